"""Image files to tensors: exact pixels, one size, one number of channels, and errors that name the file."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from atom_fast.data.decoding import decode_images, resize_images


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def test_pixels_come_in_the_order_of_the_files(tmp_path):
    pixels = random_pixels(200, 5, 7, 3)
    files = [save(tmp_path / f"{i}.png", image) for i, image in enumerate(pixels)]
    images = decode_images(files, progress=False)
    assert images.dtype == torch.uint8 and images.is_contiguous()
    assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_grayscale_files_give_one_channel_and_one_colour_file_gives_three_to_all(tmp_path):
    gray, colour = random_pixels(4, 4), random_pixels(4, 4, 3)
    files = [save(tmp_path / "gray.png", gray), save(tmp_path / "gray.bmp", gray)]
    images = decode_images(files, progress=False)
    assert images.shape == (2, 1, 4, 4)
    assert torch.equal(images[0, 0], torch.from_numpy(gray))
    images = decode_images([*files, save(tmp_path / "colour.png", colour)], progress=False)
    assert images.shape == (3, 3, 4, 4)
    assert all(torch.equal(images[0, channel], torch.from_numpy(gray)) for channel in range(3))


def test_palettes_become_rgb(tmp_path):
    colour = random_pixels(4, 4, 3)
    palette = tmp_path / "palette.png"
    Image.fromarray(colour).quantize(16).save(palette)  # 16 pixels: no colour is lost
    assert torch.equal(decode_images([palette], progress=False)[0], torch.from_numpy(colour).permute(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_is_shown_on_white(channels, tmp_path):
    colour, alpha = random_pixels(4, 4, channels), random_pixels(4, 4, 1, seed=1)
    alpha[0], alpha[1] = 0, 255
    file = save(tmp_path / "transparent.png", np.dstack([colour, alpha]))
    (image,) = decode_images([file], progress=False).permute(0, 2, 3, 1).numpy()
    assert image.shape == colour.shape
    assert (image[0] == 255).all() and (image[1] == colour[1]).all()
    share = alpha / 255
    np.testing.assert_allclose(image, share * colour + (1 - share) * 255, atol=1)


def test_a_transparent_colour_of_a_palette_is_shown_on_white(tmp_path, recwarn):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=1)
    pixels = decode_images([tmp_path / "palette.png"], progress=False)[0]
    assert pixels[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]
    assert not recwarn.list


def test_files_of_two_sizes_are_refused_by_name_or_resized(tmp_path):
    files = [save(tmp_path / "first.png", random_pixels(8, 8, 3)), save(tmp_path / "wide.png", random_pixels(8, 12, 3))]
    with pytest.raises(ValueError, match=r"wide.png is 12x8 pixels but .*first.png is 8x8.*resolution"):
        decode_images(files, progress=False)
    assert decode_images(files, resolution=6, progress=False).shape == (2, 3, 6, 6)
    assert decode_images(files, resolution=16, progress=False).shape == (2, 3, 16, 16)


def test_resizing_keeps_the_centre_square(tmp_path):
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, 2:14] = 200  # the antialiasing filter reaches two pixels beyond the square
    images = decode_images([save(tmp_path / "bright_centre.png", pixels)], resolution=4, progress=False)
    assert (images == 200).all()


def truncated(path):
    save(path, random_pixels(32, 32, 3))
    path.write_bytes(path.read_bytes()[:700])


def not_an_image(path):
    path.write_text("no image")


def sixteen_bit(path):
    save(path, np.arange(4096, dtype=np.uint16).reshape(64, 64))


@pytest.mark.parametrize(
    ("write", "name", "message"),
    [
        (truncated, "bad.png", ""),
        (truncated, "bad.jpg", "truncated"),
        (not_an_image, "bad.jpg", "cannot identify"),
        (lambda path: path.write_bytes(b""), "bad.png", "cannot identify"),
        (lambda path: None, "bad.png", "No such file"),
        (sixteen_bit, "bad.png", "more than 8 bits per channel"),
    ],
    ids=["truncated-png", "truncated-jpeg", "text", "empty", "absent", "16-bit"],
)
@pytest.mark.parametrize("position", [0, 150])
def test_a_broken_file_is_named(tmp_path, write, name, message, position):
    files = [save(tmp_path / "good.png", random_pixels(32, 32, 3))] * 200
    write(tmp_path / name)
    files.insert(position, tmp_path / name)
    with pytest.raises(ValueError, match=f"cannot read the image .*{name}: .*{message}"):
        decode_images(files, progress=False)


@pytest.mark.fault(
    "Hostile files", "an image, small as a file, that declares billions of pixels", "refused from its header alone"
)
@pytest.mark.parametrize("side", [10_000, 30_000, 2**31 - 1])
def test_a_gigantic_header_is_refused(side, tmp_path):
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match="cannot read the image .*bomb.png: "):
            decode_images([bomb], resolution=8, progress=False)


@pytest.mark.fault(
    "Hostile files",
    "a program in PostScript, or a file of another format that Pillow knows, named as an image",
    "refused: only the formats of the accepted suffixes are decoded, and no interpreter is started",
)
@pytest.mark.parametrize("form", ["EPS", "GIF", "ICO", "PDF", "SGI", "TGA"])
def test_a_file_of_another_format_is_refused(form, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "made", format=form)
    (tmp_path / "made").rename(tmp_path / "image.png")
    with pytest.raises(ValueError, match="image.png: cannot identify"):
        decode_images([tmp_path / "image.png"], progress=False)


@pytest.mark.fault("Hostile files", "a pipe or a device named as an image", "refused, where reading it would never end")
def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(ValueError, match=f"{name}: it is not a regular file"):
            decode_images([tmp_path / name], progress=False)


def test_more_images_than_memory_holds_are_refused_with_their_size(tmp_path, monkeypatch):
    file = save(tmp_path / "a.png", random_pixels(8, 8, 3))

    def no_memory(*arguments, **settings):
        raise MemoryError

    monkeypatch.setattr(np, "empty", no_memory)
    with pytest.raises(ValueError, match="10 images of 8x8 pixels need 0 GB of memory; pass a smaller resolution"):
        decode_images([file] * 10, progress=False)


@pytest.mark.fault(
    "Hostile files", "an image of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`", "refused before it is decoded"
)
def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    bomb = save(tmp_path / "bomb.png", random_pixels(8, 9))
    monkeypatch.delattr(Image.Image, "convert")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="bomb.png: 9x8 pixels.* 64 acc"):
        decode_images([bomb], progress=False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(ValueError, match="bomb.png: .*decompression bomb"):
        decode_images([bomb], progress=False)


def test_no_files_are_refused():
    with pytest.raises(ValueError, match="at least one image file; got none"):
        decode_images([], progress=False)


def test_progress_is_on_standard_error_or_nowhere(tmp_path, capsys):
    files = [save(tmp_path / "a.png", random_pixels(4, 4))]
    decode_images(files, progress=False)
    assert capsys.readouterr() == ("", "")
    decode_images(files)
    out, err = capsys.readouterr()
    assert out == "" and "decoding images" in err


def test_tensors_are_resized_as_the_files_are(tmp_path):
    pixels = random_pixels(16, 16, 3)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    from_file = decode_images([save(tmp_path / "a.png", pixels)], resolution=6, progress=False)
    resized = resize_images(tensor, 6)
    assert resized.dtype == torch.uint8
    assert (resized.int() - from_file.int()).abs().max() <= 1
    assert resize_images(tensor, None) is tensor and resize_images(tensor, 16) is tensor
