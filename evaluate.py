"""What is a checkpoint worth? The encoder is frozen and probed, as the papers do it, beside the same encoder untrained.

  python evaluate.py runs/mae/last.pt                                       k-NN and linear probe, on the data of the run
  python evaluate.py runs/capi/last.pt --probe knn linear attentive seg-knn seg-linear --picture
  python evaluate.py runs/mae/last.pt --data DIR --img-size 224             on a folder with train/ and val/
  python evaluate.py mae_pretrain_vit_base.pth --method mae --data DIR      a file that the authors released
  python evaluate.py runs/mae/last.pt --data DIR --masks trainannot valannot --ignore 11 --probe seg-knn     CamVid's layout
  python evaluate.py runs/mae/last.pt --export encoder.pt                   the encoder alone, under timm's names
  torchrun --nproc_per_node 8 evaluate.py runs/mae/last.pt                  features are extracted by all processes

  knn         by cosine, the 1 and the 20 nearest with votes exp(cosine / 0.07), exact
  linear      one Linear on standardised features (a BatchNorm without parameters); a grid of rates and decays is trained
              at once, the best on a held-out tenth of the training set is scored on the test set, once
  attentive   the same on what a learned query with 8 heads gathers from the patch tokens
  seg-knn     patch features vote for the most frequent label of a patch's pixels; mIoU over the pixels
  seg-linear  one Linear on patch features, its logits enlarged to the pixels; mIoU
  finetune    the whole encoder is trained on the labels: rates fall from layer to layer, drop path, no mixup

Features are what the method's `encode` gives (its docstring says of which encoder and after which norm), unless --pool or
--layer say otherwise. Everything that was chosen stands in the JSON file that is written beside the checkpoint.
"""

import contextlib
import copy
import dataclasses
import importlib
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import (READ_ERRORS, BadInput, DropPath, Order, Pixels, centre_box, check_ranges, cut, denormalise, draw,
                    eval_batches, evenly, features_of, fetch, find_images, flag, knn_predict, load_data, main, normalise, pair,
                    patch_grid, patchify, pca_colours, random_mask, raw_pixels, read_checkpoint, read_image, resize,
                    save_picture, size_of, split_tenth, start, train_batches, warmup_cosine, writing)

METHODS = {  # method: (class, where the blocks of its encoder are)
    "mae": ("MAE", "blocks"), "latent_mim": ("LatentMIM", "encoder.blocks"), "semantic_mim": ("SemanticMIM", "blocks"),
    "pilamim": ("PiLaMIM", "encoder.blocks"), "capi": ("CAPI", "teacher.blocks"),
}
PROBES = ("knn", "linear", "attentive", "seg-knn", "seg-linear", "finetune")
ROWS = ("trained", "untrained", "raw")
MASKED = {"voc": ("VOCSegmentation", {"image_set": "train"}, {"image_set": "val"}, {}),  # torchvision's sets with masks
          "pet_masks": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}, {"target_types": "segmentation"})}


@dataclasses.dataclass(frozen=True)
class Config:
    checkpoint: str = flag("", "a run's last.pt, or a file that the authors released (then with --method)", positional=True)
    method: str = flag("", "whose released file it is", ("", *METHODS))
    probe: tuple[str, ...] = flag(("knn", "linear"), "any of " + " ".join(PROBES), choices=PROBES)
    rows: tuple[str, ...] = flag(ROWS, "what to score: any of " + " ".join(ROWS) + " (pixels)", choices=ROWS)
    pool: str = flag("own", "what stands for an image: the method's own choice, CLS (registers, proxies), the mean of the "
                     "patches, or both", ("own", "cls", "mean", "both"))
    layer: int = flag(-1, "which block's output, before any norm, from 0; -1: what the method's encode gives", least=-1)
    held_out: bool = flag(False, "score on every tenth training image in place of the test set, to "
                          "choose settings by; always so for a folder without a labelled val/")
    limit: int = flag(0, "at most so many images of either set; 0: all, for attentive 4096, for seg- 1024", least=0)
    epochs: int = flag(50, "passes of the linear and attentive probes", least=1)
    finetune_epochs: int = flag(10, "passes of --probe finetune", least=1)
    finetune_lr: float = flag(2e-3, "rate of its head, per 256 images", least=0)
    layer_decay: float = flag(0.75, "its rate falls by this factor from layer to layer downwards", least=0, most=1)
    drop_path: float = flag(0.1, "its share of dropped branches in the last layer, rising from 0", least=0, most=0.9)
    masks: tuple[str, ...] = flag((), "folders, in --data or not, of the masks of its train/ and val/ images (same names, .png)")
    ignore: int = flag(255, "label in the masks that does not count")
    picture: bool = flag(False, "PCA of patches, t-SNE, and what the method can show, beside the checkpoint")
    images: tuple[str, ...] = flag((), "files for the pictures; else the first eight of the test set")
    export: str = flag("", "file to write the encoder to, under timm's names")
    data: str = ""
    data_root: str = ""
    img_size: tuple[int, ...] = ()
    workers: int = -1
    seed: int = 0
    device: str = "auto"
    amp: str = "auto"


# ---------------------------------------------------------------------------------------------------------------
# The checkpoint
# ---------------------------------------------------------------------------------------------------------------

def load_model(path, method=""):
    """-> method, its module's Config as it was trained (or the default), model, and one of the same kind untrained."""
    state = read_checkpoint(path)
    ours = "method" in state and all(isinstance(state.get(name), dict) for name in ("config", "model"))
    if ours and method and method != state["method"]:
        raise BadInput(f"{path}: a checkpoint of {state['method']}, not of {method}")
    method = state["method"] if ours else method
    if method not in METHODS:
        raise BadInput(f"{path}: not a checkpoint of this repository; if the authors released it, say --method "
                       f"({' '.join(METHODS)})")
    module = importlib.import_module(method)
    if ours:
        try:
            config = module.Config(**state["config"])
            vocab = {"vocab": len(state["model"]["head.weight"])} if getattr(config, "target", "") == "dvae" else {}
            torch.manual_seed(config.seed)
            model, untrained = module.build(config, **vocab), module.build(config, **vocab)
            model.load_state_dict(state["model"])
        except (RuntimeError, TypeError, KeyError) as error:
            raise BadInput(f"{path}: weights and config do not fit ({' '.join(str(error).split())[:200]})") from error
    else:
        torch.manual_seed(0)
        model = getattr(module, METHODS[method][0]).from_released(state)
        untrained = type(model)(**model.sizes)
        side = model.grid[0] * model.patch_size, model.grid[1] * model.patch_size
        config = module.Config(img_size=side, patch_size=model.patch_size, in_chans=model.sizes["in_chans"])
        if hasattr(config, "target"):
            config = module.with_recipe(config)
    return method, config, model.eval(), untrained.eval()


def encoder_of(model, method, pool, layer):
    """images -> pooled [B, F], patches [B, N, D], of the chosen layer and pooling."""
    blocks = model.get_submodule(METHODS[method][1])
    if layer >= len(blocks):
        raise BadInput(f"--layer {layer}: the encoder has {len(blocks)} blocks, 0 to {len(blocks) - 1}")

    def encode(images):
        kept = []
        hook = blocks[layer].register_forward_hook(lambda module, inputs, out: kept.append(out))
        try:
            pooled, patches = model.encode(images)
        finally:
            hook.remove()
        if pool in ("cls", "both") and kept[0].shape[1] == patches.shape[1]:
            raise BadInput(f"--pool {pool}: this encoder has neither CLS nor registers")
        front, tokens = kept[0][:, :-patches.shape[1]], kept[0][:, -patches.shape[1]:]  # CLS, registers or proxies; patches
        patches = patches if layer < 0 else tokens
        own_cls = layer < 0 and method in ("mae", "pilamim")  # their pooled feature is CLS after the final norm
        cls, mean = pooled if own_cls else front.mean(1), patches.mean(1)
        own = pooled if layer < 0 else cls if method in ("mae", "pilamim") else mean
        return {"own": own, "cls": cls, "mean": mean, "both": torch.cat([cls, mean], 1)}[pool], patches
    return encode


# ---------------------------------------------------------------------------------------------------------------
# Data with a label per pixel
# ---------------------------------------------------------------------------------------------------------------

def labels_of(mask):
    """PIL's picture of a mask -> the number of each pixel's class, uint8 [h, w]."""
    labels = np.asarray(mask)  # of a palette its indices
    if labels.ndim == 3:
        if labels.shape[2] > 2 and (labels[..., :3] != labels[..., :1]).any():
            raise ValueError("a mask in colours; one number per pixel is needed")
        labels = labels[..., 0]
    if not 0 <= labels.min() <= labels.max() <= 255:
        raise ValueError(f"a mask with labels from {labels.min()} to {labels.max()}; they are to be 0 to 255")
    return torch.from_numpy(labels.astype(np.uint8))


def with_masks(rows, count, cfg, what):
    """(picture, mask [h, w]) pairs -> Pixels at the size of the model: bicubic images, nearest masks."""
    images, maps, size = [], [], pair(cfg.img_size)
    for image, mask in tqdm(rows, f"reading {what}", total=count, leave=False, disable=None):
        box = centre_box(*size_of(image), size, 1.0)
        images.append(resize(cut(image, cfg.in_chans, box), size))
        maps.append(F.interpolate(cut(mask[None], 1, box)[None], size, mode="nearest")[0, 0])
    return Pixels(torch.stack(images), {}, torch.stack(maps))


def masked_sets(cfg, masks, run):
    """Training and test set with masks: one of torchvision's, or folders."""
    if cfg.data in MASKED:
        name, train, test, options = MASKED[cfg.data]
        sets = []
        for split in (train, test):
            data = fetch(name, split | options, cfg, run)
            rows = ((image, labels_of(mask)) for image, mask in data)
            try:
                sets.append(with_masks(rows, len(data), cfg, cfg.data))
            except ValueError as error:
                raise BadInput(f"--data {cfg.data}: {error}") from error
        return sets
    base = Path(cfg.data)
    if not base.is_dir():
        raise BadInput(f"--data {cfg.data}: no such folder")
    sets = []
    for split, folder in zip(("train", "val"), masks if len(masks) == 2 else masks * 2):
        inside = base / split
        folder = base / folder if (base / folder).is_dir() else Path(folder)
        paths = [p for p in find_images(inside, cfg.in_chans) if folder not in p.parents]
        lost = [p for p in paths if not (folder / p.relative_to(inside)).with_suffix(".png").exists()]
        if lost or not paths:
            raise BadInput(f"--masks {folder}: " + (f"no mask for {len(lost)} of {len(paths)} images, the first {lost[0].name}"
                           if lost else f"{inside} has no images"))

        def rows():
            for path in paths:
                try:
                    mask = Image.open((folder / path.relative_to(inside)).with_suffix(".png"))
                    image, labels = read_image(str(path), cfg.in_chans), labels_of(mask)
                    if size_of(image) != tuple(labels.shape):
                        raise ValueError("{} x {} pixels and {} x {} of the mask".format(*size_of(image), *labels.shape))
                    yield image, labels
                except READ_ERRORS as error:
                    raise BadInput(f"{path} or its mask cannot be used ({error})") from error
        sets.append(with_masks(rows(), len(paths), cfg, inside))
    return sets


# ---------------------------------------------------------------------------------------------------------------
# Heads: a grid of them at once
# ---------------------------------------------------------------------------------------------------------------

# AdamW, SGD and LARS, each with a grid of its own, came within 2 points of each other once the rates were high enough (2026-11,
# kind and distance of shapes, MAE, CAPI and SemanticMIM; no command here repeats it). So AdamW, and rates up to 0.3.
RATES, DECAYS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3), (0.0, 0.01, 0.1)


class Heads(nn.Module):
    """G linear classifiers side by side; with `queries` each first gathers the tokens: 8 learned queries look at
    whole tokens, and each gathers its eighth of the channels."""

    def __init__(self, count, dim, classes, queries):
        super().__init__()
        self.split = math.gcd(8, dim)
        self.weight, self.bias = nn.Parameter(torch.zeros(count, dim, classes)), nn.Parameter(torch.zeros(count, 1, classes))
        self.query = nn.Parameter(0.02 * torch.randn(count, self.split, dim)) if queries else None

    def forward(self, x):  # [n, F], or tokens [n, N, F] -> [G, n, classes]
        if self.query is None:  # all heads in one product
            return (x @ self.weight.transpose(0, 1).flatten(1)).unflatten(1, (len(self.weight), -1)).transpose(0, 1) + self.bias
        queries = self.query.transpose(0, 1).flatten(0, 1) / x.shape[-1] ** 0.5  # [8 G, F]
        look = (queries @ x.transpose(1, 2)).softmax(-1).unflatten(1, (self.split, -1))  # [n, 8, G, N]
        x = look @ x.unflatten(-1, (self.split, -1)).transpose(1, 2)  # [n, 8, G, F / 8]
        return x.permute(2, 0, 1, 3).flatten(2) @ self.weight + self.bias


def fit_heads(x, y, classes, cfg, queries=False, batch=1024):
    """Training features [n, F] or [n, N, F], labels [n] or shares [n, classes] -> (function from features to logits of the
    best head, what was chosen). AdamW, written out because each head has a rate and a decay of its own."""
    x = x.float()
    mean, std = x.flatten(0, -2).mean(0), (x.flatten(0, -2).var(0, unbiased=False) + 1e-6).sqrt()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(cfg.seed)).to(x.device)
    held, kept = order[:max(1, len(x) // 10)], order[max(1, len(x) // 10):]
    if not len(kept):
        raise BadInput("--data or --limit: a head takes two images, one to learn from and one to be chosen by")
    grid = [(rate, decay) for rate in RATES for decay in DECAYS]
    rates, decays = (torch.tensor(column, device=x.device).view(-1, 1, 1) for column in zip(*grid))
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        heads = Heads(len(grid), x.shape[-1], classes, queries).to(x.device)
    average = [(torch.zeros_like(p), torch.zeros_like(p)) for p in heads.parameters()]
    batch = min(batch, len(kept))
    stream, total = Order(len(kept), cfg.seed), max(100, cfg.epochs * len(kept) // batch)
    for step in tqdm(range(1, total + 1), "attentive" if queries else "linear", leave=False, disable=None):
        ids = kept[stream(step - 1, batch, slice(0, batch)).to(x.device)]
        logits = heads((x[ids] - mean) / std)  # [G, n, classes]
        target = y[ids].repeat(len(grid), *[1] * (y.ndim - 1))
        gradients = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), target) * len(grid), [*heads.parameters()])
        rate = warmup_cosine(step - 1, total, 0, rates)
        with torch.no_grad():
            for p, g, (m, v) in zip(heads.parameters(), gradients, average):
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.01)
                p.mul_(1 - rate * decays).sub_(rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8))

    @torch.no_grad()
    def logits(features):  # of all heads, part by part: [G, n, classes]
        for part in features.split(batch):
            yield heads((part.float() - mean) / std)
    truth = y[held] if y.ndim == 1 else y[held].argmax(1)
    scores = (torch.cat([part.argmax(-1) for part in logits(x[held])], 1) == truth).float().mean(1)
    best = scores.argmax().item()
    return lambda features: torch.cat([part[best] for part in logits(features)]), {
        "optimizer": "AdamW, betas 0.9 and 0.99", "rate": grid[best][0], "weight_decay": grid[best][1],
        "steps": total, "batch": batch, "held_out": round(100 * scores[best].item(), 2)}


# ---------------------------------------------------------------------------------------------------------------
# Probes
# ---------------------------------------------------------------------------------------------------------------

def accuracy(predicted, truth):
    return 100 * (predicted == truth).float().mean().item()


def probe_images(probe, train, train_labels, test, test_labels, cfg):
    """One of knn, linear, attentive, for every label there is: scores {name: %}, choices."""
    scores, chosen = {}, {}
    for name, y in train_labels.items():
        missing = sorted(set(test_labels[name].tolist()) - set(y.tolist()))
        if missing:
            raise BadInput(f"--data: the test set has classes of `{name}` that the training set has not: {missing[:5]}"
                           + "; a larger --limit may have them" * bool(cfg.limit))
        if probe == "knn":
            for k in (1, 20):
                scores[f"{name} k={k}"] = accuracy(knn_predict(train, y, test, k), test_labels[name])
        else:
            predict, chosen[name] = fit_heads(train, y, int(y.max()) + 1, cfg, queries=probe == "attentive")
            scores[name] = accuracy(predict(test).argmax(-1), test_labels[name])
    return scores, chosen


def patch_labels(maps, p, classes, ignore):
    """Label maps [n, H, W] -> share of each class among a patch's pixels that count [n, N, classes], zero where none does."""
    maps = maps.long().masked_fill(maps == ignore, classes)
    pixels = patchify(maps[:, None], p)  # [n, N, p * p]
    shares = torch.zeros(*pixels.shape[:2], classes + 1).scatter_add_(2, pixels, torch.ones(pixels.shape))[..., :classes]
    return shares / shares.sum(-1, keepdim=True).clamp(min=1)


def mean_iou(predicted, truth, classes, ignore):
    """Label maps of any shape -> mIoU over the classes that occur in either, and pixel accuracy, in %."""
    counts = truth != ignore
    pairs = truth[counts].long() * classes + predicted[counts].long()
    matrix = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
    union, right = matrix.sum(0) + matrix.sum(1) - matrix.diag(), matrix.diag()
    return 100 * (right / union)[union > 0].mean().item(), 100 * (right.sum() / matrix.sum()).item()


def probe_pixels(probe, train, train_maps, test, test_maps, p, cfg):
    """seg-knn or seg-linear: patch features [n, N, D], label maps [n, H, W] -> scores, choices."""
    grid = patch_grid(train_maps.shape[1:], p)
    known = torch.cat([m[m != cfg.ignore].unique() for m in (train_maps, test_maps)])
    if len(known.unique()) < 2:
        raise BadInput(f"--masks: beside --ignore {cfg.ignore} they have the labels {known.unique().tolist()}; it takes two")
    classes = int(known.max()) + 1
    shares = patch_labels(train_maps, p, classes, cfg.ignore).flatten(0, 1)  # [n N, classes]
    order = torch.randperm(len(shares), generator=torch.Generator().manual_seed(cfg.seed))
    order = order[shares[order].sum(1) > 0][:16384]
    x, y = train.flatten(0, 1)[order], shares[order].to(train.device)
    chosen = {"patches": len(x)}
    if probe == "seg-knn":
        parts = [knn_predict(x.float(), y.argmax(1), some.flatten(0, 1).float(), 20).view(len(some), *grid)
                 for some in test.split(64)]
        predicted = torch.cat(parts).repeat_interleave(p, 1).repeat_interleave(p, 2)
    else:
        predict, more = fit_heads(x, y, classes, cfg)
        chosen |= more
        parts = [F.interpolate(predict(some.flatten(0, 1)).view(len(some), *grid, classes).permute(0, 3, 1, 2), scale_factor=p,
                               mode="bilinear").argmax(1) for some in test.split(64)]
        predicted = torch.cat(parts)
    miou, right = mean_iou(predicted.cpu(), test_maps, classes, cfg.ignore)
    return {"mIoU": miou, "pixels": right}, chosen


def layer_of(name, prefix, depth):
    """Of a parameter: 0 before the blocks, 1 to depth in them, depth + 1 after them (norms, and what CAPI predicts with)."""
    if name.startswith(prefix):
        return int(name[len(prefix):].split(".")[0]) + 1
    after = ".norm." in f".{name}" and "blocks" not in name or "predictor" in name or name.endswith("teacher.mask_token")
    return depth + 1 if after else 0


def finetune(model, method, mcfg, run, train_set, val_set, cfg):
    """The whole encoder on the first label, end to end -> scores, choices."""
    torch.manual_seed(cfg.seed)  # whatever was probed before
    if cfg.limit:
        train_set, val_set = (subset(data, evenly(len(data), cfg.limit)) for data in (train_set, val_set))
    model, batch = copy.deepcopy(model).train(), min(128, len(train_set))
    model.training = False  # the flag of the whole alone: where it is set, SemanticMIM's `encode` drops no path
    encode = encoder_of(model, method, cfg.pool, cfg.layer)
    labels = train_set.labels if isinstance(train_set, Pixels) else {"class": train_set.labels}
    name, y = next(iter(labels.items()))
    blocks = model.get_submodule(METHODS[method][1])
    for depth, block in enumerate(blocks):
        rate = cfg.drop_path * depth / max(1, len(blocks) - 1)
        if isinstance(getattr(block, "drop_path", None), float):
            block.drop_path = rate
        else:  # the rate of the pre-training goes too
            block.drop_path1, block.drop_path2 = [DropPath(rate) if rate else nn.Identity() for _ in range(2)]
    with torch.no_grad():
        dim = encode(next(eval_batches(mcfg, run, val_set, torch.arange(1)))[0])[0].shape[1]
    head = nn.Linear(dim, int(y.max()) + 1).to(run.device)
    prefix, groups = METHODS[method][1] + ".", {}
    for full, p in model.requires_grad_(True).named_parameters():
        below = len(blocks) + 1 - layer_of(full, prefix, len(blocks))
        groups.setdefault((cfg.layer_decay ** below, p.ndim > 1), []).append(p)
    peak = cfg.finetune_lr * batch / 256
    optimizer = torch.optim.AdamW([{"params": ps, "scale": scale, "weight_decay": 0.05 * decayed} for (scale, decayed), ps in
                                   groups.items()] + [{"params": [*head.parameters()], "scale": 1.0}], lr=peak)
    total = max(1, cfg.finetune_epochs * len(train_set) // batch)
    ft, alone = dataclasses.replace(mcfg, batch_size=batch, accum=1, seed=cfg.seed), dataclasses.replace(run, rank=0, world=1)
    stream = train_batches(ft, alone, train_set, (0.35, 1.0), 0, total, labelled=True)
    for step, (images, y) in enumerate(tqdm(stream, "finetune", total=total, leave=False, disable=None)):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, total, total // 10, peak) * group["scale"]
        with run.autocast():
            logits = head(encode(images)[0])
        F.cross_entropy(logits.float(), y.to(run.device)).backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    right, seen = 0, 0
    with torch.no_grad():
        for images, truth in eval_batches(mcfg, alone, val_set, torch.arange(len(val_set))):
            with run.autocast():
                right += (head(encode(images)[0]).argmax(1).cpu() == truth[name].cpu()).sum().item()
            seen += len(images)
    return {name: 100 * right / seen}, {"optimizer": "AdamW", "rate": peak, "steps": total, "batch": batch,
                                        "layer_decay": cfg.layer_decay, "drop_path": cfg.drop_path, "mixup": False}


# ---------------------------------------------------------------------------------------------------------------
# Pictures and export
# ---------------------------------------------------------------------------------------------------------------

def tsne(x, perplexity=30.0, steps=500, seed=0):
    """Exact t-SNE of a few thousand points: x [n, D] -> [n, 2]."""
    n, perplexity = len(x), min(perplexity, (len(x) - 1) / 3)
    x = x.float() - x.float().mean(0)
    distance = torch.cdist(x, x).square()
    own = torch.eye(n, dtype=torch.bool, device=x.device)
    low, high = torch.full((n, 1), 1e-12, device=x.device), torch.full((n, 1), 1e12, device=x.device)
    for _ in range(60):  # the width at which each point's neighbours have the wanted perplexity, by bisection
        beta = (low * high).sqrt()
        p = (-distance * beta).masked_fill(own, -torch.inf).softmax(1)
        entropy = torch.special.entr(p).sum(1, keepdim=True)
        flat = entropy > math.log(perplexity)
        low, high = torch.where(flat, beta, low), torch.where(flat, high, beta)
    p = ((p + p.T) / (2 * n)).clamp(min=1e-12)
    y = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).to(x.device) * 1e-2
    speed, gain, rate = torch.zeros_like(y), torch.ones_like(y), max(50.0, n / 12)
    for step in range(steps):
        near = 1 / (1 + torch.cdist(y, y).square())
        near = near.masked_fill(own, 0)
        q = near / near.sum()
        pull = (p * (12 if step < steps // 4 else 1) - q) * near  # neighbours are first pulled together more than they are
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gain = torch.where(gradient.sign() == speed.sign(), gain * 0.8, gain + 0.2).clamp(min=0.01)
        speed = (0.5 if step < steps // 4 else 0.8) * speed - rate * gain * gradient
        y = y + speed
        y = y - y.mean(0)
    return y


def palette(count):
    """Colours [count, 3] in 0..1, far apart: equal steps in hue, in turn light and dark."""
    hue = torch.arange(count) / max(1, count)
    colours = (((hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6 - 3).abs() - 1).clamp(0, 1)
    return colours * (0.95 - 0.35 * (torch.arange(count) % 2))[:, None]


def scatter(points, labels, side=480, radius=3):
    """points [n, 2], labels [n] -> an image [1, 3, side, side], a disc per point on white."""
    points = points.cpu() - points.cpu().amin(0)
    at = (points / points.amax() * (side - 4 * radius) + 2 * radius).long()  # [n, 2]
    span = torch.arange(-radius, radius + 1)
    disc = torch.cartesian_prod(span, span)
    disc = disc[disc.square().sum(1) <= radius**2]
    spots = (at[:, None] + disc).clamp(0, side - 1)  # [n, discs, 2]
    image = torch.ones(side, side, 3)
    colours = palette(int(labels.max()) + 1)[labels.cpu()][:, None].expand(-1, len(disc), -1)
    image[spots[..., 1].flatten(), spots[..., 0].flatten()] = colours.flatten(0, 1)
    return image.permute(2, 0, 1)[None]


def given_image(path, cfg):
    """A file as the model wants it, the middle of it: uint8 [C, H, W]."""
    try:
        image = read_image(path, cfg.in_chans)
    except READ_ERRORS as error:
        raise BadInput(f"--images {path}: cannot be read ({' '.join(str(error).split())[:100]})") from error
    return resize(cut(image, cfg.in_chans, centre_box(*image.shape[1:], pair(cfg.img_size), 1.0)), pair(cfg.img_size))


@torch.no_grad()
def draw_pictures(model, method, encode, mcfg, run, val_set, cfg, folder, given):
    """PNG files beside the checkpoint -> their names."""
    if given:
        show = normalise(torch.stack(given).float().to(run.device), mcfg)
    else:
        show = next(eval_batches(mcfg, run, val_set, torch.arange(min(8, len(val_set)))))[0]
    shown, size, names = denormalise(show, mcfg), show.shape[2:], []

    def save(name, columns):
        save_picture(folder / name, columns)
        names.append(name)
    grid = patch_grid(size, model.patch_size)
    save("eval_pca.png", [shown, pca_colours(encode(show)[1], grid, size)])
    if hasattr(model, "reconstruct") and tuple(grid) == tuple(model.grid):
        mask = random_mask(draw((len(show), model.num_patches), run.device, "picture", cfg.seed),
                           model.num_patches - model.num_visible)
        save("eval_reconstruction.png", [shown, *[denormalise(c, mcfg) for c in model.reconstruct(show, mask)]])
    if hasattr(model, "attention") and tuple(grid) == tuple(model.grid):
        columns = importlib.import_module(method).attention_columns(model, show, grid[0] // 2 * grid[1] + grid[1] // 2)
        save("eval_attention.png", [shown, *columns])
    tokens = encode(show[:1])[1][0].float()  # one image's patches, coloured by clusters (k-means)
    centres = tokens[evenly(len(tokens), 6)]
    for _ in range(20):
        nearest = torch.cdist(tokens, centres).argmin(1)
        centres = torch.stack([tokens[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(len(centres))])
    if len(tokens) >= 16:
        where = F.interpolate(palette(len(centres))[nearest.cpu()].T.view(1, 3, *grid), (480, 480), mode="nearest")
        save("eval_tsne_patches.png", [F.interpolate(shown[:1, :3].cpu(), (480, 480)), where, scatter(tsne(tokens), nearest)])
    if val_set is not None:
        ids = evenly(len(val_set), 1500)
        (pooled, labels) = features_of(encode, mcfg, run, val_set, ids, lambda pooled, patches: pooled.float())
        for name, y in labels.items():
            save(f"eval_tsne_{name}.png", [scatter(tsne(pooled), y)])
    return names


def export_encoder(model, method):
    """-> (the encoder under the names of timm's VisionTransformer, names of what was left out)."""
    if method == "capi":
        raise BadInput("--export: CAPI's encoder (rotary positions, registers, RMSNorm, no biases) is no timm ViT")
    if method == "semantic_mim" and model.num_proxy != 1:
        raise BadInput(f"--export: an encoder with {model.num_proxy} proxies in the place of CLS is no timm ViT; with 1 it is")
    state = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    prefix = "encoder." if method in ("latent_mim", "pilamim") else ""
    kept = {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}
    taken = {name for name in state if name.startswith(prefix) and name[len(prefix):].split(".")[0] in kept}
    out = {name[len(prefix):]: state[name] for name in sorted(taken)}
    if method == "pilamim":  # no position for CLS there, and no bias on q, k and v
        out["pos_embed"] = F.pad(out["pos_embed"], (0, 0, 1, 0))
    for name in [n for n in out if n.endswith("qkv.weight")]:
        bias, zero = name.replace("weight", "bias"), torch.zeros(len(out[name]) // 3)
        q, v = (out.pop(name.replace("qkv.weight", f"{letter}_bias"), zero) for letter in "qv")
        out.setdefault(bias, torch.cat([q, zero, v]))
    return out, sorted(state.keys() - taken)


def timms_vit(state, model, method):
    """The call that makes the ViT of timm's which such a state fits strictly."""
    blocks, (dim, chans, p, _) = model.get_submodule(METHODS[method][1]), state["patch_embed.proj.weight"].shape
    return (f"timm.models.vision_transformer.VisionTransformer(img_size={tuple(n * p for n in model.grid)}, patch_size={p}, "
            f"in_chans={chans}, embed_dim={dim}, depth={len(blocks)}, num_heads={blocks[0].attn.heads}, num_classes=0, "
            f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={blocks[0].norm1.eps})"
            f"{', init_values=0.1' * ('blocks.0.ls1.gamma' in state)})")


# ---------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------

def subset(data, ids):
    """Some images of a set that is held in memory, or of a folder."""
    if isinstance(data, Pixels):
        maps = data.maps if data.maps is None else data.maps[ids]
        return Pixels(data.images[ids], {name: y[ids] for name, y in data.labels.items()}, maps)
    some = copy.copy(data)
    some.paths, some.labels = data.paths[ids.numpy()], data.labels[ids]
    return some


def hold_out(data):
    """A training set -> nine tenths to train the probes on, and every tenth image to score them on.
    (An encoder that was trained on this set has seen the images of both parts, without labels.)"""
    kept, held = split_tenth(data)
    if not len(held):
        raise BadInput(f"--held-out: none of the {len(data)} images can be held out: it takes ten "
                       "images, and others of the same class")
    return subset(data, kept), subset(data, held)


def run_probe(probe, encode, model, method, mcfg, run, sets, cfg):
    """One probe of one encoder -> scores, choices."""
    train_set, val_set = sets
    most = cfg.limit or (10**9 if probe in ("knn", "linear") else 1024 if probe.startswith("seg") else 4096)
    if probe == "finetune":
        return finetune(model, method, mcfg, run, train_set, val_set, cfg)
    threads = torch.get_num_threads()
    take = (lambda pooled, patches: pooled.float()) if probe in ("knn", "linear") else lambda pooled, patches: patches.half()
    (train, train_labels), (test, test_labels) = (
        features_of(encode, mcfg, run, data, evenly(len(data), most), take) for data in sets)
    torch.set_num_threads(threads)  # which reading a folder has lowered
    if not run.main:
        return {}, {}
    if probe in ("seg-knn", "seg-linear"):
        maps = [data.maps[evenly(len(data), most)] for data in sets]
        return probe_pixels(probe, train, maps[0], test, maps[1], model.patch_size, cfg)
    return probe_images(probe, train, train_labels, test, test_labels, cfg)


def evaluate(cfg):
    check_ranges(cfg)
    unknown = [p for p in cfg.probe if p not in PROBES]
    if unknown:
        raise BadInput(f"--probe {unknown[0]}: not one of {' '.join(PROBES)}")
    if len(cfg.masks) > 2:
        raise BadInput("--masks takes one folder, or two: of the training and of the test images")
    method, trained, model, untrained = load_model(cfg.checkpoint, cfg.method)
    if cfg.export:
        state, left = export_encoder(model, method)
        with writing(f"--export {cfg.export}"):
            torch.save(state, cfg.export)
        print(f"{cfg.export}: {len(state)} tensors, {sum(t.numel() for t in state.values()) / 1e6:.2f} M numbers; left out:")
        for part in sorted({name.split(".")[0] for name in left}):
            print(f"  {part}: {sum(name.split('.')[0] == part for name in left)} tensors")
        print(f"it loads into {timms_vit(state, model, method)}")
        return 0
    world = int(os.environ.get("WORLD_SIZE", 1))  # a batch that it divides; nothing else is made of it
    mcfg, run = start(dataclasses.replace(
        trained, data=cfg.data or trained.data, img_size=cfg.img_size or trained.img_size,
        data_root=cfg.data_root or trained.data_root, workers=cfg.workers, device=cfg.device, amp=cfg.amp, batch_size=world,
        accum=1, compile="off"), minutes=600)  # the others wait while the first process fits the heads
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing here has to be finished first
        signal.signal(number, signal.SIG_DFL)
    model, untrained = model.to(run.device), untrained.to(run.device)
    encode, encode_untrained = (encoder_of(m, method, cfg.pool, cfg.layer) for m in (model, untrained))
    given = [given_image(path, mcfg) for path in cfg.images]  # read now, so that a typo is found before an hour of probing
    if cfg.masks or mcfg.data in MASKED:
        sets = masked_sets(mcfg, cfg.masks, run)
    else:
        sets = load_data(mcfg, run)
    if (cfg.held_out or "finetune" in cfg.probe) and not hasattr(sets[0], "labels"):
        raise BadInput("--held-out and --probe finetune: only for a folder, or for a set that is held in memory")
    if "finetune" in cfg.probe and run.amp is torch.float16:
        raise BadInput("--amp fp16: --probe finetune does not scale its loss; take bf16 or off")
    test_set = "its own"
    no_val = sets[1] is None and sets[0].labelled and len(split_tenth(sets[0])[1]) > 0
    if cfg.held_out or no_val:
        test_set = "every tenth training image; the probes are fitted on the other images"
        sets = hold_out(sets[0])
    labelled = sets[1] is not None and sets[1].labelled
    if cfg.picture and not labelled and not cfg.masks and cfg.probe == Config.probe:
        run.say("--data has no labelled test images: no probes, pictures only")
        cfg = dataclasses.replace(cfg, probe=())
    for probe in cfg.probe:
        if probe.startswith("seg") and not (isinstance(sets[1], Pixels) and sets[1].maps is not None):
            raise BadInput(f"--probe {probe} needs a label per pixel: --data shapes, {' '.join(MASKED)}, or a folder with "
                           "--masks")
        if not probe.startswith("seg") and not labelled:
            raise BadInput(f"--probe {probe} needs labels: --data has no class folders (or no "
                           "val/ and too few images to score on every tenth)")

    path = Path(cfg.checkpoint).resolve().parent / f"{Path(cfg.checkpoint).stem}.eval.json"
    if path.is_dir() or not os.access(path.parent, os.W_OK):  # found now, not after an hour of probing
        raise BadInput(f"{path}: cannot be written")
    rows = {"trained": (encode, model), "untrained": (encode_untrained, untrained), "raw pixels": (raw_pixels, None)}
    rows = {row: ways for row, ways in rows.items() if row.split()[0] in cfg.rows}
    table, choices = {row: {} for row in rows}, {row: {} for row in rows}
    for probe in cfg.probe:
        for row, (way, which) in rows.items():
            if row == "raw pixels" and probe in ("attentive", "finetune"):
                continue  # there is nothing to tune, and a query over raw patches would take as long as the encoder's
            if row == "raw pixels" and probe.startswith("seg"):
                way = lambda images: (None, patchify(images, model.patch_size))
            scores, chosen = run_probe(probe, way, which or model, method, mcfg, run, sets, cfg)
            table[row] |= {f"{probe} {name}": round(score, 2) for name, score in scores.items()}
            choices[row][probe] = chosen
            run.say(f"{row:12}" + "  ".join(f"{probe} {name} {score:.1f}" for name, score in scores.items()))
            if row == "trained" and chosen:
                run.say(f"  {probe} chose " + json.dumps(chosen))
    names = draw_pictures(model, method, encode, mcfg, dataclasses.replace(run, world=1), sets[1] or sets[0], cfg, path.parent,
                          given) if run.main and cfg.picture else []
    if run.main and cfg.probe:
        protocol = {"checkpoint": Path(cfg.checkpoint).name, "method": method, "encode": " ".join(model.encode.__doc__.split()),
                    "pool": cfg.pool, "layer": cfg.layer, "data": mcfg.data, "train": len(sets[0]), "test": len(sets[1]),
                    "test_set": test_set,
                    "img_size": pair(mcfg.img_size), "crop": f"centre, {sets[1].margin} of the shorter side", "seed": cfg.seed,
                    "limit": cfg.limit or "none; attentive 4096, seg- 1024", "knn": "cosine, features as they are, k 1 and 20, "
                    "votes exp(cosine / 0.07)", "heads": f"on standardised features, {cfg.epochs} epochs, rates {RATES}, "
                    f"decays {DECAYS}",
                    "amp": str(run.amp), "torch": torch.__version__, "masks": cfg.masks, "ignore": cfg.ignore}
        report = {"protocol": protocol, "scores": table, "chosen": choices}
        with contextlib.suppress(OSError, ValueError):  # what earlier calls found stays, the last one first
            last = json.loads(path.read_text())
            report["before"] = [last, *last.pop("before", [])]
        with writing(path):
            path.write_text(json.dumps(report, indent=1))
        for key, value in protocol.items():
            print(f"  {key}: {value}")
    if run.main:
        print(f"written: {' '.join([path.name] * bool(cfg.probe) + names)}")
    return 0


if __name__ == "__main__":
    main(evaluate, Config, __doc__)
