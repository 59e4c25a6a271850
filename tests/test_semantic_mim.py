"""What the recorded runs (test_trajectories.py) do not show of SemanticMIM."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as TF

from common import BadInput, patchify, random_mask, split_ids
from conftest import built, load_fixture
from semantic_mim import Config, Tokenizer, colour_jitter, hog_cell, hog_target, with_recipe

DVAE = dict(target="dvae", vocab=16)
small = partial(built, "semantic_mim", num_proxy=3, mask_ratio=0.75)


def some_mask(images):
    return random_mask(torch.rand(images, 16), 12)


# -- HOG

@pytest.mark.parametrize("p, cell", [(16, 8), (4, 4), (14, 7), (12, 6), (24, 8), (5, 5)])
def test_every_cell_has_a_histogram_of_length_1(p, cell):
    assert hog_cell(p) == cell
    target = hog_target(torch.randn(1, 2, 2 * p, 3 * p), p)  # [1, 6, channels * bins * cells]
    lengths = target.view(6, 2, 9, (p // cell) ** 2).norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_hog_is_exact_under_autocast():
    model, images, is_masked = small(), torch.randn(2, 3, 32, 32), some_mask(2)
    plain = model(images, is_masked)[1]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images, is_masked)[1]
    assert torch.equal(plain["target_std"], mixed["target_std"])
    assert not torch.equal(plain["pred_std"], mixed["pred_std"])  # autocast was on


# -- dVAE

def dvae():
    """A small encoder with random weights and 16 tokens."""
    return load_fixture("dvae_encoder")["state_dict"]


@pytest.mark.parametrize("p", [16, 8, 4])  # half the size, as it is, twice the size
def test_the_tokenizer_has_one_token_per_patch(p):
    tokenizer, images, grid = Tokenizer(dvae()), torch.rand(2, 3, 64, 96), (64 // p, 96 // p)
    size = 8 * grid[0], 8 * grid[1]
    resized = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    ids = tokenizer(images, grid)
    assert torch.equal(ids, tokenizer.logits(0.1 + 0.8 * resized).argmax(1).flatten(1))
    assert ids.shape == (2, grid[0] * grid[1]) and tokenizer.vocab == 16


def test_tokenizer_files(tmp_path):
    state, path = dvae(), tmp_path / "dalle_encoder.pth"
    for content in (state, {"state_dict": state}):
        torch.save(content, path)
        assert Tokenizer.from_file(path, "cpu").vocab == 16
    for name in ("blocks.input.w", "blocks.group_3.block_2.res_path.conv_4.b"):
        with pytest.raises(BadInput, match=name):
            Tokenizer({k: t for k, t in state.items() if k != name})


# -- what may flow where

def seen_by_a_mask_token(model, is_masked, detach):
    """[B, N]: the patches whose pixels ONE mask token's latent has a gradient for. detach: cut the
    way through the proxies, which are the first three tokens of the compression stack."""
    images = torch.randn(2, 3, 32, 32, requires_grad=True)

    def cut(block, args, out):
        return torch.cat([out[:, :3].detach(), out[:, 3:]], 1)
    for block in model.blocks if detach else []:
        block.register_forward_hook(cut)
    latent = model.mask_latents(patchify(images, 8), *split_ids(is_masked, 4))[:, 5]
    loss = (latent * torch.randn_like(latent)).sum() + 0 * images.sum()
    return patchify(torch.autograd.grad(loss, images)[0], 8).abs().amax(-1) > 0


@pytest.mark.parametrize("target", [{}, DVAE])
def test_mask_tokens_know_the_image_through_the_proxies_alone(target):
    model, is_masked = small(**target), some_mask(2)
    assert torch.equal(seen_by_a_mask_token(model, is_masked, detach=False), ~is_masked)
    assert not seen_by_a_mask_token(model, is_masked, detach=True).any()
    baseline = small(baseline=True, **target)
    assert torch.equal(seen_by_a_mask_token(baseline, is_masked, detach=True), ~is_masked)


@pytest.mark.parametrize("baseline", [False, True])
def test_visible_patches_see_mask_tokens_in_the_baseline_alone(baseline):
    model, images, is_masked = small(baseline=baseline), torch.randn(2, 3, 32, 32), some_mask(2)
    outputs = []
    model.blocks[-1].register_forward_hook(lambda _, args, out: outputs.append(out[:, :3 + 4]))
    model.mask_latents(patchify(images, 8), *split_ids(is_masked, 4))
    loss = (outputs[0] * torch.randn_like(outputs[0])).sum() + 0 * model.mask_token.sum()
    assert torch.autograd.grad(loss, model.mask_token)[0].any() == baseline


# -- recipes

def test_recipes():
    def values(**flags):
        cfg = with_recipe(Config(**flags))
        return [cfg.mask_ratio, cfg.num_proxy, cfg.crop_scale, cfg.jitter, cfg.clip_grad,
                cfg.first_lr, cfg.last_lr, cfg.drop_path]
    hog, dvae = values(), values(target="dvae")
    assert hog == [0.8, 8, (0.5, 1.0), 0.0, 0.02, 1e-6, 1e-6, 0.0]
    assert dvae == [0.6, 1, (0.08, 1.0), 0.4, 3.0, 1e-4, 1e-5, 0.1]
    assert values(baseline=True) == [0.4, 1, *hog[2:]]
    assert values(target="dvae", baseline=True) == [0.4, 1, *dvae[2:]]
    own = dict(mask_ratio=0.5, num_proxy=2, crop_scale=(0.3, 0.9), jitter=0.0, clip_grad=0.0,
               first_lr=0.0, last_lr=0.0, drop_path=0.0)
    assert values(target="dvae", baseline=True, **own) == [*own.values()]  # zeros are values too


def test_colour_jitter_is_torchvisions():
    images, noise = torch.rand(5, 3, 6, 7), torch.rand(5, 3)
    adjustments = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation
    for image, row, changed in zip(images, 0.6 + 0.8 * noise, colour_jitter(images, noise, 0.4)):
        for factor, adjust in zip(row.tolist(), adjustments):
            image = adjust(image, factor)
        torch.testing.assert_close(changed, image)


# -- blocks, attention, sizes

def test_drop_path_keeps_the_mean():
    drop = small(drop_path=0.25, **DVAE).train().blocks[1].drop_path1
    out = drop(torch.ones(20000, 2, 3))
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(out[:, 0, 0].unique(), torch.tensor([0, 4 / 3]))
    assert (out == out[:, :1, :1]).all()  # an image's whole branch, or nothing of it
    assert torch.equal(drop.eval()(out), out)


def test_attention_is_the_last_layers():
    model, images = small(**DVAE), torch.randn(2, 3, 32, 32)
    block, x = model.blocks[-1], model.run_blocks(images, model.blocks[:1])
    values = torch.eye(19)[None, None].expand(2, 2, -1, -1)  # attention to these is the attention
    q, k, _ = block.attn.project(block.norm1(x))
    maps = F.scaled_dot_product_attention(q, k, values).mean(1)
    torch.testing.assert_close(model.attention(images), maps)


@pytest.mark.parametrize("size, p, ratio, visible", [
    (224, 16, 0.8, 39), (224, 16, 0.6, 78), (224, 16, 0.4, 117), (8, 4, 0.8, 1), (8, 4, 0.2, 3),
    (32, 4, 0.8, 12), (32, 8, 0.75, 4)])
def test_number_of_masked_patches_is_rounded_up(size, p, ratio, visible):
    """But one patch of 2 x 2 stays visible."""
    assert small(img_size=(size,), patch_size=p, mask_ratio=ratio).num_visible == visible
