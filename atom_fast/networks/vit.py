"""The small vision transformer of the distillation literature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atom_fast.networks.initialization import draw_parameters
from atom_fast.networks.layers import Dropout, check_image_size

PATCH = 4
WIDTH = 512
DEPTH = 6
HEADS = 8
HEAD_WIDTH = 64
MLP_WIDTH = 512
DROPOUT = 0.1


class _Attention(nn.Module):
    """Self-attention of normalised tokens, [B, T, WIDTH] -> the same."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.projection = nn.Linear(WIDTH, 3 * HEADS * HEAD_WIDTH, bias=False)
        self.output = nn.Linear(HEADS * HEAD_WIDTH, WIDTH)
        self.dropout = Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.projection(self.norm(x)).unflatten(2, (3, HEADS, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0))
        return self.dropout(self.output(attended.transpose(1, 2).flatten(2)))


class _Perceptron(nn.Module):
    """Two linear layers on each normalised token, [B, T, WIDTH] -> the same."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, MLP_WIDTH)
        self.outer = nn.Linear(MLP_WIDTH, WIDTH)
        self.inner_dropout = Dropout(DROPOUT)
        self.outer_dropout = Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer_dropout(self.outer(self.inner_dropout(F.gelu(self.inner(self.norm(x))))))


class ViT(nn.Module):
    """Patches of 4×4, six layers of width 512 with eight heads of 64 and an MLP of 512, dropout 0.1, a class token.

    Args:
        channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width in pixels, multiples of 4; one number for a square.

    Raises:
        ValueError: the image size does not fit.
    """

    def __init__(self, channels: int, num_classes: int, image_size: int | tuple[int, int]):
        super().__init__()
        height, width = check_image_size(image_size, PATCH, "ViT")
        self.patches = nn.Conv2d(channels, WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.empty(1, 1 + (height // PATCH) * (width // PATCH), WIDTH))
        self.dropout = Dropout(DROPOUT)
        self.layers = nn.ModuleList(module for _ in range(DEPTH) for module in (_Attention(), _Perceptron()))
        self.norm = nn.LayerNorm(WIDTH)
        self.embedding_size = WIDTH
        self.classifier = nn.Linear(WIDTH, num_classes)
        self.reset_parameters()

    def embed(self, x: Tensor) -> Tensor:
        """Return the class token after the last layer [B, embedding_size] of images [B, channels, H, W]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(len(x), -1, -1).to(tokens.dtype), tokens), 1)
        tokens = self.dropout(tokens + self.positions)
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return self.norm(tokens[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, channels, H, W]."""
        return self.classifier(self.embed(x))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new parameters in place; see :func:`~atom_fast.networks.initialization.draw_parameters`.

        From then on the masks of dropout also come from ``generator``.
        """
        draw_parameters(self, generator)
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generator = generator
