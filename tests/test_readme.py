"""README and docs: code runs, every command is covered by a test, links lead somewhere, figures are measured."""

import dataclasses
import importlib
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
from atom_fast import cli
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import get_protocol

ROOT = Path(__file__).resolve().parent.parent
README, USAGE = ROOT / "README.md", ROOT / "docs" / "usage.md"
PAGES = (
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "results" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
GROUPS = {"atom_fast": cli.main, "benchmarks": benchmarks.__main__.main}
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# How a command is covered. RUN: here, with more options that make it short. TEST: by another test that runs it.
# NEEDS: no test can run it.
RUN, TEST, NEEDS = "run", "test", "needs"
MINUTES = "minutes on a machine that does nothing else: it is a measurement"
# The first pattern that is found in a command says how the command is covered.
COVERED = {
    r"--resolution|--together": (
        TEST,
        "test_large_images.py::test_a_folder_is_distilled_stopped_killed_resumed_and_evaluated",
    ),
    r"--download|cifar|--data-dir|table5 --only|fig3 --seeds 1 --networks": (NEEDS, "a download"),
    r"benchmarks (gpu|kernels)|--edition gpu": (NEEDS, "a GPU"),
    r"benchmarks profile --shape 10 3 32 32 --ipc 50": (NEEDS, "a GPU, or minutes without one"),
    r"benchmarks (busy|candidates|evaluation|ranks|step)|pytest benchmarks": (NEEDS, MINUTES),
    r"^make (test|lint)$": (NEEDS, "nothing: it runs this test, or is a part of what does"),
    r"^make demo$|^atom-fast demo$": (
        TEST,
        "test_cli.py::test_demo_keeps_what_it_finished_and_nothing_that_is_not_its_own",
    ),
    r"^make report$|benchmarks report": (TEST, "benchmarks/test_report.py::test_pages_show_what_was_measured"),
    r"^pip install \.$": (TEST, "test_package.py::test_the_source_archive_holds_every_kernel_once_and_installs"),
    r"^atom-fast distill .*--pool-networks": (TEST, "test_cli.py::test_a_pool_is_trained_once_for_several_runs"),
    r"benchmarks table6": (TEST, "benchmarks/test_search.py::test_the_command_prints_the_table"),
    r"examples/continual": (TEST, "test_examples.py::test_classes_are_learnt_step_by_step_from_a_memory"),
    r"^atom-fast distill --dataset digits": (RUN, "--iterations 2 --width 8 --quiet"),
    r"^atom-fast distill --set": (TEST, "test_cli.py::test_a_run_starts_from_a_given_set"),
    r"^atom-fast evaluate .*--scores": (
        TEST,
        "evaluation/test_scores.py::test_the_command_prints_and_records_scores_and_trains_all_images_once",
    ),
    r"^atom-fast evaluate .*\.safetensors": (RUN, "--networks 1 --epochs 1 --quiet"),
    r"^atom-fast select --dataset": (RUN, "--epochs 1 --quiet"),
    r"^atom-fast select --method": (TEST, "evaluation/test_coresets.py::test_herding_comes_close_to_the_class_mean"),
    r"^atom-fast (show|info|export) ": (RUN, ""),
    r"^atom-fast report ": (TEST, "test_report.py::test_the_command_writes_the_file_and_prints_its_path"),
    r"^atom-fast doctor --gpu": (TEST, "test_device.py::test_doctor_says_what_would_run_on_a_gpu_that_is_not_here"),
    r"^atom-fast doctor": (TEST, "test_device.py::test_doctor_examines_this_machine"),
    r"^(atom-fast|python -m atom_fast)( COMMAND --help| [a-z]+)?$": (
        TEST,
        "test_cli.py::test_help_gives_every_option_with_its_default",
    ),
    r"^python -m benchmarks( COMMAND)?$": (RUN, "--help"),
    r"benchmarks compare .*--repeated": (
        TEST,
        "benchmarks/test_timings.py::test_a_repeated_run_is_compared_either_way",
    ),
    r"benchmarks compare": (TEST, "benchmarks/test_timings.py::test_compare_names_what_got_slower_by_ratio"),
    r"benchmarks digits": (TEST, "benchmarks/test_digits.py::test_digits_distils_the_same_set_as_the_plain_loop"),
    r"benchmarks precision": (TEST, "benchmarks/test_precision.py::test_float16_is_as_exact_as_tf32"),
    r"benchmarks profile --dataset": (RUN, "--steps 1 --warm-up 1 --width 8 --real-batch 2 --quiet"),
    r"benchmarks profile": (
        TEST,
        "benchmarks/test_profile.py::test_the_command_prints_the_table_and_keeps_the_figures",
    ),
    r"benchmarks record": (TEST, "benchmarks/test_records.py::test_a_record_names_what_was_measured_and_its_seconds"),
    r"benchmarks roofline": (RUN, ""),
    r"benchmarks scaling": (TEST, "benchmarks/test_report.py::test_scaling_is_drawn"),
    r"benchmarks table3": (TEST, "benchmarks/test_timings.py::test_second_call_continues"),
    r"benchmarks table4 --cells": (TEST, "benchmarks/test_run.py::test_a_table_ends_with_ours_beside_the_paper_s"),
    r"benchmarks (table|fig|study|additions)": (RUN, "--list"),
    r"^python -m tests\.compilers": (TEST, "test_compilers.py::test_a_chip_is_examined_and_other_rows_stay"),
    r"^python -m tests\.instructions": (TEST, "test_compilers.py::test_instructions_are_counted_from_the_machine_code"),
    r"^python -m tests\.faults": (TEST, "test_faults.py::test_the_page_is_up_to_date"),
    r"^python -m tests\.fuzz_readers": (TEST, "test_fuzz.py::test_fuzzed_files_are_read_or_refused"),
}
FIGURE = r"\d[\d.,]*\s?(?:ms|MB|GB|%|×|points|s|seconds)(?![\w-])|±"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def commands(page):
    """List the commands of a page, without comments: lines of its shell blocks, and code within its text."""
    text = page.read_text("utf-8")
    lines = "".join(blocks(page, "sh")).splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`((?:atom-fast|python|make|torchrun|pip) [^`\n]*)`", prose)
    cleaned = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return list(dict.fromkeys(line for line in cleaned if line))


def coverage(line):
    """Return the pattern, the kind and the text of the entry of ``COVERED`` that a command has."""
    for pattern, (kind, text) in COVERED.items():
        if re.search(pattern, line):
            return pattern, kind, text
    raise AssertionError(f"{line!r} has no entry in COVERED")


def without_generated(page):
    """Return the text of a page that was written by hand: without rendered sections and code."""
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


@pytest.mark.parametrize("page", [README, USAGE], ids=lambda page: page.name)
def test_the_program_distils_and_evaluates(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = dataclasses.replace(get_protocol("digits"), epochs=1)
    evaluation = importlib.import_module("atom_fast.evaluation.accuracy")
    monkeypatch.setattr(evaluation, "get_protocol", lambda name: short)
    (code,) = [block for block in blocks(page, "python") if "distill(" in block]
    assert "iterations=300" in code
    exec(code.replace("iterations=300", "iterations=2, width=8"), {})
    assert re.fullmatch(r"digits ipc=10 atom: \d+\.\d ± \d+\.\d % .*\n", capsys.readouterr().out)
    assert len(list(tmp_path.glob("runs/*/synthetic.safetensors"))) == 1


def test_the_sets_in_the_examples_are_used_as_shown(tmp_path, monkeypatch):
    train = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    preprocessing = fit_preprocessing(train, "standard", progress=False)
    synthetic = SyntheticSet(preprocessing.to_model(train[:2]), torch.tensor([0, 1]), ["a", "b"], preprocessing)
    monkeypatch.chdir(tmp_path)
    synthetic.save("runs/digits/synthetic.safetensors")
    synthetic.export("res_DM_CIFAR10_ConvNet_10ipc.pt", format="pt")
    others = ("distill(", "from_datasets(")
    load, normalise, public = [block for block in blocks(USAGE, "python") if not any(name in block for name in others)]
    names = {}
    exec(load + normalise, names)
    assert names["images"].shape[-2:] == names["inputs"].shape[-2:] == (8, 8)
    assert torch.equal(names["test_images"], names["inputs"])
    exec(public, names)
    assert names["images"].shape == synthetic.images.shape and names["labels"].tolist() == [0, 1]


def test_a_dataset_is_read_as_shown(monkeypatch):
    class Fashion(list):
        classes = ("boot", "coat")

        def __init__(self, root, train):
            super().__init__((torch.rand(1, 8, 8), number % 2) for number in range(6 if train else 4))

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", Fashion)
    (code,) = [block for block in blocks(USAGE, "python") if "from_datasets(" in block]
    names = {}
    exec(code, names)
    data = names["data"]
    assert (data.name, data.class_names, len(data.train_images), len(data.test_images)) == (
        "fashion",
        ("boot", "coat"),
        6,
        4,
    )


def test_every_command_is_covered():
    """Every command has an entry, every entry a command, and the tests that entries name exist."""
    used = {coverage(line)[0] for page in PAGES for line in commands(page)}
    assert used == set(COVERED), f"no page shows a command for {set(COVERED) - used}"
    for kind, text in COVERED.values():
        if kind == TEST:
            file, _, function = text.partition("::")
            assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text("utf-8"), text


@EVERY_PAGE
def test_commands_exist(page):
    for line in commands(page):
        program, *arguments = shlex.split(line)
        if program == "torchrun":
            assert arguments[:3] == ["--nproc-per-node", arguments[1], "-m"]
            program, arguments = "python", arguments[2:]
        elif program == "atom-fast":
            program, arguments = "python", ["-m", "atom_fast", *arguments]
        if program == "make":
            assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text("utf-8")
        elif program == "pip":
            assert arguments == ["install", "."]
        elif arguments[0] == "-m":
            check_module(*arguments[1:])
        else:
            assert program == "python" and (ROOT / arguments[0]).is_file(), line


def check_module(module, *arguments):
    """Check the command of a module: parse its options where click does, otherwise find them in the source."""
    if module in GROUPS:
        if arguments and arguments[0] != "COMMAND":
            group, name, options = GROUPS[module], arguments[0], list(arguments[1:])
            if options and group.commands[name].params:
                group.commands[name].make_context(name, options, click.Context(group, **group.context_settings))
    elif module == "pytest":
        assert (ROOT / arguments[0]).is_file()
    else:
        source = Path(importlib.util.find_spec(module).origin).read_text("utf-8")
        for option in arguments:
            assert not option.startswith("--") or f'"{option}"' in source, option


def test_commands_run(tmp_path, monkeypatch):
    """Run the commands of all pages that are to be run here, in the order of the pages."""
    monkeypatch.chdir(tmp_path)
    for line in dict.fromkeys(line for page in (README, USAGE, *PAGES) for line in commands(page)):
        _, kind, more = coverage(line)
        if kind == RUN:
            program, *arguments = shlex.split(line.removeprefix("python -m ").removesuffix(" COMMAND"))
            group = GROUPS[program.replace("-", "_")]
            result = CliRunner().invoke(group, [*arguments, *more.split()])
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    assert Path("images/train/0/0000.png").is_file() and Path("set.pt").is_file() and Path("result.json").is_file()


def anchors(page):
    """List the anchors of a page's headings, as GitHub makes them."""
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
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for path in re.findall(r"`((?:atom_fast|kernels|benchmarks|tests|examples)/[\w/.]*)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    rows = re.findall(r"^\| (?!`).*`\w+\.py`.*\|$", text, flags=re.M)
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
