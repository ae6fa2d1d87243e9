"""One rank of two with gloo: what `bapo` and `Balanced` choose and compute for this rank's half of a batch.

`python tests/two_ranks.py RANK RENDEZVOUS DATA OUT`: DATA is a file with the whole batch.
"""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from bandpo import OBJECTIVES, policy_loss
from bandpo.experimental import sum_over_ranks


def main(rank: int, rendezvous: str, data: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    whole = torch.load(data, weights_only=True)
    half = len(whole["mask"]) // 2
    mine = {name: x[rank * half : (rank + 1) * half] for name, x in whole.items()}
    plain = OBJECTIVES["bapo"]
    found = {}
    for name, bounds in (("alone", plain.bounds), ("together", replace(plain.bounds, reduce=sum_over_ranks))):
        new = mine["logprobs"].clone().requires_grad_()
        loss, _ = policy_loss(
            **{**mine, "logprobs": new}, objective=replace(plain, bounds=bounds), normalizer=whole["mask"].sum()
        )
        loss.backward()
        x = mine["logprobs"] - mine["old_logprobs"]
        edges = bounds(x, log_ratio=x, advantages=mine["advantages"].unsqueeze(1), mask=mine["mask"])
        found[name] = {"loss": loss.detach(), "gradient": new.grad, "edges": torch.stack([e[0, 0] for e in edges])}
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
