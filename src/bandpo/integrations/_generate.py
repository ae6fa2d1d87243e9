"""Sampling and scoring completions with transformers: what the evaluation and the online preference trainer share."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from bandpo.preference.probe import Pooling, pool_hidden


def sample_batches(
    model: Any, tokenizer: Any, prompts: list[Any], *, samples: int, max_new_tokens: int, temperature: float = 1.0,
    top_p: float = 1.0, batch_size: int = 64, seed: int = 0,
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
        batch_size: Completions at once.
        seed: Of sampling; the state of the random generators is restored.

    Yields:
        Numbers of the prompts, token ids of each prompt, token ids of `samples` completions of each, the end mark included.
    """
    state = PartialState()
    mine = list(range(state.process_index, len(prompts), state.num_processes))
    at_once = max(1, batch_size // samples)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else None), torch.no_grad():
        torch.manual_seed(seed + state.process_index)
        for first in range(0, len(mine), at_once):
            chosen = mine[first : first + at_once]
            inputs = tokenize(tokenizer, [prompts[i] for i in chosen]).to(model.device)
            repeated = {name: value.repeat_interleave(samples, 0) for name, value in inputs.items()}
            output = model.generate(
                **repeated, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id, **sampling,
            )  # fmt: skip
            asked = [
                ids[mask != 0].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            width = inputs["input_ids"].shape[1]
            yield chosen, asked, [_until_end(row.tolist(), tokenizer) for row in output[:, width:]]
    model.train(was_training)


def _until_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Up to the end mark and with it; a completion that has none was cut off, and loses only padding."""
    if tokenizer.eos_token_id in ids:
        return ids[: ids.index(tokenizer.eos_token_id) + 1]
    while ids and ids[-1] == tokenizer.pad_token_id:
        ids = ids[:-1]
    return ids


def tokenize(tokenizer: Any, prompts: list[Any]) -> Any:
    """Prompts, texts or messages, as a left-padded batch."""
    if isinstance(prompts[0], str):
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    else:
        batch = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_tensors="pt", padding=True, padding_side="left", return_dict=True,
        )  # fmt: skip
    batch.pop("token_type_ids", None)
    return batch


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
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each completion, summed over its tokens, and its hidden states at the last token where asked.

    Args:
        model: A causal LM.
        prompts: Token ids.
        completions: Token ids, none empty.
        pad: Token to fill with, on the right.
        batch_size: Sequences at once.
        hidden: Also return `(completions, layers, width)`: what each layer puts out, pooled so over the completion.

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
        with layer_states(model) if hidden else nullcontext([]) as layers:
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
