"""Handle Ctrl-C in a command: print one line and exit with code 130, at any time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


def exit_on_interrupt() -> None:
    """Make Ctrl-C end the process at once. For the time before a command runs, while PyTorch is imported.

    A KeyboardInterrupt during an import can turn into another exception or an abort in C++, or be swallowed. If SIGINT
    is ignored, as in a shell's background jobs, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


@contextlib.contextmanager
def interrupts_raised() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt in the enclosed code, so that the code can clean up.

    During an import the process still ends at once, because commands import modules when they need them.
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
