"""A ComfyUI that is too old says so once and works without the nodes."""

from __future__ import annotations

import pytest

from .server import FOLDER


def test_an_old_comfyui_is_named_in_one_line(old_server):
    lines = [line for line in old_server.startup_log.splitlines() if "Q&C needs ComfyUI 0.18.1 or newer" in line]
    assert len(lines) == 1
    assert old_server.checkout.name in lines[0]


def test_nothing_of_ours_ends_in_a_traceback(old_server):
    assert not [line for line in old_server.startup_log.splitlines() if "File" in line and FOLDER in line]


def test_core_nodes_load_and_ours_do_not(old_server):
    if not old_server.running:
        reason = old_server.log.strip().splitlines()[-1]
        pytest.skip(f"ComfyUI {old_server.checkout.name} itself does not start with this Python: {reason}")
    nodes = old_server.object_info()
    assert {"KSampler", "VAEDecode", "EmptyLatentImage"} <= set(nodes)
    assert not [name for name in nodes if name.startswith("QandC_")]
