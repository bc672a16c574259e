from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def formats_of_the_cpu() -> None:
    """These tests run on the CPU, whose kernels take widths that comfy-kitchen's CUDA kernels refuse."""
    if find_spec("comfy_kitchen") and torch.cuda.is_available():
        import comfy_kitchen

        comfy_kitchen.disable_backend("cuda")


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """Threads gain nothing on tiny shapes, and sums do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
