"""BatchNorm over a batch of which a call holds some classes only: other calls or processes hold the others.

Classes meet in BatchNorm through sums per channel alone: of the forward pass, mean and variance; of the backward pass,
two sums of the gradient. Within `joint_batch` the blocks sum over the classes of the call, gather these sums of all
classes, and go on with the totals, added in the order of the classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class JointBatch(NamedTuple):
    """What a call knows of the batch.

    Attributes:
        classes: number of classes in the call; its rows are class-major, equally many of each.
        gather: from values [classes, ...] of the call's classes to those of all classes [K, ...], in their order.
    """

    classes: int
    gather: Callable[[Tensor], Tensor]


_current: JointBatch | None = None


@contextlib.contextmanager
def joint_batch(batch: JointBatch | None) -> Iterator[None]:
    """Let the blocks within this context, and their backward passes, share BatchNorm's batch with other calls."""
    global _current
    before, _current = _current, batch
    try:
        yield
    finally:
        _current = before


def is_joint() -> bool:
    """Return True within `joint_batch`."""
    return _current is not None


def join_statistics(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance [C] over the batch, given the planes' [B, C]; may overwrite both arguments."""
    # Planes have one size, so the variance is the mean of their variances plus the variance of their means.
    if _current is None:
        mean = means.mean(0)
        return mean, variances.add_(means.sub_(mean).square_()).mean(0)
    means, variances = _by_class(means), _by_class(variances)
    mean = means.mean(1, keepdim=True)
    variance = variances.add_(means.sub_(mean).square_()).mean(1)
    class_means, class_variances = _current.gather(torch.stack((mean.squeeze(1), variance), 1)).unbind(1)
    mean = class_means.mean(0)
    return mean, (class_variances + (class_means - mean).square()).mean(0)


def join_sums(sums: Tensor) -> Tensor:
    """Return what the gradient of each row of the call takes from the batch: the mean of ``sums`` [B, ...] over it.

    A call may repeat a row, with a share of its gradient each. Its rows then have that share of a row's weight in the
    mean, and take it of the total.
    """
    if _current is None:
        return sums.mean(0)
    of_classes = _current.gather(_by_class(sums).sum(1))
    return of_classes.sum(0) / (len(of_classes) * (len(sums) // _current.classes))


def _by_class(rows: Tensor) -> Tensor:
    assert _current is not None
    return rows.unflatten(0, (_current.classes, -1))


class JointBatchNorm(torch.autograd.Function):
    """Normalise [B, C, H, W] over a joint batch, in PyTorch's operators; differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        variances, means = torch.var_mean(x, (2, 3), correction=0)
        mean, variance = join_statistics(means, variances)
        rstd = torch.rsqrt(variance + eps)[:, None, None]
        normalised = (x - mean[:, None, None]) * rstd
        ctx.save_for_backward(normalised, rstd)
        return normalised

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        normalised, rstd = ctx.saved_tensors
        sums = torch.stack((gradient.sum((2, 3)), (gradient * normalised).sum((2, 3))), 1)
        shift, scale = (join_sums(sums) / gradient[0, 0].numel())[..., None, None].unbind(0)
        return rstd * (gradient - shift - normalised * scale), None
