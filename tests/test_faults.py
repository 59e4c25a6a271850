"""Damage: killed runs, lost processes, full disks, broken checkpoints and images, odd machines."""

import contextlib
import errno
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torchvision.transforms.functional import to_pil_image

import common
from common import BadInput, read_checkpoint
from conftest import (METHODS, MODULES, ROOT, TWENTY, each_method, environment, launch, losses,
                      noise_image, records, tiny, tiny_flags, trained, write_images)
from programs import all_programs, program, programs  # noqa: F401, fixtures

mae = MODULES["mae"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def toy_flags(method, out, *more):
    """Saves and looks every second step, logs every step; an epoch is 2.5 steps."""
    flags = ("--model toy --data shapes:80 --warmup-epochs 2 --save-every 1 --eval-every 1 "
             "--log-every 1 --out").split()
    return [*tiny_flags(method), *flags, str(out), *map(str, more)]


def each_batch(method, change, set_attribute=setattr):
    """Call change(images, number) for every batch, number from 1. It may return other images."""
    real = MODULES[method].train_batches

    def stream(*args):
        for number, images in enumerate(real(*args), 1):
            changed = change(images, number)
            yield images if changed is None else changed
    set_attribute(MODULES[method], "train_batches", stream)


def invoke(monkeypatch, capsys, name, argv):
    """The program in this process -> exit status, its lines on stderr without the progress bar."""
    monkeypatch.setattr(sys, "argv", [])  # restored after the test
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        program(name, argv)
    lines = capsys.readouterr().err.replace("\x1b[A", "").splitlines()
    return leaving.value.code, [line for line in lines if line.strip() and "img/s" not in line]


def same(a, b):
    """Two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def result(out):
    """The checkpoint without its folder and the log of the steps without the clock."""
    state, clock = read_checkpoint(Path(out, "last.pt")), {"images_per_s": 0, "data_wait": 0}
    del state["config"]["out"]
    return state, [r | clock for r in records(out) if "loss" in r]


def steps_in(out):
    return [r["step"] for r in records(out) if "loss" in r]


def saved_step(out):
    """The step of the newest checkpoint. Every checkpoint that is there must be whole."""
    paths = [path for path in (out / "last.pt", out / "previous.pt") if path.exists()]
    return max([read_checkpoint(path)["step"] for path in paths], default=0)


def contents(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# -- 1. killed -------------------------------------------------------------------------------------

def mortal(method, argv, count=None, **moment):
    """A program that kills itself at the nth call or return of a function: counted from the start
    (`run`), from its first save (`save`), or system calls from its first save (`system`). With
    `count` it writes these numbers at the end of its first save into that file."""
    seen, saver = {"run": 0, "save": 0, "system": 0}, common.Checkpoint.save.__code__

    def profile(frame, event, what):
        seen["run"] += 1
        seen["save"] += bool(seen["save"]) or frame.f_code is saver and event == "call"
        is_system = getattr(what, "__module__", "") == "posix" and event != "return"
        seen["system"] += bool(seen["save"]) and is_system
        if moment and all(seen[kind] == number for kind, number in moment.items()):
            os.kill(os.getpid(), signal.SIGKILL)
        if count and frame.f_code is saver and event == "return":
            Path(count).write_text(json.dumps(seen))
            sys.setprofile(None)
    sys.setprofile(profile)
    program(method, argv)


@pytest.mark.parametrize("method, kills", [
    ("mae", 4), *(pytest.param(method, 20, marks=pytest.mark.long) for method in METHODS)])
def test_a_run_that_is_killed_again_and_again(programs, tmp_path, method, kills):
    """It ends as one that was not. Half of the kills are inside a save. Their moments are counted,
    not timed, so a failure comes again."""
    def run(job, name, **more):
        argv = toy_flags(method, tmp_path / name, "--epochs", 2 * kills)  # 5 steps per kill
        return programs.run(job, method=method, argv=argv, **more)
    out, count = tmp_path / "killed", tmp_path / "count"
    assert run("mortal", "whole", count=str(count))[0] == 0
    most = json.loads(count.read_text())
    moments, saved, steps = random.Random(method), 0, set()
    for kill in range(kills):
        kind = ("run", "system", "run", "save")[kill % 4]
        first, last = (most[kind], 3 * most[kind]) if kind == "run" else (1, most[kind])
        moment = {kind: moments.randint(first, last)}
        status, _, err = run("mortal", "killed", **moment)
        assert status == -signal.SIGKILL, (moment, err)
        assert saved_step(out) >= saved  # what was saved is never lost
        saved = saved_step(out)
        steps.add(saved)
    assert len(steps) >= max(2, kills // 4) and saved < 5 * kills  # in different parts of the run
    status, told, err = run("program", "killed")
    assert status == 0 and f"step {saved}" in told, err
    assert steps_in(out) == list(range(1, 5 * kills + 1)) and not list(out.glob("*.part"))
    assert same(result(out), result(tmp_path / "whole"))


def slow(method, argv, number):
    """A run in which one batch takes a minute."""
    each_batch(method, lambda images, n: time.sleep(60 * (n == number)))
    program(method, argv)


def start_slow(programs, out):
    """A run that has saved after step 2, has done step 3 and waits for the next batch -> its id."""
    pid = programs.start("slow", method="mae", argv=toy_flags("mae", out, "--epochs", 4), number=4)
    log, give_up = out / "log.jsonl", time.monotonic() + 120
    while not log.exists() or '"step": 3, ' not in log.read_text():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    return pid


def test_a_second_ctrl_c_leaves_at_once(programs, tmp_path):
    pid = start_slow(programs, tmp_path)
    while (status := programs.wait(pid, seconds=0.2)) is None:
        os.kill(pid, signal.SIGINT)
    assert status == -signal.SIGINT and saved_step(tmp_path) == 2  # not after the slow step


# -- 2. several processes --------------------------------------------------------------------------

DYING = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import common, mae
real = mae.train_batches

def stream(*args):
    for number, images in enumerate(real(*args), 1):
        is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if number == 5 and is_first and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        yield images
mae.train_batches = stream
common.MODELS["toy"] = (32, 2, 2)
common.main(mae.train, mae.Config, "")
"""


def test_torchrun_restarts_from_the_last_save(programs, tmp_path):
    """Rank 1 of 2 is killed in its fifth step, once. There are saves at steps 2 and 4."""
    def flags(name):
        return toy_flags("mae", tmp_path / name, "--epochs", 4, "--eval-every", 0)
    (tmp_path / "dying.py").write_text(DYING)
    command = launch([ROOT, *flags("run")], nproc=2, program=str(tmp_path / "dying.py"))
    command.insert(command.index("--standalone"), "--max-restarts=1")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    # Rank 0 may still have been at its save of step 4.
    assert len(re.findall(r"resume: \S+, step [24]$", done.stdout, re.M)) == 1
    assert steps_in(tmp_path / "run") == list(range(1, 11)) and saved_step(tmp_path / "run") == 10
    assert programs.run_together("program", method="mae", argv=flags("whole")) == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def poisoned(method, argv, number):
    """Rank 1 gets a pixel that is not a number."""
    def poison(images, n):
        if n == number and os.environ["RANK"] == "1":
            images[0, 0, 0] = math.nan
        if n > number:
            print("went on")
    each_batch(method, poison)
    program(method, argv)


@each_method
def test_a_nan_in_one_process_stops_both(programs, tmp_path, method):
    argv = toy_flags(method, tmp_path, "--epochs", 4, "--eval-every", 0, "--save-every", 2)
    statuses = programs.run_together("poisoned", method=method, argv=argv, number=7)
    (out, err), (other_out, other_err) = programs.said(0), programs.said(1)
    assert statuses == [1, 1], (err, other_err)
    assert err.count("not finite in the steps up to 7") == 1 and "not finite" not in other_err
    assert "went on" not in out + other_out
    state = read_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 5 and all(t.isfinite().all() for t in state["model"].values())


def leaving(method, argv, rank):
    def leave(images, n):
        if n == 4 and os.environ["RANK"] == str(rank):
            raise BadInput("--data: too many broken images here")
    each_batch(method, leave)
    program(method, argv)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_leaves_says_why(programs, tmp_path, rank):
    argv = toy_flags("mae", tmp_path, "--epochs", 4)
    statuses = programs.run_together("leaving", method="mae", argv=argv, rank=rank)
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
    "a damaged one": (lambda own: (own / "run/last.pt").write_bytes(b""), ""),
    "fewer images": (lambda own: (own / "set/003.png").unlink(), ""),
    "more epochs": (lambda own: None, "--epochs 5"),
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


def stopped(method, argv, batch):
    def stop(images, n):
        if n == batch:
            os.kill(os.getpid(), signal.SIGTERM)
    each_batch(method, stop)
    program(method, argv)


@each_method
def test_a_run_goes_on_with_another_number_of_processes(unbroken, programs, tmp_path, method):
    """One process to step 6, two to step 13, one to the end."""
    def given(batch):
        argv = toy_flags(method, tmp_path, "--epochs", 8)
        return {"method": method, "argv": argv, "batch": batch}
    assert programs.run("stopped", **given(6))[0] == 128 + signal.SIGTERM
    assert programs.run_together("stopped", **given(7)) == [128 + signal.SIGTERM] * 2
    assert saved_step(tmp_path) == 13
    assert programs.run("stopped", **given(None))[0] == 0
    whole = unbroken(method).out
    assert len(losses(tmp_path)) == 20 and losses(tmp_path)[:6] == losses(whole)[:6]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)  # the log has six digits


# -- 3. saving -------------------------------------------------------------------------------------

@contextlib.contextmanager
def largest_file(size):
    """The kernel lets no file grow beyond this size, as on a disk that is almost full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "save_picture", lambda *args: None)  # larger than a checkpoint
    trained(tiny(tmp_path))
    before = (tmp_path / "last.pt").read_bytes()
    in_the_log = (tmp_path / "log.jsonl").stat().st_size + 10
    for size in (in_the_log, len(before) // 2, len(before) - 1):
        full = pytest.raises(BadInput, match=f"{tmp_path}.*(File too large|disk full)")
        with largest_file(size), full:
            mae.train(tiny(tmp_path, epochs=2))
        assert (tmp_path / "last.pt").read_bytes() == before
    trained(tiny(tmp_path, epochs=2))  # there is room again
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_a_checkpoint_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """Else a power cut may leave half a file under the final name."""
    done, real_sync, real_replace = [], os.fsync, os.replace

    def sync(number):
        done.append(("flushed", os.fstat(number).st_size))
        real_sync(number)

    def replace(old, new):
        if Path(new).name == "last.pt":
            done.append(("renamed", os.stat(old).st_size))
        real_replace(old, new)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    trained(tiny(tmp_path))
    size = (tmp_path / "last.pt").stat().st_size
    assert done == [("flushed", size), ("renamed", size)]


@pytest.mark.parametrize("lost", [False, True])
def test_previous_pt_replaces_a_damaged_or_lost_last_pt(tmp_path, capsys, lost):
    whole, out = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, out):
        trained(tiny(folder, epochs=4, save_every=1))  # saves at steps 2, 4, 6, 8
    (out / "last.pt").rename(out / "last.pt.part")  # as if killed between two renames
    if not lost:
        (out / "last.pt").write_bytes((out / "last.pt.part").read_bytes()[:5000])
    capsys.readouterr()
    trained(tiny(out, epochs=4, save_every=1))
    told = capsys.readouterr().out
    assert told.count(f"warning: {out}/last.pt: damaged") == (not lost)
    assert f"resume: {out}/previous.pt, step 6" in told and same(result(whole), result(out))
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


def a_full_disk(path):
    path.symlink_to("/dev/full")


@pytest.mark.parametrize("name, put", [
    ("last.pt", a_folder), ("last.pt", os.mkfifo), ("last.pt", a_dangling_link),
    ("last.pt.part", a_folder), ("last.pt.part", a_full_disk), ("previous.pt", a_folder),
    ("log.jsonl", a_folder), ("log.jsonl", os.mkfifo),
    ("reconstruction.png", a_folder), ("reconstruction.png", a_full_disk)])
def test_something_else_is_in_the_way(tmp_path, name, put):
    """One line says so. It stays, and the checkpoint too, but a picture is drawn after the save."""
    trained(tiny(tmp_path))
    (tmp_path / name).unlink(missing_ok=True)
    put(tmp_path / name)
    before = contents(tmp_path)
    text = "space left|disk full" if put is a_full_disk else str(tmp_path)
    with pytest.raises(BadInput, match=text):
        mae.train(tiny(tmp_path, epochs=2))
    after, saved = contents(tmp_path), [] if name == "reconstruction.png" else ["last.pt"]
    assert os.path.lexists(tmp_path / name)
    for path in saved + [path for path in before if path.startswith(name)]:
        assert after.get(path) == before.get(path)


def test_two_runs_in_one_folder(programs, tmp_path):
    pid = start_slow(programs, tmp_path)
    before = contents(tmp_path)
    for resume in ("auto", "no"):
        with pytest.raises(BadInput, match=f"--out {tmp_path}: another run is writing here"):
            mae.train(tiny(tmp_path, resume=resume, **TWENTY))
    assert contents(tmp_path) == before
    os.kill(pid, signal.SIGKILL)
    programs.wait(pid)
    trained(tiny(tmp_path, **TWENTY))  # the lock ended with its process


def test_an_error_while_looking_does_not_cost_the_training(tmp_path, monkeypatch):
    def fail(self, step):
        assert step == 0, "a bug in a picture"
        return {}
    monkeypatch.setattr(common.Look, "__call__", fail)
    with pytest.raises(AssertionError, match="a bug in a picture"):
        mae.train(tiny(tmp_path, epochs=2))
    assert saved_step(tmp_path) == 4


def test_a_damaged_log_does_not_stop_a_run(tmp_path):
    trained(tiny(tmp_path))
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'\xff\xfe no log }\n{}}\n[1]\nnull\n{"step": "two"}\n{"step": 2, "lo')
    trained(tiny(tmp_path, epochs=2))
    assert steps_in(tmp_path) == [1, 2, 3, 4]


# -- 4. loading ------------------------------------------------------------------------------------

class Payload:
    def __reduce__(self):
        return open, ("CANARY", "w")


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def zipped(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
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
        "weights missing": state | {"model": dict([*model.items()][1:])},
        "weights are numbers": state | {"model": dict.fromkeys(model, 1.0)},
        "optimizer of another model": state | {"optimizer": {"state": {}, "param_groups": []}},
    }
    for field in ("method", "config", "step", "model", "optimizer", "rng"):
        states[f"no {field}"] = {name: value for name, value in state.items() if name != field}
        states[f"{field} is a list"] = state | {field: [1, 2]}
    return {
        "empty": b"", "one byte": whole[:1], "half": whole[:len(whole) // 2],
        "last byte missing": whole[:-1], "bit of a weight": flipped(whole, len(whole) // 2),
        "zeros": bytes(len(whole)), "zip of something else": zipped(readme="hello"),
        "a list": pickle.dumps([1], protocol=2), "code, old format": pickle.dumps(code, protocol=2),
        "code in a zip": zipped(**{"last/data.pkl": pickle.dumps(Payload(), protocol=2),
                                   "last/version": "3\n", "last/byteorder": "little"}),
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


@each_method
def test_an_optimizer_of_other_shapes_is_refused(unbroken, tmp_path, method):
    """torch would load it, and the fused AdamW would write beyond the end of its averages."""
    state = unbroken(method).state
    for name in [name for name in state if name.endswith("optimizer")]:
        averages = state[name]["state"]  # in the end as if the parameters had another order
        swapped = dict(zip(averages, [*averages.values()][::-1]))
        torch.save(state | {name: state[name] | {"state": swapped}}, tmp_path / "last.pt")
        with pytest.raises(BadInput, match=f"its {name} does not fit"):
            MODULES[method].train(tiny(tmp_path, method, eval_every=1, **TWENTY))


def test_any_bit_may_flip(unbroken, tmp_path):
    """A flip is found, or was in a byte that nobody reads."""
    whole, path = (unbroken("mae").out / "last.pt").read_bytes(), tmp_path / "last.pt"
    places, refused = random.Random(0), 0
    for most in 60 * [len(whole)] + 30 * [2000]:
        path.write_bytes(flipped(whole, place := places.randrange(most)))
        try:
            assert same(read_checkpoint(path), unbroken("mae").state), place
        except BadInput as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("error", [
    PermissionError(errno.EACCES, ""), OSError(errno.EIO, ""), MemoryError(),
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


# -- 5. images -------------------------------------------------------------------------------------

def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def npy(shape, data=b"", kind="|u1"):
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + data


PHOTO = to_pil_image(noise_image(0))
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 36\n%%EndComments\nshowpage\n"
BROKEN = {  # file name: bytes
    "text.jpg": b"Dear diary,\n", "empty.png": b"", "postscript.png": POSTSCRIPT,
    "absurd.bmp": b"BM" + struct.pack("<4I2i2H6I", 54, 0, 54, 40, 60000, 60000, 1, 24, *[0] * 6),
    "absurd.ppm": b"P6 60000 60000 255\n" + bytes(1000),
    "checksum.png": flipped(encoded(PHOTO, "png"), 60),
    "floats.tif": encoded(Image.fromarray(np.full((40, 36), np.nan, np.float32)), "tiff"),
    "noise.tif": b"II*\x00\x08\x00\x00\x00\x03\x00\xff",
}
for kind in ("jpeg", "png", "webp", "tiff", "bmp"):
    BROKEN[f"truncated.{kind}"] = encoded(PHOTO, kind)[:-300]
BROKEN_ARRAYS = {
    "empty.npy": b"", "truncated.npy": npy((40, 40, 5), bytes(100)),
    "absurd.npy": npy((60000, 60000, 5), bytes(1000)), "no pixels.npy": npy((0, 40, 5)),
    "floats.npy": npy((1, 1, 5), bytes(20), "<f4"), "three channels.npy": npy((2, 2, 3), bytes(12)),
    "zip.npy": zipped(a=npy((2, 2, 5), bytes(20))), "pickle.npy": pickle.dumps(Payload()),
}


def read_all(folder):
    """How much memory it takes to find out which images are broken."""
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    broken, before = [], None
    for chans, ending in ((3, "[!y]"), (5, ".npy")):
        paths = sorted(path for path in Path(folder).glob("*" + ending))
        data = common.Folder(np.array([os.fsencode(path) for path in paths]), {})
        reader = common.Reader(data, tiny("run", in_chans=chans), (16, 16))
        for index in (len(paths) - 1, *range(len(paths))):  # the last one is whole
            found = []
            reader.read(index, torch.rand(1, 41), found)
            broken += [paths[i].name for i, _ in found]
            before = before or peak()
    print(json.dumps([peak() - before, sorted(set(broken))]))


@linux
def test_broken_images_are_found_and_do_not_eat_the_memory(programs, tmp_path):
    for name, data in (BROKEN | BROKEN_ARRAYS).items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zz.png").write_bytes(encoded(PHOTO, "png"))
    np.save(tmp_path / "zz.npy", np.zeros((9, 9, 5), np.uint8))
    status, out, err = programs.run("read_all", folder=str(tmp_path))
    assert status == 0, err
    mib, broken = json.loads(out)
    assert broken == sorted([*BROKEN, *BROKEN_ARRAYS, "pipe.png"])
    assert mib < 100  # 60,000 x 60,000 pixels take 10 GiB


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


def read_whole(path, chans):
    """All of an image that has 32 x 64 pixels -> uint8 [C, 32, 64]."""
    return common.read_crop(str(path), chans, (32, 64), lambda height, width: (0, 0, height, width))


def test_sixteen_bits(tmp_path):
    """Scaled, not cut off: most of a 16-bit picture is above 255."""
    ramp = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64)
    for name, chans in (("grey.png", 1), ("grey.tif", 3)):
        Image.fromarray(ramp).save(tmp_path / name)
        image = read_whole(tmp_path / name, chans)
        difference = image.short() - torch.from_numpy((ramp // 257).astype(np.int16))
        assert difference.shape == image.shape == (chans, 32, 64) and difference.abs().max() <= 1


def test_links_in_circles(tmp_path):
    """No image is found twice."""
    for name in ("one", "two"):
        write_images(tmp_path / "set" / name, 2)
    for link, target in (("one/two", "two"), ("two/one", "one"), ("two/up", "."), ("self", "self")):
        (tmp_path / "set" / link).symlink_to(tmp_path / "set" / target)
    paths, _ = common.find_images(tmp_path / "set", 3)
    assert len({os.path.realpath(path) for path in paths}) == len(paths) == 4


@pytest.mark.parametrize("name", [
    "море 海 🙂.png".encode(), b"caf\xe9.png", b"two\nlines.png", b"-x %s{}.png"])
def test_names_of_files(tmp_path, capsys, name):
    """Read if they are whole, named if they are not; also a name that is not UTF-8."""
    folder = write_images(tmp_path / "set", 1)
    Path(os.fsdecode(bytes(folder) + b"/whole " + name)).write_bytes(encoded(PHOTO, "png"))
    Path(os.fsdecode(bytes(folder) + b"/torn " + name)).write_bytes(b"no image")
    trained(tiny(tmp_path / "run", data=str(folder), batch_size=3, epochs=2))
    assert capsys.readouterr().out.count("warning: cannot read") == 1


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


def test_a_run_among_its_images(tmp_path, capsys):
    """--out inside --data: the run's pictures are not trained on when it goes on."""
    folder = write_images(tmp_path / "set", 10)
    for epochs in (1, 2):
        trained(tiny(folder / "run", data=str(folder), epochs=epochs))
    assert (folder / "run/reconstruction.png").exists()
    assert capsys.readouterr().out.count("data: 10 images ") == 2


# -- 6. numbers ------------------------------------------------------------------------------------

def all_finite(out):
    return all(math.isfinite(v) for record in records(out)[1:] for v in record.values())


@pytest.mark.parametrize("value, amp", [(0.0, "off"), (3.0, "off"), (0.0, "bf16")])
@each_method
def test_constant_images(tmp_path, monkeypatch, method, value, amp):
    """A variance of zero is under every root and quotient."""
    each_batch(method, lambda images, n: torch.full_like(images, value), monkeypatch.setattr)
    state = trained(tiny(tmp_path, method, epochs=4, amp=amp), method)
    assert all_finite(tmp_path) and all(t.isfinite().all() for t in state["model"].values())


@each_method
def test_a_batch_of_one(tmp_path, method):
    trained(tiny(tmp_path, method, data="shapes:4", batch_size=1, epochs=2), method)
    assert len(losses(tmp_path)) == 8 and all_finite(tmp_path)


def test_fp16_that_never_recovers(tmp_path, monkeypatch, capsys):
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


# -- 7. the environment ----------------------------------------------------------------------------

JOIN = "WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT="


@pytest.mark.parametrize("env", [
    "WORLD_SIZE=", "RANK=", "RANK=-1", "RANK=0x0", "RANK=3", "WORLD_SIZE=2 RANK=2", "LOCAL_RANK=9",
    "LOCAL_WORLD_SIZE=1.5", "WORLD_SIZE=2", JOIN + "port", JOIN + "99999", JOIN + "BUSY"])
def test_bad_environment_variables_are_one_line(tmp_path, monkeypatch, capsys, env):
    with socket.create_server(("", 0)) as taken:
        for word in env.replace("BUSY", str(taken.getsockname()[1])).split():
            monkeypatch.setenv(*word.split("="))
        status, lines = invoke(monkeypatch, capsys, "mae", toy_flags("mae", tmp_path / "run"))
    assert status == 2 and len(lines) == 1 and not (tmp_path / "run").exists(), lines


@pytest.mark.parametrize("streams", [">&- 2>&-", ">/dev/full"])
def test_a_run_goes_on_if_nothing_can_be_printed(tmp_path, streams):
    """stdout and stderr are closed; stdout is on a full disk."""
    command = launch([*tiny_flags("mae"), "--log-every", 1, "--out", tmp_path])
    done = subprocess.run(" ".join([*command, streams]), shell=True, env=environment(), timeout=240)
    assert done.returncode == 0 and saved_step(tmp_path) == 2


@each_method
def test_help_without_docstrings(capsys, method):
    """python -OO removes them."""
    with pytest.raises(SystemExit, match="0"):
        common.parse_args(MODULES[method].Config, None, ["--help"])
    assert "--batch-size" in capsys.readouterr().out


def test_a_small_shared_memory_is_named(tmp_path, monkeypatch):
    """Docker gives 64 MB. Without the check the first batch would never come."""
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    cfg = tiny(tmp_path / "run", data=str(write_images(tmp_path / "set", 40)), workers=1)
    with pytest.raises(BadInput, match="--workers 1 .*/dev/shm.*--shm-size.*--workers 0"):
        mae.train(cfg)


# -- 8. memory and loader processes ----------------------------------------------------------------

def measured(method, argv, every, path):
    """Resident memory in MiB and the number of open files, every so many batches."""
    seen = []

    def look(images, n):
        if n % every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd"))))
            Path(path).write_text(json.dumps(seen))
    each_batch(method, look)
    program(method, argv)


@linux
@pytest.mark.long
@pytest.mark.parametrize("method, more", [
    *((method, "") for method in METHODS), ("mae", "--data FOLDER --workers 2")])
def test_memory_stays_flat(programs, tmp_path, method, more):
    """2,000 steps with saves, k-NN tests and pictures in between; the first 400 warm up."""
    folder = write_images(tmp_path / "set", 80)
    more = "--epochs 800 --save-every 40 --eval-every 40 " + more.replace("FOLDER", str(folder))
    argv, seen = toy_flags(method, tmp_path / "run", *more.split()), tmp_path / "seen"
    pid = programs.start("measured", method=method, argv=argv, every=20, path=str(seen))
    assert programs.wait(pid, seconds=1800) == 0 and len(losses(tmp_path / "run")) == 2000
    memory, opened = np.array(json.loads(seen.read_text()))[20:].T.reshape(2, 2, -1)  # two halves
    # Buffers of 24 MiB come and go, so the floor and the ceiling of the two halves are compared.
    (floor, ceiling), (later_floor, later_ceiling) = np.quantile(memory, (0.1, 0.9), axis=1).T
    assert later_floor < 1.01 * floor and later_ceiling < 1.02 * ceiling, memory
    assert opened[1].max() <= opened[0].max() + 2, opened


class AllNames(common.Reader):
    """Reads 1 of 50 parts of all names, then the first image."""

    def __getitem__(self, item):
        part = len(self.data) // 50
        at = item[0][0] % 50 * part
        assert all(self.data.paths[at:at + part])
        return super().__getitem__(([0], None))


def share_of_workers(workers, count, path):
    """Loader processes read all names of a set -> their number, the MiB that each has copied, and
    the MiB of the set."""
    def alone():
        told = [Path(f"/proc/{child.pid}/smaps_rollup").read_text() for child in children]
        return [int(re.search(r"Private_Dirty:\s+(\d+)", text)[1]) / 1024 for text in told]
    name = os.path.dirname(path) + "/." * ((400 - len(path)) // 2) + "/" + os.path.basename(path)
    data = common.Folder(np.full(count, os.fsencode(name)), {})
    cfg, run = common.start(tiny("run", workers=workers))
    common.Reader = AllNames
    crops = ((torch.tensor([i // workers]), None) for i in range(200 * workers))
    batches = common.read_batches(cfg, run, data, crops, (8, 8))
    for _ in range(workers):  # each has read an image, and at most a tenth of the names
        next(batches)
    children = multiprocessing.active_children()
    before = alone()
    for _ in range(100 * workers):
        next(batches)
    copied = max(np.subtract(alone(), before))
    print(json.dumps([len(children), copied, data.paths.nbytes / 2**20]))


@linux
@pytest.mark.parametrize("workers, count", [
    (2, 200_000), pytest.param(8, 500_000, marks=pytest.mark.long)])
def test_workers_share_the_set(programs, tmp_path, workers, count):
    """400 bytes per name: a process that touches a Python list of names copies it page by page."""
    path = str(write_images(tmp_path, 1) / "000.png")
    status, out, err = programs.run("share_of_workers", workers=workers, count=count, path=path)
    assert status == 0, err
    children, copied, in_all = json.loads(out)
    assert children == workers and in_all > 70 and copied < 0.3 * in_all


def spawning(method, argv):
    multiprocessing.set_start_method("spawn", force=True)
    common.Look.__init__ = lambda *args: None  # one loader is enough of seconds
    common.Look.__call__ = lambda *args: {}
    program(method, argv)


def test_spawned_workers_change_nothing(programs, tmp_path):
    """macOS and Windows start processes so: what they need travels by pickle."""
    more = f"--epochs 4 --batch-size 8 --data {write_images(tmp_path / 'set', 8)} --workers"
    for job, workers in (("spawning", 1), ("program", 0)):
        argv = toy_flags("mae", tmp_path / job, *more.split(), workers)
        status, _, err = programs.run(job, method="mae", argv=argv)
        assert status == 0 and "Traceback" not in err, err
    assert losses(tmp_path / "spawning") == losses(tmp_path / "program") != []
