"""Apply Cache on ComfyUI's own model classes: what a run reuses, and that it is what it says."""

from __future__ import annotations

import ast

import pytest

from .families_table import TABLE, listed
from .inside_programs import PROGRAMS

# Families on which the cache is known to fail, and why.
KNOWN: dict[str, str] = {}


def families() -> list[str]:
    """The keys of FAMILIES, read from its source: importing it needs ComfyUI's folders on the path."""
    tree = ast.parse((PROGRAMS / "family_list.py").read_text(encoding="utf-8"))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "FAMILIES")
    return [key.value for key in table.keys]


@pytest.mark.parametrize("family", families())
def test_apply_cache_on(run, family):
    found = run("families")[family]
    if "absent" in found:
        assert "comfy.supported_models" in found["absent"]
        pytest.skip(found["absent"])
    if family in KNOWN:
        pytest.xfail(KNOWN[family])
    assert "failed" not in found, found["failed"]
    assert (found["tier"], found["computed"], found["reused"]) == ("output", 2, 4)
    plain, cached = found["calls"]
    assert cached * 3 == plain > 0
    assert found["interval 1"] is True and found["clean"] is True
    assert found["error"] < 1e-4 < 1e-2 < found["effect"]


def test_at_least_twenty_families_are_there(run, checkout):
    present = [found for found in run("families").values() if "error" in found]
    assert len(present) >= (30 if checkout.version >= (0, 29) else 20)


def test_the_committed_table_lists_the_families_of_the_program():
    assert listed(TABLE.read_text(encoding="utf-8")) == families()
