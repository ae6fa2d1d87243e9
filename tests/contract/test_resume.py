"""Several real processes (gloo on the CPU): a resumed run is the run, uneven ranks are pooled, another number is refused."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bandpo import RatioBounds, policy_metrics, token_objective
from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.zoo import OBJECTIVES
from trl_runs import reward, settings

SCRIPT = Path(__file__).parents[1] / "resume_run.py"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
               str(SCRIPT), str(folder / "out.pt"), str(folder)]  # fmt: skip
    paths = os.pathsep.join(p for p in (str(SCRIPT.parent), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return torch.load(folder / "out.pt", weights_only=True), folder


@pytest.mark.parametrize("trainer", ["grpo", "dpo"])
def test_two_processes_resume_bit_for_bit(two, trainer):
    found, _ = two
    assert found["processes"] == 2
    whole, again = found[trainer]
    assert torch.equal(whole["weights"], again["weights"])
    assert len(whole["log"]) >= 2 and whole["log"][:-1] == again["log"][:-1]  # the last row is of the session


def terms_of(name, part):
    """The terms of all rows that the processes have kept, as one batch."""
    return token_objective(
        OBJECTIVES[name], logprobs=part["anchor_logprobs"] + part["log_ratio"], old_logprobs=part["anchor_logprobs"],
        advantages=part["advantages"], mask=part["mask"], bounds=RatioBounds(part["lower"], part["upper"]),
    )  # fmt: skip


def test_uneven_ranks_are_pooled_in_our_keys_and_in_trl_s(two):
    """48-odd tokens on one process and 8 on the other; the oracle puts all rows into one batch of one process."""
    for name, part in two[0]["uneven"].items():
        rows = [p["mask"].sum().item() for p in part["parts"]]
        assert rows[1] == 8 and rows[0] > 20
        data = {key: torch.cat([p[key] for p in part["parts"]]) for key in part["parts"][0]}
        want = policy_metrics(terms_of(name, data))
        log = part["log"]
        clips = {"low": "low_mean", "high": "high_mean", "any": "region_mean"}
        for key, value in want.items():
            ours = key
            if key.startswith("clip_fraction/"):
                ours = f"clip_ratio/{clips[key.rpartition('/')[2]]}"
            if value.isnan():
                assert ours not in log
            else:
                assert log[ours] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), (name, ours)
        first = part["parts"][0]
        alone = policy_metrics(terms_of(name, first))
        assert log["ratio/mean"] != pytest.approx(alone["ratio/mean"].item(), rel=1e-3)
        assert math.isfinite(log["entropy"])


def test_one_process_does_not_go_on_with_half_a_rollout(two, make_model, tokenizer, prompts, tmp_path):
    """As TRL resumes nothing of a rollout, the message names both numbers and the way out."""
    checkpoint = two[1] / "grpo" / "whole" / "checkpoint-3"
    trainer = BandGRPOTrainer(
        model=make_model(), reward_funcs=reward, train_dataset=prompts, processing_class=tokenizer,
        args=BandGRPOConfig(**settings(tmp_path, per_device_train_batch_size=4, max_steps=6)),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"written with processes=2, and this run has processes=1.*model=CHECKPOINT"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
