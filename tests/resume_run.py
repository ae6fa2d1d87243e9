"""Trains in as many processes as it is launched in, resumes from the middle, and measures a batch of uneven ranks.

`torchrun --nproc_per_node N tests/resume_run.py OUT FOLDER`. What it found goes into OUT, from the main process.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.integrations.trl.dpo import BandDPOConfig, BandDPOTrainer
from bandpo.toy.models import WarmUp, build_model, build_tokenizer
from trl_runs import joined, log_of, reward, rollout, settings

TIMES = ("train_runtime", "step_time", "update_time", "train_samples_per_second", "train_steps_per_second", "total_flos",
         "train_loss")  # fmt: skip
TOKENIZER = build_tokenizer()


def model(seed=0):
    return build_model(WarmUp(hidden_size=32, layers=1, seed=seed), TOKENIZER)


def grpo(folder, **changes):
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(1, 9) for b in range(1, 9)])
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
    }
    return BandGRPOTrainer(
        model=model(), reward_funcs=reward, train_dataset=prompts, processing_class=TOKENIZER,
        args=BandGRPOConfig(**settings(folder, **{**options, **changes})),
    )  # fmt: skip


def dpo(folder):
    pairs = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a * b + 100)}
        for a in range(2, 6)
        for b in range(4)
    ]
    return BandDPOTrainer(
        model=model(), ref_model=model(1), train_dataset=Dataset.from_list(pairs), processing_class=TOKENIZER,
        args=BandDPOConfig(
            str(folder), per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True, bf16=False, max_steps=4,
            gradient_checkpointing=False, report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="steps",
            save_steps=2,
        ),
    )  # fmt: skip


def rows(trainer, after):
    return [
        {k: v for k, v in row.items() if k not in TIMES} for row in trainer.state.log_history if row["step"] > after
    ]


def resumed(make, folder, at):
    """Weights and log of a run, and of one that goes on from its checkpoint."""
    found = []
    for name, checkpoint in (("whole", None), ("again", str(folder / "whole" / f"checkpoint-{at}"))):
        trainer = make(folder / name)
        trainer.train(resume_from_checkpoint=checkpoint)
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        found.append({"weights": weights, "log": rows(trainer, at)})
    return found


def uneven(folder):
    """Metrics of one micro-batch in which the first process has many tokens and the others few, and all of its terms."""
    rank, found = PartialState().process_index, {}
    for objective in ("bandpo-kl", "cispo"):
        trainer = grpo(folder, objective=objective, save_strategy="no")
        inputs = rollout(TOKENIZER, seed=rank)
        if rank:
            inputs["completion_mask"] = (torch.arange(6) < 1).expand(8, 6).long()
        kept = []
        trainer._after_loss = lambda logprobs, batch, given, terms, kept=kept: kept.append(terms)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, inputs)
        terms = joined(kept)
        # Plain values, which can be loaded with weights_only.
        mine = terms._asdict() | {"bounds": tuple(terms.bounds), "objective": objective, "used": None}
        log = {k: v[-1] for k, v in log_of(trainer).items()}
        found[objective] = {"log": log, "parts": gather_object([mine])}
    return found


def main(out: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    PartialState(cpu=True)
    found = {
        "processes": PartialState().num_processes, "grpo": resumed(grpo, folder / "grpo", 3),
        "dpo": resumed(dpo, folder / "dpo", 2), "uneven": uneven(folder / "uneven"),
    }  # fmt: skip
    if PartialState().is_main_process:
        torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
