"""Differentiable siamese augmentation against a plain implementation of one image at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from atom_fast.data.augmentation import AugmentationParameters, augment, draw_augmentation
from atom_fast.ops import augmentation as operators
from atom_fast.ops import native
from atom_fast.ops.augmentation import OPERATIONS, augment_op
from atom_fast.ops.dispatch import backend
from tests.cubin import compile_kernel

EACH = (*OPERATIONS, "none")
SIZES = [(3, 8, 8), (3, 5, 12), (2, 1, 1), (1, 13, 3)]


def augment_reference(images, parameters, groups=None, align_corners=False):
    """One image after the other, by the definitions in ``reference_operation``."""
    groups = range(len(images)) if groups is None else groups.tolist()
    results = []
    for image, group in zip(images.split(1), groups, strict=True):
        code = parameters.operation[group].item()
        name = OPERATIONS[code] if code >= 0 else "none"
        results.append(reference_operation(image, name, parameters.uniforms[group].tolist(), align_corners))
    return torch.cat(results)


def reference_operation(images, name, uniforms, align_corners=False):
    """One operation for all images [B, C, H, W], as it is defined: by means, slices and affine grids."""
    height, width = images.shape[-2:]
    first, second, third = uniforms
    if name == "color":
        images = images + (first - 0.5)
        mean = images.mean(1, keepdim=True)
        images = (images - mean) * (2 * second) + mean
        mean = images.mean((1, 2, 3), keepdim=True)
        return (images - mean) * (third + 0.5) + mean
    if name == "crop":
        pad_y, pad_x = int(0.125 * height + 0.5), int(0.125 * width + 0.5)
        top, left = math.floor(first * (2 * pad_y + 1)), math.floor(second * (2 * pad_x + 1))
        return F.pad(images, (pad_x, pad_x, pad_y, pad_y))[..., top : top + height, left : left + width]
    if name == "cutout":
        mask = torch.ones_like(images[:1, :1])
        mask[..., cut(first, height), cut(second, width)] = 0
        return images * mask
    if name == "flip":
        return images.flip(3) if first < 0.5 else images
    if name == "scale":
        factor_y, factor_x = (1 / 1.2 + r * (1.2 - 1 / 1.2) for r in (first, second))
        return warp(images, [[factor_x, 0, 0], [0, factor_y, 0]], align_corners)
    if name == "rotate":
        angle = (first - 0.5) * 2 * math.radians(15)
        matrix = [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]
        return warp(images, matrix, align_corners)
    return images


def cut(uniform, length):
    size = int(0.5 * length + 0.5)
    start = math.floor(uniform * (length + 1 - size % 2)) - size // 2
    return slice(max(start, 0), min(start + size, length))


def warp(images, matrix, align_corners):
    matrices = torch.tensor(matrix, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=align_corners)
    return F.grid_sample(images, grid, align_corners=align_corners, padding_mode="zeros")


def parameters_of(names, device="cpu", seed=0):
    """Parameters of one group a name."""
    codes = [OPERATIONS.index(name) if name in OPERATIONS else -1 for name in names]
    uniforms = torch.rand(len(codes), 3, generator=torch.Generator().manual_seed(seed))
    return AugmentationParameters(torch.tensor(codes, dtype=torch.int64, device=device), uniforms.to(device))


def normal(*shape, dtype=torch.float32, device="cpu", seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def with_gradient(function, images, gradient, *args):
    images = images.detach().requires_grad_()
    result = function(images, *args)
    return result.detach(), torch.autograd.grad(result, images, gradient.to(result.dtype))[0]


def assert_like_reference(images, parameters, groups, tolerance):
    """Values and gradients agree with the plain implementation in float64."""
    gradient = normal(*images.shape, dtype=torch.float64, device=images.device, seed=2)
    expected = with_gradient(augment_reference, images.double(), gradient, parameters, groups)
    actual = with_gradient(augment, images, gradient, parameters, groups)
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


BACKENDS = {"eager": "reference", "triton": "triton", "c": "torch"}  # by implementation


@pytest.fixture(params=BACKENDS)
def implementation(request):
    with backend(BACKENDS[request.param]):
        yield request.param


@pytest.fixture
def device(device, request):
    """The CPU for the kernel in C, otherwise the device that all tests share."""
    c = "implementation" in request.fixturenames and request.getfixturevalue("implementation") == "c"
    return torch.device("cpu") if c else device


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_operation_equals_its_definition(size, implementation, device):
    parameters = parameters_of(EACH * (1 if implementation == "triton" else 20), device)
    images = normal(len(parameters.operation), *size, device=device)
    assert_like_reference(images, parameters, None, 1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(1, 5, 17), (2, 6, 4), (3, 2, 33), (4, 7, 5), (5, 4, 6), (9, 3, 2)], ids=str)
def test_every_number_of_channels_in_both_layouts(size, memory_format):
    parameters = parameters_of(EACH * 4, seed=6)
    images = normal(len(parameters.operation), *size).contiguous(memory_format=memory_format)
    with backend("torch"):
        assert_like_reference(images, parameters, None, 1e-5)


def test_every_operation_in_float64(implementation, device):
    images = normal(len(EACH), 3, 5, 6, dtype=torch.float64, device=device)
    assert_like_reference(images, parameters_of(EACH, device, seed=3), None, 1e-12)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_ends_of_the_range(uniform, implementation, device):
    operation, uniforms = parameters_of(EACH, device)
    parameters = AugmentationParameters(operation, torch.full_like(uniforms, uniform))
    assert_like_reference(normal(len(EACH), 1, 6, 9, device=device), parameters, None, 1e-5)


@pytest.mark.parametrize("name", ["crop", "cutout", "flip", "none"])
def test_whole_pixels_are_copied_exactly(name, implementation, device):
    count = 4 if implementation == "triton" else 64
    parameters = parameters_of([name] * count, device)
    images, gradient = normal(count, 2, 7, 6, device=device), normal(count, 2, 7, 6, device=device, seed=2)
    actual = with_gradient(augment, images, gradient, parameters)
    expected = with_gradient(augment_reference, images, gradient, parameters)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_groups_give_each_image_its_parameters(implementation, device):
    groups = torch.tensor([4, 0, 2, 2, 5, 1, 3, 0, 6], device=device)
    images = normal(len(groups), 3, 6, 6, device=device)
    assert_like_reference(images, parameters_of(EACH, device), groups, 1e-5)


def test_both_sides_of_a_class_are_augmented_alike(implementation, device):
    parameters = parameters_of(EACH, device)
    real_groups = torch.arange(len(EACH), device=device).repeat_interleave(2)
    synthetic_groups = torch.arange(len(EACH), device=device)
    synthetic = normal(len(EACH), 3, 6, 6, device=device)
    real = torch.stack([synthetic, -synthetic], 1).flatten(0, 1)
    augmented = augment(real, parameters, real_groups)[::2]
    assert torch.equal(augmented, augment(synthetic, parameters, synthetic_groups))
    assert not torch.equal(augmented[:-1], synthetic[:-1])


def test_align_corners_does_not_matter_for_square_images():
    parameters = parameters_of(["scale", "rotate"] * 20)
    images = normal(40, 2, 9, 9, dtype=torch.float64)
    expected = augment_reference(images, parameters, align_corners=True)
    torch.testing.assert_close(augment(images, parameters), expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_every_order():
    parameters = parameters_of(EACH, seed=5)
    images = normal(len(EACH), 2, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, parameters), images)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, parameters).square(), images)


def test_second_derivative_of_the_kernel(device, triton_backend):
    parameters = parameters_of(EACH, device)
    images = normal(len(EACH), 1, 3, 4, dtype=torch.float64, device=device).requires_grad_()
    direction = torch.ones_like(images).requires_grad_()
    (gradient,) = torch.autograd.grad(augment(images, parameters), images, direction, create_graph=True)
    (linear,) = torch.autograd.grad(gradient, direction, images.detach())
    zeros = augment(torch.zeros_like(images), parameters)
    torch.testing.assert_close(linear, augment(images.detach(), parameters) - zeros.detach())


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_layouts_give_the_same_and_channels_last_is_kept(layout, implementation, device):
    parameters = parameters_of(EACH, device)
    images = normal(len(EACH), 3, 5, 6, device=device)
    strided = {
        "channels_last": lambda: images.contiguous(memory_format=torch.channels_last),
        "sliced": lambda: F.pad(images, (1, 2, 1, 0))[..., 1:, 1:-2],
        "transposed": lambda: images.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }[layout]()
    assert strided.stride() != images.stride()
    gradient = normal(*images.shape, device=device, seed=2).as_strided(images.shape, strided.contiguous().stride())
    actual, expected = (with_gradient(augment, x, gradient, parameters) for x in (strided, images))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    kept = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert actual[0].is_contiguous(memory_format=kept)


def test_an_expanded_gradient(implementation, device):
    parameters = parameters_of(EACH, device)
    images = normal(len(EACH), 2, 4, 4, device=device).requires_grad_()
    augment(images, parameters).sum().backward()
    gradient = torch.ones_like(images)
    torch.testing.assert_close(images.grad, with_gradient(augment_reference, images, gradient, parameters)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, implementation, device):
    parameters = parameters_of(EACH, device)
    images = normal(len(EACH), 3, 4, 5, dtype=dtype, device=device)
    actual = augment(images, parameters)
    assert actual.dtype == dtype
    exact = augment_reference(images.double(), parameters)
    torch.testing.assert_close(actual.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_the_same_bits_twice(implementation, device):
    parameters = parameters_of(EACH, device)
    images, gradient = normal(len(EACH), 3, 5, 5, device=device), normal(len(EACH), 3, 5, 5, device=device, seed=2)
    first, second = (with_gradient(augment, images, gradient, parameters) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_chunk_size_does_not_change_the_bits(monkeypatch):
    images, gradient = normal(35, 3, 6, 6), normal(35, 3, 6, 6, seed=2)
    settings = [(parameters_of(EACH * 5), None), (parameters_of(EACH), torch.arange(35) % 7)]
    with backend("reference"):
        whole = [with_gradient(augment, images, gradient, *setting) for setting in settings]
        monkeypatch.setattr(operators, "CHUNK_PIXELS", 4 * 36)
        blocks = [with_gradient(augment, images, gradient, *setting) for setting in settings]
    for one, other in zip(whole, blocks, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_tiles_and_programs_share_an_image(programs, monkeypatch, device, triton_backend):
    from atom_fast.kernels import augmentation as kernels

    size = 2, 18, 3 * kernels.BLOCK // 36 - 1  # three tiles, the last of them not full
    parameters = parameters_of(EACH, device)
    images = normal(len(EACH), *size, device=device)
    monkeypatch.setattr(kernels, "PROGRAMS", programs * len(EACH))
    assert kernels.split(len(EACH), math.prod(size)) == {1: (1, 3), 2: (2, 2), 3: (3, 1)}[programs]
    exact = augment_reference(images.double(), parameters)
    torch.testing.assert_close(augment(images, parameters).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=str)
def c_case(request):
    """Images, their gradients, parameters and groups; odd sizes, so that images start wherever in memory."""
    names = [name for name in EACH for _ in range(3)]
    images, gradient = (normal(45, 3, 7, 11, seed=s).contiguous(memory_format=request.param) for s in (1, 2))
    return images, gradient, parameters_of(names, seed=7), torch.arange(45) * 10 % 21


@pytest.mark.parametrize("size", [(65, 63), (4, 1023)], ids=str)
def test_the_number_of_threads_does_not_change_the_bits(size, monkeypatch):
    """Images so large that threads which shared memory would meet in it."""
    parameters = parameters_of(EACH * 8, seed=7)
    images, gradient = (normal(len(parameters.operation), 3, *size, seed=seed) for seed in (1, 2))
    monkeypatch.setattr(native, "_BYTES_PER_THREAD", 1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with backend("torch"):
                results.append(with_gradient(augment, images, gradient, parameters))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


@pytest.mark.parametrize("size", [1, 2, 10])
def test_other_images_do_not_change_an_image_s_bits(size, c_case):
    images, gradient, parameters, groups = c_case
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
    with backend("torch"):
        whole = with_gradient(augment, *c_case)
        for own in some.split(size):
            layout = [x[own].contiguous(memory_format=operators._layout(x)) for x in (images, gradient)]
            part = with_gradient(augment, *layout, parameters, groups[own])
            assert torch.equal(part[0], whole[0][own]) and torch.equal(part[1], whole[1][own])


@pytest.mark.parametrize("size", [(3, 6, 7), (1, 3, 12)], ids=str)
def test_a_derivative_is_the_transpose(size, implementation, device):
    parameters = parameters_of(EACH * 2, device, seed=8)
    x, y = normal(14, *size, device=device), normal(14, *size, device=device, seed=2)
    forward = augment_op(x, *parameters, None, False, False, implementation)
    back = augment_op(y, *parameters, None, True, False, implementation)
    actual, expected = ((a.double() * b).sum((1, 2, 3)) for a, b in ((forward, y), (x, back)))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("implementation", ["triton", "c"], indirect=True)
def test_a_value_that_is_not_finite_reaches_what_has_a_weight_on_it(value, transposed, implementation, device):
    """A weight of zero is not multiplied: an infinity beside it would leave NaN."""
    names = [name for name in EACH if name != "color"]
    operation, uniforms = parameters_of(names * (2 if implementation == "triton" else 6), device, seed=9)
    uniforms[-len(names) :] = 0.5  # rotation by nothing, whose other weights are zero
    parameters = operation, uniforms, None, transposed, False, implementation
    images, pulse = (torch.full((len(operation), 1, 5, 7), fill, device=device) for fill in (1.0, 0.0))
    images[:, :, 2, 4], pulse[:, :, 2, 4] = value, 1
    result, reached = augment_op(images, *parameters), augment_op(pulse, *parameters) != 0
    assert torch.equal(result.isnan() if math.isnan(value) else result == value, reached)
    assert torch.equal(result.isfinite(), ~reached)
    assert 0 < reached.sum(dim=(1, 2, 3)).float().mean() < 9


def test_one_pixel_that_is_not_finite_is_in_the_mean_of_color(implementation, device):
    images = normal(2, 3, 4, 4, device=device)
    images[0, 1, 2, 3] = math.nan
    result = augment(images, parameters_of(["color"] * 2, device))
    assert result[0].isnan().all() and result[1].isfinite().all()


def test_groups_that_are_not_there_are_refused():
    images = torch.zeros(2, 1, 3, 3)
    for group in (-1, 7):
        with backend("torch"), pytest.raises(IndexError):
            augment(images, parameters_of(EACH), torch.tensor([0, group]))


def test_a_forward_mode_derivative_is_refused(implementation, device):
    images = normal(len(EACH), 1, 4, 4, device=device)
    with pytest.raises(NotImplementedError, match="augmentation has no forward-mode derivative"):
        torch.func.jvp(lambda x: augment(x, parameters_of(EACH, device)), (images,), (images,))


def test_no_images(implementation, device):
    images = torch.empty(0, 3, 4, 4, device=device, requires_grad=True)
    groups = torch.empty(0, dtype=torch.int64, device=device)
    result = augment(images, parameters_of(EACH, device), groups)
    result.sum().backward()
    assert result.shape == images.grad.shape == images.shape


@pytest.mark.parametrize("transposed", [False, True])
def test_the_operator_is_registered_as_pytorch_wants(transposed, implementation, device):
    parameters = parameters_of(EACH[3:], device)
    groups = torch.tensor([2, 0, 3], device=device)
    images = normal(3, 2, 3, 3, device=device).requires_grad_()
    torch.library.opcheck(augment_op, (images, *parameters, groups, transposed, True, implementation))


def test_compiles_into_one_graph(implementation, device):
    parameters = parameters_of(EACH, device)
    images, gradient = normal(len(EACH), 1, 4, 4, device=device), normal(len(EACH), 1, 4, 4, device=device, seed=2)
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")
    actual = with_gradient(compiled, images, gradient, parameters)
    expected = with_gradient(augment, images, gradient, parameters)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


class CountOperators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_is_as_many_operators_for_every_number_of_classes(device):
    counts = []
    for classes in (2, 100):
        generator = torch.Generator(device).manual_seed(0)
        images = normal(classes, 1, 4, 4, device=device).requires_grad_()
        with CountOperators() as mode:
            augmented = augment(images, draw_augmentation(classes, generator), torch.arange(classes, device=device))
            torch.autograd.grad(augmented, images, torch.ones_like(augmented))
        counts.append(mode.count)
    assert counts[0] == counts[1] <= 12


def seeded(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


def assert_frequency(events, probability):
    """A mean of 0/1 events is within five standard deviations of its probability."""
    spread = math.sqrt(probability * (1 - probability) / events.numel())
    assert abs(events.double().mean().item() - probability) < 5 * spread


def assert_uniform(values, low, high):
    """Range, mean and variance of a uniform sample."""
    values = values.double().flatten()
    spread = (high - low) / math.sqrt(12)
    assert low - 1e-5 <= values.min() and values.max() <= high + 1e-5
    assert abs(values.mean().item() - (low + high) / 2) < 5 * spread / math.sqrt(len(values))
    assert abs(values.var().item() / spread**2 - 1) < 5 / math.sqrt(len(values))
    assert values.min() < low + 0.01 * (high - low) and values.max() > high - 0.01 * (high - low)


def test_operations_are_equally_likely_and_uniforms_uniform(device):
    parameters = draw_augmentation(6000, seeded(device))
    for code in range(len(OPERATIONS)):
        assert_frequency(parameters.operation == code, 1 / len(OPERATIONS))
    for column in parameters.uniforms.unbind(1):
        assert_uniform(column, 0, 1)


def test_classes_steps_and_parameters_are_independent(device):
    generator = seeded(device)
    steps = [draw_augmentation(5, generator) for _ in range(2000)]
    values = torch.stack([torch.cat([p.operation[:, None].float(), p.uniforms], 1) for p in steps]).flatten(1).cpu()
    following = torch.cat([values[:-1], values[1:]], 1).T  # every value of a step beside every value of the next
    correlation = torch.corrcoef(following) - torch.eye(len(following))
    assert correlation.abs().max() < 5.5 / math.sqrt(len(steps))


def test_one_operation_for_a_mini_batch(device):
    generator = seeded(device)
    draws = [draw_augmentation(8, generator, shared_operation=True) for _ in range(600)]
    operations = torch.stack([p.operation for p in draws])
    assert (operations == operations[:, :1]).all()
    for code in range(len(OPERATIONS)):
        assert_frequency(operations[:, 0] == code, 1 / len(OPERATIONS))
    assert all(p.uniforms.unique().numel() > 8 for p in draws)


@pytest.mark.parametrize("strategy", ["flip", "rotate_color", "crop_cutout_scale", "Color_Flip"])
def test_a_strategy_restricts_the_operations(strategy, device):
    names = strategy.lower().split("_")
    operation = draw_augmentation(3000, seeded(device), strategy=strategy).operation
    for name in names:
        assert_frequency(operation == OPERATIONS.index(name), 1 / len(names)) if len(names) > 1 else None
    assert set(operation.tolist()) == {OPERATIONS.index(name) for name in names}


@pytest.mark.parametrize("strategy", ["", "none", "None"])
def test_no_strategy_changes_nothing(strategy, device):
    images = normal(4, 3, 5, 5, device=device)
    assert torch.equal(augment(images, draw_augmentation(4, seeded(device), strategy=strategy)), images)


def test_draws_follow_their_generator_alone(device):
    state = torch.get_rng_state()
    first, again = (draw_augmentation(50, seeded(device, 7)) for _ in range(2))
    other = draw_augmentation(50, seeded(device, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def augmented(name, image, device, count=4000):
    """``count`` draws of one operation on one image [H, W]."""
    images = image.to(device).expand(count, 1, *image.shape)
    return augment(images, draw_augmentation(count, seeded(device), strategy=name))[:, 0]


def test_crops_shift_by_every_whole_number_alike(device):
    size, pad = 16, 2
    numbered = torch.arange(1.0, size * size + 1).view(size, size)
    source = augmented("crop", numbered, device)[:, 8, 8].long() - 1
    shifts = torch.stack([source // size - 8, source % size - 8])
    for shift in range(-pad, pad + 1):
        for axis in shifts:
            assert_frequency(axis == shift, 1 / (2 * pad + 1))
    assert shifts.abs().max() == pad
    assert_frequency((shifts[0] == pad) & (shifts[1] == -pad), 1 / (2 * pad + 1) ** 2)


@pytest.mark.parametrize("size", [8, 9, 10])
def test_cutouts_lie_everywhere_alike(size, device):
    side = int(0.5 * size + 0.5)
    starts = range(-(side // 2), size + (1 - side % 2) - side // 2)
    cleared = augmented("cutout", torch.ones(size, size), device) == 0
    for axis in (1, 2):
        lines = cleared.any(axis)
        for first in range(size):
            expected = sum(start <= first < start + side for start in starts) / len(starts)
            assert_frequency(lines[:, first], expected)
        counts = lines.sum(1)
        assert counts.max() == side
        assert torch.equal(cleared.sum((1, 2)), cleared.any(1).sum(1) * cleared.any(2).sum(1))


def test_half_of_the_flips_flip(device):
    result = augmented("flip", torch.tensor([[1.0, 2.0]]), device)
    assert_frequency(result[:, 0, 0] == 2, 0.5)


def test_scales_and_angles_are_uniform(device):
    across = torch.arange(-8.0, 9).expand(17, 17)  # bilinear sampling of a ramp is exact
    for ramp, row, column in ((across, 8, 9), (across.T, 9, 8)):
        assert_uniform(augmented("scale", ramp, device)[:, row, column], 1 / 1.2, 1.2)
        assert_uniform(augmented("rotate", ramp, device)[:, column, row].asin().rad2deg(), -15, 15)


def test_colours_are_uniform(device):
    pixels = torch.tensor([[0.0, 0.0, 3.0], [1.0, 1.0, 4.0]], device=device)  # means 1 and 2, colours 3 apart
    images = pixels.T.view(1, 3, 1, 2).expand(4000, 3, 1, 2)
    result = augment(images, draw_augmentation(4000, seeded(device), strategy="color"))[:, :, 0]
    brightness = result.mean((1, 2)) - pixels.mean()
    contrast = result.mean(1)[:, 1] - result.mean(1)[:, 0]
    saturation = (result[:, 2, 0] - result[:, 0, 0]) / 3 / contrast
    assert_uniform(brightness, -0.5, 0.5)
    assert_uniform(contrast, 0.5, 1.5)
    assert_uniform(saturation, 0, 2)


@pytest.mark.parametrize("strategy", ["colour", "flip-crop", "flip__crop", "crop_blur"])
def test_an_unknown_operation_is_named(strategy):
    with pytest.raises(ValueError, match="color, crop, cutout, flip, scale, rotate"):
        draw_augmentation(2, seeded("cpu"), strategy=strategy)


def test_bad_draws_are_refused():
    with pytest.raises(ValueError, match="twice"):
        draw_augmentation(2, seeded("cpu"), strategy="flip_crop_flip")
    with pytest.raises(ValueError, match="0 or more; got -1"):
        draw_augmentation(-1, seeded("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 4)}, r"images must be floating point \[B, C, H, W\]"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "torch.uint8"),
        ({"operation": torch.zeros(2)}, r"operation must be int64 \[G\]"),
        ({"uniforms": torch.zeros(2, 4)}, r"uniforms must be float32 \[2, 3\]"),
        ({"uniforms": torch.zeros(2, 3, dtype=torch.float64)}, "got torch.float64"),
        ({"images": torch.zeros(3, 3, 4, 4)}, "got 3 images and 2 groups"),
        ({"groups": torch.zeros(3, dtype=torch.int64)}, r"groups must be int64 \[2\]"),
        ({"groups": torch.zeros(2, dtype=torch.int32)}, "torch.int32"),
        ({"operation": torch.zeros(2, dtype=torch.int64, device="meta")}, "images' device cpu; got meta"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "images": torch.zeros(2, 3, 4, 4),
        "operation": torch.zeros(2, dtype=torch.int64),
        "uniforms": torch.zeros(2, 3),
        "groups": None,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        augment(given["images"], AugmentationParameters(given["operation"], given["uniforms"]), given["groups"])


@pytest.mark.parametrize(
    ("channels_last", "transposed", "capability"),
    [(False, False, 86), (False, True, 90), (True, False, 90), (True, True, 86)],
)
def test_the_kernel_fits_in_registers(channels_last, transposed, capability):
    from atom_fast.kernels.augmentation import BLOCK, WARPS, augmentation_kernel

    sizes = operators.extent(32, 32)
    constants = dict(CHANNELS=3, HEIGHT=32, WIDTH=32, HAS_GROUPS=True, TILES=3, BLOCK=BLOCK)
    constants |= dict(CHANNELS_LAST=channels_last, TRANSPOSED=transposed, OFFSET=not transposed)
    constants |= dict(PAD_Y=sizes.pad[0], PAD_X=sizes.pad[1], CUT_Y=sizes.cut[0], CUT_X=sizes.cut[1])
    constants |= dict(REACH_Y=sizes.reach[0], REACH_X=sizes.reach[1])
    constants |= dict(MAX_SCALE=operators.MAX_SCALE, MAX_ANGLE=operators.MAX_ANGLE)
    constants["channel_stride" if channels_last else "column_stride"] = 1
    types = dict(images="*fp32", operations="*i64", uniforms="*fp32", groups="*i64", output="*fp32")
    types |= dict(batch_stride="i32", channel_stride="i32", row_stride="i32", column_stride="i32")
    types |= dict.fromkeys(constants, "constexpr")
    aligned = ["images", "operations", "uniforms", "groups", "output", "batch_stride", "row_stride"]
    report = compile_kernel(
        "augmentation",
        "augmentation_kernel",
        signature={name: types[name] for name in augmentation_kernel.arg_names},
        constants=constants,
        capability=capability,
        num_warps=WARPS,
        aligned=(*aligned, *([] if channels_last else ["channel_stride"])),
    )
    # Taps are single values wherever an operation puts them; what lies at its own place is read and written in rows.
    assert report.spills == 0
    assert report.widest_store == 128
    assert report.widest_load == 128 or channels_last


@pytest.mark.parametrize("size", [(4, 4), (32, 32), (64, 64), (128, 128), (5, 64), (64, 5), (1, 9), (9, 1)])
def test_reach_covers_every_output_pixel_that_reads_a_pixel(size):
    """Angles and factors at the ends of their ranges, where reach is needed most: nothing of the gradient is lost."""
    height, width = size
    operation = torch.tensor([OPERATIONS.index(name) for name in ("scale", "rotate", "rotate")])
    parameters = AugmentationParameters(operation, torch.tensor([[0.0] * 3, [0.0] * 3, [1 - 2**-24] * 3]))
    images = normal(3, 1, height, width, dtype=torch.float64)
    gradient = torch.ones_like(images)
    actual = with_gradient(augment, images, gradient, parameters)[1]
    expected = with_gradient(augment_reference, images, gradient, parameters)[1]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(1280, 3, 32, 32), (40, 3, 128, 128), (200, 1, 28, 28)], ids=str)
def test_real_sizes(size, channels_last, device):
    generator = seeded(device)
    parameters = draw_augmentation(10, generator)
    groups = torch.arange(size[0], device=device) % 10
    images = normal(*size, device=device)
    gradient = normal(*size, device=device, seed=2)
    if channels_last:
        images, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (images, gradient))
    with backend("triton"):
        fused, again = (with_gradient(augment, images, gradient, parameters, groups) for _ in range(2))
    assert torch.equal(fused[0], again[0]) and torch.equal(fused[1], again[1])
    with backend("reference"):
        plain = with_gradient(augment, images, gradient, parameters, groups)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    some = slice(0, 40)
    exact = with_gradient(augment_reference, images[some].double(), gradient[some].double(), parameters, groups[some])
    for ours, theirs in zip(fused, exact, strict=True):
        torch.testing.assert_close(ours[some].double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_captured_step_draws_anew_and_never_waits(device):
    images = normal(20, 3, 16, 16, device=device).requires_grad_()
    groups = torch.arange(20, device=device) % 10
    direction = torch.ones_like(images)

    def step(generator):
        result = augment(images, draw_augmentation(10, generator), groups)
        # Detached: a graph kept from one step would tie the leaf to that step's stream.
        return result.detach(), torch.autograd.grad(result, images, direction)[0]

    step(seeded(device))
    torch.cuda.synchronize()
    generator = seeded(device, 3)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager_generator = seeded(device, 3)
        eager = [step(eager_generator) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        captured = step(generator)
    for expected in eager:
        graph.replay()
        assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])
    assert not torch.equal(eager[0][0], eager[1][0])


@pytest.mark.gpu
def test_strides_beyond_32_bits(device):
    stride = 2**30
    storage = torch.zeros(3 * stride + 16, dtype=torch.float16, device=device)
    images = storage.as_strided((2, 1, 4, 4), (4, 1, stride, 1))
    images.copy_(normal(2, 1, 4, 4, device=device))
    parameters = parameters_of(["color", "rotate"], device)
    torch.testing.assert_close(augment(images, parameters), augment(images.contiguous(), parameters))
