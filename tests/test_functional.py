"""Attention maps and matching losses: equal to the float64 equations for any shape, stride, dtype, power and scale."""

import contextlib
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atom_fast as af
from atom_fast import reference
from atom_fast.ops import attention as attention_ops
from atom_fast.ops.launching import KERNELS

BACKENDS = ("triton", "successor", "torch")  # successor: of the kernels for a GPU, see KERNELS
IMPLEMENTATION = {"triton": "triton", "successor": "successor", "torch": "c"}  # of the operator
# Relative error of the whole result: rounding of the accumulation dtype, times a few dozen operations.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
# The gradient is stored in the input's dtype, so at least its rounding remains.
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

powers = st.sampled_from([1.0, 2.0, 4.0, 8.0, 1.5, 3.0, 6.7, 16.0])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
layouts = st.sampled_from(["contiguous", "channels_last", "sliced", "expanded"])


@contextlib.contextmanager
def backend(name):
    """Run with one of BACKENDS."""
    with pytest.MonkeyPatch.context() as patch, af.backend("triton" if name == "successor" else name):
        patch.setitem(KERNELS, "attention", "successor" if name == "successor" else "measured")
        yield


def relative_error(result, expected):
    expected = expected.double()
    return ((result.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def in_layout(values, layout):
    """The same values with other strides, never made contiguous again."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        batch, channels, height, width = values.shape
        wide = values.new_full((batch, channels + 1, height + 2, 2 * width), float("nan"))
        view = wide[:, 1:, 1 : height + 1, ::2]
        view.copy_(values)
        return view
    if layout == "expanded":
        return values[:1].expand_as(values)
    return values.contiguous()


@st.composite
def features(draw, dtype=dtypes):
    dtype = draw(dtype)
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)))
    exponents = {torch.float16: (-2, 4), torch.bfloat16: (-6, 6)}.get(dtype, (-6, 6))
    magnitude = 10.0 ** draw(st.integers(*exponents))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        values = values.relu()
    if draw(st.booleans()):
        values[0] = 0.0  # a sample that is exactly zero
    return in_layout((values * magnitude).to(dtype), draw(layouts))


@settings(max_examples=20)
@given(f=features(), power=powers, normalize=st.booleans(), spatial=st.booleans())
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_equals_the_float64_equation(name, f, power, normalize, spatial, device):
    if not normalize and f.double().abs().max() ** power > 1e30:
        power = 1.0  # |f|^p itself leaves float32 here, whatever the implementation
    public, equation = (
        (af.spatial_attention, reference.spatial_attention)
        if spatial
        else (af.channel_attention, reference.channel_attention)
    )
    wide = f.double().requires_grad_()
    expected = equation(wide, power, normalize)
    f = f.to(device).detach().requires_grad_()
    with backend(name):
        result = public(f, power, normalize)
        weight = torch.linspace(-1, 1, result.numel(), dtype=result.dtype, device=device).view_as(result)
        (gradient,) = torch.autograd.grad((result * weight).sum(), f)
    (expected_gradient,) = torch.autograd.grad((expected * weight.cpu()).sum(), wide)
    assert result.dtype == attention_ops.accumulation_dtype(f.dtype)
    assert relative_error(result.cpu(), expected) < TOLERANCE[f.dtype]
    assert gradient.dtype == f.dtype
    constant = normalize and result.shape[1] == 1  # its gradient is the rounding of a difference of equal numbers
    if not constant and expected_gradient.abs().max() < torch.finfo(f.dtype).max / 10:
        # Gradients below the dtype's smallest normal number are lost to its format, not to the arithmetic.
        floor = expected_gradient.numel() ** 0.5 * torch.finfo(f.dtype).tiny
        error = (gradient.cpu().double() - expected_gradient).norm()
        assert error <= GRADIENT_TOLERANCE[f.dtype] * expected_gradient.norm() + floor


@settings(max_examples=12)
@given(
    real=features(st.just(torch.float32)),
    seed=st.integers(0, 1000),
    spatial_power=st.none() | powers,
    channel_power=powers,
    classes=st.integers(1, 4),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_loss_equals_the_float64_equation(name, real, seed, spatial_power, channel_power, classes, device):
    generator = torch.Generator().manual_seed(seed)
    real = real.repeat(2, 1, 1, 1)
    synthetic = torch.randn(5, *real.shape[1:], generator=generator)
    ids = torch.randperm(100, generator=generator)[:classes]  # labels are names, not indices
    real_labels = ids[torch.cat([torch.arange(classes), torch.randint(classes, (len(real),), generator=generator)])]
    real_labels = real_labels[torch.randperm(len(real_labels), generator=generator)][: len(real)]
    synthetic_labels = ids[torch.randint(classes, (5,), generator=generator)]
    common = set(real_labels.tolist()) & set(synthetic_labels.tolist())
    if not common:
        return
    keep = torch.tensor([label.item() in common for label in real_labels])
    real, real_labels = real[keep], real_labels[keep]
    keep = torch.tensor([label.item() in common for label in synthetic_labels])
    synthetic, synthetic_labels = synthetic[keep], synthetic_labels[keep]

    wide = synthetic.double().requires_grad_()
    expected = reference.attention_matching_loss(
        real.double(), wide, spatial_power, channel_power, real_labels, synthetic_labels
    )
    (expected_gradient,) = torch.autograd.grad(expected, wide)
    synthetic = synthetic.to(device).requires_grad_()
    with backend(name):
        loss = af.attention_matching_loss(
            real.to(device),
            synthetic,
            spatial_power=spatial_power,
            channel_power=channel_power,
            real_labels=real_labels.to(device),
            synthetic_labels=synthetic_labels.to(device),
        )
        (gradient,) = torch.autograd.grad(loss, synthetic)
    # The loss is a difference of means of unit vectors: its rounding is absolute, not relative.
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item() + 1e-10
    assert (gradient.cpu().double() - expected_gradient).norm() < 1e-4 * expected_gradient.norm() + 1e-6


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 131, 3, 5), (2, 3, 67, 61)])
@pytest.mark.parametrize("power", [(4.0, 4.0), (2.5, 1.0)])
def test_tiles_that_do_not_divide_the_shape(name, shape, power, device):
    f = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = f.clone().requires_grad_()
    expected = reference.attention_matching_loss(f.flip(0) + 1, wide, *power)
    f = f.to(device).requires_grad_()
    with backend(name):
        loss = af.attention_matching_loss(f.detach().flip(0) + 1, f, spatial_power=power[0], channel_power=power[1])
        (gradient,) = torch.autograd.grad(loss, f)
    (expected_gradient,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_channel_whose_maximum_comes_late_rescales_what_was_added(name, device):
    """The running maximum grows chunk by chunk: 1e-6 first, 1e6 last, and both ends must stay exact."""
    scale = torch.logspace(-6, 6, 300, dtype=torch.float64).view(1, 300, 1, 1)
    f = (torch.rand(2, 300, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5) * scale
    with backend(name):
        for power in (1.0, 4.0, 16.0):
            result = af.spatial_attention(f.float().to(device), power)
            assert relative_error(result.cpu(), reference.spatial_attention(f.float().double(), power)) < 1e-5
            result = af.channel_attention(f.float().to(device), power)
            assert relative_error(result.cpu(), reference.channel_attention(f.float().double(), power)) < 1e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_half_precision_does_not_overflow_where_its_fourth_power_does(name, device):
    f = torch.full((1, 2, 2, 2), 60000.0, dtype=torch.float16, device=device).requires_grad_()
    with backend(name):
        attention = af.spatial_attention(f, 16.0)
        attention.square().sum().backward()
    torch.testing.assert_close(attention.cpu(), torch.full((1, 4), 0.5))
    assert f.grad.isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("powers", "scale"), [((8.0, 3.0), 1e6), ((2.5, 8.0), 1e-6), ((16.0, None), 1e6)])
def test_samples_out_of_range_beside_samples_within(name, powers, scale, layout, device):
    """Several tiles in both directions, of which none is full at the end."""
    f = torch.randn(3, 150, 9, 15, generator=torch.Generator().manual_seed(0))
    f[1] *= scale
    f = in_layout(f, layout)
    with backend(name):
        maps, statistics = attention_ops.attention_maps_op(f.to(device), *powers, True, IMPLEMENTATION[name])
        gradient = torch.linspace(-1, 1, maps.numel()).view_as(maps).to(device)
        result = attention_ops.attention_maps_backward(
            f.to(device), gradient, maps, statistics, *powers, True, IMPLEMENTATION[name]
        )
    wide = f.double().requires_grad_()
    expected = reference.attention_maps(wide, *powers, True)
    (expected_gradient,) = torch.autograd.grad((expected * gradient.cpu()).sum(), wide)
    for sample in range(3):
        assert relative_error(maps[sample].cpu(), expected[sample].detach()) < 1e-5
        assert relative_error(result[sample].cpu(), expected_gradient[sample]) < 2e-5
    if name != "triton":
        assert statistics[0].cpu().tolist() == [1, f[1].abs().max(), 1]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("powers", [(4.0, 4.0), (1.0, 2.5)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_seen_in_its_sample_and_in_no_other(name, powers, value, device):
    f = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    clean = f.clone()
    f[1, 2, 3, 1] = value
    with backend(name):
        f, clean = f.to(device).requires_grad_(), clean.to(device).requires_grad_()
        maps, expected = (attention_ops.attention_maps(x, *powers) for x in (f, clean))
        maps[:, ::2].sum().backward()
        expected[:, ::2].sum().backward()
    for result, wanted in ((maps, expected), (f.grad, clean.grad)):
        assert result[1].isnan().any()
        assert torch.equal(result[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("name", BACKENDS)
def test_same_input_same_bits(name, device):
    f = torch.randn(3, 40, 9, 9, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    labels = torch.tensor([2, 0, 2], device=device)

    def run():
        with backend(name):
            loss = af.attention_matching_loss(
                f.detach() + 1, f, real_labels=labels, synthetic_labels=labels.flip(0), spatial_power=3.0
            )
            return loss.detach(), torch.autograd.grad(loss, f)[0]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_offsets_beyond_32_bits(name, device):
    """Two samples 2^31 elements apart in one storage, of which only a few pages are ever touched."""
    apart = 2**31 + 64
    if device.type == "cpu":
        storage = torch.from_numpy(np.zeros(apart + 16, dtype=np.float16))  # pages that nobody writes cost nothing
    else:
        storage = torch.zeros(apart + 16, dtype=torch.float16, device=device)
    f = storage.as_strided((2, 2, 2, 2), (apart, 4, 2, 1))
    f.copy_(torch.arange(16.0).view(2, 2, 2, 2))
    expected = reference.spatial_attention(torch.arange(16.0, dtype=torch.float64).view(2, 2, 2, 2), 4.0)
    with backend(name):
        assert relative_error(af.spatial_attention(f, 4.0).cpu(), expected) < 1e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_gradcheck(name, device):
    f = torch.randn(2, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    real = f.flip(0) * 2 + 1
    f.requires_grad_()
    for power in ((4.0, 3.0), (None, 1.0)):
        with backend(name):
            assert torch.autograd.gradcheck(
                lambda x, p=power: af.attention_matching_loss(real, x, spatial_power=p[0], channel_power=p[1]), (f,)
            )


@pytest.mark.parametrize("name", BACKENDS)
def test_operators_are_registered_as_pytorch_asks(name, device):
    implementation = IMPLEMENTATION[name]
    f = torch.randn(3, 5, 4, 3, device=device, requires_grad=True)
    torch.library.opcheck(attention_ops.attention_maps_op, (f, 4.0, 1.5, True, implementation))
    maps, statistics = attention_ops.attention_maps_op(f.detach(), 4.0, None, True, implementation)
    torch.library.opcheck(
        attention_ops.attention_maps_backward, (f.detach(), maps * 2, maps, statistics, 4.0, None, True, implementation)
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_into_one_graph(name, device):
    real = torch.randn(4, 3, 5, 5, device=device)
    labels = torch.tensor([0, 1, 1, 0], device=device)

    def loss(f):
        return 2 * af.attention_matching_loss(real, f, real_labels=labels, synthetic_labels=labels)

    f = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    with backend(name):
        (expected,) = torch.autograd.grad(loss(f), f)
        (gradient,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(f), f)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_vmap_of_maps_and_of_gradients(name, device):
    f = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    with backend(name):
        torch.testing.assert_close(torch.vmap(lambda f: af.channel_attention(f[None])[0])(f), af.channel_attention(f))
        f.requires_grad_()
        (sums,) = torch.autograd.grad(af.channel_attention(f)[:, 0].sum(), f)
        (each,) = torch.autograd.grad(
            af.channel_attention(f)[:, 0], f, torch.eye(2, device=device), is_grads_batched=True
        )
    torch.testing.assert_close(each.sum(0), sums)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_second_derivative_is_refused(name, device):
    f = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    with backend(name):
        for loss in (
            af.spatial_attention(f, 4.0)[:, 0].sum(),
            af.attention_matching_loss(f.detach() + 1, f),
        ):
            (gradient,) = torch.autograd.grad(loss, f, create_graph=True)
            with pytest.raises(RuntimeError, match="no autograd formula|differentiate twice|does not require grad"):
                torch.autograd.grad(gradient.square().sum(), f)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_forward_mode_derivative_is_refused_and_never_zero(name, device):
    real, f = torch.randn(2, 3, 2, 2, device=device), torch.randn(2, 3, 2, 2, device=device)
    for function in (af.spatial_attention, lambda f: af.ATOMLoss()([real], [f])):
        with backend(name), pytest.raises(
            NotImplementedError, match=r"no forward-mode derivative .*backend\('reference'\)"
        ):  # fmt: skip
            torch.func.jacfwd(function)(f)
        with backend(name), pytest.raises(RuntimeError):  # forward over reverse: refused by PyTorch
            torch.func.hessian(lambda f, function=function: function(f).sum())(f)
        with af.backend("reference"):
            assert torch.func.jacfwd(function)(f).abs().sum() > 0


def test_a_power_may_be_a_number_of_numpy():
    f = torch.randn(2, 3, 4, 4)
    assert torch.equal(af.spatial_attention(f, np.int64(2)), af.spatial_attention(f, 2))
    assert torch.equal(af.channel_attention(f, np.float32(1.5)), af.channel_attention(f, 1.5))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", (*BACKENDS, "reference"))
@pytest.mark.parametrize("power", (1.0, 4.0))
def test_a_sample_of_subnormal_numbers_counts_as_zero_and_hides_no_other(power, name, dtype, device):
    features = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features[1] *= torch.finfo(dtype).tiny / 100 / features[1].abs().max()
    features = features.to(device, dtype).requires_grad_()
    assert features[1].any()
    with backend(name):
        maps = af.spatial_attention(features, power), af.channel_attention(features, power)
        (gradient,) = torch.autograd.grad([attention.sum() for attention in maps], features)
    for attention in maps:
        assert attention[1].abs().max() < 1e-30
        torch.testing.assert_close(attention[[0, 2]].norm(dim=1), torch.ones(2, device=device).to(attention))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", (*BACKENDS, "reference"))
def test_empty_batches_and_empty_planes(name, device):
    with backend(name):
        for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
            f = torch.zeros(shape, device=device, requires_grad=True)
            attention = af.spatial_attention(f)
            assert attention.shape == (shape[0], shape[2] * shape[3])
            assert not attention.any()
            attention.sum().backward()
            assert f.grad.shape == shape
        empty = torch.zeros(0, 3, 4, 4, device=device, requires_grad=True)
        assert af.attention_matching_loss(empty.detach(), empty).item() == 0
        with pytest.raises(ValueError, match="2 real and 0 synthetic"):
            af.attention_matching_loss(torch.zeros(2, 3, 4, 4, device=device), empty)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_gradient_reaches_the_real_side_and_nothing_is_saved_for_it(name, device):
    real = torch.randn(4, 3, 8, 8, device=device, requires_grad=True)
    synthetic = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    saved = []
    with backend(name), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = af.attention_matching_loss(real, synthetic)
    loss.backward()
    assert real.grad is None
    assert all(t.untyped_storage().data_ptr() != real.untyped_storage().data_ptr() for t in saved)
    kept = sum(t.numel() for t in saved if t.data_ptr() != synthetic.data_ptr())
    assert kept < synthetic.numel()  # maps and statistics only, no copy of the features


@pytest.mark.parametrize("name", BACKENDS)
def test_groups_made_once_equal_labels_given_each_time(name, device):
    real, synthetic = torch.randn(6, 4, 3, 3, device=device), torch.randn(4, 4, 3, 3, device=device)
    real_labels = torch.tensor([7, 1, 1, 7, 7, 1], device=device)
    synthetic_labels = torch.tensor([1, 1, 7, 1], device=device)
    groups = af.class_groups(real_labels, synthetic_labels)
    with backend(name):
        with_labels = af.attention_matching_loss(
            real, synthetic, real_labels=real_labels, synthetic_labels=synthetic_labels
        )
        assert torch.equal(with_labels, af.attention_matching_loss(real, synthetic, groups=groups))
        maps = [torch.cat([af.spatial_attention(f), af.channel_attention(f)], 1) for f in (real, synthetic)]
        torch.testing.assert_close(af.attention_matching_from_maps(*maps, groups=groups), with_labels)
        fewer = groups.of_classes(2)
        assert len(fewer.real_offsets) == len(fewer.synthetic_offsets) == 3
        torch.testing.assert_close(af.attention_matching_loss(real, synthetic, groups=fewer), with_labels)


def test_the_reference_backend_is_the_equations(device):
    f = torch.randn(3, 4, 5, 5, device=device)
    with af.backend("reference"):
        assert torch.equal(af.spatial_attention(f, 4.0), reference.spatial_attention(f, 4.0))
        labels = torch.tensor([0, 1, 0], device=device)
        groups = af.class_groups(labels, labels)
        torch.testing.assert_close(
            af.attention_matching_loss(f, f + 1, groups=groups),
            reference.attention_matching_loss(f, f + 1, 4.0, 4.0, labels, labels),
        )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, y: af.spatial_attention(f[0]), ValueError, r"\[B, C, H, W\]; got 3 dimensions"),
        (lambda f, y: af.spatial_attention(f.long()), TypeError, "got torch.int64"),
        (lambda f, y: af.spatial_attention(None), TypeError, "got NoneType"),
        (lambda f, y: af.spatial_attention(f, 0.5), ValueError, r"power must be a number in \[1, 16\]; got 0.5"),
        (lambda f, y: af.ATOMLoss(mmd_weight=None), ValueError, "mmd_weight must be a finite number .* got None"),
        (lambda f, y: af.channel_attention(f, 17), ValueError, "got 17"),
        (lambda f, y: af.channel_attention(f, None), ValueError, "got None"),
        (lambda f, y: af.spatial_attention(f, float("nan")), ValueError, "got nan"),
        (lambda f, y: af.attention_matching_loss(f, f, spatial_power="4"), ValueError, "spatial_power .* got '4'"),
        (lambda f, y: af.attention_matching_loss(f, f[:, :2]), ValueError, r"\(4, 3, 5, 5\) and \(4, 2, 5, 5\)"),
        (lambda f, y: af.attention_matching_loss(f, f, real_labels=y), ValueError, "got only real_labels"),
        (
            lambda f, y: af.attention_matching_loss(f, f, real_labels=y.int(), synthetic_labels=y),
            TypeError,
            "real_labels must be an int64 tensor; got torch.int32",
        ),
        (
            lambda f, y: af.attention_matching_loss(f, f, real_labels=y, synthetic_labels=y[:3]),
            ValueError,
            r"synthetic_labels must be \[4\]",
        ),
        (
            lambda f, y: af.attention_matching_loss(f, f, real_labels=y, synthetic_labels=y * 3),
            ValueError,
            r"only on the real side: \[1\], only on the synthetic side: \[3\]",
        ),
        (
            lambda f, y: af.attention_matching_loss(f[:3], f, groups=af.class_groups(y, y)),
            ValueError,
            "made for 4 real and 4 synthetic samples; got 3 and 4",
        ),
        (lambda f, y: af.class_groups(y[None], y), ValueError, "one-dimensional"),
    ],
)
def test_bad_input_is_named(call, error, message, device):
    f = torch.randn(4, 3, 5, 5, device=device)
    with pytest.raises(error, match=message):
        call(f, torch.tensor([0, 1, 1, 0], device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_size_on_the_gpu(memory_format, dtype):
    f = torch.randn(130, 128, 32, 32, device="cuda").to(dtype).contiguous(memory_format=memory_format)
    real = torch.randn(70, 128, 32, 32, device="cuda").to(dtype)
    wide = f.double().requires_grad_()
    expected = reference.attention_matching_loss(real.double(), wide, 4.0, 4.0)
    (expected_gradient,) = torch.autograd.grad(expected, wide)
    f.requires_grad_()
    loss = af.attention_matching_loss(real, f)
    (gradient,) = torch.autograd.grad(loss, f)
    assert abs(loss.item() / expected.item() - 1) < 1e-5
    assert relative_error(gradient, expected_gradient) < GRADIENT_TOLERANCE[dtype]
    assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements_on_the_gpu():
    f = torch.ones(2, dtype=torch.float16, device="cuda").view(2, 1, 1, 1).expand(2, 1, 1, 1)
    f = torch.cat([f.expand(2, 8, 4096, 4096)] * 9)  # 2.4e9 elements, 4.8 GB
    f[-1, :, 0, 0] = 2
    attention = af.spatial_attention(f, 4.0)
    assert attention.shape == (18, 4096 * 4096)
    torch.testing.assert_close(attention[-1, 0] / attention[-1, 1], torch.tensor(16.0, device="cuda"))
    torch.testing.assert_close(attention[0].norm(), torch.tensor(1.0, device="cuda"), rtol=1e-3, atol=0)


def _seconds_of_both_backends():
    """Processor time of one thread, best of up to 20 in turns: what else the machine is doing hardly counts."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(24, 128, 32, 32, generator=generator).relu_()
    synthetic = torch.randn(24, 128, 32, 32, generator=generator).relu_().requires_grad_()

    def seconds(name):
        start = time.process_time()
        with backend(name):
            torch.autograd.grad(af.attention_matching_loss(real, synthetic), synthetic)
        return time.process_time() - start

    eager = lean = float("inf")
    for round in range(20):
        eager, lean = min(eager, seconds("reference")), min(lean, seconds("torch"))
        if round >= 2 and eager / lean > 5:
            break
    return eager, lean


def test_the_torch_backend_is_five_times_faster_than_the_equations():
    # In a fresh process: where the C library keeps what is freed, the equations take less time.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        eager, lean = pool.submit(_seconds_of_both_backends).result()
    assert eager / lean > 5
