"""A folder that the Hugging Face Hub shows and the ``datasets`` library loads: sets, their pictures and a card."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atom_fast._files import new_folder, write_atomically
from atom_fast.exports.folder import check_channels, folder_names, save_pictures
from atom_fast.names import CONFIG_FILE, EVALUATION_FILE, SYNTHETIC_FILE
from atom_fast.pictures import method_name
from atom_fast.synthetic import SyntheticSet

CARD = "README.md"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def export(
    synthetic: SyntheticSet,
    path: str | os.PathLike,
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
) -> Path:
    """Add a set to a Hub-ready folder, and write its card anew.

    The folder holds a configuration for each set, such as ``ipc10`` or ``ipc10-random``: ``synthetic.safetensors``,
    ``train/`` (PNG files, and ``metadata.jsonl`` with their labels), ``config.yaml``, and ``evaluation.json`` where
    there is one. Nothing is uploaded.

    Args:
        synthetic: the set.
        path: the folder; a new one, or one that this function wrote.
        results: records of evaluations; those of this very set, and of random images beside it, are kept.
        license: identifier of the images' licence, as the Hub lists them, for the card; None: the present card's, or
            "unknown".

    Returns:
        ``path``.

    Raises:
        FileExistsError: the folder has such a configuration, or holds something else.
        ValueError: a set that is not valid, or images that are neither grey nor RGB.
        OSError: the files could not be written.
    """
    synthetic.check()
    check_channels(synthetic)
    path = Path(path)
    if path.exists() and not _configurations(path) and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not a folder of exported sets; give a new one")
    name = _name(synthetic)
    if (path / name).exists():
        raise FileExistsError(f"{path} has a set {name} already; remove {path / name} first")
    with new_folder(path / name) as folder:
        synthetic.save(folder / SYNTHETIC_FILE)
        pictures, labels = folder / "train", synthetic.labels.tolist()
        soft = None if synthetic.soft_labels is None else synthetic.targets.tolist()
        rows = [
            {"file_name": file.relative_to(pictures).as_posix(), "label": labels[index], "index": index}
            | ({} if soft is None else {"soft_label": soft[index]})
            for file, index in save_pictures(synthetic, pictures)
        ]
        # Not CSV: there the library takes the number of a label for the name of a class, such as a digit's.
        (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        if config := synthetic.metadata.get("config"):
            (folder / CONFIG_FILE).write_text(_yaml(config), "utf-8")
        if own := _own_results(synthetic, results):
            (folder / EVALUATION_FILE).write_text(json.dumps(own, indent=1) + "\n", "utf-8")
    write_atomically(path / CARD, _card(path, license or _license(path / CARD)))
    return path


def load(path: str | os.PathLike, name: str | None = None) -> SyntheticSet:
    """Read a set from a folder that `export` wrote, wherever it was copied to since; nothing is downloaded.

    Args:
        path: the folder, or one of its configurations.
        name: the configuration, such as "ipc10"; None where there is one only.

    Returns:
        The set that was exported, to the bit.

    Raises:
        FileNotFoundError: no such folder, or no set in it.
        ValueError: several sets and no name, an unknown name, or a damaged file.
    """
    path = Path(path)
    if name is None and (path / SYNTHETIC_FILE).is_file():
        return SyntheticSet.load(path / SYNTHETIC_FILE)
    names = _configurations(path)
    if not names:
        raise FileNotFoundError(f"{path} holds no {SYNTHETIC_FILE}, neither itself nor in a folder in it")
    if name is None and len(names) > 1:
        raise ValueError(f"{path} holds several sets: give a name, one of {', '.join(names)}")
    if name is not None and name not in names:
        raise ValueError(f"name must be one of {', '.join(names)}; got {name!r}")
    return SyntheticSet.load(path / (name or names[0]) / SYNTHETIC_FILE)


def _configurations(path: Path) -> list[str]:
    names = [file.parent.name for file in path.glob(f"*/{SYNTHETIC_FILE}")] if path.is_dir() else []
    return sorted(names, key=lambda name: (len(name.split("-")[0]), name))  # ipc1, ipc10, ipc50


def _name(synthetic: SyntheticSet) -> str:
    size = "full" if synthetic.ipc is None else f"ipc{synthetic.ipc}"
    size += "" if synthetic.partition == 1 else f"-partition{synthetic.partition}"
    method = synthetic.metadata.get("method")  # of selected images; a distilled set has none
    return f"{size}-{method}" if method and method.replace("-", "").isalnum() else size


def _own_results(synthetic: SyntheticSet, results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of this set, each followed by that of random images tested alike."""
    kept, fingerprint = [], synthetic.fingerprint
    for result in results:
        if result.get("set_fingerprint") == fingerprint:
            kept += [result, *(other for other in results if _is_beside(other, result))]
    return kept


def _is_beside(other: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    alike = ("dataset", "ipc", "partition", "protocol", "network", "architecture")
    is_random = other.get("method") == "random" and other.get("set_fingerprint") is None
    return is_random and all(other.get(name) == result.get(name) for name in alike)


# The card


def _license(card: Path) -> str:
    """The licence in the header of a card; "unknown" where there is none."""
    import yaml

    try:
        return str(yaml.safe_load(card.read_text("utf-8").split("---\n")[1])["license"])
    except (OSError, LookupError, TypeError, ValueError, yaml.YAMLError):
        return "unknown"


def _card(path: Path, license: str) -> str:
    sets = {name: SyntheticSet.load(path / name / SYNTHETIC_FILE) for name in _configurations(path)}
    first = next(iter(sets.values()))
    dataset = " ".join(str(first.metadata.get("dataset") or "an unnamed data set").split())
    images = sum(map(len, sets.values()))
    header: dict[str, Any] = {
        "license": license,
        "pretty_name": f"{dataset}, distilled",
        "task_categories": ["image-classification"],
        "size_categories": [next((text for size, text in _SIZES if images < size), "n>1M")],
        "tags": ["dataset-distillation", "dataset-condensation", "synthetic", "atom-fast", dataset],
        "configs": [_configuration(name, synthetic) for name, synthetic in sets.items()],
    }
    header["configs"][0]["default"] = True
    rows = "\n".join(_row(path, name, synthetic) for name, synthetic in sets.items())
    commands = "\n".join(_command(name, synthetic) for name, synthetic in sets.items())
    example = next(iter(sets))
    return _CARD.format(
        header=_yaml(header), dataset=dataset, rows=rows, commands=commands, example=example, license=license,
        folder=path.resolve().name, classes=len(first.class_names), shape="×".join(map(str, first.sheets.shape[1:])),
    )  # fmt: skip


_CARD = """\
---
{header}---

# {dataset}, distilled into a few images per class

Synthetic training images for {dataset} ({classes} classes, images of {shape}): a network trained on them alone
classifies real images. Made with atom_fast.

| configuration | stored images per class | images | method | accuracy in % | random real images | networks | protocol |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

Accuracy: of networks trained on the set's float32 images (`synthetic.safetensors`), on all real test images after the
last epoch, mean ± standard deviation over networks.

## Use

```python
from atom_fast import hub

synthetic = hub.load("{folder}", "{example}")  # synthetic.images float32 [N, C, H, W], synthetic.labels
inputs = synthetic.preprocessing.to_model(pixels)  # your test images, uint8 or [0, 1], into the same space
```

`train/` holds the same images as PNG files, for a look and for
`datasets.load_dataset("{folder}", "{example}", split="train")`. They have 8 bits in [0, 1], and distilled images exceed
that range: a network trained on them differs a little. `index` is an image's position in the `.safetensors`.

## How they were made

```sh
{commands}
```

## Licence

`{license}`. The images derive from those of {dataset}, whose terms apply to them too.
"""


def _configuration(name: str, synthetic: SyntheticSet) -> dict[str, Any]:
    """The entry of a set in the card's header: where its pictures are, and the columns that the library gives them."""
    distinct = len(set(synthetic.class_names)) == len(synthetic.class_names)
    names = synthetic.class_names if distinct else folder_names(synthetic.class_names)
    names = {str(number): name for number, name in enumerate(names)}
    label = {"name": "label", "dtype": {"class_label": {"names": names}}}
    return {
        "config_name": name,
        "data_files": [{"split": "train", "path": f"{name}/train/**"}],
        "features": [{"name": "image", "dtype": "image"}, label, {"name": "index", "dtype": "int64"}],
    }


def _row(path: Path, name: str, synthetic: SyntheticSet) -> str:
    metadata = synthetic.metadata
    method = str(metadata.get("method") or method_name(metadata.get("config", {})))
    file = path / name / EVALUATION_FILE
    results = json.loads(file.read_text("utf-8")) if file.is_file() else []
    tested = ["not measured", "", "", ""]
    if results:
        own = results[0]  # of this set, as `_own_results` kept them
        beside = next((result for result in results if _is_beside(result, own)), None)
        protocol, networks = own["protocol"]["name"], f"{len(own['accuracies'])} {own['network']}"
        tested = [_accuracy(own), "" if beside is None else _accuracy(beside), networks, protocol]
    stored = "" if synthetic.ipc is None else str(synthetic.ipc)
    images = f"{len(synthetic)}" + (", cut out of sheets" if synthetic.partition > 1 else "")
    return "| " + " | ".join([name, stored, images, method, *tested]).replace("\n", " ") + " |"


def _accuracy(result: Mapping[str, Any]) -> str:
    mean, std = result["accuracy_mean"], result["accuracy_std"]
    return "diverged" if mean is None else f"{mean:.1f} ± {std:.1f}"


def _command(name: str, synthetic: SyntheticSet) -> str:
    metadata = synthetic.metadata
    dataset = ["--dataset", str(metadata.get("dataset"))]
    if "config" in metadata:
        return shlex.join(["atom-fast", "distill", *dataset, "--config", f"{name}/{CONFIG_FILE}"])
    if selection := metadata.get("selection"):
        options = ["--method", str(metadata["method"]), "--ipc", str(synthetic.ipc), "--seed", str(selection["seed"])]
        partition = [] if synthetic.partition == 1 else ["--partition", str(synthetic.partition)]
        return shlex.join(["atom-fast", "select", *dataset, *options, *partition])
    return f"# {name}: by another program, from {str(metadata.get('source'))!r}".replace("\n", " ")


def _yaml(content: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
