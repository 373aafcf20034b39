"""The fused block equals either norm, ReLU, the attention equations and average pooling, and moves few bytes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_fast import reference
from atom_fast.kernels import norm as successors
from atom_fast.kernels import norm_block as kernels
from atom_fast.ops.norm_block import NORMS, norm_block, norm_block_op
from benchmarks.roofline import norm_block_bytes
from tests.backends import entered
from tests.cubin import check_report
from tests.launches import compile_launch, recorded

GPU = ("triton", "successor")
BACKENDS = ("torch", *GPU)  # on a CPU, "torch" stands for the kernels in C: float32 in channels_last
IMPLEMENTATIONS = {"torch": "c", "triton": "triton", "successor": "successor"}
FUSED = [(backend, norm) for backend in BACKENDS for norm in NORMS]
PRECISE = {"torch": (torch.float32, 1e-5), **dict.fromkeys(GPU, (torch.float64, 1e-10))}  # dtype and relative error


def draw(shape, device, dtype=torch.float64, channels_last=True, seed=0):
    """A convolution's output with means unlike zero, and a scale and shift of both signs."""
    generator = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1
    affine = [torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2)]
    return x.to(device, dtype).contiguous(memory_format=layout), *(p.to(device, dtype) for p in affine)


def run(block, x, *args, seed=1):
    """Pooled features, maps (if any) and the gradient of x for random gradients of both, in float64."""
    x = x.detach().requires_grad_()
    outputs = [output for output in block(x, *args) if output[:1].numel() or not len(x)]
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    torch.autograd.backward(outputs, gradients)
    return [t.detach().double() for t in (*outputs, x.grad)]


def fused(backend, x, weight, bias, spatial_power=4.0, channel_power=4.0, norm="instance"):
    powers = {"spatial_power": spatial_power, "channel_power": channel_power}
    with entered(backend):
        return run(lambda x: norm_block(x, weight, bias, **powers, norm=norm), x)


def exact(x, weight, bias, spatial_power=4.0, channel_power=4.0, norm="instance"):
    weight, bias = (None if p is None else p.double() for p in (weight, bias))
    return run(lambda x: reference.norm_block(x, weight, bias, 1e-5, spatial_power, channel_power, norm), x.double())


def assert_equal(actual, expected, tolerance=1e-10):
    for got, wanted in zip(actual, expected, strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm() + 1e-30


POWERS = st.sampled_from([None, 1.0, 2.0, 2.5, 4.0, 8.0, 16.0])


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(2, 12), st.integers(2, 12))


@pytest.mark.parametrize("backend", GPU)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 18), st.integers(2, 9), st.integers(2, 9)),
    channels_last=st.booleans(), affine=st.booleans(), powers=st.tuples(POWERS, POWERS),
    norm=st.sampled_from(NORMS),
)  # fmt: skip
@settings(max_examples=10)
def test_results_and_gradient_equal_the_equations(backend, shape, channels_last, affine, powers, norm, device):
    x, weight, bias = draw(shape, device, channels_last=channels_last)
    arguments = x, *((weight, bias) if affine else (None, None)), *powers, norm
    assert_equal(fused(backend, *arguments), exact(*arguments))


@given(shape=SHAPES, affine=st.booleans(), powers=st.tuples(POWERS, POWERS), norm=st.sampled_from(NORMS))
@settings(max_examples=25)
def test_float32_in_c_is_as_exact_as_unfused(shape, affine, powers, norm):
    x, weight, bias = draw(shape, "cpu", torch.float32)
    arguments = x, *((weight, bias) if affine else (None, None)), *powers, norm
    expected, plain = exact(*arguments), fused("reference", *arguments)
    for got, unfused, wanted in zip(fused("torch", *arguments), plain, expected, strict=True):
        assert (got - wanted).norm() <= 4 * (unfused - wanted).norm() + 2e-6 * wanted.norm()


def test_the_reference_is_its_equations():
    x, weight, bias = draw((3, 4, 7, 6), "cpu")
    for norm, dims in (("instance", (2, 3)), ("batch", (0, 2, 3))):
        centred = x - x.mean(dims, keepdim=True)
        normalized = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
        features = (normalized * weight[:, None, None] + bias[:, None, None]).clamp(min=0)
        pooled, maps = reference.norm_block(x, weight, bias, norm=norm)
        torch.testing.assert_close(pooled, features[..., :6, :].unflatten(3, (3, 2)).unflatten(2, (3, 2)).mean((3, 5)))
        both = reference.spatial_attention(features, 4.0), reference.channel_attention(features, 4.0)
        torch.testing.assert_close(maps, torch.cat(both, 1))


def test_float64_and_other_layouts_on_a_cpu_are_the_reference():
    """ "torch" computes what C does not by the equations; so it does for contiguous float32."""
    for x in (draw((2, 3, 6, 6), "cpu")[0], draw((2, 3, 6, 6), "cpu", torch.float32, channels_last=False)[0]):
        assert_equal(fused("torch", x, None, None), fused("reference", x, None, None), 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_norms_are_the_same_for_one_sample(backend, place):
    dtype, tolerance = PRECISE[backend]
    x, weight, bias = draw((1, 6, 9, 12), place, dtype)
    assert_equal(*(fused(backend, x, weight, bias, norm=norm) for norm in NORMS), tolerance)


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 64, 48), (2, 2, 65, 127)])
def test_planes_of_every_size(shape, channels_last, norm, backend, device):
    x, weight, bias = draw(shape, device, channels_last=channels_last)
    assert_equal(fused(backend, x, weight, bias, norm=norm), exact(x, weight, bias, norm=norm))


@given(
    shape=st.tuples(st.just(2), st.integers(1, 20), st.integers(2, 7), st.integers(2, 6)),
    channels_last=st.booleans(),
    powers=st.tuples(st.sampled_from([None, 4.0]), st.sampled_from([None, 2.5])),
    norm=st.sampled_from(NORMS),
)
@settings(max_examples=8)
def test_tiles_give_what_whole_planes_give(shape, channels_last, powers, norm, device):
    x, weight, bias = draw(shape, device, channels_last=channels_last)
    tiled = fused_in_tiles(x, weight, bias, *powers, norm=norm)
    assert_equal(tiled, exact(x, weight, bias, *powers, norm=norm))


def test_features_of_a_chunk_are_small_where_another_has_none(device):
    x, weight, bias = draw((2, 32, 9, 8), device, torch.float32, channels_last=True)
    weight[16:], bias[16:], bias[:16] = 1e-6, 0.0, -20.0
    assert_equal(fused_in_tiles(x, weight, bias, 8.0, 8.0), exact(x, weight, bias, 8.0, 8.0), 1e-5)


def fused_in_tiles(*arguments, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "norm_block_launch", lambda *_: None)
        patch.setattr(kernels, "norm_block_backward_launch", lambda *_: None)
        patch.setattr(kernels, "tiled_launch", lambda *_: {"BLOCK_P": 8, "BLOCK_C": 16, "num_warps": 4})
        return fused("triton", *arguments, **options)


@given(
    shape=st.tuples(st.just(2), st.integers(1, 20), st.integers(2, 7), st.integers(2, 6)),
    powers=st.tuples(st.sampled_from([None, 4.0]), st.sampled_from([None, 2.5])),
    norm=st.sampled_from(NORMS),
    magnitude=st.sampled_from([1e-12, 1.0, 1e12]),
)
@settings(max_examples=8)
def test_the_successor_gives_the_same_in_small_tiles(shape, powers, norm, magnitude, device):
    """Planes of several tiles, samples of several rows, and both again where powers would leave the range."""
    x, weight, bias = draw(shape, device)
    weight, bias = magnitude * weight, magnitude * bias
    expected = exact(x, weight, bias, *powers, norm=norm)
    quads = -(-shape[2] // 2) * -(-shape[3] // 2)
    with pytest.MonkeyPatch.context() as patch:
        launch = {"TILES": -(-quads // 2) if norm == "instance" else 2, "BLOCK_Q": 2, "BLOCK_C": 8, "num_warps": 1}
        patch.setattr(successors, "norm_launch", lambda *_: launch)
        assert_equal(fused("successor", x, weight, bias, *powers, norm=norm), expected)


@pytest.mark.parametrize(("backend", "norm"), FUSED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_costs_at_most_twice_what_it_costs_unfused(backend, norm, dtype, place):
    x, weight, bias = draw((3, 24, 12, 12), place, dtype)
    expected = exact(x, weight, bias, norm=norm)
    plain = run(lambda x: reference.norm_block(x, weight, bias, 1e-5, 4.0, 4.0, norm), x)
    actual = fused(backend, x, weight.float(), bias.float(), norm=norm)
    for got, unfused, wanted in zip(actual, plain, expected, strict=True):
        assert (got - wanted).norm() <= 2 * (unfused - wanted).norm() + 1e-6 * wanted.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", [1.0, 16.0])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
def test_maps_are_accurate_at_every_magnitude(backend, power, magnitude, place):
    x, weight, bias = draw((2, 8, 12, 12), place, torch.float32)
    x[0, :, 3, 5] += 1e3  # one outlier: the others lie near 1/16 of it after the norm
    scaled = fused(backend, x, magnitude * weight, magnitude * bias, power, power)
    assert all(value.isfinite().all() for value in scaled)
    assert_equal(scaled, exact(x, magnitude * weight, magnitude * bias, power, power), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("magnitude", [1e-12, 1e12])
def test_powers_that_would_leave_the_range_are_scaled(magnitude, backend, place):
    """(1e12)^8 is beyond float32, (1e-12)^8 below it: the maps are of the features over their peak then."""
    x, weight, bias = draw((3, 8, 6, 6), place, torch.float32)
    weight, bias = magnitude * weight, magnitude * bias
    assert_equal(fused(backend, x, weight, bias, 8.0, 4.0), exact(x, weight, bias, 8.0, 4.0), 2e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_planes_and_zero_samples(backend, norm, place):
    dtype, tolerance = PRECISE[backend]
    x, weight, bias = draw((3, 6, 8, 8), place, dtype)
    x[:, 2] = 7.0  # zero variance: the feature is max(shift, 0)
    x[1] = 7.0
    bias[:3], bias[3:] = 0.5, -0.5
    assert_equal(fused(backend, x, weight, bias, norm=norm), exact(x, weight, bias, norm=norm), tolerance)
    silent = fused(backend, x, weight * 0, -bias.abs(), norm=norm)
    assert all((value == 0).all() for value in silent)


@pytest.mark.parametrize("backend", GPU)
def test_batch_statistics_are_accurate_far_from_zero(backend, device):
    x, weight, bias = draw((4, 6, 16, 16), device, torch.float32)
    x += torch.linspace(-300, 300, 6, device=device).view(1, 6, 1, 1)
    assert_equal(fused(backend, x, weight, bias, norm="batch"), exact(x, weight, bias, norm="batch"), 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend, place):
    x, weight, bias = draw((2, 4, 8, 8), place, torch.float32)
    x[0, 1, 0, 0] = torch.nan
    pooled, maps, _ = fused(backend, x, weight, bias)
    assert pooled[0, 1].isnan().all() and maps[0].isnan().any()
    assert pooled[1].isfinite().all() and maps[1].isfinite().all()
    pooled, _, _ = fused(backend, x, weight, bias, norm="batch")
    assert pooled[:, 1].isnan().all() and pooled[:, 2:].isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients_without_stride(backend, norm, place):
    dtype, tolerance = PRECISE[backend]
    x, weight, bias = draw((2, 6, 10, 12), place, dtype)
    sliced = x[:, ::2, 1:9, ::2], weight[::2], bias[::2]
    assert_equal(fused(backend, *sliced, norm=norm), exact(*sliced, norm=norm), tolerance)

    gradients = []
    for name in (backend, "reference"):
        leaf = x.detach().requires_grad_()
        with entered(name):
            block = norm_block(leaf, weight, bias, norm=norm)
        (block.pooled.sum() + block.maps.sum()).backward()
        gradients.append(leaf.grad)
    assert_equal(gradients[:1], gradients[1:], tolerance)


@pytest.mark.parametrize(("backend", "norm"), FUSED)
@pytest.mark.parametrize("used", ["pooled", "maps"])
def test_an_output_that_is_not_used_has_no_gradient(backend, norm, used, place):
    dtype, tolerance = PRECISE[backend]
    x, weight, bias = draw((2, 6, 8, 8), place, dtype)
    gradients = []
    for name in (backend, "reference"):
        leaf = x.detach().requires_grad_()
        with entered(name):
            getattr(norm_block(leaf, weight, bias, norm=norm), used).cumsum(1).sum().backward()
        gradients.append(leaf.grad)
    assert_equal(gradients[:1], gradients[1:], tolerance)


@pytest.mark.parametrize(("backend", "norm"), FUSED)
def test_layout_is_kept_and_bits_repeat(backend, norm, place):
    for channels_last, layout in ((True, torch.channels_last), (False, torch.contiguous_format)):
        x, weight, bias = draw((2, 8, 8, 8), place, torch.float32, channels_last)
        first, second = (fused(backend, x, weight, bias, norm=norm) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with entered(backend):
            assert norm_block(x, weight, bias, norm=norm).pooled.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend, norm, place):
    x, weight, bias = draw((0, 4, 8, 8), place, torch.float32)
    pooled, maps, gradient = fused(backend, x, weight, bias, norm=norm)
    assert pooled.shape == (0, 4, 4, 4) and maps.shape == (0, 68) and gradient.shape == x.shape


@pytest.mark.parametrize(("backend", "norm"), FUSED)
def test_only_the_gradient_keeps_anything(backend, norm, place):
    x, weight, bias = draw((2, 16, 16, 16), place, torch.float32)
    kept = []
    with entered(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_block(x, weight, bias, norm=norm)
        with torch.no_grad():
            norm_block(x.requires_grad_(), weight, bias, norm=norm)
        assert not kept
        norm_block(x, weight, bias, norm=norm)
    assert sum(t.numel() * t.element_size() for t in kept) <= 1.1 * x.numel() * x.element_size()


@pytest.mark.parametrize(("backend", "norm"), FUSED)
def test_operator_passes_opcheck_and_compiles_as_one_graph(backend, norm, place):
    x, weight, bias = draw((2, 4, 8, 8), place, torch.float32)
    torch.library.opcheck(
        norm_block_op, (x.requires_grad_(), weight, bias, 1e-5, 4.0, None, norm, IMPLEMENTATIONS[backend])
    )

    def loss(x):
        pooled, maps = norm_block(x, weight, bias, norm=norm)
        return pooled.square().sum() + maps.square().cumsum(1).sum()

    with entered(backend):
        expected = torch.autograd.grad(loss(x), x)
        actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("backend", "norm"), FUSED)
def test_a_second_derivative_is_refused(backend, norm, place):
    x, weight, bias = draw((1, 4, 8, 8), place, torch.float32)
    with entered(backend):
        maps = norm_block(x.requires_grad_(), weight, bias, norm=norm).maps
    (gradient,) = torch.autograd.grad(maps.cumsum(1).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", GPU)
def test_a_forward_mode_derivative_is_refused(backend, device):
    x, weight, bias = draw((1, 4, 8, 8), device)
    refused = pytest.raises(
        NotImplementedError, match="norm_block has no forward-mode derivative .*backend\\('reference'\\)"
    )
    with entered(backend), refused:
        torch.func.jvp(lambda x: norm_block(x, weight, bias).maps, (x,), (x,))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 8, 8), {}, r"\[B, C, H, W\]"),
        ((2, 4, 1, 8), {}, "at least 2"),
        ((2, 0, 8, 8), {}, "C at least 1"),
        ((2, 4, 8, 8), {"spatial_power": 0.5}, r"spatial_power must be in \[1, 16\] or None; got 0.5"),
        ((2, 4, 8, 8), {"channel_power": 17}, r"channel_power must be in \[1, 16\] or None; got 17"),
        ((2, 4, 8, 8), {"norm": "group"}, "norm must be one of instance, batch; got 'group'"),
        ((2, 4, 8, 8), {"weight": torch.ones(4)}, "together"),
        ((2, 4, 8, 8), {"weight": torch.ones(3), "bias": torch.ones(4)}, r"weight must be \[4\]; got \(3,\)"),
        ((2, 4, 8, 8), {"weight": torch.ones(4, requires_grad=True), "bias": torch.ones(4)}, "weight requires a grad"),
    ],
)
def test_bad_input_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        norm_block(torch.zeros(shape), **options)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int64"):
        norm_block(torch.zeros((1, 2, 4, 4), dtype=torch.int64))


def launches_of(shape, dtype=torch.float32, channels_last=True, norm="instance", backend="triton"):
    """Return the launches of forward and backward for x of this shape, without running them."""
    x, weight, bias = draw(shape, "cpu", dtype, channels_last)
    with recorded(kernels, successors) as launches, entered(backend):
        block = norm_block(x.requires_grad_(), weight.float(), bias.float(), norm=norm)
        torch.autograd.backward(list(block), [torch.empty_like(output) for output in block])
    return launches


STREAMING = [
    ((1, 128, 32, 32), torch.float32, False),
    ((1, 128, 32, 32), torch.float32, True),
    ((1, 128, 16, 16), torch.float32, True),
    ((1, 128, 16, 16), torch.bfloat16, True),
    ((1, 128, 8, 8), torch.float32, True),
]
COMPILED = [(*STREAMING[0], 90), (*STREAMING[1], 86), (*STREAMING[3], 90), (*STREAMING[4], 86)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is launched is recorded through the interpreter")
@pytest.mark.parametrize(("shape", "dtype", "channels_last", "capability"), COMPILED)
def test_kernels_fit_registers_and_access_128_bits(shape, dtype, channels_last, capability):
    for launch in launches_of(shape, dtype, channels_last):
        report = compile_launch(launch, capability)
        check_report(report, capability, launch.kernel)
        if launch.kernel != "map_weights_kernel":
            assert report.widest_load == report.widest_store == 128, launch.kernel


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is launched is recorded through the interpreter")
@pytest.mark.parametrize(("shape", "dtype", "channels_last"), STREAMING)
def test_bytes_are_at_most_a_quarter_above_the_roofline(shape, dtype, channels_last):
    shape = (4, *shape[1:])
    forward, *backward = launches_of(shape, dtype, channels_last)
    size = *shape, dtype.itemsize, True
    assert forward.bytes <= 1.25 * norm_block_bytes(*size, backward=False)
    assert sum(launch.bytes for launch in backward) <= 1.25 * norm_block_bytes(*size, backward=True)
    # BatchNorm's sums are of the batch: everything is read once more, but the gradient is written once.
    forward, *backward = launches_of(shape, dtype, channels_last, "batch")
    assert forward.bytes <= 1.25 * norm_block_bytes(*size, backward=False)
    gradient = math.prod(shape) * dtype.itemsize
    assert sum(launch.bytes for launch in backward) <= 1.25 * (2 * norm_block_bytes(*size, backward=True) - gradient)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is launched is recorded through the interpreter")
@pytest.mark.parametrize(("dtype", "capability"), [(torch.float32, 90)])
def test_kernels_of_batch_norm_fit_registers_and_read_128_bits(dtype, capability):
    for launch in launches_of((1, 128, 16, 16), dtype, norm="batch"):
        report = compile_launch(launch, capability)
        check_report(report, capability, launch.kernel)
        assert report.widest_load == 128, launch.kernel
        if launch.arguments.get("SUMS") != "write":
            assert report.widest_store == 128, launch.kernel


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is launched is recorded through the interpreter")
@pytest.mark.parametrize(
    ("shape", "channels_last", "norm"),
    [
        ((1, 64, 31, 33), False, "instance"),
        ((1, 128, 128, 128), True, "batch"),
        ((1, 128, 224, 224), True, "instance"),
        ((1, 128, 7, 7), True, "instance"),  # the last block of 224x224
    ],
)
def test_tiled_and_odd_planes_do_not_spill(shape, channels_last, norm):
    for launch in launches_of(shape, channels_last=channels_last, norm=norm):
        check_report(compile_launch(launch, 86), 86, launch.kernel)


SUCCESSORS = [  # shape, dtype, norm, chip, and the most instructions per value forward and backward, if counted
    ((1, 128, 16, 16), torch.float16, "instance", 90, 16, 21),
    ((1, 128, 8, 8), torch.bfloat16, "instance", 90, 16, 21),
    ((1, 128, 16, 16), torch.float32, "instance", 86, 17, 21),
    ((1, 128, 32, 32), torch.bfloat16, "instance", 86, None, None),
    ((1, 128, 16, 16), torch.float16, "batch", 90, None, None),
    ((1, 64, 31, 33), torch.float32, "instance", 75, None, None),
    ((1, 128, 128, 128), torch.float32, "batch", 120, None, None),
    ((1, 128, 128, 128), torch.float32, "instance", 90, None, None),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is launched is recorded through the interpreter")
@pytest.mark.parametrize(("shape", "dtype", "norm", "capability", "forward", "backward"), SUCCESSORS)
def test_successors_fit_registers_and_execute_few_instructions(shape, dtype, norm, capability, forward, backward):
    for launch in launches_of(shape, dtype, norm=norm, backend="successor"):
        report = compile_launch(launch, capability)
        check_report(report, capability, launch.kernel)
        given = launch.arguments
        exact = given.get("EXACT", False)
        if launch.kernel in ("apply_kernel", "gradient_kernel", "statistics_kernel") and exact:
            assert report.widest_load == 128, launch.kernel
        if launch.kernel == "apply_kernel" and exact or given.get("p_grad_x") is not None and exact:
            assert report.widest_store == 128, launch.kernel
        most = {"apply_kernel": forward, "gradient_kernel": backward}.get(launch.kernel)
        if most:  # without a loop: the plane is one tile
            assert given["TILES"] == 1
            assert report.instructions * 32 * launch.options["num_warps"] <= most * math.prod(
                (4, given["BLOCK_Q"], given["BLOCK_C"])
            )


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is launched is recorded through the interpreter")
@pytest.mark.parametrize("shape, dtype", [((4, 128, 16, 16), torch.float32), ((4, 128, 16, 16), torch.bfloat16)])
def test_successors_move_few_bytes(shape, dtype):
    """The input is read once more where the statistics are the batch's, and for the last pass backward there."""
    size = *shape, dtype.itemsize, True
    values = math.prod(shape) * dtype.itemsize
    for norm, walks in (("instance", 0), ("batch", 1)):
        launches = launches_of(shape, dtype, norm=norm, backend="successor")
        names = [launch.kernel for launch in launches]
        forward = sum(launch.bytes for launch in launches[: names.index("maps_kernel")])
        assert forward <= 1.25 * norm_block_bytes(*size, backward=False) + walks * values
        backward = sum(launch.bytes for launch in launches[names.index("maps_kernel") + 1 :])
        assert backward <= 1.25 * ((1 + walks) * norm_block_bytes(*size, backward=True) - walks * values)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_full_size_on_a_gpu(size, dtype, channels_last, norm, backend, device):
    x, weight, bias = draw((64, 128, size, size), device, dtype, channels_last)
    tolerance = 3e-3 if dtype == torch.bfloat16 else 1e-6
    *outputs, gradient = fused(backend, x, weight.float(), bias.float(), norm=norm)
    *wanted_outputs, wanted = exact(x, weight, bias, norm=norm)
    assert_equal(outputs, wanted_outputs, tolerance)
    if dtype == torch.float32:
        # Of millions of values a few lie within rounding of ReLU's kink, and their gradients are there or not.
        apart = (gradient - wanted).abs() > 0.01 * wanted.square().mean().sqrt()
        assert apart.sum() <= 2 + 1e-6 * x.numel()
        gradient = gradient.where(~apart, wanted)
    assert_equal([gradient], [wanted], 3 * tolerance)
