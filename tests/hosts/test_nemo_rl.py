"""NeMo-RL: its wrappers and its own ClippedPGLossFn around ours, in micro-batches over ranks."""

import enum
import sys

import cases
import pytest
import torch
from ray import cloudpickle
from records import SOURCE, own_source

from bandpo.integrations.nemo_rl import BandLoss

KEPT = {
    "disable_ppo_ratio": False, "ratio_clip_min": 0.2, "ratio_clip_max": 0.2, "ratio_clip_c": None,
    "sequence_level_importance_ratios": False, "use_cispo": False, "force_on_policy_ratio": False,
    "positive_example_nll_weight": 0.0, "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None, "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None, "reference_policy_kl_penalty": 0.0,
}  # fmt: skip


@pytest.fixture
def host(monkeypatch):
    return real if SOURCE else stand_in


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class StandIn:
    """What the record says of ClippedPGLossFn, for objectives that clip at [0.8, 1.2] and the terms that are not ours."""

    def __init__(self, **options):
        vars(self).update({**KEPT, "input_type": "logprob", "loss_type": LossType.TOKEN_LEVEL, **options})
        self.metric_normalizations = {"gen_kl_error": "tokens", "num_valid_samples": "none"}

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        old, sampler, a = (data[n][:, 1:] for n in ("prev_logprobs", "generation_logprobs", "advantages"))
        r = next_token_logprobs if self.disable_ppo_ratio else (next_token_logprobs - old).exp()
        value = -torch.maximum(-a * r, -a * (r if self.disable_ppo_ratio else r.clamp(0.8, 1.2)))
        if self.use_importance_sampling_correction:
            w = (old - sampler).exp()
            low, high = self.truncated_importance_sampling_ratio_min, self.truncated_importance_sampling_ratio
            if self.truncated_importance_sampling_type == "icepop":
                w = w * ((w >= low) & (w <= high))
            elif high is not None:
                w = w.clamp(max=high)
            value = value * w.detach()
        term = -value
        if self.reference_policy_kl_penalty:
            x = data["reference_policy_logprobs"][:, 1:] - next_token_logprobs
            term = term + self.reference_policy_kl_penalty * (x.exp() - 1 - x)
        if self.loss_type is LossType.TOKEN_LEVEL:
            loss = (term * mask).sum() / global_valid_toks
        else:
            loss = ((term * mask).sum(-1) / (mask.sum(-1) + 1e-8)).sum() / global_valid_seqs
        error = ((sampler - old).abs() * mask).exp() * mask
        return loss, {
            "loss": loss.item(), "probs_ratio": ((r * mask).sum() / global_valid_toks).item(), "probs_ratio_min": 0.0,
            "num_valid_samples": data["sample_mask"].sum().item(), "gen_kl_error": 0.0,
            "token_mult_prob_error": (error.sum() / global_valid_toks).item(),
        }  # fmt: skip


def stand_in(token_level=True, **options):
    return StandIn(**options, loss_type=LossType.TOKEN_LEVEL if token_level else LossType.SEQUENCE_LEVEL)


def real(token_level=True, **options):
    if "nemo_rl" not in sys.modules:
        packages = ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss", "nemo_rl.distributed")
        own_source(
            SOURCE, packages,
            ("megatron", "nemo_rl.models", "nemo_rl.distributed.model_utils", "nemo_rl.algorithms.x_token", "nemo_rl.utils",
             "nemo_rl.distributed.batched_data_dict", "nemo_rl.data", "nemo_rl.environments"),
        )  # fmt: skip
    from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig, ClippedPGLossFn

    values = {
        **KEPT,
        "kl_input_clamp_value": None,
        "kl_output_clamp_value": None,
        **options,
        "token_level_loss": token_level,
    }
    return ClippedPGLossFn(ClippedPGLossConfig(**values))


def call(loss_fn, data, x):
    """Two ranks, two micro-batches each: losses are parts of a sum, and so are the metrics."""

    def shifted(values):
        return torch.cat([values.new_full((len(values), 1), torch.nan), values], 1)

    whole = {
        "advantages": shifted(data["advantages"]), "prev_logprobs": shifted(data["old_logprobs"]),
        "generation_logprobs": shifted(data["rollout_logprobs"]), "sample_mask": data["keep"],
        "reference_policy_logprobs": shifted(data["ref_logprobs"]),
        "token_mask": torch.cat([torch.zeros(cases.B, 1), data["tokens"]], 1).double(),
    }  # fmt: skip
    tokens = (whole["token_mask"][:, 1:] * data["keep"].unsqueeze(-1)).sum()
    sequences = data["keep"].sum()
    total, metrics = 0.0, []
    for parts in cases.RANKS:
        for part in parts:
            mini = {name: v[part] for name, v in whole.items()}
            loss, found = loss_fn(
                data=mini, global_valid_seqs=sequences, global_valid_toks=tokens, next_token_logprobs=x[part]
            )
            total = total + loss
            metrics.append(found)
    return total, metrics


def example(seed, poison=True):
    data = cases.mini_batch(seed, poison=poison)
    data["keep"] = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)  # one sample is filtered out
    data["tokens"] = data["mask"].double()
    data["mask"] = data["mask"] & (data["keep"] != 0).unsqueeze(1)
    return data


def train(loss_fn, data):
    x = data["logprobs"].clone().requires_grad_()
    total, metrics = call(loss_fn, data, x)
    (gradient,) = torch.autograd.grad(total, x)
    return (total.detach(), gradient), metrics


EPSILON = 1e-7  # theirs divides by counts + 1e-8


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("objective", [*cases.OBJECTIVES, "dppo-kl", "icepop"])
def test_it_is_policy_loss_with_nemo_rl_s_reduction(host, objective, token_level):
    data = example(1)
    loss_fn = cloudpickle.loads(cloudpickle.dumps(BandLoss(host(token_level), objective)))  # how it reaches a worker
    aggregation = "token-mean" if token_level else "seq-mean-token-mean"
    cases.same(train(loss_fn, data)[0], cases.wanted(data, objective, aggregation), EPSILON)


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"reference_policy_kl_penalty": 0.3},
        {"use_importance_sampling_correction": True},
        {
            "use_importance_sampling_correction": True, "truncated_importance_sampling_type": "tis",
            "truncated_importance_sampling_ratio": 1.1,
        },
        {
            "use_importance_sampling_correction": True, "truncated_importance_sampling_type": "icepop",
            "truncated_importance_sampling_ratio": 1.2, "truncated_importance_sampling_ratio_min": 0.8,
        },
    ],
)  # fmt: skip
def test_with_grpo_s_clip_it_is_nemo_rl_s_own_loss(host, options, token_level):
    """KL penalty and corrections for the sampler included; and poison under the mask changes nothing."""
    data = example(2, poison=False)
    theirs = host(token_level, **options)
    want, their_metrics = train(theirs, data)
    ours = BandLoss(theirs, "grpo")
    found, metrics = train(ours, data)
    cases.same(found, want, EPSILON)
    cases.same(train(ours, example(2))[0], want, EPSILON)
    for name in ("token_mult_prob_error", "gen_kl_error", "num_valid_samples", "probs_ratio", "loss"):
        want_of_all = sum(m[name] for m in their_metrics)
        assert sum(m[name] for m in metrics) == pytest.approx(want_of_all, rel=1e-6), name


def test_what_workers_and_grpo_train_read(host):
    theirs = host()
    ours = BandLoss(theirs, radius=0.01)
    assert (ours.input_type, ours.loss_type) == (theirs.input_type, theirs.loss_type)
    assert ours.use_fused_linear_logprobs is False and ours.reference_policy_kl_penalty == 0
    _, metrics = train(ours, example(3))
    assert {"num_valid_samples", "token_mult_prob_error", "gen_kl_error", "probs_ratio_min"} <= set(metrics[0])
    sums = {name: sum(m[name] for m in metrics) for name in metrics[0] if name.startswith("band/")}
    assert all(torch.tensor(v).isfinite() for v in sums.values()) and 0 < sums["band/clip_fraction/any"] < 1
    shares = sum(v for name, v in sums.items() if name.startswith("band/token_fraction_by_prob/"))
    assert shares == pytest.approx(1, rel=1e-6)
    assert {ours.metric_normalizations[name] for name in sums} == {theirs.metric_normalizations["gen_kl_error"]}


@pytest.mark.parametrize(
    ("options", "objective", "words"),
    [
        ({"ratio_clip_max": 0.28}, "bandpo-kl", r"ratio_clip_max=0\.28 would be ignored"),
        ({"ratio_clip_c": 3.0}, "bandpo-kl", r"ratio_clip_c=3\.0 would be ignored"),
        ({"disable_ppo_ratio": True}, "bandpo-kl", "disable_ppo_ratio=True would be ignored"),
        ({"force_on_policy_ratio": True}, "bandpo-kl", "force_on_policy_ratio=True would be ignored"),
        ({"positive_example_nll_weight": 0.1}, "bandpo-kl", "positive_example_nll_weight=0.1 would be ignored"),
        ({"use_importance_sampling_correction": True}, "dppo-kl", "accounts for the sampler itself; use one"),
        ({}, "dppo-topk-kl", "NeMo-RL does not give"),
        ({}, "troll", "the 64 most likely tokens.*NeMo-RL does not give"),
        (
            {"use_importance_sampling_correction": True, "truncated_importance_sampling_type": "seq-mask-tis",
             "truncated_importance_sampling_ratio": 1.002, "truncated_importance_sampling_ratio_min": 0.999},
            "bandpo-kl", "cannot be expressed",
        ),
    ],
)  # fmt: skip
def test_refused(host, options, objective, words):
    with pytest.raises(ValueError, match=words):
        BandLoss(host(**options), objective)
