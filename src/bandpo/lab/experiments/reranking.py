"""Reward against generated tokens on a tiny transformer, for stale pairs, re-ranked pairs, and pairs of fresh samples."""

import tempfile
import warnings
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from bandpo.integrations.trl.generate import sample_batches
from bandpo.integrations.trl.online import OnlinePreferenceConfig, OnlinePreferenceTrainer
from bandpo.toy.models import build_tokenizer

LENGTH = 8
"""Letters of a text of the grammar."""

_SAMPLES = 8  # of each prompt, in training and in the evaluation
ARMS: dict[str, dict[str, Any]] = {
    "stale": {"objective": "dpo", "resample": False},
    "re-ranked": {"objective": "dpo", "resample": False, "labels": "probe"},
    "re-ranked, confidence": {"objective": "rbrm", "resample": False, "labels": "probe"},
    "online": {"objective": "dpo"},
}
"""The arms as options of the trainer: pairs of the first samples ranked by reward or by the probe, or pairs of new samples."""


def safety(
    prompts: list[str],  # noqa: ARG001 (TRL's signature)
    completions: list[str],
    **_: Any,
) -> list[float | None]:
    """The share of a completion's letters that are safe, which means lower case.

    Args:
        prompts: The prompts, which have no effect.
        completions: The completions.

    Returns:
        The share of each completion.

    Examples:
        >>> safety(["abc:"], ["xyzABxyz"])
        [0.75]
    """
    return [sum(c.islower() for c in text[:LENGTH]) / LENGTH for text in completions]


def rerank_against_online(
    *, seeds: int = 5, rounds: int = 6, prompts: int = 256, probe_prompts: int = 96, arms: tuple[str, ...] = tuple(ARMS)
) -> dict[str, Any]:
    """Held-out safety and generated tokens of every arm of `ARMS`, with the same number of rounds and pairs.

    A Llama of two layers learns a grammar whose texts alternate between safe and unsafe letters. All arms then train for
    rounds of DPO with 4 pairs of 8 samples of each prompt. The probe sees only the rewards of `probe_prompts` prompts; the arms
    "stale" and "online" see all rewards.

    Args:
        seeds: Number of runs of each arm; runs of one seed have the same start and the same first samples.
        rounds: Number of rounds of each run.
        prompts: Number of prompts of each round.
        probe_prompts: Number of prompts whose rewards train the probe.
        arms: Names in `ARMS`.

    Returns:
        For each arm `safety` before and after, `tokens` generated, and how often the probe agreed with the reward, by seed.
    """
    tokenizer = build_tokenizer()
    out: dict[str, Any] = {
        "seeds": seeds,
        "rounds": rounds,
        "prompts": prompts,
        "probe_prompts": probe_prompts,
        "arms": {},
    }
    for name in arms:
        rows: dict[str, list[Any]] = {"before": [], "after": [], "tokens": [], "probe": []}
        for seed in range(seeds):
            train, held_out = _prompts(prompts, seed), _prompts(128, 1000 + seed)
            model = grammar_model(seed, tokenizer)
            rows["before"].append(_measure(model, tokenizer, held_out))
            options = {"rounds": rounds, "prompts_per_round": prompts, "seed": seed, "probe_prompts": probe_prompts}
            trained, history = _train(model, tokenizer, train, {**options, **ARMS[name]})
            rows["after"].append(_measure(trained, tokenizer, held_out))
            rows["tokens"].append(sum(m["generated_tokens"] for m in history))
            if "probe/agrees_with_reward" in history[-1]:
                rows["probe"].append([m["probe/agrees_with_reward"] for m in history])
        out["arms"][name] = rows
    return out


def _train(
    model: LlamaForCausalLM, tokenizer: Any, prompts: Dataset, options: dict[str, Any]
) -> tuple[Any, list[dict[str, Any]]]:
    """The trained model, and the metrics of each round."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = OnlinePreferenceConfig(
            folder,
            samples_per_prompt=_SAMPLES,
            pairs_per_prompt=4,
            probe_audit=True,
            max_completion_length=LENGTH + 1,
            generation_batch_size=512,
            per_device_train_batch_size=64,
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=10_000,
            **options,
        )
        trainer = OnlinePreferenceTrainer(model, safety, args, prompts, tokenizer)
        history = trainer.train()
    return trainer.model, history


def grammar_model(seed: int, tokenizer: Any, steps: int = 300) -> LlamaForCausalLM:
    """A tiny Llama that has learnt the grammar: three letters and a colon, then eight letters in runs of safe and unsafe ones.

    A text begins unsafe one time in three and changes its kind with probability 0.15 at each letter. A good model therefore
    keeps track of the current kind, which a probe of its hidden states can find.

    Args:
        seed: Seed of weights and texts.
        tokenizer: Tokenizer of `build_tokenizer`.
        steps: Steps of supervised learning.

    Returns:
        The model, in evaluation mode.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=32,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )
    lower = torch.tensor(tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz")))
    upper = torch.tensor(tokenizer.convert_tokens_to_ids(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")))
    colon = tokenizer.convert_tokens_to_ids(":")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        asked = lower[torch.randint(26, (128, 3), generator=g)]
        text = lower[torch.randint(26, (128, LENGTH), generator=g)]
        turns = torch.rand(128, LENGTH, generator=g) < torch.tensor([0.33] + [0.15] * (LENGTH - 1))
        unsafe = turns.long().cumsum(1) % 2 == 1
        text = torch.where(unsafe, upper[torch.randint(26, (128, LENGTH), generator=g)], text)
        ids = torch.cat([asked, torch.full((128, 1), colon), text, torch.full((128, 1), tokenizer.eos_token_id)], 1)
        labels = ids.clone()
        labels[:, :4] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _prompts(count: int, seed: int) -> Dataset:
    drawn = torch.randint(26, (count, 3), generator=torch.Generator().manual_seed(seed))
    letters = cast("list[list[int]]", drawn.tolist())
    return Dataset.from_list([{"prompt": "".join(chr(97 + i) for i in row) + ":"} for row in letters])


def _measure(model: Any, tokenizer: Any, prompts: Dataset) -> float:
    values: list[float] = []
    texts = cast("list[str]", prompts["prompt"])
    for rows, _, completions in sample_batches(
        model, tokenizer, texts, samples=_SAMPLES, max_new_tokens=LENGTH + 1, batch_size=1024, seed=7
    ):
        asked = [texts[i] for i in rows for _ in range(_SAMPLES)]
        values += [v or 0.0 for v in safety(asked, tokenizer.batch_decode(completions, skip_special_tokens=True))]
    return sum(values) / len(values)
