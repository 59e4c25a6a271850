"""What the recorded run (test_trajectories.py) does not show of CAPI."""

from functools import partial

import pytest
import torch

from capi import (RotaryBlock, inverse_block, patch_coordinates, register_coordinates, rotary_table,
                  rotation, sinkhorn)
from conftest import built

small = partial(built, "capi", predict_share=0.3)


def some_masks(model, images):
    return model.draw_mask(torch.rand(images, 3 + model.num_patches))


# -- balanced assignments

def test_sinkhorn_of_extreme_logits():
    some, far = torch.randn(8, 3, 16), torch.zeros(8, 3, 16)
    far[1] = -1  # a sample far from every cluster, which would underflow without logarithms
    for logits in (some, some.sign(), (some > 1.3).float(), far):
        assignments = sinkhorn((1e4 * logits).bfloat16())
        torch.testing.assert_close(assignments.sum(-1), torch.ones(8, 3))


# -- the mask and what is predicted

@pytest.mark.parametrize("grid, visible", [((4, 4), 6), ((4, 4), 1), ((6, 9), 19), ((2, 12), 9)])
def test_the_visible_block_is_contiguous(grid, visible):
    noise = torch.rand(300, 3)
    noise[:, 1:] = 0  # not rolled: the block is in the corner
    for seen in ~inverse_block(noise, grid, visible).unflatten(1, grid):
        height, width = int(seen.any(1).sum()), int(seen.any(0).sum())
        places = [row * grid[1] + column for row in range(height) for column in range(width)]
        assert seen.flatten().nonzero()[:, 0].tolist() == places[:visible]  # row by row
        assert (height - 1) * width < visible <= height * width


def test_aspect_ratio_is_log_uniform():
    noise = torch.rand(4000, 3)
    noise[:, 1:] = 0
    heights = (~inverse_block(noise, (64, 64), 900)).unflatten(1, (64, 64)).any(2).sum(1)
    logs = (heights.float() ** 2 / 900).log2()  # of the aspect ratio, up to rounding
    assert -1.05 < logs.min() < -0.85 and 0.9 < logs.max() < 1.1
    assert abs(logs.mean() - 0.05) < 0.05 and abs(logs.std() - 3**-0.5) < 0.03


def test_inverse_block_has_exact_counts_on_every_grid():
    """Height and width are rounded up independently. On 20 x 11 at 0.65 an exact quotient, computed
    in floats, was once rounded up."""
    noise = torch.rand(16, 3)
    for rows in range(2, 25):
        for columns in range(2, 25):
            for ratio in (0.1, 0.25, 0.37, 0.42, 0.5, 0.65, 0.75, 0.9):
                visible = rows * columns - int(ratio * rows * columns)
                counts = (~inverse_block(noise, (rows, columns), visible)).sum(1)
                assert (counts == visible).all(), (rows, columns, ratio)


def test_predicted_places_are_masked_ones_equally_often():
    model = small()
    is_masked, is_predicted = some_masks(model, 5000)
    assert (is_predicted <= is_masked).all() and (is_predicted.sum(1) == 3).all()
    assert (is_predicted.float().mean(0) - 3 / 16).abs().max() < 0.03


@pytest.mark.parametrize("size, p, share, visible, predicted", [
    (224, 14, 0.05, 90, 8), (56, 14, 0.05, 6, 1), (8, 4, 0.05, 2, 1), (32, 4, 0.29, 23, 11)])
def test_counts_are_rounded_down(size, p, share, visible, predicted):
    model = small(img_size=(size,), patch_size=p, predict_share=share)
    assert (model.num_visible, model.num_predict) == (visible, predicted)


# -- rotary coordinates

def test_rotation_is_exact_under_autocast():
    places, table = patch_coordinates((16, 16), "cpu"), rotary_table(64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rotation(places, table)
    assert torch.equal(mixed, rotation(places, table))


def test_coordinates_by_hand():
    places = [[0, 0], [0, 0.5], [0, 1], [1, 0], [1, 0.5], [1, 1]]
    assert patch_coordinates((2, 3), "cpu")[0].tolist() == places
    assert register_coordinates(4, "cpu").tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    eight = [[0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1], [0.5, 1], [0, 1], [0, 0.5]]
    assert register_coordinates(8, "cpu").tolist() == eight
    assert register_coordinates(0, "cpu").shape == (0, 2)


# -- memory: chunks, recomputing, drop path

def results(model, *inputs):
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(5)  # for drop path
    loss, logs = model(*inputs)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss} | logs | gradients


def test_chunks_and_recomputing_change_nothing():
    model, images = small(drop_path=0.5), torch.randn(4, 3, 32, 32)
    masks = some_masks(model, 4)
    whole = results(model, images, *masks)
    for chunk in (1, 3 * 4 * 16):  # one position at a time; three, and one left over
        model.CHUNK = chunk
        torch.testing.assert_close(results(model, images, *masks), whole)
    model.student.recompute = True
    torch.testing.assert_close(results(model, images, *masks), whole)


def test_chunks_keep_no_logits_for_the_backward_pass():
    model, target, kept = small(clusters=256), torch.randn(8, 64, 32), []

    def keep(t):
        kept[-1] += t.numel() / (8 * 64 * 256)  # in all logits
        return t
    for chunk in (model.CHUNK, 8 * 256 * 2):  # all positions at once; two
        model.CHUNK = chunk
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model.cluster(target)
    assert kept[0] > 1.9 and kept[1] < 1.5  # only the assignments, which are the targets


def test_chunks_train_the_clusters_under_autocast_too():
    """torch 2.6 uses again what it has cast without a gradient, where there should be one."""
    model, target = small(), torch.randn(4, 16, 32)
    weight = model.cluster_head.layer.weight
    expected = torch.autograd.grad(model.cluster(target)[1], weight)[0]  # float32, in one piece
    model.CHUNK = 4 * 16 * 8  # eight positions
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.cluster(target)[1]
    gradient = torch.autograd.grad(loss, weight)[0]
    assert expected.any()
    atol = 0.02 * expected.abs().max().item()
    torch.testing.assert_close(gradient, expected, rtol=0.05, atol=atol)


def test_drop_path_leaves_a_fixed_share_of_the_images_out():
    block, x, seen = RotaryBlock(8, 1, drop_path=0.25).train(), torch.randn(8, 3, 8), []

    def branch(t):
        seen.append(len(t))
        return t
    added = torch.stack([block.add_branch(x, branch) - x for _ in range(2000)])
    assert set(seen) == {6}  # 3/4 of 8; the rest is not even computed
    kept = (added != 0).flatten(2).any(-1)
    assert (kept.sum(1) == 6).all() and (kept.float().mean(0) - 0.75).abs().max() < 0.05
    scaled = (x * 8 / 6).expand(2000, -1, -1, -1)  # to keep the mean
    torch.testing.assert_close(added[kept], scaled[kept])
    model = small(drop_path=0.2)
    for part, rate in ((model.student, 0.2), (model.teacher, 0)):
        assert {block.drop_path for block in [*part.blocks, *part.predictor]} == {rate}


def test_drop_path_keeps_an_images_coordinates_and_context():
    block, x, context = RotaryBlock(8, 1, drop_path=0.5), torch.randn(6, 3, 8), torch.randn(6, 4, 8)
    ropes = [rotation(torch.rand(6, n, 2), rotary_table(8)) for n in (3, 4)]
    block.mlp.fc2.weight.data.zero_()
    full = block.eval()(x, ropes[0], context, ropes[1]) - x
    part = block.train()(x, ropes[0], context, ropes[1]) - x
    kept = part.flatten(1).any(1)
    assert kept.sum() == 3
    torch.testing.assert_close(part[kept], 2 * full[kept])
