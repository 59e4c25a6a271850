"""SemanticMIM against the authors' numbers, slow references, and what may flow where."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as TF

import semantic_mim
from common import BadInput, LayerNorm, param_groups, patchify, random_mask, split_ids
from conftest import FIXTURES, ROOT
from semantic_mim import (EXEMPT, Config, ReconstructionBlock, SemanticMIM, Tokenizer, colour_jitter, hog_cell,
                          hog_target, rename, with_recipe)

SIZES = dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, num_proxy=3, mask_ratio=0.75)
DVAE = dict(target="dvae", vocab=16)


def load(name):
    if not (FIXTURES / f"{name}.pt").exists():
        pytest.skip(f"needs ../shared/fixtures/{name}.pt, numbers from the authors' program")
    return torch.load(FIXTURES / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module", params=["hog", "hog16", "dvae"])
def fixture(request):
    return load("semantic_mim_" + request.param)


def released(fixture):
    return SemanticMIM.from_released(fixture["state_dict"], **fixture["config"])


def small(**changes):
    return SemanticMIM(**SIZES | changes)


def some_mask(images, masked=12, places=16):
    return random_mask(torch.rand(images, places, generator=torch.Generator().manual_seed(1)), masked)


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# -- the authors' numbers -------------------------------------------------------------------------------

def test_fixture_loss_target_and_latents(fixture):
    model, inputs, outputs = released(fixture), fixture["inputs"], fixture["outputs"]
    loss, _ = model(inputs["images"], inputs["mask"], tokens=inputs.get("tokens"))
    torch.testing.assert_close(loss, outputs["loss"], rtol=1e-4, atol=0)
    visible, masked = split_ids(inputs["mask"], int((~inputs["mask"][0]).sum()))
    close(model.mask_latents(patchify(inputs["images"], model.patch_size), visible, masked), outputs["mask_latents"])
    if "hog" in outputs:
        close(hog_target(inputs["images"], model.patch_size), outputs["hog"])


def test_fixture_features(fixture):
    model, images = released(fixture), fixture["inputs"]["images"]
    close(model.encode(images)[1], fixture["outputs"]["features_patches"])
    close(model.norm(model.compress(images, model.blocks))[:, :model.num_proxy], fixture["outputs"]["features_proxy"])


def test_fixture_gradients(fixture):
    model, inputs, theirs = released(fixture), fixture["inputs"], {}
    model(inputs["images"], inputs["mask"], tokens=inputs.get("tokens"))[0].backward()
    for name, norm in fixture["grad_norms"].items():  # q and kv are matrices of their own there: squares add up
        name = rename(name.removeprefix("backbone.").replace("q_proj", "qkv").replace("kv_proj", "qkv")
                      .replace("attn.q.", "attn.qkv.").replace("attn.kv.", "attn.qkv."))
        theirs[name] = math.hypot(theirs.get(name, 0), norm)
    assert theirs.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, norm in theirs.items():
        assert model.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), name


# -- from_released --------------------------------------------------------------------------------------

def test_from_released_reads_sizes(fixture):
    state, config = fixture["state_dict"], fixture["config"]
    wrapped = {"state_dict": {"module." + name: t for name, t in state.items()}, "meta": {}}
    model, inputs = SemanticMIM.from_released(wrapped, heads=config["heads"]), fixture["inputs"]
    assert (model.target, model.num_proxy, model.baseline) == (config["target"], config["num_proxy"], False)
    loss = model(inputs["images"], inputs["mask"], tokens=inputs.get("tokens"))[0]
    torch.testing.assert_close(loss, fixture["outputs"]["loss"], rtol=1e-4, atol=0)
    one_stack = {name: t for name, t in state.items() if "extra_layers" not in name}
    one = SemanticMIM.from_released(one_stack, heads=config["heads"])
    assert one.baseline and torch.equal(one.encode(inputs["images"])[0], model.encode(inputs["images"])[0])


@pytest.mark.parametrize("name", [
    "backbone.cls_token", "backbone.pos_embed", "head.weight", "backbone.layers.0.ln2.bias", "QUERY",
    "backbone.extra_layers.0.ffn.layers.1.weight", "backbone.patch_embed.projection.bias"])
def test_from_released_is_strict(fixture, name):
    state = fixture["state_dict"]
    name = name if name != "QUERY" else next(n for n in state if ".extra_layers.0.attn.q" in n and n.endswith("weight"))
    longer = torch.zeros([n + 1 for n in state[name].shape])
    for wrong in ({k: t for k, t in state.items() if k != name}, state | {name: longer}, state | {name + "x": longer}):
        with pytest.raises(BadInput, match="released SemanticMIM"):
            SemanticMIM.from_released(wrong, **fixture["config"])
    with pytest.raises(BadInput, match="not a released SemanticMIM"):
        SemanticMIM.from_released({"model": {"cls_token": torch.zeros(1, 1, 8)}})


# -- HOG ------------------------------------------------------------------------------------------------

def slow_hog(image, p, cell):
    """One image [C, H, W] by loops over pixels -> [N, C * 9 * cells]."""
    chans, height, width = image.shape
    reflect = lambda i, n: -i if i < 0 else 2 * n - 2 - i if i >= n else i
    at = lambda c, y, x: image[c, reflect(y, height), reflect(x, width)].item()
    window = [math.exp(-(i - cell + 0.5) ** 2 / (2 * cell**2)) for i in range(2 * cell)]  # cell 8: (i - 7.5)^2 / 128
    total = sum(a * b for a in window for b in window)
    histogram = torch.zeros(height // cell, width // cell, chans, 9, dtype=torch.float64)
    for c in range(chans):
        for y in range(height):
            for x in range(width):
                gx = sum(w * (at(c, y + d, x - 1) - at(c, y + d, x + 1)) for d, w in ((-1, 1), (0, 2), (1, 1)))
                gy = sum(w * (at(c, y - 1, x + d) - at(c, y + 1, x + d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
                strength = math.hypot(gx, gy) * window[y % (2 * cell)] * window[x % (2 * cell)] / total
                histogram[y // cell, x // cell, c, math.floor(math.atan2(gx, gy) / math.pi * 9) % 9] += strength
    per, patches = p // cell, []
    for row in range(height // p):
        for column in range(width // p):
            unit = lambda cell: cell / cell.norm()
            patches.append([unit(histogram[row * per + i, column * per + j, c])[b]
                            for c in range(chans) for b in range(9) for i in range(per) for j in range(per)])
    return torch.tensor(patches, dtype=torch.float32)


@pytest.mark.parametrize("p, cell, shape", [
    (8, 8, (3, 16, 24)), (16, 8, (1, 32, 16)), (4, 4, (3, 12, 8)), (14, 7, (2, 14, 28)), (12, 6, (1, 24, 12)),
    (24, 8, (1, 24, 24)), (5, 5, (1, 10, 5))])
def test_hog_by_loops(p, cell, shape):
    assert hog_cell(p) == cell
    image = torch.randn(shape)
    torch.testing.assert_close(hog_target(image[None], p)[0], slow_hog(image, p, cell), rtol=1e-4, atol=1e-5)


def test_hog_of_what_is_known():
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)  # to the right: angle -pi / 2, bin floor(-4.5) mod 9
    inner = hog_target(ramp, 8).unflatten(-1, (9, 1))[0, :, :, 0]
    assert torch.equal(inner.argmax(1), torch.full((4,), 4)) and torch.allclose(inner.norm(dim=1), torch.ones(4))
    assert not hog_target(torch.ones(2, 3, 16, 16), 8).any()  # flat: nothing, and no division by zero
    assert not hog_target(torch.randn(2, 3, 16, 16, requires_grad=True), 8).requires_grad


def test_hog_is_exact_under_autocast():
    model, images, mask = small(), torch.randn(2, 3, 32, 32), some_mask(2)
    _, plain = model(images, mask)
    with torch.autocast("cpu", torch.bfloat16):
        _, mixed = model(images, mask)
    assert all(torch.equal(plain[name], mixed[name]) for name in ("loss_of_mean", "target_std"))
    assert not torch.equal(plain["pred_std"], mixed["pred_std"])  # autocast was on


# -- dVAE -----------------------------------------------------------------------------------------------

def test_fixture_tokenizer():
    fixture = torch.load(ROOT / "tests/fixtures/dvae_encoder.pt", weights_only=True)
    tokenizer, images = Tokenizer(fixture["state_dict"]), fixture["inputs"]["images"]
    close(tokenizer.logits(images), fixture["outputs"]["logits"])
    assert torch.equal(tokenizer.logits(images).argmax(1), fixture["outputs"]["tokens"])
    mapped = tokenizer((images - 0.1) / 0.8, (4, 4))  # it maps 0..1 to 0.1..0.9 itself
    assert torch.equal(mapped, fixture["outputs"]["tokens"].flatten(1)) and tokenizer.vocab == 16


def random_dvae(width=8, vocab=16):
    """METHODS.md's encoder by its names, small, with random weights."""
    state, before = {}, width

    def conv(name, chans, out, size):
        state[f"blocks.{name}.w"] = torch.randn(out, chans, size, size) / (chans * size**2) ** 0.5
        state[f"blocks.{name}.b"] = torch.randn(out)
    conv("input", 3, width, 7)
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name, out = f"group_{group}.block_{block}", width * 2 ** (group - 1)
            if out != before:
                conv(f"{name}.id_path", before, out, 1)
            for i in (1, 2, 3, 4):
                chans = (before if i == 1 else out // 4, out if i == 4 else out // 4)
                conv(f"{name}.res_path.conv_{i}", *chans, 1 if i == 4 else 3)
            before = out
    conv("output.conv", before, vocab, 1)
    return state


def test_tokenizer_has_one_token_per_patch():
    tokenizer, images = Tokenizer(random_dvae()), torch.rand(2, 3, 64, 96)
    for p in (16, 8, 4):  # half size, as it is, twice the size
        grid = (64 // p, 96 // p)
        resized = F.interpolate(images, scale_factor=8 / p, mode="bicubic", antialias=True).clamp(0, 1)
        ids, logits = tokenizer(images, grid), tokenizer.logits(0.1 + 0.8 * (images if p == 8 else resized))
        assert torch.equal(ids, logits.argmax(1).flatten(1)) and ids.shape == (2, grid[0] * grid[1])
    assert not tokenizer(images.requires_grad_(), (8, 12)).requires_grad
    assert not isinstance(tokenizer, torch.nn.Module)  # so it is in no optimiser and no checkpoint


def test_tokenizer_file(tmp_path):
    state, path = random_dvae(), tmp_path / "dalle_encoder.pth"
    for content in (state, {"state_dict": state}):
        torch.save(content, path)
        assert Tokenizer.from_file(path, "cpu").vocab == 16
    with pytest.raises(BadInput, match="dalle_encoder.pth"):
        Tokenizer.from_file("", "cpu")
    for name in ("blocks.input.w", "blocks.group_3.block_2.res_path.conv_4.b", "blocks.group_2.block_1.id_path.w"):
        with pytest.raises(BadInput, match=name):
            Tokenizer({k: t for k, t in state.items() if k != name})
        with pytest.raises(BadInput, match=name + "x"):
            Tokenizer(state | {name + "x": state[name]})


def test_dvae_without_tokens_is_named():
    with pytest.raises(BadInput, match="tokens"):
        SemanticMIM(img_size=32, patch_size=8, dim=32, depth=2, heads=2, **DVAE)(torch.randn(2, 3, 32, 32))


def test_dvae_loss_by_loops():
    model, images, mask, tokens = small(**DVAE), torch.randn(2, 3, 32, 32), some_mask(2), torch.randint(0, 16, (2, 16))
    visible, masked = split_ids(mask, 4)
    logits = model.head(model.mask_latents(patchify(images, 8), visible, masked)).tolist()
    pairs = [(logits[b][m], tokens[b, masked[b, m]]) for b in range(2) for m in range(12)]
    loss = sum(math.log(sum(math.exp(x) for x in row)) - row[token] for row, token in pairs) / 24
    mine, logs = model(images, mask, tokens=tokens)
    assert mine.item() == pytest.approx(loss, rel=1e-5)
    assert logs["accuracy"].item() == pytest.approx(sum(max(row) == row[token] for row, token in pairs) / 24)
    changed = torch.where(mask, tokens, (tokens + 1) % 16)  # tokens of visible places are in no loss
    assert torch.equal(model(images, mask, tokens=changed)[0], mine)


def test_hog_loss_counts_masked_places_only():
    model, images, mask = small(), torch.randn(2, 3, 32, 32), some_mask(2)
    pred = model.head(model.mask_latents(patchify(images, 8), *split_ids(mask, 4)))
    target = hog_target(images, 8)
    loss, logs = model(images, mask)
    torch.testing.assert_close(loss, (pred.flatten(0, 1) - target[mask]).square().mean())
    torch.testing.assert_close(logs["loss_of_mean"], target[mask].var(unbiased=False))
    assert all(v.ndim == 0 and not v.requires_grad for v in logs.values())


# -- what may flow where --------------------------------------------------------------------------------

def pixel_gradient(model, mask, detach):
    """The gradient of ONE mask token's latent with respect to all patches' pixels, and [B, N] where it is not zero."""
    images, (visible, masked) = torch.randn(2, 3, 32, 32, requires_grad=True), split_ids(mask, 4)
    hooks = [block.register_forward_pre_hook(lambda _, args: (args[0], args[1].detach()))
             for block in model.extra_blocks if detach]
    out = model.mask_latents(patchify(images, 8), visible, masked)[:, 5]
    (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), images, allow_unused=True)
    for hook in hooks:
        hook.remove()
    return torch.zeros(2, 16, dtype=torch.bool) if gradient is None else patchify(gradient, 8).abs().amax(-1) > 0


@pytest.mark.parametrize("target", [{}, DVAE])
def test_mask_tokens_know_of_the_image_through_the_proxies_alone(target):
    model, mask = small(**target), some_mask(2)
    assert not pixel_gradient(model, mask, detach=True).any()
    assert torch.equal(pixel_gradient(model, mask, detach=False), ~mask)  # every visible patch, no masked one
    baseline = small(baseline=True, **target)
    assert torch.equal(pixel_gradient(baseline, mask, detach=True), ~mask)  # has no proxies to go through


@pytest.mark.parametrize("baseline", [False, True])
def test_visible_patches_never_see_mask_tokens(baseline):
    model, images, mask = small(baseline=baseline), torch.randn(2, 3, 32, 32), some_mask(2)
    outputs = []
    model.blocks[-1].register_forward_hook(lambda _, __, out: outputs.append(out[:, :3 + 4]))  # proxies and visible
    visible, masked = split_ids(mask, 4)
    model.mask_latents(patchify(images, 8), visible, masked)
    seen = torch.autograd.grad((outputs[0] * torch.randn_like(outputs[0])).sum(), [model.mask_token, model.pos_embed],
                               allow_unused=True)
    assert (seen[0] is not None and bool(seen[0].any())) == baseline
    nowhere_visible = mask.all(0).nonzero()[:, 0]
    assert len(nowhere_visible) and seen[1][0, 3 + nowhere_visible].any() == baseline
    hidden = torch.where(mask[..., None], torch.randn(2, 16, 192), patchify(images, 8))
    with torch.no_grad():  # masked pixels: nobody sees them
        assert torch.equal(*(model.mask_latents(patches, visible, masked) for patches in (patchify(images, 8), hidden)))


def test_layer_by_layer():
    """Reconstruction block i gets what block i has just made of the proxies, and the masks of the block before."""
    model, images, mask = small(depth=3), torch.randn(2, 3, 32, 32), some_mask(2)
    made, got, masks = [], [], []
    for block, extra in zip(model.blocks, model.extra_blocks):
        block.register_forward_hook(lambda _, __, out: made.append(out))
        extra.register_forward_pre_hook(lambda _, args: got.append(args))
        extra.register_forward_hook(lambda _, __, out: masks.append(out))
    visible, masked = split_ids(mask, 4)
    latents = model.mask_latents(patchify(images, 8), visible, masked)
    assert [len(x) for x in (made, got, masks)] == [3, 3, 3] and all(x.shape == (2, 3 + 4, 32) for x in made)
    assert all(torch.equal(proxies, x[:, :3]) for (_, proxies), x in zip(got, made))
    assert all(torch.equal(args[0], out) for args, out in zip(got[1:], masks))
    positions = torch.stack([model.pos_embed[0, 3 + ids] for ids in masked])
    assert torch.equal(got[0][0], model.mask_token + positions)
    assert torch.equal(latents, model.norm(masks[-1]))


def test_reconstruction_block_by_hand():
    block, masks, proxies = ReconstructionBlock(8, 2), torch.randn(1, 3, 8), torch.randn(1, 2, 8)
    torch.nn.init.normal_(block.norm1.weight)
    q, kv = block.norm1(masks)[0], block.norm1(torch.cat([proxies, masks], 1))[0]
    (wq, wk, wv), (bq, bk, bv) = block.attn.qkv.weight.split(8), block.attn.qkv.bias.split(8)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = (q @ wq[h].T + bq[h]) @ (kv @ wk[h].T + bk[h]).T / 2  # sqrt(4)
        heads.append(scores.softmax(1) @ (kv @ wv[h].T + bv[h]))
    x = masks[0] + torch.cat(heads, 1) @ block.attn.proj.weight.T + block.attn.proj.bias
    torch.testing.assert_close(block(masks, proxies)[0], x + block.mlp(block.norm2(x)))


# -- recipes --------------------------------------------------------------------------------------------

def test_with_recipe():
    get = lambda **flags: with_recipe(Config(**flags))
    fields = ("mask_ratio", "num_proxy", "crop_scale", "jitter", "clip_grad", "betas", "last_lr", "drop_path")
    recipe = lambda **flags: tuple(getattr(get(**flags), name) for name in fields)
    assert recipe() == (0.8, 8, (0.5, 1.0), 0.0, 0.02, (0.9, 0.999), 1e-6, 0.0)
    assert recipe(target="dvae") == (0.6, 1, (0.08, 1.0), 0.4, 3.0, (0.9, 0.999), 1e-5, 0.1)
    assert recipe(baseline=True)[:4] == (0.4, 1, (0.5, 1.0), 0.0)
    assert recipe(target="dvae", baseline=True)[:4] == (0.4, 1, (0.08, 1.0), 0.4)
    own = dict(mask_ratio=0.5, num_proxy=2, crop_scale=(0.3, 0.9), jitter=0.0, clip_grad=0.0, betas=(0.8, 0.9),
               last_lr=0.0, drop_path=0.0)
    for flags in (dict(target="dvae"), dict(baseline=True), dict(target="dvae", baseline=True)):
        assert recipe(**flags, **own) == tuple(own[name] for name in fields)  # what is said wins, zeros too


@pytest.mark.parametrize("target", ["hog", "dvae"])
def test_exempt_from_decay(target):
    model = small(**DVAE if target == "dvae" else {})
    exempt = {id(p) for p in param_groups(model, 0.05, EXEMPT[target])[1]["params"]}
    exempt = {name for name, p in model.named_parameters() if id(p) in exempt}
    words = ("bias", "norm") + (("cls_token", "pos_embed", "gamma") if target == "dvae" else ("mask_token",))
    assert exempt == {name for name, _ in model.named_parameters() if any(word in name for word in words)}


def test_colour_jitter_is_torchvisions():
    images, noise, strength = torch.rand(5, 3, 6, 7), torch.rand(5, 3), 0.4
    mine = colour_jitter(images, noise, strength)
    for image, row, changed in zip(images, (1 + strength * (2 * noise - 1)).tolist(), mine):
        for factor, adjust in zip(row, (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)):
            image = adjust(image, factor)
        torch.testing.assert_close(changed, image)
    torch.testing.assert_close(colour_jitter(images, torch.full((5, 3), 0.5), strength), images)


def test_blocks_of_the_two_targets():
    hog, dvae = small(drop_path=0.0), small(depth=3, drop_path=0.1, **DVAE)
    for stack in ("blocks", "extra_blocks"):
        for block in getattr(hog, stack):
            assert block.attn.qkv.bias is not None
            assert not hasattr(block.ls1, "gamma") and not hasattr(block.drop_path1, "rate")
        first, *others = getattr(dvae, stack)
        assert not hasattr(first.drop_path1, "rate")  # the rate rises linearly over the layers, from 0
        rates = [(block.drop_path1.rate, block.drop_path2.rate) for block in others]
        assert rates == [pytest.approx((0.05, 0.05)), pytest.approx((0.1, 0.1))]
        for block in getattr(dvae, stack):
            assert block.attn.qkv.bias is None
            assert (block.ls1.gamma == 0.1).all() and (block.ls2.gamma == 0.1).all()
            torch.nn.init.ones_(block.attn.q_bias), torch.nn.init.constant_(block.attn.v_bias, 2.0)
            q, k, v = block.attn.project(torch.zeros(1, 1, 32))
            assert (q == 1).all() and not k.any() and (v == 2).all()  # k has no bias
    assert all(m.eps == 1e-6 for model in (hog, dvae) for m in model.modules() if isinstance(m, torch.nn.LayerNorm))


def test_init_is_the_papers():
    hog, dvae = (small(dim=96, depth=3, **target) for target in ({}, DVAE))
    for model in (hog, dvae):
        for name, p in model.named_parameters():
            layer = int(name.split(".")[1]) + 1 if "blocks." in name else 0
            divided = model is dvae and name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
            xavier = model is dvae and "mlp" in name
            if p.ndim > 1:
                expected = (2 / sum(p.shape)) ** 0.5 if xavier else 0.02
                expected = expected / math.sqrt(2 * layer) if divided else expected
                assert p.std().item() == pytest.approx(expected, rel=0.3 if p.numel() < 1000 else 0.05), name
            elif model is hog and name == "patch_embed.proj.bias":  # as PyTorch draws it for a convolution
                assert 0 < p.abs().max() <= (3 * model.patch_size**2) ** -0.5
            elif xavier and name.endswith("bias"):
                assert 0 < p.abs().max() < 1e-5
            else:
                assert not p.any() if name.endswith("bias") else p.eq(0.1 if "gamma" in name else 1).all(), name


# -- encode, attention ----------------------------------------------------------------------------------

def test_encode_is_deterministic_and_takes_other_sizes():
    model, images = small(drop_path=0.5, **DVAE), torch.randn(2, 3, 32, 32)
    (pooled, patches), (again, _) = model.encode(images), model.encode(images)
    assert torch.equal(pooled, again) and pooled.shape == (2, 32) and patches.shape == (2, 16, 32)
    assert all(m.training for m in model.modules())  # left as it was
    assert torch.equal(model.eval().encode(images)[0], pooled) and not model.training
    pooled, patches = model.encode(torch.randn(2, 3, 48, 64))
    assert pooled.shape == (2, 32) and patches.shape == (2, 48, 32) and patches.isfinite().all()
    with pytest.raises(BadInput, match="48 64"):
        model.encode(torch.randn(2, 3, 45, 62))


@pytest.mark.parametrize("baseline", [False, True])
def test_encode_is_the_compression_stack(baseline):
    model, images = small(baseline=baseline), torch.randn(2, 3, 32, 32)
    torch.nn.init.normal_(model.norm.weight)
    x = model.patch_embed(patchify(images, 8)) + model.pos_embed[:, 3:]
    x = torch.cat([(model.cls_token + model.pos_embed[:, :3]).expand(2, -1, -1), x], 1)
    for block in model.blocks:
        x = block(x)
    pooled, patches = model.encode(images)
    torch.testing.assert_close(pooled, LayerNorm(32)(x[:, 3:].mean(1)))  # before the final norm; a norm of its own
    torch.testing.assert_close(patches, model.norm(x[:, 3:]))
    for p in [*model.extra_blocks.parameters(), *model.head.parameters(), model.mask_token]:
        p.data.add_(1)
    assert torch.equal(model.encode(images)[0], pooled)


def test_attention_is_the_last_layers():
    model, images = small(drop_path=0.5, **DVAE), torch.randn(2, 3, 32, 32)
    maps = model.attention(images)
    assert torch.equal(maps, model.attention(images)) and model.training  # no branch dropped
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 19))
    model.eval()
    x, attn = model.blocks[-1].norm1(model.compress(images, model.blocks[:1])), model.blocks[-1].attn
    wq, wk, _ = attn.qkv.weight.split(32)
    heads = [((x @ wq[h].T + attn.q_bias[h]) @ (x @ wk[h].T).mT / 4).softmax(-1) for h in (slice(0, 16), slice(16, 32))]
    torch.testing.assert_close(maps, (heads[0] + heads[1]).detach() / 2)


# -- masks, sizes, gradients ----------------------------------------------------------------------------

@pytest.mark.parametrize("size, p, ratio, visible", [
    (224, 16, 0.8, 39), (224, 16, 0.6, 78), (224, 16, 0.4, 117), (8, 4, 0.8, 1), (8, 4, 0.2, 3),
    (32, 4, 0.8, 12), (32, 8, 0.75, 4)])
def test_number_of_visible_patches(size, p, ratio, visible):
    model = small(img_size=size, patch_size=p, mask_ratio=ratio, dim=4, depth=1)
    assert model.num_visible == visible  # N - ceil(ratio N), but at least one


def test_mask_handed_in_or_drawn():
    model, images = small(), torch.randn(4, 3, 32, 32)
    assert torch.equal(model(images, some_mask(4))[0], model(images, some_mask(4), 4)[0])
    torch.manual_seed(3)
    drawn = model(images)[0]
    torch.manual_seed(3)
    assert torch.equal(drawn, model(images, random_mask(torch.rand(4, 16), 12))[0])
    assert not torch.equal(drawn, model(images)[0])
    assert model(images, some_mask(4, 5))[0].isfinite()


def test_build_uses_the_config():
    cfg = with_recipe(Config(model="toy", patch_size=4, img_size=(16, 24), in_chans=5, num_proxy=2, mask_ratio=0.5,
                             drop_path=0.2))
    model = semantic_mim.build(cfg)
    assert (model.grid, model.num_visible, model.num_proxy, model.blocks[1].drop_path1.rate) == ((4, 6), 12, 2, 0.2)
    assert model.head.weight.shape == (5 * 9, 32) and model(torch.randn(2, 5, 16, 24))[0].isfinite()
    model = semantic_mim.build(with_recipe(Config(model="toy", patch_size=8, target="dvae", baseline=True)), vocab=12)
    assert (model.baseline, len(model.extra_blocks), model.head.weight.shape) == (True, 0, (12, 32))
    with pytest.raises(BadInput, match="--num-proxy"):
        small(num_proxy=0)


@pytest.mark.parametrize("changes", [{}, DVAE, {"baseline": True}, {"baseline": True, **DVAE}])
def test_gradients(changes):
    """Every parameter gets one, for DDP without find_unused_parameters; accumulated they are the whole batch's."""
    model, images, mask = small(**changes), torch.randn(32, 3, 32, 32), some_mask(32)
    tokens = torch.randint(0, 16, (32, 16))
    model(images, mask, tokens=tokens)[0].backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, gradient in whole.items() if gradient is None or not gradient.any()] == []
    model.zero_grad(set_to_none=True)
    for rows in torch.arange(32).split(8):
        (model(images[rows], mask[rows], tokens=tokens[rows])[0] / 4).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=0, atol=1e-6, msg=lambda text: name + text)
