"""Trainers on a tiny model, TRL's and ours, and one step of each."""

from pathlib import Path

import torch
from trl import GRPOConfig, GRPOTrainer

from bandpo import RatioBounds
from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.integrations.trl.base import BandTrainer
from bandpo.terms import TokenObjective


def reward(prompts, completions, **_):
    return [float(sum(map(ord, c)) % 3 == 0) + 0.1 * (len(c) % 4) for c in completions]


def settings(folder, **changes):
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_generations": 4, "steps_per_generation": 2,
        "num_iterations": 2, "max_completion_length": 6, "learning_rate": 1e-2, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "lr_scheduler_type": "constant", "max_steps": 4, **changes,
    }  # fmt: skip


def band_trainer(folder, make_model, tokenizer, prompts, *, objective=None, **changes):
    return BandGRPOTrainer(
        model=make_model(), reward_funcs=reward, args=BandGRPOConfig(**settings(folder, **changes)),
        train_dataset=prompts, processing_class=tokenizer, objective=objective,
    )  # fmt: skip


def trl_trainer(folder, make_model, tokenizer, prompts, **changes):
    return GRPOTrainer(
        model=make_model(), reward_funcs=reward, args=GRPOConfig(**settings(folder, **changes)),
        train_dataset=prompts, processing_class=tokenizer,
    )  # fmt: skip


def rollout(tokenizer, seed=0):
    """What TRL hands to `_compute_loss`: a batch off policy, with padding."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, 60, (8, 4), generator=g)
    completion = torch.randint(3, 60, (8, 6), generator=g)
    lengths = torch.tensor([6, 2, 5, 1, 6, 3, 4, 6])
    keep = (torch.arange(6) < lengths.unsqueeze(1)).long()
    return {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": completion, "completion_mask": keep,
        "advantages": torch.randn(8, generator=g), "num_items_in_batch": 2.0 * keep.sum(),
        "old_per_token_logps": (-3.5 + 2.0 * torch.randn(8, 6, generator=g)).clamp(max=-0.05),
        "ref_per_token_logps": -4.5 + 0.3 * torch.randn(8, 6, generator=g),
    }  # fmt: skip


def loss_and_gradient(trainer, inputs):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    log_of(trainer).clear()
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return loss.detach(), gradient, {k: v[-1] for k, v in log_of(trainer).items() if v}


def log_of(trainer):
    """What a trainer, TRL's or ours, has measured since the last line of its log."""
    if isinstance(trainer, BandTrainer):
        trainer.settle()
        trainer._pooled["train"].forget()
    return trainer._metrics["train"]


def joined(parts):
    """The terms of several micro-batches as those of one batch, without gradient."""
    first = parts[0]
    whole = {}
    for name, value in first._asdict().items():
        values = [getattr(part, name) for part in parts]
        if isinstance(value, RatioBounds):
            value = RatioBounds(*(torch.cat(edges) for edges in zip(*values, strict=True)))
        elif isinstance(value, torch.Tensor):
            value = torch.cat([x.detach() for x in values])
        whole[name] = value
    return TokenObjective(**whole)


def saved(make_model, folder):
    """A model that has a folder: TRL reloads the reference (beta > 0) from there."""
    path = Path(folder) / "reference"
    make_model().save_pretrained(path)
    return lambda: str(path)


def named(folder, make_model, tokenizer, prompts, name, **changes):
    args = BandGRPOConfig(**settings(folder, objective=name, **changes))
    return BandGRPOTrainer(
        model=make_model(), reward_funcs=reward, args=args, train_dataset=prompts, processing_class=tokenizer
    )


def token_logprobs(model, inputs):
    """From the model's logits, without TRL."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    logits = model(ids, attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)).logits
    return logits[:, 3:-1].log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
