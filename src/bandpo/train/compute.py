"""Device and precision of a run: chosen by the machine where the user has left them open, refused where they cannot be."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

SMALLEST_IN_BF16 = 4_000_000
"""Parameters from which bfloat16 is faster on a CPU that has instructions for it: below, casting takes longer than it saves.

Measured by the processor time of one thread with AVX-512 BF16, against float32: a training step takes 0.66 times as long with
4.2M parameters and sampling 0.9 times; with 0.9M it is 0.8 and 1.4 times.
"""

_CPU_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}
_CPU_FILE = Path("/proc/cpuinfo")
_FIRST_CUDA = (8, 0)
"""The lowest compute capability of NVIDIA GPUs with bfloat16 in hardware."""


class Machine(NamedTuple):
    """What a machine can compute with."""

    accelerator: str | None = None
    """Type of the accelerator in torch, such as cuda; None where there is none."""
    name: str = "the CPU"
    """Name of the device for messages."""
    bf16: bool = False
    """Whether the accelerator has bfloat16 in hardware."""
    cpu_bf16: str | None = None
    """The CPU's instructions for bfloat16; None where it has none."""


class Compute(NamedTuple):
    """The device and the precision of a run.

    Args:
        use_cpu: Whether it computes on the CPU.
        bf16: Whether it computes in bfloat16, with weights in float32.
        fp16: Whether it computes in float16, with weights in float32.
        line: What was chosen, why, and how to override it, in one line; None where the user has set device and precision.
    """

    use_cpu: bool
    bf16: bool
    fp16: bool
    line: str | None

    @property
    def options(self) -> dict[str, bool]:
        """The options of transformers' `TrainingArguments` that say it."""
        return {"use_cpu": self.use_cpu, "bf16": self.bf16, "fp16": self.fp16}

    @property
    def device(self) -> torch.device:
        """The device for torch."""
        if self.use_cpu:
            return torch.device("cpu")
        other = None if torch.cuda.is_available() else torch.accelerator.current_accelerator()
        return torch.device("cuda") if other is None else other


def this_machine() -> Machine:
    """What the machine of this process can compute with."""
    cpu = _cpu_bf16()
    if torch.cuda.is_available():
        amd = torch.version.hip is not None
        return Machine(
            "cuda", torch.cuda.get_device_name(), amd or torch.cuda.get_device_capability() >= _FIRST_CUDA, cpu
        )
    if torch.accelerator.is_available():
        from transformers.utils.import_utils import is_torch_bf16_gpu_available

        kind = str(torch.accelerator.current_accelerator()).partition(":")[0]
        return Machine(kind, f"the {kind} device", is_torch_bf16_gpu_available(), cpu)
    return Machine(cpu_bf16=cpu)


def choose(
    asked: Mapping[str, bool | None],
    size: Callable[[], int | None],
    machine: Machine,
    *,
    as_set: str = "as set",
    override: str = "--use_cpu, --bf16, --fp16",
) -> Compute:
    """Choose what the user has left open, and refuse what the machine cannot do.

    Args:
        asked: `use_cpu`, `bf16` and `fp16` as the user gave them; absent or None where not.
        size: Gives the number of parameters of the model, None where it is not known. Called only if the choice depends on it.
        machine: The machine.
        as_set: Why the precision is the one that was asked for, for the line.
        override: The options that override the choice, for the line.

    Returns:
        Device and precision. A GPU with bfloat16 computes in it, and a CPU does if that is faster. Weights stay in float32.

    Raises:
        ValueError: If the user asks for a device or a precision that the machine does not have.

    Examples:
        >>> choose({}, lambda: 135_000_000, Machine(cpu_bf16="AMX")).options
        {'use_cpu': True, 'bf16': True, 'fp16': False}
        >>> choose({"bf16": False}, lambda: None, Machine("cuda", "H100", bf16=True)).options
        {'use_cpu': False, 'bf16': False, 'fp16': False}
    """
    use_cpu, bf16, fp16 = (asked.get(name) for name in ("use_cpu", "bf16", "fp16"))
    if use_cpu is None and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        use_cpu = True  # the configuration of `accelerate launch` says so
    on_cpu = bool(use_cpu) or machine.accelerator is None
    where, why_there = ("the CPU", "there is no GPU" if use_cpu is None else "as set") if on_cpu else (machine.name, "")
    has_bf16 = machine.cpu_bf16 is not None if on_cpu else machine.bf16
    _refuse(use_cpu, bf16, fp16, machine)
    if bf16 is not None or fp16:
        chosen, why = bool(bf16), as_set
        if bf16 and not has_bf16:
            why += "; no instructions for it were found on this CPU, and then float32 is faster"
    elif not has_bf16:
        found_none = "no instructions for bfloat16 were found that torch uses"
        chosen, why = False, found_none if on_cpu else "it has no instructions for bfloat16"
    elif on_cpu:
        chosen, why = _pays(size(), str(machine.cpu_bf16))
    else:
        chosen, why = True, "it has bfloat16"
    precision = "float16" if fp16 else "bfloat16, with weights in float32" if chosen else "float32"
    place = f"{where} ({why_there})" if why_there else where
    line = f"computing on {place} in {precision} ({why}). Override: {override} true|false"
    is_set = use_cpu is not None and (bf16 is not None or bool(fp16))
    return Compute(on_cpu, chosen, bool(fp16), None if is_set else line)


def without_gpu(asked: Mapping[str, bool | None], machine: Machine) -> Compute | None:
    """The device and precision with which a dry run checks the rest of a job for a GPU, on a machine that has none.

    Args:
        asked: `use_cpu`, `bf16` and `fp16` as the user gave them; absent or None where not.
        machine: The machine.

    Returns:
        The CPU, in a precision that it has, with a line that says what was not checked. None where `choose` decides: the job
        asks for no GPU, or the machine has one.

    Examples:
        >>> without_gpu({"fp16": True}, Machine()).line
        'computing on a GPU in float16 (as set). fp16=True needs a GPU; not checked here, where there is none'
        >>> without_gpu({"bf16": True}, Machine()) is None
        True
    """
    use_cpu, bf16, fp16 = (asked.get(name) for name in ("use_cpu", "bf16", "fp16"))
    asks = [text for text, set_so in (("use_cpu=False", use_cpu is False), ("fp16=True", fp16)) if set_so]
    if machine.accelerator is not None or use_cpu or not asks or (bf16 and fp16):
        return None
    precision = "float16 (as set)" if fp16 else "the precision that it has" if bf16 is None else "float32 (as set)"
    precision = "bfloat16 (as set)" if bf16 else precision
    need = f"{' and '.join(asks)} {'need' if len(asks) > 1 else 'needs'} a GPU; not checked here, where there is none"
    return Compute(True, bool(bf16), False, f"computing on a GPU in {precision}. {need}")


def count_parameters(name: str, *, local: bool) -> int | None:
    """The number of parameters of a model, from its configuration alone; None where that cannot be read.

    Args:
        name: Hub name or folder of a causal LM, `wheel:NAME`, or a file of weights: of a file it is the least number, from
            its size.
        local: Download nothing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from bandpo.train import wheels

    path = Path(name)
    if name.startswith(wheels.PREFIX):
        known = wheels.WHEELS.get(name.removeprefix(wheels.PREFIX))
        return None if known is None else known.parameters
    if path.is_file():
        return path.stat().st_size // 4  # at most 32 bits each
    try:
        read, build = cast("Any", AutoConfig).from_pretrained, cast("Any", AutoModelForCausalLM).from_config
        config = read(name, trust_remote_code=False, local_files_only=local)
        with torch.device("meta"):
            model = cast("torch.nn.Module", build(config))
    except (OSError, ValueError, ImportError):  # what is wrong with it is said where it is loaded
        return None
    return sum(p.numel() for p in model.parameters())


def millions(count: int) -> str:
    """A number of parameters for a message.

    Args:
        count: The number.

    Examples:
        >>> millions(134_515_008), millions(3_085_938_688)
        ('135M', '3.1B')
    """
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def _refuse(use_cpu: bool | None, bf16: bool | None, fp16: bool | None, machine: Machine) -> None:
    on_cpu = bool(use_cpu) or machine.accelerator is None
    if use_cpu is False and on_cpu:
        raise ValueError(
            "use_cpu=False: there is no accelerator that torch can use (torch.cuda.is_available() is false; a CPU build of "
            "torch sees none); leave use_cpu out, or set it to true"
        )
    if fp16 and on_cpu:
        raise ValueError("fp16=True: a CPU cannot train in float16; set bf16: true, or leave fp16 out")
    if bf16 and not on_cpu and not machine.bf16:
        raise ValueError(
            f"bf16=True: {machine.name} has no bfloat16 (NVIDIA GPUs have it from compute capability 8.0 on); set fp16: true, "
            "or bf16: false for float32"
        )


def _pays(size: int | None, instructions: str) -> tuple[bool, str]:
    """Whether bfloat16 is faster on a CPU with these instructions, and why."""
    if size is None:
        return (
            False,
            f"the CPU has {instructions}, but the size of the model is not known; a large one is faster with bf16",
        )
    threshold = millions(SMALLEST_IN_BF16)
    if size < SMALLEST_IN_BF16:
        return False, f"the CPU has {instructions}, which is slower below {threshold} parameters: {millions(size)}"
    return True, f"the CPU has {instructions}, which is faster from {threshold} parameters on: {millions(size)}"


def _cpu_bf16() -> str | None:
    """The instructions of the CPU for bfloat16 that torch's matrix products use; None where Linux names none."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        lines = _CPU_FILE.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system than Linux
        return None
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set[str]())
    return next((name for flag, name in _CPU_FLAGS.items() if flag in flags), None)
