"""`bandpo train` with a method that learns preferences: rounds of sampling and fitting, or a dataset of pairs."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from datasets import Dataset
from transformers import PrinterCallback

from bandpo._system.files import write_jsonl
from bandpo._system.progress import Progress
from bandpo.integrations.trl.dpo import BandDPOTrainer
from bandpo.integrations.trl.online import OnlinePreferenceConfig, OnlinePreferenceTrainer, Pair
from bandpo.preference.objectives import PairObjective
from bandpo.train.config import RunConfig
from bandpo.train.folder import HasOwnCard
from bandpo.train.progress import RoundsProgress, TrainingProgress, shown_row
from bandpo.train.rewards import RewardFunction

_SHOWN = (
    ("reward", "reward of its samples", ".3f"),
    ("pairs", "pairs", ".0f"),
    ("rewards/accuracies", "preferred right", ".3f"),
    ("concentrability/log_mean", "KL to the start", ".3f"),
    ("probe/agrees_with_reward", "probe agrees with reward", ".3f"),
)
"""The metrics that are shown after a round: key, name, format."""


class PreferenceRun:
    """One run of a preference method: the trainer, saving, and the figures.

    Args:
        run: bandpo's part of the configuration.
        args: Configuration of the trainer.
        model: A model, or the name or folder to load it from.
        tokenizer: Tokenizer of the model.
        prompts: Prompts to sample completions for; or pairs, where the configuration names them.
        reward: Reward function that labels the samples.
        lora: Configuration of LoRA, or None.
        progress: Prints messages.
    """

    def __init__(
        self,
        run: RunConfig,
        args: OnlinePreferenceConfig,
        model: Any,
        tokenizer: Any,
        prompts: Dataset,
        reward: RewardFunction,
        lora: Any,
        progress: Progress,
    ) -> None:
        self.args, self.progress, self.name = args, progress, run.method
        self.folder = Path(args.output_dir or ".")
        self.notes: list[str] = []
        self.told: list[str] = []
        self.band, self.tokens = None, dict[str, list[float]]()  # for the report: this method has no region of ratios
        if run.pairs is None:
            shown = RoundsProgress(progress, args.rounds)
            self.rounds = _Rounds(model, reward, args, prompts, tokenizer, [shown])
            self.rounds.shown, self.rounds.say = shown, progress.say
            return
        self.rounds = None
        self.log = TrainingProgress(progress, self.folder)
        self.pairs = _PairsTrainer(
            model=model,
            args=args,
            train_dataset=prompts,
            peft_config=lora,
            processing_class=tokenizer,
            callbacks=[self.log],
        )
        self.pairs.remove_callback(PrinterCallback)

    @property
    def model(self) -> Any:
        """The model with its present weights."""
        if self.rounds is not None:
            return self.rounds.model
        return cast("Any", self.pairs.accelerator.unwrap_model(self.pairs.model))

    @property
    def objective(self) -> PairObjective:
        """The objective with the options of the run."""
        return self.args.resolve()

    def writes_card(self, write: Callable[[], None]) -> None:
        """Let the trainer call a function where TRL would write its model card.

        Args:
            write: Writes the card of the run.
        """
        if self.rounds is None:  # the trainers of the rounds write none
            self.pairs.write_card = write

    @property
    def length(self) -> dict[str, Any]:
        """How long the run was, for the card of its model."""
        if self.rounds is not None:
            steps, passes = self.args.max_steps, self.args.num_train_epochs
            each = f"{steps}" if steps > 0 else f"{passes:g} passes over its pairs"
            return {"rounds": self.args.rounds, "optimiser steps of each round": each}
        return {"optimiser steps": self.pairs.state.global_step}

    def train(self, resume: str | None) -> None:
        """Train to the end.

        Args:
            resume: Folder of the checkpoint to continue from, None for a new run. A run in rounds continues after its last
                complete round, whichever folder is given.
        """
        if self.rounds is not None:
            try:
                self.rounds.train(resume=resume is not None)
            finally:
                self.rounds.shown.stop()
            return
        try:
            trained = self.pairs.train(resume_from_checkpoint=resume)
            if trained is None and self.pairs.is_world_process_zero():
                self.log.forget_after(self.pairs.state.global_step)
        except BaseException:
            self.log.log_unfinished(self.pairs)
            raise

    def save(self, folder: Path) -> None:
        """Save the model.

        Args:
            folder: Folder of the model.
        """
        if self.rounds is not None:
            if PartialState().is_main_process:
                self.rounds.model.save_pretrained(folder)
        else:
            self.pairs.save_model(str(folder))

    @contextmanager
    def for_sampling(self) -> Generator[Any]:
        """The model, ready to generate."""
        yield self.model


class _PairsTrainer(HasOwnCard, BandDPOTrainer):
    pass


class _Rounds(OnlinePreferenceTrainer):
    """Prints what each round measured, and writes metrics.jsonl."""

    shown: RoundsProgress

    def _make_pairs(self, k: int) -> tuple[list[Pair], dict[str, float]]:
        args = self.args
        samples = f"sampling {args.samples_per_prompt} completions of {args.prompts_per_round} prompts"
        self.shown.doing(k + 1, samples if k == 0 or args.resample else "scoring the samples of the first round")
        return super()._make_pairs(k)

    def _fit(self, rows: list[Pair], k: int) -> None:
        self.shown.doing(k + 1, f"fitting {len(rows)} pairs")
        super()._fit(rows, k)

    def _save(self, k: int, pairs: list[Pair], measured: dict[str, float]) -> None:
        super()._save(k, pairs, measured)
        if PartialState().is_main_process:
            rows = ({"step": i + 1, **row} for i, row in enumerate(self.history))
            write_jsonl(Path(self.args.output_dir or ".") / "metrics.jsonl", rows)
            self.shown.done(k + 1, shown_row(self.history[-1], _SHOWN), int(measured["generated_tokens"]))
