"""slime and miles: their `loss_function`, from logits to the loss that Megatron averages and the metrics that are logged."""

import sys
from types import SimpleNamespace

import cases
import pytest
import torch
from records import SOURCE, modules, own_source
from torch.nn.utils.rnn import pad_sequence

from bandpo.integrations import miles as ours_miles
from bandpo.integrations import slime as ours_slime

PROMPT = 2
LENGTHS = [9, 6, 9, 4, 9, 1]
OURS = {"slime": ours_slime, "miles": ours_miles}
HOST = SOURCE and ("miles" if "miles" in SOURCE else "slime")
TOLERANCE = 2e-5 if SOURCE else 1e-11  # their code is float32 alone


def log_probs(logits, tokens, with_entropy):
    x = logits.log_softmax(-1)
    entropy = -(x.exp() * x).sum(-1) if with_entropy else None
    return x.gather(-1, tokens.view(-1, 1)), entropy


@pytest.fixture(params=[HOST] if HOST else list(OURS))
def host(request, monkeypatch):
    return (real if SOURCE else stand_in)(request.param, monkeypatch)


def stand_in(name, monkeypatch):
    """What the record says the host does."""

    def responses(logits, args, unconcat_tokens, total_lengths, response_lengths, with_entropy, **_):
        x = logits.squeeze(0) / args.rollout_temperature
        out, start = {"log_probs": [], "entropy": []}, 0
        for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
            rows = x[start + total - response - 1 : start + total - 1]
            logp, entropy = log_probs(rows, tokens[-response:], with_entropy)
            out["log_probs"].append(logp.squeeze(-1))
            out["entropy"].append(entropy)
            start += total
        return out if with_entropy else {"log_probs": out["log_probs"]}

    def approx_kl(log_probs, log_probs_base, kl_loss_type, importance_ratio=None):
        assert kl_loss_type == "k3"
        x = log_probs_base - log_probs
        kl = x.exp() - 1 - x
        return kl if importance_ratio is None else importance_ratio * kl

    def loss_function(args, batch, num_microbatches, step_global_batch_size, logits):
        def reduce(x):
            parts = zip(
                x.split(batch["response_lengths"]), batch["loss_masks"], batch["rollout_mask_sums"], strict=True
            )
            return sum((v * m).sum() / (1 if args.calculate_per_token_loss else n) for v, m, n in parts)

        loss, log = args.loss(args, batch, logits, reduce)
        tokens = sum(m.sum() for m in batch["loss_masks"])
        if args.calculate_per_token_loss:
            return loss, tokens, {"keys": list(log), "values": torch.stack([tokens, *log.values()])}
        scaled = loss * num_microbatches / step_global_batch_size * args.data_parallel
        return scaled, 1, {"keys": list(log), "values": torch.stack([torch.zeros(()), *log.values()])}

    if name == "slime":
        modules(monkeypatch, megatron__core__mpu={"get_context_parallel_world_size": lambda: 1})
        modules(monkeypatch, slime__backends__megatron_utils__cp_utils={"slice_log_prob_with_cp": lambda x, *_: x})
        modules(
            monkeypatch,
            slime__backends__megatron_utils__loss={
                "get_log_probs_and_entropy": lambda logits, **given: (torch.empty(0), responses(logits, **given)),
                "get_rollout_top_p_logprob_kwargs": lambda args, batch: {}, "compute_approx_kl": approx_kl,
            },
        )  # fmt: skip
    else:
        at = "miles__backends__training_utils__"
        for path, values in {
            f"{at}cp_utils": {"get_local_response_loss_masks": lambda *_, loss_masks, **__: loss_masks},
            f"{at}loss_hub__logit_processors": {"get_log_probs_and_entropy": responses},
            f"{at}loss_hub__math_utils": {"compute_approx_kl": approx_kl},
            f"{at}parallel": {"get_parallel_state": lambda: SimpleNamespace(cp=SimpleNamespace(size=1))},
        }.items():
            modules(monkeypatch, **{path: values})
    return SimpleNamespace(name=name, loss_function=loss_function, policy_loss=OURS[name].policy_loss)


def real(name, monkeypatch):
    """The host's own source, with Megatron stubbed and the log-probs of a vocabulary that is not split."""
    if name == "slime":
        packages = ("slime", "slime.backends", "slime.backends.megatron_utils", "slime.utils")
        if "slime" not in sys.modules:
            own_source(SOURCE, packages, ("megatron", "slime.utils.distributed_utils"))
        from megatron.core import mpu
        from slime.backends.megatron_utils import cp_utils, loss

        mpu.get_context_parallel_world_size.return_value = 1
        mpu.get_context_parallel_rank.return_value = 0
        mpu.get_data_parallel_world_size.return_value = 2

        def calculate(logits, tokens, group, with_entropy=False, **_):
            return log_probs(logits, tokens, with_entropy)

        monkeypatch.setattr(loss, "calculate_log_probs_and_entropy", calculate)
        assert cp_utils
        return SimpleNamespace(name=name, loss_function=loss.loss_function, policy_loss=ours_slime.policy_loss)
    packages = (
        "miles",
        "miles.backends",
        "miles.backends.training_utils",
        "miles.backends.training_utils.loss_hub",
        "miles.utils",
    )
    if "miles" not in sys.modules:
        own_source(SOURCE, packages, ("megatron", "ring_flash_attn"))
    from miles.backends.training_utils import cp_utils, loss
    from miles.backends.training_utils.loss_hub import logit_processors, losses

    size = SimpleNamespace(size=1, rank=0, group=None)
    two = SimpleNamespace(size=2, rank=0, group=None)
    state = SimpleNamespace(cp=size, tp=size, intra_dp=two, intra_dp_cp=two, is_ulysses_cp=False)
    import miles.backends.training_utils.parallel as parallel

    for module in (cp_utils, loss, logit_processors, losses, parallel):
        monkeypatch.setattr(module, "get_parallel_state", lambda: state)
    monkeypatch.setattr(loss, "is_multi_lora_enabled", lambda args: False)

    def calculate(logits, tokens, group, with_entropy=False, **_):
        return log_probs(logits, tokens, with_entropy)

    monkeypatch.setattr(logit_processors, "calculate_log_probs_and_entropy", calculate)

    def loss_function(args, batch, num_microbatches, step_global_batch_size, logits):
        return loss.loss_function(
            args, batch, num_microbatches, logits, apply_megatron_loss_scaling=True, num_rollouts=step_global_batch_size
        )

    return SimpleNamespace(name=name, loss_function=loss_function, policy_loss=ours_miles.policy_loss)


def arguments(host, **changes):
    values = {
        "loss_type": "custom_loss", "custom_loss_function_path": f"bandpo.integrations.{host.name}.policy_loss",
        "loss": host.policy_loss, "calculate_per_token_loss": False, "recompute_loss_function": False, "allgather_cp": False,
        "use_rollout_logprobs": False, "advantage_estimator": "grpo", "eps_clip": 0.2, "eps_clip_high": 0.2,
        "eps_clip_c": None, "use_tis": False, "use_opsm": False, "get_mismatch_metrics": False, "entropy_coef": 0.0,
        "use_kl_loss": False, "use_unbiased_kl": False, "kl_loss_coef": 0.0, "kl_loss_type": "k3",
        "rollout_temperature": 1.0, "rollout_top_p": 1.0, "log_probs_chunk_size": -1, "qkv_format": "thd",
        "observe_training_entropy": True, "true_on_policy_mode": False, "use_dynamic_global_batch_size": False,
        "custom_pg_loss_reducer_function_path": None, "custom_tis_function_path": None, "data_parallel": 2,
        "skip_actor_forward_only": False,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def example(seed):
    """Log-probs stay finite in the model's own pass; everything else is NaN where the mask is off."""
    data = cases.mini_batch(seed)
    data["logprobs"] = cases.mini_batch(seed, poison=False)["logprobs"]
    data["mask"] &= torch.arange(cases.T) < torch.tensor(LENGTHS).unsqueeze(1)
    return data


def batch_of(data, rows, **leave):
    def parts(name):
        return [data[name][i, : LENGTHS[i]].to(DTYPE) for i in rows]

    batch = {
        "unconcat_tokens": [torch.zeros(PROMPT + LENGTHS[i], dtype=torch.long) for i in rows],
        "total_lengths": [PROMPT + LENGTHS[i] for i in rows], "response_lengths": [LENGTHS[i] for i in rows],
        "loss_masks": [m.to(torch.int) for m in [data["mask"][i, : LENGTHS[i]] for i in rows]],
        "advantages": parts("advantages"), "log_probs": parts("old_logprobs"),
        "rollout_log_probs": parts("rollout_logprobs"), "ref_log_probs": parts("ref_logprobs"),
    }  # fmt: skip
    batch["rollout_mask_sums"] = [m.sum() for m in batch["loss_masks"]]
    return {name: x for name, x in batch.items() if name not in leave}


DTYPE = torch.float32 if SOURCE else torch.float64


def logits_of(x, rows):
    """Of two tokens: the sampled one has exactly the wanted log-prob."""
    flat = []
    for i in rows:
        logp = torch.cat([x.new_full((PROMPT - 1,), -1.0), x[i, : LENGTHS[i]], x.new_full((1,), -1.0)])
        flat.append(torch.stack([logp, torch.log(-torch.expm1(logp))], -1))
    return torch.cat(flat).unsqueeze(0).to(DTYPE)


RANKS = (((0, 1), (2,)), ((3, 4), (5,)))


def train(host, args, data, leave=()):
    """Two ranks with two micro-batches each: Megatron divides by micro-batches, and averages over ranks."""
    x = data["logprobs"].clone().requires_grad_()
    total, tokens, logs = 0.0, 0, []
    for parts in RANKS:
        for rows in parts:
            loss, n, log = host.loss_function(
                args, batch_of(data, rows, **dict.fromkeys(leave)), len(parts), cases.B, logits_of(x, rows)
            )
            total = total + (loss if args.calculate_per_token_loss else loss / len(parts) / len(RANKS))
            tokens += n
            logs.append(log)
    if args.calculate_per_token_loss:
        total = total / tokens
    (gradient,) = torch.autograd.grad(total, x)
    values = sum(log["values"] for log in logs)
    count = values[0] if args.calculate_per_token_loss else cases.B
    return (total.detach(), gradient), dict(zip(logs[0]["keys"], (values[1:] / count).tolist(), strict=True))


def wanted(data, objective, per_token, **kwargs):
    aggregation = "token-mean" if per_token else "seq-mean-token-mean"
    return cases.wanted(
        data, objective, aggregation, normalizer=int(data["mask"].sum()) if per_token else cases.B, **kwargs
    )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("objective", [*cases.OBJECTIVES, "dppo-kl", "icepop"])
def test_it_is_policy_loss_with_the_host_s_reduction(host, objective, per_token):
    data = example(1)
    args = arguments(host, bandpo={"objective": objective}, calculate_per_token_loss=per_token)
    cases.same(train(host, args, data)[0], wanted(data, objective, per_token), TOLERANCE)


def test_against_the_sampler(host):
    """With use_rollout_logprobs there are no old log-probs."""
    data = example(2)
    args = arguments(host, use_rollout_logprobs=True)
    cases.same(train(host, args, data, ["log_probs"])[0], wanted(data, "bandpo-kl", False, anchor="rollout"), TOLERANCE)


def test_without_old_log_probs_the_policy_is_the_old_one(host):
    data = example(3)
    args = arguments(host, skip_actor_forward_only=True)
    found = train(host, args, data, ["log_probs"])[0]
    same = {**data, "old_logprobs": data["logprobs"]}
    cases.same(found, wanted(same, "bandpo-kl", False), TOLERANCE)


def test_kl_loss_and_entropy_bonus_are_the_host_s(host):
    data = example(4)
    args = arguments(host, use_kl_loss=True, kl_loss_coef=0.3, entropy_coef=0.2)
    (loss, gradient), log = train(host, args, data)
    want, _ = wanted(data, "bandpo-kl", False)
    assert loss.item() == pytest.approx(want.item() + 0.3 * log["kl_loss"] - 0.2 * log["entropy_loss"], rel=TOLERANCE)
    assert gradient.isfinite().all()
    clean = {**cases.mini_batch(4, poison=False), "mask": data["mask"]}
    cases.same((loss, gradient), train(host, args, clean)[0], TOLERANCE)


@pytest.mark.parametrize("per_token", [False, True])
def test_logged_metrics_are_means_over_all_tokens_and_finite(host, per_token):
    data = example(5)
    args = arguments(host, bandpo={"radius": 0.01}, calculate_per_token_loss=per_token)
    _, log = train(host, args, data)
    assert all(torch.tensor(v).isfinite() for v in log.values())
    assert 0 < log["pg_clipfrac"] < 1
    if per_token:
        assert log["band/clip_fraction/any"] == pytest.approx(log["pg_clipfrac"], rel=1e-5)
        shares = sum(v for k, v in log.items() if k.startswith("band/token_fraction_by_prob/"))
        assert shares == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eps_clip_high": 0.28}, "eps_clip_high=0.28 would be ignored"),
        ({"eps_clip": 0.1, "eps_clip_high": 0.1}, "eps_clip=0.1 would be ignored"),
        ({"use_tis": True}, "use_tis=True would be ignored"),
        ({"use_opsm": True}, "use_opsm=True would be ignored"),
        ({"advantage_estimator": "gspo"}, "set grpo and objective: gspo"),
        ({"bandpo": "bandpo-kl"}, "must be a mapping"),
        ({"bandpo": {"raduis": 1}}, "unknown options raduis"),
        ({"use_rollout_logprobs": True, "bandpo": {"objective": "icepop"}}, "sampler beside the old ones"),
    ],
)
def test_refused(host, changes, words):
    with pytest.raises(ValueError, match=words):
        train(host, arguments(host, **changes), example(6))


def test_objectives_of_whole_sequences_are_refused_under_context_parallelism(host, monkeypatch):
    """A rank has a part of each sequence."""
    data = example(7)
    rows = [torch.stack([v]).squeeze(0) for v in data["logprobs"]]
    given = {
        "logprobs": rows, "entropy": None, "masks": list(data["mask"]), "context_parallel": 2, "approx_kl": None,
    }  # fmt: skip
    batch = {"advantages": list(data["advantages"]), "log_probs": list(data["old_logprobs"])}

    def call(objective):
        args = arguments(host, bandpo={"objective": objective})
        return ours_slime.megatron_loss(host.name, args, batch, torch.zeros(1), lambda x: x.sum(), **given)

    for objective in ("gspo", "luspo", "gmpo", "topr", "clip-cov", "bapo"):
        with pytest.raises(ValueError, match="whole sequences, one in a row"):
            call(objective)
    loss, _ = call("bandpo-kl")
    want, _ = cases.wanted(data, "bandpo-kl", "token-sum")
    torch.testing.assert_close(loss.detach(), want)
    assert pad_sequence(rows, batch_first=True).shape == data["mask"].shape
