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
        log_ratio: `log r`, any float tensor.
        advantages: A, a tensor that broadcasts to `log_ratio`.
        bounds: The interval of each token, or a bool tensor that is True where a token is inside its region.
        ratio: `exp(log_ratio)` where it has been computed already; None computes it.

    Returns:
        Bool tensor of the common shape.

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
    return ((advantages > 0) & (r > bounds.upper)) | ((advantages < 0) & (r < bounds.lower))
