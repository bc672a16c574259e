"""The shipped workflows, and those of 0.1.0, run on a real server, made short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .models import write_dit, write_vae
from .prompts import DEMO
from .server import ROOT, Server

API = sorted(ROOT.glob("workflows/api/*.json"))
FIRST_RELEASE = sorted(Path(__file__).parent.glob("first_release/*.json"))  # saved graphs stay valid for ever
LIMITS = {"steps": 4, "trajectories": 4, "samples": 16, "clusters": 4, "pairs": 4, "batch_size": 2, "shown": 2}


def shortened(prompt: dict) -> dict:
    """The prompt with little to sample: the same nodes and wires, seconds instead of minutes."""
    for node in prompt.values():
        limits = {"value": 4} if node["class_type"] == "PrimitiveInt" else LIMITS
        for name, value in node["inputs"].items():
            if name in limits and isinstance(value, int):
                node["inputs"][name] = min(value, limits[name])
    return prompt


def provide_models(server: Server, prompt: dict) -> None:
    """Stand-ins with random weights under the names that the workflow has for downloads.

    A VAE of a file means a latent model of 4 channels, pixel_space one of 3. Loaders of any other kind get nothing:
    ComfyUI then refuses the prompt and the test fails.
    """
    vaes = [node["inputs"]["vae_name"] for node in prompt.values() if node["class_type"] == "VAELoader"]
    for name in vaes:
        if name != "pixel_space":
            write_vae(server.checkout, server.base / "models" / "vae" / name)
    channels = 3 if set(vaes) <= {"pixel_space"} else 4
    for node in prompt.values():
        name = node["inputs"].get("model_name")
        if node["class_type"] == "QandC_LoadDiT" and name != DEMO:
            write_dit(server.models / name, channels, num_classes=1000)


def check_runnable(server: Server, prompt: dict) -> None:
    """Skips what this ComfyUI cannot run, or what needs a text encoder of several gigabytes."""
    if any(node["class_type"] == "CLIPTextEncode" for node in prompt.values()):
        pytest.skip("needs a text encoder; tests/browser opens it, test_stock_templates.py runs the stock models")
    if server.checkout.version < (0, 27) and any(node["inputs"].get("method") == "native" for node in prompt.values()):
        pytest.skip("this ComfyUI is older than 0.27, which has W8A8")


@pytest.mark.parametrize("path", [*API, *FIRST_RELEASE], ids=lambda path: f"{path.parent.name} {path.stem}")
def test_workflow_runs(server, path: Path):
    prompt = shortened(json.loads(path.read_text(encoding="utf-8")))
    check_runnable(server, prompt)
    provide_models(server, prompt)
    run = server.succeed(prompt)
    assert run.executed | set(run.cached) == set(prompt)
    assert run.outputs
