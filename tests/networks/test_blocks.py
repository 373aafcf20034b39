"""The ConvNet's blocks: fused they give what their modules give, and what cannot be fused runs module by module."""

import re

import pytest
import torch
import torch.nn as nn

import atom_fast as af
from atom_fast import reference
from atom_fast.distillation.config import preset
from atom_fast.distillation.matching import describe_fusion
from atom_fast.networks import ConvNet
from atom_fast.ops.norm_block import NORMS
from benchmarks.live_bytes import LiveBytes

BACKENDS = ("torch", "triton")
# dtype, and relative error of values and gradients; on a CPU, "torch" stands for the kernels in C
PRECISE = {"torch": (torch.float32, 1e-4), "triton": (torch.float64, 1e-8)}


def frozen(channels, size, *, width, depth, device, dtype=torch.float64, seed=0, **settings):
    """A network of constants with biases, scales and shifts unlike their initial ones."""
    network = ConvNet(channels, 5, size, width=width, depth=depth, **settings).to(device, dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


def images_of(batch, channels, height, width, device, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, channels, height, width), generator=generator, dtype=torch.float64).to(device, dtype)


def matching(real, synthetic, classes):
    """Equation 4 from embeddings and maps, as the distillation step computes it."""
    labels = {"real_labels": classes[0], "synthetic_labels": classes[1]}
    loss = 0.01 * af.mean_matching_loss(real[0], synthetic[0], **labels)
    for pair in zip(real[1], synthetic[1], strict=True):
        loss = loss + af.attention_matching_from_maps(*pair, **labels)
    return loss


@pytest.mark.parametrize(
    ("backend", "norm", "channels", "size", "depth", "powers"),
    [
        ("torch", "instance", 3, (9, 12), 2, (4.0, 4.0)),
        ("torch", "batch", 1, (13, 8), 3, (1.0, 8.0)),
        ("torch", "instance", 6, (8, 8), 3, (None, 4.0)),
        ("torch", "batch", 4, (8, 11), 1, (2.5, None)),
        ("triton", "instance", 3, (9, 8), 2, (4.0, 4.0)),
        ("triton", "batch", 1, (8, 8), 2, (1.0, None)),
    ],
)
def test_loss_and_image_gradient_equal_the_modules(backend, norm, channels, size, depth, powers, device):
    dtype, tolerance = PRECISE[backend]
    network = frozen(channels, size, width=8, depth=depth, norm=norm, device=device)
    real, synthetic = (images_of(batch, channels, *size, device, seed=seed) for batch, seed in ((4, 1), (3, 2)))
    classes = torch.tensor([1, 0, 1, 0], device=device), torch.tensor([0, 1, 1], device=device)

    plain = synthetic.clone().requires_grad_()
    (real_embedding, real_features), (embedding, features) = network.features(real), network.features(plain)
    expected = reference.atom_loss(
        real_features[:-1] or real_features, features[:-1] or features, real_embedding, embedding, *classes,
        spatial_power=powers[0] if depth > 1 else None, channel_power=powers[1] if depth > 1 else None,
    )  # fmt: skip
    (expected_gradient,) = torch.autograd.grad(expected, plain)

    network, leaf = network.to(dtype), synthetic.to(dtype).requires_grad_()
    with af.backend(backend):
        with torch.no_grad():
            constant = network.attention(real.to(dtype), *powers)
        loss = matching(constant, network.attention(leaf, *powers), classes)
        (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=1e-9 if backend == "torch" else 1e-12)
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm() + 1e-6 * tolerance


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_embedding_logits_and_maps_are_those_of_the_modules(backend, norm, device):
    network = frozen(3, 8, width=8, depth=2, norm=norm, device=device, dtype=PRECISE[backend][0])
    images = images_of(2, 3, 8, 8, device, PRECISE[backend][0])
    assert network.unfused_reason() is None
    expected, features = network.features(images)
    with af.backend(backend):
        embedding, maps = network.attention(images)
        torch.testing.assert_close(network.embed(images), expected)
        torch.testing.assert_close(network(images), network.classifier(expected))
    torch.testing.assert_close(embedding, expected)
    both = reference.spatial_attention(features[0], 4.0), reference.channel_attention(features[0], 4.0)
    torch.testing.assert_close(maps, [torch.cat(both, 1)])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_batch_norm_without_scale_and_shift_and_with_one_sample(backend, device):
    dtype, _ = PRECISE[backend]
    network = frozen(3, 8, width=8, depth=2, norm="batch", device=device, dtype=dtype)
    for block in network.blocks:
        block.norm = nn.BatchNorm2d(8, affine=False, device=device, dtype=dtype)
    images = images_of(1, 3, 8, 8, device, dtype)
    with af.backend(backend):
        embedding, _ = network.attention(images)
        logits = network(images)
    expected = network.features(images)[0]
    torch.testing.assert_close(embedding, expected)
    torch.testing.assert_close(logits, network.classifier(expected))


def test_running_statistics_stay_as_they_are_and_count_in_evaluation_mode(device):
    network = frozen(3, 8, width=8, depth=2, norm="batch", device=device)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    images = images_of(2, 3, 8, 8, device)
    network.attention(images)
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    network.eval()
    assert "block 1 cannot be fused: its BatchNorm is in evaluation mode" in network.unfused_reason()
    torch.testing.assert_close(network.attention(images)[0], network.features(images)[0])


@pytest.mark.parametrize(("backend", "norm", "steps"), [("torch", "instance", 10), ("torch", "batch", 6)])
def test_steps_give_the_images_of_the_modules(backend, norm, steps, device):
    network = frozen(1, 8, width=8, depth=2, norm=norm, device=device, dtype=torch.float32)
    real = images_of(6, 1, 8, 8, device, torch.float32)
    start = images_of(2, 1, 8, 8, device, torch.float32, seed=2)
    classes = torch.tensor([0, 1], device=device).repeat_interleave(3), torch.tensor([0, 1], device=device)

    def distil(loss_of):
        images = start.clone().requires_grad_()
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(loss_of(images), images)
            with torch.no_grad():
                images -= gradient
        return images.detach()

    def plain_loss(images):
        (real_embedding, real_features), (embedding, features) = network.features(real), network.features(images)
        return reference.atom_loss(real_features[:-1], features[:-1], real_embedding, embedding, *classes)

    def fused_loss(images):
        with af.backend(backend):
            with torch.no_grad():
                constant = network.attention(real)
            return matching(constant, network.attention(images), classes)

    torch.testing.assert_close(distil(fused_loss), distil(plain_loss), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norm": "group"}, r"block 1 cannot be fused: its norm is not InstanceNorm .* GroupNorm\(4, 8"),
        ({"norm": "none"}, "its norm is not InstanceNorm"),
        ({"activation": "leakyrelu"}, "its activation is not ReLU, but LeakyReLU"),
        ({"pooling": "avg3"}, "its pooling is not 2x2 average pooling"),
        ({"pooling": "max2"}, "its pooling is not 2x2 average pooling"),
        ({"pooling": "none"}, "its pooling is not 2x2 average pooling"),
    ],
)
def test_other_networks_say_why_and_run_module_by_module(change, reason):
    network = ConvNet(3, 5, 16, width=8, depth=2, **change).requires_grad_(False)
    assert re.search(reason, network.unfused_reason())
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    (embedding, maps), (expected, features) = network.attention(images, None, 2.0), network.features(images)
    assert torch.equal(embedding, expected)
    torch.testing.assert_close(maps, [reference.channel_attention(features[0], 2.0)])


def test_a_changed_block_runs_module_by_module():
    network = ConvNet(3, 5, 16, width=8, depth=2).requires_grad_(False).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network.blocks[1].convolution = nn.Conv2d(8, 8, kernel_size=5, padding=2, stride=2).requires_grad_(False)
    assert "block 2 cannot be fused: its convolution is not 3x3" in network.unfused_reason()
    network.classifier = nn.Linear(8 * 2 * 2, 5)
    torch.testing.assert_close(network.embed(images), network.features(images)[0])
    network.blocks[1].convolution = nn.Conv2d(8, 8, kernel_size=3, padding=1)
    network.blocks[1].pool = nn.AvgPool2d(2, ceil_mode=True)
    assert "block 2 cannot be fused: its pooling" in network.unfused_reason()


def test_hooks_see_what_the_modules_compute():
    network = ConvNet(3, 5, 8, width=8, depth=2).requires_grad_(False)
    images, seen = torch.zeros(1, 3, 8, 8), []
    for block in network.blocks:
        block.activation.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    network(images)
    network.attention(images)
    assert [tuple(shape) for shape in seen] == [(1, 8, 8, 8), (1, 8, 4, 4)] * 2


def test_a_power_is_checked_and_parameters_that_are_trained_get_their_gradient():
    network = ConvNet(3, 5, 16, width=8)
    with pytest.raises(ValueError, match="spatial_power must be in"):
        network.attention(torch.zeros(1, 3, 16, 16), spatial_power=0.5)
    assert "a parameter requires a gradient" in network.unfused_reason()
    _, maps = network.attention(torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.autograd.grad(maps[0][:, 3].sum(), network.blocks[0].norm.weight)[0].abs().sum() > 0
    with torch.no_grad():
        assert network.unfused_reason() is None


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_real_side_keeps_nothing(backend, norm, device):
    network = frozen(3, 8, width=8, depth=2, norm=norm, device=device, dtype=torch.float32)
    kept = []
    record = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with af.backend(backend), torch.no_grad(), record:
        network.attention(images_of(2, 3, 8, 8, device, torch.float32).requires_grad_())
    assert not kept


def test_a_step_lives_in_a_fifth_of_the_memory():
    network = frozen(3, 32, width=128, depth=3, device="cpu", dtype=torch.float32)
    real = images_of(16, 3, 32, 32, "cpu", torch.float32)
    synthetic = images_of(8, 3, 32, 32, "cpu", torch.float32, seed=2).requires_grad_()
    classes = torch.arange(2).repeat_interleave(8), torch.arange(2).repeat_interleave(4)

    def plain():
        with torch.no_grad():
            real_embedding, real_features = network.features(real)
        embedding, features = network.features(synthetic)
        return reference.atom_loss(real_features[:-1], features[:-1], real_embedding, embedding, *classes)

    def fused():
        with torch.no_grad():
            constant = network.attention(real)
        return matching(constant, network.attention(synthetic), classes)

    peaks = []
    for loss in (plain, fused):
        with af.backend("torch"), LiveBytes() as memory:
            torch.autograd.grad(loss(), synthetic)
        peaks.append(memory.peak)
    assert peaks[1] <= peaks[0] / 5


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_features_and_gradient_never_wait_for_the_device(norm, device):
    network = frozen(3, 32, width=128, depth=3, norm=norm, device=device, dtype=torch.float32)
    images = images_of(4, 3, 32, 32, device, torch.float32).requires_grad_()

    def gradient():
        embedding, maps = network.attention(images)
        return torch.autograd.grad(embedding.square().sum() + sum(m.cumsum(1).sum() for m in maps), images)

    gradient()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_distillation_runs_batch_norm_with_fused_blocks():
    config = preset("paper", norm="batch", depth=2, width=8)
    network = frozen(3, 8, width=8, depth=2, norm="batch", device="cpu")
    assert describe_fusion(network, config, torch.zeros(1, 3, 8, 8)) == "with fused blocks"


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bfloat16"])
def test_a_whole_step_on_a_gpu(precision, norm, device):
    network = frozen(3, 32, width=128, depth=3, norm=norm, device=device, dtype=torch.float32)
    images = images_of(32, 3, 32, 32, device, torch.float32)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        network.to(dtype)
        leaf = images.to(dtype).detach().requires_grad_()
        before = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        with (
            af.backend("triton" if dtype == torch.float32 else "reference"),
            torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16" and dtype == torch.float32),
        ):
            embedding, maps = network.attention(leaf)
            loss = embedding.double().square().sum() + sum(m.double().cumsum(1).square().sum() for m in maps)
            gradients.append(torch.autograd.grad(loss, leaf)[0].double())
        torch.backends.cudnn.conv.fp32_precision = before
    actual, expected = gradients
    tolerance = {"ieee": 1e-3, "tf32": 1e-1, "bfloat16": 3e-1}[precision]
    assert (actual - expected).norm() <= tolerance * expected.norm()
