"""ConvNet: its equations, its initial distributions, and what it refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from atom_fast.networks import ConvNet
from atom_fast.networks.convnet import ACTIVATIONS, INITIALIZATIONS, NORMS, POOLINGS, default_depth


def seeded(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def images(*shape, device="cpu", seed=0):
    return torch.randn(shape, generator=seeded(seed)).to(device)


@pytest.mark.parametrize("norm, pooling", itertools.product(NORMS, POOLINGS))
def test_shapes(norm, pooling, device):
    network = ConvNet(3, 7, (13, 18), width=8, depth=3, norm=norm, pooling=pooling).to(device)
    x = images(5, 3, 13, 18, device=device)
    embedding, maps = network.features(x)
    sizes = {
        "avg2": [(13, 18), (6, 9), (3, 4), (1, 2)],
        "max2": [(13, 18), (6, 9), (3, 4), (1, 2)],
        "avg3": [(13, 18), (7, 9), (4, 5), (2, 3)],
        "none": [(13, 18)] * 4,
    }[pooling]
    assert [tuple(m.shape) for m in maps] == [(5, 8, *size) for size in sizes[:3]]
    assert network.embedding_size == 8 * math.prod(sizes[3])
    assert embedding.shape == (5, network.embedding_size)
    assert network(x).shape == (5, 7)


@pytest.mark.parametrize("norm, activation", itertools.product(NORMS, ACTIVATIONS))
def test_logits_are_the_classifier_of_the_embedding(norm, activation, device):
    network = ConvNet(3, 4, 8, width=8, depth=2, norm=norm, activation=activation).to(device)
    x = images(6, 3, 8, 8, device=device)
    embedding, maps = network.features(x)
    torch.testing.assert_close(network(x), network.classifier(embedding))
    torch.testing.assert_close(network.embed(x), embedding)
    torch.testing.assert_close(network.blocks[-1].pool(maps[-1]).flatten(1), embedding, rtol=0, atol=0)


def normalized(x, dims):
    return (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()


NORM_EQUATIONS = {
    "instance": lambda x: normalized(x, (2, 3)),
    "batch": lambda x: normalized(x, (0, 2, 3)),
    "layer": lambda x: normalized(x, (1, 2, 3)),
    "group": lambda x: normalized(x.unflatten(1, (4, -1)), (2, 3, 4)).flatten(1, 2),
    "none": lambda x: x,
}
ACTIVATION_EQUATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}
POOLING_EQUATIONS = {
    "avg2": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)),
    "max2": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)),
    "avg3": lambda x: F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2).mean((-1, -2)),
    "none": lambda x: x,
}
SETTINGS = [
    *((norm, "relu", "avg2") for norm in NORMS),
    *(("instance", activation, "avg2") for activation in ACTIVATIONS),
    *(("instance", "relu", pooling) for pooling in POOLINGS),
]


@pytest.mark.parametrize("norm, activation, pooling", SETTINGS)
def test_blocks_equal_their_equations(norm, activation, pooling, device):
    network = ConvNet(2, 4, 8, width=8, depth=2, norm=norm, activation=activation, pooling=pooling)
    network = network.to(device, torch.float64)
    x = images(5, 2, 8, 8, device=device).double()
    _, maps = network.features(x)
    for block, got in zip(network.blocks, maps, strict=True):
        weight, bias = block.convolution.weight, block.convolution.bias
        windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        convolved = torch.einsum("bihwyx,oiyx->bohw", windows, weight) + bias[:, None, None]
        expected = ACTIVATION_EQUATIONS[activation](NORM_EQUATIONS[norm](convolved))
        torch.testing.assert_close(got, expected)
        x = POOLING_EQUATIONS[pooling](expected)


def test_channels_last_images_give_the_same_result(device):
    network = ConvNet(3, 4, 16, width=8).to(device, torch.float64)
    x = images(4, 3, 16, 16, device=device).double()
    expected = network(x)
    network = network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_initial_distribution(initialization):
    network = ConvNet(3, 10, 16, width=64, initialization=initialization)
    network.reset_parameters(seeded(3))
    for layer in (*(block.convolution for block in network.blocks), network.classifier):
        fan_in = layer.weight[0].numel()
        weight = layer.weight.detach()
        variance = {"default": 1 / 3, "uniform": 2, "normal": 2}[initialization] / fan_in
        count = weight.numel()
        assert abs(weight.mean()) < 5 * math.sqrt(variance / count)
        assert weight.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / count))
        if initialization == "normal":
            assert weight.abs().max() > 3 * math.sqrt(variance)
        else:
            assert weight.abs().max() <= math.sqrt(3 * variance)
        if initialization == "default":
            assert layer.bias.abs().max() <= 1 / math.sqrt(fan_in)
            assert layer.bias.unique().numel() == layer.bias.numel()
        else:
            assert not layer.bias.any()
    for block in network.blocks:
        assert (block.norm.weight == 1).all() and (block.norm.bias == 0).all()


def test_default_initialization_is_that_of_pytorch():
    torch.manual_seed(0)
    network = ConvNet(3, 10, 16, width=64)
    for layer in (*(block.convolution for block in network.blocks), network.classifier):
        drawn = layer.weight.detach().flatten().sort().values, layer.bias.detach().flatten().sort().values
        layer.reset_parameters()
        again = layer.weight.detach().flatten().sort().values, layer.bias.detach().flatten().sort().values
        for a, b in zip(drawn, again, strict=True):
            # Kolmogorov-Smirnov: sorted uniform samples of one distribution differ by little, relative to its range.
            assert (a - b).abs().max() / (b[-1] - b[0]) < 2.5 / math.sqrt(len(a))


@pytest.mark.parametrize("norm, initialization", itertools.product(NORMS, INITIALIZATIONS))
def test_reset_gives_one_network_a_seed_and_a_new_one_a_call(norm, initialization, device):
    network = ConvNet(3, 4, 16, width=8, norm=norm, initialization=initialization).to(device)
    generator = seeded(5, device)
    state = torch.get_rng_state()

    def reset():
        with torch.no_grad():
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.fill_(9)
        network.reset_parameters(generator)
        return {name: tensor.clone() for name, tensor in network.state_dict().items()}

    first, second = reset(), reset()
    generator.manual_seed(5)
    again = reset()
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        assert not (tensor == 9).any(), name
    for layer in (*range(3), "classifier"):
        name = "classifier.weight" if layer == "classifier" else f"blocks.{layer}.convolution.weight"
        assert not torch.isclose(first[name], second[name], rtol=0, atol=1e-6).any()


def test_reset_writes_in_place_and_the_same_network_in_every_dtype(device):
    network = ConvNet(3, 4, 16, width=8, norm="batch").to(device)
    double = ConvNet(3, 4, 16, width=8, norm="batch").to(device, torch.float64)
    double = double.to(memory_format=torch.channels_last)
    addresses = [tensor.data_ptr() for tensor in network.state_dict().values()]
    network.reset_parameters(seeded(1, device))
    double.reset_parameters(seeded(1, device))
    assert [tensor.data_ptr() for tensor in network.state_dict().values()] == addresses
    for (name, a), b in zip(network.state_dict().items(), double.state_dict().values(), strict=True):
        assert torch.equal(a.double(), b.double()), name


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_drawer_draws_the_same_networks_into_one_buffer(initialization, memory_format, device):
    settings = {"width": 9, "norm": "batch", "initialization": initialization}  # an odd width: parts are padded
    network = ConvNet(3, 4, 16, **settings).to(device, memory_format=memory_format).requires_grad_(False)
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in network.state_dict().items()}
    draw = network.drawer()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name][0]) and tensor.stride() == before[name][1], name
    expected = ConvNet(3, 4, 16, **settings).to(device)
    generator, other = seeded(2, device), seeded(2, device)
    for _ in range(2):
        draw(generator)
        expected.reset_parameters(other)
        for (name, a), b in zip(network.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert all(tensor.data_ptr() % 64 == 0 for tensor in network.parameters())
    buffers = {network.get_parameter(f"blocks.{index}.convolution.weight").untyped_storage()._cdata for index in (0, 1)}
    assert len(buffers) == 1


def test_new_networks_come_from_the_default_generator():
    torch.manual_seed(11)
    first = ConvNet(3, 4, 8, width=8).state_dict()
    torch.manual_seed(11)
    second = ConvNet(3, 4, 8, width=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_reset_can_be_captured_and_draws_anew_at_every_replay():
    network = ConvNet(3, 4, 16, width=8, norm="batch").cuda()
    expected = ConvNet(3, 4, 16, width=8, norm="batch").cuda()
    generator, again = seeded(2, "cuda"), seeded(2, "cuda")
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        network.reset_parameters(generator)
    generator.manual_seed(2)
    for _ in range(3):
        graph.replay()
        expected.reset_parameters(again)
        for (name, a), b in zip(network.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_default_depth_is_that_of_the_literature():
    assert [default_depth(size, size) for size in (8, 16, 28, 32, 64, 96, 128)] == [3, 3, 3, 3, 4, 5, 5]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"norm": "bach"}, "norm must be one of instance, batch, layer, group, none; got 'bach'"),
        ({"activation": "gelu"}, "activation must be one of relu, leakyrelu, sigmoid; got 'gelu'"),
        ({"pooling": "avg"}, "pooling must be one of avg2, avg3, max2, none; got 'avg'"),
        ({"initialization": "zeros"}, "initialization must be one of default, normal, uniform; got 'zeros'"),
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"width": 6, "norm": "group"}, "divisible by 4; got 6"),
        ({"depth": 4}, "images of 8x8 are too small for depth 4 .* block 4 would see 1x1; use depth 3 or less"),
        ({"depth": 5, "norm": "none"}, "block 4 would see 1x1"),
        ({"depth": 4, "pooling": "avg3"}, "block 4 would see 1x1"),
    ],
)
def test_settings_that_are_not_accepted(settings, message):
    with pytest.raises(ValueError, match=message):
        ConvNet(3, 10, 8, **settings)


def test_one_pixel_is_enough_where_nothing_needs_two():
    network = ConvNet(3, 10, 8, width=8, depth=4, pooling="avg3", norm="layer")
    assert network(images(2, 3, 8, 8)).shape == (2, 10)
