"""What an interrupted calibration belongs to: equal digests for equal values alone, in every process."""

import ast
import enum
import functools
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qandc_core.calibration.digest import digest

PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary())
NESTED = st.recursive(
    PLAIN, lambda kept: st.one_of(st.lists(kept), st.dictionaries(st.text(), kept), st.frozensets(PLAIN)), max_leaves=12
)


@dataclass
class Control:
    strength: float = 1.0
    span: tuple = (0.0, 1.0)
    hint: torch.Tensor = field(default_factory=lambda: torch.ones(1, 3, 8, 8))
    previous: object = None


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Kind(enum.Enum):
    ONE, TWO = 1, 2


class Patch:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x):
        return x * self.scale


def scaled(factor, *, shift=0.0):
    def patch(x, by=factor):
        return x * by + shift

    return patch


def closing_over(value):
    return lambda x: x * value


def looped(strength):
    first, second = Control(strength), Control(2.0)
    first.previous, second.previous = second, first
    return [first, second]


def network(seed=0, **attributes):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    for name, value in attributes.items():
        setattr(made[0], name, value)
    return made


def hooked(hook):
    made = network()
    made[0].register_forward_pre_hook(hook)
    return made


Point = namedtuple("Point", "x y")
WIDE = torch.arange(9.0).reshape(3, 3)
# Makers of values that differ in one thing each.
DIFFERENT = {
    "attribute": (lambda: Control(1.0), lambda: Control(0.02)),
    "range": (lambda: Control(), lambda: Control(span=(0.0, 0.5))),
    "one pixel of an image": (
        lambda: Control(),
        lambda: Control(hint=torch.ones(1, 3, 8, 8).index_fill(3, torch.tensor(7), 0)),
    ),
    "nested object": (lambda: Control(previous=Control(0.5)), lambda: Control(previous=Control(0.6))),
    "in a cycle": (lambda: looped(1.0), lambda: looped(0.9)),
    "slots": (lambda: Slotted(1), lambda: Slotted(2)),
    "enum": (lambda: Kind.ONE, lambda: Kind.TWO),
    "closure": (lambda: closing_over(1.0), lambda: closing_over(2.0)),
    "default": (lambda: scaled(1.0), lambda: scaled(2.0)),
    "keyword": (lambda: scaled(1.0), lambda: scaled(1.0, shift=1.0)),
    "code of two lambdas": (lambda: lambda x: x + 1, lambda: lambda x: x + 2),
    "called name": (lambda: lambda x: x.sin(), lambda: lambda x: x.cos()),
    "callable object": (lambda: Patch(1), lambda: Patch(2)),
    "method": (lambda: Patch(1).__call__, lambda: Patch(2).__call__),
    "partial": (lambda: functools.partial(scaled, 1), lambda: functools.partial(scaled, 2)),
    "cached function": (lambda: functools.lru_cache(scaled(1)), lambda: functools.lru_cache(scaled(2))),
    "reference": (lambda: weakref.ref(KEPT[0]), lambda: weakref.ref(KEPT[1])),
    "class": (lambda: Control, lambda: Patch),
    "dtype": (lambda: WIDE, lambda: WIDE.half()),
    "shape": (lambda: WIDE, lambda: WIDE.reshape(9)),
    "layout in memory aside": (lambda: WIDE.T, lambda: WIDE),
    "array": (lambda: np.arange(3.0), lambda: np.arange(3.0) + 1e-9),
    "order": (lambda: [1, 2], lambda: [2, 1]),
    "grouping": (lambda: [[1], [2, 3]], lambda: [[1, 2], [3]]),
    "kind of number": (lambda: 1, lambda: 1.0),
    "text and bytes": (lambda: "a", lambda: b"a"),
    "named tuple": (lambda: Point(1, 2), lambda: (1, 2)),
    "key": (lambda: OrderedDict(a=1), lambda: OrderedDict(b=1)),
    "weights": (lambda: network(0), lambda: network(1)),
    "attribute of a network": (lambda: network(scale=1.0), lambda: network(scale=2.0)),
    "hook of a network": (lambda: hooked(closing_over(1)), lambda: hooked(closing_over(2))),
    "state of a generator": (lambda: torch.Generator().manual_seed(1), lambda: torch.Generator().manual_seed(2)),
    "set": (lambda: {"a", "b"}, lambda: {"a", "c"}),
}
KEPT = Control(1.0), Control(2.0)


@pytest.mark.parametrize("name", DIFFERENT)
def test_values_that_differ_in_one_thing(name):
    first, second = DIFFERENT[name]
    ours, again, other = digest(first()), digest(first()), digest(second())
    assert ours.known and ours == again != other and other.known
    assert digest({"wrapped": [first()]}) == digest({"wrapped": [first()]}) != digest({"wrapped": [second()]})


@given(NESTED, NESTED)
@settings(max_examples=150, deadline=None)
def test_equal_values_and_no_others(a, b):
    assert digest(a).known and digest(a) == digest(a)
    assert (digest(a) == digest(b)) == (repr_of(a) == repr_of(b))


def repr_of(value):
    """Equal for the same kinds, values and order of keys, whatever the order of a set."""
    if isinstance(value, frozenset):
        return "set", tuple(sorted(map(repr, value)))
    if isinstance(value, dict):
        return "dict", tuple((key, repr_of(kept)) for key, kept in value.items())
    return ("list", tuple(map(repr_of, value))) if isinstance(value, list) else repr(value)


@pytest.mark.parametrize(
    "opaque",
    [
        threading.Lock(),
        (x for x in ()),
        iter([1]),
        torch.ones(2, device="meta"),
        torch.ones(2, 2).to_sparse(),
        np.array([object()], dtype=object),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_told_apart_equals_nothing(opaque):
    found, again = (digest({"deep": [Patch(opaque)]}) for _ in range(2))
    assert not found.known and found.hex != again.hex
    assert found.opaque[0].endswith(type(opaque).__name__)
    assert not digest({opaque} if isinstance(opaque, type(threading.Lock())) else [opaque]).known


def test_an_attribute_that_raises_and_endless_depth():
    class Raising:
        __slots__ = ("value",)

        def __getattribute__(self, name):
            raise RuntimeError("gone")

    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert not digest(Raising()).known and not digest(deep).known


def test_shared_and_copied_tensors_are_alike():
    shared = torch.ones(3)
    assert digest([shared, shared]) == digest([torch.ones(3), torch.ones(3)])


def test_what_stands_for_an_object():
    def without_strength(value):
        return value.span if isinstance(value, Control) else value

    assert digest(Control(1.0), replace=without_strength) == digest(Control(0.5), replace=without_strength)
    assert digest({Kind.ONE: Control(1.0)}, replace=without_strength) != digest(Control(1.0), replace=without_strength)


PROGRAM = """
import sys; sys.path[:0] = [{root!r}, {here!r}]
import test_digest as t
from qandc_core.calibration.digest import digest
print({{name: digest(first()).hex for name, (first, _) in t.DIFFERENT.items()}})
"""


def test_other_processes_find_the_same(tmp_path):
    """Other hash seeds, addresses, and compiled files."""
    root, here = str(Path(__file__).parents[2]), str(Path(__file__).parent)
    program = PROGRAM.format(root=root, here=here)
    found = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPYCACHEPREFIX": str(tmp_path), "PATH": "/usr/bin"},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert found[0] == found[1] and ast.literal_eval(found[0]).keys() == DIFFERENT.keys()
