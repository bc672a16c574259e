"""Which tests run in one process, where several share the work (pytest -n 2), and how hypothesis runs in CI."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath

import pytest
from hypothesis import settings

# The same examples at every run of CI: what hypothesis finds anew should not fail a change that has no part in it.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Tests of these files share a ComfyUI server.
SERVED = {"test_errors", "test_files", "test_loading", "test_official_templates", "test_running", "test_workflows"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return ByServer(config, log)


def group(nodeid: str) -> str:
    """Tests of one file, of one version of ComfyUI where they have several, so that each is started once."""
    path, _, test = nodeid.partition("::")
    version, name = re.search(r"\[(\d+\.\d+\.\d+)", test), PurePosixPath(path).stem
    return f"{'server' if name in SERVED else path} {version[1] if version else ''}"
