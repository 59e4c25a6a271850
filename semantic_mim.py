"""SemanticMIM: Marring Masked Image Modeling with Semantics Compression for General Visual Representation (Yuan et al.,
arXiv 2406.10673), in one file.

If mask tokens can look at the visible patches they copy from their neighbours, and no token need know what the image is
of. Here they may not: a few proxy tokens gather what the visible patches have to say (compression), and the mask tokens
are filled from the proxies alone (reconstruction). What is worth knowing has to fit through. Both happen layer by layer,
in two stacks of blocks side by side; the second one is thrown away after training.

  images [B, C, H, W]
    1. patches [B, N, P]; 80 % (HOG) or 60 % (dVAE) masked at random              random_mask
    2. proxies [B, K, D] and visible patches [B, V, D], with learned positions
    3. per layer (Fig. 4):                                                        stacks
         compression:     [proxies; visible] <- Block([proxies; visible])
         reconstruction:  masks <- Block(masks looking at [proxies; masks])
    4. final norm, one Linear -> what is predicted at each masked place [B, M, .]
    5. HOG: mean squared error to histograms of oriented gradients                hog_target
       dVAE: cross-entropy to the token ids of DALL-E's encoder                   Tokenizer
  After training an image's feature is the mean of its patch tokens (`encode`).

  python semantic_mim.py                                                    on pictures that common.py draws, target HOG
  python semantic_mim.py --baseline --out runs/maskfeat                     the paper's comparison: mask tokens see all
  python semantic_mim.py --data DIR --img-size 96 --out runs/mine-semantic  any folder of images, the same small model
  torchrun --nproc_per_node 8 semantic_mim.py --out runs/hog-base --data DIR --img-size 224 --model base --batch-size 2048 \
      --epochs 300 --warmup-epochs 30 --base-lr 2e-4                        the paper's recipe with HOG; not run at that scale
  torchrun --nproc_per_node 8 semantic_mim.py --target dvae --tokenizer dalle_encoder.pth --out runs/dvae-base --data DIR \
      --img-size 224 --model base --batch-size 2048 --epochs 300 --warmup-epochs 10 --base-lr 1.875e-4        and with dVAE

Result of the first, on one thread, seeds 0, 1, 2 (bf16, EPYC, torch 2.15; 2 min 2 s on two): k-NN of the nearest object's kind
63.7, 57.4, 65.0 %, of the second 44.3, 40.9, 41.7; untrained 21.6, 22.8, 20.5, raw pixels 26.1, 29.1, 28.0.

Cost at ViT-B/16, 224 pixels, one image, by torch's counter and the sum of what autograd keeps (bf16, fused attention;
`python tests/benchmark.py --cost`): with HOG 108 GFLOP and 71 MiB, its baseline 105 and 66; with dVAE 107 and 79 (without the
tokenizer), its baseline 108 and 76. Weights, gradients and averages are 2.7 GB beside 1.4: there are two stacks to train.

HOG's cells are 8 pixels. Where 8 does not divide the patch, a cell is the patch (4 pixels in the demo), or half of it if that is
even and above 8.

Differs from the authors' program:
- Crops are resized with antialiasing; theirs (OpenCV) has none. This is the largest difference at full size: HOG targets differ
  by 25 % in L2 norm on photographs.
- dVAE: the tokenizer sees the training crop, resized to half its size; theirs sees a second 112-pixel Lanczos resize of the
  same box of the photograph.
- dVAE: brightness, contrast and saturation change in this order, after the crop, in floats; theirs changes them before the
  crop, on uint8, in random order.
- dVAE: drop path leaves out the MLP branch once; theirs does it twice, inside and outside the MLP, which is a slip.
- Batches run across the end of an epoch; theirs ends every epoch with an incomplete batch.
- Queries, keys and values come from one matrix; theirs keeps q and kv apart, with the same result.
- On a grid of 2 x 2 patches one stays visible, where the ceiling of the mask ratio would leave none.
- Mixed precision is bf16; theirs is fp16 with a loss scaler (`--amp fp16`).
- Images are turned upright by their EXIF orientation.
24 recorded steps of their program agree for either target: see tests/test_trajectories.py.
"""

import dataclasses
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (MODELS, BadInput, Block, LayerNorm, Log, PatchEmbed, bicubic, check_health, cosine, count_blocks, denormalise, draw,
                    eval_batches, flag, gather, load_data, load_strictly, main, normalise, param_groups, patch_grid, patchify,
                    pca_colours, per_channel, random_mask, raw_pixels, read_checkpoint, resize_positions, resume, save_picture,
                    seed_of, split_ids, spread, start, train_batches, usual_heads, warn_of_trouble)


# ---------------------------------------------------------------------------------------------------------------
# Config: the method's own, then what all five share. The recipes are the papers', the scale is the quick demo's
# ---------------------------------------------------------------------------------------------------------------

RECIPES = {  # where HOG (after MaskFeat) and dVAE (after BEiT) differ. A flag that is left at -1, or empty, is filled from here
    "hog": dict(mask_ratio=0.8, num_proxy=8, crop_scale=(0.5, 1.0), jitter=0.0, clip_grad=0.02, betas=(0.9, 0.999),
                first_lr=1e-6, last_lr=1e-6, drop_path=0.0),
    "dvae": dict(mask_ratio=0.6, num_proxy=1, crop_scale=(0.08, 1.0), jitter=0.4, clip_grad=3.0, betas=(0.9, 0.999),
                 first_lr=1e-4, last_lr=1e-5, drop_path=0.1),
    "baseline": dict(mask_ratio=0.4, num_proxy=1),  # over either of the two
}
BLOCKS = {"hog": dict(qkv_bias=True), "dvae": dict(qkv_bias="qv", layer_scale=0.1)}
EXEMPT = {  # from weight decay
    "hog": lambda name, p: p.ndim <= 1 or name == "mask_token",
    "dvae": lambda name, p: p.ndim <= 1 or name in ("cls_token", "pos_embed"),  # the mask token decays
}


@dataclasses.dataclass(frozen=True)
class Config:
    target: str = flag("hog", "what is predicted: gradient histograms, or tokens of a dVAE", ("hog", "dvae"))
    tokenizer: str = flag("", "file with the dVAE's encoder, the released dalle_encoder.pth; for --target dvae", changeable=True)
    baseline: bool = flag(False, "the paper's comparison: mask tokens and patches in one stack (MaskFeat, BEiT)")
    num_proxy: int = flag(-1, "proxy tokens; -1: 8 with hog, 1 with dvae and for the baseline (its CLS)", least=-1)
    mask_ratio: float = flag(-1.0, "share of the patches that is masked; -1: 0.8 with hog, 0.6 with dvae, baseline 0.4", least=-1)
    jitter: float = flag(-1.0, "change of brightness, contrast and saturation; -1: 0 with hog, 0.4 with dvae", least=-1, most=1)
    drop_path: float = flag(-1.0, "share of branches dropped in the last layer, rising linearly from 0 in the first; -1: 0 "
                            "with hog, 0.1 with dvae", least=-1, most=0.9)
    first_lr: float = flag(-1.0, "rate at the start of the warm-up over the peak; -1: 1e-6 with hog, 1e-4 with dvae", least=-1)
    last_lr: float = flag(-1.0, "rate at the end; -1: 1e-6 with hog, 1e-5 with dvae", least=-1)
    beside: str = flag("", "checkpoint of the other variant: its attention is drawn beside this run's", changeable=True)
    crop_scale: tuple[float, ...] = flag((), "least and most share of the image in a crop; default 0.5 1 with hog, 0.08 1 "
                                         "with dvae")
    betas: tuple[float, ...] = flag((), "AdamW's averaging of gradients and of their squares; default 0.9 0.999")

    data: str = "shapes"
    data_root: str = "data"
    img_size: tuple[int, ...] = (32,)
    patch_size: int = 0
    in_chans: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    model: str = "nano"
    batch_size: int = 128
    accum: int = 1
    epochs: int = 6
    warmup_epochs: int = 1
    base_lr: float = 2e-3  # the paper's 2e-4 is for ViT-B and 300 epochs
    weight_decay: float = 0.05
    clip_grad: float = flag(-1.0, "largest gradient norm; 0 is no limit; -1: 0.02 with hog, 3 with dvae", least=-1)
    workers: int = -1
    seed: int = 0
    device: str = "auto"
    amp: str = "auto"
    compile: str = "auto"
    out: str = "runs/semantic_mim"
    resume: str = "auto"
    save_every: int = 5
    eval_every: int = 0
    log_every: int = 20


def with_recipe(cfg):
    """The Config with its open values taken from the recipe of its target."""
    recipe = RECIPES[cfg.target] | (RECIPES["baseline"] if cfg.baseline else {})
    cfg = dataclasses.replace(cfg, **{k: v for k, v in recipe.items() if getattr(cfg, k) in (-1, ())})
    for name in ("mask_ratio", "jitter", "drop_path", "first_lr", "last_lr", "clip_grad"):
        if getattr(cfg, name) < 0:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(cfg, name)} is neither -1 (the target's own) nor from 0 up")
    if cfg.in_chans != 3 and (cfg.jitter or cfg.target == "dvae"):
        raise BadInput(f"--in-chans {cfg.in_chans}: --target dvae and --jitter need 3, they are for colour images")
    return cfg


# ---------------------------------------------------------------------------------------------------------------
# What is predicted, and the second stack
# ---------------------------------------------------------------------------------------------------------------

def hog_cell(p):
    return 8 if p % 8 == 0 else p // 2 if p > 8 and p % 2 == 0 else p


@torch.no_grad()
def hog_target(images, p, bins=9):
    """Histograms of oriented gradients after MaskFeat: normalised images [B, C, H, W] -> [B, N, C * bins * cells], each
    cell's histogram of length 1; in a patch (channel, bin) come first, then the row and column of the cell."""
    cell, x = hog_cell(p), F.pad(images.float(), (1, 1, 1, 1), "reflect")
    # Rows (1, 0, -1), (2, 0, -2), (1, 0, -1) and their transpose: a difference one way, (1, 2, 1) the other. Written out,
    # since GPUs round the products of a convolution to 10 bits.
    gx, gy = x[..., :-2] - x[..., 2:], x[..., :-2, :] - x[..., 2:, :]
    gx = gx[..., :-2, :] + 2 * gx[..., 1:-1, :] + gx[..., 2:, :]  # [B, C, H, W]
    gy = gy[..., :-2] + 2 * gy[..., 1:-1] + gy[..., 2:]
    angle = (torch.atan2(gx, gy) / math.pi * bins).floor() % bins  # 0..bins-1
    window = torch.exp(-(torch.arange(2 * cell, device=images.device) - cell + 0.5).square() / (2 * cell**2))  # 2 cells wide
    window = window / window.sum()
    rows, columns = (window[torch.arange(n, device=images.device) % (2 * cell)] for n in images.shape[2:])
    strength = torch.hypot(gx, gy) * rows[:, None] * columns
    histogram = torch.stack([F.avg_pool2d(strength * (angle == b), cell) for b in range(bins)], 2)  # [B, C, bins, H/cell, W/cell]
    histogram = F.normalize(histogram * cell**2, dim=2).flatten(1, 2)
    per = p // cell
    x = histogram.unflatten(3, (-1, per)).unflatten(2, (-1, per))  # [B, C * bins, gh, per, gw, per]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class Tokenizer:
    """The encoder of DALL-E's discrete VAE: 8 x 8 pixels -> one of `vocab` tokens. No nn.Module, so that neither optimiser
    nor checkpoint ever hears of it."""

    def __init__(self, weights, device="cpu"):
        names = {f"blocks.{b}.{kind}" for kind in ("w", "b") for b in ["input", "output.conv"] +
                 [f"group_{g}.block_{n}.res_path.conv_{c}" for g in (1, 2, 3, 4) for n in (1, 2) for c in (1, 2, 3, 4)] +
                 [f"group_{g}.block_1.id_path" for g in (2, 3, 4)]}
        wrong = sorted(names ^ weights.keys())
        if wrong:
            raise BadInput(f"not the dVAE's encoder (dalle_encoder.pth): {wrong[0]} is missing or unknown")
        self.weights = {name: t.float().to(device) for name, t in weights.items()}
        self.vocab = len(self.weights["blocks.output.conv.w"])

    @classmethod
    def from_file(cls, path, device):
        if not path:
            raise BadInput("--target dvae needs --tokenizer FILE: the encoder of DALL-E's discrete VAE, the file released as "
                           "dalle_encoder.pth")
        state = read_checkpoint(path)
        return cls(state.get("state_dict", state), device)

    def conv(self, x, name):
        w, b = self.weights[f"blocks.{name}.w"], self.weights[f"blocks.{name}.b"]
        return F.conv2d(x, w, b, padding=w.shape[-1] // 2)

    def logits(self, x):  # [B, 3, H, W] -> [B, vocab, H / 8, W / 8]
        x = self.conv(x, "input")
        for group in (1, 2, 3, 4):
            for block in (1, 2):
                name, branch = f"group_{group}.block_{block}", x
                for number in (1, 2, 3, 4):
                    branch = self.conv(branch.relu(), f"{name}.res_path.conv_{number}")
                path = f"{name}.id_path"
                x = (self.conv(x, path) if f"blocks.{path}.w" in self.weights else x) + branch / 64  # 64: blocks squared
            if group < 4:
                x = F.max_pool2d(x, 2)
        return self.conv(x.relu(), "output.conv")

    @torch.no_grad()
    def __call__(self, images, grid):
        """images in 0..1 -> token ids [B, N]. They are resized so that one token falls on one patch: half at patch 16."""
        size = [8 * n for n in grid]
        if list(images.shape[2:]) != size:
            images = bicubic(images, size).clamp(0, 1)
        return self.logits(0.1 + 0.8 * images).argmax(1).flatten(1)


def colour_jitter(images, noise, strength):
    """Brightness, then contrast, then saturation, each by a factor from 1 - strength to 1 + strength: images [B, 3, H, W]
    in 0..1, noise [B, 3] uniform. torchvision's operations on a whole batch."""
    brightness, contrast, saturation = (1 + strength * (2 * noise - 1))[:, :, None, None, None].unbind(1)
    grey = lambda x: (x * per_channel((0.2989, 0.587, 0.114), x.device)).sum(1, keepdim=True)
    images = (images * brightness).clamp(0, 1)
    mean = grey(images).mean((2, 3), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 1)
    return (grey(images) + saturation * (images - grey(images))).clamp(0, 1)


class ReconstructionBlock(Block):
    """masks [B, M, D] look at [proxies; masks], one norm for both sides: q + attn(norm1(q), norm1(kv)), then the MLP."""

    def forward(self, masks, proxies):
        both = self.norm1(torch.cat([proxies, masks], 1))
        x = masks + self.drop_path1(self.ls1(self.attn(both, keys_only=proxies.shape[1])))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


# ---------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------

def hog_loss(pred, target):
    """Plain mean squared error over the masked places: [B, M, .] twice -> scalar."""
    return (pred - target).square().mean()


def token_loss(pred, ids):
    """Cross-entropy to the tokens of the masked places: [B, M, vocab], [B, M] -> scalar."""
    return F.cross_entropy(pred.flatten(0, 1), ids.flatten())


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------

class SemanticMIM(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=768, depth=12, heads=12, num_proxy=8, target="hog",
                 vocab=8192, mask_ratio=0.8, drop_path=0.0, baseline=False):
        super().__init__()
        self.grid, self.patch_size = patch_grid(img_size, patch_size), patch_size
        self.num_proxy, self.target, self.baseline = num_proxy, target, baseline  # K
        self.num_patches = self.grid[0] * self.grid[1]  # N
        num_masked = math.ceil(mask_ratio * self.num_patches) - (self.num_patches == 4 and mask_ratio > 0.75)  # 2 x 2: one stays
        self.num_visible = self.num_patches - num_masked  # V
        if not 0 < mask_ratio < 1 or not 0 < self.num_visible < self.num_patches:
            raise BadInput(f"--mask-ratio {mask_ratio} of {self.num_patches} patches: at least one must be visible, and one "
                           "masked")
        if num_proxy < 1:
            raise BadInput(f"--num-proxy {num_proxy}: at least one is needed; without any there is --baseline")
        rates = [drop_path * layer / max(1, depth - 1) for layer in range(depth)]  # of drop path, the same in both stacks
        make = lambda kind: nn.ModuleList([kind(dim, heads, drop_path=rate, **BLOCKS[target]) for rate in rates])

        self.cls_token = nn.Parameter(torch.zeros(1, num_proxy, dim))  # the proxies stand where a ViT has CLS
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_proxy + self.num_patches, dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.blocks = make(Block)  # compression
        self.extra_blocks = nn.ModuleList() if baseline else make(ReconstructionBlock)  # reconstruction
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, vocab if target == "dvae" else in_chans * 9 * (patch_size // hog_cell(patch_size)) ** 2)
        self.init_weights()

    def init_weights(self):
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias") and not (self.target == "hog" and name == "patch_embed.proj.bias"):
                nn.init.zeros_(p)  # with hog the patch projection's bias stays as PyTorch draws it
        if self.target == "dvae":
            for stack in (self.blocks, self.extra_blocks):
                self.init_like_beit(stack)

    @staticmethod
    def init_like_beit(stack):
        """The dVAE variant: Xavier uniform MLPs; the output matrices of layer l are divided by sqrt(2 l)."""
        for layer, block in enumerate(stack, 1):
            for linear in (block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
            block.attn.proj.weight.data.div_((2 * layer) ** 0.5)
            block.mlp.fc2.weight.data.div_((2 * layer) ** 0.5)

    def stacks(self, x, masks):  # [B, K + V, D], [B, M, D] (None: one stack alone) -> the same two after all layers
        for i, block in enumerate(self.blocks):
            x = block(x)
            if masks is not None:
                masks = self.extra_blocks[i](masks, x[:, :self.num_proxy])
        return x, masks

    def with_proxies(self, patches, pos):  # [B, T, D], positions whose first K are the proxies' -> [B, K + T, D]
        return torch.cat([(self.cls_token + pos[:, :self.num_proxy]).expand(len(patches), -1, -1), patches], 1)

    def mask_latents(self, patches, ids_visible, ids_masked):  # [B, N, P] -> [B, M, D], after the final norm
        pos = self.pos_embed[:, self.num_proxy:]
        visible = self.patch_embed(gather(patches, ids_visible)) + gather(pos, ids_visible)  # [B, V, D]
        masks = self.mask_token + gather(pos, ids_masked)  # [B, M, D]
        if self.baseline:  # one stack, everything sees everything
            x, _ = self.stacks(torch.cat([self.with_proxies(visible, self.pos_embed), masks], 1), None)
            return self.norm(x[:, -masks.shape[1]:])
        _, masks = self.stacks(self.with_proxies(visible, self.pos_embed), masks)
        return self.norm(masks)

    def forward(self, images, mask=None, num_visible=None, tokens=None):
        """images [B, C, H, W]; mask bool [B, N], True = masked, the same number in each row, None draws one; tokens [B, N],
        ids from the tokenizer, for target dvae. Without num_visible a mask is counted, and a GPU waits. -> loss, logs."""
        if mask is None:
            mask = random_mask(torch.rand(len(images), self.num_patches, device=images.device),
                               self.num_patches - self.num_visible)
            num_visible = self.num_visible
        ids_visible, ids_masked = split_ids(mask, num_visible)
        pred = self.head(self.mask_latents(patchify(images, self.patch_size), ids_visible, ids_masked)).float()  # [B, M, .]
        if self.target == "hog":
            with torch.autocast(images.device.type, enabled=False):  # angles in float32
                target = gather(hog_target(images, self.patch_size), ids_masked)
            loss = hog_loss(pred, target)
            logs = {"loss_of_mean": target.var(unbiased=False), "pred_std": spread(pred), "target_std": spread(target)}
        else:
            if tokens is None:
                raise BadInput("target dvae: model(images, tokens=...) needs the tokenizer's ids, [B, N]")
            target = tokens.gather(1, ids_masked)  # [B, M]
            loss = token_loss(pred, target)
            logs = {"accuracy": (pred.argmax(-1) == target).float().mean(), "pred_std": spread(pred)}
        return loss, logs

    def compress(self, images, blocks):  # before the final norm [B, K + N, D]
        K = self.num_proxy
        pos = resize_positions(self.pos_embed, self.grid, patch_grid(images.shape[2:], self.patch_size))
        x = self.with_proxies(self.patch_embed(patchify(images, self.patch_size)) + pos[:, K:], pos)
        for block in blocks:
            x = block(x)
        return x

    def encode(self, images):
        """images -> pooled [B, D], patches [B, N, D]: the compression stack alone, nothing masked. pooled is the mean of the
        patches before the final norm, then a LayerNorm of its own (without gain, there is nothing to train it); patches
        are after the final norm. Other image sizes are fine: positions are resized."""
        training = self.training
        if training:  # drop path has no place here
            self.eval()
        x = self.compress(images, self.blocks)[:, self.num_proxy:]
        if training:
            self.train()
        return F.layer_norm(x.mean(1), x.shape[-1:], eps=1e-6), self.norm(x)

    @torch.no_grad()
    def attention(self, images):
        """The last layer's attention, averaged over heads [B, K + N, K + N]: row i is where token i looks (Fig. 1)."""
        last, training = self.blocks[-1], self.training
        q, k, _ = last.attn.project(last.norm1(self.eval().compress(images, self.blocks[:-1])))
        self.train(training)
        return (q.float() @ k.float().mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)

    @classmethod
    def from_released(cls, state_dict, **sizes):
        """A model from the authors' file, a dict of tensors or mmengine's, which has them under the key `state_dict`. Which
        target, and all sizes, are read from the tensors; heads cannot be (usual ones unless said)."""
        state = {name.removeprefix("module."): t for name, t in state_dict.get("state_dict", state_dict).items()}
        state = {name.removeprefix("backbone."): t for name, t in state.items()
                 if not name.startswith("target_generator.")}  # HOG's constants, or the whole dVAE encoder
        missing = {"cls_token", "pos_embed", "mask_token", "patch_embed.projection.weight"} - state.keys()
        if missing:
            raise BadInput(f"not a released SemanticMIM: it has no {', '.join(sorted(missing))}")
        for name in [n for n in state if n.endswith(("attn.q.weight", "attn.q.bias", "attn.q_proj.weight"))]:
            both = name.replace("attn.q", "attn.kv")  # q and kv there, one matrix here
            if both in state and state[name].shape[1:] == state[both].shape[1:]:
                state[re.sub(r"q(_proj)?\.", "qkv.", name)] = torch.cat([state.pop(name), state.pop(both)])
        state = {rename(name): t for name, t in state.items()}
        dim, in_chans, p, _ = state["patch_embed.proj.weight"].shape
        num_proxy = state["cls_token"].shape[1]
        baseline = not any(name.startswith("extra_blocks.") for name in state)
        sizes = {"img_size": math.isqrt(state["pos_embed"].shape[1] - num_proxy) * p, "patch_size": p, "in_chans": in_chans,
                 "dim": dim, "depth": count_blocks(state, "blocks"), "heads": usual_heads(dim), "num_proxy": num_proxy,
                 "target": "dvae" if "blocks.0.ls1.gamma" in state else "hog", "baseline": baseline} | sizes
        if "head.weight" in state:
            sizes = {"vocab": len(state["head.weight"])} | sizes
        parts = [("extra_blocks.",), ("head.",)]
        return load_strictly(cls(**sizes), state, "a released SemanticMIM", sizes, optional=parts)


def rename(name):
    """A parameter's name in the authors' program -> here. Its head is a neck with hog, a head of its own with dvae."""
    for theirs, ours in (("ln1.", "norm."), ("neck.fc.", "head."), ("head.cls_head.", "head.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    for theirs, ours in (("extra_layers.", "extra_blocks."), ("layers.0.0.", "fc1."), ("ffn.layers.1.", "mlp.fc2."),
                         ("layers.", "blocks."), ("ffn.", "mlp."), (".ln1.", ".norm1."), (".ln2.", ".norm2."),
                         ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("projection.", "proj.")):
        name = re.sub("^layers.", "blocks.", name) if theirs == "layers." else name.replace(theirs, ours)
    return name


def attention_columns(model, images, query):
    """Where a query patch looks, and where each proxy looks: heat maps [n, 3, H, W] over the images, one per token."""
    maps = model.attention(images)[:, [model.num_proxy + query, *range(model.num_proxy)], model.num_proxy:]  # [n, 1 + K, N]
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=1e-12)  # each stretched to its own range
    maps = maps.unflatten(-1, model.grid).repeat_interleave(model.patch_size, 2).repeat_interleave(model.patch_size, 3)
    heat = torch.stack([2 * maps, 2 * maps - 1, 0.5 - maps], 2).clamp(0, 1)  # [n, 1 + K, 3, H, W]: dark blue, red, yellow
    return heat.unbind(1)


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------

def build(cfg, vocab=8192):
    dim, depth, heads = MODELS[cfg.model]
    return SemanticMIM(img_size=cfg.img_size, patch_size=cfg.patch_size, in_chans=cfg.in_chans, dim=dim, depth=depth,
                       heads=heads, num_proxy=cfg.num_proxy, target=cfg.target, vocab=vocab, mask_ratio=cfg.mask_ratio,
                       drop_path=cfg.drop_path, baseline=cfg.baseline)


def from_checkpoint(path, other):
    """The model of a run of this file, for the same images as another model."""
    state = read_checkpoint(path)
    if state.get("method") != "semantic_mim" or not {"config", "model"} <= state.keys():
        raise BadInput(f"--beside {path}: not a checkpoint of semantic_mim.py")
    model = build(Config(**state["config"]), len(state["model"]["head.weight"]))
    sizes = lambda m: (m.grid, m.patch_size, m.patch_embed.proj.in_channels)
    if sizes(model) != sizes(other):
        raise BadInput(f"--beside {path}: its grid, patch and channels are {sizes(model)}, here they are {sizes(other)}")
    return load_strictly(model, state["model"], f"{path}: a SemanticMIM")


def learning_rate(step, total, warmup, peak, first, last):
    """Linear from the first rate to the peak, which the last warm-up step has; then half a cosine that starts at the peak."""
    if step < warmup - 1:
        return first + (peak - first) * step / (warmup - 1)
    return cosine(max(0, step - warmup), total - warmup, peak, last)


def train(cfg):
    # -- set-up: everything that can be wrong is found out here, before anything is written
    cfg, run = start(with_recipe(cfg))
    torch.manual_seed(cfg.seed)
    tokenizer = Tokenizer.from_file(cfg.tokenizer, run.device) if cfg.target == "dvae" else None
    model = build(cfg, tokenizer.vocab if tokenizer else 8192).to(run.device)
    beside = [from_checkpoint(cfg.beside, model).to(run.device)] if cfg.beside else []
    train_set, val_set = load_data(cfg, run)
    steps = lambda epochs: max(1, round(epochs * len(train_set) / cfg.batch_size))
    total, warmup = steps(cfg.epochs), steps(cfg.warmup_epochs) if cfg.warmup_epochs else 0
    peak_lr = cfg.base_lr * cfg.batch_size / 256
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay, EXEMPT[cfg.target]), lr=peak_lr, betas=cfg.betas,
                                  fused=run.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)

    first = resume(cfg, "semantic_mim", run, model=model, optimizer=optimizer, scaler=scaler)
    if first >= total:
        run.say(f"nothing to do: {first} of {total} steps are done; more --epochs goes on, --resume no starts over")
        return 0
    run.describe(cfg, model, total, peak_lr)
    log = Log(cfg, "semantic_mim", run, first)

    if run.compile:
        model.compile()  # in place: the names in a checkpoint stay as they are
    ddp = DistributedDataParallel(model, device_ids=[run.local_rank] if run.device.type == "cuda" else None,
                                  gradient_as_bucket_view=True, broadcast_buffers=False) if run.world > 1 else model

    # -- what is looked at along the way: frozen features, and pictures of the same images
    show = next(eval_batches(cfg, run, val_set or train_set, torch.arange(min(8, len(val_set or train_set)))))[0]
    row, column, p = model.grid[0] // 2, model.grid[1] // 2, model.patch_size
    query = row * model.grid[1] + column  # the patch whose attention is drawn, marked white in the picture
    marked = denormalise(show, cfg)
    marked[:, :, row * p:row * p + p, column * p:column * p + p] = 1

    def look(step, **scores):
        scores |= check_health(model.encode, cfg, run, train_set, val_set)
        warn_of_trouble(run, scores)
        log.write(step=step, images=step * cfg.batch_size, **scores)
        if run.main:
            columns = [map for m in [model, *beside] for map in attention_columns(m, show, query)]
            save_picture(Path(cfg.out, "attention.png"), [marked, *columns])
            save_picture(Path(cfg.out, "features.png"), [denormalise(show, cfg), pca_colours(
                model.encode(show)[1], model.grid, show.shape[2:])])

    if first == 0:
        look(0, **check_health(raw_pixels, cfg, run, train_set, val_set, "raw_"))

    # -- the loop
    stream = train_batches(cfg, run, train_set, cfg.crop_scale, first, total)
    bar = tqdm(total=total * cfg.batch_size, initial=first * cfg.batch_size, unit="img", unit_scale=True,
               disable=not run.main, smoothing=0.05, mininterval=0.2 if sys.stderr.isatty() else 30)
    clock, waited, bad = time.perf_counter(), 0.0, torch.zeros((), device=run.device)
    logged = first
    for step in range(first + 1, total + 1):
        lr = learning_rate(step - 1, total, warmup, peak_lr, cfg.first_lr * peak_lr, cfg.last_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        torch.manual_seed(seed_of("drop path", cfg.seed, step, run.rank))  # of each process and step, so that it resumes
        values = 0
        for micro in range(cfg.accum):
            began = time.perf_counter()
            images = next(stream)  # [m, C, H, W]
            waited += time.perf_counter() - began
            if cfg.jitter:
                noise = draw((cfg.batch_size, 3), run.device, "jitter", cfg.seed, step)[run.rows(cfg, micro)]
                images = denormalise(images.contiguous(), cfg)  # channel by channel, for which photographs lie badly
                images = normalise(255 * colour_jitter(images, noise, cfg.jitter), cfg)
            tokens = tokenizer(denormalise(images, cfg), model.grid) if tokenizer else None  # [m, N]
            # drawn for the global batch, of which some rows are ours: no mask depends on the number of processes
            noise = draw((cfg.batch_size, model.num_patches), run.device, "mask", cfg.seed, step)
            mask = random_mask(noise[run.rows(cfg, micro)], model.num_patches - model.num_visible)
            if run.world > 1:  # gradients travel once, with the last micro-batch
                ddp.require_backward_grad_sync = micro == cfg.accum - 1
            with run.autocast():
                loss, logs = ddp(images, mask, model.num_visible, tokens)
            scaler.scale(loss / cfg.accum).backward()
            values = values + torch.stack([loss.detach(), *logs.values()]) / cfg.accum

        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        bad += ~(values[0].isfinite() & (grad_norm.isfinite() | scaler.is_enabled()))  # counted on the device: no step waits
        bar.update(cfg.batch_size)

        save = step % steps(cfg.save_every) == 0 or step == total
        evaluate = step == total or cfg.eval_every and step % steps(cfg.eval_every) == 0
        if step % cfg.log_every == 0 or save or evaluate or run.asked_to_stop or run.stumbled(grad_norm):
            # the only wait for the device: one vector, averaged over the processes, which so agree on what it says
            *values, norm, bad_steps, stop = run.average(torch.stack(
                [*values, grad_norm, bad, bad.new_tensor(float(run.signal > 0))])).tolist()
            bad_steps = bad_steps or 36 * (scaler.get_scale() < 1e-6)  # fp16 (which waits once more): halved so often, in vain
            if bad_steps:
                last = Path(cfg.out, "last.pt")
                run.say(f"error: the loss or its gradient is not finite since step {step + 1 - math.ceil(bad_steps)} (now lr "
                        f"{lr:.3g}, gradient norm {norm:.3g}); " + (f"{last} is the last good checkpoint, untouched"
                        if last.exists() else "no checkpoint had been saved yet"), sys.stderr)
                return 1
            seconds, images_seen = time.perf_counter() - clock, (step - logged) * cfg.batch_size
            names = ["loss", *logs]
            log.write(step=step, images=step * cfg.batch_size, lr=lr, **dict(zip(names, values)), grad_norm=norm,
                      images_per_s=images_seen / seconds, data_wait=waited / seconds)
            bar.set_postfix(loss=f"{values[0]:.4f}", lr=f"{lr:.2e}")
            warn_of_trouble(run, dict(zip(names, values)))
            run.warn_if_data_bound(waited / seconds)
            if evaluate:
                look(step)
            if save or stop:
                run.save(cfg, method="semantic_mim", config=dataclasses.asdict(cfg), step=step, model=model.state_dict(),
                         optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), rng=torch.get_rng_state())
            if stop:
                run.say(f"stopped by a signal after step {step}; --resume auto, the default, goes on from here")
                return 128 + (run.signal or 15)
            clock, waited, logged = time.perf_counter(), 0.0, step
    bar.close()
    log.summary(cfg)
    return 0


if __name__ == "__main__":
    main(train, Config, __doc__)
