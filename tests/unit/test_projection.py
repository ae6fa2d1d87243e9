"""The projection onto a KL ball against constrained optimisation, the intervals of `Band`, and finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import softmax

from bandpo import KL, OBJECTIVES, REVERSE_KL, Band, Clip, Objective, policy_loss, token_objective
from bandpo.bounds.regions import TopK, topk_divergence, with_rest
from bandpo.losses import compiled
from bandpo.projection import project, projection, sparse_support
from bandpo.surrogates import Projected, mask

DIRECTIONS = ["reverse", "forward"]
EDGE = {"reverse": REVERSE_KL, "forward": KL}


def pair(seed=0, rows=50, n=8, scale=2.0, drift=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    old = (scale * torch.randn(rows, n, generator=g, dtype=torch.float64)).log_softmax(-1)
    new = (old + drift * torch.randn(rows, n, generator=g, dtype=torch.float64)).log_softmax(-1)
    return new.to(dtype), old.to(dtype)


def divergence(q, old, direction):
    """In float64 of the normalised distributions; without cancellation, as `Σ b h(log a/b)`."""
    a, b = (x.detach().double() - x.detach().double().logsumexp(-1, keepdim=True) for x in (q, old))
    if direction == "forward":
        a, b = b, a
    x = torch.where(a > -math.inf, a - b, -800.0)
    h = torch.where(x.abs() < 1e-2, x * x * (1 / 2 + x * (1 / 3 + x * (1 / 8 + x * (1 / 30 + x / 144)))), 0.0)
    return (b.exp() * torch.where(x.abs() < 1e-2, h, x * x.exp() - x.expm1())).sum(-1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_feasible_distribution_is_closer(direction):
    """SLSQP over the simplex knows the definition alone: its optimum is ours."""
    new, old = pair(rows=12, n=5)
    q = project(new, old, 0.05, direction=direction).exp().numpy()
    seen = 0
    for i in range(len(q)):
        p, u = old[i].exp().numpy(), new[i].exp().numpy()

        def kl(a, b):
            return float(np.sum(a * np.log(a / b)))

        reverse = direction == "reverse"
        target = (lambda x, u=u: kl(x, u)) if reverse else (lambda x, u=u: kl(u, x))
        room = (lambda x, p=p: 0.05 - kl(x, p)) if reverse else (lambda x, p=p: 0.05 - kl(p, x))
        best = minimize(  # over logits
            lambda z, f=target: f(softmax(z)), np.log(p), method="SLSQP", options={"ftol": 1e-13, "maxiter": 500},
            constraints=[{"type": "ineq", "fun": lambda z, f=room: f(softmax(z))}],
        )  # fmt: skip
        found = softmax(best.x)
        assert room(found) > -1e-6 and room(q[i]) > -1e-12
        # its gradients are differences, 1e-8 off, and the optimum is flat: distances of √1e-7
        assert abs(target(q[i]) - best.fun) < 1e-6
        np.testing.assert_allclose(q[i], found, atol=1e-3)
        seen += room(u) < 0
    assert seen >= 6


@pytest.mark.parametrize("radius", [1e-6, 1e-3, 0.05, 0.5])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_outcomes_stop_at_the_edge_of_the_band(direction, radius):
    p = torch.linspace(-9, 9, 60, dtype=torch.float64).sigmoid()
    old = torch.stack([p.log(), (-p).log1p()], -1)
    lower, upper = Band(EDGE[direction], radius, max_ratio=None)(old[:, 0])
    for r, edge in ((1e3, upper), (1e-3, lower)):
        odds = p / (1 - p) * r
        new = torch.stack([(odds / (1 + odds)).log(), -odds.log1p()], -1)
        q = project(new, old, radius, direction=direction)[:, 0].exp()
        held = new[:, 0].exp().minimum(p * upper) if r > 1 else new[:, 0].exp().maximum(p * lower)
        # the ball's room for rounding (1e-12 of the radius), and the band's own 1e-12 of log r
        torch.testing.assert_close(q, held, rtol=1e-9, atol=0)
        assert (new[:, 0].exp() * (1 if r > 1 else -1) > p * edge * (1 if r > 1 else -1)).double().mean() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("radius", [1e-8, 1e-4, 0.05, 1.0, 20.0])
def test_nothing_is_outside_afterwards_and_what_was_inside_is_untouched(radius, direction, dtype):
    moved = 0
    for n in (2, 3, 20, 300):
        for scale in (0.1, 3.0, 30.0, 200.0):
            for drift in (1e-3, 0.1, 1.0, 10.0, 300.0):
                new, old = pair(n, rows=40, n=n, scale=scale, drift=drift, dtype=dtype)
                q = project(new, old, radius, direction=direction)
                assert q.dtype == dtype and not q.isnan().any()
                before, after = divergence(new, old, direction), divergence(q, old, direction)
                out = projection(new, old, radius, direction).outside
                assert torch.equal(q[~out], new[~out])
                assert (after[out] <= radius * (1 + 1e-12)).all()
                certain = (before / radius).log().abs() > 1e-6
                assert torch.equal((before > radius)[certain], out[certain])
                # and not far inside: the room for rounding, u·Σ|q (x - kl) log q|, which n, the scale and √ε bound
                slack = 1e-10 if dtype == torch.float64 else 2e-4 + 3e-6 / math.sqrt(radius)
                assert (after[out] >= radius * (1 - slack)).all()
                moved += int(out.sum())
    assert moved > 100


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("radius", [1e-4, 0.05, 0.3])
def test_the_gradient_is_that_of_finite_differences(direction, radius):
    new, old = pair(3, rows=6, n=7)
    new.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: project(x, old, radius, direction=direction), (new,))
    # on both sides of the surface: scale the step away from the old policy
    if radius == 0.05:
        for around in (0.999, 1.001):
            edge = project(new, old, radius, direction=direction).detach()
            near = (old + around * (edge - old)).log_softmax(-1).requires_grad_()
            out = projection(near, old, radius, direction).outside
            if around > 1 and direction == "reverse":
                assert out.any()
            assert torch.autograd.gradcheck(
                lambda x: project(x, old, radius, direction=direction), (near,), eps=1e-8, atol=1e-4
            )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_impossible_outcomes(direction):
    new = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.5, 0.5], [0.4, 0.0, 0.6], [0.3, 0.3, 0.4]], dtype=torch.float64)
    old = torch.tensor([[0.6, 0.4, 0.0], [0.4, 0.3, 0.3], [0.4, 0.0, 0.6], [0.0, 0.0, 1.0]], dtype=torch.float64)
    x = new.log().requires_grad_()
    q = project(x, old.log(), 0.05, direction=direction)
    assert not q.isnan().any()
    torch.testing.assert_close(q.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    if direction == "reverse":
        assert (q.exp()[old == 0] == 0).all()
        torch.testing.assert_close(q[0].exp(), torch.tensor([0.5, 0.3, 0.0]).double() / 0.8)  # the limit: KL .0016
    assert torch.equal(q[2], x[2])
    (gradient,) = torch.autograd.grad(q.exp().square().sum(), x)
    assert gradient.isfinite().all()
    if direction == "reverse":  # of Σ q² with q renormalised over the two that are possible
        torch.testing.assert_close(gradient[0], torch.tensor([1.0, -1.0, 0.0]).double() * 2 * 0.625 * 0.375 * 0.25)
    assert (divergence(q, old.log(), direction)[1] <= 0.05).all()


def test_a_radius_of_each_position_and_refusals():
    new, old = pair(rows=4, drift=3.0)
    radii = torch.tensor([1e-3, 0.05, 0.2, 1e9])
    q = project(new, old, radii)
    for i in range(4):
        torch.testing.assert_close(q[i], project(new[i], old[i], radii[i].double()), rtol=1e-12, atol=0)
    assert torch.equal(q[3], new[3])
    assert project(new, old, torch.tensor(-1.0)).isnan().all()
    assert project(new.bfloat16(), old.bfloat16(), 0.05).dtype == torch.float32
    for wrong, error, words in (
        ({"radius": 0.0}, ValueError, "radius"), ({"radius": (0.1, 0.2)}, TypeError, "both sides"),
        ({"direction": "up"}, ValueError, "choose one of reverse, forward"), ({"old_logprobs": old[:2]}, ValueError, "same n"),
        ({"logprobs": new.long()}, TypeError, "float dtype"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            project(**{"logprobs": new, "old_logprobs": old, "radius": 0.05} | wrong)


def peaked(seed, tokens=400, vocabulary=2000, drift=0.7):
    """Distributions of which a few tokens hold nearly everything, as of a language model."""
    g = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, vocabulary + 1, dtype=torch.float64).log()
    steep = 2 + 2 * torch.rand(tokens, 1, generator=g, dtype=torch.float64)
    old = (-steep * rank).log_softmax(-1)
    return (old + drift * torch.randn(tokens, vocabulary, generator=g, dtype=torch.float64)).log_softmax(-1), old


@pytest.mark.parametrize("k", [5, 20])
def test_a_few_tokens_project_as_the_whole_distribution_does(k):
    new, old = peaked(0)
    sampled = torch.multinomial(old.exp(), 1, generator=torch.Generator().manual_seed(1))
    found = sparse_support(new.unsqueeze(0), old.unsqueeze(0), sampled.view(1, -1), k)
    coarse = [
        with_rest(found[a], found["extras"][b], found["extras"]["sampled_in_topk"], rounding=1e-16)[0]
        for a, b in (("logprobs", "topk_logprobs"), ("old_logprobs", "old_topk_logprobs"))
    ]
    few = project(*coarse, 0.05)
    # Rest that is scaled as a whole, with the old policy's proportions: the whole policy has the divergence of the coarse one.
    kept = torch.zeros_like(old, dtype=torch.bool).scatter(-1, old.topk(k).indices, True).scatter(-1, sampled, True)
    rest = torch.where(kept, -math.inf, old).log_softmax(-1)
    whole = torch.where(kept, -math.inf, few[:, -1:] + rest)
    whole = whole.scatter(-1, old.topk(k).indices, few[:, :k])
    own = torch.where(found["extras"]["sampled_in_topk"][0].unsqueeze(-1), whole.gather(-1, sampled), few[:, k : k + 1])
    whole = whole.scatter(-1, sampled, own)
    torch.testing.assert_close(whole.logsumexp(-1), torch.zeros(400).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        divergence(whole, old, "reverse"), divergence(*[few, coarse[1]], "reverse"), rtol=1e-8, atol=1e-12
    )
    full = project(new, old, 0.05)
    assert (divergence(coarse[0], coarse[1], "reverse") <= divergence(new, old, "reverse") * (1 + 1e-9)).all()
    mass = 1 - coarse[1][:, :-1].exp().sum(-1)
    gap = 0.5 * (torch.where(kept, full.exp() - whole.exp(), 0.0)).abs().sum(-1)
    # The kept tokens differ by what the others can do, their mass and √(mass · ε)-like shifts.
    assert (gap <= 3 * mass.sqrt()).all()
    assert gap.mean() < {5: 2e-2, 20: 5e-3}[k]


def test_the_whole_vocabulary_and_both_top_sets():
    new, old = (x.unsqueeze(0) for x in pair(rows=30, n=12, drift=1.5))
    sampled = torch.multinomial(old[0].exp(), 1, generator=torch.Generator().manual_seed(1)).view(1, -1)
    leaf = new.clone().requires_grad_()
    a = torch.randn(1, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for k, either in ((99, False), (12, True)):
        inputs = sparse_support(leaf, old, sampled, k, either=either)
        loss, _ = policy_loss(**inputs, advantages=a, mask=torch.ones(1, 30), objective="troll")
        (gradient,) = torch.autograd.grad(loss, leaf)
        whole = leaf.log_softmax(-1)
        q = project(whole, old, 0.05)
        r = (q - old).gather(-1, sampled.unsqueeze(-1)).squeeze(-1).exp()
        pull = (whole.exp() * (whole - q.detach())).sum(-1)
        want = -(r * a - pull).mean()
        (by_hand,) = torch.autograd.grad(want, leaf)
        torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient, by_hand, rtol=1e-7, atol=1e-12)
    few = sparse_support(leaf, old, sampled, 4, either=True)["extras"]
    for name in ("topk_logprobs", "old_topk_logprobs"):
        assert few[name].shape == (1, 30, 8) and (few[name].exp().sum(-1) <= 1 + 1e-12).all()
    with pytest.raises(ValueError, match="batch, time, vocabulary"):
        sparse_support(new[0], old[0], sampled)


def test_the_gradient_of_the_objective_is_that_of_finite_differences():
    """The whole chain from logits, but for the regression, whose target is a constant of the update."""
    new, old = (x.unsqueeze(0) for x in pair(5, rows=5, n=9))
    sampled = torch.tensor([[0, 8, 3, 4, 2]])
    for direction in DIRECTIONS:
        objective = Objective(bounds=Clip(1.0, math.inf), surrogate=Projected(0.05, 3, direction, weight=0.0))

        def loss(x, objective=objective):
            return policy_loss(
                **sparse_support(x, old, sampled, 3),
                advantages=torch.tensor([0.7]),
                mask=torch.ones(1, 5),
                objective=objective,
            )[0]

        assert torch.autograd.gradcheck(loss, (new.clone().requires_grad_(),))


def test_the_regression_pulls_towards_the_projection_where_the_advantage_is_zero():
    new, old = (x.unsqueeze(0) for x in pair(5, rows=40, n=9, drift=2.0))
    sampled = torch.multinomial(old[0].exp(), 1, generator=torch.Generator().manual_seed(1)).view(1, -1)
    x = new.clone().requires_grad_()
    loss, _ = policy_loss(
        **sparse_support(x, old, sampled, 9), advantages=torch.zeros(1), mask=torch.ones(1, 40), objective="troll"
    )
    (gradient,) = torch.autograd.grad(loss, x)
    out = projection(new, old, 0.05, "reverse").outside
    assert out.any() and (gradient[~out] == 0).all()
    nearer = (new - 10 * gradient).log_softmax(-1)
    assert (divergence(nearer, old, "reverse")[out] < divergence(new, old, "reverse")[out]).all()
    assert "without_advantage" in OBJECTIVES["troll"].traits


def test_nan_in_masked_or_left_out_positions_reaches_nothing():
    new, old = (x.unsqueeze(0) for x in pair(5, rows=6, n=9, drift=2.0))
    inputs = sparse_support(new.requires_grad_(), old, torch.zeros(1, 6, dtype=torch.long), 4)
    keep = torch.tensor([[1, 0, 1, 1, 1, 1]])
    top = inputs["extras"]["topk_logprobs"].detach().clone()
    top[0, 1] = math.nan
    top[0, 3, 2] = math.nan
    top.requires_grad_()
    extras = {**inputs["extras"], "topk_logprobs": top}
    loss, metrics = policy_loss(**{**inputs, "extras": extras}, advantages=torch.ones(1), mask=keep, objective="troll")
    loss.backward()
    assert loss.isfinite() and top.grad.isfinite().all() and (top.grad[0, [1, 3]] == 0).all()
    assert metrics["nonfinite_fraction"].item() == pytest.approx(1 / 5)


def test_projection_top_k_and_radius_of_an_objective():
    troll = OBJECTIVES["troll"]
    assert (troll.top_k, troll.projection, troll.radius) == (64, Projected(0.05, 64), 0.05)
    assert troll.with_radius(0.1).surrogate == Projected(0.1, 64)
    assert OBJECTIVES["dppo-topk-kl"].top_k == 20 and OBJECTIVES["bandpo-kl"].radius == 0.05
    assert OBJECTIVES["grpo"].top_k is None and OBJECTIVES["grpo"].radius is None
    with pytest.raises(TypeError, match="one radius for both sides"):
        troll.with_radius((0.1, 0.2))
    with pytest.raises(ValueError, match="different numbers of tokens"):
        Objective(bounds=TopK(KL, 0.05, k=20), surrogate=both(Projected(k=64)))
    with pytest.raises(ValueError, match="use ratio_level='token'"):
        Objective(bounds=Clip(), surrogate=Projected(), ratio_level="sequence")
    for wrong, error, words in (
        ({"k": 0}, ValueError, "k must be"), ({"weight": -1.0}, ValueError, "weight"), ({"direction": "x"}, ValueError, "x"),
        ({"weight": "1"}, TypeError, "weight"), ({"radius": -1.0}, ValueError, "radius"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            Projected(**wrong)
    with pytest.raises(ValueError, match="takes the extras"):
        policy_loss(
            logprobs=torch.zeros(1, 1), old_logprobs=torch.zeros(1, 1), advantages=torch.ones(1), mask=torch.ones(1, 1),
            objective="troll",
        )  # fmt: skip


def both(surrogate):
    """A projection that takes a bool tensor for its bounds."""
    type_ = type("Both", (Projected,), {"traits": (*Projected.traits, "membership"), "__hash__": Projected.__hash__})
    return type_(surrogate.radius, surrogate.k)


def test_two_outcomes_without_regression_are_stopped_outside():
    p, r = torch.full((1, 4), 0.5), torch.tensor([[0.6, 0.9, 1.1, 1.6]])
    none = torch.zeros(1, 4, 0)
    extras = {"topk_logprobs": none, "old_topk_logprobs": none, "sampled_in_topk": torch.zeros(1, 4, dtype=torch.bool)}
    for direction in DIRECTIONS:
        x = (p * r).log().requires_grad_()
        terms = token_objective(
            Objective(bounds=Clip(1.0, math.inf), surrogate=Projected(direction=direction, weight=0.0)),
            logprobs=x, old_logprobs=p.log(), advantages=torch.ones(1), mask=torch.ones(1, 4), extras=extras,
        )  # fmt: skip
        assert terms.stopped.tolist() == [[True, False, False, True]]
        (gradient,) = torch.autograd.grad(terms.value.sum(), x)
        torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.9, 1.1, 0.0]]), rtol=1e-6, atol=1e-6)


def test_topk_divergence_is_that_of_the_projection():
    new, old = (x.unsqueeze(0) for x in pair(rows=30, n=12, drift=1.0))
    inputs = sparse_support(new, old, torch.zeros(1, 30, dtype=torch.long), 4)
    given = {name: inputs[name] for name in ("logprobs", "old_logprobs")} | inputs["extras"]
    far = topk_divergence(REVERSE_KL, **given) > 0.05
    objective = Objective(bounds=TopK(REVERSE_KL, 0.05, k=4), surrogate=mask)
    support = [
        with_rest(given[a], given[b], given["sampled_in_topk"], rounding=1e-16)
        for a, b in (("logprobs", "topk_logprobs"), ("old_logprobs", "old_topk_logprobs"))
    ]
    assert torch.equal(projection(*support, 0.05, "reverse").outside, far)
    assert objective.top_k == 4


def test_metrics_are_those_of_the_projection():
    new, old = (x.unsqueeze(0) for x in pair(rows=40, n=12, drift=1.0))
    inputs = sparse_support(new, old, torch.zeros(1, 40, dtype=torch.long), 12)
    _, metrics = policy_loss(**inputs, advantages=torch.ones(1), mask=torch.ones(1, 40), objective="troll")
    q, out = project(new, old, 0.05), projection(new, old, 0.05, "reverse").outside
    assert 0.1 < metrics["projection/fraction"].item() == pytest.approx(out.double().mean().item(), abs=1e-6)
    assert metrics["projection/kl_mean"].item() == pytest.approx(divergence(q, old, "reverse").mean().item(), rel=1e-9)


@pytest.mark.slow
def test_compiled_it_is_the_same_at_every_radius_and_weight():
    """With a constant radius PyTorch's cache on disk gave the second graph the code of the first."""
    new, old = (x.unsqueeze(0) for x in pair(rows=6, n=9, drift=2.0))
    sampled = torch.zeros(1, 6, dtype=torch.long)
    for fast in (compiled(), compiled()):
        for surrogate in (
            Projected(0.05),
            Projected(0.1),
            Projected(0.1, weight=0.5),
            Projected(0.1, direction="forward"),
        ):
            objective = Objective(bounds=Clip(1.0, math.inf), surrogate=surrogate)
            found = []
            for loss in (fast, policy_loss):
                inputs = sparse_support(new, old, sampled, 4)
                x = inputs["extras"]["topk_logprobs"].requires_grad_()
                value, metrics = loss(**inputs, advantages=torch.ones(1), mask=torch.ones(1, 6), objective=objective)
                found.append((value, torch.autograd.grad(value, x)[0], metrics["projection/kl_mean"]))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
