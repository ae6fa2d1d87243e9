"""`bandpo check-reward`: the rewards of a run on the reference answers themselves, before anything is trained."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from datasets import Dataset

from bandpo._system.errors import exits_are_errors, printable
from bandpo._system.progress import quiet_hosts
from bandpo.train.answers import reference
from bandpo.train.config import MATH, RunConfig, read, run_keys
from bandpo.train.data import load_prompts
from bandpo.train.options import declared_in, load_table
from bandpo.train.rewards import CheckedReward, checked_rewards
from bandpo.train.verification import unreadable

_WIDTH = 60  # characters of an answer in a line
_SHOWN = 5  # lines of each kind


@dataclass(frozen=True)
class Checked:
    """What a reward gives for the reference answers.

    Args:
        name: Name of the reward.
        scores: Score of each row's own answer as a completion; None where it is unscored.
        unread: Rows whose reference cannot be read by a math reward, so that no completion would get a score.
        failed: Calls for one row that raised or hung.
    """

    name: str
    scores: list[float | None]
    unread: list[int]
    failed: int

    @property
    def is_fine(self) -> bool:
        """Whether every row has a score, and for a math reward a score of 1."""
        return None not in self.scores and (self.name not in MATH or set(self.scores) <= {1.0})


def check_reward(options: argparse.Namespace) -> int:
    """Score the first rows' own answers with each reward, and print what would be unscored.

    Args:
        options: The options of `bandpo check-reward`.

    Returns:
        Exit status: 0 if all is fine; 1 if a row is unscored, or a math reward does not accept a row's own answer.

    Raises:
        ValueError: If a name is unknown, or the dataset cannot be read.
    """
    quiet_hosts()
    run = _run_of(options)
    assert run.dataset is not None
    data = load_prompts(
        run.dataset,
        config=run.dataset_config,
        split=run.dataset_split,
        prompt_column=run.prompt_column,
        answer_column=run.answer_column,
        system_prompt=None,
        chat=options.messages,
        skip_bad=run.bad_rows == "skip",
    )
    rows = data.select(range(min(options.rows, len(data))))
    with exits_are_errors():
        rewards = checked_rewards(run, folder=None, say=print)
        found = [checked_answers(reward, rows, run) for reward in rewards]
    for each in found:
        told_answers(each, rows, print)
    return 0 if all(each.is_fine for each in found) else 1


def _run_of(options: argparse.Namespace) -> RunConfig:
    """The settings of the file, with those of the command line."""
    given: dict[str, Any] = {}
    if options.config is not None:  # its names are checked as for a run
        table = load_table()
        given = read(["--config", options.config], lambda method: declared_in(table, method)).given
    settings = {name: value for name, value in given.items() if name in run_keys()}
    named = {name: value for name, value in vars(options).items() if name in run_keys() and value is not None}
    run: dict[str, Any] = {**settings, **named, "method": "grpo", "pairs": None, "reward_errors": "skip"}
    if run.get("dataset") is None:
        raise ValueError("nothing to check: name a dataset with --dataset or in the file of --config")
    run |= {"model": run.get("model") or "none", "lora_rank": 0}
    return RunConfig(**run)


def checked_answers(reward: CheckedReward, rows: Dataset, run: RunConfig) -> Checked:
    """What a reward gives for the reference answers of rows, as if they were completions.

    Args:
        reward: The reward.
        rows: Rows with the columns "prompt" and "answer".
        run: Configuration of the run, whose rewards see the same completions.
    """
    boxed = not MATH.isdisjoint(run.rewards)
    answers = _column(rows, "answer")
    texts = [_in_box(answer) if boxed else str(answer) for answer in answers]
    is_chat = not isinstance(rows["prompt"][0], str)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if is_chat else texts
    columns = {name: _column(rows, name) for name in rows.column_names if name != "prompt"}
    scores = reward(_column(rows, "prompt"), completions, **columns)
    return Checked(reward.name, scores, unreadable(answers) if reward.name in MATH else [], reward.failed)


def _column(rows: Dataset, name: str) -> list[Any]:
    return list(cast("Iterable[Any]", rows[name]))


def _in_box(answer: Any) -> str:
    """A reference as a completion for a math reward: its mathematics in a box, or behind the words "the answer is"."""
    latex = reference(answer)
    if latex is None or "\\boxed" in latex:
        return latex or str(answer)
    if latex.startswith("$") and latex.endswith("$") and latex.count("$") == 2:
        return rf"\boxed{{{latex[1:-1]}}}"
    return f"The answer is {latex}"


def told_answers(found: Checked, rows: Dataset, say: Callable[[str], object]) -> None:
    """Tell the distribution of the scores, and the first rows of each kind that needs a look.

    Args:
        found: What a reward gives for the reference answers.
        rows: The rows.
        say: Prints a line; the first one begins with "ok" or "!!".
    """
    scored = [s for s in found.scores if s is not None]
    values = ", ".join(f"{scored.count(v)} score {v:g}" for v in sorted(set(scored), reverse=True)[:_SHOWN])
    more = f", and {len(set(scored)) - _SHOWN} other values" if len(set(scored)) > _SHOWN else ""
    missing = len(found.scores) - len(scored)
    failed = f" ({found.failed} of them because the function raised or hung)" if found.failed else ""
    say(
        f"{'ok' if found.is_fine else '!!'} reward {found.name}: of the {len(found.scores)} first rows' own answers "
        f"{values or 'none has a score'}{more}{f', {missing} unscored{failed}' if missing else ''}"
    )
    for i in found.unread[:_SHOWN]:
        say(
            f"     row {i + 1}: the reference {_short(rows[i]['answer'])} cannot be read; no completion would get a score"
        )
    others = [
        i
        for i, s in enumerate(found.scores)
        if i not in found.unread and (s is None or (found.name in MATH and s != 1))
    ]
    for i in others[:_SHOWN]:
        score = "no score" if found.scores[i] is None else f"{found.scores[i]:g}"
        say(f"     row {i + 1}: {_short(rows[i]['answer'])} as a completion gets {score}")
    hidden = max(0, len(found.unread) - _SHOWN) + max(0, len(others) - _SHOWN)
    if hidden:
        say(f"     and {hidden} more rows")


def _short(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
