"""The first block from the image equals convolution, either norm, ReLU, the attention equations and pooling."""

import contextlib
import importlib.util
import re

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import atom_fast as af
import atom_fast.kernels
from atom_fast import reference
from atom_fast.kernels import conv_block as kernels
from atom_fast.kernels import folded_conv_block as folded_kernels
from atom_fast.kernels import norm_block as norm_block_kernels
from atom_fast.ops import launching
from atom_fast.ops.conv_block import _constants, conv_block, conv_block_op, launch_kind
from atom_fast.ops.launching import int32_indexable
from atom_fast.ops.norm_block import NORMS
from tests.backends import entered
from tests.cubin import LOST_CONSTANT, assemble, check_report, disassemble
from tests.launches import compile_launch, recorded
from tests.ops.test_norm_block import BACKENDS, FUSED, IMPLEMENTATIONS, PRECISE, assert_equal, run
from tests.workloads import pretended

KINDS = ("measured", "successor")


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """Run the measured kernels and their successors."""
    monkeypatch.setitem(launching.KERNELS, "conv_block", request.param)
    return request.param


@pytest.fixture
def measured(monkeypatch):
    """Run the measured kernels only: the test is of their launch tables or tiles."""
    monkeypatch.setitem(launching.KERNELS, "conv_block", "measured")


def draw(batch, image_channels, channels, height, width, device="cpu", dtype=torch.float64, seed=0):
    """Images, filters, and a scale and shift of both signs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, image_channels, height, width), (channels, image_channels, 3, 3), (channels,), (channels,)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


@contextlib.contextmanager
def products(precision):
    """Multiply float32 in "ieee" or "tf32" where convolutions do."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def fused(backend, images, filters, weight, bias, *powers, norm="instance"):
    powers = dict(zip(("spatial_power", "channel_power"), powers, strict=False))
    with entered(backend):
        return run(lambda x: conv_block(x, filters, weight, bias, **powers, norm=norm), images)


def exact(images, filters, weight, bias, spatial_power=4.0, channel_power=4.0, norm="instance"):
    filters, weight, bias = (None if p is None else p.double() for p in (filters, weight, bias))

    def block(x):
        offset = torch.linspace(-1, 1, len(filters), dtype=torch.float64, device=x.device)  # what the norm takes away
        convolved = F.conv2d(x, filters, offset, padding=1)
        return reference.norm_block(convolved, weight, bias, 1e-5, spatial_power, channel_power, norm)

    return run(block, images.double())


POWERS = st.sampled_from([None, 1.0, 2.5, 4.0, 16.0])


SHAPES = st.tuples(*(st.integers(*ends) for ends in ((1, 3), (1, 4), (1, 20), (2, 11), (2, 11))))


@given(
    shape=st.tuples(*(st.integers(*ends) for ends in ((1, 2), (1, 4), (1, 18), (2, 10), (2, 10)))),
    affine=st.booleans(), powers=st.tuples(POWERS, POWERS), norm=st.sampled_from(NORMS), kind=st.sampled_from(KINDS),
)  # fmt: skip
@settings(max_examples=10)
def test_results_and_gradient_equal_the_equations(shape, affine, powers, norm, kind, device):
    images, filters, weight, bias = draw(*shape, device)
    inputs = images, filters, *((weight, bias) if affine else (None, None)), *powers
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(launching.KERNELS, "conv_block", kind)
        assert_equal(fused("triton", *inputs, norm=norm), exact(*inputs, norm=norm))


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("scale", "power"), [(1e-6, 16.0), (1e6, 16.0), (1e12, 8.0), (1e-12, 8.0), (1e6, 1.0)])
def test_maps_and_gradients_are_accurate_at_every_magnitude(scale, power, norm, device):
    images, filters, weight, bias = draw(2, 3, 8, 8, 8, device, torch.float32)
    inputs = images, filters, scale * weight, scale * bias, power, power
    with products("ieee"):
        outputs = fused("triton", *inputs, norm=norm)
    assert all(output.isfinite().all() for output in outputs)
    assert_equal(outputs, exact(*inputs, norm=norm), 5e-5)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("norm", NORMS)
def test_images_far_from_zero_keep_their_statistics(norm, device):
    images, filters, weight, bias = draw(2, 3, 8, 12, 12, device, torch.float32)
    images += 300
    with products("ieee"):
        outputs = fused("triton", images, filters, weight, bias, norm=norm)
    assert_equal(outputs, exact(images, filters, weight, bias, norm=norm), 1e-4)


@pytest.mark.usefixtures("kind")
def test_bits_repeat_and_nan_is_not_hidden(device):
    images, filters, weight, bias = draw(2, 3, 20, 8, 8, device, torch.float32)
    first, second = (fused("triton", images, filters, weight, bias) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    images[0, 1, 3, 3] = torch.nan
    pooled, maps, _ = fused("triton", images, filters, weight, bias)
    assert pooled[0].isnan().all() and maps[0].isnan().any()
    assert pooled[1].isfinite().all() and maps[1].isfinite().all()


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_is_that_of_finite_differences(norm, device):
    images, filters, weight, bias = draw(2, 2, 5, 4, 5, device)
    with af.backend("triton"):
        torch.autograd.gradcheck(
            lambda x: tuple(conv_block(x, filters, weight, bias, norm=norm)), images.requires_grad_(), fast_mode=True
        )


@given(shape=SHAPES, affine=st.booleans(), powers=st.tuples(POWERS, POWERS), norm=st.sampled_from(NORMS))
@settings(max_examples=25)
def test_float32_in_c_is_as_exact_as_unfused(shape, affine, powers, norm):
    images, filters, weight, bias = draw(*shape, dtype=torch.float32)
    inputs = images, filters, *((weight, bias) if affine else (None, None)), *powers
    expected, plain = exact(*inputs, norm=norm), fused("reference", *inputs, norm=norm)
    for got, unfused, wanted in zip(fused("torch", *inputs, norm=norm), plain, expected, strict=True):
        assert (got - wanted).norm() <= 4 * (unfused - wanted).norm() + 5e-6 * wanted.norm()


@pytest.mark.parametrize(
    ("batch", "image_channels", "size", "norm"),
    [
        (1, 1, 28, "instance"),
        (2, 6, 8, "batch"),
    ],
)
@pytest.mark.usefixtures("kind")
def test_sizes_and_channels_beyond_the_kernels_too(batch, image_channels, size, norm, device):
    inputs = draw(batch, image_channels, 20, size, size, device)
    assert_equal(fused("triton", *inputs, norm=norm), exact(*inputs, norm=norm))


@pytest.mark.parametrize(("backend", "norm"), FUSED)
def test_float32_and_channels_last_images(backend, norm, place):
    images, filters, weight, bias = draw(3, 3, 20, 9, 8, place, torch.float32)
    images += 2 * torch.arange(3, device=place).view(3, 1, 1, 1)  # the planes' means differ
    expected = exact(images, filters, weight, bias, norm=norm)
    with products("ieee"):
        for layout in (torch.contiguous_format, torch.channels_last):
            actual = fused(backend, images.contiguous(memory_format=layout), filters, weight, bias, norm=norm)
            assert_equal(actual, expected, 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_narrow_filters_give_their_dtype(backend, place):
    images, filters, weight, bias = draw(2, 3, 16, 8, 8, place, torch.float32)
    with entered(backend), torch.autocast(place.type, torch.bfloat16):
        assert conv_block(images, filters, weight, bias).pooled.dtype == torch.bfloat16
    narrow = filters.half()  # the interpreter multiplies no bfloat16
    pooled, maps, gradient = fused(backend, images, narrow, weight, bias)
    assert_equal((pooled, maps), exact(images.half(), narrow, weight, bias)[:2], 2e-3)
    assert gradient.shape == images.shape and gradient.isfinite().all()


@pytest.mark.parametrize(("backend", "norm"), FUSED)
@pytest.mark.parametrize("used", ["pooled", "maps"])
def test_gradients_without_stride_and_of_one_output(backend, norm, used, place):
    dtype, tolerance = PRECISE[backend]
    images, filters, weight, bias = draw(2, 3, 8, 8, 8, place, dtype)
    gradients = []
    for name in (backend, "reference"):
        leaf = images.detach().requires_grad_()
        with entered(name):
            getattr(conv_block(leaf, filters, weight, bias, norm=norm), used).sum().backward()
        gradients.append(leaf.grad)
    assert_equal(gradients[:1], gradients[1:], tolerance)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_black_image_and_an_empty_batch(backend, norm, place):
    dtype, tolerance = PRECISE[backend]
    images, filters, weight, bias = draw(2, 3, 8, 8, 8, place, dtype)
    images[0] = 0  # every plane is constant
    inputs = filters, weight, bias
    assert_equal(fused(backend, images, *inputs, norm=norm), exact(images, *inputs, norm=norm), tolerance)
    pooled, maps, gradient = fused(backend, images[:0], *inputs, norm=norm)
    assert pooled.shape == (0, 8, 4, 4) and maps.shape == (0, 72) and gradient.shape == (0, 3, 8, 8)


@pytest.mark.parametrize(("backend", "norm"), FUSED)
def test_nothing_of_the_convolutions_size_is_kept(backend, norm, place):
    images, filters, weight, bias = draw(4, 3, 32, 16, 16, place, torch.float32)
    kept = []
    with entered(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            conv_block(images.requires_grad_(), filters, weight, bias, norm=norm)
        assert not kept
        conv_block(images, filters, weight, bias, norm=norm)
    largest = max(t.numel() for t in kept if t.data_ptr() != images.data_ptr())
    assert largest <= max(filters.numel(), 4 * (16 * 16 + 32))


@pytest.mark.parametrize(("backend", "norm"), FUSED)
def test_operator_passes_opcheck_and_compiles_as_one_graph(backend, norm, place):
    images, filters, weight, bias = draw(2, 3, 4, 4, 4, place, torch.float32)
    inputs = images.requires_grad_(), filters, weight, bias
    torch.library.opcheck(conv_block_op, (*inputs, 1e-5, None, 4.0, norm, IMPLEMENTATIONS[backend]))

    def loss(x):
        pooled, maps = conv_block(x, filters, weight, bias, norm=norm)
        return pooled.square().sum() + maps.square().cumsum(1).sum()

    with entered(backend):
        expected = torch.autograd.grad(loss(images), images)
        actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(images), images)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("images", "filters", "message"),
    [
        ((3, 8, 8), (4, 3, 3, 3), r"images must be \[B, C, H, W\]"),
        ((1, 3, 1, 8), (4, 3, 3, 3), "at least 2"),
        ((1, 0, 8, 8), (4, 0, 3, 3), "C at least 1"),
        ((1, 3, 8, 8), (4, 1, 3, 3), r"filters must be \[C, 3, 3, 3\]; got \(4, 1, 3, 3\)"),
        ((1, 3, 8, 8), (4, 3, 5, 5), r"filters must be \[C, 3, 3, 3\]"),
    ],
)
def test_bad_input_is_refused(images, filters, message):
    with pytest.raises(ValueError, match=message):
        conv_block(torch.zeros(images), torch.zeros(filters))


def test_filters_that_want_a_gradient_are_refused():
    with pytest.raises(ValueError, match="filters requires a gradient"):
        conv_block(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3, requires_grad=True))


def test_another_norm_is_refused():
    with pytest.raises(ValueError, match="norm must be one of instance, batch; got 'layer'"):
        conv_block(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3), norm="layer")


def launches_of(image_channels, size, dtype, precision, norm="instance", capability=90):
    images, filters, weight, bias = draw(1, image_channels, 128, size, size, dtype=torch.float32)
    with (
        pretended(capability),
        products(precision),
        recorded(kernels, folded_kernels, norm_block_kernels) as launches,
        af.backend("triton"),
    ):
        block = conv_block(images.requires_grad_(), filters.to(dtype), weight, bias, norm=norm)
        torch.autograd.backward(list(block), [torch.empty_like(output) for output in block])
    return [launch for launch in launches if launch.kernel != "map_weights_kernel"]


RECORDING = pytest.mark.skipif(torch.cuda.is_available(), reason="what is launched is recorded through the interpreter")


@RECORDING
@pytest.mark.parametrize(
    ("image_channels", "size", "dtype", "precision", "capability"),
    [
        (3, 32, torch.float32, "tf32", 86),
        (3, 32, torch.float32, "tf32", 90),
        (3, 32, torch.bfloat16, "tf32", 86),
    ],
)
@pytest.mark.usefixtures("kind")
def test_kernels_fit_and_use_the_tensor_cores(image_channels, size, dtype, precision, capability):
    for launch in launches_of(image_channels, size, dtype, precision, capability=capability):
        report = compile_launch(launch, capability)
        check_report(report, capability, launch.kernel)
        if launch.kernel in ("fold_kernel", "fold_filters_kernel", "image_gradient_kernel"):
            continue
        assert report.tensor_core == (precision == "tf32"), launch.kernel
        if "forward" in launch.kernel and size == 32:
            assert report.widest_store >= 64, launch.kernel


@RECORDING
@pytest.mark.usefixtures("measured")
def test_kernels_of_batch_norm_fit_and_use_the_tensor_cores():
    capability = 86
    statistics, forward, *backward = launches_of(3, 32, torch.float32, "tf32", "batch", capability)
    assert statistics.kernel.removeprefix("tiled_") == "conv_block_statistics_kernel"
    assert [launch.kernel for launch in backward] == [
        "conv_block_sums_kernel", "conv_block_columns_kernel", "fold_kernel"
    ]  # fmt: skip
    for launch in (statistics, forward, backward[1]):  # the other two are those of InstanceNorm
        report = compile_launch(launch, capability)
        check_report(report, capability, launch.kernel)
        assert report.tensor_core, launch.kernel


@RECORDING
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("capability", "dtype", "image_channels", "size", "tiled"),
    [
        (75, torch.float32, 3, 32, True),
        (75, torch.float32, 1, 28, True),
        (75, torch.float32, 1, 8, False),
        (86, torch.float32, 3, 32, True),
        (86, torch.bfloat16, 3, 32, False),
        (86, torch.float32, 1, 28, False),
        (120, torch.float32, 3, 32, True),
        (80, torch.float32, 3, 32, False),
        (90, torch.float32, 3, 32, False),
    ],
)
@pytest.mark.usefixtures("measured")
def test_planes_are_kept_on_the_chip_where_they_fit(capability, dtype, image_channels, size, tiled, norm):
    launches = launches_of(image_channels, size, dtype, "tf32", norm, capability)
    forward = [launch.kernel for launch in launches if "forward" in launch.kernel or "statistics" in launch.kernel]
    assert len(forward) == (1 if norm == "instance" else 2)
    assert all(kernel.startswith("tiled_") == tiled for kernel in forward)


@RECORDING
@pytest.mark.parametrize(("image_channels", "channels", "size"), [(3, 128, 32), (3, 16, 12)])
@pytest.mark.usefixtures("measured")
def test_launch_table_knows_how_much_shared_memory_is_asked_for(image_channels, channels, size):
    """No table that says "fits" may be wrong: the kernel would not start on the GPU that it is for."""
    images, filters, *_ = draw(1, image_channels, channels, size, size, dtype=torch.float32)
    with products("tf32"), recorded(kernels) as launches, af.backend("triton"):
        conv_block(images, filters)
    for capability in (86, 90) if channels == 128 else (86,):
        needed = compile_launch(launches[0], capability).shared
        for shared, fits in ((needed - 1, False), (1.5 * needed + 8192, True)):
            launch = kernels.conv_block_launch(image_channels, channels, size, size, 4, shared)
            assert (launch is not None) == fits


@RECORDING
def test_a_lost_constant_is_found(tmp_path):
    """What ptxas 12.8 and 12.9 make of a packed addition of which one half is used, if this Triton has one of them."""
    ptx = """.version 8.6
        .target sm_90
        .address_size 64
        .visible .entry k(.param .u64 p, .param .u64 q) {
            .reg .b32 %r<5>; .reg .b16 %s<2>; .reg .b64 %d<3>;
            ld.param.b64 %d1, [p]; ld.param.b64 %d2, [q];
            ld.global.b32 %r1, [%d1];
            mov.b32 %r2, 5; add.s16x2 %r3, %r1, %r2; mov.b32 {%s1, _}, %r3; cvt.u32.u16 %r4, %s1;
            st.global.b32 [%d2], %r4;
            ret;
        }"""
    assemble(ptx, 90, tmp_path / "k.cubin")
    sass = disassemble(tmp_path / "k.cubin")
    added = re.findall(r"\bVIADD\.16x2 [^;]*", sass)
    assert added, sass
    assert bool(LOST_CONSTANT.search(sass)) == (not any("0x5" in instruction for instruction in added))


@RECORDING
@pytest.mark.parametrize("tile", [(16, 16, 1)])
@pytest.mark.usefixtures("measured")
def test_no_tile_loses_a_constant(tile, monkeypatch):
    """Tiles whose gradients were wrong on an H100 with Triton 3.6, by offsets that were divisions."""
    names = dict(zip(("BLOCK_P", "BLOCK_C", "num_warps"), tile, strict=True))
    table = kernels.conv_block_backward_launch
    monkeypatch.setattr(kernels, "conv_block_backward_launch", lambda *args: {**table(*args), **names})
    launches = launches_of(3, 32, torch.bfloat16, "tf32")
    for launch in launches:
        if launch.kernel in ("conv_block_sums_kernel", "conv_block_columns_kernel"):
            assert compile_launch(launch, 90, brief=True).lost_constants == 0, launch.kernel


@pytest.mark.parametrize(
    ("switch", "name", "tf32"),
    [
        (torch.backends.cudnn, "allow_tf32", {False: False, True: True}),
        (torch.backends.cudnn.conv, "fp32_precision", {"ieee": False, "tf32": True}),
    ],
    ids=["allow_tf32", "fp32_precision"],
)
def test_tf32_is_used_where_pytorch_would(switch, name, tf32):
    images, filters, weight, _ = draw(1, 3, 16, 32, 32, dtype=torch.float32)
    # PyTorch refuses to read the older switch while the two newer ones differ.
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision
    before = getattr(switch, name)
    try:
        for setting, used in tf32.items():
            setattr(switch, name, setting)
            assert _constants(images, filters, weight, 4.0, 4.0)["PRECISION"] == ("tf32" if used else "ieee"), setting
    finally:
        setattr(switch, name, before)


@pytest.mark.parametrize(
    ("batch", "image_channels", "channels", "size", "norm"),
    [
        (2, 1, 20, 10, "batch"),
        (1, 4, 40, 7, "instance"),
        (2, 2, 8, 2, "instance"),
    ],
)
@pytest.mark.usefixtures("measured")
def test_tiles_equal_the_equations(batch, image_channels, channels, size, norm, device):
    inputs = draw(batch, image_channels, channels, size, size, device)
    with pretended(86, 0) as chip:
        assert launch_kind((image_channels, size, size), channels, torch.float64, torch.device("cpu"), chip) == "tiles"
        actual = fused("triton", *inputs, norm=norm)
    assert_equal(actual, exact(*inputs, norm=norm))


@pytest.mark.parametrize(("image_channels", "size"), [(2, 10), (3, 11)])
@pytest.mark.usefixtures("kind")
def test_offsets_of_neighbourhoods_equal_the_equations(image_channels, size, device):
    """Sizes that were kept from matrix instructions as long as the cause of the wrong gradients was not known."""
    inputs = draw(1, image_channels, 16, size, size, device)
    assert_equal(fused("triton", *inputs), exact(*inputs))


@pytest.mark.usefixtures("measured")
def test_gradients_that_32_bits_do_not_address_are_copied(device, monkeypatch):
    """Of the pooled features, as of every other tensor."""
    seen = []
    monkeypatch.setattr(
        "atom_fast.ops.conv_block.int32_indexable", lambda x: seen.append(x.shape) or int32_indexable(x)
    )
    inputs = draw(1, 3, 4, 8, 8, device)
    fused("triton", *inputs)
    assert (1, 4, 4, 4) in seen


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("image_channels", "size"), [(1, 8), (3, 10), (1, 28), (3, 16), (3, 22), (3, 32), (2, 32), (4, 16)]
)
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bfloat16"])
@pytest.mark.usefixtures("kind")
def test_products_of_every_precision_on_a_gpu(precision, image_channels, size, norm, device):
    images, filters, weight, bias = draw(64, image_channels, 128, size, size, device, torch.float32)
    filters = filters.bfloat16() if precision == "bfloat16" else filters
    # Rounding the operands turns some features off or on, each of which changes the gradient by a whole term: 1e-3 of
    # them in TF32 and 4e-3 in bfloat16 make errors of the square root.
    tolerances = {"ieee": (1e-6, 2e-6), "tf32": (2e-3, 5e-2), "bfloat16": (1e-2, 1e-1)}[precision]
    with products("tf32" if precision == "tf32" else "ieee"):
        *outputs, gradient = fused("triton", images, filters, weight, bias, norm=norm)
    *wanted_outputs, wanted_gradient = exact(images, filters, weight, bias, norm=norm)
    assert_equal(outputs, wanted_outputs, tolerances[0])
    assert_equal([gradient], [wanted_gradient], tolerances[1])


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bfloat16"])
@pytest.mark.parametrize(("image_channels", "size"), [(3, 32), (1, 28), (3, 11)])
@pytest.mark.usefixtures("measured")
def test_tiles_on_a_gpu(image_channels, size, precision, norm, device, monkeypatch):
    """As on chips with less shared memory: whatever this one has, the forward kernels walk tiles."""
    monkeypatch.setattr(kernels, "conv_block_launch", lambda *_: None)
    test_products_of_every_precision_on_a_gpu(precision, image_channels, size, norm, device)


def divided_kernels():
    """The kernels with the offsets of neighbourhoods by division, as they were when some tiles were wrong."""
    path = kernels.__file__
    spec = importlib.util.spec_from_file_location("atom_fast.kernels.divided_conv_block", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DIVIDED = tl.constexpr(True)
    return module


# Only Triton 3.5 and 3.6 make the addition that ptxas loses.
DIVIDED = [False, True] if triton.__version__.startswith(("3.5", "3.6")) else [False]


@pytest.mark.gpu
@pytest.mark.parametrize("divided", DIVIDED)
@pytest.mark.usefixtures("measured")
def test_a_tile_that_was_wrong_on_a_gpu(divided, device, monkeypatch):
    """A warp of 16 places: right by comparisons, wrong by divisions, which shows that the cause is the one known."""
    module = divided_kernels() if divided else kernels
    monkeypatch.setattr(atom_fast.kernels, "conv_block", module)
    table = module.conv_block_backward_launch
    tile = {"BLOCK_P": 16, "BLOCK_C": 16, "num_warps": 1}
    monkeypatch.setattr(module, "conv_block_backward_launch", lambda *args: {**table(*args), **tile})
    inputs = draw(64, 3, 128, 32, 32, device, torch.float32)
    with products("tf32"):
        *_, gradient = fused("triton", *inputs)
    *_, wanted = exact(*inputs)
    error = (gradient - wanted).norm() / wanted.norm()
    assert error > 0.2 if divided else error < 5e-2


@pytest.mark.parametrize("size", [8])
@pytest.mark.usefixtures("measured")
def test_divided_offsets_are_the_same_offsets(size, device, monkeypatch):
    """The divisions kept beside the comparisons compute the same where no compiler bug interferes."""
    inputs = draw(1, 3, 16, size, size, device)
    expected = fused("triton", *inputs)
    monkeypatch.setattr(atom_fast.kernels, "conv_block", divided_kernels())
    for got, wanted in zip(fused("triton", *inputs), expected, strict=True):
        assert torch.equal(got, wanted)
