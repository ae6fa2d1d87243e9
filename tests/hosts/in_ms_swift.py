"""ms-swift: its own GRPOTrainer's loss from log-probs to the number, with our intervals in its clip."""

import math
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
import trl
from isolation import stub

stub("modelscope", "dacite", "json_repair", "aiohttp", "einops", "msgspec")
missing = ModuleType("trl.experimental.ppo")  # gone from this TRL; ms-swift wants it for PPO alone
missing.PPOConfig = trl.GRPOConfig
missing.PPOTrainer = object
sys.modules.setdefault("trl.experimental.ppo", missing)

import cases
import swift.rlhf_trainers.grpo_trainer as host
from swift.trainers import TrainerFactory

from bandpo import Clip, Objective
from bandpo.integrations import ms_swift as ours
from bandpo.surrogates import future_weighted
from bandpo.surrogates.filters import opsm


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.setattr(host, "gather_object", lambda x: x)
    monkeypatch.setitem(TrainerFactory.TRAINER_MAPPING, "grpo", TrainerFactory.TRAINER_MAPPING["grpo"])

    def make(objective, theirs=False, loss_type="grpo", **options):
        if not theirs:
            ours.register(objective, **options)
        cls = host.GRPOTrainer if theirs else TrainerFactory.get_trainer_cls(SimpleNamespace(rlhf_type="grpo"))
        made = object.__new__(cls)
        args = {
            "log_entropy": False, "top_entropy_quantile": 1.0, "delta": None, "epsilon": 0.2, "epsilon_high": None,
            "importance_sampling_level": "token", "gradient_accumulation_steps": 2,
        }  # fmt: skip
        values = {
            "args": SimpleNamespace(**args), "model": SimpleNamespace(training=True), "compute_entropy": False,
            "overlong_filter": False, "beta": 0.0, "kl_in_reward": False, "rollout_importance_sampling_mode": None,
            "log_rollout_offpolicy_metrics": False, "disable_rollout_importance_sampling": True,
            "importance_sampling_level": "token", "_has_teacher": False, "loss_type": loss_type, "epsilon_low": 0.2,
            "epsilon_high": 0.2, "off_policy_sequence_mask_delta": None, "sdar_loss_coef": 0.0,
            "chord_sft_iterator": None, "max_completion_length": 32, "model_accepts_loss_kwargs": False,
            "compute_loss_func": None, "current_gradient_accumulation_steps": 2,
            "accelerator": SimpleNamespace(gather_for_metrics=lambda x: x.reshape(-1), num_processes=2),
        }  # fmt: skip
        for name, value in values.items():
            made.__dict__[name] = value
        return made

    return make


def train(made, data, parts):
    """Micro-batches of one rank; TRL's Trainer divides the loss by the accumulation steps."""
    x = data["logprobs"].clone().requires_grad_()
    total, logs = 0.0, []
    for part in parts:
        made.__dict__["_get_per_token_logps_and_entropies"] = lambda *_, part=part, **__: (x[part], None)
        batch = SimpleNamespace(
            completion_mask=data["mask"][part], truncated_mask=None, advantages=data["advantages"][part],
            old_per_token_logps=data["old_logprobs"][part], rollout_per_token_logps=None, ref_per_token_logps=None,
            num_items_in_batch=data["mask"].sum() * 2, teacher_per_token_logps=None,
        )  # fmt: skip
        loss, log = made._compute_loss_and_metrics(None, {}, batch)
        total = total + loss / len(parts)
        logs.append(log)
    (gradient,) = torch.autograd.grad(total, x)
    return (total.detach(), gradient), logs


KINDS = {
    "grpo": ("seq-mean-token-mean", lambda data: {}),
    "dapo": ("token-mean", lambda data: {}),
    "dr_grpo": ("seq-mean-token-sum-norm", lambda data: {"max_length": 32}),
}


@pytest.mark.parametrize("loss_type", KINDS)
@pytest.mark.parametrize("objective", ["bandpo-kl", "bandpo-tv", "dcpo", "dapo"])
def test_it_is_policy_loss_with_ms_swift_s_reduction(trainer, objective, loss_type):
    data = cases.mini_batch(1, poison=False)
    data["old_logprobs"] = data["old_logprobs"].masked_fill(~data["mask"], -1.0)
    aggregation, more = KINDS[loss_type]
    (loss, gradient), logs = train(trainer(objective, loss_type=loss_type), data, cases.HALVES)
    cases.same((loss, gradient), cases.wanted(data, objective, aggregation, **more(data)))
    assert sum(log["clipping"]["region_clip_mean"] for log in logs) > 0


def test_the_clip_is_ms_swift_s_own_and_its_epsilons_come_back(trainer):
    data = cases.mini_batch(2, poison=False)
    made = trainer("grpo")
    found, want = train(made, data, cases.HALVES), train(trainer("grpo", theirs=True), data, cases.HALVES)
    cases.same(found[0], want[0])
    assert found[1][0]["clipping"] == want[1][0]["clipping"]
    assert (made.epsilon_low, made.epsilon_high) == (0.2, 0.2)


@pytest.mark.parametrize("high_only", [True, False])
@pytest.mark.parametrize("delta", [None, 3.0, 10.0])
def test_fipo_is_ms_swift_s(trainer, delta, high_only):
    """`policy_loss` with the weights of `loss_type=fipo`: holes, ratios past the dual clip, a short half-life."""
    data = cases.mini_batch(3, poison=False)
    data["logprobs"] = data["logprobs"] + 0.8 * torch.randn(
        data["mask"].shape, generator=torch.Generator().manual_seed(1)
    )
    data["old_logprobs"] = data["old_logprobs"].masked_fill(~data["mask"], -1.0)
    data["logprobs"] = data["logprobs"].detach().masked_fill(~data["mask"], -1.0)
    made = trainer("grpo", theirs=True, loss_type="fipo")
    made.args.delta = delta
    options = {"fipo_gamma": 2 ** (-1 / 4), "fipo_clip_range": 0.2, "fipo_clip_high_only": high_only,
               "fipo_safety_threshold": 2.0}  # fmt: skip
    for name, value in options.items():
        made.__dict__[name] = value
    found, _ = train(made, data, cases.HALVES)
    c = math.inf if delta is None else delta
    surrogate = partial(future_weighted, half_life=4.0, low=1.0 if high_only else 0.8, safe=2.0, c=c, limit=math.inf)
    objective = Objective(bounds=Clip(0.2), surrogate=surrogate)
    cases.same(found, cases.wanted(data, objective, "token-mean", normalizer=data["mask"].sum()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_type": "cispo"}, "loss_type='cispo' is a loss of its own"),
        ({"loss_type": "sapo"}, "loss_type='sapo' is a loss of its own"),
        ({"use_liger_loss": True}, "the Liger loss clips by two numbers"),
    ],
)
def test_options_of_the_trainer(trainer, change, words):
    made = trainer("bandpo-kl")
    made.__dict__.update(change)
    with pytest.raises(ValueError, match=words):
        made.refuse_ignored()


@pytest.mark.parametrize(("beta", "in_reward"), [(0.0, False), (0.1, False), (0.001, True)])
def test_the_kl_of_the_objective_must_be_in_the_loss(beta, in_reward, trainer):
    made = trainer(Objective(bounds=Clip(0.2), kl_coef=0.001))
    made.beta, made.kl_in_reward = 0.001, False
    made.refuse_ignored()
    made.beta, made.kl_in_reward = beta, in_reward
    with pytest.raises(ValueError, match=r"set --beta 0.001 --kl_in_reward false"):
        made.refuse_ignored()


@pytest.mark.parametrize(
    ("name", "value"), [("epsilon", 0.1), ("epsilon_high", 0.28), ("importance_sampling_level", "sequence")]
)
def test_options_of_the_configuration(trainer, name, value):
    made = trainer("bandpo-kl")
    setattr(made.args, name, value)
    with pytest.raises(ValueError, match=f"{name}={value!r} would be ignored"):
        made.refuse_ignored()


def test_objectives_that_its_trainer_cannot_express():
    for name in ("cispo", "gspo", "cfpo", "bandpo-kl-soft"):
        with pytest.raises(ValueError, match="does not clip single tokens"):
            ours.register(name)
    for name in ("dppo-kl", "icepop", "etr-reading"):
        with pytest.raises(ValueError, match="ms-swift does not give"):
            ours.register(name)
    with pytest.raises(ValueError, match="has a filter, which this trainer would ignore"):
        ours.register(Objective(bounds=Clip(0.2), filter=opsm(0.1, policies="policy/old")))
