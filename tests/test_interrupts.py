"""Ctrl-C from the first moment on: exit code 130 and one line, never a traceback, never swallowed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from atom_fast._interrupts import interrupts_raised
from tests.test_package import ROOT, run_python

# Where a module is imported an exception has no effect: this one's is caught, in C++ it would end in an abort.
MODULE = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
except BaseException:
    print("swallowed", flush=True)
"""


def test_importing_the_package_does_not_import_torch():
    done = run_python("import atom_fast, atom_fast.__main__, sys; print('torch' in sys.modules, atom_fast.__version__)")
    assert done.stdout.split()[0] == "False", done.stderr


@pytest.mark.parametrize("handled", ["exit_on_interrupt()", "stack.enter_context(interrupts_raised())"])
def test_an_interrupt_in_an_import_ends_the_process(handled, tmp_path):
    (tmp_path / "interrupted.py").write_text(MODULE)
    code = f"""{HEARD}
import contextlib, sys
from atom_fast._interrupts import exit_on_interrupt, interrupts_raised
sys.path.append({str(tmp_path)!r})
with contextlib.ExitStack() as stack:
    {handled}
    import interrupted
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted\n")


def test_an_interrupt_elsewhere_in_a_command_can_be_cleaned_up_after():
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_raised():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_an_ignored_interrupt_stays_ignored():
    code = """
import os, signal
from atom_fast._interrupts import exit_on_interrupt, interrupts_raised
signal.signal(signal.SIGINT, signal.SIG_IGN)
exit_on_interrupt()
with interrupts_raised():
    os.kill(os.getpid(), signal.SIGINT)
print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
"""
    assert run_python(code).stdout == "True\n"


# A child of a background job or of nohup inherits that SIGINT is ignored; these children answer it as under a terminal.
HEARD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
"""

# Before this line Python starts, some hundredths of a second in which Ctrl-C is Python's to answer.
STARTED = f"""{HEARD}
from atom_fast.__main__ import exit_on_interrupt, main
exit_on_interrupt()
print("started", flush=True)
main()
"""


def test_an_interrupt_at_any_moment_ends_a_command_with_130(tmp_path):
    draw = random.Random(0)
    settings = ["--iterations=1000000", "--real-batch=8", "--width=8", "--depth=2", "--device=cpu", "--quiet"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    for number in range(3):
        command = [sys.executable, "-c", STARTED, "distill", *settings, f"--output={tmp_path / str(number)}"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        )
        assert process.stdout.readline() == "started\n"
        time.sleep(draw.uniform(0, 3))
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in printed, printed
        assert printed.endswith("Interrupted\n") or "SIGINT: stopped after iteration" in printed.splitlines()[-1]
