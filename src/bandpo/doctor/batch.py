"""What a batch says: how many tokens each region would clip, and the radius for a target.

A saved batch is a stranger's file: what it takes to read is in proportion to its size, whatever its header says.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bandpo._inputs import as_mask, is_logprob
from bandpo._system.bounded import parse_json, read_regular
from bandpo.bounds import Band
from bandpo.bounds.calibration import outside_fraction, radius_for
from bandpo.divergences import CHI2, KL, TV
from bandpo.doctor.findings import Finding
from bandpo.doctor.symptoms import MISMATCH
from bandpo.objective import Objective
from bandpo.zoo import OBJECTIVES

NAMES: Mapping[str, tuple[str, ...]] = {
    "logprobs": ("logprobs", "per_token_logps", "log_prob", "log_probs", "trainer_logprobs"),
    "old_logprobs": ("old_logprobs", "old_per_token_logps", "old_log_prob", "old_log_probs"),
    "rollout_logprobs": ("rollout_logprobs", "sampling_per_token_logps", "rollout_log_probs", "inference_logprobs"),
    "advantages": ("advantages",),
    "mask": ("mask", "completion_mask", "response_mask", "loss_mask", "action_mask"),
}
"""Our names, TRL's, verl's, prime-rl's and OpenRLHF's."""

SHOWN = ("grpo", "dapo", "dcpo", "bandpo-kl", "bandpo-tv", "bandpo-chi2")
_SUFFIXES = (".safetensors", ".pt", ".npz")

_MAX_BYTES = 1 << 30
_MAX_HEADER = 1 << 18  # bytes; that of a batch has some hundred
_SMALL = 1 << 20  # numbers that a tensor may have however few of them the file holds
_MOST_COMPRESSED = 50  # times that a file may grow when it is unpacked
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MASKS = (*_FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# What torch.save writes for a dict of tensors.
_GLOBALS = frozenset({"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch Size"})
_OPCODES_WITHOUT_GLOBALS = frozenset(
    {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4"}
)


def load_batch(path: Path) -> dict[str, Tensor]:
    """A saved batch in our names. Nothing in the file is executed: .pt is read with `weights_only`, .npz without pickles.

    Args:
        path: .safetensors, .pt (a dict of tensors) or .npz.

    Raises:
        ValueError: If it cannot be read, or lacks what is needed; the message says what.
    """
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: a batch ends in {', '.join(_SUFFIXES)}")
    data = read_regular(path, _MAX_BYTES, follow=False)
    try:
        found = _READERS[path.suffix](data)
    except (Exception, RecursionError, MemoryError) as error:  # each format has its own
        message = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a batch: {message}") from None
    batch: dict[str, Tensor] = {}
    for ours, spellings in NAMES.items():
        for name in spellings:
            value = found.get(name)
            if isinstance(value, Tensor):
                batch[ours] = value.detach()
                break
    return check_batch(batch, str(path))


def check_batch(batch: Mapping[str, Tensor], where: str = "batch") -> dict[str, Tensor]:
    """The batch with float log-probs and advantages per token.

    Args:
        batch: Tensors in our names.
        where: For messages.

    Raises:
        ValueError: If something is missing, or of another shape or dtype.
    """
    batch = dict(batch)
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
        batch["advantages"] = advantages = advantages.unsqueeze(-1)
    for name, value in batch.items():
        broadcasts = name == "advantages" and value.ndim == len(shape) and value.shape == (*shape[:-1], 1)
        if value.shape != shape and not broadcasts:
            raise ValueError(f"{where}: {name} has the shape {tuple(value.shape)}, logprobs {tuple(shape)}")
    return {name: value if name == "mask" else value.expand(shape).double() for name, value in batch.items()}


def _check_kind(name: str, value: Tensor, where: str) -> None:
    """A dense tensor of numbers in memory: not sparse, quantized, nested, without data (meta), or complex."""
    if value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "without data" if value.is_meta else "quantized" if value.is_quantized else "sparse or nested"
        raise ValueError(f"{where}: {name} must be a dense tensor, got a {kind} one")
    if name == "mask" and value.dtype not in _MASKS:
        raise ValueError(f"{where}: mask must be bool, whole numbers or floating point, got {value.dtype}")
    if name != "mask" and value.dtype not in _FLOATS:
        raise ValueError(f"{where}: {name} must be floating point, got {value.dtype}")
    held = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > max(_SMALL, held):
        raise ValueError(f"{where}: {name} says it has {value.numel():,} numbers, and holds {held:,}")


def examine_batch(
    batch: Mapping[str, Tensor], *, objectives: Sequence[Objective] = (), target: float = 0.01
) -> list[Finding]:
    """Expected clip fractions, a recommended radius for a target, and symptoms.

    Args:
        batch: `logprobs`, `old_logprobs`, `advantages`, and `mask`, `rollout_logprobs` where there are any, `(batch, time)`.
        objectives: What else to count clipped tokens of, the run's own for example.
        target: Share of tokens to clip, for the radius.

    Raises:
        ValueError: If something is missing, or of another shape; or if the target is not between 0 and 1.

    Examples:
        >>> x = torch.linspace(-0.5, 0.5, 1000).view(10, 100)
        >>> batch = {"logprobs": x - 0.7, "old_logprobs": torch.full_like(x, -0.7), "advantages": x.sign()}
        >>> [f.rule for f in examine_batch(batch)]
        ['ratios', 'clip fraction', 'radius']
    """
    if not 0 < target < 1:
        raise ValueError(f"target must be between 0 and 1, got {target}")
    batch = check_batch(batch)
    mask = as_mask(batch["mask"]) if "mask" in batch else torch.ones_like(batch["logprobs"], dtype=torch.bool)
    if not mask.any():
        raise ValueError("the batch has no valid token: its mask is 0 everywhere")
    finite = is_logprob(batch["logprobs"]) & is_logprob(batch["old_logprobs"]) & batch["advantages"].isfinite()
    found = _broken(batch, mask, finite)
    mask = mask & finite
    if not mask.any():
        return found
    tokens = {
        "log_ratio": (batch["logprobs"] - batch["old_logprobs"]).masked_fill(~mask, 0.0),
        "old_logprobs": batch["old_logprobs"].masked_fill(~mask, -1.0).clamp(max=0.0),
        "advantages": batch["advantages"].masked_fill(~mask, 0.0), "mask": mask,
    }  # fmt: skip
    silent = not tokens["advantages"].any()
    if silent:
        found.append(Finding(
            "signal", "problem", "every advantage is 0: nothing can be learned from this batch",
            "all completions of each prompt have the same reward, or none was scored",
            "prompts of middling difficulty, more completions for each prompt; look at the reward function",
        ))  # fmt: skip
    found += [_ratios(tokens, silent=silent), _clip_fractions(tokens, objectives), _radii(tokens, target)]
    if "rollout_logprobs" in batch and not torch.equal(batch["rollout_logprobs"], batch["old_logprobs"]):
        found.append(_sampler(batch, mask))
    return found


def _broken(batch: Mapping[str, Tensor], mask: Tensor, finite: Tensor) -> list[Finding]:
    found: list[Finding] = []
    broken = int((mask & ~finite).sum())
    if broken:
        found.append(Finding(
            "nonfinite", "problem", f"{broken} of {int(mask.sum())} valid tokens have a log-prob or advantage "
            f"that is not finite",
            "16-bit overflow, or a token that the sampler could not score", "float32 log-probs; they are left out below",
        ))  # fmt: skip
    above = int((mask & ((batch["logprobs"] > 1e-6) | (batch["old_logprobs"] > 1e-6))).sum())
    if above:
        found.append(Finding(
            "positive", "problem", f"{above} valid tokens have a log-prob above 0", "these are not "
            "log-probabilities: logits, or scaled",
            "log_softmax before the gather",
        ))  # fmt: skip
    return found


def _ratios(tokens: Mapping[str, Tensor], *, silent: bool) -> Finding:
    moved = tokens["log_ratio"][tokens["mask"]].abs()
    seen = f"{len(moved)} valid tokens; |log r| is {moved.mean():.4g} on average, {moved.max():.4g} at most"
    if moved.max() < 1e-6 and silent:
        return Finding("ratios", "note", f"{seen}: every ratio is 1", "with advantages of 0 no weight moves")
    if moved.max() < 1e-6:
        return Finding(
            "ratios", "problem", f"{seen}: every ratio is 1", "the batch is on policy: taken before the first "
            "step on it, or each "
            "rollout is used once", "save the batch of a later step on the same rollout",
        )  # fmt: skip
    return Finding("ratios", "ok", seen)


def _clip_fractions(tokens: Mapping[str, Tensor], objectives: Sequence[Objective]) -> Finding:
    rows = []
    shown = [*objectives, *(OBJECTIVES[name] for name in SHOWN)]
    for objective in [o for i, o in enumerate(shown) if o not in shown[:i]]:
        if objective.bounds_inputs or objective.ratio_level != "token":
            continue
        rows.append(f"{objective.name:<14} {outside_fraction(objective.bounds, tokens):.4f}")
    return Finding("clip fraction", "note", "share of the tokens whose gradient each region clips", details=tuple(rows))


def _radii(tokens: Mapping[str, Tensor], target: float) -> Finding:
    rows = []
    for divergence in (KL, TV, CHI2):
        try:
            radius = radius_for(divergence, target, tokens)
        except ValueError as error:
            return Finding(
                "radius", "note", f"no radius clips {target:g} of these tokens", str(error).partition(": ")[2]
            )
        share = outside_fraction(Band(divergence, radius, max_ratio=None), tokens)
        rows.append(f"bandpo-{divergence.name.lower():<7} radius {radius:.4g}  clips {share:.4f} without a cap")
    return Finding("radius", "note", f"radius that clips {target:g} of these tokens", details=tuple(rows))


def _sampler(batch: Mapping[str, Tensor], mask: Tensor) -> Finding:
    apart = (batch["old_logprobs"] - batch["rollout_logprobs"])[mask]
    apart = apart[apart.isfinite()].abs()
    mean, worst = (apart.mean().item(), apart.max().item()) if len(apart) else (0.0, 0.0)
    seen = f"|log-prob| of sampler and trainer differ by {mean:.4f} on average, {worst:.3f} at most"
    if mean > MISMATCH:
        return Finding(
            "mismatch", "warning", seen, "precision, kernels, stale weights or cut sampling",
            "an objective with the rollout anchor (dppo-kl) or a correction (tis, icepop)",
        )  # fmt: skip
    return Finding("mismatch", "ok", seen)


def _read_safetensors(data: bytes) -> dict[str, Any]:
    from safetensors.torch import load

    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER, len(data) - 8):
        raise ValueError(f"its header has {length:,} bytes")
    parse_json(data[8 : 8 + length], "its header")
    return load(data)


def _read_pt(data: bytes) -> dict[str, Any]:
    """A zip of torch.save that names nothing but tensors; the rest of the format, and everything older, is refused."""
    with _archive(data) as file:
        for entry in file.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed, which torch.save never does")
        pickles = [entry for entry in file.infolist() if entry.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_HEADER:
            raise ValueError("it is no file of torch.save with a dict of tensors")
        _check_pickle(file.read(pickles[0]))
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dict of tensors")
    return found


def _check_pickle(data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        name = f"{argument}".replace("\n", " ")
        if opcode.name in _OPCODES_WITHOUT_GLOBALS:
            raise ValueError(f"it holds something else than tensors ({opcode.name})")
        if (
            opcode.name == "GLOBAL"
            and name not in _GLOBALS
            and not (name.startswith("torch ") and name.endswith("Storage"))
        ):
            raise ValueError(f"it holds something else than tensors ({name[:80]})")


def _read_npz(data: bytes) -> dict[str, Any]:
    import numpy as np

    with _archive(data) as file:
        for entry in file.infolist():
            with file.open(entry) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
            if dtype.hasobject:
                raise ValueError(f"{entry.filename} holds Python objects")
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"{entry.filename} says it has the shape {shape}, and holds {entry.file_size:,} bytes")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    return {name: torch.from_numpy(array) for name, array in found.items() if array.dtype.kind in "fiub"}


def _archive(data: bytes) -> zipfile.ZipFile:
    """A zip of few files that are not larger unpacked than such data can be."""
    if data[-22:-18] != b"PK\x05\x06":  # its end, without a comment: every reader then finds the same list of files
        raise ValueError("it is no zip file, or not whole")
    file = zipfile.ZipFile(io.BytesIO(data))
    entries = file.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if len(entries) > 1000 or unpacked > max(8 * _SMALL, _MOST_COMPRESSED * len(data)) or unpacked > _MAX_BYTES:
        raise ValueError(f"it has {len(entries)} entries and {unpacked:,} bytes unpacked")
    return file


_READERS = {".safetensors": _read_safetensors, ".pt": _read_pt, ".npz": _read_npz}
