"""Sections of docs/performance.md: the budget of a step, shares of a copy's bandwidth, and other measurements."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from atom_fast.distillation.step import FLOAT16_FACTOR
from benchmarks import markdown
from benchmarks.communication import GPUS, assumed_latencies
from benchmarks.devices import DEVICES
from benchmarks.markdown import paragraph, three_digits
from benchmarks.pages.readme import milliseconds, newest_cells
from benchmarks.plots import IMPLEMENTATION_NAMES, OPERATOR_NAMES, bandwidth_cases
from benchmarks.ranks import batch_norm_sums
from benchmarks.roofline import WAYS, Configuration, stages
from benchmarks.scaling import EDITIONS, lines
from benchmarks.timings import merge

# A CIFAR-10 step at 50 images per class: the cell of the README's table.
STEP = Configuration(10, 3, 32, 32, ipc=50, real_batch=128, network_width=128, depth=3, precision="tf32", whitened=True)
DEVICE = "H100"
FACTORED = ("float16", "float16, without the factor")
NORM_NAMES = {"instance": "InstanceNorm", "batch": "BatchNorm"}
GROUPS = {
    "sampling, whitening, augmentation": ("sampling", "augmentation", "backward augmentation"),
    "first convolution and block": ("1 convolution + block",),
    "other convolutions": ("2 convolution", "3 convolution"),
    "other blocks": ("2 block", "3 block"),
    "first block, backward": ("backward 1 block + convolution",),
    "network, loss, update": ("network", "loss", "update"),
}


def budget() -> str:
    """Return operations, fewest bytes and least time of a step in groups of stages; nothing of it is measured."""
    work, device = stages(STEP), DEVICES[DEVICE]
    left, lines = list(work), []
    for name, ends in GROUPS.items():
        own = [stage for stage in left if stage.name in ends or stage.name.split(" ", 1)[-1] in ends]
        left = [stage for stage in left if stage not in own]
        lines.append([name, *_sums(own, device)])
    if left:
        raise ValueError(f"no group holds {', '.join(stage.name for stage in left)}")
    lines.append(["**step**", *_sums(work, device)])
    return markdown.table(["part of a step", "GFLOP", "MB, eager", "MB, atom_fast", "least ms, atom_fast"], lines)


def _sums(work, device) -> list[str]:
    eager, fused = WAYS.index("eager"), WAYS.index("fused")
    seconds = sum(stage.seconds("fused", device, STEP.precision) for stage in work)
    figures = (
        sum(stage.fused_matrix or stage.matrix for stage in work) / 1e9,
        *(sum(stage.bytes[way] for stage in work) / 1e6 for way in (eager, fused)),
    )
    return [*(f"{figure:,.0f}" for figure in figures), f"{1e3 * seconds:.2f}"]


def step(gpu: Sequence[Path]) -> str:
    """Return the measured step beside that least time."""
    own = milliseconds(newest_cells(gpu)["fused-graph", "tf32"])
    least = 1e3 * sum(stage.seconds("fused", DEVICES[DEVICE], STEP.precision) for stage in stages(STEP))
    return f"Measured: {three_digits(own)} ms, {three_digits(own / least)} times the sum of the last column."


def bandwidth(kernels: Sequence[Path]) -> str:
    """Return milliseconds and share of a copy's bandwidth by operator, layout, data type and direction."""
    cases, lines = bandwidth_cases(kernels), []
    for (operator, layout, dtype, direction, implementation), case in cases.items():
        if implementation != "fused":
            continue
        eager = cases.get((operator, layout, dtype, direction, "eager"))
        lines.append(
            [
                OPERATOR_NAMES[operator],
                "×".join(map(str, case["shape"])),
                {"nchw": "NCHW", "rows": "–"}.get(layout, layout),
                dtype,
                direction,
                f"{case['milliseconds']:.3f}",
                f"{100 * case['share_of_copy']:.0f} %",
                f"{100 * eager['share_of_copy']:.0f} %" if eager else "–",
            ]
        )
    head = ["operator", "input", "layout", "type", "direction", "ms", "share of a copy", "eager PyTorch's share"]
    return markdown.table(head, lines)


def instructions(path: Path) -> str:
    """Return instructions per value, registers and warps of the measured kernels and their successors."""
    groups: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["chip"] == 90:
            key = f"{row['work']}, {row['size'].replace('x', '×')}", _plain_workload(row["workload"])
            groups.setdefault(key, {}).setdefault(row["kernels"], []).append(row)
    lines = []
    for (work, workload), kinds in groups.items():
        if set(kinds) == {"measured", "successor"}:
            cells = [_counts(kinds[kind]) for kind in ("measured", "successor")]
            lines.append([work, workload, *(" / ".join(pair) for pair in zip(*cells, strict=True))])
    return markdown.table(["kernel", "input", "instructions per value", "registers", "warps"], lines)


def _plain_workload(name: str) -> str:
    """Return the precision, or the type and layout, of a workload of the tests."""
    words = [word for word in name.split() if word not in ("distill", "loss", "instance", "successor")]
    return " ".join(words[1:])


def _counts(rows: list[dict]) -> tuple[str, str, str]:
    """Return the counts of kernels that share a work: instructions are added, the others are of the fullest."""
    return (
        f"{sum(row['per_value'] for row in rows):.1f}",
        str(max(row["registers"] for row in rows)),
        str(min(row["warps"] for row in rows)),
    )


def precision(path: Path) -> str:
    """Return the error of the images' gradient by precision, in percent of its length."""
    record = json.loads(path.read_text())
    columns, rows = {}, {}
    for cell in record["cells"]:
        columns[cell["ipc"]] = f"{cell['ipc']}, {NORM_NAMES[cell['norm']]}"
        rows.setdefault(cell["way"], {})[cell["ipc"]] = statistics.fmean(cell["errors"])
    lines = [[way, *(f"{100 * errors[ipc]:.2g}" for ipc in columns)] for way, errors in rows.items()]
    head = ["% of the gradient; images per class and norm:", *columns.values()]
    cell = record["cells"][0]
    scaled = [cell["largest"] for cell in record["cells"] if cell["way"] == "float16"]
    lost = [max(cell["lost"] for cell in record["cells"] if cell["way"] == way) for way in FACTORED]
    return (
        markdown.table(head, lines)
        + "\n\n"
        + paragraph(
            f"{record['data']}, width {cell['width']}, {cell['real_batch']} real images per class, the mean of "
            f"{len(cell['errors'])} networks. In float16 the gradient is computed times {FLOAT16_FACTOR:,.0f}: the "
            f"largest that a kernel stores is then {max(scaled):,.0f} of 65,504, and float16 rounds at most "
            f"{100 * lost[0]:.1f} % of them to zero instead of {100 * lost[1]:.1f} %."
        )
    )


def kept_memory(path: Path) -> str:
    """Return a CPU step's time with freed memory returned to the system (PyTorch's default) and kept."""
    record = json.loads(path.read_text())
    cells = {(cell["implementation"], cell["keep_memory"]): milliseconds(cell) for cell in record["cells"]}
    lines = [
        [
            IMPLEMENTATION_NAMES[implementation],
            three_digits(cells[implementation, False]),
            three_digits(cells[implementation, True]),
        ]
        for implementation in ("eager-batched", "compile", "fused")
    ]
    where, size = record["environment"], record["workload"]
    text = (
        f"Milliseconds per step, {size['classes']} classes of CIFAR-10's size at {size['ipc']} images per class, full "
        f"width, {where['threads']} threads of an {where['device']}:"
    )
    return f"{text}\n\n{markdown.table(['', 'returned', 'kept'], lines)}"


def bfloat16(path: Path) -> str:
    """Return the gain of bfloat16 on a processor that multiplies in it."""
    record = json.loads(path.read_text())
    times = {cell["precision"]: milliseconds(cell) for cell in record["cells"] if cell["keep_memory"]}
    return (
        f"On an {record['environment']['device']} that has these instructions a step of "
        f"{record['workload']['classes']} classes takes {three_digits(times['bfloat16'])} ms instead of "
        f"{three_digits(times['float32'])}."
    )


def busy(path: Path) -> str:
    """Return the times of the loss, a step and an evaluation beside busy processes."""
    record = json.loads(path.read_text())
    numbers = list(record["cells"][0]["seconds"]["atom_fast"])
    lines = [
        [
            "loss, PyTorch's waiting" if cell["waiting"] == "library" else cell["work"],
            str(cell["neighbours"]),
            " / ".join(three_digits(1e3 * statistics.median(cell["seconds"]["atom_fast"][count])) for count in numbers),
            f"{cell['worst']:.2f}",
            *(
                " / ".join(f"{ratio:.1f}" for ratio in cell[other].values()) if other in cell else "–"
                for other in ("to_equations", "to_compile", "to_copy")
            ),
        ]
        for cell in record["cells"]
    ]
    head = ["", "busy processes", "ms", "slowest", "plain PyTorch", "torch.compile", "copy"]
    return (
        paragraph(
            f"{record['cores']} cores of an {record['environment']['device']}; on {' / '.join(numbers)} threads. "
            "*Slowest*: the slowest call on all threads over the median on one. The last columns are how many times as "
            "long others take, in turns."
        )
        + f"\n\n{markdown.table(head, lines)}"
    )


def digits(path: Path) -> str:
    """Return the seconds of a whole run and of the plain loop."""
    record = json.loads(path.read_text())
    return (
        f"{record['steps']} steps of digits at {record['config']['ipc']} images per class take "
        f"{record['fused']['seconds']:.1f} s; a plain PyTorch loop takes {record['plain']['seconds']:.1f} s "
        f"({record['environment']['threads']} threads)."
    )


def evaluation(gpu: Path, cpu: Path) -> str:
    """Return the time of networks trained several at a time, beside the public code's loop."""
    lines = []
    for path in (gpu, cpu):
        record = json.loads(path.read_text())
        best = record["rounds"][0]
        lines.append(
            [
                record["environment"]["device"],
                f"{best['ensemble']['networks']} × {best['ensemble']['epochs']:,}",
                three_digits(best["ensemble"]["seconds"]),
                three_digits(best["ensemble"]["ms_per_network_epoch"]),
                three_digits(best["loop"]["ms_per_network_epoch"]),
            ]
        )
    head = ["device", "networks × epochs", "seconds", "ms per network and epoch", "the public code's loop"]
    return markdown.table(head, lines)


def ranks(path: Path) -> str:
    """Return weak and strong scaling over processes, and the estimate of BatchNorm's sums on GPUs."""
    record = json.loads(path.read_text())
    lines = [
        [
            str(cell["processes"]),
            str(cell["classes"]),
            NORM_NAMES[norm],
            f"{100 * found['weak']:.0f} %",
            f"{100 * found['apart']:.0f} %",
            f"{found['strong']:.2f}×",
            str(found["messages"]),
            f"{found['bytes_received'] / 1e3:.1f}",
        ]
        for cell in record["cells"]
        for norm, found in cell["norms"].items()
    ]
    head = ["processes", "classes", "norm", "weak scaling", "apart", "strong scaling", "messages", "kB received"]
    text = paragraph(
        f"A core each of an {record['environment']['device']}. *Weak scaling*: speed of a process beside one that "
        "computes as many classes while the others wait; *apart*: the same where they share nothing. *Strong scaling*: "
        "speed beside one process with all classes. Messages and kB are counted, for a process and a step."
    )
    estimate = batch_norm_sums(record["cells"][-1], record["setting"]["width"])
    return "\n\n".join((text, markdown.table(head, lines), *_split_among_gpus(estimate)))


def _split_among_gpus(estimate: list[dict]) -> tuple[str, str]:
    """Return what is estimated and assumed, and the table of it (`benchmarks.communication.estimate_step`)."""
    lines = [
        [work["workload"], f"{1e3 * work['step']:.0f} ms", *(_split_step(work, link) for link in work["seconds"])]
        for work in estimate
    ]
    first = estimate[0]
    limits = " / ".join(f"{1e3 * seconds:.2f}" for seconds in first["pays_from"].values())
    text = (
        f"BatchNorm with the classes split among {GPUS} GPUs, estimated from these counts, not measured: time of a "
        "step's sums, its share of the step on one GPU, and how many times as fast as that the split step is. Assumed: "
        f"the step on one GPU; that {assumed_latencies()}; half of the nominal bandwidth. On {first['workload']} the "
        f"split step is the slower one where the step on one GPU takes less than {limits} ms."
    )
    return paragraph(text), markdown.table(["", "step on one GPU", *first["seconds"]], lines)


def _split_step(work: dict, link: str) -> str:
    return f"{1e3 * work['seconds'][link]:.2f} ms, {100 * work['share'][link]:.1f} %, {work['speed'][link]:.1f}×"


def class_chunks(path: Path) -> str:
    """Return time and memory of a step in chunks of classes."""
    edition = EDITIONS["cpu"]
    whole, chunked = list(lines(edition, "classes").values())[-2:]
    cells = merge([path])
    several = [classes for classes in whole if classes > edition.chunk]
    ratios = [milliseconds(cells[chunked[classes]]) / milliseconds(cells[whole[classes]]) for classes in several]
    before, after = (cells[line[several[-1]]]["memory"]["peak_allocated"] / 1e6 for line in (whole, chunked))
    return paragraph(
        f"On a CPU, at reduced width, a step in chunks of {edition.chunk} classes takes {min(ratios):.1f} to "
        f"{max(ratios):.1f} times as long for {several[0]} to {several[-1]} classes; at {several[-1]} classes its peak "
        f"memory is {after:.0f} MB instead of {before:.0f}."
    )
