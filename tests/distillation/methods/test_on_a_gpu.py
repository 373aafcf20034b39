"""Every method takes steps on a GPU."""

import pytest

from atom_fast.distillation.methods import METHODS, is_used
from tests.distillation.methods.runs import digits, losses, run_of


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_steps_on_a_gpu_change_what_is_learnt(method, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # of experts
    few = {"real_batch": 8, "experts": 1, "last_start": 1, "student_steps": 2, "rounds": 2, "network_epochs": 1}
    own = {name: value for name, value in few.items() if is_used(method, name)}
    own |= {} if is_used(method, "real_batch") else {"real_batch": 128}
    run = run_of(method, digits().to("cuda"), **own)
    before = {name: value.clone() for name, value in run.state().items()}
    losses(run, 2)
    assert any(not value.equal(before[name]) for name, value in run.state().items())
