"""What a training run records and shows: metrics.jsonl always, a live bar on a terminal, plain lines elsewhere."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from bandpo._system.jsonl import keep_rows
from bandpo._system.progress import Progress
from bandpo._system.secrets import hide

_SHOWN = {
    "reward": "reward",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clipped",
    "band/divergence_mean": "div/radius",
}
"""The metrics that are shown while a run trains, with their short names."""

_BEGINNING = re.compile(rb'\{"step": (\d{1,15}), ')


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
        if self.progress.console.is_terminal:
            self.bar = Bar(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.progress.console,
            )
            self.bar.add_task("", total=state.max_steps, completed=state.global_step, note="")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps or control.should_training_stop
        if last and args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log = True

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
        timings = {name for name in logs if summary or is_timing(name)}
        self._append(self.metrics, state.global_step, {n: x for n, x in logs.items() if n not in timings})
        self._append(self.timings, state.global_step, {n: x for n, x in logs.items() if n in timings})
        note = "  ".join(f"{name} {logs[key]:.3f}" for key, name in _SHOWN.items() if logs.get(key) is not None)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step, note=note)
        elif note:
            self.progress.say(f"step {state.global_step:>4}/{state.max_steps}  {note}")

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
        if trainer.accelerator.num_processes > 1 or not trainer._metrics["train"]:
            return
        self.unfinished = True
        trainer.model.train()  # TRL collects the measurements of training and of evaluation separately
        with suppress(Exception):  # the error that ended the run is reported, not a second one from here
            trainer.log({})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _append(self, path: Path, step: int, values: dict[str, Any]) -> None:
        if values:
            mark = {"unfinished": True} if self.unfinished else {}
            with path.open("a") as file:
                file.write(hide(json.dumps({"step": step, **values, **mark})) + "\n")


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
