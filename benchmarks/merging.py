"""Several results files of one machine as one set of figures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from .cells import FINISHED
from .harness import load_results
from .methods import Setting


def merge(paths: Sequence[Path]) -> dict[Setting, dict]:
    """The newest finished record of every setting, each with ``eager``: its eager twin's in the same file, or None.

    Raises:
        ValueError: the files were measured on different machines or with different libraries.
    """
    merged: dict[Setting, dict] = {}
    places = {}
    for path in paths:
        results = load_results(path)
        places[tuple(results["environment"].get(field) for field in ("device", "torch", "triton"))] = path
        own = {Setting(**record["setting"]): record for record in results["cells"]}
        for setting, record in own.items():
            if setting not in merged or _worth(merged[setting]) < _worth(record):
                merged[setting] = {**record, "eager": _eager(own, setting)}
    if len(places) > 1:
        names = ", ".join(f"{path.name}: {' / '.join(map(str, place))}" for place, path in places.items())
        raise ValueError(f"one table cannot show several machines or libraries ({names})")
    return merged


def _worth(record: dict) -> tuple[bool, str]:
    """What was measured before what failed, then the newer."""
    return record["status"] in FINISHED, record["measured_at"]


def _eager(own: dict[Setting, dict], setting: Setting) -> dict | None:
    """The eager record of the same method and sizes; tf32 where there is none in bfloat16."""
    eager = dataclasses.replace(setting, provider="eager", class_chunk=None)
    return own.get(eager) or own.get(dataclasses.replace(eager, precision="tf32"))


def given(setting: Setting) -> dict:
    """The fields that are set: what a setting was before a field was added names the same cell after."""
    return {name: value for name, value in dataclasses.asdict(setting).items() if value is not None}


def digest(paths: Sequence[Path]) -> str:
    """Names the figures a picture is drawn from."""
    cells = sorted(json.dumps([given(setting), cell["measured_at"]]) for setting, cell in merge(paths).items())
    return hashlib.sha256("\n".join(cells).encode()).hexdigest()[:16]
