"""`bandpo train` with a policy-gradient objective: BandPO and the zoo."""

import random
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from transformers import PrinterCallback
from trl.models.utils import unwrap_model_for_generation  # pyright: ignore[reportUnknownVariableType]

from bandpo._inputs import as_columns, is_logprob
from bandpo._system.progress import Progress
from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer, DoctorCallback
from bandpo.integrations.trl.rollout import mask_of
from bandpo.integrations.trl.strategy import GivenToTRL
from bandpo.objective import Objective
from bandpo.plots.figures import Interval, drawn_interval
from bandpo.terms import TokenObjective
from bandpo.train.folder import HasOwnCard
from bandpo.train.progress import TrainingProgress
from bandpo.train.rewards import RewardFunction

_BATCHES_SHOWN = 4
"""Micro-batches whose tokens the figure of the band shows, of the last ones that measured the full metrics."""
_TOKENS_PER_BATCH = 1000
"""Tokens that it shows of each of them."""


class GRPORun:
    """One run of a policy-gradient objective: the trainer, saving, and the figures.

    Args:
        args: Configuration of the trainer.
        model: A model, or the name or folder to load it from.
        tokenizer: Tokenizer of the model.
        prompts: Prompts to sample completions for.
        rewards: Reward functions of the samples; the trainer adds them with the config's `reward_weights`.
        lora: Configuration of LoRA, or None.
        progress: Prints messages.
    """

    def __init__(
        self,
        args: BandGRPOConfig,
        model: Any,
        tokenizer: Any,
        prompts: Dataset,
        rewards: list[RewardFunction],
        lora: Any,
        progress: Progress,
    ) -> None:
        self.log = TrainingProgress(progress, Path(args.output_dir or "."))
        self.doctor = DoctorCallback(say=progress.say)
        self.trainer = _Trainer(
            model=model,
            reward_funcs=rewards,
            args=args,
            train_dataset=prompts,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[self.log, self.doctor],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.told: list[str] = []
        """What the doctor told while the run trained."""
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

    @property
    def objective(self) -> Objective:
        """The objective with the options of the run."""
        return self.trainer.objective

    def writes_card(self, write: Callable[[], None]) -> None:
        """Let the trainer call a function where TRL would write its model card.

        Args:
            write: Writes the card of the run.
        """
        self.trainer.write_card = write

    @property
    def length(self) -> dict[str, Any]:
        """How long the run was, for the card of its model."""
        return {"optimiser steps": self.trainer.state.global_step}

    def train(self, resume: str | None) -> None:
        """Train to the end.

        Args:
            resume: Folder of the checkpoint to continue from, None for a new run.
        """
        try:
            trained = self.trainer.train(resume_from_checkpoint=resume)
            self.told = [str(told) for told in self.doctor.told]
            if trained is None and self.trainer.is_world_process_zero():
                self.log.forget_after(self.trainer.state.global_step)
        except BaseException:
            self.log.log_unfinished(self.trainer)
            raise

    def save(self, folder: Path) -> None:
        """Save the model, and beside its folder the last batch, for `bandpo doctor`.

        Args:
            folder: Folder of the model.
        """
        self.trainer.save_model(str(folder))
        if self.trainer.is_world_process_zero() and (batch := self.trainer.last_batch):
            save_file(batch, folder.parent / "batch.safetensors")

    @contextmanager
    def for_sampling(self) -> Generator[Any]:
        """The model, ready to generate."""
        unwrap = cast("Callable[..., AbstractContextManager[Any]]", unwrap_model_for_generation)
        with unwrap(self.trainer.model_wrapped, self.trainer.accelerator) as model:
            yield model

    @property
    def band(self) -> Interval | None:
        """The interval of the objective, for the report; None if it has none that depends on p alone."""
        return drawn_interval(self.trainer.objective.bounds)

    @property
    def tokens(self) -> dict[str, list[float]]:
        """Some of the last tokens, for the report."""
        return self.trainer.tokens


class _Trainer(HasOwnCard, BandGRPOTrainer):
    """Keeps references to the tensors of the last micro-batches, for the figure of the band and for the doctor.

    Nothing is copied to the host while the run trains.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last: tuple[torch.Tensor, dict[str, Any], GivenToTRL] | None = None
        self._drawn_from: deque[_Tokens] = deque(maxlen=_BATCHES_SHOWN)

    def _after_loss(
        self, logprobs: torch.Tensor, inputs: dict[str, Any], given: GivenToTRL, terms: TokenObjective | None
    ) -> None:
        if self.model.training:
            self._last = logprobs.detach(), inputs, given
            if terms is not None:
                self._drawn_from.append(_Tokens.of(terms))

    @property
    def last_batch(self) -> dict[str, torch.Tensor]:
        """The last micro-batch of training, on the host, with the names that the doctor reads; empty before the first."""
        if self._last is None:
            return {}
        logprobs, inputs, _ = self._last
        old, valid = inputs.get("old_per_token_logps"), mask_of(inputs) != 0
        tensors = {"logprobs": logprobs, "old_logprobs": logprobs if old is None else old}
        known = valid & is_logprob(tensors["logprobs"]) & is_logprob(tensors["old_logprobs"])
        tensors = {name: torch.where(known, x, 0.0) for name, x in tensors.items()}
        tensors |= {"advantages": as_columns(inputs["advantages"], logprobs), "mask": valid}
        return {name: x.detach().expand(valid.shape).contiguous().cpu() for name, x in tensors.items()}

    @property
    def tokens(self) -> dict[str, list[float]]:
        """Some tokens of the last micro-batches whose terms were computed: p, ratio, and whether the gradient is taken away."""
        if not self._drawn_from and self._last is not None:
            logprobs, inputs, given = self._last
            with torch.no_grad():
                self._drawn_from.append(_Tokens.of(self._strategy.terms(self.model, logprobs, inputs, given)))
        draw, found = random.Random(0), {"p": list[float](), "ratio": list[float](), "clipped": list[float]()}
        for batch in self._drawn_from:
            for name, values in batch.some(_TOKENS_PER_BATCH, draw).items():
                found[name] += values
        return found


class _Tokens(NamedTuple):
    """The tokens of a micro-batch, without gradient."""

    anchor_logprobs: torch.Tensor
    log_ratio: torch.Tensor
    stopped: torch.Tensor | None
    mask: torch.Tensor

    @classmethod
    def of(cls, terms: TokenObjective) -> "_Tokens":
        return cls(terms.anchor_logprobs, terms.log_ratio.detach(), terms.stopped, terms.mask)

    def some(self, count: int, draw: random.Random) -> dict[str, list[float]]:
        """Valid tokens chosen at random: so many, or all of them if they are fewer."""
        valid = self.mask.cpu()
        clipped = torch.zeros_like(self.mask) if self.stopped is None else self.stopped
        columns = {"p": self.anchor_logprobs.exp(), "ratio": self.log_ratio.exp(), "clipped": clipped.float()}
        total = int(valid.sum())
        chosen = draw.sample(range(total), min(total, count))
        return {name: x.expand(valid.shape).cpu()[valid][chosen].tolist() for name, x in columns.items()}
