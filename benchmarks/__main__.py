"""``python -m benchmarks COMMAND``: the tables and figures of the paper, timings, and the pages made of both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import click

from atom_fast._threads import choose_threads

choose_threads()  # before an import of PyTorch

from atom_fast.distillation.config import PRESETS
from atom_fast.names import WATCHED_EPOCHS
from atom_fast.options import (
    Choice,
    CommaList,
    Commands,
    alone,
    configuration,
    data_options,
    device_name,
    device_option,
    in_group,
    quiet_option,
    setting_options,
)
from atom_fast.training.protocols import PROTOCOLS
from benchmarks import busy, devices, gpu, ranks, roofline, scaling, step, table3
from benchmarks.accuracy.datasets import DATASETS
from benchmarks.accuracy.study import FACTORS
from benchmarks.accuracy.tables import TARGETS, Target, parse_cell
from benchmarks.harness import ROOT
from benchmarks.methods import ALL_IMPLEMENTATIONS, TIMED, Workload
from benchmarks.operators import OPERATORS

RESULTS = ROOT / "benchmarks" / "results"


class _InOrder(Commands):
    """Commands listed in the order in which they are defined."""

    def list_commands(self, ctx):
        return list(self.commands)


class _Cell(click.ParamType):
    name = "dataset:ipc"

    def convert(self, value, param, ctx):
        return parse_cell(value)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main():
    """Run the tables and figures of the ATOM paper, time steps and operators, and render the results.

    Table 3 is about time and memory; all other tables and the figures are about accuracy.
    """


def _out(default: str, explained: str) -> Callable:
    return click.option(
        "--out", type=click.Path(path_type=Path), default=Path(default), show_default=True, help=explained
    )


def _options(*options: Callable) -> Callable:
    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_accuracy_options = _options(
    click.option(
        "--cells",
        type=CommaList(_Cell()),
        help="data sets and images per class, such as cifar10:1,tiny:50  [default: the paper's]",
    ),
    click.option("--seeds", type=click.IntRange(max=1000), help="distilled sets per cell  [default: 5, 3 for digits]"),
    click.option("--networks", type=int, help="networks trained on each set  [default: 20 networks, 2 for digits]"),
    click.option("--iterations", type=int, help="steps of every distillation  [default: the method's, 200 for digits]"),
    click.option("--width", type=int, help="channels of the ConvNets  [default: 128 channels, 32 for digits]"),
    click.option("--real-batch", type=int, help="real images per class per step  [default: the method's]"),
    click.option(
        "--set",
        "given",
        multiple=True,
        metavar="NAME=VALUE",
        help="a setting of distill; METHOD.NAME=VALUE for one method with a loss of its own, as in "
        "dsa.iterations=100  [default: the method's]",
    ),
    click.option(
        "--protocol",
        type=Choice(list(PROTOCOLS)),
        help="training of the networks  [default: digits for digits, paper for others]",
    ),
    click.option(
        "--epochs", type=int, help="epochs of that protocol; others scale with them  [default: the protocol's]"
    ),
    click.option(
        "--selection-epochs", type=int, help=f"epochs of the network that selects images  [default: {WATCHED_EPOCHS}]"
    ),
    click.option("--only", type=CommaList(click.INT), help="numbers of cells from --list, such as 3,4  [default: all]"),
    click.option("--list", "listed", is_flag=True, help="list the cells with their numbers and exit  [default: off]"),
    click.option("--data-dir", type=click.Path(path_type=Path), help="folder of the data  [default: data]"),
    click.option("--download", is_flag=True, help="fetch CIFAR or Tiny ImageNet if missing  [default: off]"),
    _out("runs/accuracy", "folder of cells and results"),
    device_option,
    quiet_option,
)


def _add_target(name: str, target: Target) -> None:
    """Add the command of a table or figure of accuracies."""

    @_accuracy_options
    @in_group
    def command(
        cells, given, iterations, width, real_batch, only, listed, data_dir, download, out, device,
        quiet, methods=None, factors=None, **size,
    ):  # fmt: skip
        from atom_fast._malloc import keep_freed_memory
        from atom_fast.distillation.ranks import is_first
        from benchmarks import accuracy
        from benchmarks.accuracy.render import Record, render
        from benchmarks.accuracy.run import list_units

        keep_freed_memory()
        named = {"iterations": iterations, "width": width, "real_batch": real_batch}
        common, of_methods = split_settings(given)
        settings = {name: value for name, value in named.items() if value is not None} | common
        plan = accuracy.plan(name, cells, methods, factors, settings=settings, of_methods=of_methods, **size)
        if listed:
            if is_first():
                click.echo("\n".join(list_units(plan, out, only)))
            return
        record = accuracy.reproduce(
            plan, out, data_dir=data_dir, download=download, only=only, device=device_name(device), progress=not quiet
        )
        if is_first() and plan.kind != "grids":
            click.echo(render(Record(record)))

    if len(target.methods) > 1:
        kind, known = CommaList(Choice(list(target.methods))), ", ".join(target.methods)
        command = click.option("--methods", type=kind, help=f"methods to run, of {known}  [default: all]")(command)
    if name == "study":
        kind = CommaList(click.STRING)
        command = click.option(
            "--factors", type=kind, help=f"settings to vary, of {', '.join(FACTORS)}  [default: all]"
        )(command)
    command.__doc__ = f"""{target.title}.

    Distils and evaluates the cells that are missing, and shows the results beside the paper's. Finished cells are kept:
    run the same command again, also with more seeds or networks, to continue. Several processes may run the same
    command in one folder; `torchrun --nproc-per-node N -m benchmarks {name} ...` starts N of them, one per GPU.
    """
    main.command(name, short_help=target.title)(command)


def split_settings(given: tuple[str, ...]) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """Return the settings of all methods, and by method those given as ``METHOD.NAME=VALUE``.

    Raises:
        ValueError: as `parse_settings`.
    """
    common, of_methods = [], {}
    for pair in given:
        method, dot, rest = pair.partition("=")[0].partition(".")
        if dot:
            of_methods.setdefault(method.strip(), []).append(rest + pair[len(method) + 1 + len(rest) :])
        else:
            common.append(pair)
    return parse_settings(tuple(common)), {name: parse_settings(tuple(own)) for name, own in of_methods.items()}


def parse_settings(given: tuple[str, ...]) -> dict[str, object]:
    """Return ``NAME=VALUE`` pairs as settings, with values as YAML reads them.

    Raises:
        ValueError: a pair has no "=", or its value cannot be read.
    """
    import yaml

    from atom_fast.distillation.config import from_yaml

    settings = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE; got {pair!r}")
        try:
            settings[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except Exception as error:  # YAML's errors, and errors of its constructors
            raise ValueError(f"--set {pair!r} is not readable as YAML") from error
    return from_yaml(settings)


@click.option("--name", required=True, help="name of the record and of its file")
@click.option("--dataset", type=Choice(list(DATASETS)), default="cifar10", show_default=True, help="data set")
@click.option("--data-dir", type=click.Path(path_type=Path), help="folder of the data  [default: data]")
@click.option("--ipc", type=click.IntRange(1), default=1, show_default=True, help="stored images per class")
@click.option("--preset", "preset_name", type=Choice(list(PRESETS)), default="best", show_default=True, help="settings")
@click.option(
    "--set", "given", multiple=True, metavar="NAME=VALUE", help="a setting of distill  [default: the preset's]"
)
@click.option(
    "--protocol",
    type=Choice(list(PROTOCOLS)),
    help="training of the networks  [default: digits for digits, paper for others]",
)
@click.option("--networks", type=click.IntRange(1), default=5, show_default=True, help="networks trained on the set")
@click.option("--epochs", type=click.IntRange(1), help="epochs of that protocol  [default: the protocol's]")
@click.option("--what", required=True, help="what changed against the records before")
@click.option("--output", type=click.Path(path_type=Path), help="folder of the record  [default: runs/records/NAME]")
@device_option
@quiet_option
@alone
def _record(name, given, output, device, quiet, **options):
    """Measure a row of docs/records.md.

    Loads the data, trains the pool, distils and evaluates one set, and writes NAME.json with the seconds of each stage,
    the accuracy, all settings and the hash of the set. The same command continues an interrupted record.
    """
    from atom_fast._malloc import keep_freed_memory
    from benchmarks import records

    keep_freed_memory()
    output = Path("runs", "records", name) if output is None else output
    record = records.run(
        name, output=output, settings=parse_settings(given), device=device_name(device), progress=not quiet, **options
    )
    seconds = ", ".join(f"{stage} {record['seconds'][stage]:.1f}" for stage in records.STAGES)
    accuracy = record["accuracy"]
    click.echo(f"{accuracy['mean']:.1f} ± {accuracy['std']:.1f} % in seconds: {seconds}; SHA-256 {record['sha256']}")
    click.echo(f"written: {output / name}.json", err=True)


@click.option("--edition", type=Choice(list(table3.EDITIONS)), default="cpu", show_default=True, help="size and device")
@_out("runs/benchmarks", "folder of the results file")
@click.option("--methods", type=CommaList(Choice(list(TIMED))), help="methods to time  [default: all]")
@click.option(
    "--implementations", type=CommaList(Choice(ALL_IMPLEMENTATIONS)), help="implementations to time  [default: all]"
)
@click.option("--ipcs", type=CommaList(click.INT), help="images per class, such as 1,10  [default: the edition's]")
@click.option("--iterations", type=click.IntRange(1), help="timed steps per cell  [default: the edition's]")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), help="seconds of timing per cell  [default: the edition's]"
)
def _table3(edition, out, methods, implementations, ipcs, iterations, seconds):
    """Table 3: time and memory of a step of seven methods.

    Cells that were measured before are kept: a second call continues.
    """
    from dataclasses import replace

    from benchmarks.pages.benchmarks import table3_markdown

    changes = {"iterations": iterations, "seconds": seconds}
    timing = replace(
        table3.EDITIONS[edition].timing, **{name: value for name, value in changes.items() if value is not None}
    )
    path = table3.run(edition, out, methods=methods, implementations=implementations, ipcs=ipcs, timing=timing)
    click.echo(table3_markdown([path]))


@click.option("--dataset", type=Choice(list(DATASETS)), default="digits", show_default=True, help="data set")
@click.option("--data-dir", type=click.Path(path_type=Path), help="folder of the data  [default: data]")
@click.option("--download", is_flag=True, help="fetch CIFAR or Tiny ImageNet if missing  [default: off]")
@click.option(
    "--proxies",
    type=CommaList(click.STRING),
    help="sets to train candidates on: random, herding, k-center, forgetting, dm, dam, atom-channel, atom, early (real "
    "images, as many steps), or NAME=FILE for any set  [default: random,dm,dam,atom,early]",
)
@click.option("--ipc", type=click.IntRange(1), help="stored images per class  [default: 50 images, 10 for digits]")
@click.option("--iterations", type=int, help="steps of every distillation  [default: the method's, 200 for digits]")
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, show_default=True, help="seeds of sets and networks")
@click.option(
    "--widths",
    type=CommaList(click.INT),
    help="channels to choose from  [default: 32,64,128,256; 8,16,32,64 for digits]",
)
@click.option("--sample", type=int, help="number of candidates, chosen at random  [default: all, 720]")
@click.option("--epochs", type=click.IntRange(1), help="epochs on a proxy  [default: 200 epochs, 30 for digits]")
@click.option(
    "--reference-epochs",
    type=click.IntRange(0),
    help="epochs on the whole data; 0 leaves it out  [default: 100 epochs, 10 for digits]",
)
@_out("runs/table6", "folder of sets, candidates and results")
@device_option
@quiet_option
@alone
def _table6(dataset, data_dir, download, out, device, quiet, **options):
    """Table 6: architecture search on distilled sets.

    Trains every candidate of the grid on each proxy and on the whole data, and shows the rank correlations beside the
    paper's. Finished candidates are kept: run the same command again to continue. Several processes may run it in one
    folder; on a CPU one command starts a process for every core.
    """
    from atom_fast._malloc import keep_freed_memory
    from benchmarks.search.plan import plan
    from benchmarks.search.run import run
    from benchmarks.search.table import render

    keep_freed_memory()
    where = {"data_dir": data_dir, "download": download, "device": device_name(device), "progress": not quiet}
    click.echo(render(run(plan(dataset, **options), out, **where)))


for _name, _target in TARGETS.items():  # in the paper's order
    _add_target(_name, _target)
    if _name == "table2":
        main.command("table3", short_help="Table 3: time and memory of a step of seven methods")(_table3)
main.command("table6", short_help="Table 6: architecture search on distilled sets")(_table6)
main.command("record", short_help="A set from the data to its tested accuracy, timed")(_record)


@main.command("scaling")
@click.option(
    "--edition", type=Choice(list(scaling.EDITIONS)), default="cpu", show_default=True, help="size and device"
)
@_out("runs/benchmarks", "folder of the results file")
def _scaling(edition, out):
    """Time a step against classes, images per class and resolution."""
    scaling.run(edition, out)


@main.command()
@_out("runs/benchmarks/kernels-gpu.json", "JSON file of the results")
@click.option("--operator", type=Choice(list(OPERATORS)), help="only this operator  [default: all]")
def kernels(out, operator):
    """Time every operator against a copy of the same bytes, on a GPU."""
    from benchmarks.kernels import run

    run(out, [operator] if operator else None)


@main.command()
@click.option("--networks", type=click.IntRange(1), help="networks  [default: 10 networks, 20 on a GPU]")
@click.option("--epochs", type=click.IntRange(1), help="epochs  [default: 300 epochs, 1000 on a GPU]")
@click.option("--loop-networks", type=click.IntRange(1), help="networks of the public code's loop  [default: all]")
@click.option("--loop-epochs", type=click.IntRange(1), help="epochs of the public code's loop  [default: all]")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="number of repetitions")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the records  [default: not written]")
def evaluation(networks, epochs, loop_networks, loop_epochs, rounds, out):
    """Time the training of evaluated networks beside the public code's loop."""
    from benchmarks.evaluation import run

    run(networks, epochs, loop_networks=loop_networks, loop_epochs=loop_epochs, rounds=rounds, out=out)


@main.command("busy")
@click.option("--works", type=CommaList(Choice(list(busy.WORKS))), help="what to time  [default: all]")
@click.option(
    "--neighbours",
    type=CommaList(click.IntRange(0)),
    default="0,1,2",
    show_default=True,
    help="numbers of busy processes",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="turns of each work")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the records  [default: not written]")
def _busy(works, neighbours, rounds, out):
    """Time the loss, a step and an evaluation on a CPU beside busy processes."""
    busy.run(works or (), neighbours, rounds, out=out)


@main.command()
@data_options("digits", "digits")
@click.option("--resolution", type=int, help="resize images to squares of this side, in pixels  [default: as they are]")
@click.option(
    "--shape",
    type=int,
    nargs=4,
    help="random images instead of a data set: classes, channels, height, width  [default: the images of --dataset]",
)
@click.option("--preset", "preset_name", type=Choice(list(PRESETS)), help="published settings  [default: paper]")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings  [default: no file]")
@click.option("--steps", default=10, help="steps to time and trace  [default: 10 steps]")
@click.option("--warm-up", default=3, help="untimed steps before  [default: 3 steps]")
@click.option("--measure", is_flag=True, help="measure the rates of a device whose datasheet is known  [default: off]")
@click.option(
    "--kernels",
    type=Choice(["measured", "successor"]),
    default="measured",
    show_default=True,
    help="of operations that have two on a GPU: those that were measured, or those to follow",
)
@_out("runs/profile", "folder of profile.json and trace.json")
@device_option
@quiet_option
@setting_options
@click.pass_context
@alone
def profile(
    ctx, dataset, data_dir, download, resolution, shape, preset_name, config, steps, warm_up, measure, kernels, out,
    device, quiet, **settings,
):  # fmt: skip
    """Profile a step: time of each stage beside the least time it could take.

    Runs a few steps with the settings of `atom-fast distill` and keeps no images. Prints a table of the stages, and
    writes it to profile.json beside a Chrome trace for ui.perfetto.dev.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler reports its start and stop
    from click.core import ParameterSource

    from atom_fast._files import write_atomically
    from atom_fast._malloc import keep_freed_memory
    from atom_fast.data.sources import load_data
    from atom_fast.ops.launching import chosen_kernels
    from benchmarks.profile import profile as run
    from benchmarks.profile import profile_table, random_data

    keep_freed_memory()
    config, _ = configuration(ctx, settings, config, preset_name)
    if not shape:
        data = load_data(dataset, data_dir, download=download, resolution=resolution, progress=not quiet)
    elif any(ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in ("dataset", "resolution")):
        raise ValueError("give --shape or --dataset/--resolution, not both")
    else:
        data = random_data(*shape, per_class=max(500, config.real_batch, config.ipc))
    trace, device = out / "trace.json", device_name(device)
    options = {"device": device, "measure": measure, "progress": not quiet}
    with chosen_kernels(kernels):
        result = run(config, data, trace, steps=steps, warm_up=warm_up, **options)
    write_atomically(out / "profile.json", json.dumps(result.to_dict(), indent=2) + "\n")
    click.echo(profile_table(result))
    click.echo(f"trace: {trace}; figures: {out / 'profile.json'}", err=True)


@main.command("precision")
@data_options("digits", "digits")
@click.option("--ipc", type=CommaList(click.IntRange(1)), default="1,10,50", show_default=True, help="images per class")
@click.option("--real-batch", default=32, show_default=True, help="real images per class")
@click.option("--width", default=128, show_default=True, help="channels of every block")
@click.option("--networks", default=2, type=click.IntRange(1), show_default=True, help="networks to draw")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the records  [default: not written]")
@alone
def _precision(dataset, data_dir, download, ipc, real_batch, width, networks, out):
    """Compare a step's image gradient in every precision with float64.

    Emulates on a CPU what a GPU rounds, and prints the relative error of each precision.
    """
    from atom_fast.data.sources import load_data
    from atom_fast.distillation.config import preset
    from benchmarks import precision

    configs = [preset("paper", ipc=size, real_batch=real_batch, width=width) for size in ipc]
    precision.run(configs, load_data(dataset, data_dir, download=download), networks=networks, out=out)


@main.command("roofline")
@click.option(
    "--dataset",
    type=Choice(list(roofline.DATASETS)),
    default="cifar10",
    show_default=True,
    help="source of classes, channels and image size",
)
@click.option("--classes", type=int, help="number of classes  [default: the data set's]")
@click.option("--resolution", type=int, help="height and width in pixels  [default: the data set's]")
@click.option("--ipc", default=50, show_default=True, help="synthetic images per class")
@click.option("--real-batch", default=128, show_default=True, help="real images per class per step")
@click.option("--width", default=128, show_default=True, help="channels of every block")
@click.option("--depth", default=3, show_default=True, help="blocks")
@click.option(
    "--precision", type=Choice(list(devices.PRECISIONS)), default="tf32", show_default=True, help="of the convolutions"
)
@click.option(
    "--device", type=Choice(list(devices.DEVICES)), default="H100", show_default=True, help="rates from its datasheet"
)
@click.option(
    "--measured",
    type=click.Path(path_type=Path),
    help="JSON of a device's measured rates, instead of --device  [default: the datasheet's]",
)
@click.option("--json", "as_json", is_flag=True, help="print JSON  [default: off]")
def _roofline(dataset, classes, resolution, ipc, real_batch, width, depth, precision, device, measured, as_json):
    """Count operations, fewest bytes and least time of a step; nothing is measured."""
    own_classes, channels, height, width_of_images = roofline.DATASETS[dataset]
    rates = devices.read_device(measured) if measured else devices.DEVICES[device]
    sizes = roofline.Configuration(
        own_classes if classes is None else classes,
        channels,
        height if resolution is None else resolution,
        width_of_images if resolution is None else resolution,
        ipc=ipc,
        real_batch=real_batch,
        network_width=width,
        depth=depth,
        precision=precision,
    )
    if as_json:
        click.echo(json.dumps(roofline.to_dict(sizes, rates), indent=2))
    else:
        click.echo(f"{dataset}, IPC {ipc}, {precision}, on {rates.name}\n{roofline.table(sizes, rates)}")


@main.command("gpu")
@_out("runs/gpu", "folder of the results")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=gpu.PLANNED_MINUTES,
    show_default=True,
    help="time for everything",
)
@click.option("--cifar", type=click.Path(path_type=Path), help="CIFAR-10 as folders train/ and test/  [default: none]")
@click.option("--parts", type=CommaList(Choice(list(gpu.PARTS))), help="only these parts  [default: all that fit]")
def _gpu(out, minutes, cifar, parts):
    """Measure everything on a GPU, the most valuable first.

    Each part has its own time limit, and what it has measured is kept however it ends.
    """
    gpu.run(out, minutes, cifar, parts)


@main.command("report")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=RESULTS,
    help="folder of results files  [default: benchmarks/results]",
)
@click.option("--check", is_flag=True, help="write nothing; exit with status 1 if anything is out of date")
@click.pass_context
def _report(ctx, results, check):
    """Render tables and pictures of README and docs from the results files."""
    from benchmarks.report import refresh

    stale = refresh(results, ROOT, check=check)
    for message in stale:
        click.echo(message if check else f"refreshed: {message}")
    ctx.exit(1 if check and stale else 0)


@main.command("compare")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--tolerance", default=0.15, show_default=True, help="relative change to accept")
@click.option("--repeated", is_flag=True, help="two runs of the same code: name changes in both directions")
@click.pass_context
def _compare(ctx, old, new, tolerance, repeated):
    """Name what got slower between two results files OLD and NEW, relative to each run's eager step.

    Exits with status 1 if anything did.
    """
    from benchmarks.compare import compare, compare_repeated

    if repeated:
        largest, beyond = compare_repeated(old, new, tolerance)
        click.echo("\n".join([*beyond, largest]))
        ctx.exit(1 if beyond else 0)
    slower = compare(old, new, tolerance)
    click.echo("\n".join(slower) or "nothing got slower")
    ctx.exit(1 if slower else 0)


@main.command("step")
@click.option("--device", type=Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="where to compute")
@click.option("--classes", default=10, show_default=True, help="number of classes")
@click.option("--ipc", default=50, show_default=True, help="synthetic images per class")
@click.option("--real-batch", default=128, show_default=True, help="real images per class per step")
@click.option("--resolution", default=32, show_default=True, help="height and width in pixels")
@click.option("--width", default=128, show_default=True, help="channels of every block")
@click.option(
    "--precisions", type=CommaList(Choice(list(devices.PRECISIONS))), default="float32", show_default=True,
    help="of the convolutions",
)  # fmt: skip
@click.option(
    "--implementations", type=CommaList(Choice(ALL_IMPLEMENTATIONS)),
    help="implementations to time  [default: all but eager]",
)  # fmt: skip
@click.option("--iterations", type=click.IntRange(1), default=5, show_default=True, help="timed steps")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the records  [default: not written]")
def _step(implementations, precisions, iterations, out, **sizes):
    """Time one step of ATOM in every implementation.

    Prints its time, its ratio to the eager step of the same run, and the memory of the tensors it makes; on a CPU once
    with freed memory given back to the system, and once with it kept.
    """
    workload = Workload("atom", step.EAGER, class_images=max(200, sizes["real_batch"]), **sizes)
    step.run(workload, implementations=implementations, precisions=precisions, iterations=iterations, out=out)


@main.command("digits")
@click.option("--steps", default=300, show_default=True, help="steps of each run, a multiple of 10")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the figures  [default: not written]")
def _digits(steps, out):
    """Time a distillation of digits beside a plain loop, on a CPU."""
    from benchmarks.digits import run

    run(steps, out)


@main.command("candidates")
@click.option("--sample", default=40, show_default=True, help="number of candidates, chosen at random")
@click.option("--epochs", type=click.IntRange(1), default=30, show_default=True, help="epochs of every training")
@click.option("--ipc", type=click.IntRange(1), default=10, show_default=True, help="random digits per class")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="turns of each side")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the record  [default: not written]")
@alone
def _candidates(**options):
    """Time the training of table6's candidates beside one after the other, on a CPU."""
    from atom_fast._malloc import keep_freed_memory
    from benchmarks.search.speed import measure

    keep_freed_memory()
    measure(**options)


@main.command("ranks")
@click.option(
    "--processes", type=CommaList(click.IntRange(2)), help="numbers of processes  [default: 2,4 ... as many as cores]"
)
@click.option("--classes", default=ranks.Sizes.classes, show_default=True, help="classes per process")
@click.option("--ipc", default=ranks.Sizes.ipc, show_default=True, help="synthetic images per class")
@click.option("--real-batch", default=ranks.Sizes.real_batch, show_default=True, help="real images per class per step")
@click.option("--width", default=ranks.Sizes.width, show_default=True, help="channels of every block")
@click.option("--rounds", default=ranks.Sizes.rounds, show_default=True, help="timed rounds")
@click.option("--steps", default=ranks.Sizes.steps, show_default=True, help="steps per round")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the records  [default: not written]")
def _ranks(processes, out, **sizes):
    """Time steps split among processes, with InstanceNorm and BatchNorm, on a CPU.

    An interrupted measurement is continued by the same command.
    """
    ranks.run(ranks.Sizes(**sizes), processes, out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
