"""Decoding and augmentation in one operator against interpolation and a plain augmentation, one image at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_fast.data.augmentation import AugmentationParameters, augment, decode_and_augment
from atom_fast.data.partition import decode
from atom_fast.ops import augmentation, native
from atom_fast.ops.dispatch import backend
from atom_fast.ops.partition import partition_op
from tests.cubin import check_report
from tests.launches import compile_launch
from tests.ops.test_augmentation import BACKENDS, EACH, augment_reference, normal, parameters_of, with_gradient
from tests.workloads import Workload, decoding, launches

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def decode_reference(sheets, r):
    """Crop every small image, and enlarge it."""
    count, channels, height, width = sheets.shape
    small = sheets.reshape(count, channels, r, height // r, r, width // r).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)


def reference(sheets, parameters, groups, r, chosen):
    decoded = decode_reference(sheets, r)
    return augment_reference(decoded if chosen is None else decoded[chosen], parameters, groups)


def run(sheets, parameters, groups, r, chosen):
    return decode_and_augment(sheets, parameters, groups, partition=r, chosen=chosen)


def assert_like_reference(sheets, *args, tolerance=2e-5):
    """Values and gradients agree in float64; the gradient comes in the layout of the result, as from a convolution."""
    rows = sheets.shape[0] * args[2] ** 2 if args[3] is None else len(args[3])
    gradient = normal(rows, *sheets.shape[1:], dtype=torch.float64, device=sheets.device, seed=2)
    if sheets.is_contiguous(memory_format=torch.channels_last):
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    expected = with_gradient(reference, sheets.double(), gradient, *args)
    actual = with_gradient(run, sheets, gradient, *args)
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.shape == exact.shape and ours.dtype == sheets.dtype
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    return actual


def selection(rows, parts, device="cpu", seed=5):
    """Numbers of small images, of which one is repeated and, where there are more than rows, some are left out."""
    chosen = torch.randint(parts, (rows,), generator=torch.Generator().manual_seed(seed))
    chosen[-1] = chosen[0]
    return chosen.to(device)


@pytest.fixture(params=["eager", "c"])
def plain(request):
    """The implementations that need no interpreter."""
    with backend(BACKENDS[request.param]):
        yield request.param


@pytest.fixture(params=BACKENDS)
def implementation(request):
    with backend(BACKENDS[request.param]):
        yield request.param


@pytest.fixture
def where(request, device):
    """The CPU for the kernel in C, otherwise the device that all tests share."""
    return torch.device("cpu") if request.node.callspec.params.get("implementation") == "c" else device


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("choice", ["all", "some"])
@pytest.mark.parametrize(
    ("r", "size"),
    [
        (1, (3, 5, 6)),
        (2, (3, 8, 12)),
        (2, (1, 2, 2)),
        (3, (2, 12, 9)),
        (3, (5, 3, 6)),
        (4, (3, 16, 8)),
        (5, (1, 10, 5)),
    ],
)
def test_equals_interpolation_then_augmentation(r, size, choice, memory_format, plain):
    sheets = normal(4 if r < 3 else 2, *size).contiguous(memory_format=memory_format)
    parts = len(sheets) * r * r
    chosen = None if choice == "all" else selection(40, parts)
    groups = torch.arange(parts if chosen is None else 40) * 3 % (4 * len(EACH)) if choice == "some" else None
    names = EACH * 4 if choice == "some" else (EACH * 8)[:parts]
    result, gradient = assert_like_reference(sheets, parameters_of(names, seed=r), groups, r, chosen)
    assert result.is_contiguous(memory_format=memory_format) and gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("r", "names", "chosen", "memory_format"),
    [
        (2, ("none", "scale", "rotate", "flip"), None, torch.contiguous_format),
        (2, ("color", "crop", "cutout", "flip", "scale"), [3, 0, 1, 0, 1], torch.channels_last),
        (3, ("rotate", "crop"), [4, 8], torch.channels_last),
        (4, ("flip",), [6], torch.contiguous_format),
    ],
)
def test_the_kernel_equals_interpolation_then_augmentation(r, names, chosen, memory_format, device, triton_backend):
    chosen = None if chosen is None else torch.tensor(chosen, device=device)
    groups = None if chosen is None else torch.arange(len(names), device=device).flip(0)
    sheets = normal(1, 3, 4 * r, 6, device=device) if r == 3 else normal(1, 3, 8, 4 * r, device=device)
    sheets = sheets.contiguous(memory_format=memory_format)
    assert_like_reference(sheets, parameters_of(names, device), groups, r, chosen)


def test_the_kernel_computes_an_image_in_several_programs(device, triton_backend):
    sheets = normal(1, 3, 36, 24, device=device)
    chosen = torch.tensor([2], device=device)
    assert_like_reference(sheets, parameters_of(["color"], device), None, 2, chosen)


@settings(max_examples=25)
@given(
    r=st.integers(1, 4),
    channels=st.integers(1, 5),
    high=st.integers(1, 5),
    wide=st.integers(1, 5),
    rows=st.integers(1, 9),
    layout=st.sampled_from(["nchw", "channels_last", "sliced", "transposed", "expanded"]),
    magnitude=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_shapes_strides_and_magnitudes(r, channels, high, wide, rows, layout, magnitude, seed):
    sheets = magnitude * normal(2, channels, high * r, wide * r, seed=seed)
    sheets = {
        "nchw": lambda: sheets,
        "channels_last": lambda: sheets.contiguous(memory_format=torch.channels_last),
        "sliced": lambda: F.pad(sheets, (1, 2, 1, 0))[..., 1:, 1:-2],
        "transposed": lambda: sheets.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "expanded": lambda: sheets[:1].expand(2, -1, -1, -1),
    }[layout]()
    args = parameters_of((EACH * 2)[:rows], seed=seed), None, r, selection(rows, 2 * r * r, seed=seed)
    args[0].operation[args[0].operation == 0] = -1  # color adds a constant that hides small magnitudes
    gradient = magnitude * normal(rows, *sheets.shape[1:], seed=seed + 1)
    expected = with_gradient(reference, sheets.double(), gradient, *args)
    for name in ("torch", "reference"):
        with backend(name):
            for ours, exact in zip(with_gradient(run, sheets, gradient, *args), expected, strict=True):
                torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=2e-5 * magnitude)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_decode_equals_interpolation(r, plain):
    sheets = normal(3, 3, 6, 12)
    gradient = normal(3 * r * r, 3, 6, 12, seed=2)
    actual = with_gradient(lambda x: decode(x, r), sheets, gradient)
    expected = with_gradient(lambda x: decode_reference(x, r), sheets.double(), gradient)
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(decode(torch.full((1, 1, 6, 6), 0.3), r), torch.full((r * r, 1, 6, 6), 0.3)) or r == 3


@pytest.mark.parametrize("choice", ["all", "some"])
def test_a_partition_of_one_is_augmentation(choice, implementation, where):
    count = len(EACH) if choice == "all" else 3
    names = EACH if choice == "all" else ("color", "rotate", "crop")
    chosen = None if choice == "all" else torch.tensor([4, 0, 2], device=where)
    sheets = normal(len(EACH), 3, 5, 6, device=where)
    gradient = normal(count, 3, 5, 6, device=where, seed=2)
    parameters = parameters_of(names, where)
    actual = with_gradient(run, sheets, gradient, parameters, None, 1, chosen)
    images = sheets if chosen is None else sheets[chosen]
    value, back = with_gradient(augment, images, gradient, parameters)
    if chosen is not None:
        back = torch.zeros_like(sheets).index_copy_(0, chosen, back)
    assert torch.equal(actual[0], value) and torch.equal(actual[1], back)


def test_float64(implementation, where):
    sheets = normal(1, 2, 4, 6, dtype=torch.float64, device=where)
    names = ("color", "crop", "flip", "cutout") if implementation == "triton" else ("rotate", "scale", "color", "crop")
    assert_like_reference(sheets, parameters_of(names, where, seed=3), None, 2, None, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, implementation, where):
    names = ("color", "flip") if implementation == "triton" else EACH
    chosen = selection(len(names), 4, where)
    sheets = normal(1, 3, 4, 6, dtype=dtype, device=where)
    actual = run(sheets, parameters_of(names, where), None, 2, chosen)
    assert actual.dtype == dtype
    exact = reference(sheets.double(), parameters_of(names, where), None, 2, chosen)
    torch.testing.assert_close(actual.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (6, 64), (64, 6), (2, 18)], ids=str)
def test_reach_covers_every_output_pixel_that_reads_a_small_pixel(size):
    """The kernel's window, at the ends of the ranges of angles and factors: no weight lies outside it."""
    height, width = size
    uniforms = torch.tensor([[0.0] * 3, [0.0] * 3, [1 - 2**-24] * 3])
    parameters = AugmentationParameters(torch.tensor([4, 5, 5]), uniforms)
    coefficients = augmentation._coefficients(*parameters, height, width, torch.float64)
    for r in (2, 3) if height % 3 == width % 3 == 0 else (2,):
        radius = r if r % 2 else r + 0.5
        reach = [augmentation._reach(aspect, radius) for aspect in (height / width, width / height)]
        for row, column in ((0, 0), (height // r // 2, width // r // 2), (height // r - 1, width // r - 1)):
            pulse = torch.zeros(1, 1, height, width, dtype=torch.float64)
            pulse[..., row, column] = 1
            chosen = torch.zeros(3, dtype=torch.int64)
            with backend("reference"):
                seen = run(pulse, parameters, None, r, chosen)[:, 0] > 1e-9
            middle = [torch.full((3, 1), small * r + (r - 1) / 2, dtype=torch.float64) for small in (row, column)]
            back = augmentation._displacement(coefficients.back, *middle, height, width)
            for image in range(3):
                places = seen[image].nonzero()
                for axis in (0, 1) if len(places) else ():  # a scale may cut it off
                    near = math.floor(float(middle[axis][image] + back[axis][image]) + 0.5)
                    assert (places[:, axis] - near).abs().amax() <= reach[axis]


def test_gradients_of_every_order():
    names = ("color", "scale", "rotate", "crop")
    chosen, parameters = torch.tensor([1, 3, 0, 1]), parameters_of(names, seed=5)
    sheets = normal(1, 2, 2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run(x, parameters, None, 2, chosen), sheets)
    assert torch.autograd.gradgradcheck(lambda x: run(x, parameters, None, 2, chosen).square(), sheets)


@pytest.mark.parametrize("r", [2, 3])
def test_a_derivative_is_the_transpose(r, plain):
    parameters = parameters_of(EACH * 2, seed=8)
    chosen = selection(14, 2 * r * r)
    x, y = normal(2, 3, 6, 12), normal(14, 3, 6, 12, seed=2)
    forward = partition_op(x, *parameters, None, chosen, 2, r, False, False, plain)
    back = partition_op(y, *parameters, None, chosen, 2, r, True, False, plain)
    torch.testing.assert_close((forward.double() * y).sum(), (x.double() * back).sum(), rtol=1e-5, atol=1e-4)


def test_the_same_bits_twice(implementation, where):
    names = ("rotate", "flip") if implementation == "triton" else EACH * 3
    sheets = normal(1, 3, 4, 6, device=where)
    gradient = normal(len(names), 3, 4, 6, device=where, seed=2)
    chosen = torch.zeros(len(names), dtype=torch.int64, device=where)  # many rows are added up
    args = sheets, gradient, parameters_of(names, where), None, 2, chosen
    first, second = (with_gradient(run, *args) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert (first[1][..., 2:, :] == 0).all() and (first[1][..., :2, :3] != 0).any()


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
def test_the_number_of_threads_does_not_change_the_bits(memory_format, monkeypatch):
    sheets, gradient = normal(6, 3, 64, 66), normal(60, 3, 64, 66, seed=2)
    sheets, gradient = (x.contiguous(memory_format=memory_format) for x in (sheets, gradient))
    args = sheets, gradient, parameters_of((EACH * 9)[:60]), None, 2, selection(60, 24)
    monkeypatch.setattr(native, "_BYTES_PER_THREAD", 1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with backend("torch"):
                results.append(with_gradient(run, *args))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


@pytest.mark.parametrize("implementation", ["triton", "c"], indirect=True)
def test_a_value_that_is_not_finite_stays_in_its_small_image(implementation, where):
    sheets = normal(1, 2, 6, 6, device=where)
    sheets[0, 1, 1, 1] = math.inf
    decoded = decode(sheets, 2)
    assert decoded[1:].isfinite().all() and decoded[0, 0].isfinite().all()
    reached = torch.zeros(6, 6, dtype=torch.bool, device=where)
    reached[1:5, 1:5] = True
    assert torch.equal(~decoded[0, 1].isfinite(), reached)


def test_no_images(implementation, where):
    sheets = normal(2, 3, 4, 4, device=where).requires_grad_()
    none = torch.empty(0, dtype=torch.int64, device=where)
    result = run(sheets, parameters_of(EACH, where), none, 2, none)
    result.sum().backward()
    assert result.shape == (0, 3, 4, 4) and torch.equal(sheets.grad, torch.zeros_like(sheets))
    assert decode(sheets[:0], 2).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("choice", ["all", "some"])
def test_the_operator_is_registered_as_pytorch_wants(choice, transposed, plain):
    chosen = None if choice == "all" else torch.tensor([2, 0, 2, 3])
    groups = None if choice == "all" else torch.tensor([1, 0, 3, 2])
    images = normal(4 if transposed else 1, 2, 4, 4).requires_grad_()
    arguments = images, *parameters_of(EACH[:4]), groups, chosen, 1, 2, transposed, not transposed, plain
    torch.library.opcheck(partition_op, arguments)


def test_compiles_into_one_graph(plain):
    sheets, gradient, chosen = normal(1, 1, 4, 4), normal(7, 1, 4, 4, seed=2), selection(7, 4)
    args = parameters_of(EACH), None, 2, chosen
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual, expected = (with_gradient(function, sheets, gradient, *args) for function in (compiled, run))
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_a_forward_mode_derivative_is_refused(plain):
    sheets = normal(1, 1, 4, 4)
    with pytest.raises(NotImplementedError, match="partition has no forward-mode derivative"):
        torch.func.jvp(lambda x: decode(x, 2), (sheets,), (sheets,))


@pytest.mark.parametrize(
    ("capability", "layout", "dtype"),
    [
        (80, torch.channels_last, torch.float32),
        (89, torch.contiguous_format, torch.float32),
        (90, torch.contiguous_format, torch.bfloat16),
        (120, torch.channels_last, torch.float32),
    ],
    ids=str,
)
def test_the_kernels_fit_in_registers(capability, layout, dtype):
    found = launches(Workload("decode", decoding(3, 32, layout, dtype), False), capability)
    assert [launch.kernel for launch in found] == ["partition_forward_kernel", "partition_transposed_kernel"]
    for launch in found:
        report = compile_launch(launch, capability, brief=capability != 80)
        check_report(report, capability, launch.kernel)
        assert capability != 80 or report.widest_store == 128  # taps are single values; results are written in rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sheets": torch.zeros(2, 3, 4)}, r"images must be floating point \[B, C, H, W\]"),
        ({"sheets": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}, "torch.int64"),
        ({"r": 0}, "images of 4x6: one of 1, 2; got 0"),
        ({"r": 4}, "images of 4x6: one of 1, 2; got 4"),
        ({"r": 3}, "images of 4x6: one of 1, 2; got 3"),
        ({"chosen": torch.zeros(4)}, r"chosen must be int64 \[B\]; got torch.float32"),
        ({"chosen": torch.zeros(2, 2, dtype=torch.int64)}, r"of shape \(2, 2\)"),
        ({"chosen": torch.zeros(4, dtype=torch.int64, device="meta")}, "images' device cpu; got meta"),
        ({"chosen": torch.zeros(3, dtype=torch.int64)}, "got 3 images and 4 groups"),
        ({"sheets": torch.zeros(2, 3, 4, 6)}, "got 8 images and 4 groups"),
        ({"groups": torch.zeros(1, dtype=torch.int64)}, r"groups must be int64 \[4\]"),
        ({"operation": torch.zeros(4)}, r"operation must be int64 \[G\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "sheets": torch.zeros(1, 3, 4, 6), "operation": torch.zeros(4, dtype=torch.int64), "groups": None, "r": 2,
        "chosen": None, **change,
    }  # fmt: skip
    parameters = AugmentationParameters(given["operation"], torch.zeros(4, 3))
    with pytest.raises(ValueError, match=message):
        run(given["sheets"], parameters, given["groups"], given["r"], given["chosen"])


@pytest.mark.parametrize("number", [-1, 4])
def test_numbers_that_are_not_there_are_refused(number, plain):
    chosen = torch.tensor([0, number, 1, 2])
    with pytest.raises(IndexError, match=r"chosen must be in \[0, 4\)"):
        run(torch.zeros(1, 3, 4, 4), parameters_of(EACH[:4]), None, 2, chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize(("r", "size"), [(2, (100, 3, 32, 32)), (2, (10, 3, 128, 128)), (3, (20, 1, 27, 27))])
def test_real_sizes(r, size, memory_format, device):
    sheets = normal(*size, device=device).contiguous(memory_format=memory_format)
    chosen = selection(60 * r, size[0] * r * r, device)
    groups = torch.arange(len(chosen), device=device) % len(EACH)
    with backend("triton"):
        first = assert_like_reference(sheets, parameters_of(EACH, device), groups, r, chosen)
        again = assert_like_reference(sheets, parameters_of(EACH, device), groups, r, chosen)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.gpu
def test_a_captured_step_never_waits(device):
    sheets = normal(5, 3, 16, 16, device=device).requires_grad_()
    chosen, parameters = selection(len(EACH), 20, device), parameters_of(EACH, device)
    direction = torch.ones(len(EACH), 3, 16, 16, device=device)

    def step():
        result = run(sheets, parameters, None, 2, chosen)
        return result.detach(), torch.autograd.grad(result, sheets, direction)[0]

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])
