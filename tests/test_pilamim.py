"""PiLaMIM against the authors' numbers, and against closed forms; that prediction and target of the same patch meet."""

import pytest
import torch
import torch.nn as nn

import pilamim
from common import (BadInput, linear, param_groups, patchify, random_mask, restore, sincos_2d, split_ids, unpatchify,
                    update_ema)
from conftest import FIXTURES
from pilamim import PiLaMIM, rename, squared_error

SIZES = dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)


@pytest.fixture(scope="module")
def fixture():
    if not (FIXTURES / "pilamim.pt").exists():
        pytest.skip("needs ../shared/fixtures/pilamim.pt, numbers from the authors' program")
    return torch.load(FIXTURES / "pilamim.pt", weights_only=True)


def released(fixture):
    return PiLaMIM.from_released(fixture["state_dict"], **fixture["config"])


def small(**changes):
    return PiLaMIM(**SIZES | changes)


def some_mask(images, masked=12, places=16):
    return random_mask(torch.rand(images, places, generator=torch.Generator().manual_seed(1)), masked)


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# -- the authors' numbers -------------------------------------------------------------------------------

def test_fixture_losses(fixture):
    loss, logs = released(fixture)(fixture["inputs"]["images"], fixture["inputs"]["mask"])
    for name, value in {"loss": loss, **{k: logs[k] for k in ("pixel_loss", "latent_loss", "cls_loss")}}.items():
        torch.testing.assert_close(value, fixture["outputs"][name], rtol=1e-4, atol=0)


def test_fixture_features_and_picture(fixture):
    model, images = released(fixture), fixture["inputs"]["images"]
    pooled, patches = model.encode(images)
    close(pooled, fixture["outputs"]["features_cls"])
    close(patches, fixture["outputs"]["features_patches"])
    close(model.reconstruct(images, fixture["inputs"]["mask"])[1], fixture["outputs"]["pred_image"])


def test_fixture_gradients(fixture):
    model = released(fixture)
    model(fixture["inputs"]["images"], fixture["inputs"]["mask"])[0].backward()
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    theirs = {rename(name): norm for name, norm in fixture["grad_norms"].items()}
    assert norms.keys() == theirs.keys() and not any(name.startswith("teacher") for name in norms)
    for name, norm in theirs.items():
        torch.testing.assert_close(norms[name], norm, rtol=1e-4, atol=1e-6, msg=lambda text: name + text)


# -- from_released --------------------------------------------------------------------------------------

def test_from_released_layouts(fixture):
    state, model = fixture["state_dict"], released(fixture)
    wrapped = PiLaMIM.from_released({"model": state}, heads=3, decoder_heads=4)  # all other sizes are read
    images, mask = fixture["inputs"]["images"], fixture["inputs"]["mask"]
    assert torch.equal(wrapped(images, mask)[0], model(images, mask)[0])
    assert torch.equal(model.encoder.pos_embed, state["encoder.pos_embedding"].transpose(0, 1))  # sequence first there
    assert torch.equal(model.latent_decoder.pos_embed, state["target_decoder.pos_embedding"].transpose(0, 1))
    assert len({rename(name) for name in state}) == len(state) == len(model.state_dict())
    for channel, row, column in ((0, 0, 0), (1, 2, 5), (2, 7, 3)):  # a patch is (channel, row, column) there
        there, here = channel * 64 + row * 8 + column, (row * 8 + column) * 3 + channel
        assert torch.equal(model.decoder.head.weight[here], state["decoder.head.weight"][there])
        assert torch.equal(model.decoder.head.bias[here], state["decoder.head.bias"][there])
    assert torch.equal(model.latent_decoder.head.weight, state["target_decoder.head_latent.weight"])  # no pixels


@pytest.mark.parametrize("name", ["encoder.cls_token", "encoder.pos_embedding", "target_encoder.layer_norm.bias",
                                  "decoder.head.weight", "decoder.head.bias", "decoder_latent_embed.weight",
                                  "target_decoder.mask_token", "encoder.transformer.1.attn.proj.bias"])
def test_from_released_is_strict(fixture, name):
    state, longer = fixture["state_dict"], torch.zeros([n + 1 for n in fixture["state_dict"][name].shape])
    for wrong in ({k: t for k, t in state.items() if k != name}, state | {name: longer}, state | {name + "x": longer}):
        with pytest.raises(BadInput, match="released PiLaMIM"):
            PiLaMIM.from_released(wrong, **fixture["config"])


def test_from_released_refuses_other_files(fixture):
    for wrong in ({"cls_token": torch.zeros(1, 1, 8)}, {"model": {}}, {}):
        with pytest.raises(BadInput, match="not a released PiLaMIM"):
            PiLaMIM.from_released(wrong)
    with pytest.raises(BadInput, match="pos_embed"):
        PiLaMIM.from_released(fixture["state_dict"], **fixture["config"] | {"img_size": 64})


# -- the three losses -----------------------------------------------------------------------------------

def test_squared_error_by_hand():
    pred, target = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 2.0], [5.0, 1.0]]])
    assert squared_error(pred, target).item() == pytest.approx((1 + 0 + 4 + 9) / 4)
    assert squared_error(pred.bfloat16(), target.bfloat16()).dtype == torch.float32


def parts(model, images, mask):
    """The three losses by loops over images and places, from the three networks."""
    visible, masked = split_ids(mask, int((~mask[0]).sum()))
    patches = patchify(images, 8)
    with torch.no_grad():
        take = lambda t: torch.stack([row[ids] for row, ids in zip(t.expand(len(images), -1, -1), visible)])
        latent = model.encoder(take(patches), take(model.encoder.pos_embed))
        targets = model.teacher(patches, model.teacher.pos_embed)
        everywhere = lambda seen, cls, hidden: (cls, restore(torch.cat([seen, hidden], 1), torch.cat([visible, masked], 1)))
        _, pixels = everywhere(*model.decoder(latent, visible, masked))
        cls, latents = everywhere(*model.latent_decoder(latent, visible, masked))
    pairs = [(b, n) for b in range(len(images)) for n in range(16) if mask[b, n]]
    mean = lambda squares: sum(squares) / len(squares)
    return (mean([(pixels[b, n] - patches[b, n]).square().mean() for b, n in pairs]),
            mean([(latents[b, n] - targets[b, 1 + n]).square().mean() for b, n in pairs]),
            mean([(cls[b] - targets[b, 0]).square().mean() for b in range(len(images))]))


def test_losses_by_loops():
    model, images, mask = small(), 2 * torch.randn(3, 3, 32, 32) + 1, some_mask(3)
    for p in model.teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)  # no longer a copy
    loss, logs = model(images, mask)
    pixel, latent, cls = parts(model, images, mask)
    torch.testing.assert_close([logs["pixel_loss"], logs["latent_loss"], logs["cls_loss"]], [pixel, latent, cls])
    torch.testing.assert_close(loss.detach(), pixel + latent + cls)
    torch.testing.assert_close(logs["loss_of_mean"], patchify(images, 8)[mask].var(unbiased=False))
    assert all(v.ndim == 0 and not v.requires_grad for v in logs.values())


@pytest.mark.parametrize("dropped, own", [("pixel", "decoder."), ("latent", None), ("cls", None)])
def test_weight_of_zero_drops_a_loss(dropped, own):
    model, images, mask = small(**{f"{dropped}_weight": 0.0}), torch.randn(3, 3, 32, 32), some_mask(3)
    loss, logs = model(images, mask)
    kept = [logs[f"{name}_loss"] for name in ("pixel", "latent", "cls") if name != dropped]
    torch.testing.assert_close(loss.detach(), sum(kept))  # still logged, not in the loss
    assert logs[f"{dropped}_loss"] > 0
    loss.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad is not None, name  # zero, not absent: DDP waits for all
        if own and name.startswith(own):
            assert not p.grad.any(), name
    model = small(pixel_weight=3.0, latent_weight=0.5, cls_weight=2.0)
    loss, logs = model(images, mask)
    torch.testing.assert_close(loss.detach(), 3 * logs["pixel_loss"] + 0.5 * logs["latent_loss"] + 2 * logs["cls_loss"])


def test_all_weights_zero():
    with pytest.raises(BadInput, match="--pixel-weight"):
        small(pixel_weight=0.0, latent_weight=0.0, cls_weight=0.0)


# -- the same patch meets -------------------------------------------------------------------------------

class Marks(nn.Module):
    """In place of the teacher: each patch's own first pixel, which the test makes its place; -1 in place of CLS."""
    pos_embed = torch.zeros(1, 16, 32)

    def forward(self, patches, pos):
        marks = patches[..., :1].expand(-1, -1, 32)
        return torch.cat([torch.full_like(marks[:, :1], -1), marks], 1)


class Released(Marks):
    """What the released program does: it shuffles the patches and does not put them back."""

    def forward(self, patches, pos):
        return super().forward(patches[:, torch.randperm(16)], pos)


class Places(nn.Module):
    """In place of a decoder: each output is the place that it stands for."""

    def __init__(self, width, scale=1):
        super().__init__()
        self.width, self.scale = width, scale

    def forward(self, latent, ids_visible, ids_masked, unread=0):
        places = lambda ids: self.scale * ids[..., None].float().expand(-1, -1, self.width)
        return places(ids_visible), torch.full((len(latent), self.width), -1.0), places(ids_masked)


@pytest.mark.parametrize("teacher, decoder, meets", [(Marks, Places, True), (Released, Places, False)])
def test_prediction_and_target_of_the_same_patch_meet(teacher, decoder, meets):
    """Position-marked input: every pixel of patch n is n. Predictions are places, so each loss is 0 if and only if all
    pairs are of one patch."""
    model, mask = small(), some_mask(4)
    images = unpatchify(torch.arange(16.0)[None, :, None].expand(4, -1, 192), 8, (4, 4))
    model.teacher, model.latent_decoder, model.decoder = teacher(), decoder(32), decoder(192)
    _, logs = model(images, mask)
    assert (logs["latent_loss"] == 0) == meets
    assert logs["pixel_loss"] == 0 and logs["cls_loss"] == 0


def test_real_teacher_keeps_its_patches_in_place():
    """The same of the real teacher, which mixes patches: a decoder that knows its outputs by place gets loss 0."""
    model, images, mask = small(), torch.randn(4, 3, 32, 32), some_mask(4)
    model.teacher.load_state_dict(small().teacher.state_dict())
    known = model.teacher(patchify(images, 8), model.teacher.pos_embed)

    class Known(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = shift

        def forward(self, latent, ids_visible, ids_masked, unread):
            return None, known[:, 0], torch.stack([k[1 + (i + self.shift) % 16] for k, i in zip(known, ids_masked)])
    for shift in (0, 1):
        model.latent_decoder = Known(shift)
        logs = model(images, mask)[1]
        assert logs["cls_loss"] == 0 and (logs["latent_loss"] == 0) == (shift == 0)


def test_decoders_know_their_places():
    """A decoder's output at a place depends on its position: exchange two positions, and outputs change places."""
    decoder, latent, (visible, masked) = small().decoder, torch.randn(1, 5, 32), split_ids(some_mask(1), 4)
    *others, before = decoder(latent, visible, masked)
    assert [part.shape for part in others] == [(1, 4, 192), (1, 192)]
    a, b = masked[0, 2].item(), masked[0, 7].item()
    with torch.no_grad():
        decoder.pos_embed[:, [1 + a, 1 + b]] = decoder.pos_embed[:, [1 + b, 1 + a]]
    *_, after = decoder(latent, visible, masked)
    torch.testing.assert_close(after[:, [2, 7]], before[:, [7, 2]])
    assert (after[:, 2] - before[:, 2]).abs().max() > 1e-4


def test_unread_places_change_no_number():
    """Training leaves the visible places out of the decoders' last block; what it computes of the others is the same."""
    for decoder in (small().decoder, small().latent_decoder):
        latent, (visible, masked) = torch.randn(2, 5, 32), split_ids(some_mask(2), 4)
        everywhere, read = decoder(latent, visible, masked), decoder(latent, visible, masked, unread=4)
        assert everywhere[0].shape[1] == 4 and read[0].shape[1] == 0
        torch.testing.assert_close(read[1:], everywhere[1:])


def test_student_sees_the_visible_and_the_teacher_everything():
    model, images, mask = small(), torch.randn(2, 3, 32, 32), some_mask(2)
    seen = {}
    for part in ("encoder", "teacher", "decoder", "latent_decoder"):
        getattr(model, part).register_forward_hook(lambda _, __, out, part=part: seen.update({part: out}))
    patches, versions = patchify(images, 8), []
    for changed in (None, mask, ~mask):
        model(images if changed is None else unpatchify(patches + changed[..., None], 8, (4, 4)), mask)
        versions.append({part: out if torch.is_tensor(out) else out[2] for part, out in seen.items()})
    original, hidden, shown = versions
    assert original["encoder"].shape == (2, 5, 32) and original["teacher"].shape == (2, 17, 32)
    for part in ("encoder", "decoder", "latent_decoder"):
        assert torch.equal(original[part], hidden[part]) and not torch.equal(original[part], shown[part])
    assert not any(torch.equal(original["teacher"], version["teacher"]) for version in (hidden, shown))


# -- schedule and teacher -------------------------------------------------------------------------------

def test_schedule_is_linear():
    assert [linear(step, 200, 0.996, 1.0) for step in (0, 50, 100, 200)] == pytest.approx([0.996, 0.997, 0.998, 1.0])


def test_ema_by_hand():
    model = small()
    for p in model.encoder.parameters():
        p.data += torch.randn_like(p)
    before = {name: t.clone() for name, t in model.teacher.state_dict().items()}
    update_ema(model.teacher, model.encoder, 0.9)
    update_ema(model.teacher, model.encoder, 0.5)
    for name, student in model.encoder.state_dict().items():
        torch.testing.assert_close(model.teacher.state_dict()[name], 0.45 * before[name] + 0.55 * student)
    update_ema(model.teacher, model.encoder, 0.0)
    torch.testing.assert_close(model.teacher.state_dict(), model.encoder.state_dict())


def test_teacher_starts_as_a_copy_without_gradient():
    model = small()
    assert all(torch.equal(t, model.encoder.state_dict()[name]) for name, t in model.teacher.state_dict().items())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert all(a is not b for a, b in zip(model.teacher.parameters(), model.encoder.parameters()))


# -- picture and encode ---------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 24)])
def test_reconstruct_puts_predictions_in_their_places(shape):
    model, grid = small(img_size=shape[1:], in_chans=shape[0]), (shape[1] // 8, shape[2] // 8)
    images, mask = torch.randn(3, *shape), some_mask(3, grid[0] * grid[1] // 2, grid[0] * grid[1])
    model.decoder = Places(64 * shape[0], scale=100)
    hidden, predicted, pasted = (patchify(t, 8) for t in model.reconstruct(images, mask))
    patches, marks = patchify(images, 8), 100.0 * torch.arange(grid[0] * grid[1])[:, None]
    assert torch.equal(predicted, marks.expand_as(patches))
    assert torch.equal(pasted, torch.where(mask[..., None], marks, patches))
    assert torch.equal(hidden, torch.where(mask[..., None], torch.zeros(()), patches))


def test_encode_is_deterministic_and_takes_other_sizes():
    model, images = small(), torch.randn(2, 3, 32, 32)
    (pooled, patches), (again, _) = model.encode(images), model.eval().encode(images)
    assert torch.equal(pooled, again) and pooled.shape == (2, 32) and patches.shape == (2, 16, 32)
    pooled, patches = model.encode(torch.randn(2, 3, 48, 64))
    assert pooled.shape == (2, 32) and patches.shape == (2, 48, 32) and patches.isfinite().all()
    with pytest.raises(BadInput, match="48 64"):
        model.encode(torch.randn(2, 3, 45, 62))


def test_encode_is_cls_of_the_context_encoder_after_the_norm():
    model, images = small(), torch.randn(2, 3, 32, 32)
    pooled, patches = model.encode(images)
    x = model.encoder(patchify(images, 8), model.encoder.pos_embed)
    assert torch.equal(pooled, x[:, 0]) and torch.equal(patches, x[:, 1:])
    assert pooled.mean(1).abs().max() < 1e-5 and (pooled.var(1, unbiased=False) - 1).abs().max() < 1e-2  # normed
    for p in [*model.teacher.parameters(), *model.decoder.parameters(), *model.latent_decoder.parameters()]:
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


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.95, -0.5, 1.5])
def test_mask_ratio_that_leaves_nothing(ratio):
    with pytest.raises(BadInput, match="--mask-ratio"):
        small(mask_ratio=ratio)


def test_build_uses_the_config():
    cfg = pilamim.Config(model="toy", patch_size=8, img_size=(32, 48), in_chans=5, mask_ratio=0.5, decoder_dim=24,
                         decoder_depth=3, decoder_heads=2, pixel_weight=2.0, latent_weight=3.0, cls_weight=4.0)
    model = pilamim.build(cfg)
    assert (model.grid, model.num_visible, model.weights) == ((4, 6), 12, (2.0, 3.0, 4.0))
    assert model.decoder.head.weight.shape == (8 * 8 * 5, 24) and model.latent_decoder.head.weight.shape == (32, 24)
    assert len(model.decoder.blocks) == len(model.latent_decoder.blocks) == 3
    assert model(torch.randn(2, 5, 32, 48))[0].isfinite()
    smallest = pilamim.build(pilamim.Config(model="toy", img_size=(8,), patch_size=4))
    assert smallest(torch.randn(1, 3, 8, 8))[0].isfinite()


def test_every_trained_parameter_gets_a_gradient():  # DDP without find_unused_parameters relies on it
    model = small()
    model(torch.randn(8, 3, 32, 32))[0].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in model.teacher.parameters())


def test_accumulated_gradients_are_the_whole_batch():
    model, images, mask = small(), torch.randn(64, 3, 32, 32), some_mask(64)
    model(images, mask)[0].backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for part, hidden in zip(images.split(16), mask.split(16)):
        (model(part, hidden)[0] / 4).backward()
    for name, gradient in whole.items():
        mine = model.get_parameter(name).grad
        torch.testing.assert_close(mine, gradient, rtol=0, atol=1e-6, msg=lambda text: name + text)


def test_the_other_init_is_maes():
    torch.manual_seed(0)
    model = small(dim=128, decoder_dim=64, init="mae")
    for layer in (model.encoder.blocks[0].attn.qkv, model.decoder.head, model.latent_decoder.embed):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5  # Xavier uniform
        assert 0.98 * bound < layer.weight.abs().max() <= bound
    assert not model.decoder.head.bias.any() and model.decoder.head.bias.requires_grad
    places = torch.arange(4)
    assert torch.equal(model.encoder.pos_embed, sincos_2d(128, places, places)) and model.encoder.pos_embed.requires_grad
    for decoder in (model.decoder, model.latent_decoder):
        assert torch.equal(decoder.pos_embed[:, 1:], sincos_2d(64, places, places))
        assert 0 < decoder.pos_embed[:, :1].std() < 0.03  # CLS keeps its own
    assert all(map(torch.equal, model.teacher.parameters(), model.encoder.parameters()))


def test_init_and_blocks_are_the_papers():
    model = small(dim=128, decoder_dim=64)
    for name, p in model.named_parameters():
        if name.endswith(("cls_token", "mask_token", "pos_embed")):
            assert 0.01 < p.std() < 0.03, name
    for layer in (model.encoder.blocks[0].attn.qkv, model.decoder.head, model.latent_decoder.embed):  # PyTorch's own
        bound = layer.in_features**-0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound
    assert model.decoder.head.bias.any()
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert {m.eps for m in norms} == {1e-5} and len(norms) == 2 * (2 * 2 + 1) + 2 * 2  # none before a decoder's head
    assert all(m.bias is None for name, m in model.named_modules() if name.endswith("qkv"))
    assert all(m.bias is not None for name, m in model.named_modules() if name.endswith(("attn.proj", "fc1", "fc2")))
    assert model.encoder.pos_embed.shape == (1, 16, 128) and model.decoder.pos_embed.shape == (1, 17, 64)  # CLS has one
    exempt = {id(p) for p in param_groups(model, 0.05)[1]["params"]}
    assert exempt == {id(p) for p in model.parameters() if p.requires_grad and p.ndim == 1}
