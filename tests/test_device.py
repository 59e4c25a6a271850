"""Whole runs on a device that does not exist, because a GPU is not always at hand.

Its tensors say that they are on "meta", but keep their numbers on the CPU, which computes. Like a
GPU, it refuses to mix its tensors with those of the CPU. Between two log lines it refuses to be
read, because a GPU would have to be waited for. If there is a GPU, the same test runs there too."""

import contextlib
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import common
from conftest import MODULES, each_method, records, tiny, trained

aten, META = torch.ops.aten, torch.device("meta")
COPIES = aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default
INDEXES = aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
         aten.equal.default, aten._unique2.default, aten.bincount.default)  # values or their number


class There(torch.Tensor):
    """A tensor on the device; `here` has its numbers."""
    busy = False  # if reading is refused

    @staticmethod
    def __new__(cls, here):
        x = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, device=META)
        x.here = here
        return x

    def tolist(self):
        return read("tolist", self.here.tolist())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of the device")


def here(x):
    return tree_map_only(There, lambda t: t.here, x)


def read(what, result=None):
    if There.busy:
        raise RuntimeError(f"{what} waits for the device")
    return result


class Device(TorchDispatchMode):
    """A GPU's rules: only copies go between devices, and a tensor of the CPU may be an index or a
    number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = {id(x.here): x for x in tensors if isinstance(x, There)}
        foreign = [x.shape for x in tensors if ours and x.ndim and not isinstance(x, There)]
        indexed = func in INDEXES and isinstance(tensors[0], There)
        if foreign and func not in COPIES and not indexed:
            raise RuntimeError(f"{func} mixes devices: {foreign} on the CPU")
        kwargs = kwargs or {}
        goes_to = torch.device(kwargs.get("device") or (META if ours else "cpu"))
        fetched = goes_to != META or func is aten.copy_.default and not isinstance(args[0], There)
        by_mask = func is aten.index.Tensor and any(x.dtype is torch.bool for x in tensors[1:])
        if ours and (fetched or by_mask or func in READS or indexed and foreign):
            read(func)

        def placed(x):
            if id(x) in ours:  # changed in place
                return ours[id(x)]
            return There(x) if goes_to == META else x
        if "device" in kwargs:
            kwargs = kwargs | {"device": "cpu"}
        return tree_map_only(torch.Tensor, placed, func(*here(args), **here(kwargs)))


def draw_on_the_cpu(patch, draw=common.draw):
    """Each device has random numbers of its own, but runs are to be compared."""
    for module in [*sys.modules.values()]:
        if getattr(module, "draw", None) is draw:
            patch.setattr(module, "draw", lambda n, device, *of: draw(n, "cpu", *of).to(device))


@contextlib.contextmanager
def stand_in():
    """In a few places torch asks for the name of the device, and not the tensor."""
    tensor, save, AdamW = torch.tensor, torch.save, torch.optim.AdamW

    def made(data, device="cpu", **kind):
        if device == META:
            read("torch.tensor")
        return tensor(data, **kind).to(device)
    with pytest.MonkeyPatch.context() as patch, Device():
        patch.setattr(There, "busy", False)
        patch.setattr(common, "choose_device", lambda name, rank: META)
        patch.setattr(torch, "tensor", made)
        patch.setattr(torch, "save", lambda state, file: save(here(state), file))
        patch.setattr(torch, "autocast", lambda *args, **flags: contextlib.nullcontext())
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        patch.setattr(torch.optim, "AdamW", lambda groups, fused, **flags: AdamW(groups, **flags))
        draw_on_the_cpu(patch)
        yield lambda busy: setattr(There, "busy", busy)


@contextlib.contextmanager
def cuda():
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        patch.setattr(common, "choose_device", lambda name, rank: torch.device("cuda", 0))
        draw_on_the_cpu(patch)
        yield lambda busy: torch.cuda.set_sync_debug_mode("error" if busy else "default")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("device, amp", [
    (stand_in, "off"), *(pytest.param(cuda, a, marks=needs_gpu) for a in ("off", "bf16", "fp16"))])
@each_method
@pytest.mark.filterwarnings("ignore:.*to a meta parameter")
def test_a_run_on_a_device_equals_one_on_the_cpu(tmp_path, monkeypatch, method, device, amp):
    """Two steps, then resumed to step 6, with log lines at steps 2 and 6. Nothing waits between."""
    real, flags = MODULES[method].train_batches, dict(accum=2, log_every=9, data="shapes:32")

    def batches(cfg, run, data, first, *rest):
        for micro, images in enumerate(real(cfg, run, data, first, *rest)):
            set_busy(first > 0 and micro < 7)  # until the last micro-batch is fetched
            yield images
    for epochs in (2, 6):
        trained(tiny(tmp_path / "cpu", method, epochs=epochs, **flags), method)
    monkeypatch.setattr(MODULES[method], "train_batches", batches)
    with device() as set_busy:
        for epochs in (2, 6):
            trained(tiny(tmp_path / "device", method, epochs=epochs, amp=amp, **flags), method)
    for there, home in zip(records(tmp_path / "device"), records(tmp_path / "cpu"), strict=True):
        for name in home.keys() & {"loss", "grad_norm", "rank", "feature_std"}:
            assert there[name] == pytest.approx(home[name], rel=1e-3 if amp == "off" else 0.1), name
