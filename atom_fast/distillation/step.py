"""One step of Algorithm 1 of the ATOM paper, entirely on the device, and its capture as a CUDA graph."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from atom_fast._device import convolution_precision, is_out_of_memory, refuse_triton, triton_refusal
from atom_fast._seeds import derive_seed
from atom_fast.data.augmentation import AugmentationParameters, augment, decode_and_augment, draw_stages, unchanged
from atom_fast.data.dataset import ImageData
from atom_fast.data.placement import readable
from atom_fast.data.sampling import sample_class_indices
from atom_fast.data.whitening import Preprocessing, real_image_gatherer
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.joint_passes import JointPasses
from atom_fast.distillation.logs import log
from atom_fast.distillation.matching import (
    characteristic_loss,
    describe_fusion,
    draw_frequencies,
    joint_refusal,
    make_extractor,
    matching_terms,
    weighted_terms,
)
from atom_fast.distillation.memory import WORTH_SAYING, step_memory
from atom_fast.distillation.pool import Pool, easiest
from atom_fast.distillation.run import Run
from atom_fast.distillation.stages import stage
from atom_fast.functional import class_groups
from atom_fast.networks.convnet import ConvNet
from atom_fast.ops.launching import KernelError
from atom_fast.ops.matching import ClassGroups

_WARM_UP_STEPS = 3  # before a capture, so that libraries choose algorithms and allocate workspaces outside it
# The gradient is computed times this power of two where it is stored in float16, whose smallest number is 6e-8, and
# divided by it in float32. The largest stored ones then reach a thousand (`python -m benchmarks precision`).
FLOAT16_FACTOR = 2.0**10
_AVERAGE_POWER = 3  # of image_average: step t weighs about t^3, most of it in the last third


class Terms(typing.NamedTuple):
    """Mean loss terms over the steps since the last reading.

    Attributes:
        loss: scale * (attention_loss + mmd_weight * mmd_loss), equation 4, with the two others times their weights in
            the bracket.
        attention_loss: L_ATOM, equation 3, summed over layers and classes.
        mmd_loss: L_MMD, summed over classes.
        characteristic_loss: distance of the embeddings' characteristic functions, summed over classes; 0 without
            ``characteristic_weight``.
        calibration_loss: cross-entropy of the synthetic images, summed over classes; 0 without ``calibration_weight``.
    """

    loss: float
    attention_loss: float
    mmd_loss: float
    characteristic_loss: float
    calibration_loss: float


class _Chunk(typing.NamedTuple):
    """Classes that run through the network together."""

    classes: slice  # of the K classes
    rows: slice  # of the synthetic images
    real_labels: Tensor  # int64, class of each real image, counted from the chunk's first
    labels: Tensor  # int64, class of each synthetic image, likewise
    groups: ClassGroups

    @property
    def size(self) -> int:
        """Number of classes."""
        return self.classes.stop - self.classes.start


class Distillation(Run):
    """Synthetic images that match real ones (DM, DAM, ATOM), their momentum, and all that a step needs, on one device.

    Attributes:
        momentum: of the same shape, the buffer of SGD.
        average: of the same shape, the running mean of ``image_average``; None without it.
        labels: int64 [len(classes)*ipc], the class of each image.
        class_chunk: classes that run at once. The gradient is exactly the sum over chunks: a norm of each sample leaves
            the classes independent, and BatchNorm's sums are joined (`JointPasses`).
        network: the ConvNet that every step draws again, at random or from ``pool``.
        pool: trained networks; None without ``pool_networks``.
        extract: what is matched of images, by that network (`make_extractor`).
        fusion: how the network runs, in words for the log; ``matching.FUSED`` where it is fused.
    """

    Terms = Terms
    _RATES = ("image_lr", "loss_scale")

    def __init__(
        self,
        config: DistillConfig,
        data: ImageData,
        preprocessing: Preprocessing,
        images: Tensor,
        *,
        classes: range | None = None,
        pool: Pool | None = None,
        progress: bool = False,
    ):
        """Prepare the steps.

        Args:
            config: resolved settings (`DistillConfig.resolve`).
            data: real images of all K classes, on the device that computes. Randomness is drawn for all of them, so
                that the images of a class do not depend on which others are distilled here.
            preprocessing: on the same device.
            images: float32 [len(classes)*ipc, C, H, W], the initial images; copied.
            classes: consecutive classes to distil; None: all of them.
            pool: what ``config.pool_networks`` asks for (`trained_pool`), on the same device; None where it is 0.
            progress: show long preparations on standard error.

        Raises:
            ValueError: ``images`` has another shape, or the norm couples the classes, not all run at once, and the
                network cannot join them (`joint_refusal`).
        """
        device, classes = data.train_images.device, range(data.num_classes) if classes is None else classes
        network = make_convnet(config, data)
        names, unscaled = zip(*weighted_terms(network, config), strict=True)
        # pyrefly: ignore[unsupported-operation]  a number in resolved settings
        weights = torch.tensor(unscaled) * config.loss_scale  # the loss is their product with the terms
        super().__init__(config, data, images, classes, names, weights.tolist())
        self.pool = pool
        self._sampled = data if pool is None else easiest(data, pool.scores, config.easy_fraction)
        self.momentum = torch.zeros_like(self.images)
        self.average = self.images.clone() if config.image_average else None
        self.labels = torch.arange(classes.start, classes.stop, device=device).repeat_interleave(config.ipc)
        self.network = arrange(network, device)
        self._draw_network = self.network.drawer() if pool is None else functools.partial(pool.draw, self.network)
        self.extract = make_extractor(self.network, config)
        self.fusion = describe_fusion(self.network, config, self.images)
        self._held = config.ipc * config.partition**2  # images of a class on its sheets
        self._drawn = self._held if config.synthetic_batch is None else min(config.synthetic_batch, self._held)
        self.gather_real = real_image_gatherer(
            data, preprocessing, memory_format=torch.channels_last, precision=config.precision, progress=progress
        )
        self._factor = FLOAT16_FACTOR if config.precision == "float16" else 1.0
        self._factored = weights.to(device) * self._factor
        self._passes = JointPasses(data.num_classes)
        self.set_class_chunk(config.class_chunk or len(classes))

    def set_class_chunk(self, size: int) -> None:
        """Run ``size`` classes at once from the next step on; a captured step is dropped.

        Raises:
            ValueError: ``size`` is below 1, or below the number of classes where these cannot be joined.
        """
        device, all_classes = self.images.device, self.data.num_classes
        if size < 1:
            raise ValueError(f"class_chunk must be at least 1; got {size}")
        if size < all_classes and (reason := joint_refusal(self.network, self.config)):
            raise ValueError(f"class_chunk must be all {all_classes} classes; got {size}: {reason}")
        self.class_chunk = min(size, len(self.classes))
        # All classes at once take, on a GPU, a kernel of the whole batch; on a CPU joining them costs nothing, and the
        # bits are the same for any number of processes.
        parts = self.class_chunk < all_classes
        self._passes.joined = self.config.norm == "batch" and (parts or device.type == "cpu")
        self._chunks = []
        position = torch.arange(all_classes, device=device) - self.classes.start
        self._first_held = position % self.class_chunk * self._held
        for start in range(0, len(self.classes), self.class_chunk):
            chosen = self.classes[start : start + self.class_chunk]
            numbers = torch.arange(len(chosen), device=device)
            real_labels, labels = (
                numbers.repeat_interleave(each if len(chosen) * each > 1 else 2)  # see pad_batch_of_one
                for each in (self.config.real_batch, self._drawn)
            )
            rows = slice(start * self.config.ipc, (start + len(chosen)) * self.config.ipc)
            groups = class_groups(real_labels, labels).of_classes(len(chosen))
            self._chunks.append(_Chunk(slice(chosen.start, chosen.stop), rows, real_labels, labels, groups))
        self._run = self._step

    def step(self, iteration: int) -> None:
        """Run iteration ``iteration`` (1, 2, ...). Its randomness depends on that number and the seed alone.

        Nothing is read back from the device. On out-of-memory, halve the number of classes that run at once and retry;
        a kernel that does not run on this device is replaced by PyTorch's operators, with a warning.
        """
        self.iteration = iteration
        self._iteration.fill_(iteration)
        while True:
            self.generator.manual_seed(derive_seed(self.config.seed, iteration))
            try:
                self._run()
                break
            except RuntimeError as error:
                recover = self._way_out(error)
            recover()  # outside the handler: its traceback keeps the failed step's tensors alive
        self._steps += 1

    def _step(self) -> None:
        """Lines 3 to 7 of Algorithm 1, on the device. Images change only after the last allocation."""
        config, generator = self.config, self.generator
        with stage("network"):  # 3: theta ~ P_theta
            self._draw_network(generator)
        with stage("sample"):
            indices = sample_class_indices(self._sampled, config.real_batch, generator)  # 4: B_k^T
        with stage("augment"):  # siamese: the same operations for the real and synthetic images of a class
            drawn = draw_stages(self.data.num_classes, generator, strategy=config.augmentation)
        with stage("sample"):
            chosen = self._choose(generator)
            frequencies = None
            if config.characteristic_weight > 0:
                frequencies = draw_frequencies(self.network.embedding_size, generator)
        matched, reals = [], {}
        for chunk in self._passes.over(self._chunks):  # one of all classes, unless memory is short
            synthetic = terms = None  # what is left of a chunk that had to wait: its graph, as large as the next one's
            with self._passes.part(chunk.size):
                own = [parameters.of_groups(chunk.classes) for parameters in drawn]
                self._passes.begin("real")
                real = reals.pop(chunk.rows.start, None)
                if real is None:
                    with stage("sample"):
                        real = self.gather_real(pad_batch_of_one(indices[chunk.classes].flatten()))
                    with stage("augment"):
                        for parameters in own:
                            real = augment(real, parameters, chunk.real_labels)
                    with self._precision(config.precision_of_real), stage("real"), torch.no_grad():
                        real = self.extract(real)
                if self._passes.repeats:
                    reals[chunk.rows.start] = real
                self._passes.begin("synthetic")
                images = self.images[chunk.rows].detach().requires_grad_()  # 4: B_k^S
                with stage("augment"):
                    synthetic, others = self._cut_out(images, own, chunk, chosen)
                    for parameters in others:
                        synthetic = augment(synthetic, parameters, chunk.labels)
                with self._precision(config.precision):
                    with stage("synthetic"):
                        synthetic = self.extract(synthetic)
                    with stage("loss"):
                        terms = matching_terms(real, synthetic, config, chunk.groups)  # 5
                        if frequencies is not None:
                            characteristic = characteristic_loss(real[0], synthetic[0], frequencies, chunk.size)
                            terms = torch.cat((terms, characteristic.view(1)))
                        if config.calibration_weight > 0:
                            terms = torch.cat((terms, self._cross_entropy(synthetic[0], chunk).view(1)))
                    del real, synthetic  # the backward pass needs little of them
                    with stage("backward"):  # 6: of the loss, which is weights @ terms
                        (gradient,) = torch.autograd.grad(terms, images, self._factored)
                        unscaled = gradient if self._factor == 1 else gradient.div_(self._factor)
                        matched.append((chunk.rows, terms.detach(), unscaled))
        self._passes.forget()
        with stage("update"):
            for rows, terms, gradient in matched:  # no allocation from here on
                momentum = self.momentum[rows]
                torch.add(gradient, momentum, alpha=config.momentum, out=momentum)  # 7: SGD
                self.images[rows].sub_(momentum, alpha=config.image_lr)
                self._record(terms)
            self._count()
            if self.average is not None:
                self.average.lerp_(self.images, (_AVERAGE_POWER + 1) / (self._iteration + _AVERAGE_POWER))

    def _precision(self, precision: str) -> contextlib.AbstractContextManager[None]:
        return convolution_precision(precision, self.images.device, self.config.deterministic)

    def _cut_out(
        self, images: Tensor, stages: Sequence[AugmentationParameters], chunk: _Chunk, chosen: Tensor | None
    ) -> tuple[Tensor, Sequence[AugmentationParameters]]:
        """Return the images on a chunk's sheets, with the first stage applied, and the stages that are left."""
        if self.config.partition == 1 and chosen is None:
            return pad_batch_of_one(images), stages
        if chosen is not None:
            chosen = pad_batch_of_one(chosen[chunk.classes].flatten())
        first = stages[0] if stages else unchanged(len(chunk.labels), images.device)
        options = {"partition": self.config.partition, "chosen": chosen}
        return decode_and_augment(images, first, chunk.labels, **options), stages[1:]

    def _choose(self, generator: torch.Generator) -> Tensor | None:
        """Draw ``synthetic_batch`` of the images on each class's sheets; None where all are used.

        Returns:
            int64 [K, batch], numbered from the first image of the class's chunk.
        """
        if self._drawn == self._held:
            return None
        keys = torch.rand(self.data.num_classes, self._held, device=self.images.device, generator=generator)
        return keys.topk(self._drawn, dim=1).indices.sort(dim=1).values + self._first_held[:, None]

    def _cross_entropy(self, embedding: Tensor, chunk: _Chunk) -> Tensor:
        """Return the cross-entropy of synthetic images on the drawn network, the mean of a class, summed over classes.

        Args:
            embedding: [B, D] of the synthetic images.
            chunk: their classes.
        """
        labels = chunk.labels + chunk.classes.start
        logits = self.network.classifier(embedding)
        return F.cross_entropy(logits.float(), labels) * chunk.size

    def _way_out(self, error: RuntimeError) -> Callable[[], None]:
        """Return what to do before a failed step or capture is tried again; re-raise the error if nothing helps."""
        device = self.images.device
        if isinstance(error, KernelError) and not triton_refusal(device):
            return functools.partial(refuse_triton, device, str(error.__cause__).strip())
        if is_out_of_memory(error) and self.class_chunk > 1 and not self._is_coupled():
            return self._halve_class_chunk
        raise error

    def _is_coupled(self) -> bool:
        """True if this process must not run its classes otherwise than the other processes run theirs."""
        if self.config.norm != "batch":
            return False
        several = len(self.classes) < self.data.num_classes
        captured = several and self.images.is_cuda  # a capture that is tried again would gather more often than others
        return captured or joint_refusal(self.network, self.config) is not None

    def _halve_class_chunk(self) -> None:
        if self.images.is_cuda:
            torch.cuda.empty_cache()
        smaller = (self.class_chunk + 1) // 2
        config = dataclasses.replace(self.config, class_chunk=self.class_chunk)
        needed = step_memory(config, self.data, len(self.classes))
        about = f" ({readable(needed)})" if needed and needed >= WORTH_SAYING else ""
        log(f"out of memory with {self.class_chunk} classes at once{about}: continuing with {smaller}")
        self.set_class_chunk(smaller)

    @property
    def result(self) -> Tensor:
        """The images, or with ``image_average`` their running mean."""
        return self.images if self.average is None else self.average

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next steps depend on, by name; not copies. Randomness follows from the seed."""
        average = {} if self.average is None else {"average": self.average}
        return {"images": self.images, "momentum": self.momentum, **average}

    def capture(self) -> None:
        """Capture a step as a CUDA graph that `step` replays from then on; images and momentum stay as they are.

        Raises:
            RuntimeError: the images are not on a GPU.
        """
        if self.images.device.type != "cuda":
            raise RuntimeError(f"a CUDA graph needs images on a GPU; got {self.images.device}")
        while True:
            try:
                self._run = self._captured_step().replay
                break
            except RuntimeError as error:
                recover = self._way_out(error)
            recover()  # outside the handler, as in `step`

    def _captured_step(self) -> torch.cuda.CUDAGraph:
        device = self.images.device
        with torch.cuda.device(device), self._unchanged():  # a graph keeps its generator's state on the current device
            stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream(device))
            torch._C._cuda_clearCublasWorkspaces()  # every stream gets its own, 33 MB; replays use only this one's
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_STEPS):
                    self._step()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, stream=stream):
                self._step()
        return graph

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Undo what the enclosed steps do to images, momentum, average and terms."""
        buffers = *self.state().values(), self._sums, self._finite
        saved = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


def pad_batch_of_one(images: Tensor) -> Tensor:
    """Return a batch of one image (or index) as a batch of it twice; its mean and summed gradient are exactly the same.

    PyTorch's convolution on a CPU rounds a batch of one differently. Without the padding an image's bits would depend
    on how many classes run at once.
    """
    return images.expand(2, *images.shape[1:]) if len(images) == 1 else images


def make_convnet(config: DistillConfig, data: ImageData) -> ConvNet:
    """Return the ConvNet whose weights every step draws again; they are constants, only images get a gradient."""
    channels, height, width = data.image_shape
    network = ConvNet(channels, data.num_classes, (height, width), **config.convnet_settings())
    return network.requires_grad_(False)


def arrange(network: ConvNet, device: torch.device) -> ConvNet:
    """Move a network to a device, its filters in the layout that their convolution reads."""
    # pyrefly: ignore[no-matching-overload]  PyTorch's stubs lack a device beside a memory format
    network = network.to(device, memory_format=torch.channels_last)
    if network.unfused_reason() is None:
        first = network.blocks[0].convolution.weight
        first.data = first.data.contiguous()
    return network
