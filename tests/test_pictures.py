"""Pictures show the pixels they are given, curves read logs, tables line up."""

import io
import json
import time

import numpy
import pytest
import torch

from atom_fast.data.partition import make_sheets
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.config import preset
from atom_fast.pictures import (
    _draw_grid,
    comparison_table,
    count_images,
    describe,
    method_name,
    read_log,
    result_line,
    save_image_grid,
    save_loss_curves,
    save_run_pictures,
    save_synthetic_grid,
)
from atom_fast.synthetic import SyntheticSet

Image = pytest.importorskip("PIL.Image")

RESULT = {
    "dataset": "digits",
    "ipc": 10,
    "method": "atom",
    "accuracy_mean": 96.14,
    "accuracy_std": 0.31,
    "random_mean": 91.06,
    "random_std": 1.04,
    "seconds": 12.4,
}


def read_png(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return torch.from_numpy(numpy.array(image.convert("RGB")))


def contains(picture, block):
    """Search the [H, W, 3] ``picture`` for the [h, w, 3] ``block``."""
    height, width, _ = block.shape
    corners = (picture[: 1 - height or None, : 1 - width or None] == block[0, 0]).all(-1).nonzero().tolist()
    return any(torch.equal(picture[y : y + height, x : x + width], block) for y, x in corners)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32)])
def test_every_image_is_in_the_grid_enlarged_pixel_by_pixel(tmp_path, channels, side):
    pixels = torch.rand(3, channels, side, side, generator=torch.Generator().manual_seed(0))
    picture = read_png(save_image_grid(pixels, tmp_path / "grid.png", columns=2))
    scale = 64 // side
    for image in (pixels * 255).round().to(torch.uint8).expand(-1, 3, -1, -1):
        block = image.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        assert contains(picture, block)


def test_values_outside_are_clamped(tmp_path):
    pixels = torch.tensor([-1.0, 2.0]).view(1, 1, 1, 2)
    picture = read_png(save_image_grid(pixels, tmp_path / "grid.png", columns=1))
    block = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(32).view(1, 64, 1).expand(32, 64, 3)
    assert contains(picture, block)


def test_names_and_title_take_room_beside_the_images(tmp_path):
    pixels = torch.zeros(6, 3, 32, 32)

    def size(**options):
        return tuple(read_png(save_image_grid(pixels, tmp_path / "grid.png", columns=3, **options)).shape[:2])

    height, width = size()
    by_row, by_image, titled = size(class_names=["cat", "dog"]), size(class_names=list("abcdef")), size(title="pets")
    assert by_row[0] == height and by_row[1] > width
    assert by_image[0] > height and by_image[1] == width
    assert titled[0] > height and titled[1] == width


def test_grid_stays_of_a_size_that_opens(tmp_path):
    picture = read_png(save_image_grid(torch.zeros(200, 3, 64, 64), tmp_path / "wide.png", columns=100))
    assert max(picture.shape) < 7000
    picture = read_png(save_image_grid(torch.zeros(1, 1, 2, 2), tmp_path / "tiny.png", columns=5))
    assert 64 < max(picture.shape) < 100


def test_same_pixels_give_the_same_file(tmp_path):
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    first, second = (save_image_grid(pixels, tmp_path / name, columns=2, title="x") for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()


def test_a_picture_of_many_images_costs_a_run_little_time_and_room(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.rand(100, 3, 8, 8, generator=generator), size=32, mode="bilinear")
    pixels = pixels + 0.05 * torch.randn(pixels.shape, generator=generator)
    started = time.process_time()
    path = save_image_grid(pixels, tmp_path / "grid.png", columns=50)
    seconds = time.process_time() - started
    smallest, drawn = io.BytesIO(), _draw_grid(pixels, 2, 50, None, None)
    started = time.process_time()
    drawn.save(smallest, format="PNG", optimize=True)
    assert seconds < 0.3 * (time.process_time() - started)
    assert path.stat().st_size < 1.2 * len(smallest.getvalue())
    assert torch.equal(read_png(path), torch.from_numpy(numpy.array(drawn)))


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (torch.zeros(2, 2, 4, 4), {"columns": 1}, r"\[N, 1 or 3, H, W\].*\[2, 2, 4, 4\]"),
        (torch.zeros(0, 3, 4, 4), {"columns": 1}, "not empty"),
        (torch.zeros(3, 4, 4), {"columns": 1}, r"\[3, 4, 4\]"),
        (torch.zeros(4, 3, 4, 4), {"columns": 0}, "columns must be at least 1; got 0"),
        (torch.zeros(4, 3, 4, 4), {"columns": 2, "class_names": "abc"}, r"2 names \(one per row\) or 4 .*; got 3"),
    ],
)
def test_wrong_grids_are_refused(tmp_path, pixels, options, message):
    with pytest.raises(ValueError, match=message):
        save_image_grid(pixels, tmp_path / "grid.png", **options)
    assert not list(tmp_path.iterdir())


def make_set(labels, classes=("cat", "dog", "emu")):
    train = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    preprocessing = fit_preprocessing(train, "standard", progress=False)
    config = {"iterations": 30, "spatial_power": 4.0, "channel_power": 4.0}
    metadata = {"dataset": "pets", "config": config}
    images = preprocessing.to_model(train[: len(labels)])
    return SyntheticSet(images, torch.tensor(labels), classes, preprocessing, metadata)


def make_partitioned(labels):
    """Sheets of 2x2 images."""
    plain = make_set([0])
    train = torch.randint(0, 256, (4 * len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(1))
    sheets = make_sheets(plain.preprocessing.to_model(train / 255), 2)
    return SyntheticSet(sheets, torch.tensor(labels), plain.class_names, plain.preprocessing, plain.metadata, 2)


@pytest.mark.parametrize("make", [make_set, make_partitioned])
@pytest.mark.parametrize(
    ("labels", "rows", "columns"),
    [([0, 0, 1, 1, 2, 2], 3, 2), ([0, 1, 2], 1, 3), ([2, 0, 2, 0, 0], 2, 3)],
)
def test_a_set_is_drawn_with_one_row_per_class(tmp_path, make, labels, rows, columns):
    synthetic = make(labels)
    picture = read_png(save_synthetic_grid(synthetic, tmp_path / "set.png"))
    assert rows * 64 <= picture.shape[0] < (rows + 1) * 64
    assert columns * 64 <= picture.shape[1] < (columns + 1) * 64
    stored = synthetic.pixels() if synthetic.partition == 1 else synthetic.sheet_pixels()
    for image in (stored * 255).round().to(torch.uint8).expand(-1, 3, -1, -1):
        assert contains(picture, image.permute(1, 2, 0).repeat_interleave(8, 0).repeat_interleave(8, 1))


def test_description():
    assert describe(make_set([0, 1, 2])) == "pets, 1 per class, atom, 30 iterations"
    bare = make_set([0, 0, 1])
    bare.metadata = {}
    assert describe(bare) == "3 images, synthetic" and count_images(bare) == "3 images"
    partitioned = make_partitioned([0, 0, 1, 1, 2, 2])
    assert describe(partitioned) == "pets, 2 sheets of 4 images per class, atom, 30 iterations"
    uneven = make_partitioned([0, 0, 1])
    uneven.metadata = {}
    assert describe(uneven) == "12 images on 3 sheets, synthetic"


@pytest.mark.parametrize(
    ("spatial", "channel", "name"),
    [(4.0, 4.0, "atom"), (None, 4.0, "atom-channel"), (1.0, None, "datadam"), (None, None, "dm")],
)
def test_method_names(spatial, channel, name):
    assert method_name({"spatial_power": spatial, "channel_power": channel}) == name
    assert (
        method_name(preset("best", spatial_power=spatial, channel_power=channel).to_dict()) == f"{name}+pool+cf+ce+easy"
    )
    assert method_name(preset("best", ipc=10, calibration_weight=0.0).to_dict()) == "atom+pool+cf"


def write_log(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, "utf-8")
    return path


def test_loss_curves(tmp_path):
    pytest.importorskip("matplotlib")
    records = [{"iteration": i, "loss": 1 / i, "attention_loss": 0.5 / i, "seconds": i} for i in range(1, 20)]
    log = write_log(tmp_path / "log.jsonl", records, tail='{"iteration": 20, "lo')
    picture = read_png(save_loss_curves(log, tmp_path / "loss.png", title="digits"))
    colours = {tuple(colour) for colour in picture.flatten(0, 1).unique(dim=0).tolist()}
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colours  # two curves, not three
    assert (0x2C, 0xA0, 0x2C) not in colours
    save_run_pictures(tmp_path, make_set([0, 1, 2]))
    assert {"synthetic.png", "loss.png"} <= {path.name for path in tmp_path.iterdir()}


def test_bad_logs(tmp_path):
    pytest.importorskip("matplotlib")
    log = write_log(tmp_path / "log.jsonl", [{"iteration": 1, "speed": 3}])
    with pytest.raises(ValueError, match="log.jsonl contains no losses"):
        save_loss_curves(log, tmp_path / "loss.png")
    log.write_text('{"iteration": 1}\nnonsense\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match="log.jsonl line 2 .*nonsense"):
        read_log(log)
    with pytest.raises(FileNotFoundError, match="no log .*missing.jsonl"):
        read_log(tmp_path / "missing.jsonl")


def test_result_line():
    assert result_line(RESULT) == "digits ipc=10 atom 96.1 ± 0.3 random 91.1 ± 1.0"
    assert result_line({**RESULT, "ipc": None}) == "digits atom 96.1 ± 0.3 random 91.1 ± 1.0"
    assert result_line({**RESULT, "random_mean": None}) == "digits ipc=10 atom 96.1 ± 0.3"
    assert result_line({**RESULT, "accuracy_mean": None}) == "digits ipc=10 atom diverged random 91.1 ± 1.0"


def test_results_of_partitioned_sets_are_told_apart():
    """In a line and in a table, by both counts; a result without the entry is of a version that knew no partition."""
    plain, partitioned = {**RESULT, "partition": 1}, {**RESULT, "partition": 2}
    assert result_line(plain) == result_line(RESULT)
    line = "digits ipc=10 partition=2 (40 images per class) atom 96.1 ± 0.3 random 91.1 ± 1.0"
    assert result_line(partitioned) == line
    assert result_line({**partitioned, "ipc": None}).startswith("digits partition=2 atom 96.1")
    rows = comparison_table([RESULT, plain, partitioned, {**partitioned, "ipc": None}]).splitlines()[2:]
    sizes = [row.split("|")[2].strip() for row in rows]
    assert sizes == ["10", "10", "10 sheets, 40 images", "sheets of 4"]


def test_comparison_table_lines_up():
    table = comparison_table([RESULT, {**RESULT, "ipc": 1, "random_mean": None, "seconds": None}]).splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1
    full, partial = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:])
    assert full == ["digits", "10", "atom", "96.1 ± 0.3", "91.1 ± 1.0", "12"]
    assert partial[-2:] == ["", ""]
