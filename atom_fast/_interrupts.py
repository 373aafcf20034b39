"""Ctrl-C in a command: one line and exit code 130, whatever it meets."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


def exit_on_interrupt() -> None:
    """Let Ctrl-C end the process at once; for the time before a command runs, in which PyTorch is imported.

    A module does not survive an exception in the middle of its import: the KeyboardInterrupt comes out as another
    error, as an abort in C++, or not at all. Where Ctrl-C is ignored, as in a shell's background jobs, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


@contextlib.contextmanager
def interrupts_raised() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in the enclosed code, so that it can clean up.

    While a module is imported the process ends at once here, too: commands import what they need.
    """
    before = signal.getsignal(signal.SIGINT)
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or before not in (signal.default_int_handler, _exit):
        yield
        return
    signal.signal(signal.SIGINT, _raise_unless_importing)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exit(number: int, frame) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"Interrupted\n")
    os._exit(128 + number)


def _raise_unless_importing(number: int, frame) -> None:
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename == "<frozen importlib._bootstrap>":
            _exit(number, frame)
        caller = caller.f_back
    raise KeyboardInterrupt
