"""A digest of a nested value that is equal only for equal values, in any process.

What an interrupted calibration belongs to is more than numbers: prompts, control images, other networks, functions that
other nodes put into the model. The walk below takes values apart into what distinguishes them: an object into its class
and its attributes, a function into its code, its defaults and what it closes over, a tensor into its bytes. Objects met
before, cycles included, are named by the order of their first visit, never by their address.

The digest errs to one side. What cannot be taken apart (an object of a C extension, a generator, a lock) makes it
unique, so that work is done afresh instead of mixed with that of other inputs; `opaque` names the type.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import pathlib
import types
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLED = 4096  # values of each weight of a network; an input is read whole
PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None), type(Ellipsis), type(NotImplemented))
NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, np.dtype, pathlib.PurePath, range, slice)
# Immutable: whether two are one object depends on how their source was compiled. A cycle passes through others.
SHARED = (tuple, frozenset, types.CodeType, Tensor)
Replace = Callable[[Any], Any]


@dataclass(frozen=True)
class Digest:
    """64 hexadecimal digits, and the types that could not be taken apart, because of which it is unique."""

    hex: str
    opaque: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """True if another process finds the same digits for the same value."""
        return not self.opaque


@dataclass(frozen=True, eq=False)
class Sampled:
    """A weight of gigabytes, of which a few thousand values are read."""

    tensor: Tensor


def digest(*values: Any, replace: Replace = lambda value: value) -> Digest:
    """Digest of the values. `replace` may give for an object what stands for it, before it is taken apart."""
    walk = Walk(replace)
    try:
        for value in values:
            walk.visit(value)
    except RecursionError:
        walk.unknown(values)
    return Digest(walk.hash.hexdigest(), tuple(dict.fromkeys(walk.opaque)))


class Walk:
    """One traversal: feeds a hash with all that it meets."""

    def __init__(self, replace: Replace):
        self.replace, self.hash, self.opaque = replace, hashlib.sha256(), list[str]()
        self.met: dict[int, int] = {}
        self.read: dict[int, str] = {}  # tensors by address, equal ones alike whether or not they are the same
        self.alive: list[Any] = []  # an address is a name only while its object lives

    def say(self, *parts: Any) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            self.hash.update(b"%d:" % len(data))
            self.hash.update(data)

    def visit(self, value: Any) -> None:
        try:
            self.enter(value)
        except RecursionError:
            raise
        except Exception:  # an attribute that raises, memory that is gone
            self.unknown(value)

    def enter(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self.say("enum", name_of(type(value)), value.name)
        elif type(value) in PLAIN or isinstance(value, NAMED):
            self.say(type(value).__name__, repr(value))
        elif id(value) in self.met and not isinstance(value, SHARED):
            self.say("again", self.met[id(value)])
        else:
            self.met.setdefault(id(value), len(self.met))
            self.alive.append(value)
            self.apart(value)

    def apart(self, value: Any) -> None:
        """Takes a value apart that is met for the first time."""
        given = self.replace(value)
        if given is not value:
            self.say("for", name_of(type(value)))
            self.visit(given)
        elif isinstance(value, Tensor):
            self.say(self.contents(value))
        elif isinstance(value, Sampled):
            self.tensor(value.tensor, sampled=True)
        elif isinstance(value, nn.Module):
            self.network(value)
        elif isinstance(value, np.ndarray | np.generic) and value.dtype != object:
            self.say("array", value.dtype, value.shape, np.ascontiguousarray(value).tobytes())
        elif isinstance(value, torch.Generator):
            self.say("generator")
            self.tensor(value.get_state())
        elif isinstance(value, type):
            self.say("class", name_of(value))
        elif type(value) is object:
            self.say("object")
        elif isinstance(value, weakref.ReferenceType):
            self.say("reference")
            self.visit(value())
        elif isinstance(value, types.ModuleType):
            self.say("module", value.__name__)
        elif not self.function(value):
            self.container(value)

    def contents(self, value: Tensor) -> str:
        """Digest of one tensor, read once."""
        if id(value) not in self.read:
            own = Walk(self.replace)
            own.tensor(value)
            self.opaque += own.opaque
            self.read[id(value)] = own.hash.hexdigest()
        return self.read[id(value)]

    def tensor(self, value: Tensor, sampled: bool = False) -> None:
        flatten = getattr(value, "__tensor_flatten__", None)
        if type(value) not in (Tensor, nn.Parameter) and flatten is not None:
            names, context = flatten()
            self.say("tensor of", name_of(type(value)))
            self.visit(context)
            for name in names:
                self.tensor(getattr(value, name), sampled)
            return
        if value.layout != torch.strided or value.is_meta or value.is_nested:
            return self.unknown(value)
        if type(value) not in (Tensor, nn.Parameter):
            self.say(name_of(type(value)))
            self.visit(dict(vars(value)))
        flat = value.detach().as_subclass(Tensor)
        self.say("tensor", value.dtype, tuple(flat.shape))
        flat = flat.reshape(-1)
        if sampled:
            flat = flat[:: max(1, flat.numel() // SAMPLED)]
        data = flat.resolve_conj().resolve_neg().cpu().contiguous()
        self.say(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")

    def network(self, value: nn.Module) -> None:
        """Classes and weights by name, and the attributes that its parts were configured with.

        Names with a leading underscore hold PyTorch's own state, and those with `comfy` in them whether and where
        the weights are loaded, neither of which changes what the network computes.
        """
        self.say("network")
        for name, part in value.named_modules():
            self.say(name, name_of(type(part)))
            own = {key: kept for key, kept in vars(part).items() if not key.startswith("_") and "comfy" not in key}
            self.visit({key: kept for key, kept in own.items() if key not in LOADED})
            for hooks in (part._forward_pre_hooks, part._forward_hooks):
                self.visit(list(hooks.values()))
        for name, weight in (*value.named_parameters(), *value.named_buffers()):
            self.say(name)
            self.tensor(weight, sampled=True)

    def function(self, value: Any) -> bool:
        """Takes a callable of Python's own kinds apart; whether it was one."""
        if isinstance(value, types.MethodType):
            self.say("method")
            self.each(value.__func__, value.__self__)
        elif isinstance(value, types.FunctionType):
            self.say("function", value.__module__, value.__qualname__)
            cells = [contents(cell) for cell in value.__closure__ or ()]
            self.each(value.__code__, value.__defaults__, value.__kwdefaults__, cells, vars(value))
        elif isinstance(value, types.CodeType):
            self.say("code", value.co_name, value.co_code)
            self.each(value.co_consts, value.co_names, value.co_varnames, value.co_freevars)
        elif isinstance(value, functools.partial):
            self.say("partial")
            self.each(value.func, value.args, value.keywords)
        elif isinstance(value, types.BuiltinFunctionType):
            self.say("builtin", value.__module__ or "", value.__qualname__)
            self.each(None if isinstance(value.__self__, types.ModuleType) else value.__self__)
        elif isinstance(value, (property, classmethod, staticmethod)):
            self.say(type(value).__name__)
            self.each(getattr(value, "fget", None) or getattr(value, "__func__", None))
        else:
            return False
        return True

    def container(self, value: Any) -> None:
        self.say(name_of(type(value)))
        if isinstance(value, Mapping):
            self.say(len(value))
            for key, kept in list(value.items()):
                self.each(key, kept)
        elif isinstance(value, Set):  # in an order that does not depend on addresses or on the process
            parts = [digest(part, replace=self.replace) for part in value]
            self.opaque += [name for part in parts for name in part.opaque]
            self.say(len(parts), *sorted(part.hex for part in parts))
        elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            self.say(len(value))
            self.each(*value)
        state = attributes(value)
        if isinstance(value, (str, bytes, int, float)):
            self.say(value if isinstance(value, bytes) else str(value))
        if state is not None:
            self.say(len(state))
            for name, kept in sorted(state.items()):
                self.say(name)
                self.visit(kept)
        elif not isinstance(value, (Mapping, Set, Sequence, str, bytes, int, float)):
            self.unknown(value)

    def each(self, *values: Any) -> None:
        for value in values:
            self.visit(value)

    def unknown(self, value: Any) -> None:
        self.opaque.append(name_of(type(value)))
        self.say("opaque", os.urandom(32))


# Attributes of networks that ComfyUI changes when it loads or patches them.
LOADED = frozenset(
    """
    current_patcher current_weight_patches_uuid device lowvram_patch_counter model_lowvram
    model_loaded_weight_memory model_offload_buffer_memory weight_function bias_function weight_lowvram_function
    bias_lowvram_function training dynamic_pins dynamic_vbars
    """.split()
)


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def attributes(value: Any) -> dict[str, Any] | None:
    """The slots and attributes of an instance; None for a kind that keeps its state elsewhere."""
    kinds = [kind for kind in type(value).__mro__ if kind is not object]
    slots = [vars(kind)["__slots__"] for kind in kinds if "__slots__" in vars(kind)]
    names = [name for given in slots for name in ((given,) if isinstance(given, str) else given)]
    found = {
        name: getattr(value, name) for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)
    }
    if hasattr(value, "__dict__"):
        return {**found, **{str(name): kept for name, kept in list(vars(value).items())}}
    # A class of Python without attributes has a plain base; one written in C keeps what is not seen here.
    return found if slots and all(kind.__flags__ & HEAP_TYPE for kind in kinds) else None


HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement
