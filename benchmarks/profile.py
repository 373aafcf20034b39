"""Time of every stage of a step, beside the least time that its work could take on the device."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from atom_fast._files import write_atomically
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.pool import trained_pool
from atom_fast.distillation.ranks import own_device
from atom_fast.distillation.stages import PREFIX, STAGES
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation
from benchmarks import devices, roofline

STEP = "step"  # range of a whole step in the trace
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of PyTorch's Chrome traces
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclasses.dataclass(frozen=True)
class StageTime:
    """One stage of a step.

    Attributes:
        name: one of `atom_fast.distillation.stages.STAGES`.
        seconds: traced seconds per step: on a CPU from begin to end of the stage, on a GPU of its kernels alone.
        operations, bytes: fewest operations and bytes (`benchmarks.roofline`, way "floor"); None if not counted.
        floor: seconds that these take at the device's rates; None if not counted.
    """

    name: str
    seconds: float
    operations: float | None
    bytes: float | None
    floor: float | None


@dataclasses.dataclass(frozen=True)
class Profile:
    """The result of `profile`.

    Attributes:
        device: rates that the floors are computed from.
        rates_from: "datasheet" or "measured".
        precision: precision of the convolutions.
        fusion: parts of the network that ran fused, in words.
        steps: number of traced steps, and of steps timed again without the profiler.
        stages: stages in the order of a step.
        other_seconds: seconds per step outside every stage.
        traced_seconds: seconds per step with the profiler; on a GPU of its kernels alone.
        step_seconds: seconds per step without the profiler, not captured.
        captured_seconds: seconds of a replay of the captured step; None if nothing is captured.
        kernels: name and mean microseconds of every kernel and copy of a replay, in order; None likewise.
        not_counted: settings for which operations and bytes are not counted; None if they are.
        trace: Chrome trace.
    """

    device: devices.Device
    rates_from: str
    precision: str
    fusion: str
    steps: int
    stages: tuple[StageTime, ...]
    other_seconds: float
    traced_seconds: float
    step_seconds: float
    captured_seconds: float | None
    kernels: list[tuple[str, float]] | None
    not_counted: str | None
    trace: Path

    def to_dict(self) -> dict:
        """Return all fields as JSON can hold them, times in seconds."""
        return {**dataclasses.asdict(self), "trace": str(self.trace)}


def profile(
    config: DistillConfig,
    data: ImageData,
    trace: str | os.PathLike,
    *,
    steps: int = 10,
    warm_up: int = 3,
    device: torch.device | str | None = None,
    measure: bool = False,
    progress: bool = True,
) -> Profile:
    """Run steps of a distillation and measure the time of their stages; only the trace is kept.

    A captured step is one launch that cannot be divided into stages, so the stages are measured without capture, and
    the replay's time is given beside them.

    Args:
        config: settings; open ones are derived from data and device. ``iterations`` is not used.
        data: real images; not modified.
        trace: Chrome trace to write, for chrome://tracing or ui.perfetto.dev.
        steps: number of timed steps, and of traced steps.
        warm_up: number of steps before them.
        device: device that computes; None: the GPU, if there is one.
        measure: measure the device's rates even if its datasheet is known; others are always measured.
        progress: show progress bars on standard error.

    Raises:
        ValueError: fewer than one step or a negative warm-up, or settings that do not fit the data or the device.
        OSError: the trace could not be written.
    """
    if steps < 1 or warm_up < 0:
        raise ValueError(f"steps must be at least 1 and warm_up at least 0; got {steps} and {warm_up}")
    device = own_device(device)
    run = _prepare(config, data, device, progress)
    iterations = itertools.count(1)

    def step() -> None:
        run.step(next(iterations))

    for _ in range(warm_up):
        step()
    step_seconds = _seconds_a_step(step, steps, device)
    document = _traced(step, steps, device, Path(trace))
    seconds, traced = stage_seconds(document)
    captured = kernels = None
    if device.type == "cuda" and run.config.cuda_graph:
        run.capture()
        captured = _seconds_a_step(step, steps, device)
        with tempfile.TemporaryDirectory() as folder:
            kernels = kernel_times(_traced(step, steps, device, Path(folder) / "trace.json"), steps)
    rates, rates_from = _rates(device, measure)
    floors, not_counted = _floors(run, rates)
    return Profile(
        device=rates,
        rates_from=rates_from,
        precision=run.config.precision,
        fusion=run.fusion,
        steps=steps,
        stages=tuple(StageTime(name, seconds[name] / steps, *floors[name]) for name in STAGES),
        other_seconds=(traced - sum(seconds.values())) / steps,
        traced_seconds=traced / steps,
        step_seconds=step_seconds,
        captured_seconds=captured,
        kernels=kernels,
        not_counted=not_counted,
        trace=Path(trace),
    )


def random_data(classes: int, channels: int, height: int, width: int, per_class: int, *, seed: int = 0) -> ImageData:
    """Return uniform random uint8 images, ``per_class`` per class: time does not depend on what images show.

    Raises:
        ValueError: a size is below 1.
    """
    sizes = {"classes": classes, "channels": channels, "height": height, "width": width, "per_class": per_class}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    labels = torch.arange(classes).repeat_interleave(per_class)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(labels), channels, height, width)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return ImageData.from_tensors("random", [str(k) for k in range(classes)], images, labels, images[:1], labels[:1])


def _prepare(config: DistillConfig, data: ImageData, device: torch.device, progress: bool) -> Distillation:
    config = config.resolve(data.image_shape, data.name, device)
    data = data.to(device)
    preprocessing = fit_preprocessing(data.train_images, config.preprocessing, progress=progress)
    images = initial_images(config, data, preprocessing)
    pool = None
    if config.pool_networks:  # no step takes longer for networks that were trained for longer
        pool = trained_pool(data, preprocessing, dataclasses.replace(config, pool_epochs=1), progress=progress)
    return Distillation(config, data, preprocessing, images, pool=pool, progress=progress)


def _seconds_a_step(step: Callable[[], None], steps: int, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    return (time.perf_counter() - started) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _traced(step: Callable[[], None], steps: int, device: torch.device, path: Path) -> dict:
    """Run steps under PyTorch's profiler, write its Chrome trace, and return it."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            with torch.profiler.record_function(STEP):
                step()
        _wait(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part.json")  # a failure keeps the earlier file
    try:
        profiler.export_chrome_trace(str(unfinished))
        text = unfinished.read_text("utf-8")
    finally:
        unfinished.unlink(missing_ok=True)
    write_atomically(path, text)
    return json.loads(text)


def stage_seconds(document: dict) -> tuple[dict[str, float], float]:
    """Return the seconds of every stage, and of all steps, in a Chrome trace of `torch.profiler`.

    With kernels in the trace, a stage's time is that of the kernels launched between its begin and its end by any
    thread: the backward pass launches from another thread, while the thread that called it waits.
    """
    events = [event for event in document["traceEvents"] if event.get("ph") == "X"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    seconds = dict.fromkeys(STAGES, 0.0)
    device_events = [event for event in events if event.get("cat") in _ON_DEVICE]
    if not device_events:
        for event in ranges:
            if event["name"].startswith(PREFIX):
                seconds[event["name"].removeprefix(PREFIX)] += event["dur"] / 1e6
        return seconds, sum(event["dur"] for event in ranges if event["name"] == STEP) / 1e6
    launched = {event["args"]["correlation"]: event["ts"] for event in events
                if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})}  # fmt: skip
    find = _finder([event for event in ranges if event["name"].startswith(PREFIX)])
    for event in device_events:
        name = find(launched.get(event["args"].get("correlation")))
        if name is not None:
            seconds[name] += event["dur"] / 1e6
    return seconds, sum(event["dur"] for event in device_events) / 1e6


def kernel_times(document: dict, steps: int) -> list[tuple[str, float]]:
    """Return name and mean microseconds of the kernels of one step, in order, in a trace of equal steps.

    Raises:
        ValueError: the steps differ in their kernels.
    """
    events = [event for event in document["traceEvents"] if event.get("cat") in _ON_DEVICE]
    events.sort(key=lambda event: event["ts"])
    count = len(events) // steps
    rounds = [events[start : start + count] for start in range(0, count * steps, count or 1)]
    names = [[event["name"] for event in own] for own in rounds]
    if len(events) != count * steps or any(other != names[0] for other in names):
        raise ValueError(f"the {steps} steps of the trace differ in their kernels ({len(events)} in all)")
    durations = zip(*([event["dur"] for event in own] for own in rounds), strict=True)
    return [(name, sum(times) / steps) for name, times in zip(names[0], durations, strict=True)]


def _finder(ranges: list[dict]) -> Callable[[float | None], str | None]:
    """Return a function from a time to the name of its stage; stages do not overlap."""
    ordered = sorted(ranges, key=lambda event: event["ts"])
    begins = [event["ts"] for event in ordered]

    def find(moment: float | None) -> str | None:
        place = bisect.bisect_right(begins, moment) - 1 if moment is not None else -1
        if place < 0 or moment > begins[place] + ordered[place]["dur"]:
            return None
        return ordered[place]["name"].removeprefix(PREFIX)

    return find


def _rates(device: torch.device, measure: bool) -> tuple[devices.Device, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [rates for word, rates in devices.DEVICES.items() if word in name]
    if known and not measure:
        return known[0], "datasheet"
    return devices.measure_device(device), "measured"


def _floors(run: Distillation, rates: devices.Device) -> tuple[dict[str, tuple], str | None]:
    """Return fewest operations, fewest bytes and least seconds by stage, and the settings that prevent counting."""
    config, data = run.config, run.data
    counted = {"norm": "instance", "pooling": "avg2", "feature_maps": False, "image_average": False}
    counted |= {"partition": 1, "synthetic_batch": None, "pool_networks": 0}
    other = [f"{name} {getattr(config, name)!r}" for name, value in counted.items() if getattr(config, name) != value]
    if other:
        return dict.fromkeys(STAGES, (None, None, None)), ", ".join(other)
    size = roofline.Configuration(
        data.num_classes,
        *data.image_shape,
        ipc=config.ipc,
        real_batch=config.real_batch,
        network_width=config.width,
        depth=config.depth,
        precision=config.precision,
        maps=config.spatial_power is not None or config.channel_power is not None,
        whitened=run.images.is_cuda and config.preprocessing != "standard",  # on a CPU images are whitened beforehand
    )
    work = roofline.stages(size)
    floors = {}
    for name in STAGES:
        own = [part for part in work if part.part == name]
        floors[name] = (
            sum(part.matrix + part.vector for part in own),
            sum(part.bytes[roofline.WAYS.index("floor")] for part in own),
            sum(part.seconds("floor", rates, config.precision) for part in own),
        )
    return floors, None


def profile_table(result: Profile) -> str:
    """Return a profile as text: a line per stage with its time, share, work, least time, and *reached*.

    *reached* is the least time as a share of the measured time; above 100 %, the data stayed in a cache.
    """
    lines = [f"{'stage':<12}{'ms':>10}{'share':>8}{'GFLOP':>10}{'MB':>10}{'floor ms':>10}{'reached':>9}"]
    lines += [_line(row, result.traced_seconds) for row in _rows(result)]
    return "\n".join([*lines, *_notes(result)])


def _rows(result: Profile) -> Iterator[StageTime]:
    yield from result.stages
    yield StageTime("other", result.other_seconds, None, None, None)
    sums = None, None, None
    if result.not_counted is None:
        sums = (sum(getattr(stage, name) for stage in result.stages) for name in ("operations", "bytes", "floor"))
    yield StageTime(STEP, result.traced_seconds, *sums)


def _line(row: StageTime, whole: float) -> str:
    share = f"{row.seconds / whole:.1%}" if whole else "–"
    line = f"{row.name:<12}{1e3 * row.seconds:>10.3f}{share:>8}"
    if row.floor is None:
        return line
    reached = f"{row.floor / row.seconds:.0%}" if row.seconds and row.floor else "–"
    return f"{line}{row.operations / 1e9:>10.3f}{row.bytes / 1e6:>10.2f}{1e3 * row.floor:>10.3f}{reached:>9}"


def _notes(result: Profile) -> Iterator[str]:
    rates = result.device
    on_gpu = result.captured_seconds is not None or not rates.name.startswith("CPU")
    yield ""
    yield f"{result.steps} step{'s' if result.steps > 1 else ''}; {result.fusion}; {result.precision}; times are " + (
        "the kernels', by the stage that launched them" if on_gpu else "the clock's, with the profiler running"
    )
    yield f"without the profiler: {1e3 * result.step_seconds:.3f} ms per step" + (
        " from launch to end" if on_gpu else ""
    )
    if result.captured_seconds is not None:
        assert result.kernels is not None
        own = sum(microseconds for _, microseconds in result.kernels)
        yield (
            f"captured as a CUDA graph: {1e3 * result.captured_seconds:.3f} ms per step, {len(result.kernels)} kernels "
            f"of {own / 1e3:.3f} ms in all"
        )
    if result.not_counted:
        yield f"operations and bytes are not counted for {result.not_counted}"
        return
    origin = {"measured": "measured just now by a copy and a convolution", "datasheet": "from its datasheet"}
    yield (
        f"floor: {rates.name}, {rates.bandwidth / 1e9:,.0f} GB/s and "
        f"{rates.matrix[result.precision] / 1e9:,.0f} GFLOP/s in {result.precision}, {origin[result.rates_from]}"
    )
