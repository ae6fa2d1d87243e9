"""Steps of the loss in a form that torch's eager kernels do fast: masking by bits, a held difference, and known gradients.

Without `torch.compile` each operation is a pass over the tokens, and the passes differ: on a CPU, `torch.where` takes ten times
as long as an addition, and the backward pass of `torch.minimum` as long as thirty. Results are those of the plain forms, which
are used wherever torch traces or transforms the code (`torch.compile`, `torch.func`, fake tensors), and, for masks, on devices
where `where` is one launch like any other operation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_plain(x: Tensor) -> bool:
    """Whether nothing traces or transforms this tensor, so that an operation is done now and by hand.

    Not so under `torch.compile`, `torch.func`, forward-mode differentiation, or in a backward pass for several gradients at
    once (`is_grads_batched`).

    Args:
        x: Any tensor.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    torch_c = cast("Any", torch._C)  # type: ignore[attr-defined]
    transformed = torch_c._are_functorch_transforms_active() or torch_c._functorch.is_legacy_batchedtensor(x)
    return not transformed and cast("Any", forward_ad)._current_level < 0


class Fill:
    """Sets tensors to 0 where a mask is off, so that nothing there (NaN included) reaches a value or a gradient.

    On a CPU a number is kept or dropped by a bitwise `and` with all ones or zeros, which are made once for each mask.

    Args:
        mask: Bool, `(batch, time)`.

    Examples:
        >>> Fill(torch.tensor([[True, False]]))(torch.tensor([[1.0, torch.nan]]))
        tensor([[1., 0.]])
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._bits: dict[torch.dtype, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """`x`, and 0 where the mask is off; of the shape that the two broadcast to, with gradient.

        Args:
            x: Float, in a shape that broadcasts to the mask's.
        """
        if x.device.type != "cpu" or not (is_plain(x) and is_plain(self.mask)):
            return torch.where(self.mask, x, 0.0)
        bits = self._of(_BITS[x.dtype.itemsize])
        if x.requires_grad and torch.is_grad_enabled():
            return cast("Tensor", _Kept.apply(x, bits))  # type: ignore[no-untyped-call]
        return _and(x, bits)

    def difference(self, x: Tensor, y: Tensor, limit: float) -> Tensor:
        """`x - y` in the dtype of x, held within ±limit, where it has no gradient, and 0 where the mask is off.

        Args:
            x: Float32 or float64, of the mask's shape.
            y: The same, without gradient.
            limit: A positive number.
        """
        if x.device.type != "cpu" or not (is_plain(x) and is_plain(y) and is_plain(self.mask)):
            return torch.nn.functional.hardtanh(torch.where(self.mask, (x - y).to(x.dtype), 0.0), -limit, limit)
        bits = self._of(_BITS[x.dtype.itemsize])
        if x.requires_grad and torch.is_grad_enabled():
            return cast("Tensor", _Difference.apply(x, y, bits, limit))  # type: ignore[no-untyped-call]
        return _difference(x, y, bits, limit)

    def own(self, x: Tensor) -> Tensor:
        """The same for a tensor that nothing else uses, which is overwritten; without gradient.

        Args:
            x: Float, of the mask's shape.
        """
        if x.device.type != "cpu" or not (is_plain(x) and is_plain(self.mask)):
            return torch.where(self.mask, x, 0.0)
        bits = self._of(_BITS[x.dtype.itemsize])
        x.view(bits.dtype).bitwise_and_(bits)
        return x

    def _of(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._bits:  # all ones are the number -1
            self._bits[dtype] = self.mask.view(torch.int8).neg().to(dtype)
        return self._bits[dtype]


def _and(x: Tensor, bits: Tensor) -> Tensor:
    return (x.view(bits.dtype) & bits).view(x.dtype)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.shape = x.shape
        return _and(x, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (bits,) = ctx.saved_tensors
        gradient = cast("Tensor", grads[0])
        if is_plain(gradient):
            gradient = cast("Tensor", _Kept.apply(gradient, bits))  # type: ignore[no-untyped-call]
        else:
            gradient = torch.where(bits != 0, gradient, 0.0)
        return gradient.sum_to_size(ctx.shape), None


def _difference(x: Tensor, y: Tensor, bits: Tensor, limit: float) -> Tensor:
    found = (x - y).to(x.dtype)
    found.view(bits.dtype).bitwise_and_(bits)
    return found.clamp_(-limit, limit)


class _Difference(torch.autograd.Function):
    """One tensor for three steps: torch would keep the numbers from before the clamp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bits: Tensor, limit: float) -> Tensor:
        found = _difference(x, y, bits, limit)
        ctx.save_for_backward(found, bits)
        ctx.limit, ctx.dtype = limit, x.dtype
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found, bits = cast("tuple[Tensor, Tensor]", ctx.saved_tensors)
        gradient = cast("Tensor", grads[0])
        if torch.is_grad_enabled() or not is_plain(gradient):
            gradient = torch.where((bits != 0) & (found.detach().abs() < ctx.limit), gradient, 0.0)
        else:
            gradient = torch.ops.aten.hardtanh_backward(gradient.to(found.dtype), found, -ctx.limit, ctx.limit)
            gradient.view(bits.dtype).bitwise_and_(bits)
        return gradient.to(ctx.dtype), None, None, None


class _Sloped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plain: Callable[..., Tensor],
        of: tuple[Tensor, ...],
        value: Tensor,
        slope: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, slope, *of, *factors)  # which are let go after the backward pass, unlike a closure
        ctx.plain, ctx.inputs = plain, len(of)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, slope, *others = cast("tuple[Tensor, ...]", ctx.saved_tensors)
        of, factors = others[: ctx.inputs], others[ctx.inputs :]
        gradient = cast("Tensor", grads[0])
        if torch.is_grad_enabled():  # create_graph=True: the slope is a function of x as well
            (gradient,) = torch.autograd.grad(ctx.plain(x, *of), x, gradient, create_graph=True)
        else:
            for i, factor in enumerate(factors):  # the first product is ours, and takes the others
                gradient = gradient.mul_(factor) if i else gradient * factor
            gradient = gradient.sum_to_size(slope.shape)
            gradient = gradient.mul_(slope) if factors else gradient * slope
        return gradient, *(None,) * (4 + len(factors))


def with_slope(
    x: Tensor, plain: Callable[..., Tensor], value: Tensor, slope: Tensor, *factors: Tensor, of: tuple[Tensor, ...] = ()
) -> Tensor:
    """The value as a function of `x` whose derivative is known: the slope times the factors.

    Args:
        x: The variable, with gradient; for `is_plain` tensors only.
        plain: The function itself, of `x` and of the tensors in `of`, for second derivatives.
        value: The value at `x`, without gradient, in the shape that all arguments broadcast to.
        slope: The part of the derivative that belongs to `x`, of its shape.
        factors: The parts that may differ along a dimension in which `x` is repeated.
        of: What `plain` takes beside `x`, without gradient.

    Returns:
        A tensor equal to `value`.

    Examples:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> with_slope(x, torch.square, x.detach() ** 2, 2 * x.detach()).backward()
        >>> x.grad
        tensor([6.])
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return value
    return cast("Tensor", _Sloped.apply(x, plain, of, value, slope, *factors))  # type: ignore[no-untyped-call]


class ByHand(NamedTuple):
    """A surrogate and its derivative by the log-ratio, `A · slope · inside`."""

    value: Tensor
    """The value of each token."""
    slope: Tensor
    """The derivative over A where the token has one, in the shape of the ratio."""
    inside: Tensor
    """1 where the token keeps its gradient, and 0 where the surrogate takes it away; a float."""
    stopped: Tensor
    """The same as bool, True where it is taken away; False where A is 0."""


Slopes = Callable[..., ByHand]
"""A surrogate done by hand, from the ratio, the advantages, the bounds and the surrogate's own keywords."""
