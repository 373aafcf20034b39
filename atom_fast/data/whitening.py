"""Between pixels and model space: per-channel standardisation or ZCA whitening, fitted on the real training set."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.names import PREPROCESSINGS as KINDS

ZCA_EPS = 0.1  # added to every eigenvalue of the covariance: the value MTT and DataDAM whiten CIFAR with
_CHUNK = 4096  # images whitened at once: 50 MB of CIFAR in float32
_OVERSHOOT = 0.25  # by which cubic interpolation may leave [0, 1] at an edge


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Preprocessing:
    """The map from pixels x in [0, 1] to model space, and back. Made by :func:`fit_preprocessing`.

    - ``"standard"``: (x - mean) / std, per channel.
    - ``"zca"``: (x - zca_mean) · zca_matrix on flattened images, as MTT whitens.
    - ``"zca_standardized"``: the first, then the second, as DataDAM whitens.

    Attributes:
        mean: float32 [C], mean of x; absent for ``"zca"``.
        std: float32 [C], standard deviation of x; absent for ``"zca"``.
        zca_mean: float32 [C, H, W], mean of what is whitened; absent for ``"standard"``.
        zca_matrix: float32 [D, D] with D = C·H·W, symmetric; absent for ``"standard"``.
        zca_inverse: float32 [D, D], inverse of ``zca_matrix``; absent for ``"standard"``.
    """

    mean: Tensor | None = None
    std: Tensor | None = None
    zca_mean: Tensor | None = None
    zca_matrix: Tensor | None = None
    zca_inverse: Tensor | None = None

    def __post_init__(self) -> None:
        # x · scale + shift is everything but the matrix, so that a batch costs one elementwise pass and one product.
        if self.mean is not None:
            scale, shift = (1 / self.std)[:, None, None], (-self.mean / self.std)[:, None, None]
        else:
            scale, shift = torch.ones_like(self.zca_mean[:, :1, :1]), torch.zeros_like(self.zca_mean)
        if self.zca_mean is not None:
            shift = shift - self.zca_mean
        object.__setattr__(self, "_scale", scale)
        object.__setattr__(self, "_byte_scale", scale / 255)
        object.__setattr__(self, "_shift", shift)

    def __repr__(self) -> str:
        named = ", ".join(f"{name}={value!r}" for name, value in self.describe().items())
        return f"Preprocessing({named})"

    def describe(self) -> dict[str, object]:
        """The ``kind`` and, where it has them, the channels' ``mean`` and ``std`` to 6 digits, as plain values."""
        statistics = {"mean": self.mean, "std": self.std}
        rounded = {
            name: [round(value, 6) for value in tensor.tolist()]
            for name, tensor in statistics.items()
            if tensor is not None
        }
        return {"kind": self.kind, **rounded}

    @property
    def kind(self) -> str:
        """``"standard"``, ``"zca"`` or ``"zca_standardized"``."""
        if self.zca_matrix is None:
            return "standard"
        return "zca" if self.mean is None else "zca_standardized"

    @property
    def deviation(self) -> float:
        """Standard deviation of the training images in model space, over all their values: 1 unless they are whitened.

        Whitening takes less than the variance from directions that have little of it: CIFAR is left with 0.25.
        """
        if self.zca_matrix is None:
            return 1.0
        # Where the covariance has an eigenvalue s, the matrix has w = (s + eps)^-1/2, and leaves s w^2 = 1 - eps w^2.
        squares = torch.linalg.vector_norm(self.zca_matrix, dtype=torch.float64).item() ** 2
        variance = 1 - ZCA_EPS * squares / len(self.zca_matrix)
        return math.sqrt(variance) if variance > 1e-6 else 1.0  # of equal images nothing is left

    def to_model(self, images: Tensor) -> Tensor:
        """Pixels to model space, on the device of the images. For a single image, it is a transform of torchvision's.

        Args:
            images: uint8 from 0 to 255, or floating point in [0, 1]; [B, C, H, W], or one image [C, H, W].

        Returns:
            float32, of the same shape.

        Raises:
            ValueError: the images have another type or shape; or, on a CPU, they are floating point and not in [0, 1].
                On a GPU values are not checked, since reading them would wait for the device.
        """
        if images.dim() == 3:
            return self.to_model(images[None])[0]
        self._check_shape(images)
        if images.dtype == torch.uint8:
            model = images * self._byte_scale  # in float32, in one pass
        elif images.is_floating_point():
            _check_range(images)
            model = images.to(torch.float32) * self._scale
        else:
            raise ValueError(f"images must be uint8 or floating point in [0, 1]; got {images.dtype}")
        model.add_(self._shift)
        return model if self.zca_matrix is None else _apply(self.zca_matrix, model)

    def to_pixels(self, model: Tensor) -> Tensor:
        """Model space to pixels: float32 [B, C, H, W], or one image [C, H, W], to the same clamped to [0, 1].

        Raises:
            ValueError: the images have another shape or are not floating point.
        """
        if model.dim() == 3:
            return self.to_pixels(model[None])[0]
        self._check_shape(model)
        if not model.is_floating_point():
            raise ValueError(f"images in model space must be floating point; got {model.dtype}")
        model = model.to(torch.float32)
        if self.zca_inverse is not None:
            model = _apply(self.zca_inverse, model)
        return ((model - self._shift) / self._scale).clamp_(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, all that a file needs to hold; :meth:`from_tensors` is the way back."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Preprocessing:
        """Build from what :meth:`tensors` returned; other names in the dictionary are refused.

        Raises:
            ValueError: the names are those of no kind.
        """
        standard, zca = {"mean", "std"}, {"zca_mean", "zca_matrix", "zca_inverse"}
        if set(tensors) not in (standard, zca, standard | zca):
            raise ValueError(
                f"preprocessing needs {sorted(standard)}, {sorted(zca)} or all of them; got {sorted(tensors)}"
            )
        return cls(**tensors)

    def to(self, device: torch.device | str) -> Preprocessing:
        """The same map with its tensors on ``device``."""
        return Preprocessing(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def _check_shape(self, images: Tensor) -> None:
        expected = list(self._shift.shape) if self.zca_mean is not None else [len(self.mean), "H", "W"]
        fits = images.dim() == 4 and all(e in (n, "H", "W") for e, n in zip(expected, images.shape[1:], strict=True))
        if not fits:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"images must be [B, {sizes}], or one image [{sizes}]; got {list(images.shape)}")


def _check_range(pixels: Tensor) -> None:
    """Refuse floating-point images that are not in [0, 1], where that can be seen without waiting for a device."""
    if pixels.device.type != "cpu" or pixels.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (value.item() for value in pixels.aminmax())
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        raise ValueError(
            f"images must be uint8 from 0 to 255 or floating point in [0, 1]; got {pixels.dtype} from {low:g} to "
            f"{high:g}: divide by 255, or leave out an earlier normalisation"
        )


def _apply(matrix: Tensor, images: Tensor) -> Tensor:
    """Multiply every flattened image [D] by ``matrix`` [D, D]; the shape of ``images`` is kept."""
    return (images.flatten(1) @ matrix).view(images.shape)


def fit_preprocessing(train_images: Tensor, kind: str, *, progress: bool = True) -> Preprocessing:
    """Fit the map to model space on the real training set, and on nothing else.

    The fit runs on the CPU whatever the device of the images, so that every device sees the same whitening.

    Args:
        train_images: uint8 [N, C, H, W].
        kind: ``"standard"``, ``"zca"`` (kornia's ZCAWhitening, eps 0.1, on pixels in [0, 1]) or ``"zca_standardized"``
            (the same after mean and standard deviation).
        progress: say on standard error what is being fitted and how long it took.

    Returns:
        The map, on the device of ``train_images``.

    Raises:
        ValueError: the kind is none of the three, or the images are not uint8 [N, C, H, W].
        ImportError: ZCA is asked for and kornia cannot be imported.
    """
    if kind not in KINDS:
        raise ValueError(f"preprocessing must be one of {', '.join(KINDS)}; got {kind!r}")
    if train_images.dtype != torch.uint8 or train_images.dim() != 4 or train_images.numel() == 0:
        raise ValueError(
            f"training images must be uint8 [N, C, H, W] and not empty; "
            f"got {train_images.dtype} {list(train_images.shape)}"
        )
    images = train_images.cpu()
    statistics = {} if kind == "zca" else _channel_statistics(images)
    whitening = {} if kind == "standard" else _fit_zca(images, progress=progress, **statistics)
    return Preprocessing(**statistics, **whitening).to(train_images.device)


def _channel_statistics(images: Tensor) -> dict[str, Tensor]:
    """Mean and population standard deviation of each channel in [0, 1], exact; 1 where a channel is constant."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    frequencies = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = frequencies @ levels
    std = (frequencies * (levels - mean[:, None]).square()).sum(1).sqrt()
    std = torch.where((frequencies > 0).sum(1) > 1, std, 1.0)
    return {"mean": mean.float(), "std": std.float()}


def _fit_zca(
    images: Tensor, *, progress: bool, mean: Tensor | None = None, std: Tensor | None = None
) -> dict[str, Tensor]:
    """Whitening matrix, its inverse and the mean, by kornia; standardised first where a mean is given."""
    try:
        from kornia.enhance import ZCAWhitening
    except ImportError as error:
        raise ImportError(
            "ZCA whitening is fitted by kornia, which cannot be imported; `pip install kornia`, "
            "or use the preprocessing 'standard'"
        ) from error
    shape = images.shape[1:]
    size = shape.numel()
    if progress:
        print(f"ZCA: fitting {size} x {size} on {len(images)} training images ...", end="", file=sys.stderr, flush=True)
    started = time.monotonic()
    pixels = images.to(torch.float32).div_(255)
    if mean is not None:
        pixels.sub_(mean[:, None, None]).div_(std[:, None, None])
    zca = ZCAWhitening(dim=0, eps=ZCA_EPS, compute_inv=True).fit(pixels)
    if progress:
        print(f" {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    return {
        "zca_mean": zca.mean_vector.view(shape).contiguous(),
        "zca_matrix": zca.transform_matrix.contiguous(),
        "zca_inverse": zca.transform_inv.contiguous(),
    }


def real_image_gatherer(
    data: ImageData,
    preprocessing: Preprocessing,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    precision: str = "float32",
    progress: bool = True,
) -> Callable[[Tensor], Tensor]:
    """A function that fetches training images by index, in model space, ready for a network.

    On a GPU the images stay uint8 and each batch is preprocessed as it is fetched: memory is dear there and arithmetic
    cheap. On the CPU it is the other way round: whitening takes 19 MFLOP for each CIFAR image, a fifth of what the
    network then takes, so with ZCA the whole training set is whitened once, here, and kept as float32.

    Args:
        data: the real images.
        preprocessing: the map to model space, on the device of ``data``.
        memory_format: of the images returned: ``torch.contiguous_format`` or ``torch.channels_last``.
        precision: ``"float32"``, or ``"tf32"`` or ``"bfloat16"`` to whiten in TF32 on a GPU. In whitened CIFAR images
            its error is less than a tenth of what rounding pixels to 8 bits has left there, in the Euclidean norm.
        progress: show a progress bar on standard error while the training set is whitened.

    Returns:
        ``gather(indices)``: int64 of any shape, such as [K, R], on the device of ``data``, to float32 [K·R, C, H, W] in
        the order of ``indices.flatten()``. Nothing is read back to the host.
    """
    images = data.train_images
    if preprocessing.zca_matrix is not None and images.device.type == "cpu":
        kept = _WHITENED.get(preprocessing)
        if kept is None or kept[0] is not images:
            kept = images, _whitened_copy(images, preprocessing, progress=progress)
            _WHITENED[preprocessing] = kept
        images = kept[1]

    def gather(indices: Tensor) -> Tensor:
        batch = images.index_select(0, indices.flatten())
        if batch.dtype == torch.uint8:
            with _product_precision(precision):
                batch = preprocessing.to_model(batch)
        return batch.contiguous(memory_format=memory_format)

    return gather


@contextlib.contextmanager
def _product_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices on a GPU in float32, or in TF32 for any other ``precision``."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee" if precision == "float32" else "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


# Several distillations with one preprocessing, on a CPU, share the copy; it goes with the preprocessing.
_WHITENED: weakref.WeakKeyDictionary[Preprocessing, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()


def _whitened_copy(images: Tensor, preprocessing: Preprocessing, *, progress: bool) -> Tensor:
    """All images in model space, whitened in chunks: float32 [N, C, H, W]."""
    from tqdm import tqdm

    whitened = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    with tqdm(total=len(images), desc="ZCA: whitening", unit="image", disable=not progress) as bar:
        for source, target in zip(images.split(_CHUNK), whitened.split(_CHUNK), strict=True):
            target.copy_(preprocessing.to_model(source))
            bar.update(len(source))
    return whitened
