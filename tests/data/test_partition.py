"""Sheets: images go on them and come off in their order; what does not divide is refused."""

import pytest
import torch

from atom_fast.data.partition import check_partition, decode, make_sheets, sheet_pixels
from atom_fast.data.whitening import fit_preprocessing


def smooth_images(count, height, width, channels=2, seed=0):
    """Planes of a constant slope, each another one."""
    slopes = torch.randn(3, count, channels, 1, 1, generator=torch.Generator().manual_seed(seed))
    return slopes[0] + slopes[1] * torch.linspace(0, 1, height)[:, None] + slopes[2] * torch.linspace(0, 1, width)


@pytest.mark.parametrize(("partition", "height", "width"), [(2, 8, 12), (3, 12, 6), (4, 8, 8)])
def test_images_lie_row_by_row_on_sheet_after_sheet(partition, height, width):
    each = partition**2
    numbered = torch.arange(2.0 * each)[:, None, None, None].expand(-1, 1, height, width).contiguous()
    sheets = make_sheets(numbered, partition)
    assert sheets.shape == (2, 1, height, width)
    for number in range(2 * each):
        sheet, place = divmod(number, each)
        row, column = divmod(place, partition)
        rows = slice(row * height // partition, (row + 1) * height // partition)
        columns = slice(column * width // partition, (column + 1) * width // partition)
        assert (sheets[sheet, :, rows, columns] == number).all()
    torch.testing.assert_close(decode(sheets, partition), numbered)


def test_an_image_is_cropped_and_enlarged_by_itself():
    """Bilinear, pixel centres, edges repeated: no other image on the sheet is seen."""
    sheets = torch.randn(3, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    decoded = decode(sheets, 2)
    for number, image in enumerate(decoded):
        sheet, place = divmod(number, 4)
        row, column = divmod(place, 2)
        crop = sheets[sheet, :, 3 * row : 3 * row + 3, 4 * column : 4 * column + 4].double()
        for axis, side in ((1, 6), (2, 8)):
            position = ((torch.arange(side, dtype=torch.float64) + 0.5) / 2 - 0.5).clamp(min=0)
            low = position.long()
            high = (low + 1).clamp(max=side // 2 - 1)
            share = (position - low).view([-1 if dim == axis else 1 for dim in range(3)])
            crop = crop.index_select(axis, low) * (1 - share) + crop.index_select(axis, high) * share
        torch.testing.assert_close(image, crop.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("partition", [2, 3])
def test_shrinking_keeps_every_mean(partition):
    images = torch.randn(partition**2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    sheet = make_sheets(images, partition)
    torch.testing.assert_close(sheet.mean((2, 3)), images.mean((2, 3)).mean(0, keepdim=True))
    side = 12 // partition
    for number, image in enumerate(images):
        row, column = divmod(number, partition)
        part = sheet[0, :, side * row : side * (row + 1), side * column : side * (column + 1)]
        torch.testing.assert_close(part.mean((1, 2)), image.mean((1, 2)))


def test_decoding_undoes_shrinking_but_for_blur():
    """A plane of a constant slope has nothing to blur but its edges, which are repeated."""
    images = smooth_images(8, 12, 16)
    back = decode(make_sheets(images, 2), 2)
    torch.testing.assert_close(back[:, :, 1:-1, 1:-1], images[:, :, 1:-1, 1:-1], rtol=1e-4, atol=1e-5)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert decode(make_sheets(noise, 2), 2).std() < 0.6 * noise.std()


def test_gradients_reach_every_pixel_of_a_sheet():
    sheets = torch.zeros(2, 1, 6, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(decode(sheets, 3).sum(), sheets)
    torch.testing.assert_close(gradient, torch.full_like(sheets, 9.0))  # each pixel fills nine of the decoded ones


def test_without_a_partition_nothing_is_computed():
    images = torch.randn(3, 1, 4, 5)
    assert make_sheets(images, 1) is images and decode(images, 1) is images


@pytest.mark.parametrize("kind", ["standard", "zca", "zca_standardized"])
def test_sheets_are_shown_as_the_pixels_of_their_images(kind):
    if kind != "standard":
        pytest.importorskip("kornia", reason="ZCA is fitted by kornia")
    # Far from black and white, so that clamping does not hide a wrong order or a wrong map.
    pixels = smooth_images(40, 8, 8, channels=3).sigmoid() * 0.6 + 0.2
    space = fit_preprocessing((pixels * 255).to(torch.uint8), kind, progress=False)
    sheets = make_sheets(space.to_model(pixels[:8]), 2)
    shown = sheet_pixels(sheets, 2, space)
    assert shown.shape == (2, 3, 8, 8) and shown.min() >= 0 and shown.max() <= 1
    if kind == "standard":
        torch.testing.assert_close(shown, make_sheets(pixels[:8], 2), rtol=0, atol=0.03)
    for number, image in enumerate(decode(sheets, 2)):
        sheet, place = divmod(number, 4)
        row, column = divmod(place, 2)
        small = torch.nn.functional.avg_pool2d(space.to_pixels(image[None])[0], 2)
        part = shown[sheet, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        torch.testing.assert_close(part, small, rtol=1e-4, atol=1e-4)
    assert torch.equal(sheet_pixels(sheets, 1, space), space.to_pixels(sheets))


@pytest.mark.parametrize("partition", [0, -1, 3, 5, 16, 10**30, 2.0, "2", True, None])
def test_a_partition_that_does_not_divide_is_refused_with_those_that_do(partition):
    with pytest.raises(ValueError) as caught:
        check_partition(partition, 8, 12)
    assert str(caught.value) == (
        "partition must be a whole number that divides the sides of images of 8x12: one of 1, 2, 4; "
        f"got {partition!r}"
    )  # fmt: skip


def test_wrong_numbers_of_images_are_refused():
    with pytest.raises(ValueError, match="sheets of partition 2 take 4 images each; got 6 images"):
        make_sheets(torch.zeros(6, 1, 4, 4), 2)
    with pytest.raises(ValueError, match="images of 4x6: one of 1, 2; got 4"):
        make_sheets(torch.zeros(16, 1, 4, 6), 4)
    assert [check_partition(r, 4, 4) for r in (1, 2, 4)] == [None] * 3
