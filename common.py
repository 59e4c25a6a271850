"""What the five method files share: ViT blocks, masking, data, and the parts of a training run.

Letters for shapes, the same in all files: B images, C channels, H x W pixels, p patch size,
N = gh * gw patches, V visible and M masked, P = p * p * C numbers of a patch, D encoder width,
E decoder width, d width of a head, T tokens, Q queries, K clusters or proxies, R registers.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import functools
import inspect
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import typing
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


# Signals that stop a run. Windows has no SIGHUP.
STOPS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


class BadInput(ValueError):
    """Invalid input. `main` prints it as one line and exits with status 2."""


def one_line(error):
    return " ".join(str(error).split())[:300]


# ---- 1. ViT

MODELS = {  # width D, depth, heads; nano is for a demo on two CPU cores
    "nano": (96, 4, 3), "tiny": (192, 12, 3), "small": (384, 12, 6),
    "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16),
}


def attend(q, k, v):
    """Softmax attention. q [B, heads, Q, d], k and v [B, heads, T, d] -> [B, heads, Q, d]."""
    # On a CPU the backward pass of the fused kernel is slow in bf16. Two plain products are faster,
    # but store all scores, so not for many tokens; in float32 they gain little, so only for few.
    most = 512 * 512 if q.dtype is torch.bfloat16 else 50 * 50
    if q.device.type == "cpu" and q.shape[2] * k.shape[2] <= most:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim, heads, qkv_bias=True):
        super().__init__()
        if dim % heads:
            raise BadInput(f"{heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def project(self, x):  # [B, T, D] -> q, k, v, each [B, heads, T, d]
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, first_query=0):
        """[B, T, D] -> [B, T - first_query, D]. Tokens before first_query are only keys and
        values."""
        q, k, v = self.project(x)
        x = attend(q[:, :, first_query:], k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, bias=True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. Its parameters have timm's names."""

    def __init__(self, dim, heads, norm, qkv_bias=True):
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, first_query=0):  # [B, T, D] -> [B, T - first_query, D]
        x = x[:, first_query:] + self.attn(self.norm1(x), first_query)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """One linear map per patch. The weight has a convolution's shape, as in other checkpoints, but
    a matrix product can skip masked patches, and is faster in bf16 on a CPU."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, patches):  # [B, N, P] -> [B, N, D]
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, P]
        return F.linear(patches, weight, self.proj.bias)


def xavier_init(model):
    """Xavier uniform for every Linear and for the patch projection, seen as a matrix. Biases of
    Linears are zero; the patch projection's bias stays as PyTorch draws it."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def patchify(images, p):
    """[B, C, H, W] -> [B, N, P]. Patches come row by row; in a patch the channel varies fastest."""
    x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, gh, p, gw, p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches, p, grid):
    """The inverse of `patchify`; grid is (gh, gw)."""
    x = patches.unflatten(2, (p, p, -1)).unflatten(1, grid)  # [B, gh, gw, p, p, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def pair(size):
    """32, (32,) or (32, 48) -> (height, width)."""
    size = (size,) if isinstance(size, int) else tuple(size)
    return size * 2 if len(size) == 1 else size


def patch_grid(img_size, patch_size):
    """Rows and columns of patches (gh, gw)."""
    height, width = pair(img_size)
    if height % patch_size or width % patch_size:
        raise BadInput(f"--patch-size {patch_size} does not divide --img-size {height} {width}")
    return height // patch_size, width // patch_size


def sincos_2d(dim, rows, cols):
    """Fixed positions [1, gh * gw, dim] for the coordinates rows [gh] and cols [gw]. Channels: the
    first half encodes the column, the second the row, as [sin(x w), cos(x w)] with
    w_i = 10000^(-i / (dim / 4))."""
    if dim % 4:
        raise BadInput(f"sin-cos positions need a width divisible by 4, not {dim}")
    w = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row = rows.double()[:, None] * w  # [gh, dim / 4]
    col = cols.double()[:, None] * w
    row = torch.cat([row.sin(), row.cos()], 1)[:, None].expand(-1, len(cols), -1)
    col = torch.cat([col.sin(), col.cos()], 1)[None].expand(len(rows), -1, -1)  # [gh, gw, dim / 2]
    return torch.cat([col, row], 2).flatten(0, 1)[None].float()


def bicubic(x, size):
    """[B, C, H, W] -> [B, C, *size], bicubic with antialiasing."""
    if x.device.type == "mps":  # torch 2.6 cannot do it there
        return bicubic(x.cpu(), size).to(x.device)
    return F.interpolate(x, tuple(size), mode="bicubic", antialias=True)


def resize_positions(pos, old_grid, new_grid):
    """Resize a position table [1, extra + N, D]; the first `extra` rows (CLS) stay."""
    if tuple(old_grid) == tuple(new_grid):
        return pos
    extra = pos.shape[1] - old_grid[0] * old_grid[1]
    table = pos[:, extra:].transpose(1, 2).unflatten(2, old_grid)  # [1, D, gh, gw]
    table = bicubic(table, new_grid).flatten(2).transpose(1, 2)
    return torch.cat([pos[:, :extra], table], 1)


def load_released(model, state, optional=()):
    """Load weights that have our names. Unknown or missing tensors are an error, but all tensors of
    a prefix in `optional` may be missing together: they stay as initialised, and a message says
    so."""
    for prefix in optional:
        if not any(name.startswith(prefix) for name in state):
            print(f"from_released: the file has no {prefix.rstrip('.')}; it stays as initialised")
            own = model.state_dict().items()
            state = state | {name: t for name, t in own if name.startswith(prefix)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        name = type(model).__name__
        raise BadInput(f"not a released {name} of these sizes: {one_line(error)}") from error
    return model


def arguments(Model, cfg):
    """The constructor's arguments: the flags of the same names, and the sizes of --model."""
    names = inspect.signature(Model).parameters.keys() & vars(cfg).keys()
    dim, depth, heads = MODELS[cfg.model]
    return {name: getattr(cfg, name) for name in names} | dict(dim=dim, depth=depth, heads=heads)


# ---- 2. Masking. A mask is bool [B, N], True = masked; all rows have the same number of True.

def check_visible(setting, num_visible, num_patches, least=1):
    """Reject a setting that leaves too few visible or masked patches."""
    if not least <= num_visible <= num_patches - least:
        raise BadInput(f"{setting} leaves {num_visible} of {num_patches} patches visible; at least "
                       f"{least} must be visible and {least} masked")


def random_mask(noise, num_masked):
    """noise [B, N], uniform -> is_masked [B, N] with num_masked True in each row."""
    ids = noise.argsort(1)[:, :num_masked]
    return torch.zeros_like(noise, dtype=torch.bool).scatter_(1, ids, True)


def split_ids(is_masked, num_visible):
    """is_masked [B, N] -> ids_visible [B, V], ids_masked [B, M], each in ascending order."""
    if not torch.compiler.is_compiling() and is_masked.device.type != "mps":
        # A row with fewer visible patches would show masked ones. This does not synchronise a GPU.
        right = ((~is_masked).sum(1) == num_visible).all()
        torch._assert_async(right, f"each row of the mask must have {num_visible} visible patches")
    ids = is_masked.byte().argsort(dim=1, stable=True)
    return ids[:, :num_visible], ids[:, num_visible:]


def gather(x, ids):
    """x [B or 1, N, D], ids [B, T] -> the tokens at those places [B, T, D]."""
    return x.expand(len(ids), -1, -1).gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def unshuffle(x, ids):
    """Sort tokens x [B, N, D] with the places ids [B, N] into image order."""
    return gather(x, ids.argsort(1))


# ---- 3. Data. Crops and masks depend only on the seed, the step and the row of the GLOBAL batch,
# not on the number of processes. So a run resumes exactly.

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def seed_of(*parts):
    """A 63-bit seed for numbers and names. Different sequences give independent seeds."""
    words = [len(parts)]
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(part.encode(), "little")
        words.append(int(part))
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def draw(shape, device, *parts):
    """Uniform numbers in [0, 1) that depend only on `parts` and on the kind of device."""
    generator = torch.Generator(device).manual_seed(seed_of(*parts))
    return torch.rand(shape, generator=generator, device=device)


# -- shapes: drawn pictures, so that nothing has to be downloaded

SHAPES = torch.tensor([  # corners, notch / tip radius, hole (-1: none), size, waves in u and v
    [32, math.cos(math.pi / 32), -1, 0.80, 0, 0],  # disc
    [3, 0.5, -1, 1.24, 2, 0],  # triangle
    [4, math.cos(math.pi / 4), -1, 1.00, 2, 2],  # square
    [5, 0.42, -1, 1.30, 1, 0],  # star
    [32, math.cos(math.pi / 32), 0.55, 0.95, 0, 0],  # ring
    [4, 0.36, -1, 1.35, 1, 1],  # spark
])


def render_shapes(img_size, in_chans, *key):
    """32 images that depend on `key`: uint8 [n, C, H, W], labels {name: [n]}, and maps uint8
    [n, H, W] with 0 for background and 1 + kind for an object. 3 to 10 objects stand on a floor.
    Near ones are large, stand low and hide far ones. Labels: the kind (6 classes) and the distance
    (6) of the nearest object, and the number of objects (8)."""
    height, width = pair(img_size)
    short = min(height, width)
    n = 32  # so few images fit in the CPU's cache
    K = 10  # objects at most

    def rand(name, *shape):
        return draw((n, *shape), "cpu", "shapes", name, *key)

    def pixels(t):  # adds the axes H and W
        return t[..., None, None]

    # Wall and floor: three plane waves mix two colours; the floor is darker.
    y = (torch.arange(height)[:, None] + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    angle, octave, phase, amount = pixels(rand("waves", 4, 3)).unbind(1)  # each [n, 3, 1, 1]
    along = x * (math.pi * angle).cos() + y * (math.pi * angle).sin()
    frequency = 2 * math.pi * 2 ** (1.5 * octave)
    waves = amount * (frequency * along + 2 * math.pi * phase).sin()  # [n, 3, H, W]
    texture = (0.5 + 0.35 * waves.sum(1, keepdim=True)).clamp(0, 1)
    one, two = pixels(rand("wall", 2, in_chans)).unbind(1)
    floor = ((y - pixels(0.25 + 0.15 * rand("horizon", 1))) * 8).clamp(0, 1)
    canvas = (one * texture + two * (1 - texture)) * (1 - 0.35 * floor)  # [n, C, H, W]

    # Objects from far to near. The nearest is at a distance of 0..6, the others well behind it.
    count = (8 * rand("count")).long()  # 0..7 stands for 3..10 objects
    nearest = 6 * rand("nearest")
    others = 9 + 3 * rand("depth", K - 1)
    others = others.masked_fill(torch.arange(K - 1) >= count[:, None] + 2, torch.inf)
    depth = torch.cat([others.sort(1, descending=True).values, nearest[:, None]], 1)
    near = 1 / (1 + torch.tensor([0.45] * (K - 1) + [0.11]) * depth)  # 0: there is no such object
    kind = (len(SHAPES) * rand("kind", K)).long()
    tint = 0.1 + 0.9 * rand("tint", K, in_chans)
    corners, inner, hole, size, fu, fv = SHAPES[kind].unbind(2)  # each [n, K]
    radius = 0.44 * short * size * near
    centre_x = width * (0.25 + 0.5 * rand("x", K))
    centre_y = height * (0.15 + (0.5 + 0.3 * (rand("y", K) - 0.5)) * near)
    turn = 2 * math.pi * rand("turn", K)
    light = pixels(2 * math.pi * rand("light"))
    maps = torch.zeros(n, height, width, dtype=torch.uint8)
    for k in range(K):  # object k of all pictures at once
        dx = x * width - pixels(centre_x[:, k])  # [n, H, W]
        dy = y * height - pixels(centre_y[:, k])
        distance = torch.hypot(dx, dy)
        theta = torch.atan2(dy, dx) + pixels(turn[:, k])
        # The outline in polar coordinates: lines between tips (radius r) and notches (c r).
        r, c = pixels(radius[:, k]), pixels(inner[:, k])
        beta = pixels(math.pi / corners[:, k])
        fold = beta - (theta.remainder(2 * beta) - beta).abs()  # the angle from the nearest tip
        edge = c * beta.sin() * fold.cos() + (1 - c * beta.cos()) * fold.sin()
        edge = c * beta.sin() / edge * r
        cover = (edge - distance + 0.5).clamp(0, 1) * pixels(near[:, k] > 0)  # soft edges
        cover = cover * (distance - pixels(hole[:, k]) * r + 0.5).clamp(0, 1)
        # The surface: waves that turn with the object (discs and rings have none); light.
        u = 9 * math.pi / short * distance * theta.cos() * pixels(fu[:, k]) + 0.5
        v = 9 * math.pi / short * distance * theta.sin() * pixels(fv[:, k])
        v = v + 0.5 * pixels(fv[:, k] > 0)
        surface = (4 * u.cos() * v.cos()).clamp(-1, 1) * pixels(fu[:, k] > 0)
        shade = 0.75 + 0.3 * (dx * light.cos() + dy * light.sin()) / r.clamp(min=1e-3)
        shade = shade * (0.85 + 0.65 * surface)
        canvas += (pixels(tint[:, k]) * shade[:, None] - canvas) * cover[:, None]
        maps = torch.where(cover > 0.5, pixels(kind[:, k] + 1).byte(), maps)
    labels = {"kind": kind[:, -1], "count": count, "distance": nearest.long()}
    return (canvas * 255).round().clamp(0, 255).byte(), labels, maps


# -- image sets

@dataclasses.dataclass
class Pixels:
    """Images in memory."""
    images: torch.Tensor  # uint8 [n, C, H, W]
    labels: dict  # name: [n]
    maps: torch.Tensor | None = None  # uint8 [n, H, W], a class per pixel
    margin = 1.0  # the centre crop for evaluation, as a share of the largest one

    def __len__(self):
        return len(self.images)


@dataclasses.dataclass
class Folder:
    """Image files, which are read on demand."""
    paths: np.ndarray  # of bytes: one block of memory, which loader processes share
    labels: dict  # {"class": [n]}, or {}
    broken: dict = dataclasses.field(default_factory=dict)  # {id: path} of unreadable images
    margin = 0.875  # 224 of 256 pixels, the usual crop for ImageNet

    def __len__(self):
        return len(self.paths)


def load_data(cfg, run):
    """--data -> the training set, and the labelled set for evaluation or None."""
    if re.fullmatch("shapes(:[1-9][0-9]{0,7})?", cfg.data):
        count = int(cfg.data[7:] or 16384)
        return draw_shapes(cfg, "train", count), draw_shapes(cfg, "val", max(1, count // 4))
    if cfg.data in ("cifar10", "cifar100", "stl10", "imagenette"):
        return torchvision_sets(cfg, run)
    return folder_sets(cfg, run, cfg.data)


def draw_shapes(cfg, split, count):
    blocks = range(math.ceil(count / 32))
    images, labels, maps = zip(*[
        render_shapes(cfg.img_size, cfg.in_chans, split, cfg.seed, block) for block in blocks])
    labels = {name: torch.cat([part[name] for part in labels])[:count] for name in labels[0]}
    return Pixels(torch.cat(images)[:count], labels, torch.cat(maps)[:count])


def torchvision_sets(cfg, run):
    """CIFAR and STL-10 in memory, Imagenette as a folder. One process per machine downloads."""
    from torchvision import datasets  # takes a second to import, and only these sets need it
    make, *splits = {
        "cifar10": (datasets.CIFAR10, True, False), "cifar100": (datasets.CIFAR100, True, False),
        "stl10": (datasets.STL10, "train", "test"),
        "imagenette": (functools.partial(datasets.Imagenette, size="320px"), "train", "val"),
    }[cfg.data]
    try:
        if run.local_rank == 0:
            for split in splits:
                make(cfg.data_root, split, download=True)
        if run.world > 1:
            dist.barrier()
        sets = [make(cfg.data_root, split) for split in splits]
    except (RuntimeError, OSError) as error:
        raise BadInput(f"--data {cfg.data}: not in --data-root {cfg.data_root}, and the download "
                       f"failed ({one_line(error)})") from error
    if cfg.data == "imagenette":
        return folder_sets(cfg, run, os.path.join(cfg.data_root, "imagenette2-320"))
    if cfg.in_chans != 3:
        raise BadInput(f"--data {cfg.data} has 3 channels, not --in-chans {cfg.in_chans}")
    in_memory = []
    for images, labels in (zip(*part) for part in sets):
        images = torch.from_numpy(np.stack(images))  # [n, H, W, C]
        images = images.permute(0, 3, 1, 2).contiguous()
        in_memory.append(Pixels(images, {"class": torch.tensor(labels)}))
    return in_memory


def folder_sets(cfg, run, root):
    """A folder of images, nested or flat. `train/` and `val/` are used if both exist; folders of
    the first level are classes. Training uses all training images, also without a `val/`."""
    if not os.path.isdir(root):
        raise BadInput(f"--data {root}: no such folder; other sets are shapes, shapes:N, cifar10, "
                       "cifar100, stl10, imagenette")
    split = all(os.path.isdir(os.path.join(root, part)) for part in ("train", "val"))
    paths, classes = find_images(os.path.join(root, "train") if split else root, cfg.in_chans)
    numbers = {name: i for i, name in enumerate(sorted(set(classes)))}
    if "" in numbers or len(numbers) < 2:
        run.say(f"data: {len(paths)} images without class folders, so no k-NN test")
        return Folder(np.array(paths), {}), None
    run.say(f"data: {len(paths)} images of {len(numbers)} classes")
    labels = torch.tensor([numbers[name] for name in classes])
    train_set = Folder(np.array(paths), {"class": labels})
    if split:
        paths, classes = find_images(os.path.join(root, "val"), cfg.in_chans)
        if set(classes) <= set(numbers):  # ImageNet's val/ unpacks without class folders
            labels = torch.tensor([numbers[name] for name in classes])
            return train_set, Folder(np.array(paths), {"class": labels})
    run.say("data: no val/ with the same classes, so the k-NN test classifies every tenth training "
            "image by the others; training uses all of them")
    return train_set, None


MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels of image files; other numbers need .npy files
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # EPS would run Ghostscript


def find_images(root, in_chans):
    """All image files below root, sorted, except hidden files and run folders -> their paths, and
    the first-level folder of each, or ""."""
    def refuse(error):
        raise BadInput(f"--data: {error.filename} cannot be read ({error.strerror})")
    endings = ENDINGS if in_chans in MODES else (".npy",)
    found = []
    visited = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited or "log.jsonl" in names:  # a link to a parent; a run's folder
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        top = os.path.relpath(folder, root).split(os.sep)[0].lstrip(".")  # "" for root itself
        for name in names:
            if name.lower().endswith(endings) and not name.startswith("."):
                found.append((os.fsencode(os.path.join(folder, name)), top))
    if not found:
        raise BadInput(f"--data: no image in {root} (looked for {' '.join(endings)})")
    found.sort()
    return [path for path, _ in found], [top for _, top in found]


def read_crop(path, in_chans, size, box_of):
    """Read an image file, crop it to box_of(height, width) = (top, left, height, width), resize it
    -> uint8 [C, *size]. On a file that is not an image, decoders may raise any exception."""
    if not os.path.isfile(path):  # opening a named pipe would block
        raise ValueError("not a file")
    if in_chans not in MODES:
        array = np.load(path, allow_pickle=False)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != in_chans:
            raise ValueError(f"not uint8 [H, W, {in_chans}] but {array.dtype} {list(array.shape)}")
        top, left, h, w = box_of(*array.shape[:2])
        array = array[top:top + h, left:left + w].copy()
    else:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            top, left, h, w = box_of(height, width)
            shrink = min(h / size[0], w / size[1])
            if shrink >= 2:  # decodes a JPEG at 1/2, 1/4 or 1/8, with enough pixels in the box
                image.draft(None, (int(width / shrink), int(height / shrink)))
            image.load()
            x, y = image.width / width, image.height / height  # they differ by the rounding
            image = image.crop((round(left * x), round(top * y),
                                round((left + w) * x), round((top + h) * y)))
        if image.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
            array = (np.asarray(image, np.float32) / 257).clip(0, 255)
            image = Image.fromarray(array.astype(np.uint8))
        if image.mode == "F":
            raise ValueError("its pixels are floats")
        array = np.array(image.convert(MODES[in_chans]))
    image = torch.from_numpy(array).view(1, *array.shape[:2], in_chans)
    return bicubic(image.permute(0, 3, 1, 2), size)[0]


# -- crops

def crop_boxes(noise, height, width, scale):
    """torchvision's random resized crop: the first of ten tries (area uniform in `scale`, aspect
    ratio log-uniform in [3/4, 4/3]) that fits, else the largest central crop of an allowed ratio.
    noise [n, 41] -> boxes [n, 4] of (top, left, height, width), flips [n]."""
    u = noise.numpy()  # a loader has one image per call; on so few numbers NumPy is faster
    area, aspect, y, x = u[:, :40].reshape(-1, 4, 10).swapaxes(0, 1)  # each [n, 10]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = 3 / 4 * (16 / 9) ** aspect
    h = np.sqrt(area / aspect).round()
    w = np.sqrt(area * aspect).round()
    fits = (h >= 1) & (w >= 1) & (h <= height) & (w <= width)
    tries = np.stack([np.floor((height - h + 1) * y), np.floor((width - w + 1) * x), h, w], 2)
    boxes = tries[np.arange(len(u)), fits.argmax(1)]  # the first try that fits
    h = min(height, round(width * 4 / 3))
    w = min(width, round(height * 4 / 3))
    boxes[~fits.any(1)] = (height - h) // 2, (width - w) // 2, h, w
    return torch.from_numpy(boxes), noise[:, 40] < 0.5


def centre_box(height, width, size, margin):
    """The largest central box of the aspect ratio of `size`, times margin."""
    side = min(height / size[0], width / size[1]) * margin
    h = max(1, round(size[0] * side))
    w = max(1, round(size[1] * side))
    return (height - h) // 2, (width - w) // 2, h, w


def resample_matrix(start, length, n_in, n_out):
    """Matrices [B, n_out, n_in] that resample the pixels [start, start + length) of n_in to n_out:
    bicubic with antialiasing, with Pillow's weights."""
    start, length = start[:, None, None], length[:, None, None]
    step = length / n_out  # input pixels per output pixel
    at = torch.arange(n_in, device=start.device) + 0.5
    centre = start + (torch.arange(n_out, device=start.device)[:, None] + 0.5) * step
    x = ((at - centre) / step.clamp(min=1)).abs()
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    weight = weight.masked_fill((x >= 2) | (at < start) | (at > start + length), 0)
    return weight / weight.sum(-1, keepdim=True)


def crop_resize(images, boxes, flips, size):
    """Each image's box, resized and perhaps flipped: uint8 [B, C, H, W] -> float [B, C, *size] in
    0..255, by one matrix per image and axis. (F.grid_sample would alias if a crop shrinks.)"""
    top, left, h, w = boxes.unbind(1)
    rows = resample_matrix(top, h, images.shape[2], size[0])  # [B, h, H]
    cols = resample_matrix(left, w, images.shape[3], size[1])  # [B, w, W]
    cols = torch.where(flips[:, None, None], cols.flip(1), cols)
    x = images.transpose(1, 2).contiguous().float().flatten(1, 2)  # [B, H * C, W]
    x = torch.bmm(x, cols.mT).unflatten(1, (images.shape[2], -1)).flatten(2)  # [B, H, C * w]
    return torch.bmm(rows, x).unflatten(2, (-1, size[1])).transpose(1, 2).clamp(0, 255)


# -- batches

@functools.lru_cache(2)
def permutation(n, seed, epoch):
    generator = torch.Generator().manual_seed(seed_of("order", seed, epoch))
    return torch.randperm(n, generator=generator).tolist()


def random_crops(cfg, run, n, done, total):
    """For each micro-batch of the steps done + 1 .. total: the ids of this process's images, and
    the noise for their crops. Each epoch has its own permutation; a batch may span two epochs."""
    for step in range(done, total):
        noise = draw((cfg.batch_size, 41), "cpu", "crop", cfg.seed, step)
        for rows in map(run.rows, range(cfg.accum)):
            places = range(step * cfg.batch_size + rows.start, step * cfg.batch_size + rows.stop)
            ids = [permutation(n, cfg.seed, place // n)[place % n] for place in places]
            yield torch.tensor(ids), noise[rows]


def train_batches(cfg, run, data, done, total, size=None, with_ids=False):
    """The micro-batches [m, C, H, W] of the steps done + 1 .. total, randomly cropped to `size`
    (default --img-size) and flipped. with_ids: with the ids [m] of their images."""
    crops = random_crops(cfg, run, len(data), done, total)
    for images, ids in batches(cfg, run, data, crops, size or pair(cfg.img_size)):
        yield (images, ids) if with_ids else images


def eval_batches(cfg, run, data, ids):
    """Centre crops [m, C, H, W] of the images of a set, and their ids."""
    crops = ((chunk, None) for chunk in ids.split(64))
    return batches(cfg, run, data, crops, pair(cfg.img_size))


def batches(cfg, run, data, crops, size):
    """crops: pairs of ids and the noise for random crops, None for central ones -> normalised
    images on the device, and their ids: the next image replaces an unreadable one."""
    read = read_batches if isinstance(data, Folder) else cut_batches
    for images, ids in read(cfg, run, data, crops, size):
        yield normalise(images, cfg), ids


def cut_batches(cfg, run, data, crops, size):
    """Crop images in memory. A set below a quarter of the free GPU memory moves to the GPU."""
    images = data.images
    if run.device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 4:
        images = images.to(run.device)
    for ids, noise in crops:
        picked = images[ids.to(images.device, non_blocking=True)].to(run.device, non_blocking=True)
        if noise is None:
            top, left, h, w = centre_box(*images.shape[2:], size, data.margin)
            picked = picked[:, :, top:top + h, left:left + w].float()
            yield bicubic(picked, size).clamp(0, 255), ids
        else:
            boxes, flips = crop_boxes(noise, *images.shape[2:], cfg.crop_scale)
            boxes = boxes.to(run.device, non_blocking=True)
            flips = (flips & cfg.flip).to(run.device, non_blocking=True)
            yield crop_resize(picked, boxes, flips, size), ids


class Reader(torch.utils.data.Dataset):
    """Reads a batch in a loader process. An item is ids, and noise [m, 41] for random crops or None
    for central ones."""

    def __init__(self, data, cfg, size):
        self.data, self.cfg, self.size = data, cfg, size

    def __getitem__(self, item):
        """-> images uint8 [m, C, *size], ids [m], [(id, reason)] of the unreadable images."""
        ids, noise = item
        rows = [None] * len(ids) if noise is None else torch.from_numpy(noise).split(1)
        broken = []
        images, ids = zip(*[self.read(i, row, broken) for i, row in zip(ids, rows)])
        return torch.stack(images).contiguous(), torch.tensor(ids), broken

    def read(self, index, noise, broken):
        """An image and its id. If it is unreadable, the next one replaces it. Above 1 % of the set
        `report_broken` stops the run."""
        def box_of(height, width):
            if noise is None:
                return centre_box(height, width, self.size, self.data.margin)
            return crop_boxes(noise, height, width, self.cfg.crop_scale)[0][0].int().tolist()
        for i in range(index, index + len(self.data) // 100 + 2):
            i %= len(self.data)
            path = os.fsdecode(self.data.paths[i])
            try:
                image = read_crop(path, self.cfg.in_chans, self.size, box_of)
                if noise is not None and self.cfg.flip and noise[0, 40] < 0.5:
                    image = image.flip(2)
                return image, i
            except Exception as error:  # decoders raise many kinds
                broken.append((i, f"{type(error).__name__}: {error}".replace(path, "it")[:120]))
        return torch.zeros(self.cfg.in_chans, *self.size, dtype=torch.uint8), index


def read_batches(cfg, run, data, crops, size):
    """Loader processes read the images. On a CPU torch uses fewer threads meanwhile: if they
    compete with the loaders, a step takes several times as long."""
    on_cpu = run.device.type == "cpu"
    workers = cfg.workers
    if workers is None:
        workers = max(1, run.cores // 4 if on_cpu else min(24, run.cores))
    batch = cfg.batch_size // cfg.accum // run.world + 64  # evaluation's 64 may wait beside it
    needed = 3 * workers * run.local_world * batch * cfg.in_chans * math.prod(size)
    if workers and os.path.isdir("/dev/shm") and needed > shutil.disk_usage("/dev/shm").total:
        # With less, a batch would hang. Not `free`, as this run's other loaders may hold some.
        raise BadInput(f"--workers {workers} need {needed >> 20} MB in /dev/shm, which has less: "
                       "use docker run --shm-size, or --workers 0")
    crops = ((ids.tolist(), None if noise is None else noise.numpy()) for ids, noise in crops)
    loader = torch.utils.data.DataLoader(
        Reader(data, cfg, size), batch_size=None, sampler=crops, num_workers=workers,
        worker_init_fn=leave_group, pin_memory=run.device.type == "cuda",
        timeout=600 if workers else 0, generator=torch.Generator())  # leaves the global one alone
    threads = torch.get_num_threads()
    if on_cpu and workers:
        torch.set_num_threads(min(threads, max(1, run.cores - workers)))
    try:
        for images, ids, broken in loader:
            report_broken(data, broken)
            yield images.to(run.device, non_blocking=True).float(), ids
    except (ConnectionError, EOFError) as error:  # before torch sees that the worker died
        raise RuntimeError("a DataLoader worker was killed") from error
    finally:
        torch.set_num_threads(threads)


def leave_group(worker):
    """Ignore what stops a run, and leave its process group: its last step still needs images."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()


def report_broken(data, broken):
    """Name each unreadable image once. Stop above 1 %."""
    for i, why in broken:
        if i not in data.broken:
            data.broken[i] = data.paths[i].decode(errors="backslashreplace")
            warning = f"cannot read {data.broken[i]} ({why}); the next image replaces it"
            with contextlib.suppress(OSError):  # the output is closed
                tqdm.write(f"warning: {warning}")
    count = len(data.broken)
    if count > max(1, len(data) // 100) or count == len(data):
        some = ", ".join(list(data.broken.values())[:3])
        raise BadInput(f"--data: {count} of {len(data)} images are unreadable, above 1 %: {some}")


def normalise(images, cfg):
    """float 0..255 [B, C, H, W] -> (x / 255 - mean) / std per channel, in place."""
    mean, std = per_channel(cfg.mean, images.device), per_channel(cfg.std, images.device)
    return images.sub_(mean * 255).div_(std * 255)


def denormalise(images, cfg):
    """The inverse of `normalise`, to 0..1, for pictures."""
    mean, std = per_channel(cfg.mean, images.device), per_channel(cfg.std, images.device)
    return (images * std + mean).clamp(0, 1)


@functools.lru_cache(16)  # a new copy to a GPU in every step would synchronise
def per_channel(values, device):
    return torch.tensor(values, device=device).view(-1, 1, 1)


# ---- 4. Training

# -- flags: a field of a Config defines a flag, and is stored in the log and in checkpoints

def flag(default, help, least=None, most=1e18, may_change=False, **options):
    """A Config field. may_change: a resumed run may change it. argparse gets the options."""
    options["help"] = help
    return dataclasses.field(default=default, metadata={
        "least": least, "most": most, "may_change": may_change, "argparse": options})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The flags that all methods share. A method's Config adds its own and changes defaults."""
    data: str = flag("shapes", "folder; or shapes, shapes:N, cifar10, cifar100, stl10, imagenette")
    data_root: str = flag("data", "folder for torchvision's sets", may_change=True)
    img_size: tuple[int, ...] = flag((32,), "side of the images, or height and width", 1, 10**5)
    in_chans: int = flag(3, "channels: 1, 3, 4; others need .npy files, uint8 [H, W, C]", 1)
    mean: tuple[float, ...] = flag((), "channel means of pixels in 0..1; default ImageNet's, or "
                                   "0.5 if there are not 3 channels", -1e6, 1e6)
    std: tuple[float, ...] = flag((), "channel deviations; default ImageNet's, or 0.25", 1e-6, 1e6)
    crop_scale: tuple[float, ...] = flag((0.2, 1.0), "range of the crop's share of the image's "
                                         "area", 1e-4, 1)
    flip: bool = flag(True, "flip half of the crops")
    workers: int | None = flag(None, "loader processes; default from the cores", 0, may_change=True)
    model: str = flag("nano", "size of the encoder", choices=MODELS)
    patch_size: int | None = flag(None, "default 4 below 48 pixels, 8 below 160, else 16", 1)
    batch_size: int = flag(128, "global batch, over all processes and micro-batches", 1)
    accum: int = flag(1, "micro-batches per step, to save memory", 1, may_change=True)
    epochs: int = flag(10, "passes over the training set", 1, may_change=True)
    warmup_epochs: int = flag(1, "epochs of learning-rate warm-up", 0)
    base_lr: float = flag(1e-3, "the peak learning rate is base_lr * batch_size / 256", 0)
    betas: tuple[float, ...] = flag((0.9, 0.95), "AdamW's betas", 0, 0.999999)
    weight_decay: float = flag(0.05, "AdamW's weight decay", 0)
    clip_grad: float = flag(1.0, "largest gradient norm; 0: do not clip", 0)
    seed: int = flag(0, "decides everything random", 0)
    device: str = flag("auto", "auto: the fastest", may_change=True,
                       choices=["auto", "cpu", "cuda", "mps"])
    amp: str = flag("auto", "auto: bf16 if the device is fast at it; off: float32, on CUDA TF32",
                    may_change=True, choices=["auto", "bf16", "fp16", "off"])
    compile: str = flag("auto", "torch.compile; auto: for 5,000 steps and more", may_change=True,
                        choices=["auto", "on", "off"])
    out: str = flag("runs/run", "folder for last.pt, log.jsonl and pictures", may_change=True)
    resume: str = flag("auto", "auto: resume OUT/last.pt; no: delete it; or a checkpoint to start "
                       "from if OUT has none", may_change=True)
    save_every: int = flag(5, "epochs between checkpoints", 1, may_change=True)
    eval_every: int = flag(0, "epochs between k-NN tests; 0: before and after", 0, may_change=True)
    log_every: int = flag(20, "steps between log lines", 1, may_change=True)


def metadata_of(Config, name):
    """The metadata that `flag` gave a field. A subclass that only changes a default inherits it."""
    fields = (base.__dataclass_fields__[name] for base in Config.__mro__)
    return next(field.metadata for field in fields if field.metadata)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def parse_args(Config, doc="", argv=None):
    """Flags -> Config: dashes for underscores, --no-x for a switch, several values for a tuple."""
    parser = Parser(description=(doc or "").split("\n\n")[0], allow_abbrev=False,
                    epilog="exit status: 0 done, 1 not finite, 2 bad input, 128 + n for signal n")
    for name, kind in typing.get_type_hints(Config).items():
        default = getattr(Config, name)
        options = dict(metadata_of(Config, name)["argparse"])
        if default not in ("", (), None):
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            options["help"] += f" [{shown}]"
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = (typing.get_args(kind) or [kind])[0]  # `int | None` reads an int
        if typing.get_origin(kind) is tuple:
            options.update(nargs=2 if len(default) == 2 else "+", metavar="X")
        dashes = "" if options.pop("positional", False) else "--"
        parser.add_argument(dashes + name.replace("_", "-"), default=default, **options)
    values = vars(parser.parse_args(argv))
    return Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def check_ranges(cfg):
    for name, value in dataclasses.asdict(cfg).items():
        limits = metadata_of(type(cfg), name)
        least, most = limits["least"], limits["most"]
        for v in value if isinstance(value, tuple) else (value,):
            if None not in (v, least) and not least <= v <= most:
                raise BadInput(f"--{name.replace('_', '-')} {v}: not from {least} to {most}")


def main(train, Config, doc):
    """Configure the process, parse the flags, run `train`, exit with its status."""
    keep_memory()
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")  # TF32
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if the caller has closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")
    rank = os.environ.get("RANK", "0")
    message = ""
    try:
        status = train(parse_args(Config, doc))
        if dist.is_initialized():
            dist.barrier()  # a process that leaves early would break the others' last collective
    except BadInput as error:
        status = 2
        if rank == "0" or dist.is_initialized() or not dist.is_torchelastic_launched():
            message = error  # before joining, all ranks find the same error; rank 0 prints it
    except KeyboardInterrupt:  # outside the training loop
        status = 130
    except Exception as error:  # caught, because releasing the frames ends the loader processes
        status = 1
        message = traceback.format_exc()
        if dist.is_initialized() and "onnection" in str(error):
            message = f"lost another process, which may have said why ({one_line(error)})"
    if message:
        name = Path(sys.argv[0]).name if rank == "0" else f"rank {rank}"
        tqdm.write(f"{name}: {message}", file=sys.stderr)
    if status == 0 and dist.is_initialized() and dist.get_backend() == "nccl":
        dist.destroy_process_group()  # else NCCL warns; with gloo of torch 2.6 this can hang
    for child in multiprocessing.active_children():  # a loader that is stuck in a read
        child.kill()
    sys.exit(status)


def keep_memory():
    """Tell glibc to keep the memory that a step frees: on a CPU, every step would have to get it
    back from the kernel. Other C libraries have no such setting."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


# -- processes and devices

def start(cfg, method=""):
    """Check the flags, fill in their defaults, choose device and precision, join the other
    processes -> the Config and this process's Run."""
    check_ranges(cfg)
    if len(cfg.img_size) > 2:
        raise BadInput("--img-size takes one or two values")
    patch_size = 16
    if max(cfg.img_size) < 160:
        patch_size = 8 if max(cfg.img_size) >= 48 else 4
    mean, std = (0.5,) * cfg.in_chans, (0.25,) * cfg.in_chans
    if cfg.in_chans == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    cfg = dataclasses.replace(cfg, patch_size=cfg.patch_size or patch_size, mean=cfg.mean or mean,
                              std=cfg.std or std)
    patch_grid(cfg.img_size, cfg.patch_size)  # raises if it does not divide
    if cfg.compile == "on" and not has_compiler():
        raise BadInput("--compile on needs a C++ compiler (g++ or clang++)")
    if not len(cfg.mean) == len(cfg.std) == cfg.in_chans:
        raise BadInput(f"--mean and --std take {cfg.in_chans} values, one per channel")
    names = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0}  # torchrun's
    try:
        values = [int(os.environ.get(name, default)) for name, default in names.items()]
        world, rank, local_world, local_rank = values
        if not (0 <= rank < world and 0 <= local_rank < local_world):
            raise ValueError("out of range")
    except ValueError as error:
        raise BadInput(f"{', '.join(names)} in the environment: {error}") from error
    if cfg.batch_size % (world * cfg.accum):
        raise BadInput(f"--batch-size {cfg.batch_size} does not divide into {world} processes x "
                       f"--accum {cfg.accum}")
    device = choose_device(cfg.device, local_rank)
    amp = choose_amp(cfg.amp, device)
    run = Run(cfg, device, amp, rank, world, local_rank, local_world, method)
    if world > 1:
        join_processes(run)
    return cfg, run


def has_compiler():
    return bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))


def join_processes(run):
    """torchrun keeps one store for all restarts. Each restart needs its own prefix, or a process
    would read the addresses of dead ones."""
    options = {"device_id": run.device} if run.device.type == "cuda" else {}
    limit = datetime.timedelta(minutes=10)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if options else "gloo", store=store, rank=rank,
                                world_size=world, timeout=limit, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise BadInput(f"cannot join the other processes ({one_line(error)})") from error


def choose_device(name, local_rank):
    gpus = torch.cuda.device_count()
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
        if mps and "WORLD_SIZE" not in os.environ:
            name = "mps"
    if name == "cuda" and local_rank >= gpus or name == "mps" and not mps:
        raise BadInput(f"--device {name}: torch does not find it here (GPU number {local_rank})")
    if name == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(name)


def choose_amp(name, device):
    """-> the dtype for autocast, or None for float32."""
    if name == "fp16" and device.type != "cuda":
        raise BadInput(f"--amp fp16 is for CUDA; use bf16 or off on {device.type}")
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        cpu = Path("/proc/cpuinfo")
        if device.type == "cpu" and cpu.exists():
            fast = "avx512_bf16" in cpu.read_text()
        name = "bf16" if fast else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]


@dataclasses.dataclass(eq=False)
class Run:
    """This process: where and how it computes, and which rows of the batch it has."""
    cfg: TrainConfig
    device: torch.device
    amp: torch.dtype | None = None
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    method: str = ""
    compiled: bool = False
    signal: int = 0  # the number of the signal that asked for the end
    warned: set = dataclasses.field(default_factory=set)

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def asked_to_stop(self):
        """One process stops after this step; several agree at the next log line."""
        return self.signal > 0 and self.world == 1

    @functools.cached_property
    def cores(self):
        """CPU cores that this process may use, divided by the processes that share them. All ranks
        must call this together."""
        own = range(os.cpu_count())
        if hasattr(os, "sched_getaffinity"):
            own = sorted(os.sched_getaffinity(0))
        key = torch.tensor([seed_of(*own)], device=self.device)
        same = int((self.gather(key) == key).sum()) * self.local_world // self.world
        return max(1, len(own) // max(1, same))

    def say(self, text, file=None):
        if self.is_main:
            with contextlib.suppress(OSError):  # the output is closed; the run goes on
                tqdm.write(text, file=file)
                (file or sys.stdout).flush()

    def warn(self, name, text):
        """Print a warning once per name."""
        if name not in self.warned:
            self.warned.add(name)
            self.say(f"warning: {name}: {text}")

    def rows(self, micro):
        """The rows of the global batch that this process has in a micro-batch."""
        size = self.cfg.batch_size // self.cfg.accum // self.world
        first = (micro * self.world + self.rank) * size
        return slice(first, first + size)

    def autocast(self):
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def gather(self, t):
        """[n, ...] of each process -> [world * n, ...]."""
        if self.world == 1:
            return t
        parts = [torch.empty_like(t) for _ in range(self.world)]
        dist.all_gather(parts, t.contiguous())
        return torch.cat(parts)

    def wrap(self, model, total):
        """Compile the model in place (names in checkpoints stay), and wrap it in DDP."""
        self.compiled = self.cfg.compile == "on"
        if self.cfg.compile == "auto":
            self.compiled = has_compiler() and total >= 5000 and self.device.type != "mps"
        if self.compiled:
            model.compile()
        if self.world == 1:
            return model
        ddp = DistributedDataParallel(model, bucket_cap_mb=100,  # few, large all-reduces
                                      gradient_as_bucket_view=True)
        ddp.broadcast_buffers = False  # all buffers are constant; the argument is deprecated
        return ddp

    def steps(self, done, total):
        """Yield done + 1 .. total. Meanwhile, on Ctrl-C, SIGTERM or SIGHUP, the step is finished so
        that it can be saved; a second signal ends the process. The handlers are restored when the
        loop is left. Only the main thread installs them."""
        times = []

        def handle(number, frame):
            self.signal = self.signal or number
            times.append(time.monotonic())
            if times[-1] > times[0] + 1:  # torchrun repeats a Ctrl-C at once
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        in_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, handle) for number in STOPS if in_main}
        try:
            yield from range(done + 1, total + 1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_by_signal(self, step):
        self.say(f"stopped by a signal after step {step}; the same command resumes from there")
        return 128 + (self.signal or signal.SIGTERM)  # or: another rank got it

    def stop_not_finite(self, report):
        self.say(f"error: not finite in the steps up to {report['step']}: loss {report['loss']}, "
                 f"gradient norm {report['grad_norm']}, learning rate {report['lr']:.3g}; "
                 f"{self.cfg.out} keeps the last good checkpoint", sys.stderr)
        return 1


# -- optimisation

def cosine(step, total, first, last):
    """Half a cosine from the first value to the last."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / max(1, total)))


def warmup_cosine(step, total, warmup, peak, first, last):
    """Linear from `first` to `peak`, then half a cosine to `last`."""
    if step < warmup:
        return first + (peak - first) * step / warmup
    return cosine(step - warmup, total - warmup, peak, last)


def param_groups(model, cfg, no_decay):
    """Two groups for AdamW: with --weight-decay, and without it if no_decay(name, p)."""
    groups = [{"params": [], "weight_decay": decay} for decay in (cfg.weight_decay, 0.0)]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[1 if no_decay(name, p) else 0]["params"].append(p)
    return groups


def clip_gradients(parameters, max_norm):
    """Scale the gradients down to max_norm, if it is not 0 -> their norm before."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def update_ema(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


class Plan:
    """How many steps a run has, and after which it reports, saves and evaluates."""

    def __init__(self, cfg, images):
        self.cfg, self.images = cfg, images
        self.total = self.steps(cfg.epochs)
        self.warmup = self.steps(cfg.warmup_epochs) if cfg.warmup_epochs else 0
        self.peak_lr = cfg.base_lr * cfg.batch_size / 256

    def steps(self, epochs):
        return max(1, round(epochs * self.images / self.cfg.batch_size))

    def saves_at(self, step):
        return step == self.total or step % self.steps(self.cfg.save_every) == 0

    def evaluates_at(self, step):
        every = self.cfg.eval_every
        return step in (0, self.total) or every > 0 and step % self.steps(every) == 0

    def reports_at(self, step):
        return step % self.cfg.log_every == 0 or self.saves_at(step) or self.evaluates_at(step)


# -- checkpoints

EXTRACT = """python -c "import sys, torch; s = torch.load(sys.argv[1], weights_only=False); \
torch.save(s.get('state_dict', s.get('model')), 'weights.pt')" {}"""


class Damaged(BadInput):
    """A checkpoint file that is damaged."""


def read_checkpoint(path):
    """A dict of tensors and numbers from a file. Code in it is never run."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file")
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and zipfile.ZipFile(path).testzip():  # torch does not check its checksums
            raise ValueError
        mmap = zipped and os.name != "nt"  # Windows could not replace a mapped last.pt
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except Exception as error:  # torch.load raises many kinds
        invalid = getattr(error, "errno", None) == errno.EINVAL  # truncated: a seek before 0
        if isinstance(error, (OSError, MemoryError)) and not invalid or "allocate" in str(error):
            reason = one_line(error) or type(error).__name__
            raise BadInput(f"{path}: cannot be read ({reason})") from error
        if "GLOBAL" in str(error) or "reduce" in str(error):
            raise BadInput(f"{path}: it holds code, which is refused. If you trust it, extract its "
                           "weights: " + EXTRACT.format(shlex.quote(str(path)))) from error
        raise Damaged(f"{path}: damaged, or not a PyTorch checkpoint") from error


class Checkpoint:
    """OUT/last.pt, the state of every part of a run; the one before is kept as OUT/previous.pt."""

    def __init__(self, cfg, run, plan, **parts):
        self.cfg, self.run, self.plan, self.parts = cfg, run, plan, parts
        self.last = Path(cfg.out, "last.pt")
        self.previous = Path(cfg.out, "previous.pt")

    def resume(self):
        """Load the run in OUT, else the file that --resume names -> the number of steps done, 0 for
        a new run, the same on every rank. Make OUT and lock it. --resume no deletes old
        checkpoints."""
        step = 0
        old = [path for path in (self.last, self.previous) if os.path.lexists(path)]
        if self.cfg.resume != "no" and (old or self.cfg.resume != "auto"):
            paths = old or [self.cfg.resume]
            step = self.load(*paths)
        self.agree(step)
        if self.run.is_main:
            with writing(f"--out {self.cfg.out}"):
                self.last.parent.mkdir(parents=True, exist_ok=True)
                self.lock = open(Path(self.cfg.out, ".lock"), "w")
                if hasattr(os, "lockf"):  # not on Windows
                    os.lockf(self.lock.fileno(), os.F_TLOCK, 0)  # held until the process ends
                if self.cfg.resume == "no":
                    for path in old:
                        path.unlink()
        return step

    def load(self, path, *others):
        """Load the file, or the next one if it is damaged -> the number of steps done."""
        try:
            state = read_checkpoint(path)
        except Damaged as error:
            if not others:
                raise
            self.run.say(f"warning: {error}")
            return self.load(*others)
        config, method = state.get("config"), state.get("method")
        if method != self.run.method or not isinstance(config, dict):
            raise BadInput(f"{path}: not a checkpoint of {self.run.method}, but of {method}")
        differ = []
        for name, value in dataclasses.asdict(self.cfg).items():
            may_change = metadata_of(type(self.cfg), name)["may_change"]
            if config.get(name) != value and not may_change:
                differ.append(f"--{name.replace('_', '-')} was {config.get(name)}, is {value}")
        if differ:
            raise BadInput(f"{path}: made with another Config ({'; '.join(differ)}); use another "
                           "--out, or --resume no")
        name = "step"  # of the part that is being loaded
        try:
            step = state[name]
            if type(step) is not int or step < 0:
                raise ValueError(step)
            for name, part in self.parts.items():
                if name != "scaler" or state[name]:  # that of a run without fp16 is empty
                    part.load_state_dict(state[name])
                if isinstance(part, torch.optim.Optimizer):
                    check_shapes(part)
            name = "rng"
            torch.set_rng_state(state[name])
        except Exception as error:  # torch raises many kinds
            raise BadInput(f"{path}: its {name} does not fit ({one_line(error)})") from error
        self.run.say(f"resume: {path}, step {step}")
        return step

    def agree(self, step):
        """All ranks stop if they differ in step, images or flags."""
        own = [step, self.plan.total, self.plan.images, seed_of(repr(self.cfg))]
        own = torch.tensor([own], device=self.run.device)
        found = self.run.gather(own)
        if (found != own).any():
            raise BadInput("ranks found different checkpoints, images or flags (step, steps, "
                           f"images, Config: {found.tolist()}); --out and --data must be shared")

    def save(self, step):
        if not self.run.is_main:
            return
        state = {"method": self.run.method, "config": dataclasses.asdict(self.cfg), "step": step,
                 **{name: part.state_dict() for name, part in self.parts.items()},
                 "rng": torch.get_rng_state()}
        with writing(f"--out {self.cfg.out}"):
            with whole_file(self.last, self.previous) as file:
                torch.save(state, file)


def check_shapes(optimizer):
    """torch accepts moments of any shape, and the fused AdamW then writes beyond their end."""
    for p, state in optimizer.state.items():
        for name, t in state.items():
            if torch.is_tensor(t) and t.ndim and t.shape != p.shape:
                raise ValueError(f"{name} has the shape {list(t.shape)}, not {list(p.shape)}")


@contextlib.contextmanager
def writing(what):
    """Report a full disk, a missing permission or another run's lock as BadInput."""
    try:
        yield
    except BlockingIOError as error:
        raise BadInput(f"{what}: another run is writing here") from error
    except (OSError, RuntimeError) as error:  # torch.save hides the reason, usually a full disk
        if "DataLoader" in str(error):  # a loader died meanwhile, and its handler raises anywhere
            raise
        reason = getattr(error, "strerror", None) or f"is the disk full? {one_line(error)}"
        raise BadInput(f"{what}: cannot be written ({reason})") from error


@contextlib.contextmanager
def whole_file(path, previous=None):
    """Write a temporary file, fsync, then rename: `path` is always complete. The old file becomes
    `previous`, if it is given."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# -- the log

class Report(dict):
    """A line of the log. finite and stop are the same on all ranks."""
    finite = True
    stop = False


class Meter:
    """A progress bar, and OUT/log.jsonl. Logged values are means over the steps since the last
    line, so a value that is not finite in any step shows."""

    def __init__(self, cfg, run, done, plan, scaler):
        self.cfg, self.run, self.scaler = cfg, run, scaler
        self.path = Path(cfg.out, "log.jsonl")
        self.first = done  # steps before this run
        self.start_line(done, time.perf_counter())
        if run.is_main:
            with writing(self.path):
                kept = self.lines_until(done, plan.evaluates_at(done))
                with whole_file(self.path) as file:
                    file.write(kept.encode())
                self.file = open(self.path, "a", buffering=1)
        device = torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type
        precision = str(run.amp or torch.float32)
        if run.compiled:
            precision += ", compiled"
        self.write(method=run.method, config=dataclasses.asdict(cfg), torch=torch.__version__,
                   processes=run.world, device=device, precision=precision)
        run.say(f"{plan.total} steps of {cfg.batch_size} images; micro-batches: {cfg.accum}; "
                f"processes: {run.world}; peak learning rate: {plan.peak_lr:g}; {device}, "
                f"{precision}")
        batch = cfg.batch_size
        self.bar = tqdm(total=plan.total * batch, initial=done * batch, unit="img",
                        unit_scale=True, disable=not run.is_main,
                        mininterval=0.2 if sys.stderr.isatty() else 30)

    def lines_until(self, step, again):
        """The log without what was written after the checkpoint, and without a torn last line.
        again: without the evaluation of this step, which is repeated."""
        kept = ""
        if step and self.path.is_file():  # opening a named pipe would block
            for line in self.path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, AttributeError, TypeError):
                    record = json.loads(line)
                    repeated = again and "rank" in record and record["step"] == step
                    if record.get("step", 0) <= step and not repeated:
                        kept += line + "\n"
        return kept

    def start_line(self, step, clock):
        self.values = {}  # of the steps after this one
        self.waited = 0.0
        self.reported = step
        self.clock = clock

    @contextlib.contextmanager
    def waiting_for_data(self):
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, **values):
        """Keep the values of a micro-batch. Nothing waits for the device."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def step_done(self, **values):
        self.add(**values)
        self.bar.update(self.cfg.batch_size)

    def report(self, step, **schedules):
        """Write a line: means over the steps since the last line, and over the processes."""
        means = [torch.stack(values).float().mean() for values in self.values.values()]
        means = torch.stack([*means, torch.full_like(means[0], float(self.run.signal > 0))])
        if self.run.world > 1:
            dist.all_reduce(means)
        *means, stop = (means / self.run.world).tolist()  # the only wait for the device
        means = dict(zip(self.values, means))
        seconds = time.perf_counter() - self.clock
        report = Report(step=step, images=step * self.cfg.batch_size, **schedules, **means,
                        images_per_s=self.cfg.batch_size * (step - self.reported) / seconds,
                        data_wait=self.waited / seconds)
        # In fp16 the scaler skips a step whose gradients overflow, and halves its scale.
        skips = self.scaler.is_enabled() and self.scaler.get_scale() > 1e-6
        report.finite = all(math.isfinite(value) for name, value in means.items()
                            if not (skips and name.endswith("grad_norm")))
        report.stop = stop > 0
        self.write(**report)
        self.bar.set_postfix(loss=f"{report['loss']:.4f}", lr=f"{report['lr']:.2e}")
        if report["data_wait"] > 0.1 and self.reported > self.first:  # not while loaders start
            self.run.warn("data_wait", f"{report['data_wait']:.0%} of the time; see --workers")
        if report.get("target_std", 1) < 0.02:
            self.run.warn("collapse of the targets", "all patches have almost the same target")
        self.start_line(step, self.clock + seconds)
        return report

    def write(self, **record):
        if not self.run.is_main:
            return
        for name, v in record.items():
            if isinstance(v, float):
                record[name] = float(f"{v:.6g}") if math.isfinite(v) else None  # JSON has no NaN
        with writing(self.path):
            self.file.write(json.dumps(record) + "\n")

    def write_look(self, step, scores):
        """Log the scores of a step, and print its k-NN accuracies."""
        self.write(step=step, images=step * self.cfg.batch_size, **scores)
        titles = {"raw_knn_": "raw pixels", "knn_": "pooled", "mean_knn_": "mean of patches"}
        for prefix, title in titles.items():
            shown = [f"{name.removeprefix(prefix)} {value:.1f}" for name, value in scores.items()
                     if name.startswith(prefix)]
            if shown:
                self.run.say(f"step {step}, k-NN in %, {title}: {'  '.join(shown)}")
        self.clock = time.perf_counter()  # images_per_s leaves evaluation out

    def close(self):
        self.bar.close()
        self.run.say(f"done; {self.cfg.out} has the checkpoint, the log and pictures")


# -- evaluation during training

def knn(gallery, queries, k=20):
    """The k nearest by cosine, exactly -> similarity [m, k], ids [m, k]."""
    gallery = F.normalize(gallery, dim=1).T
    nearest = [(F.normalize(chunk, dim=1) @ gallery).topk(min(k, gallery.shape[1]))
               for chunk in queries.split(1024)]
    similarity, ids = zip(*nearest)
    return torch.cat(similarity), torch.cat(ids)


def vote(similarity, labels, temperature=0.07):
    """The neighbours' labels [m, k], weighted by exp(similarity / temperature) -> classes [m]."""
    votes = torch.zeros(len(labels), int(labels.max()) + 1, device=labels.device)
    return votes.scatter_add_(1, labels, (similarity / temperature).exp()).argmax(1)


def effective_rank(features):
    """exp of the entropy of the normalised singular values: 1 if all lie on a line, at most D."""
    features = features.float().cpu()
    s = torch.linalg.svdvals(features - features.mean(0))
    if s.sum() <= 1e-6 * len(features) ** 0.5:  # all are equal
        return 1.0
    return torch.special.entr(s / s.sum()).sum().exp().item()


def spread(tokens):
    """Standard deviation over all tokens [..., D], mean over channels: 0 if all are the same."""
    x = tokens.detach().float().flatten(0, -2)
    return (x - x.mean(0)).square().mean(0).sqrt().mean()  # on a CPU faster than x.std(0)


def raw_pixels(images):
    """Baseline features: pixels, averaged to at most 32 x 32."""
    pixels = F.adaptive_avg_pool2d(images, [min(32, side) for side in images.shape[2:]]).flatten(1)
    return pixels, pixels[:, None]


def every_tenth(data):
    """The ids of every tenth image, unless it is the only one of its class, and the other ids."""
    y = next(iter(data.labels.values()))
    tenth = (torch.arange(len(data)) % 10 == 9) & (y.bincount()[y] > 1)
    return tenth.nonzero()[:, 0], (~tenth).nonzero()[:, 0]


def evenly(ids, count):
    """At most `count` of the ids, evenly spaced."""
    last = max(0, len(ids) - 1)
    places = torch.linspace(0, last, min(count, len(ids))).long()
    return ids[places.clamp(max=last)]  # float32 may round up


@torch.no_grad()
def features_of(encode, cfg, run, data, ids, take):
    """take(pooled, patches) of the images `ids`, and their labels. The ranks share the work."""
    share = math.ceil(len(ids) / run.world)
    mine = ids[(run.rank * share + torch.arange(share)) % len(ids)]  # pads the last share
    features, seen = [], []
    for images, some in eval_batches(cfg, run, data, mine):
        with run.autocast():
            features.append(take(*encode(images)))
        seen.append(some.to(run.device))
    features = run.gather(torch.cat(features))[:len(ids)]
    seen = run.gather(torch.cat(seen))[:len(ids)]
    return features, {name: y.to(run.device)[seen] for name, y in data.labels.items()}


class Look:
    """Evaluation during training: k-NN accuracy, the health of the features, pictures. It draws
    nothing from torch's global generator, so that resuming stays exact."""

    def __init__(self, cfg, run, model, train_set, val_set):
        self.cfg, self.run, self.model = cfg, run, model
        shown = train_set if val_set is None else val_set
        queries, gallery = torch.arange(len(shown)), torch.arange(len(train_set))
        if val_set is None and train_set.labels:
            queries, gallery = every_tenth(train_set)
        self.gallery = train_set, evenly(gallery, 8192)  # a set, and ids of its images
        self.queries = shown, evenly(queries, 2048)
        self.images, _ = next(eval_batches(cfg, run, shown, torch.arange(min(8, len(shown)))))

    def __call__(self, step):
        self.model.eval()
        scores = self.scores(self.model.encode)
        if step == 0:
            raw = self.scores(raw_pixels)
            scores |= {"raw_" + name: v for name, v in raw.items() if name.startswith("knn_")}
        if self.run.is_main:
            save_pictures(self.model, self.images, self.cfg, self.cfg.out)
        self.model.train()
        return scores

    def scores(self, encode):
        """Effective rank and spread of the pooled features; k-NN accuracy in % for each label, of
        the pooled features (knn_) and of the mean over patches (mean_knn_), both standardised per
        channel, so that channels of high variance do not dominate."""
        def pooled_and_mean(pooled, patches):
            return torch.stack([pooled.float(), patches.float().mean(1)], 1)  # [n, 2, D]
        features, labels = features_of(encode, self.cfg, self.run, *self.gallery, pooled_and_mean)
        some = features[:2048, 0]
        std = some.std(0, correction=0).mean().item()
        scores = {"rank": effective_rank(some), "feature_std": std}
        if scores["rank"] < 1.5 or std < 1e-4:
            self.run.warn("collapse", f"all images have almost the same features: {scores}")
        if not labels or not len(self.queries[1]):
            return scores
        queries, truth = features_of(encode, self.cfg, self.run, *self.queries, pooled_and_mean)
        mean, std = features.mean(0), features.std(0, correction=0) + 1e-6
        for i, prefix in enumerate(("knn_", "mean_knn_")):
            similarity, ids = knn(((features - mean) / std)[:, i], ((queries - mean) / std)[:, i])
            for name, y in labels.items():
                right = vote(similarity, y[ids]) == truth[name]
                scores[prefix + name] = 100 * right.float().mean().item()
        return scores


# -- pictures

def pca_colours(patches, grid, size):
    """Patch features [n, N, D] -> [n, 3, H, W] in 0..1: the first three principal components over
    all images as red, green and blue, stretched between the 1st and the 99th percentile."""
    x = patches.float().flatten(0, 1).cpu()
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors[:, -3:].flip(1)
    colours = x @ (axes * axes.sum(0).sign())  # an axis's sign is arbitrary
    low, high = colours.quantile(torch.tensor([0.01, 0.99]), dim=0)
    colours = ((colours - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = colours.unflatten(0, (len(patches), *grid)).permute(0, 3, 1, 2)
    return F.interpolate(colours, tuple(size))


def reconstruction(images, pred, is_masked, p, to_rgb):
    """The columns of a picture. pred [n, N, P]: predicted patches, normalised as `images` are."""
    patches = patchify(images, p)
    masked = is_masked[..., None]
    columns = {"input": patches, "masked": patches.masked_fill(masked, 0), "predicted": pred,
               "pasted": torch.where(masked, pred, patches)}
    grid = patch_grid(images.shape[2:], p)
    return {title: to_rgb(unpatchify(x, p, grid)) for title, x in columns.items()}


@torch.no_grad()
def save_pictures(model, images, cfg, folder, prefix=""):
    """Write features.png and the model's own pictures -> the names of the files. `model.pictures`
    returns {file name: {title: images [n, 3 or 1, H, W] in 0..1}}; it needs the training grid."""
    to_rgb = functools.partial(denormalise, cfg=cfg)
    size = images.shape[2:]
    grid = patch_grid(size, model.patch_size)
    colours = pca_colours(model.encode(images)[1], grid, size)
    pictures = {"features.png": {"input": to_rgb(images), "PCA of patches": colours}}
    if grid == tuple(model.grid):
        for name, columns in model.pictures(images, to_rgb).items():
            pictures[name] = pictures.get(name, {}) | columns
    for name, columns in pictures.items():
        save_picture(Path(folder, prefix + name), columns)
    return [prefix + name for name in pictures]


def save_picture(path, columns):
    """{title: images [n, C, H, W] in 0..1} -> a PNG with a row per image and the titles above."""
    tiles = []
    for images in columns.values():
        images = images.detach().float().cpu().clamp(0, 1)
        images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        images = F.interpolate(images, scale_factor=math.ceil(96 / min(images.shape[2:])))
        tiles.append(F.pad(images, (2, 2, 2, 2), value=1.0))
    sheet = torch.cat(tiles, 3).permute(0, 2, 3, 1).flatten(0, 1)  # [n * H, columns * W, 3]
    sheet = F.pad(sheet, (0, 0, 0, 0, 16, 0), value=1.0)
    picture = Image.fromarray((sheet * 255).round().byte().numpy())
    for i, title in enumerate(columns):
        ImageDraw.Draw(picture).text((4 + i * tiles[0].shape[3], 2), title, fill="black")
    with writing(path):
        picture.save(path)
