"""Our nodes in every way that official templates sample, against the same done by hand."""

from __future__ import annotations

import ast
from itertools import product

from .inside_programs import PROGRAMS
from .workflows_table import CELLS, TABLE, problems


def topologies() -> list[str]:
    """The keys of TOPOLOGIES, read from its source: importing it needs ComfyUI's folders on the path."""
    tree = ast.parse((PROGRAMS / "topologies.py").read_text(encoding="utf-8"))
    (table,) = (n.value for n in tree.body if isinstance(n, ast.AnnAssign) and n.target.id == "TOPOLOGIES")
    return [key.value for key in table.keys]


def test_every_node_in_every_topology(run, subtests):
    found = run("topology_checks")
    for name, column in product(topologies(), CELLS):
        with subtests.test(f"{name}, {column}"):
            cell = {**found[name], **found[name].get(column, {})}
            if "absent" in cell:
                assert cell["absent"].startswith("this ComfyUI has no")
                continue
            assert problems(column, found[name][column]) == []


def test_the_newest_comfyui_has_all_topologies(run, checkout):
    absent = [name for name, found in run("topology_checks").items() if "absent" in found]
    assert not absent or checkout.version < (0, 33)


def test_the_committed_table_has_a_row_for_each():
    rows = [row.split("|")[1].strip() for row in TABLE.read_text(encoding="utf-8").splitlines() if row.startswith("|")]
    assert rows[2 : 2 + len(topologies())] == topologies()
