"""Damage: killed runs, lost processes, full disks, broken checkpoints and images, odd machines."""

import contextlib
import errno
import io
import itertools
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torchvision.transforms.functional import to_pil_image

import common
from common import BadInput, read_checkpoint
from conftest import (MODULES, ROOT, TWENTY, assert_same_run, change_batches, contents, each_method,
                      environment, losses, noise_image, records, step_numbers, tiny, tiny_flags,
                      trained, write_images)
from programs import all_programs, invoke, program, programs  # noqa: F401, fixtures

mae = MODULES["mae"]


def toy_flags(method, out, *more):
    """Saves and looks every second step, logs every step; an epoch is 2.5 steps."""
    flags = ("--model toy --data shapes:80 --warmup-epochs 2 --save-every 1 --eval-every 1 "
             "--log-every 1 --out").split()
    return [*tiny_flags(method), *flags, str(out), *map(str, more)]


def saved_step(out):
    """The step of the newest checkpoint. Every checkpoint that is there must be whole."""
    paths = [path for path in (out / "last.pt", out / "previous.pt") if path.exists()]
    return max([read_checkpoint(path)["step"] for path in paths], default=0)


# -- 1. killed and interrupted

def struck(method, argv, how, number, rank="0"):
    """What happens to a rank at its nth batch. Its loader processes get a signal too, as terminals,
    `timeout` and Slurm send it."""
    def strike(images, n):
        if n == number and os.environ.get("RANK", "0") == rank:
            if how == "bad input":
                raise BadInput("--data: too many broken images here")
            if how == "nan":
                images[0, 0, 0] = math.nan
            else:
                for child in multiprocessing.active_children():  # not by their parent
                    subprocess.run(["sh", "-c", f"kill -{how:d} {child.pid}"])
                os.killpg(0, how)
    change_batches(method, strike)
    program(method, argv)


def mortal(method, argv, function, number):
    """A program that kills itself at its nth call of a function of os."""
    real, calls = getattr(os, function), itertools.count(1)

    def call(*args):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    setattr(os, function, call)
    program(method, argv)


@pytest.mark.parametrize("method", ["mae", "capi", *(pytest.param(name, marks=pytest.mark.long) for
                                    name in ("latent_mim", "semantic_mim", "pilamim"))])
def test_a_run_that_is_killed_again_and_again_equals_an_unbroken_one(programs, tmp_path, method):
    """In a step, before a flush, and before each of the two renames. An epoch is 2.5 steps, and
    there is a save every second step. Rewriting the log is the first call of each function."""
    def run(job, name, **more):
        argv = toy_flags(method, tmp_path / name, "--epochs", 4)
        return programs.run(job, method=method, argv=argv, **more)
    killed, step_4 = tmp_path / "killed", dict(how=signal.SIGKILL, number=4)
    for saved, job, moment in [
            (2, "struck", step_4), (2, "mortal", dict(function="fsync", number=2)),
            (2, "mortal", dict(function="replace", number=3)),  # last.pt is previous.pt now
            (4, "mortal", dict(function="replace", number=3)), (6, "struck", step_4)]:
        status, _, err = run(job, "killed", **moment)
        assert status == -signal.SIGKILL and saved_step(killed) == saved, (saved, job, moment, err)
    for name in ("killed", "whole"):
        assert run("program", name)[0] == 0
    assert not list(killed.glob("*.part"))
    assert_same_run(killed, tmp_path / "whole")


def test_a_signal_saves_and_the_same_command_goes_on(programs, tmp_path):
    images, out = write_images(tmp_path / "images", 40), tmp_path / "run"
    flags = f"--epochs 10 --save-every 100 --eval-every 100 --workers 2 --data {images}".split()
    given = dict(method="mae", argv=toy_flags("mae", out, *flags), number=3)
    for step, how in ((3, signal.SIGINT), (6, signal.SIGTERM), (9, signal.SIGHUP)):
        status, told, err = programs.run("struck", how=how, **given)
        assert status == 128 + how and f"stopped by a signal after step {step};" in told, err
        assert saved_step(out) == step and "Traceback" not in err
    assert step_numbers(out) == [*range(1, 10)]


def interrupted_twice(method, argv):
    """Two SIGINTs in step 4, two seconds apart by a clock that only this moves."""
    clock = itertools.count(step=2)
    common.time = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)

    def press(images, number):
        for _ in range(2 if number == 4 else 0):
            signal.raise_signal(signal.SIGINT)
    change_batches(method, press)
    program(method, argv)


def test_a_second_ctrl_c_leaves_at_once(programs, tmp_path):
    argv = toy_flags("mae", tmp_path, "--epochs", 4)
    assert programs.run("interrupted_twice", method="mae", argv=argv)[0] == -signal.SIGINT
    assert saved_step(tmp_path) == 2  # not after this step


# -- 2. several processes

UNDER_TORCHRUN = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import common, mae
real = mae.train_batches

def stream(*args):
    for number, images in enumerate(real(*args), 1):
        if number == 5 and os.environ["RANK"] == "1":
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getppid(), signal.SIGTERM)
        yield images
mae.train_batches = stream
common.MODELS["toy"] = (32, 2, 2)
common.main(mae.train, mae.Config, "")
"""


def test_torchrun_restarts_from_the_last_save_and_passes_sigterm_on(programs, tmp_path):
    """Rank 1 of 2 kills itself in its fifth step, and after the restart it terminates torchrun.
    There are saves at steps 2 and 4. Rank 0 may still have been at that of step 4."""
    def flags(name):
        return toy_flags("mae", tmp_path / name, "--epochs", 10**5, "--eval-every", 10**5)
    (tmp_path / "script.py").write_text(UNDER_TORCHRUN)
    torchrun = "-m torch.distributed.run --standalone --max-restarts=1 --nproc_per_node=2".split()
    command = [sys.executable, *torchrun, tmp_path / "script.py", ROOT, *flags("run")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and done.stdout.count("stopped by a signal after step") == 1
    assert len(re.findall(r"resume: \S+, step [24]$", done.stdout, re.M)) == 1, done.stderr
    given = dict(method="mae", argv=flags("whole"), how=signal.SIGTERM)
    stop = saved_step(tmp_path / "run")
    assert programs.run_together("struck", number=stop, **given) == [128 + signal.SIGTERM] * 2
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("flags, status, line", [
    ("--batch-size 33", 2, "--batch-size 33 does not divide"),
    ("", 1, "not finite in the steps up to 7")])
def test_two_processes_stop_together_with_one_line(programs, tmp_path, flags, status, line):
    argv = toy_flags("mae", tmp_path, *"--epochs 4 --save-every 2".split(), *flags.split())
    given = dict(method="mae", argv=argv, how="nan", number=7, rank="1")
    assert programs.run_together("struck", **given) == [status, status], programs.said(0)
    assert (programs.said(0)[1] + programs.said(1)[1]).count(line) == 1
    if status == 1:
        state = read_checkpoint(tmp_path / "last.pt")
        assert state["step"] == 5 and all(t.isfinite().all() for t in state["model"].values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_leaves_says_why(programs, tmp_path, rank):
    argv = toy_flags("mae", tmp_path, "--epochs", 4)
    given = dict(method="mae", argv=argv, how="bad input", number=4, rank=str(rank))
    statuses = programs.run_together("struck", **given)
    told = [programs.said(r)[1] for r in (0, 1)]
    assert (statuses[rank], statuses[1 - rank]) == (2, 1), told
    assert "too many broken images here" in told[rank]
    assert "lost another process" in told[1 - rank]
    assert "Traceback" not in told[0] + told[1]


def apart(method, argv, folder, more):
    """Each rank runs in a folder of its own; rank 1 has more flags."""
    os.chdir(Path(folder, os.environ["RANK"]))
    program(method, argv + more.split() * int(os.environ["RANK"]))


APART = {  # what rank 1 has: (how its folder comes to it, its flags)
    "no checkpoint": (lambda own: shutil.rmtree(own / "run"), ""),
    "an older one": (lambda own: os.replace(own / "run/previous.pt", own / "run/last.pt"), ""),
    "fewer images": (lambda own: (own / "set/003.png").unlink(), ""),
    "another seed": (lambda own: [*map(shutil.rmtree, own.parent.glob("*/run"))], "--seed 1"),
}


@pytest.mark.parametrize("what", APART)
def test_ranks_that_disagree_do_not_train(programs, tmp_path, monkeypatch, what):
    change, more = APART[what]
    write_images(tmp_path / "0/set", 8)
    monkeypatch.chdir(tmp_path / "0")
    trained(tiny("run", data="set", batch_size=4, epochs=2, save_every=1))  # saves at steps 2 and 4
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    change(tmp_path / "1")
    before = contents(tmp_path)
    argv = tiny_flags("mae") + "--model toy --data set --batch-size 4 --epochs 4 --out run".split()
    given = {"method": "mae", "argv": argv, "folder": str(tmp_path), "more": more}
    assert programs.run_together("apart", **given) == [2, 2], programs.said(0) + programs.said(1)
    for rank in (0, 1):
        assert programs.said(rank)[1].count("ranks found different") == 1
    assert contents(tmp_path) == before


@each_method
def test_a_run_goes_on_with_another_number_of_processes(unbroken, programs, tmp_path, method):
    """One process to step 6, two to step 13, one to the end."""
    given = dict(method=method, argv=toy_flags(method, tmp_path, "--epochs", 8))
    stop = dict(how=signal.SIGTERM, **given)
    assert programs.run("struck", number=6, **stop)[0] == 128 + signal.SIGTERM
    together = programs.run_together("struck", number=7, rank="1", **stop)
    assert together == [128 + signal.SIGTERM] * 2 and saved_step(tmp_path) == 13
    assert programs.run("program", **given)[0] == 0
    whole = unbroken(method).out
    assert losses(tmp_path)[:6] == losses(whole)[:6]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)  # the log has six digits


# -- 3. saving

def test_a_full_disk_costs_no_checkpoint(tmp_path, monkeypatch):
    """The kernel lets no file grow beyond a size, as on a disk that is almost full."""
    monkeypatch.setattr(common, "save_picture", lambda *args: None)  # larger than a checkpoint
    trained(tiny(tmp_path))
    before = (tmp_path / "last.pt").read_bytes()
    in_the_log = (tmp_path / "log.jsonl").stat().st_size + 10
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (in_the_log, len(before) // 2, len(before) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(BadInput, match=f"{tmp_path}.*(File too large|disk full)"):
                mae.train(tiny(tmp_path, epochs=2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "last.pt").read_bytes() == before
    trained(tiny(tmp_path, epochs=2))  # there is room again
    assert step_numbers(tmp_path) == [1, 2, 3, 4]


def test_previous_pt_replaces_a_damaged_last_pt(tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, out):
        trained(tiny(folder, epochs=4, save_every=1))  # saves at steps 2, 4, 6, 8
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:5000])
    capsys.readouterr()
    trained(tiny(out, epochs=4, save_every=1))
    told = capsys.readouterr().out
    assert told.count(f"warning: {out}/last.pt: damaged") == 1
    assert f"resume: {out}/previous.pt, step 6" in told
    assert_same_run(whole, out)
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(b"PK and no more")
    before = contents(out)
    with pytest.raises(BadInput, match="previous.pt: damaged"):
        mae.train(tiny(out, epochs=5))
    assert contents(out) == before


def a_folder(path):
    path.mkdir()
    (path / "mine").write_text("a user's file")


def a_dangling_link(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("name, put", [
    ("last.pt", a_folder), ("last.pt", os.mkfifo), ("last.pt", a_dangling_link),
    ("last.pt.part", a_folder), ("previous.pt", a_folder), ("log.jsonl", a_folder),
    ("reconstruction.png", a_folder)])
def test_something_else_is_in_the_way(tmp_path, name, put):
    """One line says so. It stays, and the checkpoint too, but a picture is drawn after the save."""
    trained(tiny(tmp_path))
    (tmp_path / name).unlink(missing_ok=True)
    put(tmp_path / name)
    before = contents(tmp_path)
    with pytest.raises(BadInput, match=str(tmp_path)):
        mae.train(tiny(tmp_path, epochs=2))
    after, saved = contents(tmp_path), [] if name == "reconstruction.png" else ["last.pt"]
    assert os.path.lexists(tmp_path / name)
    for path in saved + [path for path in before if path.startswith(name)]:
        assert after.get(path) == before.get(path)


def test_a_second_run_in_the_same_folder_is_refused(programs, tmp_path, monkeypatch):
    def files():
        return [(tmp_path / name).read_bytes() for name in ("last.pt", "log.jsonl")]

    def start_another(images, number):
        if number == 4:
            before = files()
            for resume in ("auto", "no"):
                argv = toy_flags("mae", tmp_path, "--epochs", 8, "--resume", resume)
                found.append(programs.run("program", method="mae", argv=argv))
            assert files() == before
    found = []
    change_batches("mae", start_another, monkeypatch.setattr)
    trained(tiny(tmp_path, eval_every=1, **TWENTY | {"save_every": 1}))
    assert [status for status, _, _ in found] == [2, 2]
    assert all(f"--out {tmp_path}: another run is writing here" in err for _, _, err in found)


def test_an_error_while_looking_does_not_cost_the_training(tmp_path, monkeypatch):
    def fail(self, step):
        assert step == 0, "a bug in a picture"
        return {}
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="a bug in a picture"):
        patch.setattr(common.Look, "__call__", fail)
        mae.train(tiny(tmp_path, epochs=2))
    assert saved_step(tmp_path) == 4
    trained(tiny(tmp_path, epochs=2))  # makes up for it
    assert records(tmp_path)[-1]["step"] == 4 and "knn_kind" in records(tmp_path)[-1]


def test_a_damaged_log_does_not_stop_a_run(tmp_path):
    trained(tiny(tmp_path))
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'\xff\xfe no log }\n{}}\n[1]\nnull\n{"step": "two"}\n{"step": 2, "lo')
    trained(tiny(tmp_path, epochs=2))
    assert step_numbers(tmp_path) == [1, 2, 3, 4]


# -- 4. loading

class Payload:
    def __reduce__(self):
        return open, ("CANARY", "w")


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def flipped(whole, place):
    return whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:]


def damaged(whole, state):
    """The bytes of a checkpoint and its state -> {what happened to them: bytes}."""
    model, code = state["model"], state | {"step": Payload()}
    states = {
        "code": code, "step is negative": state | {"step": -4},
        "weights of DDP": state | {"model": {"module." + name: t for name, t in model.items()}},
        "larger weights": state | {"model": {name: torch.cat([t, t]) for name, t in model.items()}},
        "weights are numbers": state | {"model": dict.fromkeys(model, 1.0)},
        "optimizer of another model": state | {"optimizer": {"state": {}, "param_groups": []}},
    }
    for field in ("method", "config", "step", "model", "optimizer", "rng"):
        states[f"no {field}"] = {name: value for name, value in state.items() if name != field}
        states[f"{field} is a list"] = state | {field: [1, 2]}
    return {
        "empty": b"", "half": whole[:len(whole) // 2], "last byte missing": whole[:-1],
        "bit of a weight": flipped(whole, len(whole) // 2), "zeros": bytes(len(whole)),
        "empty zip": b"PK\5\6" + bytes(18), "a list": pickle.dumps([1], protocol=2),
        "code, old format": pickle.dumps(code, protocol=2),
        **{name: saved(changed) for name, changed in states.items()}}


def test_a_damaged_checkpoint_is_refused(unbroken, tmp_path, monkeypatch, capsys):
    """In one line that names it, before anything is written. evaluate.py too, if it reads that."""
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO(saved({"step": Payload()})), weights_only=False)
    os.remove("CANARY")  # the payload runs where code is allowed
    whole = (unbroken("mae").out / "last.pt").read_bytes()
    argvs = {"mae": toy_flags("mae", "run", "--epochs", 9, "--resume", "last.pt"),
             "evaluate": "last.pt --probe knn --data shapes:32".split()}
    for damage, data in damaged(whole, unbroken("mae").state).items():
        Path("last.pt").write_bytes(data)
        for name, argv in argvs.items():
            if name == "evaluate" and re.search("step|rng|optimizer", damage):
                continue
            status, lines = invoke(monkeypatch, capsys, name, argv)
            assert status == 2 and len(lines) == 1, (damage, lines)
            assert lines[0].startswith(f"{name}.py: last.pt"), (damage, lines)
            assert ("holds code" in lines[0]) == damage.startswith("code"), (damage, lines)
            assert os.listdir() == ["last.pt"], damage  # no run, and no CANARY


@pytest.mark.parametrize("method", ["mae", "capi"])
def test_an_optimizer_of_other_shapes_is_refused(unbroken, tmp_path, method):
    """torch would load it, and the fused AdamW would write beyond the end of its averages."""
    state = unbroken(method).state
    for name in [name for name in state if name.endswith("optimizer")]:
        averages = state[name]["state"]  # in the end as if the parameters had another order
        swapped = dict(zip(averages, [*averages.values()][::-1]))
        torch.save(state | {name: state[name] | {"state": swapped}}, tmp_path / "last.pt")
        with pytest.raises(BadInput, match=f"its {name} does not fit"):
            MODULES[method].train(tiny(tmp_path, method, eval_every=1, **TWENTY))


@pytest.mark.parametrize("error", [
    PermissionError(errno.EACCES, ""), OSError(errno.EIO, "Input/output error"), MemoryError(),
    RuntimeError("unable to mmap 1024 bytes from file <last.pt>: Cannot allocate memory (12)")])
def test_a_checkpoint_that_is_unreadable_now_is_not_damaged(tmp_path, monkeypatch, error):
    """Else the run would go on from previous.pt, and its next save would push last.pt out."""
    def fail(*args, **options):
        raise error
    trained(tiny(tmp_path, epochs=2, save_every=1))
    before = contents(tmp_path)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(BadInput, match="last.pt: cannot be read"):
        mae.train(tiny(tmp_path, epochs=4))
    assert contents(tmp_path) == before


# -- 5. images

def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def array(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


PHOTO = to_pil_image(noise_image(0))
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 36\n%%EndComments\nshowpage\n"
FLOATS = np.full((40, 36), np.nan, np.float32)
BROKEN = {  # file name: bytes
    "text.jpg": b"Dear diary,\n", "empty.png": b"",
    "checksum.png": flipped(encoded(PHOTO, "png"), 60),
    "floats.tif": encoded(Image.fromarray(FLOATS), "tiff"),
    "truncated.jpeg": encoded(PHOTO, "jpeg")[:-300],
    "pickle.npy": pickle.dumps(Payload()), "floats.npy": array(FLOATS[..., None]),
    "truncated.npy": array(np.zeros((40, 36, 5), np.uint8))[:-300],
    "three channels.npy": array(np.zeros((2, 2, 3), np.uint8)),
}


@pytest.mark.parametrize("name", [*BROKEN, "pipe.png"])
def test_a_broken_image_is_refused(tmp_path, name):
    """Also a pipe, which has no end."""
    path = tmp_path / name
    if name == "pipe.png":
        os.mkfifo(path)
    else:
        path.write_bytes(BROKEN[name])
    with pytest.raises((OSError, ValueError, SyntaxError, EOFError)):
        read_whole(path, 5 if name.endswith("npy") else 3)


def read_whole(path, chans):
    """All of an image that has 32 x 64 pixels -> uint8 [C, 32, 64]."""
    return common.read_crop(str(path), chans, (32, 64), lambda height, width: (0, 0, height, width))


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Pillow would start Ghostscript, whatever the file's name ends in."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho 10 >> {tmp_path}/CANARY\n")
    (tmp_path / "gs").chmod(0o755)
    (tmp_path / "photo.png").write_bytes(POSTSCRIPT)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(OSError):
        read_whole(tmp_path / "photo.png", 3)
    assert not (tmp_path / "CANARY").exists()
    with contextlib.suppress(Exception), Image.open(tmp_path / "photo.png") as image:
        image.load()
    assert (tmp_path / "CANARY").exists()  # it would have been run


@pytest.mark.parametrize("count", [2, 3])
def test_broken_images_are_named_once_and_above_one_percent_stop_the_run(tmp_path, capsys, count):
    """Of 200 images; those of val/ count by themselves. The k-NN test reads the former again."""
    for kind in ("cats", "dogs"):
        write_images(tmp_path / "set/train" / kind, 100)
        write_images(tmp_path / "set/val" / kind, 10)
    names = ["val/cats/003.png", "train/cats/000.png", "train/cats/001.png", "train/dogs/002.png"]
    for name in names[:1 + count]:
        (tmp_path / "set" / name).write_bytes(b"no image")
    stops = pytest.raises(BadInput, match="--data: 3 of 200 images")
    with stops if count == 3 else contextlib.nullcontext():
        trained(tiny(tmp_path / "run", data=str(tmp_path / "set"), eval_every=1))
    told = re.findall(r"cannot read \S+/set/(\S+) \(", capsys.readouterr().out)
    assert len(told) == len(set(told)) and set(told) >= set(names[1:1 + count])
    assert (tmp_path / "run/last.pt").exists() == (count == 2)


def test_sixteen_bits_are_scaled(tmp_path):
    """Not cut off: most of a 16-bit picture is above 255."""
    ramp = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64)
    for name, chans in (("grey.png", 1), ("grey.tif", 3)):
        Image.fromarray(ramp).save(tmp_path / name)
        image = read_whole(tmp_path / name, chans)
        difference = image.short() - torch.from_numpy((ramp // 257).astype(np.int16))
        assert difference.shape == image.shape == (chans, 32, 64) and difference.abs().max() <= 1


def test_a_folder_may_hold_links_in_circles_odd_names_and_the_run_itself(tmp_path, capsys):
    """No image is found twice, no name is a problem, and the run does not train on its pictures."""
    root = tmp_path / "set"
    write_images(root / "one", 100)
    for link, target in (("one/up", "."), ("two", "one"), ("self", "self")):
        (root / link).symlink_to(root / target)
    name = "-x %s{} море 🙂\n".encode() + b"caf\xe9.png"  # the last is not UTF-8
    for kind, data in ((b"/whole", encoded(PHOTO, "png")), (b"/torn", b"no image")):
        Path(os.fsdecode(bytes(root) + kind + name)).write_bytes(data)
    for epochs in (1, 2):
        trained(tiny(root / "run", data=str(root), batch_size=51, epochs=epochs))
        told = capsys.readouterr().out
        assert "data: 102 images " in told and told.count("warning: cannot read") == 1
    assert (root / "run/reconstruction.png").exists()


def test_a_class_folder_that_cannot_be_read_stops_the_run(tmp_path, monkeypatch):
    real = os.scandir

    def refuse(path):
        if str(path).endswith("dogs"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)
    for name in ("cats", "dogs"):
        write_images(tmp_path / name, 2)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadInput, match=r"--data.*dogs.*Permission denied"):
        mae.train(tiny(tmp_path / "run", data=str(tmp_path)))


# -- 6. numbers

@pytest.mark.parametrize("amp", ["off", "bf16"])
@each_method
def test_constant_images_give_finite_losses_and_weights(tmp_path, monkeypatch, method, amp):
    """A variance of zero is under every root and quotient."""
    change_batches(method, lambda images, n: torch.zeros_like(images), monkeypatch.setattr)
    state = trained(tiny(tmp_path, method, epochs=4, amp=amp), method)
    assert all(math.isfinite(v) for record in records(tmp_path)[1:] for v in record.values())
    assert all(t.isfinite().all() for t in state["model"].values())


def test_fp16_that_never_recovers_stops_the_run(tmp_path, monkeypatch, capsys):
    """A gradient that is not finite at any loss scale: the scaler would skip every step."""
    real = mae.build

    def build(cfg):
        model = real(cfg)
        model.cls_token.register_hook(lambda grad: grad * math.nan)
        return model
    monkeypatch.setattr(common, "choose_amp", lambda name, device: torch.float16)
    monkeypatch.setattr(mae, "build", build)
    assert mae.train(tiny(tmp_path, epochs=100, log_every=20, save_every=1000)) == 1
    assert "error: not finite in the steps up to" in capsys.readouterr().err
    assert not (tmp_path / "last.pt").exists() and "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_a_run_may_go_on_in_fp16_and_back(tmp_path, monkeypatch):
    for epochs, amp in enumerate((None, torch.float16, None), 1):
        monkeypatch.setattr(common, "choose_amp", lambda name, device: amp)
        assert trained(tiny(tmp_path, epochs=epochs))["step"] == 2 * epochs


def test_fp16_skips_a_step_that_overflows(tmp_path, monkeypatch):
    """Here in CAPI's cluster head, which has an optimizer of its own."""
    steps, real = itertools.count(1), MODULES["capi"].build

    def build(cfg):
        model = real(cfg)
        model.cluster_head.layer.bias.register_hook(
            lambda grad: grad * math.inf if next(steps) == 2 else grad)
        return model
    monkeypatch.setattr(common, "choose_amp", lambda name, device: torch.float16)
    monkeypatch.setattr(MODULES["capi"], "build", build)
    state = trained(tiny(tmp_path, "capi", epochs=2), "capi")
    assert all(t.isfinite().all() for t in state["model"].values())


# -- 7. the environment

JOIN = "WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT="


@pytest.mark.parametrize("env", [
    "WORLD_SIZE=", "WORLD_SIZE=0", "RANK=-1", "RANK=0x0", "WORLD_SIZE=2 RANK=2", "LOCAL_RANK=9",
    "WORLD_SIZE=2", JOIN + "port", JOIN + "99999", JOIN + "BUSY"])
def test_bad_environment_variables_are_one_line(tmp_path, monkeypatch, capsys, env):
    with socket.create_server(("", 0)) as taken:
        for word in env.replace("BUSY", str(taken.getsockname()[1])).split():
            monkeypatch.setenv(*word.split("="))
        status, lines = invoke(monkeypatch, capsys, "mae", toy_flags("mae", tmp_path / "run"))
    assert status == 2 and len(lines) == 1 and not (tmp_path / "run").exists(), lines


def silent(method, argv, full):
    """stdout is on a full disk, or stdout and stderr are closed."""
    if full:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    else:
        sys.stdout = sys.stderr = None  # as Python has it
        os.closerange(1, 3)
    program(method, argv)


@pytest.mark.parametrize("full", [True, False])
def test_a_run_goes_on_if_nothing_can_be_printed(programs, tmp_path, full):
    pid = programs.start("silent", method="mae", argv=toy_flags("mae", tmp_path), full=full)
    assert programs.wait(pid) == 0 and saved_step(tmp_path) == 2


def test_a_small_shared_memory_is_named(tmp_path, monkeypatch):
    """Docker gives 64 MB. Without the check the first batch would never come."""
    usage = SimpleNamespace(total=3 * 64 * 3 * 32 * 32)  # an evaluation's batch has 64 images
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    cfg = tiny(tmp_path / "run", data=str(write_images(tmp_path / "set", 40)), workers=1)
    with pytest.raises(BadInput, match="--workers 1 .*/dev/shm.*--shm-size.*--workers 0"):
        mae.train(cfg)


def stuck(method, argv):
    """A program whose loader never ends a read, as from a dead network disk."""
    real = torch.utils.data.DataLoader
    torch.utils.data.DataLoader = lambda *args, **options: real(*args, **options | {"timeout": 1})
    common.read_crop = lambda *args: time.sleep(10000)
    program(method, argv)


def test_a_stuck_loader_does_not_outlive_the_run(programs, tmp_path):
    images = write_images(tmp_path / "images", 40)
    argv = toy_flags("mae", tmp_path / "run", "--data", images, "--workers", 1)
    status, _, err = programs.run("stuck", method="mae", argv=argv)
    assert status == 1 and "timed out" in err


def test_a_killed_loader_is_named(tmp_path, monkeypatch):
    def kill(images, number):
        for child in multiprocessing.active_children():
            child.kill()
    change_batches("mae", kill, monkeypatch.setattr)
    folder = str(write_images(tmp_path / "set", 40))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        mae.train(tiny(tmp_path / "run", data=folder, workers=1, epochs=100))
    with pytest.raises(RuntimeError), common.writing("log.jsonl"):  # it died during a write
        raise RuntimeError("DataLoader worker (pid 7) is killed")


def first_batch(folder, workers):
    cfg, run = common.start(tiny("run", data=folder, workers=workers))
    return next(common.train_batches(cfg, run, common.load_data(cfg, run)[0], 0, 1))


def spawning(folder, path):
    multiprocessing.set_start_method("spawn", force=True)
    torch.save(first_batch(folder, 1), path)


def test_a_spawned_worker_reads_the_same(programs, tmp_path):
    """macOS and Windows start processes so: what they need travels by pickle."""
    folder, path = str(write_images(tmp_path / "set", 8)), str(tmp_path / "batch.pt")
    status, _, err = programs.run("spawning", folder=folder, path=path)
    assert status == 0 and "Traceback" not in err, err
    assert torch.equal(torch.load(path), first_batch(folder, 0))
