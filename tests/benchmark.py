"""Images per second, milliseconds per step, peak memory, share of the time spent waiting for data.

  python tests/benchmark.py                          every method at the demo's size
  python tests/benchmark.py --model small --img-size 224 --batch-size 16 --steps 15
  python tests/benchmark.py --peers                  MAE beside transformers' and lightly's
  python tests/benchmark.py --images DIR             reading photographs, beside torchvision
  python tests/benchmark.py --cost                   what the papers' recipes take, by counting
  python tests/benchmark.py --recipes --methods mae/large capi/large --settings "bf16 + compile"
                                                     what they take here

docs/speed.md says what is timed. Each row is a process of its own. The rows take turns, and the
median of the turns counts. Further flags go to the method: --model small.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

import common
from conftest import METHODS, MODULES, printed_commands

SETTINGS = {
    "fp32": ["--amp", "off", "--compile", "off"],
    "bf16": ["--amp", "bf16", "--compile", "off"],
    "fp32 + compile": ["--amp", "off", "--compile", "on"],
    "bf16 + compile": ["--amp", "bf16", "--compile", "on"],
}
WARM_UP = 3  # steps before the first turn
IMAGENET = 1_281_167


# -- rows: processes that take turns

class Done(Exception):
    """No further turn is asked for."""


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def answer(out, **figures):
    print(json.dumps(figures), file=out, flush=True)


def run_method(method, flags, steps):
    """A row: the real `train`, whose stream of batches is timed. It answers when it is warm; then
    every line on stdin asks for so many steps."""
    module, out, began = MODULES[method], sys.stdout, time.perf_counter()
    cfg = common.parse_args(module.Config, argv=flags)
    common.keep_memory()
    stream = module.train_batches

    def timed(cfg, run, *rest):
        batches = stream(cfg, run, *rest)

        def some(count):
            for _ in range(count * cfg.accum):
                yield next(batches)
            wait_for(run.device)
        yield from some(WARM_UP)
        answer(out, **{"ready s": time.perf_counter() - began})
        while sys.stdin.readline():
            yield from some(1)  # memory and caches are this row's again
            start, waited = time.perf_counter(), 0.0
            for _ in range(steps * cfg.accum):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                yield batch
            wait_for(run.device)
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            if run.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2**20
            answer(out, **{"img/s": cfg.batch_size * steps / seconds,
                           "ms/step": 1000 * seconds / steps, "peak MiB": peak,
                           "data wait": waited / seconds})
        raise Done

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.suppress(Done), mock.patch.object(module, "train_batches", timed), \
            mock.patch.object(module, "Look", lambda *_: lambda step: {}):
        module.train(dataclasses.replace(cfg, out=folder, epochs=10**6, save_every=10**6))


def take_turns(rows, steps, rounds, meanwhile=lambda: None):
    """{title: (method, flags)} -> {title: figures}, medians over the rounds."""
    children, results = {}, {}

    def ask(title, line=""):
        child = children[title]
        child.stdin.write(line)
        child.stdin.flush()
        while (told := child.stdout.readline()) and not told.startswith("{"):
            pass  # a library's words
        if not told:
            sys.exit(f"{title}: failed with status {child.wait()}")
        return json.loads(told)

    with contextlib.ExitStack() as stack:
        for title, row in rows.items():
            command = [sys.executable, __file__, "--row", json.dumps([*row, steps])]
            children[title] = subprocess.Popen(command, text=True, stdin=subprocess.PIPE,
                                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            stack.callback(children[title].kill)
        meanwhile()
        ready = {title: ask(title) for title in children}
        for _ in range(rounds):
            for title in children:
                results.setdefault(title, []).append(ask(title, "turn\n"))
    for title, turns in results.items():
        for key in turns[0]:
            ready[title][key] = statistics.median(turn[key] for turn in turns)
    return ready


# -- what a recipe costs, by counting

def recipes(method):
    """The flags of the full-size commands in the docstring of a method's file."""
    text = (ROOT / f"{method}.py").read_text().split('"""')[1]  # __doc__ has no line ends in them
    found = [command.split(f"{method}.py ")[1].split() for command in printed_commands(text)
             if command.startswith("torchrun")]
    variants = {"semantic_mim": [[], ["--baseline"]], "capi": [[], ["--recompute"]]}
    return [flags + more for flags in found for more in variants.get(method, [[]])]


def cost_of(method, flags):
    """FLOPs of a step per image by torch's counter, and the bytes that autograd keeps for the
    backward pass in bf16 with fused attention. The tensors are fake: sizes without numbers."""
    warnings.filterwarnings("ignore", "Accessing the data pointer")
    module = MODULES[method]
    cfg = common.parse_args(module.Config, argv=flags)
    cfg = dataclasses.replace(cfg, patch_size=cfg.patch_size or 16)
    if hasattr(module, "with_recipe"):
        cfg = module.with_recipe(cfg)

    class Fused(torch.autograd.Function):
        """Keeps what the fused kernel keeps: q, k, v, the output and a number per query."""
        @staticmethod
        def forward(ctx, q, k, v):
            out = torch.empty_like(q)
            ctx.save_for_backward(q, k, v, out, q[..., 0].float())
            return out

        @staticmethod
        def backward(ctx, gradient):
            return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])

    kept, batch, fake = {}, 64, FakeTensorMode()
    type(fake).__deepcopy__ = lambda self, memo: self  # a copied teacher stays in this fake world
    with fake, mock.patch("torch.nn.init.trunc_normal_", lambda t, **_: t):  # it reads numbers
        model = module.build(cfg).train()
        own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        side = model.patch_size + getattr(model, "gap", 0)
        images = torch.empty(batch, cfg.in_chans, *[n * side for n in model.grid])
        extra = {}
        if getattr(cfg, "target", "") == "dvae":
            extra["tokens"] = torch.zeros(batch, model.num_patches, dtype=torch.long)

        def keep(t):
            if t.untyped_storage()._cdata not in own:
                kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t
        plain = common.attend
        for attend in (plain, Fused.apply):
            kept.clear()
            with contextlib.ExitStack() as stack:
                for part in (common, module):
                    if hasattr(part, "attend"):
                        stack.enter_context(mock.patch.object(part, "attend", attend))
                counter = stack.enter_context(FlopCounterMode(display=False))
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t))
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                model(images, **extra)[0].backward()
            if attend is plain:
                flops = counter.get_total_flops() / batch
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return {"cfg": cfg, "flops": flops, "bytes": sum(kept.values()) / batch, "trained": trained,
            "frozen": frozen}


def print_costs(methods, more):
    print("at 40 % of 989 TFLOP/s per GPU (an H100), without decoding, all-reduce, saving")
    print(f"{'recipe':34}{'GFLOP/img':>10}{'MiB/img':>9}{'state GB':>9}{'batch':>7}{'epochs':>7}"
          f"{'GPU-hours':>10}{'GB/step':>9}")
    for name in methods:
        method, _, size = name.partition("/")
        for flags in recipes(method):
            cost = cost_of(method, flags + ["--model", size] * bool(size) + more)
            cfg, flops = cost["cfg"], cost["flops"]
            parts = [method, getattr(cfg, "target", ""), f"{cfg.model}/{cfg.patch_size}"]
            parts += [flag for flag in ("baseline", "recompute") if getattr(cfg, flag, False)]
            hours = flops * cfg.epochs * IMAGENET / (0.4 * 989e12) / 3600
            # float32: weight, gradient and two averages of what is trained; the teacher's weight.
            state = (16 * cost["trained"] + 4 * cost["frozen"]) / 1e9
            print(f"{' '.join(filter(None, parts)):34}{flops / 1e9:10.1f}"
                  f"{cost['bytes'] / 2**20:9.1f}{state:9.1f}{cfg.batch_size:7}{cfg.epochs:7}"
                  f"{hours:10.0f}{8 * cost['trained'] / 1e9:9.2f}")


# -- MAE beside other implementations

VIT = dict(img_size=224, patch_size=16, depth=12, decoder_dim=512, decoder_depth=8,
           decoder_heads=16)
PEER_SIZES = {  # sizes of the model, then the batch
    "cifar": (dict(img_size=32, patch_size=4, dim=192, depth=6, heads=3, decoder_dim=96,
                   decoder_depth=2, decoder_heads=3), 256),
    "vit_small": (VIT | dict(dim=384, heads=6), 16),
    "vit_base": (VIT | dict(dim=768, heads=12), 128),
    "toy": (dict(img_size=32, patch_size=8, dim=32, depth=1, heads=1, decoder_dim=16,
                 decoder_depth=1, decoder_heads=1), 8),
}


def contender(name, s):
    """-> model, function from images to loss: MAE of the sizes s, with normalised targets."""
    if name == "ours":
        model = MODULES["mae"].MAE(**s)
        return model, lambda images: model(images)[0]
    if name == "transformers":
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
        model = ViTMAEForPreTraining(ViTMAEConfig(
            image_size=s["img_size"], patch_size=s["patch_size"], hidden_size=s["dim"],
            num_hidden_layers=s["depth"], num_attention_heads=s["heads"],
            intermediate_size=4 * s["dim"],
            decoder_hidden_size=s["decoder_dim"], decoder_num_hidden_layers=s["decoder_depth"],
            decoder_num_attention_heads=s["decoder_heads"],
            decoder_intermediate_size=4 * s["decoder_dim"], mask_ratio=0.75, norm_pix_loss=True))
        return model, lambda images: model(images).loss
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer
    vit = VisionTransformer(img_size=s["img_size"], patch_size=s["patch_size"], embed_dim=s["dim"],
                            depth=s["depth"], num_heads=s["heads"], num_classes=0)
    encoder = MaskedVisionTransformerTIMM(vit=vit)
    length = encoder.sequence_length
    decoder = MAEDecoderTIMM(
        num_patches=length - 1, patch_size=s["patch_size"], embed_dim=s["dim"],
        decoder_embed_dim=s["decoder_dim"], decoder_depth=s["decoder_depth"],
        decoder_num_heads=s["decoder_heads"], mlp_ratio=4.0, proj_drop_rate=0.0, attn_drop_rate=0.0)

    def loss_of(images):
        keep, hidden = utils.random_token_mask(size=(len(images), length), mask_ratio=0.75,
                                               device=images.device)
        x = decoder.embed(encoder.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, (len(images), length))
        tokens = utils.set_at_index(tokens, keep, x.type_as(tokens))
        pred = decoder.predict(utils.get_at_index(decoder.decode(tokens), hidden))
        target = utils.get_at_index(utils.patchify(images, s["patch_size"]), hidden - 1)
        std = (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        target = (target - target.mean(-1, keepdim=True)) / std
        return torch.nn.functional.mse_loss(pred.float(), target)
    return torch.nn.ModuleList([encoder, decoder]), loss_of


def run_contender(name, size, setting, steps):
    """A row: one MAE on images in memory. Ours has a fused AdamW, the others are as they come."""
    sizes, batch = PEER_SIZES[size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if name == "ours":
        common.keep_memory()  # as `main` does
    model, loss_of = contender(name, sizes)
    images = torch.randn(batch, 3, sizes["img_size"], sizes["img_size"], device=device)
    model.to(device).train()
    if "compile" in setting:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {"fused": True} if name == "ours" else {}
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, **options)

    def some(count):
        began = time.perf_counter()
        for _ in range(count):
            with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in setting):
                loss = loss_of(images)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait_for(device)
        return time.perf_counter() - began

    answer(sys.stdout, **{"ready s": some(WARM_UP)})
    while sys.stdin.readline():
        some(1)
        answer(sys.stdout, **{"img/s": batch * steps / some(steps)})


def print_peers(sizes, settings, rounds, steps):
    for size in sizes or ["cifar", "vit_base" if torch.cuda.is_available() else "vit_small"]:
        rows = {f"ours, {setting}": ("contender", ["ours", size, setting]) for setting in settings}
        for name, setting in itertools.product(("transformers", "lightly"), settings):
            if importlib.util.find_spec(name) and "compile" not in setting:
                rows[f"{name}, {setting}"] = "contender", [name, size, setting]
        results = take_turns(rows, steps, rounds)
        speeds = {title: figures["img/s"] for title, figures in results.items()}
        peers = {title: speed for title, speed in speeds.items() if "ours" not in title}
        print(f"{size}, batch {PEER_SIZES[size][1]}, torch {torch.__version__}, images/s")
        for title, speed in speeds.items():
            ratios = "".join(f"{speed / other:8.2f} x {peer}" for peer, other in peers.items())
            print(f"{title:26}{speed:8.1f}{ratios}", flush=True)


# -- reading photographs

def print_images(folder, rounds):
    """Images per second on one core: read, cropped, normalised."""
    torch.set_num_threads(1)
    paths, _ = common.find_images(folder, 3)
    cfg = common.TrainConfig(img_size=(224,), batch_size=32, mean=common.IMAGENET_MEAN,
                             std=common.IMAGENET_STD)
    noise = torch.rand(len(paths), 41)
    crop = T.RandomResizedCrop(224, (0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    usual = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(),
                       T.Normalize(cfg.mean, cfg.std)])

    def ours(i):
        def box_of(height, width):
            return common.crop_boxes(noise[i:i + 1], height, width, (0.2, 1.0))[0][0].int().tolist()
        crop = common.read_crop(paths[i].decode(), 3, (224, 224), box_of)
        return common.normalise(crop[None].float(), cfg)

    def decoding(i):
        return Image.open(paths[i].decode()).convert("RGB")

    def theirs(i):
        return usual(decoding(i))

    ways = {"torchvision's transforms": theirs, "common.py": ours, "decoding alone": decoding}
    taken = {title: [] for title in ways}
    for _ in range(rounds + 1):  # the first round reads the files into memory
        for title in ways:
            taken[title].append(0.0)
        for i in range(len(paths)):
            for title, way in ways.items():  # image by image: a slow second touches all alike
                began = time.perf_counter()
                way(i)
                taken[title][-1] += time.perf_counter() - began
    print(f"{len(paths)} images to 224 pixels, one core, images/s")
    for title in ways:
        seconds = statistics.median(taken[title][1:])
        usual_seconds = taken["torchvision's transforms"][1:]
        ratio = statistics.median(a / b for a, b in zip(usual_seconds, taken[title][1:]))
        print(f"{title:28}{len(paths) / seconds:8.0f}{ratio:8.2f} x")


# -- methods

def matrix_rate(device):
    """FLOP/s of bf16 products of 8192 x 8192 matrices, a thousand in a row."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for count in (10, 1000):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(count):
            a @ b
        wait_for(device)
    return 2 * 8192**3 * 1000 / (time.perf_counter() - began)


def print_methods(args, flags):
    rows, costs = {}, {}
    for name, setting, batch in itertools.product(args.methods, args.settings, args.batch_size):
        method, _, size = name.partition("/")
        own = (recipes(method)[0] if args.recipes else []) + ["--model", size] * bool(size)
        more = ["--data", f"shapes:{2 * batch}", "--batch-size", str(batch), *flags]
        rows[f"{name:18}{setting:16}{batch:6}"] = method, [*own, *SETTINGS[setting], *more]
        costs[name] = method, own + flags

    flops = {}

    def count():
        flops.update({name: cost_of(*cost)["flops"] for name, cost in costs.items()})
    results = take_turns(rows, args.steps, args.rounds, meanwhile=count)
    rate = 0.0
    if torch.cuda.is_available():
        rate = matrix_rate(torch.device("cuda"))
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: products "
              f"{rate / 1e12:.0f} TFLOP/s")
    print(f"{'method':18}{'setting':16}{'batch':>6}{'img/s':>9}{'ms/step':>9}{'peak MiB':>10}"
          f"{'ready s':>9}{'data wait':>11}{'GFLOP/img':>11}{'of products':>13}")
    for title, r in results.items():
        work = flops[title[:18].strip()]
        share = f"{work * r['img/s'] / rate:13.1%}" if rate else ""
        print(f"{title}{r['img/s']:9.0f}{r['ms/step']:9.1f}{r['peak MiB']:10.0f}{r['ready s']:9.0f}"
              f"{r['data wait']:11.1%}{work / 1e9:11.2f}{share}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD[/SIZE]")
    parser.add_argument("--recipes", action="store_true", help="at the size of the papers' recipes")
    parser.add_argument("--settings", nargs="+", default=["fp32", "bf16"], choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="timed in each round")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128])
    parser.add_argument("--peers", nargs="*", choices=PEER_SIZES, metavar="SIZE", help="race MAE")
    parser.add_argument("--images", metavar="DIR", help="time the reading of photographs")
    parser.add_argument("--cost", action="store_true", help="count what the recipes cost")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    unknown = {name.split("/")[0] for name in args.methods} - set(METHODS)
    if unknown:
        parser.error(f"no such method: {' '.join(unknown)}; there are {' '.join(METHODS)}")
    if args.row:
        method, flags, steps = json.loads(args.row)
        if method == "contender":
            run_contender(*flags, steps)
        else:
            run_method(method, flags, steps)
    elif args.cost:
        print_costs(args.methods, flags)
    elif args.peers is not None:
        print_peers(args.peers, args.settings, args.rounds, args.steps)
    elif args.images:
        print_images(args.images, args.rounds)
    else:
        print_methods(args, flags)


if __name__ == "__main__":
    main()
