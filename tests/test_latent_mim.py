"""What the recorded run (test_trajectories.py) does not show of Latent MIM, and closed forms."""

import pytest
import torch

from common import patchify, random_mask, split_ids
from conftest import built
from latent_mim import cell_crops


# -- patches with gaps

@pytest.mark.parametrize("chans, grid, p, gap", [
    (3, (4, 4), 8, 2), (1, (2, 5), 4, 1), (3, (3, 2), 4, 4), (12, (2, 2), 3, 5), (2, (2, 3), 4, 0)])
def test_cell_crops_by_loops(chans, grid, p, gap):
    cell, N = p + gap, grid[0] * grid[1]
    images = torch.randn(3, chans, grid[0] * cell, grid[1] * cell)
    offsets = torch.randint(0, max(1, gap), (3, N, 2))
    patches = cell_crops(images, grid, p, offsets)
    for b in range(3):
        for n in range(N):
            top = n // grid[1] * cell + offsets[b, n, 0]
            left = n % grid[1] * cell + offsets[b, n, 1]
            crop = images[b, :, top:top + p, left:left + p].permute(1, 2, 0)  # channels last
            assert torch.equal(patches[b, n], crop.flatten())


def test_offsets_are_uniform_and_independent():
    offsets = built("latent_mim", gap=4).draw_offsets(torch.rand(2000, 9, 2))
    assert offsets.unique().tolist() == [0, 1, 2, 3]  # the last row of a cell is never seen
    assert (offsets.flatten().bincount() / 36000 - 0.25).abs().max() < 0.02
    assert abs(torch.corrcoef(offsets.flatten(0, 1).T.float())[0, 1]) < 0.03
    assert not built("latent_mim", gap=0).draw_offsets(torch.rand(5, 2, 2)).any()


# -- the loss that was not recorded

def test_l2_by_hand():
    """The paper's naive objective, with targets that are standardised per token."""
    model = built("latent_mim", loss="l2", sim_coeff=0.0, visible_share=0.25)
    for p in model.teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)  # no longer a copy
    images, is_masked = torch.randn(3, 3, 32, 32), random_mask(torch.rand(3, 16), 12)
    ids_visible, ids_masked = split_ids(is_masked, 4)
    latent = model.encoder(patchify(images, 8), ids_visible)
    target = model.teacher(patchify(images, 8), ids_masked)[:, 1:]
    pred = model.decoder(latent, ids_visible, ids_masked)
    centred = target - target.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (pred - centred / deviation).square().mean()
    torch.testing.assert_close(model(images, is_masked)[0], expected)


# -- sizes

@pytest.mark.parametrize("size, patch, share, visible", [
    (224, 16, 20 / 196, 20), (32, 4, 20 / 196, 7), (8, 4, 20 / 196, 2), (16, 4, 0.01, 2),
    (16, 4, 0.5, 8)])
def test_visible_share_and_gap(size, patch, share, visible):
    model = built("latent_mim", img_size=(size,), patch_size=patch, visible_share=share)
    assert model.num_visible == visible  # rounded to the nearest, at least 2
    assert model.gap == patch // 4
