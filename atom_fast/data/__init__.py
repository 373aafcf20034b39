"""Data sets as uint8 tensors, preprocessing to model space, and class-wise sampling."""

from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import check_class_sizes, sample_class_indices
from atom_fast.data.sources import SOURCES, load_data
from atom_fast.data.whitening import Preprocessing, fit_preprocessing, real_image_gatherer

__all__ = [
    "SOURCES",
    "ImageData",
    "Preprocessing",
    "check_class_sizes",
    "fit_preprocessing",
    "load_data",
    "real_image_gatherer",
    "sample_class_indices",
]
