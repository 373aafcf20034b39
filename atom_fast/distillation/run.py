"""What the runs of all methods have in common: learnt images, randomness, and the record of their loss terms."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from atom_fast._seeds import derive_seed
from atom_fast.data.dataset import ImageData
from atom_fast.distillation.config import DistillConfig
from atom_fast.names import first_few

# An image this many times as large as the images were at the start is lost. Real images in model space reach a few
# standard deviations, and distilled ones some times that.
GROWTH = 1000


class DivergenceError(RuntimeError):
    """A loss term, an image or a step size became NaN, infinite or far out of range; what is learnt is lost."""


class Run(abc.ABC):
    """Images that a method learns, on one device. A method derives its run from this class.

    It defines ``Terms``, `_step`, `state`, and where they differ from those here `soft_labels`, `learnt` and
    `_step_sizes`.

    Attributes:
        Terms: NamedTuple of the loss and its terms, all numbers.
        config: resolved settings.
        data: the real images, on the device that computes.
        classes: the classes of these images.
        images: float32 [len(classes)*ipc, C, H, W], model space, class-major; changed in place by every step. With a
            partition these are the sheets.
        iteration: the number of the last step; 0 before the first.
        generator: source of a step's randomness, on the device.
        fusion: how the network runs, in words for the log; empty where there is nothing to say.
    """

    Terms: type[Any]
    fusion = ""
    _RATES: tuple[str, ...] = ("image_lr",)  # settings to lower where images diverge

    def __init__(
        self,
        config: DistillConfig,
        data: ImageData,
        images: Tensor,
        classes: range,
        names: Sequence[str],
        weights: Sequence[float],
    ):
        """Keep what is common.

        Args:
            config, data, classes: the attributes.
            images: initial images; copied.
            names: of the terms that a step records, in its order; fields of ``Terms``, where those of one name are
                added.
            weights: of each term in the loss, the field ``loss``.

        Raises:
            ValueError: ``images`` has another shape.
        """
        device = data.train_images.device
        expected = (len(classes) * config.ipc, *data.image_shape)
        if tuple(images.shape) != expected:
            raise ValueError(f"images must be [K*ipc, C, H, W] = {list(expected)}; got {list(images.shape)}")
        self.config = config
        self.data = data
        self.classes = classes
        # channels_last is what convolutions on a CPU and on tensor cores work on
        self.images = images.detach().to(device, copy=True, memory_format=torch.channels_last)
        self.generator = torch.Generator(device)
        self.iteration = 0
        self._iteration = torch.zeros((), dtype=torch.int64, device=device)
        self._names, self._weights = tuple(names), tuple(weights)
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)  # since the last reading
        self._finite = torch.zeros(len(names), dtype=torch.int64, device=device)  # steps that left sums finite
        self._is_finite = torch.empty(len(names), dtype=torch.bool, device=device)
        self._steps = 0
        self._initial_peak = self.images.abs().max().clamp(min=1.0).double()

    def step(self, iteration: int) -> None:
        """Run iteration ``iteration`` (1, 2, ...). Its randomness depends on that number and the seed alone."""
        self.iteration = iteration
        self._iteration.fill_(iteration)
        self.generator.manual_seed(derive_seed(self.config.seed, iteration))
        self._step()
        self._steps += 1

    @abc.abstractmethod
    def _step(self) -> None:
        """Learn once, and record the terms: `_record`, once or several times, and then `_count`."""

    def _record(self, terms: Tensor) -> None:
        """Add the terms of a step, or of a part of it, float [T], to the sums; without an allocation."""
        self._sums.add_(terms)

    def _count(self) -> None:
        """Note whether the sums are finite after a step; without an allocation."""
        self._finite.add_(torch.lt(self._sums, math.inf, out=self._is_finite))

    @property
    def result(self) -> Tensor:
        """The images to keep, of the shape of ``images``."""
        return self.images

    @property
    def soft_labels(self) -> Tensor | None:
        """Learnt labels, float32 [len(classes)*ipc, K], rows of probabilities; None where labels are hard."""
        return None

    @property
    def learnt(self) -> dict[str, Any]:
        """What else is learnt, as JSON values for the metadata of the set."""
        return {}

    @abc.abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next steps depend on, by name; not copies. Randomness follows from the seed."""

    def restore(self, state: Mapping[str, Tensor | None]) -> None:
        """Continue from tensors as `state` returns them.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        for name, part in self.state().items():
            source = state.get(name)
            if source is None or source.shape != part.shape:
                found = "nothing" if source is None else list(source.shape)
                raise ValueError(f"saved {name} must be {list(part.shape)}; got {found}")
            part.copy_(source)

    def _step_sizes(self) -> Tensor:
        """Return learnt step sizes [n], which must stay finite and above 0."""
        return self.images.new_empty(0)

    def read(self) -> list[float]:
        """Wait for the device and return what `terms` needs of these classes, as plain numbers; reset the means.

        The iteration, the number of steps, the sums of the terms, the number of steps that left each finite, the learnt
        step sizes, and for each class how many times as large as at the start its images are.
        """
        peaks = self.images.abs().amax(dim=(1, 2, 3)).view(len(self.classes), -1).amax(dim=1)
        growth = peaks.double() / self._initial_peak
        packed = (self._iteration.view(1), self._sums, self._finite, self._step_sizes(), growth)
        iteration, *others = torch.cat([part.double() for part in packed]).tolist()
        steps, self._steps = self._steps, 0
        self._sums.zero_()
        self._finite.zero_()
        return [iteration, steps, *others]

    def terms(self, readings: Sequence[Sequence[float]]) -> Any:
        """Return the mean loss terms (NaN without a step), given `read` of every part of the classes in their order.

        Raises:
            DivergenceError: a loss term, an image or a step size is NaN, infinite or out of range; names term,
                iteration, classes and the settings to lower.
        """
        iteration, steps, count = int(readings[0][0]), int(readings[0][1]), len(self._weights)
        sizes = 2 + 2 * count  # where the step sizes begin
        images = sizes + len(self._step_sizes())
        sums = [sum(column) for column in zip(*(reading[2 : 2 + count] for reading in readings), strict=True)]
        columns = zip(*(reading[2 + count : sizes] for reading in readings), strict=True)
        finite = [int(min(column)) for column in columns]
        growth = [value for reading in readings for value in reading[images:]]
        bad_size = next((value for value in readings[0][sizes:images] if not 0 < value < math.inf), None)
        if bad_size is not None:
            raise DivergenceError(
                f"a learnt step size is {bad_size:g} after iteration {iteration}; lower step_size_lr (it is "
                f"{self.config.step_size_lr:g}) or step_size"
            )
        if min(finite) < steps or not all(value <= GROWTH for value in growth):
            first_bad = [iteration - steps + number + 1 if number < steps else 0 for number in finite]
            raise DivergenceError(self._describe_divergence(iteration, first_bad, growth))
        means = [total / steps if steps else math.nan for total in sums]
        named = dict.fromkeys(self.Terms._fields, 0.0 if steps else math.nan)
        for name, weight, mean in zip(self._names, self._weights, means, strict=True):
            if name != "loss":
                named[name] += mean
            named["loss"] += weight * mean
        return self.Terms(**named)

    def read_terms(self) -> Any:
        """Wait for the device; return the mean loss terms since the last reading.

        Raises:
            DivergenceError: as `terms`.
        """
        return self.terms([self.read()])

    def _describe_divergence(self, iteration: int, first_bad: Sequence[int], growth: Sequence[float]) -> str:
        names = self.data.class_names
        found = sorted((bad, name) for name, bad in zip(self._names, first_bad, strict=True) if bad)
        earliest = {name: bad for bad, name in reversed(found)}
        bad_terms = [f"{name} at iteration {earliest[name]}" for name in self.Terms._fields if name in earliest]
        lost = [name for name, value in zip(names, growth, strict=True) if not value <= GROWTH]
        largest = max(growth)  # of finite ones: NaN compares as false
        if bad_terms or not all(value < float("inf") for value in growth):
            message = f"NaN or infinity in {', '.join(bad_terms) or f'the images after iteration {iteration}'}"
        else:
            message = f"images diverged: {largest:.1e} times as large after iteration {iteration} as at the start"
        if lost:
            message += f"; images lost in {len(lost)} of {len(names)} classes: {first_few(lost, 5)}"
        first, *others = [(name, getattr(self.config, name)) for name in self._RATES]
        also = "".join(f" or {name} ({value:g})" for name, value in others)
        return f"{message}; lower {first[0]} (it is {first[1]:g}){also}"
