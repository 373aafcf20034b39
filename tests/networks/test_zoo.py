"""The networks beside the ConvNet: their sizes, their weights, and what they refuse; and the space of ConvNets."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import atom_fast as af
from atom_fast.networks import NETWORKS, ConvNet, convnet_search_space, make_network
from atom_fast.networks.convnet import default_depth
from atom_fast.networks.layers import Dropout, memory_format

OTHERS = [name for name in NETWORKS if name != "convnet"]
SMALLEST = {"alexnet": 8, "vgg11": 32, "resnet18": 16, "vit": 4}

# Parameters for 3x32x32 images and 10 classes, from the layers' sizes.
PARAMETERS = {
    "alexnet": sum(o * (i * k * k + 1) for o, i, k in ((128, 3, 5), (192, 128, 5), (256, 192, 3), (192, 256, 3)))
    + 192 * (192 * 9 + 1)
    + 10 * (192 * 16 + 1),
    "vgg11": sum(
        o * (i * 9 + 1 + 2)
        for i, o in zip((3, 64, 128, 256, 256, 512, 512, 512), (64, 128, 256, 256, 512, 512, 512, 512), strict=True)
    )
    + 10 * (512 + 1),
    "resnet18": 11_173_962,  # the CIFAR ResNet-18 of the literature
    "vit": 512 * (3 * 16 + 1) + 512 + 65 * 512
    + 6 * (2 * 1024 + 512 * 1536 + 512 * 513 + 2 * 512 * 513)
    + 1024
    + 10 * 513,
}  # fmt: skip


def seeded(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_at_32_and_64_pixels(name, size, device):
    network = make_network(name, 3, 7, size).to(device)
    x = torch.randn(2, 3, size, size, device=device)
    embedding = network.embed(x)
    assert embedding.shape == (2, network.embedding_size)
    assert network(x).shape == (2, 7)


@pytest.mark.parametrize("name", OTHERS)
def test_number_of_parameters(name):
    with torch.device("meta"):
        network = make_network(name, 3, 10, 32)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", OTHERS)
def test_a_seed_gives_one_network_in_every_dtype(name, device):
    state = torch.get_rng_state()
    networks = []
    for seed, dtype in ((5, torch.float32), (5, torch.float64), (6, torch.float32)):
        with torch.device("meta"):
            network = make_network(name, 2, 3, SMALLEST[name])
        network = network.to_empty(device=device).to(dtype)  # NaN
        addresses = [p.data_ptr() for p in network.parameters()]
        network.reset_parameters(seeded(seed, device))
        assert [p.data_ptr() for p in network.parameters()] == addresses
        networks.append(network.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    for key, tensor in networks[0].items():
        assert torch.equal(tensor.double(), networks[1][key]), key
        if tensor.dim() > 1:
            assert not torch.isclose(tensor, networks[2][key], rtol=0, atol=1e-6).all(), key


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_initial_distribution_is_that_of_pytorch(name):
    network = make_network(name, 3, 10, 32)
    network.reset_parameters(seeded(3))
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight, fan_in = layer.weight.detach(), layer.weight[0].numel()
            assert weight.abs().max() <= 1 / math.sqrt(fan_in)
            assert weight.var().item() == pytest.approx(1 / (3 * fan_in), rel=5 * math.sqrt(2 / weight.numel()))
            if layer.bias is not None:
                assert layer.bias.abs().max() <= 1 / math.sqrt(fan_in) and layer.bias.unique().numel() > 5
        elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
    if name == "vit":
        assert network.positions.std().item() == pytest.approx(1, rel=0.05)


def test_resnet_is_its_equations(device):
    network = make_network("resnet18", 3, 4, 16).to(device, torch.float64)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, device=device)

    def normalized(x, norm):
        centred = x - x.mean((2, 3), keepdim=True)
        x = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]

    with torch.no_grad():
        got = network(x)
        convolution, norm, *blocks = network.layers
        x = F.relu(normalized(F.conv2d(x, convolution.weight, padding=1), norm))
        for block in blocks:
            stride = block.conv1.stride
            inner = F.relu(normalized(F.conv2d(x, block.conv1.weight, stride=stride, padding=1), block.norm1))
            inner = normalized(F.conv2d(inner, block.conv2.weight, padding=1), block.norm2)
            if isinstance(block.shortcut, nn.Sequential):
                x = normalized(F.conv2d(x, block.shortcut[0].weight, stride=stride), block.shortcut[1])
            x = F.relu(inner + x)
        expected = x.mean((2, 3)) @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(got, expected)


def test_vit_is_its_equations(device):
    network = make_network("vit", 3, 4, 8).to(device, torch.float64).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device)
    with torch.no_grad():
        got = network(x)
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 4, 48)
        tokens = patches @ network.patches.weight.flatten(1).T + network.patches.bias
        tokens = torch.cat((network.class_token.expand(2, 1, 512), tokens), 1) + network.positions
        for attention, perceptron in zip(network.layers[::2], network.layers[1::2], strict=True):
            queries, keys, values = attention.projection(attention.norm(tokens)).chunk(3, 2)
            heads = []
            for head in range(8):
                q, k, v = (part[..., 64 * head : 64 * head + 64] for part in (queries, keys, values))
                heads.append(((q @ k.transpose(1, 2)) / 8).softmax(2) @ v)
            tokens = tokens + attention.output(torch.cat(heads, 2))
            tokens = tokens + perceptron.outer(F.gelu(perceptron.inner(perceptron.norm(tokens))))
        expected = network.classifier(network.norm(tokens[:, 0]))
    torch.testing.assert_close(got, expected)


def test_dropout_masks_come_from_the_generator(device):
    layer = Dropout(0.1)
    layer.generator = seeded(2, device)
    x = torch.ones(100, 1000, device=device)
    state = torch.get_rng_state()
    dropped = layer(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(layer(x), dropped)
    layer.generator.manual_seed(2)
    assert torch.equal(layer(x), dropped)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_search_space_holds_720_networks_that_fit():
    settings = list(convnet_search_space())
    assert len({tuple(s.items()) for s in settings}) == len(settings) == 720
    sizes = set()
    with torch.device("meta"):
        for setting in settings:
            network = make_network("convnet", 3, 10, 32, **setting)
            sizes.add((setting["depth"], setting["width"], sum(p.numel() for p in network.parameters())))
            if setting["width"] == 32 and setting["activation"] == "relu":
                assert network(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert len(sizes) > 16


@pytest.mark.parametrize("norm", ["instance", "batch", "layer", "group", "none"])
@pytest.mark.parametrize(
    "activation, pooling, size",
    [
        ("relu", "avg2", 8),
        ("relu", "max2", 8),
        ("relu", "avg3", 9),
        ("sigmoid", "avg2", 9),
        ("leakyrelu", "none", 8),
    ],
)
def test_fused_logits_are_those_of_the_modules(activation, pooling, size, norm, device):
    network = ConvNet(2, 3, size, width=8, depth=2, norm=norm, activation=activation, pooling=pooling)
    network = network.to(device, torch.float64)
    layout = memory_format(network, device)
    x = torch.randn(3, 2, size, size, dtype=torch.float64, device=device)
    expected = network.classifier(network.features(x)[0])
    gradients = torch.autograd.grad(expected.square().sum(), list(network.parameters()))
    got = network.to(memory_format=layout)(x.contiguous(memory_format=layout))
    fused_gradients = torch.autograd.grad(got.square().sum(), list(network.parameters()), allow_unused=True)
    torch.testing.assert_close(got, expected)
    for a, b in zip(fused_gradients, gradients, strict=True):
        # Without a gradient: a bias that InstanceNorm takes away.
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-7, atol=1e-9)


def test_the_reference_backend_can_be_differentiated_twice():
    network = make_network("resnet18", 1, 2, 16).double()
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    with af.backend("reference"):
        loss = network(x).square().sum()
    weight = network.classifier.weight
    (gradient,) = torch.autograd.grad(loss, network.layers[0].weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    assert second.abs().sum() > 0


@pytest.mark.parametrize(
    "name, size, settings, message",
    [
        ("resnet50", 32, {}, "one of convnet, .* vit, timm:NAME, torchvision:NAME; got 'resnet50'"),
        ("vit", 32, {"width": 8}, "vit has no setting 'width'; it has no settings"),
        ("convnet", 32, {"wdth": 8}, "convnet has no setting 'wdth'; its settings are width, depth, activation"),
        ("alexnet", 12, {}, "AlexNet needs images whose sides are multiples of 8; got 12x12"),
        ("vgg11", (32, 48), {}, "VGG-11 needs images whose sides are multiples of 32; got 32x48"),
        ("resnet18", 8, {}, "ResNet-18 needs images of 16x16 or larger; got 8x8"),
        ("vit", 30, {}, "ViT needs images whose sides are multiples of 4; got 30x30"),
    ],
)
def test_what_does_not_fit_is_refused(name, size, settings, message):
    with pytest.raises(ValueError, match=message):
        make_network(name, 3, 10, size, **settings)


def test_the_usual_depth_is_the_default():
    with torch.device("meta"):
        assert len(make_network("convnet", 3, 10, 64).blocks) == default_depth(64, 64) == 4
        assert len(make_network("convnet", 3, 10, 64, depth=2).blocks) == 2
