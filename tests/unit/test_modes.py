"""The core under autocast, function transforms, fake tensors, threads and odd layouts; compiled without a limit of variants."""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bandpo
from bandpo import KL, OBJECTIVES, TV, Band, alpha, in_band, policy_loss, ratio_bounds, token_logprobs
from bandpo import losses as library
from bandpo.bounds.roots import log_bounds
from batches import complete, deterministic, max_length

G = torch.Generator().manual_seed(0)


def head(scale):
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(64, 32, generator=g) * scale, torch.randn(101, 32, generator=g) * 0.5
    return (
        hidden,
        weight,
        torch.randn(101, generator=g),
        torch.randint(101, (64,), generator=g),
        torch.randn(2, 64, generator=g),
    )


def losses(logits, targets, up):
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (up[0] * chosen).sum() + (up[1] * -(logp.exp() * logp).sum(-1)).sum()


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0, 12.0])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_logprobs_under_autocast_are_as_near_the_truth_as_plain_autocast(scale, inside, dtype):
    hidden, weight, bias, targets, up = head(scale)
    gradients = {}
    for kind in ("truth", "plain", "ours"):
        leaves = [
            x.to(torch.float64 if kind == "truth" else torch.float32).clone().requires_grad_()
            for x in (hidden, weight, bias)
        ]
        if kind == "truth":
            losses(torch.nn.functional.linear(*leaves), targets, up).backward()
        else:
            with torch.autocast("cpu", dtype=dtype):
                if kind == "plain":
                    loss = losses(torch.nn.functional.linear(*leaves).float(), targets, up)
                else:
                    out = token_logprobs(*leaves[:2], targets, bias=leaves[2], entropy=True, chunk_size=17)
                    assert out.logprobs.dtype == out.entropy.dtype == torch.float32
                    loss = (up[0] * out.logprobs).sum() + (up[1] * out.entropy).sum()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        gradients[kind] = [x.grad.double() for x in leaves]
    for truth, plain, ours in zip(*gradients.values(), strict=True):
        off = [((x - truth).norm() / truth.norm()).item() for x in (plain, ours)]
        # the same roundings in another order: of n of them the sums differ by chance, not by size
        assert off[1] <= 1.1 * off[0]


def test_autocast_leaves_float64_alone_and_takes_mixed_inputs():
    hidden, weight, _, targets, _ = head(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = token_logprobs(hidden.double(), weight.double(), targets).logprobs
        mixed = token_logprobs(hidden.bfloat16(), weight, targets).logprobs
    assert torch.equal(wide, token_logprobs(hidden.double(), weight.double(), targets).logprobs)
    assert torch.equal(mixed, token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets).logprobs)


@pytest.mark.parametrize("name", ["bandpo-kl", "bandpo-tv", "grpo", "gspo", "gmpo", "cispo", "bapo", "dual-clip"])
def test_policy_loss_under_vmap_of_grad(name):
    new, old = -torch.rand(2, 5, 3, 4, generator=G) * 4
    advantages, mask = torch.randn(5, 3, generator=G), torch.ones(5, 3, 4)

    def loss(x, o, a, m):
        return policy_loss(logprobs=x, old_logprobs=o, advantages=a, mask=m, objective=name)[0]

    together = torch.func.vmap(torch.func.grad(loss))(new, old, advantages, mask)
    for i in range(5):
        x = new[i].clone().requires_grad_()
        loss(x, old[i], advantages[i], mask[i]).backward()
        assert torch.equal(together[i], x.grad)


def test_under_a_bare_fake_tensor_mode():
    with FakeTensorMode():
        x = torch.zeros(2, 3)
        for radius in (0.05, torch.tensor(0.05), (0.1, 0.2)):
            for divergence in (KL, "js", alpha(0.3)):
                for log in (False, True):
                    for bound in ratio_bounds(x, divergence, radius, log=log):
                        assert (bound.shape, bound.dtype) == ((2, 3), torch.float32)
        assert in_band(x, x).dtype == torch.bool
        loss, _ = policy_loss(logprobs=x, old_logprobs=x, advantages=x, mask=x)
        assert loss.shape == ()


@pytest.mark.parametrize("divergence", [KL, TV, bandpo.JS, alpha(1.5)], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layouts_empty_scalar_and_expanded(divergence, dtype):
    base = (-torch.rand(4, 6, generator=G) * 5 - 1e-3).to(dtype)
    base[0, 0] = -math.inf
    whole = ratio_bounds(base, divergence, 0.05)
    assert whole.lower[0, 0] == 0
    assert whole.upper[0, 0] == math.inf
    for view in (lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[1], lambda x: x[2, 3], lambda x: x[:0],
                 lambda x: x[:1].expand(5, 6),
                 lambda x: x.as_strided((3, 3), (1, 2))):  # fmt: skip
        for got, want in zip(ratio_bounds(view(base), divergence, 0.05), whole, strict=True):
            assert torch.equal(got, view(want.contiguous()))
            assert not got.requires_grad


def test_threads_read_one_table_that_keeps_its_promise():
    radii = [0.0123 * k for k in range(1, 5)]
    logp = -torch.rand(2000, generator=G) * 20

    def work(k):
        return ratio_bounds(logp, bandpo.LE_CAM, radii[k % 4])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(32)))
    for k, (lower, upper) in enumerate(found):
        delta = torch.tensor(radii[k % 4], dtype=torch.float64)
        true_lower, true_upper = (b.exp() for b in log_bounds(bandpo.LE_CAM, logp.double(), delta, delta))
        assert (lower.double() >= true_lower - 1e-12).all()
        assert (lower.double() - true_lower <= 4 * 2**-24).all()
        assert (upper.double() <= true_upper * (1 + 1e-12)).all()
        assert (upper.double() >= true_upper * (1 - 4 * 2**-23)).all()


@pytest.mark.slow
def test_compiled_bounds_take_any_number_of_radii_and_say_so_once():
    fast = library.compiled(ratio_bounds, backend="eager")
    logp = -torch.rand(9, generator=G) * 6
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for k in range(32):
            radius = 0.01 + 0.01 * k
            for got, want in zip(fast(logp, KL, radius), ratio_bounds(logp, KL, radius), strict=True):
                torch.testing.assert_close(got, want, rtol=4 * 2**-23, atol=4 * 2**-24)
    assert len([w for w in said if "changing radius" in str(w.message)]) == 1
    assert len(fast._graphs) == 2  # with a number, and with an input


@pytest.mark.slow
def test_compiled_loss_takes_more_objectives_than_torch_keeps_graphs():
    def cheap(*, logprobs, objective):
        return (logprobs * len(objective.name)).sum()

    fast = library.compiled(cheap, backend="eager")
    with pytest.warns(UserWarning, match="graph no. 9"):  # noqa: PT031
        for _ in range(2):
            for objective in OBJECTIVES.values():
                for shape in ((1, 3), (2, 1), (0, 4), (3, 5)):
                    x = torch.ones(shape)
                    assert fast(logprobs=x, objective=objective) == x.numel() * len(objective.name)


@pytest.mark.slow
def test_compiled_functions_with_other_numbers_begin_again_and_say_so():
    fast = library.compiled(lambda x, r: Band(KL, r)(x).upper, backend="eager")
    x = torch.tensor([-1.0, -2.0])
    with pytest.warns(UserWarning, match="compiles repeatedly"):  # noqa: PT031
        for k in range(12):
            assert torch.equal(fast(x, 0.05 + 0.01 * k), Band(KL, 0.05 + 0.01 * k)(x).upper)


@pytest.mark.slow
def test_compiled_policy_loss_with_a_schedule():
    fast = library.compiled(backend="aot_eager")
    new, old = -torch.rand(2, 3, 4, generator=G) * 4
    with pytest.warns(UserWarning, match="changing radius"):  # noqa: PT031
        for k in range(32):
            objective = OBJECTIVES["bandpo-kl"].with_radius(0.02 + 0.002 * k)
            results = []
            for loss_of in (fast, policy_loss):
                x = new.clone().requires_grad_()
                loss, _ = loss_of(
                    logprobs=x,
                    old_logprobs=old,
                    advantages=torch.tensor([1.0, -1.0, 0.5]),
                    mask=torch.ones(3, 4),
                    objective=objective,
                )
                results.append((loss.detach(), *torch.autograd.grad(loss, x)))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def counting():
    """A backend of `torch.compile` that runs the graphs as they are, and the list of those it was given."""
    graphs = []
    return graphs, lambda graph, _: (graphs.append(graph), graph.forward)[1]


def rows_of(rows):
    """A batch of float32 with `rows` sequences of 9 tokens."""
    g = torch.Generator().manual_seed(rows)
    old = -torch.rand(rows, 9, generator=g) * 4 - 1e-2
    new = torch.minimum(old + 0.5 * torch.randn(rows, 9, generator=g), torch.tensor(-1e-3))
    mask = torch.arange(9) < torch.randint(1, 10, (rows, 1), generator=g)
    return {"logprobs": new, "old_logprobs": old, "advantages": torch.randn(rows, generator=g), "mask": mask}


def check_compiled(fast, objective, rows, **options):
    data = complete(objective, rows_of(rows)) | {"max_length": max_length(objective.aggregation), **options}
    x = data.pop("logprobs")
    results = []
    for loss_of in (fast, policy_loss):
        leaf = x.clone().requires_grad_()
        loss, metrics = loss_of(logprobs=leaf, objective=objective, **data)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf), *metrics.values()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_one_compiled_loss_takes_every_objective_and_batches_of_any_shape(half):
    graphs, backend = counting()
    fast = library.compiled(backend=backend)
    chosen = [deterministic(name) for name in list(OBJECTIVES)[half::2]]
    with pytest.warns(UserWarning, match="graph no. 9") as said:  # noqa: PT031
        for objective in chosen:
            check_compiled(fast, objective, 6, kl_coef=0.0)
    assert len(said) == 1
    assert len(graphs) == len(chosen)
    for objective in chosen:
        check_compiled(fast, objective, 7, kl_coef=0.0)
    assert len(graphs) == len(chosen)


@pytest.mark.slow
def test_one_compiled_loss_takes_a_schedule_of_a_thousand_radii():
    graphs, backend = counting()
    fast = library.compiled(backend=backend)
    with pytest.warns(UserWarning, match="changing radius") as said:  # noqa: PT031
        for k in range(1000):
            objective = OBJECTIVES["bandpo-kl"].with_radius(1e-3 * (1 + k))
            if k % 100:
                fast(**rows_of(4), objective=objective)
            else:
                check_compiled(fast, objective, 4)
    assert len(said) == 1
    assert len(graphs) <= 5  # two constants and an input; PyTorch's own second look at a number that changed


@pytest.mark.slow
@pytest.mark.parametrize("number", ["penalty", "kl_coef", "normalizer", "pair"])
def test_a_number_that_changes_makes_no_graph_of_its_own(number):
    graphs, backend = counting()
    fast = library.compiled(backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*changing radius")
        for k in range(20):
            value, objective, options = 0.01 + 0.01 * k, OBJECTIVES["grpo"], {}
            if number == "penalty":
                objective = OBJECTIVES["ppo-kl"].with_penalty(value)
            elif number == "pair":
                objective = OBJECTIVES["bandpo-kl"].with_radius((value, 2 * value))
            elif number == "kl_coef":
                options = {"kl_coef": value, "ref_logprobs": rows_of(5)["old_logprobs"] - 0.1}
            else:
                options = {"normalizer": value}
            check_compiled(fast, objective, 5, **options)
    assert len(graphs) == (3 if number == "pair" else 1)


@pytest.mark.slow
def test_dtypes_and_gradient_modes_take_turns_without_another_graph():
    graphs, backend = counting()
    fast = library.compiled(backend=backend)
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            data = {k: v.to(dtype) if v.is_floating_point() else v for k, v in rows_of(5).items()}
            fast(**data)
            with torch.no_grad():
                torch.testing.assert_close(fast(**data)[0], policy_loss(**data)[0], rtol=1e-5, atol=1e-6)
            fast(**{**data, "logprobs": data["logprobs"].clone().requires_grad_()})[0].backward()
    assert len(graphs) == 6


def test_a_penalty_is_a_number_or_a_tensor_of_one():
    data, beta = rows_of(4), torch.tensor(0.3, dtype=torch.float64)
    objective = OBJECTIVES["ppo-kl"].with_penalty(beta)
    assert objective.penalty is beta
    assert policy_loss(**data, objective=objective)[0].dtype == torch.float32
    want = policy_loss(**data, objective=OBJECTIVES["ppo-kl"].with_penalty(0.3))[0]
    assert torch.equal(policy_loss(**data, objective=objective)[0], want)
    for wrong in (torch.tensor([0.3]), torch.tensor(1), -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="with_penalty: beta must be a number >= 0"):
            OBJECTIVES["ppo-kl"].with_penalty(wrong)
