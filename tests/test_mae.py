"""What the recorded run (test_trajectories.py) does not show of MAE."""

import pytest
import torch

from common import gather, patchify, random_mask
from mae import MAE, normalise_patches


def small(**changes):
    sizes = dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_dim=16,
                 decoder_depth=2, decoder_heads=2)
    return MAE(**sizes | changes)


def test_normalise_patches_by_hand():
    patches = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    target, mean, std = normalise_patches(patches)
    deviation = ((4 + 1 + 0 + 9) / 3 + 1e-6) ** 0.5  # unbiased: by 3, not 4
    torch.testing.assert_close(target[0], torch.tensor([-2, -1, 0, 3]) / deviation)
    torch.testing.assert_close(mean[:, 0], torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(std[:, 0], torch.tensor([deviation, 1e-3]))
    assert torch.equal(target[1], torch.zeros(4))  # a flat patch is zero, not infinite


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 24)])
def test_an_exact_prediction_has_no_loss_and_gives_the_input(norm_pix, shape, monkeypatch):
    model = small(norm_pix=norm_pix, img_size=shape[1:], in_chans=shape[0], mask_ratio=0.5)
    images, N = torch.randn(3, *shape), model.num_patches
    patches, is_masked = patchify(images, 8), random_mask(torch.rand(3, N), N // 2)
    exact = normalise_patches(patches)[0] if norm_pix else patches

    def decode(latent, ids_visible, ids_masked, first_query=0):
        ids = torch.cat([ids_visible, ids_masked], 1)
        cls = torch.zeros(3, 1, patches.shape[2])
        return torch.cat([cls, gather(exact, ids) + error], 1)[:, first_query:]
    monkeypatch.setattr(model, "decode", decode)
    error = 0
    assert model(images, is_masked)[0] < 1e-9
    masked, pred, pasted = model.reconstruct(images, is_masked)
    torch.testing.assert_close(pred, images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pasted, images, rtol=1e-5, atol=1e-5)
    hidden = is_masked[..., None]
    assert torch.equal(patchify(masked, 8), patches.masked_fill(hidden, 0))
    error = 1
    assert model(images, is_masked)[0].item() == pytest.approx(1)
    difference = patchify(model.reconstruct(images, is_masked)[2], 8) - patches
    assert torch.equal(difference.abs().amin(2) > 0, is_masked)  # what was visible stays as it is


@pytest.mark.parametrize("ratio, visible", [(0.75, 4), (0.6, 6), (0.9, 1), (0.05, 15)])
def test_number_of_visible_patches_is_rounded_down(ratio, visible):
    assert small(mask_ratio=ratio).num_visible == visible
