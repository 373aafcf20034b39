"""The command ``atom-fast``: distil, evaluate, show, export and describe synthetic sets."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from atom_fast import __version__
from atom_fast._malloc import keep_freed_memory
from atom_fast._threads import choose_threads
from atom_fast.distillation.config import PRESETS
from atom_fast.names import (
    EVALUATION_FILE,
    EXPORT_FORMATS,
    FEATURES,
    NETWORK_NAMES,
    PREPROCESSINGS,
    SELECTIONS,
    SOURCES,
    SYNTHETIC_FILE,
    TRAINING_PRECISIONS,
    WATCHED_EPOCHS,
    WHOLE_EPOCHS,
)
from atom_fast.options import (
    Choice,
    CommaList,
    Commands,
    FilePath,
    Network,
    SetFile,
    alone,
    configuration,
    data_options,
    device_name,
    device_option,
    foreign_options,
    in_group,
    printable,
    protocol_options,
    quiet_option,
    set_argument,
    setting_options,
)
from atom_fast.training.protocols import PROTOCOLS, default_protocol, get_protocol


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main():
    """Distil an image data set into a few synthetic images per class (ATOM).

    FILE is a synthetic set as 'atom-fast distill' writes it, synthetic.safetensors or the run's folder, or a file of
    images that another project of dataset distillation saved (.pt, .npz).
    """
    choose_threads()
    keep_freed_memory()  # a step on a CPU takes a fifth less time


@main.command()
@data_options("digits", "digits")
@click.option("--resolution", type=int, help="resize images to squares of this side, in pixels  [default: as they are]")
@click.option("--output", type=FilePath(), help="the run's folder  [default: runs/DATASET-ipcN-PRESET or ...-METHOD]")
@click.option(
    "--resume", is_flag=True, help="continue from the newest checkpoint in --output, if there is one  [default: off]"
)
@click.option("--preset", "preset_name", type=Choice(list(PRESETS)), help="published settings  [default: paper]")
@click.option("--config", type=FilePath(), help="YAML file of settings  [default: no file]")
@click.option(
    "--set",
    "given",
    type=FilePath(),
    help="synthetic set to start from, a file or a run's folder  [default: start as --image-init says]",
)
@device_option
@quiet_option
@setting_options
@click.pass_context
@in_group
def distill(
    ctx, dataset, data_dir, download, resolution, output, resume, preset_name, config, given, device, quiet, **settings,
):  # fmt: skip
    """Distil a data set into a few images per class.

    Settings come from the preset, then from --config, then from the options below; later ones override earlier ones.
    Everything about the run is kept in its folder. `torchrun --nproc-per-node N -m atom_fast distill ...` runs N
    processes, one per GPU, which share the classes.
    """
    from atom_fast.data.sources import load_data
    from atom_fast.distillation import distill as run
    from atom_fast.distillation import ranks
    from atom_fast.pictures import count_images, save_run_pictures
    from atom_fast.synthetic import SyntheticSet

    config, preset_name = configuration(ctx, settings, config, preset_name)
    if given and settings["image_init"]:
        raise ValueError(f"give --set or --image-init {settings['image_init']}, not both")
    start = SyntheticSet.load(given) if given else None
    how = preset_name if config.method == "matching" else config.method
    output = output or Path("runs") / f"{dataset}-{_size_name(config.ipc, config.partition)}-{how}"
    options = {"resolution": resolution, "progress": not quiet and ranks.is_first()}
    data = ranks.after_first(lambda: load_data(dataset, data_dir, download=download, **options))
    synthetic = run(
        data, config, output, resume=resume, start=start, progress=not quiet, device=device_name(device),
        how_to_go_on="run the same command with --resume",
    )  # fmt: skip
    if not ranks.is_first():
        return
    save_run_pictures(output, synthetic)
    file = output / SYNTHETIC_FILE
    click.echo(f"{count_images(synthetic)} in {file}, their picture in {output / 'synthetic.png'}")
    where = ["--data-dir", str(data_dir)] if data_dir else []
    click.echo(f"next: {shlex.join(['atom-fast', 'evaluate', str(file), *where])}", err=True)


def _size_name(ipc: int, partition: int) -> str:
    return f"ipc{ipc}" if partition == 1 else f"ipc{ipc}-partition{partition}"


@main.command()
@set_argument
@data_options(None, "the one the set was distilled from")
@click.option("--resolution", type=int, help="resize the data's images to this side, in pixels  [default: the set's]")
@click.option(
    "--networks", default=5, help="networks to train on the set, and as many on random images  [default: 5 networks]"
)
@click.option(
    "--arch",
    type=CommaList(Network()),
    default="convnet",
    show_default=True,
    help=f"architecture of the networks, or several joined by commas: {', '.join(NETWORK_NAMES)}, timm:NAME or "
    "torchvision:NAME for one of these libraries",
)
@protocol_options
@click.option("--random/--no-random", default=True, help="also train on random real images  [default: on]")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="seed of the networks and of the random images"
)
@click.option(
    "--precision",
    type=Choice(TRAINING_PRECISIONS),
    default="float32",
    show_default=True,
    help="precision of the training",
)
@click.option(
    "--evaluate-every", type=int, help="also test every N epochs (in --json)  [default: only after the last epoch]"
)
@click.option("--together", type=int, help="networks to train at the same time  [default: chosen for the device]")
@click.option(
    "--scores",
    is_flag=True,
    help="also train on all real images, kept for other sets, and without augmentation, and print DD-Ranking's scores "
    "HLR, IOR, LRS and ARS  [default: off]",
)
@click.option(
    "--whole-accuracy", type=float, help="known accuracy of all real images, in %, for --scores  [default: measured]"
)
@click.option(
    "--whole-epochs",
    type=int,
    help=f"passes over all real images, for --scores  [default: the protocol's, at most {WHOLE_EPOCHS}]",
)
@foreign_options
@click.option(
    "--json",
    "json_path",
    type=FilePath(),
    help="file for the full results, written whenever a network finishes; run again to train only what is missing  "
    "[default: not written]",
)
@device_option
@quiet_option
@in_group
def evaluate(
    file, dataset, data_dir, download, resolution, arch, labels, preprocessing, partition, experiment, json_path,
    device, quiet, protocol, epochs, random, scores, whole_accuracy, whole_epochs, **settings,
):  # fmt: skip
    """Train fresh networks on the set in FILE and test them: mean ± standard deviation of last-epoch accuracy, in %.

    FILE is a synthetic set, a file of images that another project saved (its space and layout are recognised, and
    said), or a folder of images; --dataset names the data set where FILE does not.
    `torchrun --nproc-per-node N -m atom_fast evaluate ...` shares the networks among N processes.
    """
    from atom_fast.distillation import ranks
    from atom_fast.evaluation.accuracy import architecture_of, protocol_of
    from atom_fast.evaluation.accuracy import evaluate as run
    from atom_fast.evaluation.results import read_records, summary
    from atom_fast.evaluation.scores import check_whole, measure_scores, score_line
    from atom_fast.evaluation.sets import random_sets
    from atom_fast.pictures import result_line

    if scores and not random:
        raise ValueError("--scores compare with random images: leave out --no-random")
    if not scores and (whole_accuracy is not None or whole_epochs is not None):
        raise ValueError("--whole-accuracy and --whole-epochs are for --scores")
    check_whole(whole_accuracy, whole_epochs)
    if json_path:
        read_records(json_path)  # refuse a file of something else before data are loaded
    progress = not quiet and ranks.is_first()
    options = {"download": download, "resolution": resolution, "progress": progress}
    given = {"labels": labels, "preprocessing": preprocessing, "partition": partition, "experiment": experiment}
    synthetic, data = ranks.after_first(
        lambda: _set_and_data(file, dataset, data_dir, given, device_name(device), **options)
    )
    if ranks.is_first():
        _say_what_was_recognised(synthetic)
    baseline = random_sets(data, synthetic, seed=settings["seed"]) if random else None
    changed = {} if epochs is None else {"epochs": epochs}
    usual = get_protocol(protocol or default_protocol(data.name), **changed)
    own = usual if protocol else protocol_of(synthetic, data.name, **changed)
    if ranks.is_first() and own != usual:
        click.echo(f"networks are trained on the set by the protocol that it was learnt with: {own.name}", err=True)
    settings |= {"device": device_name(device), "progress": progress, "record": json_path}
    for position, network in enumerate(arch):
        architecture = architecture_of(synthetic, data.name) if network == "convnet" else {}
        settings |= {"network": network, "architecture": architecture}
        result = run(synthetic, data, protocol=own, **settings)
        beside = run(baseline, data, protocol=usual, **settings) if baseline else None
        which = f"{network}: " if len(arch) > 1 else ""
        if ranks.is_first():
            if result.about["same_data"] is False and position == 0:
                click.echo(f"note: these {data.name} images are not the ones that the set was distilled from", err=True)
            click.echo(which + printable(result_line(summary(result, beside))))
        if scores and beside:
            given = {name: settings[name] for name in ("together", "device", "progress", "record")}
            given |= {"whole_accuracy": whole_accuracy, "whole_epochs": whole_epochs}
            found = measure_scores(result, beside, synthetic, data, **given)
            if ranks.is_first():
                click.echo(which + score_line(found))


def _set_and_data(file: Path, dataset: str | None, data_dir: Path | None, given: dict, device: str | None, **options):
    """The set in a file or folder of any kind, and the data set that it is tested on."""
    from atom_fast.data.sources import load_data
    from atom_fast.evaluation.sets import read_set
    from atom_fast.foreign.files import is_foreign, named_dataset
    from atom_fast.synthetic import SyntheticSet

    choices = f"give --dataset, one of {', '.join(SOURCES)}"
    if file.is_dir() or (file.is_file() and is_foreign(file)):
        dataset = dataset or named_dataset(file)
        if dataset is None:
            raise ValueError(f"{file} does not say which data set it is for; {choices}")
        data = load_data(dataset, data_dir, **options)
        return read_set(file, data, **given, device=device, progress=options["progress"]), data
    synthetic = SyntheticSet.load(file, **given)
    dataset = dataset or synthetic.metadata.get("dataset")
    if dataset not in SOURCES:
        recorded = f"says that it is for {dataset!r}" if dataset else "does not say which data set it is for"
        raise ValueError(f"the set {recorded}; {choices}")
    height, width = synthetic.sheets.shape[2:]
    if options["resolution"] is None and height == width:
        options["resolution"] = height
    return synthetic, load_data(dataset, data_dir, **options)


def _say_what_was_recognised(synthetic) -> None:
    """Report on standard error what a file of another project was taken for, and why."""
    for name, value in synthetic.metadata.get("recognised", {}).items():
        click.echo(printable(f"{name}: {value}"), err=True)


@main.command()
@data_options("digits", "digits")
@click.option("--resolution", type=int, help="resize images to squares of this side, in pixels  [default: as they are]")
@click.option("--method", type=Choice(SELECTIONS), default="random", show_default=True, help="how to choose the images")
@click.option("--ipc", default=1, help="images to store per class; not used by full  [default: 1 per class]")
@click.option(
    "--partition",
    default=1,
    help="choose this number squared times as many images, and put so many on each stored one, shrunk: to compare with "
    "sets distilled with --partition  [default: 1: whole images]",
)
@click.option("--output", type=FilePath(), help="file to write  [default: runs/DATASET-ipcN-METHOD...]")
@click.option(
    "--preprocessing",
    type=Choice(("auto", *PREPROCESSINGS)),
    default="auto",
    show_default=True,
    help="model space; auto, as in distill: zca for CIFAR up to 64x64, standard otherwise",
)
@click.option(
    "--features",
    type=Choice(FEATURES),
    default="embedding",
    show_default=True,
    help="space in which herding and k-center compare: the embedding of a network trained on all images, or pixels",
)
@click.option(
    "--epochs", default=WATCHED_EPOCHS, help=f"epochs of that network's training  [default: {WATCHED_EPOCHS} epochs]"
)
@click.option(
    "--protocol",
    type=Choice(list(PROTOCOLS)),
    help="how that network is trained  [default: digits for digits, paper for others]",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="seed of the random choice or of the network"
)
@device_option
@quiet_option
@alone
def select(
    dataset, data_dir, download, resolution, method, ipc, partition, output, device, protocol, quiet, **settings
):
    """Choose real images of a data set, as a set to evaluate beside distilled ones.

    Methods: random; herding; k-center; forgetting, the images that a network forgets most often, and
    least-forgetting; easy, random images of the half that trained networks
    find easiest; full, all training images.
    """
    from atom_fast.data.sources import load_data
    from atom_fast.distillation import ranks
    from atom_fast.evaluation.sets import select as choose
    from atom_fast.pictures import count_images

    chosen_device = ranks.own_device(device_name(device))
    data = load_data(dataset, data_dir, download=download, resolution=resolution, progress=not quiet)
    size = "full" if method == "full" else f"{_size_name(ipc, partition)}-{method}"
    output = output or Path("runs") / f"{dataset}-{size}.safetensors"
    chosen = choose(
        data, method, ipc, partition=partition, protocol=protocol or default_protocol(data.name), progress=not quiet,
        device=chosen_device, **settings,
    )  # fmt: skip
    click.echo(f"{count_images(chosen)} in {chosen.save(output)}")


@main.command()
@set_argument
@click.option("--output", type=FilePath(), help="PNG file to write  [default: FILE with .png]")
@data_options(None, "the one that FILE's path names")
@foreign_options
def show(file, output, dataset, data_dir, download, **given):
    """Draw the images in FILE as one PNG, one row per class; with a partition, the sheets that hold them.

    The real images are only needed by a whitened set of another project.
    """
    from atom_fast.foreign.recognised import Recognised
    from atom_fast.pictures import describe, save_synthetic_grid
    from atom_fast.synthetic import recognised_sets

    output = output or file.with_suffix(".png")
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png; got {output}")
    synthetic = _read(file, dataset, data_dir, download, given)
    if isinstance(synthetic, Recognised):
        synthetic = next(recognised_sets(synthetic))  # says what is missing
    _say_what_was_recognised(synthetic)
    click.echo(save_synthetic_grid(synthetic, output, title=describe(synthetic)))


def _read(file: Path, dataset: str | None, data_dir: Path | None, download: bool, given: dict):
    """The set in a file, or what was recognised of one that needs the real images and has none."""
    from atom_fast.data.sources import load_data
    from atom_fast.foreign.files import is_foreign, named_dataset
    from atom_fast.foreign.recognised import open_foreign
    from atom_fast.synthetic import SyntheticSet, recognised_sets

    if not (file.is_file() and is_foreign(file)):
        return SyntheticSet.load(file, **given)
    dataset = dataset or named_dataset(file)
    data = load_data(dataset, data_dir, download=download) if dataset and (data_dir or download) else None
    recognised = open_foreign(file, data, dataset=dataset, **given)
    return recognised if data is None and recognised.candidates[0].needs_data else next(recognised_sets(recognised))


@main.command()
@set_argument
@click.argument("output", type=FilePath())
@click.option(
    "--for",
    "form",
    type=Choice((*EXPORT_FORMATS, "hub")),
    help="folder: PNG files as torchvision's ImageFolder reads them; pt: the format of the public DC, DM and DataDAM "
    "code; hub: a folder for the Hugging Face Hub, to which the set is added; ddranking: what DD-Ranking 0.2.0 tests; "
    "eccv24: the tensor of the ECCV 2024 contest  [default: pt if OUTPUT ends in .pt, otherwise folder]",
)
@click.option(
    "--results",
    type=FilePath(),
    help="file of 'evaluate --json', for the accuracies on the card of hub  [default: evaluation.json beside FILE]",
)
@click.option(
    "--license", help="the images' licence, as the Hub abbreviates it, for that card  [default: unknown, or as it is]"
)
def export(file, output, form, results, license):
    """Write the set in FILE to OUTPUT in a format that other programs read.

    The sheets of a set with a partition are cut into the images that they hold, which are enlarged. Nothing is
    uploaded.
    """
    from atom_fast import hub
    from atom_fast.evaluation.results import read_records
    from atom_fast.synthetic import SyntheticSet

    if form != "hub":
        if results or license:
            raise ValueError("--results and --license are for the card of --for hub")
        click.echo(SyntheticSet.load(file).export(output, format=form))
        return
    if results and not results.is_file():
        raise FileNotFoundError(f"{results} does not exist")
    records = read_records(results or file.with_name(EVALUATION_FILE))
    click.echo(hub.export(SyntheticSet.load(file), output, records, license))


@main.command()
@click.argument("file", type=SetFile(), required=False)
@data_options(None, "the one that FILE's path names")
@foreign_options
@click.option("--json", "as_json", is_flag=True, help="print the facts as JSON  [default: off]")
def info(file, dataset, data_dir, download, as_json, **given):
    """Show what FILE holds and how it was made; of another project's file, what was recognised of it, and why.

    With the real images (--data-dir) a whitened set's kind of whitening is told by undoing it. Without FILE, --dataset
    shows a data set: its classes, size and fingerprint, and where a distillation on this machine keeps its images.
    """
    if file is None:
        facts = _data_facts(dataset, data_dir, download, given)
        click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(map(printable, _all_lines(facts))))
        return
    from atom_fast.foreign.recognised import Recognised
    from atom_fast.pictures import describe

    found = _read(file, dataset, data_dir, download, given)
    facts = found.facts() if isinstance(found, Recognised) else _facts(found)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    if isinstance(found, Recognised):
        click.echo("whitened: to draw, export or evaluate it, give its real images (--dataset NAME --data-dir DIR)")
    else:
        click.echo(printable(describe(found)))
        standard, given_back = found.preprocessing.kind == "standard", "recognised" not in found.metadata
        formula = "(x - mean) / std for pixels x in [0, 1]" if standard else "the whitening that this file holds"
        call = f"SyntheticSet.load({str(file)!r}).preprocessing.to_model(images)"
        if standard or given_back:
            click.echo(printable(f"normalise your test images by {formula}: {call}"))
    for line in _all_lines(facts):
        click.echo(printable(line))


def _data_facts(dataset: str | None, data_dir: Path | None, download: bool, given: dict) -> dict[str, Any]:
    """What there is to say of a data set, as JSON values."""
    from atom_fast.data.sources import load_data
    from atom_fast.distillation.ranks import own_device

    if dataset is None:
        raise click.UsageError("Missing argument 'FILE', a synthetic set, or --dataset NAME for a data set.")
    if unused := [f"--{name}" for name, value in given.items() if value is not None]:
        raise click.UsageError(f"{', '.join(unused)} says something of a FILE; none was given.")
    return load_data(dataset, data_dir, download=download).describe(own_device(None))


def _facts(synthetic) -> dict[str, Any]:
    """What there is to say of a set, as JSON values."""
    statistics = synthetic.preprocessing.describe()
    kind = statistics.pop("kind")
    facts = {
        "images": [len(synthetic), *synthetic.sheets.shape[1:]],
        "partition": synthetic.partition,
        **({} if synthetic.partition == 1 else {"sheets": list(synthetic.sheets.shape)}),
        "ipc": synthetic.ipc,
        "class_names": list(synthetic.class_names),
        "class_sizes": list(synthetic.class_sizes),
        **({} if synthetic.soft_labels is None else {"labels": "soft: probabilities of the classes"}),
        "preprocessing": kind,
        **statistics,
    }
    return facts | {name: value for name, value in synthetic.metadata.items() if name not in facts}


def _all_lines(facts: dict[str, Any]) -> list[str]:
    return [line for name, value in facts.items() for line in _lines(name, value)]


def _lines(name: str, value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"{name}:", *(f"  {line}" for key, inner in value.items() for line in _lines(key, inner))]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return [f"{name}: {value}"]


@main.command()
@click.argument("run", type=FilePath())
@data_options(None, "the one that each set was distilled from")
@click.option("--output", type=FilePath(), help="HTML file to write  [default: report.html in RUN, or RUN with .html]")
@click.option(
    "--networks",
    default=3,
    help="networks to train on each set, and as many on random images and on a coreset  [default: 3 networks]",
)
@protocol_options
@click.option("--train/--no-train", default=True, help="train networks that are not on record  [default: on]")
@device_option
@quiet_option
@alone
def report(run, quiet, device, **options):
    """Write one HTML file about RUN: images beside the nearest real ones, accuracies, confusions, losses, settings.

    RUN is a run's folder, a set's file, a folder of several, or the --out folder of `python -m benchmarks`. What a run
    has not been tested on yet is trained and kept in its evaluation.json, so that a second report trains nothing; for
    a benchmark nothing is trained. What is missing or damaged is named in the report.
    """
    from atom_fast.report import write_report

    click.echo(write_report(run, device=device_name(device), progress=not quiet, **options))


@main.command()
@click.option(
    "--output",
    type=FilePath(),
    default=Path("runs/demo"),
    show_default=True,
    help="folder; finished parts are kept, unfinished ones resumed",
)
@device_option
@quiet_option
@alone
def demo(output, device, quiet):
    """Distil scikit-learn's digits at 1 and 10 images per class and evaluate both: minutes on a CPU."""
    from atom_fast.demo import run_demo

    run_demo(output, device=device_name(device), progress=not quiet)


@main.command()
@device_option
@click.option(
    "--gpu",
    type=float,
    help="compute capability of an absent GPU, such as 8.6: show what would run on it  [default: this machine]",
)
@click.option("--json", "as_json", is_flag=True, help="print the findings as JSON  [default: off]")
@alone
def doctor(device, gpu, as_json):
    """Examine this machine: versions, devices, what runs fused and why, a self-check, and advice.

    Paste the output into a bug report. The exit code is 1 if a check fails.
    """
    from atom_fast._device import SHARED_MEMORY, Chip
    from atom_fast.distillation.ranks import own_device
    from atom_fast.doctor import examine, passes, report

    capability = None if gpu is None else round(10 * gpu)
    if capability is not None and capability not in SHARED_MEMORY:
        known = ", ".join(str(number / 10) for number in SHARED_MEMORY)
        raise ValueError(f"--gpu must be one of {known}; got {gpu}")
    chip = None if capability is None else Chip(capability, SHARED_MEMORY[capability])
    findings: dict[str, Any] = examine(own_device(device_name(device)), chip)
    click.echo(json.dumps(findings, indent=2) if as_json else report(findings))
    if not all(passes(*check) for check in findings.get("checks", {}).items()):
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main(prog_name="atom-fast")
