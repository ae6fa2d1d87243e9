"""bandpo in TRL's DPO: `BandDPOTrainer` is `DPOTrainer` with any `PairObjective`, without a copy of TRL's code.

TRL makes the batch, the forward pass and its metrics, with a loss of weight 0. The loss is `pair_loss` of the log-probs of that
forward pass.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from packaging.version import Version
from torch import Tensor

try:
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]
    from trl import __version__ as trl_version
except ImportError as error:
    raise ImportError(f"bandpo.integrations.trl.dpo needs TRL: pip install 'bandpo[trl]' ({error})") from error

from bandpo._system.secrets import HidesSecrets
from bandpo.integrations.trl.base import BandTrainer, Mode
from bandpo.integrations.trl.generate import layer_states
from bandpo.integrations.trl.host import Accelerator, Batch
from bandpo.integrations.trl.pooled import Measured, Total
from bandpo.metrics import PooledSum
from bandpo.preference.links import as_link
from bandpo.preference.losses import pair_loss, preference_confidence
from bandpo.preference.objectives import PREFERENCES, PairObjective, get_pair_objective
from bandpo.preference.probe import LayerProbe, Pooling, pool_hidden

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns of a data set that hold the log-probs of the reference."""

_TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_OWN_COLUMNS = ("reward_gap", *REFERENCE_COLUMNS)
_OF_TRLS_LOSS: dict[str, Any] = {  # options that act on TRL's own loss, and the values with which they change nothing
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "use_weighting": False,
}
_PROBE_WEIGHT_DECAY = 0.01

_LOWEST_TRL = Version("1.16")  # the first one that hands over the log-probs of single tokens


@dataclass
class BandDPOConfig(HidesSecrets, DPOConfig):
    """TRL's `DPOConfig` with a preference `objective`; `beta` and `label_smoothing` follow the objective unless they are set.

    Raises:
        ValueError: If an option is set that the objective would ignore.
    """

    objective: str = field(default="chipo", metadata={"help": f"Named preference objective: {', '.join(PREFERENCES)}."})
    beta: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Coefficient β of the regularisation. Default: the objective's."}
    )
    link: str | None = field(
        default=None,
        metadata={"help": "Link: log, chi2-kl, chi2, forward-kl, js, alpha:A or chi2-kl:ALPHA,GAMMA."},
    )
    r_max: float | None = field(default=None, metadata={"help": "Clip the pair's logit to ±2 r_max. Default: no clip."})
    label_smoothing: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Share ε of swapped labels, for cdpo and robust-dpo. Default: the objective's."}
    )
    label_scale: float | None = field(
        default=None, metadata={"help": "Factor on the reward gaps (pdfr, rebel, rdrc, vcb)."}
    )
    calibration: float | None = field(default=None, metadata={"help": "Final temperature γ_c of rdrc."})
    confidence_alpha: float = field(default=7.5, metadata={"help": "Sharpness of the probe's confidence (rbrm)."})
    confidence_level: str = field(
        default="batch", metadata={"help": "One confidence for the batch, or one for each pair: batch, pair (rbrm)."}
    )
    confidence_floor: float = field(default=0.5, metadata={"help": "Lowest confidence (rbrm)."})
    probe_pooling: str = field(
        default="mean",
        metadata={"help": "Hidden states of a completion that the probe is given: their mean, or the last one."},
    )
    probe_learning_rate: float = field(
        default=1e-2,
        metadata={"help": "Adam's learning rate for the probe; 0 keeps the probe as it is."},
    )

    def __post_init__(self) -> None:
        objective = self.resolve()
        for name, value in _OF_TRLS_LOSS.items():
            if getattr(self, name) not in (value, value[0] if isinstance(value, list) else value):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} acts on TRL's own loss, which objective {self.objective!r} replaces"
                )
        self.beta, self.label_smoothing = objective.beta, objective.label_smoothing  # pyright: ignore[reportIncompatibleVariableOverride]
        if objective.reference == "none":
            self.precompute_ref_log_probs = True  # so that TRL loads no reference model; there is nothing to compute
        super().__post_init__()

    def resolve(self) -> PairObjective:
        """The objective with the options of this configuration.

        Raises:
            ValueError: If the objective or the link is unknown, or a value is out of range.
        """
        objective = get_pair_objective(self.objective)
        names = ("beta", "r_max", "label_smoothing", "label_scale", "calibration")
        changes: dict[str, Any] = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        if self.link is not None:
            changes["link"] = as_link(self.link)
        return dataclasses.replace(objective, **changes)


class BandDPOTrainer(BandTrainer, DPOTrainer):
    """TRL's `DPOTrainer` with the loss of a bandpo preference objective; everything else is inherited.

    A data set may have more columns than those of the pairs: "reward_gap" for objectives that distil rewards;
    "ref_chosen_logps" and "ref_rejected_logps", with which no reference model is loaded; and "prompt_ids", "chosen_ids" and
    "rejected_ids" instead of text. A message says how many pairs `max_length` drops or cuts.

    Args:
        model: The model to train, or where to load it from, as in `DPOTrainer`.
        ref_model: The reference, as in `DPOTrainer`.
        args: A `BandDPOConfig`.
        objective: A `PairObjective` to use instead of `args.objective`.
        probe: The reward model of RBRM, which gives the confidence of each batch or pair from the hidden states of the policy.
            It is trained along, with an optimiser of its own.
        **kwargs: The other arguments of `DPOTrainer`, by name.

    Raises:
        ImportError: If TRL is older than the preference trainers need.
        TypeError: If `args` is no `BandDPOConfig`.
        ValueError: If the objective needs a probe and has none, or has one that it cannot use; if the data set has the
            log-probs of the reference and there is a reference model, or `max_length` cuts such a pair; if no pair is left, or
            `max_length` makes chosen and rejected equal.

    Examples:
        >>> issubclass(BandDPOTrainer, DPOTrainer)
        True
    """

    _tag_names = ["trl", "dpo", "bandpo"]  # noqa: RUF012 (TRL's convention)

    if TYPE_CHECKING:  # attributes of TRL and transformers, which leave their types open
        args: BandDPOConfig
        accelerator: Accelerator
        ref_model: Any
        data_collator: Any
        loss_weights: list[float]
        precompute_ref_logps: bool
        _total_train_tokens: int
        _signature_columns: list[str] | None

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: BandDPOConfig | None = None,
        *,
        objective: PairObjective | None = None,
        probe: LayerProbe | None = None,
        **kwargs: Any,
    ) -> None:
        if Version(trl_version) < _LOWEST_TRL:
            raise ImportError(
                f"the preference trainers need trl>={_LOWEST_TRL}, and trl {trl_version} is installed: upgrade it"
            )
        args = BandDPOConfig("BandDPO") if args is None else args
        if not isinstance(args, BandDPOConfig):
            raise TypeError(f"args: pass a BandDPOConfig (DPOConfig's fields and more), got {type(args).__name__}")
        self.objective = args.resolve() if objective is None else objective
        if probe is not None and self.objective.target != "soft":
            raise ValueError(f"probe: objective {self.objective.name!r} has no soft target for its confidence")
        if self.objective.name == "rbrm" and probe is None:
            raise ValueError("objective 'rbrm' needs a probe: bandpo.preference.LayerProbe, fitted on labelled pairs")
        self.probe = probe
        self._probe_optimizer = (
            torch.optim.Adam(probe.parameters(), lr=args.probe_learning_rate, weight_decay=_PROBE_WEIGHT_DECAY)
            if probe is not None and args.probe_learning_rate
            else None
        )
        if set(REFERENCE_COLUMNS) <= set(getattr(kwargs.get("train_dataset"), "column_names", None) or ()):
            if ref_model is not None:
                raise ValueError("ref_model: the data set holds the reference's log-probs already; give one of the two")
            args = copy.copy(args)
            args.precompute_ref_log_probs = True  # TRL then loads no reference
        super().__init__(model, ref_model, args, **kwargs)
        if probe is not None:
            probe.to(self.accelerator.device)
        self.loss_weights = [0.0]
        self.pairs_seen = 0
        """Pairs that this process has trained on."""
        self.data_collator = _WithColumns(self.data_collator)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if set(_TOKEN_COLUMNS) <= set(dataset.column_names or ()):
            found: Any = dataset
        else:
            found = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(found, Dataset) and args.max_length is not None:  # a stream is not read ahead
            self._tell(_cuts(found, len(dataset), args.max_length, dataset_name))
        return found

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self.objective.reference == "none" or "ref_chosen_logps" in dataset.column_names:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *_OWN_COLUMNS]))

    def _compute_loss(self, model: Any, inputs: Batch, return_outputs: bool) -> Any:
        inputs = dict(inputs)
        gap = inputs.pop("reward_gap", None)
        if "ref_chosen_logps" not in inputs:
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self._reference_logprobs(inputs)
        recorded = _Recorder(model)
        with self._given_references(), self._hidden_states() as hidden:
            host = cast("Any", super()._compute_loss(recorded, inputs, return_outputs))
        losses, metrics = self._pair_loss(recorded.log_probs, inputs, gap, hidden)
        self._log_pairs(metrics, len(losses))
        if return_outputs:
            return host[0] + losses.mean(), host[1]
        return host + losses.mean()  # TRL's is 0 times its own loss, and the auxiliary loss of a model that has one

    def _reference_logprobs(self, inputs: Batch) -> tuple[Tensor, Tensor]:
        """Log-probs of chosen and rejected under the reference, zeros if the objective has none; `(pairs,)` each."""
        if self.objective.reference == "none":
            zeros = torch.zeros(len(inputs["input_ids"]) // 2, device=inputs["input_ids"].device)
            return zeros, zeros
        with warnings.catch_warnings():  # TRL reads a property by a name that transformers has given up
            warnings.filterwarnings("ignore", ".*gradient_checkpointing. is deprecated", FutureWarning)
            score = cast("Callable[..., tuple[Tensor, Tensor]]", self.compute_ref_log_probs)
            return score(self.ref_model or self.model, inputs)

    def _pair_loss(
        self, log_probs: Tensor, inputs: Batch, gap: Tensor | None, hidden: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair, `(pairs,)`, and the metrics of the objective and of the probe."""
        if log_probs.dim() != 2:
            raise RuntimeError(
                f"DPOTrainer computed log-probs of shape {tuple(log_probs.shape)} in place of (sequences, time): this version "
                f"of TRL is not supported (trl {trl_version}), or a patch replaced its forward pass"
            )
        mask: Tensor = inputs["completion_mask"][:, 1:]
        chosen, rejected = log_probs[:, -mask.shape[1] :].sum(1).chunk(2)
        extras: dict[str, Tensor] = {}
        if self.objective.length == "mean":
            extras |= dict(zip(("chosen_lengths", "rejected_lengths"), mask.sum(1).chunk(2), strict=True))
        if self.objective.reference != "none":
            extras |= {f"ref_{s}_logprobs": inputs[f"ref_{s}_logps"] for s in ("chosen", "rejected")}
        confidence, probe_metrics = self._confidence(hidden, inputs["completion_mask"])
        if confidence is not None:
            extras["confidence"] = confidence
        elif gap is not None and self.objective.needs_gap and not self.objective.label_smoothing:
            extras["reward_gap"] = gap
        losses, metrics = pair_loss(
            chosen_logprobs=chosen, rejected_logprobs=rejected, objective=self.objective, **extras
        )
        return losses, metrics | probe_metrics

    def _confidence(self, hidden: list[Tensor], mask: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The probe's confidence in each pair, after a step of its own training."""
        if self.probe is None:
            return None, {}
        chosen, rejected = pool_hidden(hidden, mask, cast("Pooling", self.args.probe_pooling)).chunk(2)
        if self._probe_optimizer is not None and self.model.training:
            with torch.enable_grad():
                self._probe_optimizer.zero_grad()
                self.probe.loss(chosen, rejected).backward()
            self._probe_optimizer.step()
        with torch.no_grad():
            rewards = self.probe(chosen), self.probe(rejected)
        confidence = preference_confidence(
            *rewards,
            alpha=self.args.confidence_alpha,
            level=self.args.confidence_level,
            floor=self.args.confidence_floor,
        )
        accuracy = (rewards[0] > rewards[1]).float().mean()
        return confidence, {"probe/confidence": confidence.mean(), "probe/accuracy": accuracy}

    @contextmanager
    def _given_references(self) -> Generator[None, None, None]:
        """TRL takes the log-probs of the reference from the batch."""
        saved, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = saved

    def _hidden_states(self) -> AbstractContextManager[list[Tensor]]:
        return nullcontext([]) if self.probe is None else layer_states(self.accelerator.unwrap_model(self.model))

    def _log_pairs(self, metrics: dict[str, Tensor], pairs: int) -> None:
        """Keep our metrics, which are pooled over processes and micro-batches, for the next line of the log.

        Our implicit rewards replace those of TRL, which are computed without the link.
        """
        self.pairs_seen += pairs if self.model.training else 0
        every = metrics["nonfinite_fraction"].new_full((), float(pairs))
        used = (every * (1 - metrics["nonfinite_fraction"])).round()
        sums: dict[str, PooledSum] = {}
        for name, value in metrics.items():
            count = every if name == "nonfinite_fraction" or name.startswith("probe/") else used
            total = torch.where(count > 0, value * count, 0.0)
            sums[name if name.startswith("rewards/") else f"pairs/{name}"] = PooledSum(total, count)
        self._wait(Measured(sums, functools.partial(self._add_pairs, self._mode)))

    def _add_pairs(self, mode: Mode, found: dict[str, Total]) -> None:
        """Add the totals of a micro-batch, also where there are none: TRL's number has no place beside ours."""
        for name, total in found.items():
            self._metrics[mode].pop(name, None)
            self._pooled[mode].put(name, total)

    def state_to_keep(self) -> dict[str, Any]:
        kept = super().state_to_keep() | {"tokens": self._total_train_tokens}
        if self.probe is not None and self._probe_optimizer is not None:
            kept |= {"probe": self.probe.state_dict(), "probe_optimizer": self._probe_optimizer.state_dict()}
        return kept

    def take_state(self, state: dict[str, Any]) -> None:
        super().take_state(state)
        self._total_train_tokens = state["tokens"]
        if self.probe is not None and self._probe_optimizer is not None:
            self.probe.load_state_dict(state["probe"])
            self._probe_optimizer.load_state_dict(state["probe_optimizer"])


def _cuts(data: Dataset, given: int, max_length: int, name: str) -> str | None:
    """A message about pairs that `max_length` drops or cuts, None if there is none.

    Args:
        data: The pairs that are left.
        given: How many pairs there were.
        max_length: Tokens of the longest prompt and completion.
        name: Name of the data set.

    Raises:
        ValueError: If no pair is left, or a cut would make a pair wrong.
    """
    if not len(data):
        raise ValueError(
            f"{name} set: none of {given} pairs is left, each prompt fills max_length={max_length}; raise it"
        )
    prompts, chosen, rejected = (cast("list[list[int]]", data[name]) for name in _TOKEN_COLUMNS)
    rooms = [(max_length - len(p), c, r) for p, c, r in zip(prompts, chosen, rejected, strict=True)]
    cut = [(room, c, r) for room, c, r in rooms if max(len(c), len(r)) > room]
    if cut and set(REFERENCE_COLUMNS) <= set(data.column_names):
        raise ValueError(
            f"{name} set: {len(cut)} of {given} pairs are longer than max_length={max_length}, and their reference log-probs "
            "are of the whole completions; raise max_length, or set it to None"
        )
    same = sum(c != r and c[: max(room, 0)] == r[: max(room, 0)] for room, c, r in cut)
    if same:
        raise ValueError(
            f"{name} set: max_length={max_length} makes chosen and rejected equal in {same} of {given} pairs; raise it, or set "
            "it to None"
        )
    if not cut and len(data) == given:
        return None
    return (
        f"{name} set: max_length={max_length} drops {given - len(data)} of {given} pairs, whose prompts fill it, and cuts "
        f"{len(cut)}."
    )


class _Recorder:
    """Calls a model, and keeps the log-probs that it returned last."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.log_probs: Tensor = torch.empty(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        if kwargs.get("fused_lm_head"):
            self.log_probs = out.log_probs
        return out


@dataclass
class _WithColumns:
    """TRL's collator, with the reward gaps if the data set has them."""

    collator: Any

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        batch: Batch = self.collator(examples)
        if "reward_gap" in examples[0]:
            batch["reward_gap"] = torch.tensor([e["reward_gap"] for e in examples], dtype=torch.float32)
        return batch
