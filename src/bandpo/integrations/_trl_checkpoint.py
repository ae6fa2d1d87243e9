"""Checkpoints that are whole or do not count, and from which a run goes on as if it had never stopped."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from bandpo._errors import RunError
from bandpo._files import damage, latest_whole, seal, unseal

_STATE_FILE = "bandpo_state_{rank}.pt"


def latest_checkpoint(folder: Path, say: Callable[[str], Any]) -> Path | None:
    """The last whole checkpoint in a run's folder, if any.

    Args:
        folder: It; need not exist.
        say: Takes a message for each checkpoint that is damaged.
    """
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    return latest_whole(found, lambda p: int(p.name.rpartition("-")[2]), say)


class CheckpointError(RunError):
    """A checkpoint could not be written; the ones before it are as they were."""


class WholeCheckpoints(Trainer):
    """What a trainer of this project adds to transformers' checkpoints.

    The last file written, `bandpo_files.json`, holds size and CRC-32 of all others: a checkpoint without it, or that
    differs from it, is not gone on from. Older checkpoints are deleted once the new one is whole. The running sum behind the
    logged `loss` travels along, so that a run resumed between two logs logs the same.
    """

    _carried: tuple[Tensor, int] | None = None
    _loss_sum = torch.tensor(0.0)

    def state_to_keep(self) -> dict[str, Any]:
        """More that a checkpoint must hold, as tensors and plain values."""
        return {}

    def take_state(self, state: dict[str, Any]) -> None:
        """What `state_to_keep` gave, from a checkpoint.

        Args:
            state: It.
        """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; True goes on from the last whole checkpoint, and a damaged one is refused.

        Args:
            resume_from_checkpoint: A folder, or True for the last one in `output_dir`.
            *args: As in transformers.
            **kwargs: As in transformers.
        """
        if resume_from_checkpoint is True:
            found = latest_checkpoint(Path(self.args.output_dir or "."), warnings.warn)
            if found is None:
                raise ValueError(f"resume_from_checkpoint=True: {self.args.output_dir} has no whole checkpoint")
            resume_from_checkpoint = str(found)
        elif resume_from_checkpoint and (wrong := damage(Path(resume_from_checkpoint))):
            raise ValueError(
                f"checkpoint {resume_from_checkpoint} cannot be gone on from: {wrong}. Use the one before it, or start a new "
                "run from its weights (model=CHECKPOINT)"
            )
        if resume_from_checkpoint and self._is_done(Path(resume_from_checkpoint)):
            self._load_from_checkpoint(resume_from_checkpoint)  # transformers would make one step too many
            return None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _is_done(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is that of the last step."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.args.max_steps > 0:
            done = state.global_step >= self.args.max_steps
        else:
            done = state.global_step >= state.max_steps and state.num_train_epochs >= self.args.num_train_epochs
        if done:
            self.state = state
        return done

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._carried is not None:  # the first step after a resume: transformers has set its sum to 0
            carried, self._globalstep_last_logged = self._carried
            loss, self._carried = loss + carried.to(loss.device), None
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._loss_sum = tr_loss  # transformers sets it to 0 in place when it logs
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            unseal(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            state = {"loss": self._loss_sum.clone(), "logged": self._globalstep_last_logged, **self.state_to_keep()}
            torch.save(state, folder / _STATE_FILE.format(rank=self.accelerator.process_index))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(folder)
        except Exception as error:  # each library has its own for a full disk
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(_cannot_write(folder, run, error)) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                str(run), save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / _STATE_FILE.format(rank=self.accelerator.process_index)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint was written with another number of processes. Start a new run from its "
                "weights instead (model=CHECKPOINT)."
            )
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        self._carried = (state.pop("loss"), state.pop("logged"))
        self.take_state(state)


def _cannot_write(folder: Path, run: Path, error: Exception) -> str:
    last = latest_checkpoint(run, lambda _: None)
    free = shutil.disk_usage(run).free / 2**20
    return (
        f"cannot write {folder} ({type(error).__name__}: {error}); {free:.0f} MiB are free there. "
        f"{f'The last whole checkpoint is {last.name}' if last else 'There is no checkpoint before it'}: make room, then go on "
        "with --resume_from_checkpoint latest"
    )
