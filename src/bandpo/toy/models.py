"""A small character-level causal LM that transformers loads, warmed up on a task once and cached."""

import hashlib
import json
import string
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bandpo._system.cache import cache_root, is_usable, sole_maker, store
from bandpo._system.files import write_json
from bandpo.toy.tasks import TASKS, Row, make_splits

Progress = Callable[[int, float], None]

_PAD, _END, _UNKNOWN = "<pad>", "<end>", "<unk>"
_CHARACTERS = string.digits + string.ascii_lowercase + string.ascii_uppercase + string.punctuation + " "
_FORMAT = 1  # part of the cache's key: raise it when what is built from the same config changes


@dataclass(frozen=True)
class WarmUp:
    """What decides the warmed-up model, and so the name it is cached under.

    Args:
        task: A name in `TASKS`.
        steps: Optimiser steps of supervised learning. The default leaves most groups of samples with a signal.
        batch_size: Prompts in a step.
        learning_rate: Peak of a one-cycle schedule.
        hidden_size: Width of the model.
        layers: Its depth.
        seed: Of weights and batches.
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
        """Where the model is cached: the user's cache directory, or $BANDPO_CACHE."""
        task = TASKS[self.task]
        decides = [_FORMAT, asdict(self), dict(task.config), task.train_size]
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        return cache_root() / "warmup" / f"{self.task}-{key}"


def warmed_up_model(
    warm_up: WarmUp, report: Progress | None = None, say: Callable[[str], object] = lambda _: None
) -> Path:
    """Folder of the warmed-up model and its tokenizer, made on the first call for a config, or if it was damaged.

    Args:
        warm_up: The config.
        report: Called with (step, loss) now and then.
        say: Takes messages.

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
    """One token for each printable ASCII character, built locally."""
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
    """A Llama of the warm-up's size with random weights of its seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=warm_up.hidden_size,
        intermediate_size=2 * warm_up.hidden_size,
        num_hidden_layers=warm_up.layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(warm_up.seed)
        model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _learn(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, warm_up: WarmUp, report: Progress | None
) -> None:
    """Supervised learning of the answers, in place."""
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
        if report is not None and (step % 50 == 0 or step == warm_up.steps):
            report(step, loss.item())
    model.eval()


def _encode(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and labels that count the answer and its end only."""
    prompts = [tokenizer(r["prompt"]).input_ids for r in rows]
    answers = [[*tokenizer(r["answer"]).input_ids, tokenizer.eos_token_id] for r in rows]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
    return ids, labels
