"""BAPO on two real ranks (gloo on the CPU): with the hook, halves of a batch are treated as the whole batch is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bandpo import OBJECTIVES
from bandpo.experimental import Balanced, sum_over_ranks
from bandpo.integrations._host import over_ranks
from batches import run

SCRIPT = Path(__file__).parents[1] / "two_ranks.py"


def halves(dtype):
    """The first half is mostly good, and the second bad: each alone would choose another pair than the whole."""
    g = torch.Generator().manual_seed(2)
    old = -torch.rand(8, 6, generator=g, dtype=torch.float64) * 4 - 0.1
    a = torch.cat([torch.rand(4, generator=g) + 0.2, -torch.rand(4, generator=g) * 1.2 - 0.3]).double()
    new = torch.minimum(old + torch.randn(8, 6, generator=g, dtype=torch.float64), torch.tensor(-1e-6))
    mask = torch.rand(8, 6, generator=g) < 0.8
    data = {"logprobs": new, "old_logprobs": old, "advantages": a}
    return {**{k: v.to(dtype) for k, v in data.items()}, "mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_ranks_with_halves_choose_the_pair_of_the_whole(tmp_path, dtype):
    data = halves(dtype)
    torch.save(data, tmp_path / "data.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), tmp_path / "meet", tmp_path / "data.pt", tmp_path / f"{rank}.pt"],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=240)
            assert rank.returncode == 0, errors[-2000:]
    finally:
        for rank in ranks:
            rank.kill()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

    loss, gradient, _ = run("bapo", data)
    x = data["logprobs"] - data["old_logprobs"]
    whole = Balanced()(x, log_ratio=x, advantages=data["advantages"].unsqueeze(1), mask=data["mask"])
    want = torch.stack([e[0, 0] for e in whole])
    assert all(torch.equal(f["together"]["edges"], want) for f in found)
    assert not all(torch.equal(f["alone"]["edges"], want) for f in found), (
        "the halves must differ for this to be a test"
    )
    # Sums of 48 tokens in another order.
    close = {"rtol": 48 * torch.finfo(dtype).eps, "atol": 48 * torch.finfo(dtype).eps}
    torch.testing.assert_close(sum(f["together"]["loss"] for f in found), loss, **close)
    torch.testing.assert_close(torch.cat([f["together"]["gradient"] for f in found]), gradient, **close)
    assert not torch.allclose(torch.cat([f["alone"]["gradient"] for f in found]), gradient)


def test_one_process_adds_nothing_up():
    sums = torch.rand(3, 2)
    assert sum_over_ranks(sums) is sums
    data = halves(torch.float64)
    with_hook = over_ranks(OBJECTIVES["bapo"])
    assert with_hook.bounds == Balanced(reduce=sum_over_ranks) and with_hook != OBJECTIVES["bapo"]
    assert torch.equal(run(with_hook, data)[1], run("bapo", data)[1])


def test_the_hook_is_set_where_it_is_used_and_missing():
    for name, objective in OBJECTIVES.items():
        assert (over_ranks(objective) is objective) == (name != "bapo")
    own = OBJECTIVES["bapo"].__class__(bounds=Balanced(reduce=torch.clone))
    assert over_ranks(own) is own
