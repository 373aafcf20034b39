"""Stages of augmentation: drawn and applied one after the other; a single stage is what `draw_augmentation` draws."""

import pytest
import torch

from atom_fast.data.augmentation import augment, augment_stages, draw_augmentation, draw_stages
from atom_fast.names import OPERATIONS, STRATEGY, split_strategy

THREE = "color+flip+crop_scale_rotate"


def seeded(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


@pytest.mark.parametrize(
    "strategy, stages",
    [
        ("", ()),
        ("None", ()),
        ("color_crop", (("color", "crop"),)),
        (THREE.upper(), (("color",), ("flip",), ("crop", "scale", "rotate"))),
    ],
)
def test_a_strategy_is_split_into_stages(strategy, stages):
    assert split_strategy(strategy) == stages


@pytest.mark.parametrize("strategy", ["color+", "+", "color+blur", "color+none", "color + flip", "color,flip"])
def test_a_stage_of_something_else_is_refused(strategy):
    with pytest.raises(ValueError, match="has no operation .*; join any of .* by underscores, and stages by '\\+'"):
        draw_stages(2, seeded("cpu"), strategy=strategy)


@pytest.mark.parametrize("strategy", ["color+crop_color", "flip+flip"])
def test_an_operation_of_two_stages_is_refused(strategy):
    with pytest.raises(ValueError, match=f"'{strategy.replace('+', '.')}' names an operation twice"):
        draw_stages(2, seeded("cpu"), strategy=strategy)


def test_several_stages_are_not_one():
    with pytest.raises(ValueError, match=r"strategy must be one stage, without '\+'; got 'color\+flip'"):
        draw_augmentation(2, seeded("cpu"), strategy="color+flip")
    with pytest.raises(ValueError, match="groups must be 0 or more; got -1"):
        draw_stages(-1, seeded("cpu"), strategy=THREE)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("strategy", ["", "none", "flip", "rotate_color", STRATEGY])
def test_one_stage_is_drawn_as_without_stages(strategy, shared, device):
    before, now = seeded(device, 3), seeded(device, 3)
    expected = draw_augmentation(5, before, strategy=strategy, shared_operation=shared)
    drawn = draw_stages(5, now, strategy=strategy, shared_operation=shared)
    assert len(drawn) == (strategy not in ("", "none"))
    for stage in drawn:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(stage, expected, strict=True))
    assert torch.equal(torch.rand(4, generator=before, device=device), torch.rand(4, generator=now, device=device))


@pytest.mark.parametrize("shared", [False, True])
def test_every_stage_draws_one_of_its_own_operations(shared, device):
    stages = draw_stages(300, seeded(device), strategy=THREE, shared_operation=shared)
    assert [[OPERATIONS[code] for code in stage.operation.unique().tolist()] for stage in stages[:2]] == [
        ["color"], ["flip"],
    ]  # fmt: skip
    last = {OPERATIONS[code] for code in stages[2].operation.tolist()}
    assert last <= {"crop", "scale", "rotate"} and len(last) == (1 if shared else 3)
    assert all(stage.uniforms.unique().numel() > 300 for stage in stages)
    assert not torch.equal(stages[0].uniforms, stages[1].uniforms)


def test_stages_are_applied_in_order(device):
    images = torch.randn(6, 3, 8, 8, generator=seeded(device), device=device).requires_grad_()
    groups = torch.tensor([0, 0, 1, 1, 2, 2], device=device)
    color, crop = stages = draw_stages(3, seeded(device, 1), strategy="color+crop")
    got, expected = augment_stages(images, stages, groups), augment(augment(images, color, groups), crop, groups)
    assert torch.equal(got, expected)
    assert not torch.equal(got, augment(augment(images, crop, groups), color, groups))
    ours, theirs = (torch.autograd.grad(result.square().sum(), images)[0] for result in (got, expected))
    assert torch.equal(ours, theirs)
    assert augment_stages(images, ()) is images
