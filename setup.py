"""Packaging that pyproject.toml cannot express: the folder ``kernels/`` is the package ``atom_fast.kernels``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["atom_fast", "atom_fast.*"]), "atom_fast.kernels"],
    package_dir={"atom_fast.kernels": "kernels"},
    package_data={"atom_fast.kernels": ["*.c", "*.h"]},
)
