"""What the recorded run (test_trajectories.py) does not show of PiLaMIM, and that prediction and
target of one patch meet."""

import pytest
import torch
import torch.nn as nn

from common import patchify, random_mask, unpatchify
from conftest import built


def some_mask(images, masked=12, N=16):
    return random_mask(torch.rand(images, N), masked)


# -- the three losses

@pytest.mark.parametrize("weights", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (3, 0.5, 2)])
def test_weights_of_the_losses(weights):
    flags = dict(zip(("pixel_weight", "latent_weight", "cls_weight"), weights))
    model = built("pilamim", **flags)
    loss, logs = model(torch.randn(3, 3, 32, 32), some_mask(3))
    parts = [logs["pixel_loss"], logs["latent_loss"], logs["cls_loss"]]
    assert all(parts)  # a dropped loss is still logged
    torch.testing.assert_close(loss, sum(w * part for w, part in zip(weights, parts)))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # for DDP
    assert any(p.grad.any() for p in model.decoder.parameters()) == (weights[0] > 0)


# -- prediction and target of the same patch meet

class Marks(nn.Module):
    """A teacher that says of each patch its first pixel, which the test makes its place."""
    pos_embed = torch.zeros(1, 16, 32)

    def forward(self, patches, pos):
        marks = patches[..., :1].expand(-1, -1, 32)
        return torch.cat([torch.full_like(marks[:, :1], -1), marks], 1)


class Places(nn.Module):
    """A decoder whose outputs are the places that they stand for; CLS is -1."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, latent, ids_visible, ids_masked, first_query=0):
        cls = torch.full((len(latent), 1), -1)
        places = torch.cat([ids_visible, cls, ids_masked], 1)[:, first_query:]
        return places[..., None].float().expand(-1, -1, self.width)


def test_prediction_and_target_of_the_same_patch_meet():
    """Every pixel of patch n is n, so a loss is 0 if and only if all its pairs are of one patch."""
    model, is_masked = built("pilamim"), some_mask(4)
    images = unpatchify(torch.arange(16.0)[None, :, None].expand(4, -1, 192), 8, (4, 4))
    model.teacher, model.latent_decoder, model.decoder = Marks(), Places(32), Places(192)
    logs = model(images, is_masked)[1]
    assert logs["latent_loss"] == logs["pixel_loss"] == logs["cls_loss"] == 0


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 24)])
def test_reconstruct_puts_predictions_in_their_places(shape):
    model = built("pilamim", img_size=shape[1:], in_chans=shape[0], mask_ratio=0.5)
    images, N = torch.randn(3, *shape), model.num_patches
    is_masked = some_mask(3, N // 2, N)
    patches, places = patchify(images, 8), torch.arange(float(N))[:, None]
    model.decoder = Places(64 * shape[0])
    assert torch.equal(model.reconstruct(images, is_masked), places.expand_as(patches))
