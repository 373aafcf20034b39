"""Protocols: their learning rates and the settings they accept."""

import copy
import dataclasses
import json
import math

import pytest
import torch

from atom_fast.networks import ConvNet
from atom_fast.training import PROTOCOLS, get_protocol
from atom_fast.training.trainer import Trainer


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


@pytest.mark.parametrize("epochs", [1, 2, 7, 8, 999])
def test_without_another_schedule_the_rate_decays_once_at_half(epochs):
    protocol = get_protocol("paper", epochs=epochs)
    rates = [protocol.learning_rate_at(epoch) for epoch in range(epochs)]
    assert rates == [0.01 * 0.1 ** int(2 * epoch >= epochs) for epoch in range(epochs)]


@pytest.mark.parametrize("epochs", [6, 18, 102, 1500])
def test_idc_decays_at_two_thirds_and_five_sixths(epochs):
    protocol = get_protocol("idc", epochs=epochs)
    rates = [protocol.learning_rate_at(epoch) for epoch in range(epochs)]
    third, sixth = epochs // 3, epochs // 6
    assert rates == pytest.approx([0.01] * 2 * third + [0.002] * sixth + [0.0004] * sixth)


def test_eccv24_decays_after_epoch_index_501_of_1001():
    protocol = PROTOCOLS["eccv24"]
    rates = [protocol.learning_rate_at(epoch) for epoch in range(protocol.epochs)]
    assert len(rates) == 1001
    assert rates == pytest.approx([0.01] * 502 + [0.001] * 499)
    same = {"name": "paper", "epochs": 1000, "decay_at": (0.5,), "restart_momentum": False, "unit_variance": True}
    assert dataclasses.replace(protocol, **same) == PROTOCOLS["paper"]
    assert protocol.restart_momentum


def test_ddranking_is_dd_ranking_s_schedule():
    """StepLR with step size 500, factor 0.1, over 1,000 epochs of batches of 128."""
    protocol = PROTOCOLS["ddranking"]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=500, gamma=0.1)
    rates = []
    for _ in range(protocol.epochs):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([protocol.learning_rate_at(epoch) for epoch in range(protocol.epochs)])
    assert (protocol.epochs, protocol.batch_size, protocol.momentum, protocol.weight_decay) == (1000, 128, 0.9, 5e-4)


@pytest.mark.parametrize("restart", [False, True])
def test_momentum_starts_again_where_the_rate_decays_as_with_a_new_optimizer(restart, device):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(12, 2, 8, 8, generator=generator).to(device), torch.arange(12, device=device) % 3
    protocol = get_protocol(
        "eccv24", epochs=4, batch_size=12, decay_at=(0.5,), augmentation="none", restart_momentum=restart
    )
    trainer = Trainer(ConvNet(2, 3, (8, 8), width=4, depth=1).to(device), images, labels, protocol)
    trainer.restart(5)
    plain = copy.deepcopy(trainer.network)
    for epoch in range(protocol.epochs):
        if epoch in ((0, 2) if restart else (0,)):
            optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        for group in optimizer.param_groups:
            group["lr"] = protocol.learning_rate_at(epoch)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(images), labels).backward()
        optimizer.step()
        trainer.train_epoch(epoch)
    for (name, got), expected in zip(trainer.network.named_parameters(), plain.parameters(), strict=True):
        if not name.endswith("convolution.bias"):  # the norm cancels it, and the plain loop lets it decay
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_settings_are_recorded_as_before_they_could_be_chosen():
    """The hash of an evaluation and the name of its file depend on them: earlier results are still found."""
    earlier = {
        "name": "paper", "epochs": 1000, "batch_size": 256, "learning_rate": 0.01, "momentum": 0.9,
        "weight_decay": 5e-4, "decay_factor": 0.1, "decay_every": None,
        "augmentation": "color_crop_cutout_flip_scale_rotate", "unit_variance": True,
    }  # fmt: skip
    assert PROTOCOLS["paper"].to_dict() == earlier
    younger = {name: set(protocol.to_dict()) - set(earlier) for name, protocol in PROTOCOLS.items()}
    assert {name: settings for name, settings in younger.items() if settings} == {
        "idc": {"cutmix", "decay_at"},
        "eccv24": {"decay_at", "restart_momentum"},
    }
    idc = json.loads(json.dumps(PROTOCOLS["idc"].to_dict()))
    assert idc["cutmix"] == 0.5 and idc["decay_at"] == [2 / 3, 5 / 6]
    assert idc == PROTOCOLS["idc"].to_dict()
    assert get_protocol("paper", cutmix=0.25).to_dict() == {
        **earlier, "name": "paper (cutmix=0.25)", "cutmix": 0.25,
    }  # fmt: skip


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
        ({"augmentation": "flip+flip"}, "twice"),
        ({"decay_at": [0.5]}, r"decay_at must be a tuple of numbers between 0 and 1; got \[0.5\]"),
        ({"decay_at": (0.5, 1)}, r"decay_at must be a tuple of numbers between 0 and 1; got \(0.5, 1\)"),
        ({"cutmix": 1.5}, r"cutmix must be a number in \[0, 1\]; got 1.5"),
        ({"restart_momentum": 1}, "restart_momentum must be true or false; got 1"),
        ({"cutmix": True}, r"cutmix must be a number in \[0, 1\]; got True"),
        ({"epoch": 3}, "settings are epochs, .*; got 'epoch'"),
    ],
)
def test_protocol_settings_that_are_not_accepted(overrides, message):
    with pytest.raises(ValueError, match=message):
        get_protocol("paper", **overrides)
