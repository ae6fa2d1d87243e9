"""Trains a tiny model on fixed completions, in as many processes as it is launched in; writes losses and weights.

`torchrun --nproc_per_node N tests/distributed_run.py OUT FOLDER`: 16 sequences a step, whatever N. $OBJECTIVE names the
objective, $OPTIONS has more options as JSON.
"""

import json
import os
import sys
import zlib
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.toy.models import WarmUp, build_model, build_tokenizer
from trl_runs import reward, settings


class Fixed(BandGRPOTrainer):
    """Completions are a function of the prompt and their place in its group: processes draw other random numbers."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        seen = {}
        completions = []
        for ids in map(tuple, prompt_ids):
            place = seen[ids] = seen.get(ids, -1) + 1
            g = torch.Generator().manual_seed(zlib.crc32(repr((ids, place)).encode()))
            length = int(torch.randint(1, 6, (1,), generator=g))
            completions.append(torch.randint(3, 60, (length,), generator=g).tolist())
        return completions, None


def main(out: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    processes = PartialState(cpu=True).num_processes
    accumulation = 2 // processes
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(1, 9) for b in range(1, 9)])
    tokenizer = build_tokenizer()
    trainer = Fixed(
        model=build_model(WarmUp(hidden_size=32, layers=1), tokenizer), reward_funcs=reward, train_dataset=prompts,
        processing_class=tokenizer,
        args=BandGRPOConfig(
            **settings(folder, **{
                "gradient_accumulation_steps": accumulation, "steps_per_generation": accumulation, "optim": "sgd",
                "learning_rate": 0.5, "max_grad_norm": 0.0, "objective": os.environ["OBJECTIVE"], "max_steps": 6,
                **json.loads(os.environ.get("OPTIONS", "{}")),
            })
        ),
    )  # fmt: skip
    trainer.train()
    history = gather_object([trainer._pruned.prune.state_dict()["history"]]) if trainer._pruned is not None else []
    weights = {n: w.full_tensor() if hasattr(w, "full_tensor") else w for n, w in trainer.model.state_dict().items()}
    if PartialState().is_main_process:
        logs = [
            {k: v for k, v in row.items() if k in ("loss", "reward", "selection/kept", "selection/prompts_kept")}
            for row in trainer.state.log_history
            if "loss" in row
        ]
        found = {"processes": processes, "logs": logs, "weights": weights, "history": history}
        torch.save(found, out)
    # A thread of gloo that is alive when a process ends aborts it ("terminate called without an active exception").
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
