"""Masked Autoencoders Are Scalable Vision Learners (He et al., arXiv 2111.06377), in one file.

Three quarters of an image's patches are hidden. The encoder sees only the visible quarter, which makes it cheap; a
small decoder gets its output, with one learned token at every hidden place, and paints the hidden pixels. Nothing else
is in the loss, so what the encoder knows of an image it knows because the hidden part could not be guessed without it.

  images [B, C, H, W]
    1. patches [B, N, P]; a random 75 % of them masked                       random_mask          Sec. 3, "Masking"
    2. visible patches + positions, CLS in front -> latent [B, 1 + V, D]     encode_visible       Sec. 3, "MAE encoder"
    3. latent and mask tokens + positions -> all patches [B, N, P]           decode               Sec. 3, "MAE decoder"
    4. mean squared error on the masked patches, each one standardised       pixel_loss           Sec. 3, "Reconstruction target"
  After training the decoder is thrown away; an image's feature is CLS after the final norm (`encode`).

  python mae.py                                            on pictures that common.py draws; see the result below
  python mae.py --data DIR --img-size 96 --out runs/mine   any folder of images, the same small model
  torchrun --nproc_per_node 8 mae.py --out runs/mae-base --data DIR --img-size 224 --model base --batch-size 4096 --epochs 800 \
      --warmup-epochs 40 --base-lr 1.5e-4 --decoder-dim 512 --decoder-depth 8 --decoder-heads 16 --clip-grad 0
                                                           the paper's ImageNet recipe (Table 8); not run at that scale

Result of the first, on one thread, seeds 0, 1, 2 (bf16, EPYC, torch 2.15; 2 min 10 s on two): k-NN of the nearest object's kind
36.8, 43.9, 36.5 % from CLS and 48.0, 50.6, 51.0 % from the mean of the patches; untrained 26.5 and 23.7 (mean of the seeds), raw
pixels 26.1, 29.1, 28.0.

Differs from the authors' program:
- Gradients are clipped to norm 1; `--clip-grad 0` disables this, as in the paper.
- Batches run across the end of an epoch; theirs drops the last incomplete batch.
- Decoder tokens stand visible first, masked after; attention does not depend on their order.
- Mixed precision is bf16; theirs is fp16 with a loss scaler (`--amp fp16`).
- Images are turned upright by their EXIF orientation; theirs ignores it.
24 recorded steps of their program agree: see tests/test_trajectories.py.
"""

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

from common import (MODELS, BadInput, Block, LayerNorm, Log, PatchEmbed, check_decoder, check_health, count_blocks,
                    denormalise, draw, eval_batches, flag, gather, load_data, load_strictly, main, param_groups, patch_grid,
                    patchify, random_mask, raw_pixels, resize_positions, restore, resume, save_picture, sincos_2d, split_ids,
                    spread, start, train_batches, unpatchify, usual_heads, warmup_cosine, warn_of_trouble, xavier_init)


# ---------------------------------------------------------------------------------------------------------------
# Config: the method's own, then what all five share. Values are the quick demo's; the help says where the paper's differ
# ---------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config:
    mask_ratio: float = flag(0.75, "share of the patches that is masked (Sec. 4.1)")
    norm_pix: bool = flag(True, "predict each patch standardised by its own mean and variance (Table 1d)")
    decoder_dim: int = flag(64, "width of the decoder; the paper's is 512 (Table 1b)", least=1)
    decoder_depth: int = flag(1, "blocks of the decoder; the paper's is 8 (Table 1a)", least=1)
    decoder_heads: int = flag(2, "heads of the decoder; the paper's is 16", least=1)
    crop_scale: tuple[float, ...] = (0.2, 1.0)
    betas: tuple[float, ...] = (0.9, 0.95)  # Table 8

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
    epochs: int = 16
    warmup_epochs: int = 1
    base_lr: float = 6e-3  # the paper's 1.5e-4 is for ViT-B and 800 epochs
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    workers: int = -1
    seed: int = 0
    device: str = "auto"
    amp: str = "auto"
    compile: str = "auto"
    out: str = "runs/mae"
    resume: str = "auto"
    save_every: int = 5
    eval_every: int = 0
    log_every: int = 20


# ---------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------

def standardise(patches):
    """Sec. 3, "Reconstruction target": each patch [..., P] minus its mean, over its (unbiased) standard deviation.
    Returns the mean and deviation too: with them a picture can undo it."""
    mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def pixel_loss(pred, target):
    """Mean squared error [B, M, P] -> scalar, in float32: computed on the masked patches only (Sec. 3)."""
    return (pred.float() - target).square().mean()


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------

class MAE(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=768, depth=12, heads=12, decoder_dim=512,
                 decoder_depth=8, decoder_heads=16, mask_ratio=0.75, norm_pix=True):
        super().__init__()
        check_decoder(decoder_dim, decoder_heads)
        self.grid, self.patch_size, self.norm_pix = patch_grid(img_size, patch_size), patch_size, norm_pix
        self.num_patches = self.grid[0] * self.grid[1]  # N
        self.num_visible = int(self.num_patches * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0  # V
        if not 0 < self.num_visible < self.num_patches:
            raise BadInput(f"--mask-ratio {mask_ratio} leaves {self.num_visible} of {self.num_patches} patches visible; "
                           "at least one must be, and one masked")
        axes = [torch.arange(float(n)) for n in self.grid]

        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.register_buffer("pos_embed", F.pad(sincos_2d(dim, *axes), (0, 0, 1, 0)))  # [1, 1 + N, D], CLS row zero
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = LayerNorm(dim)

        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.register_buffer("decoder_pos_embed", F.pad(sincos_2d(decoder_dim, *axes), (0, 0, 1, 0)))
        self.decoder_blocks = nn.Sequential(*[Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * in_chans)
        self.init_weights()

    def init_weights(self):
        xavier_init(self)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def encode_visible(self, patches, ids_visible):  # [B, N, P], [B, V] -> [B, 1 + V, D]
        # The paper adds positions to all patches, then drops the masked ones; to embed only the visible is the same, cheaper.
        x = self.patch_embed(gather(patches, ids_visible)) + gather(self.pos_embed[:, 1:], ids_visible)  # [B, V, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.norm(self.blocks(x))

    def decode(self, latent, ids_visible, ids_masked, unread=1):
        """[B, 1 + V, D] -> [B, V + M, P], visible places first; with unread = 1 + V the masked ones alone, [B, M, P], which are
        all that the loss reads. The first `unread` tokens are keys and values in the last block, and nothing after it."""
        x, pos = self.decoder_embed(latent), self.decoder_pos_embed[:, 1:]
        x = torch.cat([x[:, :1], x[:, 1:] + gather(pos, ids_visible), self.mask_token + gather(pos, ids_masked)], 1)
        *first, last = self.decoder_blocks
        for block in first:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(last(x, keys_only=unread)))

    def forward(self, images, mask=None, num_visible=None):
        """images [B, C, H, W]; mask bool [B, N], True = masked, the same number in each row; None draws one. Without
        num_visible a mask is counted, and a GPU waits for it. -> loss, logs."""
        if mask is None:
            mask = random_mask(torch.rand(len(images), self.num_patches, device=images.device),
                               self.num_patches - self.num_visible)
            num_visible = self.num_visible
        ids_visible, ids_masked = split_ids(mask, num_visible)
        patches = patchify(images, self.patch_size)  # [B, N, P]
        latent = self.encode_visible(patches, ids_visible)  # [B, 1 + V, D]
        pred = self.decode(latent, ids_visible, ids_masked, unread=latent.shape[1])  # [B, M, P]
        target = gather(patches, ids_masked)  # [B, M, P]
        target = standardise(target)[0] if self.norm_pix else target
        loss = pixel_loss(pred, target)
        with torch.no_grad():  # a loss says little alone: the mean predictor's loss is the mark to be under
            logs = {"loss_of_mean": target.var(unbiased=False), "pred_std": spread(pred), "target_std": spread(target)}
        return loss, logs

    def encode(self, images):
        """images -> pooled [B, D], patches [B, N, D]: nothing masked, after the final norm; pooled is CLS, the paper's
        token for linear probing. Other image sizes than the training one are fine: positions are resized."""
        grid = patch_grid(images.shape[2:], self.patch_size)
        pos = resize_positions(self.pos_embed, self.grid, grid)
        x = self.patch_embed(patchify(images, self.patch_size)) + pos[:, 1:]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x))
        return x[:, 0], x[:, 1:]

    @torch.no_grad()
    def reconstruct(self, images, mask):
        """The paper's figure 2: the images with grey in place of masked patches, the decoder's picture of all of them,
        and the masked ones of it pasted in; each [B, C, H, W], in the images' own units. A standardised prediction has
        no brightness or contrast of its own: those are the true patch's, which flatters it."""
        ids_visible, ids_masked = split_ids(mask)
        patches = patchify(images, self.patch_size)
        pred = self.decode(self.encode_visible(patches, ids_visible), ids_visible, ids_masked).float()
        pred = restore(pred, torch.cat([ids_visible, ids_masked], 1))
        return paste(images, pred, mask, self.patch_size, self.grid, self.norm_pix)

    @classmethod
    def from_released(cls, state_dict, **sizes):
        """A model from the authors' file, a dict of tensors or one with the key `model`; the names are ours. Widths,
        depths and sizes are read from the tensors; heads cannot be (usual ones, 16 in the decoder, unless said). Of a
        classifier's file the encoder is taken."""
        state = dict(state_dict.get("model", state_dict))
        if any(name.startswith("head.") for name in state):  # fine-tuned, or a linear probe
            print("from_released: this file is a classifier; its head is ignored")
            state = {name: t for name, t in state.items() if not name.startswith("head.")}
        if "fc_norm.weight" in state and "norm.weight" not in state:  # fine-tuned: fc_norm is the only norm after the blocks
            print("from_released: fc_norm stands for the final norm. The classifier read the mean of the patches, not CLS: "
                  "evaluate it with --pool mean")
            state = {name.replace("fc_norm.", "norm."): t for name, t in state.items()}
        missing = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"} - state.keys()
        if missing:
            raise BadInput(f"not a released MAE: it has no {', '.join(sorted(missing))}")
        _, length, dim = state["pos_embed"].shape
        _, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
        sizes = {"patch_size": patch_size, "in_chans": in_chans, "dim": dim, "depth": count_blocks(state, "blocks"),
                 "heads": usual_heads(dim)} | sizes
        sizes.setdefault("img_size", math.isqrt(length - 1) * sizes["patch_size"])
        if "decoder_embed.weight" in state:
            sizes = {"decoder_dim": len(state["decoder_embed.weight"]),
                     "decoder_depth": count_blocks(state, "decoder_blocks")} | sizes
        return load_strictly(cls(**sizes), state, "a released MAE", sizes, optional=[("decoder", "mask_token")])


def paste(images, pred, mask, p, grid, norm_pix):
    """pred [B, N, P] of all patches -> masked images, predicted images, and images with the prediction at the masked
    places; with norm_pix the true patches' mean and deviation are put back."""
    patches = patchify(images, p)
    if norm_pix:
        _, mean, std = standardise(patches)
        pred = pred * std + mean
    hidden, image = mask[..., None], lambda t: unpatchify(t, p, grid)
    return image(patches.masked_fill(hidden, 0)), image(pred), image(torch.where(hidden, pred, patches))


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------

def build(cfg):
    dim, depth, heads = MODELS[cfg.model]
    return MAE(img_size=cfg.img_size, patch_size=cfg.patch_size, in_chans=cfg.in_chans, dim=dim, depth=depth, heads=heads,
               decoder_dim=cfg.decoder_dim, decoder_depth=cfg.decoder_depth, decoder_heads=cfg.decoder_heads,
               mask_ratio=cfg.mask_ratio, norm_pix=cfg.norm_pix)


def train(cfg):
    # -- set-up: everything that can be wrong is found out here, before anything is written
    cfg, run = start(cfg)
    torch.manual_seed(cfg.seed)
    model = build(cfg).to(run.device)
    train_set, val_set = load_data(cfg, run)
    steps = lambda epochs: max(1, round(epochs * len(train_set) / cfg.batch_size))
    total, warmup = steps(cfg.epochs), steps(cfg.warmup_epochs) if cfg.warmup_epochs else 0
    peak_lr = cfg.base_lr * cfg.batch_size / 256
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), lr=peak_lr, betas=cfg.betas,
                                  fused=run.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)

    first = resume(cfg, "mae", run, model=model, optimizer=optimizer, scaler=scaler)
    if first >= total:
        run.say(f"nothing to do: {first} of {total} steps are done; more --epochs goes on, --resume no starts over")
        return 0
    run.describe(cfg, model, total, peak_lr)
    log = Log(cfg, "mae", run, first)

    if run.compile:
        model.compile()  # in place: the names in a checkpoint stay as they are
    ddp = DistributedDataParallel(model, device_ids=[run.local_rank] if run.device.type == "cuda" else None,
                                  gradient_as_bucket_view=True, broadcast_buffers=False) if run.world > 1 else model

    # -- what is looked at along the way: frozen features, and a picture of the same images under the same masks
    show = next(eval_batches(cfg, run, val_set or train_set, torch.arange(min(8, len(val_set or train_set)))))[0]
    show_mask = random_mask(draw((len(show), model.num_patches), run.device, "picture", cfg.seed),
                            model.num_patches - model.num_visible)

    def look(step, **scores):
        scores |= check_health(model.encode, cfg, run, train_set, val_set)
        warn_of_trouble(run, scores)
        log.write(step=step, images=step * cfg.batch_size, **scores)
        if run.main:
            columns = [show, *model.reconstruct(show, show_mask)]
            save_picture(Path(cfg.out, "reconstruction.png"), [denormalise(c, cfg) for c in columns])

    if first == 0:
        look(0, **check_health(raw_pixels, cfg, run, train_set, val_set, "raw_"))

    # -- the loop
    stream = train_batches(cfg, run, train_set, cfg.crop_scale, first, total)
    bar = tqdm(total=total * cfg.batch_size, initial=first * cfg.batch_size, unit="img", unit_scale=True,
               disable=not run.main, smoothing=0.05, mininterval=0.2 if sys.stderr.isatty() else 30)
    clock, waited, bad = time.perf_counter(), 0.0, torch.zeros((), device=run.device)
    logged = first
    for step in range(first + 1, total + 1):
        lr = warmup_cosine(step - 1, total, warmup, peak_lr)
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
            if run.world > 1:  # gradients travel once, with the last micro-batch
                ddp.require_backward_grad_sync = micro == cfg.accum - 1
            with run.autocast():
                loss, logs = ddp(images, mask, model.num_visible)
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
                run.save(cfg, method="mae", config=dataclasses.asdict(cfg), step=step, model=model.state_dict(),
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
