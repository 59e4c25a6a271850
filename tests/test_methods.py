"""What holds for every method. A new method is tested here as soon as conftest.py registers it."""

import dataclasses
import inspect
import typing
from pathlib import Path
from unittest import mock

import pytest
import torch

import common
from common import BadInput, metadata_of, parse_args, patchify, unpatchify
from conftest import MODULES, TEACHERS, built, each_method, started, tiny

each_teacher = pytest.mark.parametrize("method", TEACHERS)
DVAE = "--target dvae --vocab 16"
NOT_SQUARE = "--img-size 32 48"  # a grid of 4 x 6 patches


def images_for(model, count):
    height, width = (n * model.patch_size for n in model.grid)
    return torch.randn(count, 3, height, width)


def as_tuple(masks):
    return masks if isinstance(masks, tuple) else (masks,)


def masks_for(model, count):
    """Masks as `forward` takes them after the images. `forward` shows how much noise they need."""
    with mock.patch.object(model, "draw_mask", wraps=model.draw_mask) as spy:
        model(images_for(model, 2))
    return as_tuple(model.draw_mask(torch.rand(count, spy.call_args.args[0].shape[1])))


# -- the class alone, and what `build` makes of a Config

@each_method
def test_a_model_works_without_a_config(method):
    """The sizes that all constructors share are enough. All others are the paper's by default."""
    model = MODULES[method].Model(img_size=64, patch_size=8, dim=32, depth=1, heads=2)
    images = images_for(model, 2)
    loss, logs = model(images)
    loss.backward()
    assert loss.isfinite() and loss.ndim == 0
    assert "pred_std" in logs and all(value.ndim == 0 for value in logs.values())
    pooled, patches = model.eval().encode(images)
    assert pooled.shape == (2, 32) and patches.shape == (2, 64, 32)


@each_method
def test_build_passes_every_flag_to_its_argument(method, monkeypatch):
    module = MODULES[method]
    arguments = inspect.signature(module.Model).parameters
    cfg = started(method, img_size=(32, 48), patch_size=8, in_chans=5)[0]
    flags = {}
    for i, field in enumerate(dataclasses.fields(cfg)):
        default = arguments[field.name].default if field.name in arguments else None
        if isinstance(default, bool):
            flags[field.name] = not default
        elif isinstance(default, str):
            flags[field.name] = default + "x"
        elif default is not None:
            flags[field.name] = default + i + 1
    flags |= dict(img_size=(32, 48), patch_size=8, in_chans=5)
    seen = {}

    def model(**given):
        seen.update(given)
    model.__signature__ = inspect.signature(module.Model)
    monkeypatch.setattr(module, module.Model.__name__, model)
    module.build(dataclasses.replace(cfg, **flags))
    assert seen.keys() == arguments.keys()
    assert (seen["dim"], seen["depth"], seen["heads"]) == common.MODELS["toy"]
    for name, value in flags.items():
        assert seen[name] == value, name


@each_method
def test_every_field_of_a_config_is_a_flag(method):
    Config = MODULES[method].Config
    assert parse_args(Config, argv=[]) == Config()
    for name, kind in typing.get_type_hints(Config).items():
        default = getattr(Config, name)
        flag = "--" + name.replace("_", "-")
        value, argv = 3, [flag, "3"]
        if kind is bool and default:
            value, argv = False, [flag.replace("--", "--no-", 1)]
        elif kind is bool:
            value, argv = True, [flag]
        elif typing.get_origin(kind) is tuple:
            value, argv = (2, 3), [flag, "2", "3"]
        elif kind is str:
            value = [*metadata_of(Config, name)["argparse"].get("choices", ["some"])][-1]
            argv = [flag, value]
        assert parse_args(Config, argv=argv) == dataclasses.replace(Config(), **{name: value})


# -- masks

@each_method
def test_masks_over_10000_samples(method):
    """Exact counts, every patch equally often, no side preferred, to five standard deviations."""
    model = built(method, NOT_SQUARE)
    is_masked, *others = masks_for(model, 10000)
    assert ((~is_masked).sum(1) == model.num_visible).all()
    for mask in others:
        assert mask.sum(1).unique().numel() == 1
    visible = (~is_masked).float()
    share = model.num_visible / model.num_patches
    assert (visible.mean(0) - share).abs().max() < 5 * (share * (1 - share) / 10000) ** 0.5
    picture = visible.unflatten(1, model.grid)  # [10000, gh, gw]
    for side in (picture, picture.mT):
        half = side.shape[1] // 2
        difference = side[:, :half].sum((1, 2)) - side[:, half:].sum((1, 2))
        assert difference.mean().abs() < 5 * difference.std() / 10000**0.5


@each_method
def test_forward_masks_by_draw_mask(method):
    model = built(method)
    images = images_for(model, 4)
    with mock.patch.object(model, "draw_mask", wraps=model.draw_mask) as spy:
        drawn = model(images)[0]
    masks = as_tuple(model.draw_mask(spy.call_args.args[0]))
    assert torch.equal(model(images, *masks)[0], drawn)
    assert not torch.equal(model(images)[0], drawn)  # the next masks are others


@each_method
def test_a_mask_with_other_counts_is_refused(method):
    """All rows must have the same number of visible patches, which must be named if it is not the
    model's own."""
    model = built(method)
    images, masks = images_for(model, 4), masks_for(model, 4)
    for i, mask in enumerate(masks):
        wrong = mask.clone()
        wrong[2, mask[2].nonzero()[0]] = False
        with pytest.raises(RuntimeError, match="visible patches"):
            model(images, *masks[:i], wrong, *masks[i + 1:])
    is_masked, *others = masks
    fewer = is_masked.scatter(1, (~is_masked).byte().argmax(1, keepdim=True), True)
    with pytest.raises(RuntimeError, match="visible patches"):
        model(images, fewer, *others)
    assert model(images, fewer, *others, num_visible=model.num_visible - 1)[0].isfinite()


@each_method
def test_predictions_are_blind_to_masked_pixels(method):
    """The targets are not. pred_std, the spread of the predictions, depends on all of them."""
    model = built(method)
    images, masks = images_for(model, 4), masks_for(model, 4)
    patches, hidden = patchify(images, model.patch_size), masks[0][..., None]
    noise = torch.randn_like(patches)
    losses, spreads = [], []
    changed_hidden = torch.where(hidden, noise, patches)
    changed_visible = torch.where(hidden, patches, noise)
    for version in (patches, changed_hidden, changed_visible):
        loss, logs = model(unpatchify(version, model.patch_size, model.grid), *masks)
        losses.append(loss.item())
        spreads.append(logs["pred_std"].item())
    assert spreads[1] == spreads[0] != spreads[2]
    assert losses[1] != losses[0]


# -- gradients

@pytest.mark.parametrize("method, flags", [*((method, "") for method in MODULES), *(
    ("semantic_mim", flags) for flags in ("--baseline", DVAE, DVAE + " --baseline"))])
def test_every_trained_parameter_gets_a_gradient(method, flags):
    """DDP without find_unused_parameters needs it."""
    model = built(method, flags).train()
    tokens = {"tokens": torch.randint(0, 16, (8, 16))} if DVAE in flags else {}
    model(images_for(model, 8), **tokens)[0].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, g in trained.items() if g is None or not g.any()] == []


# -- the teacher

def student_of(model):
    """The module that the teacher follows: the other one of its class."""
    return next(part for part in model.children()
                if type(part) is type(model.teacher) and part is not model.teacher)


@each_teacher
def test_the_teacher_starts_as_a_copy_that_only_update_teacher_moves(method):
    model = built(method).train()
    student = dict(student_of(model).named_parameters())
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    torch.testing.assert_close(before, student, rtol=0, atol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # the second with a student that has moved
        model(images_for(model, 4))[0].backward()
        optimizer.step()
    torch.testing.assert_close(dict(model.teacher.named_parameters()), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in model.teacher.parameters())
    model.update_teacher(0.9)
    model.update_teacher(0.5)
    for name, p in model.teacher.named_parameters():
        torch.testing.assert_close(p, 0.45 * before[name] + 0.55 * student[name])


# -- encode and pictures

@each_method
@torch.no_grad()
def test_encode_is_deterministic_and_leaves_nothing_out(method):
    """Image n differs from image 0 in patch n - 1 alone; the pooled feature notices each patch."""
    drop_path = hasattr(MODULES[method].Config, "drop_path")
    model = built(method, NOT_SQUARE + " --drop-path 0.5" * drop_path)
    N = model.num_patches
    patches = patchify(images_for(model, 1), model.patch_size).repeat(1 + N, 1, 1)
    patches[1 + torch.arange(N), torch.arange(N)] += torch.randn(patches.shape[2])
    images = unpatchify(patches, model.patch_size, model.grid)
    pooled, tokens = model.encode(images)
    assert pooled.shape == (1 + N, 32) and tokens.shape == (1 + N, N, 32)
    again, _ = model.encode(images)
    assert torch.equal(again, pooled)
    assert (pooled[1:] - pooled[0]).abs().amax(1).min() > 1e-5
    moved = (tokens[1:] - tokens[0]).norm(dim=-1)  # [N images, N tokens]
    assert torch.equal(moved.argmax(1), torch.arange(N))  # tokens come row by row, as the patches


@each_method
@torch.no_grad()
def test_torch_export_takes_encode(method):
    model = built(method)
    images = images_for(model, 2)
    with mock.patch.object(type(model), "forward", type(model).encode):
        exported = torch.export.export(model, (images,)).module()
    for found, features in zip(exported(images), model.encode(images), strict=True):
        assert torch.allclose(found, features, atol=1e-6)


@each_method
@torch.no_grad()
def test_encode_takes_other_sizes(method):
    model = built(method)
    pooled, patches = model.encode(torch.randn(2, 3, 48, 64))
    assert pooled.shape == (2, 32) and patches.shape == (2, 48, 32) and patches.isfinite().all()
    with pytest.raises(BadInput, match="45 62"):
        model.encode(torch.randn(2, 3, 45, 62))


@each_method
@torch.no_grad()
def test_pictures_have_titles_and_values_in_0_to_1(method, monkeypatch):
    cfg = tiny("nowhere", method, NOT_SQUARE, mean=(0.5,) * 3, std=(0.25,) * 3)
    model = built(method, NOT_SQUARE)
    drawn = {}
    monkeypatch.setattr(common, "save_picture", drawn.__setitem__)
    common.save_pictures(model, images_for(model, 3), cfg, "out")
    assert Path("out/features.png") in drawn
    for path, columns in drawn.items():
        assert path.suffix == ".png" and len(columns) > 1
        for title, column in columns.items():
            assert title and column.shape in [(3, 3, 32, 48), (3, 1, 32, 48)]
            assert column.min() >= 0 and column.max() <= 1 and column.std() > 0
