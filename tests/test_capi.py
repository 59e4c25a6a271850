"""What the recorded run (test_trajectories.py) does not show of CAPI, and slow references."""

import datetime
import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import capi
from capi import (CAPI, RotaryBlock, cut_cosine, inverse_block, patch_coordinates,
                  register_coordinates, rotary_table, rotate, rotation, sinkhorn)
from common import BadInput
from conftest import tiny


def small(**changes):
    sizes = dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_depth=2, registers=4,
                 clusters=12, predict_share=0.3)
    model = CAPI(**sizes | changes)
    for p in model.teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)  # no longer a copy
    return model


def some_masks(model, images):
    return model.draw_mask(torch.rand(images, 3 + model.num_patches))


# -- balanced assignments

def naive_sinkhorn(logits, iterations=3):
    """METHODS.md's recipe, position by position, in float64."""
    out = torch.empty(logits.shape, dtype=torch.float64)
    for n in range(logits.shape[1]):
        x = logits[:, n].double() / 0.06
        x = (x - x.max(0).values).exp()
        for _ in range(iterations):
            x = x / (x.sum(0) + 1e-8)
            x = x / (x.sum(1, keepdim=True) + 1e-8)
        out[:, n] = x
    return out


@pytest.mark.parametrize("images, clusters", [(16, 4), (6, 9), (4, 32), (1, 5)])
def test_sinkhorn_is_the_recipe(images, clusters):
    logits = 0.3 * torch.randn(images, 5, clusters)
    assignments = sinkhorn(logits)
    torch.testing.assert_close(assignments.double(), naive_sinkhorn(logits), rtol=1e-4, atol=1e-6)
    shifted = sinkhorn(logits + torch.randn(5, 1))  # a constant at each position changes nothing
    torch.testing.assert_close(shifted, assignments, rtol=1e-3, atol=1e-5)


def test_sinkhorn_of_extreme_logits():
    some, far = torch.randn(8, 3, 16), torch.zeros(8, 3, 16)
    far[1] = -1  # a sample far from every cluster, which would underflow without logarithms
    assert not naive_sinkhorn(1e4 * far)[1].any()
    for logits in (some, some.sign(), (some > 1.3).float(), far):
        assignments = sinkhorn((1e4 * logits).bfloat16())
        torch.testing.assert_close(assignments.sum(-1), torch.ones(8, 3))


def share_of(rank, folder):
    """One of two processes, with half of the batch. In a model three positions come at a time."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=100))
    try:
        found = assign(slice(4 * rank, 4 * rank + 4), chunk=3 * 4 * 12)
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def assign(rows, chunk=CAPI.CHUNK):
    torch.manual_seed(0)
    logits, target, model = torch.randn(8, 5, 6)[rows], torch.randn(8, 16, 32)[rows], small()
    model.CHUNK = chunk
    assignments, loss, _, _ = model.cluster(target)
    return sinkhorn(logits), sinkhorn(1e4 * logits), assignments, loss.detach()


def test_two_ranks_are_one(tmp_path):
    fork = multiprocessing.get_context("fork")
    other = fork.Process(target=share_of, args=(1, tmp_path), daemon=True)
    other.start()
    share_of(0, tmp_path)
    other.join()
    *parts, losses = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
    *whole, loss = assign(slice(0, 8))
    for mine, theirs in zip(map(torch.cat, parts), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sum(losses) / 2, loss)
    alone = torch.cat([assign(slice(0, 4))[0], assign(slice(4, 8))[0]])
    assert (alone - whole[0]).abs().max() > 1e-2


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
    (224, 14, 0.05, 90, 8), (56, 14, 0.05, 6, 1), (32, 4, 0.05, 23, 2), (8, 4, 0.05, 2, 1),
    (224, 14, 0.29, 90, 48), (56, 14, 0.29, 6, 2), (32, 4, 0.29, 23, 11)])
def test_counts_are_rounded_down(size, p, share, visible, predicted):
    model = small(img_size=size, patch_size=p, depth=1, decoder_depth=1, predict_share=share)
    assert (model.num_visible, model.num_predict) == (visible, predicted)


# -- rotary coordinates

def test_rotary_by_loops():
    """A channel of the first half turns with the row, one of the second with the column, each with
    its partner in the other half."""
    table, x, (row, column) = rotary_table(8), torch.randn(8), (0.3, 0.8)
    turned = rotate(x.view(1, 1, 1, 8), rotation(torch.tensor([[[row, column]]]), table)).flatten()
    for i in range(4):
        by_row, by_column = row * table[0, i].item(), column * table[1, 4 + i].item()
        a, b = x[i].item(), x[4 + i].item()
        first = a * math.cos(by_row) - b * math.sin(by_row)
        second = b * math.cos(by_column) + a * math.sin(by_column)
        assert turned[[i, 4 + i]].tolist() == pytest.approx([first, second], abs=1e-5)


def test_rotation_is_exact_under_autocast():
    places, table = patch_coordinates((16, 16), "cpu"), rotary_table(64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rotation(places, table)
    assert all(torch.equal(a, b) for a, b in zip(mixed, rotation(places, table)))


def test_coordinates_by_hand():
    places = [[0, 0], [0, 0.5], [0, 1], [1, 0], [1, 0.5], [1, 1]]
    assert patch_coordinates((2, 3), "cpu")[0].tolist() == places
    assert register_coordinates(4, "cpu").tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    eight = [[0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1], [0.5, 1], [0, 1], [0, 0.5]]
    assert register_coordinates(8, "cpu").tolist() == eight
    assert register_coordinates(0, "cpu").shape == (0, 2)
    with pytest.raises(BadInput, match="--registers"):
        small(registers=6)


def test_registers_stand_on_the_box_of_the_visible_patches():
    student = small(registers=8).student
    places = torch.tensor([[[0.2, 0.1], [0.4, 0.9], [0.8, 0.3]], [[0, 0], [1, 1], [0.5, 0.5]]])
    square = register_coordinates(8, "cpu")
    box = torch.tensor([0.2, 0.1]) + torch.tensor([0.6, 0.8]) * square
    box = torch.stack([box, square])
    expected = rotation(torch.cat([box, places], 1), student.rotary)
    torch.testing.assert_close(student(torch.randn(2, 3, 192), places)[1], expected)


# -- what may flow where

def test_no_gradient_crosses():
    """The CAPI loss trains the student alone, the clustering loss the clusters alone."""
    model = small()
    logs = model(torch.randn(4, 3, 32, 32))[1]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for part, prefix in (("capi_loss", "student"), ("clustering_loss", "cluster_head")):
        gradients = torch.autograd.grad(logs[part], [*trained.values()], allow_unused=True)
        assert [g is not None for g in gradients] == [name.startswith(prefix) for name in trained]


# -- memory: chunks, recomputing, drop path

def results(model, *inputs):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)  # for drop path
    loss, logs = model(*inputs)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss} | logs | gradients


def test_chunks_and_recomputing_change_nothing():
    model, images = small(drop_path=0.5), torch.randn(4, 3, 32, 32)
    masks = some_masks(model, 4)
    whole = results(model, images, *masks)
    for chunk in (1, 3 * 4 * 12):  # one position at a time; three, and one left over
        model.CHUNK = chunk
        torch.testing.assert_close(results(model, images, *masks), whole)
    model.student.recompute = True
    torch.testing.assert_close(results(model, images, *masks), whole)


def test_entropy_and_use_of_the_clusters_by_hand():
    model = small(clusters=60)
    model.CHUNK = 3 * 4 * 60
    assignments, _, entropy, used = model.cluster(torch.randn(4, 16, 32))
    by_hand = -(assignments * assignments.clamp(min=1e-30).log()).sum(-1).mean()
    torch.testing.assert_close(entropy, by_hand)
    assert used.item() == pytest.approx(len(assignments.argmax(-1).unique()) / 60)


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes, at any time, in tensors that were made here and are alive."""

    def __init__(self):
        super().__init__()
        self.peak, self.live = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: (ref, n) for key, (ref, n) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out


def test_chunks_keep_the_peak_of_live_logits_small():
    model, target = small(clusters=256), torch.randn(8, 64, 32)
    size, peaks = 4 * 8 * 64 * 256, []  # bytes of all logits
    for chunk in (CAPI.CHUNK, 8 * 256 * 2):  # all positions at once; two
        model.CHUNK = chunk
        with LiveBytes() as live:
            assignments, loss, _, _ = model.cluster(target)
            loss.backward()
        peaks.append(live.peak / size)
    assert peaks[0] > 4  # logits, assignments, and what both are made of
    assert peaks[1] < 2.5  # the assignments, and their parts


def test_chunks_train_the_clusters_under_autocast_too():
    """torch 2.6 uses again what it has cast without a gradient, where there should be one."""
    model, target = small(), torch.randn(4, 16, 32)
    weight = model.cluster_head.layer.weight
    expected = torch.autograd.grad(model.cluster(target)[1], weight)[0]  # float32, in one piece
    model.CHUNK = 4 * 12 * 8  # eight positions
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.cluster(target)[1]
    gradient = torch.autograd.grad(loss, weight)[0]
    assert expected.any()
    atol = 0.02 * expected.abs().max().item()
    torch.testing.assert_close(gradient, expected, rtol=0.05, atol=atol)


def test_drop_path_leaves_a_fixed_share_of_the_images_out():
    block, x, seen = RotaryBlock(8, 1, drop_path=0.25).train(), torch.randn(8, 3, 8), []

    def branch(t, some):
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


# -- schedule, sizes and weights

def test_cut_cosine():
    factors = [cut_cosine(step, 1100, 100) for step in range(1101)]
    assert factors[0] == 0 and factors[33] == pytest.approx(1 / 3) and factors[99:101] == [1, 1]
    assert factors[600] == pytest.approx(0.5 * (1 + math.cos(0.4 * math.pi)))
    assert factors[1100] == pytest.approx(0.0954915)  # it is cut off there
    assert cut_cosine(0, 10, 0) == 1


def test_sizes_of_build():
    model = capi.build(tiny("run", "capi", clusters=0, batch_size=48, predictor_depth=3))
    assert model.clusters == 48 and len(model.student.predictor) == 3
    with pytest.raises(BadInput, match="heads"):
        small(heads=16)


def test_norms_and_the_demos_initialisation():
    model = small(init="small")
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.RMSNorm)} == {1e-5}
    assert model.student.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
