from __future__ import annotations

from collections.abc import Iterator

import pytest

from .checkouts import parameters
from .models import write_dit
from .server import Server


@pytest.fixture(scope="session", params=parameters())
def server(request, tmp_path_factory) -> Iterator[Server]:
    """One ComfyUI for all tests of a version; tests share it as a user's sessions do."""
    with Server(request.param, tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module", params=parameters(old=True))
def old_server(request, tmp_path_factory) -> Iterator[Server]:
    """A ComfyUI below the oldest supported one."""
    with Server(request.param, tmp_path_factory.mktemp("comfyui"), must_start=False) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_dit(server) -> str:
    """Name of a DiT file that is not the demo."""
    write_dit(server.models / "tiny.safetensors")
    return "tiny.safetensors"
