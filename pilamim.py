r"""PiLaMIM: Toward Richer Visual Representations by Integrating Pixel and Latent Masked Image
Modeling (Lee et al., arXiv 2501.03005).

Predicting pixels keeps detail: positions, counts, distances. Predicting another encoder's features
keeps meaning. Here one encoder learns both. It sees a quarter of an image. From its output one
small decoder predicts the masked pixels; another predicts a teacher's latents of the masked
patches. The teacher is a slow moving average of the encoder and sees the whole image. A third loss
makes the second decoder predict the teacher's CLS, which describes the whole image.

  images [B, C, H, W]
    1. patches [B, N, P]; a random 75 % of them are masked          draw_mask
    2. CLS + visible patches -> latent [B, 1 + V, D]                encoder
    3. CLS + all patches -> targets [B, 1 + N, D], no gradient      teacher
    4. latent and mask tokens -> masked pixels [B, M, P]            decoder         L_pixel
    5. latent and mask tokens -> CLS, masked latents [B, 1 + M, D]  latent_decoder  L_cls, L_latent
  loss = L_pixel + L_latent + L_cls, each a mean squared error
  Positions are learned. The teacher and the decoders are dropped after training. An image's feature
  is CLS after the final norm (`encode`).
  Letters: B images, N patches of P = p * p * C numbers, V visible, M masked; width D, decoders E.

  python pilamim.py                                                    the demo
  python pilamim.py --data DIR --img-size 96 --out runs/mine-pilamim   any folder of images
  python pilamim.py --latent-weight 0 --cls-weight 0 --out runs/pixel  the ablation: pixels alone
  torchrun --nproc_per_node 8 pilamim.py --out runs/pilamim-base --data DIR --img-size 224 \
      --model base --batch-size 2048 --epochs 800 --warmup-epochs 40 --base-lr 1.5e-4 \
      --decoder-dim 384 --decoder-depth 6 --decoder-heads 12 --init torch --ema 0.996 1 \
      --clip-grad 0                                    the paper's recipe; we have not run it

Differs from the authors' program:
- A prediction is compared with the target of the same patch, as in the paper's equation. Theirs
  shuffles the teacher's patches and never restores their order, so L_latent compares a prediction
  with the target of another patch.
- The teacher starts as a copy of the encoder; theirs starts from random weights of its own.
- Every image has its own mask; theirs draws the same masks on all GPUs.
- The demo has MAE's initialisation, which learns more in a short run; theirs is `--init torch`.
- Gradients are clipped to norm 1; `--clip-grad 0` disables this, as in the paper.
- A batch may span two epochs; theirs drops the last incomplete batch of an epoch.
- JPEGs at least twice as large as needed are decoded at 1/2, 1/4 or 1/8 of their size.
- Mixed precision is bf16; theirs is fp16 with a loss scaler, here `--amp fp16`.
tests/test_trajectories.py repeats 24 recorded steps of their program, with its targets put back in
order: losses agree within 1e-5.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn as nn

from common import (BadInput, Block, Checkpoint, Look, Meter, PatchEmbed, Plan, TrainConfig,
                    arguments, check_visible, clip_gradients, cosine, draw, flag, gather, load_data,
                    load_released, main, patch_grid, patchify, random_mask, reconstruction,
                    resize_positions, sincos_2d, split_ids, spread, start, train_batches, unshuffle,
                    update_ema, xavier_init)

norm = nn.LayerNorm  # eps 1e-5, PyTorch's default, in encoder and decoders


# ---- Config: own flags and changed defaults. The defaults are the demo's.

@dataclass(frozen=True)
class Config(TrainConfig):
    mask_ratio: float = flag(0.75, "share of the patches that are masked", 0, 1)
    pixel_weight: float = flag(1.0, "weight of L_pixel", 0, 1e6)
    latent_weight: float = flag(1.0, "weight of L_latent", 0, 1e6)
    cls_weight: float = flag(1.0, "weight of L_cls", 0, 1e6)
    decoder_dim: int = flag(64, "width of both decoders; the paper's is 384", 1)
    decoder_depth: int = flag(2, "blocks of each decoder; the paper's is 6", 1)
    decoder_heads: int = flag(2, "heads of both decoders; the paper's is 12", 1)
    ema: tuple[float, ...] = flag((0.9, 1.0), "first and last momentum of the teacher; the paper's "
                                  "are 0.996 1", 0, 1)
    init: str = flag("mae", "mae: Xavier, sin-cos positions; torch: the authors', random positions",
                     choices=["mae", "torch"])
    batch_size: int = 64
    epochs: int = 5
    base_lr: float = 2e-2  # per 256 images; the paper's 1.5e-4 is for ViT-B, 800 epochs
    out: str = "runs/pilamim"
    # As in common.py: 1 epoch of warm-up; weight decay 0.05 and betas 0.9, 0.95, the paper's.


# ---- Loss

def squared_error(pred, target):
    """Mean squared error in float32, for all three losses. Pixel targets are not normalised per
    patch."""
    return (pred.float() - target.float()).square().mean()


# ---- Model

class Encoder(nn.Module):
    """A ViT without bias on q, k, v. Positions are learned; CLS has none. The teacher is a second
    instance."""

    def __init__(self, num_patches, patch_size, in_chans, dim, depth, heads):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, dim))
        blocks = [Block(dim, heads, norm, qkv_bias=False) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm(dim)

    def forward(self, patches, pos):  # [B, T, P], [B or 1, T, D] -> [B, 1 + T, D]
        x = self.patch_embed(patches) + pos
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.norm(self.blocks(x))


class Decoder(nn.Module):
    """From the latent to pixels or latents of every place. There is no norm before the head."""

    def __init__(self, num_patches, dim, width, depth, heads, out):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        blocks = [Block(width, heads, norm, qkv_bias=False) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, out)

    def forward(self, latent, ids_visible, ids_masked, first_query=0):
        """latent [B, 1 + V, D] -> [B, V + 1 + M - first_query, out] for visible places, CLS, masked
        places. The last block skips the tokens before first_query, which no loss reads."""
        x = self.embed(latent)
        pos = self.pos_embed[:, 1:]
        visible = x[:, 1:] + gather(pos, ids_visible)
        cls = x[:, :1] + self.pos_embed[:, :1]
        masked = self.mask_token + gather(pos, ids_masked)
        x = self.blocks[:-1](torch.cat([visible, cls, masked], 1))  # [B, V + 1 + M, E]
        return self.head(self.blocks[-1](x, first_query))


class PiLaMIM(nn.Module):
    encoder_name = "encoder"  # for evaluate.py: the submodule with the blocks
    pool = "cls"  # the paper's feature

    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=768, depth=12, heads=12,
                 decoder_dim=384, decoder_depth=6, decoder_heads=12, mask_ratio=0.75,
                 pixel_weight=1.0, latent_weight=1.0, cls_weight=1.0, init="torch"):
        super().__init__()
        self.grid = patch_grid(img_size, patch_size)
        self.patch_size = patch_size  # p
        self.num_patches = self.grid[0] * self.grid[1]  # N
        self.num_visible = int(self.num_patches * (1 - mask_ratio))  # V, rounded down
        check_visible(f"--mask-ratio {mask_ratio}", self.num_visible, self.num_patches)
        self.weights = {"pixel_loss": pixel_weight, "latent_loss": latent_weight,
                        "cls_loss": cls_weight}
        if not any(self.weights.values()):
            raise BadInput("--pixel-weight, --latent-weight and --cls-weight are all 0")
        self.encoder = Encoder(self.num_patches, patch_size, in_chans, dim, depth, heads)
        sizes = self.num_patches, dim, decoder_dim, decoder_depth, decoder_heads
        self.decoder = Decoder(*sizes, out=patch_size**2 * in_chans)
        self.latent_decoder = Decoder(*sizes, out=dim)

        for name, p in self.named_parameters():
            if name.endswith(("cls_token", "mask_token", "pos_embed")):
                nn.init.trunc_normal_(p, std=0.02)
        if init == "mae":  # with "torch" Linears keep PyTorch's initialisation
            xavier_init(self)
            rows, cols = (torch.arange(n) for n in self.grid)
            for part in (self.encoder, self.decoder, self.latent_decoder):
                table = sincos_2d(part.pos_embed.shape[2], rows, cols)
                part.pos_embed.data[:, -self.num_patches:] = table  # only a start: it is learned
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def draw_mask(self, noise):  # uniform [B, N] -> is_masked [B, N], M = N - V of them True
        return random_mask(noise, self.num_patches - self.num_visible)

    def encode_visible(self, patches, ids_visible):  # [B, N, P], [B, V] -> [B, 1 + V, D]
        pos = gather(self.encoder.pos_embed, ids_visible)
        return self.encoder(gather(patches, ids_visible), pos)

    def forward(self, images, is_masked=None, num_visible=None):
        """images [B, C, H, W], normalised per channel by the data set's mean and standard
        deviation; is_masked [B, N], drawn if None; num_visible: visible patches in a row of it, by
        default the model's -> loss, logs. Does not move the teacher: call `update_teacher`."""
        patches = patchify(images, self.patch_size)  # [B, N, P]
        if is_masked is None:
            is_masked = self.draw_mask(torch.rand(patches.shape[:2], device=images.device))
        ids_visible, ids_masked = split_ids(is_masked, num_visible or self.num_visible)
        latent = self.encode_visible(patches, ids_visible)  # [B, 1 + V, D]
        with torch.no_grad():
            target = self.teacher(patches, self.teacher.pos_embed)  # [B, 1 + N, D]
        # Both decoders return the masked patches in the order of ids_masked, like the targets.
        V = ids_visible.shape[1]  # the losses do not read the visible places, which come before CLS
        pixels = self.decoder(latent, ids_visible, ids_masked, V)[:, 1:]  # [B, M, P]
        latents = self.latent_decoder(latent, ids_visible, ids_masked, V)  # [B, 1 + M, D]
        target_pixels = gather(patches, ids_masked)
        target_latents = gather(target[:, 1:], ids_masked)  # [B, M, D]
        losses = {"pixel_loss": squared_error(pixels, target_pixels),  # L_pixel
                  "latent_loss": squared_error(latents[:, 1:], target_latents),  # L_latent
                  "cls_loss": squared_error(latents[:, 0], target[:, 0])}  # L_cls
        loss = sum(self.weights[name] * part for name, part in losses.items())
        # loss_of_mean is pixel_loss if the mean is predicted everywhere. If target_std is near 0,
        # the teacher has collapsed.
        return loss, losses | {"loss_of_mean": target_pixels.var(unbiased=False),
                               "pred_std": spread(latents[:, 1:]),
                               "target_std": spread(target_latents)}

    def update_teacher(self, momentum):  # <- momentum * teacher + (1 - momentum) * encoder
        update_ema(self.teacher, self.encoder, momentum)

    def encode(self, images):
        """images, normalised as for `forward`, of any size that p divides -> pooled [B, D], the
        paper's feature: CLS; patches [B, N, D]. Both are after the final norm. No patch is
        masked."""
        grid = patch_grid(images.shape[2:], self.patch_size)
        pos = resize_positions(self.encoder.pos_embed, self.grid, grid)
        x = self.encoder(patchify(images, self.patch_size), pos)
        return x[:, 0], x[:, 1:]

    def reconstruct(self, images, is_masked):
        """The pixel decoder's prediction for every patch [B, N, P], normalised as `images` are."""
        ids_visible, ids_masked = split_ids(is_masked, self.num_visible)
        latent = self.encode_visible(patchify(images, self.patch_size), ids_visible)
        pred = self.decoder(latent, ids_visible, ids_masked).float()
        V = self.num_visible
        pred = torch.cat([pred[:, :V], pred[:, V + 1:]], 1)  # without CLS
        return unshuffle(pred, torch.cat([ids_visible, ids_masked], 1))

    def pictures(self, images, to_rgb):  # to_rgb undoes the normalisation
        is_masked = self.draw_mask(draw((len(images), self.num_patches), images.device, "picture"))
        pred = self.reconstruct(images, is_masked)
        columns = reconstruction(images, pred, is_masked, self.patch_size, to_rgb)
        return {"reconstruction.png": columns}

    @classmethod
    def from_released(cls, state_dict, **sizes):
        """A model with the authors' weights. `sizes` go to the constructor (default: ViT-B)."""
        model = cls(**sizes)
        state = {}
        for name, t in state_dict.get("model", state_dict).items():
            for theirs, ours in RENAMED:
                name = name.replace(theirs, ours)
            if name.endswith("pos_embed"):  # theirs is [N, 1, D]
                t = t.transpose(0, 1)
            if name.startswith("decoder.head."):  # theirs: channel first
                t = t.unflatten(0, (-1, model.patch_size**2)).transpose(0, 1).flatten(0, 1)
            state[name] = t
        return load_released(model, state, optional=["decoder.", "latent_decoder."])


Model = PiLaMIM
RENAMED = [  # from the authors' parameter names to ours
    ("target_encoder.", "teacher."), ("target_decoder.", "latent_decoder."),
    ("decoder_latent_embed.", "latent_decoder.embed."), ("decoder_embed.", "decoder.embed."),
    ("pos_embedding", "pos_embed"), ("patchify.", "patch_embed.proj."), ("transformer.", "blocks."),
    ("layer_norm.", "norm."), ("head_latent.", "head."),
]


# ---- Training

def build(cfg):
    return PiLaMIM(**arguments(PiLaMIM, cfg))  # flags of the same names


def lr_factor(epoch, epochs, warmup_epochs):
    """The learning rate divided by its peak, constant within an epoch as in the authors' program:
    the smaller one of a linear warm-up and half a cosine from 1 to 0 over ALL epochs."""
    return min((epoch + 1) / (warmup_epochs + 1e-8), cosine(epoch, epochs, first=1.0, last=0.0))


def train(cfg):
    cfg, run = start(cfg, "pilamim")  # checks flags, joins processes, picks device and dtype
    torch.manual_seed(cfg.seed)
    model = build(cfg).to(run.device)
    train_set, val_set = load_data(cfg, run)
    plan = Plan(cfg, len(train_set))
    # Every parameter has weight decay, biases and norm gains too. The gain of the encoder's last
    # norm sets the scale of the latent targets, so its decay lowers L_latent relative to L_pixel.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=cfg.betas, weight_decay=cfg.weight_decay,
                                  fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)
    checkpoint = Checkpoint(cfg, run, plan, model=model, optimizer=optimizer, scaler=scaler)
    done = checkpoint.resume()  # steps, the same number on every rank
    ddp = run.wrap(model, plan.total)  # compiles; adds DDP if there are several processes
    meter = Meter(cfg, run, done, plan, scaler)
    look = Look(cfg, run, model, train_set, val_set)  # k-NN, effective rank, pictures
    if plan.evaluates_at(done):  # at the start; or again, as the process may have died in it
        meter.write_look(done, look(done))

    stream = train_batches(cfg, run, train_set, done, plan.total)
    for step in run.steps(done, plan.total):  # on a signal, the step is finished and saved
        epoch = (step - 1) * cfg.batch_size // len(train_set)
        lr = plan.peak_lr * lr_factor(epoch, cfg.epochs, cfg.warmup_epochs)
        momentum = cfg.ema[0] + (cfg.ema[1] - cfg.ema[0]) * (step - 1) / plan.total  # linear
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Noise for the global batch: masks do not depend on the number of processes.
        noise = draw((cfg.batch_size, model.num_patches), run.device, "mask", cfg.seed, step)

        for micro in range(cfg.accum):
            with meter.waiting_for_data():
                images = next(stream)  # [m, C, H, W]
            is_masked = model.draw_mask(noise[run.rows(micro)])
            ddp.require_backward_grad_sync = micro == cfg.accum - 1  # one all-reduce per step
            with run.autocast():
                loss, logs = ddp(images, is_masked)
            scaler.scale(loss / cfg.accum).backward()
            meter.add(loss=loss, **logs)

        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(model.parameters(), cfg.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.update_teacher(momentum)
        meter.step_done(grad_norm=grad_norm)

        if plan.reports_at(step) or run.asked_to_stop:
            report = meter.report(step, lr=lr, momentum=momentum)  # the only synchronisation
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
