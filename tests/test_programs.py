"""The programs as a user starts them: flags, processes, signals, printed commands, wrong invocations."""

import ast
import dataclasses
import difflib
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision

import common
import mae
from common import MODELS, main, parse_args, read_checkpoint
from conftest import (METHODS, MODULES, PICTURES, ROOT, TINY, environment, launch, losses, printed_commands, records,
                      run_program, tiny, tiny_flags, trained, write_images)
from test_faults import all_programs, programs  # fixtures: the ranks of a run without torchrun, which imports torch for each

each_method = pytest.mark.parametrize("method", METHODS)
MORE_STEPS = ["--data", "shapes:80", "--epochs", "2", "--log-every", "1", "--eval-every", "0"]
FIVE_STEPS = [*TINY, *MORE_STEPS]
ENDLESS = [*TINY, "--epochs", "100000", "--eval-every", "0", "--save-every", "100000"]


# -- processes ------------------------------------------------------------------------------------------

def without_key_biases(state):
    """A key's bias changes no attention: its gradient is the rounding error of a zero, which AdamW scales up to a step.
    Queries and values count. (CAPI and PiLaMIM have none; Latent MIM's cross-attention has k and v in one.)"""
    keep = {"qkv.bias": (3, [0, 2]), "kv_proj.bias": (2, [1])}
    for name, t in state.items():
        parts, rest = next((v for end, v in keep.items() if name.endswith(end)), (1, [0]))
        yield name, t.unflatten(0, (parts, -1))[rest] if parts > 1 else t


@pytest.mark.parametrize("method, flags", [
    ("mae", ""), ("mae", "--accum 2"), ("semantic_mim", ""), ("pilamim", ""), ("capi", ""),
    ("latent_mim", "--sim-coeff 0"), ("latent_mim", "")])
def test_two_processes_equal_one(programs, tmp_path, method, flags):
    flags = [*tiny_flags(method), *MORE_STEPS, *flags.split()]
    one = parse_args(MODULES[method].Config, argv=[*flags, "--out", str(tmp_path / "one")])
    assert MODULES[method].train(dataclasses.replace(one, accum=1)) == 0
    assert programs.run_together("program", method=method, argv=[*flags, "--out", str(tmp_path / "two")]) == [0, 0]
    (spoken, _), (silence, _) = map(programs.said, (0, 1))
    assert "2 processes" in spoken and spoken.count("k-NN accuracy") == 1 and not silence
    assert len(losses(tmp_path / "two")) == 5
    # to 1e-5, and to the last of the six digits that the log writes
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5, rel=2e-6)
    first, second = (dict(without_key_biases(read_checkpoint(tmp_path / name / "last.pt")["model"]))
                     for name in ("one", "two"))
    assert first.keys() == second.keys()
    # Without the similarity terms a shift of all predictions changes nothing either: patches are standardised.
    shifts = ["decoder.norm.bias", "decoder.head.bias"] if "--sim-coeff" in flags else []
    for name in first.keys() - shifts:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-5, msg=lambda text: name + text)
    tests = [[{k: v for k, v in r.items() if "knn" in k} for r in records(tmp_path / name) if "rank" in r]
             for name in ("one", "two")]
    assert len(tests[0]) == 2 and tests[0][0] == tests[1][0]  # untrained: the same features


def test_two_processes_stop_together_where_the_loss_is_not_finite(programs, tmp_path):
    flags = [*FIVE_STEPS, "--base-lr", "1e30", "--warmup-epochs", "0", "--out", str(tmp_path)]
    assert programs.run_together("program", method="mae", argv=flags) == [1, 1]
    assert "".join(programs.said(0) + programs.said(1)).count("not finite since step") == 1
    assert not (tmp_path / "last.pt").exists()


def test_two_processes_say_bad_input_once(tmp_path):
    done = run_program([*TINY, "--batch-size", "33", "--out", tmp_path / "run"], nproc=2)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert done.stderr.count("--batch-size 33 does not divide") == 1
    assert "--batch-size 32 would" in done.stderr


def test_two_nodes(tmp_path):
    """Two agents, as two machines would start them, meet on the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node),
         "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port),
         str(ROOT / "mae.py"), *tiny_flags("mae"), "--out", str(tmp_path)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for node in (0, 1)]
    try:
        told = [agent.communicate(timeout=200)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(told)
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 2 and records(tmp_path)[0]["processes"] == 2


# -- one file and common.py -----------------------------------------------------------------------------

def alone(folder, method):
    """A folder with two files, and what a run there should leave in it."""
    folder.mkdir(exist_ok=True)
    for name in (f"{method}.py", "common.py"):
        shutil.copy(ROOT / name, folder)
    run = ["last.pt", "log.jsonl", *PICTURES[method]]
    return {"common.py", f"{method}.py", *(f"runs/{method}/{name}" for name in run)}


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_two_files_alone_run(tmp_path):
    left, env = alone(tmp_path, "mae"), {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = run_program(TINY, cwd=tmp_path, program=str(tmp_path / "mae.py"), env=env)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == left
    assert "img/s" in done.stderr and "loss=" in done.stderr and "Traceback" not in done.stderr


ONE_AFTER_THE_OTHER = """
import json, os, runpy, sys
for folder, argv in json.loads(sys.argv[1]):
    os.chdir(folder)
    sys.path[0], sys.argv = folder, argv
    sys.modules.pop("common", None)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as leaving:
        assert leaving.code == 0, argv
    assert sys.modules["common"].__file__.startswith(folder)
"""


def test_two_files_of_the_others_run(tmp_path):
    """In one process, which knows nothing of this folder, so that torch is imported once."""
    others = [*METHODS][1:]
    left = {method: alone(tmp_path / method, method) for method in others}
    runs = json.dumps([(str(tmp_path / method), [f"{method}.py", *tiny_flags(method)]) for method in others])
    done = subprocess.run([sys.executable, "-c", ONE_AFTER_THE_OTHER, runs], cwd=tmp_path, capture_output=True,
                          text=True, timeout=240, env=environment(PYTHONPATH="", PYTHONDONTWRITEBYTECODE="1"))
    assert done.returncode == 0, done.stderr
    assert {method: files_in(tmp_path / method) for method in others} == left


# -- the five are alike ---------------------------------------------------------------------------------

def names_read(method):
    """Every X of a `cfg.X` in the method's file or in common.py."""
    nodes = [node for name in (method, "common") for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "cfg"}


SHARED_FIELDS = """data data_root img_size patch_size in_chans mean std model batch_size accum epochs warmup_epochs
    base_lr weight_decay clip_grad workers seed device amp compile out resume save_every eval_every log_every""".split()


@each_method
def test_config(method):
    fields = {field.name: field for field in dataclasses.fields(MODULES[method].Config)}
    assert sorted(fields.keys() - names_read(method)) == []
    assert "nobody_reads_me" not in names_read(method)
    assert [name for name in fields if name in SHARED_FIELDS] == SHARED_FIELDS
    assert MODULES[method].Config.__dataclass_params__.frozen
    assert set(common.SHARED) == {*SHARED_FIELDS, "crop_scale", "betas"} <= fields.keys()
    for name in SHARED_FIELDS:  # the same kind of thing in all
        assert fields[name].type == mae.Config.__dataclass_fields__[name].type
    assert fields["out"].default == f"runs/{method}"


def test_the_sections_of_the_five_are_alike():
    wanted = ["Config", "What", "Loss", "Model", "Training"]
    for method in METHODS:
        banners = re.findall(r"^# -{100,}\n# (\w+).*\n# -{100,}$", (ROOT / f"{method}.py").read_text(), re.M)
        banners = ["Loss" if banner == "Losses" else banner for banner in banners]
        assert banners == [name for name in wanted if name in banners], method
        assert {"Config", "Model", "Training"} <= set(banners), method


OWN_LINES = {  # of MAE's `train`, how many another's has not, and how many it has instead or besides
    "latent_mim": (9, 16), "semantic_mim": (10, 22), "pilamim": (4, 11), "capi": (16, 39)}


@pytest.mark.parametrize("method", OWN_LINES)
def test_the_five_loops_agree(method):
    """They repeat each other on purpose; what is no part of a method must not drift. A change of MAE's loop is made in
    all five, a new line of one method's own is counted here."""
    sources = (inspect.getsource(MODULES[m].train).replace(f'"{m}"', '"METHOD"') for m in ("mae", method))
    ours, theirs = ([line for line in source.splitlines() if line.strip()] for source in sources)
    steps = list(difflib.ndiff(ours, theirs))
    missing, more = ([line for line in steps if line.startswith(mark)] for mark in "-+")
    assert len(missing) <= OWN_LINES[method][0], "\n".join(missing)
    assert len(more) <= OWN_LINES[method][1], "\n".join(more)


# -- signals --------------------------------------------------------------------------------------------

def steps_logged(out):
    path = out / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
    return [r["step"] for r in whole if "loss" in r]


def start_and_interrupt(command, out, after, number, group=False):
    """Starts a run, sends it (or its whole group) a signal once it is past a step -> exit status and what it printed."""
    run = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, start_new_session=True)
    try:
        give_up = time.monotonic() + 120
        while not (steps := steps_logged(out)) or steps[-1] <= after:
            assert run.poll() is None and time.monotonic() < give_up, run.communicate()[0]
            time.sleep(0.05)
        (os.killpg if group else os.kill)(run.pid, number)
        told = run.communicate(timeout=60)[0]
    finally:
        run.kill()
    return run.returncode, told


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    command = launch([*ENDLESS, "--log-every", "1", "--out", tmp_path])
    status, told = start_and_interrupt(command, tmp_path, 2, signal.SIGINT)
    assert status == 130 and "stopped by a signal" in told and "Traceback" not in told
    stopped = read_checkpoint(tmp_path / "last.pt")["step"]
    assert f"after step {stopped}" in told and steps_logged(tmp_path)[-1] == stopped
    status, told = start_and_interrupt(command, tmp_path, stopped, signal.SIGTERM)
    assert status == 143 and f"step {stopped}" in told and "resume:" in told
    steps = steps_logged(tmp_path)
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] > stopped
    assert read_checkpoint(tmp_path / "last.pt")["step"] == steps[-1]


def test_sigterm_to_a_run_and_its_workers(tmp_path):
    """As `timeout` and Slurm send it, and torchrun to each of its processes: the worker lives until the step is done."""
    flags = [*ENDLESS, "--data", write_images(tmp_path / "images", 64), "--workers", "1", "--log-every", "1"]
    command = launch([*flags, "--out", tmp_path / "run"])
    status, told = start_and_interrupt(command, tmp_path / "run", 2, signal.SIGTERM, group=True)
    assert status == 143 and "stopped by a signal" in told and "Traceback" not in told, told
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == steps_logged(tmp_path / "run")[-1]


FAILING = """
import sys
sys.path[:0] = sys.argv[2:]
import mae, common
from conftest import tiny
def fail(run, share):
    raise ZeroDivisionError("in the middle of a run")
common.Run.warn_if_data_bound = fail
common.MODELS["toy"] = (32, 2, 2)
mae.train(tiny(sys.argv[1] + "/run", data=sys.argv[1] + "/images", workers=1, epochs=1000))
"""


def test_an_error_ends_the_workers_too(tmp_path):
    """They ignore the signal by which the loader would end them; called from somebody's own program, without `main`."""
    write_images(tmp_path / "images", 64)
    done = subprocess.run([sys.executable, "-c", FAILING, tmp_path, ROOT / "tests", ROOT], capture_output=True, text=True,
                          env=environment(), timeout=120)
    assert done.returncode == 1 and "ZeroDivisionError: in the middle of a run" in done.stderr, done.stderr


def test_sigterm_to_two_processes(tmp_path):
    """torchrun passes the signal on; the processes agree on a step, and the checkpoint is whole."""
    command = launch([*ENDLESS, "--log-every", "2", "--out", tmp_path], nproc=2)
    status, told = start_and_interrupt(command, tmp_path, 2, signal.SIGTERM)
    assert status != 0 and told.count("stopped by a signal after step") == 1, told
    assert read_checkpoint(tmp_path / "last.pt")["step"] == steps_logged(tmp_path)[-1]


# -- what bad input gets --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every file that a wrong invocation below asks for, in one folder."""
    root = tmp_path_factory.mktemp("files")
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("no image")
    (root / "file").write_text("a file, not a folder")
    write_images(root / "split" / "train" / "cats", 2)
    write_images(root / "split" / "train" / "dogs", 2)
    write_images(root / "split" / "val" / "birds", 2)
    (root / "broken").mkdir()
    (root / "broken" / "a.png").write_bytes(b"no image")
    torch.save({"model": {"w": torch.randn(3000)}}, root / "weights.pt")
    (root / "short.pt").write_bytes((root / "weights.pt").read_bytes()[:5000])
    torch.save({"method": "capi", "config": {}, "model": {}, "step": 1}, root / "capi.pt")
    torch.save({"model": MODELS.items}, root / "code.pt")  # a bound method: to load it is to run code
    cfg = common.start(tiny(root, model="nano"))[0]
    torch.save({"method": "mae", "config": dataclasses.asdict(cfg), "step": 1}, root / "mae.pt")
    torch.save({"method": "semantic_mim"}, root / "bare.pt")
    module = MODULES["semantic_mim"]
    cfg = module.with_recipe(module.Config(img_size=(64,), patch_size=8))
    torch.save({"method": "semantic_mim", "config": dataclasses.asdict(cfg), "step": 1, "model": module.build(cfg).state_dict()},
               root / "large.pt")
    write_tokenizer(root / "tokenizer.pth")
    return root


def write_tokenizer(path, hidden=8, vocab=16):
    """A random encoder of the dVAE under the released names: four groups of two blocks, 1 2 4 8 times as wide."""
    convs, width = {"input": (hidden, 3, 7)}, hidden
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name, out = f"group_{group}.block_{block}", hidden * 2**(group - 1)
            if width != out:
                convs[f"{name}.id_path"] = (out, width, 1)
            thin = out // 4
            for conv, sizes in enumerate(((thin, width, 3), (thin, thin, 3), (thin, thin, 3), (out, thin, 1)), 1):
                convs[f"{name}.res_path.conv_{conv}"] = sizes
            width = out
    convs["output.conv"] = (vocab, width, 1)
    weights = {f"blocks.{name}.w": torch.randn(n, m, side, side) / (m * side**2)**0.5
               for name, (n, m, side) in convs.items()}
    torch.save(weights | {f"{name[:-1]}b": torch.zeros(len(w)) for name, w in weights.items()}, path)
    return path


WRONG = [  # flags, FILES standing for the folder above; what the line has to say
    ("--bogus 3", "--bogus"),
    ("--epoch 3", "--epochs"),
    ("--epochs many", "--epochs.*many"),
    ("--epochs", "--epochs"),
    ("stray", "stray"),
    ("--model giant", "--model.*nano"),
    ("--amp fp8", "--amp.*bf16"),
    ("--device tpu", "--device.*cuda"),
    ("--data FILES/nowhere", "--data.*no such folder"),
    ("--data shape", "--data shape.*shapes"),
    ("--data shapes:many", "--data shapes:many"),
    ("--data shapes:0", "--data shapes:0"),
    ("--data FILES/file", "--data"),
    ("--data FILES/empty", "--data.*no image"),
    ("--data FILES/texts", "--data.*no image"),
    ("--data FILES/split", "--data.*val/.*birds"),
    ("--img-size 30", "--patch-size 8.*--img-size 30.*32"),
    ("--img-size 32 32 32", "--img-size"),
    ("--img-size 0", "--img-size"),
    ("--patch-size -4", "--patch-size"),
    ("--patch-size 64", "--patch-size 64"),
    ("--img-size 8", "--mask-ratio"),  # a grid of one patch
    ("--batch-size 30 --accum 4", "--batch-size 30.*--batch-size (28|32) would"),
    ("--batch-size 0", "--batch-size"),
    ("--accum 0", "--accum"),
    ("--epochs 0", "--epochs"),
    ("--log-every 0", "--log-every"),
    ("--save-every 0", "--save-every"),
    ("--eval-every -1", "--eval-every"),
    ("--workers -2", "--workers"),
    ("--base-lr nan", "--base-lr"),
    ("--base-lr -1", "--base-lr"),
    ("--clip-grad -1", "--clip-grad"),
    ("--seed -1", "--seed"),
    ("--seed 99999999999999999999", "--seed"),
    ("--mask-ratio 1", "--mask-ratio"),
    ("--mask-ratio 0", "--mask-ratio"),
    ("--mask-ratio 0.99", "--mask-ratio 0.99"),
    ("--mask-ratio nan", "--mask-ratio"),
    ("--in-chans 0", "--in-chans"),
    ("--mean 0.5 0.5", "--mean.*3"),
    ("--std 0", "--std"),
    ("--std 0.2 0.2 -0.2", "--std"),
    ("--decoder-dim 30", "30"),
    ("--decoder-dim 0", "--decoder-dim"),
    ("--decoder-heads 3", "--decoder-heads 3"),
    ("--decoder-heads 0", "--decoder-heads"),
    ("--decoder-depth -1", "--decoder-depth"),
    ("--crop-scale 0.2", "--crop-scale"),
    ("--crop-scale 1.0 0.2", "--crop-scale"),
    ("--crop-scale 0.5 1.5", "--crop-scale"),
    ("--crop-scale 0 0", "--crop-scale"),
    ("--betas 0.9", "--betas"),
    ("--betas 0.9 1.5", "--betas"),
    ("--amp fp16", "--amp fp16"),
    ("--resume FILES/nowhere.pt", "nowhere.pt.*no such file"),
    ("--resume FILES/file", "file"),
    ("--resume FILES/short.pt", "short.pt.*truncated"),
    ("--resume FILES/weights.pt", "weights.pt.*not a checkpoint"),
    ("--resume FILES/capi.pt", "capi.pt.*capi.*mae"),
    ("--resume FILES/code.pt", "code.pt.*unpickling"),
    ("--resume FILES/mae.pt --seed 7", "mae.pt.*--seed"),
]


WRONG_OF = [  # the flags that MAE has not
    ("latent_mim", "--visible-share 0.99", "--visible-share.*16 of 16"),
    ("latent_mim", "--visible-share 1.5", "--visible-share 1.5"),
    ("latent_mim", "--ema 2 1", "--ema 2"),
    ("latent_mim", "--ema 0.9", "--ema takes two"),
    ("latent_mim", "--sim-target 0.5", "--sim-target takes two"),
    ("latent_mim", "--loss l1", "--loss.*l2"),
    ("latent_mim", "--tau 0", "--tau"),
    ("latent_mim", "--gap -2", "--gap"),
    ("latent_mim", "--img-size 8", "--visible-share.*of 1 patches"),
    ("latent_mim", "--decoder-heads 3", "--decoder-heads 3"),
    ("latent_mim", "--resume FILES/mae.pt", "mae.pt.*of mae, not of latent_mim"),
    ("semantic_mim", "--mask-ratio 1", "--mask-ratio 1"),
    ("semantic_mim", "--num-proxy 0", "--num-proxy 0.*at least one"),
    ("semantic_mim", "--target pixels", "--target.*hog"),
    ("semantic_mim", "--target dvae", "--target dvae needs --tokenizer"),
    ("semantic_mim", "--target dvae --tokenizer FILES/nowhere.pth", "nowhere.pth.*no such file"),
    ("semantic_mim", "--target dvae --tokenizer FILES/file", "file.*not a PyTorch checkpoint"),
    ("semantic_mim", "--target dvae --tokenizer FILES/weights.pt", "not the dVAE's encoder"),
    ("semantic_mim", "--target dvae --in-chans 1 --tokenizer FILES/tokenizer.pth", "--in-chans 1.*3"),
    ("semantic_mim", "--beside FILES/mae.pt", "--beside.*mae.pt.*not a checkpoint of semantic_mim"),
    ("semantic_mim", "--beside FILES/nowhere.pt", "nowhere.pt.*no such file"),
    ("semantic_mim", "--beside FILES/bare.pt", "bare.pt.*not a checkpoint of semantic_mim"),
    ("semantic_mim", "--beside FILES/large.pt", "--beside.*large.pt: its grid.*8, 8"),
    ("semantic_mim", "--drop-path 1", "--drop-path 1"),
    ("semantic_mim", "--jitter 2", "--jitter 2"),
    ("pilamim", "--mask-ratio 1", "--mask-ratio 1"),
    ("pilamim", "--pixel-weight 0 --latent-weight 0 --cls-weight 0", "--pixel-weight.*all 0"),
    ("pilamim", "--latent-weight -1", "--latent-weight -1"),
    ("pilamim", "--ema 0.9", "--ema takes two"),
    ("pilamim", "--decoder-heads 3", "--decoder-heads 3"),
    ("capi", "--mask-ratio 1", "--mask-ratio 1"),
    ("capi", "--mask-ratio 0.01", "--mask-ratio 0.01 leaves 0 of 16"),
    ("capi", "--registers 3", "--registers 3.*multiple of 4"),
    ("capi", "--predict-share 1.5", "--predict-share 1.5"),
    ("capi", "--clusters -1", "--clusters -1"),
    ("capi", "--ema 2", "--ema 2"),
    ("capi", "--drop-path 1", "--drop-path 1"),
]
WRONG = [("mae", *case) for case in WRONG] + WRONG_OF


def wrong(monkeypatch, capsys, argv, method="mae"):
    """main() of the flags -> the one line on stderr."""
    monkeypatch.setattr(sys, "argv", [f"{method}.py", *argv])
    with pytest.raises(SystemExit) as leaving:
        main(MODULES[method].train, MODULES[method].Config, MODULES[method].__doc__)
    captured = capsys.readouterr()
    assert leaving.value.code == 2
    assert captured.err.count("\n") == 1 and captured.err.startswith(f"{method}.py: "), captured.err
    return captured.err


@pytest.mark.parametrize("method, flags, text", WRONG,
                         ids=[f"{m} {flags}".replace("FILES/", "") for m, flags, _ in WRONG])
def test_wrong_invocation(files, tmp_path, monkeypatch, capsys, method, flags, text):
    argv = [*tiny_flags(method), "--out", str(tmp_path / "run"), *flags.replace("FILES", str(files)).split()]
    assert re.search(text, wrong(monkeypatch, capsys, argv, method))
    assert not (tmp_path / "run").exists()


def test_out_that_cannot_be_written(files, monkeypatch, capsys):
    for out in (files / "file", files / "file" / "below", "/proc/nothing"):
        assert f"--out {out}" in wrong(monkeypatch, capsys, [*TINY, "--out", str(out)])
    assert (files / "file").read_text() == "a file, not a folder"


def test_nothing_but_broken_images(files, tmp_path, monkeypatch, capsys):
    argv = [*TINY, "--data", str(files / "broken"), "--out", str(tmp_path / "run")]
    line = wrong(monkeypatch, capsys, argv)
    assert "a.png" in line or "--data" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the flag asks for")
def test_cuda_that_is_not_there(tmp_path, monkeypatch, capsys):
    argv = [*TINY, "--device", "cuda", "--out", str(tmp_path / "run")]
    assert "--device cuda" in wrong(monkeypatch, capsys, argv)
    assert not (tmp_path / "run").exists()


def test_compile_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "C++" in wrong(monkeypatch, capsys, [*TINY, "--compile", "on", "--out", str(tmp_path / "run")])


def test_a_set_that_cannot_be_downloaded(tmp_path, monkeypatch, capsys):
    def offline(root, download, **options):
        raise OSError("Name or service\nnot known") if download else RuntimeError("Dataset not found")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    argv = [*TINY, "--data", "cifar10", "--data-root", "here", "--out", str(tmp_path / "run")]
    line = wrong(monkeypatch, capsys, argv)
    assert "--data cifar10" in line and "--data-root here" in line and "service not known" in line
    assert not (tmp_path / "run").exists()


def test_a_set_that_needs_another_package(tmp_path, monkeypatch, capsys):
    def needy(root, download, **options):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
    monkeypatch.setattr(torchvision.datasets, "SVHN", needy)
    line = wrong(monkeypatch, capsys, [*TINY, "--data", "svhn", "--out", str(tmp_path / "run")])
    assert "--data svhn" in line and "scipy" in line and "download" not in line


def test_wrong_invocation_of_the_real_program(tmp_path):
    done = run_program(["--mask-ratio", "1", "--out", tmp_path / "run"], cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("mae.py: --mask-ratio")
    assert list(tmp_path.iterdir()) == []


# -- what is printed ------------------------------------------------------------------------------------

def all_commands():
    fenced = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    docs = [(ROOT / name).read_text().split('"""')[1] for name in (*(f"{m}.py" for m in METHODS), "tests/benchmark.py")]
    commands = {command for text in (*fenced, *docs) for command in printed_commands(text)}
    return sorted(c for c in commands if " evaluate.py" not in c)  # those need a checkpoint: test_evaluate.py


def test_printed_commands_are_found():
    commands = all_commands()
    assert "python mae.py" in commands and any(c.startswith("torchrun") for c in commands)
    assert any("--epochs 800 --warmup-epochs 40" in c for c in commands)  # continuation lines and all
    assert all(any(c.startswith(start) and f" {method}.py" in c for c in commands)
               for method in METHODS for start in ("python", "torchrun"))
    text = "pip install x && python a.py --b 1     what it does\n pytest\n torchrun b.py \\\n   --c 2   why"
    assert printed_commands(text) == ["python a.py --b 1", "torchrun b.py --c 2"]


def test_printed_commands_do_not_collide():
    """Run one after the other, as a reader does: what goes to one folder has one Config, or the second is refused."""
    seen = {}
    for command in all_commands():
        words = shlex.split(command)
        script = next(word for word in words if word.endswith(".py"))
        if (method := script.removesuffix(".py")) in METHODS:
            cfg = common.parse_args(MODULES[method].Config, argv=words[words.index(script) + 1:])
            run = method, {k: v for k, v in dataclasses.asdict(cfg).items() if k not in common.CHANGEABLE}
            first, other = seen.setdefault(cfg.out, (run, command))
            assert run == first, f"{command}\n{other}"


TOY_FLAGS = ("--batch-size 32 --epochs 1 --model nano --img-size 32 --patch-size 8 --workers 0 --device cpu "
             "--resume no").split()


@pytest.mark.parametrize("command", all_commands())
def test_printed_command_runs(programs, command, tmp_path, monkeypatch, capsys):
    """At toy size: small flags are added at the end, where the last counts; torchrun gets two processes. It really is
    torchrun for the shortest command; the recipes' ranks are started without it, which spares three imports of torch each."""
    program, *words = shlex.split(command)
    folder = write_images(tmp_path / "images", 8)
    files = {"DIR": str(folder), "dalle_encoder.pth": str(write_tokenizer(tmp_path / "tokenizer.pth"))}
    words = [files.get(word, word) for word in words]
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).exists()
    small = METHODS.get(words[script].removesuffix(".py"), "").split()
    flags = [*words[script + 1:], *TOY_FLAGS, *small, "--out", str(tmp_path / "run")]
    if words[script].endswith("benchmark.py"):
        flags = [*words[script + 1:], "--rounds", "1", "--steps", "3", "--batch-size", "8", "--model", "nano",
                 "--img-size", "32", "--settings", "fp32", "--methods", "mae", *METHODS["mae"].split()]
        flags[:1] = ["--peers", "toy"] if flags[0] == "--peers" else flags[:1]
    elif str(folder) in words:
        flags += ["--batch-size", "4"]
    else:
        flags += ["--data", "shapes:64"]
    if program == "torchrun" and "2" in words[:script]:
        done = run_program(flags, nproc=2, program=words[script])
        assert done.returncode == 0, done.stderr
    elif program == "torchrun":
        method = words[script].removesuffix(".py")
        assert programs.run_together("program", method=method, argv=flags) == [0, 0], programs.said(0) + programs.said(1)
    else:  # in this process: the same program, without the seconds that importing torch takes
        monkeypatch.setattr(sys, "argv", [words[script], *flags])
        try:
            runpy.run_path(str(ROOT / words[script]), run_name="__main__")
            status = 0
        except SystemExit as leaving:
            status = leaving.code or 0
        assert status == 0, capsys.readouterr().err
    if not words[script].endswith("benchmark.py"):
        assert (tmp_path / "run" / "last.pt").exists()


def test_the_slurm_script(tmp_path):
    """The README's, on one machine with stand-ins for srun and scontrol, two processes and toy sizes."""
    script = re.search(r"^```bash\n(#!/bin/bash\n.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    stand_ins = {"srun": f'exec "{Path(sys.executable).parent}/$1" "${{@:2}}"', "scontrol": "echo 127.0.0.1; echo other"}
    for name, line in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    folder = write_images(tmp_path / "images", 8)
    toy = f" --data {folder} " + " ".join([*TOY_FLAGS, METHODS["mae"], f"--batch-size 4 --out {tmp_path / 'run'}"])
    script = script.rstrip() + toy
    for theirs, ours in ("--nproc_per_node 8", "--nproc_per_node 2"), (":29500", ":0"):
        assert theirs in script
        script = script.replace(theirs, ours)
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_NNODES="1", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[0-7]")
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and (tmp_path / "run" / "last.pt").exists(), done.stderr


def test_docs_are_small_and_there():
    """The README's pictures, its count of lines, and a whole log of each default run."""
    files = [path for path in (ROOT / "docs").rglob("*") if path.is_file()]
    shown = {ROOT / name for name in re.findall(r"\((docs/[^)]*)\)", (ROOT / "README.md").read_text())}
    assert all(path.exists() for path in shown) and {f for f in files if f.suffix == ".png"} <= shown
    assert sum(path.stat().st_size for path in files if path.suffix == ".png") < 600_000
    for method in METHODS:
        count = len((ROOT / f"{method}.py").read_text().splitlines())
        assert re.search(rf"^\| \[{method}.py\].*\| {count} \|", (ROOT / "README.md").read_text(), re.M)
        path = ROOT / "docs" / "logs" / f"{method}.jsonl"
        first, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert path.stat().st_size < 30_000 and first["method"] == method and first["config"]["out"] == f"runs/{method}"
        assert set(first["config"]) <= {f.name for f in dataclasses.fields(MODULES[method].Config)}
        assert "raw_knn_kind" in lines[0] and "knn_kind" in lines[-1]


@each_method
def test_benchmark_knows_the_five(capsys, monkeypatch, method):
    """What it runs in a process of its own for each method and setting, and asks for two turns."""
    benchmark = runpy.run_path(str(ROOT / "tests" / "benchmark.py"))
    assert benchmark["METHODS"] == [*METHODS]
    monkeypatch.setattr(sys, "stdin", io.StringIO("turn\nturn\n"))
    benchmark["one"](method, tiny_flags(method), 2)
    ready, *turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ready.keys() == {"ready s", "device"} and ready["device"] == "cpu" and len(turns) == 2
    for turn in turns:
        assert turn.keys() == {"img/s", "ms/step", "peak MiB", "data wait"} and turn["img/s"] > 0


def test_benchmark_races(capsys, monkeypatch):
    """What it runs in a process of its own for each of the MAEs that it compares, ours here."""
    benchmark = runpy.run_path(str(ROOT / "tests" / "benchmark.py"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("turn\nturn\n"))
    benchmark["race"]("ours", "toy", "bf16", 2)
    ready, *turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ready["ready s"] > 0 and [turn.keys() for turn in turns] == [{"img/s"}] * 2 and turns[0]["img/s"] > 0


def test_readme_snippets(tmp_path, monkeypatch):
    """The README's Python: on a run's checkpoint, for all five, and with a small file in place of the authors'."""
    run, released = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    for method in METHODS:
        cfg = tiny(tmp_path / "runs" / method, method)
        trained(cfg, method)
        names = {"images": torch.randn(2, 3, 32, 32)}
        exec(run.replace("from mae", f"from {method}").replace("runs/mae", f"runs/{method}"), names)
        assert names["pooled"].shape == (2, 32) and names["patches"].shape == (2, 16, 32)
        assert not names["model"].training and names["run"]["step"] == 2
    encoder = mae.MAE(img_size=224, patch_size=16, dim=64, depth=1, heads=1, decoder_dim=16, decoder_depth=1)
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_base.pth")
    names = {"images": torch.randn(2, 3, 224, 224)}
    exec(released, names)
    assert torch.equal(names["pooled"], encoder.encode(names["images"])[0])


def test_readme_shows_what_mae_prints(capsys):
    """The end of a run is that of docs/logs/mae.jsonl, printed as a run prints it."""
    log = object.__new__(common.Log)
    lines = (ROOT / "docs" / "logs" / "mae.jsonl").read_text().splitlines()
    log.main, log.tests = True, [r for r in map(json.loads, lines) if "rank" in r]
    log.summary(SimpleNamespace(out=str(ROOT / "docs")))
    *table, _ = capsys.readouterr().out.splitlines()
    assert len(table) == 6 and "\n".join(table) + "\nruns/mae: " in (ROOT / "README.md").read_text()


def test_readme_tells_how_the_logs_end():
    """The table of final losses is that of the logs beside it."""
    rows = re.findall(r"^\| [\w ]+ \| `\w+` [\d.]+ \([\d.]+ to .*", (ROOT / "README.md").read_text(), re.M)
    rows = dict(zip(METHODS, rows, strict=True))
    for method, key in {"mae": "loss", "latent_mim": "patch_loss", "semantic_mim": "loss", "pilamim": "pixel_loss",
                        "capi": "capi_loss"}.items():
        log = [json.loads(line) for line in (ROOT / "docs" / "logs" / f"{method}.jsonl").read_text().splitlines()]
        last = [r[key] for r in log if key in r][-10:]
        mean, least, most = re.search(rf"`{key}` (\S+) \((\S+) to (\S+)\)", rows[method]).groups()
        for told, true in ((mean, sum(last) / 10), (least, min(last)), (most, max(last))):
            assert float(told) == pytest.approx(true, abs=0.6 * 10 ** -len(told.split(".")[1])), (method, key)


@each_method
def test_help(capsys, method):
    module = MODULES[method]
    with pytest.raises(SystemExit) as leaving:
        parse_args(module.Config, module.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert leaving.value.code == 0 and max(map(len, text.splitlines())) <= 120
    assert all(f"\n{group}:\n" in text for group in ("the method", "model", "data", "training", "run"))
    options, plain = text.split("the method:")[1], re.sub(r"\s+", " ", text)
    for field in dataclasses.fields(module.Config):
        name, default = "--" + field.name.replace("_", "-"), field.default
        assert re.search(rf"^  {name}\b", options, re.M), name
        line = re.sub(r"\s+", " ", re.search(rf"^  {name}\b.*?(?=^  --|^\S|\Z)", options, re.M | re.S)[0])
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert shown == "" or f"[{shown}]" in line, line
        assert len(re.findall(r"[a-z]+", line)) > 4, line  # a flag, and words that say what it does
    assert module.__doc__[:40] in plain and "exit status" in plain
