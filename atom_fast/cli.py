"""The command ``atom-fast``: distil, evaluate, show, export and describe synthetic sets."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import typing
from pathlib import Path

import click
from click.core import ParameterSource

from atom_fast import __version__
from atom_fast._files import write_atomically
from atom_fast.data.sources import SOURCES
from atom_fast.distill.config import PRESETS, DistillConfig, preset, read_settings
from atom_fast.evaluate.protocols import PROTOCOLS
from atom_fast.synthetic import EXPORT_FORMATS


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
    """A value of another type, or the word ``none``."""

    def __init__(self, inner: click.ParamType):
        self.inner = inner
        self.name = f"{inner.name}|none"

    def convert(self, value, param, ctx):
        return None if value is None or value.lower() == "none" else self.inner.convert(value, param, ctx)


class _Commands(click.Group):
    """Commands whose expected failures are one line on standard error and exit code 2."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            if os.environ.get("ATOM_FAST_DEBUG") == "1":
                raise
            failure = click.ClickException(_one_line(error))
            failure.exit_code = 2
            raise failure from error


def _one_line(error: Exception) -> str:
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} (ATOM_FAST_DEBUG=1 shows all of it)"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _setting_option(field: dataclasses.Field, hint: object):
    """The option for one setting of ``DistillConfig``, from its metadata."""
    accepted = typing.get_args(hint) or (hint,)
    unit = f" {field.metadata['unit']}" if field.metadata["unit"] else ""
    default = "none" if field.default is None else str(field.default).lower() + unit
    text = f"{field.metadata['help']}  [default: {default}]"
    if bool in accepted:
        return click.option(f"{_flag(field.name)}/--no-{field.name.replace('_', '-')}", default=None, help=text)
    if field.metadata["choices"]:
        kind = _Choice(field.metadata["choices"])
    else:
        kind = click.INT if int in accepted else click.FLOAT if float in accepted else click.STRING
    return click.option(_flag(field.name), type=_OrNone(kind) if type(None) in accepted else kind, help=text)


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
                help="folder of the data; digits need none, 'folder' needs one  [default: data]",
            ),
            click.option("--download", is_flag=True, help="fetch CIFAR or Tiny ImageNet if missing  [default: off]"),
        )
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_device_option = click.option(
    "--device", default="auto", show_default=True, help="where to compute: auto (the GPU, if there is one), cpu, cuda"
)
_quiet_option = click.option("--quiet", is_flag=True, help="show no progress bars  [default: off]")
_set_argument = click.argument("file", type=click.Path(path_type=Path))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main():
    """Dataset distillation by attention matching (ATOM): a few synthetic images a class that train a network well.

    Files are synthetic sets as `atom-fast distill` writes them (synthetic.safetensors in a run's folder).
    """


@main.command()
@_data_options("digits", "digits")
@click.option("--resolution", type=int, help="resize images to squares of this side, in pixels  [default: as they are]")
@click.option("--output", type=click.Path(path_type=Path), help="the run's folder  [default: runs/DATASET-ipcN-PRESET]")
@click.option("--resume", is_flag=True, help="go on from the newest checkpoint in --output  [default: off]")
@click.option("--preset", "preset_name", type=_Choice(list(PRESETS)), help="published settings  [default: paper]")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings  [default: none]")
@click.option("--set", "given", type=click.Path(path_type=Path), help="synthetic set to start from  [default: none]")
@_device_option
@_quiet_option
@_setting_options
@click.pass_context
def distill(
    ctx, dataset, data_dir, download, resolution, output, resume, preset_name, config, given, device, quiet, **settings
):
    """Distil a data set into a few images a class.

    Settings are taken from the preset, then from --config, then from the options below; the last one counts. Everything
    about the run is kept in its folder.
    """
    from atom_fast.data.sources import load_data
    from atom_fast.distill import distill as run
    from atom_fast.report import save_run_pictures
    from atom_fast.synthetic import SyntheticSet

    config, preset_name = _configuration(ctx, settings, config, preset_name)
    start = SyntheticSet.load(given) if given else None
    output = output or Path("runs") / f"{dataset}-ipc{config.ipc}-{preset_name}"
    data = load_data(dataset, data_dir, download=download, resolution=resolution, progress=not quiet)
    synthetic = run(
        config, data, output, resume=resume, progress=not quiet, synthetic_init=start, device=_device(device)
    )
    save_run_pictures(output, synthetic)
    file = output / "synthetic.safetensors"
    click.echo(f"{len(synthetic)} images in {file}, their picture in {output / 'synthetic.png'}")
    click.echo(f"next: atom-fast evaluate {file}" + (f" --data-dir {data_dir}" if data_dir else ""), err=True)


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
    return None if name == "auto" else name


@main.command()
@_set_argument
@_data_options(None, "the one the set was distilled from")
@click.option("--networks", default=5, help="networks to train on each side  [default: 5 networks]")
@click.option(
    "--protocol", type=_Choice(list(PROTOCOLS)), help="how to train  [default: digits for digits, paper for others]"
)
@click.option("--random/--no-random", default=True, help="measure random real images beside it  [default: random]")
@click.option("--seed", default=0, show_default=True, help="of networks and random images")
@click.option(
    "--evaluate-every", default=0, help="epochs between further tests, kept in --json  [default: 0 epochs: last only]"
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="file for the full result  [default: none]")
@_device_option
@_quiet_option
def evaluate(
    file, dataset, data_dir, download, networks, protocol, random, seed, evaluate_every, json_path, device, quiet
):
    """Train fresh networks on the set in FILE and test them: mean ± standard deviation of last-epoch accuracy, in %."""
    from atom_fast.comparison import compare
    from atom_fast.report import result_line
    from atom_fast.synthetic import SyntheticSet

    synthetic = SyntheticSet.load(file)
    data = _data_of(synthetic, dataset, data_dir, download, not quiet)
    result = compare(
        synthetic,
        data,
        protocol=protocol,
        networks=networks,
        seed=seed,
        random=random,
        evaluate_every=evaluate_every,
        device=_device(device),
        progress=not quiet,
    )
    if not result["same_data"]:
        click.echo(f"note: these {data.name} images are not those the set was distilled from", err=True)
    click.echo(result_line(result))
    if json_path:
        write_atomically(json_path, json.dumps(result, indent=2) + "\n")


def _data_of(synthetic, dataset: str | None, data_dir: Path | None, download: bool, progress: bool):
    """The data set a synthetic set is tested on, by default its own, in the set's resolution."""
    from atom_fast.data.sources import load_data

    dataset = dataset or synthetic.metadata.get("dataset")
    if dataset not in SOURCES:
        raise ValueError(f"the set does not say which data set it is for; give --dataset, one of {', '.join(SOURCES)}")
    height, width = synthetic.images.shape[2:]
    resolution = height if height == width else None
    return load_data(dataset, data_dir, download=download, resolution=resolution, progress=progress)


@main.command()
@_set_argument
@click.option("--output", type=click.Path(path_type=Path), help="PNG file to write  [default: FILE with .png]")
def show(file, output):
    """Draw the images in FILE as one PNG, a row a class."""
    from atom_fast.report import describe, save_synthetic_grid
    from atom_fast.synthetic import SyntheticSet

    synthetic = SyntheticSet.load(file)
    click.echo(save_synthetic_grid(synthetic, output or file.with_suffix(".png"), title=describe(synthetic)))


@main.command()
@_set_argument
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=_Choice(EXPORT_FORMATS),
    default="folder",
    show_default=True,
    help="folder: PNG files as torchvision's ImageFolder reads them; pt: what the public DC, DM and DataDAM code saves",
)
def export(file, output, form):
    """Write the set in FILE to OUTPUT in a format that other programs read."""
    from atom_fast.synthetic import SyntheticSet

    click.echo(SyntheticSet.load(file).export(output, format=form))


@main.command()
@_set_argument
@click.option("--json", "as_json", is_flag=True, help="print it as JSON  [default: off]")
def info(file, as_json):
    """Say what is in FILE and how it was made."""
    from atom_fast.report import describe
    from atom_fast.synthetic import SyntheticSet

    synthetic = SyntheticSet.load(file)
    facts = {
        "images": list(synthetic.images.shape),
        "class_names": list(synthetic.class_names),
        "class_sizes": list(synthetic.class_sizes),
        "preprocessing": synthetic.preprocessing.kind,
        **synthetic.metadata,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(describe(synthetic))
    for name, value in facts.items():
        for line in _lines(name, value):
            click.echo(line)


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
    help="folder; finished parts that are there already are kept, unfinished ones resumed",
)
@_device_option
@_quiet_option
def demo(output, device, quiet):
    """Distil scikit-learn's digits at 1 and 10 images a class, and evaluate both: minutes on a CPU."""
    from atom_fast.demo import run_demo

    run_demo(output, device=_device(device), progress=not quiet)


if __name__ == "__main__":
    main(prog_name="atom-fast")
