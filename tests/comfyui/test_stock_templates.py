"""The templates of stock models in full on a server: their nodes, their loaders, tiny files of the real classes.

Prompts come without a text encoder, and what is saved is the latent. Where detection fixes a width, as SDXL's of 320
channels, it is shown that width and a narrower network is built: inside/stock_models.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from .checkouts import parameters
from .client import Run
from .inside_programs import PROGRAMS
from .server import ROOT, Server

FAMILIES = {
    "2 Flux.1 dev": "Flux",
    "3 Qwen-Image": "Qwen-Image",
    "4 Z-Image": "Z-Image",
    "5 SDXL": "SDXL",
    "6 Wan 2.2, two experts": "Wan 2.1",
    "7 LTX-Video": "LTXV",
}
# The noise that a random network predicts is none: where predictions are of noise, each step is a large one.
CHANGE = {"5 SDXL": 1.0}
LIMITS = {"width": 64, "height": 64, "length": 9, "steps": 12, "start_at_step": 6}
QUANTIZED = "9 Quantize Wan 2.1"
LITTLE = {"trajectories": 2, "samples": 16, "clusters": 4}
LOADERS = {"UNETLoader": "unet_name", "CheckpointLoaderSimple": "ckpt_name"}
LEFT_OUT = ("CLIPLoader", "DualCLIPLoader", "VAELoader", "VAEDecode", "CreateVideo", "SaveVideo", "SaveImage")
WRITE = """
import sys
programs, comfyui, folder, *names = sys.argv[1:]
sys.path[:0], sys.argv = [programs, comfyui], ["main.py", "--cpu"]
import comfy.options
import safetensors.torch
comfy.options.enable_args_parsing()
import stock_models
for name in names:
    safetensors.torch.save_file(stock_models.checkpoint(name), f"{folder}/{name}.safetensors")
"""


@pytest.fixture(scope="module", params=parameters()[:1])
def server(request, tmp_path_factory) -> Iterator[Server]:
    """The newest ComfyUI with tiny models and the pack of prompts."""
    running = Server(request.param, tmp_path_factory.mktemp("stock"))
    shutil.copytree(Path(__file__).with_name("tiny_text"), running.base / "custom_nodes" / "tiny_text")
    command = [
        running.checkout.python, "-c", WRITE, str(PROGRAMS), str(running.checkout.path), str(running.models),
        *set(FAMILIES.values()),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    for name, family in {**FAMILIES, QUANTIZED: "Wan 2.1"}.items():
        for file in model_files(template(name)):
            shutil.copy(running.models / f"{family}.safetensors", running.models / file)
    os.environ["QANDC_TINY"] = str(PROGRAMS)
    try:
        with running:
            yield running
    finally:
        del os.environ["QANDC_TINY"]


def template(name: str) -> dict:
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))


def model_files(prompt: dict) -> list[str]:
    loaders = [node for node in prompt.values() if node["class_type"] in LOADERS]
    return [node["inputs"][LOADERS[node["class_type"]]] for node in loaders]


def small(prompt: dict, family: str, limits: dict[str, int] = LIMITS) -> dict:
    """The prompt with small sizes, prompts of TinyText, and the last sampler's latent saved."""
    found = {}
    for key, node in prompt.items():
        inputs = {name: min(value, limits[name]) if name in limits and isinstance(value, int) else value
                  for name, value in node["inputs"].items()}  # fmt: skip
        kind = node["class_type"]
        if kind == "CLIPTextEncode":
            kind, inputs = "TinyText", {"text": inputs["text"], "family": family}
        elif kind in LOADERS:
            kind, inputs = "UNETLoader", {"unet_name": inputs[LOADERS[kind]], "weight_dtype": "default"}
        if inputs.get("end_at_step") == 10:
            inputs["end_at_step"] = LIMITS["start_at_step"]
        if kind == "VAEDecode":
            found["latent"] = {
                "class_type": "SaveLatent", "inputs": {"samples": inputs["samples"], "filename_prefix": "latent"}
            }  # fmt: skip
        if kind not in LEFT_OUT:
            found[key] = {"class_type": kind, "inputs": inputs}
    return found


def bypassed(prompt: dict) -> dict:
    """What Ctrl+B on every Apply Cache makes of it."""
    caches = {key: node["inputs"]["model"] for key, node in prompt.items() if node["class_type"] == "QandC_ApplyCache"}

    def source(value):
        return caches.get(value[0], value) if isinstance(value, list) else value

    return {
        key: {**node, "inputs": {name: source(value) for name, value in node["inputs"].items()}}
        for key, node in prompt.items()
        if key not in caches
    }


def sampled(server: Server, prompt: dict) -> tuple[Run, torch.Tensor]:
    run = server.succeed(prompt)
    assert run.executed | set(run.cached) == set(prompt)
    (place,) = run.outputs["latent"]["latents"]
    file = server.base / place["type"] / place["subfolder"] / place["filename"]
    return run, safetensors.torch.load_file(file)["latent_tensor"]


@pytest.mark.parametrize("name", FAMILIES)
def test_template_runs_in_full(server, name):
    prompt = small(template(name), FAMILIES[name])
    (run, cached), (_, full) = sampled(server, prompt), sampled(server, bypassed(prompt))
    for key, node in prompt.items():
        if node["class_type"] == "QandC_ApplyCache":
            computed, steps = map(int, re.match(r"(\d+) of (\d+) steps computed", run.texts[key]).groups())
            assert steps == (LIMITS["start_at_step"] if "two experts" in name else LIMITS["steps"])
            assert 0.4 * steps <= computed <= 0.6 * steps
    assert cached.isfinite().all() and full.std() > 0
    assert 1e-4 < float((cached - full).norm() / full.norm()) < CHANGE.get(name, 0.5)


def test_a_stock_model_is_calibrated_quantized_compared_and_saved(server):
    """The template in full, its frames shown by TinyDecode; what it saved then samples what the quantized model did."""
    whole = template(QUANTIZED)
    prompt = small(whole, "Wan 2.1", {**LIMITS, **LITTLE})
    for key, node in whole.items():
        if node["class_type"] == "VAEDecode":
            prompt[key] = {"class_type": "TinyDecode", "inputs": {"samples": node["inputs"]["samples"]}}
    of = {node["class_type"]: key for key, node in prompt.items()}
    fast = next(k for k, node in prompt.items() if node["inputs"].get("model") == [of["QandC_Quantize"], 0]
                and node["class_type"] == "QandC_Sample")  # fmt: skip
    prompt["latent"]["inputs"]["samples"] = [fast, 0]
    run, quantized = sampled(server, prompt)
    assert re.search(r"\d+ W8A8 layers", run.texts[of["QandC_Quantize"]])
    assert run.outputs[of["QandC_Compare"]]["images"]
    (saved,) = (server.base / "output" / "diffusion_models").glob("wan2.1_t2v_1.3B_w8a8*.safetensors")
    loader = {"class_type": "UNETLoader", "inputs": {"unet_name": saved.name, "weight_dtype": "default"}}
    needed = {key: prompt[key] for key in (of["TinyText"], of["EmptyHunyuanLatentVideo"], fast, "latent")}
    for key, node in prompt.items():
        if node["class_type"] == "TinyText":
            needed[key] = node
    needed["saved"], needed[of["ModelSamplingSD3"]] = loader, prompt[of["ModelSamplingSD3"]]
    needed[of["ModelSamplingSD3"]]["inputs"]["model"] = ["saved", 0]
    needed[fast]["inputs"]["model"] = [of["ModelSamplingSD3"], 0]
    _, loaded = sampled(server, needed)
    assert torch.equal(loaded, quantized)
