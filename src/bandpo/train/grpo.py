"""`bandpo train` with a policy-gradient objective: BandPO and the zoo."""

import random
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from transformers import PrinterCallback
from trl.models.utils import unwrap_model_for_generation  # pyright: ignore[reportUnknownVariableType]

from bandpo._system.progress import Progress
from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.plots import plot_bounds, plot_clip_by_probability, plot_training
from bandpo.plots.curves import Curves
from bandpo.terms import TokenObjective
from bandpo.train.folder import HidesSecretsInCard
from bandpo.train.progress import TrainingProgress
from bandpo.train.rewards import RewardFunction

_TOKENS_KEPT = 4000
"""Tokens of the last rollouts that the figure of the band shows."""
_TOKENS_PER_BATCH = _TOKENS_KEPT // 40
"""Tokens that are drawn from one batch, so that those of the last 40 batches are shown."""


class GRPORun:
    """One run of a policy-gradient objective: the trainer, saving, and the figures.

    Args:
        args: Configuration of the trainer.
        model: A model, or the name or folder to load it from.
        tokenizer: Tokenizer of the model.
        prompts: Prompts to sample completions for.
        reward: Reward function of the samples.
        lora: Configuration of LoRA, or None.
        progress: Prints messages.
    """

    def __init__(
        self,
        args: BandGRPOConfig,
        model: Any,
        tokenizer: Any,
        prompts: Dataset,
        reward: RewardFunction,
        lora: Any,
        progress: Progress,
    ) -> None:
        self.log = TrainingProgress(progress, Path(args.output_dir or "."))
        self.trainer = _Trainer(
            model=model,
            reward_funcs=reward,
            args=args,
            train_dataset=prompts,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[self.log],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.notes: list[str] = []
        """Messages of the trainer that a reader of the report needs, for example that no group had a learning signal."""
        self.trainer.say = self._say

    def _say(self, text: str) -> None:
        self.log.progress.say(text)
        self.notes.append(text)

    @property
    def name(self) -> str:
        """The name of the objective."""
        return self.trainer.objective.name

    def train(self, resume: str | None) -> None:
        """Train to the end.

        Args:
            resume: Folder of the checkpoint to continue from, None for a new run.
        """
        try:
            self.trainer.train(resume_from_checkpoint=resume)
        except BaseException:
            self.log.log_unfinished(self.trainer)
            raise

    def save(self, folder: Path) -> None:
        """Save the model, and beside its folder the last batch, for `bandpo doctor`.

        Args:
            folder: Folder of the model.
        """
        self.trainer.save_model(str(folder))
        if self.trainer.last_batch and self.trainer.is_world_process_zero():
            save_file(self.trainer.last_batch, folder.parent / "batch.safetensors")

    @contextmanager
    def for_sampling(self) -> Generator[Any]:
        """The model, ready to generate."""
        unwrap = cast("Callable[..., AbstractContextManager[Any]]", unwrap_model_for_generation)
        with unwrap(self.trainer.model_wrapped, self.trainer.accelerator) as model:
            yield model

    def figures(self, log: Iterable[Mapping[str, Any]]) -> dict[str, Figure]:
        """The figures of the report by their headings.

        Args:
            log: Rows of metrics.jsonl, which are read once.
        """
        training = Curves(row for row in log if "reward" in row or "entropy" in row)
        return {
            "Training": plot_training(training),
            "Who is clipped": plot_clip_by_probability(training),
            "The band, with tokens of this run": plot_bounds(
                self.trainer.objective.bounds, self.name, tokens=self.trainer.tokens
            ),
        }


class _Trainer(HidesSecretsInCard, BandGRPOTrainer):
    """Keeps some tokens of the last rollouts, for the figure of the band, and the last batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens: dict[str, list[float]] = {"p": [], "ratio": [], "clipped": []}
        self.last_batch: dict[str, torch.Tensor] = {}
        self._draw = random.Random(0)

    def _log_band(self, terms: TokenObjective, inputs: dict[str, Any]) -> None:
        super()._log_band(terms, inputs)
        valid = inputs["completion_mask"] != 0
        if self.model.training:
            self.last_batch = _as_batch(terms, valid)
        p = terms.anchor_logprobs.exp()
        log_ratio = terms.log_ratio.detach().expand(valid.shape)
        clipped = torch.zeros_like(valid) if terms.stopped is None else terms.stopped
        chosen = self._draw.sample(range(int(valid.sum())), min(int(valid.sum()), _TOKENS_PER_BATCH))
        for name, values in (("p", p), ("ratio", log_ratio.exp()), ("clipped", clipped.float())):
            self.tokens[name] = (self.tokens[name] + values[valid][chosen].tolist())[-_TOKENS_KEPT:]


def _as_batch(terms: TokenObjective, valid: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch with the names that the doctor reads."""
    old = terms.anchor_logprobs
    tensors = {"logprobs": old + terms.log_ratio, "old_logprobs": old, "advantages": terms.advantages, "mask": valid}
    return {name: x.detach().expand(valid.shape).contiguous().cpu() for name, x in tensors.items()}
