"""The command ``atom-fast``: distil, evaluate, show, export and describe synthetic sets."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import shlex
import typing
from pathlib import Path

import click
from click.core import ParameterSource

from atom_fast import __version__
from atom_fast._files import write_atomically
from atom_fast._interrupts import interrupts_raised
from atom_fast._malloc import keep_freed_memory
from atom_fast.data.sources import SOURCES
from atom_fast.data.whitening import KINDS
from atom_fast.distillation.config import AUTO, PRESETS, DistillConfig, from_yaml, preset, read_settings
from atom_fast.evaluation.coresets import EPOCHS, METHODS
from atom_fast.evaluation.protocols import PROTOCOLS
from atom_fast.evaluation.sets import FEATURES
from atom_fast.evaluation.training import PRECISIONS
from atom_fast.networks import NETWORKS
from atom_fast.synthetic import EXPORT_FORMATS, SYNTHETIC_FILE
from benchmarks.accuracy.methods import METHODS as REPRODUCED
from benchmarks.accuracy.targets import TARGETS, parse_cell


class _Choice(click.Choice):
    """A choice that suggests the nearest accepted value."""

    def convert(self, value, param, ctx):
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            nearest = difflib.get_close_matches(str(value), list(self.choices), n=1)
            if nearest:
                error.message += f" Did you mean {nearest[0]!r}?"
            raise


class _OrNone(click.ParamType):
    """A value of another type, or a word for None: ``none`` leaves something out, ``auto`` derives it."""

    def __init__(self, inner: click.ParamType, word: str):
        self.inner = inner
        self.words = {"none", word}
        self.name = f"{inner.name}|{word}"

    def convert(self, value, param, ctx):
        return None if value is None or value.lower() in self.words else self.inner.convert(value, param, ctx)


class _List(click.ParamType):
    """Values of another type, joined by commas; each once."""

    def __init__(self, inner: click.ParamType):
        self.inner = inner
        self.name = f"{inner.name},..."

    def convert(self, value, param, ctx):
        parts = value.split(",") if isinstance(value, str) else value
        found = (self.inner.convert(part.strip() if isinstance(part, str) else part, param, ctx) for part in parts)
        return list(dict.fromkeys(found))


class _Commands(click.Group):
    """Commands whose expected failures are one line on standard error and exit code 2."""

    def invoke(self, ctx):
        try:
            with interrupts_raised():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(130)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            if os.environ.get("ATOM_FAST_DEBUG") == "1":
                raise
            failure = click.ClickException(_rank() + _one_line(error))
            failure.exit_code = 2
            raise failure from error


def _one_line(error: Exception) -> str:
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    lines = [_printable(line.strip()) for line in message.splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} (ATOM_FAST_DEBUG=1 shows all of it)"


def _printable(text: str) -> str:
    """``text`` without what could steer a terminal: names in a stranger's file may hold escape sequences."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _rank() -> str:
    from atom_fast.distillation.ranks import launched

    return f"rank {os.environ['RANK']}: " if launched() and "RANK" in os.environ else ""


def _with_ranks(command):
    """Give a command the processes that torchrun started beside this one, and tell them if it fails."""

    @functools.wraps(command)
    def run(*args, **options):
        from atom_fast.distillation.ranks import join

        with join(_device(options["device"])) as world:
            return command(*args, **options, world=world)

    return run


def _alone(command):
    """Refuse to run a command several times over, where torchrun started several processes."""

    @functools.wraps(command)
    def run(*args, **options):
        from atom_fast.distillation.ranks import launched

        if launched():
            raise ValueError(f"{command.__name__} runs in one process; start it without torchrun")
        return command(*args, **options)

    return run


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _setting_option(field: dataclasses.Field, hint: object):
    """The option for one setting of ``DistillConfig``, from its metadata."""
    accepted = typing.get_args(hint) or (hint,)
    unit = f" {field.metadata['unit']}" if field.metadata["unit"] else ""
    default = field.metadata["unset"] or str(field.default).lower() + unit
    text = f"{field.metadata['help']}  [default: {default}]"
    if bool in accepted:
        return click.option(f"{_flag(field.name)}/--no-{field.name.replace('_', '-')}", default=None, help=text)
    if field.metadata["choices"]:
        kind = _Choice(field.metadata["choices"])
    else:
        kind = click.INT if int in accepted else click.FLOAT if float in accepted else click.STRING
    if type(None) in accepted:
        kind = _OrNone(kind, AUTO if default == AUTO else "none")
    return click.option(_flag(field.name), type=kind, help=text)


def _setting_options(command):
    hints = typing.get_type_hints(DistillConfig)
    for field in reversed(dataclasses.fields(DistillConfig)):
        command = _setting_option(field, hints[field.name])(command)
    return command


def _data_options(default: str | None, explained: str):
    def decorate(command):
        options = (
            click.option("--dataset", type=_Choice(SOURCES), default=default, help=f"data set  [default: {explained}]"),
            click.option(
                "--data-dir",
                type=click.Path(path_type=Path),
                help="folder of the data; not needed for digits, required for 'folder'  [default: data]",
            ),
            click.option("--download", is_flag=True, help="fetch CIFAR or Tiny ImageNet if missing  [default: off]"),
        )
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="where to compute: cpu, cuda, one of several GPUs such as cuda:1, or auto: cuda if available, otherwise cpu",
)
_quiet_option = click.option("--quiet", is_flag=True, help="show no progress bars  [default: off]")


class _SetFile(click.Path):
    """A file; a run's folder stands for the set in it."""

    def convert(self, value, param, ctx):
        path = Path(super().convert(value, param, ctx))
        return path / SYNTHETIC_FILE if (path / SYNTHETIC_FILE).is_file() else path


_set_argument = click.argument("file", type=_SetFile(path_type=Path))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main():
    """Distil an image data set into a few synthetic images per class (ATOM).

    FILE is a synthetic set as 'atom-fast distill' writes it: synthetic.safetensors, or the run's folder.
    """
    keep_freed_memory()  # a step on a CPU takes a fifth less time


@main.command()
@_data_options("digits", "digits")
@click.option("--resolution", type=int, help="resize images to squares of this side, in pixels  [default: as they are]")
@click.option("--output", type=click.Path(path_type=Path), help="the run's folder  [default: runs/DATASET-ipcN-PRESET]")
@click.option(
    "--resume", is_flag=True, help="continue from the newest checkpoint in --output, if there is one  [default: off]"
)
@click.option("--preset", "preset_name", type=_Choice(list(PRESETS)), help="published settings  [default: paper]")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings  [default: no file]")
@click.option(
    "--set",
    "given",
    type=click.Path(path_type=Path),
    help="synthetic set to start from, a file or a run's folder  [default: start as --image-init says]",
)
@_device_option
@_quiet_option
@_setting_options
@click.pass_context
@_with_ranks
def distill(
    ctx, dataset, data_dir, download, resolution, output, resume, preset_name, config, given, device, quiet, world,
    **settings,
):  # fmt: skip
    """Distil a data set into a few images per class.

    Settings come from the preset, then from --config, then from the options below; later ones override earlier ones.
    Everything about the run is kept in its folder. `torchrun --nproc-per-node N -m atom_fast distill ...` runs N
    processes, one per GPU, which share the classes.
    """
    from atom_fast.data.sources import load_data
    from atom_fast.distillation import distill as run
    from atom_fast.pictures import save_run_pictures
    from atom_fast.synthetic import SyntheticSet

    config, preset_name = _configuration(ctx, settings, config, preset_name)
    if given and settings["image_init"] not in (None, "given"):
        raise ValueError(f"give --set or --image-init {settings['image_init']}, not both")
    start = SyntheticSet.load(given) if given else None
    output = output or Path("runs") / f"{dataset}-ipc{config.ipc}-{preset_name}"
    options = {"resolution": resolution, "progress": not quiet and world.rank == 0}
    data = world.after_first(lambda: load_data(dataset, data_dir, download=download, **options))
    synthetic = run(
        data, config, output, resume=resume, progress=not quiet, start=start, device=_device(device),
        how_to_go_on="run the same command with --resume",
    )  # fmt: skip
    if world.rank > 0:
        return
    save_run_pictures(output, synthetic)
    file = output / SYNTHETIC_FILE
    click.echo(f"{len(synthetic)} images in {file}, their picture in {output / 'synthetic.png'}")
    where = ["--data-dir", str(data_dir)] if data_dir else []
    click.echo(f"next: {shlex.join(['atom-fast', 'evaluate', str(file), *where])}", err=True)


def _configuration(
    ctx: click.Context, options: dict, file: Path | None, preset_name: str | None
) -> tuple[DistillConfig, str]:
    """The settings, and the name of the preset they are based on: preset, then file, then options."""
    in_file = read_settings(file) if file else {}
    preset_in_file = in_file.pop("preset", "paper")
    given = {
        name: value
        for name, value in options.items()
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE  # the value none is one, too
    }
    preset_name = preset_name or preset_in_file
    return preset(preset_name, **{**in_file, **given}), preset_name


def _device(name: str) -> str | None:
    """The device to compute on; None to choose one. One that cannot be used is refused before anything is begun."""
    from atom_fast.distillation.ranks import own_device

    return None if name == "auto" else str(own_device(name))


@main.command()
@_data_options("digits", "digits")
@click.option("--resolution", type=int, help="resize images to squares of this side, in pixels  [default: as they are]")
@click.option(
    "--shape",
    type=int,
    nargs=4,
    help="random images instead of a data set: classes, channels, height, width  [default: the images of --dataset]",
)
@click.option("--preset", "preset_name", type=_Choice(list(PRESETS)), help="published settings  [default: paper]")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings  [default: no file]")
@click.option("--steps", default=10, help="steps to time and trace  [default: 10 steps]")
@click.option("--warm-up", default=3, help="untimed steps before  [default: 3 steps]")
@click.option("--measure", is_flag=True, help="measure the rates of a device whose datasheet is known  [default: off]")
@click.option("--output", type=click.Path(path_type=Path), help="folder to write to  [default: runs/profile]")
@click.option("--trace", type=click.Path(path_type=Path), help="Chrome trace to write  [default: OUTPUT/trace.json]")
@_device_option
@_quiet_option
@_setting_options
@click.pass_context
@_alone
def profile(
    ctx, dataset, data_dir, download, resolution, shape, preset_name, config, steps, warm_up, measure, output, trace,
    device, quiet, **settings,
):  # fmt: skip
    """Show where the time of a step goes, and how far each stage is from the least time it could take.

    Runs a few steps with the settings of `atom-fast distill` and keeps no images. Prints a table of the stages, and
    writes it to profile.json in --output, beside a Chrome trace for ui.perfetto.dev.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler reports its own start and stop
    from atom_fast.data.sources import load_data
    from benchmarks.profile import profile as run
    from benchmarks.profile import profile_table, random_data

    config, _ = _configuration(ctx, settings, config, preset_name)
    output = output or Path("runs/profile")
    if not shape:
        data = load_data(dataset, data_dir, download=download, resolution=resolution, progress=not quiet)
    elif any(ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in ("dataset", "resolution")):
        raise ValueError("give --shape or --dataset/--resolution, not both")
    else:
        data = random_data(*shape, per_class=max(500, config.real_batch, config.ipc))
    trace = trace or output / "trace.json"
    result = run(
        config, data, trace, steps=steps, warm_up=warm_up, device=_device(device), measure=measure, progress=not quiet
    )
    write_atomically(output / "profile.json", json.dumps(result.to_dict(), indent=2) + "\n")
    click.echo(profile_table(result))
    click.echo(f"trace: {trace}; figures: {output / 'profile.json'}", err=True)


@main.command()
@_set_argument
@_data_options(None, "the one the set was distilled from")
@click.option("--resolution", type=int, help="resize the data's images to this side, in pixels  [default: the set's]")
@click.option(
    "--networks", default=5, help="networks to train on the set, and as many on random images  [default: 5 networks]"
)
@click.option(
    "--arch",
    type=_List(_Choice(list(NETWORKS))),
    default="convnet",
    show_default=True,
    help=f"architecture of the networks, or several joined by commas: {', '.join(NETWORKS)}",
)
@click.option(
    "--protocol",
    type=_Choice(list(PROTOCOLS)),
    help="how the networks are trained  [default: digits for digits, paper for others]",
)
@click.option("--epochs", type=int, help="passes over the set, instead of the protocol's  [default: the protocol's]")
@click.option("--random/--no-random", default=True, help="also train on random real images  [default: on]")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="seed of the networks and of the random images"
)
@click.option(
    "--precision", type=_Choice(PRECISIONS), default="float32", show_default=True, help="precision of the training"
)
@click.option(
    "--evaluate-every", default=0, help="also test every N epochs (in --json)  [default: 0, only after the last epoch]"
)
@click.option("--together", type=int, help="networks to train at the same time  [default: chosen for the device]")
@click.option(
    "--preprocessing",
    type=_Choice(KINDS),
    help="how a .pt was preprocessed, or how to preprocess a folder's images  [default: as the public code does for a "
    ".pt of a data set it knows, standard otherwise]",
)
@click.option("--experiment", default=0, help="which set, where a .pt holds several  [default: 0: the first]")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="file for the full result, written whenever a network finishes; run again to train what is missing  "
    "[default: not written]",
)
@_device_option
@_quiet_option
@_with_ranks
def evaluate(
    file, dataset, data_dir, download, resolution, arch, preprocessing, experiment, json_path, device, quiet, protocol,
    epochs, world, **settings,
):  # fmt: skip
    """Train fresh networks on the set in FILE and test them: mean ± standard deviation of last-epoch accuracy, in %.

    FILE is a synthetic set, a .pt that the public DC, DM or DataDAM program saved, or a folder of images; the last two
    need --dataset. `torchrun --nproc-per-node N -m atom_fast evaluate ...` shares the networks among N processes.
    """
    from atom_fast.evaluation.comparison import compare, default_protocol
    from atom_fast.evaluation.protocols import get_protocol
    from atom_fast.pictures import result_line

    first = world.rank == 0
    earlier, records = world.exchange(_read_records(json_path) if first else None)[0], {}
    if all(network in earlier and earlier[network]["state"]["complete"] for network in arch):
        earlier = {}  # nothing was interrupted: measured again
    synthetic, data = world.after_first(
        lambda: _set_and_data(
            file,
            dataset,
            data_dir,
            preprocessing,
            experiment,
            download=download,
            resolution=resolution,
            progress=first and not quiet,
        )
    )
    protocol = get_protocol(protocol or default_protocol(data.name), **({} if epochs is None else {"epochs": epochs}))

    def keep(record: dict) -> None:
        records[record["evaluation"]["network"]] = record
        if json_path and first:
            same = {name: old for name, old in earlier.items() if old["state"]["hash"] == record["state"]["hash"]}
            known = same | records  # also what an interrupted call found for the networks still to come
            found = [known[name] for name in arch if name in known]
            write_atomically(json_path, json.dumps(found if len(arch) > 1 else record, indent=2) + "\n")

    for position, network in enumerate(arch):
        record = compare(
            synthetic, data, network=network, protocol=protocol, device=_device(device),
            progress=first and not quiet, on_network=keep, world=world, earlier=earlier.get(network), **settings,
        )  # fmt: skip
        keep(record)
        if not first:
            continue
        if record["same_data"] is False and position == 0:
            click.echo(f"note: these {data.name} images are not the ones that the set was distilled from", err=True)
        click.echo((f"{network}: " if len(arch) > 1 else "") + _printable(result_line(record)))


def _set_and_data(file, dataset, data_dir, preprocessing, experiment, **options):
    """The set in a file or folder of any kind, and the data set that it is tested on."""
    from atom_fast.data.sources import load_data
    from atom_fast.evaluation.sets import read_set
    from atom_fast.synthetic import SyntheticSet

    if file.is_dir() or file.suffix in (".pt", ".pth"):
        if dataset is None:
            raise ValueError(
                f"{file} does not say which data set it is for; give --dataset, one of {', '.join(SOURCES)}"
            )
        data = load_data(dataset, data_dir, **options)
        how = {"preprocessing": preprocessing, "experiment": experiment, "progress": options["progress"]}
        return read_set(file, data, **how), data
    synthetic = SyntheticSet.load(file)
    if preprocessing is not None:
        raise ValueError(f"{file} holds its own preprocessing; --preprocessing is for a .pt or a folder")
    return synthetic, _data_of(synthetic, dataset, data_dir, **options)


def _read_records(path: Path | None) -> dict[str, dict]:
    """What an earlier call left in a result file, by network; a file no such call wrote is not to be replaced."""
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
        records = content if isinstance(content, list) else [content]
        if not all({"complete", "hash"} <= record["state"].keys() for record in records):
            raise ValueError("a record does not say what it describes")
        return {record["evaluation"]["network"]: record for record in records}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a result of this command; move it, or name another file") from error


def _data_of(
    synthetic, dataset: str | None, data_dir: Path | None, *, download: bool, resolution: int | None, progress: bool
):
    """The data set a synthetic set is tested on, by default its own, in the set's resolution."""
    from atom_fast.data.sources import load_data

    dataset = dataset or synthetic.metadata.get("dataset")
    if dataset not in SOURCES:
        said = f"says that it is for {dataset!r}" if dataset else "does not say which data set it is for"
        raise ValueError(f"the set {said}; give --dataset, one of {', '.join(SOURCES)}")
    height, width = synthetic.images.shape[2:]
    if resolution is None and height == width:
        resolution = height
    return load_data(dataset, data_dir, download=download, resolution=resolution, progress=progress)


@main.command()
@_data_options("digits", "digits")
@click.option("--resolution", type=int, help="resize images to squares of this side, in pixels  [default: as they are]")
@click.option("--method", type=_Choice(METHODS), default="random", show_default=True, help="how to choose the images")
@click.option("--ipc", default=1, help="images to choose per class; not used by full  [default: 1 per class]")
@click.option("--output", type=click.Path(path_type=Path), help="file to write  [default: runs/DATASET-ipcN-METHOD...]")
@click.option(
    "--preprocessing",
    type=_Choice(("auto", *KINDS)),
    default="auto",
    show_default=True,
    help="model space; auto, as in distill: zca for CIFAR, standard otherwise",
)
@click.option(
    "--features",
    type=_Choice(FEATURES),
    default="embedding",
    show_default=True,
    help="what herding and k-center compare, both in model space: the embedding of a network trained on all images, "
    "or pixels",
)
@click.option("--epochs", default=EPOCHS, help=f"epochs of that network's training  [default: {EPOCHS} epochs]")
@click.option(
    "--protocol",
    type=_Choice(list(PROTOCOLS)),
    help="how that network is trained  [default: digits for digits, paper for others]",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="seed of the random choice or of the network"
)
@_device_option
@_quiet_option
@_alone
def select(dataset, data_dir, download, resolution, method, ipc, output, device, protocol, quiet, **settings):
    """Choose real images of a data set, as a set to evaluate beside distilled ones.

    Methods: random; herding; k-center; forgetting, the images that a network forgets most often, and
    least-forgetting; full, all training images.
    """
    import torch

    from atom_fast.data.sources import load_data
    from atom_fast.evaluation.comparison import default_protocol
    from atom_fast.evaluation.sets import select as choose

    data = load_data(dataset, data_dir, download=download, resolution=resolution, progress=not quiet)
    size = "full" if method == "full" else f"ipc{ipc}-{method}"
    output = output or Path("runs") / f"{dataset}-{size}.safetensors"
    chosen = choose(
        data, method, ipc, protocol=protocol or default_protocol(data.name), progress=not quiet,
        device=_device(device) or ("cuda" if torch.cuda.is_available() else "cpu"), **settings,
    )  # fmt: skip
    click.echo(f"{len(chosen)} images in {chosen.save(output)}")


@main.command()
@_set_argument
@click.option("--output", type=click.Path(path_type=Path), help="PNG file to write  [default: FILE with .png]")
def show(file, output):
    """Draw the images in FILE as one PNG, one row per class."""
    from atom_fast.pictures import describe, save_synthetic_grid
    from atom_fast.synthetic import SyntheticSet

    output = output or file.with_suffix(".png")
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png; got {output}")
    synthetic = SyntheticSet.load(file)
    click.echo(save_synthetic_grid(synthetic, output, title=describe(synthetic)))


@main.command()
@_set_argument
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=_Choice(EXPORT_FORMATS),
    help="folder: PNG files as torchvision's ImageFolder reads them; pt: the format of the public DC, DM and DataDAM "
    "code  [default: pt if OUTPUT ends in .pt, otherwise folder]",
)
def export(file, output, form):
    """Write the set in FILE to OUTPUT in a format that other programs read."""
    from atom_fast.synthetic import SyntheticSet

    click.echo(SyntheticSet.load(file).export(output, format=form))


@main.command()
@_set_argument
@click.option("--json", "as_json", is_flag=True, help="print the facts as JSON  [default: off]")
def info(file, as_json):
    """Show what FILE holds and how it was made."""
    from atom_fast.pictures import describe
    from atom_fast.synthetic import SyntheticSet

    synthetic = SyntheticSet.load(file)
    statistics = synthetic.preprocessing.describe()
    kind = statistics.pop("kind")
    facts = {
        "images": list(synthetic.images.shape),
        "class_names": list(synthetic.class_names),
        "class_sizes": list(synthetic.class_sizes),
        "preprocessing": kind,
        **statistics,
        **synthetic.metadata,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(_printable(describe(synthetic)))
    formula = "(x - mean) / std for pixels x in [0, 1]" if kind == "standard" else "the whitening that this file holds"
    call = f"SyntheticSet.load({str(file)!r}).preprocessing.to_model(images)"
    click.echo(_printable(f"normalise your test images by {formula}: {call}"))
    for name, value in facts.items():
        for line in _lines(name, value):
            click.echo(_printable(line))


def _lines(name: str, value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"{name}:", *(f"  {line}" for key, inner in value.items() for line in _lines(key, inner))]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return [f"{name}: {value}"]


@main.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="folder; finished parts are kept, unfinished ones resumed",
)
@_device_option
@_quiet_option
@_alone
def demo(output, device, quiet):
    """Distil scikit-learn's digits at 1 and 10 images per class and evaluate both: minutes on a CPU."""
    from atom_fast.demo import run_demo

    run_demo(output, device=_device(device), progress=not quiet)


@main.command()
@_device_option
@click.option(
    "--gpu",
    type=float,
    help="compute capability of a GPU that is not here, such as 8.6: say what would run on it  [default: this machine]",
)
@click.option("--json", "as_json", is_flag=True, help="print the findings as JSON  [default: off]")
@_alone
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
    findings = examine(own_device(_device(device)), chip)
    click.echo(json.dumps(findings, indent=2) if as_json else report(findings))
    if not all(passes(*check) for check in findings.get("checks", {}).items()):
        raise click.exceptions.Exit(1)


class _CellName(click.ParamType):
    """A data set and images per class, joined by a colon."""

    name = "dataset:ipc"

    def convert(self, value, param, ctx):
        return parse_cell(value)


@main.command()
@click.argument("target", type=_Choice(list(TARGETS)))
@click.option(
    "--cells",
    type=_List(_CellName()),
    help="data sets and images per class, such as cifar10:1,tiny:50  [default: the paper's]",
)
@click.option("--methods", type=_List(_Choice(list(REPRODUCED))), help="methods to run  [default: all of the target]")
@click.option(
    "--factors", type=_List(click.STRING), help="settings of the study to vary, joined by commas  [default: all]"
)
@click.option("--seeds", type=int, help="distilled sets per cell  [default: 5 sets, 3 for digits]")
@click.option("--networks", type=int, help="networks to train on each set  [default: 20 networks, 2 for digits]")
@click.option(
    "--iterations",
    type=int,
    help="steps of every distillation  [default: the method's own number of steps, 200 for digits]",
)
@click.option("--width", type=int, help="channels of the ConvNets  [default: 128 channels, 32 for digits]")
@click.option("--real-batch", type=int, help="real images per class per step  [default: the method's own]")
@click.option(
    "--set", "given", multiple=True, metavar="NAME=VALUE", help="a setting of distill  [default: the method's own]"
)
@click.option(
    "--protocol",
    type=_Choice(list(PROTOCOLS)),
    help="how the networks are trained  [default: digits for digits, paper for others]",
)
@click.option(
    "--epochs", type=int, help="epochs of that protocol; its other times scale with them  [default: the protocol's]"
)
@click.option(
    "--selection-epochs", type=int, help=f"epochs of the network that selects images  [default: {EPOCHS} epochs]"
)
@click.option(
    "--budget",
    type=float,
    help="minutes: estimate every cell, run what fits, name the rest  [default: no limit]",
)
@click.option("--only", type=_List(click.INT), help="numbers of cells from --list, such as 3,4  [default: all]")
@click.option("--list", "listed", is_flag=True, help="list the cells with their numbers and exit  [default: off]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="folder of the data  [default: data]")
@click.option("--download", is_flag=True, help="fetch CIFAR or Tiny ImageNet if missing  [default: off]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("runs/reproduce"),
    show_default=True,
    help="folder of the cells and results",
)
@_device_option
@_quiet_option
@_with_ranks
def reproduce(
    target, cells, methods, factors, iterations, width, real_batch, given, budget, only, listed, data_dir, download,
    output, device, quiet, world, **scale,
):  # fmt: skip
    """Run a table or figure of the ATOM paper and show the results beside the paper's.

    TARGET is a table, a figure, or study: the settings that the paper leaves open, varied one at a time. Finished cells
    are kept: run the same command again, also with more seeds or networks, to continue. Several processes may run the
    same command in one folder; `torchrun --nproc-per-node N -m atom_fast reproduce ...` starts N of them, one per GPU.
    """
    from benchmarks import accuracy as package
    from benchmarks.accuracy.run import list_units
    from benchmarks.accuracy.tables import render

    named = {"iterations": iterations, "width": width, "real_batch": real_batch}
    settings = {name: value for name, value in named.items() if value is not None} | _parse_settings(given)
    plan = package.plan(target, cells, methods, factors, settings=settings, **scale)
    if listed:
        if world.rank == 0:
            click.echo("\n".join(list_units(plan, output)))
        return
    record = package.reproduce(
        plan, output, data_dir=data_dir, download=download, budget=budget, only=only, device=_device(device),
        progress=not quiet, world=world,
    )  # fmt: skip
    if world.rank == 0 and plan.kind != "grids":
        click.echo(render(record))


def _parse_settings(given) -> dict[str, object]:
    """``NAME=VALUE`` pairs, with values as YAML reads them."""
    import yaml

    settings = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE; got {pair!r}")
        try:
            settings[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except Exception as error:  # of YAML, and what its constructors raise
            raise ValueError(f"--set {pair!r} is not readable as YAML") from error
    return from_yaml(settings)


if __name__ == "__main__":
    main(prog_name="atom-fast")
