"""Map pixels to model space and back: per-channel standardisation or ZCA whitening, fitted on the training set."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.data.placement import image_reader
from atom_fast.names import PREPROCESSINGS as KINDS

ZCA_EPS = 0.1  # added to every eigenvalue of the covariance, as MTT and DataDAM do for CIFAR
# Values of an image, those of 64x64 in colour: its matrices have 600 MB each and take minutes to fit, time that grows
# with the sixth power of the side. At 128x128 they have 10 GB each.
WHITENED_VALUES = 3 * 64 * 64
_CHUNK = 4096  # images per matrix product: 50 MB of CIFAR in float32
_FITTED_AT_ONCE = 2**31  # values that kornia fits ZCA to, 8.6 GB in float32; more are fitted in chunks
_OVERSHOOT = 0.25  # cubic interpolation leaves [0, 1] by up to this much at an edge


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Preprocessing:
    """Map pixels x in [0, 1] to model space, and back. Made by :func:`fit_preprocessing`.

    - ``"standard"``: (x - mean) / std, per channel.
    - ``"zca"``: (x - zca_mean) · zca_matrix on flattened images, as in MTT's public code.
    - ``"zca_standardized"``: ``"standard"``, then ``"zca"``, as in DataDAM's public code.

    Attributes:
        mean: float32 [C], mean of x; None for ``"zca"``.
        std: float32 [C], standard deviation of x; None for ``"zca"``.
        zca_mean: float32 [C, H, W], mean of the images that the matrix is applied to; None for ``"standard"``.
        zca_matrix: float32 [D, D] with D = C·H·W, symmetric; None for ``"standard"``.
        zca_inverse: float32 [D, D], inverse of ``zca_matrix``; None for ``"standard"``.

    Both matrices may be on the CPU: they are moved when they are used, and no step of a distillation uses them.
    """

    mean: Tensor | None = None
    std: Tensor | None = None
    zca_mean: Tensor | None = None
    zca_matrix: Tensor | None = None
    zca_inverse: Tensor | None = None

    def __post_init__(self) -> None:
        # x · scale + shift is the map without the matrix: one elementwise pass and one product per batch.
        if self.mean is not None and self.std is not None:
            scale, shift = self.std.reciprocal()[:, None, None], (-self.mean / self.std)[:, None, None]
            if self.zca_mean is not None:
                shift = shift - self.zca_mean
        elif self.zca_mean is not None:
            scale, shift = torch.ones_like(self.zca_mean[:, :1, :1]), -self.zca_mean
        else:
            raise ValueError("Preprocessing needs mean and std, or zca_mean, zca_matrix and zca_inverse")
        object.__setattr__(self, "_scale", scale)
        object.__setattr__(self, "_byte_scale", scale / 255)
        object.__setattr__(self, "_shift", shift)

    def __repr__(self) -> str:
        named = ", ".join(f"{name}={value!r}" for name, value in self.describe().items())
        return f"Preprocessing({named})"

    def describe(self) -> dict[str, object]:
        """Return ``kind`` and, if present, ``mean`` and ``std`` rounded to 6 digits, as plain Python values."""
        statistics = {"mean": self.mean, "std": self.std}
        rounded = {
            name: [round(value, 6) for value in tensor.tolist()]
            for name, tensor in statistics.items()
            if tensor is not None
        }
        return {"kind": self.kind, **rounded}

    @property
    def kind(self) -> str:
        """Kind of the map: ``"standard"``, ``"zca"`` or ``"zca_standardized"``."""
        if self.zca_matrix is None:
            return "standard"
        return "zca" if self.mean is None else "zca_standardized"

    @property
    def deviation(self) -> float:
        """Standard deviation of all values of the training images in model space: 1 unless they are whitened.

        Because of ``ZCA_EPS`` whitening leaves directions of small variance below 1: CIFAR has 0.25.
        """
        if self.zca_matrix is None:
            return 1.0
        # For an eigenvalue s of the covariance the matrix has w = (s + eps)^-1/2: the variance is s w^2 = 1 - eps w^2.
        squares = torch.linalg.vector_norm(self.zca_matrix, dtype=torch.float64).item() ** 2
        variance = 1 - ZCA_EPS * squares / len(self.zca_matrix)
        return math.sqrt(variance) if variance > 1e-6 else 1.0  # 0 if all training images are equal

    def to_model(self, images: Tensor) -> Tensor:
        """Map pixels to model space, on the device of the images. It can serve as a torchvision transform.

        Args:
            images: uint8 from 0 to 255, or floating point in [0, 1]; [B, C, H, W], or one image [C, H, W].

        Returns:
            float32 of the same shape.

        Raises:
            ValueError: the images have another type or shape; or, on a CPU, they are floating point and not in [0, 1].
                On a GPU values are not checked, because reading them would wait for the device.
        """
        if images.dim() == 3:
            return self.to_model(images[None])[0]
        self._check_shape(images)
        if images.dtype == torch.uint8:
            model = images * self._byte_scale  # converts to float32 in the same pass
        elif images.is_floating_point():
            _check_range(images)
            model = images.to(torch.float32) * self._scale
        else:
            raise ValueError(f"images must be uint8 or floating point in [0, 1]; got {images.dtype}")
        model.add_(self._shift)
        return model if self.zca_matrix is None else _apply(self.zca_matrix, model)

    def to_pixels(self, model: Tensor) -> Tensor:
        """Map model space to pixels.

        Args:
            model: floating point [B, C, H, W], or one image [C, H, W].

        Returns:
            float32 of the same shape, clamped to [0, 1].

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
        """Return the tensors by name, to be saved; :meth:`from_tensors` is the inverse."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Preprocessing:
        """Build the map from the result of :meth:`tensors`.

        Raises:
            ValueError: a tensor is missing or its name is unknown.
        """
        standard, zca = {"mean", "std"}, {"zca_mean", "zca_matrix", "zca_inverse"}
        if set(tensors) not in (standard, zca, standard | zca):
            raise ValueError(
                f"preprocessing needs {sorted(standard)}, {sorted(zca)} or all of them; got {sorted(tensors)}"
            )
        return cls(**tensors)

    def to(self, device: torch.device | str) -> Preprocessing:
        """Return the same map with its tensors on ``device``, except the matrices, which are kept on the CPU."""
        kept = ("zca_matrix", "zca_inverse")
        moved = {name: tensor.to("cpu" if name in kept else device) for name, tensor in self.tensors().items()}
        return Preprocessing(**moved)

    def _check_shape(self, images: Tensor) -> None:
        expected = list(self._shift.shape) if self.zca_mean is not None else [len(self._scale), "H", "W"]
        fits = images.dim() == 4 and all(e in (n, "H", "W") for e, n in zip(expected, images.shape[1:], strict=True))
        if not fits:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"images must be [B, {sizes}], or one image [{sizes}]; got {list(images.shape)}")


def _check_range(pixels: Tensor) -> None:
    """Raise ValueError for floating-point images outside [0, 1], on a CPU only: reading a GPU would wait for it."""
    if pixels.device.type != "cpu" or pixels.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (value.item() for value in pixels.aminmax())
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        raise ValueError(
            f"images must be uint8 from 0 to 255 or floating point in [0, 1]; got {pixels.dtype} from {low:g} to "
            f"{high:g}: divide by 255, or leave out an earlier normalisation"
        )


def _apply(matrix: Tensor, images: Tensor) -> Tensor:
    """Multiply every flattened image [D] by ``matrix`` [D, D]; return the shape of ``images``."""
    return (images.flatten(1) @ matrix.to(images.device)).view(images.shape)


def can_whiten(image_shape: Sequence[int]) -> bool:
    """Return True if images (C, H, W) are small enough to be whitened."""
    return math.prod(image_shape) <= WHITENED_VALUES


def check_whitening(kind: str, image_shape: Sequence[int]) -> None:
    """Check that images are small enough for the matrices of a kind of preprocessing.

    Args:
        kind: as in `fit_preprocessing`.
        image_shape: (C, H, W).

    Raises:
        ValueError: ``kind`` whitens and an image has more than ``WHITENED_VALUES`` values; the message says what to
            take instead.
    """
    values = math.prod(image_shape)
    if kind != "standard" and not can_whiten(image_shape):
        raise ValueError(
            f"preprocessing {kind!r} is accepted for up to {WHITENED_VALUES} values per image (64x64 in colour); "
            f"images {list(image_shape)} have {values}, whose two matrices take {8 * values**2 / 1e9:.0f} GB; "
            "use preprocessing 'standard' (--preprocessing standard)"
        )


def fit_preprocessing(train_images: Tensor, kind: str, *, progress: bool = True) -> Preprocessing:
    """Fit the map to model space on the real training images.

    The fit always runs on the CPU, so that every device uses the same whitening.

    Args:
        train_images: uint8 [N, C, H, W].
        kind: ``"standard"``, ``"zca"`` (kornia's ZCAWhitening, eps 0.1, on pixels in [0, 1]) or ``"zca_standardized"``
            (the same on standardised pixels).
        progress: report the ZCA fit and its time on standard error.

    Returns:
        The map, on the device of ``train_images``.

    Raises:
        ValueError: ``kind`` is none of the three, the images are not uint8 [N, C, H, W], or they are too large for it
            (`check_whitening`).
        ImportError: ``kind`` needs kornia, which cannot be imported.
    """
    if kind not in KINDS:
        raise ValueError(f"preprocessing must be one of {', '.join(KINDS)}; got {kind!r}")
    if train_images.dtype != torch.uint8 or train_images.dim() != 4 or train_images.numel() == 0:
        raise ValueError(
            f"training images must be uint8 [N, C, H, W] and not empty; "
            f"got {train_images.dtype} {list(train_images.shape)}"
        )
    check_whitening(kind, train_images.shape[1:])
    images = train_images.cpu()
    statistics = {} if kind == "zca" else _channel_statistics(images)
    whitening = {} if kind == "standard" else _fit_zca(images, progress=progress, **statistics)
    return Preprocessing(**statistics, **whitening).to(train_images.device)


def _channel_statistics(images: Tensor) -> dict[str, Tensor]:
    """Compute mean and population standard deviation (1 if constant) of each channel in [0, 1], from histograms."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for some in images.split(_CHUNK):
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in some.unbind(1)])
    counts = counts.double()
    frequencies = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = frequencies @ levels
    std = (frequencies * (levels - mean[:, None]).square()).sum(1).sqrt()
    std = torch.where((frequencies > 0).sum(1) > 1, std, 1.0)
    return {"mean": mean.float(), "std": std.float()}


def _fit_zca(
    images: Tensor, *, progress: bool, mean: Tensor | None = None, std: Tensor | None = None
) -> dict[str, Tensor]:
    """Fit kornia's whitening matrix, its inverse and the mean, on standardised pixels if ``mean`` is given."""
    try:
        from kornia.enhance import ZCAWhitening
    except ImportError as error:
        raise ImportError(
            "ZCA whitening is fitted by kornia, which cannot be imported; `pip install kornia`, "
            "or use preprocessing='standard' (--preprocessing standard)"
        ) from error
    shape = images.shape[1:]
    size = shape.numel()
    if progress:
        print(f"ZCA: fitting {size} x {size} on {len(images)} training images ...", end="", file=sys.stderr, flush=True)
    started = time.monotonic()

    def unwhitened(some: Tensor) -> Tensor:
        pixels = some.to(torch.float32).div_(255)
        if mean is not None and std is not None:
            pixels.sub_(mean[:, None, None]).div_(std[:, None, None])
        return pixels

    if images.numel() <= _FITTED_AT_ONCE:
        zca = ZCAWhitening(dim=0, eps=ZCA_EPS, compute_inv=True).fit(unwhitened(images))
        centre, matrix, inverse = zca.mean_vector, zca.transform_matrix, zca.transform_inv
    else:
        centre, matrix, inverse = _zca_of_chunks(images.split(_CHUNK), unwhitened, progress=progress)
    if progress:
        print(f" {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    return {
        "zca_mean": centre.view(shape).contiguous(),
        "zca_matrix": matrix.contiguous(),
        "zca_inverse": inverse.contiguous(),
    }


def _zca_of_chunks(
    chunks: Sequence[Tensor], unwhitened: Callable[[Tensor], Tensor], *, progress: bool
) -> tuple[Tensor, ...]:
    """Compute kornia's mean [D], matrix and inverse [D, D] without all images in float32 at once."""
    from tqdm import tqdm

    count, size = sum(map(len, chunks)), chunks[0][0].numel()
    mean, covariance = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for some in chunks:
        mean += unwhitened(some).flatten(1).sum(0, dtype=torch.float64) / count
    for some in tqdm(chunks, desc="ZCA: covariance", unit="chunk", disable=not progress):
        centred = unwhitened(some).flatten(1) - mean.float()
        covariance += centred.T @ centred
    variances, directions = torch.linalg.eigh(covariance / (count - 1))
    roots = (variances.clamp(min=0) + ZCA_EPS).sqrt()
    matrix, inverse = ((directions * scale) @ directions.T for scale in (1 / roots, roots))
    return mean.float(), matrix.float(), inverse.float()


def real_image_gatherer(
    data: ImageData,
    preprocessing: Preprocessing,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    precision: str = "float32",
    progress: bool = True,
) -> Callable[[Tensor], Tensor]:
    """Return a function that gathers training images by index and maps them to model space.

    On a GPU the images stay uint8 and each batch is mapped when it is gathered, which saves memory. On a CPU whitening
    takes 19 MFLOP per CIFAR image, a fifth of the network's work, so with ZCA the whole training set is whitened once
    and kept as float32.

    Args:
        data: the real images.
        preprocessing: the map to model space, on the device of ``data``.
        memory_format: memory format of the result: ``torch.contiguous_format`` or ``torch.channels_last``.
        precision: ``"float32"``, or any other of ``DistillConfig.precision`` to whiten in TF32 on a GPU. For CIFAR the
            error of TF32 is less than a tenth of the error from 8-bit pixels, in the Euclidean norm.
        progress: show a progress bar on standard error while the training set is whitened.

    Returns:
        ``gather(indices)``: takes int64 of any shape, such as [K, R], on the device of ``data``; returns float32
        [K·R, C, H, W] in the order of ``indices.flatten()``. It reads nothing back to the host.
    """
    images, on_host = data.train_images, data.host_images is not None
    if preprocessing.zca_matrix is not None and not _keeps_bytes(images.device):
        kept = _WHITENED.get(preprocessing)
        if kept is None or kept[0] is not images:
            kept = images, _whitened_copy(images, preprocessing, progress=progress)
            _WHITENED[preprocessing] = kept
        images = kept[1]

    if images.dtype == torch.uint8 and preprocessing.zca_matrix is not None:
        return _whitening_gatherer(images, preprocessing, memory_format, precision, on_host=on_host)
    read = image_reader(images, on_host=on_host)

    def gather(indices: Tensor) -> Tensor:
        batch = read(indices.flatten())
        if batch.dtype == torch.uint8:
            batch = preprocessing.to_model(batch)
        return batch.contiguous(memory_format=memory_format)

    return gather


def _keeps_bytes(device: torch.device) -> bool:
    """Return True if images stay uint8 on a device and each batch is whitened when it is gathered."""
    return device.type != "cpu"


def _whitening_gatherer(
    images: Tensor,
    preprocessing: Preprocessing,
    memory_format: torch.memory_format,
    precision: str,
    *,
    on_host: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Return `real_image_gatherer`'s function for uint8 images and ZCA: a gather, a conversion and a product.

    Scale and shift of the pixels are part of the matrix and of the bias added to the product, and its columns are in
    the order of the result's memory. Pixels minus 128 are exact in TF32, and nearer to zero than pixels.
    """
    channels, height, width = images.shape[1:]
    last = memory_format == torch.channels_last
    matrix, bias = (part.to(images.device) for part in _folded(preprocessing, channels_last=last))
    read = image_reader(images, on_host=on_host)

    def gather(indices: Tensor) -> Tensor:
        centred = read(indices.flatten()).flatten(1) - 128.0
        with _product_precision(precision):
            model = torch.addmm(bias, centred, matrix)
        if last:
            return model.view(-1, height, width, channels).permute(0, 3, 1, 2)
        return model.view(-1, channels, height, width)

    return gather


def _folded(preprocessing: Preprocessing, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Return matrix [D, D] and bias [D] on the CPU, such that pixels - 128 (0 to 255) times the first plus the second
    are images in model space, flattened in the order of either memory format.
    """
    mean, matrix = preprocessing.zca_mean, preprocessing.zca_matrix
    assert mean is not None and matrix is not None
    shape, matrix = mean.shape, matrix.cpu().double()
    scale, shift = (
        part.cpu().double().expand(shape).flatten() for part in (preprocessing._byte_scale, preprocessing._shift)
    )
    folded, bias = scale[:, None] * matrix, (128 * scale + shift) @ matrix
    if channels_last:
        order = torch.arange(shape.numel()).view(shape).permute(1, 2, 0).flatten()
        folded, bias = folded[:, order], bias[order]
    return folded.float(), bias.float()


@contextlib.contextmanager
def _product_precision(precision: str) -> Iterator[None]:
    """Set the precision of float32 matrix products on a GPU: float32, or TF32 for any other ``precision``."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee" if precision == "float32" else "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


# Distillations with the same preprocessing share the whitened copy on a CPU; it is freed with the preprocessing.
_WHITENED: weakref.WeakKeyDictionary[Preprocessing, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()


def _whitened_copy(images: Tensor, preprocessing: Preprocessing, *, progress: bool) -> Tensor:
    """Map all images to model space in chunks: float32 [N, C, H, W]."""
    from tqdm import tqdm

    whitened = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    with tqdm(total=len(images), desc="ZCA: whitening", unit="image", disable=not progress) as bar:
        for source, target in zip(images.split(_CHUNK), whitened.split(_CHUNK), strict=True):
            target.copy_(preprocessing.to_model(source))
            bar.update(len(source))
    return whitened
