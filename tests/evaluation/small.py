"""A data set that is small enough to check by brute force."""

import torch

from atom_fast.data.dataset import ImageData


def small_data(train=40, test=10, classes=3, size=8, channels=1, name="small"):
    generator = torch.Generator().manual_seed(0)

    def split(count):
        labels = torch.arange(count) % classes
        images = torch.randint(0, 100, (count, channels, size, size), generator=generator)
        bar = torch.arange(size) // (size // classes) == labels[:, None]
        return (images + 150 * bar[:, None, :, None]).to(torch.uint8), labels

    return ImageData.from_tensors(name, [f"class {k}" for k in range(classes)], *split(train), *split(test))
