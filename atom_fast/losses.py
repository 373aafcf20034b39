"""The ATOM loss as a module: equation 4 over the features of a network."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from torch import Tensor, nn

from .functional import _check_power, attention_matching_loss, mean_matching_loss
from .ops.matching import ClassGroups


class ATOMLoss(nn.Module):
    """Compute L = scale * (L_ATOM + mmd_weight * L_MMD), equations 3 and 4 of the ATOM paper.

    The real side is a constant, as in distillation: gradients flow to the synthetic side only. If a real tensor
    requires a gradient, a UserWarning is issued once per process.

    Args:
        spatial_power: p_s in [1, 16], or None without spatial attention (ATOM with channel attention only).
        channel_power: p_c in [1, 16], or None without channel attention (DataDAM).
        mmd_weight: lambda, the weight of the mean-embedding term: 0.01 at 32x32, 0.02 at 64x64 (Table 7).
        scale: multiplies the whole loss; 1 in the paper, 100 in DataDAM's released code.

    Raises:
        ValueError: a power is outside [1, 16], or a weight is negative.

    Example::

        loss = ATOMLoss()(real_features, synthetic_features, real_embedding, synthetic_embedding)
        loss.backward()
    """

    def __init__(
        self,
        spatial_power: float | None = 4.0,
        channel_power: float | None = 4.0,
        mmd_weight: float = 0.01,
        scale: float = 1.0,
    ):
        super().__init__()
        self.spatial_power = _check_power(spatial_power, "spatial_power")
        self.channel_power = _check_power(channel_power, "channel_power")
        for value, name in ((mmd_weight, "mmd_weight"), (scale, "scale")):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0; got {value!r}")
        self.mmd_weight = float(mmd_weight)
        self.scale = float(scale)

    def forward(
        self,
        real_features: Sequence[Tensor],
        synthetic_features: Sequence[Tensor],
        real_embedding: Tensor | None = None,
        synthetic_embedding: Tensor | None = None,
        real_labels: Tensor | None = None,
        synthetic_labels: Tensor | None = None,
        *,
        groups: ClassGroups | None = None,
    ) -> Tensor:
        """Compute the loss of one batch, or of one class if no labels are given.

        Args:
            real_features: layers 1 to L-1, one tensor [B, C, H, W] per layer; constants.
            synthetic_features: the same number of layers, [B', C, H, W].
            real_embedding: [B, D] the last layer's features, with ``synthetic_embedding`` [B', D]; None for both
                leaves the embedding term out.
            real_labels, synthetic_labels, groups: as in `attention_matching_loss`.

        Returns:
            A scalar; differentiable once, in reverse mode, with respect to the synthetic side.

        Raises:
            TypeError, ValueError, NotImplementedError: as `attention_matching_loss` and `mean_matching_loss`; also
                ValueError if the numbers of layers differ, nothing is given to match, or an embedding is given on one
                side only.
        """
        for features, name in ((real_features, "real_features"), (synthetic_features, "synthetic_features")):
            if isinstance(features, Tensor):
                raise TypeError(f"{name} must be a sequence of tensors, one per layer; got one tensor")
        if len(real_features) != len(synthetic_features):
            raise ValueError(
                f"real and synthetic features must have the same layers; got {len(real_features)} "
                f"and {len(synthetic_features)}"
            )
        if (real_embedding is None) != (synthetic_embedding is None):
            given = "real_embedding" if synthetic_embedding is None else "synthetic_embedding"
            raise ValueError(f"embeddings must be given for both sides or for neither; got only {given}")
        labels = {"real_labels": real_labels, "synthetic_labels": synthetic_labels, "groups": groups}
        terms = [
            attention_matching_loss(
                real, synthetic, spatial_power=self.spatial_power, channel_power=self.channel_power, **labels
            )
            for real, synthetic in zip(real_features, synthetic_features, strict=True)
        ]
        if real_embedding is not None and synthetic_embedding is not None:
            terms.append(self.mmd_weight * mean_matching_loss(real_embedding, synthetic_embedding, **labels))
        if not terms:
            raise ValueError("nothing to match: no layers and no embeddings were given")
        return self.scale * sum(terms[1:], terms[0])

    def extra_repr(self) -> str:
        return (
            f"spatial_power={self.spatial_power}, channel_power={self.channel_power}, "
            f"mmd_weight={self.mmd_weight}, scale={self.scale}"
        )
