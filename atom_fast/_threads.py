"""Threads of a command on a CPU: as many as there are cores for it, and none that keeps a core busy while it waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_SPINS = 1000  # looks for work before a thread sleeps, some microseconds; chosen by hand
_chosen = ""  # what `choose_threads` followed


def choose_threads() -> None:
    """Tell PyTorch, which must not be imported yet, how many threads to start and how they wait.

    As many as cores in the process's affinity mask, fewer in a container of fewer cores; the environment variable
    OMP_NUM_THREADS wins. There PyTorch alone counts the host's cores, and everywhere its threads wait for each other in
    a loop, so that beside another busy process each operation costs a time slice of the scheduler. Here they sleep
    soon, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT is set.
    """
    global _chosen
    if not os.environ.get("OMP_NUM_THREADS"):
        cores, quota = affinity(), cpu_quota()
        threads = cores if quota is None else max(1, min(cores, int(quota)))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        _chosen = f"{cores} cores" if threads == cores else f"a container of {quota:g} cores"
    if not os.environ.get("OMP_WAIT_POLICY"):
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))


def reason() -> str:
    """Return what the number of threads follows from."""
    named = os.environ.get("OMP_NUM_THREADS")
    return _chosen or (f"OMP_NUM_THREADS={named}" if named else "PyTorch's choice")


def affinity() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the number of cores that a container may use (cgroup v2 or v1); None if there is no limit."""
    quotas = [quota for group in _groups(own) for folder in (group, *group.parents) for quota in _quotas(root, folder)]
    return min(quotas, default=None)


def _groups(own: Path) -> Iterator[Path]:
    """Yield this process's groups that may have a limit, relative to the root."""
    yield Path()  # inside a container, where the group's own name may not be visible
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            yield Path(path.lstrip("/"))


def _quotas(root: Path, group: Path) -> Iterator[float]:
    """Yield the limits of one group, in cores."""
    version_1 = (root / "cpu" / group / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
    for files in ((root / group / "cpu.max",), version_1):
        try:
            quota, period = " ".join(file.read_text() for file in files).split()
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
