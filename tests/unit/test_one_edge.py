"""The clip with the one edge that each advantage pushes to, against the clip with both: the same to the last bit."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bandpo import OBJECTIVES, Band, Clip, Objective, RatioBounds, policy_loss, token_objective
from bandpo._eager import Fill
from bandpo.bounds import table
from bandpo.bounds.band import pushed_edge
from bandpo.divergences import DIVERGENCES
from bandpo.losses import compiled
from bandpo.metrics import policy_metrics
from bandpo.surrogates import clip, dual_clip
from bandpo.surrogates.filters import SequenceFilter

CLIPS = [Clip(0.2, 0.28), Clip(0.0, 0.0), Clip(1.0, math.inf), Clip(0.3)]
BANDS = [Band(d, r) for d in DIVERGENCES for r in (1e-3, 0.05, 2.0)]
BANDS += [Band("kl", (0.01, 0.3)), Band("js", 0.05, max_ratio=None), Band("kl", 1e-6, max_ratio=1.0)]


def tokens(rows=6, width=50, seed=0):
    """log p of all kinds: ordinary, certain, nearly certain, and rarer than float32 can tell."""
    g = torch.Generator().manual_seed(seed)
    kinds = [
        -8 * torch.rand(rows, width, generator=g),
        torch.zeros(1, width),
        -1e-6 * torch.rand(1, width, generator=g),
        -90 - torch.logspace(0, 8.9, width).unsqueeze(0),
    ]
    return torch.cat(kinds)


def advantages(shape, seed=1):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    a[::3] = 0.0
    return a


@pytest.mark.parametrize("per_token", [False, True], ids=["sequence", "token"])
@pytest.mark.parametrize("bounds", [*CLIPS, *BANDS], ids=repr)
def test_the_edge_is_that_of_the_bounds_to_the_last_bit(bounds, per_token):
    logp = tokens()
    a = advantages(logp.shape if per_token else (len(logp), 1))
    both = bounds(logp)
    want = torch.where(a > 0, both.upper, torch.where(a < 0, -both.lower, 0.0)).clamp_max(torch.finfo().max)
    assert torch.equal(pushed_edge(bounds, logp, a).expand(logp.shape), want)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_blocks_of_rows(rows, monkeypatch):
    logp = tokens(rows, 37)
    for a in (advantages((len(logp), 1)), advantages(logp.shape)):
        want = pushed_edge(Band("kl", 0.05), logp, a)
        for block in (1, 80, 1000):
            monkeypatch.setattr(table, "_BLOCK", block)
            assert torch.equal(pushed_edge(Band("kl", 0.05), logp, a), want)


class Peak(TorchDispatchMode):
    """How many results of operations, views left out, are much larger than a block."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.largest += found.numel() > 2 * table._BLOCK and not function.is_view
        return found


def test_a_long_row_is_worked_on_in_parts():
    """Only the sign and the result have the size of the batch, however long a row is."""
    logp = -torch.rand(1, 5 * table._BLOCK)
    for a in (torch.ones(1, 1), torch.ones(logp.shape)):
        with Peak() as peak:
            found = pushed_edge(Band("kl", 0.05), logp, a)
        assert peak.largest <= 1, "the result alone"
        assert torch.equal(found[:, :50], pushed_edge(Band("kl", 0.05), logp[:, :50], a[:, :50]))


def test_logprobs_and_old_logprobs_of_two_dtypes_give_what_both_edges_give():
    old = torch.linspace(-3, -0.1, 8, dtype=torch.float64)[None]
    new = (old + torch.linspace(-0.15, 0.15, 8)).float()
    data = {"logprobs": new, "old_logprobs": old, "advantages": torch.ones(1), "mask": torch.ones(1, 8)}
    for name in ("grpo", "bandpo-kl"):
        losses = [policy_loss(**data, objective=name, metrics=m)[0] for m in ("basic", "full")]
        assert torch.equal(*losses) and losses[0].dtype == losses[1].dtype


def test_the_full_metrics_of_one_edge_are_refused():
    data = {"logprobs": torch.zeros(1, 2), "old_logprobs": torch.zeros(1, 2), "advantages": torch.ones(1)}
    terms = token_objective(OBJECTIVES["bandpo-kl"], **data, mask=torch.ones(1, 2), both_edges=False)
    assert "ratio/mean" in policy_metrics(terms, detail="basic")
    with pytest.raises(ValueError, match="use token_objective"):
        policy_metrics(terms)


def test_bounds_for_which_one_edge_saves_nothing():
    logp, a = tokens(), advantages((len(tokens()), 1))
    for bounds in (Band("kl", 0.05, relax=Clip(0.2)), Band("kl", torch.tensor(0.05)), lambda x: RatioBounds(x, x)):
        assert pushed_edge(bounds, logp, a) is None
    assert pushed_edge(Band("kl", 0.05), logp.double(), a.double()) is None
    assert pushed_edge(Clip(0.2), logp.double(), a.double()).dtype == torch.float64


def batch(dtype, per_token):
    old = tokens()
    g = torch.Generator().manual_seed(2)
    new = old + 0.4 * torch.randn(old.shape, generator=g)
    new[0, :5] = old[0, :5]
    new[1, :3], new[1, 3:6] = old[1, :3] + 60, old[1, 3:6] - 60  # beyond what a ratio is held at
    mask = torch.rand(old.shape, generator=g) < 0.8
    new[~mask], old[~mask] = (
        torch.nan,
        torch.where(torch.rand(old.shape, generator=g) < 0.5, -math.inf, torch.nan)[~mask],
    )
    new[2, 0], old[2, 1] = torch.nan, math.inf
    a = advantages(old.shape if per_token else (len(old), 1))
    a[4] = math.inf
    return {"logprobs": new.to(dtype), "old_logprobs": old.to(dtype), "advantages": a.to(dtype), "mask": mask}


REGIONS = {"clip": Clip(0.2, 0.28), "band": Band("kl", 0.05), "two radii": Band("js", (0.01, 0.2), max_ratio=None)}


@pytest.mark.parametrize("per_token", [False, True], ids=["sequence", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("region", REGIONS)
def test_values_gradients_and_what_is_stopped_are_those_of_both_edges(region, dtype, per_token):
    data = batch(dtype, per_token)
    found = []
    for both_edges in (True, False):
        x = data["logprobs"].clone().requires_grad_()
        terms = token_objective(Objective(bounds=REGIONS[region]), **{**data, "logprobs": x}, both_edges=both_edges)
        weights = torch.linspace(-1, 2, terms.value.numel()).view_as(terms.value)
        (gradient,) = torch.autograd.grad((terms.value * weights).sum(), x, retain_graph=True)
        (of_ratio,) = torch.autograd.grad((terms.log_ratio * weights).sum(), x)
        found.append((terms.value, gradient, of_ratio, terms.stopped, terms.log_ratio, terms.nonfinite))
        one = isinstance(terms.bounds, torch.Tensor)
        assert one == (not both_edges and (region == "clip" or dtype != torch.float64))
    for with_both, with_one in zip(*found, strict=True):
        assert torch.equal(with_both, with_one)
    assert found[0][1].isfinite().all() and found[0][1].any() and found[0][3].any()


@pytest.mark.parametrize("region", ["clip", "band"])
def test_the_gradient_is_that_of_the_definition(region):
    """A·r where the token is inside on the side that A pushes to, else 0, in float64."""
    data = batch(torch.float32, per_token=False)
    x = data["logprobs"].clone().requires_grad_()
    terms = token_objective(Objective(bounds=REGIONS[region]), **{**data, "logprobs": x}, both_edges=False)
    terms.value.sum().backward()
    r = (data["logprobs"].double() - data["old_logprobs"].double()).nan_to_num(0.0, 0.0, 0.0)
    near_the_edge = torch.zeros_like(r, dtype=torch.bool)
    lower, upper = (edge.double() for edge in REGIONS[region](data["old_logprobs"].nan_to_num(0.0, 0.0, 0.0)))
    a = data["advantages"].double().expand(r.shape)
    ratio = r.clamp(-40, 40).exp()
    for edge in (lower, upper):
        near_the_edge |= ((ratio / edge) - 1).abs() < 1e-5  # the log-ratio of float32 is rounded
    used = data["mask"] & ~terms.nonfinite & ~near_the_edge
    inside = torch.where(a > 0, ratio <= upper, ratio >= lower) & (r.abs() < 40)
    want = torch.where(inside, a * ratio, 0.0)
    torch.testing.assert_close(x.grad.double()[used], want[used], rtol=1e-4, atol=1e-7)
    assert not x.grad[~data["mask"]].any() and used.sum() > 100


def test_a_token_on_its_edge_keeps_its_whole_gradient():
    """Certain tokens have bounds of 1 and, in the first step, a ratio of 1."""
    old = torch.zeros(2, 4)
    x = old.clone().requires_grad_()
    for call in (policy_loss, compiled(backend="eager")):
        loss, report = call(
            logprobs=x, old_logprobs=old, advantages=torch.tensor([2.0, -2.0]), mask=old == 0, objective="bandpo-kl"
        )
        (gradient,) = torch.autograd.grad(loss, x)
        assert torch.equal(gradient, torch.tensor([[-2.0], [2.0]]).expand(2, 4) / 8)
        assert report["clip_fraction/any"] == 0


@pytest.mark.parametrize("name", ["grpo", "bandpo-kl"])
def test_second_derivatives_in_float32(name):
    data = {k: v[:2, :4] for k, v in batch(torch.float32, per_token=False).items()}
    data = {k: v.nan_to_num(0.0, 0.0, 0.0) if v.is_floating_point() else v for k, v in data.items()}
    data["advantages"] = torch.tensor([[1.5], [-0.5]])
    x = data.pop("logprobs")

    def loss(x):
        return policy_loss(logprobs=x, **data, objective=name)[0]

    want = torch.func.hessian(loss)(x).view(8, 8)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    found = torch.stack([torch.autograd.grad(each, leaf, retain_graph=True)[0].flatten() for each in g.flatten()])
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)
    assert want.any()


@pytest.mark.parametrize(
    "objective",
    [
        replace(OBJECTIVES["grpo"], surrogate=dual_clip),
        OBJECTIVES["tis"],
        OBJECTIVES["gspo"],
        replace(OBJECTIVES["bandpo-kl"], filter=SequenceFilter("k3", "mean", high=1.0)),
    ],
    ids=["another surrogate", "correction", "ratio of the sequence", "filter"],
)
def test_other_objectives_keep_both_edges(objective):
    data = batch(torch.float32, per_token=False)
    needs = {"rollout_logprobs": data["old_logprobs"]} if objective.correction or objective.filters else {}
    terms = token_objective(objective, **data, **needs, both_edges=False)
    assert isinstance(terms.bounds, RatioBounds)


def test_the_clip_is_a_clip_where_torch_func_transforms_it():
    old, x = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-0.5, -1.1, -2.0]])
    given = {"old_logprobs": old, "mask": torch.tensor([[True, True, False]]), "objective": "bandpo-kl"}

    def loss(x, a):
        return policy_loss(logprobs=x, advantages=a, **given)[0]

    many = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(x, torch.tensor([[1.0], [-1.0], [0.0]]))
    for each, a in zip(many, (1.0, -1.0, 0.0), strict=True):
        leaf = x.clone().requires_grad_()
        loss(leaf, torch.tensor([a])).backward()
        torch.testing.assert_close(each, leaf.grad)
    assert clip is OBJECTIVES["bandpo-kl"].surrogate


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.float64,) * 2, (torch.float32, torch.float64)], ids=str
)
def test_the_held_difference_of_a_fill(dtypes):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 7, generator=g) < 0.6
    x, y = (100 * torch.randn(3, 7, generator=g).to(d) for d in dtypes)
    x[0, 0], y[0, 0] = 41.0, 1.0  # on the limit, where the gradient is 0 already
    x = torch.where(mask, x, torch.nan)
    weights = torch.randn(3, 7, generator=g)
    found = []
    for form in (
        lambda v: Fill(mask).difference(v, y, 40.0),
        lambda v: torch.nn.functional.hardtanh(torch.where(mask, (v - y).to(v.dtype), 0.0), -40.0, 40.0),
    ):
        leaf = x.clone().requires_grad_()
        value = form(leaf)
        (gradient,) = torch.autograd.grad((value * weights).sum(), leaf, create_graph=True)
        found.append((value, gradient))
        assert torch.equal(form(x), value)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
