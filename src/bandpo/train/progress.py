"""What a training run records and shows: metrics.jsonl always, a short row at each log, a live bar on a terminal."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.progress import Progress as Bar
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from bandpo._system.jsonl import keep_rows
from bandpo._system.progress import Progress, bar_on
from bandpo._system.secrets import hide
from bandpo.train.pace import Pace, clock_time

_SHOWN: tuple[tuple[str, str, str], ...] = (
    ("reward", "reward", ".3f"),
    ("rewards/accuracies", "preferred right", ".3f"),
    ("rewards/margins", "margin", ".3f"),
    ("entropy", "entropy", ".3f"),
    ("clip_ratio/region_mean", "clipped", ".3f"),
    ("band/divergence_mean", "div/radius", ".3f"),
    ("completions/mean_length", "length", ".1f"),
    ("kl", "kl", ".3g"),
    ("grad_norm", "grad", ".2g"),
    ("learning_rate", "lr", ".2g"),
)
"""The metrics in the row that is shown at each log, as far as a run has them: key, short name, format."""

_BEGINNING = re.compile(rb'\{"step": (\d{1,15}), ')


_SPEED = "tokens_per_second"
"""The speed of the session so far, in timings.jsonl."""


def shown_row(values: Mapping[str, Any], shown: Iterable[tuple[str, str, str]] = _SHOWN) -> str:
    """A row with the most important metrics.

    Args:
        values: The metrics of a log.
        shown: Key, short name and format of each metric, in their order; those that the log lacks are left out.

    Examples:
        >>> shown_row({"reward": 0.25, "learning_rate": 4e-4, "ratio/mean": 1.0})
        'reward 0.250  lr 0.0004'
    """
    return "  ".join(f"{name} {values[key]:{form}}" for key, name, form in shown if values.get(key) is not None)


def _steps_of_rollout(args: Any) -> int:
    """Optimiser steps for each rollout; 1 for a trainer that samples nothing."""
    uses = (getattr(args, "steps_per_generation", None) or 0) * (getattr(args, "num_iterations", None) or 0)
    return max(1, round(uses / args.gradient_accumulation_steps)) if uses else 1


def is_timing(name: str) -> bool:
    """Whether a metric is a time or a speed, which differs between runs of the same seed.

    Args:
        name: Name of the metric.
    """
    return name.endswith(("_time", "_runtime", "_per_second"))


class TrainingProgress(TrainerCallback):
    """Writes the trainer's logs to files and shows the important metrics.

    There are two files, so that the first one is the same for the same seed: metrics.jsonl holds what the run did, and
    timings.jsonl how long it took. The summary at the end of training covers this session only, and is written to the timings.
    The last step is logged whatever `logging_steps` is. If a session ends early, what was measured since the last log is
    written as a row marked `unfinished`; a session that resumes from a checkpoint replaces that row.

    Args:
        progress: Prints the messages.
        folder: Folder of the run.
    """

    def __init__(self, progress: Progress, folder: Path) -> None:
        self.progress = progress
        self.metrics, self.timings = folder / "metrics.jsonl", folder / "timings.jsonl"
        self.bar: Bar | None = None
        self.pace: Pace | None = None
        self.said = False
        """Whether a line about the time was printed."""
        self.unfinished = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        for path in (self.metrics, self.timings):  # a resumed run repeats the steps after its checkpoint
            path.touch()
            step = state.global_step
            keep_rows(path, lambda row: _is_kept(row, step), sure=lambda line: _is_surely_kept(line, step))  # noqa: B023
        tokens = getattr(state, "num_input_tokens_seen", 0)
        self.pace = Pace(state.max_steps, state.global_step, cycle=_steps_of_rollout(args), tokens=tokens)
        self.said = False
        if self.progress.console.is_terminal:
            self.bar = bar_on(self.progress.console)
            self.bar.add_task("training", total=state.max_steps, completed=state.global_step, left="")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps or control.should_training_stop
        if last and args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log = True
        if not state.is_world_process_zero or self.pace is None:
            return
        self.pace.step(state.global_step, state.num_input_tokens_seen)
        if self.bar is not None:
            speed = self.pace.tokens_per_second
            left = f"{clock_time(self.pace.left or 0)} left{'' if speed is None else f'  {speed:,.0f} tokens/s'}"
            self.bar.update(self.bar.task_ids[0], completed=state.global_step, left=left)
        elif not self.said and not control.should_log:  # before the first log, which may be far away
            self.progress.say(f"step {state.global_step:>4}/{state.max_steps}  {self.pace.told()}")
        self.said = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        summary = "train_runtime" in logs
        tokens = getattr(state, "num_input_tokens_seen", 0)
        if self.pace is not None and not tokens and logs.get("num_tokens") is not None:
            self.pace.mark(int(logs["num_tokens"]))  # TRL's trainer of pairs counts here alone
        speed = None if self.pace is None or summary else self.pace.tokens_per_second
        timings = {name for name in logs if summary or is_timing(name)}
        self._append(self.metrics, state.global_step, {n: x for n, x in logs.items() if n not in timings})
        measured = {n: x for n, x in logs.items() if n in timings}
        self._append(self.timings, state.global_step, measured | ({} if speed is None else {_SPEED: round(speed, 1)}))
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)
        if not summary and (row := shown_row(logs)):
            parts = [row, *([] if speed is None else [f"{speed:,.0f} tokens/s"])]
            if self.pace is not None and self.pace.left is not None:
                parts.append(self.pace.told())
            self.progress.say(f"step {state.global_step:>4}/{state.max_steps}  {'  '.join(parts)}")

    def forget_after(self, step: int) -> None:
        """Remove the rows of later steps from the files, for a run that ends at an earlier checkpoint than it had reached.

        Args:
            step: The step of the checkpoint.
        """
        for path in (self.metrics, self.timings):
            keep_rows(path, lambda row: row.get("step", 0) <= step, sure=lambda _: False)

    def log_unfinished(self, trainer: Any) -> None:
        """Write what a trainer has measured since its last log, when it was interrupted or failed and logs no more.

        With several processes nothing is written: a log needs all of them, and the others may have ended.

        Args:
            trainer: Trainer of TRL.
        """
        self.stop()
        if trainer.accelerator.num_processes > 1 or not trainer._metrics["train"]:
            return
        self.unfinished = True
        self.pace = None
        trainer.model.train()  # TRL collects the measurements of training and of evaluation separately
        with suppress(Exception):  # the error that ended the run is reported, not a second one from here
            trainer.log({})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar off the terminal, also when the training ends by an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _append(self, path: Path, step: int, values: dict[str, Any]) -> None:
        if values:
            mark = {"unfinished": True} if self.unfinished else {}
            with path.open("a") as file:
                file.write(hide(json.dumps({"step": step, **values, **mark})) + "\n")


class RoundsProgress(TrainerCallback):
    """Shows which round a run in rounds is in, what it does there, and how long the rest will take.

    Args:
        progress: Prints the messages.
        rounds: Number of rounds of the run.
    """

    def __init__(self, progress: Progress, rounds: int) -> None:
        self.progress, self.rounds = progress, rounds
        self.pace: Pace | None = None
        self.bar: Bar | None = None
        self.begun_with = 0
        self.tokens = 0

    def doing(self, number: int, what: str) -> None:
        """Show what the run does now; without a terminal, in the first round of a session alone.

        Args:
            number: Number of the round, from 1.
            what: What it does.
        """
        if self.pace is None:
            self.pace, self.begun_with = Pace(self.rounds, number - 1), number
            if self.progress.console.is_terminal:
                self.bar = bar_on(self.progress.console)
                self.bar.add_task("rounds", total=self.rounds, completed=number - 1, left="")
                self.bar.start()
        if self.bar is not None:
            self._show(what)
        elif number == self.begun_with:
            self.progress.say(f"round {number:>3}/{self.rounds}  {what}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self._show(f"fitting, step {state.global_step}/{state.max_steps}")

    def done(self, number: int, row: str, tokens: int) -> None:
        """Print the row of a round that has ended.

        Args:
            number: Number of the round, from 1.
            row: The metrics of the round.
            tokens: Number of tokens that were sampled in it.
        """
        assert self.pace is not None
        self.tokens += tokens
        self.pace.step(number, self.tokens)
        speed = self.pace.tokens_per_second
        parts = [row, *([] if speed is None else [f"{speed:,.0f} tokens/s"]), self.pace.told()]
        self.progress.say(f"round {number:>3}/{self.rounds}  {'  '.join(parts)}")
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=number)

    def stop(self) -> None:
        """Take the bar off the terminal."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _show(self, what: str) -> None:
        assert self.bar is not None and self.pace is not None
        left = self.pace.left
        text = what if left is None else f"{clock_time(left)} left  {what}"
        self.bar.update(self.bar.task_ids[0], left=text)


def counting(reward: Callable[..., Any], advance: Callable[[int], object]) -> Callable[..., Any]:
    """A reward function that tells how many completions it has scored.

    Args:
        reward: Reward function with TRL's signature.
        advance: Called with the number of completions of each call, after it.

    Returns:
        The reward function.
    """

    def scored(prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        found = reward(prompts, completions, **columns)
        advance(len(completions))
        return found

    return scored


def _is_surely_kept(line: bytes, step: int) -> bool:
    """`_is_kept` of a line as `_append` writes it, without parsing it; False where that cannot be told.

    Lines that were torn, or joined with another one, are parsed, and so refused.
    """
    found = _BEGINNING.match(line)
    return (
        found is not None
        and int(found[1]) <= step
        and line.endswith(b"}")
        and line.count(b"{") == 1
        and b"\0" not in line
        and b'"train_runtime"' not in line
        and b'"unfinished"' not in line
    )


def _is_kept(row: dict[str, Any], step: int) -> bool:
    """Whether a row is kept when a run resumes from a checkpoint of this step."""
    number = row.get("step")
    whole = isinstance(number, int | float) and number <= step
    return whole and "train_runtime" not in row and "unfinished" not in row
