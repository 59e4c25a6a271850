"""What the recorded run (test_trajectories.py) does not show of MAE."""

import pytest
import torch

from common import gather, patchify, random_mask
from conftest import built
from mae import normalise_patches


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 24)])
def test_an_exact_prediction_has_no_loss_and_gives_the_input(norm_pix, shape, monkeypatch):
    model = built("mae", norm_pix=norm_pix, img_size=shape[1:], in_chans=shape[0], mask_ratio=0.5)
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
    pred = model.reconstruct(images, is_masked)
    torch.testing.assert_close(pred, patches, rtol=1e-5, atol=1e-5)
    error = 1
    assert model(images, is_masked)[0].item() == pytest.approx(1)


@pytest.mark.parametrize("ratio, visible", [(0.75, 4), (0.6, 6), (0.9, 1), (0.05, 15)])
def test_number_of_visible_patches_is_rounded_down(ratio, visible):
    assert built("mae", mask_ratio=ratio).num_visible == visible
