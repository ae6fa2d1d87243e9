"""The doctor in TRL's trainers: it watches the run's metrics and tells each warning and problem once."""

import logging
from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bandpo.monitoring.findings import Finding
from bandpo.monitoring.live import Doctor, Told

_LOGGER = logging.getLogger(__name__)


class DoctorCallback(TrainerCallback):
    """Watches a run of TRL's `GRPOTrainer`, `BandGRPOTrainer` or another trainer with their metrics.

    A finding is told once, with its step, cause and knob, as soon as the metrics of three rows in succession show it, from row
    `patience` on. Nothing in the trainer, its logs and its checkpoints changes. A run that is resumed is watched from its
    beginning: the rows before the checkpoint are in the trainer's state.

    Args:
        stop: Whether to end the training: true for each problem, or the names of rules (`bandpo doctor --explain` lists them),
            whose warnings count too. The trainer then saves and returns as at its last step.
        patience: Rows of the log before the first finding.
        say: Prints a text; by default it goes to the logger of this module as a warning.

    Raises:
        ValueError: If `patience` is below 1 or a name is that of no rule.

    Examples:
        >>> callback = DoctorCallback(stop=["nonfinite"])
        >>> [told.step for told in callback.told]
        []
    """

    def __init__(
        self, *, stop: bool | Collection[str] = False, patience: int = 20, say: Callable[[str], object] | None = None
    ) -> None:
        self.doctor = Doctor(patience=patience, stop=stop)
        self._say = _LOGGER.warning if say is None else say

    @property
    def told(self) -> list[Told]:
        """What was told so far, also before the run was resumed."""
        return self.doctor.told

    def findings(self) -> list[Finding]:
        """What the rules find in the run so far, as `bandpo doctor` does in its log."""
        return self.doctor.findings()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.doctor = Doctor(patience=self.doctor.patience, stop=self.doctor.stop)
        for row in state.log_history:
            self.doctor.observe(row)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None:
            return
        for told in self.doctor.observe(logs, step=state.global_step):
            if state.is_world_process_zero:
                self._say(str(told))
        if self.doctor.stop and self._all_stop(args):
            if state.is_world_process_zero and not control.should_training_stop:
                self._say(
                    f"step {state.global_step}, doctor: the training ends here, as stop={_shown(self.doctor.stop)} asks"
                )
            control.should_training_stop = True

    def _all_stop(self, args: TrainingArguments) -> bool:
        """Whether to stop: what the first process has seen, because all must agree."""
        stop = self.doctor.should_stop
        if args.world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor(int(stop), device=args.device)
            torch.distributed.broadcast(flag, src=0)
            stop = bool(flag.item())
        return stop


def _shown(stop: bool | Collection[str]) -> str:
    return str(stop) if isinstance(stop, bool) else ", ".join(sorted(stop))
