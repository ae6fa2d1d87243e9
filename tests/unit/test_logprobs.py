"""token_logprobs against torch's log_softmax with autograd, and against TRL's own fused head."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bandpo import logprobs as room
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


@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("memory", "block"), [(0, 4), (0, 4096), (5 * V * 8, 4), (float("inf"), 4096), (None, 4096)])
def test_values_and_gradients_are_those_of_log_softmax(
    chunk_size, temperature, entropy, with_bias, memory, block, monkeypatch
):
    monkeypatch.setattr(room, "_TOKENS_AT_A_TIME", block)
    monkeypatch.setattr(room, "_LOGITS_IN_CACHE", 3 * V)
    hidden, weight, bias, targets, (g, g_h) = inputs()
    g[::3] = 0  # tokens without a gradient are skipped
    g_h[::6] = 0
    results = []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        h, w, b = leaves[0], leaves[1], leaves[2] if with_bias else None
        if ours:
            logprobs, entropies, _, _ = token_logprobs(
                h, w, targets, bias=b, temperature=temperature, entropy=entropy, chunk_size=chunk_size, memory=memory
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


@pytest.mark.parametrize("memory", [0, 3 * V * 8, float("inf")])
def test_gradcheck(memory):
    hidden, weight, bias, targets, _ = inputs()

    def f(h, w, b):
        out = token_logprobs(h, w, targets[:5], bias=b, temperature=0.8, entropy=True, chunk_size=2, memory=memory)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [0, 7 * V * 2, float("inf"), None])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("block", [9, 4096])
def test_narrow_gradients_are_as_near_the_truth_as_those_of_plain_torch(dtype, memory, frozen, block, monkeypatch):
    monkeypatch.setattr(room, "_TOKENS_AT_A_TIME", block)
    hidden, weight, bias, targets, (g, _) = inputs(dtype)
    gradients = {}
    for kind in ("truth", "plain", "ours"):
        leaves = [x.double() if kind == "truth" else x.clone() for x in (hidden, weight, bias)]
        used = [x.requires_grad_() for x in leaves[: 1 if frozen else 3]]
        if kind == "ours":
            found = token_logprobs(*leaves[:2], targets, bias=leaves[2], chunk_size=6, memory=memory).logprobs
        else:
            logits = torch.nn.functional.linear(*leaves)
            logp = (logits if kind == "truth" else logits.float()).log_softmax(-1)
            found = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        gradients[kind] = [x.double() for x in torch.autograd.grad((g.to(found.dtype) * found).sum(), used)]
    for truth, plain, ours in zip(*gradients.values(), strict=True):
        assert (ours - truth).norm() <= max(1.2 * (plain - truth).norm(), 1e-6 * truth.norm())


class Kernels(TorchDispatchMode):
    """Multiplications of the matrix products, and the largest tensor that a kernel made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() > self.largest:
            self.largest = out.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("chunk_size", [4, 7])
@pytest.mark.parametrize(
    ("memory", "frozen", "entropy", "products"),
    [(0, False, False, 4), (float("inf"), False, False, 3), (None, False, False, None), (0, True, False, 2),
     (float("inf"), True, False, 2), (0, True, True, 3)],
)  # fmt: skip
def test_products_and_the_largest_tensor(memory, frozen, entropy, products, chunk_size):
    hidden, weight, _, targets, (g, _) = inputs()
    hidden.requires_grad_(), weight.requires_grad_(not frozen)
    with Kernels() as seen:
        out = token_logprobs(hidden, weight, targets, entropy=entropy, chunk_size=chunk_size, memory=memory)
        (g * out.logprobs).sum().backward()
    products = 4 - chunk_size / N if products is None else products  # the logits of one chunk are kept
    assert seen.products == round(products * N * V * D)
    if not memory:
        assert seen.largest <= 8 * max(chunk_size * V, V * D, N * D)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 3.5, 10, 1000])
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_saved_respects_the_memory(tokens, dtype, grad):
    hidden, weight, bias, targets, _ = inputs(dtype)
    hidden, weight = hidden.requires_grad_(grad), weight.requires_grad_(grad)
    saved = dict[int, torch.Tensor]()

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    memory = tokens * V * dtype.itemsize
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_logprobs(hidden, weight, targets, bias=bias, chunk_size=4, memory=memory)
    given = {x.untyped_storage().data_ptr() for x in (hidden, weight, bias, targets)}
    new = [x.untyped_storage().nbytes() for address, x in saved.items() if address not in given]
    of_tokens = 3 * N * (8 if dtype == torch.float64 else 4)  # log-prob, entropy and log-sum, one storage
    assert sum(new) == (min(N, int(tokens)) * V * dtype.itemsize + of_tokens if grad else 0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("memory", [0, 9 * V * 8, float("inf")])
def test_a_graph_is_used_twice_and_has_no_second_derivative(memory, frozen):
    hidden, weight, _, targets, (g, _) = inputs()
    used = [hidden.requires_grad_()] if frozen else [hidden.requires_grad_(), weight.requires_grad_()]
    loss = (g * token_logprobs(hidden, weight, targets, chunk_size=5, memory=memory).logprobs).sum()
    first = torch.autograd.grad(loss, used, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, used, create_graph=True), strict=True):
        assert torch.equal(a, b)
    again = torch.autograd.grad(loss * loss, used, create_graph=True)  # with a gradient that has a graph of its own
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again[0].sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("memory", [0, 9 * V * 8, float("inf")])
def test_dead_tokens_add_nothing_also_where_their_state_is_nan(memory, frozen):
    hidden, weight, bias, targets, (g, g_h) = inputs()
    dead = torch.zeros(N, dtype=torch.bool)
    dead[[0, 3, 4, 5, 11, N - 1]] = True
    want = [hidden[~dead].clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
    broken = hidden.clone().masked_fill_(dead.unsqueeze(-1), torch.nan).requires_grad_()
    got = [broken, weight.clone().requires_grad_(not frozen)]
    out = token_logprobs(*got, targets, bias=bias, entropy=not frozen, chunk_size=5, memory=memory)
    chosen, entropies, _ = plain(*want, bias, targets[~dead], 1.0)
    (torch.where(dead, 0, g) * out.logprobs)[~dead].sum().backward(retain_graph=True)
    (g[~dead] * chosen).sum().backward(retain_graph=True)
    if not frozen:
        (g_h * out.entropy)[~dead].sum().backward()
        (g_h[~dead] * entropies).sum().backward()
        torch.testing.assert_close(got[1].grad, want[1].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(broken.grad[~dead], want[0].grad, rtol=1e-12, atol=1e-12)
    assert (broken.grad[dead] == 0).all()


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("memory", [0, V * 8, float("inf"), None])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_token_and_one(n, memory, frozen, dtype):
    hidden, weight, _, targets, _ = inputs(dtype)
    h, w = hidden[:n].clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    out = token_logprobs(h, w, targets[:n], top_k=2, memory=memory)
    assert out.top_ids.shape == (n, 2)
    for factor in (0.0, 1.0):  # all tokens dead, and all alive
        h.grad = w.grad = None
        (factor * out.logprobs).sum().backward(retain_graph=True)
        assert h.grad.isfinite().all()
        assert frozen or w.grad.isfinite().all()
        assert bool(h.grad.any()) == bool(n and factor)


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
        ({"memory": -1}, ValueError, "memory.*-1"),
        ({"memory": float("nan")}, ValueError, "memory.*nan"),
    ],
)
def test_bad_input_is_named(change, error, words):
    hidden, weight, _, targets, _ = inputs(torch.float32)
    with pytest.raises(error, match=words):
        token_logprobs(**{"hidden": hidden, "weight": weight, "targets": targets, **change})
