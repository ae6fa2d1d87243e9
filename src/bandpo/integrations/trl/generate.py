"""Sampling and scoring completions with transformers, for evaluations and for the online preference trainer.

Completions are sampled by the given options alone. In transformers, the `generation_config` of a model (a repetition penalty,
top-k, forced or suppressed tokens, beams, ...) fills every option that a call leaves open: training would learn from samples of
another distribution than that of its log-probs, and an evaluation would measure a third one. So it is replaced while sampling;
only its end tokens are used.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import GenerationConfig

from bandpo.preference.probe import Pooling, pool_hidden

_MARK = "bandpo-end-of-turn"


def sample_batches(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    generation_kwargs: Mapping[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> Iterator[tuple[list[int], list[list[int]], list[list[int]]]]:
    """Sample completions for the prompts of this process, batch by batch.

    Args:
        model: A causal LM with `generate`; it is in eval mode while sampling.
        tokenizer: The tokenizer of the model.
        prompts: Texts or messages of all processes. Process i of n takes the prompts i, i + n, ...
        samples: Completions of each prompt.
        max_new_tokens: Largest number of tokens of a completion.
        temperature: Temperature of sampling; 0 is greedy.
        top_p: Share of the probability that sampling keeps.
        top_k: Number of the most likely tokens that sampling keeps; 0 for all tokens.
        min_p: Lowest probability that sampling keeps, relative to that of the most likely token; None for no limit.
        repetition_penalty: transformers' repetition penalty; 1 for none.
        generation_kwargs: Other options of transformers' `GenerationConfig`; they override the ones above.
        chat_template_kwargs: Options of the tokenizer's chat template.
        batch_size: Completions generated at once.
        seed: Seed of sampling; the state of the random generators is restored afterwards.
        autocast: Dtype of the forward passes; None for that of the model.

    Yields:
        The numbers of some prompts, the token ids of each of them, and the token ids of their completions, `samples` for each
        prompt, with the end token.
    """
    state: Any = PartialState()
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
                with mixed(model, autocast):
                    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
                yield chosen, asked, [_until_end(row.tolist(), ends) for row in output[:, ids.shape[1] :]]
    finally:
        model.train(was_training)


def mixed(model: Any, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """A context for forward passes in mixed precision.

    Args:
        model: The model.
        dtype: bfloat16 or float16; None for the dtype of the model.
    """
    return nullcontext() if dtype is None else torch.autocast(model.device.type, dtype=dtype)


def sampler_of(args: Any) -> dict[str, Any]:
    """The sampling options of a configuration, as arguments of `sample_batches`, without temperature, top_p and length.

    Args:
        args: A `BandGRPOConfig` or an `OnlinePreferenceConfig`.

    Returns:
        Keyword arguments of `sample_batches`.

    Raises:
        ValueError: If the options are those of vLLM, with which an evaluation does not sample.
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
def sampling_by(model: Any, config: GenerationConfig) -> Generator[None, None, None]:
    """A context in which options that `config` leaves open have transformers' defaults, and not the model's own values.

    Args:
        model: The model, with an adapter around it if there is one.
        config: The configuration that `generate` is called with.
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
    """Every token that ends a completion: of the tokenizer, of the model's `generation_config`, and of the chat template.

    Args:
        model: A causal LM.
        tokenizer: The tokenizer of the model.

    Returns:
        Ids of the tokens, without duplicates.

    Raises:
        ValueError: If there is no such token.
    """
    own: object = model.generation_config.eos_token_id
    several = list(cast("list[int | None]", own)) if isinstance(own, list | tuple) else [cast("int | None", own)]
    found: list[int | None] = [tokenizer.eos_token_id, *several, _end_of_turn(tokenizer)]
    ends = list(dict.fromkeys(i for i in found if i is not None))
    if not ends:
        raise ValueError(
            "neither the tokenizer nor the model's generation_config has an end token (eos_token): nothing ends a completion"
        )
    return ends


def pad_token(tokenizer: Any) -> int:
    """The token that fills batches: the tokenizer's pad token or, as in TRL, its end token.

    Args:
        tokenizer: The tokenizer.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "the tokenizer has neither a pad token nor an end token to fill batches with: set tokenizer.pad_token"
    )


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an answer; None if there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False)
    except Exception:  # a template may refuse this conversation by its own rules
        return None
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    behind = tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
    return next((i for i in behind if i in special), None)


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The ids up to the first end token, included. A completion without one was cut off at its full length, without padding."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def tokenize(
    tokenizer: Any, prompts: list[Any], chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Token ids of prompts, as TRL makes them.

    Args:
        tokenizer: The tokenizer.
        prompts: Texts, or lists of messages.
        chat_template_kwargs: Options of the tokenizer's chat template.

    Returns:
        Token ids of each prompt.
    """
    if isinstance(prompts[0], str):
        return tokenizer(prompts)["input_ids"]
    return tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]


def _pad_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the left to `(rows, longest)`, and a mask of the same shape, 1 for tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def as_completion(prompt: Any, text: str) -> Any:
    """A completion in the form in which TRL gives it to a reward function.

    Args:
        prompt: The prompt, a text or a list of messages.
        text: The text of the completion.

    Returns:
        The text for a text, and a list of one message for messages.
    """
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
    """The log-prob of each completion, summed over its tokens, and its hidden states if asked for.

    Args:
        model: A causal LM.
        prompts: Token ids of the prompt of each completion.
        completions: Token ids of the completions; none may be empty.
        pad: Id of the token that fills sequences on the right.
        batch_size: Sequences of one forward pass.
        hidden: How to pool the outputs of each layer over a completion; None to return none.
        autocast: Dtype of the forward passes; None for that of the model.

    Returns:
        Log-probs, `(completions,)`, float32, and hidden states, `(completions, layers, width)`, or None; on the CPU.
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
        with mixed(model, autocast), layer_states(model) if hidden else nullcontext([]) as layers:
            out = model(input_ids=ids, attention_mask=attention, use_cache=False)
        each = out.logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        sums.append((each * counted[:, 1:]).sum(1).cpu())
        if hidden:
            states.append(pool_hidden(layers, counted, hidden).cpu())
    model.train(was_training)
    return torch.cat(sums), torch.cat(states) if hidden else None


@contextmanager
def layer_states(model: Any) -> Generator[list[Tensor], None, None]:
    """A context that collects the outputs of a decoder's layers, in order and detached; each forward pass starts anew.

    Args:
        model: A causal LM.

    Yields:
        The outputs of the latest forward pass, `(batch, width of the sequence, width of the model)` for each layer.
    """
    found: list[Tensor] = []

    def note(module: Any, _: Any, out: Any) -> None:
        if module is layers[0]:
            found.clear()
        states: Tensor = cast("tuple[Tensor, ...]", out)[0] if isinstance(out, tuple) else out
        found.append(states.detach())

    layers = list(model.get_decoder().layers)
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
