r"""Towards Latent Masked Image Modeling for Self-Supervised Visual Representation Learning
(Wei et al., arXiv 2407.15837).

As in MAE, most patches are masked. But the decoder does not predict their pixels. It predicts a
teacher's features of them; the teacher is a slow moving average of the encoder. The danger is that
student and teacher agree to say nothing. Four things prevent it: the teacher moves slowly; a
prediction must be more similar to its own target than to those of the image's other masked patches;
patches are cut with gaps, so that a neighbour's edge does not reveal them; and a loss term keeps
the similarity of an image's tokens on a schedule.

  images [B, C, G (p + g), G (p + g)]: G x G cells of p + g pixels; --img-size is G p, without gaps
    1. a random p x p crop of each cell: patches [B, N, P]             cell_crops
    2. CLS + a random 20 of 196 patches -> projected [B, 1 + V, D]     draw_mask, encoder
    3. CLS + the masked patches only -> targets [B, M, D], no gradient teacher
    4. mask tokens with cues attend to 2's output -> pred [B, M, D]    decoder
    5. cross-entropy: which of the M targets, temperature tau = 0.2    patch_discrimination
       + 0.1 (s(pred) - s*)^2 + 0.1 (s(visible) - s*)^2                similarity
       where s* falls from 0.75 to 0.25
  Positions are fixed sin-cos functions of a patch's cell, in encoder and decoder.
  An image's feature is the mean of the student's patch tokens before the final norm (`encode`).
  s_target near 1 in the log means collapse: all patches of an image have the same target.
  Letters: B images, N patches of P = p * p * C numbers, V visible, M masked; width D, decoder E.

  python latent_mim.py                                                     the demo
  python latent_mim.py --data DIR --img-size 96 --out runs/mine-latent     any folder of images
  python latent_mim.py --loss l2 --ema 0 0 --sim-coeff 0 --out runs/naive  collapses
  torchrun --nproc_per_node 8 latent_mim.py --out runs/latent-base --data DIR --img-size 224 \
      --model base --batch-size 4096 --epochs 800 --warmup-epochs 40 --base-lr 1.5e-4 \
      --proj-dim 4096 --decoder-dim 512 --decoder-depth 3 --decoder-heads 16 \
      --clip-grad 0                                      the paper's recipe; we have not run it

Differs from the authors' program:
- s is averaged over the images of all processes; theirs over each process alone. As in theirs, s is
  computed per micro-batch, so `--accum` changes the loss a little.
- `--visible-share` replaces their count of visible patches, so that small grids work.
- Gradients are clipped to norm 1; `--clip-grad 0` disables this, as in the paper.
- A batch may span two epochs; theirs drops the last incomplete batch of an epoch.
- JPEGs at least twice as large as needed are decoded at 1/2, 1/4 or 1/8 of their size.
- Mixed precision is bf16; theirs is fp16 with a loss scaler, here `--amp fp16`.
tests/test_trajectories.py repeats 24 recorded steps of their program: losses agree within 1e-5.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import (Attention, Block, Checkpoint, Look, Meter, Mlp, PatchEmbed, Plan, TrainConfig,
                    arguments, attend, check_visible, clip_gradients, cosine, draw, flag, gather,
                    load_data, load_released, main, param_groups, patch_grid, patchify,
                    random_mask, resize_positions, sincos_2d, split_ids, spread, start,
                    train_batches, update_ema, warmup_cosine, xavier_init)

norm = partial(nn.LayerNorm, eps=1e-6)  # of encoder and decoder; the projector's have 1e-5


# ---- Config: own flags and changed defaults. The defaults are the demo's.

@dataclass(frozen=True)
class Config(TrainConfig):
    visible_share: float = flag(20 / 196, "share of the patches that are visible", 0, 1)
    gap: int | None = flag(None, "gap g in pixels; default, the paper's: a quarter of a patch", 0)
    proj_dim: int = flag(384, "hidden width of the projector; the paper's is 4096", 1)
    decoder_dim: int = flag(64, "width of the decoder; the paper's is 512", 1)
    decoder_depth: int = flag(2, "blocks of the decoder; the paper's is 3", 1)
    decoder_heads: int = flag(2, "heads of the decoder; the paper's is 16", 1)
    loss: str = flag("patch", "patch: patch discrimination; l2: the authors' norm_l2",
                     choices=["patch", "l2"])
    tau: float = flag(0.2, "temperature of the patch discrimination", 0.01, 100)
    sim_coeff: float = flag(0.1, "weight of the two similarity terms", 0, 1e6)
    sim_target: tuple[float, ...] = flag((0.75, 0.25), "first and last similarity s* that the loss "
                                         "aims at", -1, 1)
    ema: tuple[float, ...] = flag((0.99, 1.0), "first and last momentum of the teacher", 0, 1)
    epochs: int = 6
    base_lr: float = 6e-3  # per 256 images; the paper's 1.5e-4 is for ViT-B, 800 epochs
    out: str = "runs/latent_mim"
    # As in common.py: 1 epoch of warm-up; weight decay 0.05 and betas 0.9, 0.95, the paper's.


# ---- What the paper adds: patches with gaps, cross-attention, the losses

def cell_crops(images, grid, p, offsets):
    """images [B, C, gh * (p + g), gw * (p + g)], offsets [B, N, 2] in 0..g-1 -> a p x p crop of
    each cell [B, N, P]."""
    chans = images.shape[1]
    cell = images.shape[2] // grid[0]
    cells = patchify(images, cell)  # [B, N, cell * cell * C]
    if cell == p:  # no gaps
        return cells
    # The loop would be: out[b, n] = cells[b, n][row:row + p, column:column + p].flatten()
    index = torch.arange(cell * cell * chans, device=images.device).view(cell, cell, chans)
    index = index[:p, :p].flatten()  # [P], of the patch in the cell's corner
    shift = (offsets[..., 0] * cell + offsets[..., 1]) * chans  # [B, N]
    return cells.gather(2, shift[..., None] + index)


class CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, context):  # [B, Q, E], [B, T, E] -> [B, Q, E]
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, Q, d]
        k, v = self.kv_proj(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # k, v [B, heads, T, d]
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):  # queries attend to each other, then to the context
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = norm(dim)
        self.self_attn = Attention(dim, heads)
        self.norm2q = norm(dim)
        self.norm2kv = norm(dim)
        self.cross_attn = CrossAttention(dim, heads)
        self.norm3 = norm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, context):
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2q(x), self.norm2kv(context))
        return x + self.mlp(self.norm3(x))


def patch_discrimination(pred, target, tau):
    """Cross-entropy over the targets of the SAME image: pred, target [B, M, D] -> scalar. The
    predictions are first standardised over the image's masked patches. The factor 2 tau is the
    authors'."""
    pred = (pred - pred.mean(1, keepdim=True)) / (pred.std(1, keepdim=True) + 1e-4)
    logits = F.normalize(pred, dim=-1) @ F.normalize(target, dim=-1).mT / tau  # [B, M, M]
    return -2 * tau * logits.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()


def normalised_l2(pred, target):
    """Mean squared error to targets that are normalised per token; pred is not normalised."""
    return F.mse_loss(pred, F.layer_norm(target, target.shape[-1:], eps=1e-6))


def similarity(tokens):
    """s: the mean cosine over all pairs of an image's tokens [B, T, D], self pairs included,
    averaged over images. It equals the squared length of the mean unit vector."""
    return F.normalize(tokens, dim=-1).mean(1).square().sum(-1).mean()


def over_ranks(value):
    """A mean over this rank's images -> the mean over all ranks, with this rank's gradient. s
    enters the loss squared, so the mean of the ranks' losses is not the loss of the batch."""
    if not dist.is_initialized():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return value + (total / dist.get_world_size() - value.detach())


# ---- Model

class Projector(nn.Sequential):
    def __init__(self, dim, hidden):
        super().__init__(OrderedDict(
            linear0=nn.Linear(dim, hidden, bias=False),
            norm0=nn.LayerNorm(hidden, eps=1e-5), gelu0=nn.GELU(),
            linear1=nn.Linear(hidden, hidden, bias=False),
            norm1=nn.LayerNorm(hidden, eps=1e-5), gelu1=nn.GELU(),
            linear2=nn.Linear(hidden, dim, bias=False), norm2=nn.LayerNorm(dim, eps=1e-5)))


def positions(grid, dim):
    """Sin-cos positions [1, 1 + N, dim]; zero for CLS. As in the authors' program the n coordinates
    of an axis go evenly from 0 to n, not to n - 1."""
    rows, cols = (torch.linspace(0, 1, n) * n for n in grid)
    return F.pad(sincos_2d(dim, rows, cols), (0, 0, 1, 0))


class Encoder(nn.Module):
    """A ViT and the projector `head`. Student and teacher are two of these."""

    def __init__(self, grid, patch_size, in_chans, dim, depth, heads, proj_dim):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.register_buffer("pos_embed", positions(grid, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, norm) for _ in range(depth)])
        self.norm = norm(dim)
        self.head = Projector(dim, proj_dim)

    def tokens(self, patches, pos):  # [B, T, P], [B or 1, T, D] -> [B, 1 + T, D] before the norm
        x = self.patch_embed(patches) + pos
        return self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))

    def forward(self, patches, ids):  # patches [B, N, P], ids [B, T] of those it sees
        x = self.tokens(gather(patches, ids), gather(self.pos_embed[:, 1:], ids))
        return self.head(self.norm(x))  # projected [B, 1 + T, D]


class Decoder(nn.Module):
    def __init__(self, grid, dim, width, depth, heads):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", positions(grid, width))
        self.blocks = nn.ModuleList([CrossBlock(width, heads) for _ in range(depth)])
        self.norm = norm(width)
        self.head = nn.Linear(width, dim)

    def forward(self, latent, ids_visible, ids_masked):  # [B, 1 + V, D] -> predictions [B, M, D]
        context = self.embed(latent)  # [B, 1 + V, E]
        pos_visible = gather(self.pos_embed[:, 1:], ids_visible)
        pos_masked = gather(self.pos_embed[:, 1:], ids_masked)
        # The visual cue is the mean of the visible tokens, weighted by how similar their positions
        # are. In bf16 the weights would be off by several percent.
        with torch.autocast(latent.device.type, enabled=False):
            weights = pos_masked @ pos_visible.mT / pos_masked.shape[-1] ** 0.5
            weights = weights.softmax(-1)  # [B, M, V]
        queries = self.mask_token + weights @ context[:, 1:] + pos_masked  # [B, M, E]
        # Masked patches can also attend to a CLS query. Its own output is dropped.
        queries = torch.cat([self.cls_token.expand(len(queries), -1, -1), queries], 1)
        context = torch.cat([context[:, :1], context[:, 1:] + pos_visible], 1)
        for block in self.blocks:
            queries = block(queries, context)
        return self.head(self.norm(queries))[:, 1:]


class LatentMIM(nn.Module):
    encoder_name = "encoder"  # for evaluate.py: the submodule with the blocks
    pool = "mean"  # the paper's feature

    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=768, depth=12, heads=12,
                 decoder_dim=512, decoder_depth=3, decoder_heads=16, num_visible=20, proj_dim=4096,
                 gap=4, tau=0.2, sim_coeff=0.1, loss="patch"):
        super().__init__()
        self.grid = patch_grid(img_size, patch_size)
        self.patch_size = patch_size  # p
        self.gap = gap  # g
        self.tau = tau
        self.sim_coeff = sim_coeff
        self.objective = loss
        self.num_patches = self.grid[0] * self.grid[1]  # N
        self.num_visible = num_visible  # V
        check_visible("--visible-share", num_visible, self.num_patches, least=2)
        self.encoder = Encoder(self.grid, patch_size, in_chans, dim, depth, heads, proj_dim)
        self.decoder = Decoder(self.grid, dim, decoder_dim, decoder_depth, decoder_heads)
        xavier_init(self)
        nn.init.zeros_(self.encoder.patch_embed.proj.bias)  # theirs is a Linear, with bias 0
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.decoder.cls_token, std=0.02)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def draw_mask(self, noise):  # uniform [B, N] -> is_masked [B, N], M = N - V of them True
        return random_mask(noise, self.num_patches - self.num_visible)

    def draw_offsets(self, noise):  # uniform [B, N, 2] -> a patch's place in its cell, 0..g-1
        return (noise * self.gap).long()

    def forward(self, images, is_masked=None, num_visible=None, offsets=None, sim_target=0.25):
        """images [B, C, gh * (p + g), gw * (p + g)], normalised per channel by the data set's mean
        and standard deviation; is_masked [B, N] and offsets [B, N, 2], drawn if None; num_visible:
        visible patches in a row of is_masked, by default the model's; sim_target: s* -> loss, logs.
        Does not move the teacher: call `update_teacher`."""
        B, N = len(images), self.num_patches
        if is_masked is None:
            is_masked = self.draw_mask(torch.rand(B, N, device=images.device))
        if offsets is None:
            offsets = self.draw_offsets(torch.rand(B, N, 2, device=images.device))
        ids_visible, ids_masked = split_ids(is_masked, num_visible or self.num_visible)
        patches = cell_crops(images, self.grid, self.patch_size, offsets)  # [B, N, P]
        latent = self.encoder(patches, ids_visible)  # [B, 1 + V, D]
        with torch.no_grad():
            target = self.teacher(patches, ids_masked)[:, 1:].float()  # [B, M, D]
        pred = self.decoder(latent, ids_visible, ids_masked).float()  # [B, M, D]

        with torch.autocast(images.device.type, enabled=False):  # cosines in float32
            if self.objective == "patch":
                patch_loss = patch_discrimination(pred, target, self.tau)
            else:
                patch_loss = normalised_l2(pred, target)
            s_pred = over_ranks(similarity(pred))
            s_visible = over_ranks(similarity(latent[:, 1:].float()))
            sim_loss = (s_pred - sim_target).square() + (s_visible - sim_target).square()
            loss = patch_loss + self.sim_coeff * sim_loss
            logs = {"patch_loss": patch_loss, "s_pred": s_pred, "s_visible": s_visible,
                    "s_target": similarity(target), "pred_std": spread(pred),
                    "target_std": spread(target)}
        return loss, logs

    def update_teacher(self, momentum):  # <- momentum * teacher + (1 - momentum) * encoder
        update_ema(self.teacher, self.encoder, momentum)

    def encode(self, images):
        """images WITHOUT gaps, normalised as for `forward`, of any size that p divides -> pooled
        [B, D], the paper's feature: the mean of the patches; patches [B, N, D]. Both are the
        student's BEFORE the final norm. No patch is masked."""
        grid = patch_grid(images.shape[2:], self.patch_size)
        pos = resize_positions(self.encoder.pos_embed, self.grid, grid)[:, 1:]
        patches = self.encoder.tokens(patchify(images, self.patch_size), pos)[:, 1:]
        return patches.mean(1), patches

    def pictures(self, images, to_rgb):
        return {}  # besides features.png, which all methods have

    @classmethod
    def from_released(cls, state_dict, **sizes):
        """A model with the authors' weights. `sizes` go to the constructor (default: ViT-B)."""
        model = cls(**sizes)
        state = {}
        for name, t in state_dict.get("state_dict", state_dict).items():
            name = name.removeprefix("module.").replace("target_encoder.", "teacher.")
            name = name.replace("pos_embed.pos_embeds", "pos_embed")
            if name.endswith("pos_embed"):  # theirs is [1 + N, D]
                t = t[None]
            name = name.replace(".embed.proj.", ".patch_embed.proj.")
            if name.endswith("patch_embed.proj.weight"):  # a Linear over (row, column, channel)
                t = t.unflatten(1, (model.patch_size, model.patch_size, -1)).permute(0, 3, 1, 2)
            state[name] = t
        return load_released(model, state, optional=["decoder."])


Model = LatentMIM


# ---- Training

def build(cfg):
    rows, columns = patch_grid(cfg.img_size, cfg.patch_size)
    num_visible = max(2, round(cfg.visible_share * rows * columns))  # V, rounded to nearest
    gap = cfg.patch_size // 4 if cfg.gap is None else cfg.gap
    own = dict(num_visible=num_visible, gap=gap)
    return LatentMIM(**arguments(LatentMIM, cfg) | own)


def no_decay(name, p):
    """Parameters with bias, norm or embed in their names have no weight decay, so the patch
    projection and `decoder.embed` have none either. CLS and mask tokens do."""
    return any(word in name for word in ("bias", "norm", "embed"))


def train(cfg):
    cfg, run = start(cfg, "latent_mim")  # checks flags, joins processes, picks device and dtype
    torch.manual_seed(cfg.seed)
    model = build(cfg).to(run.device)
    train_set, val_set = load_data(cfg, run)
    plan = Plan(cfg, len(train_set))
    optimizer = torch.optim.AdamW(param_groups(model, cfg, no_decay), betas=cfg.betas, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)
    checkpoint = Checkpoint(cfg, run, plan, model=model, optimizer=optimizer, scaler=scaler)
    done = checkpoint.resume()  # steps, the same number on every rank
    ddp = run.wrap(model, plan.total)  # compiles; adds DDP if there are several processes
    meter = Meter(cfg, run, done, plan, scaler)
    look = Look(cfg, run, model, train_set, val_set)  # k-NN, effective rank, pictures
    if plan.evaluates_at(done):  # at the start; or again, as the process may have died in it
        meter.write_look(done, look(done))

    size = [n * (model.patch_size + model.gap) for n in model.grid]  # image size with the gaps
    stream = train_batches(cfg, run, train_set, done, plan.total, size)
    for step in run.steps(done, plan.total):  # on a signal, the step is finished and saved
        lr = warmup_cosine(step - 1, plan.total, plan.warmup, plan.peak_lr,
                           first=0.25 * plan.peak_lr, last=0.25 * plan.peak_lr)
        momentum = cosine(step - 1, plan.total, *cfg.ema)
        sim_target = cosine(step - 1, plan.total, *cfg.sim_target)  # s*
        for group in optimizer.param_groups:
            group["lr"] = lr
        if step > 1:  # before the targets are computed; in step 1 the teacher is a copy
            model.update_teacher(momentum)
        # A Python float would recompile the model in every step, so s* is a tensor.
        s_star = torch.full((), sim_target, device=run.device)
        # Noise for the global batch: masks do not depend on the number of processes.
        B, N = cfg.batch_size, model.num_patches
        noise = draw((B, N), run.device, "mask", cfg.seed, step)
        offset_noise = draw((B, N, 2), run.device, "offsets", cfg.seed, step)

        for micro in range(cfg.accum):
            with meter.waiting_for_data():
                images = next(stream)  # [m, C, H, W]
            is_masked = model.draw_mask(noise[run.rows(micro)])
            offsets = model.draw_offsets(offset_noise[run.rows(micro)])
            ddp.require_backward_grad_sync = micro == cfg.accum - 1  # one all-reduce per step
            with run.autocast():
                loss, logs = ddp(images, is_masked, offsets=offsets, sim_target=s_star)
            scaler.scale(loss / cfg.accum).backward()
            meter.add(loss=loss, **logs)

        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(model.parameters(), cfg.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        meter.step_done(grad_norm=grad_norm)

        if plan.reports_at(step) or run.asked_to_stop:
            # The only synchronisation with the device.
            report = meter.report(step, lr=lr, momentum=momentum, sim_target=sim_target)
            if not report.finite:
                return run.stop_not_finite(report)  # keeps the last good checkpoint
            if report["s_target"] > 0.995:
                run.warn("collapse of the targets", "an image's patches have almost equal targets")
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
