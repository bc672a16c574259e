"""Apply Cache on ComfyUI's own model classes: what a run reuses, and that it is what it says."""

from __future__ import annotations

import ast

import pytest

from .families_table import TABLE, TIERS, error, listed
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


@pytest.fixture
def family(run, request):
    """What the program found on one family."""
    found = run("families")[request.param]
    if "absent" in found:
        assert "comfy.supported_models" in found["absent"]
        pytest.skip(found["absent"])
    if request.param in KNOWN:
        pytest.xfail(KNOWN[request.param])
    assert "failed" not in found, found["failed"]
    return found


@pytest.mark.parametrize("family", families(), indirect=True)
@pytest.mark.parametrize("tier", TIERS)
def test_apply_cache_on(family, tier):
    found, used = family["tiers"][tier], f"{tier}, as chosen"
    if tier == "blocks" and family["network"] in WITHOUT_BLOCKS:
        used = f"whole prediction, because the blocks of {family['network']} are not known"
    assert (found["tier"], found["computed"], found["reused"]) == (used, 2, 4)
    plain, cached = found["calls"]
    assert cached * 3 == plain > 0
    assert found["never reused"] is True and found["clean"] is True
    assert error(found) < 1e-4 < 1e-2 < found["effect"]


@pytest.mark.parametrize("family", families(), indirect=True)
def test_a_cache_that_is_off_changes_nothing_on(family):
    assert family["interval 1"] is True and family["no error"] is True


@pytest.mark.parametrize("family", families(), indirect=True)
def test_every_list_of_blocks_is_longer_than_one(family):
    assert all(length > 1 for length in family["lists"].values())


def test_at_least_twenty_families_are_there(run, checkout):
    present = [found for found in run("families").values() if "tiers" in found]
    assert len(present) >= (30 if checkout.version >= (0, 29) else 20)


def test_the_committed_table_lists_the_families_of_the_program():
    assert listed(TABLE.read_text(encoding="utf-8")) == families()
