"""The quick start of the reference re-implementation, on a diffusers pipeline with random weights."""

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from qandc_core import apply_cache_to_dit, quantize_model, remove_cache, reset_all_caches
from qandc_core.caching.attach import feature_cache
from qandc_core.quantization.model import quantized_layers


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=28, sample_size=8, out_channels=8,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, seed=0, steps=4):
    generator = torch.Generator().manual_seed(seed)
    return pipe([207], num_inference_steps=steps, guidance_scale=4.0, generator=generator, output_type="np").images


def test_quick_start(pipe):
    # fmt: off
    pipe.transformer = quantize_model(pipe.transformer, w_bits=8, a_bits=8,
                                      skip_patterns=["pos_embed", "norm"])
    apply_cache_to_dit(pipe.transformer, cache_interval=5)
    reset_all_caches(pipe.transformer)
    output = pipe(class_labels=[207], num_inference_steps=50, guidance_scale=4.0)
    # fmt: on
    assert len(quantized_layers(pipe.transformer)) == 170
    assert output.images[0].size == (8, 8) and np.asarray(output.images[0]).std() > 1
    computed = feature_cache(pipe.transformer).run.computed
    assert computed == [step % 5 == 0 for step in range(50)]
    again = images(pipe)
    assert np.isfinite(again).all() and again.std() > 0.01


def test_reset_and_remove_restore(pipe):
    model = quantize_model(pipe.transformer, w_bits=8, a_bits=8, skip_patterns=["pos_embed", "norm"])
    uncached = images(pipe, steps=7)
    apply_cache_to_dit(model, cache_interval=5)
    cached = images(pipe, steps=7)
    assert not np.array_equal(cached, uncached)
    assert np.array_equal(images(pipe, steps=7), cached)  # a new run starts by itself
    assert feature_cache(model).num_bytes > 0
    reset_all_caches(model)
    assert feature_cache(model).num_bytes == 0 and feature_cache(model).run.computed == []
    assert np.array_equal(images(pipe, steps=7), cached)
    remove_cache(model)
    assert feature_cache(model) is None
    assert np.array_equal(images(pipe, steps=7), uncached)


def test_int8_is_close_to_full_precision(pipe):
    plain, exact, other = copy.deepcopy(pipe.transformer), images(pipe), images(pipe, seed=1)
    quantize_model(pipe.transformer, w_bits=8, a_bits=8, skip_patterns=["pos_embed", "norm"])
    rounded = images(pipe)
    assert 0 < np.abs(rounded - exact).mean() < 0.25 * np.abs(other - exact).mean()
    assert np.corrcoef(rounded.ravel(), exact.ravel())[0, 1] > 0.95
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([999, 600, 300, 0]), torch.tensor([0, 207, 999, 1000])
    with torch.no_grad():
        error = pipe.transformer(x, t, y).sample - plain(x, t, y).sample
        assert float(error.norm()) < 0.05 * float(plain(x, t, y).sample.norm())
    pipe.transformer = plain
    assert np.array_equal(images(pipe), exact)
