"""Whole programs in forks of a process that has imported torch. They start at once."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import common
from conftest import ROOT, TOY, environment


def program(method, argv):
    """`python METHOD.py ARGV`, or evaluate.py's."""
    module = importlib.import_module(method)
    sys.argv = [f"{method}.py", *map(str, argv)]
    run = module.evaluate if method == "evaluate" else module.train
    common.main(run, module.Config, module.__doc__)


def invoke(monkeypatch, capsys, name, argv):
    """The program in this process -> exit status, its lines on stderr without progress bars."""
    monkeypatch.setattr(sys, "argv", [])  # restored after the test
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        program(name, argv)
    lines = capsys.readouterr().err.replace("\x1b[A", "").splitlines()
    return leaving.value.code, [line for line in lines if line.strip() and "%|" not in line]


def serve():
    """The server. Each line that it is sent names a function of a module, which runs in a fork."""
    common.MODELS["toy"] = TOY
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        module = importlib.import_module(order["module"])
        if pid := os.fork():
            print(pid, flush=True)
        else:
            run_job(getattr(module, order["job"]), order)


def run_job(job, order):
    signal.alarm(240)  # ends a job that hangs
    os.setsid()  # a signal to its group reaches its loader processes, and nobody else
    os.environ.update(order["env"])
    for number in (1, 2):
        os.dup2(os.open(f"{order['told']}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    status = 1
    try:
        job(**order["given"])
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)  # taking torch down would cost a second


class Programs:
    def __init__(self, folder):
        paths = [str(ROOT / "tests"), str(ROOT)]
        code = f"import sys; sys.path[:0] = {paths}; import programs; programs.serve()"
        self.server = subprocess.Popen([sys.executable, "-c", code], env=environment(), text=True,
                                       bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.told, self.running = str(folder / "told"), set()
        self.module = "programs"  # where the jobs are; `program` is in every module that imports it

    def ask(self, **order):
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, job, env={}, **given):
        """Start a function in a process of its own -> its id."""
        told = self.told + env.get("RANK", "")
        pid = self.ask(module=self.module, job=job, env=env, given=given, told=told)
        self.running.add(pid)
        return pid

    def wait(self, pid):
        """-> exit status, or minus the signal that it died of."""
        status = self.ask(wait=pid)
        self.running.remove(pid)
        return status

    def run(self, job, **given):
        """-> exit status, what it said on stdout and on stderr."""
        status = self.wait(self.start(job, **given))
        return status, *self.said()

    def said(self, rank=""):
        """What a process said on stdout and on stderr."""
        return [Path(f"{self.told}{rank}.{number}").read_text() for number in (1, 2)]

    def run_together(self, job, count=2, **given):
        """The processes that torchrun would start -> their exit statuses."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
                 "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "none"}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        pids = [self.start(job, place | rank, **given) for rank in ranks]
        return [self.wait(pid) for pid in pids]


@pytest.fixture(scope="session")
def all_programs(tmp_path_factory):
    programs = Programs(tmp_path_factory.mktemp("programs"))
    yield programs
    programs.server.kill()
    programs.server.wait()


@pytest.fixture
def programs(all_programs, request):
    """Starts functions of the test's module by their names."""
    all_programs.module = request.module.__name__
    yield all_programs
    for pid in list(all_programs.running):  # a test that failed has left them
        os.kill(pid, signal.SIGKILL)
        all_programs.wait(pid)
