"""Where prompts and rewards come from: a built-in task, or any Hugging Face dataset with a reward."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from trl.rewards import accuracy_reward

from bandpo.lab.tasks import TASKS, make_splits, score

RewardFunction = Callable[..., list[float | None]]
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_task(task: str, evaluation: int) -> tuple[Dataset, Dataset]:
    """Train and held-out prompts of a built-in task."""
    train, held_out = make_splits(TASKS[task], evaluation=evaluation)
    return Dataset.from_list(train), Dataset.from_list(held_out)


def load_prompts(
    name: str,
    *,
    config: str | None,
    split: str,
    prompt_column: str,
    answer_column: str,
    system_prompt: str | None,
    chat: bool,
) -> Dataset:
    """A Hub dataset or a local .jsonl, .json, .parquet or .csv file, with the columns "prompt" and "answer".

    Args:
        name: Hub name or file.
        config: Configuration of a Hub dataset.
        split: Split of a Hub dataset.
        prompt_column: Column with the prompt: text, or a list of messages.
        answer_column: Column with the reference answer.
        system_prompt: Put before text prompts.
        chat: Turn text prompts into messages, for models with a chat template.

    Raises:
        FileNotFoundError: If `name` looks like a file and is none.
        ValueError: If a column is missing, or a row lacks a prompt; the message counts them.
    """
    data = _read(name, config, split)
    for option, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if column not in data.column_names:
            raise ValueError(
                f"dataset {name!r} has no column {column!r}; set {option} to one of {', '.join(data.column_names)}"
            )
    empty = [i for i, prompt in enumerate(data[prompt_column]) if not prompt]
    if empty:
        raise ValueError(f"dataset {name!r}: {len(empty)} rows have no {prompt_column!r}, the first is row {empty[0]}")
    for old, new in ((prompt_column, "prompt"), (answer_column, "answer")):
        if old != new:
            data = data.rename_column(old, new)

    def as_messages(row: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(row["prompt"], str):
            return {"prompt": row["prompt"]}
        if not chat:
            return {"prompt": f"{system_prompt}\n\n{row['prompt']}" if system_prompt else row["prompt"]}
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return {"prompt": [*system, {"role": "user", "content": row["prompt"]}]}

    return data.map(as_messages)


def load_pairs(name: str, *, split: str) -> Dataset:
    """A dataset of pairs, in TRL's preference format: "chosen" and "rejected", with "prompt" or with it inside of both.

    Args:
        name: Hub name or file.
        split: Split of a Hub dataset.

    Raises:
        FileNotFoundError: If `name` looks like a file and is none.
        ValueError: If a column is missing, or a row lacks a completion; the message counts them.
    """
    data = _read(name, None, split)
    for column in ("chosen", "rejected"):
        if column not in data.column_names:
            raise ValueError(f"pairs {name!r} have no column {column!r}, only {', '.join(data.column_names)}")
        empty = [i for i, value in enumerate(data[column]) if not value]
        if empty:
            raise ValueError(f"pairs {name!r}: {len(empty)} rows have no {column!r}, the first is row {empty[0]}")
    return data


def _read(name: str, config: str | None, split: str) -> Dataset:
    suffix = Path(name).suffix
    if suffix not in _READERS:
        return datasets.load_dataset(name, config, split=split)
    if not Path(name).exists():
        raise FileNotFoundError(f"dataset {name!r}: no such file")
    return datasets.load_dataset(_READERS[suffix], data_files=name, split="train")


def split_prompts(data: Dataset, evaluation: int, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out prompts for evaluation; equal prompts stay on one side.

    Raises:
        ValueError: If fewer prompts than that would be left to train on.
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(data["prompt"]):
        groups.setdefault(str(prompt), []).append(i)
    if len(groups) <= evaluation:
        raise ValueError(
            f"the dataset has {len(groups)} different prompts; holding out {evaluation} leaves none to train on"
        )
    order = Dataset.from_dict({"prompt": list(groups)}).shuffle(seed=seed)["prompt"]
    held_out = [groups[p][0] for p in order[:evaluation]]
    train = [i for p in order[evaluation:] for i in groups[p]]
    return data.select(sorted(train)), data.select(held_out)


def get_reward(name: str) -> RewardFunction:
    """The reward behind a task's name, "math" (math-verify on the column "answer") or "package.module:NAME".

    A reward function has TRL's signature, `f(prompts, completions, **columns) -> list of floats`.

    Raises:
        ValueError: If there is none of that name.
    """
    if name in TASKS:
        return _task_reward(name)
    if name == "math":
        return math_reward
    if ":" not in name:
        raise ValueError(
            f"reward {name!r} is unknown: use 'math', a task ({', '.join(TASKS)}) or 'package.module:NAME'"
        )
    module, _, attribute = name.partition(":")
    try:
        reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} could not be imported: {error}") from error
    if not callable(reward):
        raise ValueError(f"reward {name!r} must be a function, got {reward!r}")
    return reward


def math_reward(prompts: list[Any], completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
    r"""1 where math-verify finds the completion equal to the answer, else 0; None where it cannot read the answer.

    Examples:
        >>> math_reward(["1/2+1/2"], [r"It is $\boxed{1}$"], ["$1$"])
        [1.0]
    """
    return accuracy_reward(
        [[{"role": "assistant", "content": text_of(c)}] for c in completions], [str(a) for a in answer]
    )


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or of its messages.

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
