"""PiLaMIM: Toward Richer Visual Representations by Integrating Pixel and Latent Masked Image
Modeling (Lee et al., arXiv 2501.03005).

Predicting pixels keeps detail: where, how many, how far. Predicting another encoder's features
keeps meaning. Here one encoder learns both. It sees a quarter of an image; from its output one
small decoder predicts the hidden pixels, and another predicts what a teacher makes of the hidden
patches. The teacher is a slow moving average of the encoder and sees the whole image. A third loss
asks the same of CLS, which has to stand for the whole image.

  images [B, C, H, W]
    1. patches [B, N, P]; a random 75 % of them are masked          draw_mask
    2. CLS + visible patches -> latent [B, 1 + V, D]                encoder
    3. CLS + all patches -> targets [B, 1 + N, D], no gradient      teacher
    4. latent and mask tokens -> masked pixels [B, M, P]            decoder         L_pixel
    5. latent and mask tokens -> CLS, masked latents [B, 1 + M, D]  latent_decoder  L_cls, L_latent
  loss = L_pixel + L_latent + L_cls, each a mean squared error
  Teacher and decoders are dropped after training. An image's feature is CLS after the final norm
  (`encode`).

  python pilamim.py                                                    the demo
  python pilamim.py --data DIR --img-size 96 --out runs/mine-pilamim   any folder of images
  python pilamim.py --latent-weight 0 --cls-weight 0 --out runs/pixel  the ablation: pixels alone
  torchrun --nproc_per_node 8 pilamim.py --out runs/pilamim-base --data DIR --img-size 224 \
      --model base --batch-size 2048 --epochs 800 --warmup-epochs 40 --base-lr 1.5e-4 \
      --decoder-dim 384 --decoder-depth 6 --decoder-heads 12 --init torch --ema 0.996 1 \
      --clip-grad 0                                    the paper's recipe; not run at that scale

Differs from the authors' program:
- A prediction meets the target of the same patch, as in the paper's equation. Theirs shuffles the
  teacher's patches and does not put them back: L_latent compares a prediction with another patch's
  target.
- The teacher starts as a copy of the encoder; theirs starts from random weights of its own.
- Every image has its own mask; theirs draws the same masks on all GPUs.
- The demo starts with MAE's weights (`--init mae`), with which so short a run learns more; theirs
  are PyTorch's (`--init torch`).
- Gradients are clipped to norm 1; `--clip-grad 0` disables this, as in the paper.
- Batches run across the end of an epoch; theirs drops the last incomplete batch.
- Mixed precision is bf16; theirs is fp16 with a loss scaler (`--amp fp16`).
24 recorded steps of their program, its targets put back in order, agree
(tests/test_trajectories.py).
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn as nn

from common import (BadInput, Block, Checkpoint, Look, Meter, PatchEmbed, Plan, TrainConfig,
                    clip_gradients, cosine, draw, encoder_sizes, flag, gather, load_data,
                    load_released, main, patch_grid, patchify, pca_colours, random_mask,
                    resize_positions, sincos_2d, split_ids, spread, start, train_batches,
                    unpatchify, unshuffle, update_ema, xavier_init)

norm = nn.LayerNorm  # eps 1e-5, PyTorch's default, in encoder and decoders


# --------------------------------------------------------------------------------------------------
# Config: the method's own flags, and the defaults that it changes. They are the demo's.
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config(TrainConfig):
    mask_ratio: float = flag(0.75, "share of the patches that is masked", 0, 1)
    pixel_weight: float = flag(1.0, "weight of L_pixel; 0 drops it", 0, 1e6)
    latent_weight: float = flag(1.0, "weight of L_latent; 0 drops it", 0, 1e6)
    cls_weight: float = flag(1.0, "weight of L_cls; 0 drops it", 0, 1e6)
    decoder_dim: int = flag(64, "width of both decoders; the paper's is 384", 1)
    decoder_depth: int = flag(2, "blocks of each decoder; the paper's is 6", 1)
    decoder_heads: int = flag(2, "heads of both decoders; the paper's is 12", 1)
    ema: tuple[float, ...] = flag((0.9, 1.0), "first and last momentum of the teacher; the paper's "
                                  "is 0.996 1", 0, 1)
    init: str = flag("mae", "first weights: mae (Xavier, sin-cos positions) learns sooner; torch "
                     "(PyTorch's, random positions) is the authors'", choices=["mae", "torch"])
    batch_size: int = 64
    epochs: int = 7
    base_lr: float = 2e-2  # the paper's 1.5e-4 is for ViT-B and 800 epochs
    out: str = "runs/pilamim"


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------

def squared_error(pred, target):
    """Mean squared error in float32: all three losses. Pixels are plain, not normalised by
    patch."""
    return (pred.float() - target.float()).square().mean()


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------

class Encoder(nn.Module):
    """A ViT without bias on q, k and v, with learned positions for patches and none for CLS. The
    context encoder f and the teacher are two of these."""

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
    """From the latent to something for every place: pixels, or latents. There is no norm before the
    head."""

    def __init__(self, num_patches, dim, width, depth, heads, out):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        blocks = [Block(width, heads, norm, qkv_bias=False) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, out)

    def forward(self, latent, ids_visible, ids_masked, first_query=0):
        """[B, 1 + V, D] -> [B, V + 1 + M - first_query, out]: visible places, CLS, masked places.
        The last block has no queries before first_query: the losses read CLS and the masked places
        only."""
        x = self.embed(latent)
        pos = self.pos_embed[:, 1:]
        visible = x[:, 1:] + gather(pos, ids_visible)
        cls = x[:, :1] + self.pos_embed[:, :1]
        masked = self.mask_token + gather(pos, ids_masked)
        x = self.blocks[:-1](torch.cat([visible, cls, masked], 1))  # [B, V + 1 + M, E]
        return self.head(self.blocks[-1](x, first_query))


class PiLaMIM(nn.Module):
    encoder_name, pool = "encoder", "cls"  # for evaluate.py: the encoder, and the paper's feature

    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=768, depth=12, heads=12,
                 decoder_dim=384, decoder_depth=6, decoder_heads=12, mask_ratio=0.75,
                 pixel_weight=1.0, latent_weight=1.0, cls_weight=1.0, init="torch"):
        super().__init__()
        self.grid, self.patch_size = patch_grid(img_size, patch_size), patch_size
        self.num_patches = self.grid[0] * self.grid[1]  # N
        self.num_visible = int(self.num_patches * (1 - mask_ratio))  # V, rounded down
        if not 0 < self.num_visible < self.num_patches:
            raise BadInput(f"--mask-ratio {mask_ratio} of {self.num_patches} patches: at least one "
                           "must be visible and one masked")
        self.weights = {"pixel_loss": pixel_weight, "latent_loss": latent_weight,
                        "cls_loss": cls_weight}
        if not any(self.weights.values()):
            raise BadInput("--pixel-weight, --latent-weight and --cls-weight are all 0")
        self.encoder = Encoder(self.num_patches, patch_size, in_chans, dim, depth, heads)
        decoder = self.num_patches, dim, decoder_dim, decoder_depth, decoder_heads
        self.decoder = Decoder(*decoder, out=patch_size**2 * in_chans)
        self.latent_decoder = Decoder(*decoder, out=dim)

        for name, p in self.named_parameters():
            if name.endswith(("cls_token", "mask_token", "pos_embed")):
                nn.init.trunc_normal_(p, std=0.02)
        if init == "mae":  # else Linears stay as PyTorch draws them
            xavier_init(self)
            rows, cols = (torch.arange(n) for n in self.grid)
            for part in (self.encoder, self.decoder, self.latent_decoder):
                table = sincos_2d(part.pos_embed.shape[2], rows, cols)
                part.pos_embed.data[:, -self.num_patches:] = table  # they are learned from here on
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def draw_mask(self, noise):
        """The mask rule: noise [B, N], uniform -> is_masked [B, N]."""
        return random_mask(noise, self.num_patches - self.num_visible)

    def forward(self, images, is_masked=None, num_visible=None):
        """images [B, C, H, W], normalised per channel by the data set's mean and standard
        deviation; is_masked [B, N], drawn if None; num_visible: how many patches of each row are
        visible, if it is not the model's own number. -> loss, logs. The teacher does not move: call
        `update_teacher`."""
        if is_masked is None:
            noise = torch.rand(len(images), self.num_patches, device=images.device)
            is_masked = self.draw_mask(noise)
        ids_visible, ids_masked = split_ids(is_masked, num_visible or self.num_visible)
        patches = patchify(images, self.patch_size)  # [B, N, P]
        visible = gather(patches, ids_visible)
        latent = self.encoder(visible, gather(self.encoder.pos_embed, ids_visible))  # [B, 1 + V, D]
        with torch.no_grad():
            target = self.teacher(patches, self.teacher.pos_embed)  # [B, 1 + N, D]
        # Both decoders give the masked places in the order of ids_masked, so that a prediction
        # meets the target of the same patch.
        ids = ids_visible, ids_masked, ids_visible.shape[1]
        pixels = self.decoder(latent, *ids)[:, 1:]  # [B, M, P]
        latents = self.latent_decoder(latent, *ids)  # [B, 1 + M, D]
        target_pixels = gather(patches, ids_masked)
        target_latents = gather(target[:, 1:], ids_masked)  # [B, M, D]
        losses = {"pixel_loss": squared_error(pixels, target_pixels),  # L_pixel
                  "latent_loss": squared_error(latents[:, 1:], target_latents),  # L_latent
                  "cls_loss": squared_error(latents[:, 0], target[:, 0])}  # L_cls
        loss = sum(self.weights[name] * part for name, part in losses.items())
        # target_std is the spread of the teacher's latents: near 0 they are all the same.
        return loss, losses | {"loss_of_mean": target_pixels.var(unbiased=False),
                               "pred_std": spread(latents[:, 1:]),
                               "target_std": spread(target_latents)}

    def update_teacher(self, momentum):
        """teacher <- momentum * teacher + (1 - momentum) * encoder."""
        update_ema(self.teacher, self.encoder, momentum)

    def encode(self, images):
        """images, normalised as for `forward`, of any size that the patches divide -> pooled [B,
        D], patches [B, N, D]. The context encoder sees all patches. Both are after the final norm;
        pooled is CLS, the paper's feature."""
        grid = patch_grid(images.shape[2:], self.patch_size)
        pos = resize_positions(self.encoder.pos_embed, self.grid, grid)
        x = self.encoder(patchify(images, self.patch_size), pos)
        return x[:, 0], x[:, 1:]

    def reconstruct(self, images, is_masked):
        """From the pixel decoder: the images without their masked patches, the prediction, and the
        images with the prediction in the masked places; each [B, C, H, W], normalised as `images`
        are."""
        ids_visible, ids_masked = split_ids(is_masked, self.num_visible)
        patches = patchify(images, self.patch_size)
        visible = gather(patches, ids_visible)
        latent = self.encoder(visible, gather(self.encoder.pos_embed, ids_visible))
        pred = self.decoder(latent, ids_visible, ids_masked).float()
        V = self.num_visible
        pred = torch.cat([pred[:, :V], pred[:, V + 1:]], 1)  # without CLS
        pred = unshuffle(pred, torch.cat([ids_visible, ids_masked], 1))  # [B, N, P]
        hidden = is_masked[..., None]
        columns = patches.masked_fill(hidden, 0), pred, torch.where(hidden, pred, patches)
        return [unpatchify(column, self.patch_size, self.grid) for column in columns]

    def pictures(self, images, to_rgb):
        """{file name: {title: images [n, 3, H, W] in 0..1}}; to_rgb undoes the normalisation."""
        is_masked = self.draw_mask(draw((len(images), self.num_patches), images.device, "picture"))
        masked, pred, pasted = self.reconstruct(images, is_masked)
        colours = pca_colours(self.encode(images)[1], self.grid, images.shape[2:])
        return {"reconstruction.png": {"input": to_rgb(images), "masked": to_rgb(masked),
                                       "predicted": to_rgb(pred), "pasted": to_rgb(pasted)},
                "features.png": {"input": to_rgb(images), "PCA of patches": colours}}

    @classmethod
    def from_released(cls, state_dict, **sizes):
        """A model with the weights of the authors' file. `sizes` are the constructor's; its
        defaults are the paper's ViT-B."""
        model = cls(**sizes)
        state = {}
        for name, t in state_dict.get("model", state_dict).items():
            for theirs, ours in RENAMED:
                name = name.replace(theirs, ours)
            if name.endswith("pos_embed"):  # [N, 1, D] there
                t = t.transpose(0, 1)
            if name.startswith("decoder.head."):  # channel first there, last here
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


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

def build(cfg):
    return PiLaMIM(**encoder_sizes(cfg), decoder_dim=cfg.decoder_dim,
                   decoder_depth=cfg.decoder_depth, decoder_heads=cfg.decoder_heads,
                   mask_ratio=cfg.mask_ratio, pixel_weight=cfg.pixel_weight,
                   latent_weight=cfg.latent_weight, cls_weight=cfg.cls_weight, init=cfg.init)


def rate_of_epoch(epoch, epochs, warmup_epochs):
    """The learning rate over its peak. It changes once an epoch, as in the authors' program: the
    smaller one of a linear warm-up, which epoch 0 starts at 1 / warmup_epochs, and half a cosine
    over all epochs to 0."""
    return min((epoch + 1) / (warmup_epochs + 1e-8), cosine(epoch, epochs, first=1.0, last=0.0))


def train(cfg):
    cfg, run = start(cfg)  # checks the flags, joins the processes, chooses device and dtype
    torch.manual_seed(cfg.seed)
    model = build(cfg).to(run.device)
    train_set, val_set = load_data(cfg, run)
    plan = Plan(cfg, len(train_set))
    # Every parameter has weight decay, biases and norm gains too. The gain of the encoder's last
    # norm sets the scale of the latent targets: its decay makes L_latent smaller against L_pixel as
    # training goes on.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=cfg.betas, weight_decay=cfg.weight_decay,
                                  fused=run.device.type != "mps")
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)
    checkpoint = Checkpoint(cfg, run, "pilamim", plan, model=model, optimizer=optimizer,
                            scaler=scaler)
    first = checkpoint.resume()  # the number of steps done, the same on every rank
    ddp = run.wrap(model, plan.total)  # compiled, and in DDP for several processes
    meter = Meter(cfg, run, "pilamim", first, plan.total, scaler)
    look = Look(cfg, run, model, train_set, val_set)
    if first == 0:
        meter.write_look(0, look(0))

    stream = train_batches(cfg, run, train_set, first, plan.total)
    for step in run.steps(first, plan.total):  # a signal lets the step finish
        epoch = (step - 1) * cfg.batch_size // len(train_set)
        lr = plan.peak_lr * rate_of_epoch(epoch, cfg.epochs, cfg.warmup_epochs)
        momentum = cfg.ema[0] + (cfg.ema[1] - cfg.ema[0]) * (step - 1) / plan.total  # linear
        for group in optimizer.param_groups:
            group["lr"] = lr

        for micro in range(cfg.accum):
            with meter.waiting_for_data():
                images = next(stream)  # [m, C, H, W]
            # The noise is the global batch's: a mask does not depend on the number of processes.
            noise = draw((cfg.batch_size, model.num_patches), run.device, "mask", cfg.seed, step)
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
            report = meter.report(step, lr=lr, momentum=momentum)  # the only wait for the device
            if not report.finite:
                return run.stop_not_finite(report)  # the last good checkpoint stays
            if plan.saves_at(step) or report.stop:
                checkpoint.save(step)
            if report.stop:
                return run.stop_by_signal(step)
            if plan.evaluates_at(step):
                meter.write_look(step, look(step))
    meter.close()
    return 0


if __name__ == "__main__":
    main(train, Config, __doc__)
