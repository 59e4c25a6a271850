"""The shared pieces, each against its formula, brute force, or torchvision."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, resized_crop, to_pil_image

import common
from common import (attend, crop_boxes, crop_resize, draw, gather, patchify, random_crops,
                    render_shapes, resize_positions, sincos_2d, split_ids, unpatchify, unshuffle)
from conftest import noise_image, started

# -- ViT

@pytest.mark.parametrize("chans, p, grid", [
    (3, 4, (8, 8)), (12, 3, (5, 1)), (2, 1, (3, 4))])
def test_unpatchify_undoes_patchify(chans, p, grid):
    images = torch.randn(2, chans, grid[0] * p, grid[1] * p)
    patches = patchify(images, p)
    assert torch.equal(unpatchify(patches, p, grid), images)
    last = images[:, :, -p:, -p:].permute(0, 2, 3, 1).flatten(1)  # row, column, channel
    assert torch.equal(patches[:, -1], last)


def test_resized_positions_keep_their_meaning():
    """There and back, with the token of CLS, which stays."""
    pos = F.pad(sincos_2d(16, torch.arange(8.0), torch.arange(6.0)), (0, 0, 1, 0), value=7.0)
    assert torch.equal(resize_positions(pos, (8, 6), (8, 6)), pos)
    larger = resize_positions(pos, (8, 6), (16, 18))
    assert larger.shape == (1, 1 + 16 * 18, 16) and (larger[0, 0] == 7).all()
    back = resize_positions(larger, (16, 18), (8, 6))
    torch.testing.assert_close(back, pos, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype, tokens, atol", [  # few tokens and many: there are two ways
    (torch.float32, 9, 1e-5), (torch.float32, 60, 1e-5), (torch.bfloat16, 60, 0.02),
    (torch.bfloat16, 520, 0.02)])
def test_attend_is_softmax_attention(dtype, tokens, atol):
    q, k, v = torch.randn(3, 2, 3, tokens, 8).to(dtype).unbind(0)
    q = q[:, :, 3:]  # fewer queries than keys
    theirs = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(attend(q, k, v).float(), theirs, rtol=1e-4, atol=atol)


def test_queries_that_are_left_out_change_no_number():
    """A block without the queries that nobody reads gives the same outputs and gradients."""
    block, x = common.Block(12, 3, nn.LayerNorm), torch.randn(2, 5, 12, requires_grad=True)
    found = []
    for out in (block(x)[:, 2:], block(x, first_query=2)):
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    torch.testing.assert_close(*found)


# -- masking

def test_split_gather_and_unshuffle_by_loops():
    is_masked, x = common.random_mask(torch.rand(5, 12), 7), torch.randn(5, 12, 3)
    ids_visible, ids_masked = split_ids(is_masked, 5)
    for b in range(5):
        assert ids_visible[b].tolist() == [n for n in range(12) if not is_masked[b, n]]
        assert torch.equal(gather(x, ids_masked)[b], x[b][is_masked[b]])
    assert torch.equal(gather(x[:1], ids_visible)[4], x[0, ids_visible[4]])  # one table for all
    apart = torch.cat([gather(x, ids_visible), gather(x, ids_masked)], 1)
    assert torch.equal(unshuffle(apart, torch.cat([ids_visible, ids_masked], 1)), x)


def test_a_reconstruction_shows_masked_predicted_and_pasted():
    images, is_masked = torch.rand(2, 3, 8, 12), common.random_mask(torch.rand(2, 6), 4)
    pred, hidden = torch.rand(2, 6, 48), is_masked[..., None]
    shown = common.reconstruction(images, pred, is_masked, 4, lambda images: images)
    assert torch.equal(shown["input"], images)
    patches = patchify(images, 4)
    for title, expected in {"masked": patches.masked_fill(hidden, 0), "predicted": pred,
                            "pasted": torch.where(hidden, pred, patches)}.items():
        assert torch.equal(patchify(shown[title], 4), expected)


# -- crops

@pytest.mark.parametrize("height, width, size, chans", [
    (40, 40, (32, 32), 3), (33, 61, (16, 24), 3), (20, 24, (48, 40), 1)])
def test_crop_resize_is_torchvisions(height, width, size, chans):
    images = torch.stack([noise_image(i, chans, height, width) for i in range(12)])
    images[:4] = torch.randint(0, 256, images[:4].shape, dtype=torch.uint8)  # the hardest: noise
    boxes, flips = crop_boxes(torch.rand(12, 41), height, width, (0.1, 1.0))
    boxes[0] = torch.tensor([0.0, 0.0, height, width])
    assert flips.unique().tolist() == [False, True]
    crops = crop_resize(images, boxes, flips, size)
    for image, box, flip, crop in zip(images, boxes.int().tolist(), flips, crops):
        theirs = resized_crop(image, *box, list(size), InterpolationMode.BICUBIC, antialias=True)
        assert (crop - (hflip(theirs) if flip else theirs)).abs().max() <= 1


@pytest.mark.parametrize("height, width, scale", [
    (32, 32, (0.2, 1.0)), (60, 90, (0.08, 0.5)), (30, 100, (0.6, 1.0))])
def test_crop_boxes_follow_torchvisions_rule(height, width, scale):
    """Means over 4000 boxes of each: equal to five standard errors."""
    boxes, flips = crop_boxes(draw((4000, 41), "cpu", "boxes", height), height, width, scale)
    image = torch.empty(1, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
                           for _ in range(4000)]).float()

    def measures(boxes):
        top, left, h, w = boxes.unbind(1)
        assert (top >= 0).all() and (top + h <= height).all() and (h >= 1).all()
        assert (left >= 0).all() and (left + w <= width).all() and (w >= 1).all()
        return torch.stack([top, left, h * w, (w / h).log(), h == height, w == width])
    mine, theirs = measures(boxes), measures(theirs)
    error = ((mine.var(1) + theirs.var(1)) / 4000).sqrt()
    assert ((mine.mean(1) - theirs.mean(1)).abs() <= 5 * error + 1e-6).all()
    assert torch.equal(boxes, boxes.round()) and abs(flips.float().mean() - 0.5) < 0.04


def test_a_crop_of_a_file_is_torchvisions(tmp_path):
    image, box = noise_image(0, 3, 90, 70), (5, 7, 60, 40)
    to_pil_image(image).save(tmp_path / "photo.png")
    crop = common.read_crop(tmp_path / "photo.png", 3, (16, 24), lambda height, width: box)
    theirs = resized_crop(image, *box, [16, 24], InterpolationMode.BICUBIC, antialias=True)
    assert crop.dtype == torch.uint8 and (crop.int() - theirs.int()).abs().max() <= 1
    to_pil_image(torch.full((3, 500, 333), 255, dtype=torch.uint8)).save(tmp_path / "white.jpg")
    box = 500 - 333, 0, 333, 333  # decoded at half its size, which is rounded up
    assert common.read_crop(tmp_path / "white.jpg", 3, (96, 96), lambda *size: box).min() == 255


# -- shapes

def test_shapes_depend_on_their_world_alone():
    images, labels, maps = render_shapes((24, 48), 5, "val", 3, 7)
    assert images.shape == (32, 5, 24, 48) and maps.shape == (32, 24, 48)
    assert images.dtype == maps.dtype == torch.uint8
    assert (images.float().flatten(2).std(2) > 4).all()  # every channel is a picture
    torch.testing.assert_close(render_shapes((24, 48), 5, "val", 3, 7), (images, labels, maps))
    assert not torch.equal(render_shapes((24, 48), 5, "train", 3, 7)[0], images)


def test_shapes_have_balanced_labels_that_maps_agree_with():
    data = common.draw_shapes(started(img_size=(16,))[0], "train", 3000)
    for name, classes in {"kind": 6, "count": 8, "distance": 6}.items():
        share = data.labels[name].bincount() / len(data)
        assert len(share) == classes and (share - 1 / classes).abs().max() < 0.04, name
    nearest = data.maps == data.labels["kind"][:, None, None] + 1
    assert nearest.flatten(1).any(1).float().mean() > 0.99  # it hides behind nothing
    near, far = (nearest[data.labels["distance"] == d].float().mean() for d in (0, 5))
    assert near > 1.3 * far


# -- the order of a run

def test_draws_depend_on_their_names_alone():
    parts = [("mask", 0, 1), ("mask", 1, 0), ("crop", 0, 1), ("mask", 0, 2), ("mask", 0, 1, 1)]
    before = torch.get_rng_state()
    draws = torch.stack([draw((4, 5), "cpu", *p) for p in parts])
    assert len(draws.unique(dim=0)) == len(parts)
    assert torch.equal(draw((4, 5), "cpu", *parts[0]), draws[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n, batch", [(64, 16), (50, 16), (7, 16), (33, 10)])
def test_every_image_comes_once_per_epoch(n, batch):
    def stream(first, steps, **changes):
        cfg, run = started(batch_size=batch, **changes)
        return torch.cat([ids for ids, _ in random_crops(cfg, run, n, first, steps)])
    steps = 4 + 4 * n // batch
    order = stream(0, steps)
    epochs = order[:4 * n].view(4, n)
    assert all(epoch.sort().values.tolist() == list(range(n)) for epoch in epochs)
    assert len(epochs.unique(dim=0)) == 4 and not torch.equal(epochs[0], torch.arange(n))
    assert torch.equal(stream(3, steps), order[3 * batch:])  # as a resumed run
    assert not torch.equal(stream(0, steps, seed=1), order)


def test_labels_are_those_of_the_images_that_are_read(tmp_path):
    """Each image is as bright as its number. One cannot be read; the next one replaces it."""
    cfg, run = started(batch_size=16)
    for i in range(200):
        Image.new("L", (20, 20), i).save(tmp_path / f"{i:03}.png")
    (tmp_path / "070.png").write_bytes(b"")
    paths, _ = common.find_images(tmp_path, 3)
    data = common.Folder(np.array(paths), {"number": torch.arange(200)})

    def brightness(images):
        return 255 * common.denormalise(images, cfg).mean((1, 2, 3)), None
    features, labels = common.features_of(brightness, cfg, run, data, torch.arange(200),
                                          lambda pooled, patches: pooled)
    assert features.round().tolist() == labels["number"].tolist()
    assert labels["number"][69:72].tolist() == [69, 71, 71]


def test_normalise_and_back():
    cfg, _ = started(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images = torch.randint(0, 256, (2, 3, 4, 4)).float()
    normal = common.normalise(images.clone(), cfg)
    torch.testing.assert_close(normal[:, 1], (images[:, 1] / 255 - 0.2) / 0.6)
    torch.testing.assert_close(common.denormalise(normal, cfg), images / 255)


# -- evaluation

def test_effective_rank_by_hand():
    """exp of the entropy of the normalised singular values, which are 3 and 1 here."""
    pair = torch.linalg.qr(torch.cat([torch.ones(64, 1), torch.randn(64, 2)], 1))[0][:, 1:]
    features = 7 + pair * torch.tensor([3.0, 1.0]) @ torch.linalg.qr(torch.randn(12, 12))[0][:2]
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert common.effective_rank(features) == pytest.approx(math.exp(entropy), rel=1e-3)


def test_knn_by_brute_force():
    gallery, labels, queries = torch.randn(60, 7), torch.randint(0, 4, (60,)), torch.randn(1100, 7)
    similarity, ids = common.knn(gallery, queries, k=9)
    answers = common.vote(similarity, labels[ids])
    for query, answer in zip(queries[::25], answers[::25]):
        cosines = [float(query @ g / query.norm() / g.norm()) for g in gallery]
        votes = [0.0] * 4
        for i in sorted(range(60), key=lambda i: -cosines[i])[:9]:
            votes[labels[i]] += math.exp(cosines[i] / 0.07)
        assert answer == votes.index(max(votes))
    assert common.knn(gallery[:3], queries)[1].shape == (1100, 3)  # fewer than k in the gallery
