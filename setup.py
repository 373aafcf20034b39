"""Packaging that pyproject.toml cannot express: ``atom_fast/kernels`` is a link to the folder ``kernels/``."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["atom_fast", "atom_fast.*"]),
    package_data={
        "atom_fast": ["py.typed"],
        "atom_fast.kernels": ["*.c", "*.h"],
        "atom_fast.report": ["templates/*"],
    },
)
