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


def test_backend_names_are_checked():
    with pytest.raises(ValueError, match="auto, triton, native, torch, reference; got 'cuda'"), af.backend("cuda"):
        pass


def test_backend_is_restored_after_an_error():
    import torch

    from atom_fast._backend import resolve_backend

    with pytest.raises(KeyError), af.backend("reference"):
        raise KeyError
    assert resolve_backend(torch.zeros(1)) != "reference"


def test_triton_on_cpu_tensors_without_the_interpreter_says_what_to_do():
    code = """
import torch, atom_fast as af
with af.backend("triton"):
    af.spatial_attention(torch.ones(1, 2, 3, 3))
"""
    done = run_python(code, TRITON_INTERPRET="0")
    assert done.returncode == 1
    assert "needs CUDA tensors, got one on cpu; use backend 'torch'" in done.stderr


def test_native_is_for_cpu_tensors():
    import torch

    from atom_fast._backend import resolve_backend

    with af.backend("native"), pytest.raises(RuntimeError, match="for CPU tensors, got one on meta; use backend"):
        resolve_backend(torch.empty(1, device="meta"))


def test_every_public_name_is_documented():
    for name in af.__all__:
        assert getattr(af, name).__doc__, name
