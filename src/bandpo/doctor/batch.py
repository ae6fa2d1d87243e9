"""Reads a saved batch: how many tokens each region would clip, and the radius for a target.

Tokens are counted part by part (`_Counts`), and the rules read the counts, so memory does not grow with the batch.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bandpo._inputs import traits_of
from bandpo.bounds.calibration import Tally
from bandpo.divergences import CHI2, KL, TV
from bandpo.doctor.batch_files import SMALL, Stored, read_tensors
from bandpo.doctor.columns import COLUMNS, PART, Part, parts, sort_columns
from bandpo.doctor.estimates import KLEstimates
from bandpo.doctor.gradient import Payers
from bandpo.doctor.noise import Noise
from bandpo.doctor.rules import logits
from bandpo.doctor.samples import Groups, Lengths
from bandpo.doctor.setup import Setup
from bandpo.doctor.staleness import Age, EffectiveSize
from bandpo.doctor.truncation import KeptMass, Truncation, from_columns
from bandpo.monitoring.findings import Finding
from bandpo.monitoring.names import TENSORS
from bandpo.monitoring.symptoms import MISMATCH
from bandpo.objective import Objective
from bandpo.zoo import OBJECTIVES

NAMES: Mapping[str, tuple[str, ...]] = {
    ours: (ours, *theirs.values()) for ours, theirs in TENSORS.items() if ours != "ref_logprobs"
}
"""Our names, and the hosts' names for the same tensors."""

SHOWN = ("grpo", "dapo", "dcpo", "bandpo-kl", "bandpo-tv", "bandpo-chi2")
RADII = (KL, TV, CHI2)
"""The divergences for which a radius is computed."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MASKS = (*_FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
PAYERS = ("grpo", "bandpo-kl")
"""The objectives that are measured where the run's own is not known."""
_PART = PART


def column_names() -> frozenset[str]:
    """The names of all tensors that `load_batch` takes from a file."""
    return frozenset(name for names in _wanted().values() for name in names)


def _wanted() -> dict[str, tuple[str, ...]]:
    return {**NAMES, **{ours: column.names for ours, column in COLUMNS.items()}}


def load_batch(path: Path) -> dict[str, Tensor | Stored]:
    """A saved batch with our names. Nothing in the file is executed: .pt is read with `weights_only`, .npz without pickles.

    The tensors of a .safetensors file stay there until `examine_batch` reads them, a part at a time.

    Args:
        path: A file .safetensors, .pt (a dict of tensors), .npz or .parquet.

    Raises:
        ValueError: If it cannot be read, or a tensor that is needed is missing.
    """
    batch = our_names(_read(path, _wanted()))
    further = {name: value for name, value in batch.items() if name in COLUMNS}
    core = {name: value for name, value in batch.items() if name not in COLUMNS}
    return {**check_batch(core, str(path)), **further}


def our_names(found: Mapping[str, object]) -> dict[str, Tensor | Stored]:
    """The tensors of a batch by our names; of two spellings the first counts.

    Args:
        found: Tensors by our or a host's names; others are left out.
    """
    batch: dict[str, Tensor | Stored] = {}
    for ours, spellings in _wanted().items():
        for name in spellings:
            value = found.get(name)
            if isinstance(value, Tensor | Stored):
                batch[ours] = value
                break
    return batch


def _read(path: Path, wanted: Mapping[str, tuple[str, ...]]) -> Mapping[str, object]:
    """The tensors of a file. Columns that the loss does not need are left out, with a warning, if they cannot be read."""
    names = frozenset(name for spellings in wanted.values() for name in spellings)
    try:
        return read_tensors(path, names)
    except ValueError as error:
        found = read_tensors(path, frozenset(name for ours in NAMES for name in wanted[ours]))
        warnings.warn(f"columns beside the tensors of the loss are left out: {error}", stacklevel=3)
        return found


def check_batch(batch: Mapping[str, Tensor | Stored], where: str = "batch") -> dict[str, Tensor | Stored]:
    """The batch with old log-probs, and advantages with as many dimensions as the log-probs.

    A batch that was saved before the first step on it has no log-probs of the policy in training.

    Args:
        batch: Tensors by our names, `(batch, time)` or `(tokens,)`; advantages may have one value for each sequence.
        where: Name of the batch, for error messages.

    Raises:
        ValueError: If a tensor is missing or has another shape or dtype.
    """
    batch = dict(batch)
    before_training = "logprobs" not in batch and "old_logprobs" in batch
    if before_training:
        batch["logprobs"] = batch["old_logprobs"]
    for name in ("logprobs", "advantages"):
        if name not in batch:
            raise ValueError(f"{where} lacks {name} (or {', '.join(NAMES[name][1:]) or 'another name for it'})")
    if "old_logprobs" not in batch:
        if "rollout_logprobs" not in batch:
            raise ValueError(
                f"{where} lacks old_logprobs ({', '.join(NAMES['old_logprobs'][1:])}) and rollout_logprobs"
            )
        batch["old_logprobs"] = batch["rollout_logprobs"]
    for name, value in batch.items():
        _check_kind(name, value, where)
    shape = batch["logprobs"].shape
    if not shape:
        raise ValueError(f"{where}: logprobs is one number; a batch has (batch, time) of them, or (tokens,)")
    if batch["logprobs"].numel() == 0:
        raise ValueError(f"{where} is empty: logprobs has the shape {tuple(shape)}")
    advantages = batch["advantages"]
    if advantages.ndim == len(shape) - 1 and advantages.shape == shape[:-1]:
        batch["advantages"] = advantages.unsqueeze(-1)
    for name, value in batch.items():
        broadcasts = name == "advantages" and value.ndim == len(shape) and value.shape == (*shape[:-1], 1)
        if value.shape != shape and not broadcasts:
            raise ValueError(f"{where}: {name} has the shape {tuple(value.shape)}, logprobs {tuple(shape)}")
    return {name: value for name, value in batch.items() if name != "logprobs"} if before_training else batch


def _check_kind(name: str, value: Tensor | Stored, where: str) -> None:
    """Require a dense tensor of numbers: not sparse, quantized, nested, without data (meta), or complex."""
    if isinstance(value, Tensor) and (
        value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta
    ):
        kind = "without data" if value.is_meta else "quantized" if value.is_quantized else "sparse or nested"
        raise ValueError(f"{where}: {name} must be a dense tensor, got a {kind} one")
    if name == "mask" and value.dtype not in _MASKS:
        raise ValueError(f"{where}: mask must be bool, whole numbers or floating point, got {value.dtype}")
    if name != "mask" and value.dtype not in _FLOATS:
        raise ValueError(f"{where}: {name} must be floating point, got {value.dtype}")
    if isinstance(value, Stored):  # its size was compared with that of the file
        return
    held = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > max(SMALL, held):
        raise ValueError(f"{where}: {name} says it has {value.numel():,} numbers, and holds {held:,}")


def examine_batch(
    batch: Mapping[str, Tensor | Stored],
    *,
    objectives: Sequence[Objective] = (),
    target: float = 0.01,
    vocabulary: int | None = None,
    truncation: Truncation | None = None,
) -> list[Finding]:
    """Expected clip fractions, a recommended radius for a target, symptoms, and what decides a run beyond these.

    Args:
        batch: `logprobs`, `old_logprobs`, `advantages`, and optionally `mask` and `rollout_logprobs`, `(batch, time)`; and
            any of `bandpo.doctor.columns.COLUMNS`.
        objectives: Further objectives whose clipped tokens are counted, for example the run's own.
        target: Share of tokens that the recommended radius clips, between 0 and 1.
        vocabulary: Number of tokens in the model's vocabulary, for the memory of the logits; None for that of the batch's
            logits, if it has some.
        truncation: How the sampler cuts its distribution; None if that is not known.

    Raises:
        ValueError: If a tensor is missing or has another shape, no token is valid, or the target is not between 0 and 1.

    Examples:
        >>> x = torch.linspace(-0.5, 0.5, 1000).view(10, 100)
        >>> batch = {"logprobs": x - 0.7, "old_logprobs": torch.full_like(x, -0.7), "advantages": x.sign()}
        >>> [f.rule for f in examine_batch(batch)]
        ['ratios', 'clipping', 'radius', 'effective size', 'gradient']
    """
    if not 0 < target < 1:
        raise ValueError(f"target must be between 0 and 1, got {target}")
    if "logprobs" not in batch and "old_logprobs" in batch:
        unmoved = {**batch, "logprobs": batch["old_logprobs"]}
        found = examine_batch(
            unmoved, objectives=objectives, target=target, vocabulary=vocabulary, truncation=truncation
        )
        return [_before_training(), *(f for f in found if f.rule not in _OF_A_MOVE)]
    core, columns, left_out = sort_columns(batch)
    tensors = check_batch(core)
    counted, measures = _Counts(tensors, objectives, target), _Measures(tensors, objectives)
    for part in parts(tensors, columns, _PART):
        counted.add(part)
        measures.add(part)
    if not counted.masked:
        raise ValueError("the batch has no valid token: its mask is 0 everywhere")
    found = _broken(counted)
    if not counted.valid:
        return found
    if counted.silent:
        found.append(
            Finding(
                "signal",
                "problem",
                "every advantage is 0: nothing can be learned from this batch",
                "all completions of each prompt have the same reward, or none was scored",
                "prompts of medium difficulty, more completions for each prompt; look at the reward function",
            )
        )
    found += [_ratios(counted), _clip_fractions(counted), _radii(counted, target)]
    if counted.sampler_differs:
        found.append(_sampler(counted))
    found += measures.findings()
    kept = KeptMass(truncation)
    from_columns(columns, tensors["old_logprobs"], tensors.get("mask"), kept)
    found += kept.findings()
    found += _memory(tensors, columns, vocabulary)
    return found + [Finding("columns", "note", f"not used: {reason}") for reason in left_out]


class _Measures:
    """The measures that look at a batch part by part, in the order of their findings."""

    def __init__(self, tensors: Mapping[str, Tensor | Stored], objectives: Sequence[Objective]) -> None:
        chosen = list(objectives) or [OBJECTIVES[name] for name in PAYERS]
        tokens = tensors["logprobs"].numel()
        self._again = Noise(chosen)
        self._payers = Payers(chosen, tokens, _PART)
        self._measures = (
            EffectiveSize(),
            Age(next((o for o in chosen if not o.extras and o.anchor == "old"), None)),
            self._payers,
            Groups(),
            Lengths(),
            KLEstimates(),
        )

    def add(self, part: Part) -> None:
        for measure in self._measures:
            measure.add(part)
        if part.has("again_logprobs"):
            self._again.add(part.columns["logprobs"], part.columns["again_logprobs"], part.valid)

    def findings(self) -> list[Finding]:
        noise = [self._again.finding()] if self._again.tokens else []
        return noise + [finding for measure in self._measures for finding in measure.findings()]


_OF_A_MOVE = ("ratios", "clipping", "radius", "gradient")
"""The rules that need the log-probs of the policy in training."""


def _before_training() -> Finding:
    return Finding(
        "ratios",
        "note",
        "not known: the batch has no log-probs of the policy in training, so no token can be outside of a region",
        "it was saved before the first step on it, as the rollouts of TRL and the DataProto of verl are",
        "save the log-probs of a late step on the rollout beside it, as logprobs",
    )


class _Counts:
    """What the rules need of a batch, counted part by part. Sums are taken in float64, counts in whole numbers."""

    def __init__(self, tensors: Mapping[str, Tensor | Stored], objectives: Sequence[Objective], target: float) -> None:
        tokens = tensors["logprobs"].numel()
        shown = [*objectives, *(OBJECTIVES[name] for name in SHOWN)]
        shown = [o for i, o in enumerate(shown) if o not in shown[:i]]
        shown = [o for o in shown if not o.bounds_inputs and o.ratio_level == "token"]
        whole = tokens <= _PART
        self.left_out = [o for o in shown if not whole and "of_batch" in traits_of(o.bounds)]
        self.objectives = [o for o in shown if o not in self.left_out]
        self.tally = Tally([o.bounds for o in self.objectives], RADII, most=round(target * tokens))
        self.masked = self.valid = self.broken = self.above = 0
        self.silent, self.sampler_differs = True, False
        self.moved = self.furthest = 0.0
        self.apart = self.furthest_apart = 0.0
        self.compared = 0

    def add(self, part: Part) -> None:
        logp, old, advantages = (part.columns[name] for name in ("logprobs", "old_logprobs", "advantages"))
        mask, valid = part.mask, part.valid
        self.masked += int(mask.sum())
        self.above += int((mask & ((logp > 1e-6) | (old > 1e-6))).sum())
        count = int(valid.sum())
        self.broken += int(mask.sum()) - count
        self.valid += count
        if part.has("rollout_logprobs") and not self.sampler_differs:
            sampled = part.columns["rollout_logprobs"]
            self.sampler_differs = bool(((sampled != old) & ~(sampled.isnan() & old.isnan())).any())
        if not count:
            return
        log_ratio = (logp - old).masked_fill(~valid, 0.0)
        advantages = advantages.masked_fill(~valid, 0.0)
        self.silent = self.silent and not advantages.any()
        size = log_ratio.abs()
        self.moved += size.sum().item()
        self.furthest = max(self.furthest, size.max().item())
        old = old.masked_fill(~valid, -1.0)
        self.tally.add(
            {"log_ratio": log_ratio, "old_logprobs": old.clamp(max=0.0), "advantages": advantages, "mask": valid}
        )
        if part.has("rollout_logprobs"):
            apart = (old - part.columns["rollout_logprobs"])[valid]
            apart = apart[apart.isfinite()].abs()
            self.apart += apart.sum().item()
            self.furthest_apart = max(self.furthest_apart, apart.max().item() if len(apart) else 0.0)
            self.compared += len(apart)


def _memory(
    tensors: Mapping[str, Tensor | Stored], columns: Mapping[str, Tensor | Stored], vocabulary: int | None
) -> list[Finding]:
    """How much memory the logits of the batch need if they are made at once."""
    words = columns["logits"].shape[-1] if vocabulary is None and "logits" in columns else vocabulary
    if words is None:
        return []
    found = logits(Setup("bandpo train", None, tokens=tensors["logprobs"].numel(), vocabulary=words))
    assert found is not None
    level = "ok" if found.level == "ok" else "note"  # how many tokens a step takes at once is not in a batch
    return [dataclasses.replace(found, level=level, seen=f"if the whole batch is scored at once, {found.seen}")]


def _broken(counted: _Counts) -> list[Finding]:
    found: list[Finding] = []
    if counted.broken:
        found.append(
            Finding(
                "nonfinite",
                "problem",
                f"{counted.broken} of {counted.masked} valid tokens have a log-prob or advantage that is not finite",
                "16-bit overflow, or a token that the sampler could not score",
                "float32 log-probs; these tokens are left out below",
            )
        )
    if counted.above:
        found.append(
            Finding(
                "positive",
                "problem",
                f"{counted.above} valid tokens have a log-prob above 0",
                "these are not log-probabilities: they may be logits, or scaled",
                "apply log_softmax before the gather",
            )
        )
    return found


def _ratios(counted: _Counts) -> Finding:
    mean, furthest = counted.moved / counted.valid, counted.furthest
    seen = f"{counted.valid} valid tokens; |log r| is {mean:.4g} on average, {furthest:.4g} at most"
    if furthest < 1e-6 and counted.silent:
        return Finding("ratios", "note", f"{seen}: every ratio is 1", "with advantages of 0 no weight moves")
    if furthest < 1e-6:
        return Finding(
            "ratios",
            "problem",
            f"{seen}: every ratio is 1",
            "the batch is on policy: it was saved before the first step on it, or each rollout is used once",
            "save the batch of a later step on the same rollout",
        )
    return Finding("ratios", "ok", seen)


def _clip_fractions(counted: _Counts) -> Finding:
    outside = zip(counted.objectives, counted.tally.outside, strict=True)
    rows = [f"{objective.name:<14} {n / max(1, counted.tally.valid):.4f}" for objective, n in outside]
    rows += [f"{o.name:<14} not counted: its region depends on the whole batch" for o in counted.left_out]
    return Finding(
        "clipping",
        "note",
        "share of the tokens outside of each region, where a clip takes the gradient away",
        details=tuple(rows),
    )


def _radii(counted: _Counts, target: float) -> Finding:
    """Radii by the divergences of the tokens; a token whose divergence is the radius itself, as in a tie, is inside."""
    rows: list[str] = []
    error = 0.0
    for i, divergence in enumerate(RADII):
        try:
            split = counted.tally.radius_for(i, target)
        except ValueError as reason:
            return Finding(
                "radius", "note", f"no radius clips {target:g} of these tokens", str(reason).partition(": ")[2]
            )
        share, error = split.outside / counted.tally.valid, max(error, split.error)
        rows.append(f"bandpo-{divergence.name.lower():<7} radius {split.radius:.4g}  clips {share:.4f} without a cap")
    seen = f"radius that clips {target:g} of these tokens"
    if error:
        seen += f", to {error:.1%}: the batch has more tokens than are sorted"
    return Finding("radius", "note", seen, details=tuple(rows))


def _sampler(counted: _Counts) -> Finding:
    mean, worst = counted.apart / max(1, counted.compared), counted.furthest_apart
    seen = f"|log-prob| of sampler and trainer differ by {mean:.4f} on average, {worst:.3f} at most"
    if mean > MISMATCH:
        return Finding(
            "mismatch",
            "warning",
            seen,
            "precision, kernels, stale weights or truncated sampling",
            "an objective with the rollout anchor (dppo-kl) or a correction (tis, icepop)",
        )
    return Finding("mismatch", "ok", seen)
