"""`policy_loss` beside the formula that TRL runs, and other objectives beside their own: time, operations, memory, compiled.

The formulas are those of `formulas.py`, written anew from the definitions, with the clip metrics that TRL logs. Value and
gradient of each are compared with ours before anything is timed. Forward and backward, one thread, the default metrics
included; the mask is the int64 that hosts hand over, for both.
"""

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bandpo import OBJECTIVES, in_band, policy_loss, ratio_bounds
from bandpo.losses import compiled
from bandpo.surrogates import TIS
from formulas import cispo, dual_clip, grpo, gspo, kl_cov, tis
from record import growth

ROWS, LENGTH = [16, 64, 256, 1024], 1024
ISSUE = 256  # rows of the aims
SIZES = f"sizes are sequences of {LENGTH} tokens"


class Batch:
    """Log-probs of three policies, advantages and a mask of `rows` x 1024 tokens."""

    def __init__(self, rows):
        g = torch.Generator().manual_seed(0)
        shape = (rows, LENGTH)
        self.old = -torch.rand(shape, generator=g) * 6
        self.new = (self.old + 0.2 * torch.randn(shape, generator=g)).clamp_max(-1e-6)
        self.rollout = (self.old + 0.05 * torch.randn(shape, generator=g)).clamp_max(-1e-6)
        self.advantages = torch.randn(rows, 1, generator=g)
        self.mask = (torch.rand(shape, generator=g) < 0.9).long()


FORMULAS = {"grpo": grpo, "gspo": gspo, "cispo": cispo, "dual-clip": dual_clip, "kl-cov": kl_cov, "grpo with TIS": tis}
OURS = {name: OBJECTIVES[name] for name in [*FORMULAS, "bandpo-kl"] if name in OBJECTIVES}
OURS["grpo with TIS"] = replace(OBJECTIVES["grpo"], correction=TIS(2.0))
TARGETS = {"grpo": "<= 1.2", "bandpo-kl": "<= 2"}


def ours(name, b, call=policy_loss, **options):
    """Our loss as a function of the log-probs."""
    needs = {"rollout_logprobs": b.rollout} if OURS[name].correction is not None else {}

    def loss(x):
        return call(
            logprobs=x,
            old_logprobs=b.old,
            advantages=b.advantages,
            mask=b.mask,
            objective=OURS[name],
            **needs,
            **options,
        )

    return loss


def step(loss, b):
    """One forward and backward pass, as a function without arguments."""

    def run():
        x = b.new.detach().requires_grad_()
        loss(x)[0].backward()
        return x.grad

    return run


def formula(name, b):
    return lambda x: FORMULAS.get(name, grpo)(x, b)


# ---- both give the same ----


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", FORMULAS)
def test_the_formula_is_the_objective(name):
    b = Batch(16)
    mine, plain = ours(name, b)(b.new), formula(name, b)(b.new)
    torch.testing.assert_close(mine[0], plain[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(step(ours(name, b), b)(), step(formula(name, b), b)(), rtol=1e-4, atol=1e-8)
    for theirs, name_ in {
        "low": "clip_fraction/low",
        "high": "clip_fraction/high",
        "region": "clip_fraction/any",
    }.items():
        if theirs in plain[1] and name != "gspo":  # whose fractions of ours count tokens, and TRL's sequences
            torch.testing.assert_close(mine[1][name_], plain[1][theirs], rtol=1e-4, atol=1e-6)


# ---- time ----


@pytest.mark.parametrize("name", OURS)
def test_eager(name, compare):
    def make(rows):
        b = Batch(rows)
        beside = name if name in FORMULAS else "grpo"
        return {"ours": step(ours(name, b), b), f"formula of {beside}": step(formula(name, b), b)}

    compare(f"policy_loss {name}, eager", make, ROWS, target=TARGETS.get(name, ""), at=ISSUE, note=SIZES)


@pytest.mark.parametrize("detail", ["none", "full"])
@pytest.mark.parametrize("name", TARGETS)
def test_other_metrics(name, detail, compare):
    def make(rows):
        b = Batch(rows)
        return {"ours": step(ours(name, b, metrics=detail), b), "formula of grpo": step(formula("grpo", b), b)}

    compare(f"policy_loss {name}, eager, metrics={detail}", make, ROWS[:3], at=ISSUE, note=SIZES)


# ---- operations and memory of one call ----


class Count(TorchDispatchMode):
    """Operations that reach the kernels: views, and allocations without a kernel, are counted apart."""

    def __init__(self):
        super().__init__()
        self.kernels, self.views = Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket._qualified_op_name.split("::")[-1]
        free = function.is_view or name in ("detach", "empty", "empty_like", "empty_strided", "new_empty")
        (self.views if free else self.kernels)[name] += 1
        return function(*arguments, **(named or {}))


def operations(run):
    run()
    with Count() as count:
        run()
    return count


def peak_bytes(run):
    """The most that one call has in use beyond what was there before, by torch's own allocator: the same in each run."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    changes = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for e in sorted(changes, key=lambda e: e.start_ns()):
        used += e.nbytes()
        peak = max(peak, used)
    return peak


CALLS = [*[(name, "basic") for name in OURS], *[(name, "full") for name in TARGETS]]


def called(name, detail):
    return name if detail == "basic" else f"{name} with metrics={detail}"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "detail"), CALLS)
def test_operations(name, detail, report):
    b = Batch(16)
    mine, plain = operations(step(ours(name, b, metrics=detail), b)), operations(step(formula(name, b), b))
    kernels, theirs = mine.kernels.total(), plain.kernels.total()
    waits = mine.kernels["_local_scalar_dense"]
    note = (
        f"{theirs} in the formula; ours has {mine.views.total()} views beside them; the host waits for {waits} values"
    )
    target = "<= 80" if name in TARGETS and detail == "basic" else ""
    report(f"policy_loss {called(name, detail)}, operations", kernels, "", target, note, exact=True)


@pytest.mark.parametrize(("name", "detail"), CALLS)
def test_memory(name, detail, report, quick):
    sizes = ROWS[:1] if quick else ROWS[:3]
    ratios, mine, plain = [], [], []
    for rows in sizes:
        b = Batch(rows)
        mine.append(peak_bytes(step(ours(name, b, metrics=detail), b)))
        plain.append(peak_bytes(step(formula(name, b), b)))
        ratios.append(mine[-1] / plain[-1])
    per_token = [x[-1] / sizes[-1] / LENGTH for x in (mine, plain)]
    note = f"{per_token[0]:.1f} against {per_token[1]:.1f} bytes a token, the gradient's 4 included; {SIZES}"
    slope = growth(sizes, mine)
    report(
        f"policy_loss {called(name, detail)}, peak memory",
        ratios[-1],
        "x",
        "<= 1.2" if name in TARGETS and detail == "basic" else "",
        note,
        exact=True,
        equivalent=f"formula of {name if name in FORMULAS else 'grpo'}",
        sizes=sizes,
        ratios=[round(r, 3) for r in ratios],
        growth=None if slope is None else round(slope, 2),
    )


# ---- compiled ----


def cpu_seconds():
    """Of this process and of the compilers that it ran."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def test_compiled(compare, paired, report):
    """What `compiled` makes, at three sizes with one graph; in CPU seconds of a compiler that remembers nothing."""
    steps = {name: {} for name in TARGETS}
    batches = {rows: Batch(rows) for rows in ROWS[1:]}
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        for name in TARGETS:
            fast = compiled()
            for rows, b in batches.items():
                steps[name][rows] = step(ours(name, b, fast), b)
            start = cpu_seconds()
            steps[name][ROWS[1]]()
            report(f"compiling {name}", cpu_seconds() - start, "s")
    for name in TARGETS:
        compare(
            f"policy_loss {name}, compiled",
            lambda rows, name=name: {
                "ours": steps[name][rows],
                "formula of grpo, eager": step(formula("grpo", batches[rows]), batches[rows]),
            },
            list(batches),
            target="<= 1",
            at=ISSUE,
            note=SIZES,
        )
    b = batches[1024]
    cases = {name: steps[name][1024] for name in TARGETS}
    cases["formula"] = step(torch.compile(formula("grpo", b), fullgraph=True), b)
    t = paired(cases)
    for what, pair, target in (
        ("policy_loss compiled, bandpo-kl / grpo", ("bandpo-kl", "grpo"), "<= 1.25"),
        ("policy_loss compiled, grpo / the formula of grpo compiled", ("grpo", "formula"), ""),
    ):
        report(what, t.ratio(*pair), "x", target, f"{ROWS[-1]} sequences", quartiles=t.quartiles(*pair))


# ---- the gradient of the clip alone ----


def test_mask_surrogate(compare):
    """Membership instead of bounds."""

    def make(tokens):
        g = torch.Generator().manual_seed(0)
        logp = -torch.rand(tokens, generator=g) * 6
        log_ratio = 0.2 * torch.randn(tokens, generator=g)
        radius = torch.full_like(logp, 0.05)
        return {
            "ours": lambda: in_band(log_ratio, logp, "js", radius),
            "bounds": lambda: ratio_bounds(logp, "js", radius),
        }

    what = "bounds / membership with a tensor radius, JS, eager"
    compare(what, make, [1 << 12, 1 << 14, 1 << 16], rounds=3, speedup=True)
