"""Sections of README.md: caption of the picture, gains, the demo, accuracy, time of a step, and seven methods."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import markdown
from benchmarks.accuracy.render import Measured, Record, accuracy, read
from benchmarks.harness import load_results
from benchmarks.markdown import paragraph, three_digits
from benchmarks.methods import TIMED, Workload
from benchmarks.plots import bandwidth_cases
from benchmarks.timings import merge

GPU = Workload("atom", "eager", ipc=50, precision="tf32")
STEPS = (
    ("eager", "tf32", "eager PyTorch, class by class"),
    ("eager-batched", "tf32", "eager PyTorch, all classes at once"),
    ("compile", "tf32", "the same under `torch.compile`"),
    ("compile-graph", "tf32", "the same in a CUDA graph"),
    ("fused", "tf32", "atom_fast without a CUDA graph"),
    ("fused-graph", "tf32", "**atom_fast**, as `distill` runs it"),
    ("fused-graph", "float16", "**atom_fast**, float16"),
    ("fused-graph", "bfloat16", "**atom_fast**, bfloat16"),
)
COLUMNS = {"eager": "eager PyTorch", "compile": "`torch.compile`", "fused": "atom_fast"}
# Notes on the measured code, by its commit.
COMMITS = {
    "93659fb": "In 93659fb the first block's gradient was wrong for some tile sizes: that run counts for time only.",
    "9013630": "",
}
CPU_IPC = 10


def caption(table1: Path) -> str:
    """Return the caption of the picture: images, seconds, accuracy."""
    record = read(table1)
    row = _atom(record, 10)
    return paragraph(
        f"<em>CIFAR-10 in 100 images, 10 per class: {record.iterations:,} steps in {row.seconds:.0f} seconds on "
        f"{record.device}, start-up not counted. A network trained on them alone classifies {accuracy(row)} % of the "
        f"test images (paper: {_printed(row)}).</em>"
    )


LIBRARY_LOSS = "loss", "library"  # threads wait as in a program that only uses the loss


def gains(table1: Path, gpu: Sequence[Path], kernels: Sequence[Path], busy: Path) -> str:
    """Return three bullets: seconds, memory, and one import."""
    record, cells = read(table1), newest_cells(gpu)
    rows = {ipc: _atom(record, ipc) for ipc in (1, 10, 50)}
    seconds = " / ".join(f"{row.seconds:.0f}" for row in rows.values())
    low, high = (round(choose(row.paper[0] - row.mean for row in rows.values()), 1) for choose in (min, max))
    eager, compiled, own = (_megabytes(cells[name, "tf32"]) for name in ("eager", "compile", "fused-graph"))
    shares = bandwidth_cases(kernels)
    forward, backward = (
        shares["attention", "channels_last", "float32", direction, "fused"]["share_of_copy"]
        for direction in ("forward", "backward")
    )
    low_forward, low_backward = (
        shares["attention", "channels_last", "bfloat16", direction, "fused"]["share_of_copy"]
        for direction in ("forward", "backward")
    )
    bullets = (
        f"**Seconds.** {record.iterations:,} steps of CIFAR-10 at 1 / 10 / 50 images per class take {seconds} seconds "
        f"on {record.device}, checkpoints and pictures included. Start-up (data, whitening, compilation, graph "
        f"capture) comes on top: {_setup(gpu)} seconds where single steps were timed. {_gain(gpu)} Accuracy is "
        f"{low:.1f} to {high:.1f} points below the paper's.",
        f"**Memory.** A step with InstanceNorm at 50 images per class needs {own} MB of GPU memory, data set included; "
        f"eager PyTorch needs {eager} MB, `torch.compile` {compiled} MB.",
        f"**One import.** `ATOMLoss` replaces the attention and embedding terms of your own loop. On that GPU its "
        f"kernels reach {100 * forward:.0f} % (forward) and {100 * backward:.0f} % (backward) of a copy's bandwidth in "
        f"float32, {100 * low_forward:.0f} % and {100 * low_backward:.0f} % in bfloat16. {_loss_on_a_cpu(busy)}",
    )
    return "\n".join(paragraph(bullet, "- ") for bullet in bullets)


def _loss_on_a_cpu(busy: Path) -> str:
    record = json.loads(busy.read_text())
    cells = {cell["neighbours"]: cell for cell in record["cells"] if (cell["work"], cell["waiting"]) == LIBRARY_LOSS}
    quiet, beside = cells[0], cells[1]
    threads = max(quiet["to_equations"], key=int)
    return (
        f"On {threads} cores of a CPU loss and gradient are {quiet['to_equations'][threads]:.0f} times as fast as the "
        f"equations in PyTorch and {quiet['to_compile'][threads]:.1f} times as fast as `torch.compile` of them; beside "
        f"a busy process, {beside['to_equations'][threads]:.0f} and {beside['to_compile'][threads]:.1f} times."
    )


def _gain(gpu: Sequence[Path]) -> str:
    """Return how many times as fast a step is as torch.compile and eager PyTorch in one run."""
    cells = _run(next(iter(_all(gpu, "compile"))))
    own = cells["fused-graph", "tf32"]
    opponents = {"compile-graph": "`torch.compile` in a CUDA graph", "compile": "`torch.compile`"}
    implementation = next(name for name in opponents if (name, "tf32") in cells)
    return (
        f"In one run a step with InstanceNorm at 50 images per class was {_ratio(cells[implementation, 'tf32'], own)} "
        f"as fast as {opponents[implementation]} of the same step, {_ratio(cells['eager-batched', 'tf32'], own)} as "
        f"eager PyTorch with all classes at once."
    )


def _setup(gpu: Sequence[Path]) -> str:
    """Return the range of seconds for data, compilation, capture and a first step, before steps were timed."""
    setups = [
        cell["setup_seconds"]
        for precision in ("tf32", "bfloat16")
        for cell in _all(gpu, "fused-graph", precision).values()
    ]
    return _range(setups, "{:.0f}", " to ")


def _atom(record: Record, ipc: int) -> Measured:
    return next(row for row in record.rows(f"cifar10:{ipc}") if row.title == "ATOM")


def newest_cells(gpu: Sequence[Path]) -> dict[tuple[str, str], dict]:
    """Return the newest cells of ATOM at 50 images per class, by implementation and precision."""
    wanted = dataclasses.replace(GPU, implementation="", precision="")
    return {
        (workload.implementation, workload.precision): cell
        for workload, cell in merge(gpu).items()
        if dataclasses.replace(workload, implementation="", precision="") == wanted and cell["status"] == "ok"
    }


def _all(gpu: Sequence[Path], implementation: str, precision: str = "tf32") -> dict[Path, dict]:
    """Return the cell of ATOM at 50 images per class from every file that has it."""
    wanted = dataclasses.replace(GPU, implementation=implementation, precision=precision)
    return {
        path: cell
        for path in gpu
        for cell in load_results(path)["cells"]
        if Workload(**cell["workload"]) == wanted and cell["status"] == "ok"
    }


def steps(gpu: Sequence[Path], table1: Path) -> str:
    """Return time and memory of one step in the run that timed torch.compile; every ratio is within a run."""
    compiled = next(iter(_all(gpu, "compile")))
    cells = _run(compiled)
    lines = [
        [
            name,
            three_digits(milliseconds(own)),
            _ratio(cells["eager", "tf32"], own),
            "" if "eager" in implementation else _ratio(cells["compile", "tf32"], own),
            _megabytes(own),
        ]
        for implementation, precision, name in STEPS
        if (own := cells.get((implementation, precision)))
    ]
    head = [f"one step of ATOM at commit {_commit(compiled)}", "ms", "over eager", "over `torch.compile`", "peak MB"]
    later = [_later(path) for path in gpu if path != compiled]
    text = [*later, _caveats(gpu), _preset(table1)]
    return "\n\n".join([_where(gpu), markdown.table(head, lines), paragraph(" ".join(text))])


def _run(path: Path) -> dict[tuple[str, str], dict]:
    """Return the cells of one run by implementation and precision."""
    return {row[:2]: cell for row in STEPS if (cell := _all([path], *row[:2]).get(path))}


def _later(path: Path) -> str:
    """Return this project's step in another run, beside the eager step of that run."""
    cells = _run(path)
    eager, own = cells.get(("eager", "tf32")), cells["fused-graph", "tf32"]
    low = cells.get(("fused-graph", "bfloat16"))
    text = f"At commit {_commit(path)} atom_fast took {three_digits(milliseconds(own))} ms"
    if eager:
        text += f", {_ratio(eager, own)} over that run's eager step of {three_digits(milliseconds(eager))} ms"
    if low:
        text += f"; in bfloat16 {three_digits(milliseconds(low))} ms and {_megabytes(low)} MB"
    return f"{text}."


def _ratio(other: dict | None, own: dict) -> str:
    """Return the speed-up over another cell of the same run; "" if that run lacks it."""
    return f"{milliseconds(other) / milliseconds(own):.2g}×" if other else ""


def _commit(path: Path) -> str:
    return (load_results(path)["environment"]["commit"] or "unknown")[:7]


def _where(gpu: Sequence[Path]) -> str:
    where = load_results(gpu[0])["environment"]
    return paragraph(
        f"CIFAR-10 at 50 images per class, ConvNet of width 128 with InstanceNorm (not the preset at this size), TF32, "
        f"{where['device']}. Ratios compare steps of one run, because the time of eager PyTorch depends on the host:"
    )


def _caveats(gpu: Sequence[Path]) -> str:
    """Return what a reader must know to judge the ratios: what was captured, and what has changed since."""
    cells = newest_cells(gpu)
    in_graph = ("compile-graph", "tf32") in cells
    text = "" if in_graph else "`torch.compile` runs in its default mode, without a CUDA graph. "
    if ("fused", "tf32") in cells:
        faster = milliseconds(cells["compile", "tf32"]) / milliseconds(cells["fused", "tf32"]) - 1
        text += (
            f"Without a graph on either side, atom_fast is {100 * faster:.0f} % faster; the rest of the gain is the "
            f"graph that `distill` captures. "
        )
        text += "" if in_graph else "`torch.compile` inside a graph was not measured. "
    dates = {_commit(path): load_results(path)["cells"][0]["measured_at"][:10] for path in gpu}
    known = [commit for commit in COMMITS if commit in dates]
    if known:
        text += (
            f"Measured on {', '.join(sorted({dates[commit] for commit in known}))}; the kernels have changed since. "
            f"{' '.join(filter(None, map(COMMITS.get, known)))}"
        )
    return text.strip()


def _preset(table1: Path) -> str:
    """Return the mean step of the preset, which has BatchNorm at this size, from its whole runs."""
    record = read(table1)
    average = 1e3 * _atom(record, 50).seconds / record.iterations
    return f"The preset has BatchNorm; its whole runs average {three_digits(average)} ms per step."


def demo(path: Path) -> str:
    """Return accuracies and seconds of ``make demo``."""
    record = json.loads(path.read_text("utf-8"))
    found = [
        f"{result['accuracy_mean']:.1f} ± {result['accuracy_std']:.1f} % with {result['ipc']} "
        f"image{'s' if result['ipc'] > 1 else ''} per class (random real images: {result['random_mean']:.1f} %)"
        for result in record["results"]
    ]
    seconds = " and ".join(f"{result['seconds']:.0f}" for result in record["results"])
    return paragraph(
        f"The demo reaches {' and '.join(found)}. Distilling took {seconds} seconds on a CPU; installing and "
        f"evaluating come on top."
    )


def accuracy_table(table1: Path) -> str:
    """Return accuracies of this project's sets, with the paper's figures in brackets."""
    record = read(table1)
    columns = [f"cifar10:{ipc}" for ipc in (1, 10, 50)]
    head = ["CIFAR-10 accuracy in % (paper's)", "1 image per class", "10 images per class", "50 images per class"]
    lines = []
    for title in ("DM", "DAM", "ATOM"):
        found = [next((row for row in record.rows(column) if row.title == title), None) for column in columns]
        lines.append([title, *(f"{accuracy(row)} ({row.paper[0]:.1f})" if row else "–" for row in found)])
    rows = [row for column in columns for row in record.rows(column)]
    sets, networks = (_range(sizes, "{:.0f}", " or ") for sizes in ([r.sets for r in rows], [r.networks for r in rows]))
    images = record.content["data"]["cifar10"].partition("(")[2].rstrip(")")
    under = paragraph(
        f"{sets} sets per cell, {networks} networks per set (paper: 5 and 20), tested with {_schedule(record)}. The "
        f"preset's open settings were chosen by CIFAR-10 test accuracy, without a validation split, so the comparison "
        f"with the paper is optimistic. DM ran {record.iterations:,} of its 20,000 steps. Images were read from JPEG "
        f"files of quality {images.removeprefix('JPEG q')} (effect unknown)."
    )
    return f"{markdown.table(head, lines)}\n\n{under}"


def _schedule(record: Record) -> str:
    """Return the only protocol of the evaluation as an option and in epochs."""
    ((name, protocol),) = record.content["protocols"].items()
    return f"`--protocol {name}`, {protocol['epochs']:,} epochs"


def _printed(row: Measured) -> str:
    """Return the paper's figure."""
    return f"{row.paper[0]:.1f} ± {row.paper[1]:.1f}"


def methods(*cpu: Path) -> str:
    """Return the time of a step of every method of the paper's Table 3, on a CPU, as one small table."""
    cells = {(w.method, w.implementation): cell for w, cell in merge(cpu).items() if w.ipc == CPU_IPC}
    lines = []
    for name, method in TIMED.items():
        found = [cells.get((name, implementation)) for implementation in COLUMNS]
        lines.append([method.title, *map(_milliseconds_or_status, found)])
    where = load_results(cpu[0])["environment"]
    head = ["ms per step, on a CPU", *COLUMNS.values()]
    below = paragraph(
        f"All seven methods of the paper's Table 3 at {CPU_IPC} images per class, on one thread of an "
        f"{where['device']}, at reduced width and batch, commits {', '.join(map(_commit, cpu))}. Compare within a row: "
        "rows are of different days."
    )
    return f"{markdown.table(head, lines)}\n\n{below}"


def _milliseconds_or_status(cell: dict | None) -> str:
    if cell is None:
        return ""
    return three_digits(milliseconds(cell)) if cell["status"] == "ok" else cell["status"]


def milliseconds(cell: dict) -> float:
    """Return the median time of a cell's step."""
    return cell["time"]["median"] * 1e3


def _megabytes(cell: dict) -> str:
    return f"{cell['memory']['peak_allocated'] / 1e6:,.0f}"


def _range(values: Sequence[float], form: str = "{:.2g}", to: str = "–") -> str:
    """Return the least and the largest of some values, whole from ten on, such as "36–47"."""
    low, high = (form.format(round(value) if value >= 10 else value) for value in (min(values), max(values)))
    return low if low == high else f"{low}{to}{high}"
