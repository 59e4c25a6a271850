r"""Cluster and Predict Latent Patches for Improved Masked Image Modeling
(Darcet et al., arXiv 2502.08769).

A teacher, the slow moving average of the student, sees the whole image. Its patch features are
assigned to clusters, and for every masked patch the student has to say which cluster the teacher's
feature is in. The clusters are learned online. Left alone, all clusters would collapse into one, so
the assignments are balanced (Sinkhorn-Knopp).

  images [B, C, H, W]
    1. one block of 35 % of the patches stays visible, the rest is masked      inverse_block
    2. teacher: all patches -> features [B, N, D] -> cluster logits [B, N, K]  teacher, cluster_head
    3. logits -> assignments [B, N, K], balanced at each position              sinkhorn
    4. clustering loss: cross-entropy of (logits / 0.12) and assignments; trains only the clusters
    5. student: registers + visible patches -> context [B, R + V, D]           student
    6. a mask token per predicted place attends to the context -> [B, Q, D]    student.predict
    7. CAPI loss: cross-entropy of (its logits / 0.12) and assignments; trains only the student
  loss = CAPI loss + clustering loss
  Positions are rotary, from (row, column) in 0..1, in every attention. Evaluation uses the teacher
  (`encode`): an image's feature is the mean output of its first predictor block.
  Letters: B images, N patches of P = p * p * C numbers, V visible, Q predicted,
  K clusters, R registers; width D.

  python capi.py                                                 the demo
  python capi.py --data DIR --img-size 96 --out runs/mine-capi   any folder of images
  torchrun --nproc_per_node 8 --nnodes 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 capi.py \
      --out runs/capi-large --data DIR --img-size 224 --patch-size 14 --model large \
      --batch-size 16384 --epochs 6394 --warmup-epochs 639 --base-lr 1.5625e-5 \
      --predictor-depth 12 --registers 16 --clusters 16384 --predict-share 0.05 \
      --weight-decay 0.1 --ema 0.999 --drop-path 0.2 --init xavier --clip-grad 0 --save-every 50
  The last command is the paper's ViT-L/14 (500,000 steps as epochs of ImageNet-1k), which we have
  not run. It saves rarely, because a checkpoint takes 7.7 GB. For a smaller budget: --epochs 500
  --warmup-epochs 50, and --predict-share 0.2 after the author's later advice that 5 % was too low.

Why position by position: patches in the middle of photographs differ from those at the rim.
Clusters that are balanced over all positions together could tell positions apart, not content. The
cost: each position has B samples for the K clusters, so B should be about K (16384 each in the
paper, over all ranks). `--accum A` divides this B by A.

Two temperatures: 0.06 makes the assignments, 0.12 the predictions. The sharper target pulls the
predictions towards deciding. With one temperature a uniform prediction would be its own target.

Differs from the authors' program:
- All masked patches are predicted unless --predict-share says otherwise; the paper's share is 0.05.
  At least one is predicted; theirs predicts none on a 4 x 4 grid.
- Residuals, rotary angles and Sinkhorn-Knopp are float32; theirs are bf16 like everything else. In
  a bf16 run the assignments are then rounded to bf16.
- The peak learning rate is `--base-lr` times batch / 256; theirs is 1e-3 for any batch.
- The first Sinkhorn iteration is in log space, so that no row underflows; the loss changes by less
  than 1e-5 of itself (docs/differences.py).
- The rows of the student head are divided by their length without the 1e-8 that theirs adds.
- The demo initialises weights with standard deviation 0.02; theirs are Xavier uniform
  (`--init xavier`).
- The student's gradient is clipped to norm 1; `--clip-grad 0` disables this, as in the paper.
- JPEGs at least twice as large as needed are decoded at 1/2, 1/4 or 1/8 of their size.
- A run has epochs; theirs counts steps.
tests/test_trajectories.py repeats 24 recorded steps of their program: losses agree within 1e-5.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from common import (BadInput, Checkpoint, Look, Meter, Mlp, PatchEmbed, Plan, TrainConfig,
                    arguments, attend, bicubic, check_visible, clip_gradients, draw, flag, gather,
                    load_data, load_released, main, patch_grid, patchify, pca_colours, seed_of,
                    split_ids, spread, start, train_batches, update_ema, xavier_init)


# ---- Config: own flags and changed defaults. The defaults are the demo's.

@dataclass(frozen=True)
class Config(TrainConfig):
    mask_ratio: float = flag(0.65, "share of the patches that are masked", 0, 1)
    predict_share: float = flag(1.0, "share of the masked patches to predict; the paper's is 0.05",
                                0, 1)
    clusters: int = flag(0, "clusters; 0: the batch size, at most the paper's 16384", 0)
    registers: int = flag(4, "register tokens, a multiple of 4; the paper's is 16", 0)
    predictor_depth: int = flag(2, "blocks of the predictor; the paper's is 12", 1)
    drop_path: float = flag(0.0, "share of the images that skip a branch; the paper's is 0.2", 0,
                            0.9)
    init: str = flag("small", "initialisation: xavier, the authors'; small (deviation 0.02) "
                     "learns more in the demo", choices=["xavier", "small"])
    ema: float = flag(0.97, "lowest momentum of the teacher, at the end of the warm-up; the "
                      "paper's is 0.999", 0, 1)
    cluster_lr: float = flag(0.5, "the clusters' learning rate as a multiple of the student's", 0,
                             1e6)
    recompute: bool = flag(False, "recompute the encoder's activations: less memory, more time")
    crop_scale: tuple[float, ...] = (0.6, 1.0)
    patch_size: int = flag(8, "side of a patch", 1)
    epochs: int = 14
    base_lr: float = 3e-3  # per 256 images; the paper's 1.5625e-5 is 1e-3 at batch 16384, for ViT-L
    out: str = "runs/capi"
    # As in common.py: 1 epoch of warm-up, weight decay 0.05, betas 0.9, 0.95.


# ---- What the paper adds: the mask, coordinates, balanced assignments, their loss

def inverse_block(noise, grid, num_visible):
    """noise [B, 3], uniform -> is_masked [B, N]. One block of the grid stays visible; then the mask
    is rolled around both axes by a random shift."""
    rows, columns = grid
    # The block's aspect ratio (height / width) is log-uniform in [1/2, 2], as far as it fits.
    flattest = num_visible / columns**2
    tallest = rows**2 / (num_visible + 1e-5)
    low = math.log(min(max(1 / 2, flattest), tallest))
    high = math.log(max(min(2, tallest), flattest))
    aspect = torch.exp(low + (high - low) * noise[:, 0])  # [B]
    # Both sides are rounded up, independently. The integer clamps keep the block inside the grid
    # and at least num_visible places large, however the square roots are rounded.
    height = (num_visible * aspect).sqrt().ceil().long()
    height = height.clamp(math.ceil(num_visible / columns), rows)
    width = (num_visible / aspect).sqrt().ceil().long()
    width = width.maximum((num_visible + height - 1) // height).clamp(max=columns)[:, None]
    # Row and column of every patch, counted from the block's corner after the roll [B, N].
    ids = torch.arange(rows * columns, device=noise.device)
    row = (ids // columns - (noise[:, 1:2] * rows).long()) % rows
    column = (ids % columns - (noise[:, 2:3] * columns).long()) % columns
    # Only the first num_visible places of the block stay visible, row by row.
    return ~((column < width) & (row * width + column < num_visible))


def random_places(noise, is_masked, count):
    """noise [B, N], uniform -> ids [B, count] of masked patches, at random, ascending."""
    noise = noise.masked_fill(~is_masked, 2)  # visible patches come last
    return noise.argsort(1)[:, :count].sort(1).values


def patch_coordinates(grid, device):
    """(row, column) of each patch, 0..1 from the first to the last: [1, N, 2]."""
    rows, columns = (torch.linspace(0, 1, n, device=device) for n in grid)
    return torch.cartesian_prod(rows, columns)[None]


def register_coordinates(count, device):
    """(row, column) of the registers along the border of the unit square [R, 2]."""
    c = torch.arange(count // 4, device=device) / max(1, count // 4)
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    sides = [(c, zero), (one, c), (1 - c, one), (zero, 1 - c)]
    return torch.cat([torch.stack(side, 1) for side in sides])


def rotary_table(head_dim):
    """Angular frequencies [2, d] for row and column: d/4 values fall geometrically from 7 to 7e-4
    periods per image. The first half of the channels turns with the row, the second with the
    column. Each half has the d/4 values twice."""
    n = head_dim // 4
    frequencies = 2 * math.pi * 7 * 1e-4 ** (torch.arange(n, dtype=torch.float64) / max(1, n - 1))
    twice = frequencies.repeat(2)
    zero = torch.zeros_like(twice)
    return torch.stack([torch.cat([twice, zero]), torch.cat([zero, twice])]).float()


def rotation(coordinates, table):
    """[B or 1, T, 2] -> cosine and sine [B or 1, 2, 1, T, d] of each channel's angle; the sine is
    negative in the first half. A matrix product would be rounded to bf16 by autocast."""
    angle = (coordinates[..., :1] * table[0] + coordinates[..., 1:] * table[1])[:, None]
    low, high = angle.sin().chunk(2, -1)
    return torch.stack([angle.cos(), torch.cat([-low, high], -1)], 1)


def rotate(x, rope):
    """x cos + rotate_half(x) sin over the whole head: x [..., B, heads, T, d], rope [B or 1, 2, 1,
    T, d]. A channel's partner is half a head away, so it turns with the other coordinate. This is
    not a true rotation; it is what the authors' program does."""
    cos, sin = rope.to(x.dtype).unbind(1)
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([b, a], -1), sin)


def all_reduce(x, op):  # in place
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


@torch.no_grad()
def sinkhorn(logits, temperature=0.06, iterations=3, eps=1e-8):
    """Balanced assignments [B, N, K], separately at each position. Alternately normalise over the
    samples of ALL ranks, so that clusters are used equally, and over the clusters."""
    x = logits.float() / temperature
    top = all_reduce(x.amax(0), dist.ReduceOp.MAX)  # [N, K]
    # The first iteration is in log space: a sample far from every cluster would underflow to zero.
    x = x - top - all_reduce((x - top).exp().sum(0), dist.ReduceOp.SUM).log()
    x = x.softmax(-1)
    for _ in range(iterations - 1):
        x /= all_reduce(x.sum(0), dist.ReduceOp.SUM) + eps
        x /= x.sum(-1, keepdim=True) + eps
    return x


def cross_entropy(logits, assignments, temperature=0.12):
    """logits, assignments [..., K] -> scalar, the mean over samples, in float32."""
    return -(assignments * (logits.float() / temperature).log_softmax(-1)).sum(-1).mean()


# ---- Model. The blocks' RMSNorms (eps 1e-5) have a gain, the final one has none. Blocks have no
# biases.

class RotaryAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads or dim // heads % 4:
            raise BadInput(f"heads of width {dim} / {heads}: it must be a multiple of 4")
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def project(self, x, *layers):  # -> [layers, B, heads, T, d]; one product is faster
        x = F.linear(x, torch.cat([layer.weight for layer in layers]))
        return x.unflatten(-1, (len(layers), self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, rope, context=None, context_rope=None):
        """Self-attention of x [B, Q, D], or cross-attention to a context [B, T, D]."""
        if context is None:
            qkv = self.project(x, self.q_proj, self.k_proj, self.v_proj)
            q, k = rotate(qkv[:2], rope)
            v = qkv[2]
        else:
            q = rotate(self.project(x, self.q_proj)[0], rope)
            k, v = self.project(context, self.k_proj, self.v_proj)
            k = rotate(k, context_rope)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class RotaryBlock(nn.Module):
    """With a context it is a block of the predictor: queries attend to the context, never to each
    other. Drop path skips a branch for some images, which saves their compute."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-5)
        self.attn = RotaryAttention(dim, heads)
        self.norm2 = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, 4 * dim, bias=False)
        self.drop_path = drop_path

    def forward(self, x, rope, context=None, context_rope=None):  # [B, T, D]
        def attention(x, *inputs):
            return self.attn(self.norm1(x), *inputs)
        inputs = [rope] if context is None else [rope, context, context_rope]
        x = self.add_branch(x, attention, *inputs)
        return self.add_branch(x, lambda x: self.mlp(self.norm2(x)))

    def add_branch(self, x, branch, *inputs):
        if not self.training or self.drop_path == 0:
            return x + branch(x, *inputs)
        kept = max(1, int(len(x) * (1 - self.drop_path)))
        ids = torch.rand(len(x), device=x.device).argsort()[:kept]
        # An input with a first dimension of 1 is the same for all images.
        inputs = [t if len(t) == 1 else t.index_select(0, ids) for t in inputs]
        out = branch(x.index_select(0, ids), *inputs)
        return x.index_add(0, ids, out.to(x.dtype), alpha=len(x) / kept)  # keeps the mean


class Backbone(nn.Module):
    """Encoder and predictor. The student is one, the teacher is its moving average."""

    def __init__(self, patch_size, in_chans, dim, depth, heads, predictor_depth, registers, init,
                 drop_path=0.0, recompute=False):
        super().__init__()
        if registers % 4:
            raise BadInput(f"--registers {registers} is not a multiple of 4")
        self.recompute = recompute
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.registers = nn.Parameter(torch.zeros(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList([RotaryBlock(dim, heads, drop_path) for _ in range(depth)])
        blocks = [RotaryBlock(dim, heads, drop_path) for _ in range(predictor_depth)]
        self.predictor = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(dim, eps=1e-5, elementwise_affine=False)  # of encoder and predictor
        self.register_buffer("rotary", rotary_table(dim // heads), persistent=False)
        if init == "xavier":
            xavier_init(self)
        for name, p in self.named_parameters():
            if name in ("registers", "mask_token") or (init == "small" and p.ndim > 1):
                nn.init.trunc_normal_(p, std=0.02)

    def forward(self, patches, coordinates):
        """patches [B, T, P], coordinates [B or 1, T, 2] -> context [B, R + T, D] after the final
        norm, and its rotation. Registers lie on the border of the patches' bounding box."""
        low, high = coordinates.amin(1, keepdim=True), coordinates.amax(1, keepdim=True)
        border = low + (high - low) * register_coordinates(self.registers.shape[1], patches.device)
        rope = rotation(torch.cat([border, coordinates], 1), self.rotary)
        x = torch.cat([self.registers.expand(len(patches), -1, -1), self.patch_embed(patches)], 1)
        for block in self.blocks:
            if self.recompute and self.training:
                x = recomputed(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return self.norm(x), rope

    def predict(self, coordinates, context, context_rope, depth=None):
        """A mask token at each place [B or 1, Q, 2] attends to the context -> [B, Q, D] after the
        final norm."""
        rope = rotation(coordinates, self.rotary)
        x = self.mask_token.expand(len(context), coordinates.shape[1], -1)
        for block in self.predictor[:depth]:
            x = block(x, rope, context, context_rope)
        return self.norm(x)


class StudentHead(nn.Module):
    """L2-normalisation (eps 1e-12), then a weight-normalised Linear: directions and lengths of its
    rows are trained."""

    def __init__(self, dim, clusters):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(clusters, dim))
        self.weight_g = nn.Parameter(torch.ones(clusters, 1))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), self.weight_g * F.normalize(self.weight_v, dim=1))


class ClusterHead(nn.Module):
    """The clusters, on top of the teacher. Only the clustering loss trains them."""

    def __init__(self, dim, clusters):
        super().__init__()
        self.layer = nn.Linear(dim, clusters)
        nn.init.normal_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.layer(F.normalize(x, dim=-1, eps=1e-7))


class CAPI(nn.Module):
    encoder_name = "teacher"  # for evaluate.py: the submodule with the blocks
    pool = "mean"  # for evaluate.py --layer; the paper's feature comes from `encode`
    CHUNK = 2**27  # most cluster logits in memory at once: 0.5 GB in float32

    def __init__(self, img_size=224, patch_size=14, in_chans=3, dim=1024, depth=24, heads=16,
                 decoder_depth=12, registers=16, clusters=16384, mask_ratio=0.65,
                 predict_share=0.05, drop_path=0.0, recompute=False, init="xavier"):
        super().__init__()
        self.grid = patch_grid(img_size, patch_size)
        self.patch_size = patch_size  # p
        self.clusters = clusters  # K
        self.num_patches = self.grid[0] * self.grid[1]  # N
        num_masked = int(mask_ratio * self.num_patches)  # M, rounded down
        self.num_visible = self.num_patches - num_masked  # V
        self.num_predict = max(1, int(predict_share * num_masked))  # Q, rounded down
        check_visible(f"--mask-ratio {mask_ratio}", self.num_visible, self.num_patches)
        self.student = Backbone(patch_size, in_chans, dim, depth, heads, decoder_depth, registers,
                                init, drop_path, recompute)
        self.student_head = StudentHead(dim, clusters)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.recompute = False
        for block in [*self.teacher.blocks, *self.teacher.predictor]:
            block.drop_path = 0.0
        self.cluster_head = ClusterHead(dim, clusters)

    def draw_mask(self, noise):  # uniform [B, 3 + N] -> is_masked [B, N], is_predicted [B, N]
        is_masked = inverse_block(noise[:, :3], self.grid, self.num_visible)
        ids = random_places(noise[:, 3:], is_masked, self.num_predict)
        return is_masked, torch.zeros_like(is_masked).scatter_(1, ids, True)

    def forward(self, images, is_masked=None, is_predicted=None, num_visible=None,
                num_predict=None):
        """images [B, C, H, W], normalised per channel by the data set's mean and standard
        deviation; is_masked [B, N] and is_predicted [B, N], a subset of it, are drawn if is_masked
        is None; num_visible, num_predict: how many patches in a row of each, by default the model's
        -> loss, logs. Does not move the teacher: call `update_teacher`."""
        if is_masked is None:
            noise = torch.rand(len(images), 3 + self.num_patches, device=images.device)
            is_masked, is_predicted = self.draw_mask(noise)
        ids_visible, _ = split_ids(is_masked, num_visible or self.num_visible)
        # The "visible" ones of this mask are those to predict.
        ids_predicted, _ = split_ids(~is_predicted, num_predict or self.num_predict)
        patches = patchify(images, self.patch_size)  # [B, N, P]
        places = patch_coordinates(self.grid, images.device)  # [1, N, 2]

        with torch.no_grad():
            features, _ = self.teacher(patches, places)
            features = features[:, -self.num_patches:]  # [B, N, D], without registers
        assignments, clustering_loss, entropy, used = self.cluster(features)  # [B, N, K]
        context, rope = self.student(gather(patches, ids_visible), gather(places, ids_visible))
        pred = self.student.predict(gather(places, ids_predicted), context, rope)  # [B, Q, D]
        capi_loss = cross_entropy(self.student_head(pred), gather(assignments, ids_predicted))
        logs = {"capi_loss": capi_loss, "clustering_loss": clustering_loss,
                "target_entropy": entropy, "clusters_used": used, "pred_std": spread(pred),
                "target_std": spread(features)}
        return capi_loss + clustering_loss, logs

    def cluster(self, features):
        """Teacher features [B, N, D] -> assignments [B, N, K], the clustering loss, the
        assignments' mean entropy and the share of clusters that are some patch's first choice.
        Positions come in chunks, whose logits are computed again in the backward pass."""
        def loss_of(x, assignments):
            return cross_entropy(self.cluster_head(x), assignments) * x.shape[1]  # over positions
        B, N, _ = features.shape
        size = max(1, self.CHUNK // (B * self.clusters))
        parts = []
        loss = entropy = 0.0
        used = torch.zeros(self.clusters, device=features.device)
        for x in features.split(size, 1):
            logits = self.cluster_head(x)  # [B, n, K]
            part = sinkhorn(logits)
            entropy = entropy + torch.special.entr(part).sum() / (B * N)
            used.scatter_(0, part.argmax(-1).flatten(), 1)
            parts.append(part.to(logits.dtype))
            if size >= N:
                loss = cross_entropy(logits, parts[0]) * N
            else:
                del logits, part  # only the assignments stay
                loss = loss + recomputed(loss_of, x, parts[-1], use_reentrant=False)
        return torch.cat(parts, 1), loss / N, entropy, used.mean()

    def update_teacher(self, momentum):  # <- momentum * teacher + (1 - momentum) * student
        update_ema(self.teacher, self.student, momentum)

    def encode(self, images):
        """images, normalised as for `forward`, of any size that p divides -> pooled [B, D], the
        paper's feature: the mean of the normed outputs of the FIRST predictor block, with a mask
        token at every place; patches [B, N, D], the teacher's after its final norm. No patch is
        masked."""
        places = patch_coordinates(patch_grid(images.shape[2:], self.patch_size), images.device)
        context, rope = self.teacher(patchify(images, self.patch_size), places)
        pooled = self.teacher.predict(places, context, rope, depth=1).mean(1)
        return pooled, context[:, -places.shape[1]:]

    def pictures(self, images, to_rgb):
        size = tuple(images.shape[2:])
        larger = self.encode(bicubic(images, [2 * side for side in size]))[1]
        ids = self.cluster_head(self.encode(images)[1]).argmax(-1)  # [n, N]
        colours = draw((self.clusters, 3), "cpu", "colours")[ids.cpu()]  # one per cluster
        colours = colours.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return {"features.png": {  # columns beside the input and the PCA of the patches
            "PCA at 2 x size": pca_colours(larger, [2 * n for n in self.grid], size),
            "clusters": F.interpolate(colours, size)}}

    @classmethod
    def from_released(cls, state_dict, **sizes):
        """A model with the authors' weights: student and teacher, or the one backbone that was
        released, which becomes both. `sizes` go to the constructor (default: ViT-L/14)."""
        model = cls(**sizes)
        state = {}
        for name, t in state_dict.get("model", state_dict).items():
            name = name.removeprefix("module.")
            if name.startswith(("backbone.", "head.")):
                name = "teacher." + name
            for theirs, ours in RENAMED:
                name = name.replace(theirs, ours)
            if name.endswith("rope.freqs"):  # a fixed table, perhaps in bf16: use theirs
                own = model.teacher.rotary
                if t.shape != own.shape or not torch.allclose(t.float(), own, rtol=5e-3):
                    raise BadInput(f"not a released CAPI of these sizes: {name} differs")
                own.copy_(t)
                model.student.rotary.copy_(t)
                continue
            state[name] = t
        if not any(name.startswith("student.") for name in state):
            state |= {name.replace("teacher.", "student."): t for name, t in state.items()
                      if name.startswith("teacher.")}
        optional = ["student.mask_token", "student.predictor.", "teacher.mask_token",
                    "teacher.predictor.", "student_head.", "cluster_head."]
        return load_released(model, state, optional)


Model = CAPI
RENAMED = [  # from the authors' parameter names to ours
    ("student.head.last_layer.", "student_head."), ("teacher.head.last_layer.", "student_head."),
    ("teacher.head.", "cluster_head."), ("backbone.", ""), ("encoder.blocks.", "blocks."),
    ("decoder.blocks.", "predictor."), ("residual1.norm.", "norm1."), ("residual2.norm.", "norm2."),
    ("residual1.fn.", "attn."), ("residual2.fn.", "mlp."), ("patch_embed.", "patch_embed.proj."),
]


# ---- Training

def build(cfg):
    clusters = cfg.clusters or min(16384, cfg.batch_size)
    own = dict(clusters=clusters, decoder_depth=cfg.predictor_depth)
    return CAPI(**arguments(CAPI, cfg) | own)


def student_groups(model, weight_decay):
    """The patch projection has a fifth of the learning rate. Norm gains have a tenth of the weight
    decay, biases none; registers, mask token and head have all of it."""
    groups = []
    for part in (model.student, model.student_head):
        for name, p in part.named_parameters():
            scale = 0.2 if name.startswith("patch_embed.") else 1.0
            decay = 0.1 if "norm" in name else 1.0
            decay = 0.0 if name.endswith("bias") else decay
            groups.append({"params": [p], "scale": scale, "weight_decay": decay * weight_decay})
    return groups


def cut_cosine(step, total, warmup):
    """The factor of learning rates and momentum; `step` counts from 0. It rises from 0 to 1 at the
    last warm-up step, then follows a cosine that stops at 80 % of its half-period, at 0.095."""
    if step < warmup - 1:
        return step / (warmup - 1)
    done = max(0, step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(0.8 * math.pi * done))


def train(cfg):
    cfg, run = start(cfg, "capi")  # checks flags, joins processes, picks device and dtype
    torch.manual_seed(cfg.seed)
    model = build(cfg).to(run.device)
    train_set, val_set = load_data(cfg, run)
    plan = Plan(cfg, len(train_set))
    groups = student_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=cfg.betas, fused=True)
    groups = [{"params": list(model.cluster_head.parameters()), "scale": cfg.cluster_lr}]
    cluster_optimizer = torch.optim.AdamW(groups, betas=cfg.betas, weight_decay=0.01,  # the paper's
                                          fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)
    checkpoint = Checkpoint(cfg, run, plan, model=model, optimizer=optimizer,
                            cluster_optimizer=cluster_optimizer, scaler=scaler)
    done = checkpoint.resume()  # steps, the same number on every rank
    ddp = run.wrap(model, plan.total)  # compiles; adds DDP if there are several processes
    meter = Meter(cfg, run, done, plan, scaler)
    look = Look(cfg, run, model, train_set, val_set)  # k-NN, effective rank, pictures
    if plan.evaluates_at(done):  # at the start; or again, as the process may have died in it
        meter.write_look(done, look(done))

    stream = train_batches(cfg, run, train_set, done, plan.total)
    for step in run.steps(done, plan.total):  # on a signal, the step is finished and saved
        factor = cut_cosine(step - 1, plan.total, plan.warmup)
        lr = plan.peak_lr * factor
        momentum = 1 - (1 - cfg.ema) * factor  # from 1 to cfg.ema in the warm-up, then towards 1
        for group in [*optimizer.param_groups, *cluster_optimizer.param_groups]:
            group["lr"] = lr * group["scale"]
        torch.manual_seed(seed_of("drop path", cfg.seed, step, run.rank))  # resumes exactly
        # Noise for the global batch: masks do not depend on the number of processes.
        shape = cfg.batch_size, 3 + model.num_patches
        noise = draw(shape, run.device, "mask", cfg.seed, step)

        for micro in range(cfg.accum):
            with meter.waiting_for_data():
                images = next(stream)  # [m, C, H, W]
            is_masked, is_predicted = model.draw_mask(noise[run.rows(micro)])
            ddp.require_backward_grad_sync = micro == cfg.accum - 1  # one all-reduce per step
            with run.autocast():
                loss, logs = ddp(images, is_masked, is_predicted)
            scaler.scale(loss / cfg.accum).backward()
            meter.add(loss=loss, **logs)

        scaler.unscale_(optimizer)
        scaler.unscale_(cluster_optimizer)
        student = [*model.student.parameters(), *model.student_head.parameters()]
        grad_norm = clip_gradients(student, cfg.clip_grad)
        cluster_grad_norm = clip_gradients(model.cluster_head.parameters(), 0)  # only measured
        scaler.step(optimizer)
        scaler.step(cluster_optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        cluster_optimizer.zero_grad(set_to_none=True)
        model.update_teacher(momentum)
        meter.step_done(grad_norm=grad_norm, cluster_grad_norm=cluster_grad_norm)

        if plan.reports_at(step) or run.asked_to_stop:
            report = meter.report(step, lr=lr, momentum=momentum)  # the only synchronisation
            if not report.finite:
                return run.stop_not_finite(report)  # keeps the last good checkpoint
            if report["clusters_used"] * model.clusters < 1.5:
                run.warn("collapse to one cluster", "all patches are assigned to the same cluster")
            if report["target_entropy"] > 0.99 * math.log(model.clusters):
                run.warn("equal assignments", "every patch is assigned to all clusters alike")
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
