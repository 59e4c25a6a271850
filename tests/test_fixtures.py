"""The authors' numbers: losses, predictions, features and gradients of single steps, and more.

Single steps are in ../shared/fixtures, beside the repository; without it their tests are skipped.
From tests/fixtures, which is always there: initialisations and the dVAE.
"""

import pytest
import torch

from capi import patch_coordinates
from common import gather, patchify, split_ids, unpatchify, unshuffle
from conftest import MODULES, SHARED_FIXTURES, load_fixture
from semantic_mim import Tokenizer, hog_target
from test_trajectories import RUNS, initial_model, under_their_names

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
each_device = pytest.mark.parametrize("device", DEVICES)
each_fixture = pytest.mark.parametrize("name", [
    "mae", "latent_mim", "semantic_mim_hog", "semantic_mim_hog16", "semantic_mim_dvae", "pilamim",
    "capi", "capi_registers"])


def load_shared(name, device):
    path = SHARED_FIXTURES / f"{name}.pt"
    if not path.exists():
        pytest.skip("needs ../shared/fixtures")
    return torch.load(path, weights_only=True, map_location=device)


def module_of(name):
    return MODULES[next(method for method in MODULES if name.startswith(method))]


def sizes_of(fixture):  # without what `forward` takes
    return {key: value for key, value in fixture["config"].items() if key != "sim_target"}


def released(name, fixture):
    model = module_of(name).Model.from_released(fixture["state_dict"], **sizes_of(fixture))
    return model.to(fixture["inputs"]["images"].device).eval()


def step_of(model, fixture):
    """`forward` on the fixture's images and masks -> loss, logs."""
    inputs = fixture["inputs"]
    if "visible" in inputs:  # CAPI
        V, Q = (int(inputs[key][0].sum()) for key in ("visible", "predict"))
        return model(inputs["images"], ~inputs["visible"], inputs["predict"], V, Q)
    more = {"tokens": inputs["tokens"]} if "tokens" in inputs else {}
    if "sim_target" in fixture["config"]:
        more["sim_target"] = fixture["config"]["sim_target"]
    return model(inputs["images"], inputs["mask"], int((~inputs["mask"][0]).sum()), **more)


# -- what the files have besides losses and the features of `encode`

def ids_of(is_masked):
    return split_ids(is_masked, int((~is_masked[0]).sum()))


def mae_outputs(model, inputs, outputs):
    ids = ids_of(inputs["mask"])
    latent = model.encode_visible(patchify(inputs["images"], model.patch_size), ids[0])
    pred = unshuffle(model.decode(latent, *ids)[:, 1:], torch.cat(ids, 1))
    return {"visible_cls": latent[:, 0], "visible_tokens": latent[:, 1:], "pred": pred}


def latent_mim_outputs(model, inputs, outputs):
    patches, encoder = patchify(inputs["images"], model.patch_size), model.encoder
    everywhere = torch.arange(16, device=patches.device).expand(len(patches), -1)
    tokens = encoder.tokens(patches, encoder.pos_embed[:, 1:])
    return {"projected": encoder(patches, everywhere), "features_cls": tokens[:, 0]}


def semantic_mim_outputs(model, inputs, outputs):
    patches = patchify(inputs["images"], model.patch_size)
    tokens = model.norm(model.run_blocks(inputs["images"], model.blocks))
    found = {"mask_latents": model.mask_latents(patches, *ids_of(inputs["mask"])),
             "features_proxy": tokens[:, :model.num_proxy]}
    if model.target == "hog":
        found["hog"] = hog_target(inputs["images"], model.patch_size)
    return found


def pilamim_outputs(model, inputs, outputs):
    pred = model.reconstruct(inputs["images"], inputs["mask"])
    return {"pred_image": unpatchify(pred, model.patch_size, model.grid)}


def capi_outputs(model, inputs, outputs):
    patches = patchify(inputs["images"], model.patch_size)
    places = patch_coordinates(model.grid, patches.device)
    visible, predicted = (ids_of(~inputs[key])[0] for key in ("visible", "predict"))
    context, rope = model.student(gather(patches, visible), gather(places, visible))
    pred = model.student.predict(gather(places, predicted), context, rope)
    features, _ = model.teacher(patches, places)
    return {"predictor_out": pred.flatten(0, 1),
            "features_registers": features[:, :-model.num_patches],
            "teacher_patches": features[:, -model.num_patches:],
            "assignments": model.cluster(outputs["teacher_patches"])[0]}


OUTPUTS = {"mae": mae_outputs, "latent_mim": latent_mim_outputs, "pilamim": pilamim_outputs,
           "semantic_mim": semantic_mim_outputs, "capi": capi_outputs}


@each_device
@each_fixture
def test_losses_predictions_features_and_gradients(name, device):
    """CAPI's authors have a table of frequencies in each block; nothing uses its gradient."""
    fixture, module = load_shared(name, device), module_of(name)
    model, outputs = released(name, fixture), fixture["outputs"]
    loss, found = step_of(model, fixture)
    loss.backward()
    found["loss"] = found.get("capi_loss", loss)  # the authors' name for it
    with torch.no_grad():
        pooled, found["features_patches"] = model.encode(fixture["inputs"]["images"])
        found["features_cls"] = found["features_global"] = pooled
        found |= OUTPUTS[module.__name__](model, fixture["inputs"], outputs)
    for key, expected in outputs.items():
        atol = 0 if "loss" in key else 1e-5
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=atol,
                                   msg=lambda text: f"{key}: {text}")
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    norms = {key: float(v) for key, v in fixture["grad_norms"].items() if "rope.freqs" not in key}
    ours = under_their_names(module, fixture["state_dict"], sizes_of(fixture), list(norms),
                             gradients)
    assert sum(g.numel() for g in gradients.values()) == sum(g.numel() for g in ours.values())
    for key, norm in norms.items():
        assert ours[key].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", RUNS)
def test_initialisation_is_the_authors(name):
    """Constants and tables are equal. Random weights have the same standard deviation, to five
    standard errors, and are uniform where theirs are."""
    recorded = load_fixture(name)
    model = RUNS[name].Model(**recorded["config"])
    tables = dict(model.named_buffers())
    for key, theirs in initial_model(name, recorded).state_dict().items():
        mine, std = model.state_dict()[key], theirs.std()
        if key in tables or std == 0:
            torch.testing.assert_close(mine, theirs, msg=lambda text: f"{key}: {text}")
            continue
        assert (mine.std() / std).log().abs() < 5 / mine.numel() ** 0.5, key
        if mine.numel() >= 200:
            assert (mine.abs().max() < 2 * mine.std()) == (theirs.abs().max() < 2 * std), key


# -- the dVAE

@torch.no_grad()
def test_dvae_encoder():
    fixture = load_fixture("dvae_encoder")
    logits = Tokenizer(fixture["state_dict"]).logits(fixture["inputs"]["images"])
    torch.testing.assert_close(logits, fixture["outputs"]["logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits.argmax(1), fixture["outputs"]["tokens"])
