"""Attention kernels as the compiler sees them: no spill, 128-bit access where the layout allows."""

import pytest
import torch

from atom_fast.kernels import attention, attention_sums
from atom_fast.ops.attention import attention_maps_backward, attention_maps_op
from tests.cubin import CAPABILITIES, check_report, compile_kernel
from tests.launches import compile_launch, recorded

FEATURES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "float64": "*fp64"}


def streaming(kernel, dtype, channels_last, capability, spatial=4, channel=4, channels=128, positions=1024):
    """Compile the forward or backward kernel for dense features [B, channels, positions]."""
    wide = "*fp64" if dtype == "float64" else "*fp32"
    strides = ["stride_b", "stride_c", "stride_h", "stride_w"]
    flags = {"SPATIAL": spatial, "CHANNEL": channel, "FLAT": True}
    if kernel == "attention_forward_kernel":
        pointers = {"p_features": FEATURES[dtype], "p_spatial": wide, "p_channel": wide, "p_peak": wide}
    else:
        pointers = {"p_features": FEATURES[dtype]}
        pointers |= dict.fromkeys(("p_gradient", "p_maps", "p_statistics", "p_projection"), wide)
        pointers["p_output"] = FEATURES[dtype]
        strides += [f"output_{stride}" for stride in strides]
        flags |= {"NORMALIZE": True, "OUTPUT_FLAT": True}
    if kernel == "attention_forward_kernel":
        launch = attention.forward_launch(channels, positions, {"float64": 8, "float32": 4}.get(dtype, 2))
    else:
        launch = attention.backward_launch(channels, positions, channels_last)
    warps = launch.pop("num_warps")
    constants = flags | {"ACCUMULATE": "tl.float64" if dtype == "float64" else "tl.float32"} | launch
    names = {"C": "i32", "P": "i32", "W": "i32"} | dict.fromkeys(strides, "i32")
    order = ("SPATIAL", "CHANNEL", "NORMALIZE", "FLAT", "OUTPUT_FLAT", "ACCUMULATE", "BLOCK_C", "BLOCK_P")
    signature = pointers | names | {name: "constexpr" for name in order if name in constants}
    for stride in strides:
        if stride.endswith("stride_c" if channels_last else "stride_w"):
            signature[stride], constants[stride] = "constexpr", 1
    aligned = tuple(name for name, kind in signature.items() if kind != "constexpr")
    return compile_kernel(
        "attention", kernel, signature=signature, constants=constants, capability=capability, num_warps=warps,
        aligned=aligned,
    )  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel", ["attention_forward_kernel", "attention_backward_kernel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streaming_kernels_read_and_write_128_bits(kernel, dtype, channels_last, capability):
    report = streaming(kernel, dtype, channels_last, capability)
    assert report.spills == 0
    assert report.widest_load == 128
    if kernel == "attention_backward_kernel":
        assert report.widest_store == 128
    assert report.shared <= 16 * 1024
    # Three programs a multiprocessor of 65,536 registers at least for 128 threads, so that the loads of one hide the
    # arithmetic of another.
    assert report.registers <= 168


@pytest.mark.parametrize("kernel", ["attention_forward_kernel", "attention_backward_kernel"])
@pytest.mark.parametrize(
    ("dtype", "powers", "capability"), [("float64", (4, 4), 90), ("float16", (8, 1), 86), ("float32", (2.5, 3), 86)]
)
def test_streaming_kernels_do_not_spill(kernel, dtype, powers, capability):
    report = streaming(kernel, dtype, False, capability, *powers)
    assert report.spills == 0
    assert report.widest_load == 128


@pytest.mark.parametrize("capability", [86])
def test_small_kernels_do_not_spill(capability):
    launch = attention.normalize_launch(128, 1024, 32)
    warps = launch.pop("num_warps")
    signature = dict.fromkeys(("p_spatial", "p_channel", "p_peak", "p_maps", "p_statistics"), "*fp32")
    signature |= dict.fromkeys(("C", "P", "n_t", "n_c"), "i32")
    constants = {"SPATIAL": 4, "CHANNEL": 4, "NORMALIZE": True, "TILE_P": 32} | launch
    signature |= dict.fromkeys(constants, "constexpr")
    report = compile_kernel(
        "attention", "attention_normalize_kernel", signature=signature, constants=constants, capability=capability,
        num_warps=warps, aligned=tuple(n for n, kind in signature.items() if kind.startswith("*")),
    )  # fmt: skip
    assert report.spills == 0

    signature = dict.fromkeys(("p_gradient", "p_maps", "p_projection"), "*fp32") | {"C": "i32", "P": "i32"}
    constants = {"SPATIAL": 4, "CHANNEL": 4, "BLOCK_C": 128, "BLOCK_P": 1024}
    signature |= dict.fromkeys(constants, "constexpr")
    report = compile_kernel(
        "attention", "attention_projection_kernel", signature=signature, constants=constants, capability=capability,
        aligned=("p_gradient", "p_maps", "p_projection", "P", "C"),
    )  # fmt: skip
    assert report.spills == 0 and report.widest_load == 128


def test_launch_tables_never_ask_for_more_than_a_tile():
    for channels in (1, 3, 16, 128, 200, 2048):
        for positions in (1, 5, 64, 1024, 128 * 128):
            for launch in (
                *(attention.forward_launch(channels, positions, size) for size in (2, 4, 8)),
                *(attention.backward_launch(channels, positions, last) for last in (False, True)),
            ):
                assert 1 <= launch["BLOCK_C"] * launch["BLOCK_P"] <= 16384
                assert launch["num_warps"] in (1, 2, 4, 8)


# The successor, kernels/attention_sums.py: the launches of the operator itself.


def successor_launches(dtype, layout, powers=(4.0, 4.0), shape=(2, 128, 32, 32)):
    features = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    with recorded(attention_sums) as launches:
        maps, statistics = attention_maps_op(features, *powers, True, "successor")
        attention_maps_backward(features, maps, maps, statistics, *powers, True, "successor")
    return {launch.kernel: launch for launch in launches}


def instructions_per_value(launch, report):
    """Everything that a thread executes, divided by its values; the loop over blocks of rows counts for each block."""
    given = launch.arguments
    blocks = given["TILE_ROWS"] // given["BLOCK_ROWS"]
    values = given["TILE_ROWS"] * given["BLOCK_COLUMNS"] / (32 * launch.options["num_warps"])
    return (report.instructions + (blocks - 1) * report.loop) / values


LAYOUTS = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [16, 32])
def test_the_successor_executes_few_instructions_in_many_warps(side, dtype, layout):
    launches = successor_launches(dtype, layout, shape=(2, 128, side, side))
    for kernel, most in (("attention_sums_kernel", 9), ("attention_gradient_kernel", 9.5)):
        report = compile_launch(launches[kernel], 90)
        check_report(report, 90, kernel)
        assert report.widest_load == 128
        assert instructions_per_value(launches[kernel], report) <= most
        assert report.registers <= 56  # 36 warps of a multiprocessor's 65,536 registers
    assert report.widest_store == 128


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "powers", "shape", "capability"),
    [
        (torch.float32, (4.0, 4.0), (2, 128, 32, 32), 75),
        (torch.bfloat16, (4.0, None), (2, 128, 16, 16), 80),
        (torch.float64, (4.0, 4.0), (2, 128, 32, 32), 86),
        (torch.float16, (8.0, 1.0), (2, 128, 8, 8), 89),
        (torch.float32, (2.5, 3.0), (2, 200, 7, 7), 90),
        (torch.bfloat16, (None, 6.7), (2, 3, 30, 30), 120),
    ],
)
def test_the_successor_does_not_spill(dtype, powers, shape, capability, layout):
    launches = successor_launches(dtype, layout, powers, shape)
    assert len(launches) == 4
    for kernel, launch in launches.items():
        check_report(compile_launch(launch, capability, brief=True), capability, kernel)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_successors_launch_table_covers_a_tile(size):
    for rows in (1, 3, 16, 128, 200, 2048, 128 * 128):
        for columns in (1, 5, 64, 128, 1000, 128 * 128):
            launch = attention_sums.tile_launch(rows, columns, size)
            assert launch["TILE_ROWS"] % launch["BLOCK_ROWS"] == launch["BLOCK_COLUMNS"] % launch["PART"] == 0
            assert launch["TILE_ROWS"] < 2 * rows and launch["BLOCK_COLUMNS"] < 2 * columns
            assert launch["TILE_ROWS"] * launch["BLOCK_COLUMNS"] <= 16384
            assert launch["num_warps"] in (1, 2, 4, 8)
