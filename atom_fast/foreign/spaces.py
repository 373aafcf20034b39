"""In which space the images of a foreign set are, and whether they are sheets of smaller images.

No file says it. Names, values and correlations of neighbours do, more or less: `recognise` returns every space that
stays possible, likelier ones first, each with its reasons.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import ZCA_EPS, Preprocessing, check_whitening, fit_preprocessing
from atom_fast.foreign.files import ForeignSet
from atom_fast.names import PREPROCESSINGS

_MEANS = (0.4914, 0.4822, 0.4465)
# Mean and standard deviation by which public programs standardise, as they stand in their code.
CONSTANTS = {
    "standard_2023": (_MEANS, (0.2023, 0.1994, 0.2010)),
    "standard_2470": (_MEANS, (0.2470, 0.2435, 0.2616)),
    "standard_cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "standard_imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "standard_tiny": ((0.4759, 0.4481, 0.3926), (0.2763, 0.2687, 0.2813)),
}
# The constants of DC, DSA, DM, MTT and DataDAM for a data set.
PUBLIC = {"cifar10": "standard_2023", "cifar100": "standard_cifar100", "tiny": "standard_imagenet"}
_TEXTS = {
    "pixels": "pixels in [0, 1]",
    "standard": "standardised by the data's own mean and standard deviation",
    "standard_2023": "standardised by CIFAR-10's mean and standard deviation .2023/.1994/.2010",
    "standard_2470": "standardised by CIFAR-10's mean and standard deviation .2470/.2435/.2616",
    "standard_cifar100": "standardised by CIFAR-100's mean and standard deviation .2673/.2564/.2762",
    "standard_imagenet": "standardised by ImageNet's mean and standard deviation .229/.224/.225",
    "standard_tiny": "standardised by Tiny ImageNet's mean and standard deviation .2763/.2687/.2813",
    "zca": "ZCA-whitened pixels (kornia's, as in MTT)",
    "zca_standardized": "ZCA-whitened after standardisation by the data's own mean and standard deviation",
    "zca_datadam": "ZCA-whitened after standardisation by the public constants (as in DataDAM)",
    "zca_frepo": "ZCA-whitened after standardisation, with an eps relative to the variance (as in FRePo and RCIG)",
}
ZCA = ("zca", "zca_datadam", "zca_frepo")  # of other projects
_REAL_STD = {"standard_cifar100": 0.27, "standard_imagenet": 0.27, "standard_tiny": 0.28}  # of pixels; CIFAR-10 0.25

# Spaces whose odds against the likeliest are better than one to this many stay possible.
_ODDS = 10
# Shares of these odds, by what programs that save such files do; what is not named has _UNUSUAL.
_UNUSUAL = 0.01
_LOWEST, _HIGHEST = -0.05, 1.05  # of pixels, which the last step of a distillation may leave a little
_LEVEL_TOLERANCE = 0.1  # of 1/255, within which a value counts as one of 256 levels: a fifth do by chance
_SETTLED_SIZE = 4096  # values of an image up to which every whitening is fitted to tell which it was
_DIP = 0.1  # correlation across a seam below that of all other neighbours


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A space that stays possible.

    Attributes:
        space: its name, in `atom_fast.names.SPACES` or ``PREPROCESSINGS``.
        reasons: why, in words.
        certain: it follows from the values or was said; otherwise it is the likeliest.
        odds: against the likeliest, at most 1.
        constants: mean and standard deviation per channel, where the file holds them.
    """

    space: str
    reasons: tuple[str, ...]
    certain: bool = False
    odds: float = 1.0
    constants: tuple[Sequence[float], Sequence[float]] | None = None

    @property
    def text(self) -> str:
        """The space in words."""
        return _TEXTS[self.space]

    @property
    def needs_data(self) -> bool:
        """True if its map from pixels is fitted on the real images."""
        fitted = (*ZCA, *PREPROCESSINGS)
        return self.space in fitted and self.constants is None

    def __str__(self) -> str:
        return f"{self.space}, {self.text}, because " + "; ".join(self.reasons)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is measured of images [N, C, H, W].

    Attributes:
        mean: of all values.
        std: mean over the channels of each one's standard deviation.
        low, high: smallest and largest value.
        neighbours: correlation of horizontal and vertical neighbours, without those across the middle.
        colours: correlation of the first two channels; 1 where there is one.
    """

    mean: float
    std: float
    low: float
    high: float
    neighbours: float
    colours: float

    @classmethod
    def of(cls, images: Tensor) -> Statistics:
        """Measure images."""
        images = images.double()
        lines = [value for axis in (2, 3) for place, value in _neighbour_correlations(images, axis).items()
                 if place != images.shape[axis] // 2]  # fmt: skip
        return cls(
            mean=images.mean().item(),
            std=images.transpose(0, 1).flatten(1).std(1, unbiased=False).mean().item(),
            low=images.min().item(),
            high=images.max().item(),
            neighbours=sum(lines) / max(1, len(lines)),
            colours=_correlation(images[:, 0], images[:, 1]) if images.shape[1] > 1 else 1.0,
        )


def recognise(foreign: ForeignSet, dataset: str | None = None) -> list[Candidate]:
    """Return the spaces that the images of a set may be in, likelier ones first.

    Args:
        foreign: the set.
        dataset: name of its data set; None: the one that its path names.
    """
    dataset = dataset or foreign.dataset
    if described := _described(foreign.space, foreign.images.shape[1]):
        return [described]
    measured = Statistics.of(foreign.images)
    if "images_zca" in foreign.path.name.lower():
        return [Candidate("pixels", ("MTT's images_zca_*.pt are images whose whitening is undone",), certain=True)]
    if measured.low >= _LOWEST and measured.high <= _HIGHEST and measured.mean > 0.05:
        reason = f"all values lie in [0, 1], from {measured.low:.2f} to {measured.high:.2f}"
        return [Candidate("pixels", (reason,), certain=True)]
    names = _possible(foreign.images.shape, dataset)
    for name in names:
        constant = None if name not in CONSTANTS else Fits(None, dataset).preprocessing(Candidate(name, ()))
        if constant is not None and _are_levels(unclamped_pixels(foreign.images, constant)):
            reason = "without these constants all values are multiples of 1/255: real images, untouched"
            return [Candidate(name, (reason,), certain=True)]
    usual, usually = _usual(foreign, dataset)
    scores = {name: math.log(usual.get(name, _UNUSUAL)) + _log_likelihood(name, measured) for name in names}
    best = max(scores.values())
    found = []
    for name in sorted(scores, key=lambda name: -scores[name]):
        odds = math.exp(scores[name] - best)
        if odds * _ODDS >= 1:
            reasons = [*([usually] if name in usual else []), _compared(name, measured)]
            found.append(Candidate(name, tuple(reasons), odds=odds))
    return found


def recognise_partition(images: Tensor) -> tuple[int, str]:
    """Find how many rows and columns of smaller images the sheets [N, C, H, W] hold, and why; 1: whole images.

    No gradient crosses the seam between two images on a sheet: across it neighbours hardly correlate.
    """
    lines = [_neighbour_correlations(images.double(), axis) for axis in (2, 3)]
    middle = None
    for partition in (4, 3, 2):
        sides = images.shape[2:]
        if any(side % partition or side < 4 * partition for side in sides):
            continue
        seams, others = [], []
        for side, line in zip(sides, lines, strict=True):
            for place, value in line.items():
                (seams if place % (side // partition) == 0 else others).append(value)
        if partition == 2:
            middle = f"{max(seams):.2f} across the middle, {min(others):.2f} or more elsewhere"
        if max(seams) < min(others) - _DIP:
            where = "the middle" if partition == 2 else "the seams"
            at_most = f"{max(seams):.2f} or less across {where}"
            return partition, f"neighbours correlate by {at_most}, by {min(others):.2f} or more elsewhere"
    return 1, f"no seam: neighbours correlate by {middle}" if middle else "its sides do not divide into smaller images"


class Fits:
    """Maps from pixels to the spaces of a data set; what is fitted on its training images is kept.

    Args:
        data: the real images; None if there are none.
        dataset: name of the data set; None if unknown.
        progress: report fits on standard error.
    """

    def __init__(self, data: ImageData | None, dataset: str | None, *, progress: bool = True):
        self._data = data
        self._dataset = dataset
        self._progress = progress
        self._made: dict[str, Preprocessing] = {}
        self._moments: tuple[Tensor, Tensor] | None = None

    def preprocessing(self, candidate: Candidate) -> Preprocessing:
        """Return the map from pixels to a space.

        Raises:
            ValueError: it is fitted on the real images, and there are none.
        """
        constants = candidate.constants or CONSTANTS.get(candidate.space)
        if constants is not None:
            return Preprocessing(*(torch.tensor(values, dtype=torch.float32) for values in constants))
        if self._data is None:
            raise ValueError(
                f"the images are {candidate.text} ({'; '.join(candidate.reasons)}), which is fitted on the real "
                "images: give their data set and its folder (--dataset NAME --data-dir DIR, in Python "
                "data=load_data(...)), or another space (--preprocessing)"
            )
        if candidate.space not in self._made:
            self._made[candidate.space] = self._fit(candidate.space, self._data.train_images.cpu())
        return self._made[candidate.space]

    def of_pixels(self, candidate: Candidate, channels: int, *, listed: bool) -> Preprocessing:
        """Return the standardisation that networks see pixels through: the data set's public constants, or its own.

        Of an unknown data set pixels stay as they are.

        Args:
            candidate: as in `preprocessing`.
            channels: of the images.
            listed: of a list [images, labels]: IDC and its successors take CIFAR-10's constants for CIFAR-100 too.
        """
        space = "standard_2023" if listed and self._dataset == "cifar100" else PUBLIC.get(self._dataset or "")
        if space is None and self._data is None:
            return Preprocessing(torch.zeros(channels), torch.ones(channels))
        return self.preprocessing(dataclasses.replace(candidate, space=space or "standard"))

    def whitening(self, space: str) -> Preprocessing:
        """Fit ZCA by the covariance of the training images, which all kinds share: kornia takes minutes for each."""
        assert self._data is not None
        images = self._data.train_images.cpu()
        check_whitening(space, images.shape[1:])
        if self._moments is None:
            self._moments = _moments(images, self._progress)
        if space == "zca":
            standard = Preprocessing(torch.zeros(images.shape[1]), torch.ones(images.shape[1]))
        else:
            public = PUBLIC.get(self._dataset or "") if space == "zca_datadam" else None
            standard = self.preprocessing(Candidate(public or "standard", ()))
        return _whitening(standard, images.shape[1:], *self._moments, relative=space == "zca_frepo")

    def _fit(self, space: str, images: Tensor) -> Preprocessing:
        if space in PREPROCESSINGS:  # the same bits as of a set in this project's format
            return fit_preprocessing(images, space, progress=self._progress)
        return self.whitening(space)


def settle(images: Tensor, candidates: list[Candidate], fits: Fits) -> list[Candidate]:
    """Return the whitening without which images are 8-bit pixels, where there is one, or else all candidates.

    All kinds of whitening are tried as soon as one is possible: their values look alike. Of large images none is, since
    each takes many minutes: 4,096 values take one.
    """
    spaces = [candidate.space for candidate in candidates]
    if candidates[0].certain or not set(spaces) & set(ZCA) or images[0].numel() > _SETTLED_SIZE:
        return candidates
    for space in sorted(ZCA, key=lambda space: spaces.index(space) if space in spaces else len(spaces)):
        if _are_levels(unclamped_pixels(images, fits.whitening(space))):
            reason = "without it all values are multiples of 1/255: real images, untouched"
            return [Candidate(space, (reason,), certain=True)]
    return candidates


# ---------------------------------------------------------------- odds


def _described(space: Mapping | None, channels: int) -> Candidate | None:
    """The space that the entry ``"preprocessing"`` of a file exported by this project names; None if it names none."""
    if not space or space.get("kind") not in PREPROCESSINGS:
        return None
    reasons = ("the file says so",)
    if space["kind"] != "standard":
        return Candidate(str(space["kind"]), reasons, certain=True)
    mean, std = (_numbers(space.get(name), channels) for name in ("mean", "std"))
    if mean is None or std is None or min(std) < 1e-6:
        return None
    for name, constants in CONSTANTS.items():
        if [mean, std] == [list(values) for values in constants]:
            return Candidate(name, reasons, certain=True)
    return Candidate("standard", reasons, certain=True, constants=(mean, std))


def _numbers(values: object, count: int) -> list[float] | None:
    """So many finite numbers, or None if the values are anything else."""
    if not isinstance(values, list) or len(values) != count:
        return None
    return values if all(isinstance(value, float) and abs(value) < 1e6 for value in values) else None


def _possible(shape: torch.Size, dataset: str | None) -> tuple[str, ...]:
    """The spaces in which images of a shape and a data set come."""
    constants = {
        "cifar10": ("standard_2023", "standard_2470"),
        "cifar100": ("standard_cifar100", "standard_2023"),
        "tiny": ("standard_imagenet", "standard_tiny"),
    }
    if shape[1] != 3 or dataset not in (None, *constants):
        return ("pixels", "standard")
    if dataset is None and shape[2:] not in ((32, 32), (64, 64)):
        return ("pixels", "standard_imagenet")
    sized = constants["tiny"] if shape[2] == 64 else (*constants["cifar10"], "standard_cifar100")
    return ("pixels", *(constants[dataset] if dataset else sized), *ZCA)


def _usual(foreign: ForeignSet, dataset: str | None) -> tuple[dict[str, float], str]:
    """Odds of the spaces in which programs that save such a file work, and that in words."""
    public = PUBLIC.get(dataset or "", "standard_imagenet" if foreign.images.shape[2] == 64 else "standard_2023")
    standard = {public: 1.0, "standard": 1.0, "standard_2470": 0.08, "standard_2023": 1.0 if public == "standard_2023"
                else 0.1, "standard_cifar100": 0.1, "standard_tiny": 0.1}  # fmt: skip
    method = foreign.method
    if foreign.form == "list":
        return {"pixels": 1.0}, "lists of images and labels (IDC, DREAM, DANCE, NCFM) hold pixels"
    if foreign.form == "npz":
        return {"zca_frepo": 1.0}, "FRePo and RCIG whiten so" + (
            "; KIP whitens much alike, after each image is divided by its norm" if method == "KIP" else ""
        )
    if method in ("DC", "DSA", "DCC", "DM", "CAFE", "IDM"):
        return standard, f"{method} standardises, and does not whiten"
    if method == "DataDAM":
        return {**standard, "zca_datadam": 1.0}, "DataDAM standardises, and may whiten after that"
    if foreign.form == "tensor":
        scale = 0.1 if _says_whitened(foreign) else 0.3 if foreign.soft_labels is not None else 1.0
        mtt = {name: scale * odds for name, odds in standard.items()}
        if method in ("DATM", "PAD"):  # CIFAR-10's constants for CIFAR-100 too
            mtt["standard_2023"] = scale
        whose = method or "MTT, TESLA, FTD, DATM and PAD"
        return {**mtt, "zca": 1.0, "zca_datadam": 0.05}, f"{whose} standardise, or whiten pixels"
    return {**standard, "zca_datadam": 0.3, "zca": 0.3}, "such files (DC, DM, DataDAM) are standardised, or whitened"


def _says_whitened(foreign: ForeignSet) -> bool:
    words = "/".join(foreign.path.parts[-3:]).lower()
    return "zca" in words and not any(without in words for without in ("nozca", "no_zca", "no-zca"))


def _expected(space: str) -> tuple[float, float, float]:
    """Standard deviation, correlation of neighbours and of red and green of real images in a space.

    Measured on CIFAR-10; of pixels and standardised images the data set's own deviation is taken.
    """
    measured = {
        "pixels": (0.25, 0.93, 0.92),
        "standard": (1.0, 0.93, 0.92),
        "zca": (0.25, 0.63, 0.84),
        "zca_datadam": (0.476, 0.37, 0.77),
        "zca_frepo": (0.45, 0.39, 0.79),
    }
    if space in measured:
        return measured[space]
    stds = CONSTANTS[space][1]
    return _REAL_STD.get(space, 0.25) * len(stds) / sum(stds), 0.93, 0.92


def _log_likelihood(space: str, measured: Statistics) -> float:
    """Log-likelihood of a space up to a constant, as if what is measured were normal around its value of real images.

    A distilled set drifts: its values spread and its neighbours and colours correlate less. The deviations on that side
    are wide enough for the sets of CIFAR-10 that this project distilled, at 1 and 10 images per class.
    """
    std, neighbours, colours = _expected(space)
    middle, spread = (0.47, 0.15) if space == "pixels" else (0.0, 0.4 * std)
    return -0.5 * (
        _off(math.log(max(measured.std, 1e-9) / std), 0.2, 0.8) ** 2
        + _off(measured.neighbours - neighbours, 0.25, 0.08) ** 2
        + _off(measured.colours - colours, 0.25, 0.1) ** 2
        + ((measured.mean - middle) / spread) ** 2
    )


def _off(difference: float, below: float, above: float) -> float:
    return difference / (below if difference < 0 else above)


def _compared(space: str, measured: Statistics) -> str:
    std, neighbours, _ = _expected(space)
    return (
        f"standard deviation {measured.std:.2f} and correlation of neighbours {measured.neighbours:.2f}, where real "
        f"images have {std:.2f} and {neighbours:.2f}"
    )


# ---------------------------------------------------------------- measurements


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    norm = (a.norm() * b.norm()).item()
    return (a @ b).item() / norm if norm > 0 else 0.0


def _neighbour_correlations(images: Tensor, axis: int) -> dict[int, float]:
    """Correlation of the lines at ``place - 1`` and ``place`` along an axis, by place."""
    lines = images.transpose(0, axis).flatten(1)
    return {place: _correlation(lines[place - 1], lines[place]) for place in range(1, len(lines))}


def unclamped_pixels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return images [N, C, H, W] in model space as pixels, also where they leave [0, 1], as distilled images do."""
    mean, matrix = preprocessing.zca_mean, preprocessing.zca_inverse
    if matrix is not None and mean is not None:
        images = (images.flatten(1) @ matrix).view(images.shape) + mean
    if preprocessing.mean is not None and preprocessing.std is not None:
        images = images * preprocessing.std[:, None, None] + preprocessing.mean[:, None, None]
    return images


def _are_levels(pixels: Tensor) -> bool:
    """True if nearly all values are multiples of 1/255 in [0, 1]."""
    levels = pixels * 255
    near = (levels - levels.round()).abs() < _LEVEL_TOLERANCE
    return (near & (levels > -0.5) & (levels < 255.5)).float().mean().item() > 0.95


# ---------------------------------------------------------------- whitening


def _moments(images: Tensor, progress: bool) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D], divided by N - 1, of flattened pixels in [0, 1]."""
    if progress:
        print(f"ZCA: covariance of {len(images)} training images", file=sys.stderr, flush=True)
    flat = images.flatten(1)
    mean = torch.stack([chunk.double().sum(0) for chunk in flat.split(4096)]).sum(0) / (255 * len(flat))
    covariance = torch.zeros(flat.shape[1], flat.shape[1])
    for chunk in flat.split(4096):
        centred = chunk.float().div_(255).sub_(mean.float())
        covariance.addmm_(centred.T, centred)
    return mean.float(), covariance / max(1, len(flat) - 1)


def _whitening(
    standard: Preprocessing, shape: torch.Size, mean: Tensor, covariance: Tensor, *, relative: bool
) -> Preprocessing:
    """Return standardisation followed by ZCA: (covariance + eps)^-1/2, with eps a share of the mean variance or not."""
    centre, scale = standard.mean, standard.std
    assert centre is not None and scale is not None
    divisor = scale[:, None, None].expand(shape).flatten()
    variance, directions = torch.linalg.eigh(covariance / divisor[:, None] / divisor)
    variance = variance.clamp(min=0) + ZCA_EPS * (variance.mean() if relative else 1)
    return Preprocessing(
        mean=centre,
        std=scale,
        zca_mean=((mean.view(shape) - centre[:, None, None]) / scale[:, None, None]).contiguous(),
        zca_matrix=(directions * variance.rsqrt()) @ directions.T,
        zca_inverse=(directions * variance.sqrt()) @ directions.T,
    )
