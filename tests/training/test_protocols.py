"""Protocols: their learning rates and the settings they accept."""

import dataclasses
import math

import pytest

from atom_fast.training import PROTOCOLS, get_protocol


def test_learning_rates_of_the_protocols():
    def rates(name):
        protocol = PROTOCOLS[name]
        return [protocol.learning_rate_at(epoch) for epoch in (0, 14, 15, 30, 499, 500, protocol.epochs - 1)]

    assert rates("paper") == pytest.approx([0.01] * 5 + [0.001] * 2)
    assert rates("paper-fixed") == [0.01] * 7
    assert rates("paper-table7") == pytest.approx([0.01, 0.01, 0.005, 0.0025, 0.01 / 2**33, 0.01 / 2**33, 0.01 / 2**66])
    assert PROTOCOLS["dc"].learning_rate_at(149) == 0.01
    assert PROTOCOLS["dc"].learning_rate_at(150) == pytest.approx(0.001)
    assert (PROTOCOLS["datadam-code"].epochs, PROTOCOLS["datadam-code"].batch_size) == (1800, 64)
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())


def test_an_overridden_protocol_says_so():
    assert get_protocol("paper") is PROTOCOLS["paper"]
    assert get_protocol("paper", epochs=1000) is PROTOCOLS["paper"]
    shorter = get_protocol("paper", epochs=30, batch_size=8)
    assert shorter.name == "paper (epochs=30, batch_size=8)"
    assert dataclasses.replace(shorter, name="paper", epochs=1000, batch_size=256) == PROTOCOLS["paper"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"epochs": 0}, "epochs must be a whole number, at least 1; got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, at least 1; got 2.5"),
        ({"learning_rate": -0.1}, "learning_rate must be a number above 0; got -0.1"),
        ({"learning_rate": math.nan}, "learning_rate must be a number above 0; got nan"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\); got 1.0"),
        ({"weight_decay": -1}, "weight_decay must be a number, 0 or above; got -1"),
        ({"epochs": True}, "epochs must be a whole number, at least 1; got True"),
        ({"epochs": None}, "epochs must be a whole number, at least 1; got None"),
        ({"learning_rate": math.inf}, "learning_rate must be a number above 0; got inf"),
        ({"weight_decay": "1"}, "weight_decay must be a number, 0 or above; got '1'"),
        ({"unit_variance": "no"}, "unit_variance must be true or false; got 'no'"),
        ({"decay_every": 0}, "decay_every must be a whole number, at least 1, or None; got 0"),
        ({"augmentation": "flip_flap"}, "no operation 'flap'"),
        ({"epoch": 3}, "settings are epochs, .*; got 'epoch'"),
    ],
)
def test_protocol_settings_that_are_not_accepted(overrides, message):
    with pytest.raises(ValueError, match=message):
        get_protocol("paper", **overrides)
