"""Part `loss`: `policy_loss`, forward and backward, of bandpo-kl beside grpo and beside the formula that TRL runs."""

import functools
from collections.abc import Callable

import torch
from measure import ON_GPU, Call, Part, Tokens, free, kernel_used, paired, peak_bytes

from bandpo import OBJECTIVES, policy_loss
from bandpo.losses import compiled
from formulas import grpo as formula

NAMES = ("bandpo-kl", "grpo")
AIM = "<= 1.05"


def run(part: Part) -> None:
    """Nothing waits; then times of the sizes."""
    waits(part)
    backend = "eager" if part.tiny else "inductor"
    fast = {name: compiled(backend=backend) for name in NAMES}
    fast_formula = torch.compile(formula, dynamic=True, backend=backend)
    for tokens in (2048,) if part.tiny else (1 << 20, 1 << 24):
        times(part, tokens, fast, fast_formula)
        free()


def step(b: Tokens, loss: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """One forward and backward pass."""

    def call() -> torch.Tensor | None:
        x = b.new.detach().requires_grad_()
        loss(x).backward()
        return x.grad

    return call


def ours(
    b: Tokens, name: str, function: Callable[..., tuple[torch.Tensor, object]] = policy_loss, **options: object
) -> Call:
    """Our loss as a step."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        given = {"logprobs": x, "old_logprobs": b.old, "advantages": b.advantages, "mask": b.mask}
        return function(**given, objective=OBJECTIVES[name], **options)[0]

    return step(b, loss)


def with_kernel(call: Call, used: bool) -> Call:
    """A call with the fused kernel, or without it."""

    @functools.wraps(call)
    def inner() -> object:
        with kernel_used(used):
            return call()

    return inner


def times(part: Part, tokens: int, fast: dict[str, Callable[..., tuple[torch.Tensor, object]]], fast_formula: Callable[..., tuple[torch.Tensor, object]]) -> None:  # fmt: skip  # noqa: E501
    """Fused, plain and compiled, with the metrics by default, in one paired comparison."""
    b = Tokens(tokens)
    at = f"{tokens >> 20}M tokens" if tokens >> 20 else f"{tokens} tokens"
    cases = {"formula": step(b, lambda x: formula(x, b)[0])}
    for name in NAMES:
        cases[f"{name}, fused"] = with_kernel(ours(b, name), True)
        cases[f"{name}, plain"] = with_kernel(ours(b, name), False)
    cases["bandpo-kl, fused, no metrics"] = with_kernel(ours(b, "bandpo-kl", metrics="none"), True)
    cases["bandpo-kl, fused, full metrics"] = with_kernel(ours(b, "bandpo-kl", metrics="full"), True)
    for name in NAMES:
        cases[f"{name}, compiled"] = ours(b, name, fast[name])
    cases["formula, compiled"] = step(b, lambda x: fast_formula(x, b)[0])
    for name, call in cases.items():
        call()
        if part.left() < 10 and not part.tiny and "compiled" in name:
            part.row(f"policy_loss, {at}", None, note="left out: the time of this part was spent while compiling")
            return
    close(part, at, cases)
    t = paired(cases, rounds=1 if part.tiny else 15, seconds=12)
    for name in cases:
        part.row(f"{name}, {at}", t[name] * 1e6, "µs", tokens=tokens)
    for a, c, aim in (
        ("bandpo-kl, fused", "grpo, fused", AIM), ("bandpo-kl, fused", "formula", AIM), ("grpo, fused", "formula", AIM),
        ("bandpo-kl, plain", "formula", ""), ("bandpo-kl, plain", "bandpo-kl, fused", ""),
        ("bandpo-kl, compiled", "grpo, compiled", AIM), ("bandpo-kl, compiled", "formula, compiled", AIM),
        ("bandpo-kl, compiled", "bandpo-kl, fused", ""),
        ("bandpo-kl, fused", "bandpo-kl, fused, no metrics", "<= 1.1" if tokens >= 1 << 24 else ""),
        ("bandpo-kl, fused, full metrics", "bandpo-kl, fused", ""),
    ):  # fmt: skip
        part.row(f"{a} / {c}, {at}", t.ratio(a, c), "x", aim, quartiles=t.quartiles(a, c), tokens=tokens)
    for name in ("bandpo-kl, fused", "bandpo-kl, plain", "formula"):
        found = peak_bytes(cases[name])
        if found is not None:
            part.row(f"{name}, {at}, peak memory", found / tokens, "bytes a token", tokens=tokens)


def close(part: Part, at: str, cases: dict[str, Call]) -> None:
    """The gradients of all ways to the same loss, relative to the largest of the formula's or of the plain path."""
    for name, against in (("grpo", "formula"), ("bandpo-kl", "bandpo-kl, plain")):
        want = cases[against]()
        assert isinstance(want, torch.Tensor)
        apart = {}
        for way in ("fused", "plain", "compiled"):
            found = cases[f"{name}, {way}"]()
            assert isinstance(found, torch.Tensor)
            apart[way] = float((found - want).norm() / want.norm())
        note = ", ".join(f"{way} {x:.2g}" for way, x in apart.items())
        part.row(
            f"gradient of {name}, {at}, distance from the {against}",
            max(apart.values()),
            "",
            "<= 0.001",
            note,
            exact=True,
        )


def waits(part: Part) -> None:
    """The loss with CUDA told to raise where the host would wait for it."""
    if not ON_GPU:
        part.row("calls in which the host waits", None, note="is asked on a GPU alone")
        return
    b, found = Tokens(1 << 16), []
    b.mask  # noqa: B018 (made before)
    for detail in ("none", "basic", "full"):
        for used in (True, False):
            for name in NAMES:
                call = with_kernel(ours(b, name, metrics=detail), used)
                call()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    call()
                except RuntimeError as error:
                    found.append(f"{name}, metrics={detail}, {'fused' if used else 'plain'}: {error}")
                finally:
                    torch.cuda.set_sync_debug_mode("default")
    part.row("calls in which the host waits", len(found), "", "<= 0", "; ".join(found)[:500], exact=True)
