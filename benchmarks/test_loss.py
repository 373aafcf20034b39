"""One layer's matching loss: the eager equations, torch.compile of them, and this project's operators, side by side.

    python -m pytest benchmarks/test_loss.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

Real and synthetic features are both [B, 128, 32, 32], what the first block of the CIFAR ConvNet gives; the time covers
both sides. A backward is timed alone, without the forward that made its graph.
"""

import pytest
import torch

import atom_fast as af
from atom_fast import reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BATCHES = (256, 1280) if CUDA else (256,)
DTYPES = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)


def eager(real, synthetic):
    return reference.attention_matching_loss(real, synthetic, 4.0, 4.0)


compiled = torch.compile(eager)


def atom_fast(real, synthetic):
    return af.attention_matching_loss(real, synthetic)


def features(batch, dtype, channels_last):
    generator = torch.Generator(DEVICE).manual_seed(0)
    values = torch.randn(batch, 128, 32, 32, generator=generator, device=DEVICE, dtype=dtype).relu_()
    return values.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def synchronized(function):
    def run():
        result = function()
        if CUDA:
            torch.cuda.synchronize()
        return result

    return run


@pytest.mark.parametrize("implementation", [eager, compiled, atom_fast], ids=["eager", "compiled", "atom_fast"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_attention_matching_loss(benchmark, direction, batch, dtype, channels_last, implementation):
    benchmark.group = f"{direction} [{batch}, 128, 32, 32] {dtype} {'channels_last' if channels_last else 'nchw'}"
    real, synthetic = features(batch, dtype, channels_last), features(batch, dtype, channels_last).requires_grad_()

    def forward():
        return implementation(real, synthetic)

    def backward(loss):
        return torch.autograd.grad(loss, synthetic, retain_graph=True)

    if direction == "forward":
        run = synchronized(forward)
    elif direction == "both":
        run = synchronized(lambda: backward(forward()))
    else:
        loss = forward()
        run = synchronized(lambda: backward(loss))
    benchmark.pedantic(run, rounds=10 if CUDA else 5, warmup_rounds=2)
