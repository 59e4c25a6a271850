r"""Masked Autoencoders Are Scalable Vision Learners (He et al., arXiv 2111.06377).

Three quarters of an image's patches are masked. The encoder sees only the visible quarter, which
makes it cheap. A small decoder gets the encoder's output and one learned mask token per masked
patch, and predicts the masked pixels. They cannot be predicted without knowing what the image
shows, so the encoder learns it.

  images [B, C, H, W]
    1. patches [B, N, P]; a random 75 % of them are masked                     draw_mask
    2. visible patches + sin-cos positions, CLS first -> latent [B, 1 + V, D]  encode_visible
    3. (latent, mask tokens) + positions -> predictions [B, M, P]              decode
    4. mean squared error to the masked patches, each normalised               pixel_loss
  The decoder is dropped after training. An image's feature is CLS after the final norm (`encode`).
  Letters: B images, N patches of P = p * p * C numbers, V visible, M masked; width D, decoder E.

  python mae.py                                            the demo, on synthetic images
  python mae.py --data DIR --img-size 96 --out runs/mine   any folder of images
  torchrun --nproc_per_node 8 mae.py --out runs/mae-base --data DIR --img-size 224 --model base \
      --batch-size 4096 --epochs 800 --warmup-epochs 40 --base-lr 1.5e-4 --decoder-dim 512 \
      --decoder-depth 8 --decoder-heads 16 --clip-grad 0   the paper's recipe; we have not run it

Differs from the authors' program:
- Gradients are clipped to norm 1; `--clip-grad 0` disables this, as in the paper.
- A batch may span two epochs; theirs drops the last incomplete batch of an epoch.
- The decoder gets visible tokens, then masked ones; theirs restores the image's order first. The
  result is the same.
- JPEGs at least twice as large as needed are decoded at 1/2, 1/4 or 1/8 of their size.
- Mixed precision is bf16; theirs is fp16 with a loss scaler, here `--amp fp16`.
tests/test_trajectories.py repeats 24 recorded steps of their program: losses agree within 1e-5.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (Block, Checkpoint, Look, Meter, PatchEmbed, Plan, TrainConfig, arguments,
                    check_visible, clip_gradients, draw, flag, gather, load_data, load_released,
                    main, param_groups, patch_grid, patchify, random_mask, reconstruction,
                    resize_positions, sincos_2d, split_ids, spread, start, train_batches, unshuffle,
                    warmup_cosine, xavier_init)

norm = partial(nn.LayerNorm, eps=1e-6)  # of encoder and decoder


# ---- Config: own flags and changed defaults. The defaults are the demo's.

@dataclass(frozen=True)
class Config(TrainConfig):
    mask_ratio: float = flag(0.75, "share of the patches that are masked", 0, 1)
    norm_pix: bool = flag(True, "predict patches normalised by their own mean and variance")
    decoder_dim: int = flag(64, "width of the decoder; the paper's is 512", 1)
    decoder_depth: int = flag(1, "blocks of the decoder; the paper's is 8", 1)
    decoder_heads: int = flag(2, "heads of the decoder; the paper's is 16", 1)
    epochs: int = 16
    base_lr: float = 6e-3  # per 256 images; the paper's 1.5e-4 is for ViT-B and larger, 800 epochs
    out: str = "runs/mae"
    # As in common.py: 1 epoch of warm-up; weight decay 0.05 and betas 0.9, 0.95, the paper's.


# ---- Loss

def normalise_patches(patches):
    """Subtract each patch's mean and divide by its unbiased standard deviation. Also return both,
    to undo it."""
    mean = patches.mean(-1, keepdim=True)
    std = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def pixel_loss(pred, target):
    """Mean squared error over the masked patches [B, M, P], in float32."""
    return (pred.float() - target).square().mean()


# ---- Model

class MAE(nn.Module):
    encoder_name = ""  # for evaluate.py: the submodule with the blocks; here the model itself
    pool = "cls"  # the paper's feature

    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=768, depth=12, heads=12,
                 decoder_dim=512, decoder_depth=8, decoder_heads=16, mask_ratio=0.75,
                 norm_pix=True):
        super().__init__()
        self.grid = patch_grid(img_size, patch_size)
        self.patch_size = patch_size  # p
        self.norm_pix = norm_pix
        self.num_patches = self.grid[0] * self.grid[1]  # N
        self.num_visible = int(self.num_patches * (1 - mask_ratio))  # V, rounded down
        check_visible(f"--mask-ratio {mask_ratio}", self.num_visible, self.num_patches)
        rows, cols = (torch.arange(n) for n in self.grid)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        positions = F.pad(sincos_2d(dim, rows, cols), (0, 0, 1, 0))  # [1, 1 + N, D], zero for CLS
        self.register_buffer("pos_embed", positions)
        self.blocks = nn.Sequential(*[Block(dim, heads, norm) for _ in range(depth)])
        self.norm = norm(dim)

        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        positions = F.pad(sincos_2d(decoder_dim, rows, cols), (0, 0, 1, 0))
        self.register_buffer("decoder_pos_embed", positions)
        blocks = [Block(decoder_dim, decoder_heads, norm) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * in_chans)

        xavier_init(self)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def draw_mask(self, noise):  # uniform [B, N] -> is_masked [B, N], M = N - V of them True
        return random_mask(noise, self.num_patches - self.num_visible)

    def encode_patches(self, patches, pos):  # [B, T, P], [B or 1, T, D] -> [B, 1 + T, D]
        x = self.patch_embed(patches) + pos
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.norm(self.blocks(x))

    def encode_visible(self, patches, ids_visible):  # [B, N, P], [B, V] -> [B, 1 + V, D]
        # The paper drops the masked patches after embedding. Dropping them first gives the same.
        pos = gather(self.pos_embed[:, 1:], ids_visible)
        return self.encode_patches(gather(patches, ids_visible), pos)

    def decode(self, latent, ids_visible, ids_masked, first_query=0):
        """latent [B, 1 + V, D] -> predictions [B, 1 + N - first_query, P] for CLS, visible and
        masked patches. The last block skips the tokens before first_query, which no loss reads."""
        x = self.decoder_embed(latent)
        pos = self.decoder_pos_embed[:, 1:]
        visible = x[:, 1:] + gather(pos, ids_visible)
        masked = self.mask_token + gather(pos, ids_masked)
        x = torch.cat([x[:, :1], visible, masked], 1)  # [B, 1 + N, E]; the position of CLS is 0
        x = self.decoder_blocks[:-1](x)
        x = self.decoder_blocks[-1](x, first_query)
        return self.decoder_pred(self.decoder_norm(x))

    def forward(self, images, is_masked=None, num_visible=None):
        """images [B, C, H, W], normalised per channel by the data set's mean and standard
        deviation; is_masked [B, N], drawn if None; num_visible: visible patches in a row of it, by
        default the model's -> loss, logs."""
        patches = patchify(images, self.patch_size)  # [B, N, P]
        if is_masked is None:
            is_masked = self.draw_mask(torch.rand(patches.shape[:2], device=images.device))
        ids_visible, ids_masked = split_ids(is_masked, num_visible or self.num_visible)
        latent = self.encode_visible(patches, ids_visible)  # [B, 1 + V, D]
        first_masked = latent.shape[1]  # 1 + V
        pred = self.decode(latent, ids_visible, ids_masked, first_masked)  # [B, M, P]
        target = gather(patches, ids_masked)  # [B, M, P]
        if self.norm_pix:
            target, _, _ = normalise_patches(target)
        loss = pixel_loss(pred, target)
        # loss_of_mean is the loss of predicting the targets' mean everywhere.
        return loss, {"loss_of_mean": target.var(unbiased=False), "pred_std": spread(pred),
                      "target_std": spread(target)}

    def encode(self, images):
        """images, normalised as for `forward`, of any size that p divides -> pooled [B, D], the
        paper's feature: CLS; patches [B, N, D]. Both are after the final norm. No patch is
        masked."""
        grid = patch_grid(images.shape[2:], self.patch_size)
        pos = resize_positions(self.pos_embed, self.grid, grid)[:, 1:]
        x = self.encode_patches(patchify(images, self.patch_size), pos)
        return x[:, 0], x[:, 1:]

    def reconstruct(self, images, is_masked):
        """The prediction for every patch [B, N, P], normalised as `images` are. With norm_pix
        the model predicts normalised patches; each patch's true mean and deviation are put back."""
        ids_visible, ids_masked = split_ids(is_masked, self.num_visible)
        patches = patchify(images, self.patch_size)
        latent = self.encode_visible(patches, ids_visible)
        pred = self.decode(latent, ids_visible, ids_masked)[:, 1:].float()
        pred = unshuffle(pred, torch.cat([ids_visible, ids_masked], 1))  # [B, N, P]
        if self.norm_pix:
            _, mean, std = normalise_patches(patches)
            pred = pred * std + mean
        return pred

    def pictures(self, images, to_rgb):  # to_rgb undoes the normalisation
        is_masked = self.draw_mask(draw((len(images), self.num_patches), images.device, "picture"))
        pred = self.reconstruct(images, is_masked)
        columns = reconstruction(images, pred, is_masked, self.patch_size, to_rgb)
        return {"reconstruction.png": columns}

    @classmethod
    def from_released(cls, state_dict, **sizes):
        """A model with the authors' weights; our parameter names equal theirs. `sizes` go to the
        constructor (default: ViT-B). The head of a fine-tuned file is ignored. If its final norm is
        fc_norm, it was trained on the mean of the patches."""
        weights = state_dict.get("model", state_dict)
        state = {name: t for name, t in weights.items() if not name.startswith("head.")}
        if "norm.weight" not in state:
            state = {name.replace("fc_norm.", "norm."): t for name, t in state.items()}
        return load_released(cls(**sizes), state, optional=["decoder", "mask_token"])


Model = MAE


# ---- Training

def build(cfg):
    return MAE(**arguments(MAE, cfg))  # flags of the same names


def no_decay(name, p):
    """Biases and norm gains have no weight decay; CLS and the mask token do."""
    return p.ndim <= 1


def train(cfg):
    cfg, run = start(cfg, "mae")  # checks flags, joins processes, picks device and dtype
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

    stream = train_batches(cfg, run, train_set, done, plan.total)
    for step in run.steps(done, plan.total):  # on a signal, the step is finished and saved
        lr = warmup_cosine(step - 1, plan.total, plan.warmup, plan.peak_lr, first=0.0, last=0.0)
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
