"""token_logprobs against the plain path at a real vocabulary, each run in a process of its own: time and peak memory."""

import json
import statistics
import subprocess
import sys

VOCABULARY, FEATURES, TOKENS, ROUNDS = 151_936, 1024, 4096, 2

SCRIPT = """
import json, re, sys, time, torch
from bandpo import token_logprobs
torch.set_num_threads(1)
vocabulary, features, tokens = map(int, sys.argv[2:])
g = torch.Generator().manual_seed(0)
hidden = torch.empty(tokens, features).normal_(generator=g).requires_grad_()
weight = torch.empty(vocabulary, features).normal_(0, 0.02, generator=g).requires_grad_()
targets = torch.randint(vocabulary, (tokens,), generator=g)
# ru_maxrss would start from the parent's peak
peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
before, start = peak(), time.perf_counter()
if sys.argv[1] == "ours":
    logprobs = token_logprobs(hidden, weight, targets).logprobs
else:
    logits = hidden @ weight.T
    logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
logprobs.mean().backward()
print(json.dumps({"s": time.perf_counter() - start, "bytes": peak() - before, "norm": weight.grad.norm().item()}))
"""


def test_token_logprobs(report):
    results = {"ours": [], "plain": []}
    for _ in range(ROUNDS):
        for which, found in results.items():
            arguments = [which, *map(str, (VOCABULARY, FEATURES, TOKENS))]
            out = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
            found.append(json.loads(out.stdout))
    median = {k: {m: statistics.median(r[m] for r in v) for m in ("s", "bytes", "norm")} for k, v in results.items()}
    ours, plain = median["ours"], median["plain"]
    assert abs(ours["norm"] / plain["norm"] - 1) < 1e-4
    report(
        "token_logprobs / plain, peak extra memory",
        ours["bytes"] / plain["bytes"],
        "x",
        "<= 0.125",
        f"{ours['bytes'] / 2**30:.2f} against {plain['bytes'] / 2**30:.2f} GiB, the head's gradient included",
    )
    report(
        "token_logprobs / plain, forward and backward",
        ours["s"] / plain["s"],
        "x",
        "<= 1.15",
        f"{ours['s']:.1f} against {plain['s']:.1f} s",
    )
