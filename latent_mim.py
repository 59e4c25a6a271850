"""Towards Latent Masked Image Modeling for Self-Supervised Visual Representation Learning (Wei et al., arXiv 2407.15837).

As in MAE most patches are hidden, but what is predicted is not their pixels: it is what a second encoder, a slow moving
average of the first, makes of them. The danger is that both agree to say nothing. Four things together prevent it: the
teacher moves slowly; a prediction has to tell its own patch from all others of the image; patches are cut with gaps, so
that a neighbour's edge gives nothing away; and the likeness of an image's tokens is held to a schedule.

  images [B, C, G (p + g), G (p + g)], cells of p + g pixels
    1. one random p x p crop of each cell: patches [B, N, P]                 cell_crops
    2. 10 % visible patches + CLS -> encoder, projector [B, 1 + V, D]        encoder(...)
    3. hidden patches + CLS -> the teacher, the targets [B, M, D]            teacher(...), no gradient
    4. mask tokens with visual cues look at 2. -> predictions [B, M, D]      decoder(...)
    5. each prediction finds its target among the image's own                patch_discrimination
     + 0.1 (s(pred) - s*)^2 + 0.1 (s(visible) - s*)^2, s* from 0.75 to 0.25  similarity
  After training an image's feature is the mean of its patch tokens before the final norm (`encode`, g = 0).

  python latent_mim.py                                                     on pictures that common.py draws
  python latent_mim.py --data DIR --img-size 96 --out runs/mine-latent     any folder of images, the same small model
  python latent_mim.py --loss l2 --ema 0 0 --sim-coeff 0 --out runs/naive  the naive variant (Fig. 3): watch it collapse
  torchrun --nproc_per_node 8 latent_mim.py --out runs/latent-base --data DIR --img-size 224 --model base --batch-size 4096 \
      --epochs 800 --warmup-epochs 40 --base-lr 1.5e-4 --proj-dim 4096 --decoder-dim 512 --decoder-depth 3 --decoder-heads 16 \
      --clip-grad 0                                                        the paper's ImageNet recipe; not run at that scale

Result of the first, on one thread, seeds 0, 1, 2 (bf16, EPYC, torch 2.15; 1 min 55 s on two): k-NN of the nearest object's kind
44.7, 45.1, 45.3 %; untrained 25.5, 25.8, 24.2, raw pixels 26.1, 29.1, 28.0.

Health: s(pred), s(visible) and s(target) are the mean cosines of an image's tokens to one another, 1 when all are the
same. They show a collapse long before the loss does: s(target) near 1 means that the teacher says one thing of every
patch. Healthy is s(pred) and s(visible) following s*, and s(target) well below 1.

Differs from the authors' program:
- s is the mean over the images of all processes in a micro-batch, so that two processes equal one; theirs is the mean over
  one process. At their 256 images per process the difference is 1e-6 of the loss.
- The visible patches are a share instead of a count (20 of 196), so that small grids work.
- `--loss l2` is their `norm_l2`, the only L2 objective that they have.
- Gradients are clipped to norm 1; `--clip-grad 0` disables this, as in the paper.
- Batches run across the end of an epoch; theirs drops the last incomplete batch.
- Mixed precision is bf16; theirs is fp16 with a loss scaler (`--amp fp16`).
- Images are turned upright by their EXIF orientation; theirs ignores it.
24 recorded steps of their program agree: see tests/test_trajectories.py.
"""

import copy
import dataclasses
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (MODELS, Attention, BadInput, Block, LayerNorm, Log, Mlp, PatchEmbed, attend, check_decoder, check_health,
                    cosine, count_blocks, denormalise, draw, eval_batches, flag, gather, load_data, load_strictly, main,
                    of_all_processes, param_groups, patch_grid, patchify, pca_colours, random_mask, raw_pixels,
                    resize_positions, resume, save_picture, sincos_2d, split_ids, spread, start, train_batches, update_ema,
                    usual_heads, warmup_cosine, warn_of_trouble, xavier_init)


# ---------------------------------------------------------------------------------------------------------------
# Config: the method's own, then what all five share. Values are the quick demo's; the help says where the paper's differ
# ---------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config:
    visible_share: float = flag(20 / 196, "share of the patches that the encoder sees; at least 2 patches (Sec. 4)",
                                least=0, most=1)
    gap: int = flag(-1, "pixels by which a cell is wider than its patch; -1 is a quarter of the patch, the paper's", least=-1)
    proj_dim: int = flag(384, "hidden width of the projector; the paper's is 4096", least=1)
    decoder_dim: int = flag(64, "width of the decoder; the paper's is 512", least=1)
    decoder_depth: int = flag(2, "blocks of the decoder; the paper's is 3", least=1)
    decoder_heads: int = flag(2, "heads of the decoder; the paper's is 16", least=1)
    loss: str = flag("patch", "patch: patch discrimination; l2: squared distance to standardised targets, the naive variant",
                     ("patch", "l2"))
    tau: float = flag(0.2, "temperature of the patch discrimination", least=0.01)
    sim_coeff: float = flag(0.1, "weight of the two similarity terms", least=0)
    sim_target: tuple[float, ...] = flag((0.75, 0.25), "s* at the start and at the end, a cosine between", least=-1, most=1)
    ema: tuple[float, ...] = flag((0.99, 1.0), "momentum of the teacher, at the start and the end; cosine between",
                                  least=0, most=1)
    crop_scale: tuple[float, ...] = (0.2, 1.0)
    betas: tuple[float, ...] = (0.9, 0.95)

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
    base_lr: float = 6e-3  # the paper's 1.5e-4 is for ViT-B and 800 epochs
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    workers: int = -1
    seed: int = 0
    device: str = "auto"
    amp: str = "auto"
    compile: str = "auto"
    out: str = "runs/latent_mim"
    resume: str = "auto"
    save_every: int = 5
    eval_every: int = 0
    log_every: int = 20


# ---------------------------------------------------------------------------------------------------------------
# What the paper adds: patches with gaps; a predictor that looks at the context
# ---------------------------------------------------------------------------------------------------------------

def cell_crops(images, grid, p, offsets):
    """One p x p patch out of each cell: images [B, C, gh * (p + g), gw * (p + g)], offsets [B, N, 2] (row, column), each
    0..g-1 -> [B, N, P]. With gaps between them, a patch's edge does not continue in its neighbour."""
    cell, chans = images.shape[2] // grid[0], images.shape[1]
    cells = patchify(images, cell)  # [B, N, cell * cell * C]
    if cell == p:
        return cells
    corner = (offsets[..., :1] * cell + offsets[..., 1:]) * chans  # [B, N, 1], the patch's first number in its cell
    row, column, channel = torch.meshgrid(*[torch.arange(n, device=images.device) for n in (p, p, chans)], indexing="ij")
    inside = (row * cell + column) * chans + channel  # [p, p, C]
    return cells.gather(2, corner + inside.flatten())


def random_offsets(noise, gap):
    """noise [B, N, 2], uniform -> 0..gap-1."""
    return (noise * gap).long()


class CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.kv_proj, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x, context):  # [B, Q, E], [B, T, E] -> [B, Q, E]
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, Q, d]
        k, v = self.kv_proj(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 2 x [B, heads, T, d]
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Queries look at each other, then at the context, then an MLP."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.self_attn = LayerNorm(dim), Attention(dim, heads)
        self.norm2q, self.norm2kv, self.cross_attn = LayerNorm(dim), LayerNorm(dim), CrossAttention(dim, heads)
        self.norm3, self.mlp = LayerNorm(dim), Mlp(dim, 4 * dim)

    def forward(self, x, context):
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2q(x), self.norm2kv(context))
        return x + self.mlp(self.norm3(x))


# ---------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------

def patch_discrimination(pred, target, tau):
    """Each prediction has to find its own target among those of the SAME image: [B, M, D] twice -> scalar. Predictions are
    standardised over the image's patches first, which takes away what they all have in common."""
    pred = (pred - pred.mean(1, keepdim=True)) / (pred.std(1, keepdim=True) + 1e-4)
    logits = F.normalize(pred, dim=-1) @ F.normalize(target, dim=-1).mT / tau  # [B, M, M]
    return -2 * tau * logits.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()


def similarity(tokens):
    """s: the mean cosine over all pairs of an image's tokens [B, T, D], each with itself too; mean over images. All the
    pairs are one vector: the mean cosine is the squared length of the mean direction."""
    return F.normalize(tokens, dim=-1).mean(1).square().sum(-1).mean()


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------

class Projector(nn.Module):
    """Three Linears without bias, each followed by a norm (eps 1e-5, unlike all others)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.linear0, self.norm0 = nn.Linear(dim, hidden, bias=False), nn.LayerNorm(hidden)
        self.linear1, self.norm1 = nn.Linear(hidden, hidden, bias=False), nn.LayerNorm(hidden)
        self.linear2, self.norm2 = nn.Linear(hidden, dim, bias=False), nn.LayerNorm(dim)

    def forward(self, x):
        x = F.gelu(self.norm0(self.linear0(x)))
        x = F.gelu(self.norm1(self.linear1(x)))
        return self.norm2(self.linear2(x))


def axes_of(grid):
    """Coordinates of rows and of columns: 0..G inclusive on G points, not 0..G-1."""
    return [torch.linspace(0, 1, n) * n for n in grid]


class Encoder(nn.Module):
    """A plain ViT (timm's names), and the projector `head`. Student and teacher are two of these."""

    def __init__(self, grid, patch_size, in_chans, dim, depth, heads, proj_dim):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.register_buffer("pos_embed", F.pad(sincos_2d(dim, *axes_of(grid)), (0, 0, 1, 0)))  # [1, 1 + N, D], CLS row zero
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.head = Projector(dim, proj_dim)

    def tokens(self, patches, pos):  # [B, T, P], [B or 1, T, D] -> [B, 1 + T, D], before the final norm
        x = self.patch_embed(patches) + pos
        return self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))

    def forward(self, patches, ids):  # [B, N, P], [B, T]: the patches at these places -> projected [B, 1 + T, D]
        return self.head(self.norm(self.tokens(gather(patches, ids), gather(self.pos_embed[:, 1:], ids))))


class Decoder(nn.Module):
    def __init__(self, grid, dim, width, depth, heads):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", F.pad(sincos_2d(width, *axes_of(grid)), (0, 0, 1, 0)))
        self.blocks = nn.ModuleList([CrossBlock(width, heads) for _ in range(depth)])
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, dim)

    def forward(self, latent, ids_visible, ids_masked):  # [B, 1 + V, D] -> predictions [B, M, D]
        context = self.embed(latent)  # [B, 1 + V, E]
        pos = self.pos_embed[:, 1:]
        pos_visible, pos_masked = gather(pos, ids_visible), gather(pos, ids_masked)
        # The visual cue: what is visible, averaged with more weight on what is near (by positions alone).
        with torch.autocast(pos.device.type, enabled=False):  # bf16 would be off by several percent
            near = (pos_masked @ pos_visible.mT / pos.shape[-1] ** 0.5).softmax(-1)  # [B, M, V]
        queries = self.mask_token + near @ context[:, 1:] + pos_masked  # [B, M, E]
        queries = torch.cat([self.cls_token.expand(len(queries), -1, -1), queries], 1)
        context = torch.cat([context[:, :1], context[:, 1:] + pos_visible], 1)
        for block in self.blocks:
            queries = block(queries, context)
        return self.head(self.norm(queries))[:, 1:]


class LatentMIM(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=768, depth=12, heads=12, decoder_dim=512,
                 decoder_depth=3, decoder_heads=16, num_visible=20, proj_dim=4096, gap=0, tau=0.2, sim_coeff=0.1,
                 sim_target=0.25, loss="patch"):
        super().__init__()
        check_decoder(decoder_dim, decoder_heads)
        self.grid, self.patch_size, self.gap = patch_grid(img_size, patch_size), patch_size, gap
        self.tau, self.sim_coeff, self.sim_target, self.objective = tau, sim_coeff, sim_target, loss
        self.num_patches, self.num_visible = self.grid[0] * self.grid[1], num_visible  # N, V
        if not 2 <= num_visible <= self.num_patches - 2:
            raise BadInput(f"--visible-share: {num_visible} of {self.num_patches} patches visible; at least two must be, "
                           "and two masked")
        self.encoder = Encoder(self.grid, patch_size, in_chans, dim, depth, heads, proj_dim)
        self.decoder = Decoder(self.grid, dim, decoder_dim, decoder_depth, decoder_heads)
        self.init_weights()
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def init_weights(self):
        xavier_init(self)
        nn.init.zeros_(self.encoder.patch_embed.proj.bias)  # the authors' patch projection is a Linear
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.decoder.cls_token, std=0.02)

    def forward(self, images, mask=None, num_visible=None, offsets=None, sim_target=None):
        """images [B, C, H, W] with gaps between the cells, or without; mask bool [B, N], True = masked, the same number
        in each row; offsets [B, N, 2], the place of each patch in its cell; sim_target, s* at this step. None draws one,
        or takes the model's own. Without num_visible a mask is counted, and a GPU waits for it. -> loss, logs."""
        if mask is None:
            mask = random_mask(torch.rand(len(images), self.num_patches, device=images.device),
                               self.num_patches - self.num_visible)
            num_visible = self.num_visible
        if offsets is None:
            offsets = random_offsets(torch.rand(*mask.shape, 2, device=images.device),
                                     images.shape[2] // self.grid[0] - self.patch_size)
        sim_target = self.sim_target if sim_target is None else sim_target
        ids_visible, ids_masked = split_ids(mask, num_visible)

        patches = cell_crops(images, self.grid, self.patch_size, offsets)  # [B, N, P]
        latent = self.encoder(patches, ids_visible)  # [B, 1 + V, D]
        with torch.no_grad():
            target = self.teacher(patches, ids_masked)[:, 1:].float()  # [B, M, D]
        pred = self.decoder(latent, ids_visible, ids_masked).float()  # [B, M, D]

        with torch.autocast(images.device.type, enabled=False):  # cosines in float32
            if self.objective == "patch":
                patch_loss = patch_discrimination(pred, target, self.tau)
            else:
                patch_loss = F.mse_loss(pred, F.layer_norm(target, target.shape[-1:], eps=1e-6))
            s_pred, s_visible = (of_all_processes(similarity(t)) for t in (pred, latent[:, 1:].float()))
            loss = patch_loss + self.sim_coeff * ((s_pred - sim_target).square() + (s_visible - sim_target).square())
            logs = {"patch_loss": patch_loss.detach(), "s_pred": s_pred.detach(), "s_visible": s_visible.detach(),
                    "s_target": similarity(target), "pred_std": spread(pred), "target_std": spread(target)}
        return loss, logs

    def encode(self, images):
        """images -> pooled [B, D], patches [B, N, D]: the student, nothing masked, no gaps, BEFORE the final norm and the
        projector; pooled is the mean of the patches (Sec. 4). Other image sizes are fine: positions are resized."""
        grid = patch_grid(images.shape[2:], self.patch_size)
        pos = resize_positions(self.encoder.pos_embed, self.grid, grid)[:, 1:]
        patches = self.encoder.tokens(patchify(images, self.patch_size), pos)[:, 1:]
        return patches.mean(1), patches

    @classmethod
    def from_released(cls, state_dict, **sizes):
        """A model from the authors' file, a dict of tensors or one with the key `state_dict` (names with `module.` in
        front). Sizes are read from the tensors; heads cannot be (usual ones, 16 in the decoder, unless said)."""
        state = {name.removeprefix("module."): t for name, t in state_dict.get("state_dict", state_dict).items()}
        missing = {"encoder.embed.proj.weight", "encoder.pos_embed.pos_embeds", "encoder.head.linear0.weight"} - state.keys()
        if missing:
            raise BadInput(f"not a released Latent MIM: it has no {', '.join(sorted(missing))}")
        length, dim = state["encoder.pos_embed.pos_embeds"].shape
        ours = lambda name: name.replace("target_encoder.", "teacher.").replace("pos_embed.pos_embeds", "pos_embed").replace(
            ".embed.proj.", ".patch_embed.proj.")
        state = {ours(name): t[None] if name.endswith("pos_embeds") else t for name, t in state.items()}
        in_chans = sizes.get("in_chans", 3)
        patch_size = math.isqrt(state["encoder.patch_embed.proj.weight"].shape[1] // in_chans)
        for name in ("encoder.patch_embed.proj.weight", "teacher.patch_embed.proj.weight"):  # a Linear over (row, column,
            if name in state and state[name].shape[1] == patch_size**2 * in_chans:  # channel), as PatchEmbed computes it
                state[name] = state[name].unflatten(1, (patch_size, patch_size, in_chans)).permute(0, 3, 1, 2).contiguous()
        sizes = {"img_size": math.isqrt(length - 1) * patch_size, "patch_size": patch_size, "in_chans": in_chans, "dim": dim,
                 "depth": count_blocks(state, "encoder.blocks"), "heads": usual_heads(dim),
                 "proj_dim": len(state["encoder.head.linear0.weight"])} | sizes
        if "decoder.embed.weight" in state:
            sizes = {"decoder_dim": len(state["decoder.embed.weight"]),
                     "decoder_depth": count_blocks(state, "decoder.blocks")} | sizes
        return load_strictly(cls(**sizes), state, "a released Latent MIM", sizes, optional=[("decoder.",)])


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------

def build(cfg):
    dim, depth, heads = MODELS[cfg.model]
    rows, columns = patch_grid(cfg.img_size, cfg.patch_size)
    return LatentMIM(img_size=cfg.img_size, patch_size=cfg.patch_size, in_chans=cfg.in_chans, dim=dim, depth=depth,
                     heads=heads, decoder_dim=cfg.decoder_dim, decoder_depth=cfg.decoder_depth,
                     decoder_heads=cfg.decoder_heads, num_visible=max(2, round(cfg.visible_share * rows * columns)),
                     proj_dim=cfg.proj_dim, gap=cfg.patch_size // 4 if cfg.gap < 0 else cfg.gap, tau=cfg.tau,
                     sim_coeff=cfg.sim_coeff, loss=cfg.loss)


def train(cfg):
    # -- set-up: everything that can be wrong is found out here, before anything is written
    cfg, run = start(cfg)
    torch.manual_seed(cfg.seed)
    model = build(cfg).to(run.device)
    train_set, val_set = load_data(cfg, run)
    steps = lambda epochs: max(1, round(epochs * len(train_set) / cfg.batch_size))
    total, warmup = steps(cfg.epochs), steps(cfg.warmup_epochs) if cfg.warmup_epochs else 0
    peak_lr = cfg.base_lr * cfg.batch_size / 256
    exempt = lambda name, p: any(word in name for word in ("bias", "norm", "embed"))
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay, exempt), lr=peak_lr, betas=cfg.betas,
                                  fused=run.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)

    first = resume(cfg, "latent_mim", run, model=model, optimizer=optimizer, scaler=scaler)
    if first >= total:
        run.say(f"nothing to do: {first} of {total} steps are done; more --epochs goes on, --resume no starts over")
        return 0
    run.describe(cfg, model, total, peak_lr)
    log = Log(cfg, "latent_mim", run, first)

    if run.compile:
        model.compile()  # in place: the names in a checkpoint stay as they are
    ddp = DistributedDataParallel(model, device_ids=[run.local_rank] if run.device.type == "cuda" else None,
                                  gradient_as_bucket_view=True, broadcast_buffers=False) if run.world > 1 else model

    # -- what is looked at along the way: frozen features, and a picture of the same images
    show = next(eval_batches(cfg, run, val_set or train_set, torch.arange(min(8, len(val_set or train_set)))))[0]

    def look(step, **scores):
        scores |= check_health(model.encode, cfg, run, train_set, val_set)
        warn_of_trouble(run, scores)
        log.write(step=step, images=step * cfg.batch_size, **scores)
        if run.main:
            save_picture(Path(cfg.out, "features.png"), [denormalise(show, cfg), pca_colours(
                model.encode(show)[1], model.grid, show.shape[2:])])

    if first == 0:
        look(0, **check_health(raw_pixels, cfg, run, train_set, val_set, "raw_"))

    # -- the loop
    cells = [n * (model.patch_size + model.gap) for n in model.grid]  # an image with its gaps
    stream = train_batches(cfg, run, train_set, cfg.crop_scale, first, total, cells)
    bar = tqdm(total=total * cfg.batch_size, initial=first * cfg.batch_size, unit="img", unit_scale=True,
               disable=not run.main, smoothing=0.05, mininterval=0.2 if sys.stderr.isatty() else 30)
    clock, waited, bad = time.perf_counter(), 0.0, torch.zeros((), device=run.device)
    logged = first
    for step in range(first + 1, total + 1):
        lr = warmup_cosine(step - 1, total, warmup, peak_lr, first=peak_lr / 4, last=peak_lr / 4)
        sim_target = torch.full((), cosine(step - 1, total, *cfg.sim_target), device=run.device)
        if step > 1:  # before the targets are computed; at first the teacher is a copy
            update_ema(model.teacher, model.encoder, cosine(step - 1, total, *cfg.ema))
        for group in optimizer.param_groups:
            group["lr"] = lr

        values = 0
        for micro in range(cfg.accum):
            began = time.perf_counter()
            images = next(stream)  # [m, C, H, W]
            waited += time.perf_counter() - began
            # drawn for the global batch, of which some rows are ours: no mask depends on the number of processes
            noise = draw((cfg.batch_size, model.num_patches), run.device, "mask", cfg.seed, step)
            mask = random_mask(noise[run.rows(cfg, micro)], model.num_patches - model.num_visible)
            noise = draw((cfg.batch_size, model.num_patches, 2), run.device, "offsets", cfg.seed, step)
            offsets = random_offsets(noise[run.rows(cfg, micro)], model.gap)
            if run.world > 1:  # gradients travel once, with the last micro-batch
                ddp.require_backward_grad_sync = micro == cfg.accum - 1
            with run.autocast():
                loss, logs = ddp(images, mask, model.num_visible, offsets, sim_target)
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
            if values[names.index("s_target")] > 0.995:
                run.warn("collapse of the targets", "s_target is 1: the teacher says the same of every patch of an image")
            run.warn_if_data_bound(waited / seconds)
            if evaluate:
                look(step)
            if save or stop:
                run.save(cfg, method="latent_mim", config=dataclasses.asdict(cfg), step=step, model=model.state_dict(),
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
