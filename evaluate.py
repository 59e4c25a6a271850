"""How good is a trained encoder? Freeze it, fit small models ("probes") on its features, and
compare with the same encoder untrained and with raw pixels.

  python evaluate.py runs/mae/last.pt                           k-NN and linear, on the run's data
  python evaluate.py runs/capi/last.pt --probe knn attentive seg-knn seg-linear --picture
  python evaluate.py runs/mae/last.pt --data DIR --img-size 224      a folder with train/ and val/
  python evaluate.py runs/mae/last.pt --data DIR --masks trainannot valannot --probe seg-knn
  python evaluate.py mae_pretrain_vit_large.pth --method mae --model large      the authors' weights
  python evaluate.py runs/mae/last.pt --export encoder.safetensors           under timm's names
  torchrun --nproc_per_node 8 evaluate.py runs/mae/last.pt      processes share the features' work

  knn         The nearest and the 20 nearest training images (cosine) vote for a class, with weights
              exp(cosine / 0.07).
  linear      A Linear layer on standardised features, for each of a grid of learning rates and
              weight decays. The best on a held-out tenth of the training set is tested, once.
  attentive   As linear, on patch features that 8 learned queries pool; at most 4,096 images.
  seg-knn     As knn with k = 20, for patches. A patch's class is the most frequent one among its
              pixels. The score is the mean intersection over union (mIoU) over pixels. At most
              1,024 images and 16,384 training patches.
  seg-linear  As linear, for patches; the logits are upsampled to the pixels; mIoU.
  finetune    The whole encoder is trained, with layer-wise learning rates and drop path.

Features come from the method's `encode`, whose docstring says which encoder and which norm. Without
a labelled val/, every tenth training image is the test set, and the probes are fitted on the
others. Scores and settings are printed, and written to last.eval.json beside the checkpoint. The
papers' own protocols differ: PiLaMIM's linear probe, for instance, has BatchNorm and LARS.
"""

import contextlib
import copy
import functools
import importlib
import json
import math
import os
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import (FORMATS, MODELS, BadInput, Folder, Pixels, centre_box, check_ranges,
                    eval_batches, evenly, every_tenth, features_of, find_images, flag, knn,
                    load_data, main, one_line, pair, patch_grid, patchify, raw_pixels,
                    read_checkpoint, read_crop, save_pictures, start, train_batches, vote,
                    warmup_cosine, whole_file, writing)

PROBES = {  # probe: the features that it needs, and how many images it uses at most
    "knn": ("pooled", None), "linear": ("pooled", None), "attentive": ("patches", 4096),
    "seg-knn": ("patches", 1024), "seg-linear": ("patches", 1024), "finetune": (None, None),
}
ROWS = ("trained", "untrained", "raw")
RATES, DECAYS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3), (0.0, 0.01, 0.1)
GRID = [(lr, decay) for lr in RATES for decay in DECAYS]  # G = 18 linear heads


@dataclass(frozen=True)
class Config:
    checkpoint: str = flag("", "a run's last.pt, or the authors' weights", positional=True)
    method: str = flag("", "for the authors' weights: mae, latent_mim, ...")
    model: str = flag("", "their encoder size; default: the paper's", choices=MODELS)
    patch_size: int | None = flag(None, "their patch size; default: the paper's", 1)
    img_size: tuple[int, ...] = flag((), "side, or height and width; default: as trained. For the "
                                     "authors' weights: theirs, by default the paper's", 1, 10**5)
    probe: tuple[str, ...] = flag((), " ".join(PROBES) + "; default: knn linear", choices=PROBES)
    rows: tuple[str, ...] = flag(ROWS, "encoders to score; raw: raw pixels", choices=ROWS)
    pool: str = flag("own", "image feature. own: the method's; cls: CLS, or the mean of registers "
                     "or proxies; mean: of patches", choices=("own", "cls", "mean", "both"))
    layer: int = flag(-1, "take the output of this block, counted from 0; -1: of `encode`", -1)
    held_out: bool = flag(False, "score on every tenth training image, not on the test set")
    limit: int = flag(0, "most images per set; 0: all, but attentive 4096, seg- 1024", 0)
    epochs: int = flag(50, "epochs of linear, attentive and seg-linear", 1)
    finetune_epochs: int = flag(10, "epochs of finetune", 1)
    finetune_lr: float = flag(2e-3, "finetune: peak learning rate for a batch of 256", 0, 1e30)
    layer_decay: float = flag(0.75, "finetune: a layer's learning rate over the next one's", 0, 1)
    drop_path: float = flag(0.1, "finetune: drop path of the last block, rising from 0", 0, 0.9)
    masks: tuple[str, ...] = flag((), "folders of the masks (.png) for train/ and val/")
    ignore: int = flag(255, "label in the masks to leave out", 0, 255)
    picture: bool = flag(False, "draw 8 test images: PCA of the patches that `encode` returns, "
                         "and the method's pictures")
    export: str = flag("", "write the encoder to this .pt or .safetensors file")
    data: str = flag("", "as in training; default: the run's")
    data_root: str = flag("", "as in training; default: the run's")
    workers: int | None = flag(None, "as in training", 0)
    seed: int = flag(0, "random seed", 0)
    device: str = flag("auto", "as in training", choices=("auto", "cpu", "cuda", "mps"))
    amp: str = flag("auto", "as in training", choices=("auto", "bf16", "fp16", "off"))


# -- the checkpoint

@contextlib.contextmanager
def reading(what):
    """On a damaged file decoders and torch may raise any exception: raise BadInput instead."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{what}: cannot be used ({one_line(error)})") from error


def load_model(cfg):
    """-> the method's name, its Config, the model, and another one with untrained weights."""
    state = read_checkpoint(cfg.checkpoint)
    from_run = "method" in state and "config" in state
    if from_run and (cfg.method or cfg.model or cfg.patch_size):
        raise BadInput(f"{cfg.checkpoint} is a checkpoint of {state['method']}; --method, --model "
                       "and --patch-size are for the authors' weights")
    method = state["method"] if from_run else cfg.method
    if not str(method).isidentifier():
        raise BadInput(f"{cfg.checkpoint}: not from a run; the authors' weights need --method")
    sizes = dict(zip(("dim", "depth", "heads"), MODELS.get(cfg.model, ())))
    sizes |= {"img_size": cfg.img_size, "patch_size": cfg.patch_size}
    sizes = {name: size for name, size in sizes.items() if size}
    with reading(f"{cfg.checkpoint}, --method {method}"):
        module = importlib.import_module(method)
        torch.manual_seed(cfg.seed)
        if from_run:
            trained = module.Config(**state["config"])
            check_ranges(trained)
            model, untrained = module.build(trained), module.build(trained)
            model.load_state_dict(state["model"])
        else:
            model, untrained = module.Model.from_released(state, **sizes), module.Model(**sizes)
            img_size = tuple(n * model.patch_size for n in model.grid)
            trained = module.Config(img_size=img_size, patch_size=model.patch_size)
    return method, trained, model.eval(), untrained.eval()


def encoder_of(model, cfg):
    """Return a function images -> pooled [B, F], patches [B, N, D], following --pool and
    --layer."""
    blocks = model.get_submodule(model.encoder_name).blocks
    if cfg.layer >= len(blocks):
        raise BadInput(f"--layer {cfg.layer}: the encoder has the blocks 0 to {len(blocks) - 1}")

    def encode(images):
        outputs = []
        hook = blocks[cfg.layer].register_forward_hook(lambda m, args, out: outputs.append(out))
        own, patches = model.encode(images)
        hook.remove()
        extra = outputs[0].shape[1] - patches.shape[1]  # CLS, registers or proxies come first
        if cfg.pool in ("cls", "both") and extra == 0:
            raise BadInput(f"--pool {cfg.pool}: this encoder has no CLS, registers or proxies")
        cls = outputs[0][:, :extra].mean(1)
        if cfg.layer >= 0:
            patches = outputs[0][:, extra:]
            own = cls if model.pool == "cls" else patches.mean(1)
        elif model.pool == "cls":
            cls = own  # after the final norm
        mean = patches.mean(1)
        pools = {"own": own, "cls": cls, "mean": mean, "both": torch.cat([cls, mean], 1)}
        return pools[cfg.pool], patches
    return encode


def check_finite(features):
    if not features.isfinite().all():
        raise BadInput("the features are not finite: damaged or diverged weights")


# -- data

def labels_of(mask):
    """A PIL image -> the class of each pixel, uint8 [H, W]; of a palette image, its indices."""
    labels = np.asarray(mask)
    if labels.ndim == 3:
        if (labels != labels[..., :1]).any():
            raise ValueError("the mask is in colour; it needs one label per pixel")
        labels = labels[..., 0]
    if labels.dtype.kind == "f" or labels.min() < 0 or labels.max() > 255:
        raise ValueError("the labels of a mask must be integers from 0 to 255")
    return torch.from_numpy(labels.astype(np.uint8))


def masked_set(cfg, split, folder):
    """The largest central crops of the images in DATA/split and of their masks, in memory."""
    root = Path(cfg.data, split)
    size = pair(cfg.img_size)
    folder = Path(cfg.data, folder) if Path(cfg.data, folder).is_dir() else Path(folder)
    images, maps = [], []
    paths, _ = find_images(root, cfg.in_chans)
    for path in tqdm(paths, f"reading {root}", leave=False, disable=None):
        path = os.fsdecode(path)
        mask_path = (folder / os.path.relpath(path, root)).with_suffix(".png")
        with reading(f"--masks: {path} with {mask_path}"):
            with Image.open(mask_path, formats=FORMATS) as mask:
                labels = labels_of(mask)
            top, left, h, w = box = centre_box(*labels.shape, size, 1.0)

            def box_of(*shape):
                if shape != labels.shape:
                    raise ValueError(f"{shape} pixels, but {tuple(labels.shape)} in the mask")
                return box
            images.append(read_crop(path, cfg.in_chans, size, box_of))
            maps.append(F.interpolate(labels[None, None, top:top + h, left:left + w], size)[0, 0])
    return Pixels(torch.stack(images), {}, torch.stack(maps))


def subset(data, ids):
    labels = {name: y[ids] for name, y in data.labels.items()}
    if isinstance(data, Folder):
        return Folder(data.paths[ids.numpy()], labels)
    return Pixels(data.images[ids], labels, None if data.maps is None else data.maps[ids])


def load_sets(cfg, trained, run):
    """-> training set, test set (None without labels), and how the test set was chosen. The
    pre-training may have seen held-out images too, but not their labels."""
    if len(cfg.masks) > 2:
        raise BadInput("--masks takes one folder, or one for train/ and one for val/")
    if cfg.masks:
        train_set = masked_set(trained, "train", cfg.masks[0])
        test_set = masked_set(trained, "val", cfg.masks[-1])
    else:
        train_set, test_set = load_data(trained, run)
    if test_set is not None and not cfg.held_out:
        return train_set, test_set, "the data's own"
    held_out, others = every_tenth(train_set) if train_set.labels else ([], [])
    if len(held_out):
        text = "every tenth training image; the probes are fitted on the others"
        return subset(train_set, others), subset(train_set, held_out), text
    if cfg.held_out:
        raise BadInput("--held-out needs labels, at least ten images, and two of one class")
    return train_set, None, ""


# -- probes: each returns its scores in %, and the settings that it chose

class Heads(nn.Module):
    """A linear classifier for each setting of GRID. With `queries`, each classifier has 8 learned
    queries that attend to the patches, and each query sums its own eighth of the channels."""

    def __init__(self, dim, classes, queries):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(GRID), dim, classes))
        self.bias = nn.Parameter(torch.zeros(len(GRID), 1, classes))
        query = 0.02 * torch.randn(len(GRID), math.gcd(8, dim), dim)
        self.query = nn.Parameter(query) if queries else None

    def forward(self, x):  # [n, F], or with queries [n, N, F] -> [G, n, classes]
        if self.query is None:
            return torch.einsum("nf,gfc->gnc", x, self.weight) + self.bias
        query = self.query.flatten(0, 1) / x.shape[-1] ** 0.5  # [G * 8, F]
        weights = (query @ x.mT).softmax(-1).unflatten(1, (len(GRID), -1))  # [n, G, 8, N]
        x = x.unflatten(2, (weights.shape[2], -1))  # [n, N, 8, F / 8]
        x = torch.einsum("ngqt,ntqd->gnqd", weights, x).flatten(2)  # [G, n, F]
        return x @ self.weight + self.bias


def fit_heads(x, y, test, classes, cfg, queries=False):
    """Fit all heads to features x [n, F] or [n, N, F] with labels y [n] or shares of classes
    [n, classes]. Return the test logits [m, classes] of the head that is best on a held-out tenth
    of x, and its settings."""
    torch.manual_seed(cfg.seed)
    var, mean = torch.var_mean(x.float().flatten(0, -2), 0, correction=0)
    x, test = [(features.float() - mean) / (var + 1e-6).sqrt() for features in (x, test)]
    held_out, others = torch.randperm(len(x)).to(x.device).tensor_split([max(1, len(x) // 10)])
    if not len(others):
        raise BadInput("--limit or --data: one image is too few to fit a head and to choose it")
    batch = min(1024, len(others))
    per_epoch = len(others) // batch  # an incomplete batch is left out
    steps = max(100, cfg.epochs * per_epoch)
    heads = Heads(x.shape[-1], classes, queries).to(x.device)
    parameters = list(heads.parameters())
    averages = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    peak, decay = torch.tensor(GRID, device=x.device).T[..., None, None]  # each [G, 1, 1]
    for step in tqdm(range(steps), "fitting heads", leave=False, disable=None):
        place = step % per_epoch
        if place == 0:
            order = others[torch.randperm(len(others)).to(x.device)]
        ids = order[place * batch:(place + 1) * batch]
        target = torch.cat([y[ids]] * len(GRID))
        loss = F.cross_entropy(heads(x[ids]).flatten(0, 1), target) * len(GRID)
        grads = torch.autograd.grad(loss, parameters)
        lr = warmup_cosine(step, steps, 0, peak, first=0.0, last=0.0)
        with torch.no_grad():  # AdamW, written out: every head has its own lr and decay
            for p, g, (m, v) in zip(parameters, grads, averages):
                m.lerp_(g, 1 - 0.9)
                v.lerp_(g * g, 1 - 0.99)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.99 ** (step + 1))
                p.mul_(1 - lr * decay).sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))

    truth = y[held_out] if y.ndim == 1 else y[held_out].argmax(1)
    with torch.no_grad():
        parts = [heads(part).argmax(-1) for part in x[held_out].split(batch)]
        scores = 100 * (torch.cat(parts, 1) == truth).float().mean(1)  # [G]
        best = scores.argmax().item()
        logits = torch.cat([heads(part)[best] for part in test.split(batch)])
    return logits, {"lr": GRID[best][0], "weight_decay": GRID[best][1], "steps": steps,
                    "batch": batch, "held_out": round(scores[best].item(), 2)}


def accuracy(predicted, truth):
    return 100 * (predicted == truth).float().mean().item()


def probe_images(probe, train, test, train_set, test_set, cfg):
    """knn, linear or attentive, for every kind of label."""
    scores, chosen = {}, {}
    for name, y in train_set.labels.items():
        y = y.to(train.device)
        truth = test_set.labels[name].to(train.device)
        if probe == "knn":
            similarity, ids = knn(train, test, 20)  # the nearest first
            for k in (1, 20):
                predicted = vote(similarity[:, :k], y[ids[:, :k]])
                scores[f"{name} k={k}"] = accuracy(predicted, truth)
        else:
            classes = int(y.max()) + 1
            queries = probe == "attentive"
            logits, chosen[name] = fit_heads(train, y, test, classes, cfg, queries)
            scores[name] = accuracy(logits.argmax(1), truth)
    return scores, chosen


def patch_labels(maps, p, classes, ignore):
    """Maps [n, H, W] -> the shares of the classes in each patch [n, N, classes]. Ignored pixels are
    left out; all shares are zero if every pixel is ignored."""
    maps = maps.long().masked_fill(maps == ignore, classes)
    pixels = patchify(maps[:, None], p)  # [n, N, p * p]
    counts = torch.zeros(*pixels.shape[:2], classes + 1)
    counts = counts.scatter_add_(2, pixels, torch.ones(pixels.shape))[..., :classes]
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def mean_iou(predicted, truth, classes, ignore):
    """Maps of any shape -> mIoU over the classes that occur in either, and pixel accuracy, in %."""
    counts = truth != ignore
    pairs = truth[counts].long() * classes + predicted[counts].long()
    matrix = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
    right, union = matrix.diag(), matrix.sum(0) + matrix.sum(1) - matrix.diag()
    miou = (right / union)[union > 0].mean().item()
    return 100 * miou, 100 * (right.sum() / matrix.sum()).item()


def probe_pixels(probe, train, test, train_set, test_set, p, cfg):
    """seg-knn or seg-linear, on at most 16,384 training patches."""
    labels = torch.cat([train_set.maps.unique(), test_set.maps.unique()]).unique()
    labels = labels[labels != cfg.ignore]
    if len(labels) < 2:
        raise BadInput(f"--masks: besides --ignore {cfg.ignore} there are only the labels "
                       f"{labels.tolist()}; at least two are needed")
    classes = int(labels.max()) + 1
    grid = patch_grid(test_set.maps.shape[1:], p)
    shares = patch_labels(train_set.maps, p, classes, cfg.ignore).flatten(0, 1)
    order = torch.randperm(len(shares), generator=torch.Generator().manual_seed(cfg.seed))
    order = order[shares[order].sum(1) > 0][:16384]
    x = train.flatten(0, 1)[order].float()
    y = shares[order].to(train.device)
    queries = test.flatten(0, 1).float()
    chosen = {}
    if probe == "seg-knn":
        similarity, ids = knn(x, queries, 20)
        predicted = vote(similarity, y.argmax(1)[ids]).view(-1, *grid)
        predicted = predicted.repeat_interleave(p, 1).repeat_interleave(p, 2)
    else:
        logits, chosen = fit_heads(x, y, queries, classes, cfg)
        logits = logits.view(-1, *grid, classes).permute(0, 3, 1, 2)
        predicted = torch.cat([F.interpolate(some, scale_factor=p, mode="bilinear").argmax(1)
                               for some in logits.split(64)])
    miou, right = mean_iou(predicted.cpu(), test_set.maps, classes, cfg.ignore)
    return {"mIoU": miou, "pixels": right}, chosen


def drop_path(rate):
    """A forward hook: drop a branch of a block for some images and scale it up for the others. It
    does nothing without gradients, which is how evaluation runs."""
    def hook(module, args, out):
        if not torch.is_grad_enabled():
            return out
        kept = torch.rand(len(out), 1, 1, device=out.device) >= rate
        return out * kept / (1 - rate)
    return hook


def layer_of(name, depth):
    """The layer of an encoder's parameter: 0 before the blocks, 1 to depth in them, depth + 1
    after them."""
    first, *rest = name.split(".")
    if first == "blocks":
        return int(rest[0]) + 1
    return depth + 1 if rest and first != "patch_embed" else 0  # tokens, positions: no dot


def finetune(model, train_set, test_set, cfg, trained, run):
    """Train the encoder and a Linear layer on the first kind of label."""
    torch.manual_seed(cfg.seed)
    batch = min(128, len(train_set))
    trained = replace(trained, batch_size=batch, seed=cfg.seed, crop_scale=(0.35, 1.0))
    run = replace(run, cfg=trained)
    name, y = next(iter(train_set.labels.items()))
    model = copy.deepcopy(model).eval()  # eval() disables pre-training's drop path
    encode = encoder_of(model, cfg)
    encoder = model.get_submodule(model.encoder_name)
    with torch.no_grad():
        images, _ = next(eval_batches(trained, run, test_set, torch.arange(1)))
        head = nn.Linear(encode(images)[0].shape[1], int(y.max()) + 1).to(run.device)

    peak = cfg.finetune_lr * batch / 256
    depth = len(encoder.blocks)
    for i, block in enumerate(encoder.blocks):
        hook = drop_path(cfg.drop_path * i / max(1, depth - 1))
        block.attn.register_forward_hook(hook)
        block.mlp.register_forward_hook(hook)
    groups = [{"params": head.parameters(), "lr": peak, "weight_decay": 0.05}]
    for parameter, p in encoder.requires_grad_(True).named_parameters():
        lr = peak * cfg.layer_decay ** (depth + 1 - layer_of(parameter, depth))
        groups.append({"params": [p], "lr": lr, "weight_decay": 0.05 if p.ndim > 1 else 0.0})
    optimizer = torch.optim.AdamW(groups)
    total = max(1, cfg.finetune_epochs * len(train_set) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(
        warmup_cosine, total=total, warmup=total // 10, peak=1.0, first=0.0, last=0.0))
    stream = train_batches(trained, run, train_set, 0, total, with_ids=True)
    for images, ids in tqdm(stream, "finetune", total=total, leave=False, disable=None):
        with run.autocast():
            logits = head(encode(images)[0])
        F.cross_entropy(logits.float(), y[ids].to(run.device)).backward()
        nn.utils.clip_grad_norm_([*encoder.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    features = extract(encode, "pooled", test_set, trained, run).to(run.device)
    score = accuracy(head(features).argmax(1), test_set.labels[name].to(run.device))
    return {name: score}, {"lr": peak, "steps": total, "batch": batch}


# -- files

def draw_pictures(model, trained, run, data, folder):
    """Write PNG files of the first 8 images of `data` to `folder`."""
    images, _ = next(eval_batches(trained, run, data, torch.arange(min(8, len(data)))))
    with torch.no_grad():
        check_finite(model.encode(images)[1])
    names = save_pictures(model, images, trained, folder, prefix="eval_")
    run.say(f"wrote {' '.join(names)}")


def timm_state(model):
    """-> the encoder under the names of timm's ViT, and the call that builds a matching ViT."""
    encoder = model.get_submodule(model.encoder_name)
    p = model.patch_size
    parts = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")
    state = {name: t.cpu() for name, t in encoder.state_dict().items()
             if name.split(".")[0] in parts}
    if (not {"cls_token", "pos_embed", "blocks.0.norm1.bias"} <= state.keys()
            or state["cls_token"].shape[1] != 1):
        raise BadInput("--export: not a timm ViT, which has one CLS token, positions and LayerNorm")
    dim, in_chans, _, _ = state["patch_embed.proj.weight"].shape
    if state["pos_embed"].shape[1] == math.prod(model.grid):  # no position for CLS
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    for i in range(len(encoder.blocks)):  # without bias, or without k's: zeros
        name = f"blocks.{i}.attn."
        zero = torch.zeros(dim)
        q, v = state.pop(name + "q_bias", zero), state.pop(name + "v_bias", zero)
        state.setdefault(name + "qkv.bias", torch.cat([q, zero, v]))
    block = encoder.blocks[0]
    img_size = tuple(n * p for n in model.grid)
    layer_scale = ", init_values=0.1" if "blocks.0.ls1.gamma" in state else ""
    return state, (
        f"timm.models.vision_transformer.VisionTransformer(img_size={img_size}, patch_size={p}, "
        f"in_chans={in_chans}, embed_dim={dim}, depth={len(encoder.blocks)}, num_classes=0, "
        f"num_heads={block.attn.heads}, norm_layer=functools.partial(torch.nn.LayerNorm, "
        f"eps={block.norm1.eps}){layer_scale})")


def safetensors(state):
    """The file format: the length of the header in 8 bytes, the header in JSON, the numbers."""
    header = {}
    numbers = []
    start = 0
    for name, t in state.items():
        numbers.append(t.numpy().astype("<f4").tobytes())
        end = start + len(numbers[-1])
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8 bytes
    return b"".join([len(text).to_bytes(8, "little"), text, *numbers])


def export(model, cfg):
    path = Path(cfg.export)
    if path.is_dir() or path.exists() and path.samefile(cfg.checkpoint):
        raise BadInput(f"--export {path}: this is a folder, or the checkpoint itself")
    state, call = timm_state(model)
    with writing(f"--export {path}"), whole_file(path) as file:
        if path.suffix == ".safetensors":
            file.write(safetensors(state))
        else:
            torch.save(state, file)
    print(f"{path}: {len(state)} tensors; build the model with\n{call}")
    return 0


# -- the program

def choose_probes(cfg, test_set, run):
    """Before any work, reject probes that the data or --amp do not allow."""
    labels, maps = getattr(test_set, "labels", {}), getattr(test_set, "maps", None)
    if cfg.picture and not cfg.probe and not labels:
        run.say("--data has no labelled test images: pictures only")
        return ()
    probes = cfg.probe or ("knn", "linear")
    for probe in probes:
        if probe.startswith("seg-") and maps is None:
            raise BadInput(f"--probe {probe} needs pixel labels: --data shapes, or --masks")
        if not probe.startswith("seg-") and not labels:
            raise BadInput(f"--probe {probe} needs labels; --data has none or too few images")
    if cfg.rows == ("raw",) and set(probes) <= {"attentive", "finetune"}:
        raise BadInput("--rows raw: raw pixels have no attentive or finetune score")
    if "finetune" in probes and run.amp is torch.float16:
        raise BadInput("--amp fp16: finetune does not scale its loss; use bf16 or off")
    return probes


def extract(encode, kind, data, trained, run):
    """The features of a set: pooled, float32 [n, F], or patches, fp16 [n, N, D]; kept on rank 0.
    If another image replaced an unreadable one, data.labels gets that image's label."""
    def take(pooled, patches):
        return pooled.float() if kind == "pooled" else patches.half()
    features, labels = features_of(encode, trained, run, data, torch.arange(len(data)), take)
    check_finite(features)
    data.labels |= {name: y.cpu() for name, y in labels.items()}
    return features.cpu() if run.is_main else None


def evaluate(cfg):
    check_ranges(cfg)
    method, trained, model, untrained = load_model(cfg)
    if cfg.export:
        return export(model, cfg)
    world = os.environ.get("WORLD_SIZE", "1")  # the batch must be divisible by it
    trained, run = start(replace(
        trained, data=cfg.data or trained.data, data_root=cfg.data_root or trained.data_root,
        img_size=cfg.img_size or trained.img_size, workers=cfg.workers, device=cfg.device,
        amp=cfg.amp, batch_size=int(world) if world.isdecimal() else 1, accum=1, compile="off"))
    path = Path(cfg.checkpoint).resolve()
    path = path.with_name(f"{path.stem}.eval.json")
    train_set, test_set, which = load_sets(cfg, trained, run)
    probes = choose_probes(cfg, test_set, run)
    models = {"trained": model.to(run.device), "untrained": untrained.to(run.device)}
    alone = replace(run, rank=0, world=1, local_world=1)
    if cfg.picture and run.is_main:
        draw_pictures(model, trained, alone, test_set or train_set, path.parent)

    encoders = {row: encoder_of(models[row], cfg) for row in cfg.rows if row != "raw"}
    if "raw" in cfg.rows:
        def raw(images):
            pooled, _ = raw_pixels(images)
            return pooled, patchify(images, model.patch_size)
        encoders["raw"] = raw
    jobs = [(probe, row) for probe in probes for row in encoders
            if row != "raw" or probe not in ("attentive", "finetune")]

    @functools.cache
    def sets(most):
        return [subset(data, evenly(torch.arange(len(data)), cfg.limit or most or len(data)))
                for data in (train_set, test_set)]

    @functools.cache
    def features(row, kind, most):
        return [extract(encoders[row], kind, data, trained, run) for data in sets(most)]

    # The processes share the extraction of features. Then rank 0 fits the probes and the others
    # exit; waiting for it would need a long time-out.
    for probe, row in jobs:
        if probe != "finetune":
            features(row, *PROBES[probe])
    if run.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if not run.is_main or not jobs:
        return 0

    scores, chosen = {row: {} for row in encoders}, {row: {} for row in encoders}
    for probe, row in jobs:
        kind, most = PROBES[probe]
        if probe == "finetune":
            found, how = finetune(models[row], *sets(most), cfg, trained, alone)
        else:
            train, test = [x.to(run.device) for x in features(row, kind, most)]
            if kind == "pooled" or probe == "attentive":
                found, how = probe_images(probe, train, test, *sets(most), cfg)
            else:
                found, how = probe_pixels(probe, train, test, *sets(most), model.patch_size, cfg)
        chosen[row][probe] = how
        scores[row] |= {f"{probe} {name}": round(score, 2) for name, score in found.items()}
        line = [f"{probe} {name} {score:.1f}" for name, score in found.items()]
        run.say(f"{row:10}" + "  ".join(line))
    protocol = asdict(cfg) | {
        "method": method, "encode": " ".join((model.encode.__doc__ or "").split()),
        "data": trained.data, "img_size": trained.img_size, "train": len(train_set),
        "test": len(test_set), "test_set": which, "amp": str(run.amp), "torch": torch.__version__,
        "crop": f"centre, {test_set.margin} of the shorter side",
        "knn": "cosine, features not standardised, votes exp(cosine / 0.07)",
        "heads": f"on standardised features, AdamW, betas 0.9 0.99, lr {RATES}, decay {DECAYS}"}
    settings = "; ".join(f"{name} {v}" for name, v in protocol.items() if v not in ("", (), None))
    run.say(textwrap.fill(f"protocol: {settings}", 100, subsequent_indent="  ",
                          break_on_hyphens=False, break_long_words=False))
    report = {"protocol": protocol, "scores": scores, "chosen": chosen}
    with contextlib.suppress(Exception):  # the file may be damaged
        last = json.loads(path.read_text())
        report["before"] = [last, *last.pop("before", [])]
    with writing(path), whole_file(path) as file:
        file.write(json.dumps(report, indent=1).encode())
    run.say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    main(evaluate, Config, __doc__)
