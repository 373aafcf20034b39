"""The commands of ``python -m benchmarks``: help, errors in one line, and the commands that pages show."""

import re
import shlex
from pathlib import Path

import click
import pytest

from benchmarks.__main__ import main, parse_settings, split_settings
from benchmarks.accuracy import TARGETS, plan
from tests.benchmarks.tiny import command


def test_commands_stand_in_the_paper_s_order_with_help():
    text, _ = command("--help")
    listed = re.findall(r"^  ([a-z]+\d?) ", text.partition("Commands:")[2], flags=re.MULTILINE)
    assert listed[:6] == ["table1", "table2", "table3", "table4", "table5", "fig3"] and listed == list(main.commands)
    for name in listed:
        assert name in command(name, "--help")[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["table9"], "No such command"),
        (["table1", "--cells", "cifar11:1"], "cifar11:1"),
        (["table1", "--cells", "cifar10:0"], "cifar10:0"),
        (["table1", "--cells", "cifar10"], "DATASET:IPC"),
        (["table2", "--methods", "herding"], "'dm', 'dam', 'atom'"),
        (["table2", "--cells", "digits:1"], "digits32"),
        (["study", "--factors", "norm,colour"], "colour"),
        (["table4", "--factors", "norm"], "No such option"),
        (["table4", "--set", "no_such=1"], "no_such"),
        (["table4", "--set", "norm"], "NAME=VALUE"),
        (["table4", "--set", "image_init=given"], "image_init"),
        (["table4", "--set", "loss_scale=["], "not readable as YAML"),
        (["table4", "--set", "norm=!!bool x"], "not readable as YAML"),
        (["table5", "--set", "channel_power=2"], "varies channel_power itself"),
        (["table1", "--cells", "digits:²"], "DATASET:IPC"),
        (["table4", "--set", "norm=[1, 2]"], "norm"),
        (["table4", "--set", "seed=3"], "--seeds"),
        (["table4", "--set", "ipc=3"], "--cells"),
        (["table4", "--seeds", "0"], "seeds"),
        (["table4", "--cells", "digits:99999999999999", "--set", "image_init=noise"], "ipc must be a whole number"),
        (["table4", "--device", "mps"], "no other kind is supported"),
        (["table4", "--cells", "digits:1", "--only", "99"], "99"),
        (["table4", "--cells", "digits:1000", "--seeds", "1", "--methods", "atom", "--quiet"], "1000"),
    ],
)
def test_what_does_not_exist_is_named(arguments, named, tmp_path):
    options = ["--device", "cpu"] if "--only" in arguments or "1000" in str(arguments) else []
    _, error = command(*arguments, "--out", tmp_path, *options, code=2)
    assert named in error and "Traceback" not in error


def test_settings_on_the_command_line_are_read():
    given = ["spatial_power=none", "loss_scale=1e2", "norm=batch", "image_average=true", "channel-power=2"]
    assert parse_settings(given) == {
        "spatial_power": None, "loss_scale": 100.0, "norm": "batch", "image_average": True, "channel_power": 2,
    }  # fmt: skip


def test_missing_data_says_where_and_how(tmp_path):
    _, error = command("fig5", "--data-dir", tmp_path, "--out", tmp_path / "out", "--quiet", code=2)
    assert str(tmp_path) in error and "--download" in error and "train/<class>" in error
    assert not list((tmp_path / "out").glob("cells/*/*"))


PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{name}.md" for name in ("benchmarks", "results", "records", "performance", "usage")),
)


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_the_pages_exist(page):
    root = Path(__file__).resolve().parents[2]
    found = re.findall(r"python -m benchmarks ([a-z]+[^`\n]*)", (root / page).read_text("utf-8"))
    assert found or page in ("README.md", "CONTRIBUTING.md")
    for line in found:
        name, *arguments = shlex.split(line, comments=True)
        command = main.commands[name]
        with click.Context(main, **main.context_settings) as parent:
            options = command.make_context(name, arguments, parent).params
        if name in TARGETS:
            size = {option: options[option] for option in ("seeds", "networks", "epochs")}
            settings = parse_settings(options["given"])
            chosen = options.get("methods"), options.get("factors")
            assert plan(name, options["cells"], *chosen, settings=settings, **size).units


def test_more_sets_than_memory_could_list_are_refused():
    with pytest.raises(click.BadParameter, match="not in the range x<=1000"):
        main.commands["table1"].make_context("table1", ["--list", "--seeds", "99999999999"])


def test_settings_of_one_method_are_named_with_it():
    given = ("width=16", "dsa.iterations=100", "dsa.image_lr = 1e-2", "mtt.experts=3")
    common, of_methods = split_settings(given)
    assert common == {"width": 16}
    assert of_methods == {"dsa": {"iterations": 100, "image_lr": 0.01}, "mtt": {"experts": 3}}
    with pytest.raises(ValueError, match="unknown setting 'steps'"):
        split_settings(("dsa.steps=1",))
