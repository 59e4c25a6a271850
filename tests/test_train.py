"""Whole runs of `train` in this process, two to eighty steps long, with a toy encoder."""

import ast
import dataclasses
import inspect
import itertools
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms.functional import to_pil_image

import capi
import common
import mae
from common import BadInput, read_checkpoint
from conftest import (METHODS, MODULES, TEACHERS, TWENTY, assert_same_run, built, change_batches,
                      each_method, losses, noise_image, records, started, step_numbers, steps_of,
                      tiny, trained, write_images)


def looks_of(out):
    return [r for r in records(out) if "rank" in r]


# -- the five loops

OWN = ("cfg, run =", "optimizer =", "checkpoint =", "stream =", "lr =", "for group in",
       "group['lr'] =", "noise =", "is_masked", "loss, logs =", "grad_norm =", "meter.step_done(",
       "report =")  # each method decides how these lines go on


def loop_lines(method):
    """The statements of `train`, one per line, without comments."""
    text = ast.unparse(ast.parse(inspect.getsource(MODULES[method].train)))
    for line in text.replace(f"'{method}'", "METHOD").splitlines():
        start = next((start for start in OWN if line.strip().startswith(start)), None)
        yield line[:line.index(start)] + start if start else line


@each_method
def test_each_loop_has_the_lines_of_mae_in_the_same_order(method):
    lines = loop_lines(method)  # a generator: each search goes on behind the line found last
    for line in loop_lines("mae"):
        assert line in lines, f"{method}.train does not have here this line of mae.train: {line}"


# -- resume

FLAGS = [(method, flags) for method in METHODS for flags in ("", "--accum 2")]
FLAGS += [("semantic_mim", "--drop-path 0.1"), ("capi", "--drop-path 0.2")]


@pytest.mark.parametrize("method, flags", FLAGS)
def test_resume_is_exact(unbroken, tmp_path, monkeypatch, method, flags):
    """An epoch is 2.5 steps: step 5 ends one, step 7 is inside one. With accumulation the signal
    comes between two micro-batches."""
    whole, cfg = unbroken(method, flags), tiny(tmp_path, method, flags, eval_every=1, **TWENTY)
    stop, number = (7, signal.SIGINT) if flags else (5, signal.SIGTERM)

    def interrupt(images, micro):
        if micro == (stop - 1) * cfg.accum + 1:
            os.kill(os.getpid(), number)
    torch.manual_seed(1)  # the seed of the Config decides, not the state of the process
    with monkeypatch.context() as patch:
        change_batches(method, interrupt, patch.setattr)
        assert MODULES[method].train(cfg) == 128 + number
    assert read_checkpoint(tmp_path / "last.pt")["step"] == stop
    torch.manual_seed(2)
    trained(cfg, method)
    assert_same_run(tmp_path, whole.out)
    assert looks_of(tmp_path) == looks_of(whole.out)


def test_a_signal_in_the_last_step_or_before_a_test_costs_nothing(tmp_path, monkeypatch):
    def interrupt(images, step):
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
    for stop, status in ((2, 128 + signal.SIGTERM), (4, 0)):
        with monkeypatch.context() as patch:
            change_batches("mae", interrupt, patch.setattr)
            cfg = tiny(tmp_path / str(stop), epochs=2, eval_every=1)
            assert mae.train(cfg) == status
        assert [r["step"] for r in looks_of(cfg.out)] == [*range(0, stop + 1, 2)]


def test_resume_refuses_another_config_and_names_the_flags(tmp_path):
    trained(tiny(tmp_path))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(BadInput, match="--mask-ratio was 0.75, is 0.5.*--resume no") as error:
        mae.train(tiny(tmp_path, mask_ratio=0.5, seed=3, epochs=2))
    assert "--seed" in str(error.value) and "--epochs" not in str(error.value)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert trained(tiny(tmp_path, epochs=2, log_every=2, accum=2))["step"] == 4  # these may change


def test_resume_of_a_finished_run_and_from_a_file_and_not_at_all(tmp_path):
    trained(tiny(tmp_path))
    first = losses(tmp_path)
    trained(tiny(tmp_path))
    assert losses(tmp_path) == first
    for epochs in (2, 3):  # the second time from its own last.pt
        trained(tiny(tmp_path / "other", epochs=epochs, resume=str(tmp_path / "last.pt")))
    assert step_numbers(tmp_path / "other") == [3, 4, 5, 6]
    assert [r["step"] for r in looks_of(tmp_path / "other")] == [4, 6]
    trained(tiny(tmp_path, resume="no", seed=1))
    assert len(losses(tmp_path)) == 2 and losses(tmp_path) != first


# -- what a run does and leaves

@each_method
def test_log_pictures_and_checkpoint(unbroken, method):
    run, model = unbroken(method), built(method)
    own = model.pictures(torch.rand(2, 3, 32, 32), lambda images: images)
    pictures = {"features.png", *own}
    assert {p.name for p in run.out.iterdir()} == {".lock", "last.pt", "log.jsonl", *pictures}
    for name in pictures:
        picture = common.read_crop(run.out / name, 3, (99, 99), lambda *size: (0, 0, *size))
        assert picture.float().std() > 10

    header, steps, looks = records(run.out)[0], steps_of(run.out), looks_of(run.out)
    assert header["method"] == method and header["torch"] == torch.__version__
    assert {"config", "processes", "device", "precision"} <= header.keys()
    names = {"lr", "loss", "grad_norm", "pred_std", "target_std"}
    for i, r in enumerate(steps, 1):
        assert r.keys() >= names | ({"momentum"} if method in TEACHERS else set())
        assert all(math.isfinite(value) for value in r.values())
        assert r["step"] == i and r["images"] == 32 * i
        assert r["images_per_s"] > 0 and 0 < r["data_wait"] < 1
    assert [r["step"] for r in looks] == [*range(0, 21, 2)]  # an epoch of 2.5 steps is rounded
    labels = {f"knn_{label}" for label in ("kind", "count", "distance")}
    assert labels | {"feature_std", "mean_knn_kind"} <= looks[-1].keys()
    assert "raw" in run.told and f"kind {looks[0]['raw_knn_kind']:.1f}" in run.told

    assert len(run.state["config"]["mean"]) == 3  # the open values are filled in
    assert run.state["model"].keys() == model.state_dict().keys()


@each_method
def test_a_run_learns(tmp_path, method):
    trained(tiny(tmp_path, method, data="shapes:256", epochs=10, log_every=5), method)
    first, last = steps_of(tmp_path)[0], steps_of(tmp_path)[-1]
    assert last["loss"] < 0.97 * first["loss"]
    if method == "mae":
        assert last["loss"] < 0.97 * last["loss_of_mean"]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "capi"])
def test_accumulation_equals_the_whole_batch(unbroken, method):
    """For means over images: CAPI balances its assignments over a micro-batch, and Latent MIM's
    similarity terms are squares of a mean over one."""
    flags = "--sim-coeff 0" if method == "latent_mim" else ""
    whole, parts = (steps_of(unbroken(method, flags + more).out)[:6] for more in ("", " --accum 2"))
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in parts] == pytest.approx([r[name] for r in whole], rel=1e-5)


def look_of(method, folder):
    cfg, run = started(method, data=str(write_images(folder, 4)))
    cfg = dataclasses.replace(cfg, out=str(folder))
    return common.Look(cfg, run, built(method), *common.load_data(cfg, run))


@each_method
def test_looking_draws_nothing_from_the_global_generator(tmp_path, method):
    look, before = look_of(method, tmp_path), torch.get_rng_state()
    look(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_train_leaves_signal_handlers_as_they_were(tmp_path, monkeypatch):
    """After a run, after an error in one, and during a run in a thread, which cannot set any."""
    def handlers():
        return [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def watch(images, number):
        seen.append(handlers())
        assert number < 3
    before, seen = handlers(), []
    change_batches("mae", watch, monkeypatch.setattr)
    trained(tiny(tmp_path))
    assert handlers() == before and before not in seen
    with pytest.raises(AssertionError):
        mae.train(tiny(tmp_path, resume="no", epochs=2))
    assert handlers() == before and len(seen) == 5
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(mae.train, tiny(tmp_path / "thread")).result() == 0
    assert seen[5:] == [before, before]


# -- what goes wrong on the way

@each_method
def test_a_run_stops_if_a_gradient_is_not_finite(tmp_path, monkeypatch, capsys, method):
    """In step 3 of 4. Steps 2 and 4 are logged and saved."""
    steps, real = itertools.count(1), MODULES[method].build

    def build(cfg):
        model = real(cfg)
        trained = [p for p in model.parameters() if p.requires_grad]
        trained[-1].register_hook(lambda grad: grad * math.inf if next(steps) == 3 else grad)
        return model
    monkeypatch.setattr(MODULES[method], "build", build)
    assert MODULES[method].train(tiny(tmp_path, method, epochs=2, save_every=1, log_every=20)) == 1
    told = capsys.readouterr().err
    assert "not finite in the steps up to 4" in told and "the last good checkpoint" in told
    state = read_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 2 and all(t.isfinite().all() for t in state["model"].values())


def test_collapse_of_latent_mim_is_named(unbroken, tmp_path, capsys):
    """The naive variant of the paper's figure 3 comes to the same target for every patch."""
    flags = "--loss l2 --ema 0 0 --sim-coeff 0 --data shapes:256 --epochs 10 --base-lr 0.3"
    trained(tiny(tmp_path, "latent_mim", flags), "latent_mim")
    assert capsys.readouterr().out.count("warning: collapse") == 1
    assert "collapse" not in unbroken("latent_mim").told


@pytest.mark.parametrize("name, assign", [
    ("equal assignments", lambda x: torch.full_like(x, 1 / x.shape[-1])),
    ("collapse to one cluster", lambda x: (torch.arange(x.shape[-1]) == 0).float().expand_as(x))])
def test_collapse_of_clusters_is_named(unbroken, tmp_path, monkeypatch, capsys, name, assign):
    assert name not in unbroken("capi").told
    monkeypatch.setattr(capi, "sinkhorn", assign)
    trained(tiny(tmp_path, "capi"), "capi")
    assert capsys.readouterr().out.count(f"warning: {name}") == 1


def test_collapse_of_the_features_is_named(tmp_path, capsys):
    look = look_of("mae", tmp_path)
    look.model.norm.weight.data.zero_()
    assert look(0)["rank"] == 1 and "warning: collapse: " in capsys.readouterr().out


# -- precision, sizes and data

@each_method
def test_bf16_is_close_to_fp32(unbroken, method):
    full, half = (losses(unbroken(method, flags).out)[:10] for flags in ("", "--amp bf16"))
    assert half == pytest.approx(full, rel=0.02) and half != full


@pytest.mark.parametrize("size, patch_size, chans, batch", [  # grids 2 x 2, 8 x 8, 8 x 12, 6 x 6
    ((16,), 8, 3, 8), ((32,), 4, 3, 8), ((64, 96), 8, 1, 8), ((48,), 8, 12, 1)])
@each_method
def test_sizes_channels_and_a_batch_of_one(tmp_path, method, size, patch_size, chans, batch):
    flags = dict(data=f"shapes:{2 * batch}", batch_size=batch, img_size=size, in_chans=chans)
    trained(tiny(tmp_path, method, patch_size=patch_size, **flags), method)
    assert len(losses(tmp_path)) == 2 and all(math.isfinite(loss) for loss in losses(tmp_path))


@pytest.mark.parametrize("kind, chans", [("memory", 3), ("png", 3), ("npy", 12)])
def test_no_flip(tmp_path, kind, chans):
    """The whole image is the only crop here. With flips some come mirrored, without them none."""
    images = torch.stack([noise_image(i, chans, width=40) for i in range(16)])
    for i, image in enumerate(images):
        np.save(tmp_path / f"{i:02}.npy", image.permute(1, 2, 0).numpy())
        to_pil_image(image[:3]).save(tmp_path / f"{i:02}.png")
    flags = dict(data=str(tmp_path), in_chans=chans, img_size=(40,), crop_scale=(1.0, 1.0))
    for flip in (True, False):
        cfg, run = started(flip=flip, **flags)
        data = common.Pixels(images, {}) if kind == "memory" else common.load_data(cfg, run)[0]
        crops, ids = next(common.train_batches(cfg, run, data, 0, 1, with_ids=True))
        crops, wanted = 255 * common.denormalise(crops, cfg), images[ids].float()
        straight, mirrored = ((crops - x).abs().flatten(1).amax(1) < 1
                              for x in (wanted, wanted.flip(3)))
        assert (straight ^ mirrored).all() and straight.any() and mirrored.any() == flip


def class_folders(folder, count):
    for i, name in enumerate(("cats", "dogs")):
        write_images(folder / name / "deeper", count, first=count * i)


@each_method
def test_a_flat_folder_with_other_modes_and_a_broken_file(tmp_path, capsys, method):
    folder = write_images(tmp_path / "images", 1)
    to_pil_image(noise_image(1, chans=1)).save(folder / "grey.jpg")
    to_pil_image(noise_image(2, chans=4)).save(folder / "alpha.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more than that")
    out = tmp_path / "run"
    trained(tiny(out, method, data=str(folder), batch_size=4, epochs=2, workers=1), method)
    told = capsys.readouterr().out
    assert told.count("cannot read") == 1 and str(folder / "broken.png") in told
    assert "4 images without class folders" in told
    assert len(looks_of(out)) == 2 and not any("knn_class" in r for r in looks_of(out))


@pytest.mark.parametrize("val, count", [("labelled", 15), ("none", 15), ("flat", 15), ("none", 4)])
def test_class_folders(tmp_path, capsys, val, count):
    """All training images are trained on. The k-NN test asks for the images of a labelled val/. If
    there is none, or a flat one like ImageNet's, it asks for every tenth training image."""
    class_folders(tmp_path / ("" if val == "none" else "train"), count)
    if val == "labelled":
        class_folders(tmp_path / "val", 3)
    elif val == "flat":
        write_images(tmp_path / "val", 3)
    cfg, run = started(data=str(tmp_path), batch_size=2 * count)
    train_set, val_set = common.load_data(cfg, run)
    told = capsys.readouterr().out
    assert f"{2 * count} images of 2 classes" in told
    assert ("every tenth training image" in told) == (val_set is None) == (val != "labelled")

    look = common.Look(cfg, run, built("mae"), train_set, val_set)
    asked, queries, gallery = val_set, {*range(6)}, {*range(2 * count)}
    if val_set is None:
        asked, queries = train_set, {*range(9, 2 * count, 10)}
        gallery -= queries
    assert look.gallery[0] is train_set and {*look.gallery[1].tolist()} == gallery
    assert look.queries[0] is asked and {*look.queries[1].tolist()} == queries
    assert ("knn_class" in look.scores(common.raw_pixels)) == (count == 15)
    _, ids = next(common.train_batches(cfg, run, train_set, 0, 1, with_ids=True))
    assert sorted(ids.tolist()) == [*range(2 * count)]


def test_cifar10(tmp_path, monkeypatch):
    """By a stand-in with torchvision's interface. Nothing is downloaded."""
    def small(root, train, download=False):
        return [(to_pil_image(noise_image(i, height=32, width=32)), i % 3) for i in range(24)]
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", small)
    trained(tiny(tmp_path, data="cifar10", batch_size=12))
    assert all("knn_class" in r for r in looks_of(tmp_path))
