"""Answers and rewards: what math reads, what a reward function returns or raises, and the folders that evaluate is given."""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from arguments import refused
from hypothesis import strategies as st

PLACE = Path(tempfile.mkdtemp(prefix="bandpo-fuzz-rewards-"))


# ---- references against boxes

integer = st.integers(-99_999, 99_999)
positive = st.integers(1, 999)


def grouped(n: int) -> str:
    return f"{n:,}"


def quotient(pair: tuple[int, int]) -> tuple[str, Fraction]:
    return rf"\frac{{{pair[0]}}}{{{pair[1]}}}", Fraction(*pair)


# a way to write it, and its exact value, so that the truth about two of them does not come from the parser
number = st.one_of(
    integer.map(lambda n: (str(n), Fraction(n))),
    integer.map(lambda n: (grouped(n), Fraction(n))),
    integer.map(lambda n: (grouped(n).replace(",", "{,}"), Fraction(n))),
    st.tuples(integer, positive).map(quotient),
    st.tuples(integer, positive).map(lambda p: (f"{p[0]}/{p[1]}", Fraction(*p))),
    st.tuples(integer, st.integers(0, 999)).map(lambda p: (f"{p[0]}.{p[1]:03d}", Fraction(f"{p[0]}.{p[1]:03d}"))),
    st.tuples(positive, st.integers(2, 6)).map(lambda p: (f"{p[0]}^{{{p[1]}}}", Fraction(p[0]) ** p[1])),
    st.integers(0, 12).map(lambda n: (f"{n}!", Fraction(math.factorial(n)))),
    st.tuples(positive, positive).map(lambda p: (rf"{p[0]} \cdot {p[1]}", Fraction(p[0] * p[1]))),
    st.tuples(positive, positive).map(lambda p: (f"{p[0]} + {p[1]}", Fraction(p[0] + p[1]))),
    positive.map(lambda n: (f"{n} apples", Fraction(n))),
    positive.map(lambda n: (rf"{n}\text{{ cm}}", Fraction(n))),
    positive.map(lambda n: (rf"\${n}", Fraction(n))),
    positive.map(lambda n: (f"x = {n}", Fraction(n))),
    positive.map(lambda n: (rf"{n}\sqrt{{4}}", Fraction(2 * n))),
)


def any_number(draw: tuple[tuple[str, Fraction], tuple[str, Fraction]]) -> str:
    """A number as a reference: itself in a box is right, another number is not, however both are written."""
    from bandpo.train.verification import verify_one

    (gold, value), (box, other) = draw
    assert verify_one(rf"so $\boxed{{{gold}}}$", gold) == 1, gold
    score = verify_one(rf"so $\boxed{{{box}}}$", gold)
    if value == other:
        assert score == 1, (gold, box)
    elif abs(value - other) > 1e-3:  # math-verify rounds decimals to six places
        assert score == 0, (gold, box)
    return "fine"


surd = st.tuples(
    positive,
    positive,
    st.sampled_from(
        [
            r"{0}\sqrt{{{1}}}",
            r"{0}+\sqrt{{{1}}}",
            r"\frac{{{0}}}{{\sqrt{{{1}}}}}",
            r"{0}\pi",
            r"{0}k+{1}",
            r"{1}k^{{3}}-{0}",
            r"({0},{1})",
            r"[{0},{1})",
            r"\{{{0},{1}\}}",
            r"{0} \text{{ and }} {1}",
            r"{0}x-{1}y=0",
            r"\begin{{pmatrix}} {0} \\ {1} \end{{pmatrix}}",
            r"x>{0}",
            r"{0}\log 3",
            r"\sin {0}x",
            r"{0}\pm {1}",
            r"{0}i+{1}",
        ]
    ),
)


def any_expression(draw: tuple[int, int, str]) -> str:
    """An expression as a reference: itself in a box is right, the numbers that stand in it are not."""
    from bandpo.train.verification import verify_all

    a, b, form = draw
    b = a + b  # the interval from a number to itself is empty
    b += math.isqrt(b) ** 2 == b  # the root of a square is a number, which may well be one of the others
    gold = form.format(a, b)
    wrong = [*{str(a), str(b), str(a + 1)}, form.format(a + 1, b)]
    right, *others = verify_all([(rf"\boxed{{{box}}}", gold) for box in (gold, *wrong)], seconds=5)
    assert right in (1, None), gold  # None: sympy took too long
    assert not any(others), (gold, wrong, others)
    return "refused" if right is None else "fine"


pieces = st.lists(
    st.one_of(
        st.sampled_from(
            [
                r"\boxed{",
                "}",
                "{",
                r"\frac",
                "12",
                "$",
                r"\text{",
                " and ",
                ",",
                "\\",
                r"\{",
                r"\}",
                "x",
                "=",
                "^",
                "_",
                r"\sqrt",
                "####",
                "answer is ",
                r"\boxed{12}",
                r"\left(",
                r"\right]",
                "%",
                "apples",
                "\n",
                "½",
                "\x00",
            ]
        ),
        st.text(max_size=6),
    ),
    max_size=12,
).map("".join)


def any_reference(text: str) -> str:
    """Whatever a dataset has as its answer: the same in a box scores 1 or nothing, and a number that is not in it never 1."""
    from bandpo.train.verification import verify_all

    same, other = verify_all([(rf"\boxed{{{text}}}", text), (r"\boxed{8128319}", text)], seconds=5)
    assert other in (0, None), text
    anchored = any(mark in text for mark in ("$", "boxed", "####", "\\(", "\\[", "answer", "Answer"))
    balanced = not any(c in text for c in "{}\\")
    assert anchored or not balanced or same in (1, None), (text, same)
    return "refused" if other is None else "fine"


def cut_off(draw: tuple[str, str, int]) -> str:
    """After a whole box a second one begins and is cut off at any place: no answer."""
    from bandpo.train.verification import verify_one

    between, inside, cut = draw
    second = r"\boxed{" + inside.replace("}", "").replace("\\", "")
    tail = second[: 2 + cut % (len(second) - 1)]
    text = r"\boxed{12}" + between.replace("\\", "").replace("{", "") + tail
    assert verify_one(text, "12") == 0, text
    return "refused"


# ---- what a reward function returns or raises

value = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.complex_numbers(),
    st.just([1.0]),
    st.just({}),
    st.floats(width=32).map(np.float32),
    st.floats(width=32).map(torch.tensor),
    st.just(np.ones(2)),
    st.just(torch.ones(2)),
    st.just(object()),
    st.fractions(),
    st.decimals(),
    st.just(np.datetime64("nat")),
    st.just(10**400),
)
returned = st.one_of(
    st.lists(value, max_size=4),
    st.lists(value, max_size=4).map(tuple),
    value,
    st.dictionaries(st.text(max_size=2), value, max_size=3),
    st.lists(st.floats(width=32), max_size=4).map(torch.tensor),
    st.lists(st.floats(), max_size=4).map(np.array),
    st.lists(value, max_size=4).map(iter),
    st.frozensets(st.floats(), max_size=3),
)
raised = st.one_of(
    st.sampled_from(
        [
            SystemExit,
            KeyboardInterrupt,
            GeneratorExit,
            ValueError,
            StopIteration,
            MemoryError,
            BaseException,
            OSError,
            RuntimeError,
        ]
    ).flatmap(lambda kind: st.one_of(st.just(kind()), st.text(max_size=8).map(kind), st.integers(0, 3).map(kind))),
    st.just(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd")),
)


def any_reward(draw: tuple[Any, BaseException | None, str]) -> str:
    """A score is a finite number that float32 can square, or None; else there is a RunError in words for a terminal."""
    from bandpo._system.errors import RunError
    from bandpo.train.rewards import CheckedReward

    values, error, errors = draw
    said: list[str] = []

    def function(**_: Any) -> Any:
        if error is not None:
            raise error
        return values

    reward = CheckedReward(function, "mine", errors=errors, say=said.append)
    found: list[float | None] = []
    try:
        found = reward(["p", "q"], ["a\x1b[2J", "b"])
    except RunError as failure:
        message = str(failure)
    else:
        message = ""
    if message:
        assert "reward 'mine'" in message and "\x1b" not in message
        return "refused"
    assert len(found) == 2
    assert all(x is None or (type(x) is float and math.isfinite(np.float32(x * x))) for x in found)
    assert reward.unscored == found.count(None) and reward.scored == 2 - reward.unscored
    assert not any("\x1b" in line for line in said)
    return "fine"


REWARDS = st.tuples(returned, st.one_of(st.none(), raised), st.sampled_from(["stop", "skip"]))


# ---- folders that evaluate is given

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.sampled_from(["fuzz_pwn:f", "os:system", "math", "countdown", "stranger/data"]),
)
_GOOD = {
    "task": "countdown",
    "eval_prompts": 4,
    "seed": 1,
    "temperature": 0.5,
    "max_completion_length": 8,
    "model": None,
}
_KEYS = [
    "task", "dataset", "eval_dataset", "dataset_config", "dataset_split", "prompt_column", "answer_column",
    "system_prompt", "reward", "bad_rows", "eval_prompts", "eval_samples", "eval_temperature", "seed", "temperature",
    "top_p", "max_completion_length", "per_device_eval_batch_size", "method", "model", "pairs", "lora_rank",
    "objective", "trust_remote_code", "reward_timeout", "unknown",
]  # fmt: skip
SETTINGS = st.dictionaries(st.sampled_from(_KEYS), odd, max_size=2).map(lambda changed: {**_GOOD, **changed})
OPTIONS = {
    "task",
    "shots",
    "dataset",
    "dataset_config",
    "dataset_split",
    "prompt_column",
    "answer_column",
    "system_prompt",
    "reward",
    "bad_rows",
    "reward_workers",
}


def any_run_folder(draw: tuple[dict[str, Any], bytes | None, str]) -> str:
    """Whatever stands in a run's configuration: a job whose parts are in range, or a refusal; no module is imported."""
    import sys

    from bandpo.train.evaluate_options import _job

    settings, raw, which = draw
    folder = PLACE / f"run-{os.getpid()}"
    (folder / "model").mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(settings, allow_unicode=True).encode("utf-8", "surrogatepass") if raw is None else raw
    (folder / "config.resolved.yaml").write_bytes(content)
    modules = set(sys.modules)
    options = argparse.Namespace(**dict.fromkeys(OPTIONS))
    found: list[Any] = []
    outcome = refused(lambda: found.append(_job(str(folder / which), options)))
    assert "fuzz_pwn" not in set(sys.modules) - modules
    for job in found:
        assert job.reward and (":" not in job.reward or job.run.task is not None)
        assert job.run.task is not None or Path(job.run.eval_dataset or job.run.dataset or "").is_file()
        assert json.dumps([job.run.eval_prompts, job.run.eval_samples, job.sampling.seed])
        assert job.run.eval_prompts >= 1 and 0 <= job.sampling.temperature < math.inf and 0 < job.sampling.top_p <= 1
    return outcome


# Inputs, check, whether every input is bad, whether it is slow; targets.py takes them.
TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], str], bool, bool]] = {
    "any number in a box": (st.tuples(number, number), any_number, False, False),
    "any expression in a box": (surd, any_expression, False, False),
    "any reference": (pieces, any_reference, False, False),
    "an answer that was cut off": (
        st.tuples(st.text(max_size=20), st.text(max_size=10), st.integers(0, 30)), cut_off, True, False,
    ),
    "any reward": (REWARDS, any_reward, False, False),
    "any folder of a run": (
        st.tuples(SETTINGS, st.one_of(st.none(), st.none(), st.binary(max_size=30)), st.sampled_from(["", "model"])),
        any_run_folder, False, False,
    ),
}  # fmt: skip
