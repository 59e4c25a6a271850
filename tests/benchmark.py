"""How fast is it here: images per second, milliseconds per step, peak memory and share of the time spent waiting for data.

  python tests/benchmark.py                          every method at the demo's size, each in the settings that apply
  python tests/benchmark.py --model small --img-size 224 --batch-size 16 --steps 15
  python tests/benchmark.py --peers                  MAE beside transformers' and lightly's, where they are installed
  python tests/benchmark.py --images DIR             reading photographs, beside the usual PIL pipeline
  python tests/benchmark.py --cost                   what the papers' recipes take, on paper: nothing is run
  python tests/benchmark.py --recipes --methods mae/large capi/large --settings "bf16 + compile" --batch-size 128
                                                     what they take here; on a GPU also the share of its matrix rate

A whole training step is timed: batch, mask, forward, backward, clipping, AdamW. The settings take turns, three rounds of
each, and the median counts: on a noisy machine only ratios within one run mean anything. No test asks for a speed.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
METHODS = ["mae", "latent_mim", "semantic_mim", "pilamim", "capi"]
SETTINGS = {"fp32": ["--amp", "off", "--compile", "off"], "bf16": ["--amp", "bf16", "--compile", "off"],
            "fp32 + compile": ["--amp", "off", "--compile", "on"], "bf16 + compile": ["--amp", "bf16", "--compile", "on"]}
WARM_UP = 3  # steps before the first turn: compiling, the first allocations


def waiter(device):
    """A function that returns when the device has done what it was asked."""
    import torch
    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)


def one(method, flags, steps, kernels=None):
    """The real program in this process, for `take_turns`. After its warm-up it prints a line of JSON and waits. Every line on
    stdin asks for so many steps, and their figures as a line of JSON; "profile" for how long the GPU computed in one."""
    began = time.perf_counter()
    import torch
    from common import parse_args
    module, told = importlib.import_module(method), sys.stdout
    cfg = parse_args(module.Config, argv=flags)

    def in_turns(cfg, run, *rest, stream=module.train_batches, began=began, **options):
        cuda, batches, wait = run.device.type == "cuda", stream(cfg, run, *rest, **options), waiter(run.device)

        def answer(**what):
            if cuda:
                torch.cuda.empty_cache()  # the memory is for the others now
            print(json.dumps(what), file=told, flush=True)

        def some(count, waited):
            for _ in range(count * cfg.accum):
                began = time.perf_counter()
                batch = next(batches)
                waited.append(time.perf_counter() - began)
                yield batch
            wait()
        yield from some(WARM_UP, [])
        answer(**{"ready s": time.perf_counter() - began, "device": run.device.type})
        while line := sys.stdin.readline():
            yield from some(1, [])  # which gets the memory back
            if "profile" in line:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watch:
                    yield from some(steps, [])
                done = [k for k in watch.key_averages() if k.device_type == torch.autograd.DeviceType.CUDA]
                if kernels:
                    Path(kernels).write_text(watch.key_averages().table(sort_by="self_device_time_total", row_limit=40,
                                                                        max_name_column_width=100))
                answer(**{"busy ms": sum(k.self_device_time_total for k in done) / 1000 / steps})
                continue
            began, waited = time.perf_counter(), []
            yield from some(steps, waited)
            seconds = time.perf_counter() - began
            peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else \
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
            answer(**{"img/s": cfg.batch_size * steps / seconds, "ms/step": 1000 * seconds / steps, "peak MiB": peak,
                      "data wait": sum(waited) / seconds})
        raise Done
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Done), \
            mock.patch.object(module, "train_batches", in_turns), mock.patch.object(module, "check_health", lambda *_: {}):
        status = module.train(dataclasses.replace(cfg, out=out, resume="no", epochs=10**6, save_every=10**6, eval_every=0))
        sys.exit(f"{method} {flags}: status {status}")


class Done(Exception):
    """Nobody asks for another turn."""


def take_turns(rows, steps, rounds, kernels=None, meanwhile=lambda: None):
    """[(title, method, flags)] -> {title: figures}. Every row is a process of its own. They warm up together, while `meanwhile`
    is called; then one at a time works and the others wait, so that a slow minute touches all alike. On a GPU the peak of one
    and the weights of all have to fit."""
    if kernels:
        Path(kernels).mkdir(parents=True, exist_ok=True)
    children, failed, results = {}, {}, {}

    def ask(title, line=None):
        child, said = children[title]
        with contextlib.suppress(BrokenPipeError):
            if line:
                child.stdin.write(line + "\n")
                child.stdin.flush()
        while (answer := child.stdout.readline()) and not answer.startswith("{"):
            pass  # a library's words
        if answer:
            return json.loads(answer)
        said.seek(0)
        words = [line for line in said.read().splitlines() if line.strip() and "img/s" not in line]  # without the bar
        failed[title] = f"status {child.wait()}" + f": {words[-1]}" * bool(words)
        del children[title]
    with contextlib.ExitStack() as stack:
        for title, method, flags in rows:
            table = kernels and str(Path(kernels, "-".join(re.findall(r"\w+", title)) + ".txt"))
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            child = subprocess.Popen([sys.executable, __file__, "--one", json.dumps([method, flags, steps, table])], text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
            stack.callback(child.wait)
            stack.callback(child.kill)  # which comes first, whatever happens here
            children[title] = child, said
        meanwhile()
        for title in [*children]:
            results[title] = [ask(title)]
        for _ in range(rounds):
            for title in [*children]:
                results[title].append(ask(title, "turn"))
        for title in [*children]:
            if results[title][0]["device"] == "cuda":
                results[title][0] |= ask(title, "profile") or {}
    for title, why in failed.items():
        print(f"{title}: not measured ({why})")
    return {title: ready | {k: statistics.median(r[k] for r in turns) for k in turns[0]}
            for title, (ready, *turns) in results.items() if title not in failed}


IMAGENET = 1_281_167


def recipes(method):
    """The full-size commands printed in the head of a method's file, and SemanticMIM's baselines -> their flags."""
    from conftest import printed_commands
    doc = (ROOT / f"{method}.py").read_text().split('"""')[1]
    found = [c.split(f"{method}.py ")[1].split() for c in printed_commands(doc) if c.startswith("torchrun")]
    variants = {"semantic_mim": [[], ["--baseline"]], "capi": [[], ["--recompute"]]}.get(method, [[]])
    return [flags + more for flags in found for more in variants]


def cost_of(method, flags, fake):
    """One recipe: FLOPs of a step per image by torch's counter; bytes of what autograd keeps for the backward pass, fused
    attention as on a GPU, bf16. The tensors are fake, they have sizes and no numbers: ViT-L takes seconds anywhere."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    import common
    module = importlib.import_module(method)
    cfg = common.parse_args(module.Config, argv=flags)
    cfg = dataclasses.replace(cfg, patch_size=cfg.patch_size or common.usual_patch(cfg.img_size))
    cfg = module.with_recipe(cfg) if hasattr(module, "with_recipe") else cfg

    class Fused(torch.autograd.Function):  # keeps what the fused kernel keeps: q, k, v, the output and a number per query
        @staticmethod
        def forward(ctx, q, k, v):
            out = torch.empty_like(q)
            ctx.save_for_backward(q, k, v, out, q[..., 0].float())
            return out

        @staticmethod
        def backward(ctx, gradient):
            return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])

    plain, kept, batch = common.attend, {}, 64
    result = {"cfg": cfg}
    type(fake).__deepcopy__ = lambda self, memo: self  # a copied teacher stays in the same fake world
    with fake, mock.patch("torch.nn.init.trunc_normal_", lambda t, **_: t), \
            mock.patch.object(common, "check_counts", lambda *_: None):  # these look at numbers
        model = module.build(cfg).train()
        own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        images = torch.empty(batch, cfg.in_chans, *[n * (model.patch_size + getattr(model, "gap", 0)) for n in model.grid])
        tokens = torch.zeros(batch, model.num_patches, dtype=torch.long)
        extra = {"tokens": tokens} if getattr(cfg, "target", "") == "dvae" else {}

        def keep(t):
            if t.untyped_storage()._cdata not in own:
                kept[t.untyped_storage()._cdata] = t
            return t
        for attend in (plain, Fused.apply):
            kept.clear()
            with contextlib.ExitStack() as stack:
                for part in (common, module):
                    if hasattr(part, "attend"):
                        stack.enter_context(mock.patch.object(part, "attend", attend))
                counter = stack.enter_context(FlopCounterMode(display=False))
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t))
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                loss, _ = model(images, **extra)
                loss.backward()
            if attend is plain:
                result["flops"] = counter.get_total_flops() / batch
        result["bytes"] = sum(t.untyped_storage().nbytes() for t in kept.values()) / batch
    count = lambda wanted: sum(p.numel() for p in model.parameters() if p.requires_grad == wanted)
    return result | {"trained": count(True), "frozen": count(False)}


def costs(rows, recompute=True):
    """(method, flags) -> their costs, one after the other; without `recompute` CAPI's logits that come in chunks count once."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    warnings.filterwarnings("ignore", "Accessing the data pointer")
    fake, capi = FakeTensorMode(), importlib.import_module("capi").CAPI
    for method, flags in rows:
        with mock.patch.object(capi, "CHUNK", capi.CHUNK if recompute else 2**62):
            yield cost_of(method, flags, fake)


def print_costs(methods, card, utilisation):
    """Every recipe printed in the files' heads."""
    first = None
    sized = [(name.split("/")[0], [f"--model={size}" for size in name.split("/")[1:]]) for name in methods]
    rows = [(method, flags + size) for method, size in sized for flags in recipes(method)]
    print(f"At {utilisation:.0%} of {card:g} TFLOP/s per GPU; scaling is taken as perfect, GB/step has to hide behind a step")
    print(f"{'recipe':36}{'GFLOP/img':>10}{'x 1st':>7}{'MiB/img':>9}{'state GB':>9}{'batch':>7}{'epochs':>7}{'GPU-hours':>10}"
          f"{'h on 8':>8}{'h on 64':>8}{'GB/step':>9}")
    for (method, _), r in zip(rows, costs(rows)):
        cfg, first = r["cfg"], first or r["flops"]
        on = [name for name in ("baseline", "recompute") if getattr(cfg, name, False)]
        what = " ".join(filter(None, [method, getattr(cfg, "target", ""), *on, f"{cfg.model}/{cfg.patch_size}"]))
        hours = r["flops"] * cfg.epochs * IMAGENET / (utilisation * card * 1e12) / 3600
        state = (16 * r["trained"] + 4 * r["frozen"]) / 1e9  # weight, gradient, two averages in float32; the teacher's weight
        print(f"{what:36}{r['flops'] / 1e9:10.1f}{r['flops'] / first:7.2f}{r['bytes'] / 2**20:9.1f}{state:9.1f}"
              f"{cfg.batch_size:7}{cfg.epochs:7}{hours:10.0f}{hours / 8:8.1f}{hours / 64:8.1f}{2 * 4 * r['trained'] / 1e9:9.2f}")


PEER_SIZES = {  # SIZE_NAMES; batch
    "cifar": ((32, 4, 192, 6, 3, 96, 2, 3), 256), "vit_small": ((224, 16, 384, 12, 6, 512, 8, 16), 16),
    "vit_base": ((224, 16, 768, 12, 12, 512, 8, 16), 128), "toy": ((32, 8, 32, 1, 1, 16, 1, 1), 8),
}
SIZE_NAMES = "img_size patch_size dim depth heads decoder_dim decoder_depth decoder_heads".split()


def contender(name, s):
    """-> model, function from images to loss: MAE of the sizes `s`, with 75 % masked and standardised targets."""
    import torch
    import torch.nn.functional as F
    if name == "ours":
        import common
        from mae import MAE
        common.keep_memory()  # as every run of ours does
        model = MAE(**s)
        return model, lambda images: model(images)[0]
    if name == "transformers":
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
        theirs = ViTMAEForPreTraining(ViTMAEConfig(
            image_size=s["img_size"], patch_size=s["patch_size"], hidden_size=s["dim"], num_hidden_layers=s["depth"],
            num_attention_heads=s["heads"], intermediate_size=4 * s["dim"], decoder_hidden_size=s["decoder_dim"],
            decoder_num_hidden_layers=s["decoder_depth"], decoder_num_attention_heads=s["decoder_heads"],
            decoder_intermediate_size=4 * s["decoder_dim"], mask_ratio=0.75, norm_pix_loss=True))
        return theirs, lambda images: theirs(images).loss
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer
    vit = VisionTransformer(img_size=s["img_size"], patch_size=s["patch_size"], embed_dim=s["dim"], depth=s["depth"],
                            num_heads=s["heads"], num_classes=0)
    encoder = MaskedVisionTransformerTIMM(vit=vit)
    length = encoder.sequence_length
    decoder = MAEDecoderTIMM(num_patches=length - 1, patch_size=s["patch_size"], embed_dim=s["dim"],
                             decoder_embed_dim=s["decoder_dim"], decoder_depth=s["decoder_depth"],
                             decoder_num_heads=s["decoder_heads"], mlp_ratio=4.0, proj_drop_rate=0.0, attn_drop_rate=0.0)

    def loss_of(images):
        keep, hidden = utils.random_token_mask(size=(len(images), length), mask_ratio=0.75, device=images.device)
        x = decoder.embed(encoder.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, (len(images), length))
        tokens = utils.set_at_index(tokens, keep, x.type_as(tokens))
        pred = decoder.predict(utils.get_at_index(decoder.decode(tokens), hidden))
        target = utils.get_at_index(utils.patchify(images, s["patch_size"]), hidden - 1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        return F.mse_loss(pred.float(), target)
    return torch.nn.ModuleList([encoder, decoder]), loss_of


def race(name, size, setting, steps):
    """One MAE in this process, for `take_turns`: mask, forward, backward, AdamW, on images that are already there."""
    import torch
    sizes, batch = PEER_SIZES[size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait = waiter(device)
    warnings.filterwarnings("ignore", ".*MAEDecoderTIMM")
    torch.manual_seed(0)
    images = torch.randn(batch, 3, sizes[0], sizes[0], device=device)
    model, loss_of = contender(name, dict(zip(SIZE_NAMES, sizes)))
    model.to(device).train()
    if "compile" in setting:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, **({"fused": True} if name == "ours" else {}))

    def some(count):
        wait()
        began = time.perf_counter()
        for _ in range(count):
            with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in setting):
                loss = loss_of(images)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait()
        return time.perf_counter() - began

    def answer(**what):
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the memory is for the others now
        print(json.dumps(what), flush=True)
    answer(**{"ready s": some(WARM_UP), "device": "cpu"})  # no GPU's profile is wanted
    while sys.stdin.readline():
        some(1)  # which gets the memory back
        answer(**{"img/s": batch * steps / some(steps)})


def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product on random numbers; on a GPU 1000 in a row: clocks settle at what power and heat allow."""
    import torch
    (size, tries), wait = (8192, 1000) if device.type == "cuda" else (1024, 50), waiter(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for count in (10, tries):
        wait()
        began = time.perf_counter()
        for _ in range(count):
            a @ b
        wait()
    return 2 * size**3 * tries / (time.perf_counter() - began)


def print_peers(which, settings, rounds, steps):
    """Images per second of the same MAE, each in a process of its own: ours in all settings, the peers as they come."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    for size in which or (["cifar", "vit_base"] if device.type == "cuda" else ["cifar", "vit_small"]):
        rows = [(f"{name}, {setting}", "race", [name, size, setting]) for name in ("ours", "transformers", "lightly")
                for setting in settings if name == "ours" or "compile" not in setting]
        speeds = {title: r["img/s"] for title, r in take_turns(rows, steps, rounds).items()}
        peers = {title: rate for title, rate in speeds.items() if "ours" not in title}
        sizes, batch = PEER_SIZES[size]
        print(f"{size}, batch {batch}, torch {torch.__version__}, {where}")
        print(f"{'':26}{'img/s':>8}" + "".join(f"{'x ' + title:>22}" for title in peers))
        for title, rate in speeds.items():
            print(f"{title:26}{rate:8.1f}" + "".join(f"{rate / other:22.2f}" for other in peers.values()), flush=True)
        _, loss_of = contender("ours", dict(zip(SIZE_NAMES, sizes)))
        with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:  # counts plain attention
            loss_of(torch.randn(2, 3, sizes[0], sizes[0])).backward()
        flops = counter.get_total_flops() / 2
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            if name in settings:
                rate = matrix_rate(device, dtype)
                print(f"ours is {flops / 1e9:.3f} GFLOP an image: {rate / flops:.0f} img/s at the {rate / 1e9:.0f} GFLOP/s of "
                      f"large {name} products")


def print_images(folder, rounds):
    """Images per second on one core, decoded, cropped, normalised: ours beside torchvision's usual transforms of PIL images."""
    import torch
    from torchvision import transforms as T
    import common
    torch.set_num_threads(1)
    paths = common.find_images(Path(folder))
    cfg = types.SimpleNamespace(mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD, batch_size=32, seed=0)
    crops = common.Crops(common.Folder(paths, [-1] * len(paths), 3), (224, 224), (0.2, 1.0), cfg)
    usual = T.Compose([T.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC),
                       T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(cfg.mean, cfg.std)])

    def ours(some):
        return common.normalise(crops.__getitems__((some, (0, slice(len(some)))))[0].float(), cfg)

    def theirs(some):
        return torch.stack([usual(common.Image.open(paths[i]).convert("RGB")) for i in some])

    def decoding(some):
        for i in some:
            common.Image.open(paths[i]).convert("RGB")
    taken = {way: [] for way in (theirs, ours, decoding)}
    for _ in range(rounds + 1):  # the first reads the files into memory
        for way in taken:
            taken[way].append(0.0)
        for at in range(0, len(paths), 32):
            for way in taken:  # batch by batch, so that a slow second touches all alike
                began = time.perf_counter()
                way(range(at, min(at + 32, len(paths))))
                taken[way][-1] += time.perf_counter() - began
    print(f"{len(paths)} images of {folder} to 224 pixels, one core, images/s")
    for way, what in ((theirs, "torchvision's usual pipeline on PIL"), (ours, "common.py"), (decoding, "decoding alone")):
        ratio = statistics.median(usual_s / s for usual_s, s in zip(taken[theirs][1:], taken[way][1:]))
        print(f"{what:38}{len(paths) / statistics.median(taken[way][1:]):8.0f}{ratio:8.2f} x")


def print_methods(args, flags):
    """The methods beside each other, at the demo's size or as the papers' recipes, with the user's `flags` on top."""
    import torch
    import common
    models, rows = [], []
    for name in dict.fromkeys(args.methods):
        method, _, size = name.partition("/")
        own = [*(recipes(method)[0] if args.recipes else []), *["--model", size] * bool(size)]
        common.parse_args(importlib.import_module(method).Config, argv=own + flags)  # a typo is found here, not by every child
        models.append((name, method, own))
    for (name, method, own), setting, batch in itertools.product(models, *map(dict.fromkeys, (args.settings, args.batch_size))):
        pictures = (2 if args.recipes else 8) * batch
        rows.append((f"{name:22}{setting:16}{batch:6}", method,
                     [*own, *SETTINGS[setting], "--data", f"shapes:{pictures}", "--batch-size", str(batch), *flags]))
    flops, counted = {}, costs([(method, own + flags) for _, method, own in models], recompute=False)
    results = take_turns(rows, args.steps, args.rounds, args.kernels, lambda: flops.update(
        {f"{name:22}": cost["flops"] for (name, *_), cost in zip(models, counted)}))
    cuda = any(r["device"] == "cuda" for r in results.values())
    rate = matrix_rate(torch.device("cuda"), torch.bfloat16) if cuda else math.nan
    if cuda:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, a bf16 matrix product {rate / 1e12:.0f} TFLOP/s")
    print(f"{'method':22}{'setting':16}{'batch':>6}{'img/s':>10}{'ms/step':>9}{'peak MiB':>10}{'ready s':>9}{'data wait':>11}"
          f"{'step, x first':>15}{'FLOPs, x first':>15}" + f"{'TFLOP/s':>9}{'of rate':>9}{'busy':>7}" * cuda)
    for title, r in results.items():
        name, setting = title[:22], title[22:]
        speed, first, work = r["img/s"], next(iter(flops)), flops[name]
        of_first = results[first + setting]["img/s"] / speed if first + setting in results else math.nan
        print(f"{title}{speed:10.0f}{r['ms/step']:9.1f}{r['peak MiB']:10.0f}{r['ready s']:9.0f}{r['data wait']:11.1%}"
              f"{of_first:15.2f}{work / flops[first]:15.2f}" + (
              f"{work * speed / 1e12:9.0f}{work * speed / rate if 'bf16' in setting else math.nan:9.1%}"
              f"{r['busy ms'] / r['ms/step']:7.0%}" if cuda else ""))


def count(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def main():
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD[/SIZE]", help="optionally with "
                        "the encoder's size: mae/large")
    parser.add_argument("--recipes", action="store_true", help="at the size of the papers' recipes, not of the demo")
    parser.add_argument("--settings", nargs="+", default=["fp32", "bf16", "bf16 + compile"], choices=list(SETTINGS))
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--steps", type=count, default=60, help="timed in each round")
    parser.add_argument("--kernels", metavar="DIR", help="on a GPU: a file per row, what it computed and for how long")
    parser.add_argument("--batch-size", type=count, nargs="+", default=[128])
    parser.add_argument("--peers", nargs="*", choices=list(PEER_SIZES), metavar="SIZE",
                        help="race MAE against transformers' and lightly's, and leave; sizes: " + " ".join(PEER_SIZES))
    parser.add_argument("--images", metavar="DIR", help="time reading and cropping the images of a folder, and leave")
    parser.add_argument("--cost", action="store_true", help="print what the papers' recipes cost, and leave")
    parser.add_argument("--card", type=float, default=989, help="TFLOP/s of a GPU in bf16, for --cost; 989 is an H100's")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of it that is reached, for --cost")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if unknown := {name.split("/")[0] for name in args.methods} - {*METHODS}:
        parser.error(f"no such method: {' '.join(unknown)}; there are {' '.join(METHODS)}")
    if "--model" in flags and "/" in "".join(args.methods):
        parser.error("--methods METHOD/SIZE and --model say two things")
    if args.cost:
        return print_costs(args.methods, args.card, args.utilisation)
    if args.peers is not None:
        return print_peers(args.peers, args.settings, args.rounds, args.steps)
    if args.images:
        return print_images(args.images, args.rounds)
    if args.one:
        method, flags, steps, table = json.loads(args.one)
        race(*flags, steps) if method == "race" else one(method, flags, steps, table)
    else:
        from common import BadInput
        try:
            print_methods(args, flags)
        except BadInput as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
