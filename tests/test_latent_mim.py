"""Latent MIM against the authors' numbers, and against closed forms written out in loops."""

import math

import pytest
import torch

import latent_mim
from common import BadInput, cosine, patchify, random_mask, split_ids, unpatchify, update_ema
from conftest import FIXTURES
from latent_mim import LatentMIM, axes_of, cell_crops, patch_discrimination, random_offsets, similarity

SIZES = dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2,
             num_visible=4, proj_dim=24)


@pytest.fixture(scope="module")
def fixture():
    if not (FIXTURES / "latent_mim.pt").exists():
        pytest.skip("needs ../shared/fixtures/latent_mim.pt, numbers from the authors' program")
    return torch.load(FIXTURES / "latent_mim.pt", weights_only=True)


def released(fixture):
    return LatentMIM.from_released(fixture["state_dict"], **fixture["config"])


def small(**changes):
    return LatentMIM(**SIZES | changes)


def apart(model):
    """The teacher is no longer a copy."""
    for p in model.teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def some_mask(images, masked=12, places=16):
    return random_mask(torch.rand(images, places, generator=torch.Generator().manual_seed(1)), masked)


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def their_name(name):
    return name.replace("patch_embed", "embed").replace("teacher.", "target_encoder.")


# -- the authors' numbers -------------------------------------------------------------------------------

def test_fixture_losses(fixture):
    loss, logs = released(fixture)(fixture["inputs"]["images"], fixture["inputs"]["mask"])
    torch.testing.assert_close(loss, fixture["outputs"]["loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(logs["patch_loss"], fixture["outputs"]["patch_loss"], rtol=1e-4, atol=0)
    assert (loss - logs["patch_loss"]).abs() > 1e-3  # so the similarity terms are in the one and not in the other


def test_fixture_features(fixture):
    model, images = released(fixture), fixture["inputs"]["images"]
    pooled, patches = model.encode(images)
    close(patches, fixture["outputs"]["features_patches"])
    close(pooled, fixture["outputs"]["features_patches"].mean(1))
    everywhere = torch.arange(16, device=images.device).expand(3, -1)
    close(model.encoder(patchify(images, 8), everywhere), fixture["outputs"]["projected"])
    tokens = model.encoder.tokens(patchify(images, 8), model.encoder.pos_embed[:, 1:])
    close(tokens[:, 0], fixture["outputs"]["features_cls"])


def test_fixture_gradients(fixture):
    model = released(fixture)
    model(fixture["inputs"]["images"], fixture["inputs"]["mask"])[0].backward()
    norms = {their_name(name): p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == fixture["grad_norms"].keys()  # none for the teacher
    for name, norm in fixture["grad_norms"].items():
        torch.testing.assert_close(norms[name], norm, rtol=1e-4, atol=1e-6, msg=lambda text: name + text)


# -- from_released --------------------------------------------------------------------------------------

def test_from_released_wrapped(fixture):
    state, images, mask = fixture["state_dict"], fixture["inputs"]["images"], fixture["inputs"]["mask"]
    wrapped = {"state_dict": {"module." + name: t for name, t in state.items()}, "epoch": 800}
    model = LatentMIM.from_released(wrapped, heads=3, decoder_heads=4, num_visible=4, sim_target=0.5)  # sizes are read
    assert torch.equal(model(images, mask)[0], released(fixture)(images, mask)[0])
    table = state["encoder.pos_embed.pos_embeds"] + 1  # position tables are the file's own
    model = LatentMIM.from_released(state | {"encoder.pos_embed.pos_embeds": table}, **fixture["config"])
    assert torch.equal(model.encoder.pos_embed[0], table) and not torch.equal(model.teacher.pos_embed[0], table)


@pytest.mark.parametrize("name", ["encoder.cls_token", "encoder.embed.proj.weight", "encoder.pos_embed.pos_embeds",
                                  "encoder.head.norm2.bias", "target_encoder.embed.proj.weight", "decoder.mask_token",
                                  "target_encoder.blocks.1.mlp.fc1.weight", "decoder.blocks.0.cross_attn.kv_proj.bias"])
def test_from_released_is_strict(fixture, name):
    state, longer = fixture["state_dict"], torch.zeros([n + 1 for n in fixture["state_dict"][name].shape])
    for wrong in ({k: t for k, t in state.items() if k != name}, state | {name: longer}, state | {name + "x": longer}):
        with pytest.raises(BadInput, match="released Latent MIM"):
            LatentMIM.from_released(wrong, **fixture["config"])


def test_from_released_refuses_other_files(fixture):
    for wrong in (small().state_dict(), {"model": {"cls_token": torch.zeros(1, 1, 8)}}, {}):
        with pytest.raises(BadInput, match="not a released Latent MIM"):
            LatentMIM.from_released(wrong)
    with pytest.raises(BadInput, match="pos_embed"):
        LatentMIM.from_released(fixture["state_dict"], **fixture["config"] | {"img_size": 64})


# -- patches with gaps ----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("chans, grid, p, gap", [(3, (4, 4), 8, 2), (1, (2, 5), 4, 1), (3, (3, 2), 4, 4),
                                                   (12, (2, 2), 3, 5)])
def test_cell_crops_by_loops(chans, grid, p, gap, dtype):
    cell, places = p + gap, grid[0] * grid[1]
    images = (torch.rand(3, chans, grid[0] * cell, grid[1] * cell) * 255).to(dtype)
    offsets = torch.randint(0, gap, (3, places, 2))
    patches = cell_crops(images, grid, p, offsets)
    for b in range(3):
        for n in range(places):
            top, left = n // grid[1] * cell + offsets[b, n, 0], n % grid[1] * cell + offsets[b, n, 1]
            crop = images[b, :, top:top + p, left:left + p]
            assert torch.equal(patches[b, n], crop.permute(1, 2, 0).flatten())  # row, column, channel
    assert patches.dtype == dtype


def test_no_gap_is_patchify():
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(cell_crops(images, (2, 3), 8, torch.zeros(2, 6, 2, dtype=torch.long)), patchify(images, 8))


def test_offsets_are_uniform():
    offsets = random_offsets(torch.rand(2000, 9, 2), 4)  # 0..g-1, and no further: the last row of a cell is never seen
    counts = torch.stack([(offsets == i).sum((0, 1)) for i in range(4)]).float()
    assert offsets.min() == 0 and offsets.max() == 3
    assert (counts / 18000 - 0.25).abs().max() < 0.02
    assert abs(torch.corrcoef(offsets.flatten(0, 1).T.float())[0, 1]) < 0.03  # the axes are independent
    assert not random_offsets(torch.rand(5, 2, 2), 0).any()


def test_offsets_handed_in_or_drawn():
    model, images, mask = small(), torch.randn(2, 3, 40, 40), some_mask(2)
    torch.manual_seed(3)
    drawn = model(images, mask)[0]
    torch.manual_seed(3)
    offsets = random_offsets(torch.rand(2, 16, 2), 2)
    assert torch.equal(drawn, model(images, mask, offsets=offsets)[0])
    cut = unpatchify(cell_crops(images, (4, 4), 8, offsets), 8, (4, 4))  # the same patches without gaps
    torch.testing.assert_close(drawn, model(cut, mask)[0])
    assert not torch.equal(drawn, model(images, mask)[0])


def test_positions_by_loops():
    model = small(dim=16, img_size=(24, 32))  # 3 x 4 patches
    assert [t.tolist() for t in axes_of((3, 4))] == [[0, 1.5, 3], pytest.approx([0, 4 / 3, 8 / 3, 4])]  # 0..G
    expected = torch.zeros(1 + 12, 16)  # CLS stays zero
    for n in range(12):
        row, column = n // 4 * 3 / 2, n % 4 * 4 / 3
        for i in range(4):
            w = 10000 ** (-i / 4)
            expected[1 + n, [i, 4 + i, 8 + i, 12 + i]] = torch.tensor(
                [math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w)])
    for table in (model.encoder.pos_embed, model.teacher.pos_embed, model.decoder.pos_embed):
        torch.testing.assert_close(table[0], expected)
    assert not any(name.endswith("pos_embed") for name, _ in model.named_parameters())


# -- losses ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1, 1e-4])  # at the second the 1e-4 counts
def test_patch_discrimination_by_hand(size):
    preds, targets, tau, total = size * torch.randn(2, 3, 2), torch.randn(2, 3, 2), 0.2, 0.0
    unit = lambda v: [x / math.hypot(*v) for x in v]
    for pred, target in zip(preds.tolist(), targets.tolist()):
        standard = [[0.0, 0.0] for _ in range(3)]
        for c in range(2):  # per channel, over the image's masked patches
            values = [row[c] for row in pred]
            mean = sum(values) / 3
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)  # unbiased
            for i in range(3):
                standard[i][c] = (values[i] - mean) / (deviation + 1e-4)
        for i in range(3):
            logits = [sum(a * b for a, b in zip(unit(standard[i]), unit(target[j]))) / tau for j in range(3)]
            total += math.log(sum(math.exp(l) for l in logits)) - logits[i]
    assert patch_discrimination(preds, targets, tau).item() == pytest.approx(2 * tau * total / 6, rel=1e-5)


def test_patch_discrimination_stays_within_an_image():
    pred, target = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    loss, order = patch_discrimination(pred, target, 0.2), torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(patch_discrimination(pred[:, order], target[:, order], 0.2), loss)
    assert (patch_discrimination(pred[:, order], target, 0.2) - loss).abs() > 1e-3  # the pairing matters
    alone = torch.stack([patch_discrimination(p[None], t[None], 0.2) for p, t in zip(pred, target)])
    torch.testing.assert_close(alone.mean(), loss)  # no negatives from other images, so none from other ranks
    assert patch_discrimination(target, target, 0.2) < loss


def test_similarity_by_hand():
    tokens, total = torch.randn(2, 4, 3), 0.0
    for image in tokens.tolist():
        for a in image:  # all pairs, each token with itself too
            for b in image:
                total += sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)
    assert similarity(tokens).item() == pytest.approx(total / 32, rel=1e-4)
    assert similarity(torch.ones(2, 5, 3)).item() == pytest.approx(1)  # collapse


def test_loss_is_its_parts():
    model, images, mask = apart(small()), torch.randn(3, 3, 32, 32), some_mask(3)
    visible, masked = split_ids(mask, 4)
    latent = model.encoder(patchify(images, 8), visible)
    target, pred = model.teacher(patchify(images, 8), masked)[:, 1:], model.decoder(latent, visible, masked)
    part = patch_discrimination(pred, target, 0.2)
    s_pred, s_visible = similarity(pred), similarity(latent[:, 1:])  # CLS is left out
    for s in (0.75, 0.25):
        loss, logs = model(images, mask, sim_target=s)
        torch.testing.assert_close(loss, part + 0.1 * (s_pred - s) ** 2 + 0.1 * (s_visible - s) ** 2)
    torch.testing.assert_close([logs[k] for k in ("patch_loss", "s_pred", "s_visible", "s_target")],
                               [t.detach() for t in (part, s_pred, s_visible, similarity(target))])
    assert all(v.ndim == 0 and not v.requires_grad for v in logs.values()) and not target.requires_grad


def test_l2_variant():
    model, images, mask = apart(small(loss="l2", sim_coeff=0.0)), torch.randn(3, 3, 32, 32), some_mask(3)
    visible, masked = split_ids(mask, 4)
    pred = model.decoder(model.encoder(patchify(images, 8), visible), visible, masked)
    target = model.teacher(patchify(images, 8), masked)[:, 1:]
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(model(images, mask)[0], (pred - target).square().mean())


# -- schedules and the teacher --------------------------------------------------------------------------

@pytest.mark.parametrize("field, first, middle, last", [("sim_target", 0.75, 0.5, 0.25), ("ema", 0.99, 0.995, 1.0)])
def test_schedules(field, first, middle, last):
    values = [cosine(step, 200, *getattr(latent_mim.Config(), field)) for step in range(201)]
    assert (values[0], values[100], values[200]) == pytest.approx((first, middle, last))
    assert values[50] == pytest.approx(middle + (first - middle) * math.cos(math.pi / 4))  # a cosine, no line


def test_ema_by_hand():
    model = small()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(torch.randn_like(p))
    model.encoder.pos_embed += 1  # a buffer
    before = {name: t.clone() for name, t in model.teacher.state_dict().items()}
    update_ema(model.teacher, model.encoder, 0.9)
    update_ema(model.teacher, model.encoder, 0.5)
    for name, student in model.encoder.state_dict().items():
        twice = 0.5 * (0.9 * before[name] + 0.1 * student) + 0.5 * student
        torch.testing.assert_close(model.teacher.state_dict()[name], student if "pos_embed" in name else twice)


def test_teacher_starts_as_a_copy_without_gradient():
    model = small()
    assert all(torch.equal(t, model.encoder.state_dict()[name]) for name, t in model.teacher.state_dict().items())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert all(a is not b for a, b in zip(model.teacher.parameters(), model.encoder.parameters()))


def test_student_sees_the_visible_and_the_teacher_the_masked(monkeypatch):
    model, images, mask = small(), torch.randn(2, 3, 32, 32), some_mask(2)
    seen = {}
    for part in ("encoder", "teacher", "decoder"):
        getattr(model, part).register_forward_hook(lambda _, __, out, part=part: seen.update({part: out.detach()}))
    patches = patchify(images, 8)
    hidden = unpatchify(torch.where(mask[..., None], patches + 1, patches), 8, (4, 4))
    shown = unpatchify(torch.where(mask[..., None], patches, patches + 1), 8, (4, 4))
    outputs = []
    for version in (images, hidden, shown):
        model(version, mask)
        outputs.append(dict(seen))
    original, hidden, shown = outputs
    assert original["teacher"].shape == (2, 13, 32) and original["encoder"].shape == (2, 5, 32)  # CLS + M, CLS + V
    for part, changed in (("encoder", [False, True]), ("decoder", [False, True]), ("teacher", [True, False])):
        assert [not torch.equal(v[part], original[part]) for v in (hidden, shown)] == changed, part


def test_visual_cue_by_hand():
    """Without blocks and norm a masked place's prediction is head(mask token + cue + position)."""
    model, mask = small(decoder_depth=1), some_mask(2)
    decoder, latent, (visible, masked) = model.decoder, torch.randn(2, 5, 32), split_ids(mask, 4)
    decoder.blocks, decoder.norm = torch.nn.ModuleList(), torch.nn.Identity()
    torch.nn.init.normal_(decoder.mask_token)
    pred, context, pe = decoder(latent, visible, masked), decoder.embed(latent)[:, 1:], decoder.pos_embed[0, 1:]
    for b in range(2):
        for m in range(12):
            near = torch.stack([pe[masked[b, m]] @ pe[v] / 16**0.5 for v in visible[b]]).exp()
            cue = sum(w * c for w, c in zip(near / near.sum(), context[b]))  # of the context before its positions
            torch.testing.assert_close(pred[b, m], decoder.head(decoder.mask_token[0, 0] + cue + pe[masked[b, m]]))


# -- encode ---------------------------------------------------------------------------------------------

def test_encode_is_deterministic_and_takes_other_sizes():
    model, images = small(gap=2), torch.randn(2, 3, 32, 32)
    (pooled, patches), (again, _) = model.encode(images), model.eval().encode(images)
    assert torch.equal(pooled, again) and pooled.shape == (2, 32) and patches.shape == (2, 16, 32)
    pooled, patches = model.encode(torch.randn(2, 3, 48, 64))
    assert pooled.shape == (2, 32) and patches.shape == (2, 48, 32) and patches.isfinite().all()
    with pytest.raises(BadInput, match="48 64"):
        model.encode(torch.randn(2, 3, 45, 62))


def test_encode_is_the_student_before_norm_and_projector():
    model, images = small(), torch.randn(2, 3, 32, 32)
    pooled, patches = model.encode(images)
    torch.testing.assert_close(pooled, patches.mean(1))
    projected = model.encoder(patchify(images, 8), torch.arange(16).expand(2, -1))[:, 1:]
    torch.testing.assert_close(model.encoder.head(model.encoder.norm(patches)), projected)
    for p in [*model.encoder.norm.parameters(), *model.encoder.head.parameters(), *model.teacher.parameters()]:
        p.data.add_(1)
    assert torch.equal(pooled, model.encode(images)[0])  # none of these is in it


# -- masks, sizes, gradients ----------------------------------------------------------------------------

def test_mask_handed_in_or_drawn():
    model, images = small(), torch.randn(4, 3, 32, 32)
    assert torch.equal(model(images, some_mask(4))[0], model(images, some_mask(4), 4)[0])
    torch.manual_seed(3)
    drawn = model(images)[0]
    torch.manual_seed(3)
    assert torch.equal(drawn, model(images, random_mask(torch.rand(4, 16), 12))[0])
    assert not torch.equal(drawn, model(images)[0])
    assert model(images, some_mask(4, 5))[0].isfinite()


@pytest.mark.parametrize("size, patch, share, visible", [
    (224, 16, 20 / 196, 20), (32, 4, 20 / 196, 7), (8, 4, 20 / 196, 2), (16, 4, 0.01, 2), (16, 4, 0.5, 8)])
def test_visible_share(size, patch, share, visible):
    cfg = latent_mim.Config(model="toy", img_size=(size,), patch_size=patch, visible_share=share)
    model = latent_mim.build(cfg)
    assert model.num_visible == visible and model.gap == patch // 4
    loss, _ = model(torch.randn(1, 3, *[size // patch * (patch + patch // 4)] * 2))
    assert loss.isfinite()


def test_visible_share_that_leaves_nothing():
    for visible in (0, 1, 15, 16):
        with pytest.raises(BadInput, match="--visible-share"):
            small(num_visible=visible)


def test_build_uses_the_config():
    cfg = latent_mim.Config(model="toy", patch_size=8, img_size=(32, 48), in_chans=5, visible_share=0.25, gap=3,
                            proj_dim=40, decoder_dim=24, decoder_depth=3, decoder_heads=2, loss="l2", tau=0.3,
                            sim_coeff=0.7)
    model = latent_mim.build(cfg)
    assert (model.grid, model.num_visible, model.gap, model.objective) == ((4, 6), 6, 3, "l2")
    assert (model.tau, model.sim_coeff, len(model.decoder.blocks)) == (0.3, 0.7, 3)
    assert model.decoder.head.weight.shape == (32, 24) and model.encoder.head.linear1.weight.shape == (40, 40)
    assert model.encoder.patch_embed.proj.weight.shape == (32, 5, 8, 8)
    assert model(torch.randn(2, 5, 44, 66))[0].isfinite()


@pytest.mark.parametrize("loss", ["patch", "l2"])
def test_every_trained_parameter_gets_a_gradient(loss):  # DDP without find_unused_parameters relies on it
    model = small(loss=loss)
    model(torch.randn(8, 3, 32, 32))[0].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in model.teacher.parameters())


def test_exempt_from_decay(monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    def spy(model, decay, exempt):
        spy.exempt = {name for name, p in model.named_parameters() if exempt(name, p)}
        raise Stop
    monkeypatch.setattr(latent_mim, "param_groups", spy)
    with pytest.raises(Stop):
        latent_mim.train(latent_mim.Config(model="toy", data="shapes:8", device="cpu", out=str(tmp_path)))
    names = {name for name, _ in small().named_parameters()}
    assert spy.exempt == {n for n in names if "bias" in n or "norm" in n or "embed" in n}
    assert {"encoder.patch_embed.proj.weight", "decoder.embed.weight"} < spy.exempt
    assert not {"encoder.cls_token", "decoder.mask_token", "encoder.head.linear0.weight"} & spy.exempt


def test_accumulated_gradients_are_the_whole_batch():
    images, mask = torch.randn(32, 3, 32, 32), some_mask(32)

    def difference(**changes):
        torch.manual_seed(0)
        model = small(**changes)
        model(images, mask)[0].backward()
        whole = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        for part, hidden in zip(images.split(8), mask.split(8)):
            (model(part, hidden)[0] / 4).backward()
        return max((p.grad - w).abs().max() for p, w in zip((p for p in model.parameters() if p.requires_grad), whole))
    assert difference(sim_coeff=0.0) < 1e-6
    assert difference(sim_coeff=10.0) > 1e-5  # the square of a mean over the batch is not a mean of squares


def test_init_is_the_papers():
    model = small(dim=96, decoder_dim=64)
    for weight in (model.encoder.patch_embed.proj.weight.flatten(1), model.encoder.blocks[0].attn.qkv.weight,
                   model.encoder.head.linear0.weight, model.decoder.blocks[1].cross_attn.kv_proj.weight):
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier uniform
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert 0.01 < model.encoder.cls_token.std() < 0.03 and not model.decoder.mask_token.any()
    eps = lambda *parts: {m.eps for part in parts for m in part.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert eps(model.encoder.blocks, model.encoder.norm, model.decoder) == {1e-6} and eps(model.encoder.head) == {1e-5}
    assert all(linear.bias is None for linear in model.encoder.head.children() if isinstance(linear, torch.nn.Linear))
