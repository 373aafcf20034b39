"""InstanceNorm with ReLU and pooling: equal to PyTorch's own operators in float64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from atom_fast import reference
from atom_fast.kernels import norm as successors
from atom_fast.kernels.instance_norm import instance_norm_launch
from atom_fast.ops.instance_norm import instance_norm, instance_norm_op
from atom_fast.ops.launching import int32_indexable
from tests.backends import entered
from tests.cubin import CAPABILITIES, check_report, compile_kernel
from tests.launches import compile_launch, recorded

BACKENDS = ["triton", "successor", "torch"]  # on a CPU, "torch" stands for the kernels in C
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def inputs(*shape, device="cpu", dtype=torch.float64, layout="channels_last", mean=0.5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + mean
    weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    x = x.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    affine = (tensor.to(device, torch.promote_types(dtype, torch.float32)) for tensor in (weight, bias))
    return [tensor.requires_grad_() for tensor in (x, *affine)]


def dtype_of(backend):
    """Return the most precise dtype that a backend computes in."""
    return torch.float32 if backend == "torch" else torch.float64


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        tolerance = 1e-5 if a.dtype == torch.float32 else 1e-9
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def results(function, x, weight, bias, **options):
    output = function(x, weight, bias, **options)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return output, *torch.autograd.grad(output, (x, weight, bias), direction)


def expected_results(x, weight, bias, relu, pool):
    double = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    return results(reference.instance_norm, *double, eps=1e-5, relu=relu, pool=pool)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relu, pool", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(2, 40, 12, 10), (1, 3, 2, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_equations(layout, shape, relu, pool, backend, place):
    tensors = inputs(*shape, device=place, dtype=dtype_of(backend), layout=layout)
    with entered(backend):
        got = results(instance_norm, *tensors, relu=relu, pool=pool)
    assert_equal(got, expected_results(*tensors, relu, pool))
    assert got[0].is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_planes_without_pooling(backend, place):
    tensors = inputs(2, 6, 5, 7, device=place, dtype=dtype_of(backend))
    with entered(backend):
        got = results(instance_norm, *tensors, relu=True)
    assert_equal(got, expected_results(*tensors, True, False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_types_are_computed_in_float32(dtype, tolerance, backend, place):
    x, weight, bias = inputs(3, 8, 8, 8, device=place, dtype=dtype)
    with entered(backend):
        got = results(instance_norm, x, weight, bias, relu=True, pool=True)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, torch.float32, torch.float32]
    for a, b in zip(got, expected_results(x, weight, bias, True, True), strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_far_from_zero_costs_no_accuracy(backend, place):
    x, weight, bias = inputs(2, 4, 16, 16, device=place, dtype=torch.float32, mean=3000.0)
    with entered(backend):
        got = instance_norm(x, weight, bias)
    expected = expected_results(x, weight, bias, False, False)[0]
    assert (got - expected).abs().max() <= 5e-4 * expected.abs().max()  # float32 holds 3000 to 1.2e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_is_passed_on(backend, place):
    x, weight, bias = inputs(2, 4, 4, 4, device=place, dtype=dtype_of(backend))
    with torch.no_grad():
        x[1, 2, 0, 0] = torch.nan
    with entered(backend):
        output = instance_norm(x, weight, bias, relu=True, pool=True)
    assert output[1, 2].isnan().all() and output.isnan().sum() == output[1, 2].numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_input_same_bits(backend, place):
    tensors = inputs(5, 33, 8, 8, device=place, dtype=torch.float32)
    with entered(backend):
        first = results(instance_norm, *tensors, relu=True, pool=True)
        again = results(instance_norm, *tensors, relu=True, pool=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_contract(backend, place):
    x, weight, bias = inputs(2, 4, 4, 4, device=place, dtype=dtype_of(backend))
    torch.library.opcheck(
        instance_norm_op,
        (x, weight, bias, 1e-5, True, True, {"torch": "c"}.get(backend, backend)),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["triton", "successor"])
def test_a_second_derivative_is_refused(backend, place):
    x, weight, bias = inputs(2, 4, 4, 4, device=place, dtype=dtype_of(backend))
    with entered(backend):
        (gradient,) = torch.autograd.grad(instance_norm(x, weight, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), x)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def second_derivatives(function, x, weight, bias, **options):
    """Return the derivatives of a weighted sum of the gradients: in their direction, in ``x`` and in ``weight``."""
    output = function(x, weight, bias, **options)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(output.shape, generator=generator).to(output).requires_grad_()
    gradients = torch.autograd.grad(output, (x, weight, bias), direction, create_graph=True)
    weighing = [torch.randn(part.shape, generator=generator).to(part) for part in gradients]
    return torch.autograd.grad(gradients, (direction, x, weight), weighing)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 35), height=st.integers(1, 6), width=st.integers(1, 6),
    relu=st.booleans(), pool=st.booleans(), scale=st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
def test_second_derivatives_in_c_equal_those_of_the_equations(batch, channels, height, width, relu, pool, scale):
    height, width = (2 * height, 2 * width) if pool else (height + 1, width + 1)
    x, weight, bias = inputs(batch, channels, height, width, dtype=torch.float32)
    x = (x.detach() * scale).requires_grad_()
    got = second_derivatives(instance_norm, x, weight, bias, relu=relu, pool=pool)
    with _Mode():  # as a counter of bytes is: calls go through the operators
        again = second_derivatives(instance_norm, x, weight, bias, relu=relu, pool=pool)
    double = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    expected = second_derivatives(reference.instance_norm, *double, eps=1e-5, relu=relu, pool=pool)
    for a, b, exact in zip(got, again, expected, strict=True):
        assert torch.equal(a, b)
        assert (a.double() - exact).norm() <= 1e-4 * exact.norm() + 1e-6 * exact.numel() ** 0.5 / scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend, place):
    x, weight, bias = inputs(0, 4, 4, 4, device=place, dtype=dtype_of(backend))
    with entered(backend):
        output, *gradients = results(instance_norm, x, weight, bias, relu=True, pool=True)
    assert output.shape == (0, 4, 2, 2) and gradients[0].shape == x.shape
    assert not gradients[1].any() and not gradients[2].any()


@pytest.mark.parametrize(
    "shape, width, options, message",
    [
        ((2, 4, 4), 4, {}, r"x must be floating point \[B, C, H, W\]"),
        ((2, 4, 4, 4), 3, {}, r"weight must be \[4\]; got \(3,\)"),
        ((2, 4, 5, 4), 4, {"pool": True}, r"even height and width; got \(2, 4, 5, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(shape, width, options, message):
    with pytest.raises(ValueError, match=message):
        instance_norm(torch.zeros(shape), torch.zeros(width), torch.zeros(width), **options)


def test_samples_that_32_bits_do_not_address_are_copied():
    far, near = (torch.empty_strided((2, 3, 4, 4), (1, step, 4, 1), device="meta") for step in (2**30, 2**29))
    assert int32_indexable(far).is_contiguous() and int32_indexable(near) is near


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype, size, pool", [("fp32", 32, True), ("bf16", 16, False)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernels_read_128_bits_and_do_not_spill(direction, dtype, size, pool, capability):
    launch = instance_norm_launch(128, size * size, {"fp32": 4, "bf16": 2}[dtype])
    warps = launch.pop("num_warps")
    wide = {"p_weight": "*fp32", "p_bias": "*fp32", "p_mean": "*fp32", "p_rstd": "*fp32"}
    if direction == "forward":
        pointers = {"p_x": f"*{dtype}", "p_weight": "*fp32", "p_bias": "*fp32", "p_out": f"*{dtype}"}
        pointers |= {"p_mean": "*fp32", "p_rstd": "*fp32"}
        sides = ("", "out_")
    else:
        pointers = {"p_grad": f"*{dtype}", "p_x": f"*{dtype}", **wide, "p_grad_x": f"*{dtype}"}
        pointers |= {"p_grad_weight": "*fp32", "p_grad_bias": "*fp32"}
        sides = ("grad_", "", "out_")
    strides = [f"{side}stride_{axis}" for side in sides for axis in "bchw"]
    signature = pointers | {name: "constexpr" if name.endswith("_c") else "i32" for name in strides}
    signature |= {"eps": "fp32"} if direction == "forward" else {}
    constants = {"C": 128, "H": size, "W": size, "RELU": True, "POOL": pool, **launch}
    signature |= dict.fromkeys(constants, "constexpr")
    constants |= {name: 1 for name in strides if name.endswith("_c")}
    report = compile_kernel(
        "instance_norm", f"instance_norm_{direction}_kernel", signature=signature, constants=constants,
        capability=capability, num_warps=warps,
        aligned=tuple(name for name, kind in signature.items() if kind not in ("constexpr", "fp32")),
    )  # fmt: skip
    assert report.spills == 0 and report.widest_load == 128
    assert report.registers <= 128  # four programs of 128 threads a multiprocessor at least


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is launched is recorded through the interpreter")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype, size, pool", [(torch.float32, 32, True), (torch.bfloat16, 16, False)])
def test_successors_read_128_bits_and_do_not_spill(dtype, size, pool, capability):
    with recorded(successors) as launches, entered("successor"):
        results(instance_norm, *inputs(2, 128, size, size, dtype=dtype), relu=True, pool=pool)
    assert [launch.kernel for launch in launches] == ["apply_kernel", "gradient_kernel", "sum_rows_kernel"]
    for launch in launches:
        report = compile_launch(launch, capability)
        check_report(report, capability, launch.kernel)
        assert launch.kernel == "sum_rows_kernel" or report.widest_load == report.widest_store == 128, launch.kernel
