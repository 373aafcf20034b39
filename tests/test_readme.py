"""What the README and the usage page show is code that runs and commands that exist."""

import re
import shlex
from pathlib import Path

import click
import pytest
import torch
import torch.nn.functional as F

from atom_fast.cli import main
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.synthetic import SyntheticSet

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "usage.md")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def test_the_drop_in_gives_the_same_number():
    generator = torch.Generator().manual_seed(0)

    def features(batch):
        shapes = [(batch, 8, 6, 6), (batch, 8, 3, 3)]
        return [torch.randn(shape, generator=generator, dtype=torch.float64).relu() for shape in shapes]

    names = {
        "F": F,
        "real_features": features(5),
        "synthetic_features": features(3),
        "real_embedding": torch.randn(5, 16, generator=generator, dtype=torch.float64),
        "synthetic_embedding": torch.randn(3, 16, generator=generator, dtype=torch.float64),
    }
    before, after = [block for block in blocks(PAGES[0], "python") if "loss = " in block]
    losses = []
    for code in (before, after):
        exec(code, names)
        losses.append(names["loss"])
    torch.testing.assert_close(losses[1], losses[0])


def test_the_sets_in_the_examples_are_used_as_shown(tmp_path, monkeypatch):
    train = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    preprocessing = fit_preprocessing(train, "standard", progress=False)
    synthetic = SyntheticSet(preprocessing.to_model(train[:2]), torch.tensor([0, 1]), ["a", "b"], preprocessing)
    monkeypatch.chdir(tmp_path)
    for folder in ("c10", "digits"):
        synthetic.save(f"runs/{folder}/synthetic.safetensors")
    synthetic.export("res_DM_CIFAR10_ConvNet_10ipc.pt", format="pt")
    examples = [code for page in PAGES for code in blocks(page, "python") if re.search(r"\.load\(|load_public\(", code)]
    assert len(examples) == 3
    for code in examples:
        names = {}
        exec(code, names)
        assert names.get("label", 0) == 0 and names["images" if "images" in names else "image"].shape[-2:] == (8, 8)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = "".join(blocks(page, "sh")) + "\n".join(re.findall(r"`(atom-fast [^`]*)`", page.read_text("utf-8")))
    commands = [line for line in text.splitlines() if line.startswith("atom-fast ")]
    assert commands
    for line in commands:
        name, *arguments = shlex.split(line, comments=True)[1:]
        if arguments:
            parent = click.Context(main, **main.context_settings)
            main.commands[name].make_context(name, arguments, parent, resilient_parsing="--help" in arguments)
        assert name in main.commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target
