"""What `BandGRPOTrainer` and `BandDPOTrainer` have in common."""

import warnings
from typing import TYPE_CHECKING, Any, Literal

from accelerate import PartialState
from torch import nn

from bandpo.integrations.trl.checkpoint import Say, WholeCheckpoints
from bandpo.integrations.trl.pooled import Log, Measured, PooledLog, checked_metrics, without_empty
from bandpo.integrations.trl.precision import lost_updates_of

Mode = Literal["train", "eval"]


def warn(text: str) -> None:
    """Show a message to the user as a Python warning.

    Args:
        text: The message.
    """
    warnings.warn(text, stacklevel=4)


class BandTrainer(WholeCheckpoints):
    """A trainer of TRL with pooled metrics, messages to the user, and checkpoints that are whole or refused."""

    if TYPE_CHECKING:
        model: nn.Module
        _metrics: dict[str, Log]  # TRL's: metrics since the last line of the log, of training and of evaluation

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.say: Say = warn
        """Shows the main process's messages to the user."""
        self._pooled = {"train": PooledLog(), "eval": PooledLog()}
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as in transformers, after a message if most updates would be lost in the precision of the weights.

        Args:
            *args: Arguments of transformers' `Trainer.train`.
            **kwargs: Arguments of transformers' `Trainer.train`.

        Returns:
            transformers' `TrainOutput`, or None if the resumed run was finished.
        """
        self._tell(lost_updates_of(self))
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.settle()
        without_empty(self.current_log)
        super().log(logs, start_time)
        self._pooled[self._mode].forget()

    def settle(self) -> None:
        """Write what the micro-batches have measured into the log, with one transfer to the host for all of them.

        It is called before a line of the log, before a checkpoint, and where a rule follows a measurement. Each process must
        call it, because it adds up over processes.
        """
        self._settle(self._mode)

    def _settle(self, mode: Mode) -> None:
        self._pooled[mode].settle(self.accelerator, self._metrics[mode])

    def _wait(self, measured: Measured) -> None:
        """Keep what a micro-batch measured until the next line of the log."""
        if self._pooled[self._mode].wait(measured):
            self.settle()

    @property
    def current_log(self) -> Log:
        """The metrics since the last line of the log, of training or of evaluation; those that wait are not in it yet."""
        return self._metrics[self._mode]

    def state_to_keep(self) -> dict[str, Any]:
        self._settle("train")
        return {"metrics": dict(self._metrics["train"]), "pooled": self._pooled["train"].parts}

    def take_state(self, state: dict[str, Any]) -> None:
        metrics = checked_metrics(state["metrics"])
        self._metrics["train"].update(metrics)
        self._pooled["train"].load(state["pooled"], of=metrics)

    @property
    def _mode(self) -> Mode:
        return "train" if self.model.training else "eval"

    def _tell(self, text: str | None) -> None:
        """Show a message to the user, once for all processes. The accelerator need not exist yet."""
        if text is not None and PartialState().is_main_process:
            self.say(text)
