"""The rule of the trust region, written once: which tokens have left it on the side that their advantage pushes to."""

from torch import Tensor

from bandpo.bounds.band import RatioBounds


def outside(
    log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds | Tensor, *, ratio: Tensor | None = None
) -> Tensor:
    """Whether each token is outside the region on the side that its advantage pushes to.

    `A > 0` and `r > upper`, or `A < 0` and `r < lower` (arXiv:1707.06347, eq. 7): there PPO's clip has no gradient. A token
    of `A = 0` is never outside, and neither is one whose numbers are NaN.

    Args:
        log_ratio: `log r`, float, any shape.
        advantages: A, a tensor that broadcasts to `log_ratio`.
        bounds: The interval of each token, or a bool tensor that is True where a token is inside its region; both broadcast to
            `log_ratio`.
        ratio: `exp(log_ratio)`, the same shape, where it has been computed already; None computes it.

    Returns:
        Bool tensor of the shape that the arguments broadcast to.

    Examples:
        >>> import torch
        >>> edges = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> outside(torch.tensor([1.5, 1.5, 0.5]).log(), torch.tensor([1.0, -1.0, -1.0]), edges)
        tensor([ True, False,  True])
        >>> outside(torch.tensor([0.4, 0.4]), torch.tensor([1.0, -1.0]), torch.tensor([False, False]))
        tensor([ True, False])
    """
    if not isinstance(bounds, RatioBounds):
        return (((advantages > 0) & (log_ratio > 0)) | ((advantages < 0) & (log_ratio < 0))) & ~bounds
    r = log_ratio.exp() if ratio is None else ratio
    return past_the_edge(r, r.clamp(bounds.lower, bounds.upper), advantages) > 0


def past_the_edge(ratio: Tensor, clamped: Tensor, advantages: Tensor) -> Tensor:
    """How far each ratio is past the edge that its advantage pushes to: positive exactly where it is `outside`.

    One comparison in place of four, and no logic of bools, which torch's CPU kernels do slowly.

    Args:
        ratio: r, any shape.
        clamped: r clamped to its interval, the same shape.
        advantages: A, which broadcasts to it.

    Returns:
        `(r - clamped)·sign(A)`, in units of the ratio.

    Examples:
        >>> import torch
        >>> past_the_edge(torch.tensor([1.5, 1.5]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, -2.0]))
        tensor([ 0.5000, -0.5000])
    """
    return (ratio - clamped) * advantages.sign()
