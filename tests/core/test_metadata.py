"""Metadata among the tensors, as ComfyUI's ModelSave leaves it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from qandc_core import DiT, DiTConfig, load_dit, quantize_model
from qandc_core.checkpoints.dit import dit_metadata
from qandc_core.checkpoints.quantized import is_quantized, quantized_metadata
from qandc_core.files import METADATA_KEY, metadata_tensor, pop_metadata, read_metadata_tensor
from qandc_core.models.dit import initialize_weights
from qandc_core.quantization.model import quantized_layers

CONFIG = DiTConfig(input_size=8, hidden_size=40, depth=1, num_heads=5, num_classes=3, prediction="sample")


def random_dit(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    model = DiT(config)
    initialize_weights(model)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def saved_by_comfyui(model: DiT, metadata: dict[str, str], path):
    tensors = {**model.state_dict(), METADATA_KEY: metadata_tensor(metadata)}
    save_file({f"model.diffusion_model.{key}": value.contiguous() for key, value in tensors.items()}, path)
    return path


def prediction(model: DiT):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x, torch.tensor([3, 900]), torch.tensor([0, 3]))


def test_bytes_come_back():
    metadata = {"qandc": '{"a": "\u4e2d"}', "prediction": "sample"}
    assert read_metadata_tensor(metadata_tensor(metadata)) == metadata


def test_it_is_found_under_any_prefix_and_taken_out():
    tensors = {f"model.diffusion_model.{METADATA_KEY}": metadata_tensor({"a": "b"}), "x": torch.zeros(1)}
    assert pop_metadata(tensors) == {"a": "b"} and list(tensors) == ["x"]
    assert pop_metadata(tensors) == {}


@pytest.mark.parametrize("tensor", [torch.tensor([123, 200], dtype=torch.uint8), metadata_tensor({})[:1]])
def test_damaged_bytes_are_named(tensor):
    with pytest.raises(ValueError, match="damaged"):
        read_metadata_tensor(tensor)


def test_a_list_is_not_metadata():
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_metadata_tensor(torch.tensor(list(b"[]"), dtype=torch.uint8))


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_a_dit_keeps_what_its_tensors_do_not_tell(tmp_path, kind):
    model = random_dit(replace(CONFIG, prediction=kind))
    loaded = load_dit(saved_by_comfyui(model, dit_metadata(model.config), tmp_path / "dit.safetensors"))
    assert loaded.config == model.config
    assert torch.equal(prediction(loaded), prediction(model))


def test_a_quantized_dit_comes_back_whole(tmp_path):
    model = random_dit(CONFIG)
    quantize_model(model, 8, 8)
    path = saved_by_comfyui(model, quantized_metadata(model), tmp_path / "w8a8.safetensors")
    assert is_quantized(path)
    loaded = load_dit(path)
    assert quantized_layers(loaded).keys() == quantized_layers(model).keys()
    assert torch.equal(prediction(loaded), prediction(model))
