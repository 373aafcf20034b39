"""BatchNorm with ReLU and pooling: equal to PyTorch's own operators and module, forward, backward and in a network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import atom_fast as af
from atom_fast.kernels import norm as successors
from atom_fast.kernels.batch_norm import batch_norm_launch, statistics_launch
from atom_fast.kernels.norm import rows_launch
from atom_fast.networks import ConvNet
from atom_fast.ops import dispatch
from atom_fast.ops.batch_norm import batch_norm, batch_norm_op, batch_statistics_op
from tests.backends import entered
from tests.cubin import CAPABILITIES, check_report, compile_kernel
from tests.launches import compile_launch, recorded

GPU = ["triton", "successor"]
FUSED = [*GPU, "torch"]  # on a CPU, "torch" stands for the kernels in C
BACKENDS = [*FUSED, "reference"]
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
NAMES = ("output", "grad_x", "grad_weight", "grad_bias", "grad_offset", "running_mean", "running_var")


def inputs(*shape, device="cpu", dtype=torch.float64, layout="channels_last", mean=0.5, seed=0):
    """x in ``dtype``; weight, bias, offset and running statistics in the type they are computed in."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + mean
    vectors = torch.randn(5, shape[1], generator=generator, dtype=torch.float64)
    vectors[4].square_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = x.to(device, dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    *parameters, running_mean, running_var = (vector.to(device, wide) for vector in vectors)
    return [x, *(parameter.requires_grad_() for parameter in parameters), running_mean, running_var]


def dtype_of(backend):
    """Return the most precise dtype that a backend computes in."""
    return torch.float32 if backend == "torch" else torch.float64


def results(function, x, weight, bias, offset, running_mean, running_var, **options):
    running_mean, running_var = running_mean.clone(), running_var.clone()
    output = function(x, weight, bias, running_mean, running_var, offset=offset, **options)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    gradients = torch.autograd.grad(output, (x, weight, bias, offset), direction)
    return dict(zip(NAMES, (output, *gradients, running_mean, running_var), strict=True))


def expected_results(*tensors, **options):
    double = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    return results(plain_batch_norm, *double, **options)


def plain_batch_norm(x, weight, bias, running_mean, running_var, *, offset, relu=False, pool=False):
    x = F.batch_norm(x + offset[:, None, None], running_mean, running_var, weight, bias, True, 0.1, 1e-5)
    x = F.relu(x) if relu else x
    return F.avg_pool2d(x, 2) if pool else x


def assert_close(got, expected, tolerance=None):
    tolerance = tolerance or (1e-5 if got["output"].dtype == torch.float32 else 1e-9)
    for name, value in expected.items():
        own = got[name].to(value.dtype)
        torch.testing.assert_close(own, value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relu, pool", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(2, 40, 12, 10), (1, 3, 2, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_equations(layout, shape, relu, pool, backend, place):
    tensors = inputs(*shape, device=place, dtype=dtype_of(backend), layout=layout)
    with entered(backend):
        got = results(batch_norm, *tensors, relu=relu, pool=pool)
    assert_close(got, expected_results(*tensors, relu=relu, pool=pool))
    assert got["output"].is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (3, 4, 1, 1), (4, 17, 1, 3)])
def test_odd_planes_without_pooling(shape, backend, place):
    tensors = inputs(*shape, device=place, dtype=dtype_of(backend))
    with entered(backend):
        got = results(batch_norm, *tensors, relu=True)
    assert_close(got, expected_results(*tensors, relu=True))


@pytest.mark.parametrize("backend", GPU)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 20, 9, 40))).filter(lambda s: s[0] * s[2] * s[3] > 1),
    layout=st.sampled_from(list(LAYOUTS)),
    part=st.sampled_from(["all", "channels", "columns", "transposed"]),
)
@settings(max_examples=6)
def test_any_shape_and_strides(backend, shape, layout, part, device):
    """Planes of one place and of several programs, odd sides, and slices of a larger tensor."""
    x, *vectors = inputs(*shape, device=device, layout=layout)
    batch, channels, height, width = shape
    if part == "channels":
        x = inputs(batch, channels + 3, height, width, device=device, layout=layout)[0].detach()[:, 1 : channels + 1]
    elif part == "columns":
        x = inputs(batch, channels, height, 2 * width, device=device, layout=layout)[0].detach()[..., ::2]
    elif part == "transposed":
        x = x.detach().transpose(2, 3)
    x = x.detach().requires_grad_()
    with entered(backend):
        got = results(batch_norm, x, *vectors, relu=True)
    expected = expected_results(x, *vectors, relu=True)
    assert_close(got, expected, 1e-8)  # two values a channel may be close to one another


@pytest.mark.parametrize("backend", GPU)
def test_more_samples_than_are_put_together_at_once(backend, device, monkeypatch):
    assert statistics_launch(260)["BLOCK_R"] == rows_launch(260)["BLOCK_R"] < 260
    few = {**statistics_launch(260), "BLOCK_R": 4}
    monkeypatch.setattr("atom_fast.kernels.batch_norm.statistics_launch", lambda rows: few)
    monkeypatch.setattr("atom_fast.kernels.norm.rows_launch", lambda rows: few)
    tensors = inputs(10, 3, 1, 2, device=device)
    with entered(backend):
        assert_close(results(batch_norm, *tensors), expected_results(*tensors))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_narrow_types_are_computed_in_float32(dtype, tolerance, backend, place):
    tensors = inputs(3, 8, 8, 8, device=place, dtype=dtype)
    if backend == "torch":
        tensors[3] = tensors[3].detach().zero_().requires_grad_()  # a sum in a narrow type is rounded
    with entered(backend):
        got = results(batch_norm, *tensors, relu=True, pool=True)
    assert [tensor.dtype for tensor in got.values()] == [dtype, dtype, *[torch.float32] * 5]
    for name, value in expected_results(*tensors, relu=True, pool=True).items():
        if name != "grad_offset":
            assert (got[name].double() - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_far_from_zero_costs_no_accuracy(layout, backend, place):
    tensors = inputs(3, 4, 16, 48, device=place, dtype=torch.float32, mean=3000.0, layout=layout)
    expected = expected_results(*tensors)
    with entered(backend):
        got = results(batch_norm, *tensors)
    for name in ("output", "running_mean", "running_var"):  # float32 holds 3000 to 1.2e-4
        assert (got[name] - expected[name]).abs().max() <= 5e-4 * expected[name].abs().max()


@pytest.mark.parametrize("backend", FUSED)
def test_not_a_number_is_passed_on(backend, place):
    x, *vectors = inputs(2, 4, 4, 4, device=place, dtype=dtype_of(backend))
    with torch.no_grad():
        x[1, 2, 0, 0] = torch.nan
    with entered(backend):
        got = results(batch_norm, x, *vectors, relu=True, pool=True)
    for name in ("output", "running_mean", "running_var"):
        nans = got[name].isnan().transpose(0, got[name].dim() // 2 - got[name].dim() // 4)
        assert nans[2].all() and nans.sum() == nans[2].numel()


@pytest.mark.parametrize("backend", FUSED)
def test_same_input_same_bits(backend, place):
    tensors = inputs(5, 33, 8, 8, device=place, dtype=torch.float32)
    with entered(backend):
        first, again = (results(batch_norm, *tensors, relu=True, pool=True) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in NAMES)


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("pool", [False, True])
def test_gradients_are_those_of_finite_differences(pool, backend, device):
    x, weight, bias, _, _, _ = inputs(2, 2, 2, 2, device=device)
    with entered(backend):
        assert torch.autograd.gradcheck(lambda *tensors: batch_norm(*tensors, relu=True, pool=pool), (x, weight, bias))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("channels_last", [False, True])
def test_running_statistics_are_those_of_the_module(channels_last, backend, place):
    """After several steps, with a convolution's bias, and what evaluation mode makes of them."""
    torch.manual_seed(0)
    dtype, tolerance = dtype_of(backend), 1e-6 if backend == "torch" else 1e-12
    convolution, norm = (module.to(place, dtype) for module in (nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)))
    nn.init.normal_(norm.weight)
    mine = copy.deepcopy(norm)
    options = {"momentum": mine.momentum, "eps": mine.eps, "relu": True}
    statistics = (mine.running_mean, mine.running_var)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for size in (5, 3, 4):
        x = torch.randn(size, 2, 7, 7, dtype=dtype, device=place).contiguous(memory_format=layout)
        expected = norm(convolution(x)).relu()
        convolved = F.conv2d(x, convolution.weight, padding=1)
        with entered(backend):
            got = batch_norm(convolved, mine.weight, mine.bias, *statistics, offset=convolution.bias, **options)
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(mine.running_mean, norm.running_mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mine.running_var, norm.running_var, rtol=tolerance, atol=tolerance)
    norm.eval()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), entered(backend):
            arguments = (F.conv2d(x, convolution.weight, padding=1), mine.weight, mine.bias, *statistics)
            got = batch_norm(*arguments, offset=convolution.bias, training=False, **options)
            torch.testing.assert_close(got, norm(convolution(x)).relu())


@pytest.mark.parametrize("backend", FUSED)
def test_without_a_gradient_from_above_there_is_none(backend, place):
    x, *vectors = inputs(2, 4, 4, 4, device=place, dtype=dtype_of(backend))
    with entered(backend):
        output = _Unasked.apply(batch_norm(x, *vectors[:2], relu=True))
    assert torch.autograd.grad(output.sum(), x, allow_unused=True) == (None,)


class _Unasked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.parametrize("implementation", GPU)
def test_operator_contract(implementation, device):
    x, weight, bias, offset, running_mean, running_var = inputs(2, 4, 4, 4, device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    statistics = (x.detach(), offset.detach(), running_mean, running_var, 0.1, 1e-5, implementation)
    torch.library.opcheck(batch_statistics_op, statistics, test_utils=tests)
    mean, rstd = batch_statistics_op(*statistics)
    arguments = x, weight, bias, offset, mean, rstd, True, True, implementation
    torch.library.opcheck(batch_norm_op, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", FUSED)
def test_a_second_derivative_is_refused(backend, place):
    x, weight, bias, *_ = inputs(2, 4, 4, 4, device=place, dtype=dtype_of(backend))
    with entered(backend):
        (gradient,) = torch.autograd.grad(batch_norm(x, weight, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.parametrize(
    "shape, width, options, message",
    [
        ((2, 4, 4), 4, {}, r"x must be floating point \[B, C, H, W\]"),
        ((2, 4, 4, 4), 3, {}, r"weight must be \[4\]; got \(3,\)"),
        ((2, 4, 4, 4), 4, {"offset": torch.zeros(2)}, r"offset must be \[4\]; got \(2,\)"),
        ((2, 4, 4, 4), 4, {"running_mean": torch.zeros(4)}, "go together"),
        ((2, 4, 4, 4), 4, {"training": False}, "without training, x is normalised by running_mean and running_var"),
        ((1, 4, 1, 1), 4, {}, r"at least two values per channel; got x of shape \(1, 4, 1, 1\)"),
        ((0, 4, 2, 2), 4, {}, "at least two values per channel"),
        ((2, 4, 5, 4), 4, {"pool": True}, r"even height and width; got \(2, 4, 5, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(shape, width, options, message):
    with pytest.raises(ValueError, match=message):
        batch_norm(torch.zeros(shape), torch.zeros(width), torch.zeros(width), **options)


@pytest.mark.parametrize("change", ["float64", "contiguous", "evaluation with gradients"])
def test_other_input_runs_pytorch(change):
    x, weight, bias, _, *running = inputs(2, 3, 4, 4, dtype=torch.float32)
    training = change != "evaluation with gradients"
    if change == "float64":
        x, weight, bias, running = x.double(), weight.double(), bias.double(), [vector.double() for vector in running]
    x = x.contiguous() if change == "contiguous" else x
    with af.backend("torch"):
        output = batch_norm(x, weight, bias, *running, training=training)
    assert "BatchNorm" in type(output.grad_fn).__name__ and type(output.grad_fn).__name__ != "_BatchNormBackward"


def test_triton_says_once_that_pytorch_runs_evaluation_mode_with_gradients(triton_backend, device, recwarn):
    dispatch._warn_of_eager.cache_clear()
    x, weight, bias, _, *running = inputs(2, 3, 4, 4, device=device)
    for _ in range(2):
        batch_norm(x, weight, bias, *running, training=False)
    (warning,) = recwarn
    assert "backend 'triton' has no kernel for this call of batch_norm" in str(warning.message)


def small_set(size, device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 2, size, size, generator=generator, dtype=torch.float64)
    return images.to(device, dtype).contiguous(memory_format=torch.channels_last), torch.arange(5, device=device) % 3


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("pooling, size", [("avg2", 4), ("avg2", 5), ("max2", 4)])
def test_training_equals_that_of_the_modules(pooling, size, backend, place):
    """Every weight and running statistic after some steps, and the logits in evaluation mode."""
    dtype, tolerance = dtype_of(backend), 1e-4 if backend == "torch" else 1e-9
    images, labels = small_set(size, place, dtype)
    network = ConvNet(2, 3, size, norm="batch", width=4, depth=2, pooling=pooling).to(images)
    network = network.to(memory_format=torch.channels_last)
    modules = copy.deepcopy(network)

    def step(network, logits):
        loss = F.cross_entropy(logits, labels[: len(logits)])
        parameters = list(network.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        torch._foreach_sub_([parameter.data for parameter in parameters], [gradient * 0.1 for gradient in gradients])

    for count in (5, 3, 5, 4):
        with entered(backend):
            step(network, network(images[:count]))
        step(modules, modules.classifier(modules.features(images[:count])[0]))
    for name, expected in modules.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], expected, rtol=tolerance, atol=tolerance)
    expected = modules.eval()(images)
    with torch.no_grad(), entered(backend):
        torch.testing.assert_close(network.eval()(images), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", FUSED)
def test_a_cumulative_average_is_the_modules(backend, place):
    images, _ = small_set(4, place, dtype_of(backend))
    network = ConvNet(2, 3, 4, norm="batch", width=4, depth=2).to(images).to(memory_format=torch.channels_last)
    network.reset_parameters(torch.Generator(place).manual_seed(0))
    for block in network.blocks:
        block.norm.momentum = None
    plain = copy.deepcopy(network)
    with entered(backend):
        for batch in (images[:3], images):
            torch.testing.assert_close(network(batch), plain.classifier(plain.features(batch)[0]))
    torch.testing.assert_close(dict(network.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
def test_a_captured_step_is_the_step(backend, device):
    with entered(backend):
        _check_captured_step(device)


def _check_captured_step(device):
    images, labels = small_set(8, device)
    networks = [ConvNet(2, 3, 8, norm="batch", width=4, depth=2).to(device, torch.float64) for _ in range(2)]
    for network in networks:
        network.reset_parameters(torch.Generator(device).manual_seed(0))

    def step(network):
        loss = F.cross_entropy(network(images), labels)
        return loss, *torch.autograd.grad(loss, list(network.parameters()))

    for network in networks:
        for _ in range(3):
            step(network)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(networks[0])
    for _ in range(2):
        graph.replay()
        for a, b in zip(captured, step(networks[1]), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(networks[0].buffers(), networks[1].buffers(), strict=True):
        assert torch.equal(a, b)


POINTERS = {
    "parts": ("x", "means", "squares"),
    "apply": ("x", "weight", "bias", "mean", "rstd", "out"),
    "sums": ("grad", "x", "weight", "bias", "mean", "rstd", "sums"),
    "backward": ("grad", "x", "weight", "bias", "mean", "rstd", "sums", "grad_x"),
}
SIDES = {"parts": ("",), "apply": ("", "out_"), "sums": ("grad_", ""), "backward": ("grad_", "", "out_")}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype, size, pool", [("fp32", 32, True), ("bf16", 16, False)])
@pytest.mark.parametrize("kernel", POINTERS)
def test_kernels_read_128_bits_and_do_not_spill(kernel, dtype, size, pool, capability):
    launch = batch_norm_launch(128, size * size, {"fp32": 4, "bf16": 2}[dtype])
    warps = launch.pop("num_warps")
    features = ("x", "out", "grad", "grad_x")
    signature = {f"p_{name}": f"*{dtype if name in features else 'fp32'}" for name in POINTERS[kernel]}
    signature |= {"count": "i32"} if kernel == "backward" else {}
    strides = [f"{side}stride_{axis}" for side in SIDES[kernel] for axis in "bchw"]
    signature |= {name: "constexpr" if name.endswith("_c") else "i32" for name in strides}
    constants = {"C": 128, "H": size, "W": size}
    constants |= {"RELU": True, "POOL": pool} if kernel != "parts" else {}
    constants |= launch
    signature |= dict.fromkeys(constants, "constexpr")
    constants |= {name: 1 for name in strides if name.endswith("_c")}
    report = compile_kernel(
        "batch_norm", f"batch_norm_{kernel}_kernel", signature=signature, constants=constants,
        capability=capability, num_warps=warps,
        aligned=tuple(name for name, kind in signature.items() if kind != "constexpr"),
    )  # fmt: skip
    assert report.spills == 0 and report.widest_load == 128
    if kernel == "backward":
        assert report.widest_store == 128
    # Four programs of 128 threads a multiprocessor at least, three where two tensors are read into two sums.
    assert report.registers <= (168 if kernel == "sums" else 128)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [1, 1024])
def test_the_statistics_kernel_does_not_spill(rows, capability):
    launch = statistics_launch(rows)
    warps = launch.pop("num_warps")
    names = ("means", "squares", "offset", "running_mean", "running_var", "mean", "rstd")
    signature = {f"p_{name}": "*fp32" for name in names} | {"rows": "i32", "count": "i32"}
    constants = {"MOMENTUM": 0.1, "EPS": 1e-5, "C": 128, "POSITIONS": 1024, "PLACES": 256, **launch}
    if rows == 1:
        signature |= {"rows": "constexpr", "p_offset": "constexpr"}
        constants |= {"rows": 1, "p_offset": None}
    signature |= dict.fromkeys((name for name in constants if name.isupper()), "constexpr")
    report = compile_kernel(
        "batch_norm", "batch_norm_statistics_kernel", signature=signature, constants=constants,
        capability=capability, num_warps=warps, aligned=tuple(n for n in signature if signature[n] == "*fp32"),
    )  # fmt: skip
    assert report.spills == 0 and report.registers <= 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is launched is recorded through the interpreter")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype, size, pool", [(torch.float32, 32, True), (torch.bfloat16, 16, False)])
def test_successors_read_128_bits_and_do_not_spill(dtype, size, pool, capability):
    with recorded(successors) as launches, entered("successor"):
        results(batch_norm, *inputs(2, 128, size, size, dtype=dtype), relu=True, pool=pool)
    forward, backward = ["statistics", "batch_statistics", "apply"], ["gradient", "sum_rows", "gradient"]
    assert [launch.kernel.removesuffix("_kernel") for launch in launches] == forward + backward
    for launch in launches:
        report = compile_launch(launch, capability)
        check_report(report, capability, launch.kernel)
        assert report.widest_load == 128 or "EXACT" not in launch.arguments, launch.kernel


def test_the_successor_of_a_batch_of_one_row_and_of_many(device):
    """One value of momentum or eps compiles for all, and a batch of one row is a constant of the compiler."""
    for batch in (1, 3):
        with recorded(successors) as launches, entered("successor"):
            batch_norm(*inputs(batch, 4, 2, 2, device=device)[:3])
        assert not {"momentum", "eps"} & launches[1].constants
        assert launches[1].arguments["rows"] == batch
        assert compile_launch(launches[1], 86).spills == 0
