"""Which tests must run in one process, where several share the work (pytest -n 2 --dist loadgroup)."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


def group(item: pytest.Item) -> str:
    """Those of one server, or of one file and one ComfyUI, so that each is started once."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    versions = [parameters[name].name for name in ("server", "checkout", "old_server") if parameters.get(name)]
    shared = "server" in parameters and item.path.parent.name == "comfyui"
    return " ".join(["server" if shared else item.path.stem, *versions])
