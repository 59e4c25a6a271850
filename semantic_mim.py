r"""SemanticMIM: Marring Masked Image Modeling with Semantics Compression for General Visual
Representation (Yuan et al., arXiv 2406.10673).

If mask tokens can look at the visible patches they copy from their neighbours, and no token need
know what the image is of. Here they cannot: a few proxy tokens gather what the visible patches
contain (compression), and the mask tokens attend only to the proxies and to each other
(reconstruction). So the proxies must describe the image. Both happen layer by layer, in two stacks
of blocks.

  images [B, C, H, W]
    1. patches [B, N, P]; 80 % (HOG) or 60 % (dVAE) masked at random         draw_mask
    2. K proxies and V visible patches, with learned positions [B, K + V, D]
    3. for every layer:                                                      mask_latents
         compression:     [proxies; visible] <- Block([proxies; visible])
         reconstruction:  mask tokens <- Block(queries: mask tokens, keys: proxies, mask tokens)
    4. final norm, one Linear -> a prediction for each masked place [B, M, .]
    5. HOG: mean squared error to histograms of oriented gradients           hog_target
       dVAE: cross-entropy to the token ids of DALL-E's encoder              Tokenizer
  No gradient flows into targets. The second stack is dropped after training. An image's feature is
  the mean of its patch tokens before the final norm, then a LayerNorm without gain (`encode`).
  Letters: B images, N patches of P = p * p * C numbers, V visible, M masked; width D.

  python semantic_mim.py                                                    the demo, target HOG
  python semantic_mim.py --baseline --out runs/maskfeat                     for comparison: MaskFeat
  python semantic_mim.py --data DIR --img-size 96 --out runs/mine-semantic  any folder of images
  The paper's two recipes, which we have not run:
  torchrun --nproc_per_node 8 semantic_mim.py --out runs/hog-base --data DIR --img-size 224 \
      --model base --batch-size 2048 --epochs 300 --warmup-epochs 30 --base-lr 2e-4
  torchrun --nproc_per_node 8 semantic_mim.py --target dvae --tokenizer dalle_encoder.pth \
      --out runs/dvae-base --data DIR --img-size 224 --model base --batch-size 2048 --epochs 300 \
      --warmup-epochs 10 --base-lr 1.875e-4

Differs from the authors' program:
- Crops are resized with antialiasing; theirs (OpenCV) has none. This is the largest difference:
  HOG targets of 224-pixel photographs differ by 24 % in L2 norm (docs/differences.py).
- dVAE: the tokenizer sees the training crop, resized to 8 x 8 pixels per patch; theirs sees the
  same box of the photograph, resized separately to 112 pixels with Lanczos.
- dVAE: colour jitter follows the crop, on floats, in the order brightness, contrast, saturation;
  theirs precedes it, on uint8, in random order.
- dVAE: drop path applies once to the MLP branch; theirs applies it twice by mistake.
- A batch may span two epochs; theirs ends every epoch with an incomplete batch.
- Queries, keys and values come from one matrix; the result is the same.
- At least one patch stays visible; 80 % of a grid of 2 x 2, rounded up, would leave none.
- If 8 does not divide the patch side, a HOG cell is half the patch (if its side is even and above
  8) or all of it, and the Gaussian window shrinks with it. The paper's patch of 16 is unaffected.
- JPEGs at least twice as large as needed are decoded at 1/2, 1/4 or 1/8 of their size.
- Mixed precision is bf16; theirs is fp16 with a loss scaler, here `--amp fp16`.
tests/test_trajectories.py repeats 24 recorded steps of their program for each target: losses agree
within 1e-5.
"""

import dataclasses
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (Attention, BadInput, Checkpoint, Look, Meter, Mlp, PatchEmbed, Plan,
                    TrainConfig, arguments, bicubic, check_visible, clip_gradients, cosine,
                    denormalise, draw, flag, gather, load_data, load_released, main, normalise,
                    param_groups, patch_grid, patchify, per_channel, random_mask, read_checkpoint,
                    resize_positions, seed_of, split_ids, spread, start, train_batches)

norm = partial(nn.LayerNorm, eps=1e-6)  # everywhere, for both targets


# ---- Config: own flags and changed defaults. The defaults are the demo's.

RECIPES = {  # the paper's values, for flags that are not given
    "hog": dict(mask_ratio=0.8, num_proxy=8, crop_scale=(0.5, 1.0), jitter=0.0, drop_path=0.0,
                clip_grad=0.02, first_lr=1e-6, last_lr=1e-6),
    "dvae": dict(mask_ratio=0.6, num_proxy=1, crop_scale=(0.08, 1.0), jitter=0.4, drop_path=0.1,
                 clip_grad=3.0, first_lr=1e-4, last_lr=1e-5),
}
BASELINE = dict(mask_ratio=0.4, num_proxy=1)  # for both targets


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    target: str = flag("hog", "gradient histograms, or tokens of a dVAE", choices=RECIPES)
    tokenizer: str = flag("", "the dVAE's encoder, dalle_encoder.pth", may_change=True)
    vocab: int | None = flag(None, "vocabulary of the dVAE [the file's]", 2)
    baseline: bool = flag(False, "MaskFeat or BEiT: mask tokens and visible patches in one stack")
    num_proxy: int | None = flag(None, "proxy tokens [hog 8, dvae 1, baseline 1]", 1)
    mask_ratio: float | None = flag(None, "masked share [hog 0.8, dvae 0.6, baseline 0.4]", 0, 1)
    jitter: float | None = flag(None, "strength of the colour jitter [hog 0, dvae 0.4]", 0, 1)
    drop_path: float | None = flag(None, "drop path rate of the last layer [hog 0, dvae 0.1]", 0,
                                   0.9)
    first_lr: float | None = flag(None, "first learning rate as a fraction of the peak [hog 1e-6, "
                                  "dvae 1e-4]", 0, 1)
    last_lr: float | None = flag(None, "last learning rate, absolute [hog 1e-6, dvae 1e-5]", 0,
                                 1e30)
    clip_grad: float | None = flag(None, "largest gradient norm; 0: do not clip [hog 0.02, dvae 3]",
                                   0, 1e30)
    crop_scale: tuple[float, ...] = flag((), "range of a crop's share of the image [hog 0.5 1, "
                                         "dvae 0.08 1]", 1e-4, 1)
    betas: tuple[float, ...] = (0.9, 0.999)
    epochs: int = 6
    base_lr: float = 2e-3  # per 256 images; the paper's 2e-4 is for ViT-B, 300 epochs
    out: str = "runs/semantic_mim"
    # As in common.py: 1 epoch of warm-up; weight decay 0.05, the paper's.


def with_recipe(cfg):
    """Fill in the flags that were not given from the recipe of the target."""
    recipe = RECIPES[cfg.target] | (BASELINE if cfg.baseline else {})
    missing = {k: v for k, v in recipe.items() if getattr(cfg, k) in (None, ())}
    cfg = dataclasses.replace(cfg, **missing)
    if len(cfg.crop_scale) != 2:
        raise BadInput("--crop-scale takes two values")
    if cfg.in_chans != 3 and (cfg.jitter or cfg.target == "dvae"):
        raise BadInput(f"--in-chans {cfg.in_chans}: --target dvae and --jitter need 3 channels")
    return cfg


# ---- Targets

def hog_cell(p):
    """The side of a HOG cell in pixels: 8 if it divides the patch side p."""
    if p % 8 == 0:
        return 8
    return p // 2 if p > 8 and p % 2 == 0 else p


@torch.no_grad()
def hog_target(images, p, bins=9):
    """Histograms of oriented gradients as in MaskFeat: normalised images [B, C, H, W] -> [B, N, C *
    bins * cells]. Each cell's histogram has L2 norm 1. Order in a patch: channel, bin, row of the
    cell, column of the cell."""
    cell = hog_cell(p)
    x = F.pad(images.float(), (1, 1, 1, 1), "reflect")
    # The kernel (1, 0, -1), (2, 0, -2), (1, 0, -1) and its transpose, written as differences: on a
    # GPU a convolution would run in TF32, with 10 bits.
    gx = x[..., :-2] - x[..., 2:]
    gx = gx[..., :-2, :] + 2 * gx[..., 1:-1, :] + gx[..., 2:, :]  # [B, C, H, W]
    gy = x[..., :-2, :] - x[..., 2:, :]
    gy = gy[..., :-2] + 2 * gy[..., 1:-1] + gy[..., 2:]
    index = (torch.atan2(gx, gy) / math.pi * bins).floor() % bins  # the bin, [B, C, H, W]
    # A Gaussian window, two cells wide with a standard deviation of one cell, tiles the image.
    at = torch.arange(2 * cell, device=images.device) - cell + 0.5
    window = torch.exp(-at.square() / (2 * cell**2))
    window = window / window.sum()
    rows, columns = (window.repeat(n // cell)[:n] for n in images.shape[2:])
    strength = torch.hypot(gx, gy) * rows[:, None] * columns
    sums = [F.avg_pool2d(strength * (index == b), cell) * cell**2 for b in range(bins)]
    histogram = F.normalize(torch.stack(sums, 2), dim=2)  # [B, C, bins, H / cell, W / cell]
    x = F.pixel_unshuffle(histogram.flatten(1, 2), p // cell)  # [B, C * bins * cells, gh, gw]
    return x.flatten(2).mT


class Tokenizer:
    """The encoder of DALL-E's discrete VAE: 8 x 8 pixels -> one of `vocab` tokens."""

    def __init__(self, weights, device="cpu"):
        try:
            self.weights = {name: t.float().to(device) for name, t in weights.items()}
            self.logits(torch.zeros(1, 3, 8, 8, device=device))  # raises if a weight is missing
        except (AttributeError, KeyError, RuntimeError) as error:
            raise BadInput(f"--tokenizer is not dalle_encoder.pth: {error}") from error
        self.vocab = len(self.weights["blocks.output.conv.w"])

    @classmethod
    def from_file(cls, path, device):
        if not path:
            raise BadInput("--target dvae needs --tokenizer FILE, the released dalle_encoder.pth")
        state = read_checkpoint(path)
        return cls(state.get("state_dict", state), device)

    def conv(self, x, name):
        weight, bias = self.weights[f"blocks.{name}.w"], self.weights[f"blocks.{name}.b"]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def logits(self, x):  # [B, 3, H, W] -> [B, vocab, H / 8, W / 8]
        x = self.conv(x, "input")
        for group in (1, 2, 3, 4):
            for block in (1, 2):
                name = f"group_{group}.block_{block}"
                branch = x
                for number in (1, 2, 3, 4):
                    branch = self.conv(branch.relu(), f"{name}.res_path.conv_{number}")
                if f"blocks.{name}.id_path.w" in self.weights:
                    x = self.conv(x, f"{name}.id_path")
                x = x + branch / 64  # 64: the number of blocks, squared
            if group < 4:
                x = F.max_pool2d(x, 2)
        return self.conv(x.relu(), "output.conv")

    @torch.no_grad()
    def __call__(self, images, grid):
        """images in 0..1 -> token ids [B, N]. A patch is resized to 8 x 8 pixels. Call it without
        autocast: bf16 changes 55 % of the ids (random weights, docs/differences.py)."""
        images = bicubic(images, [8 * n for n in grid]).clamp(0, 1)
        images = images.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        return self.logits(0.1 + 0.8 * images).argmax(1).flatten(1)  # DALL-E's range of pixels


def colour_jitter(images, noise, strength):
    """images [B, 3, H, W] in 0..1, noise [B, 3] uniform: each image has its own factors in 1 +-
    strength. torchvision's ColorJitter has one set for a whole batch."""
    factors = 1 + strength * (2 * noise - 1)
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)

    def grey(x):
        return (x * per_channel((0.2989, 0.587, 0.114), x.device)).sum(1, keepdim=True)
    images = (images * brightness).clamp(0, 1)
    mean = grey(images).mean((2, 3), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 1)
    return (grey(images) + saturation * (images - grey(images))).clamp(0, 1)


# ---- Model. With dVAE the blocks are BEiT's: no bias on k, a layer scale, drop path.

class BeitAttention(Attention):
    def __init__(self, dim, heads):
        super().__init__(dim, heads, qkv_bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))

    def project(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        x = F.linear(x, self.qkv.weight, bias)
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, T, d]


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    """Drop a branch for random images; scale it up for the others, so that the mean stays.
    torchvision's StochasticDepth does the same, but importing it takes a second."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    def __init__(self, dim, heads, target, drop_path):
        super().__init__()
        beit = target == "dvae"
        self.norm1 = norm(dim)
        self.attn = BeitAttention(dim, heads) if beit else Attention(dim, heads, qkv_bias=True)
        self.ls1 = LayerScale(dim) if beit else nn.Identity()
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = LayerScale(dim) if beit else nn.Identity()
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x, context=None):
        """Compression: x [B, T, D] attends to itself. Reconstruction: the mask tokens x attend to
        [context; x]; the context is the proxies. Queries and keys share norm1."""
        keys = x if context is None else torch.cat([context, x], 1)
        out = self.attn(self.norm1(keys), first_query=keys.shape[1] - x.shape[1])  # for x only
        x = x + self.drop_path1(self.ls1(out))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class SemanticMIM(nn.Module):
    encoder_name = ""  # for evaluate.py: the submodule with the blocks; here the model itself
    pool = "mean"  # the paper's feature

    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=768, depth=12, heads=12,
                 num_proxy=8, target="hog", vocab=8192, mask_ratio=0.8, drop_path=0.0,
                 baseline=False):
        super().__init__()
        self.grid = patch_grid(img_size, patch_size)
        self.patch_size = patch_size  # p
        self.num_proxy = num_proxy  # K
        self.target = target
        self.baseline = baseline
        self.num_patches = self.grid[0] * self.grid[1]  # N
        num_masked = math.ceil(mask_ratio * self.num_patches)  # M, rounded up
        self.num_visible = max(1, self.num_patches - num_masked)  # V, at least one
        check_visible(f"--mask-ratio {mask_ratio}", self.num_visible, self.num_patches)

        self.cls_token = nn.Parameter(torch.zeros(1, num_proxy, dim))  # the K proxies
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_proxy + self.num_patches, dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        rates = [drop_path * layer / max(1, depth - 1) for layer in range(depth)]
        blocks = [Block(dim, heads, target, rate) for rate in rates]
        self.blocks = nn.ModuleList(blocks)  # compression
        blocks = [] if baseline else [Block(dim, heads, target, rate) for rate in rates]
        self.extra_blocks = nn.ModuleList(blocks)  # reconstruction
        self.norm = norm(dim)
        hog_size = in_chans * 9 * (patch_size // hog_cell(patch_size)) ** 2  # 9 bins
        self.head = nn.Linear(dim, hog_size if target == "hog" else vocab)
        self.init_weights()

    def init_weights(self):
        """Truncated normal with deviation 0.02, biases 0. For dVAE as in BEiT: Xavier MLPs, and the
        output matrices of layer l are divided by sqrt(2 l)."""
        for name, p in self.named_parameters():
            as_drawn = self.target == "hog" and name == "patch_embed.proj.bias"  # as in theirs
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias") and not as_drawn:
                nn.init.zeros_(p)
        if self.target == "hog":
            return
        for stack in (self.blocks, self.extra_blocks):
            for layer, block in enumerate(stack, 1):
                for linear in (block.mlp.fc1, block.mlp.fc2):
                    nn.init.xavier_uniform_(linear.weight)
                    nn.init.normal_(linear.bias, std=1e-6)
                block.attn.proj.weight.data.div_((2 * layer) ** 0.5)
                block.mlp.fc2.weight.data.div_((2 * layer) ** 0.5)

    def draw_mask(self, noise):  # uniform [B, N] -> is_masked [B, N], M of them True
        return random_mask(noise, self.num_patches - self.num_visible)

    def with_proxies(self, x, pos):  # [B, T, D], [1, K + N, D] -> [B, K + T, D]
        proxies = self.cls_token + pos[:, :self.num_proxy]
        return torch.cat([proxies.expand(len(x), -1, -1), x], 1)

    def mask_latents(self, patches, ids_visible, ids_masked):
        """patches [B, N, P] -> latents of the mask tokens [B, M, D], after the final norm."""
        K = self.num_proxy
        pos = self.pos_embed[:, K:]
        visible = self.patch_embed(gather(patches, ids_visible)) + gather(pos, ids_visible)
        mask_tokens = self.mask_token + gather(pos, ids_masked)  # [B, M, D]
        x = self.with_proxies(visible, self.pos_embed)  # [B, K + V, D]
        if self.baseline:  # one stack, in which all tokens see each other
            x = torch.cat([x, mask_tokens], 1)
            for block in self.blocks:
                x = block(x)
            return self.norm(x[:, -mask_tokens.shape[1]:])
        for block, extra_block in zip(self.blocks, self.extra_blocks):
            x = block(x)  # compression
            mask_tokens = extra_block(mask_tokens, context=x[:, :K])  # reconstruction
        return self.norm(mask_tokens)

    def forward(self, images, is_masked=None, num_visible=None, tokens=None):
        """images [B, C, H, W], normalised per channel by the data set's mean and standard
        deviation; is_masked [B, N], drawn if None; num_visible: visible patches in a row of it, by
        default the model's; tokens [B, N]: the dVAE's ids, for the target dvae -> loss, logs."""
        if self.target == "dvae" and tokens is None:
            raise ValueError("the target dvae needs tokens [B, N], the ids of a Tokenizer")
        patches = patchify(images, self.patch_size)  # [B, N, P]
        if is_masked is None:
            is_masked = self.draw_mask(torch.rand(patches.shape[:2], device=images.device))
        ids_visible, ids_masked = split_ids(is_masked, num_visible or self.num_visible)
        latents = self.mask_latents(patches, ids_visible, ids_masked)
        pred = self.head(latents).float()  # [B, M, .]
        if self.target == "dvae":
            target = tokens.gather(1, ids_masked)  # [B, M]
            loss = F.cross_entropy(pred.flatten(0, 1), target.flatten())
            accuracy = (pred.argmax(-1) == target).float().mean()
            return loss, {"accuracy": accuracy, "pred_std": spread(pred)}
        target = gather(hog_target(images, self.patch_size), ids_masked)
        loss = (pred - target).square().mean()
        # loss_of_mean is the loss of predicting the targets' mean everywhere.
        return loss, {"loss_of_mean": target.var(unbiased=False), "pred_std": spread(pred),
                      "target_std": spread(target)}

    def run_blocks(self, images, blocks):
        """Run whole images through `blocks` of the compression stack -> [B, K + N, D]."""
        grid = patch_grid(images.shape[2:], self.patch_size)
        pos = resize_positions(self.pos_embed, self.grid, grid)
        x = self.patch_embed(patchify(images, self.patch_size)) + pos[:, self.num_proxy:]
        x = self.with_proxies(x, pos)
        for block in blocks:
            x = block(x)
        return x

    def encode(self, images):
        """images, normalised as for `forward`, of any size that p divides -> pooled [B, D], the
        paper's feature: the mean patch token BEFORE the final norm, then a LayerNorm without gain;
        patches [B, N, D] after the final norm. No patch is masked. Call `eval()` first."""
        x = self.run_blocks(images, self.blocks)[:, self.num_proxy:]
        return F.layer_norm(x.mean(1), x.shape[-1:], eps=1e-6), self.norm(x)

    def attention(self, images):
        """The attention weights of the last layer, averaged over heads (the paper's figure 1) ->
        [B, K + N, K + N]."""
        last = self.blocks[-1]
        q, k, _ = last.attn.project(last.norm1(self.run_blocks(images, self.blocks[:-1])))
        return (q.float() @ k.float().mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)

    def pictures(self, images, to_rgb):
        K = self.num_proxy
        weights = self.attention(images)[:, :K, K:].mean(1)  # [n, N], the mean over proxies
        weights = (weights / weights.amax(1, keepdim=True)).unflatten(1, self.grid)[:, None]
        # A column of features.png, beside the input and the PCA of the patches.
        return {"features.png": {"proxies attend to": F.interpolate(weights, images.shape[2:])}}

    @classmethod
    def from_released(cls, state_dict, **sizes):
        """A model with the authors' weights. `sizes` go to the constructor: default ViT-B, HOG."""
        state = {}
        for name, t in state_dict.get("state_dict", state_dict).items():
            if name.startswith("target_generator."):
                continue
            name = name.removeprefix("module.").removeprefix("backbone.")
            for theirs, ours in RENAMED:
                name = name.replace(theirs, ours)
            state[name] = t
        for name in [name for name in state if name.endswith(("attn.q.weight", "attn.q.bias"))]:
            both = torch.cat([state.pop(name), state.pop(name.replace("attn.q.", "attn.kv."))])
            state[name.replace("attn.q.", "attn.qkv.")] = both
        optional = ["head."] if sizes.get("baseline") else ["head.", "extra_blocks."]
        return load_released(cls(**sizes), state, optional)


Model = SemanticMIM
RENAMED = [  # from the authors' parameter names to ours; the order matters
    ("extra_layers.", "extra_blocks."), ("ffn.layers.0.0.", "mlp.fc1."),
    ("ffn.layers.1.", "mlp.fc2."), ("layers.", "blocks."), (".ln1.", ".norm1."),
    (".ln2.", ".norm2."), ("ln1.", "norm."), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"),
    ("projection.", "proj."), ("neck.fc.", "head."), ("head.cls_head.", "head."),
    ("attn.q_proj.", "attn.q."), ("attn.kv_proj.", "attn.kv."),
]


# ---- Training

def build(cfg):
    own = dict(vocab=cfg.vocab or 8192)
    return SemanticMIM(**arguments(SemanticMIM, cfg) | own)


NO_DECAY = {"hog": ["mask_token"], "dvae": ["cls_token", "pos_embed"]}  # and all 1-D tensors


def learning_rate(step, total, warmup, peak, first, last):
    """`step` counts from 0. Linear from `first` to the peak at step warmup - 1, then half a cosine
    that would reach `last` at step `total`."""
    if step < warmup - 1:
        return first + (peak - first) * step / (warmup - 1)
    return cosine(max(0, step - warmup), total - warmup, first=peak, last=last)


def train(cfg):
    cfg = with_recipe(cfg)
    cfg, run = start(cfg, "semantic_mim")  # checks flags, joins processes, picks device and dtype
    torch.manual_seed(cfg.seed)
    tokenizer = None
    if cfg.target == "dvae":
        tokenizer = Tokenizer.from_file(cfg.tokenizer, run.device)
        if cfg.vocab not in (None, tokenizer.vocab):
            raise BadInput(f"--vocab {cfg.vocab}: the --tokenizer file has {tokenizer.vocab}")
        cfg = dataclasses.replace(cfg, vocab=tokenizer.vocab)
    model = build(cfg).to(run.device)
    train_set, val_set = load_data(cfg, run)
    plan = Plan(cfg, len(train_set))

    def no_decay(name, p):
        return p.ndim <= 1 or name in NO_DECAY[cfg.target]
    optimizer = torch.optim.AdamW(param_groups(model, cfg, no_decay), betas=cfg.betas, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)
    checkpoint = Checkpoint(cfg, run, plan, model=model, optimizer=optimizer, scaler=scaler)
    done = checkpoint.resume()  # steps, the same number on every rank
    ddp = run.wrap(model, plan.total)  # compiles; adds DDP if there are several processes
    if tokenizer and run.compiled:
        tokenizer.logits = torch.compile(tokenizer.logits)  # half of the model's FLOPs
    meter = Meter(cfg, run, done, plan, scaler)
    look = Look(cfg, run, model, train_set, val_set)  # k-NN, effective rank, pictures
    if plan.evaluates_at(done):  # at the start; or again, as the process may have died in it
        meter.write_look(done, look(done))

    stream = train_batches(cfg, run, train_set, done, plan.total)
    for step in run.steps(done, plan.total):  # on a signal, the step is finished and saved
        lr = learning_rate(step - 1, plan.total, plan.warmup, plan.peak_lr,
                           first=cfg.first_lr * plan.peak_lr, last=cfg.last_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # A resumed run must drop the same branches.
        torch.manual_seed(seed_of("drop path", cfg.seed, step, run.rank))
        # Noise for the global batch: masks do not depend on the number of processes.
        noise = draw((cfg.batch_size, model.num_patches), run.device, "mask", cfg.seed, step)

        for micro in range(cfg.accum):
            with meter.waiting_for_data():
                images = next(stream)  # [m, C, H, W]
            if cfg.jitter:
                jitter_noise = draw((cfg.batch_size, 3), run.device, "jitter", cfg.seed, step)
                images = denormalise(images, cfg)  # 0..1
                images = colour_jitter(images, jitter_noise[run.rows(micro)], cfg.jitter)
                images = normalise(255 * images, cfg)
            tokens = None
            if tokenizer:
                tokens = tokenizer(denormalise(images, cfg), model.grid)  # [m, N]
            is_masked = model.draw_mask(noise[run.rows(micro)])
            ddp.require_backward_grad_sync = micro == cfg.accum - 1  # one all-reduce per step
            with run.autocast():
                loss, logs = ddp(images, is_masked, tokens=tokens)
            scaler.scale(loss / cfg.accum).backward()
            meter.add(loss=loss, **logs)

        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(model.parameters(), cfg.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        meter.step_done(grad_norm=grad_norm)

        if plan.reports_at(step) or run.asked_to_stop:
            report = meter.report(step, lr=lr)  # the only synchronisation
            if not report.finite:
                return run.stop_not_finite(report)  # keeps the last good checkpoint
            if plan.saves_at(step) or report.stop:
                checkpoint.save(step)
            if plan.evaluates_at(step):
                meter.write_look(step, look(step))
            if report.stop and step < plan.total:
                return run.stop_by_signal(step)
    meter.close()
    return 0


if __name__ == "__main__":
    main(train, Config, __doc__)
