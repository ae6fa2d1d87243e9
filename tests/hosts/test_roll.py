"""ROLL: its actor's `loss_func` around ours, with its counts, sample weights, KL loss and corrections for the sampler."""

import importlib
import json
import sys
from types import SimpleNamespace

import cases
import pytest
import torch
from records import SOURCE, modules, own_source

from bandpo.integrations import roll as ours
from bandpo.integrations._host import ENVIRONMENT

PATHS = {
    "RLVRActorWorker": "roll.pipeline.rlvr.actor_worker",
    "AgenticActorWorker": "roll.pipeline.agentic.agentic_actor_worker",
}


class Base:
    """What the record says of roll.pipeline.base_worker.ActorWorker."""

    def get_old_log_probs_with_cache(self, data, log_probs):
        return data.batch["old_log_probs"]


def agg_loss(loss_mat, loss_mask, loss_agg_mode, batch_num_tokens=None, global_valid_samples=None, weights=None):
    w = torch.ones(len(loss_mask), 1) if weights is None else weights.unsqueeze(-1)
    if loss_agg_mode == "token-mean":
        return (loss_mat * w).sum() / batch_num_tokens
    count = loss_mask.sum(-1, keepdim=True)
    rows = (loss_mat * loss_mask).sum(-1, keepdim=True)
    mean = rows / (count + 1e-8) if loss_agg_mode == "seq-mean-token-mean" else rows
    return (mean * w * (count > 0)).sum() / (global_valid_samples + 1e-8)


def compute_train_infer_correction(cfg, response_mask, old_log_probs, infer_log_probs, **_):
    ratio = (old_log_probs - infer_log_probs).exp()
    keep = torch.ones_like(response_mask)
    for rule in cfg.filters:
        keep = keep * ((ratio >= rule.ratio_low) & (ratio <= rule.ratio_high))
    weights = ratio.clamp(max=cfg.is_weight.upper_bound) if cfg.is_weight.enabled else torch.ones_like(ratio)
    return weights.detach(), keep * response_mask, {}


def theirs(self, data, output_tensor, *, whole):
    """The terms of ROLL's own loss, for a clip at [0.8, 1.2]; `whole`: with final masks and sample weights (RLVR)."""
    c, batch = self.pipeline_config, data.batch
    mask = batch["response_mask"][:, 1:].long()
    final = batch.get("final_response_mask", mask) if whole else mask
    new = self.strategy.op_compute_log_probs(
        logits=output_tensor, input_ids=batch["input_ids"], attention_mask=batch["response_mask"]
    )
    old, sampler = self.get_old_log_probs_with_cache(data, new), batch.get("infer_logprobs")
    if c.enable_old_logprobs_recompute:
        w = batch["train_infer_is_weight"]
    else:
        w, keep, _ = compute_train_infer_correction(c.train_infer_correction, mask, old, sampler)
        mask, final = mask * keep, final * keep
    counts = {n: data.meta_info[n]["response_mask"] for n in ("batch_num_tokens", "global_valid_samples")}
    how = {"loss_mask": final, "loss_agg_mode": c.loss_agg_mode, **counts}
    r, a = (new - old).exp(), batch["advantages"]
    value = torch.minimum(r * a, r.clamp(0.8, 1.2) * a) * (w if c.train_infer_correction.is_weight.enabled else 1)
    policy = agg_loss(-value, **how, **({"weights": self.compute_sample_weights(data, mask)} if whole else {}))
    x = batch["ref_log_probs"] - new
    kl = agg_loss((x.exp() - 1 - x) * final, **how)
    total = policy + (c.kl_loss_coef * kl if c.use_kl_loss else 0)
    total = total * c.rl_loss_coef if whole else total
    return total, {"actor/kl_loss@sum": kl.item(), "actor/pg_loss@sum": policy.item(), "actor/total_loss@sum": total.item(),
                   "actor/clipfrac@sum": 0.0}  # fmt: skip


@pytest.fixture(params=PATHS)
def worker(request, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, '{"objective": "grpo"}')
    vars(ours).pop(request.param, None)
    if SOURCE:
        real()
    else:
        whole = request.param == "RLVRActorWorker"
        body = {"loss_func": lambda self, data, out: theirs(self, data, out, whole=whole)}
        if whole:
            body["compute_sample_weights"] = lambda self, data, mask: 1 + mask.sum(1).double() / 10
        modules(
            monkeypatch,
            **{PATHS[request.param].replace(".", "__"): {"ActorWorker": type("ActorWorker", (Base,), body)}},
        )
        modules(monkeypatch, roll__utils__functionals={"agg_loss": agg_loss})
        modules(
            monkeypatch,
            roll__utils__train_infer_corrections={"compute_train_infer_correction": compute_train_infer_correction},
        )
    made = getattr(ours, request.param)
    host = importlib.import_module(PATHS[request.param]).ActorWorker
    assert (
        issubclass(made, host)
        and made is getattr(ours, request.param)
        and made.__module__ == "bandpo.integrations.roll"
    )
    yield SimpleNamespace(name=request.param, ours=made, host=host)
    vars(ours).pop(request.param, None)


def real():
    if "roll" in sys.modules:
        return
    packages = (
        "roll",
        "roll.pipeline",
        "roll.pipeline.rlvr",
        "roll.pipeline.agentic",
        "roll.utils",
        "roll.distributed",
    )
    own_source(
        SOURCE, packages,
        ("roll.distributed.scheduler", "roll.platforms", "roll.utils.logging", "roll.configs", "roll.utils.kl_controller",
         "roll.pipeline.base_worker", "roll.pipeline.rlvr.rlvr_config", "roll.pipeline.agentic.agentic_config", "ray",
         "imageio", "dacite", "roll.agentic"),
    )  # fmt: skip
    import roll.pipeline.base_worker

    roll.pipeline.base_worker.ActorWorker = Base


def configuration(**changes):
    correction = SimpleNamespace(
        is_weight=SimpleNamespace(enabled=False, weight_type="token", upper_bound=1.2, detach=True), filters=[]
    )
    values = {
        "pg_clip": 0.2, "pg_clip_low": 0.2, "pg_clip_high": 0.2, "use_pg_clip_range": False, "dual_clip_loss": False,
        "importance_sampling": "token", "ratio_type": "token", "loss_agg_mode": "token-mean", "use_kl_loss": False,
        "kl_loss_coef": 0.0, "rl_loss_coef": 1.0, "entropy_loss_coef": 0.0, "enable_old_logprobs_recompute": True,
        "train_infer_correction": correction, "difficulty_loss_weight": False, "length_loss_weight": False, "ppo_epochs": 1,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def train(cls, data, config):
    """Micro-batches of two ranks; the counts are those of the whole step, and losses are parts of a sum."""
    x = data["logprobs"].clone().requires_grad_()
    counts = {"response_mask": int(data["mask"].sum())}
    samples = {"response_mask": int(data["mask"].any(-1).sum())}
    worker = cls()
    worker.pipeline_config, worker.logger, worker._logprobs_cache = config, None, {}
    total, logs = 0.0, []
    for parts in cases.RANKS:
        for part in parts:
            first = torch.zeros(len(x[part]), 1, dtype=torch.long)
            batch = {
                "response_mask": torch.cat([first, data["mask"][part].long()], 1), "input_ids": first,
                "old_log_probs": data["old_logprobs"][part], "ref_log_probs": data["ref_logprobs"][part],
                "advantages": data["advantages"][part], "infer_logprobs": data["rollout_logprobs"][part],
                "train_infer_is_weight": torch.full_like(data["old_logprobs"][part], 1.1),
            }  # fmt: skip
            before = dict(batch)
            worker.strategy = SimpleNamespace(op_compute_log_probs=lambda part=part, **_: x[part])
            given = SimpleNamespace(
                batch=batch,
                non_tensor_batch={},
                meta_info={"batch_num_tokens": dict(counts), "global_valid_samples": dict(samples)},
            )
            loss, metrics = worker.loss_func(given, torch.zeros(1))
            assert all(batch[name] is v for name, v in before.items())  # the batch is as it was
            total = total + loss
            logs.append(metrics)
    (gradient,) = torch.autograd.grad(total, x)
    return (total.detach(), gradient), logs


EPSILON = 1e-6 if SOURCE else 1e-7  # theirs divides by counts + 1e-8


def weighted(data, worker):
    """ROLL's sample weights are 1 unless asked for; the stand-in's grow with the length, so that dropping them shows."""
    if worker.name == "AgenticActorWorker" or SOURCE:
        return None
    return (1 + data["mask"].sum(1, keepdim=True).double() / 10).expand(cases.B, cases.T)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("objective", [*cases.OBJECTIVES, "dppo-kl", "icepop"])
def test_it_is_policy_loss_with_roll_s_reduction(worker, monkeypatch, objective, mode):
    monkeypatch.setenv(ENVIRONMENT, f'{{"objective": "{objective}"}}')
    data = cases.mini_batch(1)
    found, logs = train(worker.ours, data, configuration(loss_agg_mode=mode))
    cases.same(found, cases.wanted(data, objective, mode, weights=weighted(data, worker)), EPSILON)
    assert all(torch.tensor(v).isfinite() for log in logs for n, v in log.items() if "band/" in n)
    assert sum(log["actor/band/token_fraction_by_prob/0.1:0.5@sum"] for log in logs) > 0


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("recompute", [True, False])
def test_with_grpo_s_clip_it_is_roll_s_own_loss(worker, mode, recompute):
    """KL loss, sample weights, weights and filters for the sampler included; poison under the mask changes nothing."""
    config = configuration(
        loss_agg_mode=mode, use_kl_loss=True, kl_loss_coef=0.3, enable_old_logprobs_recompute=recompute
    )
    config.train_infer_correction.is_weight.enabled = True
    rule = SimpleNamespace(
        enabled=True,
        agg_type="token",
        ratio_enabled=True,
        ratio_low=0.8,
        ratio_high=1.25,
        diff_enabled=False,
        diff_low=0,
        diff_high=0,
    )
    if (
        mode != "token-mean"
    ):  # there ROLL's own reduction has no mask, and its filters no effect on the loss; ours have one
        config.train_infer_correction.filters = [rule]
    data = cases.mini_batch(2, poison=False)
    # ROLL's token mean takes every token, so its advantages must be 0 where the mask is off, as its pipeline makes them
    data["advantages"] = data["advantages"] * data["mask"]
    want, _ = train(worker.host, data, config)
    cases.same(train(worker.ours, data, config)[0], want, EPSILON)
    cases.same(train(worker.ours, cases.mini_batch(2), config)[0], want, EPSILON)


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("{}", {"pg_clip": 0.1}, r"pg_clip=0\.1 would be ignored"),
        ("{}", {"use_pg_clip_range": True}, "use_pg_clip_range=True would be ignored"),
        ("{}", {"dual_clip_loss": True}, "dual_clip_loss=True would be ignored"),
        ("{}", {"importance_sampling": "seq"}, "importance_sampling='seq' would be ignored"),
        ("{}", {"ratio_type": "segment"}, "ratio_type='segment' would be ignored"),
        ('{"objective": "dppo-topk-kl"}', {}, "ROLL does not give"),
        ('{"objective": "troll"}', {}, "the 64 most likely tokens.*ROLL does not give"),
    ],
)
def test_refused(worker, monkeypatch, text, changes, words):
    monkeypatch.setenv(ENVIRONMENT, text)
    with pytest.raises(ValueError, match=words):
        train(worker.ours, cases.mini_batch(3), configuration(**changes))


@pytest.mark.parametrize("objective", ["dppo-kl", "cases:WEIGHING"])
def test_both_accounting_for_the_sampler(objective, worker, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, json.dumps({"objective": objective}))
    config = configuration()
    config.train_infer_correction.is_weight.enabled = True
    with pytest.raises(ValueError, match="accounts for the sampler itself; use one"):
        train(worker.ours, cases.mini_batch(4), config)
