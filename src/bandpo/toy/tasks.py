"""Reasoning tasks, most of them from reasoning-gym: short prompts with a verifiable answer, split into two parts."""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

Row = dict[str, str]

SPLIT_SEEDS = {"train": 0, "eval": 10**8}
"""First seeds of the splits. Item i of a reasoning-gym dataset is drawn with seed + i, so they lie far apart."""

_SEED_STRIDE = 10**6  # between the first items of two seeds of a split
_SEEDS = 100  # seeds of a split, so that seed * stride stays below the next split
_HELD_OUT = 512
_CHUNK = 1000  # items that are drawn at once
_FULL_SCORE = 0.99
_SAFE_EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,64}")


@dataclass(frozen=True)
class Task:
    """A reasoning-gym generator with a compact prompt.

    Args:
        name: Name of the generator in reasoning-gym, or sums, which is made here.
        description: Description in one line, for tables.
        config: Options of the generator.
        prompt: Function that makes the compact prompt of the built-in small model from an item's metadata.
        question: Function that makes the question for a language model from an item's metadata.
        instruction: What a language model is told before the questions.
        solution: Function that makes the answer of a solved example for a language model, from an item's metadata and answer.
        answer: Function that makes the answer for the warm-up from the item's answer.
        key: Function of the metadata that is equal for two items of the same problem; the splits share no key.
        train_size: Number of training prompts: enough for the task, or as many as the generator has.
        max_completion_length: Tokens (characters) that hold every answer and the end token.
    """

    name: str
    description: str
    config: Mapping[str, Any]
    prompt: Callable[[dict[str, Any]], str]
    question: Callable[[dict[str, Any]], str]
    instruction: str
    solution: Callable[[dict[str, Any], str], str]
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
                question=lambda m: f"Make {m['target']} from {', '.join(map(str, m['numbers']))}.",
                instruction="Use each number once, with + and -.",
                solution=lambda _, a: a,
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
                question=lambda m: f"What is {m['expression']}?",
                instruction="Add.",
                solution=lambda m, a: f"{m['expression']} = {a}",
                answer=lambda a: a,
                key=lambda m: m["expression"],
                train_size=2500,
                max_completion_length=4,
            ),
            Task(
                name="sums",
                description="add or subtract two small numbers",
                config={"largest": (60, 20)},
                prompt=lambda m: f"{m['expression'].replace(' ', '')}:",
                question=lambda m: f"What is {m['expression']}?",
                instruction="Add.",
                solution=lambda m, a: f"{m['expression']} = {a}",
                answer=lambda a: a,
                key=lambda m: " ".join(sorted(m["expression"].split())),
                train_size=1200,
                max_completion_length=4,
            ),
            Task(
                name="letter_counting",
                description="count a letter in two or three words",
                config={"min_words": 2, "max_words": 3},
                prompt=lambda m: f"{m['target_letter']} {' '.join(m['span'])}:".lower(),
                question=lambda m: f"How many {m['target_letter']} are in {' '.join(m['span'])}?".lower(),
                instruction="Count.",
                solution=lambda _, a: a,
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
    """Training and held-out rows that share no problem, also not with its parts in another order where order does not matter.

    Args:
        task: The task.
        train: Number of training prompts, all different; the task's own number by default.
        evaluation: Number of held-out problems, all different. They are the first of a pool of 512 that is the same for every
            seed; no training row has a problem of the pool.
        seed: Seed of the training prompts, in `[0, 99]`.

    Returns:
        Training rows and held-out rows, with "prompt", "answer" and "metadata" (JSON for the scorer).

    Raises:
        ValueError: If a number is out of range, or the task has not enough problems.
    """
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"seed of a split must be in [0, 99], got {seed}")
    if not 1 <= evaluation <= _HELD_OUT:
        raise ValueError(f"held-out problems of task {task.name!r}: at least 1, at most {_HELD_OUT}; got {evaluation}")
    held_out = _draw(task, "eval", _HELD_OUT, 0, unique=task.key, excluded=frozenset())
    keys = frozenset(task.key(json.loads(row["metadata"])) for row in held_out)
    train = task.train_size if train is None else train
    return _draw(task, "train", train, seed, unique=task.prompt, excluded=keys), held_out[:evaluation]


def in_chat(rows: list[Row], task: Task, examples: list[Row]) -> list[dict[str, Any]]:
    """Rows whose prompt is a chat: the task's instruction, solved examples, and the question of the row.

    Args:
        rows: Rows of `make_splits`.
        task: Their task.
        examples: Rows whose questions and answers come before each question; none for a chat without examples.

    Returns:
        The rows with messages as their prompts, in the same order.
    """

    def asked(row: Row) -> dict[str, str]:
        return {"role": "user", "content": task.question(json.loads(row["metadata"]))}

    before = [{"role": "system", "content": task.instruction}]
    for row in examples:
        before += [
            asked(row),
            {"role": "assistant", "content": task.solution(json.loads(row["metadata"]), row["answer"])},
        ]
    return [{**row, "prompt": [*before, asked(row)]} for row in rows]


def _draw(
    task: Task, split: str, size: int, seed: int, *, unique: Callable[[dict[str, Any]], str], excluded: frozenset[str]
) -> list[Row]:
    """The first `size` items of a split that differ in `unique` and whose keys are not excluded."""
    if size < 1:
        raise ValueError(f"the {split} split needs at least 1 row, got {size}")
    rows: dict[str, Row] = {}
    for first in range(0, 10 * size + _CHUNK, _CHUNK):
        for i in range(_CHUNK):
            answer, text = _item(task.name, SPLIT_SEEDS[split] + seed * _SEED_STRIDE + first, i)
            metadata = json.loads(text)
            if task.key(metadata) not in excluded and unique(metadata) not in rows:
                rows[unique(metadata)] = {
                    "prompt": task.prompt(metadata),
                    "answer": task.answer(answer),
                    "metadata": text,
                }
            if len(rows) == size:
                return list(rows.values())
    raise ValueError(f"task {task.name!r} has only {len(rows)} different {split} rows; {size} were asked for")


@lru_cache(maxsize=16_384)
def _item(task: str, seed: int, i: int) -> tuple[str, str]:
    """Answer and metadata (JSON) of an item: drawn once in a process, because sympy needs half a millisecond for it."""
    item = _generator(task, seed, _CHUNK)[i]
    return item["answer"], json.dumps(item["metadata"])


@lru_cache(maxsize=100_000)
def score(task: str, completion: str, metadata: str) -> float:
    """1.0 if the completion is right according to reasoning-gym's own scorer, else 0.0.

    The scorers give small scores (0.01, 0.05) for wrong answers, raise errors for some, and evaluate expressions with sympy.
    Only a full score counts here, and only short arithmetic without powers reaches the scorer of countdown. A sum may be
    written as an equation whose left side is the question's expression, as in solved examples.

    Args:
        task: A name in `TASKS`.
        completion: The completion as text.
        metadata: Metadata of the row, as JSON.
    """
    answer, parts = stated(task, completion, metadata), json.loads(metadata)
    if task == "countdown" and (not _SAFE_EXPRESSION.fullmatch(answer) or "**" in answer or "//" in answer):
        return 0.0
    item = {"metadata": parts}
    if task != "countdown":
        item["answer"] = _oracle_answer(task, parts)
    return float(_generator(task, 0, 1).score_answer(answer, item) >= _FULL_SCORE)


def stated(task: str, completion: str, metadata: str) -> str:
    """The answer that a completion states: without blanks around it, and of a sum only what follows the question's expression.

    Args:
        task: A name in `TASKS`.
        completion: The completion as text.
        metadata: Metadata of the row, as JSON.

    Examples:
        >>> stated("sums", " 1 + 2 = 3", '{"expression": "1 + 2"}'), stated("countdown", "7-4", "{}")
        ('3', '7-4')
    """
    answer = completion.strip()
    return answer if task == "countdown" else _right_side(answer, json.loads(metadata).get("expression", ""))


def _right_side(completion: str, expression: str) -> str:
    """What a completion says the expression is equal to; the whole completion if it is no such equation."""
    left, _, right = completion.rpartition("=")
    return right.strip() if left and left.replace(" ", "") == expression.replace(" ", "") else completion


def _oracle_answer(task: str, metadata: dict[str, Any]) -> str:
    """The right answer of a task with a single one, from the item's definition."""
    if task == "letter_counting":
        return str(" ".join(metadata["span"]).lower().count(metadata["target_letter"]))
    terms = re.findall(r"[+-]?\d+", metadata["expression"].replace(" ", ""))
    return str(sum(map(int, terms)))


class _Sums:
    """Problems `a + b` and `a - b` with positive numbers up to a largest one for each, and results of at least 0.

    The digits of both numbers are drawn together in reasoning-gym's sums: those of one digit, which are few, would all be held
    out, and none would be left to train on.
    """

    def __init__(self, seed: int, largest: tuple[int, int]) -> None:
        self._seed, self._largest = seed, largest

    def __getitem__(self, i: int) -> dict[str, Any]:
        draw = random.Random(self._seed + i)
        first, second = (draw.randint(1, n) for n in self._largest)
        if draw.random() < 0.5:
            expression, answer = f"{first} + {second}", first + second
        else:
            first, second = max(first, second), min(first, second)
            expression, answer = f"{first} - {second}", first - second
        return {"answer": str(answer), "metadata": {"expression": expression}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        """1.0 for the right number, else 0.0."""
        return float(answer == entry["answer"])


@lru_cache(maxsize=8)
def _generator(task: str, seed: int, size: int) -> "ProceduralDataset | _Sums":
    if task == "sums":
        return _Sums(seed, **TASKS[task].config)
    import reasoning_gym  # two seconds, because it imports matplotlib; the names of the tasks need no generator

    return reasoning_gym.create_dataset(task, seed=seed, size=size, **TASKS[task].config)
