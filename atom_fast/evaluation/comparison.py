"""A synthetic set's accuracy beside that of randomly selected real images, as one record."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping

import torch

from atom_fast import __version__
from atom_fast._seeds import derive_seed
from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import describe_small_classes
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.config import preset
from atom_fast.distillation.ranks import ALONE, World, own_device
from atom_fast.evaluation import EvaluationResult, Protocol, evaluate, get_protocol, random_selection
from atom_fast.pictures import method_name
from atom_fast.synthetic import SyntheticSet


def compare(
    synthetic: SyntheticSet,
    data: ImageData,
    *,
    protocol: Protocol | str | None = None,
    networks: int = 5,
    seed: int = 0,
    network: str = "convnet",
    precision: str = "float32",
    random: bool = True,
    evaluate_every: int = 0,
    together: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    earlier: Mapping | None = None,
    on_network: Callable[[dict], None] | None = None,
    world: World = ALONE,
) -> dict:
    """Train networks on a synthetic set, and as many on random real images, and test both on the real test set.

    A ConvNet has the architecture and the initialisation of :func:`architecture_of`.

    Args:
        synthetic: the set.
        data: real images of the same classes.
        protocol: how to train, or a preset's name; None is ``default_protocol(data.name)``.
        networks: how many on each side.
        seed: of networks and selections.
        network: their architecture, a key of :data:`~atom_fast.networks.NETWORKS`.
        precision, evaluate_every, together: see :func:`atom_fast.evaluation.evaluate`.
        random: measure Random, too.
        device: where to train; None: the GPU, if there is one.
        progress: show progress bars on standard error.
        earlier: a record of an earlier call. The networks that it holds are not trained again, and a complete one is
            returned as it is. Passed over where anything was not as it is now.
        on_network: called with the record so far whenever networks have finished.
        world: several processes that share the networks; see :func:`atom_fast.evaluation.evaluate`.

    Returns:
        What JSON can hold: ``dataset``, ``ipc``, ``method``, ``accuracy_mean``, ``accuracy_std``, ``random_mean``,
        ``random_std`` (per cent; None where not measured or all diverged), ``seconds`` (of the distillation),
        ``device`` (of the evaluation), ``config_hash``, ``same_data`` (whether ``data`` is what the set was made from;
        None where it does not say), in full ``evaluation`` and ``random_evaluation`` as
        :meth:`EvaluationResult.to_dict` writes them, and ``state``: whether it is ``complete``, and a ``hash`` of
        everything the result depends on but ``network``, so that it is the same for all networks of a command.

    Raises:
        ValueError: the set's classes or image size are not the data's; or ``random`` for classes of different sizes, or
            of more images than there are real ones.
    """
    _check_fit(synthetic, data, random)
    protocol = default_protocol(data.name) if protocol is None else protocol
    convnet = architecture_of(synthetic, data.name)
    settings = {
        "protocol": get_protocol(protocol) if isinstance(protocol, str) else protocol,
        "networks": networks,
        "seed": seed,
        "precision": precision,
        "evaluate_every": evaluate_every,
    }
    space = synthetic.preprocessing
    sides = {"evaluation": functools.partial(evaluate, synthetic.images, synthetic.labels, data, space)}
    if random:
        sides["random_evaluation"] = functools.partial(evaluate_random, data, synthetic.ipc, space)
    digest = _hash(synthetic, data, {**settings, "convnet": convnet, "random": random})
    record = _Record(synthetic, data, digest, {})
    earlier = _of_same(earlier, digest, network)
    if earlier and earlier["state"]["complete"]:
        return dict(earlier)
    settings |= {"network": network, "architecture": convnet if network == "convnet" else {}}
    settings |= {"device": own_device(device, world), "world": world}
    for side, measure in sides.items():

        def note(result: EvaluationResult, side: str = side) -> None:
            record.sides[side] = result.to_dict()
            if on_network is not None:
                on_network(record.to_dict(complete=False))

        result = measure(
            **settings, together=together, progress=progress, earlier=_curves(earlier.get(side)), on_network=note
        )
        record.sides[side] = result.to_dict()
    return record.to_dict(complete=True)


@dataclasses.dataclass(frozen=True)
class _Record:
    """What :func:`compare` returns, as far as it is known."""

    synthetic: SyntheticSet
    data: ImageData
    hash: str
    sides: dict[str, dict]

    def to_dict(self, complete: bool) -> dict:
        metadata = self.synthetic.metadata
        result, baseline = (self.sides.get(side) or {} for side in ("evaluation", "random_evaluation"))
        made_from = metadata.get("dataset_fingerprint")
        return {
            "dataset": self.data.name,
            "ipc": self.synthetic.ipc,
            "method": metadata.get("method") or method_name(metadata.get("config", {})),
            "accuracy_mean": result.get("accuracy_mean"),
            "accuracy_std": result.get("accuracy_std"),
            "random_mean": baseline.get("accuracy_mean"),
            "random_std": baseline.get("accuracy_std"),
            "seconds": metadata.get("seconds"),
            "device": result.get("device"),
            "config_hash": metadata.get("config_hash"),
            "same_data": None if made_from is None else made_from == self.data.fingerprint,
            "evaluation": result or None,
            "random_evaluation": baseline or None,
            "state": {"complete": complete, "hash": self.hash},
        }


def _hash(synthetic: SyntheticSet, data: ImageData, settings: dict) -> str:
    """SHA-256 of everything that an evaluation's result depends on, but for the network and the device."""
    settings = {**settings, "protocol": dataclasses.asdict(settings["protocol"]), "version": __version__}
    digest = hashlib.sha256(json.dumps([settings, data.fingerprint], sort_keys=True).encode())
    tensors = {"images": synthetic.images, "labels": synthetic.labels, **synthetic.preprocessing.tensors()}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def _of_same(earlier: Mapping | None, digest: str, network: str) -> Mapping:
    """An earlier record, if it is one of the same measurement."""
    same = earlier and earlier["state"]["hash"] == digest and earlier["evaluation"]["network"] == network
    return earlier if same else {}


def _curves(side: Mapping | None) -> list[dict[int, float | None]]:
    """A side's curves as they were before they became JSON."""
    if not side:
        return []
    return [{int(epoch): accuracy for epoch, accuracy in curve.items()} for curve in side["curves"]]


def _check_fit(synthetic: SyntheticSet, data: ImageData, random: bool) -> None:
    if synthetic.class_names != data.class_names:
        raise ValueError(
            f"the set was made for the {len(synthetic.class_names)} classes {_some(synthetic.class_names)}; "
            f"{data.name} has the {data.num_classes} classes {_some(data.class_names)}"
        )
    if random and synthetic.ipc is None:
        raise ValueError("Random needs a set with as many images in every class; leave it out (--no-random)")
    if random and (small := describe_small_classes(data, synthetic.ipc)):
        raise ValueError(f"Random needs {synthetic.ipc} images of every class, but {small}; leave it out (--no-random)")


def evaluate_random(
    data: ImageData, ipc: int, preprocessing: Preprocessing, *, networks: int, seed: int = 0, **settings
) -> EvaluationResult:
    """Networks trained on ``ipc`` random real images a class, each on a selection of its own.

    Which images are drawn moves the accuracy more than which network is (at one digit a class by 4 against 1 points),
    so that the deviation over networks on a single selection would claim a precision that Random does not have.

    Args:
        data: the real images.
        ipc: images a class.
        preprocessing: to the model space that the networks are trained in.
        networks: how many, and how many selections.
        seed: of both.
        **settings: of :func:`atom_fast.evaluation.evaluate`.

    Raises:
        ValueError: a class has fewer than ``ipc`` images, or a setting is not accepted.
    """

    def choose(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = random_selection(data, ipc, derive_seed(seed, index))
        return preprocessing.to_model(data.train_images[chosen]), data.train_labels[chosen]

    return evaluate(choose, None, data, preprocessing, networks=networks, seed=seed, **settings)


def default_protocol(dataset: str) -> str:
    """The preset of ``PROTOCOLS`` a data set is evaluated with unless another is asked for."""
    return "digits" if dataset == "digits" else "paper"


def architecture_of(synthetic: SyntheticSet, dataset: str) -> dict[str, object]:
    """Settings of the :class:`~atom_fast.networks.ConvNet` that a set is tested on: those it was distilled with.

    Real images and other programs' sets record none. Theirs are those of the preset "paper" for such data and as many
    images a class, so that they are compared with a set that was distilled so on the same networks.

    Args:
        synthetic: the set.
        dataset: name of the data it is tested on, as in ``ImageData.name``.

    Raises:
        ValueError: a recorded setting is not one that a distillation accepts.
    """
    config = synthetic.metadata.get("config", {})
    names = {"width": "width", "depth": "depth", "norm": "norm", "pooling": "pooling", "network_init": "initialization"}
    recorded = {setting: config[setting] for setting in names if config.get(setting) is not None}
    per_class = max(1, len(synthetic) // len(synthetic.class_names))  # in the mean, where the classes differ in size
    config = preset("paper", ipc=per_class, **recorded).for_data(tuple(synthetic.images.shape[1:]), dataset)
    return {name: getattr(config, setting) for setting, name in names.items()}


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
