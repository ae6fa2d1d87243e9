"""token_logprobs beside the two plain ways to the same numbers: CPU time by tokens, and peak memory in processes of their own.

The case of a real model (151,936 words, 1,024 features, 4,096 tokens) takes minutes and 10 GB; BANDPO_LARGE=1 runs it too.
"""

import os

import pytest
import torch

from bandpo import token_logprobs

VOCABULARY, FEATURES = 16_384, 512
WAYS = ("log_softmax(-1).gather", "gather - logsumexp")


def plain(hidden, weight, targets, way):
    logits = hidden @ weight.T
    if way == WAYS[0]:
        return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def inputs(tokens, vocabulary, features, trained):
    g = torch.Generator().manual_seed(0)
    hidden = torch.empty(tokens, features).normal_(generator=g).requires_grad_()
    weight = torch.empty(vocabulary, features).normal_(0, 0.02, generator=g).requires_grad_(trained)
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=g), torch.randn(tokens, generator=g)


@pytest.mark.parametrize(
    ("name", "memory", "trained", "sizes", "target"),
    [
        ("within a chunk", None, True, (32, 256, 1024), "<= 1.1"),
        ("all logits kept", float("inf"), True, (256, 1024, 2048), "<= 1.1"),
        ("no logits kept", 0, True, (256, 1024, 2048), "<= 1.34"),
        ("head without gradient, no logits kept", 0, False, (256, 1024, 2048), "<= 1.1"),
    ],
)
def test_time(name, memory, trained, sizes, target, compare, report):
    def make(tokens):
        hidden, weight, targets, up = inputs(tokens, VOCABULARY, FEATURES, trained)

        def step(logprobs):
            def run():
                hidden.grad = weight.grad = None
                (logprobs() * up).sum().backward()

            return run

        ours = {"ours": step(lambda: token_logprobs(hidden, weight, targets, memory=memory).logprobs)}
        return ours | {way: step(lambda way=way: plain(hidden, weight, targets, way)) for way in WAYS}

    what = f"token_logprobs, {name}"
    seconds = compare(
        f"{what} / {WAYS[0]}", make, sizes, target=target, rounds=3, note="forward and backward, by tokens"
    )
    other = [a / b for a, b in zip(seconds["ours"], seconds[WAYS[1]], strict=True)]
    report(
        f"{what} / {WAYS[1]}",
        other[-1],
        "x",
        target,
        sizes=list(sizes[: len(other)]),
        ratios=[round(x, 3) for x in other],
    )


MEMORY = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
from bandpo import token_logprobs
from bench_token_logprobs import inputs, plain
torch.set_num_threads(1)
way, memory, trained = sys.argv[2], sys.argv[3], sys.argv[4] == "True"
hidden, weight, targets, up = inputs(*map(int, sys.argv[5:]), trained)
START()
began = time.process_time()
if way == "ours":
    logprobs = token_logprobs(hidden, weight, targets, memory=None if memory == "None" else float(memory)).logprobs
else:
    logprobs = plain(hidden, weight, targets, way)
(logprobs * up).sum().backward()
RESULT = [time.process_time() - began, hidden.grad.norm().item()]
"""


def measured(peak_memory, way, memory, trained, shape):
    found, (seconds, norm) = peak_memory(MEMORY, os.path.dirname(__file__), way, memory, trained, *shape)
    return found, seconds, norm


def test_memory(peak_memory, report):
    sizes = (1024, 2048, 4096)
    cases = {"default": (None, True), "all logits kept": (float("inf"), True), "head without gradient": (None, False)}
    for name, (memory, trained) in cases.items():
        ratios = []
        for tokens in sizes:
            shape = (tokens, 65_536, 64)
            ours, _, norm = measured(peak_memory, "ours", memory, trained, shape)
            plains = [measured(peak_memory, way, None, trained, shape) for way in WAYS]
            assert abs(norm / plains[0][2] - 1) < 1e-4
            ratios.append([ours / p[0] for p in plains])
        for way, column in zip(WAYS, zip(*ratios, strict=True), strict=True):
            report(
                f"token_logprobs, {name} / {way}, peak memory",
                column[-1],
                "x",
                "" if name == "all logits kept" else "<= 0.125",
                "65,536 words, 64 features; gradients included, by tokens",
                sizes=list(sizes),
                ratios=[round(x, 3) for x in column],
            )


@pytest.mark.skipif(not os.environ.get("BANDPO_LARGE"), reason="takes minutes and 10 GB")
def test_large(peak_memory, report):
    shape = (4096, 151_936, 1024)
    plains = [measured(peak_memory, way, None, True, shape) for way in WAYS]
    for name, memory in (("default", None), ("all logits kept", float("inf"))):
        found = measured(peak_memory, "ours", memory, True, shape)
        for way, (size, seconds, norm) in zip(WAYS, plains, strict=True):
            assert abs(found[2] / norm - 1) < 1e-4
            what, note = f"token_logprobs at 4096 x 151936, {name} / {way}", "1,024 features, one run"
            report(f"{what}, time", found[1] / seconds, "x", "<= 1.1", note)
            more = f"{note}: {found[0] / 2**30:.2f} against {size / 2**30:.2f} GiB, gradients included"
            report(f"{what}, peak memory", found[0] / size, "x", "<= 0.125" if memory is None else "", more)
