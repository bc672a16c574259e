"""Bad input is answered with one clear sentence, and the server goes on."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from .models import DEMO as DEMO_FILE
from .models import write_dit
from .prompts import Graph

CASES: list[tuple[Callable[[], Graph], str, tuple[str, ...]]] = []
VARIANCE_FILE, STATISTICS_FILE = "errors_variance.safetensors", "errors_statistics.safetensors"


def bad_input(node: str, *words: str):
    """Registers a graph that `node` must refuse with a sentence that has all the words."""

    def register(build: Callable[[], Graph]):
        CASES.append((build, node, words))
        return build

    return register


@pytest.fixture(scope="module")
def files(server, tiny_dit):
    """Every file that the graphs below name."""
    demo = DEMO_FILE.read_bytes()
    (server.models / "truncated.safetensors").write_bytes(demo[: len(demo) // 2])
    (server.models / "garbage.safetensors").write_bytes(b"<html>404 Not Found</html>" * 100)
    write_dit(server.models / "seven_channels.safetensors", in_channels=7)
    graph = Graph()
    cached = graph.cache(graph.load())
    graph.calibrate(cached, file=STATISTICS_FILE)
    graph.picture(graph.quantize(cached, graph.calibrate(cached, file=STATISTICS_FILE)))
    graph.picture(graph.compensate(cached, graph.load(), file=VARIANCE_FILE))
    server.succeed(graph)
    (server.models / "not_a_dit.safetensors").write_bytes((server.calibrations / STATISTICS_FILE).read_bytes())
    (server.calibrations / "broken.safetensors").write_bytes(b"x" * 64)
    for name, tensors in OTHERS.items():
        save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, server.models / f"{name}.safetensors")


# Names and shapes by which ComfyUI's loaders know these.
FLUX = {
    "double_blocks.0.img_attn.norm.key_norm.scale": (8,), "img_in.weight": (128, 64), "txt_in.weight": (128, 16),
    "vector_in.in_layer.weight": (128, 8), "single_blocks.0.linear1.weight": (8, 8),
}  # fmt: skip
SD3 = {
    "joint_blocks.0.context_block.attn.qkv.weight": (192, 64), "x_embedder.proj.weight": (64, 16, 2, 2),
    "y_embedder.mlp.0.weight": (64, 8), "final_layer.linear.weight": (64, 64), "pos_embed": (1, 16, 64),
}  # fmt: skip
OTHERS = {
    "flux": FLUX,
    "sd3_checkpoint": {f"model.diffusion_model.{k}": v for k, v in SD3.items()}
    | {f"model.diffusion_model.joint_blocks.0.x_block.{i}.weight": (1,) for i in range(4)}
    | {"first_stage_model.decoder.conv_in.weight": (4, 4)},
    "lora": {"diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight": (8, 4)},
}


def sampled(model_name: str = "built-in demo", classes: str = "0-9") -> Graph:
    graph = Graph(classes)
    graph.picture(graph.load(model_name))
    return graph


@bad_input("QandC_Sample", "class id 41", "0 to 39")
def class_out_of_range():
    return sampled(classes="41")


@bad_input("QandC_ClassLabel", "'abc'", "write for example")
def unknown_class_name():
    return sampled(classes="abc")


@bad_input("QandC_ClassLabel", "empty", "write for example")
def no_classes():
    return sampled(classes=" , ")


@bad_input("QandC_Sample", "classes, not text", "Class Label")
def text_prompt():
    graph = Graph()
    text = graph.add("LotusConditioning")
    graph.picture(graph.load(), positive=text, negative=text)
    return graph


@bad_input("QandC_LoadDiT", "absent.safetensors", "models/diffusion_models")
def absent_model():
    return sampled("absent.safetensors")


@bad_input("QandC_LoadDiT", "truncated.safetensors", "truncated or not a safetensors file")
def truncated_model():
    return sampled("truncated.safetensors")


@bad_input("QandC_LoadDiT", "garbage.safetensors", "truncated or not a safetensors file")
def garbage_model():
    return sampled("garbage.safetensors")


@bad_input("QandC_LoadDiT", "not_a_dit.safetensors", "not a DiT")
def other_model():
    return sampled("not_a_dit.safetensors")


@bad_input("QandC_LoadDiT", "flux.safetensors", "not a DiT", "the family Flux", "the stock node Load Diffusion Model.")
def text_model():
    return sampled("flux.safetensors")


@bad_input("QandC_LoadDiT", "sd3_checkpoint.safetensors", "the family SD3", "the stock node Load Checkpoint.")
def whole_checkpoint():
    return sampled("sd3_checkpoint.safetensors")


@bad_input("QandC_LoadDiT", "lora.safetensors", "a LoRA", "the stock node Load LoRA.")
def lora():
    return sampled("lora.safetensors")


@bad_input("QandC_LoadDiT", "7 channels", "4", "3")
def odd_channels():
    return sampled("seven_channels.safetensors")


@bad_input("QandC_LoadDiT", "server.log")
def model_outside_the_folders():
    return sampled("../../server.log")


@bad_input("QandC_ApplyCache", "'every'", "write for example")
def unreadable_steps():
    graph = Graph()
    policy = {"policy": "chosen steps", "policy.computed_steps": "every"}
    graph.picture(graph.add("QandC_ApplyCache", model=graph.load(), order=0, **policy))
    return graph


@bad_input("QandC_Quantize", "another model", "calibrate this model")
def calibration_of_another_model():
    graph = Graph()
    graph.picture(graph.quantize(graph.load(), graph.calibrate(graph.load("tiny.safetensors"))))
    return graph


@bad_input("QandC_TAPCalibrate", "another model", "calibrate this model")
def calibration_file_of_another_model():
    graph = Graph()
    model = graph.load("tiny.safetensors")
    graph.picture(graph.quantize(model, graph.calibrate(model, file=STATISTICS_FILE)))
    return graph


@bad_input("QandC_Quantize", "quantized already", "original file")
def quantized_twice():
    graph = Graph()
    graph.picture(graph.quantize(graph.quantize(graph.load())))
    return graph


@bad_input("QandC_Quantize", "gptq", "hessians")
def gptq_without_hessians():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.quantize(model, graph.calibrate(model, hessians=False), rounding="gptq"))
    return graph


@bad_input("QandC_Quantize", "calibration")
def gptq_without_calibration():
    graph = Graph()
    graph.picture(graph.quantize(graph.load(), rounding="gptq"))
    return graph


@bad_input("QandC_TAPCalibrate", VARIANCE_FILE, "no layer statistics")
def compensation_file_as_calibration():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.quantize(model, graph.calibrate(model, file=VARIANCE_FILE)))
    return graph


@bad_input("QandC_VarianceCompensate", STATISTICS_FILE, "no variance compensation")
def calibration_file_as_compensation():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.compensate(graph.cache(model), model, file=STATISTICS_FILE))
    return graph


@bad_input("QandC_VarianceCompensate", VARIANCE_FILE, "fitted", "another cache", "every 4")
def compensation_of_other_attachments():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.compensate(graph.cache(model, interval=4), model, file=VARIANCE_FILE))
    return graph


@bad_input("QandC_Sample", "fitted", "steps")
def compensation_of_other_steps():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.compensate(graph.cache(model), model), steps=5)
    return graph


@bad_input("QandC_Sample", "fitted", "ddpm", "euler")
def compensation_of_another_sampler():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.compensate(graph.cache(model), model), sampler_name="euler")
    return graph


@bad_input("QandC_TAPCalibrate", "broken.safetensors", "safetensors file")
def broken_calibration():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.quantize(model, graph.calibrate(model, file="broken.safetensors")))
    return graph


@bad_input("QandC_TAPCalibrate", "'../x.safetensors'", "pick one")
def calibration_path():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.quantize(model, graph.calibrate(model, file="../x.safetensors")))
    return graph


@bad_input("QandC_VarianceCompensate", "'/elsewhere/x.safetensors'", "pick one")
def compensation_path():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.compensate(model, model, file="/elsewhere/x.safetensors"))
    return graph


@bad_input("QandC_TAPCalibrate", "elsewhere.safetensors", "connect positive, negative, latent_image")
def absent_calibration_without_wires():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.quantize(model, graph.calibrate(model, wired=False, file="elsewhere.safetensors")))
    return graph


@bad_input("QandC_VarianceCompensate", "elsewhere.safetensors", "connect positive, negative, latent_image")
def absent_compensation_without_wires():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.compensate(model, model, wired=False, file="elsewhere.safetensors"))
    return graph


@bad_input("QandC_TAPCalibrate", "connect positive, negative, latent_image")
def new_calibration_without_wires():
    graph = Graph()
    model = graph.load()
    graph.picture(graph.quantize(model, graph.calibrate(model, wired=False)))
    return graph


def test_bad_input_is_named_in_a_sentence(server, files, subtests):
    for build, node, words in CASES:
        with subtests.test(build.__name__):
            run = server.run(build())
            message = run.message
            assert run.error["node_type"] == node, message
            assert [word for word in words if word not in message] == [], message
            assert "\n" not in message and "Traceback" not in message
            assert len(re.findall(r"[.!?](?=\s|$)", message)) <= 2, message


def test_load_dit_lists_only_files_that_it_reads(server, files, tiny_dit):
    listed = server.object_info("QandC_LoadDiT")["QandC_LoadDiT"]["input"]["required"]["model_name"][1]["options"]
    assert {"built-in demo", tiny_dit, "seven_channels.safetensors"} <= set(listed)
    assert not {f"{name}.safetensors" for name in (*OTHERS, "garbage", "not_a_dit")} & set(listed)


def test_a_size_that_the_model_was_not_trained_for_is_said_at_once(server):
    graph = Graph()
    graph.latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    graph.picture(graph.load())
    start = len(server.log)
    server.succeed(graph)
    assert (
        server.log[start:].count("is for 32 x 32. Set Empty Latent Image to that; it was not trained for 64 x 64") == 1
    )


def test_the_null_class_is_a_class(server):
    assert server.run(sampled(classes="10")).status == "success"


def test_failed_runs_write_no_file(server, files):
    before = sorted(server.calibrations.iterdir())
    for build in (absent_compensation_without_wires, new_calibration_without_wires, broken_calibration):
        assert server.run(build()).error
    assert sorted(server.calibrations.iterdir()) == before
