"""Networks of timm and torchvision: adapted to the data, drawn from a seed, refused by name."""

import pytest
import torch
from torch import nn

import atom_fast as af
from atom_fast.networks import make_network
from atom_fast.networks.layers import Dropout
from atom_fast.training import get_protocol
from tests.evaluation.small import small_data


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["torchvision:shufflenet_v2_x0_5", "timm:resnet10t", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_seed_gives_one_network_for_any_channels_and_classes(name, channels):
    pytest.importorskip(name.partition(":")[0])
    state = torch.get_rng_state()
    networks = []
    for seed in (5, 5, 6):
        with torch.device("meta"):
            network = make_network(name, channels, 7, 32)
        network = network.to_empty(device="cpu")  # NaN
        network.reset_parameters(seeded(seed))
        with torch.random.fork_rng(devices=[]):  # a transformer's dropout of no value draws all the same
            assert network(torch.randn(2, channels, 32, 32, generator=seeded(0))).shape == (2, 7)
        network.reset_parameters(seeded(seed))  # the norms' statistics are drawn anew too
        networks.append(network.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, networks[1][key]) for key, tensor in networks[0].items())
    assert any(not torch.equal(tensor, networks[2][key]) for key, tensor in networks[0].items())


def test_masks_of_dropout_come_from_the_generator():
    network = make_network("torchvision:squeezenet1_1", 3, 5, 32)
    network.reset_parameters(seeded(1))
    assert not any(type(module) is nn.Dropout for module in network.modules())
    assert sum(isinstance(module, Dropout) for module in network.modules()) == 1
    images = torch.randn(2, 3, 32, 32, generator=seeded(0))
    outputs = []
    for seed in (1, 1, 2):
        network.train().reset_parameters(generator := seeded(1))
        generator.manual_seed(seed)
        outputs.append(network(images))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet81", "torchvision has no image classifier 'resnet81'; did you mean resnet18"),
        ("torchvision:", "torchvision has no image classifier ''"),
        ("torchvision:vit_b_16", "vit_b_16 does not take images of 3x8x8"),
        ("torchvision:squeezenet1_1", "squeezenet1_1 does not take images of 3x8x8"),
        ("timm:resnet81", "timm has no image classifier 'resnet81'"),
        ("keras:resnet18", "network must be one of convnet, .*, timm:NAME, torchvision:NAME; got 'keras:resnet18'"),
    ],
)
def test_what_is_no_network_for_these_images_is_named(name, message):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        make_network(name, 3, 5, 8)
    with pytest.raises(ValueError, match="has no setting 'width'"):
        make_network("torchvision:resnet18", 3, 5, 32, width=3)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match="network 'timm:resnet18' is part of timm: `pip install timm`"):
        make_network("timm:resnet18", 3, 5, 32)


def test_a_set_is_tested_on_such_a_network():
    data = small_data()
    synthetic = af.select(data, "random", 2, progress=False)
    protocol = get_protocol("paper", epochs=2)
    settings = {"network": "torchvision:shufflenet_v2_x0_5", "protocol": protocol, "progress": False, "networks": 2}
    alone, both = (af.evaluate(synthetic, data, together=count, **settings) for count in (1, 2))
    assert alone.accuracies == both.accuracies and alone.network == "torchvision:shufflenet_v2_x0_5"
