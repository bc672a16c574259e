"""A CUDA device for machines without one: `with fake.device() as d:` torch has a cuda:0.

A tensor of the device is a subclass of Tensor that says cuda:0 and keeps its bytes in a CPU tensor. A dispatch mode
sees every operator, refuses operands on two devices as CUDA does, runs the CPU's kernel on the bytes, and counts where
the host waited: copies between the devices, item(), shapes that depend on values. Fresh and freed memory is 0xFF, which
is NaN in every float format. A CUDA graph is the list of the operators between its two ends; a replay runs them again
on the same addresses, whoever owns them by now.

It shows tensors on two devices, host waits, what cannot be captured, replays on freed memory, lacking float64, shapes
that torch._int_mm refuses. It cannot show speed, streams, races or the numerics of a GPU's kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import time
import types
import weakref
from collections import Counter
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

try:
    from . import real
except ImportError:  # of comfyui.py, a program
    import real
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
# Operators whose result has a shape, or is a value, that the host must wait for.
WAITS = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal, aten.allclose,
    aten._unique2,
}  # fmt: skip
COPIES = {aten._to_copy, aten.copy_}
PLAIN = {Tensor, torch.nn.Parameter}
KINDS = ("active", "reserved", "allocated")
TOTAL = 8 * 2**30
HERE = Path(__file__).name


def fill(inner: Tensor) -> None:
    storage = inner.untyped_storage()
    ctypes.memset(storage.data_ptr(), 0xFF, storage.nbytes())


class Memory:
    """An allocation of the device; garbage once the last tensor of it is gone, even where a graph knows its address."""

    def __init__(self, inner: Tensor, device: FakeDevice):
        if device.held + inner.untyped_storage().nbytes() > device.limit:
            raise torch.OutOfMemoryError("CUDA out of memory (fake device)")
        self.inner = inner.detach()
        device.held += inner.untyped_storage().nbytes()
        device.peak = max(device.peak, device.held)
        weakref.finalize(self, self.release, self.inner, device)

    @staticmethod
    def release(inner: Tensor, device: FakeDevice) -> None:
        device.held -= inner.untyped_storage().nbytes()
        fill(inner)


class DeviceTensor(Tensor):
    inner: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, inner: Tensor, memory: Memory):
        found = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=CUDA, requires_grad=False,
        )  # fmt: skip
        found.inner, found.memory = inner, memory
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if FakeDevice.current is None:
            raise RuntimeError("a tensor of the fake device outlived it")
        if foreign(types):
            return NotImplemented
        return FakeDevice.current.run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy (fake device)")

    def __repr__(self, **_) -> str:
        return f"DeviceTensor({self.inner!r})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]


def foreign(types) -> bool:
    """Whether another subclass is among the operands, which unpacks itself first."""
    return any(kind not in PLAIN and not issubclass(kind, DeviceTensor) for kind in types)


@cache
def guard() -> str:
    """Builds guard.cpp once for each version of torch and tells torch of it; says what is missing where it cannot."""
    source, compiler, root = Path(__file__).with_name("guard.cpp"), shutil.which("c++"), Path(torch.__file__).parent
    if compiler is None:
        return "no C++ compiler"
    tag = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    library = Path(__file__).parents[2] / "build" / f"device-{tag}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", str(source), "-o", str(part),
                   f"-L{root}/lib", "-lc10"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{compiler} cannot build against this torch: {done.stderr[:200]}"
        part.rename(library)
    ctypes.CDLL(str(library)).install()
    return ""


class FakeDevice(TorchDispatchMode):
    """`waits` counts the host's waits by kind and place, `held` and `peak` the bytes of the device, of which `limit`
    may be taken: less than it says that it has, as where others use it too.
    """

    current: FakeDevice | None = None

    def __init__(self, float64: bool = True):
        super().__init__()
        self.float64, self.graph = float64, None
        self.waits: Counter = Counter()
        self.held = self.peak = 0
        self.limit: float = TOTAL
        self.reached = 0.0  # the latest event that the host waited for

    # -- operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if foreign(types):
            return NotImplemented
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        if func.overloadpacket is aten.to:  # inference mode hands composite operators over as they are
            with self:
                return func.decompose(*args, **kwargs)
        ours, others = [], []
        tree_map(lambda t: (ours if isinstance(t, DeviceTensor) else others).append(t) if isinstance(t, Tensor) else t,
                 (args, kwargs))  # fmt: skip
        target = kwargs.get("device")
        target = CUDA if target is None and ours else torch.device(target or "cpu")
        if not ours and target.type != "cuda":
            return func(*args, **kwargs)
        name = func.overloadpacket
        self.check_devices(func, name, args, ours, others)
        self.count(name, args, kwargs, ours, others, target)
        if name is aten._int_mm:
            check_int_mm(*args[:2])
        known = {id(t.inner): t for t in ours}
        given = tree_map(lambda t: t.inner if isinstance(t, DeviceTensor) else CPU if t == CUDA else t, (args, kwargs))
        if kwargs.get("device") is not None:
            given[1]["device"] = CPU
        if self.graph is not None:
            self.graph.save(func, given)
        out = func(*given[0], **given[1])
        if name in (aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty):
            fill(out)
        if self.graph is not None:
            self.graph.record(func, given, out)
        if target.type == "cpu" or (name is aten.copy_ and not isinstance(args[0], DeviceTensor)):
            return args[0] if name is aten.copy_ else out
        owners = {t.inner.untyped_storage().data_ptr(): t.memory for t in ours}
        return tree_map(lambda t: self.wrap(t, known, owners) if isinstance(t, Tensor) else t, out)

    def wrap(self, inner: Tensor, known: dict, owners: dict) -> Tensor:
        if id(inner) in known:
            return known[id(inner)]
        if inner.dtype == torch.float64 and not self.float64:
            raise TypeError("the device has no float64 (fake device)")
        memory = owners.get(inner.untyped_storage().data_ptr()) or Memory(inner, self)
        with torch.inference_mode(inner.is_inference()):  # a view is what its base is
            return DeviceTensor(inner, memory)

    def check_devices(self, func, name, args, ours, others) -> None:
        if not ours or name in COPIES:
            return
        if name is aten.index:  # indices may come from the host, which waits for their copy
            if isinstance(args[0], DeviceTensor):
                return
        for tensor in others:
            if tensor.dim():
                raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu in {func}")

    def count(self, name, args, kwargs, ours, others, target) -> None:
        """A copy to the device that need not block waits for nothing: CUDA stages what is not pinned. One to the host's
        pageable memory does.
        """
        arrives = name in COPIES and (
            isinstance(args[0], DeviceTensor) if name is aten.copy_ else target.type == "cuda"
        )
        if arrives and not ours[1:] and any((kwargs.get("non_blocking"), *args[2:3])):
            return
        crosses = name in COPIES and (bool(ours) != (target.type == "cuda") or (others and ours))
        indexed = name in (aten.index, aten.index_put_, aten._index_put_impl_) and (
            others or any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        )
        if name in WAITS or crosses or indexed:
            self.wait(str(name).removeprefix("aten."))

    def wait(self, kind: str) -> None:
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind} (fake device)")
        frame = sys._getframe(1)
        while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename.endswith(HERE)):
            frame = frame.f_back
        place = "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.waits[kind, place] += 1

    # -- torch.cuda

    @contextlib.contextmanager
    def capture(self, graph: Graph, pool=None, **_):
        self.graph = graph
        try:
            yield
        finally:
            self.graph = None
            graph.undo()

    def module(self) -> dict:
        nothing = contextlib.nullcontext
        return {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "init": lambda: None,
            "_lazy_init": lambda: None, "is_initialized": lambda: True, "get_device_name": lambda *_: "Fake GPU",
            # Below 8.0: no Triton kernels, which could not run here.
            "get_device_capability": lambda *_: (7, 5), "device_of": lambda *_: nothing(),
            "device": lambda *_: nothing(),
            "synchronize": lambda *_: self.wait("synchronize"), "empty_cache": lambda: None,
            "Stream": lambda *_, **__: Stream(), "current_stream": lambda *_: Stream(), "stream": lambda *_: nothing(),
            "Event": lambda **_: Event(self), "CUDAGraph": Graph, "graph": self.capture, "graph_pool_handle": object,
            "memory_allocated": lambda *_: self.held, "max_memory_allocated": lambda *_: self.peak,
            "reset_peak_memory_stats": self.reset_peak, "_sleep": lambda *_: None,
            "memory_stats": lambda *_: Counter({f"{kind}_bytes.all.current": self.held for kind in KINDS}),
            "mem_get_info": lambda *_: (TOTAL - self.held, TOTAL), "memory_reserved": lambda *_: self.held,
            "default_stream": lambda *_: Stream(), "get_allocator_backend": lambda: "native",
            "ipc_collect": lambda: None,
            "is_bf16_supported": lambda *_, **__: True, "is_current_stream_capturing": lambda: self.graph is not None,
            "get_device_properties": lambda *_: types.SimpleNamespace(
                name="Fake GPU", major=7, minor=5, total_memory=TOTAL, multi_processor_count=8
            ),
        }  # fmt: skip

    def reset_peak(self, *_) -> None:
        self.peak = self.held


def check_int_mm(a: Tensor, b: Tensor) -> None:
    if len(a) <= 16 or a.shape[1] % 8 or b.shape[1] % 8:
        raise RuntimeError(
            f"_int_mm takes more than 16 rows and multiples of 8, not {a.shape} and {b.shape} (fake device)"
        )


class Stream:
    def wait_stream(self, other) -> None: ...


class Event:
    def __init__(self, device: FakeDevice):
        self.device = device

    def record(self, stream=None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        if self.at > self.device.reached:  # else the host has been there already
            self.device.reached = self.at
            self.device.wait("event")

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at)


class Graph:
    """Operators on addresses. A capture runs nothing, so what it wrote is put back at its end."""

    def __init__(self) -> None:
        self.steps: list = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def save(self, func, given) -> None:
        for argument, value in zip(func._schema.arguments, given[0]):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, Tensor) and value.data_ptr() not in self.before:
                self.before[value.data_ptr()] = value, value.clone()

    def record(self, func, given, out) -> None:
        self.steps.append((func, given, out))

    def undo(self) -> None:
        for tensor, value in self.before.values():
            tensor.copy_(value)
        self.before.clear()

    @torch.inference_mode()
    def replay(self) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            for func, (args, kwargs), kept in self.steps:
                found = func(*args, **kwargs)
                for old, new in zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (kept, found))):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Generator:
    """torch.Generator, whose numbers come from the CPU."""

    real = torch.Generator

    def __new__(cls, device="cpu"):
        return cls.real("cpu")


@contextlib.contextmanager
def device(float64: bool = True):
    """The device, cuda:0 with its number, for as long as the context lasts. Without float64 as Apple's GPUs are."""
    if real.WANTED and float64:
        with real.device() as found:
            yield found
        return
    if guard():
        raise RuntimeError(guard())
    found = FakeDevice(float64)
    with contextlib.ExitStack() as stack:
        for name, value in found.module().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(FakeDevice, "current", found))
        # Module.to() would put the bytes of a subclass into the old Parameter.
        future = torch.__future__
        stack.callback(
            future.set_overwrite_module_params_on_conversion, future.get_overwrite_module_params_on_conversion()
        )
        future.set_overwrite_module_params_on_conversion(True)
        # torch.tensor(..., device=) would make its copy for the device where no mode sees it.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.enter_context(torch.no_grad())  # autograd asks a real CUDA for its streams
        stack.enter_context(found)
        yield found
