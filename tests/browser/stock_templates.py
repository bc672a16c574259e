"""Templates of stock models: the official graph, all of it but the model in a subgraph, and Apply Cache between.

Models, settings and files are those of ComfyUI's own templates (package comfyui-workflow-templates-json, MIT).
"""

from __future__ import annotations

from typing import Any

from tests.browser.templates import Node, Promoted, Subgraph, Template, node, note

HUGGING_FACE = "https://huggingface.co/Comfy-Org"
BYPASS = "Select Apply Cache and press **Ctrl+B** to compare: it is then bypassed, and every step is computed."
NEGATIVE = "blurry, low quality, distorted"


def intro(title: str, text: str, files: list[dict[str, str]]) -> Node:
    listed = "\n".join(f"- models/{file['directory']}/[{file['name']}]({file['url']})" for file in files)
    return note(f"## {title}\n\n{text}\n\n{BYPASS}\n\nFiles:\n\n{listed}", 420, 400)


def file(repository: str, directory: str, name: str, folder: str = "split_files/") -> dict[str, str]:
    url = f"{HUGGING_FACE}/{repository}/resolve/main/{folder}{directory + '/' if folder else ''}{name}"
    return {"name": name, "url": url, "directory": directory}


def stock(
    name: str, title: str, text: str, models: dict[str, dict[str, str]], nodes: dict[str, Node],
    inside: list[str], promoted: list[Promoted], result: str, speedup: float, loaders: list[str] | None = None,
) -> Template:  # fmt: skip
    """`loaders` stay outside, each with an Apply Cache behind it, which `nodes` knows as cache, cache_2."""
    loaders = loaders or ["load"]
    caches = ["cache", "cache_2"][: len(loaders)]
    experts = {"shift": "high noise", "shift_2": "low noise"} if len(loaders) > 1 else {}
    if nodes["negative"]["type"] == "CLIPTextEncode":
        promoted = [promoted[0], ("negative", "text", "negative prompt"), *promoted[1:]]
    beside = nodes[loaders[0]]["type"] == "CheckpointLoaderSimple"  # its other wires go past, above Apply Cache
    given = {
        cache: {
            **node("QandC_ApplyCache", {"model": (loader, 0)}, policy="speedup", **{"policy.speedup": speedup}),
            "down": 120 * beside,
        }
        for cache, loader in zip(caches, loaders)
    }
    every = {"note": intro(title, text, list(models.values())), **given, **nodes}
    return Template(
        name, every, [["note"], loaders, caches, ["subgraph"], [result]], [],
        models, runs_here=False, subgraphs=(Subgraph(title, inside, promoted, inputs=experts),),
    )  # fmt: skip


def texts(prompt: str, clip: tuple[str, int] = ("clip", 0)) -> dict[str, Node]:
    return {
        "positive": node("CLIPTextEncode", {"clip": clip}, "Prompt", text=prompt),
        "negative": node("CLIPTextEncode", {"clip": clip}, "Negative prompt", text=NEGATIVE),
    }


def ksampler(model: str, negative: str = "negative", **settings: Any) -> Node:
    return node(
        "KSampler",
        {"model": (model, 0), "positive": ("positive", 0), "negative": (negative, 0), "latent_image": ("latent", 0)},
        **settings,
    )


def image(prefix: str) -> dict[str, Node]:
    return {
        "decode": node("VAEDecode", {"samples": ("sampler", 0), "vae": ("vae", 0)}),
        "save": {**node("SaveImage", {"images": ("decode", 0)}, filename_prefix=prefix), "size": [400, 420]},
    }


def video(prefix: str, vae: tuple[str, int], fps: int) -> dict[str, Node]:
    return {
        "decode": node("VAEDecode", {"samples": ("sampler", 0), "vae": vae}),
        "video": node("CreateVideo", {"images": ("decode", 0)}, fps=fps),
        "save": {**node("SaveVideo", {"video": ("video", 0)}, filename_prefix=prefix), "size": [400, 420]},
    }


FACES = [
    ("positive", "text", "prompt"),
    ("latent", "width"),
    ("latent", "height"),
    ("sampler", "seed"),
    ("sampler", "steps"),
]
EVERY_OTHER = "**Apply Cache** computes about every other step and extrapolates the rest: about twice as fast."

FLUX_FILES = {
    "load": {
        "name": "flux1-dev.safetensors", "directory": "diffusion_models",
        "url": f"{HUGGING_FACE}/flux1-dev/resolve/main/flux1-dev.safetensors",
    },
    "clip": {
        "name": "clip_l.safetensors", "directory": "text_encoders",
        "url": "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors",
    },
    "clip_2": {
        "name": "t5xxl_fp16.safetensors", "directory": "text_encoders",
        "url": "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
    },
    "vae": {
        "name": "ae.safetensors", "directory": "vae",
        "url": f"{HUGGING_FACE}/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
    },
}  # fmt: skip
FLUX = stock(
    "2 Flux.1 dev", "Text to image, Flux.1 dev", EVERY_OTHER, FLUX_FILES,
    {
        "load": node("UNETLoader", unet_name="flux1-dev.safetensors"),
        "clip": node(
            "DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux"
        ),
        "vae": node("VAELoader", vae_name="ae.safetensors"),
        "positive": node(
            "CLIPTextEncode", {"clip": ("clip", 0)}, "Prompt", text="a lighthouse in a storm, oil painting"
        ),
        "guidance": node("FluxGuidance", {"conditioning": ("positive", 0)}, guidance=3.5),
        "negative": node("ConditioningZeroOut", {"conditioning": ("positive", 0)}),
        "latent": node("EmptySD3LatentImage", width=1024, height=1024),
        "sampler": node(
            "KSampler",
            {
                "model": ("cache", 0), "positive": ("guidance", 0), "negative": ("negative", 0),
                "latent_image": ("latent", 0),
            },
            seed=1, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple",
        ),
        **image("flux"),
    },
    ["clip", "vae", "positive", "guidance", "negative", "latent", "sampler", "decode"], FACES, "save", 2.0,
)  # fmt: skip

QWEN_FILES = {
    "load": file("Qwen-Image_ComfyUI", "diffusion_models", "qwen_image_fp8_e4m3fn.safetensors"),
    "clip": file("Qwen-Image_ComfyUI", "text_encoders", "qwen_2.5_vl_7b_fp8_scaled.safetensors"),
    "vae": file("Qwen-Image_ComfyUI", "vae", "qwen_image_vae.safetensors"),
}
QWEN = stock(
    "3 Qwen-Image", "Text to image, Qwen-Image", EVERY_OTHER, QWEN_FILES,
    {
        "load": node("UNETLoader", unet_name=QWEN_FILES["load"]["name"]),
        "clip": node("CLIPLoader", clip_name=QWEN_FILES["clip"]["name"], type="qwen_image"),
        "vae": node("VAELoader", vae_name=QWEN_FILES["vae"]["name"]),
        "shift": node("ModelSamplingAuraFlow", {"model": ("cache", 0)}, shift=3.1),
        **texts('a shop window at dusk, a neon sign says "OPEN LATE"'),
        "latent": node("EmptySD3LatentImage", width=1328, height=1328),
        "sampler": ksampler("shift", seed=1, steps=20, cfg=4.0, sampler_name="euler", scheduler="simple"),
        **image("qwen_image"),
    },
    ["clip", "vae", "shift", "positive", "negative", "latent", "sampler", "decode"], FACES, "save", 2.0,
)  # fmt: skip

Z_FILES = {
    "load": file("z_image", "diffusion_models", "z_image_bf16.safetensors"),
    "clip": file("z_image_turbo", "text_encoders", "qwen_3_4b.safetensors"),
    "vae": file("z_image_turbo", "vae", "ae.safetensors"),
}
Z_IMAGE = stock(
    "4 Z-Image", "Text to image, Z-Image", EVERY_OTHER, Z_FILES,
    {
        "load": node("UNETLoader", unet_name=Z_FILES["load"]["name"]),
        "clip": node("CLIPLoader", clip_name=Z_FILES["clip"]["name"], type="lumina2"),
        "vae": node("VAELoader", vae_name=Z_FILES["vae"]["name"]),
        "shift": node("ModelSamplingAuraFlow", {"model": ("cache", 0)}, shift=3.0),
        **texts("a portrait by a window, soft light, 35 mm film"),
        "latent": node("EmptySD3LatentImage", width=1024, height=1024),
        "sampler": ksampler("shift", seed=1, steps=25, cfg=4.0, sampler_name="res_multistep", scheduler="simple"),
        **image("z_image"),
    },
    ["clip", "vae", "shift", "positive", "negative", "latent", "sampler", "decode"], FACES, "save", 2.0,
)  # fmt: skip

SDXL_FILES = {
    "load": {
        "name": "sd_xl_base_1.0.safetensors", "directory": "checkpoints",
        "url": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    },
}  # fmt: skip
SDXL = stock(
    "5 SDXL", "Text to image, SDXL", EVERY_OTHER, SDXL_FILES,
    {
        "load": node("CheckpointLoaderSimple", ckpt_name=SDXL_FILES["load"]["name"]),
        **texts("a paper boat on a puddle, macro photograph, rain", ("load", 1)),
        "latent": node("EmptyLatentImage", width=1024, height=1024),
        "sampler": ksampler("cache", seed=1, steps=25, cfg=7.0, sampler_name="dpmpp_2m", scheduler="karras"),
        "decode": node("VAEDecode", {"samples": ("sampler", 0), "vae": ("load", 2)}),
        "save": {**node("SaveImage", {"images": ("decode", 0)}, filename_prefix="sdxl"), "size": [400, 420]},
    },
    ["positive", "negative", "latent", "sampler", "decode"], FACES, "save", 2.0,
)  # fmt: skip

WAN_FILES = {
    "load": file("Wan_2.2_ComfyUI_Repackaged", "diffusion_models", "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"),
    "load_2": file("Wan_2.2_ComfyUI_Repackaged", "diffusion_models", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"),
    "clip": file("Wan_2.1_ComfyUI_repackaged", "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    "vae": file("Wan_2.2_ComfyUI_Repackaged", "vae", "wan_2.1_vae.safetensors"),
}


def expert(model: str, latent: str, first: bool) -> Node:
    return node(
        "KSamplerAdvanced",
        {"model": (model, 0), "positive": ("positive", 0), "negative": ("negative", 0), "latent_image": (latent, 0)},
        "High noise" if first else "Low noise", add_noise="enable" if first else "disable", noise_seed=1, steps=20,
        cfg=3.5, sampler_name="euler", scheduler="simple", start_at_step=0 if first else 10,
        end_at_step=10 if first else 10000, return_with_leftover_noise="enable" if first else "disable",
    )  # fmt: skip


WAN = stock(
    "6 Wan 2.2, two experts", "Text to video, Wan 2.2 14B",
    "Each expert has an **Apply Cache** of its own, before its half of the steps: about twice as fast.", WAN_FILES,
    {
        "load": node("UNETLoader", None, "High noise", unet_name=WAN_FILES["load"]["name"]),
        "load_2": node("UNETLoader", None, "Low noise", unet_name=WAN_FILES["load_2"]["name"]),
        "clip": node("CLIPLoader", clip_name=WAN_FILES["clip"]["name"], type="wan"),
        "vae": node("VAELoader", vae_name=WAN_FILES["vae"]["name"]),
        "shift": node("ModelSamplingSD3", {"model": ("cache", 0)}, shift=8.0),
        "shift_2": node("ModelSamplingSD3", {"model": ("cache_2", 0)}, shift=8.0),
        **texts("a fox runs through fresh snow, morning light"),
        "latent": node("EmptyHunyuanLatentVideo", width=640, height=640, length=81),
        "first": expert("shift", "latent", True),
        "sampler": expert("shift_2", "first", False),
        **video("video/wan2.2", ("vae", 0), 16),
    },
    [
        "clip", "vae", "shift", "shift_2", "positive", "negative", "latent", "first", "sampler", "decode", "video",
    ],
    [
        ("positive", "text", "prompt"), ("latent", "width"), ("latent", "height"), ("latent", "length"),
        ("first", "noise_seed"),
    ],
    "save", 2.0, ["load", "load_2"],
)  # fmt: skip

LTX_FILES = {
    "load": {
        "name": "ltx-video-2b-v0.9.5.safetensors", "directory": "checkpoints",
        "url": "https://huggingface.co/Lightricks/LTX-Video/resolve/main/ltx-video-2b-v0.9.5.safetensors",
    },
    "clip": {
        "name": "t5xxl_fp16.safetensors", "directory": "text_encoders",
        "url": "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
    },
}  # fmt: skip
LTX = stock(
    "7 LTX-Video", "Text to video, LTX-Video", EVERY_OTHER, LTX_FILES,
    {
        "load": node("CheckpointLoaderSimple", ckpt_name=LTX_FILES["load"]["name"]),
        "clip": node("CLIPLoader", clip_name=LTX_FILES["clip"]["name"], type="ltxv"),
        **texts("waves roll onto a black sand beach under a low sun, slow drone shot"),
        "rate": node("LTXVConditioning", {"positive": ("positive", 0), "negative": ("negative", 0)}, frame_rate=25),
        "latent": node("EmptyLTXVLatentVideo", width=768, height=512, length=97),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("LTXVScheduler", {"latent": ("latent", 0)}, steps=30),
        "sampler": node(
            "SamplerCustom",
            {
                "model": ("cache", 0), "positive": ("rate", 0), "negative": ("rate", 1), "sampler": ("euler", 0),
                "sigmas": ("sigmas", 0), "latent_image": ("latent", 0),
            },
            noise_seed=1, cfg=3.0,
        ),
        **video("video/ltx", ("load", 2), 25),
    },
    ["clip", "positive", "negative", "rate", "latent", "euler", "sigmas", "sampler", "decode", "video"],
    [
        ("positive", "text", "prompt"), ("latent", "width"), ("latent", "height"), ("latent", "length"),
        ("sampler", "noise_seed"), ("sigmas", "steps"),
    ],
    "save", 2.0,
)  # fmt: skip

STOCK = [FLUX, QWEN, Z_IMAGE, SDXL, WAN, LTX]


def blueprint(name: str, nodes: dict[str, Node], promoted: list[Promoted]) -> Template:
    """A subgraph for the node library, from MODEL to MODEL: what stands between a loader and a sampler."""
    first, last = list(nodes)[0], list(nodes)[-1]
    nodes[first]["inputs"] = {"model": ("load", 0)}
    between = {"load": node("UNETLoader"), **nodes, "sampler": node("KSampler", {"model": (last, 0)})}
    return Template(
        name,
        between,
        [["subgraph"]],
        [],
        runs_here=False,
        subgraphs=(Subgraph(name, list(nodes), promoted, alone=True),),
    )


BLUEPRINTS = [
    blueprint("Speed up", {"cache": node("QandC_ApplyCache", policy="speedup")}, [("cache", "policy.speedup")]),
    blueprint(
        "Speed up, 8 bits",
        {
            "quantize": node("QandC_Quantize", format="W8A8"),
            "cache": node("QandC_ApplyCache", {"model": ("quantize", 0)}, policy="speedup"),
        },
        [("cache", "policy.speedup"), ("quantize", "format")],
    ),
]
