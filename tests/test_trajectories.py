"""Each method's own `train` repeats 24 recorded steps of the authors' program.

tests/fixtures/README.md describes the recordings. `play` runs `train` as it is, on the CPU in
float32. The recorded inputs enter where a run gets its own: the initial weights through `build`,
the images through `train_batches`, the masks and patch offsets through `draw`. With the dVAE target
the tokens and the drop path factors are recorded too. Everything else is the method's own work:
losses, gradients, learning rate, weight decay, clipping, teacher, log and checkpoint.
"""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
from conftest import MODULES, load_fixture, records

# Recorded run: the module whose `train` repeats it.
RUNS = {name: MODULES[name] for name in ("mae", "latent_mim", "pilamim", "capi")}
RUNS |= dict.fromkeys(("semantic_mim_hog", "semantic_mim_dvae"), MODULES["semantic_mim"])
TEACHERS = {  # these teachers start as a copy of the student: its prefix, then the teacher's
    "latent_mim": ("encoder.", "target_encoder."),
    "capi": ("student.backbone.", "teacher.backbone."),
}
RECIPE_FLAGS = ["batch_size", "accum", "epochs", "warmup_epochs", "base_lr", "weight_decay", "ema",
                "sim_target", "cluster_lr"]


# -- what a file holds, in the form that our program takes

def initial_weights(name, recorded):
    """The weights before the first step, under the authors' names, teacher included."""
    weights = dict(recorded["initial"])
    if name in TEACHERS:
        student, teacher = TEACHERS[name]
        for key, tensor in recorded["initial"].items():
            if key.startswith(student):
                weights[key.replace(student, teacher, 1)] = tensor
    return weights


def initial_model(name, recorded):
    return RUNS[name].Model.from_released(initial_weights(name, recorded), **recorded["config"])


def pool_images(recorded):
    """The pool of pictures, normalised: float32 [16, C, H, W]."""
    mean = torch.tensor(recorded["normalise"]["mean"]).view(-1, 1, 1)
    std = torch.tensor(recorded["normalise"]["std"]).view(-1, 1, 1)
    return (recorded["pool"].float() / 255 - mean) / std


def flags_of(name, recorded, out, **changes):
    """The Config of the recorded run. The data set `shapes:16` is as large as the pool, so that an
    epoch has as many steps. Its pictures are only used by the k-NN test."""
    Config = RUNS[name].Config
    config, recipe = recorded["config"], recorded["recipe"]
    keys = [key for key in RECIPE_FLAGS if key in recipe]
    if "semantic" not in name:  # which has these values, and last_lr, in its own table
        keys += ["betas", "clip_grad"]
    flags = config | {key: recipe[key] for key in keys}
    flags |= dict(img_size=(config["img_size"],), jitter=0.0)
    flags |= dict(predictor_depth=config.get("decoder_depth"))  # CAPI's name for it
    flags |= dict(visible_share=config.get("num_visible", 0) / 16)
    flags |= dict(model="recorded", data="shapes:16", out=str(out), amp="off", compile="off",
                  device="cpu", workers=0, log_every=1, eval_every=0, save_every=100)
    flags |= changes
    known = {field.name for field in dataclasses.fields(Config)}
    values = {key: tuple(value) if isinstance(value, list) else value
              for key, value in flags.items() if key in known}
    return dataclasses.replace(common.parse_args(Config, argv=[]), **values)


def capi_noise(recorded, step, model):
    """Numbers [B, 3 + N] that give the recorded masks and predicted places. A mask depends on three
    numbers: try every shape of the block at every place, and take one that gives the mask."""
    rows, columns = model.grid
    tried = torch.cartesian_prod(torch.linspace(0.01, 0.99, 50),
                                 (torch.arange(rows) + 0.5) / rows,
                                 (torch.arange(columns) + 0.5) / columns)
    masks = MODULES["capi"].inverse_block(tried, model.grid, model.num_visible)  # [tried, N]
    equal = (masks == recorded["mask"][step][:, None]).all(2)  # [B, tried]
    assert equal.any(1).all(), "inverse_block cannot draw a mask that the authors' program drew"
    block = tried[equal.byte().argmax(1)]  # [B, 3]
    places = torch.ones(len(block), model.num_patches).scatter(1, recorded["predict"][step], 0)
    return torch.cat([block, places], 1)


class RecordedDropPath(nn.Module):
    def __init__(self, run, factors):
        super().__init__()
        self.run, self.factors = run, factors  # factors [steps, B]

    def forward(self, x):
        return x * self.factors[self.run.step].view(-1, 1, 1) if self.training else x


def put_drop_path(run, recorded):
    """The authors' program drops the MLP branch twice. Ours gets the product of both factors."""
    for name, factors in recorded.get("drop_factors", {}).items():
        block = run.model.get_submodule(name)
        assert block.drop_path1.rate == pytest.approx(factors["rate"]), name
        assert block.drop_path2.rate == pytest.approx(factors["rate"]), name
        block.drop_path1 = RecordedDropPath(run, factors["attn"])
        block.drop_path2 = RecordedDropPath(run, factors["mlp"] * factors["mlp_inner"])


class RecordedTokenizer:
    def __init__(self, run, recorded):
        self.run, self.recorded = run, recorded
        self.vocab = recorded["config"]["vocab"]

    def __call__(self, images, grid):
        return self.recorded["tokens"][self.recorded["order"][self.run.step]]


# -- one run of `train`

def play(name, monkeypatch, out, **changes):
    """Run `train` on the recorded inputs. `changes` are flags that differ from the recorded run.
    Returns the recording, and what our run computed."""
    module, recorded = RUNS[name], load_fixture(name)
    own_build, own_draw, config = module.build, module.draw, recorded["config"]
    own_update = getattr(module, "update_ema", None)
    run = SimpleNamespace(step=-1, loss=[], parts=[], rates={}, momentum=[], groups={})

    def build(*args):
        run.model = own_build(*args)
        run.model.load_state_dict(initial_model(name, recorded).state_dict())
        run.model.register_forward_hook(note_losses)
        put_drop_path(run, recorded)
        return run.model

    def train_batches(*args, **options):
        images = pool_images(recorded)
        for step, ids in enumerate(recorded["order"]):
            run.step = step
            yield images[ids]

    def draw(shape, device, purpose, *place):
        if purpose not in ("mask", "offsets"):
            return own_draw(shape, device, purpose, *place)
        step = place[-1] - 1  # `train` counts from 1
        if purpose == "offsets":  # `draw_offsets` multiplies by the gap and rounds down
            noise = (recorded["offsets"][step] + 0.5) / config["gap"]
        elif name == "capi":
            noise = capi_noise(recorded, step, run.model)
        else:  # `random_mask` masks the patches with the smallest numbers
            noise = (~recorded["mask"][step]).float()
        assert noise.shape == shape
        return noise

    def note_losses(model, args, output):
        loss, logs = output
        run.loss.append(loss.item())
        run.parts.append({key: value.item() for key, value in logs.items()})

    def note_momentum(teacher, student, momentum):
        run.momentum.append(momentum)
        own_update(teacher, student, momentum)

    def note_rate(optimizer, args, options):
        rate = max(group["lr"] for group in optimizer.param_groups)
        run.rates.setdefault(optimizer, []).append(rate)
        run.groups |= {p: group for group in optimizer.param_groups for p in group["params"]}

    sizes = config["dim"], config["depth"], config["heads"]
    monkeypatch.setitem(common.MODELS, "recorded", sizes)
    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(module, "train_batches", train_batches)
    monkeypatch.setattr(module, "draw", draw)
    if "momentum" in recorded:
        monkeypatch.setattr(module, "update_ema", note_momentum)
    if "tokens" in recorded:
        tokenizer = RecordedTokenizer(run, recorded)
        monkeypatch.setattr(module.Tokenizer, "from_file", lambda path, device: tokenizer)
    with register_optimizer_step_pre_hook(note_rate):
        assert module.train(flags_of(name, recorded, out, **changes)) == 0
    run.grad_norm = [line["grad_norm"] for line in records(out) if "grad_norm" in line]
    state = common.read_checkpoint(f"{out}/last.pt")["model"]
    ours = dict(run.model.named_parameters())

    def by_their_names(values):
        return under_their_names(module, initial_weights(name, recorded), config,
                                 list(recorded["final_sample"]), values)

    def option(option):  # of the optimizer's groups, for each parameter
        values = {key: torch.full_like(p, run.groups[p].get(option, 1.0))
                  for key, p in ours.items() if p in run.groups}
        return {what: value.unique().tolist() for what, value in by_their_names(values).items()
                if not value.isnan().all()}
    run.weights = by_their_names({key: state[key] for key in ours})
    run.decay, run.scale = option("weight_decay"), option("scale")
    return recorded, run


def under_their_names(module, state, sizes, names, values):
    """{our name: tensor} -> {the authors' name: flat tensor}, nan where we have no value. To learn
    where `from_released` puts each element of the authors' tensors, number the elements and load
    the numbers as weights."""
    counts = [state[name].numel() for name in names]
    numbers = torch.arange(sum(counts), dtype=torch.float32).split(counts)
    numbered = {name: n.view_as(state[name]) for name, n in zip(names, numbers)}
    model = module.Model.from_released(state | numbered, **sizes)
    found = torch.full([sum(counts)], torch.nan)
    for name, value in values.items():
        found[model.get_parameter(name).detach().flatten().long()] = value.flatten().cpu()
    return dict(zip(names, found.split(counts)))


# -- comparing

def check_steps(what, ours, theirs, bar):
    """`bar` is the largest difference allowed, one number or one for each step."""
    ours = torch.tensor(ours, dtype=torch.float64)
    assert ours.shape == theirs.shape, f"{what}: {len(ours)} steps, recorded are {len(theirs)}"
    excess = (ours - theirs).abs() / bar
    step = excess.argmax().item()
    assert excess[step] <= 1, f"{what}, step {step}: {ours[step]:.9g}, recorded {theirs[step]:.9g}"


def check_schedules(recorded, run):
    for what, rates in zip(("lr", "cluster_lr"), run.rates.values()):
        check_steps(what, rates, recorded[what], 1e-9 * recorded["recipe"]["peak_lr"])
    if "momentum" in recorded:
        # In step 0 Latent MIM's teacher equals the student, so `train` may leave the update out.
        count = max(23, len(run.momentum))
        check_steps("momentum", run.momentum, recorded["momentum"][-count:], 1e-9)


def check_results(recorded, run):
    check_steps("loss", run.loss, recorded["loss"], 1e-5 * recorded["loss"].abs())
    for what, theirs in recorded["parts"].items():
        check_steps(what, [logs[what] for logs in run.parts], theirs, 1e-4 * theirs.abs())
    check_steps("grad_norm", run.grad_norm, recorded["grad_norm"], 1e-4 * recorded["grad_norm"])
    for what, sample in recorded["final_sample"].items():
        ours = run.weights[what]
        kept = torch.ones(len(ours), dtype=torch.bool)
        if what in recorded["without_gradient"]:
            first, end = recorded["without_gradient"][what]
            kept[first:end] = False
        error = (ours[::7] - sample)[kept[::7]].norm() / sample[kept[::7]].norm()
        assert error <= 3e-4, f"final {what}: differs by {error:.2g} of its norm"
        norm = recorded["final_norm"][what]
        assert abs(ours[kept].norm() - norm) <= 3e-4 * norm, f"norm of the final {what}"


def check_groups(recorded, run):
    """Which parameters have weight decay. CAPI's also differ in its amount, and in their rate."""
    decayed = {what for what, values in run.decay.items() if values != [0]}
    assert decayed == set(recorded["decayed"])
    for what, scale in recorded.get("decay_scale", {}).items():
        assert run.decay[what] == pytest.approx([scale * recorded["recipe"]["weight_decay"]]), what
        assert run.scale[what] == pytest.approx([recorded["lr_scale"][what]]), what


@pytest.mark.parametrize("name", RUNS)
def test_every_step_agrees_with_the_authors_program(name, monkeypatch, tmp_path):
    recorded, run = play(name, monkeypatch, tmp_path)
    check_schedules(recorded, run)
    check_groups(recorded, run)
    check_results(recorded, run)


def test_hog_target_equals_the_authors():
    recorded = load_fixture("semantic_mim_hog")
    images = pool_images(recorded)[recorded["hog"]["images"]]
    target = MODULES["semantic_mim"].hog_target(images, recorded["config"]["patch_size"])
    torch.testing.assert_close(target, recorded["hog"]["target"], rtol=0, atol=1e-5)


# -- a mistake in one rule is noticed, by losses and weights alone

def check_notices(name, monkeypatch, out, **changes):
    recorded, run = play(name, monkeypatch, out, **changes)
    with pytest.raises(AssertionError):
        check_results(recorded, run)


@pytest.mark.parametrize("name, flags", [
    ("semantic_mim_hog", dict(weight_decay=0.05 * 1.2)),  # the weakest of all
    ("mae", dict(warmup_epochs=3.5)),  # one step longer
])
def test_a_wrong_constant_is_noticed(name, flags, monkeypatch, tmp_path):
    check_notices(name, monkeypatch, tmp_path, **flags)


def late(update_ema, what):
    """Each update of the teacher has the momentum, or the student, of the step before."""
    before = {}

    def mistaken(teacher, student, momentum):
        now = {"momentum": momentum, "student": copy.deepcopy(student)}
        used = now | {what: before.get(what, now[what])}
        before.update(now)
        update_ema(teacher, used["student"], used["momentum"])
    return mistaken


@pytest.mark.parametrize("name, what", [
    ("latent_mim", "momentum"),  # an update after the targets of its step
    ("pilamim", "student"),  # an update before the optimiser's step
])
def test_a_late_teacher_is_noticed(name, what, monkeypatch, tmp_path):
    module = MODULES[name]
    monkeypatch.setattr(module, "update_ema", late(module.update_ema, what))
    check_notices(name, monkeypatch, tmp_path)
