"""`bandpo train --method dpo|chipo|online-dpo|pdfr|rebel|rdrc|rbrm`: rounds of sampling and fitting, or a dataset of pairs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PrinterCallback

from bandpo._system.files import write_jsonl
from bandpo.integrations.trl.dpo import BandDPOTrainer
from bandpo.integrations.trl.online import OnlinePreferenceConfig, OnlinePreferenceTrainer
from bandpo.plots import plot_preference
from bandpo.train.config import RunConfig
from bandpo.train.progress import Progress, TrainingProgress
from bandpo.train.rewards import RewardFunction

_SHOWN = (
    ("reward", "reward of its samples", ".3f"), ("pairs", "pairs", ".0f"), ("rewards/accuracies", "preferred right", ".3f"),
    ("concentrability/log_mean", "KL to the start", ".3f"),
    ("probe/agrees_with_reward", "probe agrees with reward", ".3f"),
)  # fmt: skip


class PreferenceRun:
    """One run of a preference method, with what the job around it needs: a model to evaluate, training, saving.

    Args:
        run: The run's config.
        args: The trainer's.
        model: A model, or where to load it from.
        tokenizer: Its tokenizer.
        prompts: To sample for; or the pairs, where the config names them.
        reward: Labels the samples.
        lora: A LoRA config, or None.
        progress: For messages.
    """

    def __init__(
        self, run: RunConfig, args: OnlinePreferenceConfig, model: Any, tokenizer: Any, prompts: Dataset,
        reward: RewardFunction, lora: Any, progress: Progress,
    ) -> None:  # fmt: skip
        self.args, self.progress, self.name = args, progress, run.method
        self.folder = Path(args.output_dir or ".")
        self.notes: list[str] = []
        if run.pairs is None:
            self.rounds = _Rounds(model, reward, args, prompts, tokenizer)
            self.rounds.progress, self.rounds.say = progress, progress.say
            return
        self.rounds = None
        self.log = TrainingProgress(progress, self.folder)
        self.pairs = BandDPOTrainer(
            model=model, args=args, train_dataset=prompts, peft_config=lora,
            processing_class=tokenizer, callbacks=[self.log],
        )  # fmt: skip
        self.pairs.remove_callback(PrinterCallback)

    @property
    def model(self) -> Any:
        """As it is now."""
        return self.rounds.model if self.rounds is not None else self.pairs.accelerator.unwrap_model(self.pairs.model)

    def train(self, resume: str | None) -> None:
        """To the end.

        Args:
            resume: A checkpoint folder; in rounds, anything that is not None continues after the last complete one.
        """
        if self.rounds is not None:
            self.rounds.train(resume=resume is not None)
            return
        try:
            self.pairs.train(resume_from_checkpoint=resume)
        except BaseException:
            self.log.log_unfinished(self.pairs)
            raise

    def save(self, folder: Path) -> None:
        """The model."""
        if self.rounds is not None:
            if PartialState().is_main_process:
                self.rounds.model.save_pretrained(folder)
        else:
            self.pairs.save_model(str(folder))

    @contextmanager
    def for_sampling(self) -> Iterator[Any]:
        """The model, ready to generate."""
        yield self.model

    def figures(self, log: list[dict[str, Any]]) -> dict[str, Figure]:
        """For the report."""
        title = "Rounds" if self.rounds is not None else "Training"
        return {title: plot_preference(log, "round" if self.rounds is not None else "step")}


class _Rounds(OnlinePreferenceTrainer):
    """Says what each round measured, and keeps metrics.jsonl."""

    progress: Progress

    def _save(self, k: int, pairs: list[dict[str, Any]], measured: dict[str, float]) -> None:
        super()._save(k, pairs, measured)
        if PartialState().is_main_process:
            rows = ({"step": i + 1, **row} for i, row in enumerate(self.history))
            write_jsonl(Path(self.args.output_dir or ".") / "metrics.jsonl", rows)
            shown = [f"{name} {measured[key]:{form}}" for key, name, form in _SHOWN if key in measured]
            self.progress.say(f"round {k + 1:>3}/{self.args.rounds}  {'  '.join(shown)}")
