from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from .checkouts import Checkout, is_wanted_in_full, parameters
from .inside_programs import install_pack, run_program
from .models import write_dit
from .server import Server

LONG = {"families", "cache_matrix", "cache_runs", "cache_compile", "sample_node", "topology_checks"}


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


@pytest.fixture(scope="module", params=parameters())
def checkout(request) -> Checkout:
    return request.param


@pytest.fixture(scope="module")
def run(checkout, tmp_path_factory) -> Iterator[Callable[[str], dict]]:
    """Runs a program of inside/ in ComfyUI's own Python, once, and gives what it found."""
    base = tmp_path_factory.mktemp("inside")
    install_pack(base)
    found = cache(lambda name: run_program(checkout, name, base))

    def result(name: str) -> dict:
        if name in LONG and not is_wanted_in_full(checkout):
            pytest.skip("long: on the newest and the oldest version, or where QANDC_COMFYUI_VERSIONS names it")
        return found(name)

    yield result
    shutil.rmtree(base, ignore_errors=True)
