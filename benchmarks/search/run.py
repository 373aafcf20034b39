"""Run the search: make the proxies, train every candidate on each, and write the table."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from atom_fast._files import write_atomically
from atom_fast._malloc import keep_freed_memory
from atom_fast.distillation import ranks
from atom_fast.distillation.logs import log
from benchmarks.accuracy.run import sigterm_exits
from benchmarks.accuracy.work import DataCache
from benchmarks.harness import environment
from benchmarks.search.grid import Candidate
from benchmarks.search.plan import REFERENCE, Search
from benchmarks.search.proxies import Proxy, make_proxies
from benchmarks.search.table import draw, render
from benchmarks.search.training import read_results, train_candidate, unfit_reason

FORMAT = "benchmarks.search"
NAME = "table6"
_SECONDS_BETWEEN_LOOKS = 1.0  # at the workers


def run(
    search: Search,
    output: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    device: str | None = None,
    progress: bool = True,
    report: Callable[[str], None] = log,
) -> dict[str, Any]:
    """Do what is missing of a search, and write ``table6.json``, ``table6.md`` and ``table6.png``.

    What is finished is kept: the same call continues, also with more proxies, seeds or candidates. Several processes
    may run it in one folder, and each ends with the whole table.

    Args:
        search: from `benchmarks.search.plan.plan`.
        output: folder of the sets, the candidates' results and the table.
        data_dir, download: location of the data, see `load_named`.
        device: where to train; None: the GPU, if there is one. On a CPU there is a process for every thread of PyTorch.
        progress: show progress bars on standard error.
        report: called with each message.

    Returns:
        The record, as in ``table6.json``.

    Raises:
        FileNotFoundError: data are missing.
        ValueError: a set does not fit the data, or a file in ``output`` is damaged.
        RuntimeError: a process that trains candidates ended; finished candidates are kept.
    """
    output, place = Path(output), ranks.own_device(device)
    cache = DataCache(data_dir, download=download, device=place, progress=progress)
    data, title = cache.data(search.dataset)
    proxies = list(make_proxies(search, output, cache))
    reasons = {candidate: unfit_reason(candidate, data.image_shape, data.num_classes) for candidate in search.grid}
    fit = [candidate for candidate, reason in reasons.items() if reason is None]
    if not fit:
        raise ValueError(f"no candidate can be built for images of {data.name}: {next(iter(reasons.values()))}")
    costs = {candidate: candidate.cost(data.image_shape) for candidate in fit}
    folder = output / "candidates"
    report(f"{len(fit)} candidates, {len(proxies)} trainings of each, in {folder}")

    def write() -> dict[str, Any]:
        record = _record(search, title, data.fingerprint, proxies, reasons, folder, place)
        if len(record["candidates"]) < 2:
            return record
        write_atomically(output / f"{NAME}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        write_atomically(output / f"{NAME}.md", render(record) + "\n")
        written = [f"{NAME}.json", f"{NAME}.md"]
        if record["reference"]:
            draw(record, output / f"{NAME}.png")
            written.append(f"{NAME}.png")
        report(f"written: {', '.join(str(output / name) for name in written)}")
        return record

    try:
        with sigterm_exits(), _bar(costs, progress) as advance:
            train_all(longest_first(fit, data.image_shape), proxies, folder, advance)
    except (SystemExit, KeyboardInterrupt):
        report("stopped; finished candidates are kept, and the same command continues")
        write()
        raise
    return write()


def longest_first(grid: Sequence[Candidate], image_shape: tuple[int, int, int]) -> list[Candidate]:
    """Return candidates in the order of their cost, so that all cores end together."""
    return sorted(grid, key=lambda candidate: -candidate.cost(image_shape))


@contextlib.contextmanager
def _bar(costs: Mapping[Candidate, float], progress: bool) -> Iterator[Callable[[Candidate], None]]:
    """Show the share of the work that is done and the time left; yield what to call with a finished candidate."""
    shape = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}"
    with tqdm(total=sum(costs.values()), desc="candidates", bar_format=shape, disable=not progress) as bar:
        finished = 0
        bar.set_postfix_str(f"0 of {len(costs)}")

        def advance(candidate: Candidate) -> None:
            nonlocal finished
            finished += 1
            bar.set_postfix_str(f"{finished} of {len(costs)}", refresh=False)
            bar.update(costs[candidate])

        yield advance


def train_all(
    grid: Sequence[Candidate], proxies: Sequence[Proxy], folder: Path, advance: Callable[[Candidate], None]
) -> None:
    """Train candidates in their order, on a CPU in a process for every thread of PyTorch.

    Raises:
        RuntimeError: a process ended, or failed with the error in the message; finished candidates are kept.
    """
    workers = min(torch.get_num_threads(), len(grid)) if proxies[0].images.device.type == "cpu" else 1
    if workers == 1:
        _pass_over(grid, proxies, folder, advance)
        return
    context = torch.multiprocessing.get_context("forkserver")  # which imports once for all what takes seconds
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # the latter is for the optimizer's first step
    reports = context.Queue()
    processes = [
        context.Process(target=_work, args=(grid, proxies, folder, reports), daemon=True) for _ in range(workers)
    ]
    try:
        for process in processes:
            process.start()
        _follow(processes, reports, set(grid), advance)
    finally:
        for process in processes:
            process.terminate()  # nothing is lost: results are written as they are there
        for process in processes:
            process.join()


def _follow(processes: Sequence, reports, left: set[Candidate], advance: Callable[[Candidate], None]) -> None:
    """Pass on what processes report until every candidate is finished."""
    while left:
        ended = [process.exitcode for process in processes]
        try:
            found = reports.get(timeout=_SECONDS_BETWEEN_LOOKS)
        except queue.Empty:
            if None not in ended:  # as long as one lives, it does the others' work too
                raise RuntimeError(
                    f"the processes that train candidates ended with exit status {', '.join(map(str, ended))}; "
                    "finished candidates are kept, and the same command continues"
                ) from None
            continue
        if isinstance(found, Exception):
            raise found
        if found in left:
            left.remove(found)
            advance(found)


def _work(grid: Sequence[Candidate], proxies: Sequence[Proxy], folder: Path, reports) -> None:
    """Train candidates in a process of its own, on one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it goes to all processes, and the first one ends the others
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        _pass_over(grid, proxies, folder, reports.put)
    except (ValueError, OSError, RuntimeError) as error:
        reports.put(error)


def _pass_over(
    grid: Sequence[Candidate], proxies: Sequence[Proxy], folder: Path, advance: Callable[[Candidate], object]
) -> None:
    """Train the candidates that no other process trains, and then wait for those that others do."""
    held = list(grid)
    for wait in (False, True):
        passed = []
        for candidate in held:
            if train_candidate(candidate, proxies, folder, wait=wait, stop=_is_orphan):
                advance(candidate)
            else:
                passed.append(candidate)
            if _is_orphan():
                return
        held = passed


def _is_orphan() -> bool:
    """Return True in a process whose parent was killed: nobody waits for its work."""
    parent = torch.multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _record(
    search: Search,
    title: str,
    fingerprint: str,
    proxies: Sequence[Proxy],
    reasons: Mapping[Candidate, str | None],
    folder: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Gather the candidates that are finished: all that the table and its picture are made of."""
    trained: dict[str, dict[str, Any]] = {}
    fit = {candidate: read_results(folder, candidate) for candidate, reason in reasons.items() if reason is None}
    results = {candidate: own for candidate, own in fit.items() if all(proxy.key in own for proxy in proxies)}
    for proxy in proxies:
        entry = trained.setdefault(proxy.name, {"stored": proxy.stored, "count": proxy.count, "seeds": []})
        found = [own[proxy.key] for own in results.values()]
        entry["seeds"].append(
            {
                "accuracies": [result["accuracy"] for result in found],
                "seconds": round(sum(result["seconds"] for result in found), 1),
                "failed": {
                    candidate.name: result["reason"]
                    for candidate, result in zip(results, found, strict=True)
                    if result["accuracy"] is None
                },
            }
        )
    return {
        "format": FORMAT,
        "dataset": search.dataset,
        "data": title,
        "fingerprint": fingerprint,
        "ipc": search.ipc,
        "widths": list(search.widths),
        "sample": search.sample,
        "grid": len(search.grid),
        "protocol": search.protocol.to_dict(),
        "reference_epochs": None if search.reference is None else search.reference.epochs,
        "settings": dict(search.settings),
        "files": {name: path.name for name, path in search.proxies.items() if path is not None},
        "candidates": [candidate.name for candidate in results],
        "unfinished": len(fit) - len(results),
        "unfit": {candidate.name: reason for candidate, reason in reasons.items() if reason is not None},
        "proxies": {name: entry for name, entry in trained.items() if name != REFERENCE},
        "reference": trained.get(REFERENCE),
        "environment": environment(device.type),
    }
