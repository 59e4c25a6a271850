"""evaluate.py: probes, protocol, released files, masks, export, pictures, and what it refuses."""

import dataclasses
import functools
import inspect
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import common
import evaluate
from common import BadInput, Pixels, main
from conftest import (METHODS, MODULES, ROOT, each_method, printed_commands, tiny,
                      write_images)

TEACHERS = {"latent_mim": {"encoder.": "target_encoder."},
            "capi": {"student.backbone.": "teacher.backbone."}}
CHANGES = {"capi": dict(clusters=8), "latent_mim": dict(proj_dim=32)}


def checkpoint(path, method="mae", **changes):
    """A checkpoint of the toy model, as a run leaves it."""
    module = MODULES[method]
    cfg = tiny("nowhere", method, data="shapes:48", mean=(0.5,) * 3, std=(0.25,) * 3, **changes)
    if hasattr(module, "with_recipe"):
        cfg = module.with_recipe(cfg)
    torch.save({"method": method, "config": dataclasses.asdict(cfg), "step": 1,
                "model": module.build(cfg).state_dict()}, path)
    return path


@pytest.fixture
def run(monkeypatch):
    """Run the program in this process -> exit status."""
    def program(*argv):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv), "--device", "cpu"])
        with pytest.raises(SystemExit) as leaving:
            main(evaluate.evaluate, evaluate.Config, evaluate.__doc__)
        return leaving.value.code
    return program


def report_of(path):
    return json.loads(path.with_name(f"{path.stem}.eval.json").read_text())


def loaded(path, **changes):
    return evaluate.load_model(evaluate.Config(checkpoint=str(path), **changes))


# -- probes

@pytest.mark.parametrize("probe", ["knn", "linear", "attentive"])
def test_separate_classes_score_100_and_shuffled_labels_score_chance(probe):
    def blobs(count, seed):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(4, (count,), generator=generator)
        return torch.eye(4, 16)[y] + 0.1 * torch.randn(count, 16, generator=generator), y

    def labelled(y):
        return Pixels(torch.zeros(len(y), 1, 1, 1), {"kind": y})
    (x, y), (queries, truth) = blobs(600, 0), blobs(400, 1)
    if probe == "attentive":  # tokens, of which only the first tells the class
        x, queries = (torch.stack([t, t.flip(1)], 1) for t in (x, queries))
    cfg = evaluate.Config(epochs=60)
    scores, _ = evaluate.probe_images(probe, x, queries, labelled(y), labelled(truth), cfg)
    assert all(score == 100 for score in scores.values())
    again, _ = evaluate.probe_images(probe, x, queries, labelled(y), labelled(truth), cfg)
    assert again == scores
    shuffled = labelled(y[torch.randperm(len(y), generator=torch.Generator().manual_seed(3))])
    scores, _ = evaluate.probe_images(probe, x, queries, shuffled, labelled(truth), cfg)
    assert all(score < 45 for score in scores.values())


def test_mean_iou_by_hand():
    predicted = torch.tensor([[0, 1, 1], [1, 0, 0]])
    truth = torch.tensor([[0, 0, 1], [1, 2, 255]])  # 255 does not count
    iou, pixels = evaluate.mean_iou(predicted, truth, 4, 255)
    assert iou == pytest.approx(100 * (1 / 3 + 2 / 3) / 3) and pixels == pytest.approx(60)


def test_patch_labels_by_hand():
    maps = torch.tensor([[[0, 0, 2, 9], [0, 1, 9, 9], [9, 9, 1, 1], [9, 9, 1, 1]]])
    shares = evaluate.patch_labels(maps, 2, 3, 9)
    assert shares.tolist() == [[[0.75, 0.25, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]]


@each_method
def test_every_method_evaluates_with_every_probe(tmp_path, run, method):
    path = checkpoint(tmp_path / "last.pt", method, **CHANGES.get(method, {}))
    assert run(path, "--probe", *evaluate.PROBES, "--picture", "--epochs", 1,
               "--finetune-epochs", 1, "--amp", "off") == 0
    report = report_of(path)
    assert set(report["scores"]) == {"trained", "untrained", "raw"}
    for probe in evaluate.PROBES:
        names = [name for name in report["scores"]["trained"] if name.startswith(probe)]
        assert names and all(0 <= report["scores"]["trained"][name] <= 100 for name in names)
    protocol = report["protocol"]
    assert protocol["method"] == method and protocol["test_set"] == "its own"
    assert protocol["encode"] == " ".join(MODULES[method].Model.encode.__doc__.split())
    assert list(tmp_path.glob("eval_*.png"))


@each_method
def test_pool_and_layer_choose_the_features(tmp_path, method):
    path = checkpoint(tmp_path / "last.pt", method, **CHANGES.get(method, {}))
    model = loaded(path)[2]
    images = torch.randn(2, 3, 32, 32)
    pooled, patches = model.encode(images)
    own, tokens = evaluate.encoder_of(model, evaluate.Config())(images)
    assert torch.equal(own, pooled) and torch.equal(tokens, patches)
    mean, _ = evaluate.encoder_of(model, evaluate.Config(pool="mean"))(images)
    assert torch.equal(mean, patches.mean(1))
    both, _ = evaluate.encoder_of(model, evaluate.Config(pool="both", layer=0))(images)
    assert both.shape == (2, 64)
    with pytest.raises(BadInput, match="--layer 2"):
        evaluate.encoder_of(model, evaluate.Config(layer=2))


def test_finetuning_heeds_its_learning_rate(tmp_path):
    """Without a rate the encoder stays as it is, and the head with it."""
    path = checkpoint(tmp_path / "last.pt")
    _, trained, model, _ = loaded(path)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    cfg, run = common.start(trained)
    data = common.load_data(cfg, run)[0]
    weights = []
    for rate in (0.0, 1e-3):
        changed = evaluate.Config(finetune_lr=rate, finetune_epochs=1)
        score, _ = evaluate.finetune(model, data, data, changed, cfg, run)
        weights.append(score)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(0 <= value <= 100 for score in weights for value in score.values())


# -- test sets and protocol

def test_without_a_labelled_val_every_tenth_image_is_scored(tmp_path, run):
    for name in "ab":
        write_images(tmp_path / "set" / name, 12)
    path = checkpoint(tmp_path / "last.pt")
    reports = []
    for flags in ([], ["--held-out"]):
        assert run(path, "--data", tmp_path / "set", "--probe", "knn", *flags) == 0
        reports.append(report_of(path))
    protocol = reports[0]["protocol"]
    assert (protocol["train"], protocol["test"]) == (22, 2)
    assert protocol["test_set"].startswith("every tenth")
    assert reports[0]["scores"] == reports[1]["scores"]


def test_earlier_results_are_kept_and_a_damaged_file_does_not_matter(tmp_path, run):
    path, results = checkpoint(tmp_path / "last.pt"), tmp_path / "last.eval.json"
    for damage in ("{torn", "[]", "3", '{"before": 3}'):
        results.write_text(damage)
        assert run(path, "--probe", "knn", "--rows", "raw") == 0
    assert run(path, "--probe", "knn", "--rows", "raw") == 0
    assert report_of(path)["before"] and not list(tmp_path.glob("*.part"))


def test_pictures_need_no_labels(tmp_path, run):
    path = checkpoint(tmp_path / "last.pt")
    write_images(tmp_path / "flat", 4)
    assert run(path, "--data", tmp_path / "flat", "--picture") == 0
    assert run(path, "--data", tmp_path / "flat", "--picture", "--img-size", 48, "--images",
               tmp_path / "flat/001.png") == 0
    assert (tmp_path / "eval_pca.png").exists() and not (tmp_path / "last.eval.json").exists()


# -- released files

@pytest.mark.parametrize("name, method", [
    ("mae", "mae"), ("latent_mim", "latent_mim"), ("semantic_mim_hog", "semantic_mim"),
    ("pilamim", "pilamim"), ("capi", "capi")])
def test_a_released_file_evaluates(tmp_path, monkeypatch, run, name, method):
    recorded = torch.load(ROOT / f"tests/fixtures/{name}.pt", weights_only=True)
    weights = dict(recorded["initial"])
    for student, teacher in TEACHERS.get(name, {}).items():  # these teachers start as a copy
        weights |= {key.replace(student, teacher): t for key, t in recorded["initial"].items()
                    if key.startswith(student)}
    kind = MODULES[method].Model
    init, known = kind.__init__, inspect.signature(kind.__init__).parameters
    small = {key: value for key, value in recorded["config"].items() if key in known}
    monkeypatch.setattr(kind, "__init__", lambda self, **sizes: init(self, **{**small, **sizes}))
    torch.save({"model": weights, "state_dict": weights}, tmp_path / "released.pth")
    assert run(tmp_path / "released.pth", "--method", method, "--data", "shapes:32",
               "--probe", "knn") == 0


# -- a label per pixel

def masked_folder(root, labels=4, count=6):
    for split in ("train", "val"):
        write_images(root / split, count)
        (root / f"{split}annot").mkdir()
        for i in range(count):
            mask = np.random.RandomState(i).randint(0, labels, (40, 36)).astype(np.uint8)
            Image.fromarray(mask).save(root / f"{split}annot/{i:03}.png")
    return root


def test_a_folder_with_masks_is_segmented(tmp_path, run):
    path, root = checkpoint(tmp_path / "last.pt"), masked_folder(tmp_path / "set")
    assert run(path, "--data", root, "--probe", "seg-knn", "seg-linear", "--epochs", 1,
               "--ignore", 3, "--masks", "trainannot", "valannot") == 0
    assert 0 <= report_of(path)["scores"]["trained"]["seg-linear mIoU"] <= 100


def test_masks_are_numbers_per_pixel():
    grey = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    sixteen = Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3))
    for mask in (grey, grey.convert("RGB"), sixteen):
        assert evaluate.labels_of(mask).tolist() == [[0, 1, 2], [3, 4, 5]]
    colours = Image.merge("RGB", [grey, grey.point(lambda v: v + 1), grey])
    large = Image.fromarray(np.full((2, 3), 300, np.uint16))
    for mask in (colours, large, Image.fromarray(np.full((2, 3), np.nan, np.float32))):
        with pytest.raises(ValueError):
            evaluate.labels_of(mask)


# -- export

EXPORTED = [("mae", {}), ("latent_mim", {}), ("pilamim", {}), ("semantic_mim", {"num_proxy": 1}),
            ("semantic_mim", {"num_proxy": 1, "target": "dvae", "vocab": 16, "tokenizer": "x"})]


@pytest.mark.parametrize("method, changes", EXPORTED)
def test_export_writes_one_state_as_pt_and_as_safetensors(tmp_path, run, method, changes):
    path = checkpoint(tmp_path / "last.pt", method, **CHANGES.get(method, {}) | changes)
    assert run(path, "--export", tmp_path / "e.pt") == 0
    assert run(path, "--export", tmp_path / "e.safetensors") == 0
    state = torch.load(tmp_path / "e.pt", weights_only=True)
    data = (tmp_path / "e.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__", None)
    assert header.keys() == state.keys() and not list(tmp_path.glob("*.part"))
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        raw = bytearray(data[8 + length + first:8 + length + end])
        tensor = torch.frombuffer(raw, dtype=torch.float32).view(entry["shape"])
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("method, changes", EXPORTED)
def test_timm_computes_the_same_features(tmp_path, run, capsys, method, changes):
    timm = pytest.importorskip("timm")
    path = checkpoint(tmp_path / "last.pt", method, **CHANGES.get(method, {}) | changes)
    assert run(path, "--export", tmp_path / "e.pt") == 0
    call = capsys.readouterr().out.strip().splitlines()[-1]
    call = call[call.index("timm."):]
    vit = eval(call, {"timm": timm, "functools": functools, "torch": torch}).eval()
    vit.load_state_dict(torch.load(tmp_path / "e.pt", weights_only=True))
    model = loaded(path)[2]
    images = torch.randn(2, 3, 32, 32)
    _, patches = model.encode(images)
    if method == "latent_mim":  # encode stops before the final norm
        patches = model.encoder.norm(patches)
    torch.testing.assert_close(vit.forward_features(images)[:, 1:], patches, rtol=1e-5, atol=1e-5)


# -- what it refuses

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the wrong invocations below name, in one folder."""
    root = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluate.MODELS, "toy", (32, 2, 2))
        for method in ("mae", "capi", "semantic_mim"):
            checkpoint(root / f"{method}.pt", method, **CHANGES.get(method, {}))
    state = torch.load(root / "mae.pt", weights_only=True)
    torch.save({"model": state["model"]}, root / "released.pth")
    torch.save(state | {"method": "../x"}, root / "path.pt")
    torch.save(state | {"method": "json"}, root / "module.pt")
    torch.save(state | {"config": 7}, root / "config.pt")
    state["model"]["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    torch.save(state, root / "nan.pt")
    write_images(root / "flat", 4)
    for name in "ab":
        write_images(root / "classes" / name, 12)
        write_images(root / "other/train" / name, 4)
        write_images(root / "other/val" / f"{name}x", 4)
    masked_folder(root / "masked")
    (root / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return root


WRONG = [  # flags, what the one line says
    ("none.pt", "none.pt"), ("path.pt", "path.pt|--method"), ("module.pt", "module.pt"),
    ("config.pt", "config.pt"), ("mae.pt --method capi", "mae.pt"),
    ("released.pth", "--method"), ("released.pth --method pilamim", "released.pth"),
    ("released.pth --method ../x", "--method"), ("mae.pt --probe knnn", "--probe"),
    ("mae.pt --layer 7", "--layer 7"), ("mae.pt --img-size 33", "--img-size 33"),
    ("mae.pt --masks a b c", "--masks"), ("mae.pt --data FILES/flat", "label"),
    ("mae.pt --data FILES/flat --held-out", "--held-out|label"),
    ("mae.pt --data FILES/classes --probe seg-knn", "seg-knn"),
    ("mae.pt --data FILES/masked --masks nowhere --probe seg-knn", "--masks|nowhere"),
    ("mae.pt --data FILES/masked --masks trainannot valannot --probe knn", "knn|label"),
    ("mae.pt --picture --images FILES/none.png", "none.png"),
    ("mae.pt --picture --images FILES/postscript.png", "postscript.png"),
    ("capi.pt --export x.pt", "--export"), ("semantic_mim.pt --export x.pt", "--export"),
    ("mae.pt --export FILES/mae.pt", "--export"), ("mae.pt --export FILES/no/x.pt", "no/x.pt"),
    ("nan.pt", "not finite"), ("nan.pt --probe finetune --finetune-epochs 1", "not finite"),
    ("mae.pt --limit 1 --probe linear", "--limit"), ("mae.pt --finetune-lr nan", "--finetune-lr"),
]


@pytest.mark.parametrize("flags, text", WRONG, ids=[flags for flags, _ in WRONG])
def test_bad_input_is_one_line(files, tmp_path, monkeypatch, capfd, run, flags, text):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in files.glob("*.p*")}
    name, *rest = flags.replace("FILES", str(files)).split()
    capfd.readouterr()
    assert run(files / name, *rest) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1 and re.search(text, lines[0]), lines
    assert {path: path.read_bytes() for path in files.glob("*.p*")} == before
    assert not list(tmp_path.iterdir())


# -- printed commands

def commands():
    texts = [evaluate.__doc__, (ROOT / "README.md").read_text()]
    texts += [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    found = {command for text in texts for command in printed_commands(text)}
    return sorted(command for command in found if " evaluate.py" in command)


@pytest.mark.parametrize("command", commands())
def test_a_printed_command_runs(tmp_path, monkeypatch, run, command):
    """At toy size, on a toy checkpoint in place of the one that the command names."""
    monkeypatch.chdir(tmp_path)
    program, *words = command.split()
    words = words[words.index("evaluate.py") + 1:]
    method = next((m for m in METHODS if f"runs/{m}" in words[0]), "mae")
    data = masked_folder(tmp_path / "images") if "--masks" in words else tmp_path / "images"
    for split in () if "--masks" in words else ("train", "val"):
        for name in "ab":
            write_images(data / split / name, 3)
    if "--method" in words:
        released = torch.load(checkpoint(tmp_path / "run.pt"), weights_only=True)["model"]
        torch.save({"model": released}, tmp_path / "file.pt")
        monkeypatch.setitem(evaluate.MODELS, "large", (32, 2, 2))
        flags = ["--patch-size", "8", "--img-size", "32"]
        small = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2)
        init = MODULES["mae"].Model.__init__
        monkeypatch.setattr(MODULES["mae"].Model, "__init__",
                            lambda self, **sizes: init(self, **{**small, **sizes}))
    else:
        checkpoint(tmp_path / "file.pt", method, **CHANGES.get(method, {}))
        flags = ["--img-size", "32"]
    words = [str(data) if word == "DIR" else word for word in words[1:]]
    if "--export" not in words:
        flags += ["--epochs", "1", "--finetune-epochs", "1"]
    assert run(tmp_path / "file.pt", *words, *flags) == 0
