"""The shared pieces, each against its formula, brute force, or torchvision."""

import ast
import dataclasses
import math
import pickle
import platform
import re
import resource
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, resized_crop, to_pil_image

import common
import mae
from common import (BadInput, Order, attend, check_health, crop_box, crop_boxes, crop_resize, draw, effective_rank,
                    gather, knn_predict, param_groups, parse_args, patchify, random_mask, raw_pixels,
                    read_checkpoint, render_shapes, resize_positions, restore, save_checkpoint, seed_of,
                    shapes_set, sincos_2d, split_ids, train_batches, unpatchify, warmup_cosine,
                    warn_of_trouble)
from conftest import ROOT, filled, noise_image, one_process, tiny

# -- ViT ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chans, p, grid", [
    (3, 4, (8, 8)), (1, 16, (2, 3)), (12, 3, (5, 1)), (5, 7, (1, 1)), (2, 1, (3, 4))])
def test_unpatchify_undoes_patchify(chans, p, grid):
    images = torch.randn(2, chans, grid[0] * p, grid[1] * p)
    patches = patchify(images, p)
    assert patches.shape == (2, grid[0] * grid[1], p * p * chans)
    assert torch.equal(unpatchify(patches, p, grid), images)
    last = images[0, :, -p:, -p:].permute(1, 2, 0).flatten()  # row, column, channel
    assert torch.equal(patches[0, -1], last)


def test_sincos_2d_by_loops():
    dim, rows, cols = 24, [0.0, 1.0, 2.5], [0.0, 3.0, 1.0, 14.0]
    expected = torch.zeros(1, 12, dim)
    for r, row in enumerate(rows):
        for c, col in enumerate(cols):
            for i in range(dim // 4):
                w = 10000 ** (-i / (dim / 4))
                values = math.sin(col * w), math.cos(col * w), math.sin(row * w), math.cos(row * w)
                for quarter, value in enumerate(values):
                    expected[0, r * 4 + c, quarter * dim // 4 + i] = value
    table = sincos_2d(dim, torch.tensor(rows), torch.tensor(cols))
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)
    with pytest.raises(BadInput):
        sincos_2d(30, torch.arange(2.0), torch.arange(2.0))


def test_usual_patch():
    assert [common.usual_patch(size) for size in ((32,), (64,), (96,), (224,), (32, 64))] == [4, 8, 8, 16, 8]


def test_resize_positions():
    pos = torch.randn(1, 1 + 12, 8)
    assert torch.equal(resize_positions(pos, (3, 4), (3, 4)), pos)
    larger = resize_positions(pos, (3, 4), (5, 7))
    assert larger.shape == (1, 36, 8) and torch.equal(larger[:, 0], pos[:, 0])
    rows = torch.arange(3.0)[:, None].expand(3, 4).reshape(1, 12, 1)  # a table that tells the row
    resized = resize_positions(F.pad(rows, (0, 0, 1, 0)), (3, 4), (6, 5))[0, 1:, 0].view(6, 5)
    torch.testing.assert_close(resized, resized[:, :1].expand(6, 5))
    assert (resized[1:, 0] > resized[:-1, 0]).all()


@pytest.mark.parametrize("queries, keys", [(5, 9), (600, 600)])  # either side of the switch of methods
def test_attend(queries, keys):
    q, k, v = torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
    by_hand = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 8**0.5, -1) @ v
    torch.testing.assert_close(attend(q, k, v), by_hand, rtol=1e-4, atol=1e-5)


def test_attention_and_block_options():
    x = torch.randn(2, 5, 12)
    block = common.Block(12, 3)
    assert not any("ls" in name or "drop" in name for name in block.state_dict())
    scaled = common.Block(12, 3, qkv_bias=False, layer_scale=0.0, drop_path=0.5)
    assert "attn.qkv.bias" not in scaled.state_dict() and scaled.ls1.gamma.shape == (12,)
    assert torch.equal(scaled(x), x) and not torch.equal(block(x), x)  # a scale of 0: the residual alone
    with pytest.raises(BadInput, match="heads"):
        common.Attention(12, 5)


def test_keys_only_changes_no_number():
    """A block that leaves out queries which nobody reads: the other outputs and all gradients are the same."""
    block, x = common.Block(12, 3), torch.randn(2, 5, 12, requires_grad=True)
    found = []
    for out in (block(x)[:, 2:], block(x, keys_only=2)):
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    assert found[1][0].shape == (2, 3, 12)
    torch.testing.assert_close(*found)


def test_drop_path_keeps_the_mean():
    drop = common.DropPath(0.25)
    out = drop(torch.ones(20000, 2, 3))
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(out[:, 0, 0].unique(), torch.tensor([0, 4 / 3]))
    assert (out == out[:, :1, :1]).all()  # a whole image's branch, or nothing of it
    assert torch.equal(drop.eval()(out), out)


# -- masking --------------------------------------------------------------------------------------------

def test_masks_over_10000_samples():
    samples, places, masked = 10000, 64, 48
    noise = torch.cat([draw((1000, places), "cpu", "mask", 0, step) for step in range(10)])
    masks = random_mask(noise, masked)
    assert (masks.sum(1) == masked).all()
    often = masks.float().mean(0)  # expected 0.75, standard deviation 0.0043
    assert (often - masked / places).abs().max() < 5 * (0.75 * 0.25 / samples) ** 0.5
    image = masks.view(samples, 8, 8).float()
    # masked in one half minus in the other: mean 0; the variance of a draw without replacement is 12.2
    for difference in (image[:, :4] - image[:, 4:], image[:, :, :4] - image[:, :, 4:]):
        difference = difference.sum((1, 2))
        assert abs(difference.mean().item()) < 5 * (12.2 / samples) ** 0.5
        assert difference.var().item() == pytest.approx(12.2, rel=0.08)
    assert len(masks.unique(dim=0)) == samples  # no two images share a mask


def test_split_gather_restore():
    mask = random_mask(torch.rand(5, 12), 7)
    visible, masked = split_ids(mask, 5)
    for row in range(5):
        assert visible[row].tolist() == [i for i in range(12) if not mask[row, i]]
        assert masked[row].tolist() == [i for i in range(12) if mask[row, i]]
    x = torch.randn(5, 12, 3)
    assert all(torch.equal(gather(x, masked)[row], x[row][mask[row]]) for row in range(5))
    assert torch.equal(gather(x[:1], visible)[4], x[0, visible[4]])  # one table for all images
    apart = torch.cat([gather(x, visible), gather(x, masked)], 1)
    assert torch.equal(restore(apart, torch.cat([visible, masked], 1)), x)


# -- crops ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, size, chans", [
    (40, 40, (32, 32), 3), (33, 61, (16, 24), 3), (20, 24, (48, 40), 1)])
def test_crop_resize_is_torchvisions(height, width, size, chans):
    images = torch.stack([noise_image(i, chans, height, width) for i in range(12)])
    images[:4] = torch.randint(0, 256, images[:4].shape, dtype=torch.uint8)  # the hardest picture: noise
    boxes, flips = crop_boxes(torch.rand(12, 41), height, width, (0.1, 1.0))
    boxes[0], flips[:2] = torch.tensor([0.0, 0.0, height, width]), torch.tensor([False, True])
    mine = crop_resize(images, boxes, flips, size)
    assert mine.shape == (12, chans, *size)
    for image, box, flip, result in zip(images, boxes.int().tolist(), flips, mine):
        theirs = resized_crop(image, *box, list(size), InterpolationMode.BICUBIC, antialias=True)
        theirs = hflip(theirs) if flip else theirs
        assert (result - theirs).abs().max() <= 1


@pytest.mark.parametrize("height, width, scale", [
    (32, 32, (0.2, 1.0)), (60, 90, (0.08, 0.5)), (30, 100, (0.6, 1.0))])
def test_crop_boxes_are_torchvisions(height, width, scale):
    n = 4000
    boxes, flips = crop_boxes(draw((n, 41), "cpu", "boxes", height), height, width, scale)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)]
    theirs = torch.tensor(theirs).float()
    top, left, h, w = boxes.unbind(1)
    assert torch.equal(boxes, boxes.round())
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    measures = {  # share of the area, aspect, place, and how often a crop is as high or as wide as the image
        "area": lambda b: b[:, 2] * b[:, 3] / (height * width), "aspect": lambda b: (b[:, 3] / b[:, 2]).log(),
        "top": lambda b: b[:, 0], "left": lambda b: b[:, 1],
        "full height": lambda b: (b[:, 2] == height).float(),
        "full width": lambda b: (b[:, 3] == width).float(),
        "small": lambda b: (b[:, 2] < height / 2).float()}
    for name, measure in measures.items():
        a, b = measure(boxes), measure(theirs)
        noise = ((a.var() + b.var()) / n).sqrt().item()
        assert abs((a.mean() - b.mean()).item()) <= 5 * noise + 1e-6, name
    assert abs(flips.float().mean().item() - 0.5) < 5 * 0.5 / n**0.5


def test_crop_that_never_fits_is_central():
    boxes, _ = crop_boxes(torch.rand(50, 41), 10, 100, (0.9, 1.0))
    assert boxes.unique(dim=0).tolist() == [[0, (100 - 13) // 2, 10, 13]]
    assert crop_box(torch.rand(41).tolist(), 10, 100, (0.9, 1.0))[0] == (0, (100 - 13) // 2, 10, 13)


@pytest.mark.parametrize("height, width, scale", [(32, 32, (0.2, 1.0)), (375, 500, (0.08, 0.5)), (30, 100, (0.6, 1.0))])
def test_one_image_is_cropped_as_many_are(height, width, scale):
    noise = torch.rand(2000, 41, dtype=torch.float64)
    boxes, flips = crop_boxes(noise, height, width, scale)
    alone = [crop_box(u, height, width, scale) for u in noise.tolist()]
    assert [list(box) for box, _ in alone] == boxes.tolist() and [flip for _, flip in alone] == flips.tolist()


def test_a_box_is_cut_as_from_the_whole():
    for chans, mode in ((3, "RGB"), (1, "RGB"), (3, "L"), (1, "L"), (3, "RGBA"), (4, "RGB"), (3, "P")):
        picture = to_pil_image(noise_image(chans, 3, 40, 36)).convert(mode)
        whole, part = common.cut(picture, chans), common.cut(picture, chans, (5, 7, 20, 11))
        assert whole.shape == (chans, 40, 36) and torch.equal(part, whole[:, 5:25, 7:18])
        assert torch.equal(common.cut(whole, chans, (5, 7, 20, 11)), part)
    picture = to_pil_image(noise_image(0, 4, 40, 36))  # a fourth channel is one more channel, if four are wanted
    assert torch.equal(common.cut(picture, 4), noise_image(0, 4, 40, 36))


# -- shapes ---------------------------------------------------------------------------------------------

def test_shapes_are_a_function_of_seed_and_index():
    images, labels, maps = render_shapes(3, range(12), 32)
    for part in (range(5, 9), [11, 0, 5]):
        some, some_labels, some_maps = render_shapes(3, part, 32)
        assert torch.equal(some, images[list(part)]) and torch.equal(some_maps, maps[list(part)])
        assert all(torch.equal(y, labels[name][list(part)]) for name, y in some_labels.items())
    assert not torch.equal(render_shapes(4, range(12), 32)[0], images)
    assert len(images.flatten(1).unique(dim=0)) == 12


def test_shapes_labels_and_maps():
    images, labels, maps = render_shapes(0, range(3000), 16)
    assert images.dtype == maps.dtype == torch.uint8 and maps.shape == (3000, 16, 16)
    for name, classes in {"kind": 6, "count": 8, "distance": 6}.items():
        often = labels[name].bincount(minlength=classes) / 3000
        assert len(often) == classes and (often - 1 / classes).abs().max() < 0.04, name
    assert set(maps.unique().tolist()) == set(range(7))
    seen = torch.tensor([bool((m == kind + 1).any()) for m, kind in zip(maps, labels["kind"])])
    assert seen.float().mean() > 0.99  # the nearest object hides behind nothing
    covered = (maps == labels["kind"][:, None, None] + 1).float()
    near, far = (covered[labels["distance"] == d].mean() for d in (0, 5))
    assert near > 1.3 * far  # what is far is small


@pytest.mark.parametrize("chans, size", [(1, 32), (3, (24, 48)), (12, (48, 24))])
def test_shapes_sizes_and_channels(chans, size):
    images, _, maps = render_shapes(0, range(8), size, chans)
    assert images.shape == (8, chans, *common.pair(size)) and maps.shape == (8, *common.pair(size))
    assert (images.float().flatten(2).std(2) > 4).all()  # every channel is a picture
    assert chans == 1 or not torch.equal(images[:, 0], images[:, -1])


# -- the stream of a run --------------------------------------------------------------------------------

def test_seeds_and_draws():
    parts = [("mask", 0, 1), ("mask", 1, 0), ("crop", 0, 1), ("mask", 0, 2), ("mask", 0, 1, 1), ("x", 0, 1)]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert all(0 <= seed_of(*p) < 2**63 for p in parts)
    assert torch.equal(draw((4, 5), "cpu", "mask", 0, 1), draw((4, 5), "cpu", "mask", 0, 1))
    assert not torch.equal(draw((4, 5), "cpu", "mask", 0, 1), draw((4, 5), "cpu", "mask", 0, 2))
    before = torch.get_rng_state()
    draw((4,), "cpu", "mask")
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone


@pytest.mark.parametrize("n, batch", [(64, 16), (50, 16), (7, 16), (33, 10)])
def test_order_shows_every_image_once_per_epoch(n, batch):
    order = Order(n, seed=1)
    stream = torch.cat([order(step, batch, slice(0, batch)) for step in range(4 + 4 * n // batch)])
    epochs = stream[:4 * n].view(4, n)
    assert all(epoch.sort().values.tolist() == list(range(n)) for epoch in epochs)
    assert len(epochs.unique(dim=0)) == 4 and not torch.equal(epochs[0], torch.arange(n))
    again = Order(n, seed=1)  # from the middle, as a resumed run asks, and by rows, as a process asks
    assert torch.equal(again(3, batch, slice(2, 5)), stream[3 * batch + 2:3 * batch + 5])
    assert not torch.equal(Order(n, seed=2)(0, batch, slice(0, batch)), stream[:batch])


@pytest.mark.parametrize("world, accum", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_processes_share_the_global_batch(world, accum, tmp_path):
    cfg = filled(tiny(tmp_path, batch_size=16))
    data = shapes_set(cfg, 0, 40, one_process())
    whole = list(train_batches(cfg, one_process(), data, (0.2, 1), 0, 3))
    cfg = dataclasses.replace(cfg, accum=accum)
    runs = [one_process(rank=rank, world=world) for rank in range(world)]
    parts = [list(train_batches(cfg, run, data, (0.2, 1), 0, 3)) for run in runs]
    for step in range(3):
        together = torch.cat([part[step * accum + micro] for micro in range(accum) for part in parts])
        torch.testing.assert_close(together, whole[step], rtol=0, atol=1e-5)
    late = next(train_batches(dataclasses.replace(cfg, accum=1), one_process(), data, (0.2, 1), 2, 3))
    assert torch.equal(late, whole[2])  # a stream that starts late is the same stream
    assert not torch.equal(whole[0], whole[1])


def test_labels_go_with_the_images_that_are_seen(tmp_path):
    """Each picture is as bright as its label says; of an image that stands in for a broken one it is its own."""
    cfg = filled(tiny(tmp_path, batch_size=16, workers=0))
    numbers = torch.arange(200)
    memory = common.Pixels(numbers.byte().view(-1, 1, 1, 1).repeat(1, 3, 20, 20), {"number": numbers})
    (tmp_path / "set").mkdir()
    for i in range(200):
        Image.new("L", (20, 20), i).save(tmp_path / "set" / f"{i:03}.png")
    (tmp_path / "set" / "007.png").write_bytes(b"no image")
    folder = common.Folder(sorted((tmp_path / "set").iterdir()), list(range(200)), 3)
    for data in (memory, folder):
        told = []
        for images, labels in train_batches(cfg, one_process(), data, (0.2, 1), 0, 12, labelled=True):
            shown = 255 * common.denormalise(images, cfg).mean((1, 2, 3))
            assert shown.round().tolist() == labels.tolist()
            told += labels.tolist()
        place = common.Order(200, cfg.seed)(0, 200, slice(0, 192)).tolist().index(7)
        assert told[place] == (7 if data is memory else 8)


def test_normalise_and_back(tmp_path):
    cfg = dataclasses.replace(tiny(tmp_path), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images = torch.randint(0, 256, (2, 3, 4, 4)).float()
    normal = common.normalise(images.clone(), cfg)
    torch.testing.assert_close(normal[:, 1], (images[:, 1] / 255 - 0.2) / 0.6)
    torch.testing.assert_close(common.denormalise(normal, cfg), images / 255)
    torch.testing.assert_close(common.normalise(images.to(memory_format=torch.channels_last), cfg), normal)  # rounds once less


@pytest.mark.parametrize("planes_first", [False, True])
@pytest.mark.parametrize("chans", [1, 3, 4, 6])
def test_resize(chans, planes_first):
    """PIL's result to a level, whatever the layout; of colours as PIL lays them out, by the way of torch that is fast."""
    pixels = noise_image(3, chans, 50, 70)
    picture = pixels.contiguous() if planes_first else pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    small = common.resize(picture, (24, 30))
    for got, plane in zip(small, pixels):
        wanted = torch.from_numpy(np.array(to_pil_image(plane).resize((30, 24), Image.BICUBIC)))
        assert (got.int() - wanted.int()).abs().max() <= 1
    if chans in (3, 4):
        assert small.permute(1, 2, 0).is_contiguous()


def test_channels_of_files(tmp_path):
    pixels = noise_image(0)
    to_pil_image(pixels).save(tmp_path / "colour.png")
    assert torch.equal(common.read_image(str(tmp_path / "colour.png"), 3), pixels)
    for chans in (1, 4):
        assert common.read_image(str(tmp_path / "colour.png"), chans).shape == (chans, 40, 36)
    array = np.random.default_rng(0).integers(0, 256, (9, 8, 12), dtype=np.uint8)
    np.save(tmp_path / "many.npy", array)
    many = common.read_image(str(tmp_path / "many.npy"), 12)
    assert torch.equal(many, torch.from_numpy(array).permute(2, 0, 1))
    np.save(tmp_path / "code.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "float.npy", array.astype(np.float32))
    for name, chans in (("many.npy", 3), ("code.npy", 3), ("float.npy", 12), ("colour.png", 5)):
        with pytest.raises(ValueError):
            common.read_image(str(tmp_path / name), chans)


# -- optimisation ---------------------------------------------------------------------------------------

def test_warmup_cosine():
    rate = lambda step: warmup_cosine(step, 110, 10, 2.0, last=0.5)
    assert [rate(s) for s in (0, 5, 10)] == [0, 1, 2]
    assert rate(60) == pytest.approx(1.25) and rate(110) == pytest.approx(0.5)
    assert rate(35) == pytest.approx(0.5 + 1.5 * (1 + 0.5**0.5) / 2)
    assert warmup_cosine(0, 10, 0, 3.0) == 3 and warmup_cosine(10, 10, 0, 3.0) == 0
    assert warmup_cosine(3, 5, 5, 1.0) == 0.6 and warmup_cosine(5, 5, 5, 1.0) == 1  # warm-up all the way


def test_param_groups():
    model = mae.MAE(img_size=16, patch_size=8, dim=8, depth=1, heads=1, decoder_dim=8, decoder_depth=1,
                    decoder_heads=1)
    model.norm.requires_grad_(False)
    decayed, plain = param_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0)
    assert all(p.ndim == 1 and names[id(p)].endswith(("bias", "norm1.weight", "norm2.weight", "norm.weight"))
               for p in plain["params"])
    used = [names[id(p)] for p in decayed["params"] + plain["params"]]
    assert sorted(used) == sorted(set(names.values()) - {"norm.weight", "norm.bias"})


# -- health ---------------------------------------------------------------------------------------------

def test_effective_rank():
    assert effective_rank(torch.ones(50, 8)) == 1.0
    assert effective_rank(torch.zeros(50, 8)) == 1.0
    assert effective_rank(torch.randn(50, 1) * torch.randn(1, 8)) == pytest.approx(1, abs=1e-3)
    assert 15.5 < effective_rank(torch.randn(4000, 16)) <= 16
    basis = torch.linalg.qr(torch.cat([torch.ones(64, 1), torch.randn(64, 5)], 1))[0][:, 1:]  # centred
    rotation = torch.linalg.qr(torch.randn(12, 12))[0][:5]
    assert effective_rank(7 + 3 * basis @ rotation) == pytest.approx(5, rel=1e-3)


def test_collapse_is_named(tmp_path, capsys):
    cfg, run = filled(tiny(tmp_path)), one_process()
    data = shapes_set(cfg, 0, 80, run)
    constant = lambda images: (torch.ones(len(images), 16), torch.ones(len(images), 4, 16))
    scores = check_health(constant, cfg, run, data, data)
    warn_of_trouble(run, scores)
    assert scores["rank"] == 1 and "collapse" in capsys.readouterr().out
    random = lambda images: (torch.randn(len(images), 16), torch.randn(len(images), 4, 16))
    scores = check_health(random, cfg, run, data, data)
    warn_of_trouble(run, scores)
    assert scores["rank"] > 10 and capsys.readouterr().out == ""


def test_health_of_raw_pixels(tmp_path):
    cfg, run = filled(tiny(tmp_path)), one_process()
    data = shapes_set(cfg, 0, 60, run)
    scores = check_health(raw_pixels, cfg, run, data, data)
    assert {"rank", "feature_std", "knn_kind", "knn_count", "knn_distance"} <= scores.keys()
    assert scores["knn_kind"] > 90  # asked about the gallery itself: an image's nearest neighbour is itself


def test_knn_by_brute_force():
    gallery, labels, queries = torch.randn(60, 7), torch.randint(0, 4, (60,)), torch.randn(25, 7)
    expected = []
    for query in queries:
        votes, cosine = [0.0] * 4, [float(query @ g / query.norm() / g.norm()) for g in gallery]
        for i in sorted(range(60), key=lambda i: -cosine[i])[:9]:
            votes[labels[i]] += math.exp(cosine[i] / 0.07)
        expected.append(votes.index(max(votes)))
    assert knn_predict(gallery, labels, queries, k=9).tolist() == expected
    assert knn_predict(gallery[:3], labels[:3], queries).shape == (25,)  # fewer than k in the gallery


def test_knn_on_toys():
    labels = torch.arange(4).repeat_interleave(200)
    features = F.one_hot(labels, 8) + 0.1 * torch.randn(800, 8)
    queries, truth = features[::2], labels[::2]
    assert (knn_predict(features[1::2], labels[1::2], queries) == truth).all()
    shuffled = labels[1::2][torch.randperm(400)]
    right = (knn_predict(features[1::2], shuffled, queries) == truth).float().mean().item()
    assert abs(right - 0.25) < 0.2  # chance; wide, as the queries of one cluster share their neighbours


# -- flags ----------------------------------------------------------------------------------------------

def test_every_field_is_a_flag():
    assert parse_args(mae.Config, argv=[]) == mae.Config()
    argv = "--no-norm-pix --img-size 64 96 --mean 0.1 0.2 0.3 --out x".split()
    expected = mae.Config(norm_pix=False, img_size=(64, 96), mean=(0.1, 0.2, 0.3), out="x")
    assert parse_args(mae.Config, argv=argv) == expected
    for field in dataclasses.fields(mae.Config):
        name, value = "--" + field.name.replace("_", "-"), field.default
        if value is True:
            argv, expected = [name.replace("--", "--no-", 1)], False
        elif isinstance(value, tuple):
            argv, expected = [name, "2", "3"], (2, 3)
        elif isinstance(value, str):
            chosen = {"model": "tiny", "device": "cpu", "amp": "off", "compile": "off"}
            expected = chosen.get(field.name, "some")
            argv = [name, expected]
        else:
            argv, expected = [name, "3"], 3
        assert getattr(parse_args(mae.Config, argv=argv), field.name) == expected, name


def test_shared_flags_are_in_every_config():
    assert set(common.SHARED) <= {field.name for field in dataclasses.fields(mae.Config)}
    assert mae.Config.__dataclass_params__.frozen


def unread(fields, *sources):
    """The fields of which no source has `cfg.NAME`."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "cfg"}
    return [name for name in fields if name not in read]


def test_every_field_is_read():
    sources = [(ROOT / name).read_text() for name in ("mae.py", "common.py")]
    assert unread([field.name for field in dataclasses.fields(mae.Config)], *sources) == []
    assert unread(["epochs", "nobody_reads_me"], *sources) == ["nobody_reads_me"]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports():
    ours = {path.stem for path in ROOT.glob("*.py")}
    third, peers = {"torch", "torchvision", "numpy", "tqdm"}, {"transformers", "lightly", "timm"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        tests = {"pytest", "conftest", "test_faults"} if path.parent.name == "tests" else set()
        tests |= peers if path.name == "benchmark.py" else set()
        allowed = set(sys.stdlib_module_names) | third | {"PIL"} | ours | tests  # PIL comes with torchvision
        assert set(imports_of(path)) <= allowed, path.name
    assert not set(imports_of(ROOT / "common.py")) & ours  # one way: methods -> common
    assert "evaluate" not in set(imports_of(ROOT / "mae.py"))
    named = re.findall(r"^[a-z]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert set(named) == third | {"pytest"}


# -- checkpoints ----------------------------------------------------------------------------------------

def test_checkpoint_round_trip(tmp_path):
    state = {"method": "mae", "step": 3, "model": {"w": torch.randn(4)}, "config": {"betas": (0.9, 0.95)}}
    save_checkpoint(tmp_path / "last.pt", state)
    back = read_checkpoint(tmp_path / "last.pt")
    assert torch.equal(back["model"].pop("w"), state["model"].pop("w")) and back == state
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


class Payload:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def test_unreadable_checkpoints(tmp_path):
    save_checkpoint(tmp_path / "whole.pt", {"w": torch.randn(5000)})
    (tmp_path / "short.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:9000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint at all")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "folder.pt").mkdir()
    for name in ("short", "empty", "text", "list", "folder", "missing"):
        with pytest.raises(BadInput, match=f"{name}.pt") as error:
            read_checkpoint(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path, zipped):
    canary, path = tmp_path / "canary", tmp_path / "bad.pt"
    if zipped:
        torch.save({"model": Payload(canary)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Payload(canary)}, protocol=2))
    with pytest.raises(BadInput, match="unpickling" if zipped else "bad.pt"):
        read_checkpoint(path)
    assert not canary.exists()
    if zipped:  # the payload is live: whoever trusts the file runs it
        torch.load(path, weights_only=False)
        assert canary.exists()


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0\nat c10")])
def test_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, error):
    def full(state, file):
        file.write(b"half of it")
        raise error
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(BadInput, match="untouched") as refusal:
            save_checkpoint(tmp_path / "last.pt", {"step": 2})
    assert "\n" not in str(refusal.value) and "--out" in str(refusal.value)
    assert read_checkpoint(tmp_path / "last.pt") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's setting")
def test_memory_is_kept():
    """What a step frees and takes anew is not faulted in again, large tensors or small; a run on a CPU asks for that."""
    common.start(tiny("run"))

    def step():
        for size in [2**22, 2**24] * 2:  # 16 and 64 MiB of float32: by itself glibc takes the larger ones from the system
            torch.ones(size)

    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    pages = 2 * (2**22 + 2**24) * 4 // resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 10
