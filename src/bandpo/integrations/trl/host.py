"""The parts of `BandGRPOTrainer` that its helpers use, with types: TRL and transformers leave most of them open."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias, TypeVar, cast

from accelerate.utils import gather_object
from torch import Tensor, nn

from bandpo.integrations.trl.config import BandGRPOConfig
from bandpo.integrations.trl.pooled import Gathers, Log
from bandpo.objective import Objective

Batch: TypeAlias = dict[str, Any]
"""A rollout or a batch of TRL: tensors by name, with one row for each completion, and a few values of the whole rollout."""


T = TypeVar("T")


def gathered(values: list[T]) -> list[T]:
    """The lists of all processes, one after the other; accelerate's `gather_object` with a type.

    Args:
        values: Picklable values of this process.
    """
    return cast("list[T]", gather_object(values))


def split(x: Tensor, rows: int) -> tuple[Tensor, ...]:
    """A tensor in parts of so many rows; torch's `split` with a type.

    Args:
        x: Any tensor.
        rows: Rows of each part; the last part may have fewer.
    """
    return cast("tuple[Tensor, ...]", x.split(rows))


def ints(x: Tensor) -> list[int]:
    """The entries of a one-dimensional integer tensor."""
    return cast("list[int]", x.tolist())


class Accelerator(Gathers, Protocol):
    """What is used of accelerate's `Accelerator`."""

    num_processes: int
    process_index: int

    def wait_for_everyone(self) -> None:
        """Return when all processes are here."""
        ...

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """The model without what distributed training has put around it."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """A context in which forward passes run in the trainer's precision."""
        ...


class TrainerState(Protocol):
    """What is used of transformers' `TrainerState`."""

    global_step: int
    max_steps: int


class GRPOHost(Protocol):
    """What is used of `BandGRPOTrainer`."""

    objective: Objective
    args: BandGRPOConfig
    accelerator: Accelerator
    model: nn.Module
    state: TrainerState
    train_dataset: Any
    last_rewards: Tensor
    last_top: Tensor | None
    loss_type: str
    temperature: float
    num_generations: int
    max_completion_length: int
    use_vllm: bool
    vllm_importance_sampling_correction: bool
    current_gradient_accumulation_steps: int

    @property
    def current_log(self) -> Log:
        """The metrics since the last line of the log."""
        ...

    @property
    def group_size(self) -> int:
        """Completions of each prompt."""
        ...

    @property
    def pad_token(self) -> int:
        """The token that fills short completions."""
        ...

    @property
    def radius_moves(self) -> bool:
        """Whether the radius may change between two steps."""
        ...

    @property
    def micro_batch(self) -> int:
        """Number of the micro-batch, counted by TRL over the run."""
        ...
