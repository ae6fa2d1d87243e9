"""`distributed_run.py` with FSDP2 on CPUs; run by `accelerate launch --config_file recipes/trl/fsdp2.yaml`.

accelerate shards models on accelerators alone: on CPUs it turns FSDP into DDP without a word. torch's FSDP2 itself runs over
gloo, so here accelerate is told that its CPU processes are of a kind that may be sharded. The run fails where nothing is.
"""

import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import distributed_run

_original = PartialState.__init__


def _init(self, *args, **kwargs):
    _original(self, *args, **kwargs)
    if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class Sharded(distributed_run.Fixed):
    def train(self, *args, **kwargs):
        out = super().train(*args, **kwargs)
        weights = list(self.model_wrapped.parameters())
        assert self.accelerator.is_fsdp2, self.accelerator.distributed_type
        assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in weights), "nothing is sharded"
        return out


if __name__ == "__main__":
    PartialState.__init__ = _init
    distributed_run.Fixed = Sharded
    distributed_run.main(Path(sys.argv[1]), Path(sys.argv[2]))
