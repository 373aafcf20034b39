"""Settings of a distillation: presets, checks, and the way through files and back."""

import dataclasses
import math
import pickle
import subprocess
import sys

import click
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_fast.cli import main
from atom_fast.distillation.config import (
    PRESETS,
    SETTINGS,
    DistillConfig,
    affects_result,
    drop_removed_settings,
    from_yaml,
    preset,
    read_config,
    read_settings,
    write_config,
)

CPU = torch.device("cpu")


def test_the_default_is_the_paper():
    config = DistillConfig()
    assert config == preset() == preset("paper")
    assert (config.iterations, config.real_batch, config.momentum) == (8000, 128, 0.5)
    assert (config.spatial_power, config.channel_power, config.width) == (4.0, 4.0, 128)
    resolved = config.resolve((3, 32, 32), "cifar10", CPU)
    assert (resolved.mmd_weight, resolved.image_lr, resolved.depth, resolved.preprocessing) == (0.01, 1.0, 3, "zca")


def test_presets_differ_where_papers_and_code_do():
    assert preset("channel").spatial_power is None
    assert preset("channel").channel_power == 4
    dm = preset("dm")
    assert (dm.spatial_power, dm.channel_power, dm.mmd_weight, dm.real_batch) == (None, None, 1.0, 256)
    code = preset("datadam-code")
    assert (code.norm, code.spatial_power, code.channel_power, code.iterations) == ("batch", 1.0, None, 20_000)
    assert (code.loss_scale, code.preprocessing, code.real_batch) == (100.0, "zca_standardized", 64)
    assert len({preset(name).config_hash() for name in PRESETS}) == len(PRESETS)


def test_every_setting_is_described():
    assert (
        list(SETTINGS) == [field.name for field in dataclasses.fields(DistillConfig)] == list(DistillConfig().to_dict())
    )
    for name, setting in SETTINGS.items():
        assert setting["description"] and setting["type"] in ("integer", "number", "string", "boolean"), name
        assert setting["default"] == getattr(DistillConfig(), name), name
        assert setting["default"] is not None or setting["nullable"], name
        assert "enum" not in setting or setting["default"] in (*setting["enum"], None), name
    assert SETTINGS["spatial_power"] | {"minimum": 1, "maximum": 16, "nullable": True} == SETTINGS["spatial_power"]
    assert affects_result("seed") and not affects_result("class_chunk")


def test_settings_are_read_without_pytorch():
    """The command line shows them in --help, within a second."""
    code = "import sys, atom_fast.distillation.config as c; c.preset('dm'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("side", "ipc", "dataset", "expected"),
    [
        (8, 1, "digits", (0.01, 1.0, 3, "standard")),
        (32, 50, "cifar100", (0.01, 1.0, 3, "zca")),
        (32, 100, "folder", (0.01, 10.0, 3, "standard")),
        (64, 51, "tiny", (0.02, 10.0, 4, "standard")),
    ],
)
def test_what_is_open_follows_from_the_data(side, ipc, dataset, expected):
    resolved = preset(ipc=ipc).resolve((3, side, side), dataset, CPU)
    assert (resolved.mmd_weight, resolved.image_lr, resolved.depth, resolved.preprocessing) == expected
    assert resolved.precision == "float32"
    assert resolved == resolved.resolve((3, side, side), dataset, CPU)


@pytest.mark.parametrize(
    ("dataset", "ipc", "expected"),
    [
        ("cifar10", 1, ("instance", 10.0, 1.0, False)),
        ("cifar10", 10, ("batch", 3.0, 1.0, True)),
        ("cifar10", 50, ("batch", 15.0, 1.0, True)),
        ("cifar100", 100, ("batch", 3.0, 10.0, True)),
        ("tiny", 50, ("instance", 10.0, 1.0, False)),
    ],
)
def test_under_batch_norm_the_steps_are_large_and_averaged(dataset, ipc, expected):
    resolved = preset(ipc=ipc).for_data((3, 32, 32), dataset)
    assert (resolved.norm, resolved.loss_scale, resolved.image_lr, resolved.image_average) == expected
    assert not preset(ipc=ipc, image_average=False).for_data((3, 32, 32), dataset).image_average
    for published in ("dm", "datadam-code"):
        assert preset(published, ipc=ipc, norm="batch").for_data((3, 32, 32), dataset).image_average is False


def test_mean_embeddings_alone_have_the_weight_that_they_have_beside_attention():
    """Under BatchNorm a step that is a hundred times as long loses the images."""
    alone = {"spatial_power": None, "channel_power": None}
    for weight in (None, 0.01, 1.0):
        resolved = preset(ipc=10, mmd_weight=weight, **alone).for_data((3, 32, 32), "cifar10")
        assert resolved.loss_scale * resolved.mmd_weight == pytest.approx(0.03)
        assert preset(ipc=10, mmd_weight=weight).for_data((3, 32, 32), "cifar10").loss_scale == 3
        assert preset(ipc=10, mmd_weight=weight, norm="instance", **alone).for_data((1, 8, 8), "x").loss_scale == 10
    assert preset("dm", ipc=10, norm="batch").for_data((3, 32, 32), "cifar10").loss_scale == 1, "as published"


def test_what_is_given_is_not_derived():
    chosen = {"mmd_weight": 0.5, "image_lr": 3.0, "depth": 2, "preprocessing": "standard", "precision": "bfloat16"}
    resolved = preset(**chosen).resolve((3, 64, 64), "cifar10", CPU)
    assert {name: getattr(resolved, name) for name in chosen} == chosen


def test_a_precision_that_the_device_lacks_is_refused():
    with pytest.raises(ValueError, match="tf32.*8.0.*cpu"):
        preset(precision="tf32").resolve((3, 32, 32), "cifar10", CPU)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("ipc", 0, "at least 1"),
        ("ipc", 1.5, "whole number"),
        ("ipc", True, "whole number"),
        ("iterations", -3, "at least 1"),
        ("iterations", 2**31, r"below 2\*\*31"),
        ("real_batch", None, "whole number"),
        ("spatial_power", 0.5, r"\[1, 16\], or None"),
        ("channel_power", 17, r"\[1, 16\], or None"),
        ("mmd_weight", -0.1, "at least 0"),
        ("loss_scale", math.inf, "number"),
        ("image_lr", math.nan, "number"),
        ("image_lr", "1e-3", "number"),
        ("momentum", 1.5, r"\[0, 1\]"),
        ("image_init", "reel", "one of real, noise; .*did you mean 'real'"),
        ("augmentation", "color_crup", "crup"),
        ("preprocessing", "whiten", "auto, standard, zca"),
        ("norm", "instanc", "did you mean 'instance'"),
        ("precision", "fp32", "auto, float32, tf32, float16, bfloat16"),
        ("seed", -1, "at least 0|in "),
        ("cuda_graph", 1, "true or false"),
        ("log_every", 0, "at least 1"),
        ("norm", None, "one of auto, instance"),
    ],
)
def test_a_value_that_is_not_accepted_is_named(name, value, accepted):
    with pytest.raises(ValueError, match=accepted) as refusal:
        preset(**{name: value})
    assert name in str(refusal.value)
    assert repr(value) in str(refusal.value)


def test_none_and_powers_of_ten_may_be_written_as_on_the_command_line(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("preset: paper\nspatial_power: None\nimage_lr: 1e-1\nloss_scale: none\naugmentation: none\n")
    assert read_config(path) == preset(spatial_power=None, image_lr=0.1, loss_scale=None, augmentation="none")


def test_nothing_to_match_is_refused():
    with pytest.raises(ValueError, match="nothing to match"):
        preset(spatial_power=None, channel_power=None, mmd_weight=0)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="'real_bach'.*did you mean 'real_batch'"):
        DistillConfig.from_dict({"real_bach": 3})
    with pytest.raises(ValueError, match="'chanel'.*did you mean 'channel'"):
        preset("chanel")
    with pytest.raises(ValueError, match="'zzz'.*ipc"):
        preset(zzz=1)


CONFIGS = st.builds(
    DistillConfig,
    ipc=st.integers(1, 1000),
    iterations=st.integers(1, 10**9),
    spatial_power=st.none() | st.floats(1, 16),
    channel_power=st.floats(1, 16),
    mmd_weight=st.none() | st.floats(0, 1e30),
    loss_scale=st.floats(0, 1e30),
    momentum=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
    augmentation=st.sampled_from(["none", "flip", "color_crop"]),
    precision=st.sampled_from(["auto", "float32", "bfloat16"]),
    cuda_graph=st.booleans(),
)


@settings(max_examples=20)
@given(CONFIGS)
def test_a_configuration_survives_a_dictionary_and_a_file(tmp_path_factory, config):
    again = DistillConfig.from_dict(config.to_dict())
    assert again == config
    assert again.config_hash() == config.config_hash()
    path = write_config(config, tmp_path_factory.getbasetemp() / "config.yaml")
    assert read_config(path) == config
    assert pickle.loads(pickle.dumps(config)) == config and hash(again) == hash(config)


@settings(max_examples=20)
@given(CONFIGS, st.integers(1, 10**6))
def test_the_hash_is_of_what_the_images_depend_on(config, steps):
    assert len(config.config_hash()) == 16
    logged = dataclasses.replace(config, log_every=steps, image_every=steps, checkpoint_every=steps)
    assert logged.config_hash() == config.config_hash()
    changed = dataclasses.replace(config, seed=config.seed ^ 1)
    assert changed.config_hash() != config.config_hash()


def test_a_whole_number_is_the_same_setting():
    assert preset(loss_scale=2).config_hash() == preset(loss_scale=2.0).config_hash()
    assert isinstance(preset(loss_scale=2).loss_scale, float)


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        ({"memory_budget": None}, None),
        ({"memory_budget": "2 GB"}, r"the setting memory_budget \('2 GB'\) is gone; use class_chunk"),
        ({"image_init": "herding"}, "image_init 'herding' is gone; .*select --method herding.*--set"),
        ({"image_init": "given"}, "image_init 'given' is gone; .*--set"),
    ],
)
def test_settings_of_the_version_before_are_dropped_or_refused_by_name(tmp_path, earlier, message):
    config = preset("channel", ipc=10)
    settings = {**config.to_dict(), **earlier}
    path = write_config(config, tmp_path / "config.yaml")
    path.write_text("".join(f"{name}: {'null' if value is None else value}\n" for name, value in settings.items()))
    if message is None:
        assert DistillConfig.from_dict(settings) == read_config(path) == config
        assert drop_removed_settings(settings) == config.to_dict()
        with pytest.raises(ValueError, match="unknown setting 'memory_budget'"):
            preset(memory_budget=None)
        return
    for read in (lambda: DistillConfig.from_dict(settings), lambda: read_config(path)):
        with pytest.raises(ValueError, match=message):
            read()


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        DistillConfig().ipc = 3
    with pytest.raises(ValueError, match="ipc must be .*; got 0"):
        dataclasses.replace(DistillConfig(), ipc=0)


def test_a_file_may_name_a_preset_and_what_differs(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("preset: channel\nipc: 10\nloss_scale: 3  # whole\n")
    assert read_config(path) == preset("channel", ipc=10, loss_scale=3.0)
    path.write_text("")
    assert read_settings(path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- ipc\n- 10\n", "name: value"),
        ("ipcc: 3", "ipcc.*did you mean 'ipc'"),
        ("ipc: [", "not readable as YAML"),
        ("1: 2", "unknown setting 1"),
        ("ipc: !!python/object/apply:os.system ['true']", "not readable as YAML"),
        ("preset: papper", "papper.*did you mean 'paper'"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        read_config(tmp_path / "nowhere.yaml")


def test_the_words_that_help_shows_are_accepted(tmp_path):
    """``auto`` for what is derived, ``none`` for what is left out, in YAML as on the command line."""
    assert from_yaml({"loss_scale": "auto", "spatial_power": "none"}) == {"loss_scale": None, "spatial_power": None}
    with pytest.raises(ValueError, match="spatial_power must be a number"):
        preset("paper", **from_yaml({"spatial_power": "auto"}))
    command = main.commands["distill"]
    options = ["--loss-scale", "auto", "--image-average", "--depth", "auto", "--channel-power", "none"]
    parent = click.Context(main, **main.context_settings)  # whose names of --help a command keeps
    values = command.make_context("distill", options, parent).params
    assert values["loss_scale"] is None and values["depth"] is None and values["channel_power"] is None
    with pytest.raises(click.BadParameter, match="'auto' is not a valid float"):
        command.make_context("distill", ["--spatial-power", "auto"], parent)


def test_a_name_given_twice_is_refused(tmp_path):
    path = tmp_path / "settings.yaml"
    for text in ("ipc: 1\nnorm: batch\nipc: 10\n", "preset: dm\npreset: paper\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"'{text[: text.index(':')]}' twice"):
            read_settings(path)


def test_errors_of_yaml_are_one_line_with_the_place(tmp_path):
    path = tmp_path / "settings.yaml"
    for text in ("ipc: 1\n\tnorm: batch\n", "ipc: 1\nnorm: !!python/name:os.system x\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"in line 2, column \d+$") as caught:
            read_settings(path)
        assert "\n" not in str(caught.value)


def test_numpy_numbers_are_taken_as_pythons():
    config = preset(ipc=np.int64(3), loss_scale=np.float32(2), feature_maps=np.bool_(True))
    assert (config.ipc, config.loss_scale, config.feature_maps) == (3, 2.0, True)
    assert all(type(value).__module__ == "builtins" for value in config.to_dict().values())
    for wrong in ({"ipc": np.bool_(True)}, {"loss_scale": np.bool_(True)}, {"ipc": np.float64(2)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            preset(**wrong)


def test_a_preset_that_is_no_name():
    with pytest.raises(ValueError, match="preset must be one of"):
        preset(["paper"])
