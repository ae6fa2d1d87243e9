"""The operator against a 50-digit oracle, its published constants, and its contract."""

import math
import random

import mpmath as mp
import pytest
import torch

import bandpo
import oracle
from bandpo import (
    CHI2,
    DCPO,
    HELLINGER,
    JS,
    KL,
    NEYMAN,
    REVERSE_KL,
    TV,
    Band,
    Clip,
    FDivergence,
    alpha,
    in_band,
    ratio_bounds,
)
from bandpo.divergences import DIVERGENCES, binary_divergence

ALPHAS = [alpha(a) for a in (3.0, 2.0, 1.5, 1.001, 0.999, 0.5, 0.3, 0.001, -1.0, -1.5)]
ALL = [*DIVERGENCES.values(), *ALPHAS]
NAMED = pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
LOGPS, RADII = oracle.LOGPS, oracle.RADII
SIDES = ("lower", "upper")


def both(divergence, logps, radius, dtype, **kwargs):
    bounds = ratio_bounds(torch.tensor(logps, dtype=dtype), divergence, radius, **kwargs)
    return {side: getattr(bounds, side).tolist() for side in SIDES}


def exact(name, logp, radius):
    return dict(zip(SIDES, oracle.log_bounds(name, logp, radius), strict=True))


def test_the_golden_file_has_every_point_of_the_oracle_and_no_other():
    points = list(oracle.points())
    assert len(points) == len(set(points)) == 19 * 5 * 18 + 10
    assert oracle.golden().keys() == set(points)


def test_a_random_sample_of_the_golden_file_computed_anew_is_the_same_to_the_last_digit():
    seed = random.SystemRandom().randrange(2**32)
    for point in random.Random(seed).sample(list(oracle.points()), 24):
        found = tuple(map(oracle.as_text, oracle.compute_log_bounds(*point)))
        assert found == oracle.golden()[point], f"point {point} of seed {seed}"


@NAMED
def test_float64_log_bounds_against_oracle(divergence):
    for radius in RADII:
        got = both(divergence, LOGPS, radius, torch.float64, log=True)
        for i, logp in enumerate(LOGPS):
            for side, true in exact(divergence.name, logp, radius).items():
                value = got[side][i]
                if mp.isinf(true):
                    assert value == float(true), (side, logp, radius)
                else:
                    assert abs(value - true) <= 1e-12 * max(1, abs(true)), (side, logp, radius, value, float(true))


@NAMED
def test_float32_against_oracle(divergence):
    for radius in RADII:
        logps = torch.tensor(LOGPS, dtype=torch.float32).tolist()  # the oracle gets the very numbers the library gets
        log_got = both(divergence, logps, radius, torch.float32, log=True)
        got = both(divergence, logps, radius, torch.float32)
        for i, logp in enumerate(logps):
            true = exact(divergence.name, logp, radius)
            for side in SIDES:
                if mp.isinf(true[side]):
                    assert log_got[side][i] == float(true[side])
                    continue
                scale = torch.tensor(max(abs(float(true[side])), 1e-6), dtype=torch.float32)
                ulp = (torch.nextafter(scale, torch.tensor(math.inf)) - scale).item()
                error = log_got[side][i] - true[side]
                assert abs(error) <= 4 * ulp, (side, logp, radius)
                # Inward: never further from 0 than the truth, but for the 1e-12 of the float64 solve.
                outward = -error if side == "lower" else error
                assert outward <= 1e-12 * max(1, abs(true[side])), (side, logp, radius)
            assert abs(got["lower"][i] - mp.exp(true["lower"])) <= 4 * 2.0**-24, (logp, radius)
            upper = mp.exp(true["upper"])
            assert abs(got["upper"][i] - upper) <= 4 * 2.0**-23 * upper, (logp, radius)
            assert got["upper"][i] <= upper * (1 + 1e-10), (logp, radius)
            assert got["lower"][i] >= mp.exp(true["lower"]) - 1e-12, (logp, radius)


def test_user_divergence_of_f_alone_is_as_good():
    user = FDivergence("user", lambda u: -u.log() + u - 1)
    for radius in RADII:
        for log in (False, True):
            ours = ratio_bounds(torch.tensor(LOGPS[2:]), user, radius, log=log)
            kl = ratio_bounds(torch.tensor(LOGPS[2:]), KL, radius, log=log)
            # f near 1 is off by ulp(1) = 2e-16; over a radius of 1e-6 that is 2e-10 of the bound. -700 is where u underflows.
            for a, b in zip(ours, kl, strict=True):
                torch.testing.assert_close(a.clamp_min(-700), b.clamp_min(-700), rtol=1e-6, atol=1e-9)


def test_published_constants():
    # worked out beforehand with a 60-digit oracle, and quoted to the digits shown
    table = {
        0.001: (7.10e-23, 53.548), 0.01: (0.0024974, 7.8098), 0.05: (0.1620, 2.9812), 0.1: (0.3128, 2.2008),
        0.3: (0.5709, 1.5153), 0.5: (0.6915, 1.3085), 0.7: (0.7791, 1.1839), 0.9: (0.8666, 1.0764),
        0.99: (0.9312, 1.0101), 0.999: (0.9474, 1.0010),
    }  # fmt: skip
    p = torch.tensor(list(table), dtype=torch.float64)
    lower, upper = ratio_bounds(p.log(), KL, 0.05)
    torch.testing.assert_close(lower, torch.tensor([v[0] for v in table.values()]).double(), rtol=5e-4, atol=0)
    torch.testing.assert_close(upper, torch.tensor([v[1] for v in table.values()]).double(), rtol=5e-5, atol=0)
    rare = ratio_bounds(torch.tensor([1e-4], dtype=torch.float64).log(), KL, 0.05, log=True)
    assert rare.upper.exp().item() == pytest.approx(494.6, rel=1e-4)
    assert rare.lower.item() == pytest.approx(-501.0, abs=0.01)  # -δ/p - 1 + r, to first order in p


def test_half_has_a_closed_form_for_kl():
    lower, upper = ratio_bounds(torch.tensor([0.5], dtype=torch.float64).log(), KL, 0.05)
    shift = math.sqrt(1 - math.exp(-0.1))
    assert lower.item() == pytest.approx(1 - shift, abs=1e-13)
    assert upper.item() == pytest.approx(1 + shift, abs=1e-13)


def test_numbers_logged_by_the_authors_gpu_run():
    logp = torch.tensor([0.0159060, 0.1724216]).log()
    lower, upper = ratio_bounds(logp, KL, 0.05)
    torch.testing.assert_close(lower, torch.tensor([0.0162530, 0.4409633]), rtol=0, atol=2e-6)
    torch.testing.assert_close(upper, torch.tensor([5.695395, 1.8040655]), rtol=2e-6, atol=0)


def test_tv_and_chi2_match_their_formulas():
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    lower, upper = ratio_bounds(p.log(), TV, 0.05)
    torch.testing.assert_close(lower, (1 - 0.05 / p).clamp_min(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(upper, torch.minimum(1 + 0.05 / p, 1 / p), rtol=1e-14, atol=0)
    lower, upper = ratio_bounds(p.log(), CHI2, 0.05)
    step = (0.05 * (1 - p) / p).sqrt()
    torch.testing.assert_close(lower, (1 - step).clamp_min(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(upper, torch.minimum(1 + step, 1 / p), rtol=1e-14, atol=0)


@pytest.mark.parametrize("divergence", [d for d in ALL if d.closed_form], ids=lambda d: d.name)
def test_closed_form_equals_the_search(divergence):
    searched = FDivergence(divergence.name, divergence.f, divergence.f_exp, divergence.slope_at_infinity)
    logp = -torch.logspace(-10, 1.9, 200, dtype=torch.float64)
    for radius in (1e-5, 0.02, 0.5, 1.9, 3.0):
        for a, b in zip(
            ratio_bounds(logp, divergence, radius, log=True),
            ratio_bounds(logp, searched, radius, log=True),
            strict=True,
        ):
            torch.testing.assert_close(a.exp(), b.exp(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("divergence", [KL, TV, JS, alpha(1.5)], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bit_identical_alone_and_in_any_batch(divergence, dtype):
    logp = (torch.rand(257, generator=torch.Generator().manual_seed(0)) * -12).to(dtype)
    batch = ratio_bounds(logp, divergence, 0.05)
    views = [(logp[i], i) for i in range(0, 257, 5)] + [
        (logp[::3], slice(None, None, 3)), (logp[:-1].view(16, 16).t(), None), (logp[100:133], slice(100, 133)),
    ]  # fmt: skip
    for part, index in views:
        for side, whole in zip(ratio_bounds(part, divergence, 0.05), batch, strict=True):
            assert torch.equal(side, whole[:-1].view(16, 16).t() if index is None else whole[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("log", [False, True])
def test_16_bit_is_the_float32_result_rounded_once_and_inward(dtype, log):
    logp = -torch.logspace(-3, 1, 200).to(dtype)
    for narrow, wide, up in zip(
        ratio_bounds(logp, KL, 0.05, log=log), ratio_bounds(logp.float(), KL, 0.05, log=log), (True, False), strict=True
    ):
        assert narrow.dtype == dtype
        finite = wide.abs() <= torch.finfo(dtype).max
        assert ((narrow.float() >= wide) if up else (narrow.float() <= wide))[finite].all()
        # and it is the nearest such number: one more step outward passes the float32 result
        bits = torch.tensor(1 if (wide.ge(0).all() and not up) or (wide.le(0).all() and up) else -1, dtype=torch.int16)
        further = (narrow.view(torch.int16) + bits).view(dtype).float()
        assert ((further < wide) if up else (further > wide))[finite & (narrow != 0) & (narrow != wide)].all()


def test_gradient_never_flows_through_bounds():
    logp = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    radius = torch.tensor([0.05, 0.1], dtype=torch.float64, requires_grad=True)
    bounds = ratio_bounds(logp, KL, radius)
    assert not bounds.lower.requires_grad
    assert not bounds.upper.requires_grad
    assert not in_band(torch.zeros_like(logp), logp, KL, 0.05).requires_grad

    def surrogate(x):  # if a gradient leaked, the numerical and the analytic one would differ
        lower, upper = Band(KL, 0.05)(logp0)
        return torch.minimum(x.exp(), x.exp().clamp(lower, upper)).sum()

    logp0 = torch.tensor([-1.0, -3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(surrogate, (torch.tensor([0.05, 2.5], dtype=torch.float64, requires_grad=True),))


def test_nan_infinity_zero_and_rounding_above_zero():
    logp = torch.tensor([math.nan, -math.inf, 0.0, -0.0, 1e-7])
    for divergence in ALL:
        lower, upper = ratio_bounds(logp, divergence, 0.05)
        assert lower[0].isnan()
        assert upper[0].isnan()
        assert lower[1] == 0
        assert upper[1] == math.inf
        assert (upper[2:] == 1).all()
        # p = 1: the limit of the lower bound solves f(r) + (1-r) f'(∞) = δ
        assert torch.equal(lower[2], lower[3])
        assert torch.equal(lower[2], lower[4])
        r = lower[2].double()
        if math.isinf(divergence.recession):
            assert r == 1
        else:
            assert divergence(r) + (1 - r) * divergence.recession == pytest.approx(
                0.05, abs=2**-23 * (1 + divergence.recession)
            )
    assert ratio_bounds(logp, KL, 0.05, max_ratio=10).upper[1] == 10


def test_tensor_radius_equals_float_radius_and_broadcasts():
    logp = torch.rand(3, 4) * -5
    radii = torch.tensor([[0.01], [0.05], [0.2]])
    for divergence in (KL, TV):
        bounds, exact = ratio_bounds(logp, divergence, radii), ratio_bounds(logp.double(), divergence, radii.double())
        for i in range(3):
            one = ratio_bounds(logp[i].double(), divergence, radii[i].item())
            assert torch.equal(exact.lower[i], one.lower)
            assert torch.equal(exact.upper[i], one.upper)
            tabulated = ratio_bounds(
                logp[i], divergence, radii[i].item()
            )  # a float radius in float32 comes from the table
            torch.testing.assert_close(bounds.lower[i], tabulated.lower, rtol=0, atol=4 * 2**-24)
            torch.testing.assert_close(bounds.upper[i], tabulated.upper, rtol=4 * 2**-23, atol=0)
    bad = ratio_bounds(logp[0], KL, torch.tensor([0.05, 0.0, -1.0, math.nan]))
    assert bad.lower.isnan().tolist() == [False, True, True, True]
    assert bad.upper.isnan().tolist() == [False, True, True, True]
    assert ratio_bounds(logp[0], TV, torch.tensor([0.05, 0.0, -1.0, math.nan])).upper.isnan().sum() == 3


def test_radius_for_each_side():
    logp = torch.tensor([-1.0, -4.0])
    bounds = Band(KL, radius=(0.01, 0.2), max_ratio=None)(logp)
    assert torch.equal(bounds.lower, ratio_bounds(logp, KL, 0.01).lower)
    assert torch.equal(bounds.upper, ratio_bounds(logp, KL, 0.2).upper)
    lower, upper = ratio_bounds(logp, KL, (0.01, 0.2), log=True)
    for log_ratio, inside in ((lower * 0.99, True), (lower * 1.01, False), (upper * 0.99, True), (upper * 1.01, False)):
        assert (in_band(log_ratio, logp, KL, (0.01, 0.2)) == inside).all()


def test_max_ratio_and_relax():
    logp = torch.tensor([1e-4, 0.5, 0.9]).log()
    pure = Band(KL, 0.05, max_ratio=None)(logp)
    capped = Band(KL, 0.05)(logp)
    assert capped.upper[0] == 10
    assert torch.equal(capped.upper[1:], pure.upper[1:])
    assert torch.equal(capped.lower, pure.lower)
    relaxed = Band(KL, 0.05, relax=Clip(0.2, 0.28))(logp)
    assert relaxed.upper.tolist() == pytest.approx([10, pure.upper[1].item(), 1.28])
    assert relaxed.lower.tolist() == pytest.approx([pure.lower[0].item(), pure.lower[1].item(), 0.8])
    logged = ratio_bounds(logp, KL, 0.05, max_ratio=10, log=True)
    assert logged.upper[0].item() == pytest.approx(math.log(10))


def test_where_the_cap_and_the_fixed_clip_cross_the_band():
    # δ = 0.05, from the same oracle
    for p, side, value in (
        (0.5399, "upper", 1.28),
        (0.6707, "upper", 1.2),
        (0.7507, "lower", 0.8),
        (0.00714, "upper", 10),
    ):
        got = getattr(ratio_bounds(torch.tensor([p], dtype=torch.float64).log(), KL, 0.05), side).item()
        assert got == pytest.approx(value, rel=2e-3 if value == 10 else 2e-4)


def test_in_band_agrees_with_the_bounds():
    g = torch.Generator().manual_seed(1)
    for divergence in ALL:
        logp = torch.rand(2000, generator=g, dtype=torch.float64) * -10
        x = (torch.rand(2000, generator=g, dtype=torch.float64) * 2 - 1) * 3
        lower, upper = ratio_bounds(logp, divergence, 0.05, log=True)
        near = ((x - lower).abs() < 1e-9) | ((x - upper).abs() < 1e-9)
        inside = (x >= lower) & (x <= upper)
        assert torch.equal(in_band(x, logp, divergence, 0.05)[~near], inside[~near])
    assert in_band(torch.tensor([0.0, math.nan, 0.1]), torch.tensor([0.0, -1.0, 0.0])).tolist() == [True, False, False]


def test_in_band_in_float32_decides_as_the_bounds_do():
    g = torch.Generator().manual_seed(2)
    logp = torch.rand(20_000, generator=g) * -10
    x = torch.randn(20_000, generator=g)
    for divergence in (KL, TV, JS):
        lower, upper = ratio_bounds(logp, divergence, (0.02, 0.1))
        inside = (x.exp() >= lower) & (x.exp() <= upper)
        assert torch.equal(in_band(x, logp, divergence, (0.02, 0.1)), inside)
        exact = in_band(x.double(), logp.double(), divergence, (0.02, 0.1))
        assert (exact == inside).float().mean() > 0.999  # they may differ within 4 units of the edge


def test_binary_divergence_is_the_kl_of_two_bernoullis():
    p, q = 0.3, 0.45
    want = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    got = binary_divergence(torch.tensor(q / p).log().double(), torch.tensor(p).log().double(), KL)
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_dcpo_formula():
    p = torch.tensor([1e-3, 0.3, 0.64, 0.9], dtype=torch.float64)
    lower, upper = DCPO(0.16, 0.20)(p.log())
    # its own inequality |(r - 1) q| <= ε with q = r p holds with equality, or the bound is ½ / 10
    assert (((1 - lower) * lower * p - 0.16).abs()[2:] < 1e-12).all()
    assert lower[:2].tolist() == [0.5, 0.5]
    assert (((upper - 1) * upper * p - 0.20).abs()[1:] < 1e-12).all()
    assert upper[0] == 10


def test_shapes_dtypes_empty_scalar_and_permuted():
    for divergence in (KL, TV):
        for shape in ((), (0,), (2, 0, 3), (2, 3)):
            bounds = ratio_bounds(torch.zeros(shape), divergence)
            assert bounds.lower.shape == shape
            assert bounds.upper.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: ratio_bounds(x, KL, 0.0), ValueError, "radius.*positive.*0.0"),
        (lambda x: ratio_bounds(x, KL, -0.1), ValueError, "radius.*-0.1"),
        (lambda x: ratio_bounds(x, KL, math.nan), ValueError, "radius.*nan"),
        (lambda x: ratio_bounds(x, KL, math.inf), ValueError, "radius.*no-clip"),
        (lambda x: ratio_bounds(x, KL, True), TypeError, "radius"),
        (lambda x: ratio_bounds(x, KL, "0.05"), TypeError, "radius"),
        (lambda x: ratio_bounds(x, KL, torch.ones(5, dtype=torch.int64)), TypeError, "radius.*int64"),
        (lambda x: ratio_bounds(x, KL, torch.full((4,), 0.1)), ValueError, r"radius.*\(4,\).*\(5,\)"),
        (lambda x: ratio_bounds(x, KL, torch.full((2, 5), 0.1)), ValueError, "radius.*broadcast"),
        (lambda x: ratio_bounds(x, "hellinger2"), ValueError, "hellinger2.*kl, reverse_kl"),
        (lambda x: ratio_bounds(x, 3), TypeError, "divergence"),
        (lambda x: ratio_bounds(x.long()), TypeError, "int64.*float"),
        (lambda x: ratio_bounds([0.1]), TypeError, "list"),
        (lambda x: ratio_bounds(x, max_ratio=0.5), ValueError, "max_ratio.*0.5"),
        (lambda x: ratio_bounds(x, max_ratio="10"), TypeError, "max_ratio"),
        (lambda x: ratio_bounds(x, detla=0.5), TypeError, "detla"),
        (lambda x: Band(radius=-1.0), ValueError, "radius.*-1.0"),
        (lambda x: ratio_bounds(x, KL, (0.1, 0.1, 0.1)), ValueError, "lower, upper.*3 values"),
        (lambda x: in_band(x, x, KL, (0.1, -0.1)), ValueError, "radius.*-0.1"),
        (lambda x: Band(radius=(0.1, 0.1, 0.1)), ValueError, "lower, upper"),
        (lambda x: Band(relax=0.2), TypeError, "relax.*Clip"),
        (lambda x: Clip(1.2), ValueError, "low.*1.2"),
        (lambda x: Clip(0.2, -0.1), ValueError, "high.*-0.1"),
        (lambda x: DCPO(low=0), ValueError, "DCPO"),
        (lambda x: in_band(x[:2], x), ValueError, r"\(2,\).*\(5,\)"),
        (lambda x: alpha(math.inf), ValueError, "order"),
        (lambda x: FDivergence("x", 3), TypeError, "f must be a function"),
        (
            lambda x: FDivergence("x", lambda u: -(u - 1).square()),
            ValueError,
            "must be convex, but its slope falls at 1",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.full((5,), -1.0))


def test_compiles_to_one_graph():
    logp = torch.rand(64) * -8

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, y, radius):
        kl = Band(KL, 0.05, relax=Clip(0.2, 0.28))(x)
        tv = ratio_bounds(x, TV, radius, log=True)
        js = ratio_bounds(x, JS, radius)
        return *kl, *tv, *js, *DCPO()(x), in_band(y, x, HELLINGER, 0.05)

    def eager(x, y, radius):
        kl = Band(KL, 0.05, relax=Clip(0.2, 0.28))(x)
        tv = ratio_bounds(x, TV, radius, log=True)
        js = ratio_bounds(x, JS, radius)
        return *kl, *tv, *js, *DCPO()(x), in_band(y, x, HELLINGER, 0.05)

    y, radius = torch.randn(64) * 0.3, torch.full((64,), 0.05)
    for a, b in zip(compiled(logp, y, radius), eager(logp, y, radius), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiles_with_inductor():
    logp = torch.rand(300) * -8
    compiled = torch.compile(lambda x: ratio_bounds(x, KL, 0.05), fullgraph=True)
    for a, b in zip(compiled(logp), ratio_bounds(logp, KL, 0.05), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=1.2e-7)  # one unit in the last place of float32


def test_public_names_resolve():
    for name in bandpo.__all__:
        assert getattr(bandpo, name) is not None
    assert set(bandpo.__all__) <= set(dir(bandpo))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = bandpo.nonsense


def test_names_of_limits_of_alpha():
    assert alpha(0) is KL
    assert alpha(1) is REVERSE_KL
    logp = torch.linspace(-6, -0.01, 50, dtype=torch.float64)
    for a, other, factor in ((2, CHI2, 2.0), (0.5, HELLINGER, 0.5), (-1, NEYMAN, 2.0)):
        for x, y in zip(ratio_bounds(logp, alpha(a), 0.05), ratio_bounds(logp, other, 0.05 * factor), strict=True):
            assert torch.equal(x, y)
    for near, other in ((1e-7, KL), (1 + 1e-7, REVERSE_KL)):
        for x, y in zip(ratio_bounds(logp, alpha(near), 0.05), ratio_bounds(logp, other, 0.05), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
