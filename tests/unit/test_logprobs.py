"""token_logprobs against torch's log_softmax with autograd, and against TRL's own fused head."""

import pytest
import torch

from bandpo import token_logprobs

N, D, V = 23, 16, 101


def inputs(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn(V, D, generator=g, dtype=torch.float64) * 0.5).to(dtype)
    bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype)
    return (
        hidden,
        weight,
        bias,
        torch.randint(V, (N,), generator=g),
        torch.randn(2, N, generator=g, dtype=torch.float64),
    )


def plain(hidden, weight, bias, targets, temperature):
    logp = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1), logp


@pytest.mark.parametrize("chunk_size", [1, 7, 23, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_log_softmax(chunk_size, temperature, entropy, with_bias):
    hidden, weight, bias, targets, (g, g_h) = inputs()
    g[::3] = 0  # tokens without a gradient are skipped
    g_h[::6] = 0
    results = []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        h, w, b = leaves[0], leaves[1], leaves[2] if with_bias else None
        if ours:
            logprobs, entropies, _, _ = token_logprobs(
                h, w, targets, bias=b, temperature=temperature, entropy=entropy, chunk_size=chunk_size
            )
        else:
            logprobs, entropies, _ = plain(h, w, b, targets, temperature)
        loss = (g * logprobs).sum() + ((g_h * entropies).sum() if entropy else 0)
        used = leaves if with_bias else leaves[:2]
        results.append([logprobs.detach(), *torch.autograd.grad(loss, used)])
        if entropy:
            results[-1].append(entropies.detach())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    hidden, weight, bias, targets, _ = inputs()

    def f(h, w, b):
        out = token_logprobs(h, w, targets[:5], bias=b, temperature=0.8, entropy=True, chunk_size=2)
        return out.logprobs, out.entropy

    leaves = [hidden[:5].clone(), weight.clone(), bias.clone()]
    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in leaves])


def test_top_k_shapes_and_frozen_weights():
    hidden, weight, _, targets, _ = inputs()
    h = hidden.view(1, N, D).clone().requires_grad_()
    out = token_logprobs(h, weight, targets.view(1, N), top_k=4, entropy=True, chunk_size=5)
    _, _, logp = plain(hidden, weight, None, targets, 1.0)
    values, ids = logp.topk(4)
    torch.testing.assert_close(out.top_logprobs, values.unsqueeze(0), rtol=0, atol=1e-12)
    assert torch.equal(out.top_ids, ids.unsqueeze(0))
    assert out.logprobs.shape == out.entropy.shape == (1, N)
    assert not out.top_logprobs.requires_grad
    out.logprobs.sum().backward()  # the head needs no gradient, as under LoRA
    assert h.grad.shape == h.shape
    assert weight.grad is None
    assert token_logprobs(hidden[:0], weight, targets[:0]).logprobs.shape == (0,)


def test_bfloat16_softmax_is_float32():
    hidden, weight, _, targets, _ = inputs(torch.bfloat16)
    out = token_logprobs(hidden, weight, targets).logprobs
    assert out.dtype == torch.float32
    logits = hidden @ weight.T
    torch.testing.assert_close(out, plain(logits.float(), torch.eye(V), None, targets, 1.0)[0], rtol=1e-5, atol=1e-5)


def test_equals_the_fused_head_of_trl():
    host = pytest.importorskip("trl.trainer.utils")  # what GRPOTrainer scores tokens with, always on since TRL 1.16
    if not hasattr(host, "_ChunkedLogProbFunction"):
        pytest.skip("this version of TRL has no fused head")
    hidden, weight, _, targets, (g, _) = inputs(torch.float32)
    results = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            logprobs = token_logprobs(h, w, targets, temperature=0.7).logprobs
        else:
            logprobs = host._ChunkedLogProbFunction.apply(
                h, w, None, targets, 0.7, host._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
            )[0]
        results.append([logprobs.detach(), *torch.autograd.grad((g.float() * logprobs).sum(), (h, w))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"targets": torch.zeros(N - 1, dtype=torch.int64)}, ValueError, "targets has shape"),
        ({"targets": torch.zeros(N)}, TypeError, "int64"),
        ({"weight": torch.zeros(V, D + 1)}, ValueError, "features"),
        ({"weight": torch.zeros(V, D, dtype=torch.bfloat16)}, TypeError, "one float dtype"),
        ({"bias": torch.zeros(V + 1)}, ValueError, "bias"),
        ({"temperature": 0.0}, ValueError, "temperature.*0.0"),
        ({"top_k": V + 1}, ValueError, "top_k"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
    ],
)
def test_bad_input_is_named(change, error, words):
    hidden, weight, _, targets, _ = inputs(torch.float32)
    with pytest.raises(error, match=words):
        token_logprobs(**{"hidden": hidden, "weight": weight, "targets": targets, **change})
