"""Which files Load DiT lists: told by their tensors' names alone."""

import json
import zipfile

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from qandc_core import quantize_model
from qandc_core.checkpoints import load_dit, save_dit
from qandc_core.checkpoints.quantized import save_quantized
from qandc_core.checkpoints.recognition import may_be_dit
from qandc_core.models import DiT, DiTConfig
from qandc_core.models.sizes import unlike_size

SIZE = DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=10)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return {key: value.detach() for key, value in DiT(SIZE).state_dict().items()}


def quantized(path):
    save_quantized(quantize_model(DiT(SIZE).eval()), path)


def diffusers(path):
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10
    )
    save_file(model.state_dict(), path)


@pytest.mark.parametrize("write", [lambda path: save_dit(DiT(SIZE), path), quantized, diffusers])
def test_files_of_dits_are_recognized(write, tmp_path):
    path = tmp_path / "model.safetensors"
    write(path)
    assert may_be_dit(path)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module.", "ema."])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_recognized_without_being_unpickled(weights, prefix, legacy, tmp_path):
    path = tmp_path / "model.pt"
    content = {f"{prefix}{key}": value for key, value in weights.items()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert may_be_dit(path) and load_dit(path, num_heads=4).config.num_classes == 10


# Flux, SD3 and PixArt in diffusers' names and in ComfyUI's, an upscaler, a LoRA.
OTHERS = (
    "double_blocks.0.img_attn.qkv.weight", "transformer_blocks.0.attn.to_q.weight", "pos_embed.proj.weight",
    "x_embedder.proj.weight", "y_embedder.mlp.0.weight", "y_embedder.y_embedding", "lora_unet_blocks_0.lora_up.weight",
)  # fmt: skip


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_not_listed(name, ending, tmp_path):
    path = tmp_path / f"model.{ending}"
    (save_file if ending == "safetensors" else torch.save)({name: torch.zeros(2, 2)}, path)
    assert not may_be_dit(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, b"\xff" * 64, (2**63).to_bytes(8, "little") + b"{}", b"PK\3\4 no archive", b"PK\5\6" + b"\0" * 18],
)
@pytest.mark.parametrize("ending", ["safetensors", "sft", "pt", "ckpt", "bin", "gguf", "txt", ""])
def test_whatever_else_lies_in_the_folders_is_not_listed(content, ending, tmp_path):
    path = tmp_path / f"file.{ending}"
    path.write_bytes(content)
    assert not may_be_dit(path)
    assert not may_be_dit(tmp_path) and not may_be_dit(tmp_path / "absent.safetensors")


def test_an_archive_that_no_reader_takes_is_not_listed(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"embedding_table.weight")
    assert may_be_dit(path)
    damaged = path.read_bytes().replace(b"embedding_table", b"embedding_tible")
    path.write_bytes(damaged)
    assert not may_be_dit(path)


def test_a_file_that_takes_the_place_of_another_is_looked_at_again(weights, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    assert not may_be_dit(path)
    save_file(weights, path)
    assert may_be_dit(path)


def test_only_the_list_of_tensors_is_read(tmp_path):
    # A header of a sparse file of 1 TiB: reading more than the list would fill the memory.
    path = tmp_path / "model.safetensors"
    header = json.dumps(
        {"y_embedder.embedding_table.weight": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
    )
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(2**40)
    assert may_be_dit(path)


@pytest.mark.parametrize(
    "channels, side, height, width, said",
    [
        (3, 32, 32, 32, None),
        (
            3,
            32,
            512,
            512,
            "is for 32 x 32. Set Empty Latent Image to that; it was not trained for 512 x 512, which takes",
        ),
        (3, 32, 32, 40, "it was not trained for 40 x 32."),
        (4, 32, 32, 32, None),
        (4, 32, 64, 32, "is for 256 x 256. Set Empty Latent Image to that; it was not trained for 256 x 512, which"),
        (4, 64, 32, 32, "it was not trained for 256 x 256."),
    ],
)
def test_a_size_that_the_model_was_not_trained_for_is_said(channels, side, height, width, said):
    sentence = unlike_size(DiTConfig(input_size=side, in_channels=channels), height, width)
    assert said in sentence if said else sentence == ""
