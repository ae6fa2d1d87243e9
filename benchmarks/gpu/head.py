"""Part `head`: `token_logprobs` at a real vocabulary beside the plain head, and beside Liger's where it is installed."""

import importlib.util

import torch
from measure import DEVICE, Call, Part, free, paired, peak_bytes

from bandpo import token_logprobs

VOCABULARY, FEATURES = 151_936, 1024


def run(part: Part) -> None:
    """Training of the head and of the states below it, bf16, forward and backward."""
    vocabulary, features = (500, 16) if part.tiny else (VOCABULARY, FEATURES)
    for tokens in (32,) if part.tiny else (4096, 16_384):
        for dtype in (torch.bfloat16,) if tokens == 16_384 else (torch.bfloat16, torch.float32):
            if part.left() < 5:
                part.row(f"token_logprobs, {tokens} tokens, {dtype}", None, note="left out: the time was spent")
                continue
            measure(part, tokens, vocabulary, features, dtype)
            free()


def measure(part: Part, tokens: int, vocabulary: int, features: int, dtype: torch.dtype) -> None:
    """Time and peak memory of each way; one that does not fit is said so."""
    g = torch.Generator(device=DEVICE).manual_seed(0)
    hidden = torch.randn(tokens, features, generator=g, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, features, generator=g, device=DEVICE).mul_(0.02).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=g, device=DEVICE)
    up = torch.randn(tokens, generator=g, device=DEVICE)

    def plain() -> torch.Tensor:
        return (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    def pull(logprobs: torch.Tensor) -> None:
        hidden.grad = weight.grad = None
        (logprobs * up).sum().backward()

    calls: dict[str, Call] = {
        "ours": lambda: pull(token_logprobs(hidden, weight, targets).logprobs),
        "ours, all logits kept": lambda: pull(token_logprobs(hidden, weight, targets, memory=float("inf")).logprobs),
        "ours, no logits kept": lambda: pull(token_logprobs(hidden, weight, targets, memory=0).logprobs),
        "plain": lambda: pull(plain()),
        **_liger(hidden, weight, targets),
    }
    at = f"{tokens} x {vocabulary}, {str(dtype).removeprefix('torch.')}"
    memory = {}
    for name in list(calls):
        try:
            memory[name] = peak_bytes(calls[name])
        except torch.OutOfMemoryError:
            part.row(f"token_logprobs {name}, {at}", None, note="does not fit in the memory of the device")
            del calls[name]
            free()
    with torch.no_grad():
        gap = (token_logprobs(hidden, weight, targets).logprobs - plain()).abs().max() if "plain" in calls else None
    t = paired(calls, rounds=1 if part.tiny else 7, seconds=min(8.0, max(1.0, part.left() / 2)))
    for name in calls:
        used = memory[name]
        more = {} if used is None else {"peak_GiB": round(used / 2**30, 3)}
        part.row(f"token_logprobs {name}, {at}", t[name] * 1e3, "ms", "", "", **more)
    for other in [name for name in calls if not name.startswith("ours")]:
        for name in [name for name in calls if name.startswith("ours")]:
            aim = {"plain": "<= 1.34" if "no logits" in name else "<= 1.1"}.get(other, "")
            part.row(f"token_logprobs {name} / {other}, {at}", t.ratio(name, other), "x", aim, "time")
            a, b = memory[name], memory[other]
            if a and b:
                aim = "<= 0.5" if other == "plain" and "all" not in name else ""
                part.row(f"token_logprobs {name} / {other}, {at}, peak memory", a / b, "x", aim, "gradients included")
    if gap is not None:
        part.row(f"token_logprobs, {at}, largest distance from the plain one", float(gap), "nats")


def _liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Call]:
    """Its fused linear cross entropy: the sum over the tokens, with weights of 1, which is less than ours gives."""
    if DEVICE.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    head = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def call() -> None:
        hidden.grad = weight.grad = None
        head(weight, hidden, targets).backward()

    return {"liger": call}
