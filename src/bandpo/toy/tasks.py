"""Reasoning tasks from reasoning-gym, as short prompts with a verifiable answer, split without leakage."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset

Row = dict[str, str]

# Item i of a reasoning-gym dataset is drawn with seed + i: two splits share items unless their seeds lie far apart.
SPLIT_SEEDS = {"train": 0, "eval": 10**8}
_HELD_OUT = 512
_SAFE_EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,64}")


@dataclass(frozen=True)
class Task:
    """A reasoning-gym generator with a compact prompt.

    Args:
        name: The generator in reasoning-gym.
        description: One line for tables.
        config: Its options.
        prompt: Makes the prompt from an item's metadata.
        answer: Makes the answer that the warm-up learns from the item's.
        key: What makes two items the same problem, from the metadata; splits share none.
        train_size: Training prompts to draw: enough, or what the generator has.
        max_completion_length: Tokens (characters) that hold every answer and the end mark.
    """

    name: str
    description: str
    config: Mapping[str, Any]
    prompt: Callable[[dict[str, Any]], str]
    answer: Callable[[str], str]
    key: Callable[[dict[str, Any]], str]
    train_size: int
    max_completion_length: int


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        t.name: t
        for t in (
            Task(
                name="countdown",
                description="combine three numbers by + and - to reach a target",
                config={
                    "min_numbers": 3,
                    "max_numbers": 3,
                    "min_value": 1,
                    "max_value": 15,
                    "min_target": 1,
                    "max_target": 45,
                    "operators": ("+", "-"),
                },
                prompt=lambda m: f"{','.join(map(str, m['numbers']))}={m['target']}:",
                answer=lambda a: a.replace(" ", ""),
                key=lambda m: f"{sorted(m['numbers'])}={m['target']}",
                train_size=4000,
                max_completion_length=10,
            ),
            Task(
                name="chain_sum",
                description="add and subtract three one-digit numbers",
                config={"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
                prompt=lambda m: f"{m['expression'].replace(' ', '')}:",
                answer=lambda a: a,
                key=lambda m: m["expression"],
                train_size=2500,
                max_completion_length=4,
            ),
            Task(
                name="letter_counting",
                description="count a letter in two or three words",
                config={"min_words": 2, "max_words": 3},
                prompt=lambda m: f"{m['target_letter']} {' '.join(m['span'])}:".lower(),
                answer=lambda a: a,
                key=lambda m: f"{m['target_letter']} {' '.join(m['span'])}".lower(),
                train_size=6000,
                max_completion_length=3,
            ),
        )
    }
)
"""The built-in tasks by name."""


def make_splits(
    task: Task, train: int | None = None, evaluation: int = 256, *, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Train and held-out rows that share no problem: not even one in another order, where order does not matter.

    Args:
        task: The task.
        train: Training prompts, all different; the task's own number by default.
        evaluation: Held-out problems, all different: the first of a pool of 512 that is the same for every seed and that
            no training row touches.
        seed: Of the training prompts, in `[0, 99]`.

    Returns:
        Rows with "prompt", "answer" and "metadata" (JSON, what the scorer needs).

    Raises:
        ValueError: If a number is out of range, or the task has not enough problems.
    """
    if not 0 <= seed < 100:
        raise ValueError(f"seed of a split must be in [0, 99], got {seed}")
    if not 1 <= evaluation <= _HELD_OUT:
        raise ValueError(f"held-out problems of task {task.name!r}: at least 1, at most {_HELD_OUT}; got {evaluation}")
    held_out = _draw(task, "eval", _HELD_OUT, 0, unique=task.key, excluded=frozenset())
    keys = frozenset(task.key(json.loads(row["metadata"])) for row in held_out)
    train = task.train_size if train is None else train
    return _draw(task, "train", train, seed, unique=task.prompt, excluded=keys), held_out[:evaluation]


def _draw(
    task: Task, split: str, size: int, seed: int, *, unique: Callable[[dict[str, Any]], str], excluded: frozenset[str]
) -> list[Row]:
    """The first `size` items of a split that differ in `unique` and whose key is not excluded."""
    if size < 1:
        raise ValueError(f"the {split} split needs at least 1 row, got {size}")
    rows: dict[str, Row] = {}
    chunk = 1000
    for first in range(0, 10 * size + chunk, chunk):
        for item in _generator(task.name, SPLIT_SEEDS[split] + seed * 10**6 + first, chunk):
            metadata = item["metadata"]
            if task.key(metadata) not in excluded and unique(metadata) not in rows:
                rows[unique(metadata)] = {
                    "prompt": task.prompt(metadata),
                    "answer": task.answer(item["answer"]),
                    "metadata": json.dumps(metadata),
                }
            if len(rows) == size:
                return list(rows.values())
    raise ValueError(f"task {task.name!r} has only {len(rows)} different {split} rows; {size} were asked for")


@lru_cache(maxsize=100_000)
def score(task: str, completion: str, metadata: str) -> float:
    """1 if the completion is right by reasoning-gym's own scorer, else 0.

    Scorers give crumbs (0.01, 0.05) for wrong answers, raise on some, and evaluate expressions with sympy: here only a full
    score counts, and only short arithmetic without powers reaches the one for countdown.
    """
    answer = completion.strip()
    if task == "countdown" and (not _SAFE_EXPRESSION.fullmatch(answer) or "**" in answer or "//" in answer):
        return 0.0
    item = {"metadata": json.loads(metadata)}
    if task != "countdown":
        item["answer"] = _oracle_answer(task, item["metadata"])
    return float(_generator(task, 0, 1).score_answer(answer, item) >= 0.99)


def _oracle_answer(task: str, metadata: dict[str, Any]) -> str:
    """The right answer of the tasks that have one, from the item's own definition."""
    if task == "letter_counting":
        return str(" ".join(metadata["span"]).lower().count(metadata["target_letter"]))
    terms = re.findall(r"[+-]?\d+", metadata["expression"].replace(" ", ""))
    return str(sum(map(int, terms)))


@lru_cache(maxsize=8)
def _generator(task: str, seed: int, size: int) -> ProceduralDataset:
    return reasoning_gym.create_dataset(task, seed=seed, size=size, **TASKS[task].config)
