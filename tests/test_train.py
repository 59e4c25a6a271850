"""Whole runs of `train`, in this process, two to twenty steps long, with an encoder that only tests have."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms.functional import to_pil_image

import capi
import common
import mae
from common import BadInput, main, read_checkpoint
from conftest import (METHODS, MODULES, PICTURES, TWENTY, filled, losses, noise_image, one_process,
                      records, tiny, trained, write_images)

each_method = pytest.mark.parametrize("method", METHODS)


def changed_stream(monkeypatch, change, method="mae"):
    """Every batch of a run goes through change(images, number), number from 1."""
    real = MODULES[method].train_batches

    def stream(*args):
        for number, images in enumerate(real(*args), 1):
            yield change(images, number)
    monkeypatch.setattr(MODULES[method], "train_batches", stream)


def same(a, b, path=""):
    """Two nested states are equal bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            same(*pair, f"{path}.{i}")
    else:
        assert a == b, path


# -- resume ---------------------------------------------------------------------------------------------

RESUMES = [(method, accum, stop, number, flags) for accum, stop, number, flags in (
    (1, 10, signal.SIGTERM, ""), (1, 9, signal.SIGINT, ""), (2, 7, signal.SIGTERM, "--accum 2")) for method in METHODS]
RESUMES += [("semantic_mim", 1, 7, signal.SIGTERM, "--drop-path 0.1"),
            ("capi", 1, 7, signal.SIGTERM, "--drop-path 0.2"), ("mae", 2, 10, signal.SIGTERM, "--accum 2")]


@pytest.mark.parametrize("method, accum, stop, number, flags", RESUMES)
def test_resume_is_exact(unbroken, tmp_path, monkeypatch, capsys, method, accum, stop, number, flags):
    """An epoch is 2.5 steps; step 10 is an epoch's edge, 7 and 9 the middle of one. The whole checkpoint is compared,
    teacher, optimisers and all."""
    whole, cfg = unbroken(method, flags), tiny(tmp_path, method, flags, eval_every=1, **TWENTY)
    assert whole.state["step"] == 20 and whole.cfg.accum == accum

    def interrupt(images, micro):
        if micro == (stop - 1) * accum + 1:  # with accumulation, in the middle of the step
            os.kill(os.getpid(), number)
        return images
    with monkeypatch.context() as patch:
        changed_stream(patch, interrupt, method)
        assert MODULES[method].train(cfg) == 128 + number
    assert read_checkpoint(tmp_path / "last.pt")["step"] == stop
    torch.manual_seed(12345)  # another process would start from another state
    parts = trained(cfg, method)
    assert f"resume: {tmp_path / 'last.pt'}, step {stop}" in capsys.readouterr().out

    assert parts["config"].pop("out") != whole.state["config"]["out"]
    same(whole.state | {"config": {k: v for k, v in whole.state["config"].items() if k != "out"}}, parts)
    timed = {"images_per_s", "data_wait"}
    first, second = ([{k: v for k, v in r.items() if k not in timed} for r in records(out)[1:]]
                     for out in (whole.out, tmp_path))
    assert first == second


@pytest.mark.parametrize("method, flags", [("semantic_mim", "--drop-path 0.1"), ("capi", "--drop-path 0.2")])
def test_drop_path_drops(unbroken, method, flags):
    """Else its resuming would be no proof of anything."""
    assert losses(unbroken(method, flags).out) != losses(unbroken(method).out)


def test_resume_drops_what_was_logged_after_the_checkpoint(tmp_path):
    """A run that was killed, not stopped: its log is ahead of its checkpoint."""
    cfg = tiny(tmp_path, epochs=4)
    trained(cfg)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "loss": 1.0}) + "\n")
    trained(tiny(tmp_path, epochs=6))
    steps = [r["step"] for r in records(tmp_path) if "loss" in r]
    assert steps == list(range(1, 13)) and "method" in records(tmp_path)[0]


def test_resume_after_a_torn_last_log_line(tmp_path):
    """A power cut leaves half a line; the run goes on all the same."""
    trained(tiny(tmp_path))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    trained(tiny(tmp_path, epochs=2))
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 2, 3, 4]


def test_resume_with_another_config_names_the_fields(tmp_path):
    trained(tiny(tmp_path))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(BadInput) as error:
        mae.train(tiny(tmp_path, mask_ratio=0.5, seed=3, epochs=2))
    for text in ("--mask-ratio 0.75", "0.5", "--seed", "last.pt", "--resume no"):
        assert text in str(error.value)
    assert "--epochs" not in str(error.value) and (tmp_path / "last.pt").read_bytes() == before
    # run length and run-time flags may change
    assert trained(tiny(tmp_path, epochs=2, log_every=2, accum=2))["step"] == 4


def test_nothing_left_to_do_and_starting_over(tmp_path, capsys):
    trained(tiny(tmp_path))
    first = losses(tmp_path)
    assert mae.train(tiny(tmp_path)) == 0
    assert "nothing to do" in capsys.readouterr().out and losses(tmp_path) == first
    trained(tiny(tmp_path, resume="no", seed=1))
    assert len(losses(tmp_path)) == 2 and losses(tmp_path) != first
    trained(tiny(tmp_path / "other", resume=str(tmp_path / "last.pt"), seed=1, epochs=2))  # from a named file
    assert [r["step"] for r in records(tmp_path / "other") if "loss" in r] == [3, 4]
    trained(tiny(tmp_path / "other", resume=str(tmp_path / "last.pt"), seed=1, epochs=3))  # again: from its own last.pt
    assert [r["step"] for r in records(tmp_path / "other") if "loss" in r] == [3, 4, 5, 6]
    assert "last.pt, step 4" in capsys.readouterr().out


@pytest.mark.parametrize("change, text", [(lambda s: s | {"method": "capi"}, "of capi, not of mae"),
                                          (lambda s: s["model"], "not a checkpoint of this repository")])
def test_resume_refuses_what_is_not_its_own(tmp_path, change, text):
    torch.save(change(trained(tiny(tmp_path))), tmp_path / "last.pt")
    with pytest.raises(BadInput, match=text):
        mae.train(tiny(tmp_path))


# -- what a run leaves ----------------------------------------------------------------------------------

PARTS = {  # of the loss, and what tells whether a method is well
    "mae": {"loss_of_mean", "pred_std", "target_std"},
    "latent_mim": {"patch_loss", "s_pred", "s_visible", "s_target", "pred_std", "target_std"},
    "semantic_mim": {"loss_of_mean", "pred_std", "target_std"},
    "pilamim": {"pixel_loss", "latent_loss", "cls_loss", "loss_of_mean", "pred_std", "target_std"},
    "capi": {"capi_loss", "clustering_loss", "target_entropy", "clusters_used", "pred_std", "target_std"},
}


def test_a_header_for_every_way_it_was_run(tmp_path):
    for changes in (dict(epochs=1), dict(epochs=2), dict(epochs=2, log_every=2)):
        assert mae.train(tiny(tmp_path, **changes)) == 0
    assert [r["config"]["epochs"] for r in records(tmp_path) if "config" in r] == [1, 2]  # the third run had nothing to do
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 2, 3, 4]


@each_method
def test_nothing_is_fetched(tmp_path, monkeypatch, method):
    """Neither weights nor data: a default run opens no connection."""
    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection: {args}")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    trained(tiny(tmp_path, method), method)


@each_method
def test_log_and_run_folder(unbroken, method):
    run = unbroken(method)
    assert sorted(p.name for p in run.out.iterdir()) == sorted(["last.pt", "log.jsonl", *PICTURES[method]])
    header, *lines = records(run.out)
    assert {"method", "config", "torch", "torchvision", "python", "commit", "processes", "device",
            "amp"} <= header.keys()
    assert header["method"] == method and header["torch"] == torch.__version__
    assert len(header["config"]["mean"]) == 3  # as used, open values filled in
    steps = [r for r in lines if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 21))
    for r in steps:
        assert {"step", "images", "lr", "loss", "grad_norm", "images_per_s", "data_wait"} | PARTS[method] == r.keys()
        assert r["images"] == 32 * r["step"] and 0 <= r["data_wait"] <= 1 and r["images_per_s"] > 0
        assert all(math.isfinite(value) for value in r.values()) and r["grad_norm"] > 0
    if method == "mae":
        assert all(r["loss_of_mean"] == pytest.approx(1, rel=0.02) for r in steps)  # standardised targets
    if method == "pilamim":
        parts = [r["pixel_loss"] + r["latent_loss"] + r["cls_loss"] for r in steps]
        assert [r["loss"] for r in steps] == pytest.approx(parts, rel=1e-5)
    if method == "capi":
        parts = [r["capi_loss"] + r["clustering_loss"] for r in steps]
        assert [r["loss"] for r in steps] == pytest.approx(parts, rel=1e-5)
    peak = run.cfg.base_lr * 32 / 256
    # The warm-up takes 2 epochs, which are 5 steps; test_trajectories.py compares every rate with the authors'.
    first = {"latent_mim": peak / 4, "semantic_mim": 1e-6 * peak, "pilamim": peak / 2}.get(method, 0)
    assert steps[0]["lr"] == pytest.approx(first) and max(r["lr"] for r in steps) == pytest.approx(peak, rel=0.05)
    tests = [r for r in lines if "rank" in r]
    assert [r["step"] for r in tests] == list(range(0, 21, 2))
    assert all({"knn_kind", "knn_count", "knn_distance", "feature_std"} <= r.keys() for r in tests)
    assert {"raw_knn_kind", "raw_knn_count", "raw_knn_distance"} <= tests[0].keys()
    for text in ("raw pixels", "untrained", "trained", "kind", "count", "distance", "base lr"):
        assert text in run.told
    for name in PICTURES[method]:
        picture = common.read_image(str(run.out / name), 3)
        assert picture.float().std() > 10 and min(picture.shape[1:]) > 100


@each_method
def test_checkpoint(unbroken, method):
    """Read weights-only, by `trained`."""
    state, cfg = unbroken(method).state, unbroken(method).cfg
    assert state.keys() == {"method", "config", "step", "model", "optimizer", "scaler", "rng"} | (
        {"cluster_optimizer"} if method == "capi" else set())
    cfg = MODULES[method].with_recipe(cfg) if method == "semantic_mim" else cfg
    cfg = common.start(cfg)[0]
    assert state["method"] == method and state["config"] == dataclasses.asdict(cfg)
    assert state["model"].keys() == MODULES[method].build(cfg).state_dict().keys()
    assert not [k for k in state["model"] if k.startswith("module.") or "_orig_mod" in k]


def test_another_methods_checkpoint_is_refused(unbroken, tmp_path):
    for method, other in zip(METHODS, [*METHODS][1:] + [*METHODS][:1]):
        with pytest.raises(BadInput, match=f"last.pt: a checkpoint of {other}, not of {method}"):
            MODULES[method].train(tiny(tmp_path, method, resume=str(unbroken(other).out / "last.pt")))
    assert not list(tmp_path.iterdir())


def test_a_run_learns(tmp_path):
    """The least that training has to do: be under the loss of a mean predictor."""
    trained(tiny(tmp_path, data="shapes:256", epochs=15, log_every=10))
    assert losses(tmp_path)[-1] < 0.93 < 0.97 < losses(tmp_path)[0]


def test_the_seed_is_all_that_randomness_depends_on(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name))
        trained(tiny(tmp_path / name, seed=seed))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


@pytest.mark.parametrize("method, flags", [
    ("mae", ""), ("semantic_mim", ""), ("pilamim", ""), ("latent_mim", "--sim-coeff 0")])
def test_accumulation_changes_nothing(unbroken, method, flags):
    """Not so where a loss is no mean over images: CAPI balances its assignments over a micro-batch, Latent MIM's
    similarity terms are squares of a mean over one."""
    few, many = (losses(unbroken(method, flags + more).out)[:6] for more in ("", " --accum 2"))
    assert few == pytest.approx(many, rel=1e-5)


def test_collapse_is_named(tmp_path, capsys):
    """The naive variant of Latent MIM (its Fig. 3) comes to say one thing of every patch, and says so; the method does
    not, in as many steps at as high a rate."""
    for name, flags, warnings in (("naive", "--loss l2 --ema 0 0 --sim-coeff 0", 1), ("whole", "", 0)):
        flags += " --data shapes:256 --epochs 10 --base-lr 0.3"
        trained(tiny(tmp_path / name, "latent_mim", flags), "latent_mim")
        assert capsys.readouterr().out.count("warning: collapse") == warnings
    naive, whole = ([r for r in records(tmp_path / name) if "loss" in r][-1] for name in ("naive", "whole"))
    assert naive["target_std"] < 0.02 < 0.3 < whole["target_std"]
    assert naive["s_target"] > 0.99 > 0.9 > whole["s_target"]


# -- what goes wrong on the way -------------------------------------------------------------------------

@pytest.mark.parametrize("method, log_every", [*((method, 1) for method in METHODS), ("mae", 2)])
def test_a_loss_that_is_not_finite(tmp_path, monkeypatch, capsys, method, log_every):
    def poison(images, step):
        if step == 3:
            images[0, 0, 0] = math.inf
        return images
    changed_stream(monkeypatch, poison, method)
    cfg = tiny(tmp_path, method, epochs=4, save_every=1, log_every=log_every)  # saves at steps 2, 4, ...
    assert MODULES[method].train(cfg) == 1
    out = capsys.readouterr().err
    assert "not finite since step 3 " in out and "lr" in out and "gradient norm" in out and "last.pt" in out
    state = read_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 2 and all(t.isfinite().all() for t in state["model"].values())


@each_method
def test_a_gradient_that_is_not_finite(tmp_path, monkeypatch, capsys, method):
    """The loss is, so nothing shows in it before the step: the weights of that step must not be saved, be it the last."""
    real = MODULES[method].build

    def build(*args):
        model, calls = real(*args), []
        weight = [p for p in model.parameters() if p.requires_grad][-1]  # CAPI's is the clustering head's
        weight.register_hook(lambda g: (calls.append(0), g * math.inf if len(calls) == 4 else g)[1])
        return model
    monkeypatch.setattr(MODULES[method], "build", build)
    assert MODULES[method].train(tiny(tmp_path, method, epochs=2, save_every=1, log_every=20)) == 1  # step 4 is the last
    assert "not finite since step 4 " in capsys.readouterr().err
    state = read_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 2 and all(t.isfinite().all() for t in state["model"].values())


@pytest.mark.parametrize("names, assign", [
    (["collapse to one cluster", "all-equal assignments"], lambda x: torch.full_like(x, 1 / x.shape[-1])),
    (["collapse to one cluster"], lambda x: (torch.arange(x.shape[-1]) == 0).float().expand_as(x)), ([], capi.sinkhorn)])
def test_bad_clusters_are_named(tmp_path, monkeypatch, capsys, names, assign):
    monkeypatch.setattr(capi, "sinkhorn", assign)
    trained(tiny(tmp_path, "capi"), "capi")
    told = re.findall("warning: (.*?):", capsys.readouterr().out)
    assert [name for name in told if "cluster" in name or "assignments" in name] == names


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    trained(tiny(tmp_path))
    before = (tmp_path / "last.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadInput, match="--out.*No space left.*untouched"):
        mae.train(tiny(tmp_path, epochs=2))
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_waiting_for_data_is_named_once(tmp_path, monkeypatch, capsys):
    """A clock that only the test moves: a step computes for 10 seconds and waits `cost` for its batch."""
    clock, real_loss = [0.0], mae.pixel_loss

    def compute(*args):
        clock[0] += 10
        return real_loss(*args)
    monkeypatch.setattr(mae, "pixel_loss", compute)
    monkeypatch.setattr(mae, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for cost, warnings in ((2, 0), (30, 1)):
        def wait(images, _, cost=cost):
            clock[0] += cost
            return images
        with monkeypatch.context() as patch:
            changed_stream(patch, wait)
            trained(tiny(tmp_path / str(cost), epochs=3))
        assert capsys.readouterr().out.count("warning: data-bound") == warnings
        assert all(r["data_wait"] == pytest.approx(cost / (cost + 10), rel=1e-4)
                   for r in records(tmp_path / str(cost)) if "loss" in r)


# -- precision and compilation --------------------------------------------------------------------------

@each_method
def test_bf16_is_close_to_fp32(unbroken, method):
    full, half = (losses(unbroken(method, flags).out)[:10] for flags in ("", "--amp bf16"))
    assert half == pytest.approx(full, rel=0.02) and half != full
    assert records(unbroken(method, "--amp bf16").out)[0]["amp"] == "torch.bfloat16"


@pytest.mark.skipif(not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
                    reason="torch.compile needs a C++ compiler on the CPU")
@each_method
def test_compiled_is_close_to_eager(tmp_path, monkeypatch, method):
    monkeypatch.setitem(common.MODELS, "toy", (32, 1, 2))  # every block costs seconds to compile
    if method not in ("mae", "capi"):  # traced and split as for real; C++ for two methods has to do
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module: setattr(
            module, "_compiled_call_impl", torch.compile(module._call_impl, backend="aot_eager")))
    eager = trained(tiny(tmp_path / "off", method), method)
    compiled = trained(tiny(tmp_path / "on", method, compile="on"), method)
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)
    assert compiled["model"].keys() == eager["model"].keys()
    assert records(tmp_path / "on")[0]["compile"] is True
    trained(tiny(tmp_path / "on", method, epochs=2), method)  # and an uncompiled run goes on from it


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for: needs CUDA")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@each_method
def test_no_step_waits_for_the_gpu(tmp_path, monkeypatch, method, amp):
    """Between two log lines nothing reads from the device: torch raises an error where something does."""
    def guard(images, step):
        torch.cuda.set_sync_debug_mode({3: "error", 9: "default"}.get(step, torch.cuda.get_sync_debug_mode()))
        return images
    changed_stream(monkeypatch, guard, method)
    try:
        trained(tiny(tmp_path, method, device="cuda", amp=amp, epochs=5, log_every=10), method)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- sizes and data -------------------------------------------------------------------------------------

@pytest.mark.parametrize("img_size, patch_size, chans, grid", [
    ((16,), 8, 3, (2, 2)), ((32,), 8, 3, (4, 4)), ((32,), 4, 3, (8, 8)), ((64, 96), 8, 1, (8, 12)),
    ((48,), 8, 12, (6, 6))])
@each_method
def test_sizes_train(tmp_path, method, img_size, patch_size, chans, grid):
    state = trained(tiny(tmp_path, method, img_size=img_size, patch_size=patch_size, in_chans=chans,
                         data="shapes:16", batch_size=8), method)
    assert state["step"] == 2 and all(math.isfinite(loss) for loss in losses(tmp_path))
    if method == "mae":
        assert state["model"]["pos_embed"].shape == (1, 1 + grid[0] * grid[1], 32)
        assert state["model"]["decoder_pred.weight"].shape[0] == patch_size**2 * chans


def mixed_folder(folder):
    folder.mkdir()
    to_pil_image(noise_image(0)).save(folder / "colour.png")
    to_pil_image(noise_image(1, chans=1)).save(folder / "grey.jpg")
    to_pil_image(noise_image(2, chans=4)).save(folder / "alpha.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more than that")
    return folder


@pytest.mark.parametrize("method, workers", [("mae", 0), ("mae", 1), ("latent_mim", 0)])  # the latter's crops have gaps
def test_flat_folder_with_a_broken_file(tmp_path, capsys, method, workers):
    folder = mixed_folder(tmp_path / "images")
    state = trained(tiny(tmp_path / "run", method, data=str(folder), batch_size=4, epochs=2, workers=workers), method)
    out = capsys.readouterr().out
    assert state["step"] == 2 and out.count("cannot read") == 1 and str(folder / "broken.png") in out
    assert "no labels" in out and not any("knn_class" in r for r in records(tmp_path / "run"))
    assert any("rank" in r for r in records(tmp_path / "run"))


def test_workers_change_nothing(tmp_path):
    folder = write_images(tmp_path / "images", 12)
    for workers in (0, 1, 2):
        trained(tiny(tmp_path / str(workers), data=str(folder), batch_size=4, epochs=2, workers=workers))
    assert losses(tmp_path / "0") == losses(tmp_path / "1") == losses(tmp_path / "2")


def test_folder_with_train_and_val(tmp_path, capsys):
    for i, name in enumerate(("cats", "dogs")):
        write_images(tmp_path / "set" / "train" / name / "deeper", 6, first=10 * i)
        write_images(tmp_path / "set" / "val" / name, 3, first=10 * i + 6)
    trained(tiny(tmp_path / "run", data=str(tmp_path / "set"), batch_size=6))
    tests = [r for r in records(tmp_path / "run") if "rank" in r]
    assert len(tests) == 2 and all(0 <= r["knn_class"] <= 100 for r in tests) and "raw_knn_class" in tests[0]
    assert "12 images" in capsys.readouterr().out


def test_class_folders_without_a_split(tmp_path, capsys):
    for i, name in enumerate(("cats", "dogs")):
        write_images(tmp_path / "set" / name, 10, first=10 * i)
    trained(tiny(tmp_path / "run", data=str(tmp_path / "set"), batch_size=6))
    assert all("knn_class" in r for r in records(tmp_path / "run") if "rank" in r)
    out = capsys.readouterr().out
    assert "20 images" in out and "2 classes" in out
    assert "no labelled val/: the k-NN test asks about every tenth training image" in out


@pytest.mark.parametrize("count, tests", [(4, False), (15, True)])
def test_knn_without_val_asks_about_every_tenth_image(tmp_path, monkeypatch, capsys, count, tests):
    """Queries and gallery are disjoint. Together they are the training set, which is complete."""
    for i, name in enumerate(("cats", "dogs")):
        write_images(tmp_path / "set" / name, count, first=count * i)
    cfg, run = filled(tiny(tmp_path / "run", data=str(tmp_path / "set"))), one_process()
    train_set, val_set = common.load_data(cfg, run)
    assert len(train_set) == 2 * count and val_set is None
    read, real = [], common.eval_batches
    monkeypatch.setattr(common, "eval_batches", lambda cfg, run, data, ids:
                        read.append((data, ids.tolist())) or real(cfg, run, data, ids))
    scores = common.check_health(common.raw_pixels, cfg, run, train_set, val_set)
    assert ("knn_class" in scores) == tests
    queries = [i for i in range(2 * count) if i % 10 == 9]
    gallery = [i for i in range(2 * count) if i % 10 != 9]
    assert read == [(train_set, gallery)] + [(train_set, queries)] * tests
    assert ("too few images for k-NN" in capsys.readouterr().out) != tests


def test_knn_without_val_and_labels(tmp_path, monkeypatch):
    cfg, run = filled(tiny("run", data=str(write_images(tmp_path, 12)))), one_process()
    train_set, val_set = common.load_data(cfg, run)
    ids, real = [], common.eval_batches
    monkeypatch.setattr(common, "eval_batches", lambda *args: ids.append(args[3]) or real(*args))
    scores = common.check_health(common.raw_pixels, cfg, run, train_set, val_set)
    assert scores.keys() == {"rank", "feature_std"} and torch.cat(ids).tolist() == list(range(12))


def test_hidden_files_and_links_to_a_parent(tmp_path):
    folder = write_images(tmp_path / "images", 3)
    write_images(folder / ".cache", 2)
    (folder / "._000.png").write_bytes(b"what a Mac leaves behind")
    os.symlink(folder, folder / "again")
    assert [p.name for p in common.find_images(folder)] == ["000.png", "001.png", "002.png"]


def test_too_many_broken_images_stop_the_run(tmp_path):
    folder = write_images(tmp_path / "images", 15)
    for i in range(5):
        (folder / f"broken{i}.jpg").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"of 20 images cannot be read, more than 1 %.*broken") as error:
        mae.train(tiny(tmp_path / "run", data=str(folder), batch_size=5, epochs=2))
    assert "\n" not in str(error.value)


def test_twelve_channels_from_npy_files(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        np.save(folder / f"{i}.npy", noise_image(i, chans=12, height=60, width=50).permute(1, 2, 0).numpy())
    state = trained(tiny(tmp_path / "run", data=str(folder), batch_size=3, in_chans=12, img_size=(48,)))
    assert state["step"] == 2 and len(state["config"]["mean"]) == 12


def test_named_sets(tmp_path, monkeypatch):
    """torchvision's classes, stood in for by two small sets of the same interface: nothing is downloaded."""
    class Small(torch.utils.data.Dataset):
        def __init__(self, root, train=None, split=None, size=None, download=False):
            self.n = 24 if train or split == "train" else 8

        def __len__(self):
            return self.n

        def __getitem__(self, i):
            if i >= self.n:
                raise IndexError
            return to_pil_image(noise_image(i, chans=3, height=32, width=32)), i % 3
    for name, kind in (("cifar10", "CIFAR10"), ("imagenette", "Imagenette")):  # in memory; from files
        monkeypatch.setattr(torchvision.datasets, kind, Small)
        trained(tiny(tmp_path / name, data=name, batch_size=12))
        assert all("knn_class" in r for r in records(tmp_path / name) if "rank" in r)


def test_main_exit_statuses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mae.py", "--epochs", "3"])
    for status in (0, 1, 130):
        with pytest.raises(SystemExit) as leaving:
            main(lambda cfg: status if cfg.epochs == 3 else 99, mae.Config, mae.__doc__)
        assert leaving.value.code == status
    assert capsys.readouterr().err == ""


def test_loader_processes_may_be_spawned(tmp_path):
    """As on macOS and Windows: what a worker needs has to travel by pickle."""
    paths = sorted(write_images(tmp_path / "images", 4).iterdir())
    crops = common.Crops(common.Folder(paths, [-1] * 4, 3), (16, 16), (0.2, 1.0), tiny("run"))
    items = [(range(4), (0, slice(0, 4)))]
    loaded = [next(iter(torch.utils.data.DataLoader(crops, batch_sampler=items, num_workers=n, multiprocessing_context=how,
                                                    collate_fn=tuple, worker_init_fn=common.worker_signals)))
              for n, how in ((0, None), (2, "spawn"))]
    assert torch.equal(loaded[0][0], loaded[1][0]) and loaded[1][0].shape == (4, 3, 16, 16)


def test_compile_auto_waits_for_a_long_run(capsys, monkeypatch):
    """It is decided by the length of the run, on a GPU by its steps; `on` and `off` are what they say."""
    monkeypatch.setenv("CXX", "c++")
    cfg = tiny("unused", compile="auto")
    model = mae.build(cfg)
    trained = sum(p.numel() for p in model.parameters())
    hour = int(5e13 * torch.get_num_threads() / (2 * trained * model.num_patches * cfg.batch_size))  # in steps
    monkeypatch.setattr(common, "device_name", str)
    for device, flag, total, compiled in (
            ("cpu", "auto", 10, False), ("cpu", "auto", hour // 2, False), ("cpu", "auto", 2 * hour, True),
            ("cpu", "on", 10, True), ("cpu", "off", 10**12, False), ("cuda", "auto", 4999, False), ("cuda", "auto", 5000, True),
            ("cuda", "on", 10, True), ("cuda", "off", 10**12, False)):
        chosen, run = common.start(dataclasses.replace(cfg, compile=flag))
        run.device = torch.device(device)
        run.describe(chosen, model, total, 1e-3)
        assert run.compile == compiled, (device, flag, total)
        assert (", compiled" in capsys.readouterr().out) == compiled
