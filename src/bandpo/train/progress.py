"""What a run shows: a live bar on a terminal, plain lines elsewhere, and metrics.jsonl always."""

import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from bandpo._system.errors import LINES, printable
from bandpo._system.files import read_jsonl, write_jsonl
from bandpo._system.secrets import hide, redact_text

_SHOWN = {
    "reward": "reward",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clipped",
    "band/divergence_mean": "div/radius",
}


def quiet_hosts() -> None:
    """Hide what transformers and TRL say to each other; our own messages and every other warning stay."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)


class Progress:
    """Messages of the main process; the others are silent."""

    def __init__(self, *, main: bool = True) -> None:
        self.console = Console(quiet=not main, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(printable(redact_text(text), keep=LINES), markup=False)

    def table(self, title: str, evaluation: dict[str, Any]) -> None:
        """The held-out results before and after."""
        table = Table(title=title)
        table.add_column(f"{evaluation['prompts']} held-out prompts")
        for name in ("before", "after", "change"):
            table.add_column(name, justify="right")
        for name, before in evaluation["before"].items():
            after = evaluation["after"][name]
            table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
        self.console.print(table)


def is_timing(name: str) -> bool:
    """Whether a metric is about the clock: it differs from run to run, whatever the seed."""
    return name.endswith(("_time", "_runtime", "_per_second"))


class TrainingProgress(TrainerCallback):
    """Writes the trainer's logs and shows the important ones.

    Two files, so that the first is the same for the same seed: metrics.jsonl has what the run did, timings.jsonl what it took.
    The summary at the end of training is of this session alone, so it goes with the timings. The last step is logged whatever
    logging_steps is, and of a session that ends early the rows since the last log are kept, marked `unfinished`; a session that
    resumes from a checkpoint makes them again.

    Args:
        progress: For messages.
        folder: The run's.
    """

    def __init__(self, progress: Progress, folder: Path) -> None:
        self.progress = progress
        self.metrics, self.timings = folder / "metrics.jsonl", folder / "timings.jsonl"
        self.bar: RichProgress | None = None
        self.unfinished = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        for path in (self.metrics, self.timings):  # a resumed run goes over the steps after its checkpoint again
            rows = read_jsonl(path) if path.exists() else []
            write_jsonl(path, [row for row in rows if _is_kept(row, state.global_step)])
        if self.progress.console.is_terminal:
            self.bar = RichProgress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.progress.console,
            )  # fmt: skip
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
        last = "train_runtime" in logs
        timings = {name: value for name, value in logs.items() if last or is_timing(name)}
        mark = {"unfinished": True} if self.unfinished else {}
        for path, names in ((self.metrics, logs.keys() - timings.keys()), (self.timings, timings.keys())):
            if names:
                row = {"step": state.global_step, **{n: logs[n] for n in logs if n in names}, **mark}
                with path.open("a") as file:
                    file.write(hide(json.dumps(row)) + "\n")
        note = "  ".join(f"{name} {logs[key]:.3f}" for key, name in _SHOWN.items() if logs.get(key) is not None)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step, note=note)
        elif note:
            self.progress.say(f"step {state.global_step:>4}/{state.max_steps}  {note}")

    def log_unfinished(self, trainer: Any) -> None:
        """Write what a trainer has measured since its last log: it was interrupted, or failed, and no log of it comes.

        Args:
            trainer: TRL's. Of several processes nothing is asked: the others may be gone.
        """
        if trainer.accelerator.num_processes > 1 or not trainer._metrics["train"]:
            return
        self.unfinished = True
        trainer.model.train()  # TRL keeps what it measures in training and in evaluation apart
        with suppress(Exception):  # the reason why the run ends is said, and not this
            trainer.log({})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


def _is_kept(row: dict[str, Any], step: int) -> bool:
    """Whether a row is kept when a run resumes from a checkpoint of this step."""
    number = row.get("step")
    whole = isinstance(number, int | float) and number <= step
    return whole and "train_runtime" not in row and "unfinished" not in row
