"""Images of 128x128 and 224x224: fused blocks and augmentation against float64, and a folder from the command line."""

import contextlib
import json
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import atom_fast as af
from atom_fast.cli import main
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.run_folder import SYNTHETIC_FILE
from atom_fast.names import OPERATIONS
from atom_fast.networks.convnet import ConvNet, default_depth
from atom_fast.pictures import CELL_SIZE, LARGEST_SIDE, _cell
from atom_fast.synthetic import SyntheticSet
from atom_fast.training import trainer
from tests.distillation.test_step import make_data
from tests.ops.test_augmentation import assert_like_reference, normal, parameters_of
from tests.processes import Server

Image = pytest.importorskip("PIL.Image")

CLASSES = ("church", "golf ball")
# A tiny run; every second step is a checkpoint.
SETTINGS = (
    *("--ipc", "1", "--iterations", "6", "--real-batch", "2", "--width", "4", "--log-every", "2"),
    *("--checkpoint-every", "2", "--image-every", "6", "--resolution", "128", "--class-chunk", "1"),
    *("--device", "cpu", "--quiet"),
)


def networks(side, norm):
    """A network of the paper's depth at 4 channels, its images, and the same in float64."""
    torch.manual_seed(0)
    network = ConvNet(3, 10, side, width=4, depth=default_depth(side, side), norm=norm, initialization="normal")
    exact = ConvNet(3, 10, side, width=4, depth=default_depth(side, side), norm=norm, initialization="normal").double()
    exact.load_state_dict(network.state_dict())
    images = F.interpolate(torch.rand(2, 3, 32, 32), size=side, mode="bilinear") + 0.1 * torch.randn(2, 3, side, side)
    return (
        network.requires_grad_(False),
        exact.requires_grad_(False),
        images.contiguous(memory_format=torch.channels_last),
    )


def attention(network, images, backend):
    """Embedding, maps and the gradient of the images for random gradients of both, in float64."""
    images = images.clone().requires_grad_()
    with af.backend(backend):
        embedding, maps = network.attention(images)
    generator = torch.Generator().manual_seed(1)
    outputs = [embedding, *maps]
    gradients = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    torch.autograd.backward(outputs, gradients)
    return [tensor.detach().double() for tensor in (*outputs, images.grad)]


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize(("side", "depth", "last"), [(128, 5, 4), (224, 6, 3)])
def test_the_blocks_in_c_are_as_exact_as_unfused(side, depth, last, norm):
    network, exact, images = networks(side, norm)
    assert len(network.blocks) == depth and network.embedding_size == 4 * last**2
    assert network.unfused_reason() is None
    wanted = attention(exact, images.double(), "reference")
    plain, fused = (attention(network, images, backend) for backend in ("reference", "torch"))
    for got, unfused, expected in zip(fused, plain, wanted, strict=True):
        assert (got - expected).norm() <= 4 * (unfused - expected).norm() + 1e-5 * expected.norm()


@pytest.mark.parametrize("side", [128, 224])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_augmentation_is_the_reference_forward_and_backward(side, backend):
    names = (*OPERATIONS, "none")
    images = normal(len(names), 3, side, side).contiguous(memory_format=torch.channels_last)
    with af.backend(backend):
        assert_like_reference(images, parameters_of(names), None, 2e-4)


def test_the_kernel_of_the_augmentation_is_the_reference(device, triton_backend):
    """Without colour, whose mean of an image takes the interpreter a minute."""
    names = ("rotate",)
    images = normal(len(names), 1, 128, 128, device=device)
    assert_like_reference(images, parameters_of(names, device), None, 2e-4)


def test_a_test_set_is_brought_to_model_space_in_parts(monkeypatch):
    data, sizes = make_data(classes=20, size=64), []
    space = fit_preprocessing(data.train_images, "standard")
    whole = trainer.in_model_space(data.train_images, space, torch.device("cpu"), torch.channels_last)
    to_model = type(space).to_model
    monkeypatch.setattr(type(space), "to_model", lambda *a: sizes.append(len(a[1])) or to_model(*a))
    monkeypatch.setattr(trainer, "_PREPROCESSED_AT_ONCE", 7 * 64**2)
    parts = trainer.in_model_space(data.train_images, space, torch.device("cpu"), torch.channels_last)
    assert torch.equal(parts, whole) and max(sizes) == 7
    images, labels = data.train_images.float(), data.train_labels
    batches = [len(labels) for _, labels in trainer.in_batches(lambda x: x, images, labels)]
    assert max(batches) * 64**2 <= trainer.TEST_PIXELS["cpu"] and sum(batches) == len(labels)


@pytest.mark.parametrize(
    ("rows", "columns", "side", "cell"),
    [
        (10, 1, 8, 64),  # digits, enlarged
        (20, 10, 128, 128),
        (200, 10, 64, 64),  # Tiny ImageNet, as it is
        (100, 10, 128, 64),
        (1000, 10, 224, 74),
    ],
)
def test_pictures_of_many_large_images_can_be_opened(rows, columns, side, cell):
    assert _cell(rows, columns, side, side) == (cell, cell)
    assert cell * rows <= LARGEST_SIDE or cell < 2 * CELL_SIZE


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of 2 classes of 160x128, each with 4 images to train and 2 to test on: smooth colours and noise."""
    folder, draw = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                coarse = draw.integers(0, 200, (4, 4, 3)) + 25 * label
                image = Image.fromarray(coarse.astype(np.uint8)).resize((160, 128), Image.Resampling.BICUBIC)
                image.save(folder / split / name / f"{number}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("fcntl", reason="processes and signals as POSIX has them")
    with contextlib.closing(Server()) as server:
        yield server


def test_a_folder_is_distilled_stopped_killed_resumed_and_evaluated(photographs, server, tmp_path):
    printed, run = tmp_path / "printed", tmp_path / "run"
    data = ["--dataset", "folder", "--data-dir", photographs]

    def distil(output, *options, signal_at=None):
        """Return the exit code; ``signal_at``: a signal, and the checkpoint at which the process receives it."""
        number, iteration = signal_at or (0, 0)
        checkpoint = output / "checkpoints" / f"iteration-{iteration:08d}.safetensors"
        arguments = "distill", *data, *SETTINGS, "--output", output, *options
        return server.run(*arguments, printed=printed, signalled={"number": number, "file": str(checkpoint)})

    straight = tmp_path / "straight"
    assert distil(straight) == 0, printed.read_text()
    assert distil(run, signal_at=(signal.SIGKILL, 2)) == -signal.SIGKILL
    assert distil(run, "--resume", signal_at=(signal.SIGTERM, 4)) == 143
    assert not (run / SYNTHETIC_FILE).exists()
    assert distil(run, "--resume") == 0, printed.read_text()
    resumed, whole = (SyntheticSet.load(folder) for folder in (run, straight))
    assert torch.equal(resumed.images, whole.images)
    assert whole.metadata["config"]["depth"] == 5

    def command(*arguments, code=0):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.output

    evaluate = "evaluate", straight, *data[2:], "--networks", 1, "--epochs", 1, "--together", 1, "--device", "cpu"
    assert "folder ipc=1 atom" in command(*evaluate, "--quiet", "--json", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())
    assert "images: 2, 3, 128, 128" in command("info", straight)
    command("show", straight, "--output", tmp_path / "shown.png")
    command("export", straight, tmp_path / "images")
    exported = sorted((tmp_path / "images" / "train").glob("*/*.png"))
    assert len(exported) == 2 and {Image.open(path).size for path in exported} == {(128, 128)}
    with Image.open(tmp_path / "shown.png") as shown:
        assert shown.width >= 2 * 128 and shown.height >= 128
    distil_again = "distill", *data, *SETTINGS, "--output", tmp_path / "refused"
    assert "use preprocessing 'standard' (--preprocessing standard)" in command(
        *distil_again, "--preprocessing", "zca", code=2
    )
    assert "divides the sides of images of 128x128: one of 1, 2, 4, 8" in command(
        *distil_again, "--partition", 3, code=2
    )
    assert not (tmp_path / "refused").exists()
