"""open-instruct: the caller's ratio without a mask, its weights, its mask and its divisor; the exchange in a module."""

import importlib
import sys
from types import SimpleNamespace

import cases
import pytest
import torch
from records import SOURCE, modules, own_source

from bandpo.integrations import open_instruct as ours
from bandpo.integrations._host import ENVIRONMENT

INVALID = 1.0


def estimate_kl(difference, ratio):
    """Four estimators, as open_instruct.model_utils stacks them."""
    return torch.stack([difference, difference.square() / 2, torch.expm1(-difference) + difference, ratio * difference])


def theirs(new_logprobs, ratio, advantages, ref_logprobs, config, rho_weights):
    """What the record says of its own function, for loss_fn dapo."""
    a, b = -advantages * ratio, -advantages * ratio.clamp(1 - config.clip_lower, 1 + config.clip_higher)
    kl = torch.zeros_like(a)
    if ref_logprobs is not None:
        kl = estimate_kl((new_logprobs - ref_logprobs).clamp(-40, 40), ratio)[config.kl_estimator]
    return torch.maximum(a, b) * rho_weights, (b > a).double() * (rho_weights != 0), kl


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, '{"objective": "dapo", "epsilon_high": 0.272}')
    if not SOURCE:
        modules(monkeypatch, open_instruct__model_utils={"estimate_kl": estimate_kl})
        module = modules(monkeypatch, open_instruct__grpo_utils={"compute_grpo_loss": theirs})
    else:
        module = real()
    monkeypatch.setattr(module, "theirs", module.compute_grpo_loss, raising=False)
    monkeypatch.setattr(module, "compute_grpo_loss", module.compute_grpo_loss)
    return module


def real():
    if "open_instruct" not in sys.modules:
        own_source(
            SOURCE, ("open_instruct",),
            ("olmo_core", "deepspeed", "vllm", "open_instruct.data_loader", "open_instruct.vllm_utils", "accelerate",
             "open_instruct.data_types", "open_instruct.logger_utils", "open_instruct.actor_manager",
             "open_instruct.model_utils", "open_instruct.olmo_core_utils", "open_instruct.utils", "datasets", "wandb"),
        )  # fmt: skip
        import open_instruct.model_utils
        import open_instruct.olmo_core_utils
        import open_instruct.utils

        for name in ("ExperimentConfig", "TrainingConfig", "LoggingConfig", "CheckpointConfig"):
            setattr(open_instruct.olmo_core_utils, name, type(name, (), {}))
        open_instruct.utils.INVALID_LOGPROB = INVALID
        open_instruct.model_utils.estimate_kl = estimate_kl
    return importlib.import_module("open_instruct.grpo_utils")


def config(**changes):
    return SimpleNamespace(**{"clip_lower": 0.2, "clip_higher": 0.272, "loss_fn": "dapo", "kl_estimator": 2, **changes})


def train(module, data, name="compute_grpo_loss", beta=0.0, rho=None, **changes):
    """Micro-batches of two ranks; masked log-probs are 1.0, and there is no mask in the call."""
    x = data["logprobs"].clone().requires_grad_()
    mask, total = data["mask"], data["mask"].sum()
    new, old, ref = (torch.where(mask, v, INVALID) for v in (x, data["old_logprobs"], data["ref_logprobs"]))
    rho = torch.ones_like(x) if rho is None else rho
    loss, outs = 0.0, []
    for parts in cases.RANKS:
        for part in parts:
            out = getattr(module, name)(
                new_logprobs=new[part], ratio=torch.exp(new[part] - old[part]), advantages=data["advantages"][part],
                ref_logprobs=ref[part] if beta else None, config=config(**changes), rho_weights=rho[part],
            )  # fmt: skip
            outs.append(out)
            per_token = out[0] + beta * out[2]
            loss = loss + (per_token * mask[part]).sum() / total
    (gradient,) = torch.autograd.grad(loss, x)
    return (loss.detach(), gradient), outs


def example(seed, poison=False):
    """open-instruct multiplies by its mask, so its own advantages must be finite; ours are poisoned only in a direct call."""
    return cases.mini_batch(seed, poison=poison)


@pytest.mark.parametrize("objective", ["bandpo-kl", "dapo", "cispo", "bandpo-kl-soft"])
def test_it_is_policy_loss_as_a_token_mean(host, monkeypatch, objective):
    monkeypatch.setenv(ENVIRONMENT, f'{{"objective": "{objective}"}}')
    ours.patch()
    data = example(1)
    cases.same(train(host, data)[0], cases.wanted(data, objective, "token-mean"), 1e-11)
    poisoned = {**data, "advantages": data["advantages"].masked_fill(~data["mask"], torch.nan)}
    cases.same(train(host, poisoned)[0], cases.wanted(data, objective, "token-mean"), 1e-11)


def test_weights_and_kl_are_open_instruct_s(host):
    data = example(2)
    rho = torch.rand(cases.B, cases.T, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    rho = rho * (rho > 0.5)
    ours.patch()
    found, want = (train(host, data, name, beta=0.3, rho=rho) for name in ("compute_grpo_loss", "theirs"))
    cases.same(found[0], want[0], 1e-11)
    for a, b in zip(found[1], want[1], strict=True):
        torch.testing.assert_close(a[1], b[1].double())
        assert a[0].shape == a[1].shape == a[2].shape


def test_the_exchange_waits_for_the_import(monkeypatch, tmp_path):
    """A worker's hook must not import the host; the module is changed when something else imports it."""
    if SOURCE:
        pytest.skip("the checkout is in front")
    package = tmp_path / "open_instruct"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "grpo_utils.py").write_text("def compute_grpo_loss(**_): return 'theirs'\n")
    for name in [n for n in sys.modules if n.split(".")[0] == "open_instruct"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(ENVIRONMENT, "{}")
    ours.patch()
    assert "open_instruct" not in sys.modules
    module = importlib.import_module("open_instruct.grpo_utils")
    assert module.compute_grpo_loss.__module__ == "bandpo.integrations.open_instruct"
    for name in [n for n in sys.modules if n.split(".")[0] == "open_instruct"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("{}", {"clip_higher": 0.3}, r"clip_higher=0\.3 would be ignored"),
        ("{}", {"loss_fn": "cispo"}, "loss_fn='cispo' would be ignored"),
        ('{"objective": "gspo"}', {}, "whole sequences, one in a row"),
        ('{"objective": "dppo-kl"}', {}, "log-probs of the sampler; open-instruct does not give"),
        (
            '{"radius": 0.05, "radius": 0.1}',
            {},
            "the key 'radius' is there twice; keep one of the two; open-instruct reads",
        ),
        ("bandpo-kl", {}, "BANDPO_LOSS='bandpo-kl' is not JSON"),
        ("[1]", {}, "must be a JSON object"),
    ],
)
def test_refused(host, monkeypatch, text, changes, words):
    monkeypatch.setenv(ENVIRONMENT, text)

    def run():
        ours.patch()
        train(host, example(3), **changes)

    with pytest.raises(ValueError, match=words):
        run()


def test_the_command_refuses_a_wrong_objective_before_it_starts_anything():
    with pytest.raises(ValueError, match="whole sequences, one in a row"):
        ours.launch(
            "open-instruct", "nowhere", "bandpo.integrations.open_instruct.patch", ours._CHECK, ["--objective", "gspo"]
        )
    with pytest.raises(ValueError, match="radius='wide' must be a number"):
        ours.launch(
            "x", "nowhere", "bandpo.integrations.open_instruct.patch", ours._CHECK, ["--radius", "wide", "--", "--lr"]
        )
