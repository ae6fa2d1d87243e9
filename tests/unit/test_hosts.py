"""prime-rl's adapter and the recipes for other hosts, called with stand-ins of the hosts' documented signatures."""

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bandpo import OBJECTIVES, Band, aggregate, policy_loss
from bandpo.integrations import prime_rl
from batches import batch

SPEC = importlib.util.spec_from_file_location("hosts", Path(__file__).parents[2] / "recipes" / "hooks" / "hosts.py")
hosts = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hosts)


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict


@pytest.fixture
def host(monkeypatch):
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.trainer.rl.loss"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["prime_rl.trainer.rl.loss"].LossOutputs = LossOutputs


def wanted(data, aggregation="seq-mean-token-mean", objective="bandpo-kl"):
    """Loss and gradient of the library's own `policy_loss`."""

    x = data["logprobs"].clone().requires_grad_()
    loss, _ = policy_loss(
        logprobs=x, old_logprobs=data["old_logprobs"], advantages=data["advantages"], mask=data["mask"],
        objective=dataclasses.replace(OBJECTIVES[objective], aggregation=aggregation),
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("objective", ["bandpo-kl", "dapo", "dppo-kl", "gspo"])
def test_prime_rl_sums_over_sequences(host, objective):
    data = batch(0, spread=0.6)
    x = data["logprobs"].clone().requires_grad_()
    outputs = [
        prime_rl.policy_loss(
            SimpleNamespace(
                trainer_logprobs=x[i], inference_logprobs=data["old_logprobs"][i], loss_mask=data["mask"][i],
                advantages=data["advantages"][i].expand(x.shape[1]), teacher_logprobs=None,
            ),
            objective=objective,
        )
        for i in range(len(x))
    ]  # fmt: skip
    total = sum(o.loss for o in outputs)
    ratio = {**data, "rollout_logprobs": data["old_logprobs"]}
    y = data["logprobs"].clone().requires_grad_()

    spec = dataclasses.replace(OBJECTIVES[objective], aggregation="token-sum", anchor="rollout")
    want, _ = policy_loss(
        logprobs=y, rollout_logprobs=ratio["rollout_logprobs"], advantages=data["advantages"], mask=data["mask"],
        objective=spec,
    )  # fmt: skip
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], torch.autograd.grad(want, y)[0])
    assert all(o.loss.dim() == 0 for o in outputs)
    assert "band/clip_fraction/any" in outputs[0].metrics


def test_prime_rl_options_reach_the_region_and_mistakes_are_named():
    assert prime_rl._objective("bandpo-tv", radius=0.1).bounds == Band("tv", 0.1)
    assert prime_rl._objective("bandpo-kl").anchor == "rollout"
    with pytest.raises(ValueError, match="unknown options raduis; choose from objective, divergence"):
        prime_rl._objective("bandpo-kl", raduis=0.1)
    with pytest.raises(ValueError, match=r"radius=0\.1 would be ignored"):
        prime_rl._objective("dapo", radius=0.1)
    with pytest.raises(ValueError, match=r"topk_logprobs.*which prime-rl does not give"):
        prime_rl._objective("dppo-topk-kl")


def test_slime():
    data = batch(1, spread=0.6)
    x = data["logprobs"].clone().requires_grad_()
    lengths = data["mask"].sum(1).tolist()
    keep = [i for i, n in enumerate(lengths) if n]
    rows = [data["mask"][i] != 0 for i in keep]

    def sum_of_sample_mean(values):
        return sum(part.mean() for part in values.split([int(r.sum()) for r in rows]))

    given = {
        "log_probs": [data["old_logprobs"][i][r] for i, r in zip(keep, rows, strict=True)],
        "advantages": [data["advantages"][i].expand(int(r.sum())) for i, r in zip(keep, rows, strict=True)],
    }
    new = [x[i][r] for i, r in zip(keep, rows, strict=True)]
    loss, _ = hosts.slime_loss(None, given, torch.empty(0), sum_of_sample_mean, new)
    want, gradient = wanted(data)
    torch.testing.assert_close(loss.detach() / len(keep), want)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0] / len(keep), gradient)


def test_skyrl_and_openrlhf():
    data = batch(2, spread=0.6)
    want, _ = wanted(data)
    per_token = data["advantages"].unsqueeze(1).expand(data["logprobs"].shape)
    loss, report = hosts.skyrl_loss(data["logprobs"], data["old_logprobs"], per_token, None, data["mask"])
    torch.testing.assert_close(loss, want)
    assert isinstance(report["clip_ratio"], float)
    loss, clipped, kl, none = hosts.OpenRLHFLoss(clip_eps_low=0.2)(
        data["logprobs"], data["old_logprobs"], per_token, action_mask=data["mask"]
    )
    torch.testing.assert_close(loss, want)
    assert clipped.item() == pytest.approx(report["clip_ratio"])
    assert kl.isfinite() and none is None


def test_nemo_micro_batches_add_up():
    data = batch(3, spread=0.6)
    want, _ = wanted(data)
    first = torch.zeros(len(data["mask"]), 1, dtype=torch.float64)

    def shifted(x):
        return torch.cat([first, x.double()], 1)

    whole = {
        "token_mask": shifted(data["mask"]), "sample_mask": torch.ones(len(first)),
        "prev_logprobs": shifted(data["old_logprobs"]),
        "advantages": shifted(data["advantages"].unsqueeze(1).expand(data["logprobs"].shape)),
    }  # fmt: skip
    sequences, tokens = (data["mask"].sum(1) > 0).sum(), data["mask"].sum()
    half = len(first) // 2
    parts = [
        hosts.NeMoLoss()(data["logprobs"][rows], {k: v[rows] for k, v in whole.items()}, sequences, tokens)[0]
        for rows in (slice(0, half), slice(half, None))
    ]
    torch.testing.assert_close(sum(parts), want)


def test_tinker():
    data = batch(4, spread=0.6)

    class Data:
        def __init__(self, x):
            self.x = x

        def to_torch(self):
            return self.x

    datums = [
        SimpleNamespace(
            loss_fn_inputs={
                "logprobs": Data(data["old_logprobs"][i]), "mask": Data(data["mask"][i]),
                "advantages": Data(data["advantages"][i].expand(data["logprobs"].shape[1])),
            }
        )
        for i in range(len(data["mask"]))
    ]  # fmt: skip
    x = data["logprobs"].clone().requires_grad_()
    loss, report = hosts.tinker_loss(datums, list(x))
    value = aggregate(torch.ones_like(x), data["mask"], "seq-mean-token-mean")
    assert value == 1  # no empty sequence in this batch, so the mean over data is the mean over sequences
    torch.testing.assert_close(loss.detach(), wanted(data)[0])
    assert report["loss"] == pytest.approx(loss.item())


def test_a_plain_loop_learns():
    torch.manual_seed(0)
    table = torch.nn.Embedding(5, 5)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self, ids):
            return SimpleNamespace(logits=self.table(ids))

    model = Model()
    ids = torch.tensor([[0, 1, 2], [0, 3, 4]])
    old = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).detach()
    given = {
        "ids": ids, "prompt_length": torch.tensor(1), "old_logprobs": old, "advantages": torch.tensor([1.0, -1.0]),
        "mask": torch.ones(2, 2),
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    reports = [hosts.plain_step(model, optimizer, given) for _ in range(20)]
    after = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert (after[0] > old[0]).all() and (after[1] < old[1]).all()
    assert reports[0]["clipped"] == 0 and reports[-1]["clipped"] > 0
