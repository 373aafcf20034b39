"""Types and options that the commands share. PyTorch is not imported before a command runs."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable
from pathlib import Path

import click
from click.core import ParameterSource

from atom_fast._interrupts import interrupts_raised
from atom_fast.distillation.config import SETTINGS, DistillConfig, none_word, preset, read_settings
from atom_fast.names import NETWORK_LIBRARIES, NETWORK_NAMES, PREPROCESSINGS, SOURCES, SPACES, SYNTHETIC_FILE
from atom_fast.training.protocols import PROTOCOLS


class Choice(click.Choice):
    """A choice that suggests the nearest accepted value."""

    def convert(self, value, param, ctx):
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            nearest = difflib.get_close_matches(str(value), list(self.choices), n=1)
            if nearest:
                self.fail(f"{error.message} Did you mean {nearest[0]!r}?", param, ctx)
            raise


class Network(Choice):
    """A test network by name, or one of another library: "timm:NAME", "torchvision:NAME"."""

    def __init__(self):
        super().__init__(NETWORK_NAMES)

    def convert(self, value, param, ctx):
        library, _, name = str(value).partition(":")
        return value if library in NETWORK_LIBRARIES and name else super().convert(value, param, ctx)


class OrNone(click.ParamType):
    """A value of another type, or a word for None: ``none`` leaves something out, ``auto`` derives it."""

    def __init__(self, inner: click.ParamType, word: str):
        self.inner = inner
        self.words = {"none", word}
        self.name = f"{inner.name}|{word}"

    def convert(self, value, param, ctx):
        return None if value is None or value.lower() in self.words else self.inner.convert(value, param, ctx)


class CommaList(click.ParamType):
    """Values of another type, joined by commas; each once."""

    def __init__(self, inner: click.ParamType):
        self.inner = inner
        self.name = f"{inner.name},..."

    def convert(self, value, param, ctx):
        parts = value.split(",") if isinstance(value, str) else value
        found = (self.inner.convert(part.strip() if isinstance(part, str) else part, param, ctx) for part in parts)
        return list(dict.fromkeys(found))


class FilePath(click.Path):
    """A path as a ``pathlib.Path``. It must be UTF-8: safetensors cannot open others, and no terminal shows them."""

    def __init__(self):
        super().__init__(path_type=Path)

    def convert(self, value, param, ctx) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            self.fail(f"the path {os.fsencode(path)!r} is not UTF-8; rename it, or give another one", param, ctx)
        return path


class SetFile(FilePath):
    """A file; a run's folder stands for the set in it."""

    def convert(self, value, param, ctx):
        path = super().convert(value, param, ctx)
        return path / SYNTHETIC_FILE if (path / SYNTHETIC_FILE).is_file() else path


class _Failure(click.ClickException):
    exit_code = 2


class Commands(click.Group):
    """Commands that report expected failures in one line on standard error, with exit code 2."""

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
            raise _Failure(_rank() + _one_line(error)) from error


def _one_line(error: Exception) -> str:
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    lines = [printable(line.strip()) for line in message.splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} (ATOM_FAST_DEBUG=1 shows all of it)"


def printable(text: str) -> str:
    """Escape characters that could control a terminal: names in a stranger's file may hold escape sequences."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _rank() -> str:
    return f"rank {os.environ['RANK']}: " if _launched() and "RANK" in os.environ else ""


def in_group(command: Callable) -> Callable:
    """Run a command within the group of processes that torchrun started, and tell them if it fails."""

    @functools.wraps(command)
    def run(*args, **options):
        from atom_fast.distillation import ranks

        with ranks.join(device_name(options["device"])):
            return command(*args, **options)

    return run


def alone(command: Callable) -> Callable:
    """Refuse to run a command several times over, if torchrun started several processes."""

    @functools.wraps(command)
    def run(*args, **options):
        if _launched():
            raise ValueError(f"{command.__name__} runs in one process; start it without torchrun")
        return command(*args, **options)

    return run


def device_name(name: str) -> str | None:
    """Return the device to compute on, None to choose one; a device that cannot be used is refused here."""
    from atom_fast.distillation import ranks

    return None if name == "auto" else str(ranks.own_device(name))


device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="where to compute: cpu, cuda, one of several GPUs such as cuda:1, or auto: cuda if available, otherwise cpu",
)
quiet_option = click.option("--quiet", is_flag=True, help="show no progress bars  [default: off]")
set_argument = click.argument("file", type=SetFile())


def data_options(default: str | None, explained: str) -> Callable:
    """Add the options that say which data set to load, and from where."""

    def decorate(command):
        options = (
            click.option("--dataset", type=Choice(SOURCES), default=default, help=f"data set  [default: {explained}]"),
            click.option(
                "--data-dir",
                type=FilePath(),
                help="folder of the data; not needed for digits, required for 'folder'  [default: data]",
            ),
            click.option("--download", is_flag=True, help="fetch CIFAR or Tiny ImageNet if missing  [default: off]"),
        )
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def protocol_options(command: Callable) -> Callable:
    """Add the options that say how the networks that test a set are trained."""
    options = (
        click.option(
            "--protocol",
            type=Choice(list(PROTOCOLS)),
            help="how the networks are trained  [default: digits for digits, paper for others]",
        ),
        click.option(
            "--epochs", type=int, help="passes over the set, instead of the protocol's  [default: the protocol's]"
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def foreign_options(command: Callable) -> Callable:
    """Add the options that say of another project's file what it does not say itself."""
    options = (
        click.option(
            "--labels", type=FilePath(), help="file of the labels of an images_*.pt  [default: labels_*.pt beside it]"
        ),
        click.option(
            "--preprocessing",
            type=Choice((*PREPROCESSINGS, *SPACES)),
            help="space of the images in a file of another project, or how to preprocess a folder's images  [default: "
            "recognised; standard for a folder]",
        ),
        click.option(
            "--partition", type=int, help="rows and columns of images on each stored one  [default: recognised]"
        ),
        click.option(
            "--experiment",
            type=int,
            help="number of the set, where a file holds several  [default: 0: the first; DataDAM's last]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def setting_options(command: Callable) -> Callable:
    """Add an option for every setting of `DistillConfig`, derived from its schema."""
    for name in reversed(SETTINGS):
        command = _setting_option(name)(command)
    return command


def _setting_option(name: str) -> Callable:
    setting = SETTINGS[name]
    flag, off = f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"
    default = "auto" if setting["default"] is None else f"{setting['default']} {setting['unit']}".lower().rstrip()
    text = f"{setting['description']}  [default: {default}]"
    if setting["type"] == "boolean":
        return click.option(f"{flag}/{off}", default=None, help=text)
    kinds = {"integer": click.INT, "number": click.FLOAT, "string": click.STRING}
    kind = Choice(setting["enum"]) if "enum" in setting else kinds[setting["type"]]
    if setting["nullable"]:
        kind = OrNone(kind, none_word(setting))
    return click.option(flag, type=kind, help=text)


def configuration(
    ctx: click.Context, options: dict, file: Path | None, preset_name: str | None
) -> tuple[DistillConfig, str]:
    """Return the settings, and the name of the preset they are based on: preset, then file, then options."""
    in_file = read_settings(file) if file else {}
    preset_in_file = in_file.pop("preset", "paper")
    given = {
        name: value
        for name, value in options.items()
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE  # also where the value is None
    }
    name = preset_name or preset_in_file
    return preset(name, **{**in_file, **given}), name
