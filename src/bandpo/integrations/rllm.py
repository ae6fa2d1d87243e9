"""The objectives in rLLM's verl backend, by its own name for a policy loss.

    export VERL_USE_EXTERNAL_MODULES=bandpo.integrations.rllm     # on every node, before `ray start` or the training script
    python train.py rllm.algorithm.loss_fn=bandpo ...             # or bandpo:NAME, a name of `bandpo objectives`

rLLM pins verl 0.8.0, which has no plug-ins, and does not forward variables whose names begin with VERL_ to its Ray workers: the
variable must be set in their own environment. A worker without it stops with "Unsupported loss mode: bandpo". A loss of a
single role (`estimator_map`) that the driver does not know is replaced by verl's own, with a warning, so set the variable for
the driver too. rLLM's Tinker backend accepts only Tinker's own losses by name and replaces any other with a warning, so bandpo
cannot be used there.

Everything else is in `bandpo.integrations.verl`, which this module registers.
"""

from bandpo.integrations.verl import BandPolicyLossConfig, loss, register

__all__ = ["BandPolicyLossConfig", "loss", "register"]
