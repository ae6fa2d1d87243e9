"""Part `kernel`: the Triton kernel beside the plain path, equal and timed, and beside a copy of as many bytes."""

import math

import torch
from measure import DEVICE, ON_GPU, Part, Tokens, captured, free, paired, wait

from bandpo import CHI2, HELLINGER, JS, KL, REVERSE_KL, TV, Band, Clip
from bandpo.bounds import outside
from bandpo.surrogates import clip
from bandpo.surrogates import kernel as fused

REGIONS = {
    "Clip(0.2, 0.28)": Clip(0.2, 0.28), "Clip(1, inf)": Clip(1.0, math.inf), "KL": Band(KL, 0.05), "TV": Band(TV, 0.05),
    "CHI2": Band(CHI2, (0.02, 0.3), max_ratio=None), "JS": Band(JS, 0.01, max_ratio=4.0),
    "reverse KL": Band(REVERSE_KL, 0.5), "Hellinger": Band(HELLINGER, 3.0, max_ratio=None),
}  # fmt: skip
TABLED = REGIONS["KL"]
AIM = ">= 0.8"
BYTES = fused.BYTES_PER_TOKEN


def run(part: Part) -> None:
    """Equal first; then times; then the sizes of a program; then more tokens than 32 bits can count."""
    for name, region in REGIONS.items():
        compare(part, name, region)
    special(part)
    for tokens in (4096,) if part.tiny else (1 << 20, 1 << 24, 1 << 28):
        if part.left() < 10 and not part.tiny:
            part.row(f"kernel at {tokens >> 20}M tokens", None, note="left out: the time of this part was spent")
            continue
        times(part, tokens)
        free()
    programs(part, 4096 if part.tiny else 1 << 24)
    huge(part)


def plain(b: Tokens, advantages: torch.Tensor, region: Band | Clip) -> tuple[torch.Tensor, ...]:
    """Value, gradient, bounds and who is outside by the plain path's operations."""
    new, old = (torch.where(b.valid, x.detach().float(), 0.0) for x in (b.new, b.old))
    bounds = region(old)
    log_ratio = (new - old).requires_grad_()
    value = clip(log_ratio, advantages, bounds)
    value = torch.where(b.valid, value, 0.0)
    (gradient,) = torch.autograd.grad(value.sum(), log_ratio)
    return (
        value.detach(),
        gradient,
        bounds.lower,
        bounds.upper,
        outside(log_ratio.detach(), advantages, bounds) & b.valid,
    )


def compare(part: Part, name: str, region: Band | Clip) -> None:
    """All dtypes, one advantage for each sequence and for each token, NaN where the mask is off."""
    tokens = 4096 if part.tiny else 1 << 22
    flips = tokens_in_all = 0
    worst = {"value": 0.0, "gradient": 0.0, "bounds": 0.0}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for per_token in (False, True):
            b = Tokens(tokens, dtype, seed=1)
            advantages = torch.randn_like(b.new, dtype=torch.float32) if per_token else b.advantages
            want = plain(b, advantages, region)
            x = b.new.masked_fill(~b.valid, math.nan).requires_grad_()
            found = fused.clipped_objective(x, b.old.masked_fill(~b.valid, -math.inf), advantages, b.valid, region)
            assert found is not None
            (gradient,) = torch.autograd.grad(found.value.sum(), x)
            wait()
            worst["value"] = max(worst["value"], _apart(found.value, want[0]))
            worst["gradient"] = max(worst["gradient"], _apart(gradient, want[1].to(dtype)))
            worst["bounds"] = max(worst["bounds"], *map(_apart, found.bounds, want[2:4]))
            flips += int((found.outside != want[4]).sum())
            assert int(found.sums[0]) == int(b.valid.sum()) and int(found.sums[1]) == int(found.outside.sum())
            tokens_in_all += tokens
    part.row(
        f"kernel = plain path, {name}, tokens judged otherwise", flips, "", "<= 0", exact=True, tokens=tokens_in_all
    )
    for what, x in worst.items():
        aim = {"value": "<= 1e-6", "gradient": "<= 0.004", "bounds": "<= 0"}[what]  # the gradient also in 16 bits
        part.row(f"kernel = plain path, {name}, {what}, largest relative distance", x, "", aim, exact=True)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest relative difference; equal infinities are no difference."""
    a, b = a.detach(), b.detach()
    same = a == b
    gap = ((a.float() - b.float()).abs() / b.float().abs().clamp_min(1e-6)).masked_fill(same, 0.0)
    return float(gap.max())


def special(part: Part) -> None:
    """NaN, impossible and certain tokens, whose bounds are those of the plain path, and an empty batch."""
    old = torch.tensor([[math.nan, -math.inf, -1.0, 1e-7, 0.0, -1e-38, -200.0, -3e38]], device=DEVICE)
    on, one = torch.ones_like(old, dtype=torch.bool), torch.ones(1, 1, device=DEVICE)
    found = fused.clipped_objective(torch.full_like(old, -0.5), old, one, on, TABLED)
    assert found is not None
    same = all(torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)) for a, b in zip(found.bounds, TABLED(old), strict=True))
    empty = fused.clipped_objective(old[:0], old[:0], one[:0], on[:0], TABLED)
    part.row(
        "kernel = plain path, NaN and impossible tokens", float(same and empty is not None), "", ">= 1", exact=True
    )


def times(part: Part, tokens: int) -> None:
    """The kernel, its parts, the plain path, the plain path compiled, and a copy that moves as many bytes."""
    b = Tokens(tokens)
    moved = torch.empty((2, BYTES // 2 * tokens), dtype=torch.uint8, device=DEVICE)
    moved[0].random_()

    def values() -> tuple[torch.Tensor, ...]:
        new, old = (torch.where(b.valid, x, 0.0) for x in (b.new, b.old))
        bounds = TABLED(old)
        return (
            clip(new - old, b.advantages, bounds),
            bounds.lower,
            bounds.upper,
            outside(new - old, b.advantages, bounds),
        )

    compiled = torch.compile(values, dynamic=True, backend="eager" if part.tiny else "inductor")
    given = b.new, b.old, b.advantages, b.valid
    calls = {
        "kernel": lambda: fused.clipped_objective(*given, TABLED),
        "kernel without sums": lambda: fused.clipped_objective(*given, TABLED, sums=False),
        "kernel of a fixed clip": lambda: fused.clipped_objective(*given, REGIONS["Clip(0.2, 0.28)"]),
        "plain": values, "compiled": compiled, "copy": lambda: moved[1].copy_(moved[0]),
    }  # fmt: skip
    with torch.no_grad():
        graphs = {name: captured(call) for name, call in calls.items()}
        t = paired({name: call for name, (call, _) in graphs.items()}, rounds=1 if part.tiny else 15, seconds=5)
    at = f"{tokens >> 20}M tokens" if tokens >> 20 else f"{tokens} tokens"
    in_cache = " (fits in the cache of the device, as the copy does)" if tokens <= 1 << 20 else ""
    for name in calls:
        alone = graphs[name][1]
        note = f"{'one CUDA graph' if alone else 'called from Python'}{in_cache}"
        part.row(f"{name}, {at}", t[name] * 1e6, "µs", "", note, tokens=tokens)
    rate = BYTES * tokens / t["copy"] / 1e9
    part.row(f"copy, {at}, bytes read and written", rate, "GB/s", tokens=tokens)
    for name in ("kernel", "kernel without sums", "kernel of a fixed clip"):
        note = f"{BYTES} bytes a token predicted; a copy of as many bytes over the kernel"
        more = {"quartiles": t.quartiles("copy", name), "tokens": tokens}
        part.row(
            f"{name}, {at}, share of the copy", t.ratio("copy", name), "", AIM if name == "kernel" else "", note, **more
        )
    for name in ("plain", "compiled"):
        note = "which has no gradient" + (": eager here" if part.tiny else "")
        part.row(f"{name} / kernel, {at}", t.ratio(name, "kernel"), "x", "", note, tokens=tokens)


def programs(part: Part, tokens: int) -> None:
    """Tokens and warps of one program."""
    b = Tokens(tokens)
    before = fused.BLOCK, fused.WARPS
    calls = {}
    choices = [(1024, 4)] if part.tiny else [(s, w) for s in (256, 512, 1024, 2048) for w in (2, 4, 8)]
    for size, warps in choices:

        def call(size: int = size, warps: int = warps) -> object:
            fused.BLOCK, fused.WARPS = size, warps
            return fused.clipped_objective(b.new, b.old, b.advantages, b.valid, TABLED)

        calls[f"{size} tokens, {warps} warps"] = captured(call)[0]
    t = paired(calls, rounds=1 if part.tiny else 9, seconds=5)
    fused.BLOCK, fused.WARPS = before
    now = f"{before[0]} tokens, {before[1]} warps"
    for name in calls:
        part.row(f"program of {name} / of {now}", t.ratio(name, now), "x", "", tokens=tokens)


def huge(part: Part) -> None:
    """More than 2^31 tokens: the last ones must be right."""
    tokens, needed = (1 << 31) + 1024, 60e9
    if not ON_GPU or torch.cuda.mem_get_info()[0] < needed:
        part.row("kernel at more than 2^31 tokens", None, note="left out: needs 60 GB on a GPU")
        return
    small = Tokens(1 << 16, torch.bfloat16)
    new = torch.empty(tokens // 1024, 1024, dtype=torch.bfloat16, device=DEVICE).fill_(-1.0)
    old, on = torch.full_like(new, -1.2), torch.ones(new.shape, dtype=torch.bool, device=DEVICE)
    advantages = torch.ones(len(new), 1, device=DEVICE)
    rows = len(small.new)
    new[-rows:], old[-rows:], advantages[-rows:] = small.new, small.old, small.advantages
    found = fused.clipped_objective(new, old, advantages, on, TABLED)
    small.valid = torch.ones_like(small.valid)
    want = fused.clipped_objective(small.new, small.old, small.advantages, small.valid, TABLED)
    assert found is not None and want is not None
    same = torch.equal(found.value[-rows:], want.value) and torch.equal(found.outside[-rows:], want.outside)
    part.row(
        "kernel at more than 2^31 tokens",
        float(same and found.sums[0] == tokens),
        "",
        ">= 1",
        exact=True,
        tokens=tokens,
    )
