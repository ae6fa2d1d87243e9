"""The doctor in verl: it sees each row of metrics that verl logs, and prints each warning and problem once.

verl has no callbacks. With `BANDPO_DOCTOR=1` in the environment of the training processes, the plug-in
(`bandpo.integrations.verl`) wraps `verl.utils.tracking.Tracking.log`, through which every row goes, in the process that logs.
It needs none of bandpo's losses. `BANDPO_DOCTOR=stop` ends the run at the first problem, `BANDPO_DOCTOR=stop,patience=50` waits
for 50 rows.
"""

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from bandpo._system.errors import RunError, printable
from bandpo._system.secrets import redact_text
from bandpo.monitoring.live import Doctor

VARIABLE = "BANDPO_DOCTOR"
"""The environment variable that switches the doctor on."""


def _print(text: str) -> None:
    print(text, flush=True)


def watch(tracking: type, options: str, say: Callable[[str], object] = _print) -> None:
    """Let a doctor see the rows that a logger of verl logs; each instance has its own doctor.

    Args:
        tracking: verl's `Tracking`, or a class with its method `log(data, step, ...)`. A class that is watched stays as it is.
        options: The value of `BANDPO_DOCTOR`: `1`, or `stop` and `patience=N`, separated by commas. `0` and "" leave it off.
        say: Prints a text.

    Raises:
        ValueError: If the options cannot be read.

    Examples:
        >>> class Tracking:
        ...     def log(self, data, step, backend=None):
        ...         pass
        >>> watch(Tracking, "patience=3")
        >>> logger = Tracking()
        >>> for step in range(4):
        ...     logger.log({"actor/pg_clipfrac": 0.5}, step=step)  # doctest: +ELLIPSIS
        step 2, doctor: clipping: actor/pg_clipfrac is 0.500 on average, 0.500 at most. Why: many tokens ...
    """
    found = read_options(options)
    original: Any = getattr(tracking, "log")  # noqa: B009
    if found is None or hasattr(original, "_watched"):
        return
    doctors: weakref.WeakKeyDictionary[object, Doctor] = weakref.WeakKeyDictionary()

    @functools.wraps(original)
    def log(self: Any, data: Mapping[str, Any], step: int, *args: Any, **kwargs: Any) -> Any:
        logged = original(self, data, step, *args, **kwargs)
        doctor = doctors.setdefault(self, Doctor(**found))
        for told in doctor.observe(data, step=step):
            say(printable(redact_text(str(told))))
        if doctor.should_stop:
            raise RunError(
                f"step {step}: {VARIABLE}={options} ends the run at the first problem: {doctor.told[-1].finding.rule}"
            )
        return logged

    log._watched = True  # type: ignore[attr-defined]
    tracking.log = log  # type: ignore[attr-defined]


def read_options(text: str) -> dict[str, Any] | None:
    """The options of a `Doctor` in the value of `BANDPO_DOCTOR`; None where it is off.

    Args:
        text: The value.

    Raises:
        ValueError: If it is none of those that `watch` names.

    Examples:
        >>> read_options("stop,patience=50"), read_options("1"), read_options("0")
        ({'stop': True, 'patience': 50}, {}, None)
    """
    if text.strip() in ("", "0"):
        return None
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name == "stop" and not value:
            found["stop"] = True
        elif name == "patience" and value.isdecimal() and int(value) > 0:
            found["patience"] = int(value)
        elif part.strip() != "1":
            raise ValueError(f"{VARIABLE}={text!r}: {part.strip()!r} is none of 1, stop and patience=N")
    return found
