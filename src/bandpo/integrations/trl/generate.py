"""Sampling and scoring completions with transformers: what the evaluation and the online preference trainer share.

The sampler is the one that is asked for and nothing else. In transformers a model's own `generation_config` (a repetition
penalty, top-k, forced or suppressed tokens, beams, ...) fills whatever a call leaves open: training would learn from samples of
another distribution than its log-probs are of, and an evaluation would measure a third one. So it is set aside while sampling;
of it only the end tokens count.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import GenerationConfig

from bandpo.preference.probe import Pooling, pool_hidden

_MARK = "bandpo-end-of-turn"


def sample_batches(
    model: Any, tokenizer: Any, prompts: list[Any], *, samples: int, max_new_tokens: int, temperature: float = 1.0,
    top_p: float = 1.0, top_k: int = 0, min_p: float | None = None, repetition_penalty: float = 1.0,
    generation_kwargs: Mapping[str, Any] | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 64, seed: int = 0,
) -> Iterator[tuple[list[int], list[list[int]], list[list[int]]]]:  # fmt: skip
    """Sample completions of this process's share of the prompts, batch by batch.

    Args:
        model: A causal LM with `generate`; it is in eval mode while sampling.
        tokenizer: Its tokenizer.
        prompts: Texts or messages; process i of n takes i, i + n, ...
        samples: Completions of each prompt.
        max_new_tokens: Their maximal length.
        temperature: Of sampling; 0 is greedy.
        top_p: Of sampling.
        top_k: Of sampling; 0 for all tokens.
        min_p: Of sampling; None for none.
        repetition_penalty: 1 for none.
        generation_kwargs: More options of transformers' `GenerationConfig`, on purpose.
        chat_template_kwargs: Options of the tokenizer's chat template.
        batch_size: Completions at once.
        seed: Of sampling; the state of the random generators is restored.

    Yields:
        Numbers of the prompts, token ids of each prompt, token ids of `samples` completions of each, the end mark included.
    """
    state = PartialState()
    mine = list(range(state.process_index, len(prompts), state.num_processes))
    at_once = max(1, batch_size // samples)
    sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": repetition_penalty}
    if temperature:
        sampling |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    ends, pad = end_tokens(model, tokenizer), pad_token(tokenizer)
    tokens = {"pad_token_id": pad, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends}
    options = {"max_new_tokens": max_new_tokens, **tokens, **sampling, **(generation_kwargs or {})}
    config = GenerationConfig(**options, disable_compile=True)
    was_training = model.training
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices=[] if model.device.type == "cpu" else None),
            torch.no_grad(),
            sampling_by(model, config),
        ):
            torch.manual_seed(seed + state.process_index)
            for first in range(0, len(mine), at_once):
                chosen = mine[first : first + at_once]
                asked = tokenize(tokenizer, [prompts[i] for i in chosen], chat_template_kwargs)
                ids, mask = (x.to(model.device).repeat_interleave(samples, 0) for x in _pad_left(asked, pad))
                output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
                yield chosen, asked, [_until_end(row.tolist(), ends) for row in output[:, ids.shape[1] :]]
    finally:
        model.train(was_training)


def sampler_of(args: Any) -> dict[str, Any]:
    """The sampler that a trainer's config describes, as arguments of `sample_batches` beside temperature, top_p and length.

    Args:
        args: A `BandGRPOConfig` or an `OnlinePreferenceConfig`.
    """
    names = ("top_k", "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs")
    found = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if getattr(args, "use_vllm", False) and found.pop("generation_kwargs", None):
        raise ValueError(
            f"generation_kwargs={args.generation_kwargs} are vLLM's, and the evaluation samples with transformers: it would "
            "measure another sampler. Leave them out, or set use_vllm=False"
        )
    return found


@contextmanager
def sampling_by(model: Any, config: GenerationConfig) -> Iterator[None]:
    """A model's own `generation_config` set aside: what `config` leaves open is transformers' default, not the model's.

    Args:
        model: The model, an adapter around it included.
        config: The one that `generate` is called with.
    """
    saved = [(m, m.generation_config) for m in model.modules() if "generation_config" in vars(m)]
    for module, _ in saved:
        module.generation_config = config
    try:
        yield
    finally:
        for module, own in saved:
            module.generation_config = own


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the tokenizer's, those of the model's `generation_config`, the chat template's.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: If there is none.
    """
    own = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own]), _end_of_turn(tokenizer)]
    ends = list(dict.fromkeys(i for i in found if i is not None))
    if not ends:
        raise ValueError(
            "neither the tokenizer nor the model's generation_config has an end token (eos_token): nothing ends a completion"
        )
    return ends


def pad_token(tokenizer: Any) -> int:
    """The token to fill batches with: the tokenizer's, or its end token, as TRL does.

    Args:
        tokenizer: The tokenizer.

    Raises:
        ValueError: If it has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "the tokenizer has neither a pad token nor an end token to fill batches with: set tokenizer.pad_token"
    )


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an answer, None where it puts none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False)
    except Exception:  # a template has its own rules of what a conversation is
        return None
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    behind = tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
    return next((i for i in behind if i in special), None)


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token and with it. A completion that has none was cut off at its full length, without padding."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def tokenize(
    tokenizer: Any, prompts: list[Any], chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Token ids of prompts, texts or messages, as TRL makes them.

    Args:
        tokenizer: The tokenizer.
        prompts: All texts, or all messages.
        chat_template_kwargs: Options of its chat template.
    """
    if isinstance(prompts[0], str):
        return tokenizer(prompts)["input_ids"]
    return tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]


def _pad_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows as `(rows, longest)`, and 1 where a token is."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def as_completion(prompt: Any, text: str) -> Any:
    """As TRL hands it to a reward function: text for a text prompt, messages for messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


@torch.no_grad()
def score_completions(
    model: Any,
    prompts: list[list[int]],
    completions: list[list[int]],
    *,
    pad: int,
    batch_size: int = 64,
    hidden: Pooling | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each completion, summed over its tokens, and its hidden states at the last token where asked.

    Args:
        model: A causal LM.
        prompts: Token ids.
        completions: Token ids, none empty.
        pad: Token to fill with, on the right.
        batch_size: Sequences at once.
        hidden: Also return `(completions, layers, width)`: what each layer puts out, pooled so over the completion.
        autocast: Compute in this dtype, as the trainer does.

    Returns:
        `(completions,)`, float32, and the hidden states or None; on the CPU.
    """
    sums: list[Tensor] = []
    states: list[Tensor] = []
    was_training = model.training
    model.eval()
    for first in range(0, len(prompts), batch_size):
        both = list(zip(prompts, completions, strict=True))[first : first + batch_size]
        width = max(len(p) + len(c) for p, c in both)
        ids = torch.full((len(both), width), pad)
        attention, counted = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (p, c) in enumerate(both):
            ids[row, : len(p) + len(c)] = torch.tensor(p + c)
            attention[row, : len(p) + len(c)] = 1
            counted[row, len(p) : len(p) + len(c)] = 1
        ids, attention, counted = (x.to(model.device) for x in (ids, attention, counted))
        cast = nullcontext() if autocast is None else torch.autocast(model.device.type, dtype=autocast)
        with cast, layer_states(model) if hidden else nullcontext([]) as layers:
            out = model(input_ids=ids, attention_mask=attention, use_cache=False)
        each = out.logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        sums.append((each * counted[:, 1:]).sum(1).cpu())
        if hidden:
            states.append(pool_hidden(layers, counted, hidden).cpu())
    model.train(was_training)
    return torch.cat(sums), torch.cat(states) if hidden else None


@contextmanager
def layer_states(model: Any) -> Iterator[list[Tensor]]:
    """What each layer of a decoder puts out while this is open, detached, in order; empty again for each forward pass."""
    found: list[Tensor] = []

    def note(module: Any, _: Any, out: Any) -> None:
        if module is layers[0]:
            found.clear()
        found.append((out[0] if isinstance(out, tuple) else out).detach())

    layers = list(model.get_decoder().layers)
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
