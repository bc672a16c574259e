"""quantize_model on diffusers' transformers of other families, and what becomes of their save_pretrained."""

import copy

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from qandc_core import quantize_model
from qandc_core.quantization.model import quantized_layers

pytestmark = pytest.mark.usefixtures("no_grad")


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 6, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.5, 0.2]),
        "img_ids": torch.randn(16, 3), "txt_ids": torch.randn(6, 3), "guidance": torch.tensor([3.5, 3.5]),
    }  # fmt: skip


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 6, 32),
        "pooled_projections": torch.randn(2, 64), "timestep": torch.tensor([5, 800]),
    }  # fmt: skip


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([5, 800]),
        "encoder_hidden_states": torch.randn(2, 8, 32),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 2, 8, 8), "timestep": torch.tensor([5, 800]),
        "encoder_hidden_states": torch.randn(2, 12, 16),
    }  # fmt: skip


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=8, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=8,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 2, 4, 8, 8), "timestep": torch.tensor([5, 800]),
        "encoder_hidden_states": torch.randn(2, 8, 8),
    }  # fmt: skip


FAMILIES = pytest.mark.parametrize("make", [flux, sd3, pixart, wan, cogvideox])


def made(make, dtype=torch.float32):
    torch.manual_seed(0)
    model, inputs = make()
    inputs = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    return model.to(dtype).eval(), inputs


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_transformer_predicts_nearly_the_same(make, dtype):
    model, inputs = made(make, dtype)
    exact = model(**inputs).sample.float()
    assert quantize_model(model, 8, 8) is model
    assert len(quantized_layers(model)) > 10
    found = model(**inputs).sample
    assert found.dtype == dtype
    assert 0 < (found.float() - exact).norm() < 0.1 * exact.norm()


@FAMILIES
def test_a_refusal_changes_nothing(make):
    model, inputs = made(make)
    name, linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)][-1]
    exact = model(**inputs).sample
    linear.weight = torch.nn.Parameter(linear.weight.char(), requires_grad=False)
    with pytest.raises(ValueError, match=f"^The weight of {name} is .* of torch.int8"):
        quantize_model(model, 8, 8)
    assert not quantized_layers(model) and "save_pretrained" not in vars(model)
    linear.weight = torch.nn.Parameter(torch.full_like(linear.weight, float("nan"), dtype=torch.float32))
    with pytest.raises(ValueError, match="not finite"):
        quantize_model(model, 8, 8)
    assert not quantized_layers(model) and exact.isfinite().all()


@FAMILIES
def test_saving_refuses_what_would_come_back_random(make, tmp_path):
    model, _ = made(make)
    model.save_pretrained(tmp_path / "whole")
    for quantized in (quantize_model(model, 8, 8), copy.deepcopy(model)):
        with pytest.raises(ValueError, match="^from_pretrained cannot read a quantized model back; save it before"):
            quantized.save_pretrained(tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()
    again, _ = make()  # from_pretrained of Wan needs accelerate
    again.load_state_dict(load_file(tmp_path / "whole" / "diffusion_pytorch_model.safetensors"))
    quantize_model(again.eval(), 8, 8)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_pipeline_refuses_too(tmp_path):
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10
    )
    pipeline = diffusers.DiTPipeline(model, None, diffusers.DDIMScheduler())
    quantize_model(model, 8, 8, ["pos_embed", "norm"])
    with pytest.raises(ValueError, match="cannot read a quantized model back"):
        pipeline.save_pretrained(tmp_path / "pipeline")
