"""What the recorded run (test_trajectories.py) does not show of Latent MIM, and closed forms."""

import math

import pytest
import torch

import latent_mim
from common import BadInput, patchify, random_mask, split_ids
from conftest import tiny
from latent_mim import LatentMIM, cell_crops, patch_discrimination, similarity


def small(**changes):
    sizes = dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_dim=16,
                 decoder_depth=2, decoder_heads=2, num_visible=4, proj_dim=24, gap=2)
    model = LatentMIM(**sizes | changes)
    for p in model.teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)  # no longer a copy
    return model


def some_mask(images):
    return random_mask(torch.rand(images, 16), 12)


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
    offsets = small(gap=4).draw_offsets(torch.rand(2000, 9, 2))
    assert offsets.unique().tolist() == [0, 1, 2, 3]  # the last row of a cell is never seen
    assert (offsets.flatten().bincount() / 36000 - 0.25).abs().max() < 0.02
    assert abs(torch.corrcoef(offsets.flatten(0, 1).T.float())[0, 1]) < 0.03
    assert not small(gap=0).draw_offsets(torch.rand(5, 2, 2)).any()


# -- losses

def unit(vector):
    return [x / math.hypot(*vector) for x in vector]


@pytest.mark.parametrize("size", [1, 1e-4])  # at the second the 1e-4 counts
def test_patch_discrimination_by_hand(size):
    preds, targets, tau, total = size * torch.randn(2, 3, 2), torch.randn(2, 3, 2), 0.2, 0.0
    for pred, target in zip(preds.tolist(), targets.tolist()):
        standard = [[0.0, 0.0] for _ in range(3)]
        for c in range(2):  # per channel, over the image's masked patches
            values = [row[c] for row in pred]
            mean = sum(values) / 3
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)  # unbiased
            for i in range(3):
                standard[i][c] = (values[i] - mean) / (deviation + 1e-4)
        for i in range(3):
            logits = [sum(a * b for a, b in zip(unit(standard[i]), unit(target[j]))) / tau
                      for j in range(3)]
            total += math.log(sum(math.exp(x) for x in logits)) - logits[i]
    expected = pytest.approx(2 * tau * total / 6, rel=1e-5)
    assert patch_discrimination(preds, targets, tau).item() == expected


def test_similarity_by_hand():
    tokens, total = torch.randn(2, 4, 3), 0.0
    for image in tokens.tolist():
        for a in image:  # all pairs, each token with itself too
            for b in image:
                total += sum(x * y for x, y in zip(unit(a), unit(b)))
    assert similarity(tokens).item() == pytest.approx(total / 32, rel=1e-4)
    assert similarity(torch.ones(2, 5, 3)).item() == pytest.approx(1)  # collapse


def test_l2_by_hand():
    """The paper's naive objective, with targets that are standardised per token."""
    model, is_masked = small(loss="l2", sim_coeff=0.0), some_mask(3)
    images = torch.randn(3, 3, 32, 32)
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
    cfg = tiny("run", "latent_mim", img_size=(size,), patch_size=patch, visible_share=share)
    model = latent_mim.build(cfg)
    assert model.num_visible == visible  # rounded to the nearest, at least 2
    assert model.gap == patch // 4


@pytest.mark.parametrize("visible", [-1, 0, 1, 15, 16, 17])
def test_too_few_visible_or_masked_patches_are_refused(visible):
    with pytest.raises(BadInput, match="--visible-share"):
        small(num_visible=visible)


def test_norms_have_the_papers_eps():
    norms = {name: m for name, m in small().named_modules() if isinstance(m, torch.nn.LayerNorm)}
    for name, m in norms.items():
        assert m.eps == (1e-5 if ".head." in name else 1e-6), name  # the projector's are larger
