"""What a run shows: a live bar on a terminal, plain lines elsewhere, and metrics.jsonl always."""

import json
import warnings
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bandpo._files import read_jsonl, write_jsonl
from bandpo._secrets import hide, redact_text

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
        self.console.print(redact_text(text), markup=False)

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
    The summary at the end of training is of this session alone, so it goes with the timings.

    Args:
        progress: For messages.
        folder: The run's.
    """

    def __init__(self, progress: Progress, folder: Path) -> None:
        self.progress = progress
        self.metrics, self.timings = folder / "metrics.jsonl", folder / "timings.jsonl"
        self.bar: RichProgress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        for path in (self.metrics, self.timings):  # a resumed run goes over the steps after its checkpoint again
            rows = read_jsonl(path) if path.exists() else []
            write_jsonl(path, [row for row in rows if row["step"] <= state.global_step and "train_runtime" not in row])
        if self.progress.console.is_terminal:
            self.bar = RichProgress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.progress.console,
            )  # fmt: skip
            self.bar.add_task("", total=state.max_steps, completed=state.global_step, note="")
            self.bar.start()

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
        for path, values in ((self.metrics, logs.keys() - timings.keys()), (self.timings, timings.keys())):
            if values:
                with path.open("a") as file:
                    row = {"step": state.global_step, **{n: logs[n] for n in logs if n in values}}
                    file.write(hide(json.dumps(row)) + "\n")
        note = "  ".join(f"{name} {logs[key]:.3f}" for key, name in _SHOWN.items() if logs.get(key) is not None)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step, note=note)
        elif note:
            self.progress.say(f"step {state.global_step:>4}/{state.max_steps}  {note}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
