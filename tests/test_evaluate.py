"""evaluate.py: probes against toy features and brute force, checkpoints of all five, what is wrong in one line."""

import dataclasses
import functools
import importlib
import json
import shlex
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import capi
import common
import evaluate
from common import BadInput, knn_predict, main, save_picture
from conftest import FIXTURES, ROOT, noise_image, printed_commands, run_program, write_images
from evaluate import (Config, METHODS, encoder_of, export_encoder, fit_heads, labels_of, layer_of, load_model, mean_iou,
                      patch_labels, probe_images, timms_vit, tsne)

SMALL = {"mae": dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2),
         "latent_mim": dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1,
                            decoder_heads=2, num_visible=4, proj_dim=32),
         "semantic_mim": dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, num_proxy=1),
         "pilamim": dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2),
         "capi": dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_depth=1, registers=4, clusters=8)}


def small(method):
    torch.manual_seed(0)
    return getattr(importlib.import_module(method), METHODS[method][0])(**SMALL[method]).eval()


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        main(evaluate.evaluate, Config, evaluate.__doc__)
    return stop.value.code


def checkpoint(path, method, **changes):
    """A run's last.pt without the run: the toy encoder of conftest, data a handful of shapes."""
    module = importlib.import_module(method)
    own = {"capi": dict(clusters=8), "latent_mim": dict(proj_dim=32)}.get(method, {})
    cfg = dataclasses.replace(module.Config(), model="toy", data="shapes:48", patch_size=8, mean=(0.5,) * 3, std=(0.25,) * 3,
                              **own, **changes)
    cfg = module.with_recipe(cfg) if hasattr(module, "with_recipe") else cfg
    torch.save({"method": method, "config": dataclasses.asdict(cfg), "step": 1, "model": module.build(cfg).state_dict()}, path)
    return path


# -- measures ---------------------------------------------------------------------------------------------

def blobs(n, classes=4, dim=16, spread=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    return torch.eye(classes, dim)[y] + spread * torch.randn(n, dim, generator=g), y


@pytest.mark.parametrize("probe", ["knn", "linear", "attentive"])
def test_what_separates_scores_100_and_shuffled_labels_score_chance(probe):
    (x, y), (q, truth) = blobs(600), blobs(400, seed=1)
    if probe == "attentive":
        x, q = (torch.stack([t, t.flip(1)], 1) for t in (x, q))
    cfg = Config(epochs=100)
    scores, _ = probe_images(probe, x, {"kind": y}, q, {"kind": truth}, cfg)
    assert all(score == 100 for score in scores.values()), scores
    again, _ = probe_images(probe, x, {"kind": y}, q, {"kind": truth}, cfg)
    assert scores == again
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(3))]
    scores, _ = probe_images(probe, x, {"kind": shuffled}, q, {"kind": truth}, cfg)
    assert all(score < 45 for score in scores.values()), scores  # chance is 25


def test_the_grid_learns_what_one_weak_rate_does_not():
    (x, y), (q, truth) = blobs(600, spread=0.5), blobs(400, spread=0.5, seed=1)
    predict, chosen = fit_heads(x, y, 4, Config(epochs=10))
    assert 100 * (predict(q).argmax(1) == truth).float().mean() > 75
    assert chosen["rate"] in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2) and chosen["held_out"] > 60


def test_a_head_takes_two_images():
    with pytest.raises(BadInput, match="two images"):
        fit_heads(torch.randn(1, 4), torch.zeros(1, dtype=torch.long), 2, Config())


def test_knn_is_brute_force():
    g = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(300, 8, generator=g), torch.randn(40, 8, generator=g)
    labels = torch.randint(5, (300,), generator=g)
    for k in (1, 20):
        for query, predicted in zip(queries, knn_predict(gallery, labels, queries, k)):
            cosine = [(F.cosine_similarity(query, row, dim=0).item(), label) for row, label in zip(gallery, labels.tolist())]
            votes = [0.0] * 5
            for value, label in sorted(cosine, reverse=True)[:k]:
                votes[label] += torch.tensor(value / 0.07).exp().item()
            assert votes.index(max(votes)) == predicted


def test_mean_iou_by_hand():
    truth = torch.tensor([[0, 0, 1], [1, 2, 255]])
    predicted = torch.tensor([[0, 1, 1], [1, 0, 0]])  # the last pixel does not count
    miou, right = mean_iou(predicted, truth, 4, 255)  # class 0: 1 of 3, class 1: 2 of 3, class 2: 0 of 1, class 3 nowhere
    assert miou == pytest.approx(100 * (1 / 3 + 2 / 3 + 0) / 3) and right == pytest.approx(60)


def test_patch_labels_by_hand():
    maps = torch.tensor([[[0, 0, 2, 9], [0, 1, 9, 9], [9, 9, 1, 1], [9, 9, 1, 1]]])
    shares = patch_labels(maps, 2, 3, 9)
    assert shares.tolist() == [[[0.75, 0.25, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]]


def test_tsne_keeps_clusters_together():
    x, y = blobs(120, spread=0.05)
    points = tsne(x, steps=200)
    distance = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert (y[distance.argmin(1)] == y).float().mean() > 0.95 and points.isfinite().all()


# -- checkpoints ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_features_are_encodes(method):
    model, images = small(method), torch.randn(2, 3, 32, 32)
    pooled, patches = model.encode(images)
    mine, tokens = encoder_of(model, method, "own", -1)(images)
    assert torch.equal(mine, pooled) and torch.equal(tokens, patches)
    assert torch.equal(encoder_of(model, method, "mean", -1)(images)[0], patches.mean(1))
    assert encoder_of(model, method, "both", 0)(images)[0].shape == (2, 64)
    first, last = (encoder_of(model, method, "mean", layer)(images)[0] for layer in (0, 1))
    assert not torch.allclose(first, last)
    with pytest.raises(BadInput, match="--layer 2"):
        encoder_of(model, method, "own", 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method_evaluates(tmp_path, monkeypatch, capsys, method):
    path = checkpoint(tmp_path / "last.pt", method)
    probes = ["--probe", *(evaluate.PROBES if method in ("mae", "capi") else ("knn", "seg-knn"))]
    assert run(monkeypatch, path, *probes, "--picture", "--epochs", 1, "--finetune-epochs", 1, "--amp", "off") == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "last.eval.json").read_text())
    assert report["protocol"]["method"] == method and "encode" in report["protocol"]
    assert set(report["scores"]) == {"trained", "untrained", "raw pixels"}
    for row in ("trained", "untrained", "raw pixels"):
        assert {"knn kind k=1", "knn count k=20", "seg-knn mIoU"} <= set(report["scores"][row])
    assert all(0 <= score <= 100 for row in report["scores"].values() for score in row.values())
    pictures = {p.name for p in tmp_path.glob("*.png")}
    assert {"eval_pca.png", "eval_tsne_kind.png", "eval_tsne_patches.png"} <= pictures and all(name in out for name in pictures)
    assert ("eval_reconstruction.png" in pictures) == (method in ("mae", "pilamim"))
    assert ("eval_attention.png" in pictures) == (method == "semantic_mim")


def test_pool_and_layer_are_in_the_protocol_and_rows_are_those_asked_for(tmp_path, monkeypatch):
    path, told = checkpoint(tmp_path / "last.pt", "mae"), []
    for flags in (["--pool", "cls"], ["--pool", "mean"], ["--pool", "mean", "--layer", 0], ["--pool", "mean", "--layer", 0]):
        assert run(monkeypatch, path, "--probe", "knn", "--rows", "trained", *flags) == 0
        told.append(json.loads((tmp_path / "last.eval.json").read_text()))
    assert [len(t.pop("before", [])) for t in told] == [0, 1, 2, 3] and told[3] == told[2]
    assert json.loads((tmp_path / "last.eval.json").read_text())["before"] == told[2::-1]  # no score is lost
    chosen = [(t["protocol"]["pool"], t["protocol"]["layer"]) for t in told]
    assert chosen == [("cls", -1), ("mean", -1), ("mean", 0), ("mean", 0)]
    scores = [t["scores"].pop("trained") for t in told]
    assert not any(t["scores"] for t in told)  # --rows had them left out
    assert scores[0] != scores[1] != scores[2] == scores[3]


@pytest.mark.parametrize("given", [False, True])
def test_pictures_without_labels(tmp_path, monkeypatch, capsys, given):
    """A flat folder has nothing to probe with, and pictures are what its owner wants. A probe that is asked for is refused."""
    folder, path = write_images(tmp_path / "flat", 4), checkpoint(tmp_path / "last.pt", "mae")
    flags = ["--data", folder, "--picture", *["--images", folder / "001.png"] * given]
    assert run(monkeypatch, path, *flags) == 0
    out, pictures = capsys.readouterr().out, {p.name for p in tmp_path.glob("*.png")}
    assert {"eval_pca.png", "eval_reconstruction.png", "eval_tsne_patches.png"} == pictures and "pictures only" in out
    assert not (tmp_path / "last.eval.json").exists() and all(name in out for name in pictures)
    assert run(monkeypatch, path, *flags, "--probe", "knn") == 2 and "needs labels" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["classes", "imagenet"])
def test_without_a_labelled_val_every_tenth_training_image_is_scored(tmp_path, monkeypatch, layout):
    """Class folders alone, or train/WNID/ beside a flat val/. `--held-out` splits the same way."""
    for name in ("a", "b"):
        write_images(tmp_path / "set" / ("train" if layout == "imagenet" else "") / name, 12)
    if layout == "imagenet":
        write_images(tmp_path / "set" / "val", 3)
    path, reports = checkpoint(tmp_path / "last.pt", "mae"), []
    for flags in ([], ["--held-out"]):
        assert run(monkeypatch, path, "--data", tmp_path / "set", "--probe", "knn", *flags) == 0
        reports.append(json.loads((tmp_path / "last.eval.json").read_text()))
    protocol = reports[0]["protocol"]
    assert protocol["test_set"].startswith("every tenth training image")
    assert (protocol["train"], protocol["test"]) == (22, 2)
    assert reports[0]["scores"] == reports[1]["scores"] and protocol == reports[1]["protocol"]


def test_a_val_with_class_folders_is_the_test_set(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_images(tmp_path / "set" / "train" / name, 12)
        write_images(tmp_path / "set" / "val" / name, 3)
    path = checkpoint(tmp_path / "last.pt", "mae")
    expectations = {(): ("its own", 24, 6), ("--held-out",): ("every tenth training", 22, 2)}
    for flags, expected in expectations.items():
        assert run(monkeypatch, path, "--data", tmp_path / "set", "--probe", "knn", *flags) == 0
        protocol = json.loads((tmp_path / "last.eval.json").read_text())["protocol"]
        assert protocol["test_set"].startswith(expected[0])
        assert (protocol["train"], protocol["test"]) == expected[1:]


@pytest.mark.parametrize("name, method", [("mae", "mae"), ("latent_mim", "latent_mim"), ("semantic_mim_hog", "semantic_mim"),
                                          ("pilamim", "pilamim"), ("capi", "capi")])
def test_released_files_evaluate(tmp_path, monkeypatch, name, method):
    if not (FIXTURES / f"{name}.pt").exists():
        pytest.skip("needs ../shared/fixtures")
    fixture = torch.load(FIXTURES / f"{name}.pt", weights_only=True)
    sizes = {k: v for k, v in fixture["config"].items() if k in ("heads", "decoder_heads", "img_size", "num_visible")}
    kind = getattr(importlib.import_module(method), METHODS[method][0])
    real = kind.from_released.__func__  # a released file does not tell its heads, and these have unusual ones
    monkeypatch.setattr(kind, "from_released", classmethod(lambda cls, state: real(cls, state, **sizes)))
    torch.save(fixture["state_dict"], tmp_path / "released.pth")
    assert run(monkeypatch, tmp_path / "released.pth", "--method", method, "--data", "shapes:32", "--probe", "knn") == 0
    method, _, model, untrained = load_model(tmp_path / "released.pth", method)
    images = fixture["inputs"]["images"]
    torch.testing.assert_close(model.encode(images)[1], fixture["outputs"]["features_patches"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(untrained.encode(images)[1], model.encode(images)[1])


def test_folders_with_masks(tmp_path, monkeypatch, capsys):
    path = checkpoint(tmp_path / "last.pt", "mae")
    for split in ("train", "val"):
        write_images(tmp_path / "data" / split, 6)
        (tmp_path / "data" / f"{split}annot").mkdir()
        for image in (tmp_path / "data" / split).iterdir():
            mask = (noise_image(1, 1) // 64).squeeze(0)
            to_pil_image(mask).save(tmp_path / "data" / f"{split}annot" / f"{image.stem}.png")
    flags = ["--data", tmp_path / "data", "--probe", "seg-knn", "seg-linear", "--epochs", 1, "--ignore", 3]
    assert run(monkeypatch, path, *flags, "--masks", "trainannot", "valannot") == 0
    assert 0 <= json.loads((tmp_path / "last.eval.json").read_text())["scores"]["trained"]["seg-linear mIoU"] <= 100
    # without val/ there is nothing to test on: the training images would be scored
    assert run(monkeypatch, path, *flags, "--data", tmp_path / "data" / "train", "--masks", tmp_path / "data" / "trainannot") == 2
    first = next((tmp_path / "data" / "valannot").iterdir())
    to_pil_image(noise_image(1, 1, 20, 18) // 64).save(first)  # half of the image's size
    assert run(monkeypatch, path, *flags, "--masks", "trainannot", "valannot") == 2
    assert "40 x 36 pixels and 20 x 18 of the mask" in capsys.readouterr().err
    first.unlink()
    assert run(monkeypatch, path, *flags, "--masks", "trainannot", "valannot") == 2


@pytest.mark.parametrize("labels", [[255], [0, 255]])
def test_masks_with_one_label(labels):
    """What is left beside --ignore 255 of masks in black and white."""
    maps = torch.tensor(labels).byte().repeat(2, 8, 16 // len(labels))
    with pytest.raises(BadInput, match="--masks.*--ignore 255"):
        evaluate.probe_pixels("seg-knn", torch.randn(2, 8, 4), maps, torch.randn(2, 8, 4), maps, 4, Config())


def test_masks_of_every_kind():
    classes = np.arange(6, dtype=np.uint8).reshape(2, 3)
    grey = Image.fromarray(classes)
    indices = Image.new("P", (3, 2))
    indices.putdata(classes.flatten().tolist())
    for mask in (grey, indices, Image.fromarray(classes.astype(np.uint16)), Image.fromarray(classes.astype(np.int32)),
                 grey.convert("LA"), grey.convert("RGB"), grey.convert("RGBA")):
        assert labels_of(mask).tolist() == classes.tolist() and labels_of(mask).dtype == torch.uint8, mask.mode
    assert labels_of(Image.fromarray(classes > 2)).tolist() == (classes > 2).tolist()
    with pytest.raises(ValueError, match="from 300 to 300"):
        labels_of(Image.fromarray(np.full((2, 3), 300, np.uint16)))
    with pytest.raises(ValueError, match="in colours"):
        labels_of(Image.merge("RGB", [grey, grey.point(lambda v: v + 1), grey]))


def test_a_set_with_masks_is_fetched(tmp_path, monkeypatch):
    """The folder for data may be there already, for other sets."""
    asked = []

    def voc(root, download, image_set):
        asked.append((root, download))
        if not download:
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        return [(to_pil_image(noise_image(i)), to_pil_image(noise_image(i, 1) // 64)) for i in range(6)]
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", voc)
    path = checkpoint(tmp_path / "last.pt", "mae")
    assert run(monkeypatch, path, "--data", "voc", "--data-root", tmp_path, "--probe", "seg-knn") == 0
    assert asked == [(str(tmp_path), False), (str(tmp_path), True)] * 2
    for chans, status in ((3, 0), (6, 2)):  # not said, the sets lie where those of the run lay
        path = checkpoint(tmp_path / f"{chans}.pt", "mae", data_root=f"{tmp_path}/the runs", in_chans=chans)
        assert run(monkeypatch, path, "--data", "voc", "--probe", "seg-knn", "--rows", "raw") == status
        assert asked[-1] == (f"{tmp_path}/the runs", True)


def test_no_cls_and_no_registers():
    model = importlib.import_module("capi").CAPI(**SMALL["capi"] | {"registers": 0}).eval()
    with pytest.raises(BadInput, match="neither CLS nor registers"):
        encoder_of(model, "capi", "cls", -1)(torch.randn(2, 3, 32, 32))


def test_held_out_never_sees_the_test_set(tmp_path, monkeypatch):
    """Every picture of train once: nine tenths to learn from, a tenth to be scored on; in memory and in a folder."""
    images, y = noise_image(0, height=40, width=8)[None].repeat(20, 1, 1, 1), torch.arange(20)
    train, test = evaluate.hold_out(common.Pixels(images, {"kind": y}))
    assert test.labels["kind"].tolist() == [9, 19] and sorted([*train.labels["kind"].tolist(), 9, 19]) == y.tolist()
    folder = common.Folder([f"{i}.png" for i in range(20)], (y // 5).tolist(), 3)
    train, test = evaluate.hold_out(folder)
    assert [test.name(i) for i in range(2)] == ["9.png", "19.png"] and len(train) == 18 and len(folder) == 20
    path = checkpoint(tmp_path / "last.pt", "mae")
    assert run(monkeypatch, path, "--probe", "knn", "seg-knn", "--held-out") == 0
    protocol = json.loads((tmp_path / "last.eval.json").read_text())["protocol"]
    assert (protocol["train"], protocol["test"]) == (44, 4) and "training" in protocol["test_set"]


@pytest.mark.parametrize("flags, text", [
    ("FILES/none.pt", "none.pt: no such file"), ("FILES/last.pt --method capi", "of mae, not of capi"),
    ("FILES/released.pth", "--method"), ("FILES/released.pth --method pilamim", "not a released PiLaMIM"),
    ("FILES/last.pt --probe knnn", "knnn"), ("FILES/last.pt --layer 7", "--layer 7"),
    ("FILES/last.pt --data FILES/flat", "labels"), ("FILES/last.pt --data FILES/classes --probe seg-knn", "label per pixel"),
    ("FILES/last.pt --data FILES/other", "classes that train/ has not"), ("FILES/last.pt --img-size 33", "--patch-size"),
    ("FILES/last.pt --masks a b c --data FILES/flat", "--masks"), ("FILES/capi.pt --export FILES/x.pt", "no timm ViT"),
    ("FILES/last.pt --data FILES/flat --held-out", "ten images"),
    ("FILES/last.pt --picture --images FILES/none.png", "none.png"), ("FILES/last.pt --pol cls", "--pool"),
])
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, flags, text):
    checkpoint(tmp_path / "last.pt", "mae")
    checkpoint(tmp_path / "capi.pt", "capi")
    torch.save({"model": small("mae").state_dict()}, tmp_path / "released.pth")
    write_images(tmp_path / "flat", 4)
    for name in ("a", "b"):
        write_images(tmp_path / "classes" / name, 12)
        write_images(tmp_path / "other" / "train" / name, 4)
        write_images(tmp_path / "other" / "val" / (name + "x"), 4)
    capsys.readouterr()
    status = run(monkeypatch, *flags.replace("FILES", str(tmp_path)).split())
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(error) == 1 and text in error[0], error


@pytest.mark.parametrize("method", METHODS)
def test_finetuning_drops_paths(tmp_path, monkeypatch, method):
    rates, real = [], capi.RotaryBlock.residual
    monkeypatch.setattr(common.DropPath, "forward", lambda self, x: rates.append(self.rate * self.training) or x)
    monkeypatch.setattr(capi.RotaryBlock, "residual", lambda self, *args: rates.append(self.drop_path * self.training)
                        or real(self, *args))
    path = checkpoint(tmp_path / "last.pt", method)
    assert run(monkeypatch, path, "--probe", "finetune", "--finetune-epochs", 1, "--amp", "off") == 0
    assert max(rates) == 0.1


@pytest.mark.parametrize("method, flags", [("semantic_mim", {"drop_path": 0.3}), ("capi", {"drop_path": 0.3})])
def test_finetuning_forgets_the_drop_path_of_the_pre_training(tmp_path, monkeypatch, method, flags):
    rates, real = [], capi.RotaryBlock.residual
    monkeypatch.setattr(common.DropPath, "forward", lambda self, x: rates.append(self.rate * self.training) or x)
    monkeypatch.setattr(capi.RotaryBlock, "residual", lambda self, *args: rates.append(self.drop_path * self.training)
                        or real(self, *args))
    path = checkpoint(tmp_path / "last.pt", method, **flags)
    assert run(monkeypatch, path, "--probe", "finetune", "--finetune-epochs", 1, "--amp", "off", "--drop-path", 0) == 0
    assert not any(rates)


@pytest.mark.parametrize("method", METHODS)
def test_the_layers_of_fine_tuning(method):
    model, prefix = small(method), METHODS[method][1] + "."
    inside = prefix.removesuffix("blocks.")
    layers = {name: layer_of(name, prefix, 2) for name, _ in model.named_parameters() if name.startswith(inside)}
    assert all(layer == 0 for name, layer in layers.items() if name.startswith((f"{inside}patch_embed", f"{inside}cls_token")))
    assert {layer for name, layer in layers.items() if name.startswith(prefix + "1.")} == {2}
    assert {layer for name, layer in layers.items() if name.startswith((f"{inside}norm.", f"{inside}predictor."))} == {3}


def test_finetuning_heeds_its_flags(tmp_path, monkeypatch):
    path, told, used = checkpoint(tmp_path / "last.pt", "mae"), [], []
    encoder, batches = evaluate.encoder_of, evaluate.train_batches
    monkeypatch.setattr(evaluate, "encoder_of", lambda *args: used.append(args[2:]) or encoder(*args))
    monkeypatch.setattr(evaluate, "train_batches", lambda cfg, *args, **labelled: used.append(cfg.seed) or
                        batches(cfg, *args, **labelled))
    for flags in ([], ["--rows", "untrained"], ["--seed", 7, "--limit", 32, "--pool", "mean", "--layer", 0]):
        assert run(monkeypatch, path, "--probe", "finetune", "--finetune-epochs", 2, "--amp", "off", *flags) == 0
        report = json.loads((tmp_path / "last.eval.json").read_text())
        told.append((report["scores"]["untrained"], report["chosen"]["untrained"]["finetune"]["batch"]))
    assert told[0] == told[1] and told[2][1] == 32 < told[1][1]  # the same, whatever was scored before
    assert used[-2:] == [("mean", 0), 7] and used[:4] == [("own", -1)] * 3 + [0]


def test_finetuning_a_set_that_is_read_as_it_goes(tmp_path, monkeypatch, capsys):
    sets = [common.Named("imagenette", [None] * 20, 3)] * 2
    monkeypatch.setattr(evaluate, "load_data", lambda cfg, run: sets)
    for flag in (["--probe", "finetune"], ["--held-out"]):
        assert run(monkeypatch, checkpoint(tmp_path / "last.pt", "mae"), *flag) == 2
        assert "held in memory" in capsys.readouterr().err


# -- leaving the house ------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["mae", "latent_mim", "semantic_mim", "pilamim"])
def test_export_under_timms_names(method):
    state, left = export_encoder(small(method), method)
    assert state["cls_token"].shape == (1, 1, 32) and state["pos_embed"].shape == (1, 17, 32)
    assert state["blocks.0.attn.qkv.bias"].shape == (96,) and not any(name.startswith("encoder.") for name in state)
    assert bool(left) and not any(name in state for name in left)


@pytest.mark.parametrize("method, layer_scale", [("mae", False), ("latent_mim", False), ("semantic_mim", False),
                                                 ("semantic_mim", True), ("pilamim", False)])
def test_timm_gives_the_same_features(method, layer_scale):
    timm = pytest.importorskip("timm")
    model, images = small(method), torch.randn(2, 3, 32, 32)
    model = type(model)(**SMALL[method], target="dvae", vocab=16).eval() if layer_scale else model
    state, _ = export_encoder(model, method)
    vit = eval(timms_vit(state, model, method), {"timm": timm, "functools": functools, "torch": torch}).eval()  # as printed
    vit.load_state_dict(state, strict=True)
    pooled, patches = model.encode(images)
    tokens = vit.forward_features(images)
    patches = model.encoder.norm(patches) if method == "latent_mim" else patches
    torch.testing.assert_close(tokens[:, 1:], patches, rtol=1e-5, atol=1e-5)
    if method in ("mae", "pilamim"):  # the others pool no CLS
        torch.testing.assert_close(tokens[:, 0], pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_patches_of_encode_are_row_major(method):
    """One patch of the image is changed: its own feature changes most."""
    model, images = small(method), torch.randn(2, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 8:16, 24:32] += torch.randn(2, 3, 8, 8)  # row 1, column 3 of a 4 x 4 grid
    before, after = (model.encode(x)[1] for x in (images, changed))
    assert ((after - before).norm(dim=-1).argmax(1) == 1 * 4 + 3).all()


@pytest.mark.parametrize("method", METHODS)
def test_encode_can_be_exported(method):
    class Encode(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model.encode(images)
    model, images = small(method), torch.randn(2, 3, 32, 32)
    program = torch.export.export(Encode(model).eval(), (images,))
    for mine, theirs in zip(program.module()(images), model.encode(images)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_pictures_of_given_files(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "last.pt", "mae")
    save_picture(tmp_path / "photo.png", [torch.rand(1, 3, 50, 60)])
    assert run(monkeypatch, path, "--probe", "knn", "--picture", "--images", tmp_path / "photo.png") == 0
    assert (tmp_path / "eval_reconstruction.png").exists()


# -- what is printed runs ---------------------------------------------------------------------------------

PRINTED = sorted({c for text in (evaluate.__doc__, (ROOT / "README.md").read_text()) for c in printed_commands(text)
                  if " evaluate.py" in c})


def test_printed_commands_are_found():
    assert len(PRINTED) >= 6 and any("--export" in c for c in PRINTED) and any(c.startswith("torchrun") for c in PRINTED)


@pytest.mark.parametrize("command", PRINTED)
def test_printed_command_runs(command, tmp_path, monkeypatch):
    """At toy size, on files that stand for those that are named."""
    for method in ("mae", "capi"):
        (tmp_path / "runs" / method).mkdir(parents=True)
        checkpoint(tmp_path / "runs" / method / "last.pt", method)
    torch.save({"model": small("mae").state_dict()}, tmp_path / "mae_pretrain_vit_base.pth")
    mae = importlib.import_module("mae")  # a released file does not tell its heads, and the toy's are unusual
    released = mae.MAE.from_released.__func__
    monkeypatch.setattr(mae.MAE, "from_released", classmethod(lambda cls, s: released(cls, s, heads=2, decoder_heads=2)))
    for split in ("train", "val"):
        if "--masks" in command:
            write_images(tmp_path / "DIR" / split, 4)
            (tmp_path / "DIR" / f"{split}annot").mkdir()
            for i in range(4):
                to_pil_image((noise_image(i, 1) // 32)[0]).save(tmp_path / "DIR" / f"{split}annot" / f"{i:03}.png")
        else:
            for name in ("a", "b"):
                write_images(tmp_path / "DIR" / split / name, 4)
    program, *words = shlex.split(command)
    words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1:]
    words += ["--device", "cpu", "--epochs", "1", "--workers", "0"] + ["--img-size", "32"] * ("--img-size" in words)
    monkeypatch.chdir(tmp_path)
    if program == "torchrun":  # the toy encoder is the tests' own, so the other processes need one that they know
        cfg = dataclasses.replace(mae.Config(), data="shapes:32", patch_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        torch.save({"method": "mae", "config": dataclasses.asdict(cfg), "step": 1, "model": mae.build(cfg).state_dict()},
                   tmp_path / "runs" / "mae" / "last.pt")
        done = run_program(words, cwd=tmp_path, nproc=2, program="evaluate.py")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written:") == 1  # one process speaks
    else:
        assert run(monkeypatch, *words) == 0
    assert (tmp_path / "encoder.pt").exists() == ("--export" in command)
