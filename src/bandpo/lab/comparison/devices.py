"""The device of a comparison: which names are allowed, whether the device is there, and its generators of random numbers."""

import torch

from bandpo._system.errors import RunError

SAMPLERS = ("eager", "graph")
"""How a new token is computed: operation by operation, or by a CUDA graph."""


def device_kind(name: str) -> str:
    """The kind of a device, `cpu` or `cuda`; two cards of a machine are one kind.

    Args:
        name: `cpu`, `cuda`, or `cuda:N` for the card number N.

    Raises:
        ValueError: If the lab has no path for the device.

    Examples:
        >>> device_kind("cuda:1")
        'cuda'
    """
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not number.isdecimal())):
        raise ValueError(
            f"device: got {name!r}; the lab runs on cpu, cuda, or one card as cuda:0, and has no path for any other device"
        )
    return kind


def find_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: If the lab has no path for the device.
        RunError: If this machine does not have it.

    Examples:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if device_kind(name) == "cuda":
        if not torch.cuda.is_available():
            raise RunError(
                f"device {name}: PyTorch {torch.__version__} finds no CUDA card on this machine; choose --device cpu, or "
                "install a CUDA build of PyTorch on a machine with such a card"
            )
        count, (_, _, number) = torch.cuda.device_count(), name.partition(":")
        if number and int(number) >= count:
            raise RunError(f"device {name}: this machine has {count} CUDA card(s), numbered from cuda:0")
    return torch.device(name)


def device_title(name: str) -> str:
    """A device's name for reports, for a card that of its model.

    Args:
        name: `cpu`, `cuda` or `cuda:N`.

    Examples:
        >>> device_title("cpu")
        'CPU'
    """
    return "CPU" if device_kind(name) == "cpu" else torch.cuda.get_device_name(torch.device(name))


def seeded(device: torch.device, seed: int) -> torch.Generator:
    """A generator of random numbers on a device. The same seed gives other numbers on another kind of device.

    Args:
        device: The device.
        seed: The seed.
    """
    return torch.Generator(device).manual_seed(seed)


def check_sampler(sampler: str, device: str) -> None:
    """Refuse a sampler that is unknown or that the device does not have.

    Args:
        sampler: A name in `SAMPLERS`.
        device: Name of the device.

    Raises:
        ValueError: If the sampler is unknown, or if a graph is asked for on another device than a CUDA card.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: got {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if sampler == "graph" and device_kind(device) != "cuda":
        raise ValueError(f"sampler graph is a CUDA graph: it needs --device cuda, not {device}; choose --sampler eager")
