"""Masks by bits, and surrogates by hand, against the plain forms; what a call of the loss costs in operations and memory."""

import gc
import math
import weakref
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from bandpo import OBJECTIVES, Objective, RatioBounds, policy_loss, token_objective
from bandpo._eager import Fill
from bandpo.bounds import Clip
from bandpo.surrogates import clip, dual_clip, two_sided
from bandpo.surrogates.stops import stop_rule_of
from bandpo.surrogates.token import mask as clip_by_mask

VIEWS = {"view", "expand", "unsqueeze", "squeeze", "detach", "alias", "select", "t", "slice", "unbind"}


class Count(TorchDispatchMode):
    """Operations that reach the kernels, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def batch(rows=6, width=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, width, generator=g)
    new = (old + 0.4 * torch.randn(rows, width, generator=g)).requires_grad_()
    mask = torch.rand(rows, width, generator=g) < 0.8
    return {"logprobs": new, "old_logprobs": old, "advantages": torch.randn(rows, generator=g), "mask": mask}


def operations(objective, **kwargs):
    policy_loss(**batch(), objective=objective)  # which builds the table
    data = batch()
    with Count() as count:
        policy_loss(**data, objective=objective, **kwargs)[0].backward()
    return count.names


def test_a_call_of_the_loss_is_few_operations():
    """TRL's formula with its clip metrics has 57 by this count; every operation is a launch on a GPU."""
    basic = operations("grpo")
    assert len(basic) <= 80, basic
    assert not {"where", "masked_fill", "masked_fill_"} & set(basic), "the slow way to choose, on a CPU"
    assert len(operations("bandpo-kl")) <= 110, "its two edges are looked up in a table"
    assert len(operations("grpo", metrics="none")) <= 60
    assert len(operations("grpo", metrics="full")) > len(basic) + 50


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "dual-clip", "bandpo-kl", "tis", "gmpo", "kl-cov"])
def test_the_level_of_detail_changes_no_number(name):
    data = batch()
    if OBJECTIVES[name].correction is not None:
        data["rollout_logprobs"] = data["old_logprobs"] + 0.1
    found = {d: policy_loss(**data, objective=name, metrics=d) for d in ("none", "basic", "full")}
    losses = [loss for loss, _ in found.values()]
    assert losses[0] == losses[1] == losses[2]
    assert set(found["none"][1]) == {"loss/policy"}
    basic, full = found["basic"][1], found["full"][1]
    assert set(basic) < set(full) and {"clip_fraction/any", "ratio/mean", "kl/old_new"} < set(basic)
    for key, value in basic.items():
        torch.testing.assert_close(value, full[key], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"got 'all'; choose one of none, basic, full"):
        policy_loss(**data, objective=name, metrics="all")


EDGES = {
    "fixed": (0.8, 1.2),
    "free": (0.0, math.inf),
    "narrow": (1.0, 1.0),
}


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("column", [True, False], ids=["column", "per token"])
@pytest.mark.parametrize(
    "surrogate",
    [
        clip,
        dual_clip,
        partial(dual_clip, c=1.5),
        partial(dual_clip, c=math.inf),
        two_sided,
        clip_by_mask,
        partial(clip_by_mask, truncate=1.1),
    ],
    ids=["clip", "dual_clip", "dual_clip c=1.5", "dual_clip c=inf", "two_sided", "mask", "mask truncated"],
)
def test_by_hand_is_the_formula_and_its_gradient(surrogate, column, edges):
    """The formula in float64 with automatic differentiation; the ratios 0.8 and 1.2 themselves, and those held at e^40."""
    g = torch.Generator().manual_seed(1)
    ratio = torch.cat(
        [torch.rand(200, 4, generator=g).double() * 2 + 0.01, torch.tensor([[0.8, 1.2, 1.0, 1.5]]).double()]
    )
    x = torch.cat([ratio.log(), torch.tensor([[40.0, -40.0, 39.0, -39.0]]).double()]).requires_grad_()
    a = torch.randn(len(x), 1 if column else 4, generator=g).double()
    a[::7] = 0.0
    lower, upper = (torch.full_like(x.detach(), edge) for edge in EDGES[edges])
    bounds = RatioBounds(lower, upper)
    mark, _ = stop_rule_of(surrogate)
    fixed = surrogate.keywords if isinstance(surrogate, partial) else {}
    r = x.detach().exp()
    found = mark.slopes(r, a, bounds, **fixed)
    value = surrogate(x, a, bounds)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    near = (
        torch.stack([(r - edge).abs() for edge in (lower, upper, torch.full_like(r, 1.5))]).amin(0) < 1e-12
    )  # at an edge itself automatic differentiation halves
    inner = (x.detach().abs() < 40) & ~near
    torch.testing.assert_close(found.value, value.detach(), rtol=1e-15, atol=0)
    torch.testing.assert_close((a * found.slope * found.inside)[inner], gradient[inner], rtol=1e-14, atol=0)
    rule = mark.rule(x.detach(), a, bounds, **{k: v for k, v in fixed.items() if k in mark.keywords})
    assert torch.equal(found.stopped, rule & (a != 0))
    assert torch.equal((found.inside == 0) & (a != 0), found.stopped)


class Nobody:
    """A region that no token is inside of, known by membership alone."""

    traits = ("membership",)

    def __call__(self, old_logprobs):
        return torch.zeros_like(old_logprobs, dtype=torch.bool)


def test_membership_goes_by_the_log_ratio_and_not_by_a_ratio_that_was_rounded_to_1():
    old = torch.tensor([[-3e-9, -1e-9, -1.0, -1.0]])
    x = torch.tensor([[-1e-9, -2e-8, -0.9, -0.9]], requires_grad=True)
    a = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    objective = Objective(bounds=Nobody(), surrogate=clip_by_mask)
    loss, report = policy_loss(logprobs=x, old_logprobs=old, advantages=a, mask=mask, objective=objective)
    loss.backward()
    assert ((x.detach() - old).exp() == 1).sum() == 2
    assert (x.grad != 0).tolist() == [[False, False, False, True]]
    assert report["clip_fraction/any"] == 0.75


def forward_mode(loss, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, direction))).tangent


@pytest.mark.parametrize("leaf", [False, True], ids=["no gradient", "with gradient"])
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "bandpo-kl"])
def test_forward_mode_and_batches_of_gradients(name, leaf):
    data = {k: v.detach().double() if v.is_floating_point() else v for k, v in batch(2, 3).items()}
    x = data.pop("logprobs")

    def loss(x):
        return policy_loss(logprobs=x, **data, objective=name)[0]

    want = torch.func.grad(loss)(x)
    direction = torch.arange(6.0).view(2, 3).double()
    found = forward_mode(loss, x.clone().requires_grad_(leaf), direction)
    torch.testing.assert_close(found.detach(), (want * direction).sum())
    jacobian = torch.autograd.functional.jacobian(loss, x, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(jacobian, want)
    several = torch.autograd.functional.jacobian(lambda x: torch.stack([loss(x), 3 * loss(x)]), x, vectorize=True)
    torch.testing.assert_close(several, torch.stack([want, 3 * want]))


def test_vmap_of_the_entropy_beside_log_probs_with_a_gradient():
    data = batch(2, 3)
    x = data["logprobs"]
    loss = torch.func.vmap(lambda e: policy_loss(**data, objective="grpo", entropy=e)[0])(torch.zeros(2, 2, 3))
    (found,) = torch.autograd.grad(loss[0], x)
    (want,) = torch.autograd.grad(policy_loss(**data, objective="grpo")[0], x)
    torch.testing.assert_close(found, want)


def test_bounds_are_let_go_after_the_backward_pass_while_the_loss_is_kept():
    made = []

    class Region:
        def __call__(self, old_logprobs):
            bounds = RatioBounds(torch.full_like(old_logprobs, 0.8), torch.full_like(old_logprobs, 1.2))
            made.extend(weakref.ref(edge) for edge in bounds)
            return bounds

    loss, _ = policy_loss(**batch(), objective=Objective(bounds=Region()))
    assert all(edge() is not None for edge in made)
    loss.backward()
    gc.collect()
    assert [edge() for edge in made] == [None, None]
    assert loss.grad_fn is not None


def test_bounds_with_a_gradient_keep_it():
    upper = torch.tensor(1.2, requires_grad=True)
    terms = token_objective(
        Objective(bounds=Clip()),
        logprobs=torch.tensor([[-1.0, -0.5]], requires_grad=True),
        old_logprobs=torch.full((1, 2), -1.0),
        advantages=torch.ones(1),
        mask=torch.ones(1, 2),
        bounds=RatioBounds(torch.tensor(0.8), upper),
    )
    terms.value.sum().backward()
    assert upper.grad == 1


@pytest.mark.parametrize("name", ["grpo", "dual-clip", "gspo"])
def test_second_derivatives_are_those_of_torch_func(name):
    """torch.func takes the plain formula, and the eager backward pass with create_graph the same."""
    data = {k: v.detach().double() if v.is_floating_point() else v for k, v in batch(2, 3).items()}
    x = data.pop("logprobs")

    def loss(x):
        return policy_loss(logprobs=x, **data, objective=name, metrics="none")[0]

    want = torch.func.hessian(loss)(x)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    found = torch.stack([torch.autograd.grad(each, leaf, retain_graph=True)[0] for each in g.flatten()])
    torch.testing.assert_close(found.view_as(want), want, rtol=1e-12, atol=1e-15)
    assert want.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (3, 1), (1, 5), ()], ids=str)
def test_fill_is_where(dtype, shape):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 5, generator=g) < 0.5
    x = torch.randn(shape, generator=g).to(dtype)
    bad = torch.where(mask, x, torch.nan)
    assert torch.equal(Fill(mask)(bad), torch.where(mask, x, 0.0).to(dtype))
    weight = torch.randn(3, 5, generator=g).to(dtype)
    grads = []
    for form in (Fill(mask), lambda v: torch.where(mask, v, torch.zeros((), dtype=dtype))):
        leaf = x.clone().requires_grad_()
        (form(leaf) * weight).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_fill_of_odd_layouts():
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    x = torch.arange(6.0).view(2, 3).t()  # not contiguous
    assert Fill(mask)(x).tolist() == [[0.0, 0.0], [1.0, 4.0], [0.0, 5.0]]
    assert Fill(mask.t().contiguous().t())(x).tolist() == [[0.0, 0.0], [1.0, 4.0], [0.0, 5.0]]
    assert Fill(mask[:0])(x[:0]).shape == (0, 2)


@pytest.mark.parametrize("surrogate", [clip, clip_by_mask, two_sided], ids=["clip", "mask", "two_sided"])
def test_an_advantage_that_overflows_the_product_leaves_loss_and_gradient_of_a_stopped_token_finite(surrogate):
    data = batch(1, 2)
    data |= {
        "logprobs": torch.tensor([[-1.0, -1.0]], requires_grad=True),
        "old_logprobs": torch.tensor([[-41.0, -1.0]]),
    }
    data |= {"advantages": torch.tensor([1e25]), "mask": torch.ones(1, 2, dtype=torch.bool)}
    loss, _ = policy_loss(**data, objective=Objective(bounds=Clip(), surrogate=surrogate))
    loss.backward()
    assert loss.isfinite()
    assert data["logprobs"].grad[0, 0] == 0 and data["logprobs"].grad.isfinite().all()
