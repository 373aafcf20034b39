"""Where training images live: on the device, or in host memory that it reads."""

import contextlib
import gc
import math

import pytest
import torch

from atom_fast.data import placement
from atom_fast.data.dataset import ImageData
from atom_fast.data.placement import describe_place, image_reader, keeps_on_device, readable
from atom_fast.data.whitening import fit_preprocessing, real_image_gatherer
from tests.distillation.test_step import make_data

CPU = torch.device("cpu")


def pretend(monkeypatch, memory):
    """Let every device have ``memory`` free bytes."""
    monkeypatch.setattr(placement, "device_memory", lambda device: memory)


def test_data_take_at_most_half_of_a_devices_free_memory(monkeypatch):
    assert placement.device_memory(CPU) == math.inf and keeps_on_device(2**60, CPU)
    pretend(monkeypatch, 1000)
    assert keeps_on_device(500, CPU) and not keeps_on_device(501, CPU)


def test_free_memory_of_a_gpu_counts_what_pytorch_holds_unused(monkeypatch):
    for name, value in {"mem_get_info": (700, 9000), "memory_reserved": 500, "memory_allocated": 200}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert placement.device_memory(torch.device("cuda", 0)) == 1000


def test_images_that_do_not_fit_stay_where_they_are(monkeypatch):
    data = make_data()
    fitting = data.to("cpu")
    assert fitting.host_images is None and data.fingerprint == fitting.fingerprint
    pretend(monkeypatch, data.train_images.nbytes / 2)
    kept = data.to("cpu")
    assert kept.host_images is kept.stored_images is data.train_images
    assert kept.fingerprint == data.fingerprint and kept.to("cpu") is kept
    pretend(monkeypatch, math.inf)
    assert kept.to("cpu").host_images is not None, "data stay where they are while work goes on"


@pytest.mark.parametrize(("channels", "size"), [(3, 8), (1, 7)], ids=["in words", "in bytes"])
@pytest.mark.parametrize("offset", [0, 1])
def test_images_read_from_host_memory_are_those_of_the_indices(channels, size, offset):
    generator = torch.Generator().manual_seed(0)
    memory = torch.randint(0, 256, (offset + 9 * channels * size**2,), generator=generator, dtype=torch.uint8)
    images = memory[offset:].view(9, channels, size, size)
    indices = torch.tensor([8, 0, 3, 3])
    read = image_reader(images, on_host=True)(indices)
    assert read.dtype == torch.uint8 and torch.equal(read, images[indices])
    floats = images.float()
    assert torch.equal(image_reader(floats, on_host=True)(indices), floats[indices])


@pytest.mark.parametrize("kind", ["standard", "zca"])
def test_gathered_images_have_the_same_bits_from_host_memory(kind, monkeypatch):
    monkeypatch.setattr("atom_fast.data.whitening._keeps_bytes", lambda device: True)  # as on a GPU
    data = make_data()
    space = fit_preprocessing(data.train_images, kind, progress=False)
    indices = torch.tensor([[3, 17, 0], [29, 3, 8]])
    layout = {"memory_format": torch.channels_last, "progress": False}
    expected = real_image_gatherer(data, space, **layout)(indices)
    pretend(monkeypatch, 100)
    real = real_image_gatherer(data.to("cpu"), space, **layout)(indices)
    assert torch.equal(real, expected) and real.stride() == expected.stride()


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (1.536e8, "154 MB"), (8e10, "80.0 GB")],
)
def test_sizes_are_written_for_people(size, words):
    assert readable(size) == words


def test_a_place_is_said_with_what_is_free(monkeypatch):
    assert describe_place(153_600_000, CPU, on_host=False) == "in memory (154 MB)"
    pretend(monkeypatch, 80e9)
    gpu = torch.device("cuda", 1)
    assert describe_place(153_600_000, gpu, on_host=False) == "on cuda:1 (154 MB of 80.0 GB free)"
    assert describe_place(60e9, gpu, on_host=True) == "in pinned host memory (60.0 GB; cuda:1 has 80.0 GB free)"


def test_data_describe_themselves(monkeypatch):
    data = make_data()
    facts = data.describe()
    assert facts == {
        "dataset": "made", "source": "tensors", "classes": 3, "class_names": ["class 0", "class 1", "class 2"],
        "training_images": 30, "test_images": 3, "images_per_class": 10, "shape": [3, 8, 8], "bytes": 33 * 192,
        "fingerprint": data.fingerprint, "training_images_are": "in memory (5.8 kB)",
    }  # fmt: skip
    pretend(monkeypatch, 2000)
    assert data.describe()["training_images_are"] == "in host memory (5.8 kB; cpu has 2.0 kB free)"
    uneven = ImageData.from_tensors("made", ("a", "b"), data.train_images[:3], torch.tensor([0, 1, 1]),
                                    data.test_images, torch.zeros(3, dtype=torch.int64))  # fmt: skip
    assert uneven.describe()["images_per_class"] == "1 to 2"


class Runtime:
    """CUDA's pinning, pretended: 0 is success."""

    def __init__(self, answer=0):
        self.answer, self.registered = answer, {}

    def cudaHostRegister(self, address, size, flags):
        self.registered[address] = size
        return self.answer

    def cudaHostUnregister(self, address):
        del self.registered[address]


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)

    def check_error(result):
        if result != 0:
            raise RuntimeError("operation not permitted\n(800)")

    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    return runtime


def test_pinned_memory_is_released_with_the_images(runtime):
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    placement._pin(images)
    assert runtime.registered == {images.data_ptr(): 960}
    del images
    gc.collect()
    assert runtime.registered == {}


def test_memory_that_cannot_be_pinned_is_an_error_with_a_way_out(runtime):
    runtime.answer = 800
    with pytest.raises(RuntimeError, match=r"^960 bytes of training images .*\(operation not permitted\).*'cpu'$"):
        placement._pin(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))


def test_a_gpus_tensor_is_made_on_the_memory_itself(runtime, monkeypatch):
    """The array interface that PyTorch is given, without a GPU."""
    images, given = torch.zeros(5, 3, 8, 8, dtype=torch.uint8), []

    def as_tensor(shared, device):
        given.append((shared, device))
        return images if len(given) == 1 else torch.zeros(1)

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: bool(runtime.registered))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    gpu = torch.device("cuda", 1)
    assert placement.readable_by(images, gpu) is images
    ((shared, device),) = given
    interface = shared.__cuda_array_interface__
    assert device == gpu and shared.images is images
    assert (interface["shape"], interface["typestr"], interface["data"]) == (
        (5, 3, 8, 8),
        "|u1",
        (images.data_ptr(), False),
    )
    with pytest.raises(RuntimeError, match="pinned for another GPU than cuda:1"):
        placement.readable_by(images, gpu)
    assert len(runtime.registered) == 1, "memory is pinned once"


@pytest.mark.gpu
def test_a_gpu_reads_pinned_host_memory_also_in_a_graph(device, monkeypatch):
    data = make_data(per_class=4000)
    pretend(monkeypatch, 1000)
    before = torch.cuda.memory_allocated(device)
    real = data.to(device)
    assert torch.cuda.memory_allocated(device) - before < data.train_images.nbytes
    assert real.train_images.is_cuda and real.train_images.data_ptr() == data.train_images.data_ptr()
    assert data.train_images.is_pinned() and real.test_images.device.type == "cpu"
    gather = real_image_gatherer(real, fit_preprocessing(data.train_images, "standard").to(device), progress=False)
    indices = torch.tensor([5, 11_999, 0], device=device)
    gather(indices)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gather(indices)
    indices.copy_(torch.tensor([7, 8, 11_000]))
    graph.replay()
    expected = fit_preprocessing(data.train_images, "standard").to_model(data.train_images[[7, 8, 11_000]])
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)
    assert real.to("cpu").train_images is data.train_images
