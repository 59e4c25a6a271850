"""How fast is it here: images per second, milliseconds per step, peak memory and share of the time spent waiting for data.

  python tests/benchmark.py                          every method at the demo's size, each in the settings that apply
  python tests/benchmark.py --model small --img-size 224 --batch-size 16 --steps 15

A whole training step is timed: batch, mask, forward, backward, clipping, AdamW. The settings take turns, three rounds of
each, and the median counts: on a noisy machine only ratios within one run mean anything. Never run inside a test.
"""

import argparse
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = ["mae", "latent_mim", "semantic_mim", "pilamim", "capi"]
SETTINGS = {"fp32": ["--amp", "off", "--compile", "off"], "bf16": ["--amp", "bf16", "--compile", "off"],
            "bf16 + compile": ["--amp", "bf16", "--compile", "on"]}


def one(method, flags):
    """A short run of the real program in this process -> its log's last training record, and the peak memory."""
    sys.path.insert(0, str(ROOT))
    import torch
    from common import parse_args
    module = __import__(method)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        cfg = parse_args(module.Config, argv=[*flags, "--out", out, "--resume", "no"])
        status = module.train(cfg)
        records = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    if status:
        sys.exit(f"{method} {flags}: status {status}")
    steps = [r for r in records if "images_per_s" in r][1:]  # the first window holds warm-up and compilation
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    speed = statistics.median(r["images_per_s"] for r in steps)
    print(json.dumps({"img/s": speed, "ms/step": 1000 * cfg.batch_size / speed, "peak MiB": peak,
                      "data wait": statistics.median(r["data_wait"] for r in steps)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="timed in each round")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    windows = 4  # of steps / 3 each, the first not counted
    pictures = args.batch_size * 8
    common = ["--data", f"shapes:{pictures}", "--batch-size", str(args.batch_size), "--log-every", str(args.steps // 3),
              "--epochs", str(max(1, windows * (args.steps // 3) // 8)), "--save-every", "1000", "--eval-every", "0", *flags]
    if args.one:
        method, setting = args.one.split("/")
        return one(method, [*SETTINGS[setting], *common])
    results = {}
    for _ in range(args.rounds):  # in turn, so that a slow minute of the machine touches all alike
        for method in args.methods:
            for setting in args.settings:
                run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", f"{method}/{setting}"],
                                     capture_output=True, text=True)
                if run.returncode:
                    sys.exit(run.stderr)
                results.setdefault((method, setting), []).append(json.loads(run.stdout.splitlines()[-1]))
    columns = ["img/s", "ms/step", "peak MiB", "data wait"]
    print(f"{'method':14}{'setting':18}" + "".join(f"{c:>12}" for c in columns))
    for (method, setting), rounds in results.items():
        values = {c: statistics.median(r[c] for r in rounds) for c in columns}
        print(f"{method:14}{setting:18}{values['img/s']:12.0f}{values['ms/step']:12.1f}{values['peak MiB']:12.0f}"
              f"{values['data wait']:12.1%}")


if __name__ == "__main__":
    main()
