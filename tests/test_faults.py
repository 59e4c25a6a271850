"""The damage: killed runs, dying processes, full disks, broken checkpoints and images, wrong flags, long runs. What a run
does when nothing is wrong stands in the other files. `pytest --long` adds the long form, half an hour of it."""

import ast
import contextlib
import dataclasses
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
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import common
import evaluate
from common import BadInput, main, parse_args, read_checkpoint
from conftest import (FIXTURES, METHODS, MODULES, ROOT, TOY, TWENTY, environment, launch, losses, noise_image, records, tiny,
                      tiny_flags, trained, write_images)

each_method = pytest.mark.parametrize("method", METHODS)
PROGRAMS = {name: (module.train, module.Config, module.__doc__) for name, module in MODULES.items()}
PROGRAMS["evaluate"] = evaluate.evaluate, evaluate.Config, evaluate.__doc__
PATHS = [str(ROOT / "tests"), str(ROOT)]
linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is measured as Linux tells it")


# -- programs in processes that are there at once -------------------------------------------------------

def serve():
    """Runs in a process of its own, which imports everything once. Each line that it is sent names a function of this file,
    which runs in a fork of it: a whole program, to be killed at will, without the seconds that importing torch takes."""
    common.MODELS["toy"] = TOY
    common.SHARED["model"] = (*common.SHARED["model"][:2], tuple(common.MODELS))
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            give_up = time.monotonic() + order["seconds"]
            while not (ended := os.waitpid(order["wait"], os.WNOHANG))[0] and time.monotonic() < give_up:
                time.sleep(0.01)
            print(json.dumps(os.waitstatus_to_exitcode(ended[1]) if ended[0] else None), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            os.environ.update(order["env"])
            for number in (1, 2):
                os.dup2(os.open(f"{order['told']}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            status = 1
            try:
                globals()[order["job"]](**order["given"])
                status = 0
            except SystemExit as leaving:
                status = leaving.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)  # taking torch down would cost a second


class Programs:
    def __init__(self, folder):
        code = f"import sys; sys.path[:0] = {PATHS}; import test_faults; test_faults.serve()"
        self.server = subprocess.Popen([sys.executable, "-c", code], env=environment(), text=True, bufsize=1,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.told, self.running = str(folder / "told"), set()

    def ask(self, **order):
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, job, env={}, **given):
        pid = self.ask(job=job, env=env, given=given, told=self.told + env.get("RANK", ""))
        self.running.add(pid)
        return pid

    def wait(self, pid, seconds=60):
        """-> exit status, minus the signal that it died of; None while it still runs."""
        status = self.ask(wait=pid, seconds=seconds)
        self.running -= {pid} if status is not None else set()
        return status

    def run(self, job, **given):
        """-> exit status, what it said on stdout and on stderr."""
        status = self.wait(self.start(job, **given))
        return status, *self.said()

    def said(self, rank=""):  # on stdout, on stderr
        return [Path(f"{self.told}{rank}.{number}").read_text() for number in (1, 2)]

    def run_together(self, job, count=2, **given):
        """The processes that torchrun would start -> their exit statuses."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count),
                     "LOCAL_WORLD_SIZE": str(count)}
        pids = [self.start(job, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **given) for rank in range(count)]
        return [self.wait(pid) for pid in pids]


@pytest.fixture(scope="module")
def all_programs(tmp_path_factory):
    programs = Programs(tmp_path_factory.mktemp("programs"))
    yield programs
    programs.server.stdin.close()
    programs.server.wait()


@pytest.fixture
def programs(all_programs):
    yield all_programs
    for pid in list(all_programs.running):  # a test that failed has left them
        os.kill(pid, signal.SIGKILL)
        all_programs.wait(pid)


def program(method, argv):
    sys.argv = [f"{method}.py", *argv]
    main(*PROGRAMS[method])


def each_batch(method, change, set_attribute=setattr):
    """Every batch of a run goes through change(images, number), number from 1."""
    real = MODULES[method].train_batches

    def stream(*args):
        for number, images in enumerate(real(*args), 1):
            yield change(images, number)
    set_attribute(MODULES[method], "train_batches", stream)


def toy_flags(method, out, *more):
    """Saves and looks every second step, logs every step; an epoch is 2.5 steps."""
    return [*tiny_flags(method), *"--model toy --data shapes:80 --warmup-epochs 2 --save-every 1 --eval-every 1 "
            "--log-every 1 --out".split(), str(out), *map(str, more)]


def invoke(monkeypatch, capsys, name, argv):
    """main() in this process -> exit status, and the lines on stderr but for those that a progress bar draws."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main(*PROGRAMS[name])
    lines = re.sub(r"\x1b\[A", "", capsys.readouterr().err).splitlines()
    return leaving.value.code, [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)]


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
    """What two runs of one command have to agree in: the checkpoint but for its folder, the log but for the clock."""
    state = read_checkpoint(Path(out, "last.pt"))
    del state["config"]["out"]
    return state, [{k: v for k, v in r.items() if k not in ("images_per_s", "data_wait")} for r in records(out) if "step" in r]


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# -- 1. killed ------------------------------------------------------------------------------------------

def mortal(method, argv, count=None, **moment):
    """A program that SIGKILLs itself at one call or return of a function, Python's or C's: so many from the start on (`run`),
    from the begin of its first save (`save`), or of what the system is asked for in it (`system`: flush, link, rename).
    Or writes into a file how many there are until the end of the first save."""
    seen, saver = {"run": 0, "save": 0, "system": 0}, common.save_checkpoint.__code__

    def profile(frame, event, what):
        seen["run"] += 1
        seen["save"] += bool(seen["save"]) or frame.f_code is saver and event == "call"
        seen["system"] += bool(seen["save"]) and getattr(what, "__module__", "") == "posix" and event != "return"
        if moment and all(seen[kind] == number for kind, number in moment.items()):
            os.kill(os.getpid(), signal.SIGKILL)
        if count and frame.f_code is saver and event == "return" and not Path(count).exists():
            Path(count).write_text(json.dumps(seen))
    sys.setprofile(profile)
    program(method, argv)


def saved_step(out):
    """Of the newest checkpoint; every one that is there has to be whole."""
    return max([read_checkpoint(path)["step"] for path in (out / "last.pt", out / "previous.pt") if path.exists()], default=0)


@pytest.mark.parametrize("method, kills", [
    ("mae", 4), *(pytest.param(method, 20, marks=pytest.mark.long) for method in METHODS)])
def test_killed_again_and_again(programs, tmp_path, method, kills):
    """Half of the kills are inside a save. Moments are counted, not timed, so that a failure comes again."""
    argv = lambda name: toy_flags(method, tmp_path / name, "--epochs", 2 * kills)  # 5 steps a kill: too many to finish before
    assert programs.run("mortal", method=method, argv=argv("whole"), count=str(tmp_path / "count"))[0] == 0
    most = json.loads((tmp_path / "count").read_text())
    most["run"] *= 3
    moments, saved, steps = random.Random(method), 0, set()
    for kill in range(kills):
        kind = ("run", "system", "run", "save")[kill % 4]
        moment = {kind: moments.randrange(most[kind] // 3 if kind == "run" else 1, most[kind] + 1)}
        assert programs.run("mortal", method=method, argv=argv("killed"), **moment)[0] == -signal.SIGKILL, moment
        assert saved_step(tmp_path / "killed") >= saved  # nothing that was saved is lost again
        saved = saved_step(tmp_path / "killed")
        steps.add(saved)
    assert len(steps) >= max(2, kills // 4) and saved < 5 * kills  # they fell on different stretches of the run
    status, out, _ = programs.run("program", method=method, argv=argv("killed"))
    assert status == 0 and f"step {saved}" in out
    assert [r["step"] for r in records(tmp_path / "killed") if "loss" in r] == list(range(1, 5 * kills + 1))
    assert same(result(tmp_path / "killed"), result(tmp_path / "whole"))
    assert not list((tmp_path / "killed").glob("*.part"))


@pytest.mark.long
@each_method
def test_killed_from_outside(programs, tmp_path, method):
    """By the clock, so in the middle of computing too; one that came too late to kill is not counted."""
    argv = lambda name: toy_flags(method, tmp_path / name, "--epochs", 40)
    began = time.monotonic()
    assert programs.run("program", method=method, argv=argv("whole"))[0] == 0
    seconds, moments, killed = time.monotonic() - began, random.Random(method), 0
    for _ in range(20):
        pid = programs.start("program", method=method, argv=argv("killed"))
        time.sleep(moments.uniform(0, seconds / 5))
        os.kill(pid, signal.SIGKILL)
        killed += programs.wait(pid) == -signal.SIGKILL
    assert killed >= 5 and programs.run("program", method=method, argv=argv("killed"))[0] == 0
    assert same(result(tmp_path / "killed"), result(tmp_path / "whole"))


def slow(method, argv, number, seconds):
    """One batch that takes long to come."""
    each_batch(method, lambda images, n: (time.sleep(seconds * (n == number)), images)[1])
    program(method, argv)


def wait_for_step(out, step):
    give_up = time.monotonic() + 60
    line = f'"step": {step}, "images": {32 * step}, "lr"'
    while not (out / "log.jsonl").exists() or line not in (out / "log.jsonl").read_text():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_second_ctrl_c_leaves_at_once(programs, tmp_path):
    pid = programs.start("slow", method="mae", argv=toy_flags("mae", tmp_path, "--epochs", 4), number=4, seconds=60)
    wait_for_step(tmp_path, 3)
    os.kill(pid, signal.SIGINT)  # as asked, the step is finished first, however long it takes
    assert programs.wait(pid, seconds=1.5) is None
    os.kill(pid, signal.SIGINT)
    assert programs.wait(pid, seconds=5) == -signal.SIGINT
    assert saved_step(tmp_path) == 2
    assert programs.run("program", method="mae", argv=toy_flags("mae", tmp_path, "--epochs", 4))[0] == 0
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == list(range(1, 11))


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_the_exit_statuses(capsys, name):
    _, Config, doc = PROGRAMS[name]
    with pytest.raises(SystemExit) as leaving:
        parse_args(Config, doc, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert leaving.value.code == 0 and re.search(r"exit status: 0 .*1 .*2 bad input, 128 \+ n stopped by signal n", text)


# -- 2. one of several processes dies -------------------------------------------------------------------

DYING = """
import datetime, os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import common, mae
real = mae.train_batches

def stream(*args):
    for number, images in enumerate(real(*args), 1):
        if number == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        yield images
mae.train_batches = stream
join = common.dist.init_process_group
common.dist.init_process_group = lambda backend, **_: join(backend, timeout=datetime.timedelta(seconds=15))
common.MODELS["toy"] = (32, 2, 2)
common.SHARED["model"] = ("model", "", ("toy",))
common.main(mae.train, mae.Config, "")
"""


def test_torchrun_restarts_from_the_last_save(programs, tmp_path):
    """Process 1 of 2 is killed in its fifth step, once; saves are made at steps 2 and 4."""
    (tmp_path / "dying.py").write_text(DYING)
    flags = lambda name: toy_flags("mae", tmp_path / name, "--epochs", 4, "--eval-every", 0)
    command = launch([ROOT, *flags("run")], nproc=2, program=str(tmp_path / "dying.py"))
    command.insert(command.index("--standalone"), "--max-restarts=3")
    for _ in range(2):  # once in a while gloo itself does not find its peers after a restart; it does not do so twice
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    # Process 0 may still have been at its save of step 4, which counts as whole or not at all.
    assert re.search(r"resume: \S+, step [24]$", done.stdout, re.M) and done.stdout.count("resume: ") == 1, done.stdout
    assert [r["step"] for r in records(tmp_path / "run") if "loss" in r] == list(range(1, 11))
    assert saved_step(tmp_path / "run") == 10
    assert programs.run_together("program", method="mae", argv=flags("whole")) == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def poisoned(method, argv, rank, number, value):
    """One process of several gets pixels that are no numbers."""
    def poison(images, n):
        if n == number and os.environ.get("RANK") == str(rank):
            images[0, 0, 0] = value
        Path(f"{argv[argv.index('--out') + 1]}.batches.{os.environ.get('RANK')}").write_text(str(n))
        return images
    each_batch(method, poison)
    program(method, argv)


@each_method
def test_one_process_with_a_nan_stops_both(programs, tmp_path, method):
    argv = toy_flags(method, tmp_path / "run", "--epochs", 4, "--eval-every", 0, "--save-every", 2, "--log-every", 20)
    statuses = programs.run_together("poisoned", method=method, argv=argv, rank=1, number=7, value=math.nan)
    told = [Path(f"{programs.told}{rank}.2").read_text() for rank in (0, 1)]
    assert statuses == [1, 1], told  # none waits for the other
    assert told[0].count("not finite since step 7 ") == 1 and "not finite" not in told[1]
    assert [(tmp_path / f"run.batches.{rank}").read_text() for rank in (0, 1)] == ["7", "7"]  # in that very step
    assert [r["step"] for r in records(tmp_path / "run") if "loss" in r] == [5]
    state = read_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == 5 and all(t.isfinite().all() for t in state["model"].values())


def leaving(method, argv, number):
    """The second process finds something that it cannot go on with."""
    def leave(images, n):
        if n == number and os.environ["RANK"] == "1":
            raise common.BadHere("--data: too many broken images here")
        return images
    each_batch(method, leave)
    program(method, argv)


def test_one_process_that_leaves_is_not_buried(programs, tmp_path):
    statuses = programs.run_together("leaving", method="mae", argv=toy_flags("mae", tmp_path / "run", "--epochs", 4), number=4)
    told = [Path(f"{programs.told}{rank}.2").read_text() for rank in (0, 1)]
    assert statuses == [1, 2] and told[1].count("mae.py: --data: too many broken images here") == 1
    assert "Traceback" not in told[0] and told[0].count("mae.py: process 0 has lost the others") == 1, told[0]


# -- 3. another number of processes ---------------------------------------------------------------------

def stopped(method, argv, batch):
    each_batch(method, lambda images, n: (n == batch and os.kill(os.getpid(), signal.SIGTERM), images)[1])
    program(method, argv)


@pytest.mark.parametrize("method, accum", [("mae", 2), ("semantic_mim", 2), ("pilamim", 2), ("latent_mim", 1), ("capi", 1)])
def test_a_run_goes_on_on_another_number_of_processes(unbroken, programs, tmp_path, method, accum):
    """One process to step 6, two to step 13, one to the end. (CAPI and Latent MIM take whole batches: see test_train.py's
    test_accumulation_changes_nothing.)"""
    argv = lambda micro: toy_flags(method, tmp_path, "--epochs", 8, "--accum", micro)
    assert programs.run("stopped", method=method, argv=argv(1), batch=6)[0] == 128 + signal.SIGTERM
    pair = programs.run_together("stopped", method=method, argv=argv(accum), batch=7 * accum)
    assert pair == [128 + signal.SIGTERM] * 2 and saved_step(tmp_path) == 13
    assert f"2 processes x {accum} micro-batches" in Path(programs.told + "0.1").read_text()
    assert programs.run("program", method=method, argv=argv(accum))[0] == 0
    whole = unbroken(method).out
    assert len(losses(tmp_path)) == 20 and losses(tmp_path)[:6] == losses(whole)[:6]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)  # the log has six digits


# -- 4. saving ------------------------------------------------------------------------------------------

@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond so many bytes: as good as a full disk, and the kernel's own doing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@each_method
def test_a_disk_that_is_full(tmp_path, monkeypatch, method):
    monkeypatch.setattr(common, "save_picture", lambda *args: None)  # a larger file than the toy's checkpoint
    monkeypatch.setattr(MODULES[method], "save_picture", lambda *args: None)
    trained(tiny(tmp_path, method), method)
    before = (tmp_path / "last.pt").read_bytes()
    for part in (0.05, 0.5, 0.999):
        with largest_file(int(part * len(before))), pytest.raises(BadInput) as error:
            MODULES[method].train(tiny(tmp_path, method, epochs=2))
        assert re.fullmatch(rf"--out {tmp_path}: cannot save \(.+\); the last good checkpoint, {tmp_path}/last.pt, is "
                            "untouched", str(error.value))
        assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.part"))
    trained(tiny(tmp_path, method, epochs=2), method)  # there is room again
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 2, 3, 4]


@pytest.mark.parametrize("what", ["log", "picture"])
def test_a_disk_that_is_full_before_the_save(tmp_path, monkeypatch, capsys, what):
    """Log and pictures are written more often than checkpoints: they meet the full disk first."""
    flags = [*tiny_flags("mae"), "--model", "nano", "--log-every", "1", "--eval-every", "1", "--out", tmp_path]
    assert invoke(monkeypatch, capsys, "mae", flags)[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    room = (tmp_path / "log.jsonl").stat().st_size + (10 if what == "log" else 3000)
    with largest_file(room):
        status, lines = invoke(monkeypatch, capsys, "mae", [*flags, "--epochs", "2"])
    assert status == 2 and len(lines) == 1 and str(tmp_path) in lines[0] and "large" in lines[0], lines
    assert (tmp_path / "last.pt").read_bytes() == before
    assert invoke(monkeypatch, capsys, "mae", [*flags, "--epochs", "2"])[0] == 0
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 2, 3, 4]


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    """After a power cut a file that was renamed before it was flushed is empty, or half of itself."""
    flushed, renamed = {}, []
    real_sync, real_replace = os.fsync, os.replace

    def sync(number):
        flushed[os.fstat(number).st_ino] = os.fstat(number).st_size
        real_sync(number)

    def replace(old, new):
        if Path(new).name == "last.pt":
            renamed.append((flushed.get(os.stat(old).st_ino), os.stat(old).st_size))
        real_replace(old, new)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    trained(tiny(tmp_path, epochs=2, save_every=1))
    assert len(renamed) == 2 and all(safe == size > 1000 for safe, size in renamed)


@each_method
def test_the_last_two_are_kept(tmp_path, capsys, method):
    whole, out = tmp_path / "whole", tmp_path / "run"
    trained(tiny(whole, method, epochs=4), method)
    trained(tiny(out, method, epochs=4, save_every=1), method)  # saves at steps 2, 4, 6, 8
    assert read_checkpoint(out / "last.pt")["step"] == 8 and read_checkpoint(out / "previous.pt")["step"] == 6
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:5000])
    capsys.readouterr()
    trained(tiny(out, method, epochs=4), method)
    told = capsys.readouterr().out
    assert told.count("warning: ") - told.count("data-bound") == 1 and told.count(f"{out}/last.pt: cannot be read") == 1
    assert f"resume: {out}/previous.pt, step 6" in told
    assert [r["step"] for r in records(out) if "loss" in r] == list(range(1, 9))
    (first, first_log), (second, second_log) = result(whole), result(out)
    first["config"].pop("save_every"), second["config"].pop("save_every")
    assert same(first, second) and first_log == second_log


def test_nothing_stands_in_for_two_bad_ones(tmp_path, monkeypatch, capsys):
    trained(tiny(tmp_path, epochs=2, save_every=1))
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"PK and no more")
    before = contents(tmp_path)
    with pytest.raises(BadInput, match=r"(last|previous).pt: cannot be read") as error:
        MODULES["mae"].train(tiny(tmp_path, epochs=4))
    assert "\n" not in str(error.value) and contents(tmp_path) == before  # never from scratch over what was a run
    # named by hand it is that file or none, and another method's is a mistake of the user's, not damage
    trained(tiny(tmp_path, epochs=2, save_every=1, resume="no"))
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(BadInput, match="last.pt"):
        MODULES["mae"].train(tiny(tmp_path / "other", epochs=4, resume=str(tmp_path / "last.pt")))


def test_a_move_that_was_cut_in_two(tmp_path, capsys):
    """Killed when the old checkpoint had been moved aside and the new one not yet put in its place."""
    trained(tiny(tmp_path, epochs=2, save_every=1))
    (tmp_path / "last.pt").rename(tmp_path / "last.pt.part")
    capsys.readouterr()
    trained(tiny(tmp_path, epochs=2))
    assert "previous.pt, step 2" in capsys.readouterr().out
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 2, 3, 4]


@pytest.mark.parametrize("damaged", [False, True])
def test_the_last_rename_fails(tmp_path, monkeypatch, capsys, damaged):
    """Whatever happens while two files change places, a good one stays, and is named."""
    trained(tiny(tmp_path, epochs=2, save_every=1))
    if damaged:
        (tmp_path / "last.pt").write_bytes(b"")
    real = os.replace

    def refuse(old, new):
        if Path(old).name == "last.pt.part":
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="--out.*Input/output error") as error:
        patch.setattr(os, "replace", refuse)
        MODULES["mae"].train(tiny(tmp_path, epochs=3))
    named = re.search(r"the last good checkpoint, (\S+),", str(error.value))
    assert named and read_checkpoint(named[1])["step"] == (2 if damaged else 4)
    trained(tiny(tmp_path, epochs=3))
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 2, 3, 4, 5, 6]


def a_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "mine").write_text("a user's file")


@pytest.mark.parametrize("name, put, resume", [
    ("last.pt", a_folder, "auto"), ("last.pt", a_folder, "no"), ("last.pt.part", a_folder, "auto"),
    ("previous.pt", a_folder, "auto"), ("log.jsonl", a_folder, "auto"), ("reconstruction.png", a_folder, "auto"),
    ("last.pt", lambda path: path.write_text("a user's text"), "auto"),
    ("log.jsonl", lambda path: path.write_bytes(b"\xff\xfe no log }\n{}}\n"), "auto")])
def test_something_else_is_in_the_way(tmp_path, monkeypatch, capsys, name, put, resume):
    """Of a file that the run wants to write: one line that names it or --out, and neither it nor a checkpoint is touched."""
    flags = [*tiny_flags("mae"), "--log-every", "1", "--out", tmp_path]
    assert invoke(monkeypatch, capsys, "mae", flags)[0] == 0
    put(tmp_path / name)
    before = contents(tmp_path)
    status, lines = invoke(monkeypatch, capsys, "mae", [*flags, "--epochs", "2", "--resume", resume])
    assert status == 2 and len(lines) == 1 and str(tmp_path) in lines[0], lines
    after = contents(tmp_path)
    kept = [path for path in before if path.startswith(name) or path == "last.pt" and resume == "auto"]
    assert kept and all(after[path] == before[path] for path in kept)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch, capsys):
    flags = [*tiny_flags("mae"), "--out", tmp_path]
    assert invoke(monkeypatch, capsys, "mae", flags)[0] == 0
    before = contents(tmp_path)
    tmp_path.chmod(0o555)
    try:
        status, lines = invoke(monkeypatch, capsys, "mae", [*flags, "--epochs", "2"])
    finally:
        tmp_path.chmod(0o755)
    assert status == 2 and len(lines) == 1 and f"--out {tmp_path}" in lines[0] and contents(tmp_path) == before


def test_a_folder_that_is_taken_away(tmp_path, monkeypatch):
    each_batch("mae", lambda images, n: (n == 4 and shutil.rmtree(tmp_path / "run"), images)[1], monkeypatch.setattr)
    monkeypatch.setattr(MODULES["mae"], "save_picture", lambda *args: None)
    with pytest.raises(BadInput, match="--out .*run: cannot save") as error:
        MODULES["mae"].train(tiny(tmp_path / "run", epochs=2))
    assert "good checkpoint" not in str(error.value)  # there is none any more


# -- 5. loading -----------------------------------------------------------------------------------------

class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (self.canary, "w")


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


def renamed(prefix):
    return lambda whole, state: saved(state | {"model": {prefix + k: v for k, v in state["model"].items()}})


def another_size(state):
    """The Config is right, the weights are of an encoder twice as wide."""
    return {k: torch.cat([t, t]) if t.ndim else t for k, t in state.items()}


DAMAGE = {  # what happened: (bytes of a whole checkpoint, its state) -> bytes
    "empty": lambda whole, state: b"",
    "one byte": lambda whole, state: whole[:1],
    "half": lambda whole, state: whole[:len(whole) // 2],
    "last byte missing": lambda whole, state: whole[:-1],
    "bit of a weight": lambda whole, state: flipped(whole, len(whole) // 2),
    "bit of the directory": lambda whole, state: flipped(whole, len(whole) - 200),
    "zeros": lambda whole, state: bytes(len(whole)),
    "zip without data": lambda whole, state: zipped(),
    "zip of something else": lambda whole, state: zipped(readme="hello"),
    "code": lambda whole, state: saved(state | {"step": Payload("CANARY")}),
    "code, old format": lambda whole, state: pickle.dumps(state | {"step": Payload("CANARY")}, protocol=2),
    "code in a zip": lambda whole, state: zipped(**{"last/data.pkl": pickle.dumps(Payload("CANARY"), protocol=2),
                                                    "last/version": "3\n", "last/byteorder": "little"}),
    "weights of another size": lambda whole, state: saved(state | {"model": another_size(state["model"])}),
    "weights of DDP": renamed("module."),
    "weights of torch.compile": renamed("_orig_mod."),
    "weights missing": lambda whole, state: saved(state | {"model": dict([*state["model"].items()][1:])}),
    "no dict": lambda whole, state: saved([*state.values()]),
    "no step": lambda whole, state: saved({k: v for k, v in state.items() if k != "step"}),
    "no config": lambda whole, state: saved({k: v for k, v in state.items() if k != "config"}),
    "no model": lambda whole, state: saved({k: v for k, v in state.items() if k != "model"}),
    "no optimizer": lambda whole, state: saved({k: v for k, v in state.items() if k != "optimizer"}),
    "optimizer of another model": lambda whole, state: saved(state | {"optimizer": {"state": {}, "param_groups": []}}),
    "config is a list": lambda whole, state: saved(state | {"config": [1, 2]}),
    "step is a word": lambda whole, state: saved(state | {"step": "ten"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@each_method
def test_a_damaged_checkpoint(unbroken, tmp_path, monkeypatch, method, damage):
    """No line of log, no picture, no tensor taken from it: refused before anything is written, in one line that names it."""
    monkeypatch.chdir(tmp_path)
    whole = (unbroken(method).out / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(DAMAGE[damage](whole, dict(unbroken(method).state)))
    cfg = tiny("run", method, eval_every=1, **TWENTY | {"epochs": 9}, resume=str(tmp_path / "last.pt"))
    with pytest.raises(BadInput, match="last.pt") as error:
        MODULES[method].train(cfg)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert ("unpickling of code" in str(error.value)) == ("code" in damage)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]  # no run, and no CANARY


@pytest.mark.parametrize("damage", DAMAGE)
def test_evaluate_of_a_damaged_checkpoint(unbroken, tmp_path, monkeypatch, capsys, damage):
    if damage in ("no step", "no optimizer", "optimizer of another model", "step is a word"):
        pytest.skip("nothing that evaluate.py takes from a checkpoint")
    monkeypatch.chdir(tmp_path)
    whole = (unbroken("mae").out / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(DAMAGE[damage](whole, dict(unbroken("mae").state)))
    status, lines = invoke(monkeypatch, capsys, "evaluate", ["last.pt", "--probe", "knn", "--data", "shapes:32"])
    assert status == 2 and len(lines) == 1 and lines[0].startswith("evaluate.py: last.pt"), lines
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_the_payload_is_live(tmp_path, monkeypatch):
    """Else its not being run would prove nothing."""
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO(DAMAGE["code"](b"", {})), weights_only=False)
    assert (tmp_path / "CANARY").exists()


def test_any_bit_may_flip(unbroken, tmp_path):
    """A flip is found, or was in a byte that nobody reads."""
    whole, path, places = (unbroken("mae").out / "last.pt").read_bytes(), tmp_path / "last.pt", random.Random(0)
    refused = 0
    for place in [places.randrange(len(whole)) for _ in range(60)] + [places.randrange(2000) for _ in range(30)]:
        path.write_bytes(flipped(whole, place))
        try:
            assert same(read_checkpoint(path), unbroken("mae").state), place
        except BadInput as error:
            assert "last.pt" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 50


def released(method):
    """A state dict under the authors' names where the fixtures are, else under our own; and the sizes that no file tells."""
    path = FIXTURES / f"{'semantic_mim_hog' if method == 'semantic_mim' else method}.pt"
    if path.exists():
        fixture = torch.load(path, weights_only=True)
        sizes = ("heads", "decoder_heads", "img_size", "num_visible")
        return fixture["state_dict"], {k: v for k, v in fixture["config"].items() if k in sizes}
    cfg = tiny("nowhere", method)
    cfg = MODULES[method].with_recipe(cfg) if method == "semantic_mim" else cfg
    sizes = {"heads": 2, "img_size": 32} | ({"decoder_heads": 2} if "decoder-heads" in METHODS[method] else {})
    return MODULES[method].build(common.start(cfg)[0]).state_dict(), sizes


@pytest.mark.parametrize("claimed", METHODS)
@each_method
def test_a_released_file_under_a_wrong_name(tmp_path, monkeypatch, capsys, method, claimed):
    state, sizes = released(method)
    cases = {"other": state}
    if claimed == method:
        kind = getattr(MODULES[method], evaluate.METHODS[method][0])
        real = kind.from_released.__func__
        monkeypatch.setattr(kind, "from_released", classmethod(lambda cls, state: real(cls, state, **sizes)))
        cases = {"DDP": {f"module.{k}": v for k, v in state.items()}, "half": dict([*state.items()][::2]), "empty": {},
                 "compiled": {f"_orig_mod.{k}": v for k, v in state.items()}, "one too many": state | {"extra": torch.zeros(3)}}
    for what, damaged in cases.items():
        torch.save({"model": damaged}, tmp_path / "released.pth")
        argv = [tmp_path / "released.pth", "--method", claimed, "--probe", "knn", "--data", "shapes:32"]
        status, lines = invoke(monkeypatch, capsys, "evaluate", argv)
        assert status == 2 and len(lines) == 1 and lines[0].startswith("evaluate.py: "), (what, status, lines)
        assert "released" in lines[0] or what == "other", (what, lines)  # of another's, sizes may be read that make no sense
    assert [p.name for p in tmp_path.iterdir()] == ["released.pth"]


# -- 6. images ------------------------------------------------------------------------------------------

def png(width, height, depth, colour, rows):
    """A PNG by hand: PIL writes neither lies nor 16 bits of colour."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(shape, data=b"", kind="|u1"):
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + data


PHOTO = to_pil_image(noise_image(0))
BROKEN = {  # file name: bytes
    "truncated.jpg": encoded(PHOTO, "JPEG")[:400], "text.jpg": b"Dear diary,\n", "empty.png": b"",
    "absurd.png": png(60000, 60000, 8, 2, bytes(10**6)), "empty.npy": b"",
    "absurd.bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
    "absurd.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + encoded(PHOTO.convert("P"), "GIF")[13:],
    "absurd.ppm": b"P6 60000 60000 255\n" + bytes(1000), "absurd.npy": npy((60000, 60000, 3), bytes(1000)),
    "more absurd.npy": npy((10**9, 10**9, 3), bytes(1000)), "truncated.npy": npy((40, 40, 3), bytes(100)),
    "no pixels.npy": npy((0, 40, 3)), "seven axes.npy": npy((1,) * 7, b"0"), "floats.npy": npy((2, 2, 3), bytes(48), "<f4"),
    "zip.npy": zipped(a=npy((2, 2, 3), bytes(12))), "torn zip.npy": b"PK\x03\x04 and so on",
    "noise.npy": b"\x93NUMPY\x01\x00\xff\xff",
    "pickle.npy": b"\x80\x04\x95", "noise.tif": b"II*\x00\x08\x00\x00\x00\x03\x00\xff",
    "truncated.webp": encoded(PHOTO, "WEBP")[:100], "truncated.tif": encoded(PHOTO, "TIFF")[:900],
    "checksum.png": flipped(encoded(PHOTO, "PNG"), 60), "truncated.gif": encoded(PHOTO.convert("P"), "GIF")[:50],
}


def thousand(folder, *broken):
    """1,000 images, ten different ones; the names of some have spaces and letters of other alphabets."""
    folder.mkdir()
    ten = [encoded(to_pil_image(noise_image(i, height=12, width=10)), "PNG") for i in range(10)]
    for i in range(1000 - len(broken)):
        name = f"{i:03} été на море 海.png" if i % 100 == 0 else f"{i:03}.png"
        (folder / name).write_bytes(ten[i % 10])
    for name in broken:
        (folder / name).write_bytes(BROKEN[name])
    return str(folder)


def on_thousand(folder, out, **changes):
    return tiny(out, data=folder, batch_size=250, img_size=(16,), patch_size=8, **changes)


@pytest.fixture
def no_tests(monkeypatch):
    """k-NN would read the folder again."""
    monkeypatch.setattr(MODULES["mae"], "check_health", lambda *args: {"rank": 9.0, "feature_std": 1.0})


def test_five_broken_of_a_thousand(tmp_path, capsys, no_tests):
    five = [name for name in BROKEN if not name.endswith(".npy")][:5]
    folder = thousand(tmp_path / "set", *five)
    trained(on_thousand(folder, tmp_path / "run", epochs=2))
    out = capsys.readouterr().out
    assert all(out.count(f"cannot read {folder}/{name} (") == 1 for name in five) and out.count("cannot read") == 5
    assert len(losses(tmp_path / "run")) == 8 and all(map(math.isfinite, losses(tmp_path / "run")))


def test_broken_images_of_training_and_test_are_counted_apart(tmp_path, capsys):
    """Two of 200 are one in a hundred; of the 20 to test on they would be one in ten."""
    for part, count in (("train", 100), ("val", 10)):
        for kind in ("cats", "dogs"):
            write_images(tmp_path / "set" / part / kind, count)
    broken = [tmp_path / "set" / name for name in ("train/cats/003.png", "train/cats/007.png", "val/cats/003.png")]
    for path in broken:
        path.write_bytes(b"no image")
    trained(tiny(tmp_path / "run", data=str(tmp_path / "set"), eval_every=1))
    out = capsys.readouterr().out
    assert all(out.count(f"cannot read {path} (") == 1 for path in broken) and out.count("cannot read") == 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_twelve_broken_of_a_thousand(tmp_path, monkeypatch, capsys, no_tests):
    folder = thousand(tmp_path / "set", *[name for name in BROKEN if not name.endswith(".npy")])
    argv = [*tiny_flags("mae"), "--img-size", "16", "--batch-size", "250", "--data", folder, "--out", tmp_path / "run"]
    status, lines = invoke(monkeypatch, capsys, "mae", argv)
    assert status == 2 and len(lines) == 1 and re.search(r"--data: [12]\d of 1000 images cannot be read, more than 1 %", lines[0])
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_replaced(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    (tmp_path / "whole.png").write_bytes(encoded(PHOTO, "PNG"))
    data = common.Folder([tmp_path / name, tmp_path / "whole.png"], [-1, -1], 3)
    images, _, broken = common.Crops(data, (16, 16), (0.2, 1.0), tiny("run")).__getitems__(([0], (0, slice(0, 1))))
    assert [i for i, _ in broken] == [0] and broken[0][1] and images.shape == (1, 3, 16, 16)
    with pytest.raises(common.READ_ERRORS):  # where there is no other to take, as in evaluate.py
        data.read(0)[0][0, 0, 0].item()


def read_all(folder):
    """How much memory it takes to find out that they are broken."""
    peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    paths = sorted(Path(folder).iterdir())
    crops = common.Crops(common.Folder(paths, [-1] * len(paths), 3), (16, 16), (0.2, 1.0), tiny("run"))
    broken_of = lambda index: crops.__getitems__(([index], (0, slice(0, 1))))[2]
    broken_of(len(paths) - 1)  # a whole one
    before = peak()
    broken = {i for index in range(len(paths)) for i, _ in broken_of(index)}
    print(json.dumps({"MiB": peak() - before, "broken": len(broken)}))


@linux
def test_a_bomb_does_not_eat_the_memory(programs, tmp_path):
    for name, data in BROKEN.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "zz.png").write_bytes(encoded(PHOTO, "PNG"))
    status, out, err = programs.run("read_all", folder=str(tmp_path))
    assert status == 0, err
    told = json.loads(out)
    assert told["broken"] == len(BROKEN) and told["MiB"] < 100, told  # a decoded 60,000 x 60,000 is 10 GiB


def test_sixteen_bits(tmp_path):
    """Scaled, not clipped: most of a 16-bit picture is above 255."""
    ramp = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64)
    wanted = torch.from_numpy((ramp // 257).astype(np.int16))
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp).save(tmp_path / "grey.tif")
    colour = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], 2)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    (tmp_path / "colour.png").write_bytes(png(64, 32, 16, 2, rows))
    for name in ("grey.png", "grey.tif", "colour.png"):
        for chans in (1, 3) if name != "colour.png" else (3,):
            image = common.read_image(str(tmp_path / name), chans)
            assert image.shape == (chans, 32, 64) and image.dtype == torch.uint8
            assert (image[0].short() - wanted).abs().max() <= 1, name
    assert (image[1].short() - wanted.flip(0)).abs().max() <= 1 and (image[2].short() - wanted.flip(1)).abs().max() <= 1


def test_odd_kinds_of_files(tmp_path):
    photo, plain = PHOTO, pil_to_tensor(PHOTO).short()
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    photo.quantize(200).save(tmp_path / "palette.png")
    photo.quantize(200).save(tmp_path / "palette.gif")
    photo.convert("P").save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("P", photo.size)] * 3)
    clear = photo.convert("RGBA")
    clear.save(tmp_path / "alpha.webp", lossless=True)
    for name, tolerance in (("cmyk.jpg", 8), ("palette.png", 12), ("palette.gif", 12), ("animated.gif", 40), ("alpha.webp", 1)):
        image = common.read_image(str(tmp_path / name), 3)  # of an animation the first picture
        assert image.shape == plain.shape and (image.short() - plain).abs().float().mean() < tolerance, name
    photo.convert("1").save(tmp_path / "bits.png")
    assert set(common.read_image(str(tmp_path / "bits.png"), 3).unique().tolist()) == {0, 255}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_photographs_stand_upright(tmp_path, kind):
    """EXIF's eight orientations, each stored as the camera stores it."""
    upright = np.kron(np.array([[0, 80, 160], [250, 40, 120]], np.uint8), np.ones((16, 16), np.uint8))  # 32 x 48
    turned = lambda a: a[::-1, ::-1].T
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T, 6: np.rot90(upright),
              7: turned(upright), 8: np.rot90(upright, -1)}
    for orientation, pixels in stored.items():
        exif, path = Image.Exif(), tmp_path / f"{orientation}.{kind.lower()}"
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, kind, exif=exif, **{"quality": 95} if kind == "JPEG" else {})
        image = common.read_image(str(path), 3)
        assert image.shape == (3, 32, 48), orientation
        assert (image.short() - torch.from_numpy(upright).short()).abs().max() <= 8, orientation


def test_an_odd_entry_of_the_exif_does_not_matter(tmp_path):
    """Pillow turns the picture, then writes its EXIF anew: a width in letters, which some camera writes, stops that."""
    entries = struct.pack("<HHHI4s", 2, 0x0100, 2, 2, b"7") + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + struct.pack("<I", 0)
    whole = encoded(Image.new("RGB", (16, 8), "red"), "JPEG")
    whole = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]
    with pytest.raises(struct.error), Image.open(io.BytesIO(whole)) as image:
        ImageOps.exif_transpose(image)
    (tmp_path / "photo.jpg").write_bytes(whole)
    assert common.read_image(str(tmp_path / "photo.jpg"), 3).shape == (3, 16, 8)


def test_a_file_that_vanishes_is_a_broken_one(tmp_path, monkeypatch, capsys, no_tests):
    folder = thousand(tmp_path / "set")
    order = common.Order(1000, 0)(2, 250, slice(0, 250))  # those of the third step
    gone = sorted(Path(folder).iterdir())[order[0]]
    each_batch("mae", lambda images, n: (n == 1 and gone.unlink(), images)[1], monkeypatch.setattr)
    trained(on_thousand(folder, tmp_path / "run", epochs=2))
    out = capsys.readouterr().out
    assert out.count("cannot read") == 1 and f"cannot read {gone} (" in out


def test_a_val_without_class_folders(tmp_path, monkeypatch, capsys):
    """ImageNet's validation archive unpacks so. Training uses all of train/, in every epoch."""
    for name in ("cats", "dogs"):
        write_images(tmp_path / "set/train" / name, 10)
    write_images(tmp_path / "set/val", 3)
    cfg = tiny(tmp_path / "run", data=str(tmp_path / "set"), batch_size=4, epochs=2)
    orders = []

    class Recorded(common.Order):
        def __call__(self, *place):
            orders.append(super().__call__(*place))
            return orders[-1]
    monkeypatch.setattr(common, "Order", Recorded)
    trained(cfg)
    for epoch in torch.cat(orders).split(20):
        assert sorted(epoch.tolist()) == list(range(20))
    assert all("knn_class" in r for r in records(tmp_path / "run") if "rank" in r)
    out = capsys.readouterr().out
    assert re.search("warning: .*val has images in no class folder", out)
    assert f"20 images in {tmp_path}/set/train, 2 classes" in out and "no labelled val/" in out


def test_a_class_called_train(tmp_path, capsys):
    """Trains are things too: without val/ or test/ beside it, a folder among others is a class."""
    for name in ("bus", "car", "train"):
        write_images(tmp_path / "set" / name, 10)
    trained(tiny(tmp_path / "run", data=str(tmp_path / "set")))
    assert "30 images" in (out := capsys.readouterr().out) and "3 classes" in out
    write_images(tmp_path / "set/test/bus", 1)
    trained(tiny(tmp_path / "again", data=str(tmp_path / "set")))
    assert f"10 images in {tmp_path}/set/train, no labels" in capsys.readouterr().out


def test_the_only_image_of_a_class_is_no_query(tmp_path, capsys):
    """The tenth image is the only one of its class; the twentieth is not."""
    for name, count in (("a", 9), ("b", 1), ("c", 12)):
        write_images(tmp_path / "set" / name, count)
    train_set, val_set = common.load_data(tiny("run", data=str(tmp_path / "set")), SimpleNamespace(say=print))
    assert train_set.labels.bincount().tolist() == [9, 1, 12] and val_set is None
    gallery, queries = common.split_tenth(train_set)
    assert queries.tolist() == [19] and sorted([*gallery.tolist(), 19]) == list(range(22))


def test_a_broken_image_of_gallery_and_training_is_named_once(tmp_path, capsys):
    """The k-NN test reads the training set itself, so the limit is 1 % of all 200 images."""
    for name in ("cats", "dogs"):
        write_images(tmp_path / "set" / name, 100)
    queries = ("cats/009.png", "cats/019.png")  # two of 20
    broken = [tmp_path / "set" / name for name in queries]
    for path in broken:
        path.write_bytes(b"no image")
    trained(tiny(tmp_path / "run", data=str(tmp_path / "set"), eval_every=1))
    out = capsys.readouterr().out
    assert all(out.count(f"cannot read {path} (") == 1 for path in broken)
    assert out.count("cannot read") == 2


def test_arrays_beside_photographs(tmp_path):
    write_images(tmp_path / "set", 3)
    np.save(tmp_path / "set/labels.npy", np.arange(3))
    assert len(common.find_images(tmp_path / "set", 3)) == 3 and len(common.find_images(tmp_path / "set", 5)) == 4
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays/0.npy", np.zeros((9, 9, 3), np.uint8))
    assert len(common.find_images(tmp_path / "arrays", 3)) == 1


def test_a_run_among_its_images(tmp_path, capsys):
    """--out inside --data: the pictures that it draws are not trained on when it goes on."""
    folder = write_images(tmp_path / "set", 10)
    for epochs in (1, 2):
        assert trained(tiny(folder / "run", data=str(folder), batch_size=5, epochs=epochs))["step"] == 2 * epochs
    assert [*(folder / "run").glob("*.png")] and capsys.readouterr().out.count("10 images in") == 2


def test_a_resumed_run_knows_its_images(tmp_path, monkeypatch, capsys):
    """The same ones elsewhere are the same; one more, or another name, is another set: its order would be another."""
    folder = write_images(tmp_path / "set", 10)
    trained(tiny(tmp_path / "run", data=str(folder), batch_size=5))
    shutil.copytree(folder, tmp_path / "copy")
    assert trained(tiny(tmp_path / "run", data=str(tmp_path / "copy"), batch_size=5, epochs=2))["step"] == 4
    for change in (lambda: write_images(tmp_path / "copy", 1, first=10), lambda: (tmp_path / "copy/000.png").unlink()):
        change()
        with pytest.raises(BadInput, match=r"made from other images \(10 images.* there, 1\d images"):
            MODULES["mae"].train(tiny(tmp_path / "run", data=str(tmp_path / "copy"), batch_size=5, epochs=3))


def test_a_new_run_in_an_old_folder(tmp_path):
    """--resume no, stopped before its first save: the next start must not go on from the run before it."""
    trained(tiny(tmp_path))
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        def interrupt(images, number):
            raise KeyboardInterrupt
        each_batch("mae", interrupt, patch.setattr)
        MODULES["mae"].train(tiny(tmp_path, resume="no"))
    assert not (tmp_path / "last.pt").exists() and read_checkpoint(tmp_path / "replaced.pt")["step"] == 2
    assert trained(tiny(tmp_path))["step"] == 2 and [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 2]


def test_a_warm_up_that_never_ends(tmp_path, capsys):
    trained(tiny(tmp_path, epochs=2, warmup_epochs=2))
    assert "warning: warm-up: as long as the run (4 steps)" in capsys.readouterr().out


def test_the_first_line_does_not_complain_of_the_workers_start(capsys):
    run = common.Run(torch.device("cpu"), None, False)
    run.warn_if_data_bound(0.9)
    assert not capsys.readouterr().out
    run.warn_if_data_bound(0.9)
    assert "data-bound: 90%" in capsys.readouterr().out


def test_fp16_that_never_recovers(tmp_path, monkeypatch, capsys):
    """A gradient that is not finite at any scale: the scaler would skip steps to the end and the run be called done."""
    monkeypatch.setattr(common, "choose_amp", lambda name, device: torch.float16)
    real = MODULES["mae"].build

    def build(cfg):
        model = real(cfg)
        model.cls_token.register_hook(lambda g: g * math.nan)
        return model
    monkeypatch.setattr(MODULES["mae"], "build", build)
    assert MODULES["mae"].train(tiny(tmp_path, epochs=100, log_every=20, save_every=1000)) == 1
    out, err = capsys.readouterr()
    assert "error: the loss or its gradient is not finite since step 1 (" in err
    assert not (tmp_path / "last.pt").exists() and "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_a_signal_before_the_first_step(tmp_path):
    """There is nothing to save: it leaves at once."""
    code = f"import os, common, mae; common.start(mae.Config(out='{tmp_path}/run')); os.kill(os.getpid(), 2); print('still here')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and not done.stdout, done.stderr


def test_links_that_go_in_circles(tmp_path):
    for name in ("one", "two"):
        write_images(tmp_path / "set" / name, 2)
    for link, target in (("one/two", "two"), ("two/one", "one"), ("two/up", "."), ("self", "self"), ("self.png", "self.png"),
                         ("dangling.png", "nowhere.png"), ("one/dots", "one/../one")):
        (tmp_path / "set" / link).symlink_to(tmp_path / "set" / target)
    found = common.find_images(tmp_path / "set")
    assert len({path.resolve() for path in found if not path.is_symlink()}) == 4 and len(found) <= 6
    data = common.Folder(found, [-1] * len(found), 3)
    crops = common.Crops(data, (8, 8), None, tiny("run"))
    broken = {i for index in range(len(data)) for i, _ in crops.__getitems__(([index], None))[2]}
    assert {found[i].name for i in broken} <= {"self.png", "dangling.png"}


@pytest.mark.parametrize("name", [b"a photo.png", "море 海 🙂.png".encode(), b"caf\xe9.png", b"two\nlines.png", b"-x.png",
                                  b"%s{}.png"])
def test_names_of_files(tmp_path, capsys, no_tests, name):
    """Read where they are whole, named where they are not: also one that is no UTF-8, as old archives hold."""
    folder = tmp_path / "set"
    write_images(folder, 1)
    Path(os.fsdecode(bytes(folder) + b"/whole " + name)).write_bytes(encoded(PHOTO, "PNG"))
    Path(os.fsdecode(bytes(folder) + b"/torn " + name)).write_bytes(b"no image")
    trained(tiny(tmp_path / "run", data=str(folder), batch_size=3, epochs=2))
    assert capsys.readouterr().out.count("warning: cannot read") == 1


# -- 7. numbers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [0.0, 3.0])
@each_method
def test_constant_images(tmp_path, monkeypatch, method, value):
    """A zero variance under every root and quotient: no loss and no gradient may be lost to it."""
    each_batch(method, lambda images, n: torch.full_like(images, value), monkeypatch.setattr)
    state = trained(tiny(tmp_path, method, epochs=4), method)
    for record in records(tmp_path)[1:]:
        assert all(math.isfinite(v) for v in record.values()), record
    assert all(t.isfinite().all() for t in state["model"].values() if t.is_floating_point())


@each_method
def test_constant_images_in_bf16(tmp_path, monkeypatch, method):
    each_batch(method, lambda images, n: images.zero_(), monkeypatch.setattr)
    trained(tiny(tmp_path, method, epochs=2, amp="bf16"), method)
    assert all(math.isfinite(v) for record in records(tmp_path)[1:] for v in record.values())


@each_method
def test_a_batch_of_one(tmp_path, method):
    """No method needs more; Latent MIM and CAPI compare the patches of the one image with each other."""
    trained(tiny(tmp_path, method, data="shapes:4", batch_size=1, epochs=2), method)
    assert len(losses(tmp_path)) == 8
    assert all(math.isfinite(v) for record in records(tmp_path)[1:] for v in record.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 with its scaler needs CUDA")
@each_method
def test_fp16_scaler_meets_an_overflow(tmp_path, monkeypatch, method):
    """The scale begins too high on purpose: steps are left out, the scale halved, and the state resumes."""
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled, real=torch.amp.GradScaler:
                        real(device, enabled=enabled, init_scale=2.0**40))
    state = trained(tiny(tmp_path, method, device="cuda", amp="fp16", epochs=20), method)
    assert 0 < state["scaler"]["scale"] < 2.0**40 and all(map(math.isfinite, losses(tmp_path)))
    again = trained(tiny(tmp_path, method, device="cuda", amp="fp16", epochs=21), method)
    assert again["scaler"]["scale"] <= state["scaler"]["scale"] and len(losses(tmp_path)) == 42


# -- 8. wrong invocations -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the wrong invocations name, in one folder."""
    root = tmp_path_factory.mktemp("files")
    write_images(root / "flat", 4)
    (root / "empty").mkdir()
    (root / "text.txt").write_text("no image")
    (root / "text.pt").write_text("no checkpoint")
    for name in ("a", "b"):
        write_images(root / "classes" / name, 12)
    np.save(root / "twelve.npy", np.zeros((9, 9, 12), np.uint8))
    (root / "chans").mkdir()
    for i in range(4):
        shutil.copy(root / "twelve.npy", root / "chans" / f"{i}.npy")
    for method in ("mae", "capi"):
        cfg = common.start(tiny("run", method, model="nano"))[0]
        model = MODULES[method].build(cfg).state_dict()
        torch.save({"method": method, "config": dataclasses.asdict(cfg), "step": 1, "model": model, "optimizer": {}, "scaler": {},
                    "rng": torch.get_rng_state()}, root / f"{method}.pt")
    (root / "blocked" / "last.eval.json").mkdir(parents=True)
    shutil.copy(root / "mae.pt", root / "blocked" / "last.pt")
    return root


WRONG = [  # program, flags, what the one line has to say; in test_programs.py and test_evaluate.py stand a hundred others
    ("mae", "--epochs 1e3", "--epochs.*1e3"),
    ("mae", "--epochs -3", "--epochs -3"),
    ("mae", "--batch-size 32.5", "--batch-size.*32.5"),
    ("mae", "--img-size", "--img-size"),
    ("mae", "--data ''", "--data : no such folder"),
    ("mae", "--data FILES/flat --out FILES/flat/.", "--out .*flat.*: is where the images are"),
    ("mae", "--img-size 32 x", "--img-size.*x"),
    ("mae", "--img-size 32 30", "--patch-size 8.*30"),
    ("mae", "--mask-ratio -0.5", "--mask-ratio -0.5"),
    ("mae", "--mask-ratio abc", "--mask-ratio.*abc"),
    ("mae", "--norm-pix yes", "yes"),
    ("mae", "--norm-pix=no", "--norm-pix"),
    ("mae", "--model Base", "--model.*base"),
    ("mae", "--device cuda:0", "--device.*cuda"),
    ("mae", "--compile maybe", "--compile.*auto"),
    ("mae", "--data ''", "--data"),
    ("mae", "--data shapes:-5", "--data shapes:-5"),
    ("mae", "--data shapes:1.5", "--data shapes:1.5"),
    ("mae", "--data cifar11", "cifar1"),
    ("mae", "--data FILES/chans --batch-size 2", "4 of 4 images|--in-chans"),
    ("mae", "--mean nan nan nan", "--mean"),
    ("mae", "--mean 0.5 inf 0.5", "--mean"),
    ("mae", "--std nan", "--std"),
    ("mae", "--std inf", "--std"),
    ("mae", "--crop-scale nan 1", "--crop-scale"),
    ("mae", "--betas 0.9 nan", "--betas"),
    ("mae", "--betas 0.9 0.95 0.99", "--betas"),
    ("mae", "--weight-decay inf", "--weight-decay"),
    ("mae", "--clip-grad nan", "--clip-grad"),
    ("mae", "--warmup-epochs -1", "--warmup-epochs"),
    ("mae", "--resume FILES", "cannot be read"),
    ("mae", "--resume ''", "--resume|cannot be read"),
    ("mae", "--resume FILES/mae.pt --model tiny", "mae.pt.*--model nano there, tiny now"),
    ("mae", "--resume FILES/mae.pt --img-size 64", "mae.pt.*--img-size"),
    ("latent_mim", "--img-size 30", "--patch-size 8"),
    ("latent_mim", "--proj-dim 0", "--proj-dim 0"),
    ("latent_mim", "--sim-coeff -1", "--sim-coeff -1"),
    ("latent_mim", "--sim-target 0.5 2", "--sim-target 2"),
    ("latent_mim", "--visible-share nan", "--visible-share nan"),
    ("latent_mim", "--tau inf", "--tau"),
    ("latent_mim", "--mask-ratio 0.5", "--mask-ratio"),  # MAE's
    ("semantic_mim", "--mask-ratio -0.5", "--mask-ratio -0.5"),
    ("semantic_mim", "--mask-ratio 0.999", "--mask-ratio 0.999"), ("semantic_mim", "--clip-grad -0.9", "--clip-grad -0.9"),
    *((method, "--decoder-heads 5", "--decoder-heads 5") for method in ("mae", "latent_mim", "pilamim")),
    ("mae", "--decoder-dim 66", "--decoder-dim 66"),
    ("semantic_mim", "--num-proxy two", "--num-proxy.*two"),
    ("semantic_mim", "--jitter 0.4 --in-chans 1", "--in-chans 1.*--jitter"),
    ("semantic_mim", "--last-lr -2", "--last-lr"),
    ("semantic_mim", "--crop-scale 0.5", "--crop-scale"),
    ("semantic_mim", "--betas 0.9 1", "--betas"),
    ("semantic_mim", "--beside FILES/text.pt", "text.pt"),
    ("semantic_mim", "--batch-size 30 --accum 4", "--batch-size 30"),
    ("pilamim", "--ema 0.9 nan", "--ema nan"),
    ("pilamim", "--cls-weight inf", "--cls-weight"),
    ("pilamim", "--decoder-depth 0", "--decoder-depth 0"),
    ("pilamim", "--decoder-dim 15", "--decoder-dim 15"),
    ("pilamim", "--data FILES/empty", "--data.*no image"),
    ("pilamim", "--clusters 16", "--clusters"),  # CAPI's
    ("capi", "--registers -4", "--registers -4"),
    ("capi", "--registers 4.0", "--registers.*4.0"),
    ("capi", "--ema nan", "--ema nan"),
    ("capi", "--cluster-lr inf", "--cluster-lr"),
    ("capi", "--predictor-depth 0", "--predictor-depth 0"),
    ("capi", "--predict-share -0.1", "--predict-share -0.1"),
    ("capi", "--recompute twice", "twice"),
    ("capi", "--resume FILES/mae.pt", "mae.pt.*of mae, not of capi"),
    ("evaluate", "", "checkpoint"),
    ("evaluate", "''", "checkpoint|file"),
    ("evaluate", "FILES", "cannot be read: a folder; of a run, say .*last.pt"),
    ("evaluate", "FILES/text.pt", "text.pt.*cannot be read"),
    ("evaluate", "FILES/mae.pt FILES/capi.pt", "capi.pt"),
    ("evaluate", "FILES/mae.pt --method vit", "--method.*vit"),
    ("evaluate", "FILES/mae.pt --probe", "--probe"),
    ("evaluate", "FILES/mae.pt --limit -1", "--limit -1"),
    ("evaluate", "FILES/mae.pt --epochs 0", "--epochs 0"),
    ("evaluate", "FILES/mae.pt --layer -2", "--layer -2"),
    ("evaluate", "FILES/mae.pt --drop-path 1", "--drop-path 1"),
    ("evaluate", "FILES/mae.pt --finetune-lr nan", "--finetune-lr nan"),
    ("evaluate", "FILES/mae.pt --layer-decay 2", "--layer-decay 2"),
    ("evaluate", "FILES/mae.pt --seed -1", "--seed -1"),
    ("evaluate", "FILES/mae.pt --ignore many", "--ignore.*many"),
    ("evaluate", "FILES/mae.pt --workers -2", "--workers -2"),
    ("evaluate", "FILES/mae.pt --data FILES/nowhere", "--data.*no such folder"),
    ("evaluate", "FILES/mae.pt --data FILES/empty", "--data.*no image"),
    ("evaluate", "FILES/mae.pt --data FILES/classes --masks nowhere --probe seg-knn", "--masks"),
    ("evaluate", "FILES/mae.pt --picture --images FILES/text.txt", "--images.*text.txt"),
    ("evaluate", "FILES/mae.pt --export FILES/nowhere/encoder.pt", "--export.*nowhere"),
    ("evaluate", "FILES/mae.pt --export FILES", "--export"),
    ("evaluate", "FILES/blocked/last.pt --data shapes:32 --probe knn", "last.eval.json"),
    ("evaluate", "FILES/mae.pt --amp fp16 --device cpu", "--amp fp16"),
]


def test_the_table_is_long_enough():
    assert len(WRONG) == len(set(WRONG)) >= 40 and {name for name, *_ in WRONG} == {*PROGRAMS}


@pytest.mark.parametrize("name, flags, text", WRONG, ids=[f"{n} {f}".replace("FILES/", "") for n, f, _ in WRONG])
def test_wrong_invocation(files, tmp_path, monkeypatch, capsys, name, flags, text):
    """One line on stderr, status 2, nothing written: neither where it runs nor where its files lie."""
    monkeypatch.chdir(tmp_path)
    before = contents(files)
    argv = shlex.split(flags.replace("FILES", str(files)))
    if name != "evaluate":
        argv = [*tiny_flags(name), "--out", "run", *argv]
    status, lines = invoke(monkeypatch, capsys, name, argv)
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"{name}.py: "), lines
    assert re.search(text, lines[0]), lines
    if "chans" not in flags:  # images are read when the run has begun
        assert not list(tmp_path.iterdir())
    assert contents(files) == before


# -- 9. memory and processes ----------------------------------------------------------------------------

def in_session(session):
    """Processes of a session, by Linux's own list."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            if int(rest.split()[3]) == session and rest.split()[0] != "Z":
                found[int(path.parent.name)] = name
    return found


@linux
def test_ctrl_c_leaves_no_process_behind(tmp_path):
    """As a terminal sends it: to the program and its image loaders at once."""
    folder = write_images(tmp_path / "set", 40)
    argv = [*tiny_flags("mae"), "--epochs", "100000", "--log-every", "1", "--save-every", "100000", "--data", folder,
            "--workers", "2", "--out", tmp_path]
    run = subprocess.Popen(launch(argv), env=environment(), start_new_session=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_step(tmp_path, 3)
        assert len(in_session(run.pid)) >= 3
        os.killpg(run.pid, signal.SIGINT)
        told = run.communicate(timeout=60)[0]  # ends when the last process that holds the pipe has
        assert run.returncode == 130 and "stopped by a signal" in told and "Traceback" not in told, told
        assert not in_session(run.pid)
    finally:
        for pid in in_session(run.pid):
            os.kill(pid, signal.SIGKILL)
        run.wait()


def measured(method, argv, every, path):
    """Resident memory and open files, every so many batches."""
    seen = []

    def look(images, n):
        if n % every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd"))))
            Path(path).write_text(json.dumps(seen))
        return images
    each_batch(method, look)
    program(method, argv)


@linux
@pytest.mark.long
@pytest.mark.parametrize("method, more", [*((method, "") for method in METHODS), ("mae", "--data FOLDER --workers 2")])
def test_memory_stays_flat(programs, tmp_path, method, more):
    """2,000 steps with saves, k-NN tests and pictures in between; the first 400 warm up."""
    folder = write_images(tmp_path / "set", 80)
    argv = toy_flags(method, tmp_path / "run", "--epochs", 800, "--save-every", 40, "--eval-every", 40,
                     *more.replace("FOLDER", str(folder)).split())
    pid = programs.start("measured", method=method, argv=argv, every=20, path=str(tmp_path / "seen"))
    assert programs.wait(pid, seconds=900) == 0
    assert len(losses(tmp_path / "run")) == 2000
    memory, opened = np.array(json.loads((tmp_path / "seen").read_text()))[20:].T.reshape(2, 2, -1)  # of either half
    assert_flat(memory, opened)


def assert_flat(memory, opened):
    """Buffers of 24 MiB come and go, so the floor and the ceiling of the halves are compared: a steady growth of 2 % in all
    lifts the floor by 1 % from half to half."""
    (floor, ceiling), (later_floor, later_ceiling) = np.quantile(memory, (0.1, 0.9), axis=1).T
    assert later_floor < 1.01 * floor and later_ceiling < 1.02 * ceiling, memory
    assert opened[1].max() <= opened[0].max() + 2, opened


def test_growth_would_be_seen():
    flat = 530 + 24 * (np.arange(80) % 3 == 0)
    assert_flat(flat.reshape(2, -1), np.full((2, 40), 7))
    for memory, opened in ((flat * np.linspace(1, 1.025, 80), np.full(80, 7)), (flat, 7 + np.arange(80) // 8)):
        with pytest.raises(AssertionError):
            assert_flat(memory.reshape(2, -1), opened.reshape(2, -1))


class Names(common.Crops):
    """Looks at every name of a fiftieth of the set on its way to an image."""

    def __getitems__(self, item):
        for at in item[0]:
            assert all(self.data.name(i) for i in range(at, min(len(self.data), at + len(self.data) // 50)))
        return super().__getitems__(item)


def share_of_workers(workers, count, path, length=400):
    """A set of so many names is read by worker processes: MiB that each holds alone, and what the set takes."""
    name = os.path.dirname(path) + "/." * ((length - len(path)) // 2) + "/" + os.path.basename(path)
    data = common.Folder([name] * count, [-1] * count, 3)
    every = (range(0, count, count // 50), None)  # each batch goes through the whole set
    run = common.Run(torch.device("cpu"), None, False)
    crops = Names(data, (8, 8), None, tiny("run"))
    batches = common.read_batches(crops, iter([every] * 4 * workers), tiny("run", workers=workers), run)
    for _ in range(2 * workers):
        next(batches)
    alone = [int(re.search(r"Private_Dirty:\s+(\d+)", Path(f"/proc/{child.pid}/smaps_rollup").read_text())[1]) / 1024
             for child in multiprocessing.active_children()]
    print(json.dumps({"workers": len(alone), "alone": sum(alone) / len(alone), "set": count * length / 2**20}))


@linux
@pytest.mark.parametrize("workers, count", [(2, 200_000), pytest.param(8, 500_000, marks=pytest.mark.long)])
def test_workers_share_the_set(programs, tmp_path, workers, count):
    """400 bytes of name for each image: who touches a list of them copies it, page by page."""
    path = str(write_images(tmp_path, 1) / "000.png")
    few, many = (json.loads(programs.run("share_of_workers", workers=workers, count=count, path=path)[1])
                 for count in (500, count))
    assert few["workers"] == many["workers"] == workers and few["set"] < 1 < 70 < many["set"]
    assert many["alone"] - few["alone"] < 0.05 * many["set"], (few, many)


# -- 10. platforms --------------------------------------------------------------------------------------

def spawning(method, argv):
    multiprocessing.set_start_method("spawn", force=True)
    real = MODULES[method].eval_batches  # one loader in the way of macOS and Windows is enough of seconds
    MODULES[method].eval_batches = lambda cfg, *args: real(dataclasses.replace(cfg, workers=0), *args)
    MODULES[method].check_health = lambda *args: {"rank": 9.0, "feature_std": 1.0}
    program(method, argv)


def test_a_run_with_spawned_workers(programs, tmp_path):
    """What workers need travels by pickle there; the losses are those of no workers at all."""
    folder = write_images(tmp_path / "set", 8)
    for name, job, workers in (("spawned", "spawning", 1), ("none", "program", 0)):
        argv = toy_flags("mae", tmp_path / name, "--epochs", 4, "--data", folder, "--batch-size", 8, "--workers", workers)
        status, _, err = programs.run(job, method="mae", argv=argv)
        assert status == 0 and "Traceback" not in err, err
    assert losses(tmp_path / "spawned") == losses(tmp_path / "none") and len(losses(tmp_path / "none")) == 4


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_no_device_is_named_by_a_call(path):
    """`.cuda()` and torch.cuda.FloatTensor tie a program to one vendor, `.to(run.device)` does not. And the syntax is that of
    Python 3.10."""
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert len(calls) > 50 and not [call.lineno for call in calls if call.func.attr == "cuda"]
    assert not re.search(r"torch\.cuda\.\w*Tensor|\.to\(['\"](cuda|mps)|device=['\"](cuda|mps)['\"]", path.read_text())
