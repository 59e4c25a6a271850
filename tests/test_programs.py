"""The programs as a user starts them: processes, wrong invocations, printed commands."""

import ast
import functools
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import torchvision

import common
from common import parse_args, read_checkpoint
from conftest import (FIXTURES, METHODS, MODULES, ROOT, contents, each_method, environment, losses,
                      printed_commands, records, tiny, tiny_flags, trained, write_images)
from programs import all_programs, invoke, program, programs  # fixtures, and a job

PROGRAMS = [*METHODS, "evaluate"]
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
TOKENIZER = FIXTURES / "dvae_encoder.pt"


def flags_of(method, out, more=""):
    return [*tiny_flags(method), "--model", "toy", "--out", str(out), *more.split()]


# -- several processes

def compiled(method, argv):
    """With the compiler's front end and autograd, but without generated code."""
    os.environ["CXX"] = "not used"
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    program(method, [*argv, "--compile", "on"])


def assert_equal_runs(one, two):
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


@pytest.mark.parametrize("job", ["program", "compiled"])
@each_method
def test_two_processes_equal_one(programs, tmp_path, method, job):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = "--data shapes:80 --epochs 2 --log-every 1 --accum 2"
    trained(tiny(one, method, flags), method)
    argv = flags_of(method, two, flags)
    assert programs.run_together(job, method=method, argv=argv) == [0, 0], programs.said(1)
    told = programs.said(0)[0]
    assert "processes: 2" in told and ("compiled" in told) == (job == "compiled")
    assert programs.said(1) == ["", ""]
    assert_equal_runs(one, two)
    looks = [next(r for r in records(out) if "knn_kind" in r) for out in (one, two)]
    assert looks[0] == looks[1]  # before training


def test_the_tokenizer_is_compiled_if_the_model_is(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setenv("CXX", "not used")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled.append("model"))
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f.__name__) or f)
    argv = f"--target dvae --tokenizer {TOKENIZER} --compile on"
    trained(tiny(tmp_path, "semantic_mim", argv), "semantic_mim")
    assert compiled == ["model", "logits"]


# -- files

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


def process_state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return (handlers, [*warnings.filters], {**os.environ}, torch.get_num_threads(), os.getcwd(),
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


@pytest.mark.parametrize("name", ["common", *PROGRAMS])
def test_no_other_packages_are_imported(name):
    allowed = {"torch", "torchvision", "numpy", "tqdm", "PIL", "common", *sys.stdlib_module_names}
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    assert "torch" in found and {name.split(".")[0] for name in found} <= allowed


# -- wrong invocations; evaluate.py's are in test_evaluate.py

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the wrong invocations name, in one folder."""
    root = tmp_path_factory.mktemp("files")
    for name in ("texts", "broken"):
        (root / name).mkdir()
    for name in ("text", "texts/a.txt", "broken/a.png"):
        (root / name).write_text("neither an image nor a checkpoint")
    cfg = common.start(tiny("run", model="nano"))[0]
    torch.save({"method": "mae", "config": asdict(cfg)}, root / "mae.pt")
    return root


WRONG = [  # program, flags, what the line on stderr says
    ("mae", "--bogus 3", "--bogus"),
    ("mae", "--epoch 3", "--epoch 3"),  # no abbreviations
    ("latent_mim", "--mask-ratio 0.5", "--mask-ratio"),  # another method's
    ("mae", "--epochs 1e3", "--epochs.*1e3"),
    ("mae", "--model giant", "--model.*giant.*nano"),
    ("mae", "--epochs 0", "--epochs 0"),
    ("mae", "--base-lr nan", "--base-lr nan"),
    ("mae", "--seed 99999999999999999999", "--seed 9"),
    ("mae", "--mean 0 1e30 0", "--mean 1e"),
    ("mae", "--crop-scale 0.5", "--crop-scale"),
    ("mae", "--mean 0.5 0.5", "--mean.* 3 values"),
    ("mae", "--img-size 32 32 32", "--img-size"),
    ("mae", "--img-size 30", "--patch-size 8.*--img-size 30"),
    ("mae", "--batch-size 30 --accum 4", "--batch-size 30.*--accum 4"),
    ("mae", "--device cuda", "--device cuda"),
    ("mae", "--amp fp16", "--amp fp16"),
    ("mae", "--compile on", r"--compile on.*C\+\+"),
    ("mae", "--data ''", "--data : no such"),
    ("mae", "--data FILES/texts", "--data.*no image"),
    ("mae", "--data FILES/broken", "--data.* images.*a.png"),
    ("mae", "--data shapes:0", "--data shapes:0"),
    ("mae", "--data cifar10 --data-root here", "cifar10.*--data-root here.*service not known"),
    ("mae", "--out FILES/text", "--out .*text.*cannot be written"),
    ("mae", "--resume FILES/nowhere.pt", "nowhere.pt: no such file"),
    ("mae", "--resume FILES/mae.pt --seed 7", "mae.pt.*--seed was 0, is 7"),
    ("capi", "--resume FILES/mae.pt", "mae.pt: not a checkpoint of capi, but of mae"),
    ("mae", "--img-size 8", "--mask-ratio 0.75.*1 patches"),
    ("semantic_mim", "--mask-ratio 0", "--mask-ratio 0.0.* 16 of 16"),
    ("pilamim", "--mask-ratio 0", "--mask-ratio 0.0.* 16 of 16"),
    ("capi", "--mask-ratio 0.01", "--mask-ratio 0.01.* 16 of 16"),
    ("mae", "--decoder-heads 5", "5 heads"),
    ("latent_mim", "--visible-share 0.95", "--visible-share.*15 of 16"),
    ("semantic_mim", "--target dvae", "--target dvae needs --tokenizer"),
    ("semantic_mim", "--target dvae --tokenizer FILES/mae.pt", "--tokenizer is not"),
    ("semantic_mim", f"--target dvae --vocab 5 --tokenizer {TOKENIZER}", "--vocab 5.* has 16"),
    ("semantic_mim", "--jitter 0.4 --in-chans 1", "--in-chans 1.*--jitter"),
    ("pilamim", "--pixel-weight 0 --latent-weight 0 --cls-weight 0", "--pixel-weight.*all 0"),
    ("capi", "--registers 3", "--registers 3.*multiple of 4"),
]


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
def test_a_wrong_invocation_is_one_line(files, bare_machine, tmp_path, monkeypatch, capsys, name,
                                        flags, text):
    """Exit status 2, nothing on stderr but this line, nothing written."""
    monkeypatch.chdir(tmp_path)
    before = contents(files)
    words = shlex.split(flags.replace("FILES", str(files)))
    argv = [*tiny_flags(name), "--out", "run", *words]
    status, lines = invoke(monkeypatch, capsys, name, argv)
    assert status == 2 and len(lines) == 1, lines
    assert re.match(rf"{name}\.py: .*{text}", lines[0]), lines
    if "images" not in text:  # broken ones are found when the run has begun
        assert not list(tmp_path.iterdir())
    assert contents(files) == before


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_explains_every_flag(capsys, name):
    module = importlib.import_module(name)
    for doc in (None, module.__doc__):  # python -OO removes docstrings
        with pytest.raises(SystemExit, match="^0$"):
            parse_args(module.Config, doc, ["--help"])
    text = capsys.readouterr().out
    plain = " ".join(text.split())
    assert " ".join(module.__doc__.split())[:40] in plain
    assert re.search(r"exit status: 0 .*1 .*2 bad input, 128 \+ n", plain)
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=\S)", text)]
    for field in fields(module.Config):
        name = field.name.replace("_", "-")
        entry = next(entry for entry in entries if re.match(rf"(--)?{name}\b", entry))
        default = field.default if isinstance(field.default, tuple) else (field.default,)
        shown = " ".join(map(str, default))
        assert shown in ("", "None") or f"[{shown}]" in entry, entry
        assert len(re.findall(r"[a-z]{2,}", entry)) > 2, entry


# -- what is printed

def fenced(*languages):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", "\n".join(PAGES.values()), re.M | re.S)
    return [text for language, text in blocks if language in languages]


def training_commands():
    """Those of README.md, docs/ and the files' heads. evaluate.py's are in test_evaluate.py."""
    texts = fenced("", "sh", "bash", "console")
    texts += [(ROOT / f"{method}.py").read_text().split('"""')[1] for method in METHODS]
    found = {" ".join(command.split()) for text in texts for command in printed_commands(text)}
    return sorted(c for c in found if re.search(rf" ({'|'.join(METHODS)})\.py\b", c))


def test_differences_from_the_authors_programs_are_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["differences.py", str(write_images(tmp_path, 4))])
    script = runpy.run_path(str(ROOT / "docs" / "differences.py"))
    script["RandomTokenizer"].__init__.__defaults__ = 8,  # width
    script["main"]()
    hog, dvae, capi = re.findall(r"([\d.e+-]+)(?:%|\sof)", capsys.readouterr().out)
    assert float(hog) > 1 and float(dvae) <= 100 and abs(float(capi)) < 1e-5


def test_curves_and_tables_are_made_of_logs_and_scores(unbroken, tmp_path):
    def script(name, *argv):
        command = [sys.executable, ROOT / "docs" / name, *argv]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout
    svg = tmp_path / "curves.svg"
    script("plot.py", "--out", svg, f"MAE={unbroken('mae').out}/log.jsonl")
    assert svg.read_text().count('class="line"') == 3  # loss, k-NN, legend
    for seed, score in enumerate((40.0, 50.0)):
        report = {"scores": {"trained": {"knn kind": score}}}
        (tmp_path / f"{seed}.json").write_text(json.dumps(report))
    told = script("tables.py", *[f"MAE={tmp_path}/{seed}.json" for seed in (0, 1)])
    assert told.splitlines()[-1] == "| MAE | 45.0 +- 5.0 |"


def test_printed_commands_are_found():
    commands = "\n".join(training_commands())
    assert [] == [(start, method) for method in METHODS for start in ("python", "torchrun")
                  if not re.search(rf"^{start} .*\b{method}\.py", commands, re.M)]


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
    with torch.device("meta"):
        state = MODULES["mae"].MAE().state_dict()  # the paper's ViT-B
    torch.save({"model": {k: torch.zeros(1).expand(t.shape) for k, t in state.items()}}, path)
    names = {"images": torch.randn(2, 3, 224, 224)}
    exec(snippet, names)
    assert names["pooled"].shape == (2, 768) and names["patches"].shape == (2, 196, 768)


def benchmark(argv):
    sys.argv = ["benchmark.py", *argv, "--rounds", "1", "--steps", "1"]
    runpy.run_path(str(ROOT / "tests" / "benchmark.py"), run_name="__main__")


@pytest.mark.parametrize("flags, row", [
    ("--methods capi --settings fp32 --model nano --img-size 32 --batch-size 8", "capi"),
    ("--peers toy --settings fp32", "ours, fp32"),
    ("--images IMAGES", "common.py"), ("--cost --methods mae", "mae base/16 .* 800 +41")])
def test_benchmark_prints_numbers(programs, tmp_path, flags, row):
    argv = flags.replace("IMAGES", str(write_images(tmp_path, 4))).split()
    status, out, err = programs.run("benchmark", argv=argv)
    assert status == 0 and re.search(rf"^{row} .*\d", out, re.M), out + err
