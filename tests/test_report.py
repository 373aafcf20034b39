"""Reports: valid pages of nothing but themselves, whose figures are those on record, whatever a run holds."""

import base64
import html.parser
import io
import json
import re
import shutil
import statistics

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import atom_fast as af
from atom_fast.cli import main
from atom_fast.data.dataset import ImageData
from atom_fast.data.partition import make_sheets
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.evaluation.accuracy import evaluate
from atom_fast.evaluation.results import read_records
from atom_fast.evaluation.sets import select
from atom_fast.report import charts, gather, render, write_report
from atom_fast.report.gallery import make_gallery
from atom_fast.report.gather import Report, Run
from atom_fast.report.nearest import nearest_images
from atom_fast.synthetic import SyntheticSet
from tests.benchmarks.tiny import run, small
from tests.evaluation.interruptions import count_trained

TINY = {"iterations": 4, "width": 4, "depth": 2, "real_batch": 4, "log_every": 1}
QUICK = {"networks": 2, "epochs": 2, "device": "cpu", "progress": False}
HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=1>\u202e\x00 &amp;"


class Page(html.parser.HTMLParser):
    """What a page is made of; refuses tags that are not closed in order."""

    VOID = {"meta", "img", "br", "hr", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.images, self.headings, self.rows = [], [], [], [], [], []
        self.text, self.tables = "", []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert len(given) == len(attributes), attributes
        assert not any(name.startswith("on") for name in given), given
        self.tags.append((tag, given))
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip("\n")


def check(text):
    """Check what every page must be; return it."""
    page = Page(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">') and len(set(page.ids)) == len(page.ids)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "base"} & set(names)
    styles = " ".join(re.findall(r"<style>.*?</style>", text, re.S))
    assert not re.search(r"url\(|@import|http", styles) and "prefers-color-scheme: dark" in styles
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/png;base64,", "#run")), attributes
        if tag == "img":
            assert attributes["alt"].strip()
            image = Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))
            assert image.format == "PNG" and image.size[0] * int(attributes["height"]) == image.size[1] * int(
                attributes["width"]
            )
        if tag == "svg":
            assert attributes.get("role") == "img" and attributes["aria-label"] or attributes["aria-hidden"] == "true"
        if tag == "a":
            assert attributes["href"][1:] in page.ids
    assert names.count("table") == names.count("caption") == names.count("thead")
    levels = [int(name[1]) for name in names if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    viewport = [found.get("content", "") for _, found in page.tags if found.get("name") == "viewport"]
    assert viewport == ["width=device-width, initial-scale=1"]
    return page


def page_of(report):
    return check(render(report))


def shown(record):
    """A record's accuracy as a page has it."""
    return f"{record['accuracy_mean']:.1f} ± {record['accuracy_std']:.1f}"


@pytest.fixture(scope="module")
def data():
    return af.load_data("digits", progress=False)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, data):
    """A run's folder; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("runs") / "digits-ipc2"
    af.distill(data, af.preset("paper", ipc=2, **TINY), folder, progress=False, device="cpu")
    return folder


@pytest.fixture(scope="module")
def tested(distilled, data):
    """The same after its first report; with a coreset that was chosen by pixels, which trains no network."""
    synthetic = SyntheticSet.load(distilled)
    chosen = select(data, "herding", 2, features="pixels", preprocessing=synthetic.preprocessing, progress=False)
    chosen.save(distilled / "herding.safetensors")
    write_report(distilled, **QUICK)
    return distilled


def copy_of(folder, tmp_path, name="copy"):
    return shutil.copytree(folder, tmp_path / name)


def random_data(classes=3, shape=(3, 8, 8), each=4, names=None):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    images = torch.randint(0, 256, (len(labels), *shape), generator=generator, dtype=torch.uint8)
    names = names or [f"class {number}" for number in range(classes)]
    return ImageData.from_tensors("noise", names, images, labels, images.clone(), labels)


def as_set(data, indices, metadata=None, partition=1):
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    sheets = make_sheets(space.to_model(data.train_images[indices]), partition)
    labels = data.train_labels[indices][:: partition**2]
    return SyntheticSet(sheets, labels, data.class_names, space, metadata, partition)


# ---------------------------------------------------------------- the whole page


def test_a_run_s_page_shows_what_is_on_record(tested):
    text = (tested / "report.html").read_text("utf-8")
    page = check(text)
    records = read_records(tested / "evaluation.json")
    assert [record["method"] for record in records] == ["atom", "random", "herding"]
    in_table = {row[0]: row for row in page.rows if row and row[-1] == "cpu"}
    names = {"this set": 0, "random real images": 1, "herding (pixels)": 2}
    for name, number in names.items():
        assert in_table[name][1:3] == [shown(records[number]), "2"] and in_table[name][4] == "digits (epochs=2)"
    counts = [
        [sum(column) for column in zip(*rows, strict=True)] for rows in zip(*records[0]["confusions"], strict=True)
    ]
    _, *rows = (row for row in page.rows if len(row) == 11)
    matrix = [[int(cell) for cell in row[1:]] for row in rows]
    assert matrix == counts and sum(map(sum, matrix)) == 2 * 397
    for label, row in enumerate(row for row in page.rows if len(row) == 4 and "±" in row[1]):
        percents = [100 * m[label][label] / sum(m[label]) for m in records[0]["confusions"]]
        assert row[:2] == [str(label), f"{statistics.fmean(percents):.1f} ± {statistics.pstdev(percents):.1f}"]
    metadata = SyntheticSet.load(tested).metadata
    for value in (metadata["config_hash"], metadata["dataset_fingerprint"], metadata["versions"]["torch"]):
        assert value in page.text
    assert ["real_batch", "4"] in page.rows and "Missing or uncertain" not in text
    assert len([tag for tag, _ in page.tags if tag == "polyline"]) == 3  # losses that are not used are not drawn


def test_the_accuracy_is_the_confusion_matrix_s(tested):
    for record in read_records(tested / "evaluation.json"):
        for accuracy, matrix in zip(record["accuracies"], record["confusions"], strict=True):
            assert sum(map(sum, matrix)) == 397
            assert accuracy == 100 * sum(row[label] for label, row in enumerate(matrix)) / 397


def test_a_second_report_trains_nothing_and_has_the_same_bytes(tested, tmp_path, monkeypatch):
    seeds = count_trained(monkeypatch)
    again = write_report(tested, tmp_path / "again.html", **QUICK)
    assert again.read_bytes() == (tested / "report.html").read_bytes() and not seeds
    assert render(gather(tested, train=False, **QUICK)) == again.read_text("utf-8")
    more = gather(tested, **{**QUICK, "networks": 3}, train=False)
    [missing] = more.runs[0].left_out
    assert "2 of 3 on the set, 2 of 3 on random real images, 2 of 3 on a coreset are on record" in missing
    assert missing.endswith(f"; atom-fast report {tested} --networks 3 --epochs 2") and not seeds


def test_strict_parsers_find_no_error(tested):
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse((tested / "report.html").read_text("utf-8"))


def test_a_folder_of_runs_has_an_overview_and_unfinished_or_damaged_ones_are_named(tested, tmp_path):
    folder = tmp_path / "runs"
    for name in ("b-10", "b-2", "unfinished", "damaged"):
        copy_of(tested, folder, name)
    (folder / "unfinished" / "synthetic.safetensors").unlink()
    (folder / "damaged" / "synthetic.safetensors").write_bytes(b"\0" * 100)
    (folder / "no run").mkdir()
    report = gather(folder, train=False, **QUICK)
    page = page_of(report)
    assert [run.name for run in report.runs] == ["b-2", "b-10", "damaged", "unfinished"]
    rows = {row[0]: row for row in reversed(page.rows)}
    accuracies = [shown(record) for record in read_records(tested / "evaluation.json")]
    for name in ("b-2", "b-10"):
        assert rows[name][1:7] == ["digits", "2", "atom", *accuracies] and float(rows[name][7]) >= 0
    assert (
        "4 of 4 iterations are logged, and there is no set yet; to continue, run its command with --resume"
        in rows["unfinished"][-1]
    )
    assert "is not a readable safetensors file" in rows["damaged"][-1]
    assert len([run for run in report.runs if run.losses]) == 4  # what there is, is shown
    assert len(report.runs[3].settings) > 20


def test_a_benchmark_s_cells_are_pooled_over_seeds_and_nothing_is_trained(tmp_path, monkeypatch):
    target = small("table1", ["random", "dm", "atom"], seeds=2, networks=2)
    record, _ = run(target, tmp_path)
    damaged = tmp_path / "cells" / "digits-ipc1-broken"
    damaged.mkdir()
    seeds = count_trained(monkeypatch)
    report = gather(tmp_path, **QUICK)
    page = page_of(report)
    assert not seeds
    rows = {row[0]: row for row in reversed(page.rows)}
    ours = {row["title"]: row["entries"]["digits:1"]["ours"] for row in record["sections"][0]["rows"]}
    for title, name in (("Random", "random"), ("DM", "dm"), ("ATOM", "atom")):
        row = rows[f"digits-ipc1-{name}"]
        assert row[:5] == [row[0], "digits", "1", name, f"{ours[title]['mean']:.1f} ± {ours[title]['std']:.1f}"]
        if name != "random":
            assert row[5] == rows["digits-ipc1-random"][4]
    assert "cell.json is missing" in rows["digits-ipc1-broken"][-1]
    atom = next(run for run in report.runs if run.name == "digits-ipc1-atom")
    assert atom.losses and atom.gallery.real and atom.classes.networks == 4 and not atom.left_out
    assert ("sets", "2, of seeds 0, 1; pictures, settings and losses are the first one's") in atom.facts


def test_the_command_writes_the_file_and_prints_its_path(tested, tmp_path):
    folder = copy_of(tested, tmp_path)
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    options = ["--networks", "2", "--epochs", "2", "--device", "cpu", "--quiet"]
    result = CliRunner().invoke(main, ["report", str(folder), *options])
    assert result.exit_code == 0 and result.stdout == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_bytes() == before.replace(tested.name.encode(), folder.name.encode())
    result = CliRunner().invoke(main, ["report", str(folder / "synthetic.safetensors"), "--no-train", "--quiet"])
    assert result.stdout == f"{folder / 'synthetic.html'}\n"
    assert f"atom-fast report {folder} --networks 3" in check((folder / "synthetic.html").read_text("utf-8")).text


# ---------------------------------------------------------------- what is missing or damaged


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("log.jsonl", None, "loss curves: no log"),
        ("log.jsonl", b'nonsense\n{"iteration": 1}\n', "is not a JSON object: 'nonsense'"),
        ("log.jsonl", b'{"iteration": "a", "loss": 1}\n{"iteration": 2, "loss": NaN}\n', "contains no losses"),
        ("log.jsonl", b"\xff\xfe" + b"[" * 10000, "contains no losses"),
        ("environment.json", None, "command, versions and device: "),
        ("environment.json", b"{}", "environment.json is damaged"),
        ("environment.json", b'[{"command": 3}]', "environment.json is damaged"),
        ("environment.json", b"[" * 100000, "environment.json is damaged"),
        ("evaluation.json", b"{", "is not a record of evaluations by this version"),
        ("evaluation.json", b'[{"hash": "x", "protocol": [], "seconds": 0, "curves": []}]', "is not a record"),
        ("herding.safetensors", b"nothing", "is not a readable safetensors file"),
    ],
)
def test_what_is_missing_or_damaged_is_left_out_and_named(tested, tmp_path, file, content, expected):
    folder = copy_of(tested, tmp_path)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    report = gather(folder, train=False, **QUICK)
    assert expected in page_of(report).text
    whole = file not in ("evaluation.json", "herding.safetensors")
    assert bool(report.runs[0].accuracies) == whole and report.runs[0].gallery.real


def test_records_without_matrices_and_of_other_sets(tested, tmp_path):
    folder = copy_of(tested, tmp_path)
    records = read_records(folder / "evaluation.json")
    stranger = {**records[0], "hash": "0" * 64, "set_fingerprint": "0" * 64}
    old = [{name: value for name, value in record.items() if name != "confusions"} for record in records]
    (folder / "evaluation.json").write_text(json.dumps([*old, stranger]))
    [run] = gather(folder, **QUICK).runs  # trains nothing: what is finished stays finished
    assert [one.name for one in run.accuracies] == ["this set", "random real images", "herding (pixels)"]
    assert run.accuracies[0].text == shown(records[0]) and run.classes is None
    assert any("kept no confusion matrix; remove it to train again" in reason for reason in run.left_out)
    assert any("evaluation.json that are of another set: 1" in reason for reason in run.left_out)
    assert read_records(folder / "evaluation.json")[0] == old[0]


def test_an_old_record_is_continued_with_matrices(data, tmp_path):
    synthetic = as_set(data, torch.arange(20))
    options = {"device": "cpu", "progress": False, "record": tmp_path / "record.json", "protocol": "digits"}
    options |= {"architecture": {"width": 4, "depth": 2}}
    protocol = af.training.protocols.get_protocol("digits", epochs=1)
    first = evaluate(synthetic, data, **{**options, "protocol": protocol, "networks": 1})
    [record] = read_records(options["record"])
    del record["confusions"]
    options["record"].write_text(json.dumps([record]))
    second = evaluate(synthetic, data, **{**options, "protocol": protocol, "networks": 2})
    assert second.curves[0] == first.curves[0] and first.confusions[0] is not None
    assert second.confusions[0] is None and second.confusions[1] is not None
    assert read_records(options["record"])[0]["confusions"] == [None, second.confusions[1]]
    text = options["record"].read_text()
    assert text.count("\n") < 100  # a row of a matrix is one line
    for broken in ("x", [1], [[[1, 2]]], [[[1.5]]], [[[-1]]], [[[True]]]):
        options["record"].write_text(json.dumps([{**record, "confusions": broken}]))
        with pytest.raises(ValueError, match="is not a record of evaluations"):
            read_records(options["record"])


def test_real_images_that_are_not_at_hand_or_other_ones_are_named(tested, tmp_path):
    folder = copy_of(tested, tmp_path)
    synthetic = SyntheticSet.load(folder)
    synthetic.metadata["dataset"] = "cifar10"
    synthetic.save(folder / "synthetic.safetensors")
    [run] = gather(folder, data_dir=tmp_path / "nowhere", **QUICK).runs
    assert run.gallery and not run.gallery.real
    assert any("nearest real images: cifar10 is missing" in reason for reason in run.left_out)
    assert run.accuracy_of("set").text  # it is on record, and told by the fingerprint of the data
    synthetic.metadata |= {"dataset": "digits", "dataset_fingerprint": "0" * 64}
    synthetic.save(folder / "synthetic.safetensors")
    [run] = gather(folder, train=False, **QUICK).runs
    assert any("are not the ones that the set was made from" in reason for reason in run.left_out)
    [run] = gather(folder, data=random_data(), train=False, **QUICK).runs
    assert any("noise has other classes or images than the set" in reason for reason in run.left_out)


def test_a_foreign_set_has_no_command(tmp_path):
    images = torch.nn.functional.interpolate(torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 32)
    path = tmp_path / "images_CIFAR10.pt"
    torch.save(images, path)
    [run] = gather(path, data_dir=tmp_path, **QUICK).runs
    assert run.gallery and not run.gallery.real and run.facts[0] == ("data set", "cifar10")
    assert any("settings, command and versions: the file does not hold them" in reason for reason in run.left_out)
    assert any("0 of 2 on a coreset are on record; cifar10 is missing" in reason for reason in run.left_out)
    [run] = gather(path.rename(tmp_path / "images.pt"), train=False, **QUICK).runs
    assert run.problem or any("names no data set: give --dataset" in reason for reason in run.left_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": 0}, "networks must be a whole number, at least 1; got 0"),
        ({"protocol": "papre"}, "protocol must be one of .*; got 'papre'"),
        ({"epochs": -1}, "epochs must be a whole number, at least 1; got -1"),
        ({"dataset": "imagenet"}, "data set must be one of digits, .*; got 'imagenet'"),
        ({"output": "report.pdf"}, "must end in .html; got report.pdf"),
    ],
)
def test_bad_options_are_named_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "missing", **options)


def test_a_place_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        write_report(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="holds no run: neither synthetic.safetensors nor config.yaml"):
        write_report(tmp_path)


# ---------------------------------------------------------------- hostile text and size


def test_hostile_names_are_text(tmp_path):
    names = [HOSTILE, "b" * 5000, "ä 漢字"]
    data = random_data(names=names)
    about = {"dataset": HOSTILE, "method": HOSTILE, "config": {"iterations": HOSTILE, HOSTILE: HOSTILE}}
    about |= {"recognised": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}, "selection": {"features": HOSTILE}}
    folder = tmp_path / HOSTILE.replace("/", "").replace("\x00", "")
    as_set(data, torch.arange(12), about).save(folder / "synthetic.safetensors")
    (folder / "environment.json").write_text(json.dumps([{"command": [HOSTILE], "versions": {HOSTILE: HOSTILE}}]))
    (folder / "log.jsonl").write_text(json.dumps({"iteration": 1, f"{HOSTILE}loss": 1.0}) + "\n")
    for source in (folder, tmp_path):
        report = gather(source, data=data, **QUICK)
        assert [one.kind for one in report.runs[0].accuracies] == ["set", "random", "coreset"]
        text = render(report)
        page = check(text)
        assert "<script" not in text and "\u202e" not in text and "\x00" not in text
        assert HOSTILE.replace("\u202e", "\\u202e").replace("\x00", "\\x00") in page.text


@settings(max_examples=20)
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_name_gives_a_page(name, value):
    page = page_of(Report(name, False, [Run(name, title=value, facts=[(name, value)], command=value)]))
    assert [name, value] in page.rows or not (name + value).isprintable()


def test_a_hundred_classes_of_fifty_noisy_images_stay_below_5_mb(tmp_path):
    data = random_data(classes=100, shape=(3, 32, 32), each=50)
    synthetic = as_set(data, torch.arange(5000), {"dataset": "noise"})
    synthetic.sheets = torch.randn(synthetic.sheets.shape, generator=torch.Generator().manual_seed(1))
    synthetic.save(tmp_path / "set.safetensors")
    options = {**QUICK, "networks": 1, "epochs": 1}
    report = gather(tmp_path / "set.safetensors", data=data, **options, train=False)
    text = render(report)
    check(text)
    gallery = report.runs[0].gallery
    assert 2_500_000 < len(text) < 5_000_000
    assert len(gallery.rows) == 100 and all(row.shown >= 3 and row.stored == 50 for row in gallery.rows)
    assert text.count(f"first {gallery.rows[0].shown} of 50") == 100
    assert sum(row.of_other_classes for row in gallery.rows) > 100


def test_classes_without_room_are_counted(tmp_path):
    data = random_data(classes=40, shape=(3, 16, 16), each=1)
    paths = [as_set(data, torch.arange(40)).save(tmp_path / f"{number}.safetensors") for number in range(50)]
    report = gather(tmp_path, data=data, **QUICK, train=False)
    assert len(report.runs) == len(paths)
    text = render(report)
    assert len(text) < 5_000_000
    shown_classes = len(report.runs[0].gallery.rows)
    assert shown_classes < 40 and f"Shown are the first {shown_classes} of 40 classes" in text


def test_many_classes_have_a_picture_of_their_confusions(tmp_path):
    data = random_data(classes=30, each=2)
    as_set(data, torch.arange(60), {"dataset": "noise"}).save(tmp_path / "set.safetensors")
    synthetic = SyntheticSet.load(tmp_path / "set.safetensors")
    protocol = af.training.protocols.get_protocol("paper", epochs=2)
    synthetic.metadata["dataset_fingerprint"] = data.fingerprint
    synthetic.save(tmp_path / "set.safetensors")
    record = tmp_path / "set.evaluation.json"
    options = {"networks": 1, "protocol": protocol, "architecture": {"width": 4, "depth": 2}, "record": record}
    evaluate(synthetic, data, **options, device="cpu", progress=False)
    report = gather(tmp_path / "set.safetensors", data=data, train=False, **QUICK)
    page_of(report)
    classes = report.runs[0].classes
    [matrix] = read_records(record)[0]["confusions"]
    picture = Image.open(io.BytesIO(base64.b64decode(classes.picture.partition(",")[2])))
    assert picture.size == (30, 30) and classes.counts == matrix
    for true, row in enumerate(matrix):
        for taken, count in enumerate(row):
            assert (picture.getpixel((taken, true))[3] == 0) == (count == 0)
    true, taken, count, share = classes.largest[0]
    assert matrix[int(true.split()[1])][int(taken.split()[1])] == count and share == 100 * count / 2


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_the_nearest_image_has_the_smallest_mean_squared_difference(chunk, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (50, 3, 6, 4), generator=generator, dtype=torch.uint8)
    pixels = torch.rand(20, 3, 6, 4, generator=generator)
    pixels[:5] = real[[7, 49, 0, 21, 33]].float() / 255
    monkeypatch.setattr("atom_fast.report.nearest._REAL_AT_ONCE", chunk)
    found = nearest_images(pixels, real, progress=False)
    distances = (pixels[:, None].double() - real[None].double() / 255).square().flatten(2).mean(2)
    assert found.tolist() == distances.argmin(1).tolist() and found[:5].tolist() == [7, 49, 0, 21, 33]


def test_nearly_equal_images_are_told_apart():
    """A bright image less one level in one pixel: in float32 the product of matrices rounds that away."""
    real = torch.full((300, 3, 64, 64), 250, dtype=torch.uint8)
    real[:, :, 0, 0] = torch.arange(300)[:, None].clamp(max=255).to(torch.uint8)
    pixels = real[[13, 200]].float() / 255
    assert nearest_images(pixels, real, progress=False).tolist() == [13, 200]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_gallery_s_pictures_hold_the_images_above_the_nearest_real_ones(channels):
    data = random_data(shape=(channels, 8, 8))
    synthetic = as_set(data, torch.tensor([2, 5, 4, 9]))
    synthetic.sheets = synthetic.sheets + 0.01
    gallery = make_gallery(synthetic, data, 10**6, progress=False)
    assert [(row.name, row.shown, row.stored) for row in gallery.rows] == [
        ("class 0", 1, 1), ("class 1", 2, 2), ("class 2", 1, 1)]  # fmt: skip
    picture = Image.open(io.BytesIO(base64.b64decode(gallery.rows[1].picture.partition(",")[2])))
    assert picture.mode == ("LA" if channels == 1 else "RGBA") and picture.size == (17, 17)
    assert picture.getpixel((8, 3))[-1] == picture.getpixel((3, 8))[-1] == 0
    for x, index in ((0, 5), (9, 4)):
        expected = data.train_images[index, :, 2, 3].tolist()
        assert list(picture.getpixel((x + 3, 9 + 2)))[:channels] == expected
        drawn = list(picture.getpixel((x + 3, 2)))[:channels]
        assert all(abs(one - two) <= 2 for one, two in zip(drawn, expected, strict=True))


def test_images_on_sheets_have_their_own_nearest_images():
    flat = torch.arange(0, 240, 20, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 8, 8).contiguous()
    labels = torch.arange(3).repeat_interleave(4)
    data = ImageData.from_tensors("flat", "abc", flat, labels, flat.clone(), labels)
    gallery = make_gallery(as_set(data, torch.arange(12), partition=2), data, 10**6, progress=False)
    assert gallery.noun == "synthetic sheet" and [row.shown for row in gallery.rows] == [1, 1, 1]
    picture = Image.open(io.BytesIO(base64.b64decode(gallery.rows[1].picture.partition(",")[2])))
    for row in (0, 9):  # 4, 5, 6, 7: row by row
        corners = [picture.getpixel((x, row + y))[0] for y in (1, 6) for x in (1, 6)]
        assert corners == [80, 100, 120, 140]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e30, 1e30, allow_subnormal=False)), min_size=1, max_size=300)
)
def test_curves_stay_within_their_chart(points):
    chart = charts.lines({"loss": sorted(points), "unused": [(0, 0.0)]})
    if chart is None:
        assert not any(y for _, y in points)
        return
    [series] = chart.series
    places = [tuple(map(float, place.split(","))) for place in series.points.split()]
    assert 2 <= len(places) <= 201
    for x, y in places:
        assert charts.LEFT <= x <= charts.WIDTH and charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM
    assert 1 <= len(chart.x_ticks) <= 12 and len(chart.y_ticks) <= 12
    assert len(str(chart)) < 100_000


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(0, 100), max_size=5), max_size=4))
def test_dots_stay_within_their_chart(rows):
    chart = charts.dots([(str(number), values) for number, values in enumerate(rows)])
    if chart is None:
        assert not any(rows)
        return
    assert len(chart.rows) == sum(map(bool, rows))
    assert all(0 <= x <= charts.WIDTH for _, places, mean in chart.rows for x in (*places, mean))
    assert 2 <= len(chart.ticks) <= 12
