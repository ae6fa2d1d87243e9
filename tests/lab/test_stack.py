"""The stack of small models against transformers, run by run."""

import pytest
import torch

from bandpo.lab.comparison import decoding
from bandpo.lab.comparison import stack as module
from bandpo.lab.comparison.stack import Adam, Stack
from bandpo.toy.models import WarmUp, build_model, build_tokenizer

END, PAD = 1, 0


@pytest.fixture(scope="module")
def models():
    tokenizer = build_tokenizer()
    return [build_model(WarmUp(hidden_size=64, layers=2, seed=s), tokenizer).eval() for s in range(3)]


def hf_logprobs(model, prompts, completions):
    logits = model(torch.cat([prompts, completions], 1)).logits[:, prompts.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, completions.unsqueeze(-1)).squeeze(-1)


def batch(runs=3, prompts=5, width=4, repeats=3, new=6):
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, 90, (runs, prompts, width), generator=g), torch.rand(
        runs, prompts * repeats, new, generator=g
    )


def test_logprobs_and_gradients_are_those_of_transformers(models):
    stack = Stack.load(models)
    prompts, noise = batch()
    rollout = stack.sample(prompts, noise, end=END, pad=PAD, repeats=3)
    for w in stack.weights.values():
        w.requires_grad_()
    full = prompts.repeat_interleave(3, 1)
    ours = stack.logprobs(full, rollout.tokens) * rollout.mask
    gradients = dict(zip(stack.weights, torch.autograd.grad(ours.sum(), list(stack.weights.values())), strict=True))
    for run, model in enumerate(models):
        theirs = hf_logprobs(model, full[run], rollout.tokens[run]) * rollout.mask[run]
        torch.testing.assert_close(ours[run], theirs, rtol=0, atol=1e-5)
        model.zero_grad()
        theirs.sum().backward()
        for name, p in model.named_parameters():
            if "embed" in name:  # transformers gives the pad token's row no gradient, even where the token was drawn
                gradients[name][run, PAD] = 0
            scale = p.grad.abs().max().item()
            torch.testing.assert_close(gradients[name][run], p.grad, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_draws_from_the_policy_and_reports_its_logprobs(models, temperature):
    stack = Stack.load(models[:1])
    prompts = torch.randint(3, 90, (1, 1, 4), generator=torch.Generator().manual_seed(1))
    n = 40_000
    noise = torch.rand(1, n, 2, generator=torch.Generator().manual_seed(2))
    rollout = stack.sample(prompts, noise, end=END, pad=PAD, repeats=n, temperature=temperature)
    logits = models[0](prompts[0]).logits[0, -1] / temperature
    want = logits.softmax(-1)
    seen = torch.bincount(rollout.tokens[0, :, 0], minlength=len(want)) / n
    assert ((seen - want).abs() < 5 * (want * (1 - want) / n).sqrt() + 1e-6).all()
    again = stack.logprobs(prompts.expand(1, 64, 4), rollout.tokens[:, :64], temperature)
    mask = rollout.mask[:, :64]
    torch.testing.assert_close(again[mask], rollout.logprobs[:, :64][mask], rtol=0, atol=1e-5)


def test_completions_end_once_and_are_padded(models):
    stack = Stack.load(models)
    prompts, noise = batch(prompts=40)
    common = int(stack.sample(prompts, noise, end=-1, pad=PAD, repeats=3).tokens[..., 1].flatten().mode().values)
    tokens, logprobs, mask = stack.sample(prompts, noise, end=common, pad=PAD, repeats=3)
    for row, logp, valid in zip(tokens.flatten(0, 1), logprobs.flatten(0, 1), mask.flatten(0, 1), strict=True):
        n = int(valid.sum())
        assert valid[:n].all()
        assert (row[n:] == PAD).all() and (logp[n:] == 0).all()
        assert common not in row[: n - 1].tolist()
        assert n == 6 or row[n - 1] == common
    assert mask.flatten(0, 1).sum(1).unique().numel() > 1


def test_a_run_does_not_depend_on_its_neighbours(models):
    prompts, noise = batch()
    together = Stack.load(models).sample(prompts, noise, end=END, pad=PAD, repeats=3)
    for run, model in enumerate(models):
        alone = Stack.load([model]).sample(prompts[run : run + 1], noise[run : run + 1], end=END, pad=PAD, repeats=3)
        assert torch.equal(alone.tokens[0], together.tokens[run])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[run], rtol=0, atol=1e-5)


def test_weights_go_back_into_a_model(models):
    stack = Stack.load(models)
    target = build_model(WarmUp(hidden_size=64, layers=2, seed=9), build_tokenizer())
    stack.write(2, target)
    for a, b in zip(target.parameters(), models[2].parameters(), strict=True):
        assert torch.equal(a, b)


def test_adam_is_torch_s_with_a_rate_and_a_norm_for_each_run():
    g = torch.Generator().manual_seed(0)
    rates = [1e-2, 3e-3]
    weights = {"a": torch.randn(2, 4, 3, generator=g), "b": torch.randn(2, 5, generator=g)}
    theirs = [[torch.nn.Parameter(w[r].clone()) for w in weights.values()] for r in range(2)]
    optimizers = [torch.optim.Adam(p, lr=rate, betas=(0.9, 0.95)) for p, rate in zip(theirs, rates, strict=True)]
    ours = Adam(weights, torch.tensor(rates))
    for _ in range(20):
        gradients = [3 * torch.randn(w.shape, generator=g) for w in weights.values()]
        norms = ours.step(gradients)
        for r, (parameters, optimizer) in enumerate(zip(theirs, optimizers, strict=True)):
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient[r].clone()
            assert torch.nn.utils.clip_grad_norm_(parameters, 1.0).item() == pytest.approx(norms[r].item(), rel=1e-5)
            optimizer.step()
    for r in range(2):
        for w, p in zip(weights.values(), theirs[r], strict=True):
            torch.testing.assert_close(w[r], p.detach(), rtol=1e-5, atol=1e-6)


def test_a_run_that_exploded_stands_still_and_spares_the_others():
    weights = {"a": torch.ones(2, 3)}
    ours = Adam(weights, torch.full((2,), 0.1))
    ours.step([torch.tensor([[1.0, 1.0, 1.0], [float("nan"), 1.0, 1.0]])])
    assert (weights["a"][0] < 1).all() and (weights["a"][1] == 1).all()


def gradients_by_part(stack, prompts, completions):
    found = []
    for which in stack.parts(prompts.shape[1] * (prompts.shape[-1] + completions.shape[-1])):
        part = stack.part(which)
        total = part.logprobs(prompts[which], completions[which], 0.7).sum()
        found.append(torch.autograd.grad(total, list(part.weights.values())))
    return len(found), [torch.cat(g) for g in zip(*found, strict=True)]


def test_parts_of_a_stack_change_no_bit(models, monkeypatch):
    """With 32 sequences a run; elsewhere the last elements of a tensor, which no vector holds, may differ in the last bit."""
    prompts, noise = batch(prompts=8, repeats=4)
    sizes, seen = [], []
    for elements in (1, 64 * 32 * 2, 1 << 30):  # one run, two runs, all of them
        monkeypatch.setattr(module, "_PART", elements)
        stack = Stack.load(models)
        sizes.append([part.stop - part.start for part in stack.parts(32)])
        rollout = stack.sample(prompts, noise, end=END, pad=PAD, repeats=4)
        for w in stack.weights.values():
            w.requires_grad_()
        full = prompts.repeat_interleave(4, 1)
        whole = torch.autograd.grad(stack.logprobs(full, rollout.tokens, 0.7).sum(), list(stack.weights.values()))
        seen.append([*rollout, *whole])
        count, parts = gradients_by_part(stack, full, rollout.tokens)
        assert count == (1 if elements == 1 << 30 else 3)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert sizes == [[1, 1, 1], [2, 1], [3]]
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("repeats", [1, 3])
def test_both_layouts_of_the_cache_are_plain_attention(repeats, monkeypatch):
    """The short one bit for bit as one writes it down, time first; the evidence rests on these numbers."""
    g = torch.Generator().manual_seed(0)
    runs, prompts, heads, start, size, new = 2, 3, 4, 5, 8, 4
    k, v = (torch.randn(runs * prompts, heads, start, size, generator=g) for _ in range(2))
    made = []
    for long in (False, True):
        monkeypatch.setattr(decoding, "LONG", start + new + (not long))
        made.append(decoding.Cache(k, v, (runs, prompts), repeats, new))
        assert made[-1].long is long
    keys, values = (x.repeat_interleave(repeats, 0) for x in (k, v))
    for at in range(start, start + new):
        q, one_k, one_v = (torch.randn(runs * prompts * repeats, heads, 1, size, generator=g) for _ in range(3))
        keys, values = torch.cat([keys, one_k], 2), torch.cat([values, one_v], 2)
        by_time = [x.permute(2, 0, 1, 3).contiguous() for x in (keys, values)]
        weight = torch.linalg.vecdot(by_time[0], q.squeeze(2) / size**0.5).softmax(0)
        plain = (weight.unsqueeze(-1) * by_time[1]).sum(0).unsqueeze(2)
        short, long = (cache.attend(at, q, one_k, one_v) for cache in made)
        assert torch.equal(short, plain)
        torch.testing.assert_close(long, plain, rtol=0, atol=1e-6)


def test_long_completions_have_the_log_probs_of_transformers(models):
    prompts, noise = batch(new=70)
    stack = Stack.load(models)
    rollout = stack.sample(prompts, noise, end=-1, pad=PAD, repeats=3)
    full = prompts.repeat_interleave(3, 1)
    for run, model in enumerate(models):
        theirs = hf_logprobs(model, full[run], rollout.tokens[run])
        torch.testing.assert_close(rollout.logprobs[run], theirs.detach(), rtol=0, atol=2e-5)


def test_the_rotary_embedding_is_the_usual_formula_bit_for_bit(models):
    stack = Stack.load(models)
    x = torch.randn(3, 5, 6, 64, generator=torch.Generator().manual_seed(0))
    positions, size = torch.arange(2, 8), 16
    angle = positions.unsqueeze(-1) * stack.shape.theta ** (-torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([y, y], -1) for y in (angle.cos(), angle.sin()))
    joined = stack._joined()
    found = stack._project(0, x, module._turn(stack._speed(x.device), positions, x.dtype), joined)
    mixed = module._product(stack._norm("model.layers.0.input_layernorm.weight", x), joined[0].attention)
    plain = [y.reshape(15, 6, 4, size).transpose(1, 2) for y in mixed.chunk(3, -1)]
    for ours, y in zip(found[:2], plain, strict=False):
        half = torch.cat([-y[..., size // 2 :], y[..., : size // 2]], -1)
        assert torch.equal(ours, y * cos + half * sin)
    assert torch.equal(found[2], plain[2])
