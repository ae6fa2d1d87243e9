"""What a run needs and this machine does not have: packages and a GPU."""

import importlib.util
from collections.abc import Generator

from bandpo.train.compute import Machine
from bandpo.train.config import RunConfig, TrainerConfig


def missing(run: RunConfig, args: TrainerConfig, machine: Machine) -> str | None:
    """The first thing that the run needs and this machine does not have, with the fix; None where there is none."""
    return next(needs(run, args, machine), None)


def sampler_line(args: TrainerConfig, machine: Machine) -> str | None:
    """On a GPU, a line that says with what a run samples, and how to sample with vLLM; None elsewhere, or where it does.

    Args:
        args: TRL's part of the configuration.
        machine: The machine.
    """
    if machine.accelerator != "cuda" or getattr(args, "use_vllm", True) or args.use_cpu:
        return None
    installed = _installed("vllm")
    how = (
        "is installed: --use_vllm true uses it"
        if installed
        else "is not installed: pip install 'trl[vllm]', --use_vllm true"
    )
    return f"sampling with transformers. vLLM, which is faster for long completions, {how}"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def needs(run: RunConfig, args: TrainerConfig, machine: Machine) -> Generator[str]:
    """What the run needs and this machine does not have, each with the fix.

    Args:
        run: bandpo's part of the configuration, checked.
        args: TRL's part of the configuration, checked.
        machine: The machine.
    """
    if getattr(args, "use_vllm", False):
        if not _installed("vllm"):
            yield (
                "use_vllm=True needs vLLM: pip install 'trl[vllm]', or set use_vllm: false to sample with transformers, "
                "which is slower"
            )
        if machine.accelerator is None and getattr(args, "vllm_mode", "") == "colocate":
            yield "use_vllm=True with vllm_mode=colocate needs a GPU, and there is none: set use_vllm: false"
    if run.lora_rank and not _installed("peft"):
        yield f"lora_rank={run.lora_rank} needs peft: pip install peft"
