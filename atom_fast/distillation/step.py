"""One step of Algorithm 1 of the ATOM paper, entirely on the device, and its capture as a CUDA graph."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from atom_fast._device import convolution_precision, is_out_of_memory
from atom_fast._seeds import derive_seed
from atom_fast.data.augmentation import AugmentationParameters, augment, draw_augmentation
from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import check_class_sizes, sample_class_indices
from atom_fast.data.whitening import Preprocessing, real_image_gatherer
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.live_bytes import LiveBytes
from atom_fast.distillation.logs import say
from atom_fast.distillation.matching import fused_if_possible, matching_terms
from atom_fast.distillation.ranks import ALONE, World
from atom_fast.distillation.stages import stage
from atom_fast.evaluation import get_protocol, herding_selection, watch_training
from atom_fast.functional import (
    class_groups,
)
from atom_fast.networks.convnet import ConvNet
from atom_fast.ops.launching import unfused_if_refused
from atom_fast.ops.matching import ClassGroups

TERMS = ("loss", "attention_loss", "mmd_loss")
_WARM_UP_STEPS = 3  # before a capture, so that libraries choose algorithms and allocate workspaces outside it
# Of the network in whose features herding chooses the starting images; one that has begun to learn suffices.
_HERDING_EPOCHS = 2
_AVERAGE_POWER = 3  # of image_average: step t weighs about t^3, most of it in the last third


class Terms(typing.NamedTuple):
    """Means over the steps since the last reading.

    Attributes:
        loss: scale * (attention_loss + mmd_weight * mmd_loss), equation 4.
        attention_loss: L_ATOM, equation 3, summed over layers and classes.
        mmd_loss: L_MMD, summed over classes.
    """

    loss: float
    attention_loss: float
    mmd_loss: float


class NonFiniteError(RuntimeError):
    """A loss term or an image became NaN or infinite; the images are lost from that iteration on."""


class _Chunk(typing.NamedTuple):
    """Classes that run through the network together."""

    classes: slice  # of the K classes
    rows: slice  # of the synthetic images
    real_labels: Tensor  # int64, the class of each real image, counted from the chunk's first
    labels: Tensor  # int64, that of each synthetic image
    groups: ClassGroups


class Distillation:
    """Synthetic images under distillation: the images, their momentum, and all that a step needs, on one device.

    Attributes:
        classes: whose images these are: all K, or where several processes share them, this one's own.
        images: float32 [len(classes)*ipc, C, H, W], model space, class-major; changed in place by every step.
        momentum: of the same shape, the buffer of SGD.
        average: of the same shape, the running mean of ``image_average``; None without it.
        labels: int64 [len(classes)*ipc], the class of each image.
        config: resolved settings.
        class_chunk: classes that run at once; the gradient is exactly the sum over chunks, since under a norm of each
            sample no class depends on another.
        fusion: how the network runs, for the log: ``FUSED``, or what runs in its place and why.
    """

    def __init__(
        self,
        config: DistillConfig,
        data: ImageData,
        preprocessing: Preprocessing,
        images: Tensor,
        *,
        progress: bool = False,
        world: World = ALONE,
    ):
        """Prepare the steps.

        Args:
            config: resolved settings (`DistillConfig.resolve`).
            data: real images, on the device that computes.
            preprocessing: on the same device.
            images: float32 [len(classes)*ipc, C, H, W], what the synthetic images start from; copied.
            progress: show what takes long on standard error.
            world: the processes that share the classes.

        Raises:
            ValueError: ``images`` has another shape, or classes shall run in chunks, or in several processes, under a
                norm that couples them.
        """
        check_ranks(config, data, world)
        device, classes = data.train_images.device, world.share(data.num_classes)
        expected = (len(classes) * config.ipc, *data.image_shape)
        if tuple(images.shape) != expected:
            raise ValueError(f"images must be [K*ipc, C, H, W] = {list(expected)}; got {list(images.shape)}")
        layout = torch.channels_last  # what the CPU's and the tensor cores' convolutions work on
        self.config = config
        self.data = data
        self.world = world
        self.classes = classes
        self.images = images.detach().to(device, copy=True, memory_format=layout)
        self.momentum = torch.zeros_like(self.images)
        self.average = self.images.clone() if config.image_average else None
        self._gradient = torch.empty_like(self.images)  # kept, so that a chunk needs no memory for what is not its own
        self.labels = torch.arange(classes.start, classes.stop, device=device).repeat_interleave(config.ipc)
        self.network = make_network(config, data).to(device, memory_format=layout)
        self.extractor, self.fusion = fused_if_possible(self.network, config, self.images)
        self.gather_real = real_image_gatherer(
            data, preprocessing, memory_format=layout, precision=config.precision, progress=progress
        )
        self.generator = torch.Generator(device)
        self._iteration = torch.zeros((), dtype=torch.int64, device=device)
        self._sums = torch.zeros(len(TERMS), dtype=torch.float64, device=device)
        self._first_bad = torch.zeros(len(TERMS), dtype=torch.int64, device=device)  # 0: none, iterations start at 1
        self._steps = 0
        size = 1 + 2 * len(TERMS) + len(self.classes)
        self._reading = torch.empty(size, dtype=torch.float64, pin_memory=self.images.is_cuda)
        self._steps_read = 0
        self._copied = torch.cuda.Event() if self.images.is_cuda else None
        self.set_class_chunk(config.class_chunk or len(classes))

    def set_class_chunk(self, size: int) -> None:
        """Run ``size`` classes at once from the next step on; a captured step is dropped.

        Raises:
            ValueError: ``size`` is below 1, or below the number of classes under a norm that couples them.
        """
        classes, device = len(self.classes), self.images.device
        if size < 1:
            raise ValueError(f"class_chunk must be at least 1; got {size}")
        if size < classes and self.config.norm == "batch":
            raise ValueError(
                f"class_chunk must be all {classes} classes under norm 'batch', which computes its statistics over "
                f"them together; got {size}. Norms of each sample (instance, layer, group) can run in chunks"
            )
        self.class_chunk = min(size, classes)
        self._chunks = []
        for start in range(0, classes, self.class_chunk):
            chosen = self.classes[start : start + self.class_chunk]
            numbers = torch.arange(len(chosen), device=device)
            real_labels, labels = (
                numbers.repeat_interleave(each if len(chosen) * each > 1 else 2)  # see _in_company
                for each in (self.config.real_batch, self.config.ipc)
            )
            rows = slice(start * self.config.ipc, (start + len(chosen)) * self.config.ipc)
            groups = class_groups(real_labels, labels).of_classes(len(chosen))
            self._chunks.append(_Chunk(slice(chosen.start, chosen.stop), rows, real_labels, labels, groups))
        self._run = self._advance

    def step(self, iteration: int) -> None:
        """Run iteration ``iteration`` (1, 2, ...); its randomness depends on it and on the seed alone.

        Seeding is all the host does. Nothing is read back. Where memory runs out, half as many classes run at once from
        this step on.
        """
        self._iteration.fill_(iteration)
        self._with_less_memory(lambda: self._seed_and_run(iteration))
        self._steps += 1

    def _seed_and_run(self, iteration: int) -> None:
        self.generator.manual_seed(derive_seed(self.config.seed, iteration))
        self._run()

    def _with_less_memory(self, work: Callable[[], None]) -> None:
        """Do ``work``, which changes nothing before all its memory is had, in ever smaller chunks until it fits."""
        while True:
            try:
                return unfused_if_refused(work, self.images.device)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.class_chunk == 1 or self.config.norm == "batch":
                    raise
            # Here, not in the handler: there the traceback would keep the failed step's tensors alive.
            if self.images.is_cuda:
                torch.cuda.empty_cache()
            smaller = (self.class_chunk + 1) // 2
            say(f"{self.world.label}out of memory with {self.class_chunk} classes at once: continuing with {smaller}")
            self.set_class_chunk(smaller)

    def _advance(self) -> None:
        """Lines 3 to 7 of Algorithm 1, for all classes at once."""
        config, generator = self.config, self.generator
        with stage("network"):
            self.network.reset_parameters(generator)
        with stage("sample"):
            indices = sample_class_indices(self.data, config.real_batch, generator)
        with stage("augment"):
            # Siamese: a class draws one operation, and both its sides are put through it.
            augmentation = draw_augmentation(self.data.num_classes, generator, strategy=config.augmentation)
        terms = torch.zeros_like(self._sums)
        for chunk in self._chunks:
            of_chunk, self._gradient[chunk.rows] = self._match(chunk, indices, augmentation)
            terms += of_chunk
        with stage("update"):
            self.momentum.mul_(config.momentum).add_(self._gradient)
            self.images.sub_(self.momentum, alpha=config.image_lr)
            if self.average is not None:
                self.average.lerp_(self.images, (_AVERAGE_POWER + 1) / (self._iteration + _AVERAGE_POWER))
            self._record(terms)

    def _match(self, chunk: _Chunk, indices: Tensor, augmentation: AugmentationParameters) -> tuple[Tensor, Tensor]:
        """Loss terms of a chunk of classes, and the gradient of its synthetic images."""
        config = self.config
        with stage("sample"):
            real = self.gather_real(_in_company(indices[chunk.classes].flatten()))
        images = self.images[chunk.rows].detach().requires_grad_()
        synthetic = _in_company(images)
        if config.augmentation not in ("", "none"):
            with stage("augment"):
                own = AugmentationParameters(*(parameter[chunk.classes] for parameter in augmentation))
                real = augment(real, own, chunk.real_labels)
                synthetic = augment(synthetic, own, chunk.labels)
        with convolution_precision(config.precision, images.device, config.deterministic):
            attention, mmd = matching_terms(self.extractor, real, synthetic, config, chunk.groups)
            with stage("loss"):
                loss = config.loss_scale * (attention + config.mmd_weight * mmd)
            with stage("backward"):
                (gradient,) = torch.autograd.grad(loss, images)
        return torch.stack((loss, attention, mmd)).detach(), gradient

    def _record(self, terms: Tensor) -> None:
        self._sums.add_(terms)
        newly_bad = ~torch.isfinite(terms) & (self._first_bad == 0)
        self._first_bad.add_(newly_bad * self._iteration)

    def read_terms(self) -> Terms:
        """Wait for the device, and for the other ranks; mean loss terms since the last reading (NaN without a step).

        Raises:
            NonFiniteError: a loss term or an image is NaN or infinite; names the term, iteration and classes.
        """
        self.start_reading()
        return self.finish_reading()

    def start_reading(self) -> None:
        """Queue on the device what `finish_reading` waits for. Steps may follow before it, and do not change it."""
        classes = len(self.classes)
        finite = torch.isfinite(self.images).flatten(1).all(dim=1).view(classes, -1).all(dim=1)
        packed = (self._iteration.view(1), self._sums, self._first_bad, finite)
        self._reading.copy_(torch.cat([part.double() for part in packed]), non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.images.device))
        self._sums.zero_()
        self._steps_read, self._steps = self._steps, 0

    def reads_at_once(self) -> bool:
        """Whether `finish_reading` does not wait. A GPU is not asked: all ranks must meet at the same places."""
        return self._copied is None

    def finish_reading(self) -> Terms:
        """What `read_terms` returns and raises, as of the last `start_reading`."""
        if self._copied is not None:
            self._copied.synchronize()
        iteration, *packed = self._reading.tolist()
        count = len(TERMS)
        ranks = self.world.exchange(packed)
        sums = [sum(own) for own in zip(*(read[:count] for read in ranks), strict=True)]
        first_bad = [
            min((bad for bad in own if bad), default=0)
            for own in zip(*(read[count : 2 * count] for read in ranks), strict=True)
        ]
        finite = [good for read in ranks for good in read[2 * count :]]
        if any(first_bad) or not all(finite):
            raise NonFiniteError(_describe_non_finite(first_bad, finite, self.data.class_names, int(iteration)))
        steps = self._steps_read
        return Terms(*(total / steps if steps else float("nan") for total in sums))

    def all_images(self, *, everywhere: bool = False) -> Tensor | None:
        """The set of all classes, [K*ipc, C, H, W]: on the first rank, None on the others unless ``everywhere``.

        The images, or with ``image_average`` their running mean.
        """
        own = self.images if self.average is None else self.average
        return self.world.collect(own, self.data.num_classes, everywhere=everywhere)

    def _parts(self) -> dict[str, Tensor]:
        """What the next steps depend on, of this rank's classes, by the names in checkpoints."""
        average = {} if self.average is None else {"average": self.average}
        return {"images": self.images, "momentum": self.momentum, **average}

    def state(self) -> dict[str, Tensor] | None:
        """What a checkpoint must hold, of all classes, copied to the CPU of the first rank; None on the others.

        The generators' states follow from seed and iteration.
        """
        state = {name: self.world.collect(part, self.data.num_classes) for name, part in self._parts().items()}
        if self.world.rank > 0:
            return None
        return {name: tensor.cpu().contiguous().clone() for name, tensor in state.items()}

    def restore(self, state: dict[str, Tensor] | None) -> None:
        """Continue from what `state` returned, whatever the number of ranks was; only the first one's counts.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        expected = [self.data.num_classes * self.config.ipc, *self.data.image_shape]
        for name, part in self._parts().items():
            source = state.get(name) if self.world.rank == 0 else None
            if self.world.rank == 0 and (source is None or list(source.shape) != expected):
                found = "nothing" if source is None else list(source.shape)
                raise ValueError(f"saved {name} must be {expected}; got {found}")
            self.world.deal(source, part, self.data.num_classes)

    def capture(self) -> None:
        """Capture a step as a CUDA graph that `step` replays from then on; images and momentum stay as they are.

        Raises:
            RuntimeError: the images are not on a GPU.
        """
        if self.images.device.type != "cuda":
            raise RuntimeError(f"a CUDA graph needs images on a GPU; got {self.images.device}")
        self._with_less_memory(self._capture)

    def _capture(self) -> None:
        device = self.images.device
        with torch.cuda.device(device), self._unchanged():  # a graph keeps its generator's state on the current device
            stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_STEPS):
                    self._advance()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, stream=stream):
                self._advance()
        self._run = graph.replay

    def peak_memory(self, class_chunk: int) -> int:
        """Bytes at the peak of a step with ``class_chunk`` classes at once.

        On a GPU everything that PyTorch allocated there; on a CPU the tensors of data, network and step, counted.
        """
        self.set_class_chunk(class_chunk)
        cuda = self.images.is_cuda
        with self._unchanged():
            # What only a first step needs: compiled kernels, chosen algorithms.
            unfused_if_refused(self._advance, self.images.device)
            if not cuda:
                state = *self._parts().values(), self._gradient
                resident = (*self.network.parameters(), *state, *vars(self.data).values())
                with LiveBytes() as counter:
                    for tensor in resident:
                        counter.add(tensor)
                    self._advance()
                return counter.peak
            torch.cuda.synchronize(self.images.device)
            torch.cuda.reset_peak_memory_stats(self.images.device)
            self._advance()
            torch.cuda.synchronize(self.images.device)
        return torch.cuda.max_memory_allocated(self.images.device)

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Undo what the enclosed steps do to images, momentum, average and terms."""
        buffers = *self._parts().values(), self._sums, self._first_bad
        saved = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


def check_ranks(config: DistillConfig, data: ImageData, world: World) -> None:
    """Make sure that the classes can be dealt to the ranks.

    Raises:
        ValueError: there are more ranks than classes, or the norm couples the classes.
    """
    if world.size > 1 and config.norm == "batch":
        raise ValueError(
            f"norm 'batch' computes its statistics over all classes together, so they cannot be split among "
            f"{world.size} processes; use one process, or a norm of each sample (instance, layer, group)"
        )
    if world.size > data.num_classes:
        raise ValueError(
            f"{world.size} processes are more than the {data.num_classes} classes of {data.name}, each of which one "
            f"process computes; start at most {data.num_classes}"
        )


def _in_company(images: Tensor) -> Tensor:
    """A single image, or index of one, twice; its mean and its gradient's sum are exactly what they are for one.

    For a batch of one, PyTorch's convolution on a CPU takes another path, whose rounding differs. With it an image's
    bits would depend on how many classes run at once.
    """
    return images.expand(2, *images.shape[1:]) if len(images) == 1 else images


def make_network(config: DistillConfig, data: ImageData) -> ConvNet:
    """The ConvNet whose weights every step draws anew; they are constants, only images get a gradient."""
    channels, *size = data.image_shape
    network = ConvNet(
        channels,
        data.num_classes,
        tuple(size),
        width=config.width,
        depth=config.depth,
        norm=config.norm,
        pooling=config.pooling,
        initialization=config.network_init,
    )
    return network.requires_grad_(False)


def check_start(config: DistillConfig, data: ImageData) -> None:
    """Make sure that there are as many real images as synthetic ones are to start from.

    Raises:
        ValueError: a class has fewer; the message says what to do.
    """
    if config.image_init in ("real", "herding"):
        check_class_sizes(data, config.ipc, ", or start from noise (image_init 'noise', --image-init noise)")


def initial_images(
    config: DistillConfig, data: ImageData, preprocessing: Preprocessing, *, progress: bool = False
) -> Tensor:
    """What the synthetic images start from: float32 [K*ipc, C, H, W] in model space, class-major (line 1).

    Random distinct real images of each class, or Gaussian noise, drawn from ``config.seed``; or those that herding
    chooses (`atom_fast.evaluation.herding_selection`) in the features of a network that is trained from that seed on
    all real images for two epochs, augmented as the distillation, with a progress bar if ``progress``.

    Raises:
        ValueError: a class has fewer than ``config.ipc`` real images, or the images were to be given.
    """
    generator = torch.Generator(data.train_images.device).manual_seed(derive_seed(config.seed, 0))
    check_start(config, data)
    if config.image_init == "real":
        indices = sample_class_indices(data, config.ipc, generator).flatten()
        return preprocessing.to_model(data.train_images[indices])
    if config.image_init == "noise":
        shape = (data.num_classes * config.ipc, *data.image_shape)
        return torch.randn(shape, generator=generator, device=generator.device)
    if config.image_init == "herding":
        protocol = get_protocol("paper", augmentation=config.augmentation)
        features, _ = watch_training(
            data, preprocessing, protocol=protocol, epochs=_HERDING_EPOCHS, seed=config.seed, progress=progress
        )
        return preprocessing.to_model(data.train_images[herding_selection(features, data, config.ipc)])
    raise ValueError("image_init 'given' needs a synthetic set to start from")


def _describe_non_finite(
    first_bad: Sequence[float], finite: Sequence[float], class_names: Sequence[str], iteration: int
) -> str:
    terms = [f"{name} at iteration {int(bad)}" for name, bad in zip(TERMS, first_bad, strict=True) if bad]
    lost = [name for name, good in zip(class_names, finite, strict=True) if not good]
    message = f"NaN or infinity in {', '.join(terms) or f'the images after iteration {iteration}'}"
    if lost:
        message += f"; images lost in {len(lost)} of {len(class_names)} classes: {', '.join(lost[:5])}"
        message += ", ..." if len(lost) > 5 else ""
    return message + "; a smaller loss_scale or image_lr may help"
