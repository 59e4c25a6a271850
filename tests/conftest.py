"""What the tests share: a toy size at which a run takes a fraction of a second, and helpers."""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
SHARED_FIXTURES = ROOT.parent / "shared" / "fixtures"  # more numbers, if they are there
sys.path.insert(0, str(ROOT))

import pytest
import torch
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import common

TOY = (32, 2, 2)  # width, depth, heads of an encoder that only tests have
DECODER = "--decoder-dim 16 --decoder-heads 2 --decoder-depth 1"
METHODS = {  # the one place to register a method: its name, and flags that make it small
    "mae": DECODER,
    "latent_mim": DECODER + " --proj-dim 32",
    "semantic_mim": "",
    "pilamim": DECODER,
    "capi": "--predictor-depth 1 --registers 4 --clusters 16",
}
MODULES = {name: importlib.import_module(name) for name in METHODS}
TEACHERS = [name for name, module in MODULES.items() if hasattr(module.Model, "update_teacher")]
each_method = pytest.mark.parametrize("method", METHODS)


def tiny_flags(method):
    return ("--data shapes:64 --batch-size 32 --epochs 1 --patch-size 8 --workers 0 --amp off "
            "--compile off --device cpu " + METHODS[method]).split()


def tiny(out, method="mae", flags="", **changes):
    """The tiny flags as a Config, with the toy encoder."""
    small = dict(model="toy", log_every=1, eval_every=0, save_every=100, out=str(out))
    cfg = common.parse_args(MODULES[method].Config, argv=[*tiny_flags(method), *flags.split()])
    return dataclasses.replace(cfg, **small | changes)


def trained(cfg, method="mae"):
    assert MODULES[method].train(cfg) == 0
    return common.read_checkpoint(f"{cfg.out}/last.pt")


TWENTY = dict(data="shapes:80", epochs=8, warmup_epochs=2)  # 20 steps of 32 images, 2.5 an epoch


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """(method, flags) -> a run of 20 steps, made once: Config, folder, checkpoint, output."""
    @functools.cache
    def run(method, flags=""):
        cfg = tiny(tmp_path_factory.mktemp(method), method, flags, eval_every=1, **TWENTY)
        with contextlib.redirect_stdout(io.StringIO()) as told:
            state = trained(cfg, method)
        return SimpleNamespace(cfg=cfg, out=Path(cfg.out), state=state, told=told.getvalue())
    return run


def started(method="mae", flags="", **changes):
    """(Config with its open values filled in, Run) as `train` gets them from `start`."""
    cfg = tiny("nowhere", method, flags, **changes)
    if hasattr(MODULES[method], "with_recipe"):
        cfg = MODULES[method].with_recipe(cfg)
    return common.start(cfg)


def built(method, flags="", **changes):
    """The toy model of a method, in evaluation mode."""
    cfg, _ = started(method, flags, **changes)
    torch.manual_seed(0)
    return MODULES[method].build(cfg).eval()


def records(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def steps_of(out):
    """The log's lines about training."""
    return [r for r in records(out) if "loss" in r]


def losses(out):
    return [r["loss"] for r in steps_of(out)]


def step_numbers(out):
    return [r["step"] for r in steps_of(out)]


def change_batches(method, change, set_attribute=setattr):
    """Call change(images, number) for every micro-batch of a run, number from 1. It may return
    other images."""
    real = MODULES[method].train_batches

    def changed(*args):
        for number, images in enumerate(real(*args), 1):
            other = change(images, number)
            yield images if other is None else other
    set_attribute(MODULES[method], "train_batches", changed)


def load_fixture(name):
    return torch.load(FIXTURES / f"{name}.pt", weights_only=True)


def contents(folder):
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_same_run(one, two):
    """Bit for bit: the checkpoints but for --out, the log's steps but for the clock."""
    first, second = (common.read_checkpoint(f"{out}/last.pt") for out in (one, two))
    assert first["config"] | {"out": ""} == second["config"] | {"out": ""}
    for state in (first, second):
        del state["config"], state["method"]  # assert_close takes no words
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    logs = [[r | {"images_per_s": 0, "data_wait": 0} for r in steps_of(out)] for out in (one, two)]
    assert logs[0] == logs[1] != []


def noise_image(seed, chans=3, height=40, width=36):
    """A smooth uint8 picture [C, H, W], each seed another."""
    coarse = torch.rand(1, chans, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (smooth * 255).byte()


def write_images(folder, count, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        to_pil_image(noise_image(i)).save(folder / f"{i:03}.png")
    return folder


def printed_commands(text):
    """The commands of a text that start a program here, without the words behind them."""
    found = []
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        for command in line.split("&&"):
            command = re.split(r"\s{2,}|\s#", command.strip())[0]
            if re.match(r"(python|torchrun) .*\.py\b", command):
                found.append(command)
    return found


def environment(**env):
    return os.environ | {"OMP_NUM_THREADS": "1"} | env


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the tests that take minutes")


def pytest_configure(config):
    torch.set_num_threads(1)  # at this size threads cost more than they bring
    config.addinivalue_line("markers", "long: takes minutes; runs with --long")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --long"))


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Add the toy encoder; give every test the same random numbers."""
    monkeypatch.setitem(common.MODELS, "toy", TOY)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    tqdm._instances.clear()  # a traceback of an earlier test may keep a bar
    yield
    torch.set_rng_state(state)


# -- the tests are shared among processes: nearly all of them use one core

def how_many(session):
    option = session.config.option
    if option.collectonly or option.usepdb or option.maxfail or option.capture == "no":
        return 1
    if session.testsfailed or sys.platform != "linux" or torch.cuda.device_count():
        return 1  # a fork cannot use a GPU
    return min(8, len(os.sched_getaffinity(0))) if len(session.items) >= 50 else 1


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Forks, once everything is imported. A function and all its parameters are one share. A
    process that is free takes the next."""
    count = how_many(session)
    if count == 1:
        return None  # pytest's own loop
    session.config._tmp_path_factory.getbasetemp()  # before the fork: one folder for all
    fork, config, children = multiprocessing.get_context("fork"), session.config, {}
    by_function = itertools.groupby(session.items, lambda item: item.nodeid.split("[")[0])
    shares = [list(items) for _, items in by_function]
    taken = fork.Value("i", 0)
    for _ in range(count):
        told, tell = fork.Pipe(duplex=False)
        children[told] = fork.Process(target=run_shares, args=(config, shares, taken, tell.send))
        children[told].start()
        tell.close()  # the child's alone, so that its end is the end of the pipe
    try:
        while children:
            for told in multiprocessing.connection.wait(list(children)):
                try:
                    data = told.recv()
                except EOFError:
                    child = children.pop(told)
                    child.join()
                    if child.exitcode:
                        session.shouldfail = f"a process that ran tests died: {child.exitcode}"
                        raise session.Failed(session.shouldfail) from None
                    continue
                report = config.hook.pytest_report_from_serializable(config=config, data=data)
                config.hook.pytest_runtest_logreport(report=report)
                if report.when == "teardown":
                    where = dict(nodeid=report.nodeid, location=report.location)
                    config.hook.pytest_runtest_logfinish(**where)
    finally:
        for child in children.values():
            child.kill()  # a run in it would finish its step first
    return True


def run_shares(config, shares, taken, tell):
    """What a child does. Its reports go to the parent, its captured output into its own files."""
    class Teller:
        def pytest_runtest_logreport(self, report):
            tell(config.hook.pytest_report_to_serializable(config=config, report=report))

    def items():
        while True:
            with taken.get_lock():
                taken.value += 1
                mine = taken.value - 1
            if mine >= len(shares):
                return
            yield from shares[mine]
    config.pluginmanager.unregister(name="terminalreporter")
    config.pluginmanager.register(Teller())
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()
    capture.suspend_global_capture()
    for item, following in itertools.pairwise(itertools.chain(items(), [None])):
        config.hook.pytest_runtest_protocol(item=item, nextitem=following)
