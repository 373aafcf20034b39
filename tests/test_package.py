"""The package as it is installed and imported."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import atom_fast as af

ROOT = Path(__file__).resolve().parent.parent


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        check=False,
    )


def test_imports_without_triton_kornia_torchvision():
    code = """
import sys
for name in ("triton", "kornia", "torchvision", "sklearn", "matplotlib", "click", "yaml"):
    sys.modules[name] = None
import torch, atom_fast as af
print(af.ATOMLoss()([torch.ones(2, 3, 4, 4)], [torch.zeros(2, 3, 4, 4)]).item())
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(2.0)


def test_kernels_are_a_subpackage_and_the_top_level_name_stays_free():
    done = run_python("import atom_fast.kernels.attention as a, sys; print(a.__file__, 'kernels' in sys.modules)")
    assert done.stdout.split() == [str(ROOT / "atom_fast" / "kernels" / "attention.py"), "False"], done.stderr


def test_the_wheel_holds_the_kernels(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", tmp_path, "--bdist-dir", tmp_path / "build"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    sources = {f"atom_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.*")}
    assert sources and sources <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "atom-fast = atom_fast.__main__:main" in archive.read(entry_points).decode()


def test_public_names_are_listed_and_others_are_not_there():
    assert set(af.__all__) <= set(dir(af))
    with pytest.raises(AttributeError, match="module 'atom_fast' has no attribute 'atom_loss'"):
        af.atom_loss  # noqa: B018


def test_a_public_name_that_is_first_used_in_a_compiled_function_breaks_no_graph():
    code = """
import torch, atom_fast as af
compiled = torch.compile(lambda *sides: af.mean_matching_loss(*sides), fullgraph=True, backend="eager")
print(compiled(torch.ones(2, 3), torch.zeros(2, 3)).item())
"""
    done = run_python(code)
    assert done.stdout == "3.0\n", done.stderr


def test_every_public_name_is_documented():
    for name in af.__all__:
        assert getattr(af, name).__doc__, name
