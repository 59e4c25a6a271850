"""CAPI against the authors' numbers, slow references, and what may flow where."""

import datetime
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import capi
from capi import (CAPI, RotaryBlock, cross_entropy, cut_cosine, inverse_block, patch_coordinates, random_places,
                  register_coordinates, rename, rotary_table, rotate, rotation, sinkhorn, student_groups)
from common import BadInput, patchify, random_mask, split_ids, unpatchify, update_ema
from conftest import FIXTURES, ROOT, environment

SIZES = dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_depth=2, registers=4, clusters=12)


@pytest.fixture(scope="module", params=["capi", "capi_registers"])
def fixture(request):
    if not (FIXTURES / f"{request.param}.pt").exists():
        pytest.skip(f"needs ../shared/fixtures/{request.param}.pt, numbers from the authors' program")
    return torch.load(FIXTURES / f"{request.param}.pt", weights_only=True)


def released(fixture):
    return CAPI.from_released(fixture["state_dict"], **fixture["config"])


def losses(model, fixture):
    return model(fixture["inputs"]["images"], ~fixture["inputs"]["visible"], predict=fixture["inputs"]["predict"])


def small(**changes):
    return CAPI(**SIZES | changes)


def some_mask(images, masked=10, places=16):
    return random_mask(torch.rand(images, places, generator=torch.Generator().manual_seed(1)), masked)


def first_masked(mask, count):
    return mask & (mask.cumsum(1) <= count)


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# -- the authors' numbers -------------------------------------------------------------------------------

def test_fixture_losses_and_assignments(fixture):
    model, outputs = released(fixture), fixture["outputs"]
    loss, logs = losses(model, fixture)
    torch.testing.assert_close(logs["capi_loss"], outputs["loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(logs["clustering_loss"], outputs["clustering_loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, outputs["loss"] + outputs["clustering_loss"], rtol=1e-4, atol=0)
    close(model.cluster(outputs["teacher_patches"])[0], outputs["assignments"])


def test_fixture_features(fixture):
    model, images, outputs = released(fixture), fixture["inputs"]["images"], fixture["outputs"]
    pooled, patches = model.encode(images)
    registers = model.teacher(patchify(images, model.patch_size), patch_coordinates(model.grid, images.device)[None])[0]
    registers = registers[:, :-patches.shape[1]]
    close(registers, outputs["features_registers"])
    close(patches, outputs["features_patches"])
    close(patches, outputs["teacher_patches"])
    close(pooled, outputs["features_global"])


def test_fixture_predictor(fixture):
    model, inputs = released(fixture), fixture["inputs"]
    visible, predict = (split_ids(~inputs[name], int(inputs[name][0].sum()))[0] for name in ("visible", "predict"))
    places = patch_coordinates(model.grid, visible.device)
    take = lambda t, ids: torch.stack([row[i] for row, i in zip(t, ids)])
    context, rope = model.student(take(patchify(inputs["images"], model.patch_size), visible), places[visible])
    close(model.student.predict(places[predict], context, rope).flatten(0, 1), fixture["outputs"]["predictor_out"])


def test_fixture_gradients(fixture, monkeypatch):
    """The authors keep a table of frequencies in each block, here it is one constant. To compare those gradients too,
    each block of the student gets a copy of its own for the test."""
    model, tables, current = released(fixture), {}, []
    for stack in ("blocks", "predictor"):
        for i, block in enumerate(getattr(model.student, stack)):
            table = tables[f"student.{stack}.{i}.attn.rope.freqs"] = model.student.rotary.clone().requires_grad_()
            block.attn.register_forward_pre_hook(lambda *_, table=table: current.append(table))
    monkeypatch.setattr(capi, "rotation", lambda places, table: (places, table))  # turned later, by the block's own
    own = lambda places, table: rotation(places, current[-1] if current else table)
    monkeypatch.setattr(capi, "rotate", lambda x, rope: rotate(x, own(*rope)))
    losses(model, fixture)[0].backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None} | tables
    theirs = {rename(name): norm for name, norm in fixture["grad_norms"].items()}
    assert trained.keys() == theirs.keys()  # of the teacher's, the clusters alone
    for name, norm in theirs.items():
        torch.testing.assert_close(trained[name].grad.norm(), norm, rtol=1e-4, atol=1e-6, msg=lambda text: name + text)


# -- from_released --------------------------------------------------------------------------------------

def backbone_file(fixture, keep=lambda name: True):
    """As released: the teacher's backbone alone."""
    return {name.removeprefix("teacher."): t for name, t in fixture["state_dict"].items()
            if name.startswith("teacher.backbone.") and keep(name)}


def test_from_released_backbone_alone(fixture, capsys):
    state, images, heads = backbone_file(fixture), fixture["inputs"]["images"], fixture["config"]["heads"]
    for file in (state, {"model": state}, {f"module.{name}": t for name, t in state.items()}):
        model = CAPI.from_released(file, heads=heads, clusters=10)
        told = capsys.readouterr().out
        assert "student_head" in told and "cluster_head" in told and "predictor" not in told
        pooled, patches = model.encode(images)
        close(pooled, fixture["outputs"]["features_global"])
        close(patches, fixture["outputs"]["features_patches"])
        assert all(torch.equal(t, model.teacher.state_dict()[name]) for name, t in model.student.state_dict().items())
    assert CAPI.from_released(state, heads=heads, clusters=10).encode(torch.randn(1, 3, 42, 70))[1].shape == (1, 15, 48)


def test_from_released_encoder_alone(fixture, capsys):
    state = backbone_file(fixture, lambda name: "decoder" not in name and "mask_token" not in name)
    model = CAPI.from_released(state, heads=fixture["config"]["heads"], clusters=10)
    assert "predictor" in capsys.readouterr().out
    close(model.encode(fixture["inputs"]["images"])[1], fixture["outputs"]["features_patches"])


@pytest.mark.parametrize("heads", ["student.head", "teacher.head"])
def test_from_released_without_a_head(fixture, heads, capsys):
    state = {name: t for name, t in fixture["state_dict"].items() if not name.startswith(heads)}
    model = CAPI.from_released(state, **fixture["config"])
    assert {"student.head": "student_head", "teacher.head": "cluster_head"}[heads] in capsys.readouterr().out
    assert model.clusters == fixture["config"]["clusters"]


@pytest.mark.parametrize("name", ["backbone.registers", "backbone.mask_token", "backbone.patch_embed.weight",
                                  "backbone.encoder.blocks.0.residual1.fn.k_proj.weight",
                                  "backbone.decoder.blocks.0.residual2.norm.weight"])
def test_from_released_is_strict(fixture, name):
    full, alone, config = fixture["state_dict"], backbone_file(fixture), fixture["config"]
    for state, key in ((alone, name), (full, "teacher." + name), (full, "student." + name)):
        longer = torch.zeros([n + 1 for n in state[key].shape])
        for wrong in ({k: t for k, t in state.items() if k != key}, state | {key: longer}, state | {key + "x": longer}):
            with pytest.raises(BadInput, match="released CAPI"):
                CAPI.from_released(wrong, **config)


def test_from_released_refuses_other_files(fixture):
    freqs = "student.backbone.encoder.blocks.0.residual1.fn.rope.freqs"
    state = fixture["state_dict"]
    for table in (state[freqs] * 1.01, state[freqs][:, :-4]):
        with pytest.raises(BadInput, match="rope.freqs"):
            CAPI.from_released(state | {freqs: table}, **fixture["config"])
    with pytest.raises(BadInput, match="rope.freqs"):
        CAPI.from_released(state, **fixture["config"] | {"heads": 4})
    for wrong in ({"cls_token": torch.zeros(1, 1, 8)}, {"model": {}}, {}):
        with pytest.raises(BadInput, match="not a released CAPI"):
            CAPI.from_released(wrong)


# -- Sinkhorn -------------------------------------------------------------------------------------------

def naive_sinkhorn(logits, iterations=3):
    """METHODS.md to the letter, position by position, in float64."""
    out = torch.empty(logits.shape, dtype=torch.float64)
    for n in range(logits.shape[1]):
        x = logits[:, n].double() / 0.06
        x = (x - x.max(0).values).exp()
        for _ in range(iterations):
            x = x / (x.sum(0) + 1e-8)
            x = x / (x.sum(1, keepdim=True) + 1e-8)
        out[:, n] = x
    return out


@pytest.mark.parametrize("images, clusters", [(16, 4), (6, 9), (4, 32), (1, 5)])
def test_sinkhorn_is_the_recipe(images, clusters):
    logits = 0.3 * torch.randn(images, 5, clusters)
    result = sinkhorn(logits)
    torch.testing.assert_close(result.double(), naive_sinkhorn(logits), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.sum(-1), torch.ones(images, 5))
    torch.testing.assert_close(sinkhorn(logits + 7), result, rtol=1e-3, atol=1e-5)  # a constant changes nothing
    torch.testing.assert_close(sinkhorn(logits + torch.randn(5, 1)), result, rtol=1e-3, atol=1e-5)  # nor one a place
    alone = torch.cat([sinkhorn(logits[:, n:n + 1]) for n in range(5)], 1)
    torch.testing.assert_close(alone, result)  # position-wise


def test_sinkhorn_balances():
    logits = 0.1 * torch.randn(16, 3, 4) + torch.tensor([1.0, 0, 0, 0])  # all would be in the first
    assert (logits.argmax(-1) == 0).all()
    shares = lambda iterations: sinkhorn(logits, iterations=iterations).sum(0)
    torch.testing.assert_close(shares(500), torch.full((3, 4), 4.0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sinkhorn(logits, iterations=500).sum(-1), torch.ones(16, 3))
    assert (shares(500) - 4).abs().max() < (shares(3) - 4).abs().max() < (shares(1) - 4).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_sinkhorn_is_stable(dtype, size):
    shape = (8, 3, 16)
    some, ones = torch.randn(shape), torch.ones(shape)
    for logits in (some, some.sign(), some > 1.3, ones, -ones):
        result = sinkhorn((size * logits).to(dtype))
        assert result.dtype == torch.float32 and result.isfinite().all()
        torch.testing.assert_close(result.sum(-1), torch.ones(8, 3))
    far = torch.tensor([[[0.0, 0]], [[-1e4, -1e4]]])  # far from every cluster: without logarithms it would get no share
    torch.testing.assert_close(naive_sinkhorn(far)[1], torch.zeros(1, 2).double())
    torch.testing.assert_close(sinkhorn(far)[1].sum(-1), torch.ones(1))


RANK_1 = """
import sys
sys.path.insert(0, "tests")
from test_capi import share_of
share_of(1, sys.argv[1])
"""


def share_of(rank, folder):
    """One of two processes: half of the batch. Assignments of logits, of extreme logits, of a model; its loss."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=100))
    try:
        result = assign(slice(4 * rank, 4 * rank + 4), chunk=3 * 4 * 12)  # three positions at a time
        torch.save(result, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def assign(rows, chunk=CAPI.CHUNK):
    torch.manual_seed(0)
    logits, target, model = torch.randn(8, 5, 6)[rows], torch.randn(8, 16, 32)[rows], small()
    model.CHUNK = chunk
    assignments, loss = model.cluster(target)
    return sinkhorn(logits), sinkhorn(1e4 * logits), assignments, loss.detach()


def test_two_ranks_are_one(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", RANK_1, str(tmp_path)], cwd=ROOT, env=environment())
    share_of(0, tmp_path)
    assert other.wait(100) == 0
    *theirs, losses = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
    *whole, loss = assign(slice(0, 8))
    for mine, parts in zip(whole, theirs):
        torch.testing.assert_close(torch.cat(parts), mine, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sum(losses) / 2, loss)
    alone = torch.cat([assign(slice(0, 4))[0], assign(slice(4, 8))[0]])
    assert (alone - whole[0]).abs().max() > 1e-2  # without the other rank it would be something else


# -- the mask and what is predicted ---------------------------------------------------------------------

@pytest.mark.parametrize("grid, visible", [((2, 2), 2), ((4, 4), 6), ((4, 4), 1), ((6, 9), 19), ((16, 16), 90),
                                           ((2, 12), 9)])
def test_inverse_block_over_10000_samples(grid, visible):
    rows, columns = grid
    noise = torch.rand(10000, 3)
    masks = inverse_block(noise, grid, visible)
    assert ((~masks).sum(1) == visible).all()  # exact
    share, expected = (~masks).float().mean(0), visible / (rows * columns)
    assert (share - expected).abs().max() < 5 * (expected * (1 - expected) / 10000) ** 0.5  # everywhere equally often
    assert len({tuple(m.tolist()) for m in masks}) > rows * columns / 3
    noise[:, 1:] = 0  # not rolled: the block lies in the corner
    for mask in inverse_block(noise, grid, visible)[:300].unflatten(1, grid):
        seen = ~mask
        height, width = int(seen.any(1).sum()), int(seen.any(0).sum())
        assert seen[:height, :width].sum() == visible  # contiguous, from the corner
        assert seen[:height - 1, :width].all()  # only the end of the last row is cut off
        assert not seen[height - 1, 1:][~seen[height - 1, :-1]].any()
        assert (height - 1) * width < visible <= height * width
        low, high = (max(1, math.floor(math.sqrt(visible * a))) for a in (0.5, 2))  # rounded up
        assert min(low, rows) <= height <= max(high + 1, -(-visible // columns))
        assert 0.5 * (height - 1) <= 2 * width + 2 or height <= -(-visible // columns)


def test_inverse_block_rolls():
    at = lambda y, x: inverse_block(torch.tensor([[0.5, y, x]]), (4, 6), 6).unflatten(1, (4, 6))[0]
    for row in range(4):
        for column in range(6):
            assert torch.equal(at(row / 4 + 0.1, column / 6 + 0.1), at(0, 0).roll((row, column), (0, 1)))


def test_aspect_is_log_uniform():
    noise = torch.rand(4000, 3)
    noise[:, 1:] = 0
    heights = (~inverse_block(noise, (64, 64), 900)).unflatten(1, (64, 64)).any(2).sum(1).float()
    logs = (heights**2 / 900).log2()  # of the aspect ratio, up to rounding
    assert -1.05 < logs.min() < -0.85 and 0.9 < logs.max() < 1.1
    assert abs(logs.mean() - 0.05) < 0.05 and abs(logs.std() - 3**-0.5) < 0.03


def test_inverse_block_has_exact_counts_on_every_grid():
    """All grids from 2 x 2 to 24 x 24 and ratios from 0.1 to 0.9. The height and the width of a block are rounded up
    independently; on 20 x 11 at 0.65 an exact quotient, computed in floats, was once rounded up."""
    noise = torch.rand(16, 3)
    for rows in range(2, 25):
        for columns in range(2, 25):
            for ratio in (0.1, 0.25, 0.37, 0.42, 0.5, 0.65, 0.75, 0.9):
                visible = rows * columns - int(ratio * rows * columns)
                counts = (~inverse_block(noise, (rows, columns), visible)).sum(1)
                assert (counts == visible).all(), (rows, columns, ratio)


def test_a_mask_with_unequal_counts_is_refused():
    model, mask = small(), inverse_block(torch.rand(4, 3), (4, 4), 6)
    mask[2, mask[2].nonzero()[0]] = False
    with pytest.raises(ValueError, match="visible in every row"):
        model(torch.randn(4, 3, 16, 16), mask)


def test_predicted_places():
    mask = inverse_block(torch.rand(500, 3), (4, 4), 6)
    ids = random_places(torch.rand(500, 16), mask, 3)
    assert mask.gather(1, ids).all() and (ids.diff() > 0).all()
    counts = torch.zeros(16).scatter_add_(0, ids.flatten(), torch.ones(1500))
    assert (counts / 1500 - 1 / 16).abs().max() < 0.03


@pytest.mark.parametrize("size, p, visible, predicted", [(224, 14, 90, 8), (56, 14, 6, 1), (32, 4, 23, 2),
                                                         (8, 4, 2, 1)])
def test_counts(size, p, visible, predicted):
    model = small(img_size=size, patch_size=p, depth=1, decoder_depth=1)
    assert (model.num_visible, model.num_predict) == (visible, predicted)  # N - floor(0.65 N), floor of 5 %, at least 1
    more = small(img_size=size, patch_size=p, depth=1, predict_share=0.29).num_predict
    assert more == {224: 48, 56: 2, 32: 11, 8: 1}[size]  # 48.14, 2.9, 11.89, 0.58
    assert model(torch.randn(2, 3, size, size))[0].isfinite()


# -- rotary coordinates ---------------------------------------------------------------------------------

def test_rotary_table_by_loops():
    table = rotary_table(24)
    for i in range(24):
        frequency = 2 * math.pi * 7 * (7e-4 / 7) ** (i % 6 / 5)  # 6 of them, twice in each half
        assert table[:, i].tolist() == pytest.approx([frequency, 0] if i < 12 else [0, frequency])


def test_rotary_by_loops():
    """Every channel of the first half turns with the row, every one of the second with the column, against its partner
    in the other half. So only on the diagonal is a pair truly rotated, and a product a matter of distance."""
    table, x, (row, column) = rotary_table(8), torch.randn(8), (0.3, 0.8)
    turned = rotate(x.view(1, 1, 1, 8), rotation(torch.tensor([[[row, column]]]), table)).flatten().tolist()
    for i in range(4):
        by_row, by_column = row * table[0, i].item(), column * table[1, 4 + i].item()
        assert turned[i] == pytest.approx(x[i].item() * math.cos(by_row) - x[4 + i].item() * math.sin(by_row), abs=1e-5)
        lower = x[4 + i].item() * math.cos(by_column) + x[i].item() * math.sin(by_column)
        assert turned[4 + i] == pytest.approx(lower, abs=1e-5)

    q, k, table = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double(), rotary_table(16).double()
    at = lambda t, *place: rotate(t, rotation(torch.tensor([[place]]).double(), table))
    diagonal = lambda a, b: (at(q, a, a) * at(k, b, b)).sum().item()
    assert diagonal(0.1, 0.3) == pytest.approx(diagonal(0.6, 0.8))
    assert abs(diagonal(0.1, 0.3) - diagonal(0.1, 0.4)) > 1e-3
    assert torch.equal(at(q, 0, 0), q)


def test_rotation_is_exact_under_autocast():
    places, table = patch_coordinates((16, 16), "cpu")[None], rotary_table(64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rotation(places, table)
    assert all(torch.equal(a, b) for a, b in zip(mixed, rotation(places, table)))


def test_coordinates():
    assert patch_coordinates((2, 3), "cpu").tolist() == [[0, 0], [0, 0.5], [0, 1], [1, 0], [1, 0.5], [1, 1]]
    assert register_coordinates(4, "cpu").tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    assert register_coordinates(8, "cpu").tolist() == [[0, 0], [0.5, 0], [1, 0], [1, 0.5],
                                                       [1, 1], [0.5, 1], [0, 1], [0, 0.5]]
    sixteen = register_coordinates(16, "cpu")
    assert sixteen[:5].tolist() == [[0, 0], [0.25, 0], [0.5, 0], [0.75, 0], [1, 0]]
    assert sixteen[13].tolist() == [0, 0.75]
    assert len(sixteen) == 16 and register_coordinates(0, "cpu").shape == (0, 2)
    with pytest.raises(BadInput, match="--registers"):
        small(registers=6)


def test_registers_stand_round_the_visible_box(monkeypatch):
    model, seen = small(registers=8), []
    monkeypatch.setattr(capi, "rotation", lambda places, table: (seen.append(places), rotation(places, table))[1])
    places = torch.tensor([[[0.2, 0.1], [0.4, 0.9], [0.8, 0.3]], [[0, 0], [1, 1], [0.5, 0.5]]])
    model.student(torch.randn(2, 3, 192), places)
    box = register_coordinates(8, "cpu")
    torch.testing.assert_close(seen[0][0, :8], torch.stack([0.2 + 0.6 * box[:, 0], 0.1 + 0.8 * box[:, 1]], 1))
    torch.testing.assert_close(seen[0][1, :8], box)
    torch.testing.assert_close(seen[0][:, 8:], places)


# -- losses, and what may flow where --------------------------------------------------------------------

def test_cross_entropy_by_hand():
    logits, share = [[0.3, -0.1, 0.2], [0.0, 0.5, 0.1]], [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]
    total = 0.0
    for row, target in zip(logits, share):
        log_sum = math.log(sum(math.exp(x / 0.12) for x in row))
        total -= sum(t * (x / 0.12 - log_sum) for t, x in zip(target, row)) / 2
    assert cross_entropy(torch.tensor(logits), torch.tensor(share)).item() == pytest.approx(total, rel=1e-5)
    assert cross_entropy(torch.tensor(logits).bfloat16(), torch.tensor(share)).dtype == torch.float32


def test_heads_by_hand():
    model, x = small(), 5 * torch.randn(3, 32)
    head, unit = model.student_head, x / x.norm(dim=1, keepdim=True)
    torch.nn.init.uniform_(head.weight_g)
    weight = head.weight_g * head.weight_v / head.weight_v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(x), unit @ weight.T)
    layer = model.cluster_head.layer
    torch.nn.init.normal_(layer.bias)
    torch.testing.assert_close(model.cluster_head(x), unit @ layer.weight.T + layer.bias)
    assert not model.cluster_head(torch.zeros(1, 32)).isnan().any()


def test_loss_is_its_parts():
    model, images, mask = small(), torch.randn(4, 3, 32, 32), some_mask(4)
    for p in model.teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)  # no longer a copy
    predict = first_masked(mask, 3)
    loss, logs = model(images, mask, predict=predict)
    places, patches = patch_coordinates((4, 4), "cpu"), patchify(images, 8)
    target = model.teacher(patches, places[None])[0][:, 4:]
    assignments = sinkhorn(model.cluster_head(target))
    visible, ids = split_ids(mask, 6)[0], split_ids(~predict, 3)[0]
    context, rope = model.student(torch.stack([p[i] for p, i in zip(patches, visible)]), places[visible])
    pred = model.student_head(model.student.predict(places[ids], context, rope))
    capi_loss = cross_entropy(pred.flatten(0, 1), assignments[predict])
    clustering_loss = cross_entropy(model.cluster_head(target.detach()).flatten(0, 1), assignments.flatten(0, 1))
    torch.testing.assert_close([loss, logs["capi_loss"], logs["clustering_loss"]],
                               [capi_loss + clustering_loss, capi_loss.detach(), clustering_loss.detach()])
    entropy = -(assignments * assignments.clamp(min=1e-30).log()).sum(-1).mean()
    torch.testing.assert_close(logs["target_entropy"], entropy)
    assert logs["clusters_used"].item() == pytest.approx(len(assignments.argmax(-1).unique()) / 12)
    assert all(v.ndim == 0 and not v.requires_grad for v in logs.values())


def test_no_gradient_crosses(monkeypatch):
    model, images = small(), torch.randn(8, 3, 32, 32)

    def gradients_of(loss):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)  # the same mask
        loss().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    student = {name for name, _ in model.named_parameters() if name.startswith("student")}
    clusters = {"cluster_head.layer.weight", "cluster_head.layer.bias"}
    both = gradients_of(lambda: model(images)[0])
    whole = model.cluster
    monkeypatch.setattr(model, "cluster", lambda target: (whole(target)[0], torch.zeros(())))
    alone = gradients_of(lambda: model(images)[0])  # the CAPI loss
    assert alone.keys() == student and both.keys() == student | clusters
    monkeypatch.setattr(capi, "cross_entropy", lambda logits, assignments: 0 * logits.sum())
    monkeypatch.setattr(model, "cluster", lambda target: (whole(target)[0], cluster_loss(model, target)))
    other = gradients_of(lambda: model(images)[0])  # the clustering loss
    assert other.keys() == clusters
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (alone | other)[name])


def cluster_loss(model, target):
    logits = model.cluster_head(target)
    return cross_entropy(logits, sinkhorn(logits))


def test_places_do_not_see_each_other():
    backbone, context, places = small().student, torch.randn(2, 7, 32), torch.rand(2, 5, 2)
    rope = rotation(torch.rand(2, 7, 2), backbone.rotary)
    pred, changed = backbone.predict(places, context, rope), places.clone()
    changed[:, 1:] = torch.rand(2, 4, 2)
    again = backbone.predict(changed, context, rope)
    torch.testing.assert_close(again[:, 0], pred[:, 0])
    assert (again[:, 1:] - pred[:, 1:]).abs().amax(-1).min() > 1e-4
    torch.testing.assert_close(backbone.predict(places[:, 2:3], context, rope)[:, 0], pred[:, 2])


def test_student_sees_the_visible_and_the_teacher_everything():
    model, images, mask = small(), torch.randn(4, 3, 32, 32), some_mask(4)
    predict, patches, seen = first_masked(mask, 2), patchify(images, 8), []
    model.student_head.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    assignments = []
    model.cluster = lambda target, own=model.cluster: (assignments.append(own(target)) or assignments[-1])
    for changed in (torch.zeros_like(mask), mask, ~mask):
        model(unpatchify(patches + changed[..., None], 8, (4, 4)), mask, predict=predict)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert all(not torch.equal(assignments[0][0], a) for a, _ in assignments[1:])


def test_blocks_by_hand():
    """Cross-attention: q + attn(norm(q), context), then q + mlp(norm(q)); no norm on the context, no biases."""
    block, q, context = RotaryBlock(8, 1), torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    torch.nn.init.normal_(block.norm1.weight)
    rope_q, rope_k = (rotation(torch.rand(1, n, 2), rotary_table(8)) for n in (3, 4))
    normed = q / (q.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm1.weight
    keys = rotate(block.attn.k_proj(context)[:, None], rope_k)
    scores = rotate(block.attn.q_proj(normed)[:, None], rope_q) @ keys.mT / 8**0.5
    x = q + block.attn.proj((scores.softmax(-1) @ block.attn.v_proj(context)[:, None])[:, 0])
    torch.testing.assert_close(block(q, rope_q, context, rope_k), x + block.mlp(block.norm2(x)))
    student = small().student
    assert [name for name, _ in student.named_parameters() if name.endswith("bias")] == ["patch_embed.proj.bias"]
    assert {m.eps for m in student.modules() if isinstance(m, torch.nn.RMSNorm)} == {1e-5}
    assert student.norm.weight is None and student.blocks[0].norm1.weight is not None


# -- memory: chunks, recomputing, drop path -------------------------------------------------------------

def gradients(model, *args, **kwargs):
    model.zero_grad(set_to_none=True)
    loss, logs = model(*args, **kwargs)
    loss.backward()
    return {"loss": loss.detach()} | logs | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_chunks_and_recomputing_change_nothing(monkeypatch):
    model, images, mask = small(), torch.randn(4, 3, 32, 32), some_mask(4)
    predict = first_masked(mask, 2)
    whole = gradients(model, images, mask, predict=predict)
    for chunk in (1, 3 * 4 * 12):  # one position at a time; three, and one left over
        monkeypatch.setattr(CAPI, "CHUNK", chunk)
        torch.testing.assert_close(gradients(model, images, mask, predict=predict), whole)
    again = small(recompute=True, drop_path=0.5)
    other = small(recompute=False, drop_path=0.5)
    other.load_state_dict(again.state_dict())
    for pair in ((again, other),):
        torch.manual_seed(5)
        one = gradients(pair[0], images, mask, predict=predict)
        torch.manual_seed(5)
        torch.testing.assert_close(one, gradients(pair[1], images, mask, predict=predict))


def test_drop_path():
    block, x = RotaryBlock(8, 1, drop_path=0.25), torch.randn(8, 3, 8)
    rope, seen = rotation(torch.rand(1, 3, 2), rotary_table(8)), []
    same = RotaryBlock(8, 1)
    same.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x, rope), same(x, rope))
    block.train().mlp = torch.nn.Identity()
    block.norm2, branch = torch.nn.Identity(), lambda t: (seen.append(len(t)), t)[1]
    added = torch.stack([block.residual(x, branch) - x for _ in range(2000)]).detach()
    assert set(seen) == {6}  # 3/4 of 8: the rest is not even computed
    kept = (added != 0).flatten(2).any(-1)
    assert (kept.sum(1) == 6).all() and (kept.float().mean(0) - 0.75).abs().max() < 0.05
    torch.testing.assert_close(added[kept], (x * 8 / 6).expand(2000, -1, -1, -1)[kept])
    torch.testing.assert_close(added.mean(0), x, rtol=0.1, atol=0.01)  # the mean is kept
    assert RotaryBlock(8, 1, drop_path=0.99).residual(x, branch).isfinite().all() and seen[-1] == 1  # at least one
    student, teacher = (getattr(small(drop_path=0.2), part) for part in ("student", "teacher"))
    assert {b.drop_path for b in [*student.blocks, *student.predictor]} == {0.2}
    assert {b.drop_path for b in [*teacher.blocks, *teacher.predictor]} == {0}


def test_drop_path_keeps_an_images_rotation():
    """The rows that are kept keep their own coordinates and context."""
    block, x, context = RotaryBlock(8, 1, drop_path=0.5), torch.randn(6, 3, 8), torch.randn(6, 4, 8)
    ropes = [rotation(torch.rand(6, n, 2), rotary_table(8)) for n in (3, 4)]
    block.mlp.fc2.weight.data.zero_()
    full = block.eval()(x, ropes[0], context, ropes[1]) - x
    part = block.train()(x, ropes[0], context, ropes[1]) - x
    kept = part.flatten(1).any(1)
    assert kept.sum() == 3
    torch.testing.assert_close(part[kept], 2 * full[kept])


# -- schedules, groups, teacher -------------------------------------------------------------------------

def test_cut_cosine():
    shape = lambda step: cut_cosine(step, 1100, 100)
    assert [shape(0), shape(33), shape(99), shape(100)] == [0, pytest.approx(1 / 3), 1, 1]
    assert shape(1100) == pytest.approx(0.5 * (1 + math.cos(0.8 * math.pi)))  # cut at 0.095, not at 0
    assert shape(600) == pytest.approx(0.5 * (1 + math.cos(0.4 * math.pi)))
    assert cut_cosine(0, 10, 0) == 1
    momentum = [1 - (1 - 0.999) * shape(step) for step in (0, 100, 1100)]
    assert momentum == pytest.approx([1, 0.999, 0.9999045])  # falls in the warm-up, then rises


def test_student_groups():
    model = small()
    groups, names = student_groups(model, 0.1), {id(p): name for name, p in model.named_parameters()}
    got = {names[id(p)]: (g["scale"], pytest.approx(g["weight_decay"])) for g in groups for p in g["params"]}
    assert got.keys() == {name for name in names.values() if name.startswith("student")}
    for name, rates in got.items():
        scale, decay = 0.2 if "patch_embed" in name else 1, 0 if "bias" in name else 0.01 if ".norm" in name else 0.1
        assert rates == (scale, decay), name
    assert sum(len(g["params"]) for g in groups) == len(got)  # none twice


def test_teacher_is_a_copy_and_ema_by_hand():
    model = small()
    assert all(torch.equal(t, model.student.state_dict()[name]) for name, t in model.teacher.state_dict().items())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    for p in model.student.parameters():
        p.data += torch.randn_like(p)
    model.student.rotary += 1  # a buffer
    update_ema(model.teacher, model.student, 0.9)
    for name, p in model.student.named_parameters():
        torch.testing.assert_close(model.teacher.get_parameter(name), 0.9 * before[name] + 0.1 * p)
    assert torch.equal(model.teacher.rotary, model.student.rotary)


# -- encode, sizes, gradients ---------------------------------------------------------------------------

def test_encode_is_deterministic_and_takes_other_sizes():
    model, images = small(drop_path=0.5), torch.randn(2, 3, 32, 32)
    (pooled, patches), (again, _) = model.encode(images), model.eval().encode(images)
    assert torch.equal(pooled, again) and pooled.shape == (2, 32) and patches.shape == (2, 16, 32)
    pooled, patches = model.encode(torch.randn(2, 3, 48, 64))
    assert pooled.shape == (2, 32) and patches.shape == (2, 48, 32) and patches.isfinite().all()
    with pytest.raises(BadInput, match="48 64"):
        model.encode(torch.randn(2, 3, 45, 62))


def test_encode_is_the_teacher_and_its_first_predictor_block():
    model, images = small(), torch.randn(2, 3, 32, 32)
    pooled, patches = model.encode(images)
    places = patch_coordinates((4, 4), "cpu")[None]
    context, rope = model.teacher(patchify(images, 8), places)
    queries, turn = model.teacher.mask_token.expand(2, 16, -1), rotation(places, model.teacher.rotary)
    x = model.teacher.predictor[0](queries, turn, context, rope)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(pooled, normed.mean(1))  # normed, then averaged
    assert torch.equal(patches, context[:, 4:]) and (patches.square().mean(-1) - 1).abs().max() < 0.1
    for p in [*model.student.parameters(), *model.teacher.predictor[1].parameters(), *model.cluster_head.parameters()]:
        p.data.add_(1)
    assert torch.equal(model.encode(images)[0], pooled)


def test_mask_and_places_handed_in_or_drawn():
    model, images, mask = small(predict_share=0.3), torch.randn(4, 3, 32, 32), some_mask(4)
    predict = first_masked(mask, 3)
    assert torch.equal(model(images, mask, predict=predict)[0], model(images, mask, 6, predict, 3)[0])
    torch.manual_seed(3)
    drawn = model(images)[0]
    torch.manual_seed(3)
    mask = inverse_block(torch.rand(4, 3), (4, 4), 6)
    predict = torch.zeros(4, 16, dtype=torch.bool).scatter_(1, random_places(torch.rand(4, 16), mask, 3), True)
    assert torch.equal(drawn, model(images, mask, predict=predict)[0])
    assert not torch.equal(drawn, model(images)[0])


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.02, -0.5, 1.5])
def test_mask_ratio_that_leaves_nothing(ratio):
    with pytest.raises(BadInput, match="--mask-ratio"):
        small(mask_ratio=ratio)


def test_build_uses_the_config():
    cfg = capi.Config(model="toy", patch_size=8, img_size=(32, 48), in_chans=5, mask_ratio=0.5, predict_share=0.5,
                      clusters=20, registers=8, predictor_depth=3, drop_path=0.25, recompute=True)
    model = capi.build(cfg)
    assert (model.grid, model.num_visible, model.num_predict, model.clusters) == ((4, 6), 12, 6, 20)
    assert (len(model.student.predictor), model.student.recompute, model.student.blocks[0].drop_path) == (3, True, 0.25)
    assert model.student.registers.shape == (1, 8, 32) and model(torch.randn(4, 5, 32, 48))[0].isfinite()
    assert capi.build(capi.Config(model="toy", patch_size=8, batch_size=48)).clusters == 48  # K = B
    with pytest.raises(BadInput, match="heads"):
        small(heads=16)


def test_every_trained_parameter_gets_a_gradient():  # DDP without find_unused_parameters relies on it
    for model in (small(), small(drop_path=0.5, recompute=True)):
        model(torch.randn(8, 3, 32, 32))[0].backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
        assert all(p.grad is None for p in model.teacher.parameters())


def test_init_is_the_papers():
    model = small(dim=128, clusters=200)
    layer = model.cluster_head.layer
    bound = (3 * model.patch_size**2) ** -0.5  # of the patch projection's bias
    assert layer.weight.std().item() == pytest.approx(1, rel=0.05) and not layer.bias.any()
    assert (model.student_head.weight_g == 1).all() and model.student_head.weight_v.shape == (200, 128)
    for name, p in model.student.named_parameters():
        if name in ("registers", "mask_token"):
            assert p.std().item() == pytest.approx(0.02, rel=0.3), name
        elif p.ndim > 1:
            assert p.std().item() == pytest.approx((2 / sum(p.flatten(1).shape)) ** 0.5, rel=0.05), name
        elif name.endswith("bias"):
            assert name == "patch_embed.proj.bias" and 0.5 * bound < p.abs().max() <= bound
        else:
            assert p.eq(1).all(), name
    demo = small(dim=128, init="small").student.blocks[0].mlp.fc1.weight
    assert demo.std().item() == pytest.approx(0.02, rel=0.05)


def test_chunks_train_the_clusters_under_autocast_too(monkeypatch):
    """torch 2.6 keeps weights that were cast without gradient and uses them again where there should be one; compiled it does
    not, and what forgets them must not be in its way."""
    images, mask, gradients = torch.randn(4, 3, 32, 32), some_mask(4), []
    for chunk, compiled in ((2**27, False), (1, False), (4 * 12 * 8, True)):
        monkeypatch.setattr(CAPI, "CHUNK", chunk)
        torch.manual_seed(0)
        model = small(depth=1, decoder_depth=1)
        if compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model(images, mask, 6, first_masked(mask, 3), 3)
        loss.backward()
        gradients.append(model.cluster_head.layer.weight.grad)
    assert gradients[0].any()
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=0.05, atol=0.02 * gradients[0].abs().max().item())


def test_only_masked_places_are_predicted(monkeypatch):
    """Also of a mask handed in that hides fewer patches than the model would."""
    model, seen = CAPI(img_size=32, patch_size=4, dim=16, depth=1, heads=1, decoder_depth=1, registers=4, clusters=8,
                       predict_share=1.0), []
    monkeypatch.setattr(capi, "random_places", lambda *args: seen.append(random_places(*args)) or seen[-1])
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[:, 5:15] = True
    model(torch.randn(2, 3, 32, 32), mask)
    assert [row.tolist() for row in seen[0]] == [list(range(5, 15))] * 2
