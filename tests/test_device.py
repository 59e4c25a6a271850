"""Whole runs on a device that is none, because a GPU is not always at hand.

Its tensors say that they are on torch's "meta", and keep their numbers on the CPU, where all is computed. What mixes them
with tensors of the CPU raises an error, as on a GPU, and what reads numbers back, for which a GPU would have to be waited for,
is written down. What only a GPU can show, its kernels, precisions and speed, is not shown: where there is one, the same tests
run on it too, and so do the comparisons with the authors' numbers."""

import contextlib
import functools
import importlib
import inspect
import json
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common
import evaluate
from conftest import METHODS, MODULES, PICTURES, records, tiny, trained, write_images

aten, META = torch.ops.aten, torch.device("meta")
WAITS = []  # what would have waited for a GPU
READING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
           aten._unique2.default, aten.bincount.default)  # numbers, or how many there are
INDEXING = aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default
COPYING = aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default


class There(torch.Tensor):
    """A tensor on the device; `here` has its numbers."""

    @staticmethod
    def __new__(cls, here):
        x = torch.Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(),
                                                dtype=here.dtype, device=META)
        x.here = here
        return x

    def tolist(self):
        WAITS.append("tolist")
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Computed(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def each(change, x):
    """x with every tensor in it changed."""
    if isinstance(x, (list, tuple)):
        return type(x)([each(change, part) for part in x])
    if isinstance(x, dict):
        return {name: each(change, part) for name, part in x.items()}
    return change(x) if isinstance(x, torch.Tensor) else x


def here(x):
    return x.here if isinstance(x, There) else x


def computed(func, args, kwargs):
    """One operation, by the rules of a GPU: only copies go between devices, and a CPU tensor may be an index or a number."""
    tensors = []
    each(tensors.append, [args, kwargs])
    those = {id(x.here): x for x in tensors if isinstance(x, There)}
    strangers = [tuple(x.shape) for x in tensors if x.ndim and not isinstance(x, There)] if those else []
    if func not in COPYING and strangers and not (func in INDEXING and isinstance(tensors[0], There)):
        raise RuntimeError(f"{func} of both devices: {strangers} are on the CPU")
    device = kwargs.get("device")
    if device is not None:
        kwargs = kwargs | {"device": "cpu"}
    if those and (func is aten._to_copy.default and device == torch.device("cpu") or func in INDEXING and strangers
                  or func is aten.copy_.default and not isinstance(args[0], There) or func in READING
                  or func is aten.index.Tensor and any(x.dtype is torch.bool for x in tensors[1:])):
        WAITS.append(str(func))
    out = func(*each(here, args), **each(here, kwargs))
    stays = bool(those) if device is None else torch.device(device) == META
    return each(lambda x: those[id(x)] if id(x) in those else There(x) if stays else x, out)


def moved(model, device):
    for module in model.modules():
        for parts in (module._parameters, module._buffers):
            for name, x in parts.items():
                if x is not None:
                    there = There(x.detach().clone())
                    parts[name] = torch.nn.Parameter(there, x.requires_grad) if isinstance(x, torch.nn.Parameter) else there
    return model


@contextlib.contextmanager
def on_the_device():
    """torch as it would be, in the few places where it asks the name "meta" and not the tensor."""
    tensor, save = torch.tensor, torch.save

    def made(data, device="cpu", **kind):
        WAITS.extend(["torch.tensor"] * (device == META))
        return tensor(data, **kind).to(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", made)
        patch.setattr(torch.Tensor, "new_tensor", lambda x, data, device=None: made(
            data, dtype=x.dtype, device=device or x.device))
        patch.setattr(torch, "save", lambda state, file: save(each(here, state), file))
        patch.setattr(torch, "autocast", lambda *args, **flags: contextlib.nullcontext())
        patch.setattr(torch.nn.Module, "to", moved)
        patch.setattr(common, "choose_device", lambda name, rank: META)
        draw_here(patch)
        with Computed():
            yield


def draw_here(patch, draw=common.draw):
    """On the CPU, and copied: each device has random numbers of its own, and runs are to be compared."""
    for module in list(sys.modules.values()):
        if getattr(module, "draw", None) is draw:
            patch.setattr(module, "draw", lambda shape, device, *parts: draw(shape, "cpu", *parts).to(device))


@contextlib.contextmanager
def on_the_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "choose_device", lambda name, rank: torch.device("cuda", 0))
        patch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # no TF32: it is good to three digits
        draw_here(patch)
        yield


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
each_device = pytest.mark.parametrize("device", [on_the_device, pytest.param(on_the_gpu, marks=needs_gpu)])


@needs_gpu
@pytest.mark.parametrize("name", ["mae", "latent_mim", "semantic_mim_hog", "semantic_mim_hog16", "semantic_mim_dvae", "pilamim",
                                  "capi", "capi_registers"])
def test_the_authors_numbers_on_a_gpu(monkeypatch, name):
    """The tests that compare with them, with everything moved there."""
    module = importlib.import_module("test_" + next(method for method in METHODS if name.startswith(method)))
    if not (path := module.FIXTURES / f"{name}.pt").exists():
        pytest.skip(f"needs ../shared/fixtures/{name}.pt, numbers from the authors' program")
    fixture, released = each(lambda t: t.cuda(), torch.load(path, weights_only=True)), module.released
    monkeypatch.setattr(module, "released", lambda fixture: released(fixture).cuda())
    takes = {test: inspect.signature(test).parameters for name, test in vars(module).items() if name.startswith("test_fixture")}
    tests = [test for test, names in takes.items() if "fixture" in names]
    assert len(tests) > 2
    for test in tests:
        with pytest.MonkeyPatch.context() as patch:
            test(fixture, *[patch] * ("monkeypatch" in takes[test]))


@each_device
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*to a meta parameter")
def test_a_run_there_equals_one_here(tmp_path, monkeypatch, method, device):
    """Losses, gradients, features, pictures; resumed once. And between two log lines nothing reads back."""
    flags = dict(accum=2, epochs=4, log_every=6)  # 8 steps

    def stream(*args, real=MODULES[method].train_batches):
        for number, images in enumerate(real(*args)):
            if number in (0, 7):  # the first micro-batch of the third step, the last of the sixth, where a log line is due
                waits.append(len(WAITS))
            yield images
    for place, where in (("here", contextlib.nullcontext), ("there", device)):
        waits = []
        with where(), monkeypatch.context() as patch:
            trained(tiny(tmp_path / place, method, **flags | {"epochs": 1}, save_every=1), method)
            patch.setattr(MODULES[method], "train_batches", stream)
            trained(tiny(tmp_path / place, method, **flags), method)
    assert len(waits) == 2 and waits[0] == waits[1], WAITS[waits[0]:waits[1]]  # a real one: test_no_step_waits_for_the_gpu
    for there, home in zip(records(tmp_path / "there"), records(tmp_path / "here"), strict=True):
        for name in {*home} & {"loss", "grad_norm", "rank", "feature_std"}:
            assert there[name] == pytest.approx(home[name], rel=1e-3), name
    assert all((tmp_path / "there" / name).exists() for name in PICTURES[method])
    name = records(tmp_path / "there")[0]["device"]
    assert name == torch.cuda.get_device_name() if device is on_the_gpu else name.startswith("meta")


@each_device
@pytest.mark.parametrize("method", ["mae", "semantic_mim"])  # all pictures that there are
def test_scores_there_equal_those_here(tmp_path, monkeypatch, method, device):
    """Every kind of probe of MAE, on drawn pictures or a folder; and a method's pictures."""
    monkeypatch.setattr(evaluate, "tsne", functools.partial(evaluate.tsne, steps=2))
    trained(tiny(tmp_path / "run", method), method)
    for kind in ("one", "two"):
        write_images(tmp_path / "images" / kind, 12, first=12 * (kind == "two"))
    sets = ({"probe": ("knn", "seg-knn", "seg-linear", "finetune"), "picture": True},
            {"probe": ("knn", "attentive"), "data": str(tmp_path / "images")})  # linear is attentive without queries
    if method == "semantic_mim":
        sets = {"probe": ("knn",), "picture": True},
    scores = {contextlib.nullcontext: [], device: []}
    for where in scores:
        with where():
            for flags in sets:
                cfg = evaluate.Config(str(tmp_path / "run/last.pt"), limit=32, epochs=1, finetune_epochs=1, workers=0,
                                      device="cpu", amp="off", rows=("trained", "raw"), **flags)
                assert evaluate.evaluate(cfg) == 0
                for row in json.loads((tmp_path / "run/last.eval.json").read_text())["scores"].values():
                    scores[where] += row.values()
    here, there = scores.values()
    assert there == pytest.approx(here, abs=0.02)
