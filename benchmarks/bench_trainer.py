"""Our trainer beside TRL's own `GRPOTrainer`: the same model, the same rollout, micro-batch by micro-batch in turn.

The rollout is reused, so that there are old log-probs and the ratios are not 1. `full_metrics_every` and `logging_steps` have
their defaults, and each timing is of as many steps as lie between two lines of the log, so that it has its share of both.
"""

import functools

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.toy.models import WarmUp, build_model, build_tokenizer

STEPS = 10  # between two lines of the log, and between two steps with the full metrics
SIZES = (8, 64, 256)
PLAIN = {"loss_type": "dapo", "epsilon": 0.2, "scale_rewards": "group"}
OBJECTIVES = {
    "grpo": {"objective": "grpo", **PLAIN},
    "bandpo-kl": {"objective": "bandpo-kl", "loss_type": "dapo"},
    "cispo": {"objective": "cispo", "loss_type": "dapo"},
}


def _settings(folder, size):
    return {
        "output_dir": str(folder), "per_device_train_batch_size": size, "num_generations": 8, "steps_per_generation": 1,
        "num_iterations": 1 << 30, "max_completion_length": 10, "learning_rate": 1e-4, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": "none", "logging_steps": STEPS, "save_strategy": "no",
        "disable_tqdm": True, "lr_scheduler_type": "constant", "max_steps": 1 << 20,
    }  # fmt: skip


def _reward(completions, **_):
    return [float(sum(map(ord, c)) % 3 == 0) for c in completions]


def _trainer(cls, args, tokenizer):
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(1, 33) for b in range(1, 9)])
    trainer = cls(
        model=build_model(WarmUp(), tokenizer), reward_funcs=_reward, args=args, train_dataset=prompts,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer_and_scheduler(1 << 20)
    trainer.model.train()
    return trainer


def _pair(folder, size, objective):
    """Ours and TRL's trainer with equal weights and one rollout, whose old log-probs are not those of the weights."""
    tokenizer, settings = build_tokenizer(), _settings(folder, size)
    theirs = _trainer(GRPOTrainer, GRPOConfig(**settings, **PLAIN), tokenizer)
    ours = _trainer(BandGRPOTrainer, BandGRPOConfig(**settings, **OBJECTIVES[objective]), tokenizer)
    torch.manual_seed(0)
    inputs = ours._prepare_inputs([row for row in theirs.train_dataset.select(range(size // 8)) for _ in range(8)])
    of_trl = {name: x for name, x in inputs.items() if not name.startswith("bandpo_")}
    for trainer, batch in ((ours, inputs), (theirs, of_trl)):
        trainer._step, trainer._buffered_inputs = 1, [batch]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # the policy has moved since the rollout
            for weight in trainer.model.parameters():
                weight += 0.1 * weight.abs().mean() * torch.randn(weight.shape, generator=generator)
    return {"ours": ours, "TRL's GRPOTrainer": theirs}


def _loss_steps(trainer):
    for _ in range(STEPS):
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, trainer._buffered_inputs[0]).backward()
        trainer.state.global_step += 1
    trainer.log({})


def _training_steps(trainer):
    for _ in range(STEPS):
        trainer.training_step(trainer.model, [], None)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
        trainer.state.global_step += 1
    trainer.log({})


@pytest.mark.parametrize("objective", ["grpo", "bandpo-kl", "cispo"])
def test_the_loss_of_a_micro_batch(objective, tmp_path, compare):
    def make(size):
        pair = _pair(tmp_path, size, objective)
        return {name: functools.partial(_loss_steps, trainer) for name, trainer in pair.items()}

    note = f"loss and backward of {STEPS} micro-batches and one line of the log; size: completions of a micro-batch"
    compare(f"trainer, loss of a micro-batch, {objective}", make, SIZES, target="<= 1.03", rounds=5, note=note)


def test_a_training_step(tmp_path, compare):
    def make(size):
        pair = _pair(tmp_path, size, "bandpo-kl")
        return {name: functools.partial(_training_steps, trainer) for name, trainer in pair.items()}

    note = f"{STEPS} optimizer steps on a reused rollout and one line of the log; size: completions of a step"
    compare("trainer, training step, bandpo-kl", make, SIZES, target="<= 1.03", rounds=5, note=note)
