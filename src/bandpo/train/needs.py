"""What a run needs, and what of it this machine does not have; `bandpo train --dry_run` prints it, without a download."""

import importlib.util
from collections.abc import Generator
from pathlib import Path
from typing import Any

from bandpo.train.compute import Compute, Machine, count_parameters, millions
from bandpo.train.config import RunConfig, TrainerConfig

_GIB = 2**30


def described(run: RunConfig, args: TrainerConfig, compute: Compute, machine: Machine) -> list[str]:
    """The lines that a dry run prints before the configuration.

    Args:
        run: bandpo's part of the configuration, checked.
        args: TRL's part of the configuration, checked.
        compute: Device and precision of the run.
        machine: The machine.

    Raises:
        FileNotFoundError: If a dataset is named as a file, and there is none.
    """
    needs = [*_needs(run, args, machine)]
    return [
        "the configuration is valid; nothing was loaded, fetched or written",
        compute.line or f"computing on {'the CPU' if compute.use_cpu else machine.name}, in the precision that is set",
        *_model(run, args),
        *_data(run),
        *_rollout(run, args),
        *([] if (line := sampler_line(args, machine)) is None else [line]),
        *(f"this machine differs: {need}" for need in needs),
    ]


def missing(run: RunConfig, args: TrainerConfig, machine: Machine) -> str | None:
    """The first thing that the run needs and this machine does not have, with the fix; None where there is none."""
    return next(_needs(run, args, machine), None)


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


def _needs(run: RunConfig, args: TrainerConfig, machine: Machine) -> Generator[str]:
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


def _model(run: RunConfig, args: TrainerConfig) -> Generator[str]:
    """The size of the model and of what its training keeps, as far as its configuration is on this machine."""
    if run.model is None:
        yield "model: the built-in one of 0.20M parameters, warmed up on the task"
        return
    count = count_parameters(run.model, local=True)
    if count is None:
        yield f"model: {run.model}, whose configuration is not on this machine: it would be fetched, and its size is not known"
        return
    trained = "an adapter of it is trained" if run.lora_rank else "all of them are trained"
    yield f"model: {run.model}, {millions(count)} parameters; {trained}"
    # float32: weights; for all weights a gradient and the two moments of Adam as well; and the weights of the reference.
    reference = bool(getattr(args, "beta", 0)) and not run.lora_rank
    copies = (1 if run.lora_rank else 4) + reference
    yield (
        f"memory: {4 * count * copies / _GIB:.1f} GiB for weights{'' if run.lora_rank else ', gradients and Adam'}"
        f"{' and the reference' if reference else ''} in float32, divided among the processes if they are sharded, and the "
        "activations"
    )


def _data(run: RunConfig) -> Generator[str]:
    for option in ("dataset", "eval_dataset", "pairs"):
        name = getattr(run, option)
        if name is None:
            continue
        if Path(name).suffix in (".jsonl", ".json", ".parquet", ".csv"):
            if not Path(name).is_file():
                raise FileNotFoundError(f"dataset {name!r}: no such file")
            yield f"{option}: the file {name}"
        else:
            yield f"{option}: {name}, fetched from the Hub"


def _rollout(run: RunConfig, args: Any) -> Generator[str]:
    if run.method != "grpo":
        return
    completions, group = args.generation_batch_size, args.num_generations
    steps = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    longest = args.max_completion_length
    yield (
        f"a rollout with this number of processes: {completions // group} prompts x {group} completions"
        f"{f' of up to {longest} tokens' if longest else ''}, for {steps:g} optimiser steps"
    )
