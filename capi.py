"""Cluster and Predict Latent Patches for Improved Masked Image Modeling (Darcet et al., arXiv 2502.08769), in one file.

A teacher, the slow moving average of the student, sees the whole image; its patch features are sorted into clusters, and
for every hidden patch the student has to say which cluster the teacher's feature is in. Clusters are learned online.
Left alone they would all become one, so the sorting is forced to be balanced (Sinkhorn-Knopp).

  images [B, C, H, W]
    1. one visible block of patches, everything around it hidden               inverse_block
    2. teacher: all patches -> features [B, N, D] -> cluster logits [B, N, K]  teacher, cluster_head
    3. logits -> balanced assignments [B, N, K]                                sinkhorn
    4. clustering loss: softmax(logits / 0.12) against 3., trains the clusters only
    5. student: registers + visible patches -> context [B, R + V, D]           student
    6. a mask token per predicted place looks at the context -> [B, Q, D]      student.predict
    7. CAPI loss: softmax(student's logits / 0.12) against 3., trains the student only
  What is evaluated is the teacher (`encode`).

  python capi.py                                                 on pictures that common.py draws
  python capi.py --data DIR --img-size 96 --out runs/mine-capi   any folder of images, the same small model
  torchrun --nproc_per_node 8 --nnodes 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 capi.py --out runs/capi-large \
      --data DIR --img-size 224 --patch-size 14 --model large --batch-size 16384 --epochs 6394 --warmup-epochs 639 \
      --base-lr 1.5625e-5 --predictor-depth 12 --registers 16 --clusters 16384 --predict-share 0.05 --weight-decay 0.1 \
      --ema 0.999 --drop-path 0.2 --init xavier --clip-grad 0    the paper's ViT-L/14 recipe: 500,000 steps, as passes over
                                                                 ImageNet-1k (a larger set takes fewer); not run at that scale

Result of the first, on one thread, seeds 0, 1, 2 (bf16, EPYC, torch 2.15; 2 min 11 s on two): k-NN of the nearest object's kind
36.3, 47.5, 43.5 %; untrained 23.3, 24.7, 22.8, raw pixels 26.1, 29.1, 28.0.

Why position by position: patches in the middle of photographs differ from those at the rim. Balanced over all positions
together, clusters could tell positions apart and still be balanced; balanced separately at each, a cluster must say
something about content. The price: each position has only B samples for its K clusters, so B should be about K (the
paper: 16384 of both, over all ranks). With --clusters 0 K is the batch, and --accum makes the balanced batch smaller.

Two temperatures: 0.06 makes the assignments, 0.12 the predictions. The sharper target pulls the predictions towards
deciding; with one temperature an undecided answer that is balanced would be its own target.

Two losses, no shared gradient: assignments are constants for both; the teacher's features are constants for the
clustering head; the clusters are constants for the student. Each has its own optimiser.

Memory: all logits are B x 256 x K numbers at ViT-L/14: 4.3 GB in float32 for 256 images per GPU and K = 16384. They are made
in chunks of positions and made again in the backward pass; what stays is the assignments, in the precision of autocast. By
calculation (`python tests/benchmark.py --cost`: fused attention, bf16) the recipe above keeps 149 MiB per image for the
backward pass, and 9.6 GB of weights, gradients, averages and teacher: 50 GB at its 256 images per GPU, plus a few times the
0.5 GB of a chunk's logits. --recompute: 38 MiB per image, 14 % more FLOPs.

Differs from the authors' program:
- All hidden patches are predicted unless --predict-share says otherwise. The paper's share is 0.05; the author has since said that
  it was too low and advises about 0.2. At least one patch is predicted, where theirs predicts none on a 4 x 4 grid.
- Residuals, rotary angles and Sinkhorn-Knopp are float32; theirs are bf16 like everything else. Ours is closer to float32
  results by a factor of two.
- The first Sinkhorn turn is in logarithms, so that no row underflows (5e-6 of the loss).
- The rows of the student head are divided by their length without the 1e-8 that theirs adds.
- The demo starts with small weights (`--init small`); theirs are Xavier uniform (`--init xavier`).
- The student's gradient is clipped to norm 1; `--clip-grad 0` disables this, as in the paper.
- Batches run across the end of an epoch; their program counts steps, not epochs.
- Images are turned upright by their EXIF orientation; theirs ignores it.
24 recorded steps of their program agree: see tests/test_trajectories.py.
"""

import dataclasses
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import (MODELS, BadInput, Log, Mlp, PatchEmbed, attend, bicubic, check_health, count_blocks, denormalise, draw,
                    eval_batches, flag, gather, load_data, load_strictly, main, patch_grid, patchify, pca_colours, raw_pixels,
                    resume, save_picture, seed_of, split_ids, spread, start, train_batches, update_ema, usual_heads,
                    warn_of_trouble, xavier_init)


# ---------------------------------------------------------------------------------------------------------------
# Config: the method's own, then what all five share. Values are the quick demo's; the help says where the paper's differ
# ---------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config:
    mask_ratio: float = flag(0.65, "share of the patches that is masked (Sec. 4)")
    predict_share: float = flag(1.0, "share of the masked patches that is predicted, at least one patch; the paper's is 0.05",
                                least=0, most=1)
    clusters: int = flag(0, "K; 0: as many as the batch has images (the paper's ratio), at most 16384", least=0)
    registers: int = flag(4, "register tokens, a multiple of 4; the paper's ViT-L has 16", least=0)
    predictor_depth: int = flag(2, "cross-attention blocks of the predictor; the paper's is 12", least=1)
    drop_path: float = flag(0.0, "share of the images left out of each branch; the paper's is 0.2", least=0, most=0.9)
    init: str = flag("small", "weights at the start: xavier, the authors'; small, trunc-normal 0.02, which learns more in the "
                     "demo: at width 96 Xavier weights are three to five times larger", choices=("xavier", "small"))
    ema: float = flag(0.97, "least momentum of the teacher, reached after warm-up; the paper's is 0.999", least=0, most=1)
    cluster_lr: float = flag(0.5, "rate of the clustering head, in units of the student's", least=0)
    recompute: bool = flag(False, "encoder activations are computed again instead of kept: less memory, more time")
    crop_scale: tuple[float, ...] = (0.6, 1.0)
    betas: tuple[float, ...] = (0.9, 0.95)

    data: str = "shapes"
    data_root: str = "data"
    img_size: tuple[int, ...] = (32,)
    patch_size: int = 8
    in_chans: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    model: str = "nano"
    batch_size: int = 128
    accum: int = 1
    epochs: int = 14
    warmup_epochs: int = 1
    base_lr: float = 3e-3  # the paper's 1.5625e-5, which is 1e-3 at 16384 images, is for ViT-L and 500,000 steps
    weight_decay: float = 0.05  # the paper's is 0.1
    clip_grad: float = 1.0
    workers: int = -1
    seed: int = 0
    device: str = "auto"
    amp: str = "auto"
    compile: str = "auto"
    out: str = "runs/capi"
    resume: str = "auto"
    save_every: int = 5
    eval_every: int = 0
    log_every: int = 20


# ---------------------------------------------------------------------------------------------------------------
# What the paper adds: the mask, coordinates, balanced assignments
# ---------------------------------------------------------------------------------------------------------------

def inverse_block(noise, grid, num_visible):
    """noise [B, 3], uniform -> is_masked [B, N]. One block of the grid stays visible, everything else is masked; then
    the mask is rolled around both axes by a random shift."""
    rows, columns = grid
    # The block's aspect ratio (height / width) is log-uniform in [1/2, 2], as far as such a block fits into the grid.
    thinnest, tallest = num_visible / columns**2, rows**2 / (num_visible + 1e-5)
    low = math.log(min(max(1 / 2, thinnest), tallest))
    high = math.log(max(min(2, tallest), thinnest))
    aspect = torch.exp(low + (high - low) * noise[:, 0])  # [B]
    # Height and width are rounded up independently. The clamps are in integers: they keep the block inside the grid and
    # at least num_visible places large, whatever the rounding of the square roots.
    height = (num_visible * aspect).sqrt().ceil().long().clamp(math.ceil(num_visible / columns), rows)
    width = (num_visible / aspect).sqrt().ceil().long()
    width = width.maximum((num_visible + height - 1) // height).clamp(max=columns)[:, None]  # [B, 1]
    # Row and column of every patch, counted from the block's corner after the roll.
    ids = torch.arange(rows * columns, device=noise.device)
    row = (ids // columns - (noise[:, 1:2] * rows).long()) % rows  # [B, N]
    column = (ids % columns - (noise[:, 2:3] * columns).long()) % columns
    # Only the first num_visible places of the block stay visible, row by row.
    return ~((column < width) & (row * width + column < num_visible))


def random_places(noise, is_masked, count):
    """noise [B, N], uniform -> ids [B, count] of masked patches, at random, ascending."""
    return noise.masked_fill(~is_masked, 2).argsort(1)[:, :count].sort(1).values


def patch_coordinates(grid, device):
    """(row, column) of each patch, 0..1 from the first to the last: [N, 2]."""
    axes = [torch.linspace(0, 1, n, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)


def register_coordinates(count, device):
    """Round the border of the unit square, side after side: [R, 2]."""
    c = torch.arange(count // 4, device=device) / max(1, count // 4)
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    return torch.cat([torch.stack(side, 1) for side in ((c, zero), (one, c), (1 - c, one), (zero, 1 - c))])


def rotary_table(head_dim):
    """Frequencies [2, d]: d/4 of them, geometric from 7 to 7e-4 turns; the first half of the channels turns with the row,
    the second with the column, and each half carries them twice."""
    n = head_dim // 4
    freqs = 2 * math.pi * 7 * 1e-4 ** (torch.arange(n, dtype=torch.float64) / max(1, n - 1))
    twice, zero = freqs.repeat(2), torch.zeros(2 * n, dtype=torch.float64)
    return torch.stack([torch.cat([twice, zero]), torch.cat([zero, twice])]).float()


def rotation(coordinates, table):
    """[B or 1, T, 2] -> cosine and sine [B or 1, 1, T, d] of every channel's angle, the sine negative in the first half."""
    angle = (coordinates[..., :1] * table[0] + coordinates[..., 1:] * table[1])[:, None]  # no @: autocast would round angles
    low, high = angle.sin().chunk(2, -1)
    return angle.cos(), torch.cat([-low, high], -1)


def rotate(x, rope):
    """Rotary embedding over the whole head: x [..., B, heads, T, d]. A channel's partner is half a head away, so one of the two
    turns with the row and the other with the column: the authors' choice, not the usual rotation of a plane."""
    cos, sin = (t.to(x.dtype) for t in rope)
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([b, a], -1), sin)


def over_ranks(x, op):
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


@torch.no_grad()
def sinkhorn(logits, temperature=0.06, iterations=3, eps=1e-8):
    """Balanced assignments [B, N, K], separately at each position: in turn every cluster gets the same share of the batch
    OF ALL RANKS, and every sample is shared out wholly. The first turn is in logarithms: a sample that is far from every
    cluster would underflow to nothing."""
    x = logits.float() / temperature
    top = over_ranks(x.amax(0), dist.ReduceOp.MAX)  # [N, K]
    x = x - top - over_ranks((x - top).exp().sum(0), dist.ReduceOp.SUM).log()
    x = x.softmax(-1)
    for _ in range(iterations - 1):
        x /= over_ranks(x.sum(0), dist.ReduceOp.SUM) + eps
        x /= x.sum(-1, keepdim=True) + eps
    return x


# ---------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------

def cross_entropy(logits, assignments, temperature=0.12):
    """Soft labels, mean over samples: [..., K] twice -> scalar, in float32."""
    return -(assignments * (logits.float() / temperature).log_softmax(-1)).sum(-1).mean()


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------

class RotaryAttention(nn.Module):
    """Without biases, with rotary coordinates; of the tokens to themselves, or to a context."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads or dim // heads % 4:
            raise BadInput(f"heads={heads}: rotary coordinates need heads whose width 4 divides, not {dim} / {heads}")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x, rope, context=None, context_rope=None):  # [B, Q, D], and [B, T, D] -> [B, Q, D]
        def project(x, *layers):  # in one product, which is faster -> [layers, B, heads, T, d]
            x = F.linear(x, torch.cat([layer.weight for layer in layers]))
            return x.unflatten(-1, (len(layers), self.heads, -1)).permute(2, 0, 3, 1, 4)
        if context is None:
            qkv = project(x, self.q_proj, self.k_proj, self.v_proj)
            (q, k), v = rotate(qkv[:2], rope), qkv[2]
        else:
            (q,), (k, v) = project(x, self.q_proj), project(context, self.k_proj, self.v_proj)
            q, k = rotate(q, rope), rotate(k, context_rope)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class RotaryBlock(nn.Module):
    """RMSNorm, no biases. With a context it is a block of the predictor: queries look at the context, never at each other.
    Drop path leaves images out of the branch, which saves their compute, and scales the rest up to keep the mean."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(dim, eps=1e-5), RotaryAttention(dim, heads)
        self.norm2, self.mlp = nn.RMSNorm(dim, eps=1e-5), Mlp(dim, 4 * dim, bias=False)
        self.drop_path = drop_path

    def forward(self, x, rope, context=None, context_rope=None):  # [B, T, D]
        tensors = rope if context is None else (*rope, context, *context_rope)  # flat, so that drop path can pick images of each

        def attention(x, cos, sin, context=None, *context_rope):
            return self.attn(self.norm1(x), (cos, sin), context, context_rope)
        x = self.residual(x, attention, tensors)
        return self.residual(x, lambda x: self.mlp(self.norm2(x)))

    def residual(self, x, branch, tensors=()):
        if not (self.training and self.drop_path):
            return x + branch(x, *tensors)
        kept = max(1, int(len(x) * (1 - self.drop_path)))
        some = torch.rand(len(x), device=x.device).argsort()[:kept]
        out = branch(x[some], *[t[some] if len(t) == len(x) else t for t in tensors])
        return x.index_add(0, some, out.to(x.dtype), alpha=len(x) / kept)


class Backbone(nn.Module):
    """Encoder and predictor; the student is one, the teacher is its moving average."""

    def __init__(self, patch_size, in_chans, dim, depth, heads, predictor_depth, registers, init, drop_path=0.0, recompute=False):
        super().__init__()
        if registers % 4:
            raise BadInput(f"--registers {registers}: they stand on four sides, so it has to be a multiple of 4")
        self.recompute = recompute
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.registers = nn.Parameter(torch.zeros(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList([RotaryBlock(dim, heads, drop_path) for _ in range(depth)])
        self.predictor = nn.ModuleList([RotaryBlock(dim, heads, drop_path) for _ in range(predictor_depth)])
        self.norm = nn.RMSNorm(dim, eps=1e-5, elementwise_affine=False)  # one for both, it has no gain
        self.register_buffer("rotary", rotary_table(dim // heads), persistent=False)
        for p in self.parameters() if init == "small" else (self.registers, self.mask_token):
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
        if init == "xavier":
            xavier_init(self)

    def forward(self, patches, coordinates):  # [B, T, P], [B or 1, T, 2] -> [B, R + T, D] after the norm, and its rotation
        registers = self.registers.expand(len(patches), -1, -1)
        low, high = coordinates.amin(1, keepdim=True), coordinates.amax(1, keepdim=True)  # registers: round what is visible
        border = low + (high - low) * register_coordinates(registers.shape[1], patches.device)
        rope = rotation(torch.cat([border, coordinates], 1), self.rotary)
        x = torch.cat([registers, self.patch_embed(patches)], 1)
        for block in self.blocks:
            x = checkpoint(block, x, rope, use_reentrant=False) if self.recompute and self.training else block(x, rope)
        return self.norm(x), rope

    def predict(self, coordinates, context, context_rope, depth=None):  # [B or 1, Q, 2], [B, R + T, D] -> [B, Q, D]
        rope = rotation(coordinates, self.rotary)
        x = self.mask_token.expand(len(context), coordinates.shape[1], -1)
        for block in self.predictor[:depth]:
            x = block(x, rope, context, context_rope)
        return self.norm(x)


class StudentHead(nn.Module):
    """Length 1, then a Linear whose rows have a direction and a length of their own (trained, 1 at first)."""

    def __init__(self, dim, clusters):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(clusters, dim))
        self.weight_g = nn.Parameter(torch.ones(clusters, 1))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), self.weight_g * F.normalize(self.weight_v, dim=1))


class ClusterHead(nn.Module):
    """The teacher's: the clusters, which the clustering loss alone trains."""

    def __init__(self, dim, clusters):
        super().__init__()
        self.layer = nn.Linear(dim, clusters)
        nn.init.normal_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.layer(F.normalize(x, dim=-1, eps=1e-7))


class CAPI(nn.Module):
    CHUNK = 2**27  # logits that exist at the same time

    def __init__(self, img_size=224, patch_size=14, in_chans=3, dim=1024, depth=24, heads=16, decoder_depth=12, registers=16,
                 clusters=16384, mask_ratio=0.65, predict_share=0.05, drop_path=0.0, recompute=False, init="xavier"):
        super().__init__()
        self.grid, self.patch_size, self.clusters = patch_grid(img_size, patch_size), patch_size, clusters  # K
        self.num_patches = self.grid[0] * self.grid[1]  # N
        num_masked = int(mask_ratio * self.num_patches) if 0 < mask_ratio < 1 else 0  # M
        if not 0 < num_masked < self.num_patches:
            raise BadInput(f"--mask-ratio {mask_ratio} leaves {num_masked} of {self.num_patches} patches masked; at least one "
                           "must be, and one visible")
        self.num_visible, self.num_predict = self.num_patches - num_masked, max(1, int(predict_share * num_masked))  # V, Q
        make = lambda **options: Backbone(patch_size, in_chans, dim, depth, heads, decoder_depth, registers, init, **options)
        self.student, self.student_head = make(drop_path=drop_path, recompute=recompute), StudentHead(dim, clusters)
        self.teacher, self.cluster_head = make().requires_grad_(False), ClusterHead(dim, clusters)
        self.teacher.load_state_dict(self.student.state_dict())

    def forward(self, images, mask=None, num_visible=None, predict=None, num_predict=None):
        """images [B, C, H, W]; mask bool [B, N], True = masked, the same number in each row; predict bool [B, N], which of
        them are predicted; None draws one. A GPU waits for the counts, where they are not said. -> loss, logs."""
        B, N, device = len(images), self.num_patches, images.device
        if mask is None:
            mask, num_visible = inverse_block(torch.rand(B, 3, device=device), self.grid, self.num_visible), self.num_visible
        ids_visible, ids_masked = split_ids(mask, num_visible)
        if predict is None:
            count = min(self.num_predict, ids_masked.shape[1])
            ids_predict = random_places(torch.rand(B, N, device=device), mask, count)
        else:
            ids_predict, _ = split_ids(~predict, num_predict)
        patches = patchify(images, self.patch_size)  # [B, N, P]
        coordinates = patch_coordinates(self.grid, device)[None]  # [1, N, 2]

        with torch.no_grad():
            target = self.teacher(patches, coordinates)[0][:, -N:]  # [B, N, D]
        assignments, clustering_loss = self.cluster(target)  # [B, N, K]
        context, rope = self.student(gather(patches, ids_visible), gather(coordinates, ids_visible))  # [B, R + V, D]
        pred = self.student.predict(gather(coordinates, ids_predict), context, rope)  # [B, Q, D]
        capi_loss = cross_entropy(self.student_head(pred), gather(assignments, ids_predict))

        with torch.no_grad():
            share = assignments.float()
            used = torch.zeros(self.clusters, device=device).scatter_(0, share.argmax(-1).flatten(), 1)
            entropy = -(share * share.clamp(min=1e-30).log()).sum(-1)
            logs = {"capi_loss": capi_loss.detach(), "clustering_loss": clustering_loss.detach(), "target_entropy":
                    entropy.mean(), "clusters_used": used.mean(), "pred_std": spread(pred), "target_std": spread(target)}
        return capi_loss + clustering_loss, logs

    def cluster(self, target):
        """Teacher features [B, N, D] -> assignments [B, N, K] and the clustering loss. Positions do not know of each other,
        so that they can come in chunks; the logits of a chunk are made again in the backward pass."""
        def loss_of(x, assignments):
            return cross_entropy(self.cluster_head(x), assignments) * x.shape[1]  # a sum over the chunk's positions
        assignments, loss, chunk = [], 0, max(1, self.CHUNK // (len(target) * self.clusters))
        for x in target.split(chunk, 1):
            whole = chunk >= target.shape[1]  # all at once: the logits can stay
            with torch.set_grad_enabled(whole and torch.is_grad_enabled()):
                logits = self.cluster_head(x)
            assignments.append(sinkhorn(logits).to(logits.dtype))  # [B, n, K]
            if whole:
                loss = cross_entropy(logits, assignments[0]) * x.shape[1]
            else:
                if not torch.compiler.is_compiling():  # compiled code has no such cache, and the call would break it in two
                    torch.clear_autocast_cache()  # else the weights that were cast without gradient are used again
                loss = loss + checkpoint(loss_of, x, assignments[-1], use_reentrant=False)
        return torch.cat(assignments, 1), loss / target.shape[1]

    def encode(self, images):
        """images -> pooled [B, D], patches [B, N, D]: the teacher (the student's moving average), nothing masked, after the
        final norm. pooled: the first predictor block with a mask token at every place, each output normed, then the mean.
        Any image size that the patch divides: positions are coordinates."""
        coordinates = patch_coordinates(patch_grid(images.shape[2:], self.patch_size), images.device)[None]
        context, rope = self.teacher(patchify(images, self.patch_size), coordinates)
        pooled = self.teacher.predict(coordinates, context, rope, depth=1).mean(1)
        return pooled, context[:, -coordinates.shape[1]:]

    @classmethod
    def from_released(cls, state_dict, **sizes):
        """A model from the authors' file: student and teacher with their heads, or the one backbone that was released
        (`backbone.`), with its predictor and head or without. Then the student is a copy of the teacher. Sizes are read
        from the tensors; heads cannot be (usual ones unless said), nor img_size, which encode takes as it comes."""
        state = {rename(name): t for name, t in state_dict.get("model", state_dict).items()}
        missing = {"teacher.registers", "teacher.patch_embed.proj.weight", "teacher.blocks.0.attn.q_proj.weight"} - state.keys()
        if missing:
            raise BadInput(f"not a released CAPI: it has no {', '.join(sorted(missing))}")
        dim, in_chans, p, _ = state["teacher.patch_embed.proj.weight"].shape
        sizes = {"img_size": 16 * p, "patch_size": p, "in_chans": in_chans, "dim": dim, "registers":
                 state["teacher.registers"].shape[1], "depth": count_blocks(state, "teacher.blocks"), "heads": usual_heads(dim),
                 "decoder_depth": count_blocks(state, "teacher.predictor") or 1} | {
                 "clusters": len(state[k]) for k in ("cluster_head.layer.weight", "student_head.weight_v") if k in state} | sizes
        model = cls(**sizes)
        for name in [n for n in state if n.endswith("rope.freqs")]:  # the same fixed table in each block
            freqs, own = state.pop(name).float().cpu(), model.teacher.rotary
            # Not exactly: the teacher's average of this constant is off by 1e-5 after 500,000 steps in float32, and their
            # program may write bf16, which is off by 2e-3.
            if freqs.shape != own.shape or not torch.allclose(freqs, own, rtol=5e-3):
                raise BadInput(f"not a released CAPI of these sizes: other rotary frequencies in {name}")
            model.teacher.rotary.copy_(freqs)
            model.student.rotary.copy_(freqs)
        if not any(name.startswith("student.") for name in state):
            state |= {name.replace("teacher.", "student.", 1): t for name, t in state.items() if name.startswith("teacher.")}
        parts = [("student.predictor.", "student.mask_token"), ("teacher.predictor.", "teacher.mask_token"),
                 ("student_head.",), ("cluster_head.",)]
        return load_strictly(model, state, "a released CAPI", sizes, optional=parts)


def rename(name):
    """A parameter's name in the authors' program -> here. A single released backbone is the teacher's; a head that comes
    with it is the student's (`last_layer`) or the teacher's."""
    name = re.sub(r"^(module\.)?backbone\.", "teacher.backbone.", name)
    name = re.sub(r"^(module\.)?head\.last_layer\.", "student_head.", name)
    name = re.sub(r"^(module\.)?head\.layer\.", "cluster_head.layer.", name)
    for theirs, ours in (("student.head.last_layer.", "student_head."), ("teacher.head.", "cluster_head."), ("backbone.", ""),
                         ("encoder.blocks.", "blocks."), ("decoder.blocks.", "predictor."), ("residual1.norm.", "norm1."),
                         ("residual2.norm.", "norm2."), ("residual1.fn.", "attn."), ("residual2.fn.", "mlp."),
                         ("patch_embed.", "patch_embed.proj.")):
        name = name.replace(theirs, ours)
    return name


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------

def build(cfg):
    dim, depth, heads = MODELS[cfg.model]
    return CAPI(img_size=cfg.img_size, patch_size=cfg.patch_size, in_chans=cfg.in_chans, dim=dim, depth=depth, heads=heads,
                decoder_depth=cfg.predictor_depth, registers=cfg.registers, clusters=cfg.clusters or min(16384, cfg.batch_size),
                mask_ratio=cfg.mask_ratio, predict_share=cfg.predict_share, drop_path=cfg.drop_path, recompute=cfg.recompute,
                init=cfg.init)


def student_groups(model, weight_decay):
    """The student's parameters for AdamW: the patch projection at a fifth of the rate, the gains of norms at a tenth of the
    decay, biases without decay."""
    groups = {}
    for name, p in [*model.student.named_parameters(), *model.student_head.named_parameters()]:
        scale = 0.2 if name.startswith("patch_embed.") else 1.0
        decay = 0.0 if name.endswith("bias") else 0.1 if "norm" in name else 1.0
        groups.setdefault((scale, decay), []).append(p)
    return [{"params": ps, "scale": scale, "weight_decay": decay * weight_decay} for (scale, decay), ps in groups.items()]


def cut_cosine(step, total, warmup):
    """The factor of learning rates and momentum. It rises from 0 to 1, which the last warm-up step has; then it follows
    a cosine towards 0 that is cut off at 80 % of its half-period, where it is 0.095."""
    if step < warmup - 1:
        return step / (warmup - 1)
    step = max(step, warmup)
    return 0.5 * (1 + math.cos(0.8 * math.pi * (step - warmup) / max(1, total - warmup)))


def train(cfg):
    # -- set-up: everything that can be wrong is found out here, before anything is written
    cfg, run = start(cfg)
    torch.manual_seed(cfg.seed)
    model = build(cfg).to(run.device)
    train_set, val_set = load_data(cfg, run)
    steps = lambda epochs: max(1, round(epochs * len(train_set) / cfg.batch_size))
    total, warmup = steps(cfg.epochs), steps(cfg.warmup_epochs) if cfg.warmup_epochs else 0
    peak_lr = cfg.base_lr * cfg.batch_size / 256
    fused = run.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(student_groups(model, cfg.weight_decay), lr=peak_lr, betas=cfg.betas, fused=fused)
    cluster_optimizer = torch.optim.AdamW([{"params": [*model.cluster_head.parameters()], "scale": cfg.cluster_lr}], lr=peak_lr,
                                          betas=cfg.betas, weight_decay=0.01, fused=fused)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)

    first = resume(cfg, "capi", run, model=model, optimizer=optimizer, cluster_optimizer=cluster_optimizer, scaler=scaler)
    if first >= total:
        run.say(f"nothing to do: {first} of {total} steps are done; more --epochs goes on, --resume no starts over")
        return 0
    run.describe(cfg, model, total, peak_lr)
    log = Log(cfg, "capi", run, first)

    if run.compile:
        model.compile()  # in place: the names in a checkpoint stay as they are
    ddp = DistributedDataParallel(model, device_ids=[run.local_rank] if run.device.type == "cuda" else None,
                                  gradient_as_bucket_view=True, broadcast_buffers=False) if run.world > 1 else model

    # -- what is looked at along the way: frozen features, and of the same images the PCA at two sizes and the clusters
    show = next(eval_batches(cfg, run, val_set or train_set, torch.arange(min(8, len(val_set or train_set)))))[0]

    def look(step, **scores):
        scores |= check_health(model.encode, cfg, run, train_set, val_set)
        warn_of_trouble(run, scores)
        log.write(step=step, images=step * cfg.batch_size, **scores)
        if run.main:
            height, width = show.shape[2:]
            larger = bicubic(show, [2 * height, 2 * width])  # and positions twice as dense
            small, large = model.encode(show)[1].float(), model.encode(larger)[1].float()
            clusters = model.cluster_head(small).argmax(-1).unflatten(1, model.grid)  # [n, gh, gw]
            colours = draw((model.clusters, 3), "cpu", "colours").to(run.device)[clusters].permute(0, 3, 1, 2)
            save_picture(Path(cfg.out, "features.png"), [
                denormalise(show, cfg), pca_colours(small, model.grid, (height, width)),
                F.interpolate(pca_colours(large, [2 * n for n in model.grid], (height, width)), (height, width), mode="nearest"),
                F.interpolate(colours, (height, width), mode="nearest")])

    if first == 0:
        look(0, **check_health(raw_pixels, cfg, run, train_set, val_set, "raw_"))

    # -- the loop
    stream = train_batches(cfg, run, train_set, cfg.crop_scale, first, total)
    bar = tqdm(total=total * cfg.batch_size, initial=first * cfg.batch_size, unit="img", unit_scale=True,
               disable=not run.main, smoothing=0.05, mininterval=0.2 if sys.stderr.isatty() else 30)
    clock, waited, bad = time.perf_counter(), 0.0, torch.zeros((), device=run.device)
    logged = first
    for step in range(first + 1, total + 1):
        schedule = cut_cosine(step - 1, total, warmup)
        lr, momentum = peak_lr * schedule, 1 - (1 - cfg.ema) * schedule
        for group in [*optimizer.param_groups, *cluster_optimizer.param_groups]:
            group["lr"] = lr * group["scale"]

        torch.manual_seed(seed_of("drop path", cfg.seed, step, run.rank))  # of each process and step, so that it resumes
        values = 0
        for micro in range(cfg.accum):
            began = time.perf_counter()
            images = next(stream)  # [m, C, H, W]
            waited += time.perf_counter() - began
            # drawn for the global batch, of which some rows are ours: no mask depends on the number of processes
            noise = draw((cfg.batch_size, 3 + model.num_patches), run.device, "mask", cfg.seed, step)[run.rows(cfg, micro)]
            mask = inverse_block(noise[:, :3], model.grid, model.num_visible)
            predict = torch.zeros_like(mask).scatter_(1, random_places(noise[:, 3:], mask, model.num_predict), True)
            if run.world > 1:  # gradients travel once, with the last micro-batch
                ddp.require_backward_grad_sync = micro == cfg.accum - 1
            with run.autocast():
                loss, logs = ddp(images, mask, model.num_visible, predict, model.num_predict)
            scaler.scale(loss / cfg.accum).backward()
            values = values + torch.stack([loss.detach(), *logs.values()]) / cfg.accum

        scaler.unscale_(optimizer)
        scaler.unscale_(cluster_optimizer)
        student = [*model.student.parameters(), *model.student_head.parameters()]
        grad_norm = nn.utils.clip_grad_norm_(student, cfg.clip_grad or math.inf)  # the student's alone: nothing crosses
        clusters_norm = nn.utils.get_total_norm([p.grad for p in model.cluster_head.parameters()])
        grad_norm = grad_norm + 0 * clusters_norm  # which makes it nan where that one is not finite
        scaler.step(optimizer)
        scaler.step(cluster_optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        cluster_optimizer.zero_grad(set_to_none=True)
        update_ema(model.teacher, model.student, momentum)
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
            used, entropy = (values[names.index(name)] for name in ("clusters_used", "target_entropy"))
            if used * model.clusters < 1.5:
                run.warn("collapse to one cluster", "every patch is assigned to the same one")
            if entropy > 0.99 * math.log(model.clusters):
                run.warn("all-equal assignments", f"target_entropy {entropy:.3f} is that of chance")
            run.warn_if_data_bound(waited / seconds)
            if evaluate:
                look(step)
            if save or stop:
                run.save(cfg, method="capi", config=dataclasses.asdict(cfg), step=step, model=model.state_dict(),
                         optimizer=optimizer.state_dict(), cluster_optimizer=cluster_optimizer.state_dict(),
                         scaler=scaler.state_dict(), rng=torch.get_rng_state())
            if stop:
                run.say(f"stopped by a signal after step {step}; --resume auto, the default, goes on from here")
                return 128 + (run.signal or 15)
            clock, waited, logged = time.perf_counter(), 0.0, step
    bar.close()
    log.summary(cfg)
    return 0


if __name__ == "__main__":
    main(train, Config, __doc__)
