"""A synthetic set's accuracy beside that of randomly selected real images, as one record."""

from __future__ import annotations

import dataclasses

import torch

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.evaluate import EvaluationResult, Protocol, evaluate, random_selection
from atom_fast.evaluate.training import network_seed
from atom_fast.report import method_name
from atom_fast.synthetic import SyntheticSet


def compare(
    synthetic: SyntheticSet,
    data: ImageData,
    *,
    protocol: Protocol | str | None = None,
    networks: int = 5,
    seed: int = 0,
    random: bool = True,
    evaluate_every: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict:
    """Train networks on a synthetic set, and as many on random real images, and test both on the real test set.

    The networks have the architecture and the initialisation that the set was distilled with.

    Args:
        synthetic: the set.
        data: real images of the same classes.
        protocol: how to train, or a preset's name; None is ``default_protocol(data.name)``.
        networks: how many on each side.
        seed: of networks and selections.
        random: measure Random, too.
        evaluate_every: test also after every so many epochs, see :func:`atom_fast.evaluate.evaluate`.
        device: where to train; None: the GPU, if there is one.
        progress: show progress bars on standard error.

    Returns:
        What JSON can hold: ``dataset``, ``ipc``, ``method``, ``accuracy_mean``, ``accuracy_std``, ``random_mean``,
        ``random_std`` (per cent; None where not measured or all diverged), ``seconds`` (of the distillation),
        ``device`` (of the evaluation), ``config_hash``, ``same_data`` (whether ``data`` is what the set was distilled
        from), and in full ``evaluation`` and ``random_evaluation`` as :meth:`EvaluationResult.to_dict` writes them.

    Raises:
        ValueError: the set's classes or image size are not the data's; or ``random`` for classes of different sizes.
    """
    if synthetic.class_names != data.class_names:
        raise ValueError(
            f"the set was made for the {len(synthetic.class_names)} classes {_some(synthetic.class_names)}; "
            f"{data.name} has the {data.num_classes} classes {_some(data.class_names)}"
        )
    if random and synthetic.ipc is None:
        raise ValueError("Random needs a set with as many images in every class; leave it out (--no-random)")
    settings = {
        "protocol": default_protocol(data.name) if protocol is None else protocol,
        "architecture": architecture_of(synthetic),
        "evaluate_every": evaluate_every,
        "device": device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"),
        "progress": progress,
    }
    preprocessing = synthetic.preprocessing
    result = evaluate(
        synthetic.images, synthetic.labels, data, preprocessing, networks=networks, seed=seed, **settings
    ).to_dict()
    baseline = {}
    if random:
        ipc = synthetic.ipc
        baseline = evaluate_random(data, ipc, preprocessing, networks=networks, seed=seed, **settings).to_dict()
    metadata = synthetic.metadata
    return {
        "dataset": data.name,
        "ipc": synthetic.ipc,
        "method": method_name(metadata.get("config", {})),
        "accuracy_mean": result["accuracy_mean"],
        "accuracy_std": result["accuracy_std"],
        "random_mean": baseline.get("accuracy_mean"),
        "random_std": baseline.get("accuracy_std"),
        "seconds": metadata.get("seconds"),
        "device": result["device"],
        "config_hash": metadata.get("config_hash"),
        "same_data": metadata.get("dataset_fingerprint") == data.fingerprint,
        "evaluation": result,
        "random_evaluation": baseline or None,
    }


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
        **settings: of :func:`atom_fast.evaluate.evaluate`.

    Raises:
        ValueError: a class has fewer than ``ipc`` images, or a setting is not accepted.
    """
    if networks < 1:
        raise ValueError(f"networks must be at least 1; got {networks}")
    results = []
    for index in range(networks):
        chosen = random_selection(data, ipc, seed + index)
        images, labels = preprocessing.to_model(data.train_images[chosen]), data.train_labels[chosen]
        seed_here = network_seed(seed, index)
        results.append(evaluate(images, labels, data, preprocessing, networks=1, seed=seed_here, **settings))
    curves = tuple(curve for result in results for curve in result.curves)
    return dataclasses.replace(results[0], curves=curves, seed=seed, seconds=sum(result.seconds for result in results))


def default_protocol(dataset: str) -> str:
    """The preset of ``PROTOCOLS`` a data set is evaluated with unless another is asked for."""
    return "digits" if dataset == "digits" else "paper"


def architecture_of(synthetic: SyntheticSet) -> dict[str, object]:
    """Settings of the :class:`~atom_fast.networks.ConvNet` that a set was distilled with, as far as it records them."""
    config = synthetic.metadata.get("config", {})
    names = {"width": "width", "depth": "depth", "norm": "norm", "pooling": "pooling", "network_init": "initialization"}
    return {name: config[setting] for setting, name in names.items() if config.get(setting) is not None}


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
