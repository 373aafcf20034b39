"""``python -m atom_fast`` is the command ``atom-fast``."""

from atom_fast.cli import main

main(prog_name="atom-fast")
