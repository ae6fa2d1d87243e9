"""A second device for tests on a machine that has only a CPU: tensors with real numbers that claim to be elsewhere.

FakeTensor has no numbers, so that a loop whose next step depends on its samples cannot run on it, and its CUDA tensors have no
gradients in a CPU build of PyTorch. Here a tensor of the device `meta` carries a tensor of the CPU, on which each operation
runs. What CUDA would refuse is refused: an operation on tensors of both devices, apart from scalars and from copies, and a
generator of the other device. Results must be bit for bit those of the CPU.
"""

import contextlib
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bandpo.bounds import table

AWAY = "meta"
"""The device that the tensors claim to be on."""

CPU = torch.device("cpu")
_COPIES = ("copy_", "_to_copy")
_MAKERS = ("rand", "randn", "randint", "randperm", "bernoulli", "multinomial")


class Away(torch.Tensor):
    """A tensor that claims to be away, with its numbers in `inner`."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=AWAY,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Away({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, None)


def _run(func, args, kwargs, device):
    """Run an operation on the inner tensors, and check that all of them are on one device."""
    name = func.__name__.split(".")[0]
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    away = [t for t in tensors if isinstance(t, Away)]
    here = [t for t in tensors if not isinstance(t, Away)]
    if away and any(t.dim() for t in here) and name not in _COPIES:
        raise RuntimeError(f"{func}: tensors of two devices")
    target = kwargs.get("device")
    goes_away = bool(away) if target is None else torch.device(target).type == AWAY

    def inner(x):
        return x.inner if isinstance(x, Away) else CPU if isinstance(x, torch.device) else x

    out = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    if device is not None:
        made = not tensors and isinstance(out, torch.Tensor) and out.numel() > 0  # an empty one may stand for "none"
        device.seen(name, goes_away, made, kwargs)

    def outer(x):
        if not (isinstance(x, torch.Tensor) and goes_away):
            return x
        return next((t for t in away if t.inner is x), None) if any(t.inner is x for t in away) else Away(x)

    return tree_map(outer, out)


class _Dispatch(TorchDispatchMode):
    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.device)


class _Functions(TorchFunctionMode):
    """What PyTorch does for meta tensors before an operation is dispatched: there are no numbers to copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or CPU).type == AWAY:
            del kwargs["device"]
            return Away(func(*args, **kwargs))
        if func is torch.Tensor.tolist and isinstance(args[0], Away):
            return args[0].inner.tolist()
        return func(*args, **kwargs)


class PretendDevice:
    """What happened on the device.

    Args:
        strict: Whether a tensor that is made from nothing on the CPU is an error.
    """

    def __init__(self, strict=True):
        self.strict = strict
        self.operations = Counter()
        self.generators = []

    def seen(self, name, away, made, kwargs):
        """Note an operation, and refuse it where it would be wrong on a real device.

        Args:
            name: Name of the operation.
            away: Whether its result is on the device.
            made: Whether it makes a tensor from nothing.
            kwargs: Its keyword arguments.
        """
        generator = kwargs.get("generator")
        if generator is not None and any(g._cdata == generator._cdata for g in self.generators) != away:
            raise RuntimeError(f"{name}: the generator is on another device than its numbers")
        if generator is None and name in _MAKERS and away:
            raise RuntimeError(f"{name}: random numbers of no seed")
        if away:
            self.operations[name] += 1
        elif self.strict and made:
            raise RuntimeError(f"{name}: a tensor is made on the CPU")

    @contextlib.contextmanager
    def here(self):
        """A block that may make tensors on the CPU."""
        before, self.strict = self.strict, False
        try:
            yield
        finally:
            self.strict = before


@contextlib.contextmanager
def pretend_device(monkeypatch, strict=True):
    """A block in which `AWAY` is a device with numbers; `torch.Generator` makes generators for it."""
    device, real = PretendDevice(strict), torch.Generator

    def generator(where="cpu"):
        made = real()
        if torch.device(where).type == AWAY:
            device.generators.append(made)
        return made

    tables = table._constant_table

    def table_of(divergence, low, high, where):  # the library makes it in a thread of its own, which has no modes
        made = tables(divergence, low, high, "cpu")
        away = torch.device(where).type == AWAY and made is not None
        return made._replace(coefficients=Away(made.coefficients)) if away else made

    with monkeypatch.context() as patch, _Functions(), _Dispatch(device):
        patch.setattr(table, "_constant_table", table_of)
        patch.setattr(torch, "Generator", generator)
        yield device
