"""What the plug-in reports to verl: numbers only, over the valid tokens, and the same names on every rank."""

import math

import pytest
import torch

pytest.importorskip("verl", reason="verl has an environment of its own; `make test` runs this file there (.venv-verl)")
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.metric import Metric
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

from bandpo import policy_loss
from batches import batch


def metrics_of(data, ranks=1, **fields):
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=PolicyLossConfig(loss_mode="bandpo"),
        clip_ratio_c=1e9, **fields,
    )  # fmt: skip
    config.global_batch_info.update({"dp_size": ranks, "batch_num_tokens": 100, "global_batch_size": 16})
    return get_policy_loss_fn("bandpo")(
        old_log_prob=data["old_logprobs"], log_prob=data["logprobs"], response_mask=data["mask"], config=config,
        advantages=data["advantages"].unsqueeze(1).expand(data["mask"].shape), loss_agg_mode="token-mean",
    )[1]  # fmt: skip


def test_every_micro_batch_has_numbers_and_an_empty_one_is_no_evidence():
    data = batch(0, spread=0.6)
    found = metrics_of(data)
    assert all(isinstance(v, float) and math.isfinite(v) for v in found.values())
    report = policy_loss(
        logprobs=data["logprobs"],
        old_logprobs=data["old_logprobs"],
        advantages=data["advantages"],
        mask=data["mask"],
        metrics="full",
    )[1]
    assert any(x.isnan() for x in report.values())
    pushed = ((data["advantages"].unsqueeze(1) != 0) & (data["mask"] != 0)).sum() / (data["mask"] != 0).sum()
    for name, value in report.items():
        family, _, rest = name.partition("/")
        if family == "clip_fraction_by_prob":
            _, _, which = rest.partition("/")
            name, value = f"{family}_of_all/{rest}", (value * report[f"token_fraction_by_prob/{which}"]).nan_to_num()
        elif family == "band" and rest.endswith("_fraction"):
            name, value = f"{rest}_of_all", value * pushed
        if name != "loss/policy":
            assert found[f"actor/band/{name.removeprefix('band/')}"] == pytest.approx(value.item(), rel=1e-5), name
    assert metrics_of({**data, "mask": torch.zeros_like(data["mask"])}) == {}


def test_ranks_report_the_same_names_or_verl_would_stop():
    """`Metric.aggregate_dp` needs as many values from each rank; here one rank has tokens in bins where the other has none."""
    first = batch(0, spread=0.6)
    second = {**batch(1, spread=0.6), "old_logprobs": torch.full_like(first["old_logprobs"], -1.0)}
    second["advantages"] = torch.zeros_like(second["advantages"])
    ranks = [Metric.from_dict(metrics_of(data, ranks=2), "mean") for data in (first, second)]
    assert ranks[0].keys() == ranks[1].keys()
    for name in ranks[0]:
        value = Metric.aggregate_dp([rank[name] for rank in ranks])
        assert not math.isnan(value), name
    empty = metrics_of({**first, "mask": torch.zeros_like(first["mask"])}, ranks=2)
    assert empty.keys() == ranks[0].keys() and all(math.isfinite(v) for v in empty.values())


def test_tokens_that_are_no_numbers_are_counted_and_in_no_mean():
    data = {k: v.clone() for k, v in batch(2, spread=0.6).items()}
    data["mask"][0, :2] = True
    clean = {**data, "mask": data["mask"].clone()}
    clean["mask"][0, 0] = False
    data["old_logprobs"][0, 0] = -math.inf
    found, want = metrics_of(data), metrics_of(clean)
    assert found["actor/band/nonfinite_fraction"] == pytest.approx(1 / data["mask"].sum().item())
    for name in ("actor/ppo_kl", "actor/pg_clipfrac", "actor/band/ratio/mean", "actor/band/divergence_mean"):
        assert found[name] == pytest.approx(want[name], rel=1e-5), name


def test_a_call_without_the_configuration_says_what_is_missing():
    data = batch(0)
    with pytest.raises(ValueError, match=r"config is None.*config=ActorConfig"):
        get_policy_loss_fn("bandpo")(
            old_log_prob=data["old_logprobs"], log_prob=data["logprobs"], advantages=data["advantages"],
            response_mask=data["mask"], config=None,
        )  # fmt: skip
