"""Tiny configurations of ComfyUI's model families: the keys of comfy.model_detection, small numbers."""

from __future__ import annotations

import torch

WIDTH, HEADS, TOKENS, TEXT = 64, 2, 7, 48  # of most of the models below; a head has 32 channels


def flux(**changes) -> dict:
    return {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": 40, "context_in_dim": TEXT, "hidden_size": WIDTH,
        "mlp_ratio": 2.0, "num_heads": HEADS, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12],
        "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
        **changes,
    }  # fmt: skip


def flux2() -> dict:
    return flux(
        image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, axes_dim=[8, 8, 8, 8], theta=2000,
        patch_size=1, qkv_bias=False, global_modulation=True, mlp_silu_act=True, ops_bias=False, txt_ids_dims=[3],
    )  # fmt: skip


def chroma(**changes) -> dict:
    channels = {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": WIDTH, "hidden_dim": 32, "n_layers": 1}
    config = flux(image_model="chroma", vec_in_dim=None, **channels)
    del config["guidance_embed"]
    return {**config, **changes}


def radiance() -> dict:
    from comfy.ldm.chroma_radiance.model import ChromaRadianceParams

    newer = {"use_sequential_txt_ids"} & ChromaRadianceParams.__dataclass_fields__.keys()
    return chroma(
        image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=16,
        nerf_mlp_ratio=2, nerf_depth=1, nerf_max_freqs=4, nerf_tile_size=512, nerf_final_head_type="conv",
        nerf_embedder_dtype=torch.float32, use_x0=False, **dict.fromkeys(newer, False),
    )  # fmt: skip


def sd35() -> dict:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": WIDTH}}
    return {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 1, "num_blocks": 2, "input_size": None,
        "adm_in_channels": 40, "context_embedder_config": embedder, "num_patches": 64, "pos_embed_max_size": 8,
        "qk_norm": "rms", "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [0],
    }  # fmt: skip


def auraflow() -> dict:
    return {
        "max_seq": 64, "cond_seq_dim": TEXT, "n_double_layers": 2, "n_layers": 4, "dim": WIDTH, "n_heads": HEADS,
        "global_conddim": WIDTH,
    }  # fmt: skip


def hunyuan_video(**changes) -> dict:
    return {
        "image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16,
        "vec_in_dim": 40, "axes_dim": [8, 12, 12], "meanflow": False, "context_in_dim": TEXT, "hidden_size": WIDTH,
        "mlp_ratio": 2.0, "num_heads": HEADS, "depth": 2, "depth_single_blocks": 2, "theta": 256, "qkv_bias": True,
        "byt5": False, "guidance_embed": True, "use_cond_type_embedding": False, "vision_in_dim": None,
        "meanflow_sum": False, **changes,
    }  # fmt: skip


def hunyuan_dit() -> dict:
    return {
        "image_model": "hydit1", "depth": 2, "hidden_size": WIDTH, "num_heads": HEADS, "text_states_dim": TEXT,
        "text_states_dim_t5": TEXT, "text_len": TOKENS, "text_len_t5": TOKENS, "size_cond": True,
        "use_style_cond": True,
    }  # fmt: skip


def pixart(sigma: bool) -> dict:
    return {
        "image_model": "pixart_sigma" if sigma else "pixart_alpha", "micro_condition": not sigma, "num_heads": HEADS,
        "patch_size": 2, "hidden_size": 96, "in_channels": 4, "depth": 2, "model_max_length": TOKENS,
        "input_size": 8, "pe_interpolation": 1, "caption_channels": TEXT,
    }  # fmt: skip


def mochi() -> dict:
    return {
        "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": HEADS, "hidden_size_x": WIDTH,
        "hidden_size_y": 32, "mlp_ratio_x": 12288 / WIDTH, "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12,
        "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
        "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False,
        "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": TEXT, "t5_token_length": TOKENS,
        "rope_theta": 10000.0,
    }  # fmt: skip


def ltxv(**changes) -> dict:
    return {
        "image_model": "ltxv", "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": HEADS,
        "cross_attention_dim": WIDTH, "caption_channels": TEXT, **changes,
    }  # fmt: skip


def ltxav() -> dict:
    return ltxv(
        image_model="ltxav", audio_in_channels=128, audio_cross_attention_dim=32, audio_attention_head_dim=16,
        audio_num_attention_heads=HEADS, connector_attention_head_dim=32, connector_num_attention_heads=HEADS,
        audio_connector_attention_head_dim=16, audio_connector_num_attention_heads=HEADS, connector_num_layers=1,
    )  # fmt: skip


def wan(**changes) -> dict:
    return {
        "image_model": "wan2.1", "model_type": "t2v", "dim": WIDTH, "out_dim": 16, "num_heads": HEADS, "ffn_dim": 96,
        "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 32, "window_size": (-1, -1), "qk_norm": True,
        "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "text_dim": TEXT, "text_len": TOKENS, **changes,
    }  # fmt: skip


def qwen_image() -> dict:
    return {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": HEADS, "joint_attention_dim": TEXT, "axes_dims_rope": (8, 12, 12),
    }  # fmt: skip


def lumina(**changes) -> dict:
    return {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": WIDTH, "cap_feat_dim": TEXT,
        "n_layers": 2, "n_refiner_layers": 1, "qk_norm": True, "n_heads": HEADS, "n_kv_heads": 1,
        "axes_dims": [8, 12, 12], "axes_lens": [64, 64, 64], "rope_theta": 10000.0, "ffn_dim_multiplier": 1.0,
        "multiple_of": 32, **changes,
    }  # fmt: skip


def z_image() -> dict:
    return lumina(
        dim=256,
        n_heads=8,
        n_kv_heads=8,
        rope_theta=256.0,
        z_image_modulation=True,
        time_scale=1000.0,
        pad_tokens_multiple=32,
    )


def hidream() -> dict:
    return {
        "image_model": "hidream", "attention_head_dim": 32, "axes_dims_rope": [16, 8, 8],
        "caption_channels": [TEXT, TEXT], "max_resolution": [16, 16], "in_channels": 16, "llama_layers": [0, 1, 0, 1],
        "num_attention_heads": HEADS, "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 2,
        "num_single_layers": 2, "out_channels": 16, "patch_size": 2, "text_emb_dim": 40,
    }  # fmt: skip


def cosmos_predict2(**changes) -> dict:
    return {
        "image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
        "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": WIDTH,
        "concat_padding_mask": True, "crossattn_emb_channels": TEXT, "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
        "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 2, "num_heads": HEADS,
        "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0, "rope_enable_fps_modulation": False, **changes,
    }  # fmt: skip


def cogvideox() -> dict:
    return {
        "image_model": "cogvideox", "num_attention_heads": HEADS, "attention_head_dim": 32, "time_embed_dim": 32,
        "num_layers": 2, "in_channels": 16, "patch_size": 2, "text_embed_dim": TEXT, "max_text_seq_length": TOKENS,
        "sample_width": 8, "sample_height": 8, "sample_frames": 9, "use_learned_positional_embeddings": False,
        "use_rotary_positional_embeddings": True,
    }  # fmt: skip


def kandinsky5(**changes) -> dict:
    return {
        "image_model": "kandinsky5", "model_dim": WIDTH, "axes_dims": (8, 12, 12), "time_dim": 32, "ff_dim": 96,
        "visual_embed_dim": 132, "num_text_blocks": 1, "num_visual_blocks": 2, "in_text_dim": TEXT,
        "in_text_dim2": 40, **changes,
    }  # fmt: skip


def stable_audio() -> dict:
    return {
        "audio_model": "dit1.0", "global_cond_dim": 1536, "project_cond_tokens": True, "embed_dim": WIDTH,
        "num_heads": 1, "io_channels": 64, "input_concat_dim": 0, "depth": 2,
    }  # fmt: skip


def seconds(*names: str, **kind) -> dict:
    """The conditioners of the checkpoint for the length, which the model class loads strictly."""
    from comfy.ldm.audio.embedders import NumberConditioner

    generator, found = torch.Generator().manual_seed(3), {}
    for name in names:
        tensors = NumberConditioner(768, min_val=0, max_val=512, **kind).state_dict()
        found |= {
            f"conditioner.conditioners.{name}.{key}": torch.randn(tensor.shape, generator=generator)
            for key, tensor in tensors.items()
        }
    return found


def ace_step() -> dict:
    return {
        "audio_model": "ace", "attention_head_dim": 32, "in_channels": 8, "inner_dim": WIDTH, "max_height": 16,
        "max_position": 256, "max_width": 256, "mlp_ratio": 2.0, "num_attention_heads": HEADS, "num_layers": 2,
        "out_channels": 8, "patch_size": [16, 1], "rope_theta": 1000000.0, "speaker_embedding_dim": 512,
        "text_embedding_dim": TEXT, "ssl_encoder_depths": [8, 8], "ssl_latent_dims": [16, 16],
        "ssl_names": ["mert", "m-hubert"], "lyric_encoder_vocab_size": 32, "lyric_hidden_size": WIDTH,
    }  # fmt: skip


def omnigen2() -> dict:
    return {
        "image_model": "omnigen2", "axes_dim_rope": [8, 12, 12], "axes_lens": [64, 64, 64],
        "ffn_dim_multiplier": None, "hidden_size": WIDTH, "in_channels": 16, "multiple_of": 32, "norm_eps": 1e-5,
        "num_attention_heads": HEADS, "num_kv_heads": 1, "num_layers": 2, "num_refiner_layers": 1,
        "out_channels": None, "patch_size": 2, "text_feat_dim": TEXT, "timestep_scale": 1000.0,
    }  # fmt: skip


def unet(**changes) -> dict:
    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": (1, 2), "use_spatial_transformer": True, "transformer_depth": [0, 1],
        "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1, "context_dim": TEXT,
        "use_linear_in_transformer": False, "use_temporal_attention": False, "legacy": False, **changes,
    }  # fmt: skip


def sdxl() -> dict:
    return unet(model_channels=64, use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=2816)


def ernie() -> dict:
    return {
        "image_model": "ernie", "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_layers": 2,
        "ffn_hidden_size": 96, "text_in_dim": TEXT, "rope_axes_dim": (8, 12, 12),
    }  # fmt: skip


def krea2() -> dict:
    return {
        "image_model": "krea2", "features": WIDTH, "channels": 16, "patch": 2, "layers": 2, "heads": HEADS,
        "kvheads": 1, "multiplier": 2, "txtlayers": 2, "txtdim": TEXT, "txtheads": HEADS, "txtkvheads": HEADS,
    }  # fmt: skip


def lens() -> dict:
    return {
        "image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 2, "num_attention_heads": HEADS,
        "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "enc_hidden_dim": TEXT,
        "multi_layer_encoder_feature": False, "selected_layer_index": (0,),
    }  # fmt: skip


def mage_flow() -> dict:
    return {
        "image_model": "mage_flow", "in_channels": 128, "num_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": HEADS, "joint_attention_dim": TEXT, "axes_dims_rope": (8, 12, 12),
    }  # fmt: skip


def joyimage() -> dict:
    return {
        "image_model": "joyimage", "hidden_size": HEADS * 128, "num_attention_heads": HEADS, "text_dim": TEXT,
        "mlp_width_ratio": 1.0, "num_layers": 2,
    }  # fmt: skip


def stable_audio3() -> dict:
    return {
        **stable_audio(), "global_cond_dim": 768, "num_memory_tokens": 4, "io_channels": 256,
        "timestep_features_type": "expo", "local_add_cond_dim": 257, "global_cond_shared_embed": True,
        "global_cond_type": "adaLN", "attn_kwargs": {"qk_norm": "rms", "differential": False},
        "norm_type": "rms_norm",
    }  # fmt: skip


def minimax_h3() -> dict:
    return {
        "image_model": "minimax_h3", "num_layers": 2, "token_refiner_num_layers": 1, "hidden_size": WIDTH,
        "latents_dim": 24, "audio_latents_dim": 32, "attention_head_dim": 32, "num_attention_heads": HEADS,
        "ffn_hidden_size": 96, "text_dim": TEXT, "timestep_input_dim": 32, "time_embed_hidden_size": 32,
        "time_embed_dim": 32, "rope_inv_freq_len": 4,
    }  # fmt: skip


def cosmos1() -> dict:
    config = cosmos_predict2(
        image_model="cosmos", model_channels=96, block_config="FA-CA-MLP", block_x_format="THWBD",
        affline_emb_norm=True, pos_emb_learnable=False, extra_per_block_abs_pos_emb=True,
        extra_per_block_abs_pos_emb_type="learnable",
    )  # fmt: skip
    return {key: value for key, value in config.items() if "fps" not in key}


def pixeldit() -> dict:
    return {
        "image_model": "pixeldit_t2i", "num_groups": HEADS, "hidden_size": WIDTH, "pixel_hidden_size": 16,
        "pixel_attn_hidden_size": 32, "pixel_num_groups": HEADS, "patch_depth": 2, "pixel_depth": 2,
        "txt_embed_dim": TEXT,
    }  # fmt: skip


def hunyuan3d() -> dict:
    return {
        "image_model": "hunyuan3d2", "in_channels": 16, "context_in_dim": TEXT, "hidden_size": WIDTH,
        "mlp_ratio": 2.0, "num_heads": HEADS, "depth": 2, "depth_single_blocks": 2, "qkv_bias": True,
        "guidance_embed": False,
    }  # fmt: skip


def hunyuan3d_21() -> dict:
    return {
        "image_model": "hunyuan3d2_1", "in_channels": 16, "context_dim": TEXT, "hidden_size": WIDTH,
        "mlp_ratio": 2.0, "num_heads": HEADS, "depth": 4, "qkv_bias": False, "guidance_cond_proj_dim": None,
    }  # fmt: skip


def ideogram4() -> dict:
    return {
        "image_model": "ideogram4", "in_channels": 128, "num_layers": 2, "num_attention_heads": HEADS,
        "attention_head_dim": 32, "intermediate_size": 96, "adaln_dim": 32, "llm_features_dim": TEXT,
        "mrope_section": (8, 4, 4),
    }  # fmt: skip
