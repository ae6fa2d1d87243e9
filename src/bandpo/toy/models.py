"""A small character-level causal LM of transformers that is warmed up on a task once and cached."""

import hashlib
import json
import string
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bandpo._system.cache import cache_root, is_usable, sole_maker, store
from bandpo._system.files import write_json
from bandpo.toy.tasks import TASKS, Row, make_splits

Progress = Callable[[int, float], None]
"""A function of the step and the loss."""

_PAD, _END, _UNKNOWN = "<pad>", "<end>", "<unk>"
_CHARACTERS = string.digits + string.ascii_lowercase + string.ascii_uppercase + string.punctuation + " "
_FORMAT = 1  # part of the cache's key: raise it when the same configuration gives another model
_REPORT_EVERY = 50  # steps of the warm-up


@dataclass(frozen=True)
class WarmUp:
    """The configuration of a warmed-up model, which decides its place in the cache.

    Args:
        task: A name in `TASKS`.
        steps: Optimiser steps of supervised learning. After the default number, most groups of samples have a signal.
        batch_size: Number of prompts in a step.
        learning_rate: Peak of a one-cycle schedule.
        hidden_size: Width of the model.
        layers: Number of layers of the model.
        seed: Seed of weights and batches.

    Raises:
        ValueError: If the task is unknown, or a number is below 1.
    """

    task: str = "countdown"
    steps: int = 250
    batch_size: int = 128
    learning_rate: float = 4e-3
    hidden_size: int = 96
    layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: got {self.task!r}; choose one of {', '.join(TASKS)}")
        for name in ("steps", "batch_size", "hidden_size", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"warm-up {name} must be at least 1, got {getattr(self, name)}")

    @property
    def path(self) -> Path:
        """The folder of the model, in the user's cache directory or $BANDPO_CACHE."""
        task = TASKS[self.task]
        decides = [_FORMAT, asdict(self), dict(task.config), task.train_size]
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        return cache_root() / "warmup" / f"{self.task}-{key}"


def warmed_up_model(
    warm_up: WarmUp, report: Progress | None = None, say: Callable[[str], object] = lambda _: None
) -> Path:
    """The folder of the warmed-up model and its tokenizer, which are made if the cache does not have them undamaged.

    Args:
        warm_up: The configuration.
        report: Function that is called with the step and the loss every 50 steps.
        say: Function that is called with messages.

    Raises:
        RunError: If the cache has no such model and cannot be written.
    """
    path = warm_up.path
    if is_usable(path, say):
        return path
    with sole_maker(path, say):
        if is_usable(path, lambda _: None):  # another process has just made it
            return path
        say(f"warming up a small model on {warm_up.task} by supervised learning (once; cached)")
        tokenizer = build_tokenizer()
        model = build_model(warm_up, tokenizer)
        _learn(model, tokenizer, warm_up, report)

        def save(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            write_json(folder / "warmup.json", asdict(warm_up))

        store(path, save)
    return path


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each printable ASCII character, built without a download."""
    vocabulary = {token: i for i, token in enumerate([_PAD, _END, _UNKNOWN, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        unk_token=_UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(warm_up: WarmUp, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights.

    Args:
        warm_up: The configuration, with size and seed.
        tokenizer: Tokenizer of `build_tokenizer`.
    """
    pad, end = _special_ids(tokenizer)
    return build_llama(
        len(tokenizer), pad, end, hidden_size=warm_up.hidden_size, layers=warm_up.layers, seed=warm_up.seed
    )


def build_llama(vocabulary: int, pad: int, end: int, *, hidden_size: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights and four attention heads.

    Args:
        vocabulary: Number of tokens.
        pad: Token that fills places after the end.
        end: Token that ends a completion.
        hidden_size: Width of the model.
        layers: Number of layers.
        seed: Seed of the weights.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=pad,
        eos_token_id=end,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = pad
    return model


def _learn(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, warm_up: WarmUp, report: Progress | None
) -> None:
    """Train the model on the answers of the task."""
    rows, _ = make_splits(TASKS[warm_up.task])
    ids, labels = _encode(rows, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=warm_up.learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, warm_up.learning_rate, warm_up.steps + 1, pct_start=0.1)
    draw = torch.Generator().manual_seed(warm_up.seed)
    model.train()
    for step in range(1, warm_up.steps + 1):
        chosen = torch.randint(len(rows), (warm_up.batch_size,), generator=draw)
        loss = model(input_ids=ids[chosen], labels=labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report is not None and (step % _REPORT_EVERY == 0 or step == warm_up.steps):
            report(step, loss.item())
    model.eval()


def _encode(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids and labels `(rows, time)`, padded on the right; the labels are those of the answer and its end token."""
    pad, end = _special_ids(tokenizer)
    prompts: list[list[int]] = [tokenizer(r["prompt"]).input_ids for r in rows]
    answers: list[list[int]] = [[*tokenizer(r["answer"]).input_ids, end] for r in rows]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
    return ids, labels


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """The ids of padding and of the end, which transformers types as unknown."""
    return cast(int, tokenizer.pad_token_id), cast(int, tokenizer.eos_token_id)
