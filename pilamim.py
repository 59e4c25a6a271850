"""PiLaMIM: Toward Richer Visual Representations by Integrating Pixel and Latent Masked Image Modeling (Lee et al., arXiv
2501.03005), in one file.

Predicting pixels keeps detail (where, how many, how far); predicting another encoder's features keeps meaning. Here one
encoder does both at once: it sees a quarter of an image, and from its output one small decoder paints the hidden patches
while another predicts what a teacher, a slow moving average of the encoder that sees everything, makes of them. A third
loss asks the same of CLS, which has to stand for the whole image.

  images [B, C, H, W]
    1. patches [B, N, P]; a random 75 % of them masked                          random_mask
    2. CLS + visible patches -> latent [B, 1 + V, D]                            encoder(...)
    3. CLS + all patches -> the targets [B, 1 + N, D]                           teacher(...), no gradient
    4. latent and mask tokens -> masked pixels [B, M, P]                        decoder(...)         L_pixel
    5. latent and mask tokens -> masked latents [B, M, D] and CLS [B, D]        latent_decoder(...)  L_latent, L_cls
  loss = L_pixel + L_latent + L_cls, each a mean squared error
  After training teacher and decoders are thrown away; an image's feature is CLS after the final norm (`encode`).

  python pilamim.py                                                    on pictures that common.py draws
  python pilamim.py --data DIR --img-size 96 --out runs/mine-pilamim   any folder of images, the same small model
  python pilamim.py --latent-weight 0 --cls-weight 0 --out runs/pixel  the ablation: pixels alone; likewise the others
  torchrun --nproc_per_node 8 pilamim.py --out runs/pilamim-base --data DIR --img-size 224 --model base --batch-size 2048 \
      --epochs 800 --warmup-epochs 40 --base-lr 1.5e-4 --decoder-dim 384 --decoder-depth 6 --decoder-heads 12 \
      --init torch --ema 0.996 1 --clip-grad 0
                                                                       the paper's ImageNet recipe; not run at that scale

Result of the first, on one thread, seeds 0, 1, 2 (bf16, EPYC, torch 2.15; 2 min 45 s on two): k-NN of the nearest object's kind
50.8, 62.6, 60.4 % from CLS and 63.7, 68.8, 66.9 % from the mean of the patches; untrained 27.2 and 24.7 (mean of the seeds), raw
pixels 26.1, 29.1, 28.0.

Health: pixel_loss should fall below loss_of_mean, what guessing the mean would give. target_std is the spread of the
teacher's latents over patches and images: near 0 they are all the same, and latent_loss and cls_loss mean nothing.

Differs from the authors' program:
- A prediction meets the target of the same patch, as in the paper's equation. Theirs shuffles the teacher's patches and does not
  put them back, so that L_latent compares a prediction with another patch's target.
- The teacher starts as a copy of the encoder; theirs starts from random weights of its own.
- Every image has a mask of its own; theirs draws the same masks on all GPUs.
- The demo starts with MAE's weights (`--init mae`), with which so short a run learns more; theirs are PyTorch's (`--init torch`).
- Gradients are clipped to norm 1; `--clip-grad 0` disables this, as in the paper.
- Batches run across the end of an epoch; theirs drops the last incomplete batch.
- Mixed precision is bf16; theirs is fp16 with a loss scaler (`--amp fp16`).
- Images are turned upright by their EXIF orientation; theirs ignores it.
24 recorded steps of their program, with its targets put back in order, agree: see tests/test_trajectories.py.
"""

import copy
import dataclasses
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (MODELS, BadInput, Block, Log, PatchEmbed, check_decoder, check_health, cosine, count_blocks, denormalise,
                    draw, eval_batches, flag, gather, linear, load_data, load_strictly, main, patch_grid, patchify,
                    pca_colours, random_mask, raw_pixels, resize_positions, restore, resume, save_picture, sincos_2d,
                    split_ids, spread, start, train_batches, unpatchify, update_ema, usual_heads, warn_of_trouble,
                    xavier_init)


# ---------------------------------------------------------------------------------------------------------------
# Config: the method's own, then what all five share. Values are the quick demo's; the help says where the paper's differ
# ---------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config:
    mask_ratio: float = flag(0.75, "share of the patches that is masked")
    pixel_weight: float = flag(1.0, "weight of L_pixel; 0 drops it", least=0)
    latent_weight: float = flag(1.0, "weight of L_latent; 0 drops it", least=0)
    cls_weight: float = flag(1.0, "weight of L_cls; 0 drops it", least=0)
    decoder_dim: int = flag(64, "width of both decoders; the paper's is 384", least=1)
    decoder_depth: int = flag(2, "blocks of each decoder; the paper's is 6", least=1)
    decoder_heads: int = flag(2, "heads of both decoders; the paper's is 12", least=1)
    ema: tuple[float, ...] = flag((0.9, 1.0), "momentum of the teacher at the start and at the end; the paper's is 0.996 1",
                                  least=0, most=1)
    init: str = flag("mae", "weights at the start: as MAE's (Xavier; positions sin-cos), which learns sooner, or torch's own "
                     "(positions small and random), the authors'", choices=("mae", "torch"))
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
    batch_size: int = 64
    accum: int = 1
    epochs: int = 7
    warmup_epochs: int = 1
    base_lr: float = 2e-2  # the paper's 1.5e-4 is for ViT-B and 800 epochs
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    workers: int = -1
    seed: int = 0
    device: str = "auto"
    amp: str = "auto"
    compile: str = "auto"
    out: str = "runs/pilamim"
    resume: str = "auto"
    save_every: int = 5
    eval_every: int = 0
    log_every: int = 20


# ---------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------

def squared_error(pred, target):
    """Mean squared error in float32, of any shape: all three losses. Pixels are plain, not standardised by patch."""
    return (pred.float() - target.float()).square().mean()


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------

class Encoder(nn.Module):
    """A ViT with timm's names, without bias on q, k and v, with learned positions for the patches and none for CLS. The
    context encoder and the teacher are two of these."""

    def __init__(self, num_patches, patch_size, in_chans, dim, depth, heads):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=False, norm=nn.LayerNorm) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, patches, pos):  # [B, T, P], [B or 1, T, D] -> [B, 1 + T, D]
        x = self.patch_embed(patches) + pos
        return self.norm(self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)))


class Decoder(nn.Module):
    """From the latent to something per place: pixels, or the teacher's latents. No norm before the head."""

    def __init__(self, num_patches, dim, width, depth, heads, out):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        self.blocks = nn.Sequential(*[Block(width, heads, qkv_bias=False, norm=nn.LayerNorm) for _ in range(depth)])
        self.head = nn.Linear(width, out)

    def forward(self, latent, ids_visible, ids_masked, unread=0):
        """[B, 1 + V, D] -> visible places [B, V - unread, out], CLS [B, out], masked places [B, M, out]. The losses read CLS
        and the masked ones: `unread` tokens are keys and values in the last block and nothing after it."""
        x, pos = self.embed(latent), self.pos_embed[:, 1:]
        x = torch.cat([x[:, 1:] + gather(pos, ids_visible), x[:, :1] + self.pos_embed[:, :1],
                       self.mask_token + gather(pos, ids_masked)], 1)
        *first, last = self.blocks
        for block in first:
            x = block(x)
        x, num_masked = self.head(last(x, keys_only=unread)), ids_masked.shape[1]
        return x[:, :-1 - num_masked], x[:, -1 - num_masked], x[:, -num_masked:]


class PiLaMIM(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=768, depth=12, heads=12, decoder_dim=384,
                 decoder_depth=6, decoder_heads=12, mask_ratio=0.75, pixel_weight=1.0, latent_weight=1.0, cls_weight=1.0,
                 init="torch"):
        super().__init__()
        check_decoder(decoder_dim, decoder_heads)
        self.grid, self.patch_size = patch_grid(img_size, patch_size), patch_size
        self.weights = pixel_weight, latent_weight, cls_weight
        self.num_patches = self.grid[0] * self.grid[1]  # N
        self.num_visible = int(self.num_patches * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0  # V
        if not 0 < self.num_visible < self.num_patches:
            raise BadInput(f"--mask-ratio {mask_ratio} leaves {self.num_visible} of {self.num_patches} patches visible; "
                           "at least one must be, and one masked")
        if not any(self.weights):
            raise BadInput("--pixel-weight, --latent-weight and --cls-weight are all 0: nothing is left to learn")
        self.encoder = Encoder(self.num_patches, patch_size, in_chans, dim, depth, heads)
        self.decoder = Decoder(self.num_patches, dim, decoder_dim, decoder_depth, decoder_heads, patch_size**2 * in_chans)
        self.latent_decoder = Decoder(self.num_patches, dim, decoder_dim, decoder_depth, decoder_heads, dim)
        self.init_weights(init)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def init_weights(self, init):
        for name, p in self.named_parameters():
            if name.endswith(("cls_token", "mask_token", "pos_embed")):
                nn.init.trunc_normal_(p, std=0.02)
        if init == "mae":  # else Linears keep PyTorch's own
            xavier_init(self)
            for part in (self.encoder, self.decoder, self.latent_decoder):  # the patches' positions; they are still learned
                part.pos_embed.data[:, -self.num_patches:] = sincos_2d(part.pos_embed.shape[2], *map(torch.arange, self.grid))

    def forward(self, images, mask=None, num_visible=None):
        """images [B, C, H, W]; mask bool [B, N], True = masked, the same number in each row; None draws one. Without
        num_visible a mask is counted, and a GPU waits for it. -> loss, logs."""
        if mask is None:
            mask = random_mask(torch.rand(len(images), self.num_patches, device=images.device),
                               self.num_patches - self.num_visible)
            num_visible = self.num_visible
        ids_visible, ids_masked = split_ids(mask, num_visible)
        patches = patchify(images, self.patch_size)  # [B, N, P]
        latent = self.encoder(gather(patches, ids_visible), gather(self.encoder.pos_embed, ids_visible))  # [B, 1 + V, D]
        with torch.no_grad():
            target = self.teacher(patches, self.teacher.pos_embed)  # [B, 1 + N, D]
        target_cls, target_latents = target[:, 0], gather(target[:, 1:], ids_masked)  # [B, D], [B, M, D]
        target_pixels = gather(patches, ids_masked)  # [B, M, P]
        # Both decoders give the masked places in the order of ids_masked: prediction and target are of the same patch.
        _, _, pixels = self.decoder(latent, ids_visible, ids_masked, unread=ids_visible.shape[1])  # [B, M, P]
        _, cls, latents = self.latent_decoder(latent, ids_visible, ids_masked, unread=ids_visible.shape[1])  # [B, D], [B, M, D]
        losses = {"pixel_loss": squared_error(pixels, target_pixels),
                  "latent_loss": squared_error(latents, target_latents),
                  "cls_loss": squared_error(cls, target_cls)}
        loss = sum(weight * part for weight, part in zip(self.weights, losses.values()))
        with torch.no_grad():
            logs = {name: part.detach() for name, part in losses.items()} | {
                "loss_of_mean": target_pixels.var(unbiased=False), "pred_std": spread(latents),
                "target_std": spread(target_latents)}
        return loss, logs

    def encode(self, images):
        """images -> pooled [B, D], patches [B, N, D]: the context encoder, nothing masked, after the final norm; pooled is
        CLS, the paper's token for linear probing. Other image sizes are fine: positions are resized."""
        pos = resize_positions(self.encoder.pos_embed, self.grid, patch_grid(images.shape[2:], self.patch_size))
        x = self.encoder(patchify(images, self.patch_size), pos)
        return x[:, 0], x[:, 1:]

    @torch.no_grad()
    def reconstruct(self, images, mask):
        """From the pixel decoder: the images with grey in place of masked patches, its picture of all of them, and the
        masked ones of it pasted in; each [B, C, H, W], in the images' own units."""
        ids_visible, ids_masked = split_ids(mask)
        patches, p, hidden = patchify(images, self.patch_size), self.patch_size, mask[..., None]
        latent = self.encoder(gather(patches, ids_visible), gather(self.encoder.pos_embed, ids_visible))
        visible, _, masked = self.decoder(latent, ids_visible, ids_masked)
        pred = restore(torch.cat([visible, masked], 1).float(), torch.cat([ids_visible, ids_masked], 1))
        return [unpatchify(t, p, self.grid) for t in (patches.masked_fill(hidden, 0), pred, torch.where(hidden, pred, patches))]

    @classmethod
    def from_released(cls, state_dict, **sizes):
        """A model from the authors' file, a dict of tensors or one with the key `model`. Widths, depths and sizes are read
        from the tensors; heads cannot be (usual ones, 12 in the decoders, unless said)."""
        state = {rename(name): t for name, t in state_dict.get("model", state_dict).items()}
        missing = {"encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.proj.weight"} - state.keys()
        if missing:
            raise BadInput(f"not a released PiLaMIM: it has no {', '.join(sorted(missing))}")
        dim, in_chans, p, _ = state["encoder.patch_embed.proj.weight"].shape
        for name, t in state.items():
            if name.endswith("pos_embed"):  # [N, 1, D] there
                state[name] = t.transpose(0, 1)
            elif name.startswith("decoder.head.") and len(t) == in_chans * p * p:  # channel comes first there, here last
                state[name] = t.unflatten(0, (in_chans, p * p)).transpose(0, 1).flatten(0, 1)
        sizes = {"img_size": math.isqrt(state["encoder.pos_embed"].shape[1]) * p, "patch_size": p, "in_chans": in_chans,
                 "dim": dim, "depth": count_blocks(state, "encoder.blocks"), "heads": usual_heads(dim)} | sizes
        if "decoder.embed.weight" in state:
            sizes = {"decoder_dim": len(state["decoder.embed.weight"]),
                     "decoder_depth": count_blocks(state, "decoder.blocks")} | sizes
        decoders = [("decoder.",), ("latent_decoder.",)]
        return load_strictly(cls(**sizes), state, "a released PiLaMIM", sizes, optional=decoders)


def rename(name):
    """A parameter's name in the authors' program -> here."""
    for theirs, ours in (("target_encoder.", "teacher."), ("target_decoder.", "latent_decoder."), ("decoder_latent_embed.",
                         "latent_decoder.embed."), ("decoder_embed.", "decoder.embed."), ("pos_embedding", "pos_embed"),
                         ("patchify.", "patch_embed.proj."), ("transformer.", "blocks."), ("layer_norm.", "norm."),
                         ("head_latent.", "head.")):
        name = name.replace(theirs, ours)
    return name


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------

def build(cfg):
    dim, depth, heads = MODELS[cfg.model]
    return PiLaMIM(img_size=cfg.img_size, patch_size=cfg.patch_size, in_chans=cfg.in_chans, dim=dim, depth=depth, heads=heads,
                   decoder_dim=cfg.decoder_dim, decoder_depth=cfg.decoder_depth, decoder_heads=cfg.decoder_heads,
                   mask_ratio=cfg.mask_ratio, pixel_weight=cfg.pixel_weight, latent_weight=cfg.latent_weight,
                   cls_weight=cfg.cls_weight, init=cfg.init)


def rate_of_epoch(epoch, epochs, warmup_epochs):
    """The learning rate over its peak. It changes once an epoch, as in the authors' program: the smaller one of a
    linear warm-up that is already at 1 / warmup_epochs in epoch 0, and half a cosine over all epochs."""
    return min((epoch + 1) / (warmup_epochs + 1e-8), cosine(epoch, epochs, 1.0, 0.0))


def train(cfg):
    # -- set-up: everything that can be wrong is found out here, before anything is written
    cfg, run = start(cfg)
    torch.manual_seed(cfg.seed)
    model = build(cfg).to(run.device)
    train_set, val_set = load_data(cfg, run)
    steps = lambda epochs: max(1, round(epochs * len(train_set) / cfg.batch_size))
    total = steps(cfg.epochs)
    peak_lr = cfg.base_lr * cfg.batch_size / 256
    # Weight decay is on every parameter, biases and norm gains included. The gain of the encoder's last norm sets the
    # scale of the latent targets: its decay makes L_latent smaller against L_pixel as training goes on.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak_lr, betas=cfg.betas, weight_decay=cfg.weight_decay,
                                  fused=run.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)

    first = resume(cfg, "pilamim", run, model=model, optimizer=optimizer, scaler=scaler)
    if first >= total:
        run.say(f"nothing to do: {first} of {total} steps are done; more --epochs goes on, --resume no starts over")
        return 0
    run.describe(cfg, model, total, peak_lr)
    log = Log(cfg, "pilamim", run, first)

    if run.compile:
        model.compile()  # in place: the names in a checkpoint stay as they are
    ddp = DistributedDataParallel(model, device_ids=[run.local_rank] if run.device.type == "cuda" else None,
                                  gradient_as_bucket_view=True, broadcast_buffers=False) if run.world > 1 else model

    # -- what is looked at along the way: frozen features, and pictures of the same images under the same masks
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
        epoch = (step - 1) * cfg.batch_size // len(train_set)
        lr = peak_lr * rate_of_epoch(epoch, cfg.epochs, cfg.warmup_epochs)
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
        update_ema(model.teacher, model.encoder, linear(step - 1, total, *cfg.ema))
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
                run.save(cfg, method="pilamim", config=dataclasses.asdict(cfg), step=step, model=model.state_dict(),
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
