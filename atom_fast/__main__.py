"""The command ``atom-fast``, which is also ``python -m atom_fast``."""

from atom_fast._interrupts import exit_on_interrupt


def main() -> None:
    """Run the command line; Ctrl-C is handled before PyTorch is imported."""
    exit_on_interrupt()
    from atom_fast.cli import main as command

    command(prog_name="atom-fast")


if __name__ == "__main__":
    main()
