"""Measures a model on the tokens of a batch: the noise of its log-probs between two scorings, and what truncation removes.

A model may be a stranger's folder: it is read from safetensors alone, with an architecture that transformers itself has.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bandpo._inputs import as_mask
from bandpo._system.bounded import parse_json, read_regular
from bandpo.doctor.batch import PAYERS, examine_batch, load_batch
from bandpo.doctor.batch_files import Stored
from bandpo.doctor.columns import flat
from bandpo.doctor.noise import NARROW, Noise
from bandpo.doctor.setup import Setup
from bandpo.doctor.truncation import KeptMass, Truncation
from bandpo.monitoring.findings import Finding
from bandpo.objective import Objective
from bandpo.zoo import OBJECTIVES

Padding = Literal["right", "left"]

SEQUENCES = 64
"""Sequences of a batch that a model scores at most."""
_LOGITS = 1 << 26  # logits of a forward pass, 256 MiB in float32
_ROWS = 8  # sequences of a forward pass
_MAX_CONFIG = 1 << 20  # bytes


def score(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    rows: int = _ROWS,
    padding: Padding = "right",
    temperature: float = 1.0,
    seen: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Log-probs of the tokens of sequences under a causal language model, without gradient.

    Args:
        model: A causal LM of transformers.
        input_ids: `(batch, width)`, int64.
        attention_mask: `(batch, width)`, bool or 0/1: the tokens, which may have padding on either side or between them.
        rows: Sequences of a forward pass, at most: fewer where the logits would have more than 2²⁶ numbers.
        padding: Where the sequences of a forward pass are filled up to the length of the longest one.
        temperature: T > 0, by which logits are divided.
        seen: Called with log-probs of the vocabulary `(n, vocabulary)`, sequence numbers and columns `(n,)` of the tokens that
            they predict.

    Returns:
        `(batch, width)`, float32; NaN for padding and for the first token of a sequence, which has no context.

    Raises:
        ValueError: If a token is not in the vocabulary.
    """
    tokens = as_mask(attention_mask)
    words = int(model.get_input_embeddings().weight.shape[0])
    used = input_ids[tokens]
    if len(used) and not (int(used.min()) >= 0 and int(used.max()) < words):
        raise ValueError(
            f"token ids must be from 0 to {words - 1}, got {int(used.min())} to {int(used.max())}: another model's?"
        )
    found = torch.full(input_ids.shape, math.nan, dtype=torch.float32)
    places = [row.nonzero().flatten() for row in tokens]
    longest = max((len(p) for p in places), default=0)
    rows = max(1, min(rows, _LOGITS // max(1, longest * words)))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(places), rows):
            chosen = [i for i in range(start, min(start + rows, len(places))) if len(places[i]) > 1]
            for i, logp in _forward(model, input_ids, {i: places[i] for i in chosen}, padding, temperature):
                targets = input_ids[i, places[i][1:]].to(logp.device)
                found[i, places[i][1:]] = logp.gather(-1, targets[:, None]).squeeze(-1).float().cpu()
                if seen is not None:
                    seen(logp, torch.full_like(targets, i), places[i][1:].to(logp.device))
    model.train(was_training)
    return found


def _forward(
    model: Any, input_ids: Tensor, places: Mapping[int, Tensor], padding: Padding, temperature: float
) -> Iterator[tuple[int, Tensor]]:
    """The log-softmax of the predictions of each sequence, `(its tokens - 1, vocabulary)`, from one forward pass."""
    if not places:
        return
    width = max(len(p) for p in places.values())
    ids = torch.zeros(len(places), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    begin = {i: width - len(p) if padding == "left" else 0 for i, p in places.items()}
    for row, (i, place) in enumerate(places.items()):
        inside = slice(begin[i], begin[i] + len(place))
        ids[row, inside], mask[row, inside] = input_ids[i, place].cpu(), 1
    device = model.get_input_embeddings().weight.device
    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(**{name: x.to(device) for name, x in given.items()}, use_cache=False).logits
    for row, (i, place) in enumerate(places.items()):
        of_row = logits[row, begin[i] : begin[i] + len(place) - 1].float() / temperature
        yield i, of_row.log_softmax(-1)


def measure_noise(
    model: Any,
    input_ids: Tensor,
    mask: Tensor,
    *,
    attention_mask: Tensor | None = None,
    objectives: Sequence[Objective] = (),
    temperature: float = 1.0,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    kept: KeptMass | None = None,
) -> dict[str, Noise]:
    """The noise floor of the ratio of a model: its tokens scored again in other batches, with other padding, in another dtype.

    In each dtype the first scoring takes up to eight sequences at once, filled up on the right. It is compared with one
    sequence at a time, with filling up on the left, and with the same pass in the first dtype. A copy of the model is made for
    each dtype that is not its own.

    Args:
        model: A causal LM of transformers; it is not changed.
        input_ids: Prompts and completions, `(batch, width)`, int64.
        mask: The tokens that count, `(batch, width)`, bool or 0/1.
        attention_mask: The tokens that are no padding, the same shape; None for all.
        objectives: Objectives whose regions are told against the noise.
        temperature: T > 0 of the log-probs.
        dtypes: dtypes of weights and activations.
        kept: What takes the distributions of the first scoring, to measure truncation.

    Returns:
        `Noise` by what differs, such as "left padding, bfloat16".

    Raises:
        ValueError: If shapes do not fit, or a token is not in the vocabulary.
    """
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if input_ids.dim() != 2 or not input_ids.shape == mask.shape == attention_mask.shape:
        shapes = [tuple(x.shape) for x in (input_ids, mask, attention_mask)]
        raise ValueError(f"measure_noise: input_ids, mask and attention_mask must be (batch, width), got {shapes}")
    counted = as_mask(mask) & as_mask(attention_mask)

    def taken(logp: Tensor, row: Tensor, column: Tensor) -> None:
        assert kept is not None
        inside = counted.to(logp.device)[row, column]
        chosen = logp.gather(-1, input_ids.to(logp.device)[row, column][:, None]).squeeze(-1)
        kept.add(logp[inside], chosen[inside])

    found: dict[str, Noise] = {}
    first: Tensor | None = None
    for dtype in dtypes:
        own = next(model.parameters()).dtype == dtype
        of_dtype = model if own else copy.deepcopy(model).to(dtype)
        label = str(dtype).removeprefix("torch.")
        watched = taken if kept is not None and first is None else None
        base = score(of_dtype, input_ids, attention_mask, temperature=temperature, seen=watched)
        alone = score(of_dtype, input_ids, attention_mask, temperature=temperature, rows=1)
        left = score(of_dtype, input_ids, attention_mask, temperature=temperature, padding="left")
        if first is not None:
            found[f"{label} against {str(dtypes[0]).removeprefix('torch.')}"] = _noise(first, base, counted, objectives)
        first = base if first is None else first
        found[f"one sequence at a time, {label}"] = _noise(base, alone, counted, objectives)
        found[f"left padding, {label}"] = _noise(base, left, counted, objectives)
        del of_dtype
    return found


def _noise(first: Tensor, second: Tensor, mask: Tensor, objectives: Sequence[Objective]) -> Noise:
    found = Noise(objectives)
    found.add(first, second, mask.cpu())
    return found


def examine_model(
    model: Any,
    tensors: Mapping[str, Tensor | Stored],
    *,
    objectives: Sequence[Objective] = (),
    truncation: Truncation | None = None,
    temperature: float = 1.0,
) -> list[Finding]:
    """Noise floor and kept mass of a model on the tokens of a batch: at most 64 sequences, evenly spaced.

    Args:
        model: A causal LM of transformers; it is not changed.
        tensors: A batch of `bandpo.doctor.batch.load_batch`, with `input_ids`, or with `prompt_ids` and `completion_ids`.
        objectives: Objectives whose regions are told against the noise.
        truncation: How the sampler cuts its distribution; None if that is not known.
        temperature: T > 0 of the sampler.

    Raises:
        ValueError: If a token is not in the vocabulary.
    """
    tokens = _tokens_of(tensors)
    if tokens is None:
        return [
            Finding(
                "noise", "note", "not known: the batch has no token ids (input_ids, or prompt_ids and completion_ids)"
            )
        ]
    ids, attention, mask = tokens
    kept = KeptMass(truncation)
    found = measure_noise(
        model, ids, mask, attention_mask=attention, objectives=objectives, temperature=temperature, kept=kept
    )
    return [_summary(found, len(ids)), *kept.findings()]


def _summary(found: Mapping[str, Noise], sequences: int) -> Finding:
    """One finding for all comparisons; the level is that of the comparisons within one dtype, of which training makes two."""
    rows = [f"{'':<38} {'median':>8} {'.99':>8} {'most':>8}  half of each region where it is narrowest"]
    numbers: dict[str, float] = {}
    worst: tuple[float, str, float, str] | None = None
    shown = ""
    for what, noise in found.items():
        if not noise.tokens:
            continue
        narrowest = noise.narrowest()
        multiples = ", ".join(f"{name} {width:.3g}x" for width, name, _ in narrowest) or "-"
        total = noise.total
        rows.append(f"{what:<38} {total.at(0.5):>8.2g} {total.at(0.99):>8.2g} {total.largest:>8.2g}  {multiples}")
        numbers |= {f"{what}/{name}": value for name, value in noise.numbers().items()}
        shown = shown or what
        if narrowest and " against " not in what:
            worst = min((*min(narrowest), what), worst or (math.inf, "", 1.0, ""))
    if not numbers:
        return Finding("noise", "note", "not known: no token of the batch has a context")
    shown = worst[3] if worst else shown
    rows += [f"{shown}:", *found[shown].table()]
    seen = f"{sequences} sequences scored again by the model"
    if worst:
        seen += f": half of {worst[1]} at p = {worst[2]:.2g} is {worst[0]:.3g} times the noise ({shown})"
    single = found[shown].finding(shown)
    if worst and worst[0] < NARROW:
        return Finding("noise", single.level, seen, single.cause, single.knob, tuple(rows), numbers)
    return Finding("noise", "ok", seen, details=tuple(rows), numbers=numbers)


def examine_saved(
    path: Path,
    *,
    objectives: Sequence[Objective] = (),
    target: float = 0.01,
    vocabulary: int | None = None,
    setup: Setup | None = None,
    model: Path | None = None,
) -> list[Finding]:
    """The findings about a saved batch, and about a model on its tokens.

    Args:
        path: The file.
        objectives: The run's own objectives.
        target: Share of tokens that the recommended radius clips.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.
        setup: Settings of the run, of which those of the sampler are used.
        model: Folder of the model that scores the tokens; None for none.

    Raises:
        ValueError: If a file cannot be read.
    """
    truncation = temperature = None
    if setup is not None and None not in (setup.top_p, setup.top_k, setup.min_p):
        truncation = Truncation(setup.top_p or 1.0, max(0, setup.top_k or 0), setup.min_p or 0.0)
        temperature = setup.temperature
    batch = load_batch(path)
    try:
        found = examine_batch(batch, objectives=objectives, target=target, vocabulary=vocabulary, truncation=truncation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if model is not None:
        found += examine_model(
            load_model(model),
            batch,
            objectives=list(objectives) or [OBJECTIVES[name] for name in PAYERS],
            truncation=truncation,
            temperature=temperature if temperature and temperature > 0 else 1.0,
        )
    return found


def _tokens_of(tensors: Mapping[str, Tensor | Stored]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Ids, attention and loss mask of prompts and completions, of evenly spaced sequences; None where there are no ids."""
    shape = tensors["logprobs"].shape
    if len(shape) != 2:
        return None
    count = min(SEQUENCES, shape[0])
    rows = [i * shape[0] // count for i in range(count)]

    def take(name: str, width: int) -> Tensor:
        if name not in tensors:
            return torch.ones(count, width, dtype=torch.int64)
        value = tensors[name]
        found = torch.stack([flat(value, i * width, (i + 1) * width) for i in rows])
        return found.to(torch.int64) if name.endswith("ids") else as_mask(found).to(torch.int64)

    of_loss = take("mask", shape[1])
    if "input_ids" in tensors:
        width = tensors["input_ids"].shape[1]
        ids, attention = take("input_ids", width), take("attention_mask", width)
        if width < shape[1]:
            return None
        mask = torch.cat([torch.zeros(count, width - shape[1], dtype=torch.int64), of_loss], 1)
        return ids, attention, mask
    if not {"prompt_ids", "completion_ids"} <= tensors.keys():
        return None
    prompts = tensors["prompt_ids"].shape[1]
    ids = torch.cat([take("prompt_ids", prompts), take("completion_ids", shape[1])], 1)
    attention = torch.cat([take("prompt_mask", prompts), of_loss], 1)
    return ids, attention, torch.cat([torch.zeros(count, prompts, dtype=torch.int64), of_loss], 1)


def load_model(folder: Path) -> Any:
    """A causal LM from a local folder, in float32. Nothing is downloaded, and no code of the folder is run.

    Args:
        folder: A folder with config.json and weights as .safetensors.

    Raises:
        ValueError: If it is no such folder, asks for code of its own, or is quantised.
    """
    if not folder.is_dir():
        raise ValueError(f"--model {folder}: it must be a local folder with config.json and .safetensors")
    if not any(path.is_file() for path in folder.glob("*.safetensors")):
        raise ValueError(f"--model {folder} has no .safetensors; other formats can contain code")
    config = parse_json(read_regular(folder / "config.json", _MAX_CONFIG), f"{folder}/config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.json is no object")
    for key, why in (("auto_map", "it needs code of its own"), ("quantization_config", "it is quantised")):
        if cast("dict[str, object]", config).get(key):
            raise ValueError(f"--model {folder} has {key} in config.json: {why}, which is not run here")
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
    except Exception as error:  # what transformers and safetensors raise has no common class
        message = " ".join(str(error).split())[:200]
        raise ValueError(f"--model {folder} cannot be loaded: {message}") from None
