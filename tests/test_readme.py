"""What README and docs show: code that runs, commands that exist and run, links that lead somewhere, real figures."""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import benchmarks.__main__
from atom_fast.cli import main
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.evaluation import comparison, get_protocol
from atom_fast.synthetic import SyntheticSet

ROOT = Path(__file__).resolve().parent.parent
README, USAGE = ROOT / "README.md", ROOT / "docs" / "usage.md"
PAGES = (
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "results" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# Commands that no test runs as they are shown, by what they hold, and why.
NOT_RUN = {
    r"--dataset cifar|--data-dir|--download|cifar\d+:|fig3 --seeds|table5 --only": "need a download",
    r"--edition gpu|benchmarks\.(gpu|kernels)\b|--shape 10 3 32 32 --ipc 50$": "need a GPU, or minutes without one",
    r"^make ": "are the whole; tests/test_package.py and tests/test_cli.py run their parts",
    r"^torchrun": "tests/distillation/test_ranks.py runs torchrun with other settings",
    r"reproduce .*digits": "take minutes; tests/benchmarks/test_accuracy.py runs smaller ones",
    r"python -m (benchmarks|pytest)": "take minutes; tests/benchmarks/test_harness.py runs smaller ones",
    r"python -m tests": "tests/test_faults.py, tests/test_fuzz.py and tests/test_compilers.py call them",
    r"^(atom-fast|python -m atom_fast)( [\w-]+)?$": "name a command, which has tests of its own",
}
# What makes a command take little time; the last of two values counts.
SHORT = {
    "distill": "--iterations 2 --width 8 --quiet",
    "evaluate": "--networks 1 --epochs 1 --quiet",
    "select": "--epochs 1 --quiet",
    "profile": "--steps 1 --warm-up 1 --width 8 --real-batch 2 --quiet",
}
FIGURE = r"\d[\d.,]*\s?(?:ms|MB|GB|%|×|points|s|seconds)(?![\w-])|±"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def commands(page):
    """Every command of a page, once, without its comment: lines of its shell blocks, and code within its text."""
    text = page.read_text("utf-8")
    lines = "".join(blocks(page, "sh")).splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`((?:atom-fast|python -m|make|torchrun) [^`\n]*)`", prose)
    cleaned = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    known = ("atom-fast ", "python -m ", "torchrun ", "make ")
    return list(dict.fromkeys(line for line in cleaned if line.startswith(known)))


def without_generated(page):
    """The text of a page as it was written by hand: without rendered sections and code."""
    text = re.sub(r"<!-- (\S+):start -->.*?<!-- \1:end -->", "", page.read_text("utf-8"), flags=re.S)
    return re.sub(r"```.*?```", "", text, flags=re.S)


def test_the_drop_in_gives_the_same_number_and_gradient():
    generator = torch.Generator().manual_seed(0)

    def features(batch, **options):
        shapes = [(batch, 8, 6, 6), (batch, 8, 3, 3)]
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).relu() for shape in shapes]
        return [feature.requires_grad_(**options) for feature in drawn]

    names = {
        "F": F,
        "real_features": features(5, requires_grad=False),
        "synthetic_features": features(3),
        "real_embedding": torch.randn(5, 16, generator=generator, dtype=torch.float64),
        "synthetic_embedding": torch.randn(3, 16, generator=generator, dtype=torch.float64).requires_grad_(),
    }
    before, after = [block for block in blocks(README, "python") if "loss = " in block]
    losses, gradients = [], []
    for code in (before, after):
        exec(code, names)
        losses.append(names["loss"].detach())
        leaves = [*names["synthetic_features"], names["synthetic_embedding"]]
        gradients.append(torch.autograd.grad(names["loss"], leaves))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_program_distils_and_evaluates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = dataclasses.replace(get_protocol("digits"), epochs=1)
    monkeypatch.setattr(comparison, "default_protocol", lambda name: short)
    (code,) = [block for block in blocks(README, "python") if "distill(" in block]
    for shown, small in (("iterations=300", "iterations=2, width=8"), ("networks=3", "networks=1")):
        assert shown in code
        code = code.replace(shown, small)
    exec(code, {})
    assert 0 <= float(capsys.readouterr().out) <= 100
    assert (tmp_path / "runs" / "python" / "synthetic.safetensors").is_file()


def test_the_sets_in_the_examples_are_used_as_shown(tmp_path, monkeypatch):
    train = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    preprocessing = fit_preprocessing(train, "standard", progress=False)
    synthetic = SyntheticSet(preprocessing.to_model(train[:2]), torch.tensor([0, 1]), ["a", "b"], preprocessing)
    monkeypatch.chdir(tmp_path)
    synthetic.save("runs/digits/synthetic.safetensors")
    synthetic.export("res_DM_CIFAR10_ConvNet_10ipc.pt", format="pt")
    load, normalise, public = blocks(USAGE, "python")
    names = {}
    exec(load + normalise, names)
    assert names["images"].shape[-2:] == names["inputs"].shape[-2:] == (8, 8)
    assert torch.equal(names["test_images"], names["inputs"])
    exec(public, names)
    assert names["images"].shape == synthetic.images.shape and names["labels"].tolist() == [0, 1]


@EVERY_PAGE
def test_commands_exist(page):
    for line in commands(page):
        program, *arguments = shlex.split(line)
        if program == "torchrun":
            assert arguments[:4] == ["--nproc-per-node", arguments[1], "-m", "atom_fast"]
            program, arguments = "atom-fast", arguments[4:]
        if program == "atom-fast":
            check_atom_fast(*arguments)
        elif program == "make":
            assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text("utf-8")
        else:
            check_module(*arguments[1:])


def check_atom_fast(name, *arguments):
    if name == "COMMAND":  # stands for any
        return
    command = main.commands[name]
    if arguments and not stands_for_others(arguments):
        command.make_context(name, list(arguments), click.Context(main, **main.context_settings))


def stands_for_others(words):
    """Whether a command holds a name such as FILE, which stands for a user's own."""
    return any(re.fullmatch(r"[A-Z]{2,}", word) for word in words)


def check_module(module, *arguments):
    if module == "benchmarks":
        if arguments:
            benchmarks.__main__._parser().parse_args(arguments)
    elif module == "pytest":
        assert (ROOT / arguments[0]).is_file()
    elif module != "atom_fast":
        source = Path(importlib.util.find_spec(module).origin).read_text("utf-8")
        for option in arguments:
            assert not option.startswith("--") or f'"{option}"' in source, option


def is_not_run(line):
    return stands_for_others(line.split()) or any(re.search(pattern, line) for pattern in NOT_RUN)


def test_commands_run(tmp_path, monkeypatch):
    """Those that need neither a GPU nor a download, in the order of the pages, each cut short."""
    monkeypatch.chdir(tmp_path)
    ran = 0
    for line in commands(README) + commands(USAGE):
        program, name, *arguments = [*shlex.split(line), ""]
        if program != "atom-fast" or is_not_run(line):
            continue
        if name == "distill":  # both pages show the same run
            if Path("runs/digits").exists():
                continue
        elif name == "export" and Path(arguments[1]).exists():
            continue
        result = CliRunner().invoke(main, [name, *arguments[:-1], *SHORT.get(name, "").split()])
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
        ran += 1
    assert ran >= 9
    assert Path("images/train/0/0000.png").is_file() and Path("set.pt").is_file() and Path("result.json").is_file()


@EVERY_PAGE
def test_every_command_is_run_or_named_with_a_reason(page):
    shown = (README, USAGE)
    for line in commands(page):
        assert is_not_run(line) or (page in shown and line.startswith("atom-fast")), line


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@EVERY_PAGE
def test_links_and_pictures_lead_somewhere(page):
    text = page.read_text("utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_map_of_the_code_names_files_that_exist():
    rows = re.findall(r"^\| .*`\w+\.py`.*\|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), flags=re.M)
    folders = (("kernels", "atom_fast/ops"), ("atom_fast",), ("tests",), ("benchmarks",))
    assert len(rows) >= 6
    for row in rows:
        for places, cell in zip(folders, row.strip("| ").split(" | ")[1:], strict=True):
            for name in re.findall(r"`([\w/]+\.\w+)`", cell):
                for folder in places[:1] if name.endswith(".c") else places:
                    assert (ROOT / folder / name).is_file(), f"{folder}/{name}"
        module, *functions = re.findall(r"`([\w/.]+)`", row.strip("| ").split(" | ")[2])
        source = (ROOT / "atom_fast" / module).read_text("utf-8")
        assert functions and all(re.search(rf"^(def|class) {name}\b", source, re.M) for name in functions), row


def test_figures_of_the_readme_are_rendered():
    found = re.findall(FIGURE, without_generated(README))
    assert not found, f"{found}: a measured figure belongs between marks, where `python -m benchmarks report` puts it"


@EVERY_PAGE
def test_accuracies_written_by_hand_are_marked(page):
    for paragraph in without_generated(page).split("\n\n"):
        if re.search(r"\d ± \d", paragraph):
            assert "by hand" in paragraph.lower(), paragraph


@EVERY_PAGE
def test_nothing_is_shown_that_was_not_measured(page):
    assert "not measured yet" not in page.read_text("utf-8")
