"""MAE against the authors' numbers, and against closed forms."""

import pytest
import torch

import mae
from common import BadInput, gather, patchify, random_mask, restore, split_ids
from conftest import FIXTURES
from mae import MAE, paste, pixel_loss, standardise

DECODER = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2)
SIZES = dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, **DECODER)


@pytest.fixture(scope="module")
def fixture():
    if not (FIXTURES / "mae.pt").exists():
        pytest.skip("needs ../shared/fixtures/mae.pt, numbers from the authors' program")
    return torch.load(FIXTURES / "mae.pt", weights_only=True)


def released(fixture):
    return MAE.from_released(fixture["state_dict"], **fixture["config"])


def small(**changes):
    return MAE(**SIZES | changes)


def some_mask(images, masked, places=16):
    return random_mask(torch.rand(images, places, generator=torch.Generator().manual_seed(1)), masked)


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# -- the authors' numbers -------------------------------------------------------------------------------

def test_fixture_loss(fixture):
    loss, _ = released(fixture)(fixture["inputs"]["images"], fixture["inputs"]["mask"])
    torch.testing.assert_close(loss, fixture["outputs"]["loss"], rtol=1e-4, atol=0)


def test_fixture_tokens_and_prediction(fixture):
    model, images, mask = released(fixture), fixture["inputs"]["images"], fixture["inputs"]["mask"]
    visible, masked = split_ids(mask, int((~mask[0]).sum()))
    latent = model.encode_visible(patchify(images, model.patch_size), visible)
    close(latent[:, 0], fixture["outputs"]["visible_cls"])
    close(latent[:, 1:], fixture["outputs"]["visible_tokens"])
    pred = model.decode(latent, visible, masked)
    close(restore(pred, torch.cat([visible, masked], 1)), fixture["outputs"]["pred"])
    close(model.decode(latent, visible, masked, unread=latent.shape[1]), pred[:, visible.shape[1]:])  # as the loss reads it


def test_fixture_features(fixture):
    pooled, patches = released(fixture).encode(fixture["inputs"]["images"])
    close(pooled, fixture["outputs"]["features_cls"])
    close(patches, fixture["outputs"]["features_patches"])


def test_fixture_gradients(fixture):
    model = released(fixture)
    model(fixture["inputs"]["images"], fixture["inputs"]["mask"])[0].backward()
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == fixture["grad_norms"].keys()  # no gradient where theirs has none
    for name, norm in fixture["grad_norms"].items():
        torch.testing.assert_close(norms[name], norm, rtol=1e-4, atol=1e-6, msg=lambda text: name + text)


def test_fixture_names_are_the_authors(fixture):
    model, state = released(fixture), fixture["state_dict"]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


# -- from_released --------------------------------------------------------------------------------------

def test_from_released_reads_sizes_and_the_key_model(capsys):
    source = MAE(img_size=48, patch_size=8, dim=64, depth=3, heads=1, decoder_dim=32, decoder_depth=2,
                 decoder_heads=16)
    loaded = MAE.from_released({"model": source.state_dict()})
    images, mask = torch.randn(2, 3, 48, 48), some_mask(2, 27, 36)
    assert torch.equal(source(images, mask)[0], loaded(images, mask)[0])
    assert capsys.readouterr().out == ""


def test_from_released_encoder_only(capsys):
    source = small()
    encoder = {k: v for k, v in source.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    loaded = MAE.from_released({"model": encoder}, heads=2, **DECODER)
    assert "encoder" in capsys.readouterr().out
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.encode(images)[0], source.encode(images)[0])


@pytest.mark.parametrize("name, change", [
    ("extra.weight", lambda state: state | {"extra.weight": torch.zeros(3)}),
    ("blocks.1.mlp.fc1.bias", lambda state: {k: v for k, v in state.items() if k != "blocks.1.mlp.fc1.bias"}),
    ("decoder_pred.bias", lambda state: {k: v for k, v in state.items() if k != "decoder_pred.bias"}),
    ("mask_token", lambda state: {k: v for k, v in state.items() if k != "mask_token"}),
    ("cls_token", lambda state: {k: v for k, v in state.items() if k != "cls_token"}),
    ("blocks.0.attn.proj.weight", lambda state: state | {"blocks.0.attn.proj.weight": torch.zeros(32, 16)}),
])
def test_from_released_is_strict(name, change):
    state = small().state_dict()
    sizes = dict(heads=2, decoder_heads=2)
    MAE.from_released(state, **sizes)  # as it is, it loads
    with pytest.raises(BadInput, match=name):
        MAE.from_released(change(state), **sizes)


def test_from_released_refuses_other_sizes():
    with pytest.raises(BadInput, match="pos_embed"):
        MAE.from_released(small().state_dict(), heads=2, decoder_heads=2, img_size=64)
    with pytest.raises(BadInput):
        MAE.from_released({"fc.weight": torch.zeros(2, 2)})


# -- target, loss, picture ------------------------------------------------------------------------------

def test_standardise_by_hand():
    target, mean, std = standardise(torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]]))
    deviation = ((4 + 1 + 0 + 9) / 3 + 1e-6) ** 0.5  # unbiased: by 3, not 4
    torch.testing.assert_close(target[0], torch.tensor([-2, -1, 0, 3]) / deviation)
    torch.testing.assert_close(mean[:, 0], torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(std[:, 0], torch.tensor([deviation, 1e-3]))
    assert torch.equal(target[1], torch.zeros(4))  # a flat patch has no direction, and no infinity


def test_pixel_loss_by_hand():
    pred, target = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 2.0], [5.0, 1.0]]])
    assert pixel_loss(pred, target).item() == pytest.approx((1 + 0 + 4 + 9) / 4)
    assert pixel_loss(pred.bfloat16(), target).dtype == torch.float32


def test_loss_counts_masked_patches_only():
    model, images, mask = small(norm_pix=False), torch.randn(2, 3, 32, 32), some_mask(2, 12)
    loss, logs = model(images, mask)
    visible, masked = split_ids(mask, 4)
    patches = patchify(images, 8)
    pred = model.decode(model.encode_visible(patches, visible), visible, masked)
    pred = restore(pred, torch.cat([visible, masked], 1))
    torch.testing.assert_close(loss, (pred - patches)[mask].square().mean())
    torch.testing.assert_close(logs["loss_of_mean"], patches[mask].var(unbiased=False))
    assert not any(value.requires_grad for value in logs.values())


def test_model_is_blind_to_masked_pixels():
    model, images, mask = small(), torch.randn(2, 3, 32, 32), some_mask(2, 12)
    visible, masked = split_ids(mask, 4)
    look = lambda patches: model.decode(model.encode_visible(patches, visible), visible, masked)
    patches = patchify(images, 8)
    assert torch.equal(look(patches), look(patches.masked_fill(mask[..., None], 7)))
    assert not torch.equal(look(patches), look(patches + 1))


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 24)])
def test_exact_prediction_reconstructs_the_input(norm_pix, shape):
    images, grid = torch.randn(3, *shape), (shape[1] // 8, shape[2] // 8)
    mask = some_mask(3, grid[0] * grid[1] // 2, grid[0] * grid[1])
    patches = patchify(images, 8)
    exact = standardise(patches)[0] if norm_pix else patches
    hidden, predicted, pasted = paste(images, exact, mask, 8, grid, norm_pix)
    torch.testing.assert_close(predicted, images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pasted, images, rtol=1e-5, atol=1e-5)
    assert (patchify(hidden, 8)[mask] == 0).all() and torch.equal(patchify(hidden, 8)[~mask], patches[~mask])
    _, _, wrong = paste(images, exact + 1, mask, 8, grid, norm_pix)
    assert torch.equal(patchify(wrong, 8)[~mask], patches[~mask])  # what was visible stays as it is
    assert (patchify(wrong, 8)[mask] - patches[mask]).abs().min() > 0


def test_reconstruct_puts_predictions_in_their_places():
    model, images, mask = small(norm_pix=False), torch.randn(2, 3, 32, 32), some_mask(2, 12)
    visible, masked = split_ids(mask, 4)
    patches = patchify(images, 8)
    pred = model.decode(model.encode_visible(patches, visible), visible, masked)
    _, predicted, pasted = model.reconstruct(images, mask)
    torch.testing.assert_close(gather(patchify(predicted, 8), masked), pred[:, 4:].detach())
    torch.testing.assert_close(gather(patchify(pasted, 8), visible), gather(patches, visible))


# -- encode ---------------------------------------------------------------------------------------------

def test_encode_is_deterministic_and_takes_other_sizes():
    model, images = small(), torch.randn(2, 3, 32, 32)
    (pooled, patches), (again, _) = model.encode(images), model.eval().encode(images)
    assert torch.equal(pooled, again) and pooled.shape == (2, 32) and patches.shape == (2, 16, 32)
    pooled, patches = model.encode(torch.randn(2, 3, 48, 64))
    assert pooled.shape == (2, 32) and patches.shape == (2, 48, 32) and patches.isfinite().all()
    with pytest.raises(BadInput, match="48 64"):
        model.encode(torch.randn(2, 3, 45, 62))


def test_encode_is_the_training_encoder_with_nothing_masked():
    model, images = small(), torch.randn(2, 3, 32, 32)
    latent = model.encode_visible(patchify(images, 8), torch.arange(16).expand(2, -1))
    pooled, patches = model.encode(images)
    torch.testing.assert_close(latent[:, 0], pooled)
    torch.testing.assert_close(latent[:, 1:], patches)


def test_patches_are_row_major():
    model = small()
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 8:16, 24:32] = 1  # row 1, column 3 of a 4 x 4 grid
    embedded = model.patch_embed(patchify(images, 8))[0]
    others = [i for i in range(16) if i != 1 * 4 + 3]
    assert torch.equal(embedded[others], model.patch_embed.proj.bias.expand(15, -1))
    assert not torch.allclose(embedded[7], model.patch_embed.proj.bias)
    convolved = model.patch_embed.proj(images).flatten(2).mT[0]  # what its weights are stored as
    torch.testing.assert_close(embedded, convolved)


# -- masks ----------------------------------------------------------------------------------------------

def test_mask_handed_in_or_drawn():
    model, images = small(), torch.randn(4, 3, 32, 32)
    mask = some_mask(4, 12)
    assert torch.equal(model(images, mask)[0], model(images, mask, 4)[0])
    torch.manual_seed(3)
    drawn = model(images)[0]
    torch.manual_seed(3)
    assert torch.equal(drawn, model(images, random_mask(torch.rand(4, 16), 12))[0])
    assert not torch.equal(drawn, model(images)[0])  # the next mask is another
    assert model(images, some_mask(4, 5))[0].isfinite()  # a mask handed in may hide another number


@pytest.mark.parametrize("ratio, visible", [(0.75, 4), (0.6, 6), (0.9, 1), (0.05, 15)])
def test_number_of_visible_patches(ratio, visible):
    assert small(mask_ratio=ratio).num_visible == visible  # floor(N (1 - ratio))


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.95, -0.5, 1.5])
def test_mask_ratio_that_leaves_nothing(ratio):
    with pytest.raises(BadInput, match="--mask-ratio"):
        small(mask_ratio=ratio)


# -- gradients ------------------------------------------------------------------------------------------

def test_accumulated_gradients_are_the_whole_batch():
    model, images, mask = small(), torch.randn(64, 3, 32, 32), some_mask(64, 12)
    model(images, mask)[0].backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for part, hidden in zip(images.split(16), mask.split(16)):
        (model(part, hidden)[0] / 4).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=0, atol=1e-6, msg=lambda text: f"{name}: {text}")


def test_every_parameter_gets_a_gradient():  # DDP without find_unused_parameters relies on it
    model = small()
    model(torch.randn(8, 3, 32, 32))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_positions_are_fixed_and_init_is_the_papers():
    model = small(dim=96, decoder_dim=32)
    assert not {"pos_embed", "decoder_pos_embed"} & {name for name, _ in model.named_parameters()}
    assert not model.pos_embed[:, 0].any() and not model.decoder_pos_embed[:, 0].any()
    for weight in (model.patch_embed.proj.weight.flatten(1), model.blocks[0].attn.qkv.weight,
                   model.decoder_pred.weight):
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier uniform
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    biases = [name for name, p in model.named_parameters() if name.endswith("bias") and p.any()]
    assert biases == ["patch_embed.proj.bias"]  # stays as PyTorch draws it for a convolution
    bound = (3 * 64) ** -0.5
    assert 0.8 * bound < model.patch_embed.proj.bias.abs().max() <= bound
    assert 0.01 < model.cls_token.std() < 0.03 and 0.01 < model.mask_token.std() < 0.03


def test_build_uses_the_config():
    cfg = mae.Config(model="toy", patch_size=8, decoder_dim=24, decoder_depth=3, decoder_heads=2,
                     mask_ratio=0.5, in_chans=5, img_size=(32, 48), norm_pix=False)
    model = mae.build(cfg)
    assert (model.grid, model.num_visible, model.norm_pix) == ((4, 6), 12, False)
    assert len(model.decoder_blocks) == 3 and model.decoder_pred.weight.shape == (8 * 8 * 5, 24)
