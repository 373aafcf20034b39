"""Networks that images are distilled with and evaluated on."""

from atom_fast.networks.convnet import ConvNet

__all__ = ["ConvNet"]
