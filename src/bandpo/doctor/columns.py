"""Further columns of a saved batch beside the tensors of the loss, and the batch in parts of whole sequences."""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bandpo._inputs import as_mask, is_logprob
from bandpo.doctor.batch_files import Stored
from bandpo.monitoring.names import TENSORS
from bandpo.objective import Objective
from bandpo.terms import TokenObjective, token_objective

PART = 1 << 18
"""Tokens that are examined at a time, so that their float64 tensors stay in the processor's caches."""
LONGEST = 1 << 20
"""Tokens of the longest sequence that is examined as one; of longer ones the measures of sequences are left out."""
_IN_FLOAT64 = 1 << 17  # tokens up to which objectives are evaluated in float64: the tables of bands are float32
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Column(NamedTuple):
    """A column that a batch may have."""

    names: tuple[str, ...]
    """Our name and the names that hosts have for it."""
    of: Literal["token", "sequence", "alternatives", "input"]
    """What a number belongs to: a token; a token or a sequence; with others to a token; a token of prompt or completion."""
    dtypes: tuple[torch.dtype, ...]
    """The dtypes that it may have."""


COLUMNS: Mapping[str, Column] = {
    "ref_logprobs": Column(("ref_logprobs", *TENSORS["ref_logprobs"].values()), "token", _FLOATS),
    "again_logprobs": Column(("again_logprobs", "logprobs_again", "rescored_logprobs"), "token", _FLOATS),
    "version": Column(
        (
            "version",
            "versions",
            "policy_version",
            "weight_version",
            "weight_versions",
            "model_version",
            "param_version",
        ),
        "sequence",
        (*_WHOLE, *_FLOATS),
    ),
    "age": Column(("age", "staleness", "off_policy_steps", "off_policy_level", "lag"), "sequence", (*_WHOLE, *_FLOATS)),
    "group": Column(
        ("group", "group_id", "group_ids", "group_index", "prompt_index", "prompt_id", "uid"), "sequence", _WHOLE
    ),
    "completion_ids": Column(("completion_ids", "responses", "response_ids", "completion_tokens"), "token", _WHOLE),
    "old_topk_logprobs": Column(("old_topk_logprobs", "topk_logprobs", "top_logprobs"), "alternatives", _FLOATS),
    "logits": Column(("logits",), "alternatives", _FLOATS),
    "input_ids": Column(("input_ids",), "input", _WHOLE),
    "attention_mask": Column(("attention_mask",), "input", (*_WHOLE, *_FLOATS)),
    "prompt_ids": Column(("prompt_ids", "prompts"), "input", _WHOLE),
    "prompt_mask": Column(("prompt_mask",), "input", (*_WHOLE, *_FLOATS)),
}
"""Columns by our names. `version` is the number of the policy that sampled, `age` how many updates it is behind the trainer,
`again_logprobs` are those of `logprobs` computed a second time, and `group` is equal for the completions of one prompt."""


def sort_columns(
    batch: Mapping[str, Tensor | Stored],
) -> tuple[dict[str, Tensor | Stored], dict[str, Tensor | Stored], list[str]]:
    """The tensors of the loss, the further columns that fit to them, and why others do not.

    Args:
        batch: Tensors by our names.

    Returns:
        The tensors that are no column of `COLUMNS`; the columns; and a reason for each column that is left out.
    """
    core = {name: value for name, value in batch.items() if name not in COLUMNS}
    shape = core["logprobs"].shape if "logprobs" in core else torch.Size()
    columns: dict[str, Tensor | Stored] = {}
    left_out: list[str] = []
    for name in (name for name in batch if name in COLUMNS):
        reason = _unfit(name, batch[name], shape)
        if reason:
            left_out.append(f"{name}: {reason}")
        else:
            columns[name] = batch[name]
    return core, columns, left_out


def _unfit(name: str, value: Tensor | Stored, shape: torch.Size) -> str:
    """Why a column cannot be used, "" if it can."""
    column, found = COLUMNS[name], tuple(value.shape)
    if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided or value.is_quantized):
        return "it is no dense tensor"
    if isinstance(value, Tensor) and (value.is_meta or value.untyped_storage().nbytes() < value.nbytes):
        return f"it says it has {value.numel():,} numbers, and does not hold them"
    if value.dtype not in column.dtypes:
        return f"it has the dtype {value.dtype}"
    rows, token = tuple(shape[:-1]), tuple(shape)
    fits = {
        "token": found == token,
        "sequence": found in (token, (*rows, 1)) or (len(token) > 1 and found == rows),
        "alternatives": found[:-1] == token and found[-1:] != (0,),
        "input": len(found) == 2 and len(token) == 2 and found[0] == token[0] and found[1] > 0,
    }[column.of]
    return "" if fits else f"it has the shape {found}, logprobs {token}"


class Part:
    """Some of the tokens of a batch: whole sequences, `(sequences, time)`, or tokens alone, `(tokens,)`.

    Args:
        columns: The columns; log-probs, advantages and what goes with them in float64, ids and versions as they are.
        by_sequence: Whether the rows are whole sequences.
        wide: Whether objectives are evaluated in float64.
    """

    def __init__(self, columns: Mapping[str, Tensor], *, by_sequence: bool, wide: bool = True) -> None:
        self.columns, self.by_sequence = columns, by_sequence
        self._dtype = torch.float64 if wide else torch.float32
        self._terms: dict[int, tuple[TokenObjective, Tensor]] = {}
        logp, old, advantages = (columns[name] for name in ("logprobs", "old_logprobs", "advantages"))
        self.mask = as_mask(columns["mask"]) if "mask" in columns else torch.ones_like(logp, dtype=torch.bool)
        self.valid = self.mask & is_logprob(logp) & is_logprob(old) & advantages.isfinite()
        """The tokens that count, of which all numbers that are always needed are finite."""

    def has(self, name: str) -> bool:
        """Whether there is such a column.

        Args:
            name: Our name.
        """
        return name in self.columns

    def terms(self, objective: Objective) -> tuple[TokenObjective, Tensor]:
        """An objective evaluated on these tokens, and the log-probs that its value has a gradient by.

        Args:
            objective: An objective without extras.
        """
        if id(objective) not in self._terms:
            names = ("logprobs", "old_logprobs", "advantages", "rollout_logprobs")
            given = {n: self._as_rows(self.columns[n]).to(self._dtype) for n in names if n in self.columns}
            new = given.pop("logprobs").detach().requires_grad_()
            terms = token_objective(
                objective,
                logprobs=new,
                old_logprobs=given["old_logprobs"],
                advantages=given["advantages"],
                rollout_logprobs=given.get("rollout_logprobs", given["old_logprobs"]),
                mask=self._as_rows(self.mask),
            )
            self._terms[id(objective)] = terms, new
        return self._terms[id(objective)]

    def _as_rows(self, x: Tensor) -> Tensor:
        return x if x.dim() == 2 else x.reshape(1, -1)


def parts(
    tensors: Mapping[str, Tensor | Stored], columns: Mapping[str, Tensor | Stored], size: int = PART
) -> Iterator[Part]:
    """The batch in parts of about `size` tokens; what belongs to a sequence is given to each of its tokens.

    Args:
        tensors: Checked tensors of the loss.
        columns: Further columns; only those of tokens and sequences are cut into parts.
        size: Tokens of a part. A sequence is not divided, unless it is longer than `LONGEST`.
    """
    shape = tensors["logprobs"].shape
    tokens, length = shape.numel(), shape[-1]
    by_sequence = len(shape) > 1 and length <= LONGEST
    step = max(1, size // length) * length if by_sequence else size
    wanted = {n: x for n, x in columns.items() if COLUMNS[n].of in ("token", "sequence")}
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        found: dict[str, Tensor] = {}
        for name, value in (*tensors.items(), *wanted.items()):
            piece = _piece(value, shape, start, stop)
            as_it_is = name == "mask" or (name in wanted and not piece.is_floating_point())
            found[name] = (piece.view(-1, length) if by_sequence else piece).to(
                piece.dtype if as_it_is else torch.float64
            )
        yield Part(found, by_sequence=by_sequence, wide=tokens <= _IN_FLOAT64)


def _piece(value: Tensor | Stored, shape: torch.Size, start: int, stop: int) -> Tensor:
    if value.shape == shape:
        return flat(value, start, stop)
    length = shape[-1]
    first = start // length
    of_sequences = flat(value, first, (stop - 1) // length + 1)
    return of_sequences[(torch.arange(start, stop) // length).to(of_sequences.device) - first]


def flat(value: Tensor | Stored, start: int, stop: int) -> Tensor:
    """The numbers from one to another place of the flattened tensor, without a copy of the whole.

    Args:
        value: The tensor.
        start: The first number.
        stop: The number after the last one.
    """
    if isinstance(value, Stored):
        return value.flat(start, stop)
    value = value.detach()
    width = value.shape[1:].numel()
    first = start // width
    rows = value[first : (stop - 1) // width + 1]
    return rows.reshape(-1)[start - first * width : stop - first * width]
