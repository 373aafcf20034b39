"""Scores of a synthetic set that compare it with random real images and with all of them, as DD-Ranking defines them.

HLR, hard label recovery
    acc(all real images) - acc(set, hard labels). 0: the set trains as well as all real images. Smaller is better.
IOR, improvement over random
    acc(set) - acc(random real images), as the set is trained: on its soft labels, if it has some. Random images have
    hard labels. (DD-Ranking's have soft labels of its teachers, which no set comes with.)
LRS, label robust score
    ``(e^a - e^-1) / (e - e^-1)`` of ``a = w IOR - (1 - w) HLR``, w = 0.5.
ARS, augmentation robust score
    The same map of ``b = g IOR(with augmentation) + (1 - g) IOR(without)``, g = 0.5.

Accuracies are in percent, as everywhere in this project; HLR and IOR are fractions of 1, and LRS and ARS lie in [0, 1].
(DD-Ranking 0.2.0 puts percent into the exponential, so that what it prints for LRS and ARS is not comparable.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from atom_fast._files import cache_folder, claimed, write_atomically
from atom_fast._hashing import add_tensors
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation import ranks
from atom_fast.distillation.logs import log
from atom_fast.evaluation.accuracy import evaluate
from atom_fast.evaluation.results import (
    EvaluationResult,
    find_record,
    locked_record,
    networks_of,
    read_records,
    write_record,
)
from atom_fast.evaluation.sets import random_sets, select
from atom_fast.names import WHOLE_EPOCHS
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import Protocol, check_count, default_protocol, get_protocol

FORMAT_VERSION = 1  # of the cache and of what it depends on: a change leaves older files unused
WEIGHT = 0.5  # DD-Ranking's w and gamma
_ABOUT = (
    "dataset",
    "ipc",
    "partition",
    "method",
    "config_hash",
    "set_seconds",
    "same_data",
    "set_fingerprint",
)  # of EvaluationResult


def hard_label_recovery(whole_accuracy: float, hard_accuracy: float) -> float:
    """Return by how much training on all real images is better than on a set with hard labels, as a fraction.

    Args:
        whole_accuracy: of networks trained on all real images, in percent.
        hard_accuracy: of networks trained on the set with hard labels, in percent.

    Raises:
        ValueError: an accuracy is not in [0, 100]; NaN, of networks that diverged, is passed on.
    """
    return _difference(whole_accuracy=whole_accuracy, hard_accuracy=hard_accuracy)


def improvement_over_random(accuracy: float, random_accuracy: float) -> float:
    """Return by how much training on a set is better than on as many random real images, as a fraction.

    Args:
        accuracy: of networks trained on the set, in percent.
        random_accuracy: of networks trained in the same way on random real images, in percent.

    Raises:
        ValueError: as `hard_label_recovery`.
    """
    return _difference(accuracy=accuracy, random_accuracy=random_accuracy)


def label_robust_score(recovery: float, improvement: float, weight: float = WEIGHT) -> float:
    """Return DD-Ranking's label robust score (LRS), in [0, 1]; larger is better.

    Args:
        recovery: `hard_label_recovery`, a fraction.
        improvement: `improvement_over_random`, a fraction.
        weight: of the improvement, w in [0, 1]; the recovery has 1 - w.

    Raises:
        ValueError: a value is no fraction in [-1, 1], or the weight is not in [0, 1].
    """
    _check_fractions(recovery=recovery, improvement=improvement)
    _check_weight(weight)
    return _score(weight * improvement - (1 - weight) * recovery)


def augmentation_robust_score(augmented: float, plain: float, weight: float = WEIGHT) -> float:
    """Return DD-Ranking's augmentation robust score (ARS), in [0, 1]; larger is better.

    Args:
        augmented: `improvement_over_random` of networks trained with augmentation, a fraction.
        plain: the same without.
        weight: of the first, gamma in [0, 1].

    Raises:
        ValueError: as `label_robust_score`.
    """
    _check_fractions(augmented=augmented, plain=plain)
    _check_weight(weight)
    return _score(weight * augmented + (1 - weight) * plain)


def scores(
    result: EvaluationResult,
    random: EvaluationResult,
    whole: EvaluationResult | float,
    *,
    hard: EvaluationResult | None = None,
    other: tuple[EvaluationResult, EvaluationResult] | None = None,
) -> dict[str, Any]:
    """Compute a set's scores from evaluations of :func:`atom_fast.evaluate`; `measure_scores` also does those.

    Args:
        result: of the set.
        random: of random real images, trained in the same way.
        whole: of all real images, or their known accuracy in percent, such as 84.8, a paper's.
        hard: of the set with hard labels; None where ``result`` is.
        other: of the set and of random images without augmentation; with it, where ``result`` is without. None leaves
            ARS out.

    Returns:
        ``hlr``, ``ior``, ``lrs`` and ``ars``, each None where an accuracy is missing (all networks diverged). What they
        were computed from, in percent: ``accuracy``, ``random_accuracy``, ``hard_accuracy``, ``whole_accuracy``, and
        with ``other`` ``augmented_accuracy``, ``augmented_random_accuracy``, ``plain_accuracy`` and
        ``plain_random_accuracy``. How: ``networks``; ``augmentation``, with ``other``; and ``whole_epochs`` and
        ``whole_networks``, None where the accuracy was given.

    Raises:
        ValueError: the evaluations are of different data, networks or protocols, or ``whole`` is not in [0, 100].
    """
    _check_alike("random", random, result)
    if hard is not None:
        _check_alike("hard", hard, result)
    trained = whole if isinstance(whole, EvaluationResult) else None
    if trained is not None:
        _check_alike("whole", trained, result, apart=("epochs",))
    for evaluation in () if other is None else other:
        _check_alike("other", evaluation, result, apart=("augmentation", "cutmix"))
        if _augments(evaluation.protocol) == _augments(result.protocol):
            raise ValueError(f"other must be {'without' if _augments(result.protocol) else 'with'} augmentation")
    whole_accuracy = whole.mean if isinstance(whole, EvaluationResult) else whole
    recovery = hard_label_recovery(whole_accuracy, (hard or result).mean)
    improvement = improvement_over_random(result.mean, random.mean)
    found: dict[str, Any] = {
        "hlr": recovery,
        "ior": improvement,
        "lrs": label_robust_score(recovery, improvement),
        "ars": None,
        "accuracy": result.mean,
        "random_accuracy": random.mean,
        "hard_accuracy": (hard or result).mean,
        "whole_accuracy": float(whole_accuracy),
        "networks": len(result.curves),
        "whole_epochs": None if trained is None else trained.protocol.epochs,
        "whole_networks": None if trained is None else len(trained.curves),
    }
    if other is not None:
        pairs = [(result, random), other]
        augmented, plain = pairs if _augments(result.protocol) else pairs[::-1]
        improvements = (improvement_over_random(pair[0].mean, pair[1].mean) for pair in (augmented, plain))
        found["ars"] = augmentation_robust_score(*improvements)
        for kind, pair in (("augmented", augmented), ("plain", plain)):
            found |= {f"{kind}_accuracy": pair[0].mean, f"{kind}_random_accuracy": pair[1].mean}
        found["augmentation"] = augmented[0].protocol.augmentation
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in found.items()}


def score_line(found: Mapping[str, Any]) -> str:
    """Format `scores` as a line, such as ``scores HLR 0.269 IOR 0.319 LRS 0.280 ARS 0.401 (whole data 84.8 %)``.

    A hyphen stands for a score of networks that diverged.
    """
    names = ("hlr", "ior", "lrs", *(["ars"] if "augmentation" in found else []))
    values = " ".join(f"{name.upper()} " + ("-" if found[name] is None else f"{found[name]:.3f}") for name in names)
    whole = "diverged" if found["whole_accuracy"] is None else f"{found['whole_accuracy']:.1f} %"
    epochs = found["whole_epochs"]
    how = "" if epochs is None else f", {epochs} epoch{'s' if epochs > 1 else ''}"
    return f"scores {values} (whole data {whole}{how})"


def measure_scores(
    result: EvaluationResult,
    random: EvaluationResult,
    synthetic: SyntheticSet,
    data: ImageData,
    *,
    whole_accuracy: float | None = None,
    whole_epochs: int | None = None,
    together: int | None = None,
    device: Any = None,
    progress: bool = True,
    record: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Train what the scores of a set still need, and compute them.

    That is, each with the networks, the protocol and the seed of ``result``: all real images (`evaluate_whole`), once
    for all sets; the set and random images without augmentation (where the protocol has none: with that of the data
    set's default protocol); and the set with hard labels, where it has soft ones. After
    :func:`atom_fast.distillation.ranks.join`, each process calls this function with the same arguments.

    Args:
        result: of the set.
        random: of ``random_sets(data, synthetic, seed=result.seed)``, trained in the same way.
        synthetic: the set.
        data: the real images.
        whole_accuracy: of networks trained on all real images, in percent, instead of training them.
        whole_epochs: passes over all real images; None is `whole_protocol`'s.
        together, device, progress, record: as in :func:`atom_fast.evaluate`. The scores join the set's record under the
            name ``scores``.

    Returns:
        As `scores`.

    Raises:
        ValueError: as `check_whole` or `scores`.
        OSError: the cache could not be written.
    """
    check_whole(whole_accuracy, whole_epochs)
    options = {"together": together, "device": device, "progress": progress}
    how: dict[str, Any] = {
        "network": result.network, "architecture": result.architecture, "networks": len(result.curves),
        "seed": result.seed, "precision": result.precision, **options,
    }  # fmt: skip
    hard = None
    if synthetic.soft_labels is not None:
        about = {**synthetic.metadata, "method": f"{result.about['method']}, hard labels"}
        copy = SyntheticSet(
            synthetic.sheets, synthetic.sheet_labels, synthetic.class_names, synthetic.preprocessing, about,
            synthetic.partition,
        )  # fmt: skip
        hard = evaluate(copy, data, protocol=result.protocol, record=record, **how)
    protocol = _other_protocol(result.protocol, data.name)
    other_set = evaluate(synthetic, data, protocol=protocol, record=record, **how)
    baseline = random_sets(data, synthetic, seed=result.seed)
    other_random = evaluate(baseline, data, protocol=protocol, record=record, **how)
    whole: EvaluationResult | float
    if whole_accuracy is None:
        protocol = whole_protocol(result.protocol, whole_epochs)
        whole = evaluate_whole(data, synthetic.preprocessing, protocol=protocol, **how)
    else:
        whole = whole_accuracy
    found = scores(result, random, whole, hard=hard, other=(other_set, other_random))
    if record is not None and ranks.is_first():
        _add_to_record(record, result, found)
    return found


def check_whole(accuracy: float | None, epochs: int | None) -> None:
    """Check what is given of the training on all real images, before anything is trained.

    Raises:
        ValueError: the accuracy is not in (1, 100], epochs are no whole number of at least 1, or both are given.
    """
    check_count("whole_epochs", epochs, optional=True)
    if accuracy is None:
        return
    if epochs is not None:
        raise ValueError(f"whole_epochs is for training on all real images; their accuracy is given: {accuracy}")
    # Nothing learns as little as 1 %: 0.848 is meant as 84.8.
    if not _is_percent(accuracy) or accuracy <= 1:
        raise ValueError(f"whole_accuracy must be in percent, such as 84.8, at most 100; got {accuracy!r}")


def whole_protocol(protocol: Protocol, epochs: int | None = None) -> Protocol:
    """Return how networks are trained on all real images: like on a set, with fewer passes over many more images.

    Args:
        protocol: of the set.
        epochs: None: the protocol's, at most 200 (DD-Ranking's for CIFAR). Decays after a share of the epochs move.
    """
    epochs = min(protocol.epochs, WHOLE_EPOCHS) if epochs is None else epochs
    if epochs == protocol.epochs:
        return protocol
    return dataclasses.replace(protocol, name=f"{protocol.name}, whole data", epochs=epochs)


def evaluate_whole(
    data: ImageData,
    preprocessing: Preprocessing,
    *,
    protocol: Protocol,
    network: str = "convnet",
    architecture: Mapping[str, Any] | None = None,
    networks: int = 5,
    seed: int = 0,
    precision: str = "float32",
    together: int | None = None,
    device: Any = None,
    progress: bool = True,
) -> EvaluationResult:
    """Train networks on all real images, with hard labels, and test them; results are kept in the user's cache.

    They are found again by the data, the model space, the protocol, the architecture, the seed and the precision, also
    with more networks: only those that are missing are trained. Of two processes that need them at the same time one
    waits for the other. A damaged file in the cache is made again.

    Args:
        data: the real images.
        preprocessing: to the model space that networks are trained in.
        protocol: how to train; `whole_protocol` makes one of a set's.
        The others as in :func:`atom_fast.evaluate`.

    Raises:
        ValueError: as :func:`atom_fast.evaluate`.
        OSError: the cache could not be written.
    """
    check_count("networks", networks)
    settings = {
        "version": FORMAT_VERSION,
        "data": data.fingerprint,
        "protocol": protocol.to_dict(),
        "network": network,
        "architecture": dict(architecture or {}),
        "precision": precision,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    add_tensors(digest, preprocessing.tensors())
    identity = digest.hexdigest()
    path = cache_folder() / "whole" / f"{data.name}-{identity[:16]}.json"
    found = _shared(lambda: _read(path, identity))
    if not _has(found, networks):
        with _held(path):
            found = _shared(lambda: _read(path, identity))  # another process may have trained them meanwhile
            if not _has(found, networks):
                unfinished = path.with_suffix(".unfinished")
                _shared(lambda: _prepare(unfinished, found))
                if ranks.is_first():
                    log(f"training on all {len(data.train_images)} images of {data.name}, kept in {path}")
                whole = select(data, "full", preprocessing=preprocessing, progress=progress)
                result = evaluate(
                    whole, data, protocol=protocol, network=network, architecture=architecture, networks=networks,
                    seed=seed, precision=precision, together=together, device=device, progress=progress,
                    record=unfinished,
                )  # fmt: skip
                _shared(lambda: _keep(path, identity, unfinished, result))
                return result
    assert found is not None
    known = networks_of(found)[:networks]
    return EvaluationResult(
        about={name: found[name] for name in _ABOUT},
        curves=tuple(curve for curve, _ in known),
        confusions=tuple(matrix for _, matrix in known),
        protocol=protocol,
        network=network,
        architecture=found["architecture"],
        precision=precision,
        seed=seed,
        seconds=found["seconds"],
        device=found["device"],
    )


def _shared(work: Callable[[], Any]) -> Any:
    """The first rank's ``work()`` on every rank: they go on alike, also where they have different caches."""
    return ranks.all_gather_object(work() if ranks.is_first() else None)[0]


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Let no other process train for a file of the cache meanwhile, where the file system can lock."""
    if not ranks.is_first():  # its first rank waits for all
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_suffix(".lock")
    with claimed(file, wait=False) as held:
        if held:
            yield
            return
    log(f"waiting for another process that trains on all images, for {path}")
    with claimed(file, wait=True):
        yield


def _has(record: Mapping[str, Any] | None, networks: int) -> bool:
    """True if a record holds so many finished networks."""
    return record is not None and len(record["curves"]) >= networks and all(record["curves"][:networks])


def _read(path: Path, identity: str) -> dict[str, Any] | None:
    """Read a record from the cache; None where there is none, or one that is damaged, which is said and removed."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["identity"] != identity:
            reason = f"it is {content['identity'][:16]}"
        elif content["sha256"] != _checksum(content["record"]):
            reason = "its content does not match its checksum"
        else:
            return content["record"]
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)
    log(f"{path} cannot be used ({reason}): networks are trained on all images again")
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _prepare(unfinished: Path, found: dict[str, Any] | None) -> None:
    """Put finished networks where an evaluation finds them, and keep there what an interrupted one has left."""
    try:
        read_records(unfinished)
    except ValueError as error:
        log(f"{error}; it is removed")
        unfinished.unlink()
    if found is not None:
        write_record(unfinished, found)


def _keep(path: Path, identity: str, unfinished: Path, result: EvaluationResult) -> None:
    record = find_record(read_records(unfinished), result)
    assert record is not None
    content = {"identity": identity, "sha256": _checksum(record), "record": record}
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    unfinished.unlink()


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _add_to_record(path: str | os.PathLike, result: EvaluationResult, found: Mapping[str, Any]) -> None:
    with locked_record(path):
        record = find_record(read_records(path), result)
        if record is not None and record.get("scores") != found:
            write_record(path, {**record, "scores": dict(found)})


def _augments(protocol: Protocol) -> bool:
    return protocol.augmentation != "none" or protocol.cutmix > 0


def _other_protocol(protocol: Protocol, dataset: str) -> Protocol:
    """The protocol without augmentation; one that has none with that of the data set's default protocol."""
    if _augments(protocol):
        return dataclasses.replace(protocol, name=f"{protocol.name}, no augmentation", augmentation="none", cutmix=0.0)
    augmentation = get_protocol(default_protocol(dataset)).augmentation
    return dataclasses.replace(protocol, name=f"{protocol.name}, {augmentation}", augmentation=augmentation)


def _check_alike(name: str, found: EvaluationResult, result: EvaluationResult, apart: tuple[str, ...] = ()) -> None:
    """Check that two evaluations differ in nothing but the set and the settings ``apart`` of the protocol."""
    for what in ("network", "architecture", "precision"):
        if getattr(found, what) != getattr(result, what):
            raise ValueError(
                f"evaluations must have the same {what}; got {getattr(result, what)!r}, and {name} has "
                f"{getattr(found, what)!r}"
            )
    if found.about["dataset"] != result.about["dataset"]:
        raise ValueError(
            f"evaluations must be of the same data; got {result.about['dataset']}, and {name} has "
            f"{found.about['dataset']}"
        )
    for field in dataclasses.fields(Protocol):
        value, expected = getattr(found.protocol, field.name), getattr(result.protocol, field.name)
        if value != expected and field.name not in (*apart, *(("name",) if apart else ())):
            raise ValueError(f"evaluations must have the same {field.name}; got {expected!r}, and {name} has {value!r}")


def _score(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def _difference(**accuracies: float) -> float:
    for name, accuracy in accuracies.items():
        if not _is_percent(accuracy) and not (_is_number(accuracy) and math.isnan(accuracy)):
            raise ValueError(f"{name} must be in percent, from 0 to 100; got {accuracy!r}")
    first, second = accuracies.values()
    return (first - second) / 100


def _is_percent(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 100


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_fractions(**values: float) -> None:
    for name, value in values.items():
        if not _is_number(value) or not (math.isnan(value) or -1 <= value <= 1):
            raise ValueError(f"{name} must be a fraction from -1 to 1, not percent; got {value!r}")


def _check_weight(weight: float) -> None:
    if not _is_number(weight) or not 0 <= weight <= 1:
        raise ValueError(f"weight must be a number from 0 to 1; got {weight!r}")
