"""Checkpoints that are complete or refused, and from which a run continues as if it had never stopped."""

import errno
import inspect
import shutil
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import send_to_device  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState

from bandpo._system.errors import RunError
from bandpo._system.files import damage, latest_whole, seal, unseal

if TYPE_CHECKING:
    from bandpo.integrations.trl.host import Accelerator

_STATE_FILE = "bandpo_state_{rank}.pt"
_FIXED = (  # besides the number of processes, the half-used rollout and the place in the data depend on these
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TRIAL_BYTES = 1 << 20  # written to see whether there is room
_LONGEST_LINE = 300  # characters of an error that a message quotes


Say = Callable[[str], None]
"""Shows a message to the user."""


def latest_checkpoint(folder: Path, say: Say) -> Path | None:
    """The last complete checkpoint in the folder of a run; None if there is none.

    Args:
        folder: The folder of the run; it may not exist.
        say: Called with a message for each checkpoint that is damaged.
    """
    return latest_whole(_checkpoints(folder), _step_of, say)


class CheckpointError(RunError):
    """A checkpoint could not be written; the checkpoints before it are unchanged."""


class WholeCheckpoints(Trainer):
    """A trainer of transformers whose checkpoints are complete or refused.

    The last file written, `bandpo_files.json`, holds size and CRC-32 of all others: a checkpoint without it, or that differs
    from it, is never resumed. Older checkpoints are deleted once the new one is complete. The running sum behind the logged
    `loss` is saved too, so that a run that is resumed between two lines of the log logs the same numbers.
    """

    if TYPE_CHECKING:
        accelerator: Accelerator

    _carried: tuple[Tensor, int] | None = None
    _loss_sum = torch.tensor(0.0)

    def state_to_keep(self) -> dict[str, Any]:
        """State of a subclass that a checkpoint must hold, as tensors and plain values."""
        return {}

    def take_state(self, state: dict[str, Any]) -> None:
        """Restore what `state_to_keep` returned.

        Args:
            state: The state from the checkpoint; it has more keys than those of `state_to_keep`.
        """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as in transformers. A damaged checkpoint is refused.

        Args:
            resume_from_checkpoint: The folder of a checkpoint, or True for the last complete one in `output_dir`.
            *args: The other arguments of transformers' `Trainer.train`.
            **kwargs: The other arguments of transformers' `Trainer.train`.

        Returns:
            transformers' `TrainOutput`, or None if the resumed run was finished.

        Raises:
            ValueError: If the checkpoint cannot be resumed, or there is none.
        """
        if resume_from_checkpoint is True:
            found = latest_checkpoint(Path(self.args.output_dir or "."), warnings.warn)
            if found is None:
                raise ValueError(f"resume_from_checkpoint=True: {self.args.output_dir} has no whole checkpoint")
            resume_from_checkpoint = str(found)
        elif resume_from_checkpoint and (wrong := damage(Path(resume_from_checkpoint))):
            raise _cannot_resume(resume_from_checkpoint, wrong)
        if resume_from_checkpoint:
            self._state_in(Path(resume_from_checkpoint))  # a state that does not fit is refused before anything slow
        if resume_from_checkpoint and self._is_done(Path(resume_from_checkpoint)):
            self._load_from_checkpoint(resume_from_checkpoint)  # transformers would make one step too many
            return None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _is_done(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is of the last step of the run."""
        with _readable(checkpoint):
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
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # transformers deletes too early
        try:
            super()._save_checkpoint(model, trial)
            state = {
                "settings": self._settings(),
                "loss": self._loss_sum.clone(),
                "logged": self._globalstep_last_logged,
                **self.state_to_keep(),
            }
            torch.save(state, folder / _STATE_FILE.format(rank=self.accelerator.process_index))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(folder)
        except Exception as error:
            full = _is_full(error, folder)
            shutil.rmtree(folder, ignore_errors=True)
            if full:
                raise CheckpointError(_cannot_write(folder, run, error)) from error
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            _delete_oldest(run, limit, keep=[folder] if best is None else [folder, Path(best)])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        asked = None if self.is_deepspeed_enabled else _hyperparameters(self.optimizer)
        with _readable(folder):
            super()._load_optimizer_and_scheduler(checkpoint)
        if asked is not None:
            _set_hyperparameters(self.optimizer, self.lr_scheduler, asked)
        state = cast("dict[str, Any]", send_to_device(self._state_in(folder), self.accelerator.device))
        with _readable(folder):
            self._carried = (state["loss"], state["logged"])
            self.take_state(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(Path(checkpoint or ".")):
            super()._load_rng_state(checkpoint)

    def _settings(self) -> dict[str, Any]:
        """Settings that must be the same in the run that resumes."""
        fixed = {name: getattr(self.args, name) for name in _FIXED if hasattr(self.args, name)}
        return {"processes": self.accelerator.num_processes, **fixed}

    def _state_in(self, checkpoint: Path) -> dict[str, Any]:
        """What `state_to_keep` returned on this process, from a checkpoint of a run with the same processes and batches.

        Raises:
            ValueError: If the file cannot be read, or if the run had other settings.
        """
        path = checkpoint / _STATE_FILE.format(rank=self.accelerator.process_index)
        if not path.exists():  # another number of processes: the file of the first one holds it
            path = checkpoint / _STATE_FILE.format(rank=0)
        with _readable(checkpoint):
            # On the CPU first: torch cannot load to "cpu:0", which processes on a CPU have as their device.
            loaded: object = torch.load(path, map_location="cpu", weights_only=True)
        state = cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}
        settings = state.get("settings")
        if not isinstance(settings, dict):
            raise _cannot_resume(
                checkpoint, f"{path.name} was written by another version of bandpo, or by another program"
            )
        then = {k: v for k, v in cast("dict[str, object]", settings).items() if isinstance(v, int)}
        now = self._settings()
        changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        if changed:
            had, has = (", ".join(f"{name}={x.get(name)}" for name in changed) for x in (then, now))
            raise _cannot_resume(
                checkpoint,
                f"it was written with {had}, and this run has {has}; its half-used rollout and its place in the data depend on "
                "them, so set them as they were",
            )
        return state


def _hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
    """The options of each group of parameters, as this run has made its optimiser.

    They are what its constructors take: some optimisers keep their state in the groups as well, such as the count of steps of
    schedule-free ones, which is the checkpoint's.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate may have wrapped it
    made = cast("type[Any]", type(inner))
    taken = {name for c in made.__mro__[:-1] for name in inspect.signature(c.__init__).parameters} - {"params"}
    kept = taken | {"lr", "initial_lr"}
    return [{name: value for name, value in group.items() if name in kept} for group in optimizer.param_groups]


def _set_hyperparameters(optimizer: Any, scheduler: Any, asked: list[dict[str, Any]]) -> None:
    """Give an optimiser the options of this run: its state in a checkpoint brings those of the run that wrote it.

    Otherwise torch would use the old learning rate, weight decay, betas, ... whatever the run asks for, and the first step the
    rate of the old schedule. Nothing changes where the run asks for what the checkpoint has.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate may have wrapped it
    rates = [wanted.get("initial_lr", wanted["lr"]) for wanted in asked]
    for i, (group, wanted) in enumerate(zip(optimizer.param_groups, asked, strict=True)):
        now, old = group["lr"], group.get("initial_lr", group["lr"])
        group.update(wanted)
        if isinstance(scheduler, LambdaLR):
            group["lr"] = rates[i] * scheduler.lr_lambdas[i](scheduler.last_epoch)
        else:
            group["lr"] = now if old == rates[i] else now * (rates[i] / old) if old else rates[i]
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = rates
        cast("Any", scheduler)._last_lr = [group["lr"] for group in optimizer.param_groups]


@contextmanager
def _readable(checkpoint: Path) -> Generator[None, None, None]:
    """Any failure to read a file of a checkpoint becomes one message: damaged or refused pickles fail in many ways."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _cannot_resume(checkpoint, f"{type(error).__name__}: {_first_line(error)}") from error


def _cannot_resume(checkpoint: str | Path, why: str) -> ValueError:
    return ValueError(
        f"checkpoint {checkpoint} cannot be resumed: {why}. Use the one before it, or start a new run from its weights "
        "(model=CHECKPOINT)"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:_LONGEST_LINE]


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their steps; the times at which they were written may be wrong."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _delete_oldest(run: Path, limit: int | None, keep: list[Path]) -> None:
    """Delete the checkpoints of the lowest steps until `limit` are left, but none of those to keep."""
    if limit is None or limit <= 0:
        return
    found, kept = _checkpoints(run), {p.resolve() for p in keep}
    spare = [p for p in found if p.resolve() not in kept]
    for old in spare[: max(0, len(found) - limit)]:
        shutil.rmtree(old, ignore_errors=True)


def _is_full(error: BaseException | None, folder: Path) -> bool:
    """Whether a file could not be written because the disk is full: by the system's error number, or by trying again."""
    seen = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(
            f"(os error {number})" in str(seen) for number in _FULL
        ):  # safetensors gives the number in its text only
            return True
        seen = seen.__cause__ or seen.__context__
    if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
        return False
    written = [p for p in folder.rglob("*") if p.is_file()]  # torch does not give the reason
    if not written:
        return False
    try:
        with max(written, key=lambda p: p.stat().st_size).open("ab") as file:
            file.write(bytes(_TRIAL_BYTES))
    except OSError as again:
        return again.errno in _FULL
    return False


def _cannot_write(folder: Path, run: Path, error: Exception) -> str:
    last = latest_checkpoint(run, lambda _: None)
    free = shutil.disk_usage(run).free / 2**20
    return (
        f"cannot write {folder} ({type(error).__name__}: {error}); {free:.0f} MiB are free there. "
        f"{f'The last whole checkpoint is {last.name}' if last else 'There is no checkpoint before it'}: make room, then "
        "resume with --resume_from_checkpoint latest"
    )
