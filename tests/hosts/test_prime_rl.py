"""prime-rl: its `compute_loss`, sequence by sequence, with its weights, its divisor and its means of the metrics."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import cases
import pytest
import torch
from records import RECORDS, SOURCE, modules, own_source

from bandpo import OBJECTIVES
from bandpo.integrations import prime_rl as ours


@pytest.fixture
def host(monkeypatch):
    return real() if SOURCE else stand_in(monkeypatch)


def stand_in(monkeypatch):
    """What the record says the host does."""

    @dataclass
    class LossOutputs:
        loss: torch.Tensor
        metrics: dict

    modules(monkeypatch, prime_rl__trainer__rl__loss={"LossOutputs": LossOutputs})

    def compute_loss(sequences, weights, loss_fn, tokens):
        total, metrics = sequences[0]["new"].sum() * 0.0, {}  # so that an empty micro-batch has a gradient
        for i, sequence in enumerate(sequences):
            mask = sequence["mask"] if weights is None else sequence["mask"] & (weights[i] != 0)
            values = (
                sequence["new"],
                sequence["sampler"],
                None,
                sequence["a"],
                mask,
                None if weights is None else weights[i],
            )
            out = loss_fn(SimpleNamespace(**dict(zip(RECORDS["prime_rl"]["inputs"], values, strict=True))))
            total = total + out.loss
            for name, value in out.metrics.items():
                metrics.setdefault(name, []).append(value)
        return total / tokens, {name: torch.stack(v) for name, v in metrics.items()}

    return compute_loss


def real():
    if "prime_rl" not in sys.modules:
        packages = ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.utils")
        own_source(f"{SOURCE}/src", packages, ("jaxtyping", "beartype", "prime_rl.configs", "prime_rl.utils.utils"))
    import prime_rl.trainer.rl.loss as module

    def compute_loss(sequences, weights, loss_fn, tokens):
        columns = [[s[name] for s in sequences] for name in ("new", "sampler", "a", "mask")]
        return module.compute_loss(
            columns[0], columns[1], None, columns[2], columns[3], weights, None, None, loss_fn, tokens, 1, 1
        )

    return compute_loss


def example(seed):
    """prime-rl itself adds 0 * log-probs of a whole sequence, so the model's own log-probs must be finite everywhere."""
    return {**cases.mini_batch(seed), "logprobs": cases.mini_batch(seed, poison=False)["logprobs"]}


def train(compute_loss, data, weights=None, **kwargs):
    x = data["logprobs"].clone().requires_grad_()
    tokens = int(data["mask"].sum())
    total, metrics = 0.0, []
    for parts in cases.RANKS:
        for part in parts:
            rows = range(*part.indices(cases.B))
            sequences = [
                {"new": x[i], "sampler": data["rollout_logprobs"][i], "a": data["advantages"][i], "mask": data["mask"][i]}
                for i in rows
            ]  # fmt: skip
            loss, found = compute_loss(
                sequences, None if weights is None else [weights[i] for i in rows],
                lambda inputs: ours.policy_loss(inputs, **kwargs), tokens,
            )  # fmt: skip
            total = total + loss
            metrics.append(found)
    (gradient,) = torch.autograd.grad(total, x)
    return (total.detach(), gradient), {name: torch.cat([m[name] for m in metrics]) for name in metrics[0]}


@pytest.mark.parametrize("objective", [*cases.OBJECTIVES, "dppo-kl"])
def test_it_is_policy_loss_against_the_sampler_as_a_token_mean(host, objective):
    data = example(1)
    want = cases.wanted(data, objective, "token-mean", anchor="rollout")
    cases.same(train(host, data, objective=objective)[0], want)


def test_weights_multiply_the_terms_of_tokens(host):
    """A weight of .25 makes a quarter of the loss; tokens of weight 0 are off and never matter."""
    data = example(2)
    weights = torch.rand(cases.B, cases.T, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    weights[:, 1] = 0.0
    data["mask"][0] = True
    for name in ("logprobs", "rollout_logprobs", "advantages"):
        data[name][0] = cases.mini_batch(3, poison=False)[name][1]
    tokens = int(data["mask"].sum())
    shown = {**data, "mask": data["mask"] & (weights != 0)}
    want = cases.wanted(shown, "bandpo-kl", "token-mean", anchor="rollout", weights=weights, normalizer=tokens)
    cases.same(train(host, data, weights, objective="bandpo-kl")[0], want)
    whole, quarter = (train(host, data, torch.full_like(weights, w), objective="bandpo-kl")[0][0] for w in (1.0, 0.25))
    torch.testing.assert_close(quarter, whole / 4)


def test_metrics_are_finite_under_a_mean(host):
    data = example(4)
    data["mask"][3] = False  # a sequence of tool tokens alone
    _, metrics = train(host, data, objective="bandpo-kl", radius=0.01)
    assert all(m.isfinite().all() and m.dim() == 1 for m in metrics.values())
    assert metrics["band/clip_fraction/any"].mean() > 0
    assert not any(name.startswith("band/band/") for name in metrics)


def test_options_and_what_is_refused(host):
    assert ours._objective("bandpo-tv", radius=0.1).bounds.radius == 0.1
    assert ours._objective("bandpo-kl").anchor == "rollout"
    for given, words in (
        ({"objective": "bandpo-kl", "raduis": 0.1}, "unknown options raduis; choose from objective, divergence"),
        ({"objective": "dapo", "radius": 0.1}, r"radius=0\.1 would be ignored"),
        ({"objective": "dppo-topk-kl"}, "topk_logprobs.*prime-rl does not give"),
        ({"objective": "troll"}, "the 64 most likely tokens.*topk_logprobs.*prime-rl does not give"),
        ({"objective": "icepop"}, "log-probs of the sampler beside the old ones"),
        ({"objective": "bandpo-kl", "relax": "maybe"}, "relax='maybe' must be true or false"),
        ({"objective": "bandpo-kl", "radius": "wide"}, "radius='wide' must be a number"),
    ):
        with pytest.raises(ValueError, match=words):
            train(host, example(5), **given)


def test_objectives_that_compare_sequences_are_refused():
    """prime-rl calls the loss for one sequence at a time."""
    for name in ("clip-cov", "kl-cov", "bapo", "m2po"):
        with pytest.raises(ValueError, match="the other sequences of the batch"):
            ours._objective(name)
    for name in OBJECTIVES.keys() - {"clip-cov", "kl-cov", "bapo", "m2po"}:
        if OBJECTIVES[name].kl_coef:
            with pytest.raises(ValueError, match="gives no log-probs of a reference"):
                ours._objective(name)
        elif not OBJECTIVES[name].extras and OBJECTIVES[name].correction is None:
            assert ours._objective(name)
