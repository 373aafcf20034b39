"""ATOMLoss: equation 4, and a drop-in for the loops the field already has."""

import pytest
import torch
from torch import nn

import atom_fast as af
from atom_fast import functional, reference
from atom_fast.networks import ConvNet


def layers(batch, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 6, 6), (5, 3, 3))
    return [torch.randn(batch, *shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("name", ["triton", "torch", "reference"])
@pytest.mark.parametrize("powers", [(4.0, 4.0), (1.0, 8.0), (None, 4.0), (4.0, None)])
def test_equals_equation_4(name, powers, device):
    real, synthetic = layers(6, 0), layers(4, 1)
    embeddings = torch.randn(6, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 1, 1]), torch.tensor([1, 1, 0, 0])
    expected = reference.atom_loss(
        real, synthetic, *embeddings, *labels, spatial_power=powers[0], channel_power=powers[1], mmd_weight=0.3, scale=7
    )
    module = af.ATOMLoss(*powers, mmd_weight=0.3, scale=7)
    sides = [[f.to(device) for f in side] for side in (real, synthetic)]
    with af.backend(name):
        loss = module(*sides, *(e.to(device) for e in embeddings), *(y.to(device) for y in labels))
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-11, atol=0)


class HookedFeatures:
    """The field's way to features: forward hooks on the ReLU layers, cleared before each pass."""

    def __init__(self, network):
        self.outputs = []
        for layer in network.modules():
            if isinstance(layer, nn.ReLU):
                layer.register_forward_hook(lambda module, inputs, output: self.outputs.append(output))

    def __call__(self, network, images):
        self.outputs.clear()
        embedding = network.features(images)[0]
        return self.outputs[:-1], embedding


def distil_class_by_class(loss_function, steps):
    """The field's loop: one class at a time, a new network each step, SGD on the images."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(3, 8, 3, 8, 8, generator=generator)
    images = real[:, :2].clone().requires_grad_()
    optimizer = torch.optim.SGD([images], lr=1.0, momentum=0.5)
    network = ConvNet(3, 3, (8, 8), width=8, depth=3)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    hooked = HookedFeatures(network)
    for _ in range(steps):
        network.reset_parameters(generator)
        loss = 0
        for c in range(3):
            with torch.no_grad():
                real_features, real_embedding = hooked(network, real[c])
                real_features = list(real_features)
            synthetic_features, synthetic_embedding = hooked(network, images[c])
            loss = loss + loss_function(
                list(real_features), list(synthetic_features), real_embedding, synthetic_embedding
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return images.detach()


def test_drop_in_gives_the_images_of_the_reference_after_12_steps():
    expected = distil_class_by_class(lambda *sides: reference.atom_loss(*sides, scale=100.0), 12)
    images = distil_class_by_class(af.ATOMLoss(scale=100.0), 12)
    start = distil_class_by_class(af.ATOMLoss(scale=100.0), 0)
    assert (expected - start).abs().max() > 0.1  # the images did move
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.fixture
def unwarned():
    """As in a process in which nothing was warned of yet."""
    functional._warn_that_real_is_constant.cache_clear()
    yield
    functional._warn_that_real_is_constant.cache_clear()


LOSSES = {
    "ATOMLoss": lambda real, synthetic: af.ATOMLoss()(*([side.view(4, -1, 3, 3)] for side in (real, synthetic))),
    "ATOMLoss's embeddings": lambda real, synthetic: af.ATOMLoss()([], [], real, synthetic),
    "attention_matching_loss": lambda *sides: af.attention_matching_loss(*(side.view(4, -1, 3, 3) for side in sides)),
    "attention_matching_from_maps": af.attention_matching_from_maps,
    "mean_matching_loss": af.mean_matching_loss,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_real_side_that_expects_a_gradient_is_told_once_that_it_gets_none(loss, unwarned):
    real, synthetic = torch.randn(4, 18, requires_grad=True), torch.randn(4, 18, requires_grad=True)
    with pytest.warns(UserWarning, match=r"constant: no gradient flows to it.*real\.detach\(\)") as warned:
        loss(real, synthetic).backward()
        loss(real, synthetic)
    assert len(warned) == 1 and real.grad is None and synthetic.grad is not None


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_nobody_is_told_who_expects_none(loss, unwarned, recwarn):
    real, synthetic = torch.randn(4, 18, requires_grad=True), torch.randn(4, 18, requires_grad=True)
    loss(real.detach(), synthetic)
    with torch.no_grad():
        loss(real, synthetic)
    assert not [warning for warning in recwarn if "constant" in str(warning.message)]


def test_a_real_side_that_expects_a_gradient_compiles_into_one_graph(unwarned, recwarn):
    real, synthetic = torch.randn(4, 2, 3, 3, requires_grad=True), torch.randn(4, 2, 3, 3, requires_grad=True)
    loss = af.ATOMLoss()
    compiled = torch.compile(lambda *sides: loss(*([side * 2] for side in sides)), backend="aot_eager", fullgraph=True)
    compiled(real, synthetic).backward()
    assert real.grad is None and synthetic.grad is not None
    assert not [warning for warning in recwarn if "constant" in str(warning.message)]


def test_half_precision_features_from_autocast(device):
    real, synthetic = layers(4, 0, torch.float32), layers(2, 1, torch.float32)
    expected = reference.atom_loss(real, synthetic)
    loss = af.ATOMLoss()([f.bfloat16().to(device) for f in real], [f.bfloat16().to(device) for f in synthetic])
    assert loss.dtype == torch.float32
    assert abs(loss.item() / expected.item() - 1) < 0.02


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: af.ATOMLoss(spatial_power=0), ValueError, "spatial_power"),
        (lambda: af.ATOMLoss(mmd_weight=True), ValueError, "mmd_weight must be a finite number .* got True"),
        (lambda: af.ATOMLoss(mmd_weight=-1), ValueError, "mmd_weight .* got -1"),
        (lambda: af.ATOMLoss(scale=float("inf")), ValueError, "scale .* got inf"),
        (lambda: af.ATOMLoss()(layers(2, 0)[0], layers(2, 0)), TypeError, "one per layer; got one tensor"),
        (lambda: af.ATOMLoss()(layers(2, 0), layers(2, 0)[:1]), ValueError, "got 2 and 1"),
        (lambda: af.ATOMLoss()([], []), ValueError, "nothing to match"),
        (lambda: af.ATOMLoss()([], [], torch.zeros(2, 3)), ValueError, "got only real_embedding"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
