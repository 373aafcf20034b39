"""What methods share that learn images by SGD: batches of real and synthetic images, and the update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atom_fast.data.augmentation import augment_stages, draw_stages
from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import sample_class_indices
from atom_fast.data.whitening import Preprocessing, real_image_gatherer
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.run import Run


class ImageRun(Run):
    """Synthetic images of all classes, learnt by SGD with momentum.

    Attributes:
        momentum: of the images' shape, the buffer of SGD.
        labels: int64 [K*ipc], the class of each image.
    """

    def __init__(
        self,
        config: DistillConfig,
        data: ImageData,
        preprocessing: Preprocessing,
        images: Tensor,
        *,
        names: Sequence[str] = ("loss",),
        weights: Sequence[float] = (1.0,),
        progress: bool = False,
    ):
        """Prepare the steps; see `Run` and `atom_fast.distillation.methods.make_run` for the arguments."""
        super().__init__(config, data, images, range(data.num_classes), names, weights)
        device, classes = self.images.device, data.num_classes
        self.momentum = torch.zeros_like(self.images)
        self.labels = torch.arange(classes, device=device).repeat_interleave(config.ipc)
        self._real_labels = torch.arange(classes, device=device).repeat_interleave(config.real_batch)
        self._gather_real = real_image_gatherer(
            data, preprocessing, memory_format=torch.channels_last, precision=config.precision, progress=progress
        )

    def _real_images(self) -> Tensor:
        """Draw ``real_batch`` real images of each class: [K*real_batch, C, H, W], class-major."""
        return self._gather_real(sample_class_indices(self.data, self.config.real_batch, self.generator))

    def _siamese(self, real: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor]:
        """Augment the real and the synthetic images of each class with the same operation and parameters."""
        drawn = draw_stages(self.data.num_classes, self.generator, strategy=self.config.augmentation)
        return augment_stages(real, drawn, self._real_labels), augment_stages(synthetic, drawn, self.labels)

    def _update(self, gradient: Tensor, decay: float = 1.0) -> None:
        """Take a step of SGD with momentum, at ``decay`` times the learning rate."""
        assert self.config.image_lr is not None  # a number in resolved settings
        descend(self.images, self.momentum, gradient, self.config.image_lr * decay, self.config.momentum)

    def state(self) -> dict[str, Tensor]:
        """Return images and momentum."""
        return {"images": self.images, "momentum": self.momentum}


def descend(value: Tensor, momentum: Tensor, gradient: Tensor, rate: float, factor: float) -> None:
    """Take a step of SGD with momentum, in place."""
    torch.add(gradient, momentum, alpha=factor, out=momentum)
    value.sub_(momentum, alpha=rate)
