"""Preprocessing: standardisation and ZCA against their definitions, their inverses, and what they are fitted on."""

import sys

import pytest
import torch

from atom_fast.data import whitening
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import KINDS, ZCA_EPS, Preprocessing, fit_preprocessing, real_image_gatherer
from atom_fast.distillation.config import preset

SHAPE = (3, 6, 5)
SIZE = 90


def smooth_images(count, seed=0, brightness=128):
    """uint8 [count, 3, 6, 5] whose pixels and channels are correlated, like photographs."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 1, 1, 1, generator=generator)
    rows = torch.randn(count, 3, 6, 1, generator=generator)
    noise = torch.randn(count, *SHAPE, generator=generator)
    return (brightness + 60 * common + 30 * rows + 20 * noise).clamp(0, 255).to(torch.uint8)


def fit(images, kind):
    if kind != "standard":
        pytest.importorskip("kornia")
    return fit_preprocessing(images, kind, progress=False)


def orthonormal_preprocessing(standardised=False):
    """ZCA-shaped tensors without a fit: a symmetric orthogonal matrix is its own inverse."""
    direction = torch.nn.functional.normalize(torch.randn(SIZE, generator=torch.Generator().manual_seed(2)), dim=0)
    matrix = torch.eye(SIZE) - 2 * torch.outer(direction, direction)
    tensors = {"zca_mean": torch.full(SHAPE, 0.25), "zca_matrix": matrix, "zca_inverse": matrix.clone()}
    if standardised:
        tensors |= {"mean": torch.tensor([0.4, 0.5, 0.6]), "std": torch.tensor([0.2, 0.25, 0.3])}
    return Preprocessing.from_tensors(tensors)


def test_standard_gives_each_channel_mean_zero_and_deviation_one():
    images = smooth_images(500)
    model = fit(images, "standard").to_model(images).double()
    torch.testing.assert_close(model.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-5)


def test_standard_is_the_mean_and_deviation_of_pixels_between_0_and_1():
    images = smooth_images(300)
    preprocessing = fit(images, "standard")
    pixels = images.double() / 255
    assert preprocessing.kind == "standard"
    torch.testing.assert_close(preprocessing.mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(preprocessing.std.double(), pixels.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_a_constant_channel_stays_finite():
    images = smooth_images(20)
    images[:, 1] = 7
    preprocessing = fit(images, "standard")
    assert preprocessing.std[1] == 1
    assert preprocessing.to_model(images)[:, 1].abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["zca", "zca_standardized"])
def test_whitened_covariance_is_the_identity_up_to_eps(kind):
    images = smooth_images(3000)
    preprocessing = fit(images, kind)
    pixels = images.double() / 255
    if kind == "zca_standardized":
        pixels = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), correction=0, keepdim=True)
    eigenvalues, eigenvectors = torch.linalg.eigh(pixels.flatten(1).T.cov())
    whitened = preprocessing.to_model(images).flatten(1).double()
    # In each direction ZCA leaves s / (s + eps) of a variance s: 1 where s is far above eps.
    expected = eigenvectors @ torch.diag(eigenvalues / (eigenvalues + ZCA_EPS)) @ eigenvectors.T
    torch.testing.assert_close(whitened.T.cov(), expected, rtol=0, atol=1e-3)
    assert whitened.mean(0).abs().max() < 1e-4
    principal = eigenvectors[:, -1] @ whitened.T.cov() @ eigenvectors[:, -1]
    assert eigenvalues[-1] > 2 and 0.95 < principal < 1.0


@pytest.mark.parametrize("kind", ["zca", "zca_standardized"])
def test_zca_is_kornias(kind):
    kornia = pytest.importorskip("kornia")
    images = smooth_images(400)
    pixels = images.float() / 255
    if kind == "zca_standardized":
        pixels = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), correction=0, keepdim=True)
    zca = kornia.enhance.ZCAWhitening(eps=0.1, compute_inv=True).fit(pixels)
    preprocessing = fit(images, kind)
    torch.testing.assert_close(preprocessing.to_model(images), zca(pixels), rtol=0, atol=1e-4)
    assert preprocessing.kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_deviation_is_that_of_the_training_images_in_model_space(kind):
    images = smooth_images(3000)
    preprocessing = fit(images, kind)
    assert preprocessing.deviation == pytest.approx(preprocessing.to_model(images).double().std().item(), abs=1e-3)
    assert preprocessing.deviation == 1 if kind == "standard" else preprocessing.deviation < 0.95


def test_of_equal_images_there_is_no_deviation_to_divide_by():
    assert fit(torch.full((20, *SHAPE), 7, dtype=torch.uint8), "zca").deviation == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse_gives_the_pixels_back(kind):
    preprocessing = fit(smooth_images(400), kind)
    unseen = smooth_images(50, seed=9, brightness=90)
    pixels = preprocessing.to_pixels(preprocessing.to_model(unseen))
    torch.testing.assert_close(pixels, unseen.float() / 255, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_training_images_are_fitted(kind):
    train, test = smooth_images(400), smooth_images(400, seed=3, brightness=70)
    preprocessing = fit(train, kind)
    assert preprocessing.to_model(train).mean().abs() < 1e-3
    before = {name: tensor.clone() for name, tensor in preprocessing.tensors().items()}
    assert preprocessing.to_model(test).mean() < -0.05
    assert all(torch.equal(before[name], tensor) for name, tensor in preprocessing.tensors().items())


@pytest.mark.parametrize("standardised", [False, True], ids=["zca", "zca_standardized"])
def test_model_space_equals_the_formula(device, standardised):
    preprocessing = orthonormal_preprocessing(standardised).to(device)
    images = smooth_images(30).to(device)
    pixels = images.double() / 255
    if standardised:
        pixels = (pixels - preprocessing.mean[:, None, None]) / preprocessing.std[:, None, None]
    expected = ((pixels - preprocessing.zca_mean).flatten(1) @ preprocessing.zca_matrix.double()).view(images.shape)
    model = preprocessing.to_model(images)
    assert model.dtype == torch.float32 and model.device == images.device
    torch.testing.assert_close(model.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(preprocessing.to_pixels(model), images.float() / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bytes_and_fractions_mean_the_same_and_are_not_written_to(dtype):
    images = smooth_images(20)
    fractions = (images.double() / 255).to(dtype)
    kept = fractions.clone()
    tolerance = 1e-2 if dtype == torch.float16 else 1e-5
    for preprocessing in (orthonormal_preprocessing(), fit(images, "standard")):
        model = preprocessing.to_model(fractions)
        assert model.dtype == torch.float32
        torch.testing.assert_close(model, preprocessing.to_model(images), rtol=0, atol=tolerance)
        preprocessing.to_pixels(model)
        assert torch.equal(fractions, kept)


def test_a_single_image_is_put_into_model_space_as_in_a_batch():
    images = smooth_images(20)
    for preprocessing in (orthonormal_preprocessing(), orthonormal_preprocessing(True), fit(images, "standard")):
        model = preprocessing.to_model(images[0])
        assert torch.equal(model, preprocessing.to_model(images[:1])[0])
        assert torch.equal(preprocessing.to_pixels(model), preprocessing.to_pixels(model[None])[0])


def test_it_is_a_transform_of_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    images = smooth_images(20)
    preprocessing = fit(images, "standard")
    picture = transforms.functional.to_pil_image(images[3])
    model = transforms.Compose([transforms.ToTensor(), preprocessing.to_model])(picture)
    torch.testing.assert_close(model, preprocessing.to_model(images)[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_that_are_not_in_0_to_1_are_refused(dtype):
    images = smooth_images(20)
    preprocessing = fit(images, "standard")
    with pytest.raises(ValueError, match=r"in \[0, 1\]; got torch.float\d\d from [\d.]+ to \d+: divide by 255"):
        preprocessing.to_model(images.to(dtype))
    with pytest.raises(ValueError, match=r"leave out an earlier normalisation"):
        preprocessing.to_model(preprocessing.to_model(images).to(dtype))
    preprocessing.to_model(torch.tensor([-0.1, 1.1], dtype=dtype).view(2, 1, 1, 1).expand(2, *SHAPE))  # interpolated


def test_it_compiles_in_one_graph():
    images = smooth_images(20)
    preprocessing = fit(images, "standard")
    compiled = torch.compile(preprocessing.to_model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images / 255), preprocessing.to_model(images))


def test_it_shows_itself_in_a_line():
    assert repr(orthonormal_preprocessing()) == "Preprocessing(kind='zca')"
    statistics = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    shown = "Preprocessing(kind='standard', mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.201])"
    assert repr(Preprocessing(*statistics)) == shown


def test_pixels_are_clamped():
    preprocessing = fit(smooth_images(50), "standard")
    pixels = preprocessing.to_pixels(torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1).expand(2, *SHAPE))
    assert torch.equal(pixels, torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, *SHAPE))


def test_tensors_are_enough_to_rebuild_it(device):
    images = smooth_images(20)
    for preprocessing in (orthonormal_preprocessing(), orthonormal_preprocessing(True), fit(images, "standard")):
        rebuilt = Preprocessing.from_tensors({name: tensor.clone() for name, tensor in preprocessing.tensors().items()})
        assert rebuilt.kind == preprocessing.kind
        assert torch.equal(rebuilt.to_model(images), preprocessing.to_model(images))
        moved = rebuilt.to(device)
        for name, tensor in moved.tensors().items():
            assert tensor.device.type == ("cpu" if "matri" in name or "inverse" in name else device.type), name
        torch.testing.assert_close(moved.to_model(images.to(device)).cpu(), preprocessing.to_model(images))
    with pytest.raises(ValueError, match=r"got \['mean', 'zca_mean'\]"):
        Preprocessing.from_tensors({"mean": torch.zeros(3), "zca_mean": torch.zeros(SHAPE)})


def test_other_shapes_and_types_are_refused():
    standard, zca = fit(smooth_images(20), "standard"), orthonormal_preprocessing()
    with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\], or one image \[3, H, W\]; got \[2, 1, 6, 5\]"):
        standard.to_model(torch.zeros(2, 1, 6, 5))
    with pytest.raises(ValueError, match=r"must be \[B, 3, 6, 5\], or one image \[3, 6, 5\]; got \[2, 3, 5, 6\]"):
        zca.to_pixels(torch.zeros(2, 3, 5, 6))
    with pytest.raises(ValueError, match="uint8 or floating point.*int64"):
        zca.to_model(torch.zeros(2, *SHAPE, dtype=torch.int64))
    with pytest.raises(ValueError, match="model space must be floating point; got torch.uint8"):
        zca.to_pixels(torch.zeros(2, *SHAPE, dtype=torch.uint8))
    with pytest.raises(ValueError, match="standard, zca, zca_standardized; got 'pca'"):
        fit_preprocessing(smooth_images(20), "pca")
    with pytest.raises(ValueError, match="must be uint8.*float32"):
        fit_preprocessing(torch.zeros(2, *SHAPE), "standard")


def test_without_kornia_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setitem(sys.modules, "kornia.enhance", None)
    assert fit_preprocessing(smooth_images(20), "standard").kind == "standard"
    with pytest.raises(ImportError, match="pip install kornia"):
        fit_preprocessing(smooth_images(20), "zca")


def test_the_fit_is_announced_unless_progress_is_off(capsys):
    pytest.importorskip("kornia")
    fit_preprocessing(smooth_images(30), "zca", progress=False)
    assert capsys.readouterr() == ("", "")
    fit_preprocessing(smooth_images(30), "zca")
    out, err = capsys.readouterr()
    assert out == "" and "ZCA: fitting 90 x 90 on 30 training images" in err


@pytest.mark.parametrize("kind", ["zca", "zca_standardized"])
def test_zca_fitted_in_chunks_is_kornias(kind, monkeypatch, capsys):
    pytest.importorskip("kornia")
    images = smooth_images(500)
    whole = fit_preprocessing(images, kind, progress=False)
    monkeypatch.setattr(whitening, "_FITTED_AT_ONCE", 1000)
    monkeypatch.setattr(whitening, "_CHUNK", 64)
    chunked = fit_preprocessing(images, kind, progress=False)
    assert capsys.readouterr() == ("", "")
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(chunked.tensors()[name], tensor, rtol=1e-4, atol=1e-4)
    expected = (images.double() / 255).flatten(1)
    if kind == "zca_standardized":
        expected = (expected.view(images.shape) - chunked.mean[:, None, None]) / chunked.std[:, None, None]
        expected = expected.flatten(1).double()
    covariance = expected.T.cov()
    values, directions = torch.linalg.eigh(covariance)
    matrix = (directions / (values + ZCA_EPS).sqrt()) @ directions.T
    torch.testing.assert_close(chunked.zca_matrix.double(), matrix, rtol=1e-5, atol=1e-5)


def test_the_statistics_of_channels_do_not_depend_on_chunks(monkeypatch):
    images = smooth_images(50)
    whole = fit_preprocessing(images, "standard")
    monkeypatch.setattr(whitening, "_CHUNK", 7)
    for name, tensor in fit_preprocessing(images, "standard").tensors().items():
        assert torch.equal(tensor, whole.tensors()[name])


def data_of(images, device):
    labels = torch.arange(len(images)) % 2
    return ImageData.from_tensors("made", ("a", "b"), images, labels, images, labels).to(device)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("whitened", [False, True], ids=["standard", "zca"])
def test_gathered_images_are_those_of_the_indices_in_model_space(device, whitened, memory_format):
    images = smooth_images(40)
    preprocessing = (orthonormal_preprocessing() if whitened else fit(images, "standard")).to(device)
    data = data_of(images, device)
    gather = real_image_gatherer(data, preprocessing, memory_format=memory_format, progress=False)
    indices = torch.tensor([[3, 17, 0], [39, 3, 8]], device=device)
    real = gather(indices)
    assert real.shape == (6, *SHAPE) and real.dtype == torch.float32
    assert real.is_contiguous(memory_format=memory_format)
    expected = preprocessing.to_model(data.train_images[indices.flatten()])
    torch.testing.assert_close(real, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("standardized", [False, True])
def test_a_gpus_whitening_is_one_product_with_the_map_folded_in(standardized, memory_format, device):
    images, preprocessing = smooth_images(40).to(device), orthonormal_preprocessing(standardized).to(device)
    gather = whitening._whitening_gatherer(images, preprocessing, memory_format, "float32")
    indices = torch.tensor([[3, 17, 0], [39, 3, 8]], device=device)
    real = gather(indices)
    assert real.shape == (6, *SHAPE) and real.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(real, preprocessing.to_model(images[indices.flatten()]), rtol=0, atol=1e-5)


def test_a_gatherer_puts_the_precision_of_products_back(monkeypatch):
    settings = torch.backends.cuda.matmul
    before, seen = settings.fp32_precision, []

    def addmm(*operands):
        seen.append(settings.fp32_precision)
        raise KeyError

    monkeypatch.setattr(torch, "addmm", addmm)
    options = smooth_images(4), orthonormal_preprocessing(), torch.channels_last
    for precision in ("float32", "tf32", "bfloat16"):
        gather = whitening._whitening_gatherer(*options, precision)
        with pytest.raises(KeyError):
            gather(torch.tensor([0]))
        assert settings.fp32_precision == before
    assert seen == ["ieee", "tf32", "tf32"]


def test_precision_changes_nothing_on_a_cpu():
    preprocessing, data = orthonormal_preprocessing(), data_of(smooth_images(40), "cpu")
    indices = torch.tensor([3, 17, 0])
    exact, low = (
        real_image_gatherer(data, preprocessing, precision=precision, progress=False)(indices)
        for precision in ("float32", "tf32")
    )
    assert torch.equal(exact, low)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="TF32 needs capability 8.0"
)
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_gpu_whitens_in_the_precision_asked_for(device, precision):
    """Whatever the user's own setting is: float32 is float32 under a TF32 one as well."""
    generator = torch.Generator().manual_seed(0)
    shape, size = (3, 16, 16), 768
    images = torch.randint(0, 256, (256, *shape), generator=generator, dtype=torch.uint8)
    matrix = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].float()
    tensors = {"zca_mean": torch.full(shape, 0.5), "zca_matrix": matrix, "zca_inverse": matrix.T.contiguous()}
    gather = real_image_gatherer(
        data_of(images, device), Preprocessing.from_tensors(tensors).to(device), precision=precision, progress=False
    )
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee" if precision != "float32" else "tf32"
    try:
        whitened = gather(torch.arange(256, device=device)).cpu().double().flatten(1)
    finally:
        settings.fp32_precision = before
    expected = (images.double() / 255 - 0.5).flatten(1) @ matrix.double()
    error = (whitened - expected).norm() / expected.norm()
    assert error < 1e-5 if precision == "float32" else 1e-5 < error < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("whitened", [False, True], ids=["standard", "zca"])
def test_gathering_runs_in_a_cuda_graph(device, whitened):
    images = smooth_images(40)
    preprocessing = (orthonormal_preprocessing() if whitened else fit(images, "standard")).to(device)
    gather = real_image_gatherer(data_of(images, device), preprocessing, progress=False)
    indices = torch.tensor([[1, 2], [3, 4]], device=device)
    gather(indices)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        real = gather(indices)
    indices.copy_(torch.tensor([[9, 8], [7, 6]]))
    graph.replay()
    torch.testing.assert_close(real, gather(indices), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["zca", "zca_standardized"])
def test_images_that_are_too_large_to_be_whitened_are_refused_before_anything_is_computed(kind):
    images = torch.zeros(2, 3, 65, 65, dtype=torch.uint8)
    message = f"preprocessing '{kind}' is accepted for up to 12288 values .* use preprocessing 'standard'"
    with pytest.raises(ValueError, match=message):
        fit_preprocessing(images, kind, progress=False)
    with pytest.raises(ValueError, match=message):
        preset(preprocessing=kind).resolve((3, 65, 65), "folder", torch.device("cpu"))
    assert preset().resolve((3, 65, 65), "cifar10", torch.device("cpu")).preprocessing == "standard"
    assert preset().resolve((3, 64, 64), "cifar10", torch.device("cpu")).preprocessing == "zca"
