"""evaluate.py: probes, protocol, masks, export, pictures, and what it refuses."""

import dataclasses
import functools
import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
import evaluate
from common import BadInput, Pixels
from conftest import (METHODS, MODULES, contents, each_method, printed_commands, started,
                      write_images)
from programs import invoke
from test_programs import PAGES


def checkpoint(path, method="mae", flags=""):
    """A checkpoint of the toy model, as a run leaves it."""
    cfg, _ = started(method, flags, data="shapes:48")
    torch.save({"method": method, "config": dataclasses.asdict(cfg), "step": 1,
                "model": MODULES[method].build(cfg).state_dict()}, path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program in this process -> exit status, its lines on stderr without progress bars."""
    def program(*argv):
        return invoke(monkeypatch, capsys, "evaluate", [*argv, "--device", "cpu"])
    monkeypatch.setattr(evaluate, "GRID", evaluate.GRID[::6])  # three heads; more take long
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

    def scores_with(y):
        sets = [Pixels(torch.zeros(len(y), 1, 1, 1), {"kind": y}) for y in (y, truth)]
        scores, _ = evaluate.probe_images(probe, x, queries, *sets, evaluate.Config(epochs=60))
        return [*scores.values()]
    (x, y), (queries, truth) = blobs(600, 0), blobs(400, 1)
    if probe == "attentive":  # tokens, of which only the first tells the class
        x, queries = (torch.stack([t, t.flip(1)], 1) for t in (x, queries))
    assert all(score == 100 for score in scores_with(y))
    shuffled = scores_with(y[torch.randperm(len(y))])
    assert all(score < 45 for score in shuffled)


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
    path = checkpoint(tmp_path / "last.pt", method)
    assert run(path, "--probe", *evaluate.PROBES, "--picture", "--epochs", 1, "--finetune-epochs",
               1, "--amp", "off")[0] == 0
    report = report_of(path)
    assert set(report["scores"]) == {"trained", "untrained", "raw"}
    for probe in evaluate.PROBES:
        names = [name for name in report["scores"]["trained"] if name.startswith(probe)]
        assert names and all(0 <= report["scores"]["trained"][name] <= 100 for name in names)
    protocol = report["protocol"]
    assert protocol["method"] == method and protocol["test"] == 12
    assert protocol["encode"] == " ".join(MODULES[method].Model.encode.__doc__.split())
    assert list(tmp_path.glob("eval_*.png")) and not list(tmp_path.glob("*.part"))


@each_method
def test_pool_and_layer_choose_the_features(tmp_path, method):
    model, images = loaded(checkpoint(tmp_path / "last.pt", method))[2], torch.randn(2, 3, 32, 32)

    def encoded(**flags):
        return evaluate.encoder_of(model, evaluate.Config(**flags))(images)
    pooled, patches = model.encode(images)
    own, tokens = encoded()
    assert torch.equal(own, pooled) and torch.equal(tokens, patches)
    assert torch.equal(encoded(pool="mean")[0], patches.mean(1))
    assert encoded(pool="both", layer=0)[0].shape == (2, 64)
    with pytest.raises(BadInput, match="--layer 2"):
        encoded(layer=2)


def test_finetuning_learns_and_leaves_the_model_as_it_was(tmp_path):
    _, trained, model, _ = loaded(checkpoint(tmp_path / "last.pt"))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    cfg, run = common.start(trained)
    data, scores = common.load_data(cfg, run)[0], []
    for rate in (0.0, 1e-2):
        flags = evaluate.Config(finetune_lr=rate, finetune_epochs=40)
        scores.append(evaluate.finetune(model, data, data, flags, cfg, run)[0]["kind"])
    assert scores[1] > scores[0]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# -- test sets and files

def test_without_a_labelled_val_every_tenth_image_is_scored(tmp_path, run):
    for name in "ab":
        write_images(tmp_path / "set" / name, 12)
    path = checkpoint(tmp_path / "last.pt")
    (tmp_path / "last.eval.json").write_text('{"before": 3}')  # damaged, but that does not matter
    for flags in ([], ["--held-out"]):
        assert run(path, "--data", tmp_path / "set", "--probe", "knn", *flags)[0] == 0
    report = report_of(path)
    assert (report["protocol"]["train"], report["protocol"]["test"]) == (22, 2)
    assert report["protocol"]["test_set"].startswith("every tenth")
    assert report["before"][0]["scores"] == report["scores"]


def test_pictures_need_no_labels(tmp_path, run):
    path = checkpoint(tmp_path / "last.pt")
    write_images(tmp_path / "flat", 4)
    for more in ([], ["--img-size", 48]):
        assert run(path, "--data", tmp_path / "flat", "--picture", *more)[0] == 0
    assert (tmp_path / "eval_features.png").exists() and not (tmp_path / "last.eval.json").exists()


def test_a_replaced_image_has_its_own_label(tmp_path):
    for name in "ab":
        write_images(tmp_path / name, 2)
    (tmp_path / "a/001.png").write_bytes(b"")
    cfg, run = started(data=str(tmp_path), batch_size=1)
    data, _ = common.load_data(cfg, run)
    evaluate.extract(common.raw_pixels, "pooled", data, cfg, run)
    assert data.labels["class"].tolist() == [0, 1, 1, 1]


# -- a label per pixel

def masked_folder(root, labels=4, count=6):
    for split in ("train", "val"):
        write_images(root / split, count)
        (root / f"{split}annot").mkdir()
        for i in range(count):
            mask = np.random.RandomState(i).randint(0, labels, (40, 36)).astype(np.uint8)
            Image.fromarray(mask).save(root / f"{split}annot/{i:03}.png")
    return root


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

def read_safetensors(path):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return {name: torch.frombuffer(bytearray(data[start:][slice(*entry["data_offsets"])]),
                                   dtype=torch.float32).view(entry["shape"])
            for name, entry in json.loads(data[8:start]).items()}


@pytest.mark.parametrize("method, flags", [
    ("mae", ""), ("latent_mim", ""), ("pilamim", ""), ("semantic_mim", "--num-proxy 1"),
    ("semantic_mim", "--num-proxy 1 --target dvae --vocab 16 --tokenizer x")])
def test_an_exported_encoder_computes_the_same_features(tmp_path, run, monkeypatch, method, flags):
    """MAE's encoder has timm's names, but no position for CLS. For BEiT's blocks it takes timm."""
    path, told = checkpoint(tmp_path / "last.pt", method, flags), []
    monkeypatch.setattr(evaluate, "print", told.append, raising=False)
    monkeypatch.setattr(MODULES["mae"], "norm", MODULES[method].norm)  # has another eps
    for name in ("e.pt", "e.safetensors"):
        assert run(path, "--export", tmp_path / name)[0] == 0
    state, model = torch.load(tmp_path / "e.pt", weights_only=True), loaded(path)[2]
    torch.testing.assert_close(read_safetensors(tmp_path / "e.safetensors"), state, rtol=0, atol=0)
    images = torch.randn(2, 3, 32, 32)
    patches = model.encode(images)[1]
    if method == "latent_mim":  # encode stops before the final norm
        patches = model.encoder.norm(patches)
    if "dvae" not in flags:
        cls = state["cls_token"] + state["pos_embed"][:, :1]
        sizes = dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_depth=1)
        mae = MODULES["mae"].MAE.from_released(state | {"cls_token": cls}, **sizes)
        torch.testing.assert_close(mae.encode(images)[1], patches, rtol=1e-4, atol=1e-4)
    if importlib.util.find_spec("timm"):
        import timm.models.vision_transformer
        call = told[0].splitlines()[-1]
        vit = eval(call, {"timm": timm, "functools": functools, "torch": torch}).eval()
        vit.load_state_dict(state)
        theirs = vit.forward_features(images)[:, 1:]
        torch.testing.assert_close(theirs, patches, rtol=1e-5, atol=1e-5)


# -- what it refuses

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the wrong invocations below name, in one folder."""
    root = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluate.MODELS, "toy", (32, 2, 2))
        for method in ("mae", "capi", "semantic_mim"):
            checkpoint(root / f"{method}.pt", method)
    state = torch.load(root / "mae.pt", weights_only=True)
    torch.save({"model": state["model"]}, root / "released.pth")
    torch.save(state | {"method": "../x"}, root / "path.pt")
    torch.save(state | {"method": "json"}, root / "module.pt")
    state["model"]["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    torch.save(state, root / "nan.pt")
    write_images(root / "flat", 4)
    for name in "ab":
        write_images(root / "classes" / name, 12)
    masked_folder(root / "masked")
    shutil.copytree(root / "masked/trainannot", root / "postscript")
    mask = next((root / "postscript").rglob("*.png"))
    mask.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return root


WRONG = [  # flags, what the one line says
    ("none.pt", "none.pt: no such file"), ("flat/000.png", "000.png: damaged"),
    ("path.pt", "path.pt|--method"), ("module.pt", "module.pt"),
    ("mae.pt --method capi", "mae.pt.* of mae.*--method"), ("released.pth", "--method"),
    ("released.pth --method pilamim", "released.pth"), ("released.pth --method ../x", "--method"),
    ("mae.pt --probe knnn", "--probe.*knnn"), ("mae.pt --layer 7", "--layer 7"),
    ("mae.pt --img-size 33", "--img-size 33"), ("mae.pt --masks a b c", "--masks takes"),
    ("mae.pt --data FILES/flat", "label"), ("mae.pt --data FILES/flat --held-out", "--held-out"),
    ("mae.pt --data FILES/classes --probe seg-knn", "seg-knn"),
    ("mae.pt --data FILES/masked --masks nowhere --probe seg-knn", "--masks|nowhere"),
    ("mae.pt --data FILES/masked --masks FILES/postscript --probe seg-knn", "cannot identify"),
    ("mae.pt --data FILES/masked --masks trainannot valannot --probe knn", "knn|label"),
    ("capi.pt --export x.pt", "--export"), ("semantic_mim.pt --export x.pt", "--export"),
    ("mae.pt --export FILES/mae.pt", "--export"), ("mae.pt --export FILES/no/x.pt", "no/x.pt"),
    ("mae.pt --export .", "--export .*folder"), ("mae.pt --masks a --ignore 256", "--ignore 256"),
    ("mae.pt --rows raw --probe attentive finetune", "--rows raw"),
    ("nan.pt", "not finite"), ("nan.pt --probe finetune --finetune-epochs 1", "not finite"),
    ("mae.pt --limit 1 --probe linear", "--limit"), ("mae.pt --finetune-lr nan", "--finetune-lr"),
]


@pytest.mark.parametrize("flags, text", WRONG, ids=[flags for flags, _ in WRONG])
def test_bad_input_is_one_line(files, tmp_path, monkeypatch, run, flags, text):
    monkeypatch.chdir(tmp_path)
    before = contents(files)
    name, *rest = flags.replace("FILES", str(files)).split()
    status, lines = run(files / name, *rest)
    assert status == 2 and len(lines) == 1 and re.search(text, lines[0]), lines
    assert contents(files) == before and not list(tmp_path.iterdir())


# -- printed commands

def commands():
    found = {c for text in (evaluate.__doc__, *PAGES.values()) for c in printed_commands(text)}
    return sorted(command for command in found if " evaluate.py" in command)


@pytest.mark.parametrize("command", commands())
def test_a_printed_command_runs(tmp_path, monkeypatch, run, command):
    """At toy size, on a toy checkpoint in place of the one that the command names."""
    monkeypatch.chdir(tmp_path)
    words = command.split()
    words = words[words.index("evaluate.py") + 1:]
    method = next((m for m in METHODS if f"runs/{m}" in words[0]), "mae")
    path, data, flags = checkpoint(tmp_path / "file.pt", method), tmp_path / "images", []
    if "--masks" in words:
        masked_folder(data)
    else:
        for folder in ("train/a", "train/b", "val/a", "val/b"):
            write_images(data / folder, 3)
    if "--method" in words:  # a file of the authors, with the paper's decoder left out
        state = torch.load(path, weights_only=True)["model"]
        state = {name: t for name, t in state.items() if not re.match("decoder|mask_token", name)}
        torch.save({"model": state}, path)
        monkeypatch.setitem(evaluate.MODELS, "large", (32, 2, 2))
        flags = ["--patch-size", "8"]
    if "--export" not in words:
        flags += ["--img-size", "32", "--epochs", "1", "--finetune-epochs", "1"]
    if "--data" not in words:
        words += ["--data", "shapes:48"]
    words = [str(data) if word == "DIR" else word for word in words[1:]]
    assert run(path, *words, *flags)[0] == 0
