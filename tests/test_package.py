"""The package: how it is built, installed and imported."""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
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


def test_the_loss_needs_pytorch_alone_and_a_first_use_in_a_compiled_function_breaks_no_graph():
    code = """
import sys
for name in ("triton", "kornia", "torchvision", "sklearn", "matplotlib", "click", "pydantic", "yaml"):
    sys.modules[name] = None
import torch, atom_fast as af
print(af.ATOMLoss()([torch.ones(2, 3, 4, 4)], [torch.zeros(2, 3, 4, 4)]).item())
compiled = torch.compile(lambda *sides: af.mean_matching_loss(*sides), fullgraph=True, backend="eager")
print(compiled(torch.ones(2, 3), torch.zeros(2, 3)).item())
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    loss, compiled = map(float, done.stdout.split())
    assert loss == pytest.approx(2.0) and compiled == 3.0


def where_modules_are(*folders):
    """Find modules with nothing on the path but the standard library and the ``folders``."""
    code = """
import importlib.util, site, sys
for folder in sys.argv[1:]:
    site.addsitedir(folder)
for name in ("atom_fast", "atom_fast.kernels.attention", "kernels", "benchmarks", "tests", "setup"):
    found = importlib.util.find_spec(name)
    print(found and found.origin)
for name in ("setup", "kernels.kernels", "atom_fast", "benchmarks", "tests"):
    assert importlib.util.find_spec(f"atom_fast.{name}") is None, name
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def kernel_files(names):
    """Select and sort the files of kernels, in any folder."""
    kernels = {path.name for path in (ROOT / "kernels").iterdir() if path.is_file()}
    return sorted(name for name in names if Path(name).name in kernels and Path(name).parent.name == "kernels")


KERNELS = sorted(f"atom_fast/kernels/{path.name}" for path in (ROOT / "kernels").iterdir() if path.is_file())


def test_an_uninstalled_checkout_finds_its_kernels_and_nothing_else_is_in_the_package():
    package = ROOT / "atom_fast"
    assert where_modules_are(ROOT)[:2] == [str(package / "__init__.py"), str(package / "kernels" / "attention.py")]
    done = run_python("import atom_fast.kernels, sys; print('kernels' in sys.modules)")
    assert done.stdout == "False\n", done.stderr
    with pytest.raises(ImportError):
        importlib.import_module("atom_fast.setup")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Copy what a build reads, so that it leaves nothing in the working tree."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("atom_fast", "kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def built(checkout):
    """Build a source archive, a wheel and an editable wheel, as pip and build do."""
    code = """
from setuptools import build_meta
for build in (build_meta.build_sdist, build_meta.build_wheel):
    build("dist")
build_meta.build_editable("editable")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return checkout


def test_the_wheel_holds_every_kernel_once_and_nothing_beside_the_package(built):
    (wheel,) = (built / "dist").glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    names, metadata = archive.namelist(), f"atom_fast-{af.__version__}.dist-info"
    assert kernel_files(names) == KERNELS
    assert "atom_fast/py.typed" in names
    templates = {f"atom_fast/report/templates/{path.name}" for path in (ROOT / "atom_fast/report/templates").iterdir()}
    assert templates and templates <= set(names)
    assert {name.split("/")[0] for name in names} == {"atom_fast", metadata}
    entry_points = archive.read(f"{metadata}/entry_points.txt").decode()
    assert "atom-fast = atom_fast.__main__:main" in entry_points


def test_the_source_archive_holds_every_kernel_once_and_installs(built, tmp_path):
    (archive,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = [name.partition("/")[2] for name in file.getnames()]
    assert kernel_files(names) == KERNELS
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--no-compile", "--target", tmp_path, archive],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    installed = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert kernel_files(installed) == KERNELS and "atom_fast/report/templates/report.html" in installed
    package = tmp_path / "atom_fast"
    expected = [str(package / "__init__.py"), str(package / "kernels" / "attention.py")]
    assert where_modules_are(tmp_path) == [*expected, *["None"] * 4]


def test_an_editable_install_finds_the_checkout_and_nothing_beside_the_package(built, tmp_path):
    (wheel,) = (built / "editable").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    package = built / "atom_fast"
    expected = [str(package / "__init__.py"), str(package / "kernels" / "attention.py")]
    assert where_modules_are(tmp_path) == [*expected, *["None"] * 4]


def test_public_names_are_listed_and_others_are_not_there():
    assert set(af.__all__) <= set(dir(af))
    with pytest.raises(AttributeError, match="module 'atom_fast' has no attribute 'atom_loss'"):
        af.atom_loss  # noqa: B018


def test_every_public_name_is_documented():
    for name in af.__all__:
        assert getattr(af, name).__doc__, name
