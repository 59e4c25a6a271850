"""Files as the authors' programs write them load, and `encode` gives what their programs gave.
Each file is made of a recorded run's initial weights (tests/fixtures, under the authors' names)."""

import argparse
import shlex
import subprocess
import sys

import pytest
import torch

import evaluate
from common import BadInput, read_checkpoint
from conftest import load_fixture
from programs import invoke
from test_trajectories import RUNS, initial_weights, pool_images

IGNORED = {"semantic_mim_hog": "target_generator.gkern",
           "semantic_mim_dvae": "target_generator.blocks.input.w"}


def weights_of(name):
    state = initial_weights(name, load_fixture(name))
    if name in IGNORED:
        state[IGNORED[name]] = torch.ones(16, 16)
    if name == "capi":  # the authors released the teacher's backbone alone
        backbone = [key for key in state if key.startswith("student.backbone.")]
        state = {key.removeprefix("student."): state[key] for key in backbone}
    return state


def wrapped(name, state):
    """What the program saves."""
    if name == "mae":
        return {"model": state}
    if name == "latent_mim":
        return {"state_dict": {f"module.{key}": t for key, t in state.items()}, "epoch": 800}
    return {"meta": {"epoch": 300}, "state_dict": state} if name.startswith("semantic") else state


def without(state, *prefixes):
    return {key: t for key, t in state.items() if not key.startswith(prefixes)}


def released(name, file, **changes):
    sizes = load_fixture(name)["config"] | changes
    return RUNS[name].Model.from_released(file, **sizes).eval()


@torch.no_grad()
def assert_encodes_as_recorded(name, model):
    recorded = load_fixture(name)
    images, expected = pool_images(recorded), recorded["encode"]
    size = expected.get("crop", images.shape[-1])  # Latent MIM encodes without gaps
    found = model.encode(images[expected["images"], :, :size, :size])
    for ours, theirs in zip(found, (expected["pooled"], expected["patches"])):
        assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", RUNS)
def test_an_unknown_or_a_missing_tensor_is_refused(name):
    state = weights_of(name)
    own = list(without(state, "target_generator."))
    for missing in (own[len(own) // 5], own[-1]):  # one of the encoder, one of a decoder or head
        with pytest.raises(BadInput):
            released(name, wrapped(name, without(state, missing)))
    with pytest.raises(BadInput, match="surplus"):
        released(name, wrapped(name, state | {"surplus.weight": torch.zeros(3)}))


@pytest.mark.parametrize("name", IGNORED)
def test_a_baseline_has_no_second_stack(name, capsys):
    file = wrapped(name, without(weights_of(name), "backbone.extra_layers."))
    assert_encodes_as_recorded(name, released(name, file, baseline=True))
    assert capsys.readouterr().out == ""  # the head is there


@pytest.mark.parametrize("name, absent, parts", [
    ("mae", ("decoder", "mask_token"), ["decoder", "mask_token"]),
    ("latent_mim", ("decoder.",), ["decoder"]),
    ("pilamim", ("decoder", "target_decoder"), ["decoder", "latent_decoder"]),
    ("semantic_mim_hog", ("backbone.extra_layers.", "neck."), ["extra_blocks", "head"]),
    ("semantic_mim_dvae", ("head.",), ["head"]), ("capi", (), ["student_head", "cluster_head"])])
def test_an_absent_decoder_or_head_stays_initialised_and_is_named(name, absent, parts, capsys):
    state = without(weights_of(name), *absent)
    assert_encodes_as_recorded(name, released(name, wrapped(name, state)))
    told = capsys.readouterr().out
    assert told.count("\n") == len(parts) and all(f"no {part};" in told for part in parts)


@pytest.mark.parametrize("norm, head", [("norm", "head.1.weight"), ("fc_norm", "head.weight")])
def test_an_mae_classifier_gives_its_encoder(norm, head):
    """A linear probe, and a fine-tuned model: it has fc_norm in place of norm."""
    state = without(weights_of("mae"), "decoder", "mask_token") | {head: torch.ones(10, 32)}
    state |= {f"{norm}.{kind}": state.pop(f"norm.{kind}") for kind in ("weight", "bias")}
    assert_encodes_as_recorded("mae", released("mae", {"model": state}))


def test_a_capi_file_may_hold_a_head_and_be_in_bf16():
    head = {"head.layer.weight": torch.ones(16, 24), "head.layer.bias": torch.ones(16)}
    state = {key: t.bfloat16() for key, t in (weights_of("capi") | head).items()}
    model, freqs = released("capi", state), "backbone.encoder.blocks.0.residual1.fn.rope.freqs"
    assert torch.equal(model.teacher.rotary, state[freqs].float())
    assert (model.cluster_head.layer.weight == 1).all()


@pytest.mark.parametrize("name", ["mae", "semantic_mim_hog"])
def test_a_file_that_needs_code_is_refused_with_a_command_that_extracts_it(tmp_path, name):
    file, path = wrapped(name, weights_of(name)), tmp_path / "it's $HOME.pth"  # it needs quotes
    torch.save(file | {"args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(BadInput, match="holds code.* you trust") as refused:
        read_checkpoint(path)
    command = shlex.quote(sys.executable) + str(refused.value).partition(": python")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert_encodes_as_recorded(name, released(name, read_checkpoint(tmp_path / "weights.pt")))


@pytest.mark.parametrize("name", RUNS)
def test_evaluate_takes_a_file_as_released(tmp_path, monkeypatch, capsys, name):
    module, path = RUNS[name], tmp_path / "released.pth"

    class Small(module.Model):  # `evaluate` does not know the sizes of so small an encoder
        def __init__(self, **_):
            super().__init__(**load_fixture(name)["config"])
    monkeypatch.setattr(module, "Model", Small)
    torch.save(wrapped(name, weights_of(name)), path)
    flags = f"--method {module.__name__} --data shapes:32 --probe knn"
    assert invoke(monkeypatch, capsys, "evaluate", [path, *flags.split()])[0] == 0
    cfg = evaluate.Config(checkpoint=str(path), method=module.__name__)
    assert_encodes_as_recorded(name, evaluate.load_model(cfg)[2])
