"""What the five methods share, and nothing that is any one method's own idea.

Four parts, in reading order:

  1. ViT        sizes, attention, blocks, patches, positions
  2. Masking    random masks, and moving tokens in and out of them
  3. Data       the `shapes` pictures, named sets, folders; crops; the order of a run
  4. Running    flags, processes, schedules, parameter groups, checkpoints, log, health, pictures

Shape letters, the same in every file: B images, C channels, N patches of an image, V visible, M masked, P = patch * patch * C
numbers of a patch, D encoder width, E decoder width, T tokens of any kind, Q queries, R registers, K clusters or proxies; gh and
gw, or G, patches along a side, d the width of a head.
"""

import argparse, atexit, contextlib, ctypes, dataclasses, datetime, difflib, functools, importlib.metadata, itertools
import json, math, multiprocessing, os, platform, shlex, shutil, signal, subprocess, sys, time, typing, warnings, zipfile, zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps  # torchvision brings it; itself it takes as long to import as torch, so only where it is used
from tqdm import tqdm

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor does anything here write to a picture


class BadInput(ValueError):
    """Something the user gave cannot work. `main` shows it as one line and exits with status 2."""


class BadHere(BadInput):
    """The same, found by one process alone, which therefore has to say it itself."""


@contextlib.contextmanager
def writing(what):
    """A full disk, a folder that is none: one line about `what`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise BadInput(f"{what}: cannot be written ({why})") from error


# ---------------------------------------------------------------------------------------------------------------
# 1. ViT
# ---------------------------------------------------------------------------------------------------------------

MODELS = {  # width D, depth, heads; nano is ours, for two CPU cores
    "nano": (96, 4, 3), "tiny": (192, 12, 3), "small": (384, 12, 6),
    "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16),
}
LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


def attend(q, k, v):
    """Softmax attention. q [B, heads, Q, d], k and v [B, heads, K, d] -> [B, heads, Q, d]."""
    # On a CPU the backward of the fused kernel is slow, in bf16 5 to 8 times slower than in fp32 (torch 2.15). Two plain
    # products win in bf16 until the Q x K matrix leaves the caches, in fp32 up to some 50 tokens.
    if q.device.type == "cpu" and q.shape[2] * k.shape[2] <= (512 * 512 if q.dtype is torch.bfloat16 else 50 * 50):
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Self-attention with one fused projection, rows in the order q, k, v. qkv_bias: True, False, or "qv" (none on k, as
    BEiT has it; timm's names)."""

    def __init__(self, dim, heads, qkv_bias=True):
        super().__init__()
        if dim % heads:
            raise BadInput(f"heads={heads} does not divide the width {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias is True)
        if qkv_bias == "qv":
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def project(self, x):  # [B, T, D] -> q, k, v, each [B, heads, T, d]
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]) if hasattr(self, "q_bias") else self.qkv.bias
        return F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, keys_only=0):  # [B, T, D] -> [B, T - keys_only, D]: the first ones are keys and values, no queries
        q, k, v = self.project(x)
        return self.proj(attend(q[:, :, keys_only:], k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, bias=True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    """Leaves a whole branch out for a random share of the images, and scales the rest up to keep the mean."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """Pre-norm transformer block under timm's names. `layer_scale` and `drop_path` exist only where they are on."""

    def __init__(self, dim, heads, qkv_bias=True, norm=LayerNorm, layer_scale=None, drop_path=0.0):
        super().__init__()
        scale = functools.partial(LayerScale, dim, layer_scale) if layer_scale is not None else nn.Identity
        drop = functools.partial(DropPath, drop_path) if drop_path else nn.Identity
        self.norm1, self.attn, self.ls1, self.drop_path1 = norm(dim), Attention(dim, heads, qkv_bias), scale(), drop()
        self.norm2, self.mlp, self.ls2, self.drop_path2 = norm(dim), Mlp(dim, 4 * dim), scale(), drop()

    def forward(self, x, keys_only=0):  # [B, T, D] -> [B, T - keys_only, D]
        x = x[:, keys_only:] + self.drop_path1(self.ls1(self.attn(self.norm1(x), keys_only)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """One linear map per patch [B, N, P]. Stored as a convolution, as in everyone's checkpoints; computed as the product
    that it is, which takes a third of the convolution's time on a CPU, and only for the patches that are needed."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, patches):  # [B, N, P] -> [B, N, D]
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


def check_decoder(dim, heads):
    """What the flags of a decoder cannot be, by their names."""
    if dim % heads or dim % 4:
        raise BadInput(f"--decoder-dim {dim} has to be a multiple of --decoder-heads {heads}, and of 4 for its positions")


def xavier_init(model):
    """Xavier uniform for every Linear and for the patch projection, seen as a matrix. Biases of Linears are zero; the
    bias of the patch projection stays as PyTorch draws it for a convolution, uniform in +-1/sqrt(fan_in)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def patchify(images, p):
    """[B, C, H, W] -> [B, N, P]: patches row by row, and in each one row, column, channel (channel fastest)."""
    x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, gh, p, gw, p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches, p, grid):
    """The inverse of `patchify`; grid is (rows, columns) of patches."""
    x = patches.unflatten(2, (p, p, -1)).unflatten(1, grid)  # [B, gh, gw, p, p, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def pair(size):
    """32, (32,) or (32, 48) -> (height, width)."""
    size = (size,) if isinstance(size, int) else tuple(size)
    return size * 2 if len(size) == 1 else size


def usual_patch(img_size):
    size = max(pair(img_size))
    return 4 if size < 48 else 8 if size < 160 else 16


def patch_grid(img_size, patch_size):
    """Rows and columns of patches."""
    (height, width), p = pair(img_size), patch_size
    if p < 1 or height % p or width % p:
        near = " ".join(str(max(1, round(n / max(p, 1))) * p) for n in (height, width))
        raise BadInput(f"--patch-size {p} does not divide --img-size {height} {width}; --img-size {near} would fit")
    return height // p, width // p


def sincos_2d(dim, rows, cols):
    """Fixed positions [1, gh * gw, dim] for the coordinates rows [gh] and cols [gw]: the first half of the channels
    encodes the column, the second the row, each as [sin(x w), cos(x w)] with w_i = 10000^(-i / (dim / 4))."""
    if dim % 4:
        raise BadInput(f"sin-cos positions need a width that 4 divides, not {dim}")
    w = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    wave = lambda x: torch.cat([(x.double()[:, None] * w).sin(), (x.double()[:, None] * w).cos()], 1)  # [gh or gw, dim / 2]
    col, row = wave(cols)[None].expand(len(rows), -1, -1), wave(rows)[:, None].expand(-1, len(cols), -1)  # [gh, gw, dim / 2]
    return torch.cat([col, row], 2).flatten(0, 1)[None].float()


def bicubic(x, size):
    """[B, C, H, W] -> [B, C, *size], bicubic with antialiasing."""
    there = x.cpu() if x.device.type == "mps" else x  # Apple's GPUs have it from torch 2.8 on only
    return F.interpolate(there, tuple(size), mode="bicubic", antialias=True).to(x.device)


def resize_positions(pos, old_grid, new_grid):
    """Position table [1, extra + N, D] for another grid: patches bicubic, the extra rows in front (CLS) as they are."""
    if tuple(old_grid) == tuple(new_grid):
        return pos
    extra = pos.shape[1] - old_grid[0] * old_grid[1]
    table = pos[:, extra:].transpose(1, 2).unflatten(2, old_grid)  # [1, D, gh, gw]
    return torch.cat([pos[:, :extra], bicubic(table, new_grid).flatten(2).transpose(1, 2)], 1)


def usual_heads(dim):
    """Heads of a released encoder, which its tensors do not tell: 64 channels each, in ViT-H 80."""
    return 16 if dim == 1280 else max(1, dim // 64)


def count_blocks(state, prefix):
    """How many blocks a state dict has under prefix.0, prefix.1, ..."""
    return len({name[len(prefix) + 1:].split(".")[0] for name in state if name.startswith(prefix + ".")})


def load_strictly(model, state, what, sizes=None, optional=()):
    """Load `state`, in which every name and every size must be right. The exception is a decoder or head of which the file
    carries no tensor: it stays as initialised, and a printed line names it. `optional` lists these parts, each as a tuple
    of prefixes, the first of which is its name. The model keeps the sizes that it was made with."""
    model.sizes, absent = sizes, []
    for part in optional:
        fresh = {name: t for name, t in model.state_dict().items() if name.startswith(part)}
        if fresh and not any(name.startswith(part) for name in state):
            state = state | fresh
            absent.append(part[0].rstrip("."))
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise BadInput(f"not {what} of these sizes: {' '.join(str(error).split())[:300]}") from error
    for name in absent:
        print(f"from_released: the file has an encoder but no {name}, which stays as initialised")
    return model


# ---------------------------------------------------------------------------------------------------------------
# 2. Masking. A mask is bool [B, N], True = masked, the same number in every row.
# ---------------------------------------------------------------------------------------------------------------

def random_mask(noise, num_masked):
    """noise [B, N], uniform -> bool [B, N] with exactly num_masked True in each row."""
    ids = noise.argsort(1)[:, :num_masked]
    return torch.zeros_like(noise, dtype=torch.bool).scatter_(1, ids, True)


def split_ids(is_masked, num_visible=None):
    """bool [B, N] -> ids_visible [B, V], ids_masked [B, M], each in ascending order. Every row must have V visible
    patches. Pass V on CUDA: counting it here would synchronise."""
    num_visible = num_visible or int((~is_masked[0]).sum())
    check_counts(is_masked, num_visible)
    ids = is_masked.byte().argsort(dim=1, stable=True)
    return ids[:, :num_visible], ids[:, num_visible:]


def check_counts(is_masked, num_visible):
    """Refuse a mask whose rows do not all have num_visible visible patches: `split_ids` would show hidden ones."""
    if torch.compiler.is_compiling() or is_masked.device.type not in ("cpu", "cuda"):
        return
    right = ((~is_masked).sum(1) == num_visible).all()
    if is_masked.device.type == "cuda":
        torch._assert_async(right, "the rows of the mask have unequal counts")  # does not synchronise
    elif not right:
        raise ValueError(f"the mask must leave {num_visible} patches visible in every row")


def gather(x, ids):
    """x [B or 1, N, D], ids [B, K] -> the tokens at those places [B, K, D]."""
    return x.expand(len(ids), -1, -1).gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def restore(x, ids):
    """Tokens x [B, N, D] that belong at places ids [B, N] -> back in image order."""
    return gather(x, ids.argsort(1))


# ---------------------------------------------------------------------------------------------------------------
# 3. Data
#
# Everything random is a function of (seed, place in the run): the place is the step and the row of the GLOBAL batch.
# So a run resumes exactly, every process draws other pictures, and two processes see what one would have seen.
# ---------------------------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def seed_of(*parts):
    """One 63-bit seed out of numbers and names: as many independent streams as there are different `parts`."""
    words = [len(parts), *(int.from_bytes(p.encode(), "little") if isinstance(p, str) else int(p) for p in parts)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw(shape, device, *parts):
    """Uniform numbers in [0, 1), a function of `parts` (and of the kind of device) alone."""
    return torch.rand(shape, generator=torch.Generator(device).manual_seed(seed_of(*parts)), device=device)


# -- shapes: a small world without a download -------------------------------------------------------------------

SHAPES = {  # kind: corners, inner radius, radius of the hole (-1: none), size, waves of the surface along and across
    "disc": (32, math.cos(math.pi / 32), -1, 0.80, 0, 0), "triangle": (3, 0.5, -1, 1.24, 2, 0),
    "square": (4, math.cos(math.pi / 4), -1, 1.00, 2, 2), "star": (5, 0.42, -1, 1.30, 1, 0),
    "ring": (32, math.cos(math.pi / 32), 0.55, 0.95, 0, 0), "spark": (4, 0.36, -1, 1.35, 1, 1),
}
SHAPES_TRAIN, SHAPES_VAL, MAX_OBJECTS = 16384, 4096, 10


def hashed(seed, index, count):
    """Uniform numbers [len(index), count], each a pure function of (seed, index, column): splitmix64."""
    with np.errstate(over="ignore"):
        z = np.asarray(index, np.uint64)[:, None] * np.uint64(1 << 20) + np.arange(count, dtype=np.uint64)
        z = (z + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / 2**24)


def render_shapes(seed, index, img_size, in_chans=3):
    """Pictures number `index` of the world `seed`: uint8 [n, C, H, W], labels {name: [n]}, kind map uint8 [n, H, W].

    3 to 10 objects stand on a floor before a wall. The nearest is large and in front; how large and how low in the
    picture an object is follows from its distance, and the nearer hides the farther. A kind is an outline with its
    surface; colours, turns, light and wall are anything. Labels: kind of the nearest object (6 classes), how many
    there are (8: 3..10), distance of the nearest (6). In the map, 0 is background and 1 + kind an object."""
    (height, width), K, n = pair(img_size), MAX_OBJECTS, len(index)
    short = min(height, width)
    rand = lambda name, *shape: hashed(seed_of("shapes", name, seed), index, math.prod(shape)).view(n, *shape)
    over = lambda t: t[..., None, None]  # all pixels

    # Wall and floor: two colours mixed by three plane waves, the floor a little darker.
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    angle, octave, phase, amount = over(rand("waves", 4, 3)).unbind(1)  # each [n, 3, 1, 1]
    angle, freq = math.pi * angle, 2 * math.pi * 2 ** (1.5 * octave)
    waves = amount * (freq * (x * angle.cos() + y * angle.sin()) + 2 * math.pi * phase).sin()  # [n, 3, H, W]
    texture = (0.5 + 0.35 * waves.sum(1, keepdim=True)).clamp(0, 1)
    one, two = over(rand("wall", 2, in_chans)).unbind(1)  # [n, C, 1, 1]
    canvas = one * texture + two * (1 - texture)  # [n, C, H, W]
    horizon = over(0.25 + 0.15 * rand("horizon", 1))
    canvas = canvas * (1 - 0.35 * ((y - horizon) * 8).clamp(0, 1))

    # Objects, from far to near. The distance of the nearest is a label, 0..6; all others stand well behind it.
    count = (8 * rand("count")).long()  # 0..7 stands for 3..10 objects
    nearest = 6 * rand("nearest")
    others = (9 + 3 * rand("depth", K - 1)).masked_fill(torch.arange(K - 1) >= count[:, None] + 2, torch.inf)
    depth = torch.cat([others.sort(1, descending=True).values, nearest[:, None]], 1)
    near = 1 / (1 + torch.tensor([0.45] * (K - 1) + [0.11]) * depth)  # perspective; 0 for an object that is not there
    kind, tint = (len(SHAPES) * rand("kind", K)).long(), 0.1 + 0.9 * rand("tint", K, in_chans)
    corners, inner, hole, size, along, across = torch.tensor(list(SHAPES.values()))[kind].unbind(2)  # each [n, K]
    radius = 0.44 * short * size * near
    centre_x = width * (0.25 + 0.5 * rand("x", K))
    centre_y = height * (0.15 + (0.5 + 0.3 * (rand("y", K) - 0.5)) * near)
    turn, light = 2 * math.pi * rand("turn", K), over(2 * math.pi * rand("light"))
    kind_map = torch.zeros(n, height, width, dtype=torch.uint8)
    for k in range(K):  # one object of every picture at once
        dx, dy = x * width - over(centre_x[:, k]), y * height - over(centre_y[:, k])  # [n, H, W]
        r, dist, theta = over(radius[:, k]), torch.hypot(dx, dy), torch.atan2(dy, dx) + over(turn[:, k])
        beta, c = over(math.pi / corners[:, k]), over(inner[:, k])
        fold = beta - (theta.remainder(2 * beta) - beta).abs()  # the angle from the nearest tip, 0..beta
        outline = c * beta.sin() / (c * beta.sin() * fold.cos() + (1 - c * beta.cos()) * fold.sin())
        cover = (outline * r - dist + 0.5).clamp(0, 1) * (dist - over(hole[:, k]) * r + 0.5).clamp(0, 1)
        cover = cover * over(near[:, k] > 0)  # with soft edges
        u, v = 9 * math.pi / short * dist * theta.cos(), 9 * math.pi / short * dist * theta.sin()
        fu, fv = over(along[:, k]), over(across[:, k])
        surface = (fu > 0) * (4 * (fu * u + 0.5).cos() * (fv * v + 0.5 * (fv > 0)).cos()).clamp(-1, 1)  # 0 where plain
        shade = (0.75 + 0.3 * (dx * light.cos() + dy * light.sin()) / r.clamp(min=1e-3)) * (0.85 + 0.65 * surface)
        canvas += (over(tint[:, k]) * shade[:, None] - canvas) * cover[:, None]
        kind_map = torch.where(cover > 0.5, over(kind[:, k] + 1).byte(), kind_map)
    labels = {"kind": kind[:, -1], "count": count, "distance": nearest.long()}
    return (canvas * 255).round().clamp(0, 255).byte(), labels, kind_map


# -- sets: all in memory, or files --------------------------------------------------------------------------------

@dataclasses.dataclass
class Pixels:
    """A set of small images, decoded, in one tensor."""
    images: torch.Tensor  # uint8 [n, C, H, W]
    labels: dict  # name: [n]; empty where there are none
    maps: torch.Tensor = None  # uint8 [n, H, W], a class per pixel
    margin = 1.0  # the evaluation crop's share of the shorter side

    def __len__(self):
        return len(self.images)

    @property
    def labelled(self):
        return bool(self.labels)


class Folder:
    """A set of image files that are read when they are needed."""
    margin = 0.875  # 224 out of 256, as everyone's evaluation has it

    def __init__(self, paths, labels, chans):
        self.paths = np.array([os.fsencode(p) for p in paths])  # one block of bytes: workers share it, lists they copy
        self.labels, self.labelled, self.chans = torch.tensor(labels), labels[0] >= 0, chans

    def __len__(self):
        return len(self.paths)

    def name(self, i):
        return os.fsdecode(self.paths[i])

    def read(self, i):  # -> a picture, label
        return open_image(self.name(i)), int(self.labels[i])


class Named:
    """One of torchvision's sets of larger images, behind the same three methods."""
    margin, labelled = 0.875, True

    def __init__(self, name, data, chans):
        self.title, self.data, self.chans = name, data, chans

    def __len__(self):
        return len(self.data)

    def name(self, i):
        return f"{self.title}, image {i}"

    def read(self, i):
        image, label = self.data[i]
        return image, int(label)


NAMED = {  # name: (torchvision's class, options of the training set, of the test set, small enough to be held decoded)
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}, True),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}, True),
    "mnist": ("MNIST", {"train": True}, {"train": False}, True),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": False}, True),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}, True),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}, True),
    "imagenette": ("Imagenette", {"split": "train", "size": "320px"}, {"split": "val", "size": "320px"}, False),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}, False),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}, False),
    "clevr_count": ("CLEVRClassification", {"split": "train"}, {"split": "val"}, False),
    "oxford_pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}, False),
}
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".npy")
READ_ERRORS = (Exception,)  # on a file that is no image decoders raise anything: EOFError, MemoryError, BadZipFile, struct.error


def load_data(cfg, run):
    """cfg.data -> (training set, validation set or None)."""
    name, _, many = cfg.data.partition(":")
    if name == "shapes":
        if many and not many.isdigit() or many == "0":
            raise BadInput(f"--data {cfg.data}: after `shapes:` comes a number of pictures")
        sizes = (int(many), max(1, int(many) // 4)) if many else (SHAPES_TRAIN, SHAPES_VAL)
        return tuple(shapes_set(cfg, start, n, run) for start, n in zip((0, 1 << 40), sizes))
    if cfg.data in NAMED:
        return tuple(named_set(cfg, options, run) for options in NAMED[cfg.data][1:3])
    return folder_sets(cfg, run)


def shapes_set(cfg, start, n, run):
    # 32 pictures at a time stay in the processor's cache, which makes the drawing three times faster.
    parts = [render_shapes(cfg.seed, range(start + i, start + min(i + 32, n)), cfg.img_size, cfg.in_chans)
             for i in tqdm(range(0, n, 32), "drawing shapes", leave=False, disable=not run.main or n < 4096)]
    images, labels, maps = zip(*parts)
    labels = {k: torch.cat([part[k] for part in labels]) for k in labels[0]}
    return Pixels(torch.cat(images), labels, torch.cat(maps))


def fetch(name, options, cfg, run):
    """One of torchvision's sets; downloaded by the first process of a machine, if need be."""
    import torchvision.datasets
    kind = getattr(torchvision.datasets, name)
    for turn in (True, False):  # the first process of each machine, then the others
        if turn == (run.local_rank == 0):
            try:
                data = kind(cfg.data_root, download=False, **options)
            except ImportError as error:
                raise BadInput(f"--data {cfg.data}: torchvision reads it with {error.name}, which is not installed") from error
            except (RuntimeError, OSError):
                try:
                    data = kind(cfg.data_root, download=True, **options)
                except Exception as error:
                    raise BadInput(f"--data {cfg.data}: not under --data-root {cfg.data_root}, and the download "
                                   f"failed ({' '.join(str(error).split())[:200]})") from error
        run.barrier()
    return data


def named_set(cfg, options, run):
    kind, *_, small = NAMED[cfg.data]
    data = Named(cfg.data, fetch(kind, options, cfg, run), cfg.in_chans)
    if not small:
        return data
    try:
        rows = map(data.read, tqdm(range(len(data)), f"reading {cfg.data}", leave=False, disable=not run.main))
        images, labels = zip(*[(cut(picture, cfg.in_chans), label) for picture, label in rows])
    except ValueError as error:
        raise BadInput(f"--data {cfg.data}: {error}") from error
    return Pixels(torch.stack(images), {"class": torch.tensor(labels)})


def folder_sets(cfg, run):
    """Any folder of images: nested or flat; `train/` and `val/` inside are used as such, unless `train` is a class among
    others; folders of the first level are classes. The training set holds every training image. The
    validation set is None if there are no labels or no `val/` with class folders."""
    root = Path(cfg.data)
    if not cfg.data or not root.is_dir():
        close = difflib.get_close_matches(cfg.data, ["shapes", *NAMED], 1)
        raise BadInput(f"--data {cfg.data}: no such folder" + (f"; did you mean {close[0]}?" if close else
                       f", and not one of: shapes {' '.join(NAMED)}"))
    others = [d for d in root.iterdir() if d.is_dir() and d.name != "train" and not d.name.startswith(".")]
    split = (root / "train").is_dir() and (any(d.name in ("val", "valid", "validation", "test") for d in others)
                                           or not any(find_images(d) for d in others))  # else it is one class of several
    train_root, val_root = (root / "train", root / "val") if split else (root, root)
    if Path(cfg.out).resolve() == train_root.resolve():
        raise BadInput(f"--out {cfg.out}: is where the images are, and the run's pictures would be among them")
    paths = find_images(train_root, cfg.in_chans)
    if not paths:
        raise BadInput(f"--data {cfg.data}: no image in it (looked for {' '.join(EXTENSIONS)})")
    top = lambda path, base: path.parts[len(base.parts)] if len(path.parts) > len(base.parts) + 1 else None
    classes = {top(p, train_root) for p in paths}
    labelled = len(classes) > 1 and None not in classes
    val_paths = find_images(val_root, cfg.in_chans) if split and labelled else []
    unknown = {top(p, val_root) for p in val_paths} - classes
    if None in unknown:  # ImageNet's validation archive unpacks into one flat folder
        run.say(f"warning: {val_root} has images in no class folder, so it is not used")
        val_paths = []
    elif unknown:
        raise BadInput(f"--data {cfg.data}: val/ has classes that train/ has not: "
                       + " ".join(sorted(unknown)[:5]))
    names = b"\n".join(os.fsencode(p.relative_to(train_root)) for p in paths)
    run.images = f"{len(paths)} images, names {zlib.crc32(names):08x}"
    number = {name: i for i, name in enumerate(sorted(classes))} if labelled else {}
    labels = [number[top(p, train_root)] if labelled else -1 for p in paths]
    train_set, val_set = Folder(paths, labels, cfg.in_chans), None
    if val_paths:
        val_set = Folder(val_paths, [number[top(p, val_root)] for p in val_paths], cfg.in_chans)
    use = f"{len(classes)} classes from its folders"
    if not labelled:
        use = "no labels (no class folders), so no k-NN"
    elif val_set:
        use += f", {len(val_set)} images for k-NN"
    elif len(split_tenth(train_set)[1]):
        use += ("; no labelled val/: the k-NN test asks about every tenth training image, with the "
                "other images as its gallery; pre-training uses all images")
    else:
        use += "; no labelled val/ and too few images for k-NN"
    run.say(f"data: {len(paths)} images in {train_root}, {use}")
    return train_set, val_set


def split_tenth(data):
    """Split a training set for a test that has no test set: ids of the gallery, ids of the queries.
    Every tenth image is a query, unless it is the only one of its class: no gallery could answer."""
    is_query = torch.arange(len(data)) % 10 == 9
    if isinstance(data, Folder) and data.labelled:
        is_query &= data.labels.bincount()[data.labels] > 1
    return (~is_query).nonzero()[:, 0], is_query.nonzero()[:, 0]


def find_images(root, chans=5):
    """All image files below root, sorted; hidden ones are left out, and what runs have left; a folder that links to its parent
    ends. Up to four channels an array is an image only where there are no others: photographs have arrays beside them."""
    found, visited = [], set()
    for folder, inside, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited or "log.jsonl" in names:
            inside[:] = []
            continue
        visited.add(real)
        inside[:] = sorted(d for d in inside if not d.startswith("."))
        found += [Path(folder, n) for n in names if n.lower().endswith(EXTENSIONS) and not n.startswith(".")]
    pictures = [path for path in found if path.suffix.lower() != ".npy"]
    return sorted(pictures if pictures and chans <= 4 else found)


def size_of(picture):  # -> height, width
    return tuple(picture.shape[1:]) if torch.is_tensor(picture) else picture.size[::-1]


def cut(picture, chans, box=None):
    """A picture, decoded but still PIL's, or uint8 [c, H, W] -> the box (top, left, height, width) of it, uint8 [chans, h, w].
    What lies outside is never copied, which is half of a training crop's photograph."""
    top, left, h, w = box or (0, 0, *size_of(picture))
    if torch.is_tensor(picture):
        return match_channels(picture[:, top:top + h, left:left + w], chans)
    picture = picture.crop((left, top, left + w, top + h)) if box else picture
    picture = picture if picture.mode in ("RGB", "L", "RGBA") else picture.convert("RGB")
    pixels = torch.from_numpy(np.frombuffer(picture.tobytes(), np.uint8))  # to be read only; np.asarray takes half as long again
    return match_channels(pixels.unflatten(0, (h, w, -1)).permute(2, 0, 1), chans)


def resize(image, size):
    """uint8 [c, h, w] -> [c, *size], bicubic with antialiasing: PIL's result, in a fraction of its time."""
    # Channels last, as PIL has them, torch has a faster way, taken only where the batch of one has the stride it would have.
    image = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return bicubic(image, size)[0]


def match_channels(image, chans):
    """uint8 [c, H, W] -> [chans, H, W]: grey is repeated, colour averaged to grey, alpha dropped or added."""
    have = len(image)
    if have == chans:
        return image
    if have in (2, 4):  # the last one is alpha
        return match_channels(image[:-1], chans)
    if chans == 1 and have == 3:
        return (image * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True).byte()
    if have == 1 and chans <= 4:
        return match_channels(image.expand(min(chans, 3), -1, -1), chans)
    if have == 3 and chans == 4:
        return torch.cat([image, torch.full_like(image[:1], 255)])
    raise ValueError(f"the image has {have} channels, --in-chans is {chans}")


def open_image(path):
    """One image file, decoded: PIL's picture of it; uint8 [c, H, W] where that has more than 8 bits, or the file is a .npy,
    uint8 [H, W, C], which is how more than four channels come."""
    if path.lower().endswith(".npy"):
        array = np.load(path, allow_pickle=False)
        if getattr(array, "dtype", None) != np.uint8 or array.ndim not in (2, 3) or not array.size:
            raise ValueError(f"a .npy image is uint8 [H, W, C], not {getattr(array, 'dtype', 'an archive')}, "
                             f"{list(getattr(array, 'shape', []))}")
        image = torch.from_numpy(array)
        return image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    with Image.open(path) as image:  # of an animation the first picture
        image.load()  # before the file is closed; not every Pillow's exif_transpose does it
        with contextlib.suppress(Exception):  # it turns first, then writes the EXIF anew: an odd entry there does not matter
            ImageOps.exif_transpose(image, in_place=True)  # as it was held, not as the sensor lay
        if image.mode[0] in "IF":  # 16 bits or more: convert would cut at 255
            array = np.asarray(image, np.float32)
            top = 65535 if image.mode.startswith("I") else array.max()
            return torch.from_numpy(array / max(top, 1e-12) * 255).clamp(0, 255).byte()[None]
        return image


def read_image(path, chans):
    """One image file as uint8 [chans, H, W]."""
    return cut(open_image(path), chans)


# -- crops ----------------------------------------------------------------------------------------------------------

def crop_noise(cfg, step, rows, device="cpu"):
    """What decides the crops of some rows of a step's global batch: uniform numbers [m, 41]."""
    return draw((cfg.batch_size, 41), device, "crop", cfg.seed, step)[rows]


def crop_box(u, height, width, scale):
    """Random resized crop of one image. u, 41 uniform numbers; scale, (least, most) share of the area -> (top, left, height,
    width), flip. torchvision's rule: of ten tries (area even, aspect ratio log-even in [3/4, 4/3]) the first that fits,
    else the largest central crop of an allowed aspect ratio."""
    for area, aspect, y, x in zip(u[:10], u[10:20], u[20:30], u[30:40]):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = 3 / 4 * (16 / 9) ** aspect
        h, w = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if 1 <= h <= height and 1 <= w <= width:
            return (int((height - h + 1) * y), int((width - w + 1) * x), h, w), u[40] < 0.5
    return central_crop(height, width), u[40] < 0.5


def central_crop(height, width):
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_boxes(u, height, width, scale):
    """`crop_box` of many images of one size, on their device: u [n, 41] -> boxes [n, 4], flips [n]."""
    area, aspect, y, x = u[:, :40].unflatten(1, (4, 10)).unbind(1)  # each [n, 10]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = 3 / 4 * (16 / 9) ** aspect
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (h >= 1) & (w >= 1) & (h <= height) & (w <= width)
    tries = torch.stack([((height - h + 1) * y).floor(), ((width - w + 1) * x).floor(), h, w], 2)  # [n, 10, 4]
    first = tries.gather(1, fits.byte().argmax(1)[:, None, None].expand(-1, 1, 4))[:, 0]
    central = torch.stack([u.new_full((len(u),), n) for n in central_crop(height, width)], 1)
    return torch.where(fits.any(1, keepdim=True), first, central), u[:, 40] < 0.5


def resample_matrix(start, length, n_in, n_out):
    """Bicubic resampling with antialiasing of a stretch [start, start + length) of n_in pixels to n_out pixels, as one
    matrix per image [B, n_out, n_in]. The same weights as PIL's and torchvision's."""
    start, step = start[:, None, None], (length / n_out)[:, None, None]  # step: input pixels per output pixel
    at = torch.arange(n_in, device=start.device) + 0.5
    centre = start + (torch.arange(n_out, device=start.device)[:, None] + 0.5) * step
    x = ((at - centre) / step.clamp(min=1)).abs_().clamp_(max=2)  # the kernel is 0 from 2 on
    x.masked_fill_((at < start) | (at > start + length[:, None, None]), 2)
    weight = torch.where(x < 1, (1.5 * x - 2.5).mul_(x).mul_(x).add_(1), (2.5 - 0.5 * x).mul_(x).sub_(4).mul_(x).add_(2))
    return weight / weight.sum(-1, keepdim=True)


@functools.lru_cache(4)
def resample_table(n_in, n_out, device):
    """The matrices of all stretches of a small image, to look up instead of computing: row start * n_in + length - 1."""
    start = torch.arange(n_in, dtype=torch.float32, device=device)
    return resample_matrix(start.repeat_interleave(n_in), (start + 1).repeat(n_in), n_in, n_out)


def crop_resize(images, boxes, flips, size):
    """Every image's own box, resized and maybe flipped: uint8 [B, C, H, W] -> float [B, C, *size] in 0..255. A crop, a
    resize and a flip along an axis are one small matrix, so that the batch is two products and no loop."""
    top, left, h, w = boxes.unbind(1)
    rows, cols = (resample_table(n_in, n_out, images.device)[(start * n_in + length - 1).long()]
                  if n_in <= 48 and n_out <= 48 else resample_matrix(start, length, n_in, n_out)
                  for start, length, n_in, n_out in ((top, h, images.shape[2], size[0]), (left, w, images.shape[3], size[1])))
    cols = torch.where(flips[:, None, None], cols.flip(1), cols)
    x = images.transpose(1, 2).contiguous().float().flatten(1, 2)  # [B, H * C, W]; so both products are one per image
    x = torch.bmm(rows, torch.bmm(x, cols.mT).unflatten(1, (images.shape[2], -1)).flatten(2))  # [B, h, C * w]
    return x.unflatten(2, (images.shape[1], -1)).transpose(1, 2).clamp_(0, 255)


def centre_box(height, width, size, margin):
    """The largest central box of the wanted aspect ratio, times margin: top, left, height, width."""
    side = min(height / size[0], width / size[1]) * margin
    h, w = max(1, round(size[0] * side)), max(1, round(size[1] * side))
    return (height - h) // 2, (width - w) // 2, h, w


# -- the stream of a run --------------------------------------------------------------------------------------------

class Order:
    """Which image stands at a place of the run: epoch after epoch, each its own permutation. Nothing is dropped at an
    epoch's end, and a set smaller than a batch is simply seen more than once in it."""

    def __init__(self, n, seed):
        self.n, self.permutation = n, functools.lru_cache(2)(
            lambda epoch: torch.randperm(n, generator=torch.Generator().manual_seed(seed_of("order", seed, epoch))))

    def __call__(self, step, batch, rows):
        place = torch.arange(step * batch + rows.start, step * batch + rows.stop)
        epochs = place // self.n
        return torch.cat([self.permutation(e)[place[epochs == e] % self.n] for e in epochs.unique().tolist()])


class Crops(torch.utils.data.Dataset):
    """What a worker process does: read, crop and resize the images of a batch, on uint8. An image that cannot be read is
    replaced by the next that can, and reported."""

    def __init__(self, data, size, scale, cfg):
        self.data, self.size, self.scale, self.cfg = data, tuple(size), scale, cfg

    def crop(self, index, u, broken):  # -> uint8 [C, *size], label; None when too many are broken
        for i in range(index, index + len(self.data) // 100 + 2):  # when all of these are, the run stops anyway
            i %= len(self.data)
            try:
                picture, label = self.data.read(i)
                box, flip = crop_box(u, *size_of(picture), self.scale) if u else \
                    (centre_box(*size_of(picture), self.size, self.data.margin), False)
                image = resize(cut(picture, self.data.chans, box), self.size)
                return image.flip(2) if flip else image, label
            except READ_ERRORS as error:
                why = f"{type(error).__name__}: {error}".replace(self.data.name(i), "it")
                broken.append((i, why[:120]))

    def __getitems__(self, item):
        """(indices, (step, rows) or None for central crops) -> uint8 [m, C, *size] with channels last in memory, labels [m],
        [(index, why)] of the broken."""
        ids, place = item
        noise = crop_noise(self.cfg, *place).tolist() if place else [None] * len(ids)
        broken = []
        images, labels = zip(*[self.crop(i, u, broken) or (None, None) for i, u in zip(ids, noise)])
        if None in labels:
            return None, None, broken
        return torch.stack([x.permute(1, 2, 0) for x in images]).permute(0, 3, 1, 2), torch.tensor(labels), broken


def train_batches(cfg, run, data, scale, start, total, size=None, labelled=False):
    """The training stream: one micro-batch [m, C, H, W], normalised, on the device, for every micro-step of the steps
    start..total-1. `scale` is the crop's least and most share of the area, `size` its height and width if not img_size;
    labelled: in pairs with the labels [m], the first kind where there are several."""
    size, order = size or pair(cfg.img_size), Order(len(data), cfg.seed)
    run.training = True
    places = ((step, run.rows(cfg, micro)) for step in range(start, total) for micro in range(cfg.accum))
    if isinstance(data, Pixels):
        images = data.images
        if run.device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 4:
            images = images.to(run.device)
        ahead = max(1, 2**20 // (cfg.batch_size * math.prod(size)))  # small crops: a few steps' at once, which is cheaper
        while some := list(itertools.islice(places, ahead)):
            ids = torch.cat([order(step, cfg.batch_size, rows) for step, rows in some])
            noise = torch.cat([crop_noise(cfg, step, rows, run.device) for step, rows in some])
            picked = to_device(images[to_device(ids, images.device)], run.device)
            crops = normalise(crop_resize(picked, *crop_boxes(noise, *images.shape[2:], scale), size), cfg)
            crops = crops.chunk(len(some))
            yield from zip(crops, next(iter(data.labels.values()))[ids].chunk(len(some))) if labelled else crops
    else:
        items = ((order(step, cfg.batch_size, rows).tolist(), (step, rows)) for step, rows in places)
        for images, labels, broken in read_batches(Crops(data, size, scale, cfg), items, cfg, run):
            run.report_broken(data, broken)
            images = normalise(images.to(run.device, non_blocking=True).float(), cfg)
            yield (images, labels) if labelled else images


def eval_batches(cfg, run, data, ids):
    """Whole pictures, centre-cropped: yields images [m, C, H, W] as `train_batches` does, and labels {name: [m]}."""
    if isinstance(data, Pixels):
        top, left, h, w = centre_box(*data.images.shape[2:], pair(cfg.img_size), data.margin)
        for some in ids.split(256):
            images = data.images[some, :, top:top + h, left:left + w].float()
            images = bicubic(images, pair(cfg.img_size)).clamp_(0, 255).to(run.device)
            yield normalise(images, cfg), {name: y[some] for name, y in data.labels.items()}
    else:
        items = ((some.tolist(), None) for some in ids.split(256))
        for images, labels, broken in read_batches(Crops(data, pair(cfg.img_size), None, cfg), items, cfg, run):
            run.report_broken(data, broken)
            yield normalise(images.to(run.device).float(), cfg), {"class": labels} if data.labelled else {}


def read_batches(crops, items, cfg, run):
    """Images decoded by worker processes, a batch per item, in the order of the items."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # what we were given
    cores, on_cpu = max(1, cores // run.local_world), run.device.type == "cpu"
    workers = cfg.workers if cfg.workers >= 0 else max(1, min(8, cores // (4 if on_cpu else 1)))
    if on_cpu and workers:  # threads that spin for cores which the workers hold would slow a step down tenfold
        torch.set_num_threads(min(torch.get_num_threads(), max(1, cores - workers)))
    loader = torch.utils.data.DataLoader(crops, batch_sampler=items, num_workers=workers, collate_fn=tuple,
                                         worker_init_fn=worker_signals, pin_memory=run.device.type == "cuda",
                                         prefetch_factor=4 if workers else None)
    batches = iter(loader)
    atexit.unregister(end_workers)
    atexit.register(end_workers)  # again, so that it comes before what this loader leaves to the end
    return batches


def normalise(images, cfg):
    """float 0..255 [B, C, H, W] -> (x / 255 - mean) / std per channel, in place."""
    shift = per_channel(tuple(-mean / std for mean, std in zip(cfg.mean, cfg.std)), images.device)
    scale = per_channel(tuple(1 / (255 * std) for std in cfg.std), images.device)
    if images.is_contiguous(memory_format=torch.channels_last):  # three numbers at a time would take five times as long as a row
        rows, width = images.permute(0, 2, 3, 1).flatten(2), images.shape[3]  # [B, H, W * C]
        torch.addcmul(shift.flatten().repeat(width), rows, scale.flatten().repeat(width), out=rows)
    else:
        images.mul_(scale).add_(shift)
    return images


def denormalise(images, cfg):
    """The inverse, in 0..1, for pictures."""
    return (images * per_channel(cfg.std, images.device) + per_channel(cfg.mean, images.device)).clamp(0, 1)


@functools.lru_cache(16)  # a fresh copy to a GPU would synchronise in every step
def per_channel(values, device):
    return torch.tensor(values, device=device).view(-1, 1, 1)


def to_device(x, device):
    """Without waiting for it, where the device can."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.device.type == "cpu" else x.to(device)


# ---------------------------------------------------------------------------------------------------------------
# 4. Running
# ---------------------------------------------------------------------------------------------------------------

# -- flags: a field of a method's Config is the flag, the log's header and the checkpoint's record ----------------

SHARED = {  # the flags that all five methods have: group, help, choices
    "data": ("data", "shapes (drawn here), shapes:N (N pictures), a folder of images, or one of " + " ".join(NAMED)),
    "data_root": ("data", "where torchvision's sets lie or are downloaded to"),
    "img_size": ("data", "side of the image, or height and width"),
    "in_chans": ("data", "channels; above 4 a folder holds .npy files, uint8 [H, W, C]"),
    "mean": ("data", "per channel, of 0..1; default ImageNet's for 3 channels, else 0.5"),
    "std": ("data", "per channel; default ImageNet's for 3 channels, else 0.25"),
    "crop_scale": ("data", "least and most share of the image in a training crop"),
    "workers": ("data", "processes that decode images, for folders; -1 chooses, 0 is none"),
    "model": ("model", "size of the encoder", tuple(MODELS)),
    "patch_size": ("model", "side of a patch; 0 chooses by image: 4 below 48 pixels, 8 below 160, else 16"),
    "batch_size": ("training", "global batch, whatever the number of processes and --accum"),
    "accum": ("training", "micro-batches per step, to save memory"),
    "epochs": ("training", "passes over the training set"),
    "warmup_epochs": ("training", "passes until the rate has risen to its peak"),
    "base_lr": ("training", "rate per 256 images: the rate used is base_lr * batch_size / 256"),
    "betas": ("training", "AdamW's averaging of gradients and of their squares"),
    "weight_decay": ("training", "AdamW's decay of matrices; a method's file says what else has some, or none"),
    "clip_grad": ("training", "largest gradient norm; 0 is no limit"),
    "seed": ("training", "all randomness follows from it"),
    "device": ("run", "where to compute", ("auto", "cpu", "cuda", "mps")),
    "amp": ("run", "precision of products; auto: bf16 where the device is fast at it, else off", ("auto", "bf16", "fp16", "off")),
    "compile": ("run", "torch.compile; auto: for long runs, of 5,000 steps on CUDA, of an hour on a CPU", ("auto", "on", "off")),
    "out": ("run", "folder for last.pt, log.jsonl and pictures"),
    "resume": ("run", "auto goes on from OUT/last.pt where there is one; no starts over; or a checkpoint to go on from until "
               "OUT has its own"),
    "save_every": ("run", "epochs between checkpoints"),
    "eval_every": ("run", "epochs between k-NN tests and pictures; 0: only before and after training"),
    "log_every": ("run", "steps between log lines"),
}
CHANGEABLE = {"epochs", "accum", "workers", "device", "amp", "compile", "data_root", "out", "resume", "save_every",
              "eval_every", "log_every"}  # what a resumed run may have otherwise: its length and how it is run


LEAST = {"in_chans": 1, "batch_size": 1, "accum": 1, "log_every": 1, "save_every": 1, "eval_every": 0, "epochs": 1,
         "warmup_epochs": 0, "base_lr": 0, "weight_decay": 0, "clip_grad": 0, "workers": -1, "patch_size": 0, "seed": 0}


def flag(default, help, choices=None, least=None, most=math.inf, positional=False, changeable=False):
    """A program's own Config field: help, least and greatest value, and whether a resumed run may have it otherwise."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most,
                                                        "positional": positional, "changeable": changeable})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def parse_args(Config, doc="", argv=None):
    """The dataclass as flags: --dashes-for-underscores, --no-x for a switch, several values for a tuple."""
    parser = Parser(description=doc.strip().split("\n\n")[0], allow_abbrev=False,
                    formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=110),
                    epilog="exit status: 0 done, 1 not finite, 2 bad input, 128 + n stopped by signal n (saved)")
    types = typing.get_type_hints(Config)
    groups = {name: parser.add_argument_group(title) for name, title in {
        "own": "the method" if "model" in types else "what to do", "model": "model", "data": "data", "training": "training",
        "run": "run"}.items()}
    for field in dataclasses.fields(Config):
        group, text, choices = (*SHARED[field.name], None)[:3] if not field.metadata else \
            ("own", field.metadata["help"], field.metadata["choices"])
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        options = {"default": field.default, "help": f"{text} [{shown}]" if shown != "" else text}
        if types[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(types[field.name]) is tuple:
            options |= {"nargs": "+", "type": typing.get_args(types[field.name])[0], "metavar": "X", "choices": choices}
        else:
            options |= {"type": types[field.name], "choices": choices} | ({} if choices else {"metavar": "X"})
        if field.metadata.get("positional"):
            parser.add_argument(field.name, help=text)
        else:
            groups[group].add_argument("--" + field.name.replace("_", "-"), **options)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [s for action in parser._actions for s in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        raise BadInput(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else "; see --help"))
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(values).items()})


def main(train, Config, doc):
    """What every method file runs: flags in, status out; what the user got wrong is one line."""
    try:
        status = train(parse_args(Config, doc))
        if dist.is_initialized():
            dist.barrier()  # whoever leaves first would have torchrun end the others, in the middle of a word
    except BadInput as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, BadHere):  # once on each machine
            tqdm.write(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)  # on a line of its own, below the bar
        status = 2
    except RuntimeError as error:
        if not (dist.is_initialized() and "onnection" in str(error)):
            raise
        tqdm.write(f"{Path(sys.argv[0]).name}: process {dist.get_rank()} has lost the others, which may have said why "
                   f"({' '.join(str(error).split())[:200]})", file=sys.stderr)
        status = 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(status)


# -- processes ------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Run:
    """Where and how this process computes."""
    device: torch.device
    amp: torch.dtype  # None: float32 throughout
    compile: bool
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    training: bool = False  # the first batch has been asked for
    signal: int = 0  # the number of a signal that asked for the end
    images: str = ""  # of a folder: how many and which, for a checkpoint to know them again
    lines: int = 0  # of the log, so far
    warned: set = dataclasses.field(default_factory=set)  # what has been warned of; once is enough
    broken: dict = dataclasses.field(default_factory=dict)  # images of a set that could not be read: index, name

    @property
    def main(self):
        return self.rank == 0

    def say(self, text, file=None):
        if self.main:
            tqdm.write(text, file=file or sys.stdout)
            (file or sys.stdout).flush()

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def rows(self, cfg, micro):
        """The rows of the global batch that this process holds in a micro-step."""
        size = cfg.batch_size // cfg.accum // self.world
        start = (micro * self.world + self.rank) * size
        return slice(start, start + size)

    def autocast(self):
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)

    def average(self, values):
        """A vector averaged over the processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    @property
    def asked_to_stop(self):
        """Between log lines only a process that is alone may stop: the others would wait for it for ever."""
        return self.signal and self.world == 1

    def stumbled(self, grad_norm):
        """Not finite: seen at once on a CPU, where looking is free; a GPU would have to be waited for, and is looked at with
        the log. The gradient is everyone's, so all processes see the same."""
        return self.device.type == "cpu" and not math.isfinite(grad_norm)

    def describe(self, cfg, model, total, peak_lr):
        """What the run really uses. --compile auto is decided here, by what was measured: on a CPU compiling takes a minute or
        two and saves 7 % (MAE, bf16, two cores) and more; on an H100 40 s (nano) to 200 s (ViT-L) and saves a quarter (ViT-B)."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if cfg.compile == "auto" and self.device.type == "cpu":  # what a thread of an EPYC does in an hour, with nano
            hour = torch.get_num_threads() * (2e14 if self.amp is torch.bfloat16 else 5e13)
            self.compile &= 2 * trained * model.num_patches * total * cfg.batch_size / self.world > hour
        elif cfg.compile == "auto":
            self.compile &= total >= 5000
        self.say(f"{cfg.model}: {trained / 1e6:.2f} M trained parameters, {device_name(self.device)}, "
                 f"{'float32' if self.amp is None else str(self.amp)[6:]}{', compiled' * self.compile}\n"
                 f"batch: {cfg.batch_size} = {self.world} processes x {cfg.accum} micro-batches x "
                 f"{cfg.batch_size // self.world // cfg.accum}; {total} steps, {total * cfg.batch_size} images; "
                 f"base lr {cfg.base_lr:g}, lr {peak_lr:g}")
        if cfg.warmup_epochs and (cfg.warmup_epochs >= cfg.epochs or total == 1):
            self.warn("warm-up", f"as long as the run ({total} steps): more --epochs, fewer --warmup-epochs or a smaller "
                      "--batch-size")

    def save(self, cfg, **state):
        if self.main:
            save_checkpoint(Path(cfg.out, "last.pt"), state | ({"images": self.images} if self.images else {}))

    def warn_if_data_bound(self, share):
        if share > 0.3 and self.lines:  # not of the first line, which has the workers' start in it
            self.warn("data-bound", f"{share:.0%} of the time is spent waiting for images; of a folder, more --workers may help")
        self.lines += 1

    def warn(self, name, text):
        if name not in self.warned:
            self.warned.add(name)
            self.say(f"warning: {name}: {text}")

    def report_broken(self, data, broken):
        printable = lambda text: os.fsencode(text).decode(errors="backslashreplace")  # a name may be no UTF-8
        known = self.broken.setdefault(data, {})
        for i, why in broken:
            if i not in known:
                known[i] = printable(data.name(i))
                tqdm.write(f"warning: cannot read {known[i]} ({printable(why)}); the next readable image takes its place")
        if len(known) > max(1, len(data) // 100) or len(known) == len(data):
            raise BadHere(f"--data: {len(known)} of {len(data)} images cannot be read, more than 1 %: "
                           + ", ".join(list(known.values())[:3]))


def check_ranges(cfg):
    """Every number lies where its field, or LEAST, says that it may."""
    own = {f.name: (f.metadata["least"], f.metadata["most"]) for f in dataclasses.fields(cfg) if f.metadata}
    for name, (least, most) in ({name: (least, math.inf) for name, least in LEAST.items() if hasattr(cfg, name)} | own).items():
        value, name = getattr(cfg, name), name.replace("_", "-")
        if least is not None and isinstance(value, tuple) and len(value) != 2:
            raise BadInput(f"--{name} takes two numbers, not {' '.join(map(str, value))}")
        for v in value if isinstance(value, tuple) else (value,):
            if least is not None and not (least <= v <= most and v < (2**63 if isinstance(v, int) else math.inf)):  # nor nan
                raise BadInput(f"--{name} {v} is not a number from {least} " + ("up" if most == math.inf else f"to {most}"))


def start(cfg, minutes=30):
    """Checks the flags, joins the processes, chooses device and precision. Returns the Config with its open values
    (patch size, mean, std) filled in, and the Run. Processes wait so many minutes for one another."""
    check_ranges(cfg)
    if not (len(cfg.crop_scale) == 2 and 0 < cfg.crop_scale[0] <= cfg.crop_scale[1] <= 1):
        raise BadInput(f"--crop-scale takes two shares, 0 < least <= most <= 1, not {' '.join(map(str, cfg.crop_scale))}")
    if not (len(cfg.betas) == 2 and all(0 <= b < 1 for b in cfg.betas)):
        raise BadInput(f"--betas takes two numbers from 0 to below 1, not {' '.join(map(str, cfg.betas))}")
    if len(cfg.img_size) > 2 or min(cfg.img_size) < 1:
        raise BadInput(f"--img-size takes one or two positive numbers, not {' '.join(map(str, cfg.img_size))}")
    filled = {"patch_size": cfg.patch_size or usual_patch(cfg.img_size)}
    for name, colour, other in (("mean", IMAGENET_MEAN, 0.5), ("std", IMAGENET_STD, 0.25)):
        given = getattr(cfg, name) or (colour if cfg.in_chans == 3 else (other,))
        if len(given) not in (1, cfg.in_chans) or not all(map(math.isfinite, given)) or name == "std" and min(given) <= 0:
            raise BadInput(f"--{name} takes 1 or {cfg.in_chans} numbers{' above 0' * (name == 'std')}, "
                           f"not {' '.join(map(str, given))}")
        filled[name] = tuple(given) * (cfg.in_chans // len(given))
    cfg = dataclasses.replace(cfg, **filled)
    patch_grid(cfg.img_size, cfg.patch_size)

    world, rank, local_rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    share = world * cfg.accum
    if cfg.batch_size % share:
        near = max(1, round(cfg.batch_size / share)) * share
        raise BadInput(f"--batch-size {cfg.batch_size} does not divide into {world} processes x --accum {cfg.accum}; "
                       f"--batch-size {near} would")
    device = choose_device(cfg.device, local_rank)
    amp = choose_amp(cfg.amp, device)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")  # on CUDA too: Triton builds launchers
    compiled = cfg.compile == "on" or cfg.compile == "auto" and device.type in ("cuda", "cpu") and bool(compiler)
    if cfg.compile == "on" and device.type == "cpu" and not compiler:
        raise BadInput("--compile on needs a C++ compiler (g++ or clang++) on the CPU")
    run = Run(device, amp, compiled, rank, world, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if world > 1:
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.6 does not know its successor
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=minutes))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where autocast does not reach
    elif device.type == "cpu":
        keep_memory()

    asked = [math.inf]

    def on_signal(number, frame):
        if not run.training or time.monotonic() > asked[0] + 1:  # nothing to save yet, or asked again: leave at once.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if run.main and not run.signal:  # (torchrun passes a Ctrl-C on, a moment later.)
            os.write(2, b"\nfinishing the step, then saving; a second signal: no saving\n")
        run.signal, asked[0] = number, min(asked[0], time.monotonic())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return cfg, run


def keep_memory():
    """glibc hands what a step frees back to the system, and the next step gets it anew, page by page: on a CPU a twentieth of a
    large step's time (`python mae.py --batch-size 512` with and without this call, in turns, two cores of an EPYC, torch 2.14:
    302 ms and 308, compiled 259 and 278). Here it keeps what it has. Other C libraries have no such setting."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the heap's end up to this is kept
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks too come from the heap


def worker_signals(_):
    """Loader processes leave signals to their parent: torchrun, `timeout` and Slurm send them to the whole group, and the step
    that the parent wants to finish needs its images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers():
    """When a run leaves with an error its workers are still there, and would be asked to end by the signal that they ignore."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch takes their end for an accident
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def choose_device(name, local_rank):
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and "WORLD_SIZE" not in os.environ else "cpu"
    if name == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_rank >= count:  # the first process of a machine that goes without says so
            kind = BadHere if local_rank == count else BadInput
            raise kind(f"--device cuda: this process needs GPU number {local_rank}, torch sees {count}")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "mps" and not mps:
        raise BadInput("--device mps: torch sees no Apple GPU here")
    return torch.device(name)


def choose_amp(name, device):
    if name == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if name == "auto":  # bf16 pays on a CPU that has the instructions (there up to 7 times fp32's rate), else it costs
        flags = Path("/proc/cpuinfo").read_text() if device.type == "cpu" and Path("/proc/cpuinfo").exists() else ""
        return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else None
    if name == "fp16" and device.type != "cuda":
        raise BadInput(f"--amp fp16 is for CUDA's GPUs; on {device.type} take bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]


def of_all_processes(value):
    """A mean over this process's images -> the mean over everyone's, with this process's gradient: what a loss needs that
    is not linear in such a mean, for two processes to be one."""
    if not dist.is_initialized():
        return value
    whole = value.detach().clone()
    dist.all_reduce(whole)
    return value + (whole / dist.get_world_size() - value.detach())


# -- optimisation -----------------------------------------------------------------------------------------------------

def cosine(step, total, first, last):
    """Half a cosine from the first value to the last."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / max(1, total)))


def linear(step, total, first, last):
    return first + (last - first) * step / max(1, total)


def warmup_cosine(step, total, warmup, peak, first=0.0, last=0.0):
    """Linear from the first rate to the peak, then half a cosine down to the last."""
    if step < warmup:
        return first + (peak - first) * step / warmup
    return cosine(step - warmup, total - warmup, peak, last)


def param_groups(model, weight_decay, exempt=lambda name, p: p.ndim <= 1):
    """Two groups for AdamW: with decay, and without; exempt are biases, norm gains and all else of one dimension."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [{"params": [p for n, p in named if not exempt(n, p)], "weight_decay": weight_decay},
            {"params": [p for n, p in named if exempt(n, p)], "weight_decay": 0.0}]


@torch.no_grad()
def update_ema(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, all tensors together; buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
    for mine, theirs in zip(teacher.buffers(), student.buffers()):
        mine.copy_(theirs)


# -- checkpoints and log ----------------------------------------------------------------------------------------------

def read_checkpoint(path):
    """A plain dict of tensors and numbers from a file; nothing in it is executed."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch takes no notice of the checksums that it writes
                    raise ValueError("a bit has changed")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise BadInput(f"{path}: cannot be read: a folder; of a run, say {Path(path, 'last.pt')}") from error
    except Exception as error:  # torch.load raises half a dozen kinds, all of them meaning this
        why = "truncated, damaged, or not a PyTorch checkpoint"
        if "safe_globals" in str(error) or "reduce" in str(error):
            # MAE's program saves its argparse.Namespace, SemanticMIM's saves objects of mmengine. This line unwraps both.
            line = ("import sys, torch; f = torch.load(sys.argv[1], weights_only=False); "
                    "torch.save(f.get('state_dict', f.get('model')), 'weights.pt')")
            why = ("it needs unpickling of code, which is refused. If the authors' program wrote this file and you trust it, "
                   f"extract its weights, with that program's packages installed: python -c \"{line}\" {shlex.quote(str(path))}")
        raise BadInput(f"{path}: cannot be read: {why}") from error
    if not isinstance(state, dict):
        raise BadInput(f"{path}: holds a {type(state).__name__}, not a dict of weights")
    return state


def resume(cfg, method, run, **parts):
    """Every part of a run, and the generator, gets back its state of the checkpoint to go on from -> the step that was done;
    0 where there is none. Refused where it is another method's or another Config's."""
    if cfg.resume == "no":
        return 0
    paths = [p for p in (Path(cfg.out, "last.pt"), Path(cfg.out, "previous.pt")) if p.exists()]
    if cfg.resume != "auto" and (not paths or Path(cfg.resume).resolve().parent == Path(cfg.out).resolve()):
        paths = [Path(cfg.resume)]  # else this command has been here before, and goes on from what it saved itself
    if not paths:
        return 0
    path = paths[0]
    try:
        state = read_checkpoint(path)
    except BadInput as error:
        if len(paths) == 1:
            raise
        path = paths[1]
        state = read_checkpoint(path)
        run.say(f"warning: {error}; the one before it is taken")
    if state.get("method", method) != method:
        raise BadInput(f"{path}: a checkpoint of {state['method']}, not of {method}")
    if not ("method" in state and isinstance(state.get("config"), dict) and isinstance(state.get("step"), int)):
        raise BadInput(f"{path}: not a checkpoint of this repository's training runs")
    changeable = CHANGEABLE | {field.name for field in dataclasses.fields(cfg) if field.metadata.get("changeable")}
    there = state.get("images", "")  # of a folder, and since there are such records
    changeable |= {"data"} if there and there == run.images else set()  # the same images in another place
    differ = [f"--{k.replace('_', '-')} {state['config'].get(k)} there, {v} now" for k, v in
              dataclasses.asdict(cfg).items() if k not in changeable and state["config"].get(k) != v]
    if differ:
        raise BadInput(f"{path}: made with another Config ({'; '.join(differ)}); take another --out, or --resume no")
    if there and there != run.images:
        raise BadInput(f"{path}: made from other images ({there} there, {run.images} now); take another --out, or --resume no")
    try:
        for name, part in parts.items():
            if state[name] or name != "scaler":  # whose state is empty where it was off
                part.load_state_dict(state[name])
        name = "rng"
        torch.set_rng_state(state[name])
    except Exception as error:  # names, sizes, kinds: torch has an error of its own for each
        raise BadInput(f"{path}: its {name} does not fit ({' '.join(str(error).split())[:300]})") from error
    run.say(f"resume: {path}, step {state['step']}")
    if path != paths[0]:  # else the next save would put the damaged one in the place of the good one
        run.barrier()
        if run.main:
            os.replace(path, paths[0])
    return state["step"]


def save_checkpoint(path, state):
    """Written beside, flushed, renamed: what is at `path` is always whole, the old or the new; the one before is kept."""
    part, previous = path.with_name(path.name + ".part"), path.with_name("previous.pt")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # a full disk: torch's writer raises RuntimeError
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
            if not path.exists():
                os.replace(previous, path)
        kept = f"; the last good checkpoint, {path}, is untouched" if path.exists() else ""
        raise BadInput(f"--out {path.parent}: cannot save ({' '.join(str(error).split())[:120]}){kept}") from error


class Log:
    """OUT/log.jsonl: a header record, then one record per line; also keeps the run folder writable or says so. Opened
    by a run that resumes at a step, it first drops what was logged after it, and adds its header if that is another; by a
    run that begins, it puts the checkpoints of the one before aside."""

    def __init__(self, cfg, method, run, step):
        self.path, self.main = Path(cfg.out, "log.jsonl"), run.main
        if not self.main:
            return
        header = {"method": method, "config": dataclasses.asdict(cfg), "torch": torch.__version__, "torchvision":
                  importlib.metadata.version("torchvision"), "python": platform.python_version(), "commit": commit(), "processes":
                  run.world, "device": device_name(run.device), "amp": str(run.amp), "compile": run.compile}
        with writing(f"--out {cfg.out}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for name in ("last.pt", "last.pt.part", "previous.pt"):  # found now, not when the first epoch is over
                if self.path.with_name(name).is_dir():
                    raise BadInput(f"--out {cfg.out}: {name} in it is a folder")
            lines = self.path.read_text(errors="replace").splitlines() if step and self.path.exists() else []
            try:
                records = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be torn
            except json.JSONDecodeError as error:
                raise BadInput(f"{self.path}: no log of a run ({error})") from error
            records = [r for r in records if "step" not in r or r["step"] <= step]
            header = json.loads(json.dumps(header))  # tuples become lists, as in the log
            records += [header] * (header != next((r for r in reversed(records) if "config" in r), None))
            part = self.path.with_name("log.jsonl.part")
            part.write_text("".join(json.dumps(r) + "\n" for r in records))
            part.replace(self.path)
            for name in () if step else ("previous.pt", "last.pt"):  # the next start is to go on from this run
                if self.path.with_name(name).exists():
                    os.replace(self.path.with_name(name), self.path.with_name("replaced.pt"))
            self.tests = [r for r in records if "rank" in r]  # of k-NN, for `summary`
            self.file = open(self.path, "a", buffering=1)

    def write(self, **record):
        if self.main:
            self.tests += [record] * ("rank" in record)
            with writing(self.path):
                self.file.write(json.dumps({k: v if not isinstance(v, float) else float(f"{v:.6g}") if math.isfinite(v) else None
                                            for k, v in record.items()}) + "\n")  # JSON knows no NaN

    def summary(self, cfg):
        """k-NN before and after training and of raw pixels, as far as the log has them."""
        if not self.main:
            return
        before, after = self.tests[0], self.tests[-1]
        before = before if before["step"] == 0 else {}  # a run that was resumed elsewhere has no beginning here
        names = [k[4:] for k in after if k.startswith("knn_")]
        rows = [("raw pixels", before, "raw_knn_"), ("untrained", before, "knn_"), ("trained", after, "knn_")]
        if any(after["mean_knn_" + name] != after["knn_" + name] for name in names):
            rows += [(f"{title}, mean of patches", record, f"mean_{prefix}") for title, record, prefix in rows[1:]]
        if names:
            print(f"{'k-NN accuracy, %':28}" + "".join(f"{name:>10}" for name in names))
        for title, record, prefix in rows:
            if names and prefix + names[0] in record:
                print(f"{title:28}" + "".join(f"{record[prefix + name]:10.1f}" for name in names))
        print(f"{cfg.out}: " + " ".join(sorted(p.name for p in Path(cfg.out).iterdir())))


def commit():
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True,
                              timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{device.type} ({name}, {torch.get_num_threads()} threads)"


# -- health -----------------------------------------------------------------------------------------------------------

GALLERY, QUERIES = 8192, 2048  # at most so many images on either side of a k-NN test during training


def knn_predict(gallery, labels, queries, k=20, temperature=0.07):
    """Weighted vote of the k nearest by cosine, a chunk of queries at a time. labels [n], or of several kinds at once [n, L]
    -> predicted classes [m] or [m, L]."""
    gallery, classes, k = F.normalize(gallery, dim=1), int(labels.max()) + 1, min(k, len(gallery))
    predicted = []
    for chunk in F.normalize(queries, dim=1).split(1024):
        similarity, ids = (chunk @ gallery.T).topk(k, 1)
        near, weight = labels[ids], (similarity / temperature).exp()  # [m, k] or [m, k, L], [m, k]
        votes = torch.zeros(len(chunk), classes, *labels.shape[1:], device=chunk.device)
        predicted.append(votes.scatter_add_(1, near, weight.view(*ids.shape, *[1] * (near.ndim - 2)).expand_as(near)).argmax(1))
    return torch.cat(predicted)


def effective_rank(features):
    """exp of the entropy of the normalised singular values: 1 when all features lie on a line, D at the most."""
    features = features.float().cpu()  # Apple's GPUs do not have it
    s = torch.linalg.svdvals(features - features.mean(0))
    if not s.sum() > 1e-6 * len(features) ** 0.5:  # all equal: no direction at all is a collapse too
        return 1.0
    p = s / s.sum()
    return math.exp(-(p * p.clamp(min=1e-12).log()).sum().item())


def evenly(n, most):
    """At most so many of the numbers 0..n-1, evenly spread."""
    return torch.linspace(0, n - 1, min(most, n)).long()


@torch.no_grad()
def features_of(encode, cfg, run, data, ids, take):
    """What `take` makes of (pooled, patches) [n, ...], and the labels, of the images `ids`; each
    process does its share."""
    mine = ids[torch.arange(run.rank, math.ceil(len(ids) / run.world) * run.world, run.world) % len(ids)]
    features, labels = [], []
    for images, names in eval_batches(cfg, run, data, mine):
        with run.autocast():
            features.append(take(*encode(images)))
        labels.append(names)
    features, labels = torch.cat(features), {k: torch.cat([l[k] for l in labels]).to(run.device) for k in labels[0]}

    def everyone(t):  # [share, ...] of each process -> [n, ...] in order
        parts = [torch.empty_like(t) for _ in range(run.world)] if run.world > 1 else [t]
        if run.world > 1:
            dist.all_gather(parts, t.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)[:len(ids)]
    return everyone(features), {k: everyone(y) for k, y in labels.items()}


def check_health(encode, cfg, run, train_set, val_set, raw=""):
    """Frozen features of the pictures as they are: effective rank and spread of the pooled ones; k-NN accuracy per
    label in percent, of the pooled ones (`knn_`) and of the mean over patches (`mean_knn_`). For k-NN every channel is
    standardised first, as MAE's and PiLaMIM's linear probes do it: else the few loudest channels decide alone. Of raw
    pixels k-NN alone, under names that begin with `raw`.

    If there are labels but no validation set, the training images are split into gallery and
    queries, see `split_tenth`."""
    both = lambda pooled, patches: torch.stack([pooled.float(), patches.float().mean(1)], 1)  # [n, 2, D]
    gallery, queries = torch.arange(len(train_set)), None
    if val_set is not None:
        queries = torch.arange(len(val_set))
    elif train_set.labelled:
        # An unreadable image is replaced by the next one, here perhaps by one of the other side. The
        # run stops if this concerns more than 1 % of the images.
        gallery, queries = split_tenth(train_set)
    gallery = gallery[evenly(len(gallery), GALLERY)]
    features, labels = features_of(encode, cfg, run, train_set, gallery, both)
    pooled, scores = features[:, 0], {}
    if not raw:
        some = pooled[::math.ceil(len(pooled) / QUERIES)]
        scores = {"rank": effective_rank(some), "feature_std": pooled.std(0, correction=0).mean().item()}
    if labels and queries is not None and len(queries):
        queries = queries[evenly(len(queries), QUERIES)]
        queries_from = train_set if val_set is None else val_set
        queries, truth = features_of(encode, cfg, run, queries_from, queries, both)
        y, truth = (torch.stack([kinds[name] for name in labels], 1) for kinds in (labels, truth))  # [n, L]
        for prefix, known, asked in zip([raw + "knn_"] if raw else ["knn_", "mean_knn_"], features.unbind(1), queries.unbind(1)):
            mean, std = known.mean(0), known.std(0) + 1e-6
            right = knn_predict((known - mean) / std, y, (asked - mean) / std) == truth
            scores |= {prefix + name: 100 * share for name, share in zip(labels, right.float().mean(0).tolist())}
    return scores


def raw_pixels(images):
    """The encoder that everything has to beat: the pixels, at most 32 x 32 of them."""
    somewhere = images.cpu() if images.device.type == "mps" else images  # Apple's GPUs take multiples of 32 alone
    pixels = F.adaptive_avg_pool2d(somewhere, tuple(min(32, s) for s in images.shape[2:])).flatten(1).to(images.device)
    return pixels, pixels[:, None]


def warn_of_trouble(run, values):
    """Collapse, by name, as far as the record at hand can show it."""
    rank, feature_std, target_std = (values.get(k, math.inf) for k in ("rank", "feature_std", "target_std"))
    if rank < 1.5 or feature_std < 1e-4:
        run.warn("collapse", "the pooled features of different images are all but the same (effective rank "
                 f"{rank:.2f}, spread {feature_std:.1e})")
    if target_std < 0.02:
        run.warn("collapse of the targets", f"the same is to be predicted of every patch (target_std {target_std:.1e})")


def spread(tokens):
    """Standard deviation over all tokens [..., D], averaged over the channels: 0 when they are all the same."""
    x = tokens.detach().float().flatten(0, -2)
    return (x - x.mean(0)).square().mean(0).sqrt().mean()  # on CPUs an eighth of the time of std(0)


# -- pictures -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def pca_colours(patches, grid, img_size):
    """Patch features [n, N, D] -> [n, 3, H, W] in 0..1: their first three principal components over all n images as red,
    green and blue, stretched between the 1st and the 99th percentile."""
    x = patches.float().flatten(0, 1).cpu()
    x = x - x.mean(0)
    _, axes = torch.linalg.eigh(x.T @ x)  # ascending
    axes = axes[:, -3:].flip(1)
    colours = x @ (axes * axes.sum(0).sign())  # [n N, 3]; an axis has no sign of its own
    low, high = colours.quantile(0.01, dim=0), colours.quantile(0.99, dim=0)
    colours = ((colours - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = colours.unflatten(0, (len(patches), *grid)).permute(0, 3, 1, 2)  # [n, 3, gh, gw]
    return F.interpolate(colours, tuple(img_size), mode="nearest")


def save_picture(path, columns):
    """PNG of images in rows: columns is a list of [n, C, H, W] in 0..1, side by side; small ones are enlarged."""
    columns = [c.detach().float().cpu() for c in columns]
    columns = [c[:, :3] if c.shape[1] >= 3 else c[:, :1].expand(-1, 3, -1, -1) for c in columns]
    zoom = max(1, math.ceil(96 / min(columns[0].shape[2:])))
    tiles = torch.stack(columns, 1).flatten(0, 1).clamp(0, 1)
    tiles = F.pad(tiles.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), (4, 0, 4, 0), value=1.0)
    nrow = min(len(tiles), 2 * len(columns))
    tiles = torch.cat([tiles, torch.ones_like(tiles[:1]).expand(-len(tiles) % nrow, -1, -1, -1)])
    sheet = tiles.unflatten(0, (-1, nrow)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [rows * h, nrow * w, 3]
    with writing(path):
        Image.fromarray((F.pad(sheet, (0, 0, 0, 4, 0, 4), value=1.0) * 255).round().byte().numpy()).save(path)
