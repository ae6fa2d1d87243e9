"""Tinker: its own `_compute_custom_loss`, from the forward pass's output to the weights that it sends back."""

from functools import partial

import pytest
import torch

pytest.importorskip("tinker")
import cases
import tinker
from tinker import types
from tinker.lib.public_interfaces.training_client import TrainingClient

from bandpo.integrations import tinker as ours


def tensor(x):
    x = x.contiguous()
    if x.dtype == torch.bool:
        x = x.long()
    return types.TensorData(
        data=x.tolist(), dtype="int64" if x.dtype == torch.int64 else "float32", shape=list(x.shape)
    )


def datums(data, lengths):
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(list(range(n))),
            loss_fn_inputs={
                "target_tokens": tensor(torch.arange(n)), "logprobs": tensor(data["rollout_logprobs"][i, :n]),
                "advantages": tensor(data["advantages"][i, :n]), "mask": tensor(data["mask"][i, :n]),
            },
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip


def compute(data, lengths, loss_fn):
    outputs = [{"logprobs": tensor(data["logprobs"][i, :n])} for i, n in enumerate(lengths)]
    forward = types.ForwardBackwardOutput(loss_fn_output_type="x", loss_fn_outputs=outputs, metrics={})
    return TrainingClient._compute_custom_loss(datums(data, lengths), loss_fn, forward)


@pytest.mark.parametrize("objective", [*cases.OBJECTIVES, "dppo-kl", "ppo-kl"])
def test_it_is_policy_loss_against_the_sampler(objective):
    """float32 is Tinker's; the inputs are exact in it, so only roundings of the loss differ."""
    data = cases.mini_batch(1)
    data = {name: x if x.dtype == torch.bool else x.float().double() for name, x in data.items()}
    lengths = [9, 6, 9, 4, 9, 1]
    found = compute(data, lengths, partial(ours.policy_loss, objective=objective, max_length=max_length(objective)))
    spec = ours.host_objective("Tinker", objective, {}, sampler="only")
    loss, gradient = cases.wanted(data, spec, spec.aggregation, max_length=max_length(objective))
    assert found.loss_sum == pytest.approx(loss.item(), rel=2e-6) if hasattr(found, "loss_sum") else True
    for i, (datum, n) in enumerate(zip(found.data, lengths, strict=True)):
        weights = datum.loss_fn_inputs["weights"].to_torch().double()
        torch.testing.assert_close(weights, -gradient[i, :n], rtol=3e-6, atol=3e-7)
        assert set(datum.loss_fn_inputs) == {"target_tokens", "weights"}
    assert all(torch.tensor(v).isfinite() for v in found.metrics.values())


def max_length(objective):
    return 32 if objective == "dppo-kl" else None


def test_an_empty_datum_counts_nowhere():
    data = cases.mini_batch(2)
    data["mask"][5] = False
    loss = partial(ours.policy_loss, objective="bandpo-kl")
    with_it, without = (compute(data, lengths, loss) for lengths in ([9, 6, 9, 4, 9, 1], [9, 6, 9, 4, 9]))
    for a, b in zip(with_it.data[:5], without.data, strict=True):
        assert torch.equal(a.loss_fn_inputs["weights"].to_torch(), b.loss_fn_inputs["weights"].to_torch())
    assert with_it.data[5].loss_fn_inputs["weights"].to_torch().abs().sum() == 0


def test_two_calls_add_up_with_the_normalizer():
    data = cases.mini_batch(3, poison=False)
    data = {name: x if x.dtype == torch.bool else x.float().double() for name, x in data.items()}
    loss = partial(ours.policy_loss, objective="bandpo-kl", normalizer=6)
    parts = [compute(cases.rows(data, part), [9, 9, 9], loss).data for part in cases.HALVES]
    _, gradient = cases.wanted(data, "bandpo-kl", "seq-mean-token-mean", anchor="rollout")
    for i, datum in enumerate([*parts[0], *parts[1]]):
        torch.testing.assert_close(
            datum.loss_fn_inputs["weights"].to_torch().double(), -gradient[i], rtol=3e-6, atol=3e-7
        )


def test_refused():
    data = cases.mini_batch(4)
    given = datums(data, [9])
    given[0].loss_fn_inputs.pop("mask")
    with pytest.raises(ValueError, match="has no 'mask'"):
        ours.policy_loss(given, [data["logprobs"][0]])
    with pytest.raises(ValueError, match=r"log-probs of the sampler beside the old ones; Tinker does not give"):
        ours.policy_loss([], [], objective="icepop")
    with pytest.raises(ValueError, match="raduis"):
        ours.policy_loss([], [], raduis=0.1)
    assert tinker.__version__
