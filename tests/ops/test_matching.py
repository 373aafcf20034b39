"""The distance of class means: equal to the equation for any classes, and an operator as PyTorch wants it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atom_fast as af
from atom_fast import reference
from atom_fast.kernels.matching import matching_launch
from atom_fast.ops.matching import class_groups_op, class_mean_distance, class_mean_distances, class_mean_distances_op
from tests.cubin import compile_kernel

BACKENDS = ("triton", "torch")
IMPLEMENTATIONS = {"triton": "triton", "torch": "c"}


def draw(rows, columns, device, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(device, dtype)


@given(
    members=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    columns=st.integers(1, 40),
    shuffled=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15)
@pytest.mark.parametrize("name", BACKENDS)
def test_value_and_gradient_equal_the_equation(name, members, columns, shuffled, seed, device):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(100, generator=generator)[: len(members)]  # labels are names, not indices
    labels = [ids.repeat_interleave(torch.tensor(counts)) for counts in zip(*members, strict=True)]
    if shuffled:
        labels = [side[torch.randperm(len(side), generator=generator)] for side in labels]
    real, synthetic = (draw(len(side), columns, device, seed=seed + k) for k, side in enumerate(labels))
    labels = [side.to(device) for side in labels]
    synthetic.requires_grad_()
    expected = reference.class_mean_distance(real, synthetic, *labels)
    with af.backend(name):
        loss = af.mean_matching_loss(real, synthetic, real_labels=labels[0], synthetic_labels=labels[1])
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-13)
    gradients = [torch.autograd.grad(value, synthetic)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", (*BACKENDS, "reference"))
def test_one_class_without_labels_in_every_dtype_and_stride(name, device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        real, synthetic = draw(5, 14, device, dtype)[:, ::2], draw(3, 7, device, dtype, 1).requires_grad_()
        with af.backend(name):
            loss = af.mean_matching_loss(real, synthetic)
        (gradient,) = torch.autograd.grad(loss, synthetic)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.dtype == dtype
        expected = (real.double().mean(0) - synthetic.double().mean(0)).square().sum()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", (*BACKENDS, "reference"))
@pytest.mark.parametrize("columns", [(7, 300, 40), (300, 0, 40)])
def test_several_pairs_are_each_computed_as_alone(name, columns, device):
    dtypes = torch.float32, torch.bfloat16, torch.float32
    labels = torch.tensor([1, 0, 1, 1, 0], device=device)
    groups = af.class_groups(labels, labels.flip(0))
    real = [draw(5, width, device, dtype) for width, dtype in zip(columns, dtypes, strict=True)]
    synthetic = [draw(5, side.shape[1], device, side.dtype, seed=1).requires_grad_() for side in real]
    weights = torch.tensor([1.0, 3.0, 0.01], device=device)
    with af.backend(name):
        distances = class_mean_distances(real, synthetic, groups)
        alone = [class_mean_distance(*pair, groups) for pair in zip(real, synthetic, strict=True)]
    together = torch.autograd.grad(distances, synthetic, weights)
    apart = [torch.autograd.grad(*each)[0] for each in zip(alone, synthetic, weights, strict=True)]
    torch.testing.assert_close(distances, torch.stack(alone), rtol=1e-6, atol=0)
    assert all(torch.equal(*pair) for pair in zip(together, apart, strict=True))
    assert [gradient.dtype for gradient in together] == list(dtypes)


@pytest.mark.parametrize("name", BACKENDS)
def test_first_derivatives_only(name, device):
    real, synthetic = draw(4, 3, device), draw(2, 3, device, seed=1).requires_grad_()
    with af.backend(name):
        assert torch.autograd.gradcheck(lambda x: af.mean_matching_loss(real, x), (synthetic,))
        loss = af.mean_matching_loss(real, synthetic)
        (gradient,) = torch.autograd.grad(loss, synthetic, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula|does not require grad"):
            torch.autograd.grad(gradient.square().sum(), synthetic)
        with pytest.raises(NotImplementedError, match="matching has no forward-mode derivative"):
            torch.func.jvp(lambda x: af.mean_matching_loss(real, x), (synthetic,), (synthetic,))


@pytest.mark.parametrize("name", BACKENDS)
def test_operators_are_registered_as_pytorch_asks(name, device):
    labels = torch.tensor([1, 0, 1], device=device)
    torch.library.opcheck(class_groups_op, (labels, labels.flip(0)))
    groups = af.class_groups(labels, labels.flip(0))
    real, synthetic = draw(3, 7, device), draw(3, 7, device, seed=1).requires_grad_()
    for orders in (groups, (None,) * 4):
        torch.library.opcheck(class_mean_distances_op, ([synthetic], [real], *orders, IMPLEMENTATIONS[name]))


@pytest.mark.parametrize(
    ("real", "synthetic", "message"),
    [
        ((4, 3, 5, 5), (4, 3, 5, 5), r"must be \[B, D\]"),
        ((4, 75), (4, 74), r"agree in size; got \(4, 75\) and \(4, 74\)"),
        ((2, 5), (0, 5), "a class is on one side only: 2 real and 0 synthetic samples"),
    ],
)
def test_bad_input_is_named(real, synthetic, message):
    with pytest.raises(ValueError, match=message):
        af.mean_matching_loss(torch.zeros(real), torch.zeros(synthetic))


@pytest.mark.parametrize(("grouped", "capability"), [(False, 86), (True, 90)])
def test_kernel_does_not_spill(grouped, capability):
    launch = matching_launch(2048)
    warps = launch.pop("num_warps")
    signature = {"p_real": "*fp32", "p_synthetic": "*fp32"}
    signature |= dict.fromkeys(
        ("p_real_order", "p_real_offsets", "p_synthetic_order", "p_synthetic_offsets"),
        "*i64" if grouped else "constexpr",
    )
    signature |= {"p_partial": "*fp32", "p_gradient": "*fp32"}
    signature |= dict.fromkeys(("n_real", "n_synthetic", "D", "real_stride", "synthetic_stride"), "i32")
    constants = {
        "GROUPED": grouped,
        "ACCUMULATE": "tl.float32",
        "BLOCK_N": launch["BLOCK_N"],
        "BLOCK_D": launch["BLOCK_D"],
    }
    signature |= dict.fromkeys(constants, "constexpr")
    constants |= {name: None for name, kind in signature.items() if kind == "constexpr" and name.startswith("p_")}
    report = compile_kernel(
        "matching", "class_mean_distance_kernel", signature=signature, constants=constants, capability=capability,
        num_warps=warps, aligned=("p_real", "p_synthetic", "p_gradient", "D", "real_stride", "synthetic_stride"),
    )  # fmt: skip
    assert report.spills == 0
    assert report.widest_load == 128
