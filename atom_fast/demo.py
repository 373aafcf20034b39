"""The demonstration: digits distilled at 1 and 10 images per class, evaluated beside Random, with pictures."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from atom_fast import __version__
from atom_fast._files import write_atomically
from atom_fast.data.dataset import ImageData
from atom_fast.data.sources import load_data
from atom_fast.distillation.config import DistillConfig, drop_removed_settings, preset
from atom_fast.distillation.loop import distill
from atom_fast.evaluation.accuracy import architecture_of, evaluate
from atom_fast.evaluation.results import summary
from atom_fast.evaluation.sets import random_sets
from atom_fast.names import EVALUATION_FILE
from atom_fast.pictures import comparison_table, result_line, save_run_pictures

IPCS = (1, 10)
NETWORKS = 3

# What differs from the preset "paper": fewer steps and real images, to finish in minutes on a CPU (a class has about
# 140), and no flip, since a mirrored digit is another sign.
OVERRIDES = {"iterations": 300, "real_batch": 64, "augmentation": "color_crop_cutout_scale_rotate"}

_RECORD = "demo.json"


def run_demo(
    output: Path, *, device: torch.device | str | None = None, progress: bool = True, ipcs=IPCS, overrides=None
) -> list[dict]:
    """Run the missing parts of the demonstration, and print one line for each number of images per class.

    Keep a part that an earlier demonstration finished with the same settings, resume an unfinished one, and replace one
    with other settings. Folders that no demonstration made are never touched.

    Args:
        output: folder; holds ``summary.json``, ``summary.md`` and a run's folder for each part.
        device: where to compute; None: the GPU, if there is one.
        progress: show progress bars on standard error.
        ipcs: images per class of each part.
        overrides: settings instead of ``OVERRIDES``.

    Returns:
        The content of ``summary.json``: for every part ``dataset``, ``ipc``, ``method``, ``accuracy_mean``,
        ``accuracy_std``, ``random_mean``, ``random_std`` (per cent), ``seconds`` (of the distillation), ``device`` and
        ``config_hash``.

    Raises:
        FileExistsError: a part's folder exists and no demonstration made it.
    """
    output = Path(output)
    data = load_data("digits", progress=progress)
    summary = []
    for ipc in ipcs:
        config = preset("paper", ipc=ipc, **(OVERRIDES if overrides is None else overrides))
        result = _part(output, data, config, device, progress)
        print(result_line(result), flush=True)
        summary.append({name: value for name, value in result.items() if not isinstance(value, (dict, bool))})
        write_atomically(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(output / "summary.md", comparison_table(summary) + "\n")
    print(f"pictures and figures are in {output}", file=sys.stderr)
    return summary


def _part(output: Path, data: ImageData, config: DistillConfig, device, progress: bool) -> dict:
    """Return the result at one number of images per class, from an earlier demonstration or computed now."""
    folder = output / f"{data.name}-ipc{config.ipc}"
    settings = {"version": __version__, "networks": NETWORKS, "config": config.to_dict()}
    resume = _prepare(output, folder, settings)
    result_file = folder / "result.json"
    if resume and result_file.is_file():
        try:
            result = json.loads(result_file.read_text("utf-8"))
            result_line(result)
        except (ValueError, TypeError, KeyError) as error:
            print(f"{result_file} is damaged ({error}): it is measured again", file=sys.stderr)
        else:
            print(f"kept from an earlier demo: {folder} (remove the folder to repeat it)", file=sys.stderr)
            return result
    synthetic = distill(
        data, config, folder, resume=resume, progress=progress, device=device, how_to_go_on="run the same command again"
    )
    save_run_pictures(folder, synthetic)
    options: dict[str, Any] = {"networks": NETWORKS, "seed": config.seed, "device": device, "progress": progress}
    options |= {"architecture": architecture_of(synthetic, data.name), "record": folder / EVALUATION_FILE}
    random = random_sets(data, synthetic, seed=config.seed)
    result = summary(evaluate(synthetic, data, **options), evaluate(random, data, **options))
    write_atomically(result_file, json.dumps(result, indent=2) + "\n")
    return result


def _prepare(output: Path, folder: Path, settings: dict) -> bool:
    """Check that ``folder`` may be used and record it as the demo's; return True to continue the run in it."""
    record = _read_record(output / _RECORD)
    known = record.get(folder.name)
    started = folder.is_dir() and any(folder.iterdir())
    if started and known is None:
        raise FileExistsError(f"{folder} was not made by the demo; move it, or give the demo another --output")
    if started and known is not None and _as_of_this_version(known) != settings:
        print(f"repeated, because the demo's settings changed: {folder}", file=sys.stderr)
        shutil.rmtree(folder)
        started = False
    write_atomically(output / _RECORD, json.dumps({**record, folder.name: settings}, indent=2) + "\n")
    return started


def _read_record(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not what the demo wrote; move it, or give the demo another --output") from error


def _as_of_this_version(settings: dict) -> dict:
    """A part's settings without what an earlier version wrote and that changes nothing."""
    try:
        return {**settings, "config": drop_removed_settings(settings["config"])}
    except (LookupError, TypeError, ValueError):
        return settings
