"""Fresh networks trained on a synthetic set and tested on real images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from atom_fast._device import check_bfloat16
from atom_fast.data.dataset import ImageData
from atom_fast.data.sources import load_data
from atom_fast.distillation import ranks
from atom_fast.distillation.config import CONVNET_SETTINGS, preset
from atom_fast.distillation.logs import versions
from atom_fast.evaluation.results import (
    LARGEST_CONFUSION,
    Confusion,
    EvaluationResult,
    Network,
    locked_record,
    networks_of,
    read_records,
    write_record,
)
from atom_fast.names import TRAINING_PRECISIONS, first_few
from atom_fast.networks.convnet import default_depth
from atom_fast.networks.layers import memory_format
from atom_fast.pictures import method_name
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.ensemble import train_networks
from atom_fast.training.protocols import Protocol, check_count, default_protocol, get_protocol, own_steps
from atom_fast.training.trainer import (
    Trainer,
    accuracy,
    confusion,
    empty_network,
    in_model_space,
    network_seed,
    repeatable_convolutions,
)

_TRIAL_STEPS, _TRIAL_IMAGES = 100, 2000  # of a network that only tells two spaces apart


def evaluate(
    synthetic: SyntheticSet | Callable[[int], SyntheticSet],
    data: ImageData | None = None,
    *,
    network: str = "convnet",
    architecture: Mapping[str, Any] | None = None,
    networks: int = 5,
    protocol: Protocol | str | None = None,
    seed: int = 0,
    precision: str = "float32",
    evaluate_every: int | None = None,
    together: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    record: str | os.PathLike | None = None,
) -> EvaluationResult:
    """Train fresh networks on a set and test them on the whole test set after the last epoch.

    Several are trained at a time; see :mod:`atom_fast.training.ensemble`. Network i has its own generator, seeded
    from ``seed`` and i, for its initial weights, batch order, augmentation and dropout. It is the same network, to
    rounding, however many others there are. After :func:`atom_fast.distillation.ranks.join`, processes share the
    networks; each calls this function with the same arguments and gets the whole result.

    Args:
        synthetic: the set, or a function from a network's number to its own set, all of one size and one model space
            (:func:`atom_fast.evaluation.sets.random_sets`).
        data: real images of the same classes, for the test set; None loads the set's own data set where that needs no
            folder (digits).
        network: name of the architecture, as :func:`~atom_fast.networks.make_network` takes it.
        architecture: settings of :class:`~atom_fast.networks.ConvNet` other than the image's; None is
            `architecture_of` the set. The depth, where it is not given, is the usual one for the image size.
        networks: number of networks.
        protocol: how to train, or its name in ``PROTOCOLS``; None is `protocol_of` the set.
        seed: of the networks.
        precision: "float32" (on a GPU convolutions may use TF32), or "bfloat16" to train under autocast; networks are
            always tested in float32.
        evaluate_every: test also after every so many epochs; None tests after the last one only.
        together: train at most so many networks at a time; None chooses.
        device: where to train; None: the GPU, if there is one.
        progress: show a progress bar on standard error, with the accuracy so far.
        record: JSON file, updated whenever a network finishes. An equal call, also with more or fewer ``networks``,
            trains only what the file lacks. Other evaluations in the file stay there.

    Raises:
        TypeError: an argument is another kind of object, such as a path in place of a set.
        ValueError: the set does not fit the data, ``data`` is needed, an unknown protocol or network, a setting that is
            not accepted, or ``record`` is another kind of file.
    """
    _check_settings(networks, precision, evaluate_every, together, seed)
    device = ranks.own_device(device)
    if precision == "bfloat16":
        check_bfloat16(device)
    own_sets, shared = (synthetic, synthetic(0)) if callable(synthetic) else (None, synthetic)
    data = _own_data(shared) if data is None and isinstance(shared, SyntheticSet) else data
    if protocol is None and isinstance(data, ImageData) and isinstance(shared, SyntheticSet):
        protocol = protocol_of(shared, data.name)
    elif isinstance(protocol, str):
        protocol = get_protocol(protocol)
    _check_kinds(shared, data, protocol)
    assert isinstance(data, ImageData) and isinstance(protocol, Protocol)  # for the type checker
    _check_fit(shared, data)
    if network == "convnet":
        given = architecture_of(shared, data.name) if architecture is None else architecture
        architecture = {"depth": default_depth(*data.image_shape[1:]), **given}
    task = _Task.prepare(shared, own_sets, data, device, protocol, network, dict(architecture or {}), precision, seed)
    digest = _hash(task, shared, evaluate_every)
    earlier = _find(record, digest)
    known = networks_of(earlier)
    known += [({}, None) for _ in range(networks - len(known))]
    jobs = [index for index, (curve, _) in enumerate(known[:networks]) if not curve]
    about, installed = _about(shared, data, None if own_sets else shared.fingerprint), versions()
    started = time.perf_counter()

    def result(known: Sequence[Network]) -> EvaluationResult:
        return EvaluationResult(
            about=about,
            curves=tuple(curve for curve, _ in known),
            confusions=tuple(matrix for _, matrix in known),
            protocol=protocol,
            network=network,
            architecture=task.architecture,
            precision=precision,
            seed=seed,
            seconds=earlier["seconds"] + time.perf_counter() - started,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        )

    bar_total = len(ranks.own_jobs(jobs)) * protocol.epochs
    with repeatable_convolutions(), tqdm(total=bar_total, desc=network, unit="epoch", disable=not progress) as bar:
        options = {"evaluate_every": evaluate_every, "together": together, "advance": bar.update}
        train = functools.partial(train_networks, task.make_trainer, start=task.start, test=task.test, **options)
        for index, tested in ranks.share(jobs, train):
            curve = {epoch: percent for epoch, (percent, _) in tested.items()}
            known[index] = curve, tested[protocol.epochs][1]
            so_far = result(known[:networks])
            finished = networks - len(so_far.unfinished)
            bar.set_postfix_str(f"{finished} networks: {so_far.mean:.1f} ± {so_far.std:.1f} %")
            if record is not None and ranks.is_first():
                with locked_record(record):  # what another process, or a call with more networks, put there stays
                    saved = _merged(known, read_records(record), digest)
                    write_record(record, {"hash": digest, **result(saved).to_dict(), "versions": installed})
    return result(known[:networks])


def likeliest_space(
    sets: Sequence[SyntheticSet], data: ImageData, *, device: torch.device | str | None = None, progress: bool = True
) -> tuple[int, list[float | None]]:
    """Train one short network on each of some sets, to find the one whose model space its images are in.

    Networks are tested on training images, so that nothing is chosen by the test set.

    Args:
        sets: the same images, each time said to be in another space, such as those of
            `atom_fast.synthetic.recognised_sets`.
        data: the real images.
        device: where to train; None: the GPU, if there is one.
        progress: show a progress bar on standard error.

    Returns:
        The position of the best, and the accuracies in percent; None for a network that diverged.
    """
    place = ranks.own_device(device)
    chosen = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))[:_TRIAL_IMAGES]
    chosen = chosen.to(data.train_images.device)
    seen = {"test_images": data.train_images[chosen], "test_labels": data.train_labels[chosen]}
    real = dataclasses.replace(data, **seen)
    accuracies = []
    for synthetic in tqdm(sets, desc="which space", unit="network", disable=not progress):
        _check_fit(synthetic, data)
        protocol = get_protocol(default_protocol(data.name))
        steps = -(-len(synthetic) // protocol.batch_size)
        protocol = dataclasses.replace(protocol, epochs=-(-_TRIAL_STEPS // steps))
        architecture = {"depth": default_depth(*data.image_shape[1:]), **architecture_of(synthetic, data.name)}
        task = _Task.prepare(synthetic, None, real, place, protocol, "convnet", architecture, "float32", 0)
        options = {"evaluate_every": None, "together": 1, "advance": lambda: None}
        with repeatable_convolutions():
            [(_, curve)] = train_networks(task.make_trainer, [0], task.start, task.test, **options)
        accuracies.append(curve[protocol.epochs][0])
    return max(range(len(sets)), key=lambda number: accuracies[number] or 0.0), accuracies


def architecture_of(synthetic: SyntheticSet, dataset: str) -> dict[str, Any]:
    """Return the settings of the :class:`~atom_fast.networks.ConvNet` that a set is tested on.

    They are the ones it was distilled with. Real images and other programs' sets record none; theirs are those of the
    preset "paper" for such data and as many images per class, so that both are tested on the same networks.

    Args:
        synthetic: the set.
        dataset: name of the data it is tested on, as in ``ImageData.name``.

    Raises:
        ValueError: a recorded setting is not one that a distillation accepts.
    """
    config = synthetic.metadata.get("config", {})
    recorded = {setting: config[setting] for setting in CONVNET_SETTINGS if config.get(setting) is not None}
    per_class = max(1, len(synthetic.sheets) // len(synthetic.class_names))  # the mean, where classes differ in size
    _, channels, height, width = synthetic.sheets.shape
    return preset("paper", ipc=per_class, **recorded).for_data((channels, height, width), dataset).convnet_settings()


def protocol_of(synthetic: SyntheticSet, dataset: str, **overrides) -> Protocol:
    """Return how networks are trained on a set by default: the data set's protocol, with what the set has learnt.

    A set of MTT or TESLA is trained at the learning rate that was learnt with it, one of DD by its own steps.

    Args:
        synthetic: the set.
        dataset: name of the data it is tested on, as in ``ImageData.name``.
        **overrides: settings of the protocol, see `get_protocol`; for a set's own steps there is none.

    Raises:
        ValueError: an unknown setting, or a value that is not accepted.
    """
    learnt = synthetic.metadata.get("learnt", {})
    if "step_sizes" in learnt:
        if overrides:
            raise ValueError(
                f"a set that is trained by its own steps has no {first_few(list(overrides))}: give a protocol"
            )
        return own_steps(learnt["step_sizes"], len(synthetic.class_names))
    own = {"learning_rate": learnt["step_size"]} if "step_size" in learnt else {}
    return get_protocol(default_protocol(dataset), **{**own, **overrides})


@dataclasses.dataclass(frozen=True)
class _Task:
    """What the networks of an evaluation share, on its device.

    Attributes:
        images, labels: the set and its targets, or the first network's where each has its own.
        own_sets: from a network's number to its set; None where they share one.
        layout: of weights and images.
        scale: factor on images in model space; already applied to ``images`` and ``test_images``.
        The others as in :func:`evaluate`.
    """

    images: Tensor
    labels: Tensor
    own_sets: Callable[[int], SyntheticSet] | None
    data: ImageData
    test_images: Tensor
    test_labels: Tensor
    device: torch.device
    layout: torch.memory_format
    scale: float
    protocol: Protocol
    network: str
    architecture: dict[str, Any]
    precision: str
    seed: int

    @classmethod
    def prepare(cls, synthetic, own_sets, data, device, protocol, network, architecture, precision, seed) -> _Task:
        """Bring the set and the test set to the device."""
        layout = memory_format(empty_network(network, architecture, data, device), device)
        scale = 1 / synthetic.preprocessing.deviation if protocol.unit_variance else 1.0
        return cls(
            images=_in_layout(synthetic.images.to(device), layout).mul_(scale),
            labels=synthetic.targets.to(device),
            own_sets=own_sets,
            data=data,
            # Whitened once: that costs as much as a test.
            test_images=in_model_space(data.test_images, synthetic.preprocessing, device, layout).mul_(scale),
            test_labels=data.test_labels.to(device),
            device=device,
            layout=layout,
            scale=scale,
            protocol=protocol,
            network=network,
            architecture=architecture,
            precision=precision,
            seed=seed,
        )

    def make_trainer(self) -> Trainer:
        """Make a trainer; where each network has its own set, its buffers for the set are its own too."""
        network = empty_network(self.network, self.architecture, self.data, self.device)
        network.to(memory_format=self.layout)
        images, labels = self.images, self.labels
        if self.own_sets is not None:
            images, labels = images.clone(), labels.clone()
        return Trainer(network, images, labels, self.protocol, precision=self.precision)

    def start(self, trainer: Trainer, index: int) -> None:
        """Make a trainer ready for a network."""
        if self.own_sets is not None:
            own = self.own_sets(index)
            _check_fit(own, self.data)
            if len(own) != len(trainer.images):
                raise ValueError(
                    f"the networks' sets must be of one size; got one of {len(own)} images beside {len(trainer.images)}"
                )
            trainer.images.copy_(own.images).mul_(self.scale)
            trainer.labels.copy_(own.targets)
        trainer.restart(network_seed(self.seed, index))

    def test(self, trainer: Trainer) -> tuple[float | None, Confusion | None]:
        """Return the accuracy of a trainer's network in percent, and after the last epoch its confusion matrix.

        Both are None where it diverged. There is no matrix of more than ``LARGEST_CONFUSION`` classes.
        """
        tested = trainer.network, self.test_images, self.test_labels
        if trainer.epoch < self.protocol.epochs or self.data.num_classes > LARGEST_CONFUSION:
            return accuracy(*tested), None
        matrix = confusion(*tested, self.data.num_classes)
        if matrix is None:
            return None, None
        return 100 * matrix.trace().item() / len(self.test_images), matrix.tolist()


def _in_layout(images: Tensor, layout: torch.memory_format) -> Tensor:
    """A copy of images [N, C, H, W] in a layout, with its strides even where a size of one leaves them open."""
    return torch.empty(images.shape, device=images.device, memory_format=layout).copy_(images)


def _own_data(synthetic: SyntheticSet) -> ImageData:
    """The data set that a set was made from, where it needs no folder."""
    name = synthetic.metadata.get("dataset")
    if name != "digits":
        wanted = f"the set was made from {name!r}" if name else "the set does not say which data set it is for"
        call = f"load_data({name!r}, FOLDER)" if name else "load_data(NAME, FOLDER)"
        raise ValueError(f"{wanted}: pass data={call}")
    height, width = synthetic.sheets.shape[2:]
    return load_data("digits", resolution=height if height == width else None, progress=False)


def _about(synthetic: SyntheticSet, data: ImageData, fingerprint: str | None) -> dict[str, Any]:
    metadata = synthetic.metadata
    made_from = metadata.get("dataset_fingerprint")
    return {
        "dataset": data.name,
        "ipc": synthetic.ipc,
        "partition": synthetic.partition,
        "method": metadata.get("method") or method_name(metadata.get("config", {})),
        "config_hash": metadata.get("config_hash"),
        "set_seconds": metadata.get("seconds"),
        "same_data": None if made_from is None else made_from == data.fingerprint,
        "set_fingerprint": fingerprint,
    }


def _hash(task: _Task, synthetic: SyntheticSet, evaluate_every: int | None) -> str:
    """SHA-256 of everything that a network's curve depends on except its number and the device."""
    settings = {
        "data": task.data.fingerprint,
        "protocol": task.protocol.to_dict(),
        "network": task.network,
        "architecture": task.architecture,
        "precision": task.precision,
        "seed": task.seed,
        "evaluate_every": evaluate_every,
        "own_sets": task.own_sets is not None,
    }
    if synthetic.partition > 1:  # apart from a set that stores the same images one by one
        settings["partition"] = synthetic.partition
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    tensors = {"images": synthetic.images, "labels": synthetic.targets, **synthetic.preprocessing.tensors()}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content: Any = tensor.detach().cpu().contiguous().numpy()
        digest.update(content)
    return digest.hexdigest()


def _merged(known: Sequence[Network], records: Sequence[Mapping[str, Any]], digest: str) -> list[Network]:
    """Return networks, and those of an equal evaluation in a file where one is not finished here."""
    saved = next((networks_of(record) for record in records if record["hash"] == digest), [])
    return [own if own[0] else other for own, other in itertools.zip_longest(known, saved, fillvalue=({}, None))]


def _find(path: str | os.PathLike | None, digest: str) -> dict[str, Any]:
    """The record of an evaluation as the first rank finds it, or an empty one."""
    found: dict[str, Any] = {"seconds": 0.0, "curves": []}
    if path is not None and ranks.is_first():
        found = next((record for record in read_records(path) if record["hash"] == digest), found)
    return ranks.all_gather_object({name: found.get(name) for name in ("seconds", "curves", "confusions")})[0]


def _check_settings(networks: int, precision: str, evaluate_every: int | None, together: int | None, seed: int) -> None:
    check_count("networks", networks)
    check_count("seed", seed, 0)
    if precision not in TRAINING_PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(TRAINING_PRECISIONS)}; got {precision!r}")
    for name, value in (("evaluate_every", evaluate_every), ("together", together)):
        check_count(name, value, optional=True)


def _check_kinds(synthetic: object, data: object, protocol: object) -> None:
    """Name an argument that is another kind of object, such as a path in place of what the file there holds."""
    kinds = (
        ("the set to evaluate", synthetic, SyntheticSet, "SyntheticSet.load(path) reads one"),
        ("data", data, ImageData, "load_data(name) reads them"),
        ("protocol", protocol, Protocol, "get_protocol(name) makes one"),
    )
    for name, value, kind, advice in kinds:
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__} ({advice}); got {type(value).__name__}")


def _check_fit(synthetic: SyntheticSet, data: ImageData) -> None:
    """Check that a set can be trained on for the test set of ``data``."""
    if synthetic.class_names != data.class_names:
        raise ValueError(
            f"the set was made for the {len(synthetic.class_names)} classes {first_few(synthetic.class_names)}; "
            f"{data.name} has the {data.num_classes} classes {first_few(data.class_names)}"
        )
    if tuple(synthetic.sheets.shape[1:]) != data.image_shape:
        raise ValueError(
            f"images must be [N, {', '.join(map(str, data.image_shape))}] to fit the test set of {data.name}; "
            f"got {list(synthetic.sheets.shape)}"
        )
    synthetic.check()
