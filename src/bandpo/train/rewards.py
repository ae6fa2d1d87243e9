"""Rewards by name, and what happens when a reward function raises, hangs or returns no number."""

import faulthandler
import inspect
import itertools
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from bandpo._system.errors import LINES, RunError, Terminated, place_of, printable, what_happened
from bandpo._system.files import write_jsonl
from bandpo._system.imports import UnknownNameError, imported
from bandpo._system.secrets import redact_text
from bandpo.toy.tasks import TASKS, score
from bandpo.train.config import MATH, RunConfig
from bandpo.train.verification import verify_all

RewardFunction = Callable[..., list[float | None]]

_LARGEST = 1e18
"""Largest absolute value of a reward: advantages are computed from squares in float32, whose largest number is 3e38."""


class RewardError(RunError):
    """A reward function failed; the samples of the call are written to a file."""


class _Failure(Exception):
    """One call of the function failed."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class CheckedReward:
    """A reward function whose failures are reported, counted and never taken for a score.

    A reward of None, NaN, infinity or beyond ±1e18, whose square float32 cannot hold, counts as unscored: TRL leaves such a
    sample out of its group and gives it no advantage. Everything that the function raises is a failure, also `SystemExit` and
    `KeyboardInterrupt`; only a Ctrl-C that the user pressed, or SIGTERM, interrupts the
    run.

    Args:
        function: Reward function with TRL's signature, `f(prompts, completions, **columns) -> list of floats`.
        name: Name for messages.
        limit: Seconds for one call, None for no limit. A call that takes longer is interrupted, see `time_limit`.
        errors: "stop" ends the run at the first call that raises or takes too long; "skip" scores the samples of that call one
            by one and counts those that fail as unscored.
        folder: Folder in which the samples of a failed call are written to failed_reward.jsonl, with the traceback.
        say: Prints a message.

    Raises:
        ValueError: If the function is async.
    """

    def __init__(
        self,
        function: RewardFunction,
        name: str,
        *,
        limit: float | None = None,
        errors: str = "stop",
        folder: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        if inspect.iscoroutinefunction(function):
            raise ValueError(f"reward {name!r} is async; write a plain function (it may run asyncio inside)")
        self.function, self.name, self.limit, self.errors = function, name, limit, errors
        self.folder, self.say = folder, say
        self.__name__ = getattr(function, "__name__", name)
        self.scored = self.unscored = self.failed = 0

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        failed = self.failed
        try:
            values = self._once(prompts, completions, columns)
        except _Failure as failure:
            values = self._failed(failure.error, prompts, completions, columns)
        missing = values.count(None)
        if missing and not self.unscored:
            self.say(
                f"reward {self.name!r} left {missing} of {len(values)} samples unscored; they are counted, and this reward "
                "teaches nothing about them"
            )
        self.scored, self.unscored = self.scored + len(values) - missing, self.unscored + missing
        if "log_metric" in columns and self.errors == "skip":  # TRL passes it in training; an evaluation has none
            columns["log_metric"]("reward/failed", float(self.failed - failed))
        return values

    def _once(self, prompts: list[Any], completions: list[Any], columns: dict[str, Any]) -> list[float | None]:
        with _noting_interrupts() as interrupts:
            try:
                with time_limit(self.limit):
                    values = self.function(prompts=prompts, completions=completions, **columns)
                    if isinstance(values, Iterator):  # a generator's code runs here, not while its numbers are checked
                        values = list(itertools.islice(cast("Iterator[Any]", values), len(completions) + 1))
            except BaseException as error:  # a user's function may raise anything
                if isinstance(error, Terminated) or (isinstance(error, KeyboardInterrupt) and interrupts):
                    raise
                raise _Failure(error) from error
        return self._numbers(values, len(completions))

    def _numbers(self, values: object, count: int) -> list[float | None]:
        try:
            if isinstance(values, str | bytes | Mapping | Set):
                raise TypeError(
                    f"a {type(cast('object', values)).__name__} is no list; it must give one value for each"
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy and torch warn about float() of their scalars
                found = [_number(v) for v in cast("Iterable[Any]", values)]
        except Exception as error:  # tensors and arrays raise errors of their own types
            raise RewardError(
                f"reward {self.name!r} must return a number or None for each completion, got {_shown(values)} "
                f"({printable(str(error))[:200]})"
            ) from None
        if len(found) != count:
            raise RewardError(
                f"reward {self.name!r} returned {len(found)} values for {count} completions; it must give one for each"
            )
        return found

    def _failed(
        self, error: BaseException, prompts: list[Any], completions: list[Any], columns: dict[str, Any]
    ) -> list[float | None]:
        late = isinstance(error, RewardTimeout)
        what = f"took over {self.limit:g} s" if late else redact_text(what_happened(error))
        where = redact_text(_traceback(error))
        kept = self._keep(prompts, completions, what, where)
        if self.errors != "skip":
            raise RewardError(
                f"reward {self.name!r} {what} on {len(completions)} completions{kept}, at {place_of(error)}. Correct it and "
                f"resume with --resume_from_checkpoint latest, or set reward_errors: skip to leave such samples out\n{where}"
            ) from error
        if not self.failed:
            self.say(
                f"reward {self.name!r} {what}{kept}; its samples are scored one by one, those that fail are left out\n{where}"
            )
        return self._one_by_one(prompts, completions, columns)

    def _one_by_one(self, prompts: list[Any], completions: list[Any], columns: dict[str, Any]) -> list[float | None]:
        """The scores of the samples of a failed call, None for those that fail again."""
        values: list[float | None] = []
        for i in range(len(completions)):
            own = {name: _part(column, i, len(completions)) for name, column in columns.items()}
            try:
                values += self._once(prompts[i : i + 1], completions[i : i + 1], own)
            except _Failure:
                values.append(None)
                self.failed += 1
        return values

    def _keep(self, prompts: list[Any], completions: list[Any], what: str, where: str) -> str:
        if self.folder is None or not self.folder.is_dir():
            return ""
        path = self.folder / "failed_reward.jsonl"
        samples = zip(prompts, completions, strict=True)
        write_jsonl(path, ({"error": what, "prompt": p, "completion": c, "traceback": where} for p, c in samples))
        return f" (kept in {path})"


def _part(column: Any, i: int, count: int) -> Any:
    """The value of one sample as a list; a column that is no list over the samples is passed as it is."""
    if not isinstance(column, list):
        return column
    values = cast("list[Any]", column)
    return values[i : i + 1] if len(values) == count else values


def _number(value: Any) -> float | None:
    """A reward as a float, None where nothing can be learned from it."""
    if value is None:
        return None
    if isinstance(value, str | bytes):
        raise TypeError(f"{_shown(value)} is text")
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= _LARGEST else None  # the comparison is false for NaN


def _shown(value: Any) -> str:
    """The start of a value, for a message."""
    try:
        return repr(printable(str(value)[:80]))
    except Exception:  # the class of a user may raise in __str__
        return f"an object of type {type(value).__name__}"


def _traceback(error: BaseException) -> str:
    """The traceback as Python prints it, from the first frame that is not in this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    try:
        lines = traceback.format_exception(type(error), error, frames)
    except Exception:  # the class of a user may raise in __str__
        lines = traceback.format_tb(frames)
    return printable("".join(lines).rstrip()[-8000:], keep=LINES)


@contextmanager
def _noting_interrupts() -> Generator[list[int]]:
    """The signals of Ctrl-C during this block: a function can raise KeyboardInterrupt without one."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield pressed  # other threads get no signals, and a handler that is not Python's cannot be called from here
        return

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class RewardTimeout(Exception):
    """Raised inside a reward function that takes too long."""


@contextmanager
def time_limit(seconds: float | None, grace: float = 10.0) -> Generator[None]:
    """Raise `RewardTimeout` in this block after some seconds, or end the process if the block cannot be interrupted.

    Python handles signals in its main thread, between instructions. A block in another thread, or in a C function that does not
    return (a regular expression that backtracks for years), cannot be interrupted; then faulthandler writes "Timeout" and the
    stack of every thread to stderr, and ends the process with status 1. The signal is SIGUSR1, since math-verify and other
    libraries use SIGALRM for limits of their own.

    Args:
        seconds: Time limit in seconds; None for no limit.
        grace: Seconds between the signal and the end of the process.

    Yields:
        Once, for the block that is limited.
    """
    if seconds is None:
        yield
        return
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGUSR1")
    here, done = threading.get_ident(), threading.Event()

    def stop(*_: Any) -> None:
        if not done.is_set():
            raise RewardTimeout

    def watch() -> None:
        if not done.wait(seconds):
            signal.pthread_kill(here, signal.SIGUSR1)

    if sys.__stderr__ is not None:  # its thread needs no lock of Python, which re does not release
        faulthandler.dump_traceback_later(seconds + grace, exit=True, file=sys.__stderr__)
    before = signal.signal(signal.SIGUSR1, stop) if main else None
    watcher = threading.Thread(target=watch, daemon=True)
    if main:
        watcher.start()
    try:
        yield
    finally:
        done.set()
        faulthandler.cancel_dump_traceback_later()
        if main:
            watcher.join()
            signal.signal(signal.SIGUSR1, before)


def get_reward(name: str, *, workers: int | None = None) -> RewardFunction:
    """The reward function of a name. It has TRL's signature, `f(prompts, completions, **columns) -> list of floats`.

    Args:
        name: Name of a task, "math" or "math-lenient" (math-verify on the column "answer"), or "package.module:NAME", whose
            module is imported.
        workers: Number of processes of the math rewards; None for this process's share of the CPUs.

    Raises:
        ValueError: If there is no reward of that name, or it has no processes to number.
    """
    if workers is not None and name not in MATH:
        raise ValueError(f"reward_workers={workers} would be ignored: reward {name!r} runs in the process of the run")
    if name in TASKS:
        return _task_reward(name)
    if name in MATH:
        return _math_reward_of(name, workers)
    if ":" not in name:
        raise ValueError(
            f"reward {name!r} is unknown: use 'math', 'math-lenient', a task ({', '.join(TASKS)}) or 'package.module:NAME'"
        )
    try:
        reward = imported(name)
    except KeyboardInterrupt:
        raise
    except UnknownNameError as error:
        raise ValueError(f"reward {name!r} could not be imported: {error}") from error
    except BaseException as error:  # the code of the module runs, and may raise anything
        raise ValueError(f"reward {name!r} could not be imported: its module {what_happened(error)}") from error
    if not callable(reward):
        raise ValueError(f"reward {name!r} must be a function, got {reward!r}")
    return cast("RewardFunction", reward)


def math_reward(prompts: list[Any], completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    r"""1 where math-verify finds the completion's last box equal to the answer, else 0; None where it could not tell.

    None means that the answer cannot be read, that math-verify raised, or that it took over ten seconds. It runs in processes
    of its own, so that the limit holds in every thread. `bandpo.train.answers` says what is read from a completion and from an
    answer.

    Args:
        prompts: Prompts, not used.
        completions: Completions, text or messages.
        answer: Reference answer of each completion.
        **_: Further columns, not used.

    Examples:
        >>> math_reward(["1/2+1/2", ""], [r"It is $\boxed{1}$", r"\boxed{2}"], ["1", r"2\sqrt{3}"])
        [1.0, 0.0]
    """
    return verify_all([(text_of(c), a) for c, a in zip(completions, answer, strict=True)])


def _math_reward_of(name: str, workers: int | None) -> RewardFunction:
    lenient = name == "math-lenient"

    def reward(prompts: list[Any], completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
        pairs = [(text_of(c), a) for c, a in zip(completions, answer, strict=True)]
        return verify_all(pairs, workers=workers, lenient=lenient)

    reward.__name__ = name.replace("-", "_") if lenient else math_reward.__name__
    return reward


def text_of(completion: Any) -> str:
    """The text of a completion, which is a text or a list of messages.

    Args:
        completion: Text or messages.

    Examples:
        >>> text_of([{"role": "assistant", "content": "7"}])
        '7'
    """
    return completion if isinstance(completion, str) else "".join(str(message["content"]) for message in completion)


def _task_reward(task: str) -> RewardFunction:
    def reward(prompts: list[str], completions: list[str], metadata: list[str], **_: Any) -> list[float | None]:
        return [score(task, text_of(c), m) for c, m in zip(completions, metadata, strict=True)]

    reward.__name__ = task
    return reward


def checked_rewards(run: RunConfig, *, folder: Path | None, say: Callable[[str], None]) -> list[CheckedReward]:
    """The reward functions of a run, each with a name of its own in the log.

    Args:
        run: Configuration of the run: names, time limit, what to do with errors.
        folder: Folder in which the samples of a failed call are written.
        say: Prints a message.

    Raises:
        ValueError: If there is no reward of a name.
    """
    found = [checked_reward(run, name, folder=folder, say=say) for name in run.rewards]
    names = [reward.__name__ for reward in found]
    for reward in found:
        if names.count(reward.__name__) > 1:  # two modules may have functions of one name
            reward.__name__ = reward.name
    return found


def checked_reward(run: RunConfig, name: str, *, folder: Path | None, say: Callable[[str], None]) -> CheckedReward:
    """One reward function of a run.

    Args:
        run: Configuration of the run: time limit, what to do with errors.
        name: Name of the reward.
        folder: Folder in which the samples of a failed call are written.
        say: Prints a message.

    Raises:
        ValueError: If there is no reward of that name.
    """
    function = get_reward(name, workers=run.reward_workers if name in MATH else None)
    return CheckedReward(function, name, limit=run.reward_timeout, errors=run.reward_errors, folder=folder, say=say)


def unscored_line(reward: CheckedReward) -> str | None:
    """A line for the end of a run about samples without a score, None if there were none.

    Args:
        reward: Reward function of the run.
    """
    if not reward.unscored:
        return None
    total = reward.scored + reward.unscored
    failed = f", {reward.failed} of them because it failed" if reward.failed else ""
    return f"reward {reward.name!r} left {reward.unscored} of {total} samples unscored{failed}"
