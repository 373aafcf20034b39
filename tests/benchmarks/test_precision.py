"""The emulated precisions round as a GPU does, and float64 is the gradient of the fused network."""

import json

import pytest
import torch

from atom_fast.data.sources import load_data
from atom_fast.distillation.config import preset
from atom_fast.distillation.matching import matching_terms, weighted_terms
from atom_fast.functional import class_groups
from benchmarks import precision
from benchmarks.precision import WAYS, Rounding, to_tf32
from tests.benchmarks.tiny import command


def test_tf32_keeps_ten_bits_and_rounds_to_the_nearest_even():
    one = 2.0**-10  # the last bit of 1
    cases = {1 + one / 2: 1, 1 + 1.5 * one: 1 + 2 * one, 1 + 0.51 * one: 1 + one, -1 - 0.75 * one: -1 - one, 0: 0}
    assert to_tf32(torch.tensor(list(cases))).tolist() == list(cases.values())
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert ((to_tf32(x) - x).abs() <= x.abs() * 2**-11).all() and torch.equal(to_tf32(to_tf32(x)), to_tf32(x))
    assert torch.equal(to_tf32(x.half().float()), x.half().float()), "float16 has as many bits"


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_exact_gradient_is_that_of_the_network(norm):
    config = preset("paper", ipc=2, real_batch=3, width=8, norm=norm)
    run = precision._prepare(config, load_data("digits"))
    labels = torch.arange(10).repeat_interleave(3)
    groups = class_groups(labels, run.labels)
    real = run.gather_real(torch.arange(30))
    exact = Rounding(lambda x: x, lambda x: x, torch.float64)
    gradient, stored = precision._gradient(run, precision._extract(run, real, exact), exact, groups)
    images = run.images.clone().requires_grad_()
    terms = matching_terms(run.extract(real), run.extract(images), run.config, groups)
    weights = torch.tensor([weight for _, weight in weighted_terms(run.network, run.config)])
    (expected,) = torch.autograd.grad(terms, images, weights * run.config.loss_scale)
    torch.testing.assert_close(gradient.float(), expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    assert len(stored) == 3 * 3 - 1  # of three convolutions, two of their outputs and three pooled ones


def test_float16_is_as_exact_as_tf32(tmp_path):
    """The command, on digits: the errors are ordered by the mantissa, and the factor changes a power of two alone."""
    options = ("--ipc", "2", "--real-batch", "4", "--width", "16", "--networks", "2")
    printed, _ = command("precision", *options, "--out", tmp_path / "precision.json")
    cells = {cell["way"]: cell for cell in json.loads((tmp_path / "precision.json").read_text())["cells"]}
    assert set(cells) == set(WAYS) and all(name in printed for name in WAYS)
    errors = {name: sum(cell["errors"]) / 2 for name, cell in cells.items()}
    assert errors["float32"] < 1e-4
    assert 0.7 * errors["tf32"] < errors["tf32, real images in float16"] < 1.3 * errors["tf32"]
    assert 0.7 * errors["tf32"] < errors["float16"] < 1.5 * errors["tf32"] < errors["bfloat16"]
    assert cells["float16"]["largest"] == pytest.approx(1024 * cells["float16, without the factor"]["largest"], rel=0.1)
