"""The objectives in rLLM's verl backend, by its own name for a policy loss.

    export VERL_USE_EXTERNAL_MODULES=bandpo.integrations.rllm     # on every node, before `ray start` or the training script
    python train.py rllm.algorithm.loss_fn=bandpo ...             # or bandpo:NAME, a name of `bandpo objectives`

rLLM pins verl 0.8.0, which has no plug-ins, and forwards no variable whose name begins with VERL_ to its Ray workers: they
must find it in their own environment. A worker that has not got it stops ("Unsupported loss mode: bandpo"). The loss of a
single role (`estimator_map`) that the driver does not know is replaced by verl's own, with a warning, so set the variable
there too. rLLM's Tinker backend takes Tinker's own losses by name and replaces any other with a warning: bandpo cannot be used
in it.

Everything else is `bandpo.integrations.verl`, which this module registers.
"""

from bandpo.integrations.verl import BandPolicyLossConfig, loss, register

__all__ = ["BandPolicyLossConfig", "loss", "register"]
