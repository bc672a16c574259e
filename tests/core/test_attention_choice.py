"""The choice of an attention kernel, with kernels and times made up: there is one kernel on a CPU."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from qandc_core.fused import attention

CUDNN, FLASH, EFFICIENT = attention.FUSED
SIZES = (2, 2, 8, 4, torch.float32, torch.device("cpu"))


@pytest.fixture
def choose(monkeypatch):
    """The choice when kernels take the given milliseconds, and answer as `answers` says: an error, or an offset."""
    current = []

    class Chosen:
        def __init__(self, backend):
            self.backend = backend

        def __enter__(self):
            current.append(self.backend)

        def __exit__(self, *_):
            current.pop()

    plain = torch.nn.functional.scaled_dot_product_attention

    def choose(milliseconds, answers):
        def attend(*qkv):
            if answers.get(current[-1]) == "refuses":
                raise RuntimeError("No available kernel.")
            return plain(*qkv) + answers.get(current[-1], 0.0)

        monkeypatch.setattr(attention, "sdpa_kernel", Chosen)
        monkeypatch.setattr(attention.F, "scaled_dot_product_attention", attend)
        monkeypatch.setattr(attention, "elapsed", lambda qkv: milliseconds[current[-1]])
        return attention.measured_attention.__wrapped__(*SIZES)

    return choose


def test_the_fastest_is_chosen(choose):
    assert choose({CUDNN: 2.0, FLASH: 1.0, EFFICIENT: 3.0}, {}) == FLASH


def test_one_that_disagrees_or_refuses_is_not(choose):
    times = {CUDNN: 1.0, FLASH: 2.0, EFFICIENT: 3.0}
    assert choose(times, {CUDNN: "refuses"}) == FLASH
    assert choose(times, {CUDNN: 0.5, FLASH: float("nan")}) == EFFICIENT


def test_the_plain_formula_is_the_last_resort(choose):
    assert choose({}, dict.fromkeys(attention.FUSED, "refuses")) == SDPBackend.MATH


def test_nothing_is_chosen_on_a_cpu(monkeypatch):
    monkeypatch.setattr(attention, "measured_attention", None)
    with attention.fastest_attention(2, 2, 8, 4, torch.zeros(1)):
        pass
