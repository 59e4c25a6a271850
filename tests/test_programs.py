"""The programs as a user starts them: flags, processes, signals, printed commands, wrong invocations."""

import dataclasses
import json
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import common
import mae
from common import MODELS, main, parse_args, read_checkpoint
from conftest import ROOT, TINY, environment, launch, losses, records, run_program, tiny, write_images

FIVE_STEPS = [*TINY, "--data", "shapes:80", "--epochs", "2", "--log-every", "1", "--eval-every", "0"]
ENDLESS = [*TINY, "--epochs", "100000", "--eval-every", "0", "--save-every", "100000"]


# -- processes ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("accum", [1, 2])
def test_two_processes_equal_one(tmp_path, accum):
    one = parse_args(mae.Config, argv=[*FIVE_STEPS, "--out", str(tmp_path / "one")])
    assert mae.train(one) == 0
    two = run_program([*FIVE_STEPS, "--accum", accum, "--out", tmp_path / "two"], nproc=2)
    assert two.returncode == 0, two.stderr
    assert "2 processes" in two.stdout and two.stdout.count("k-NN accuracy") == 1  # one process speaks
    assert len(losses(tmp_path / "two")) == 5
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    first, second = (read_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("one", "two"))
    assert first.keys() == second.keys()
    for name in first:
        if name.endswith("qkv.bias"):
            # A key's bias changes no attention: its gradient is the rounding error of a zero, which AdamW
            # scales up to a step. Queries and values count.
            for state in (first, second):
                state[name] = state[name].unflatten(0, (3, -1))[[0, 2]]
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-5, msg=lambda text: name + text)
    tests = [[{k: v for k, v in r.items() if "knn" in k} for r in records(tmp_path / name) if "rank" in r]
             for name in ("one", "two")]
    assert len(tests[0]) == 2 and tests[0][0] == tests[1][0]  # untrained: the same features


def test_two_processes_stop_together_where_the_loss_is_not_finite(tmp_path):
    done = run_program([*FIVE_STEPS, "--base-lr", "1e30", "--warmup-epochs", "0", "--out", tmp_path], nproc=2)
    assert done.returncode == 1 and done.stderr.count("not finite since step") == 1
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
         str(ROOT / "mae.py"), *TINY, "--out", str(tmp_path)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for node in (0, 1)]
    try:
        told = [agent.communicate(timeout=200)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(told)
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 2 and records(tmp_path)[0]["processes"] == 2


# -- one file and common.py -----------------------------------------------------------------------------

def test_two_files_alone_run(tmp_path):
    for name in ("mae.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    env = {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = run_program(TINY, cwd=tmp_path, program=str(tmp_path / "mae.py"), env=env)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["common.py", "mae.py", "runs"]
    left = sorted(p.name for p in (tmp_path / "runs" / "mae").iterdir())
    assert left == ["last.pt", "log.jsonl", "reconstruction.png"]
    assert "img/s" in done.stderr and "loss=" in done.stderr and "Traceback" not in done.stderr


# -- signals --------------------------------------------------------------------------------------------

def steps_logged(out):
    path = out / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
    return [r["step"] for r in whole if "loss" in r]


def start_and_interrupt(command, out, after, number):
    """Starts a run, sends it a signal once it is past a step -> exit status and what it printed."""
    run = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True)
    try:
        give_up = time.monotonic() + 120
        while not (steps := steps_logged(out)) or steps[-1] <= after:
            assert run.poll() is None and time.monotonic() < give_up, run.communicate()[0]
            time.sleep(0.05)
        run.send_signal(number)
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
    return root


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
    ("--decoder-heads 3", "heads"),
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


def wrong(monkeypatch, capsys, argv):
    """main() of the flags -> the one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["mae.py", *argv])
    with pytest.raises(SystemExit) as leaving:
        main(mae.train, mae.Config, mae.__doc__)
    captured = capsys.readouterr()
    assert leaving.value.code == 2
    assert captured.err.count("\n") == 1 and captured.err.startswith("mae.py: "), captured.err
    return captured.err


@pytest.mark.parametrize("flags, text", WRONG, ids=[flags.replace("FILES/", "") for flags, _ in WRONG])
def test_wrong_invocation(files, tmp_path, monkeypatch, capsys, flags, text):
    argv = [*TINY, "--out", str(tmp_path / "run"), *flags.replace("FILES", str(files)).split()]
    assert re.search(text, wrong(monkeypatch, capsys, argv))
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
    monkeypatch.setattr(common.torchvision.datasets, "CIFAR10", offline)
    argv = [*TINY, "--data", "cifar10", "--data-root", "here", "--out", str(tmp_path / "run")]
    line = wrong(monkeypatch, capsys, argv)
    assert "--data cifar10" in line and "--data-root here" in line and "service not known" in line
    assert not (tmp_path / "run").exists()


def test_wrong_invocation_of_the_real_program(tmp_path):
    done = run_program(["--mask-ratio", "1", "--out", tmp_path / "run"], cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("mae.py: --mask-ratio")
    assert list(tmp_path.iterdir()) == []


# -- what is printed ------------------------------------------------------------------------------------

def printed_commands(text):
    """The commands of a text that start a program here, without the words behind them."""
    found = []
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        for command in line.split("&&"):
            command = re.split(r"\s{3,}|\s#", command.strip())[0]
            if re.match(r"(python|torchrun) .*\.py\b", command):
                found.append(command)
    return found


def all_commands():
    fenced = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    docs = [(ROOT / name).read_text().split('"""')[1] for name in ("mae.py", "tests/benchmark.py")]
    return sorted({command for text in (*fenced, *docs) for command in printed_commands(text)})


def test_printed_commands_are_found():
    commands = all_commands()
    assert "python mae.py" in commands and any(c.startswith("torchrun") for c in commands)
    assert any("--epochs 800 --warmup-epochs 40" in c for c in commands)  # continuation lines and all
    text = "pip install x && python a.py --b 1     what it does\n pytest\n torchrun b.py \\\n   --c 2   why"
    assert printed_commands(text) == ["python a.py --b 1", "torchrun b.py --c 2"]


TOY_FLAGS = ("--batch-size 32 --epochs 1 --model nano --img-size 32 --workers 0 --decoder-dim 16 "
             "--decoder-depth 1 --decoder-heads 2 --device cpu --resume no").split()


@pytest.mark.parametrize("command", all_commands())
def test_printed_command_runs(command, tmp_path, monkeypatch, capsys):
    """At toy size: small flags are added at the end, where the last counts; torchrun gets two processes."""
    program, *words = shlex.split(command)
    folder = write_images(tmp_path / "images", 8)
    words = [str(folder) if word == "DIR" else word for word in words]
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).exists()
    flags = [*words[script + 1:], *TOY_FLAGS, "--out", str(tmp_path / "run")]
    if words[script].endswith("benchmark.py"):
        flags = [*words[script + 1:], "--rounds", "1", "--steps", "3", "--batch-size", "8", "--model", "nano",
                 "--img-size", "32", "--settings", "fp32"]
    elif str(folder) in words:
        flags += ["--batch-size", "4"]
    else:
        flags += ["--data", "shapes:64"]
    if program == "torchrun":
        done = run_program(flags, nproc=2, program=words[script])
        assert done.returncode == 0, done.stderr
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


def test_readme_snippets(tmp_path, monkeypatch):
    """The README's Python, with a small file in place of the authors' and random pictures."""
    readme = (ROOT / "README.md").read_text()
    encoder = mae.MAE(img_size=224, patch_size=16, dim=64, depth=1, heads=1, decoder_dim=16, decoder_depth=1)
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_base.pth")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    assert snippets
    for snippet in snippets:
        names = {"images": torch.randn(2, 3, 224, 224)}
        exec(snippet, names)
        assert torch.equal(names["pooled"], encoder.encode(names["images"])[0])


def test_readme_names_the_sizes_of_a_default_run():
    """`MAE(...)` in the README's text takes the state dict of a run with default flags."""
    calls = re.findall(r"`(MAE\(img_size=[^`]*\))`", (ROOT / "README.md").read_text())
    assert calls
    default = mae.build(dataclasses.replace(mae.Config(), patch_size=4))
    for call in calls:
        eval(call, {"MAE": mae.MAE}).load_state_dict(default.state_dict())


def test_help(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse_args(mae.Config, mae.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert leaving.value.code == 0 and max(map(len, text.splitlines())) <= 110
    assert all(f"\n{group}:\n" in text for group in ("the method", "model", "data", "training", "run"))
    options, plain = text.split("the method:")[1], re.sub(r"\s+", " ", text)
    for field in dataclasses.fields(mae.Config):
        name, default = "--" + field.name.replace("_", "-"), field.default
        assert re.search(rf"^  {name}\b", options, re.M), name
        line = re.sub(r"\s+", " ", re.search(rf"^  {name}\b.*?(?=^  --|^\S|\Z)", options, re.M | re.S)[0])
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert shown == "" and "default" in line or f"[{shown}]" in line, line
        assert len(re.findall(r"[a-z]+", line)) > 4, line  # a flag, and words that say what it does
    assert "Masked Autoencoders" in plain and "exit status" in plain
