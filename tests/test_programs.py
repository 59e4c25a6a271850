"""The programs as a user starts them: processes, signals, wrong invocations, printed commands."""

import ast
import atexit
import contextlib
import functools
import importlib
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
import threading
import time
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import torchvision

import common
from common import parse_args, read_checkpoint
from conftest import (METHODS, MODULES, ROOT, each_method, environment, launch, losses,
                      printed_commands, records, tiny, tiny_flags, trained,
                      write_images)
from programs import all_programs, program, programs  # fixtures, and a job

PROGRAMS = [*METHODS, "evaluate"]
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
TOKENIZER = ROOT / "tests" / "fixtures" / "dvae_encoder.pt"
ENDLESS = "--epochs 100000 --save-every 100000 --log-every 1"


def flags_of(method, out, more=""):
    return [*tiny_flags(method), "--model", "toy", "--out", str(out), *more.split()]


# -- several processes -----------------------------------------------------------------------------

def compiled(method, argv):
    """With the compiler's front end and autograd, but without generated code."""
    os.environ["CXX"] = "not used"
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    program(method, [*argv, "--compile", "on"])


def assert_same_run(one, two):
    """Equal but for the order in which numbers are summed."""
    assert len(losses(one)) == 5 and losses(two) == pytest.approx(losses(one), abs=1e-5, rel=2e-6)
    first, second = (read_checkpoint(out / "last.pt") for out in (one, two))
    for name, t in first["model"].items():
        # The bias of keys changes no attention. Its gradient is the rounding error of a zero, which
        # AdamW scales up to a whole step.
        if not name.endswith(("qkv.bias", "kv_proj.bias")):
            torch.testing.assert_close(second["model"][name], t, rtol=0, atol=1e-5)
    for i, state in first["optimizer"]["state"].items():
        average = second["optimizer"]["state"][i]["exp_avg"]
        torch.testing.assert_close(average, state["exp_avg"], rtol=1e-3, atol=1e-5)


@each_method
def test_two_processes_equal_one_also_compiled(programs, tmp_path, method):
    one, two, compiled = (tmp_path / name for name in ("one", "two", "compiled"))
    flags = "--data shapes:80 --epochs 2 --log-every 1 --accum 2"
    trained(tiny(one, method, flags), method)
    argv = flags_of(method, two, flags)
    assert programs.run_together("program", method=method, argv=argv) == [0, 0], programs.said(1)
    assert "2 processes" in programs.said(0)[0] and programs.said(1) == ["", ""]
    assert_same_run(one, two)
    looks = [next(r for r in records(out) if "knn_kind" in r) for out in (one, two)]
    assert looks[0] == looks[1]  # before training
    argv = flags_of(method, compiled, flags)
    assert programs.run_together("compiled", method=method, argv=argv) == [0, 0], programs.said(1)
    assert "compiled" in programs.said(0)[0]
    assert_same_run(two, compiled)


@pytest.mark.parametrize("flags, status, line", [
    ("--batch-size 33", 2, "--batch-size 33 does not divide"),
    ("--base-lr 1e18 --warmup-epochs 0 --epochs 3 --log-every 1", 1, "error: not finite")])
def test_two_processes_stop_together_with_one_line(programs, tmp_path, flags, status, line):
    argv = flags_of("mae", tmp_path / "run", flags)
    assert programs.run_together("program", method="mae", argv=argv) == [status, status]
    assert (programs.said(0)[1] + programs.said(1)[1]).count(line) == 1
    assert not (tmp_path / "run" / "last.pt").exists()


def test_two_nodes(tmp_path):
    """Two agents, as two machines would start them, meet on the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
               "--master_addr=127.0.0.1", f"--master_port={port}", "--node_rank"]
    argv = [str(ROOT / "mae.py"), *tiny_flags("mae"), "--out", str(tmp_path)]
    agents = [subprocess.Popen([*command, node, *argv], env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True) for node in "01"]
    try:
        told = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(told)
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 2
    assert records(tmp_path)[0]["processes"] == 2


# -- files -----------------------------------------------------------------------------------------

def alone(folder, method, argv):
    """The method's file as a program that finds nothing of this repository but common.py."""
    os.chdir(folder)
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", "")).startswith(str(ROOT)):
            del sys.modules[name]
    sys.path[:] = [folder, *(path for path in sys.path if not path.startswith(str(ROOT)))]
    sys.argv, sys.dont_write_bytecode = [f"{method}.py", *argv], True
    runpy.run_path(f"{method}.py", run_name="__main__")


@each_method
def test_a_method_runs_with_common_alone(programs, tmp_path, method):
    for name in ("common", method):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    given = dict(folder=str(tmp_path), method=method, argv=tiny_flags(method))
    status, _, err = programs.run("alone", **given)
    assert status == 0 and "img/s" in err and "loss=" in err and "Traceback" not in err, err
    assert {path.name for path in tmp_path.iterdir()} == {"common.py", f"{method}.py", "runs"}
    made = {path.name for path in (tmp_path / "runs" / method).iterdir()}
    assert {"last.pt", "log.jsonl"} < made and any(name.endswith(".png") for name in made)


@pytest.mark.parametrize("name", ["common", *PROGRAMS])
def test_only_the_required_packages_are_imported(name):
    nodes = [*ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))]
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found = {module.split(".")[0] for module in found} - sys.stdlib_module_names
    allowed = {"torch", "torchvision", "numpy", "tqdm", "PIL"}
    assert found <= (allowed if name == "common" else allowed | {"common"})


def process_state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return (handlers, [*warnings.filters], {**os.environ}, threading.active_count(),
            atexit._ncallbacks(), torch.get_num_threads(), torch.get_default_dtype(), os.getcwd(),
            torch.get_float32_matmul_precision(), torch.get_rng_state().tolist())


def import_all():
    torch.set_num_threads(3)
    before = process_state()
    for name in ("common", *PROGRAMS):
        sys.modules.pop(name, None)
    for name in ("common", *PROGRAMS):
        importlib.import_module(name)
        assert process_state() == before, name


def test_importing_has_no_side_effects(programs):
    assert programs.run("import_all") == (0, "", "")


# -- signals ---------------------------------------------------------------------------------------

def steps_logged(out):
    """The steps in the log's complete lines."""
    path = Path(out, "log.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [r["step"] for r in found if "loss" in r]


def wait_for_step(out, step, is_running):
    give_up = time.monotonic() + 120
    while max(steps_logged(out), default=0) < step:
        assert is_running() and time.monotonic() < give_up
        time.sleep(0.02)


def interrupt(command, out, step, number, kill):
    """Start a program, send it a signal after a step -> exit status, what it said. This waits for
    its loader processes too, because they hold the pipe."""
    run = subprocess.Popen(command, env=environment(), start_new_session=True, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for_step(out, step, lambda: run.poll() is None)
        kill(run.pid, number)
        told = run.communicate(timeout=120)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    return run.returncode, told


def leader(argv):
    """The program in a process group of its own, for signals to it and its loaders."""
    os.setsid()
    program("mae", argv)


def test_a_signal_saves_and_the_same_command_goes_on(programs, tmp_path):
    """All are sent to the program and its loaders, as terminals, `timeout` and Slurm do."""
    out, images = tmp_path / "run", write_images(tmp_path / "images", 40)
    argv = [*tiny_flags("mae"), *f"{ENDLESS} --workers 2 --data {images} --out {out}".split()]
    status, told = interrupt(launch(argv), out, 3, signal.SIGINT, os.killpg)
    assert status == 130 and "stopped by a signal" in told and "Traceback" not in told, told
    for number in (signal.SIGTERM, signal.SIGHUP):
        saved = read_checkpoint(out / "last.pt")["step"]
        assert saved == steps_logged(out)[-1]
        pid = programs.start("leader", argv=argv)
        wait_for_step(out, saved + 1, lambda: programs.wait(pid, seconds=0) is None)
        os.killpg(pid, number)
        assert programs.wait(pid) == 128 + number and f"step {saved}\n" in programs.said()[0]
    assert steps_logged(out) == [*range(1, read_checkpoint(out / "last.pt")["step"] + 1)]


def test_sigterm_to_two_processes(tmp_path):
    """torchrun passes the signal on. The processes agree on a step, and the checkpoint is whole."""
    argv = [*tiny_flags("mae"), *ENDLESS.split(), "--log-every", 2, "--out", tmp_path]
    status, told = interrupt(launch(argv, nproc=2), tmp_path, 4, signal.SIGTERM, os.kill)
    assert status != 0 and told.count("stopped by a signal after step") == 1, told
    assert read_checkpoint(tmp_path / "last.pt")["step"] == steps_logged(tmp_path)[-1]


FAILING = """
import sys
sys.path[:0] = sys.argv[2:]
import common, mae
from conftest import tiny
def fail(meter, step, **rates):
    raise ZeroDivisionError("in the middle of a run")
common.Meter.report = fail
mae.train(tiny(sys.argv[1] + "/run", model="nano", data=sys.argv[1] + "/images", workers=1))
"""


def test_an_error_in_another_program_ends_the_workers_too(tmp_path):
    write_images(tmp_path / "images", 64)
    command = [sys.executable, "-c", FAILING, tmp_path, ROOT / "tests", ROOT]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ZeroDivisionError: in the middle" in done.stderr, done.stderr


# -- wrong invocations -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the wrong invocations name, in one folder."""
    root = tmp_path_factory.mktemp("files")
    for name in ("empty", "texts", "broken"):
        (root / name).mkdir()
    for name in ("text", "texts/a.txt", "broken/a.png"):
        (root / name).write_text("neither an image nor a checkpoint")
    for name in ("classes/cats", "classes/dogs", "flat"):
        write_images(root / name, 2)
    for method in ("mae", "capi"):
        cfg = common.start(tiny("run", method, model="nano"))[0]
        model = MODULES[method].build(cfg).state_dict()
        torch.save({"method": method, "config": asdict(cfg), "step": 1, "model": model},
                   root / f"{method}.pt")
    (root / "short.pt").write_bytes((root / "mae.pt").read_bytes()[:50_000])
    torch.save({"model": {"w": torch.randn(3)}}, root / "weights.pt")
    torch.save({"model": common.MODELS.items}, root / "code.pt")  # to load a method is to run code
    return root


WRONG = [  # program, flags, what the line on stderr says
    ("mae", "--bogus 3", "--bogus"),
    ("mae", "--epoch 3", "--epoch 3"),  # no abbreviations
    ("latent_mim", "--mask-ratio 0.5", "--mask-ratio"),  # another method's
    ("mae", "--epochs 1e3", "--epochs.*1e3"),
    ("mae", "stray", "stray"),
    ("mae", "--model giant", "--model.*giant.*nano"),
    ("mae", "--norm-pix=no", "--norm-pix"),
    ("mae", "--epochs 0", "--epochs 0"),
    ("mae", "--base-lr nan", "--base-lr nan"),
    ("mae", "--seed 99999999999999999999", "--seed 9"),
    ("mae", "--std 0.2 0 0.2", "--std 0"),
    ("mae", "--crop-scale 0.5", "--crop-scale"),
    ("mae", "--mean 0.5 0.5", "--mean.* 3 values"),
    ("mae", "--img-size 32 32 32", "--img-size"),
    ("mae", "--img-size 30", "--patch-size 8.*--img-size 30"),
    ("mae", "--batch-size 30 --accum 4", "--batch-size 30.*--accum 4"),
    ("mae", "--device cuda", "--device cuda"),
    ("mae", "--amp fp16", "--amp fp16"),
    ("mae", "--compile on", r"--compile on.*C\+\+"),
    ("mae", "WORLD_SIZE=two", "WORLD_SIZE.*two"),
    ("mae", "WORLD_SIZE=0", "WORLD_SIZE"),
    ("mae", "--data ''", "--data : no such"),
    ("mae", "--data FILES/texts", "--data.*no image"),
    ("mae", "--data FILES/broken", "--data.* images.*a.png"),
    ("mae", "--data shapes:0", "--data shapes:0"),
    ("mae", "--data cifar10 --data-root here", "cifar10.*--data-root here.*service not known"),
    ("mae", "--out FILES/text", "--out .*text.*cannot be written"),
    ("mae", "--resume FILES/nowhere.pt", "nowhere.pt: no such file"),
    ("mae", "--resume FILES", r"files\d*: "),
    ("mae", "--resume FILES/short.pt", "short.pt: damaged"),
    ("mae", "--resume FILES/weights.pt", "weights.pt: .*not of mae"),
    ("mae", "--resume FILES/code.pt", "code.pt: it holds code"),
    ("mae", "--resume FILES/capi.pt", "capi.pt: a checkpoint of capi, not of mae"),
    ("mae", "--resume FILES/mae.pt --seed 7", "mae.pt.*--seed 0 there, 7 now"),
    ("mae", "--resume FILES/mae.pt", "mae.pt: its optimizer does not fit"),
    ("mae", "--img-size 8", "--mask-ratio 0.75.*1 patches"),
    ("mae", "--decoder-heads 5", "5 heads"),
    ("mae", "--decoder-dim 30", "30"),
    ("latent_mim", "--visible-share 0.99", "--visible-share.*16 of 16"),
    ("semantic_mim", "--target dvae", "--target dvae needs --tokenizer"),
    ("semantic_mim", "--target dvae --tokenizer FILES/weights.pt", "--tokenizer is not"),
    ("semantic_mim", f"--target dvae --vocab 5 --tokenizer {TOKENIZER}", "--vocab 5.* has 16"),
    ("semantic_mim", "--jitter 0.4 --in-chans 1", "--in-chans 1.*--jitter"),
    ("pilamim", "--pixel-weight 0 --latent-weight 0 --cls-weight 0", "--pixel-weight.*all 0"),
    ("capi", "--registers 3", "--registers 3.*multiple of 4"),
    ("evaluate", "", "checkpoint"),
    ("evaluate", "FILES/text", "text: damaged"),
    ("evaluate", "FILES/weights.pt", "weights.pt.*--method"),
    ("evaluate", "FILES/mae.pt --method capi", "mae.pt.* of mae.*--method"),
    ("evaluate", "FILES/mae.pt --probe guess", "--probe.*guess"),
    ("evaluate", "FILES/mae.pt --data FILES/empty", "--data.*no image"),
    ("evaluate", "FILES/mae.pt --data FILES/flat --probe knn", "label"),
    ("evaluate", "FILES/mae.pt --data FILES/classes --masks a b c", "--masks takes"),
    ("evaluate", "FILES/mae.pt --picture --images FILES/text", "--images.*text"),
    ("evaluate", "FILES/mae.pt --export FILES/nowhere/encoder.pt", "nowhere.*cannot be written"),
]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def bare_machine(monkeypatch):
    """No GPU, no compiler, no network."""
    def offline(root, *args, **options):
        raise OSError("Name or service\nnot known")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)


@pytest.mark.parametrize("name, flags, text", WRONG, ids=[" ".join(row[:2]) for row in WRONG])
def test_wrong_invocation(files, bare_machine, tmp_path, monkeypatch, capsys, name, flags, text):
    """Exit status 2, one line on stderr, nothing written."""
    monkeypatch.chdir(tmp_path)
    before = contents(files)
    words = shlex.split(flags.replace("FILES", str(files)))
    while words and re.match(r"[A-Z_]+=", words[0]):
        monkeypatch.setenv(*words.pop(0).split("="))
    usual = [] if name == "evaluate" else [*tiny_flags(name), "--out", "run"]
    with pytest.raises(SystemExit) as leaving:
        program(name, [*usual, *words])
    told = capsys.readouterr().err.replace("\x1b[A", "")
    lines = [line for line in told.splitlines() if line.strip() and "img/s" not in line]  # no bars
    assert leaving.value.code == 2 and len(lines) == 1, told
    assert re.match(rf"{name}\.py: .*{text}", lines[0]), told
    if "images" not in text and "compile" not in text:  # these are found when the run has begun
        assert not list(tmp_path.iterdir())
    assert contents(files) == before


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_explains_every_flag(capsys, name):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as leaving:
        parse_args(module.Config, module.__doc__, ["--help"])
    text = capsys.readouterr().out
    plain = " ".join(text.split())
    assert leaving.value.code == 0 and " ".join(module.__doc__.split())[:40] in plain
    assert re.search(r"exit status: 0 .*1 .*2 bad input, 128 \+ n", plain)
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=\S)", text)]
    for field in fields(module.Config):
        name = field.name.replace("_", "-")
        entry = next(entry for entry in entries if re.match(rf"(--)?{name}\b", entry))
        assert field.default in ("", (), None) or f"[{field.default}]" in entry, entry
        assert len(re.findall(r"[a-z]{2,}", entry)) > 3, entry


# -- what is printed -------------------------------------------------------------------------------

def fenced(*languages):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", "\n".join(PAGES.values()), re.M | re.S)
    return [text for language, text in blocks if language in languages]


def training_commands():
    """Those of README.md, docs/ and the files' heads. evaluate.py's are in test_evaluate.py."""
    texts = fenced("", "sh", "bash", "console")
    texts += [(ROOT / f"{method}.py").read_text().split('"""')[1] for method in METHODS]
    found = {" ".join(command.split()) for text in texts for command in printed_commands(text)}
    return sorted(c for c in found if re.search(rf" ({'|'.join(METHODS)})\.py\b", c))


def test_printed_commands_are_found():
    assert all(any(re.match(rf"{start} .*\b{method}\.py", c) for c in training_commands())
               for method in METHODS for start in ("python", "torchrun"))


@pytest.mark.parametrize("command", training_commands())
def test_printed_command_runs(programs, command, tmp_path):
    """At toy size: the last of two equal flags counts. torchrun's run in two processes."""
    script = re.search(r"\w+\.py", command)
    method = script[0].removesuffix(".py")
    argv = shlex.split(command[script.end():].replace("dalle_encoder.pth", str(TOKENIZER)))
    argv += flags_of(method, tmp_path / "run", "--img-size 32")
    if "--data DIR" in command:
        argv += ["--batch-size", "4", "--data", str(write_images(tmp_path / "images", 8))]
    processes = 2 if command.startswith("torchrun") else 1
    status = programs.run_together("program", processes, method=method, argv=argv)
    assert status == [0] * processes, programs.said(0)[1]
    assert (tmp_path / "run" / "last.pt").exists()


def test_the_slurm_script_runs(tmp_path):
    """On one machine with stand-ins for srun and scontrol, two processes, toy size."""
    blocks = fenced("", "sh", "bash")
    script = next(text for text in blocks if text.startswith("#!/bin/bash")).rstrip()
    torchrun = Path(sys.executable).parent / "torchrun"
    images, out = write_images(tmp_path / "images", 8), tmp_path / "run"
    toy = shlex.join(tiny_flags("mae"))
    toy += f" --img-size 32 --model nano --batch-size 4 --data {images} --out {out}"
    srun = f'until [[ $1 == torchrun ]]; do shift; done\nexec {torchrun} "${{@:2}}" {toy}'
    for name, lines in {"srun": srun, "scontrol": "echo 127.0.0.1; echo other"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    script, count = re.subn(r"--nproc_per_node[ =]\S+", "--nproc_per_node 2", script)
    script = re.sub(r":29\d\d\d\b", ":0", script)
    slurm = dict(SLURM_NNODES="1", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n",
                 SLURM_CPUS_PER_TASK="1")
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", **slurm)
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=240)
    assert count == 1 and done.returncode == 0 and (out / "last.pt").exists(), done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[page])
    assert [link for link in links if not (page.parent / link).exists()] == []


@each_method
def test_readme_shows_how_to_use_a_run(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    trained(tiny(f"runs/{method}", method), method)
    snippet = next(text for text in fenced("python") if "runs/mae" in text)
    names = {"images": torch.randn(2, 3, 32, 32)}
    exec(re.sub(r"\bmae\b", method, snippet), names)
    assert names["pooled"].shape == (2, 32) and names["patches"].shape == (2, 16, 32)
    assert not names["model"].training


def test_readme_shows_how_to_use_a_released_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet = next(text for text in fenced("python") if "from_released" in text)
    path = re.search(r'"([\w.-]+\.pth)"', snippet)[1]
    torch.save({"model": MODULES["mae"].MAE().state_dict()}, path)  # the paper's ViT-B
    names = {"images": torch.randn(2, 3, 224, 224)}
    exec(snippet, names)
    assert names["pooled"].shape == (2, 768) and names["patches"].shape == (2, 196, 768)


def benchmark(argv):
    sys.argv = ["benchmark.py", *argv, "--rounds", "1", "--steps", "1"]
    runpy.run_path(str(ROOT / "tests" / "benchmark.py"), run_name="__main__")


SMALL = "--settings fp32 --model nano --img-size 32 --patch-size 8 --batch-size 8"


@pytest.mark.parametrize("flags, rows", [
    (f"--methods mae capi {SMALL}", ["mae", "capi"]),
    ("--peers toy --settings fp32", ["ours, fp32"]),
    ("--images IMAGES", ["common.py"]), ("--cost --methods mae", ["mae"])])
def test_benchmark_prints_numbers(programs, tmp_path, flags, rows):
    argv = flags.replace("IMAGES", str(write_images(tmp_path, 4))).split()
    status, out, err = programs.run("benchmark", argv=argv)
    assert status == 0 and all(re.search(rf"^{row} .*\d", out, re.M) for row in rows), out + err
