"""Apply Cache on ComfyUI's own model classes: what a run reuses, and that it is what it says."""

from __future__ import annotations

import ast
from itertools import product

import pytest

from .families_table import REUSE, TABLE, error, listed
from .inside_programs import PROGRAMS

# Families on which the cache is known to fail, and why.
KNOWN: dict[str, str] = {}
# Skip connections between blocks, or no blocks of one shape, or the batch not in a stream's first dimension.
WITHOUT_BLOCKS = {"UNetModel", "HunYuanDiT", "HunYuanDiTPlain", "GeneralDIT"}


def families() -> list[str]:
    """The keys of FAMILIES, read from its source: importing it needs ComfyUI's folders on the path."""
    tree = ast.parse((PROGRAMS / "family_list.py").read_text(encoding="utf-8"))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "FAMILIES")
    return [key.value for key in table.keys]


def on(found: dict, family: str) -> dict:
    """What the program found on one family."""
    result = found[family]
    if "absent" in result:
        assert "comfy.supported_models" in result["absent"]
        pytest.skip(result["absent"])
    if family in KNOWN:
        pytest.xfail(KNOWN[family])
    assert "failed" not in result, result["failed"]
    return result


def test_apply_cache_on_every_family(run, subtests):
    found = run("families")
    for name, reuse in product(families(), REUSE):
        with subtests.test(f"{name}, {reuse}"):
            family = on(found, name)
            result, used = family["kinds"][reuse], f"{reuse}, as chosen"
            if reuse == "blocks" and family["network"] in WITHOUT_BLOCKS:
                used = f"whole prediction, because the blocks of {family['network']} are not known"
            assert (result["reuse"], result["computed"], result["reused"]) == (used, 2, 4)
            plain, cached = result["calls"]
            assert cached * 3 == plain > 0
            assert result["never reused"] is True and result["clean"] is True
            assert error(result) < 1e-4 < 1e-2 < result["effect"]


def test_a_cache_that_is_off_changes_nothing_on_any_family(run, subtests):
    found = run("families")
    for name in families():
        with subtests.test(name):
            family = on(found, name)
            assert family["interval 1"] is True and family["no error"] is True


def test_every_list_of_blocks_is_longer_than_one(run, subtests):
    found = run("families")
    for name in families():
        with subtests.test(name):
            assert all(length > 1 for length in on(found, name)["lists"].values())


def test_at_least_twenty_families_are_there(run, checkout):
    present = [found for found in run("families").values() if "kinds" in found]
    assert len(present) >= (30 if checkout.version >= (0, 29) else 20)


def test_the_committed_table_lists_the_families_of_the_program():
    assert listed(TABLE.read_text(encoding="utf-8")) == families()
