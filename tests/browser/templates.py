"""The templates that ship with the pack, as nodes in columns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

BLUE, GREEN, VIOLET = "#3f789e", "#4a8a5a", "#7a5a9e"
Node = dict[str, Any]


@dataclass(frozen=True)
class Subgraph:
    """`members` become one node; `promoted` are their widgets, of a node and a name, that it shows.

    `alone`: the other nodes only say what comes in and goes out, and are taken off again. `down` and `size` are as of
    other nodes.
    """

    title: str
    members: list[str]
    promoted: list[tuple[str, str]]
    alone: bool = False
    key: str = "subgraph"
    down: int = 0
    size: tuple[int, int] = (400, 0)


@dataclass(frozen=True)
class Template:
    """`columns` lists node keys from left to right, top to bottom, those of subgraphs among them.

    A node that is `down` begins lower, so that wires pass above it. `models` says where the files of loaders come from.
    """

    name: str
    nodes: dict[str, Node]
    columns: list[list[str]]
    groups: list[dict[str, Any]]
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    runs_here: bool = True
    subgraphs: tuple[Subgraph, ...] = ()

    def spec(self) -> dict[str, Any]:
        inner = [asdict(subgraph) for subgraph in self.subgraphs]
        return {"nodes": self.nodes, "columns": self.columns, "groups": self.groups, "subgraphs": inner}

    def files(self) -> list[tuple[str, str]]:
        return [(model["directory"], model["name"]) for model in self.models.values()]


def node(type: str, inputs: dict[str, tuple[str, int]] | None = None, title: str = "", /, **widgets: Any) -> Node:
    return {"type": type, "inputs": inputs or {}, "title": title, "widgets": widgets}


def note(text: str, height: int = 240, width: int = 380) -> Node:
    return {"type": "MarkdownNote", "widgets": {"": text}, "size": [width, height]}


def group(title: str, color: str, *members: str) -> dict[str, Any]:
    return {"title": title, "color": color, "members": list(members)}


def wires(model: tuple[str, int], **more: tuple[str, int]) -> dict[str, tuple[str, int]]:
    """Model, conditioning and latent, which calibrating, compensating and sampling all take."""
    return {
        "model": model, "positive": ("label", 0), "negative": ("label", 1), "latent_image": ("latent", 0), **more
    }  # fmt: skip


def sources(model: str, classes: str, side: int, batch: int, vae: str) -> dict[str, Node]:
    return {
        "load": node("QandC_LoadDiT", model_name=model),
        "label": node("QandC_ClassLabel", classes=classes),
        "latent": node("EmptyLatentImage", width=side, height=side, batch_size=batch),
        "vae": node("VAELoader", vae_name=vae),
    }


# What the paper caches: attention and MLP outputs, held for two steps of three.
PAPER = {"policy": "interval", "policy.interval": 3, "order": 0, "reuse": "attention and MLP"}


def chain(
    settings: dict[str, Any], calibration: dict[str, Any], pairs: int, cache: dict[str, Any] = PAPER
) -> dict[str, Node]:
    """Apply Cache -> TAP Calibrate -> Quantize -> Variance Compensate."""
    return {
        "cache": node("QandC_ApplyCache", {"model": ("load", 0)}, **cache),
        "calibrate": node("QandC_TAPCalibrate", wires(("cache", 0)), **settings, **calibration),
        "quantize": node("QandC_Quantize", {"model": ("cache", 0), "calibration": ("calibrate", 0)}, method="paper"),
        "compensate": node(
            "QandC_VarianceCompensate", wires(("quantize", 0), reference=("load", 0)), pairs=pairs, **settings
        ),
    }


def decoded(key: str) -> Node:
    return {**node("VAEDecode", {"samples": (f"sample_{key}", 0), "vae": ("vae", 0)}), "size": [220, 0]}


def sampled(runs: dict[str, tuple[tuple[str, int], str, dict[str, Any]]], repeats: int = 0) -> dict[str, Node]:
    """A Sample and a VAE Decode for every run, and the Compare of all, which samples them `repeats` times again."""
    nodes, inputs = {}, {}
    for i, (key, (model, label, settings)) in enumerate(runs.items()):
        nodes[f"sample_{key}"] = node("QandC_Sample", wires(model), f"Sample: {label}", label=label, **settings)
        nodes[f"decode_{key}"] = decoded(key)
        inputs |= {f"images.image{i}": (f"decode_{key}", 0)}
    for i, key in enumerate(runs):
        inputs |= {f"reports.report{i}": (f"sample_{key}", 1)}
    nodes["compare"] = {**node("QandC_Compare", inputs, repeats=repeats), "size": [860, 440 + 180 * len(runs)]}
    return nodes


def down(nodes: dict[str, Node], **pixels: int) -> dict[str, Node]:
    return {key: {**spec, "down": pixels.get(key, 0)} for key, spec in nodes.items()}


# The wires of what is sampled pass above the column of calibrating, those of the reports above the decoders.
BELOW_WIRES = {"decode_full": 690}
SAMPLED = ["sample_full", "sample_fast", "vae"]


DEMO = {"steps": 50, "cfg": 1.5, "sampler_name": "ddpm", "scheduler": "normal"}
SMOOTH = {**DEMO, "sampler_name": "ddim"}  # adds no noise, so that predictions can be forecast
XL = {"steps": 50, "cfg": 4.0, "sampler_name": "ddpm", "scheduler": "normal"}
CALIBRATION = {"trajectories": 32, "samples": 400}
SOURCES = ("load", "label", "latent", "vae")
DEMO_SOURCES = sources("built-in demo", "0-9", 32, 10, "pixel_space")

CHAIN = Subgraph(
    "Calibrate, quantize, compensate", ["calibrate", "quantize", "compensate"],
    [("calibrate", "trajectories"), ("quantize", "format"), ("compensate", "pairs")], down=720, size=(320, 0),
)  # fmt: skip
CHAIN_COLUMNS = [
    ["note"], ["load", "label", "latent"], ["cache"], ["subgraph"], SAMPLED, ["decode_full", "decode_fast"],
    ["compare"],
]  # fmt: skip
CHAIN_GROUPS = [
    group("Model and classes", BLUE, "load", "label", "latent"),
    group("Cached, quantized, compensated", GREEN, "cache", "subgraph"),
    group("The same noise, twice", VIOLET, "sample_full", "sample_fast"),
]
QUICKSTART = Template(
    "1 Quickstart",
    {
        "note": note(
            "## Q&C quickstart\n\nPress **Run**. Nothing is downloaded: the demo model draws the digits 0 to 9.\n\n"
            "1. **Apply Cache** computes one step in three and forecasts the others.\n"
            "2. In the subgraph **TAP Calibrate** samples with the cache on and notes what every layer sees, "
            "**Quantize** turns the layers into 8-bit integers, and **Variance Compensate** corrects the drift "
            "of both.\n"
            "3. Both models sample the same noise, and **Compare** measures.\n\n"
            "Run again with another seed: calibration is kept, only sampling runs.",
            340, 340,
        ),
        **down(
            {
                **DEMO_SOURCES,
                **chain(SMOOTH, CALIBRATION, 64, {"policy": "speedup", "policy.speedup": 3.0}),
                **sampled({
                    "full": (("load", 0), "full precision", SMOOTH),
                    "fast": (("compensate", 0), "Q&C", SMOOTH),
                }, repeats=2),
            },
            cache=900, **BELOW_WIRES,
        ),
    },
    CHAIN_COLUMNS, CHAIN_GROUPS, subgraphs=(CHAIN,),
)  # fmt: skip

SIX = ("full", "quantized", "cached", "both", "fast", "fewer")
ABLATION = Template(
    "Paper, ablation",
    {
        "note": note(
            "## What each part does\n\nSix runs from the same noise: full precision, quantized only, cached only, both "
            "together without and with variance compensation, and full precision with as many steps as the cached runs "
            "compute.\n\nThe parts and the runs are in the two subgraphs. Times are measured on this machine.",
            300, 340,
        ),
        **DEMO_SOURCES,
        **chain(DEMO, CALIBRATION, 64),
        "quantize_only": node(
            "QandC_Quantize", {"model": ("load", 0), "calibration": ("calibrate", 0)}, "Quantize, no cache",
            method="paper",
        ),
        **sampled({
            "full": (("load", 0), "full precision", DEMO),
            "quantized": (("quantize_only", 0), "quantized only", DEMO),
            "cached": (("cache", 0), "cached only", DEMO),
            "both": (("quantize", 0), "quantized and cached", DEMO),
            "fast": (("compensate", 0), "Q&C, all parts", DEMO),
            "fewer": (("load", 0), "full precision, 17 steps", {**DEMO, "steps": 17}),
        }),
    },
    [["note"], ["load", "label", "latent", "vae"], ["subgraph"], ["runs"], ["compare"]],
    [
        group("Model and classes", BLUE, *SOURCES),
        group("The parts, and six runs from the same noise", GREEN, "subgraph", "runs"),
    ],
    subgraphs=(
        Subgraph(
            "The parts", ["cache", "calibrate", "quantize", "compensate", "quantize_only"],
            [("cache", "policy.interval"), ("calibrate", "trajectories"), ("quantize", "format")], down=620,
            size=(320, 0),
        ),
        Subgraph(
            "Six runs", [f"{part}_{run}" for part in ("sample", "decode") for run in SIX], [], key="runs",
            size=(320, 0),
        ),
    ),
)  # fmt: skip

XL_FILE, VAE_FILE = "DiT-XL-2-256x256-fp16.safetensors", "vae-ft-mse-840000-ema-pruned.safetensors"
DIT_XL = Template(
    "Paper, DiT-XL 256",
    {
        "note": note(
            "## DiT-XL/2, 256 x 256, ImageNet\n\nNeeds two files; the frontend offers to download them:\n\n"
            f"- models/diffusion_models/{XL_FILE}\n- models/vae/{VAE_FILE}\n\n"
            "The weights are CC BY-NC 4.0: not for commercial use. A file of the original repository (.pt) or of "
            "diffusers works as well. Class Label takes ImageNet names: *golden retriever, otter, balloon*.",
            340, 340,
        ),
        **down(
            {
                **sources(XL_FILE, "207, 360, 387, 974, 88, 979, 417, 279", 256, 8, VAE_FILE),
                **chain(XL, {"trajectories": 16, "samples": 200, "batch_size": 8}, 16),
                **sampled({
                    "full": (("load", 0), "full precision", XL),
                    "fast": (("compensate", 0), "Q&C", XL),
                }),
            },
            cache=900, **BELOW_WIRES,
        ),
        "save": node("SaveImage", {"images": ("decode_fast", 0)}, filename_prefix="qandc/dit_xl2"),
    },
    [*CHAIN_COLUMNS[:-1], ["compare", "save"]],
    CHAIN_GROUPS,
    {
        "QandC_LoadDiT": {
            "name": XL_FILE,
            "url": f"https://huggingface.co/city96/DiT/resolve/main/{XL_FILE}",
            "directory": "diffusion_models",
        },
        "VAELoader": {
            "name": VAE_FILE,
            "url": f"https://huggingface.co/stabilityai/sd-vae-ft-mse-original/resolve/main/{VAE_FILE}",
            "directory": "vae",
        },
    },
    runs_here=False,
    subgraphs=(CHAIN,),
)  # fmt: skip

QUANTIZE = Template(
    "8 Quantize your model",
    {
        "note": note(
            "## Quantize your model\n\nSamples the model, chooses weights by what every layer then sees, and saves "
            "the quantized model with the stock node **ModelSave**.\n\nThe file lands in output/diffusion_models. "
            "Press **R**, and **Load DiT** lists it. In place of Load DiT any loader and any model may stand; see the "
            "template 9 Quantize Wan 2.1. Then ComfyUI's own loader loads the file, with or without this pack.\n\n"
            "Quantize shows the error of every layer and of the whole model. **Apply Cache** goes behind it, or "
            "before it and TAP Calibrate.",
            420, 340,
        ),
        **down(
            {
                **DEMO_SOURCES,
                "calibrate": node("QandC_TAPCalibrate", wires(("load", 0)), **SMOOTH, **CALIBRATION),
                "quantize": node("QandC_Quantize", {"model": ("load", 0), "calibration": ("calibrate", 0)}),
                "save": node("ModelSave", {"model": ("quantize", 0)}, filename_prefix="diffusion_models/digits_w8a8"),
                **sampled({
                    "full": (("load", 0), "full precision", SMOOTH),
                    "fast": (("quantize", 0), "quantized", SMOOTH),
                }),
            },
            calibrate=810, quantize=720, **BELOW_WIRES,
        ),
    },
    [
        ["note"], ["load", "label", "latent"], ["calibrate"], ["quantize"], [*SAMPLED, "save"],
        ["decode_full", "decode_fast"], ["compare"],
    ],
    [
        group("Model and classes", BLUE, "load", "label", "latent"),
        group("Calibrate and quantize", GREEN, "calibrate", "quantize"),
        group("Check it", VIOLET, "sample_full", "sample_fast"),
    ],
)  # fmt: skip

WAN_FILES = {
    "UNETLoader": ("diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors"),
    "CLIPLoader": ("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    "VAELoader": ("vae", "wan_2.1_vae.safetensors"),
}
WAN_SETTINGS = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple"}


def wan_sample(label: str, model: tuple[str, int]) -> Node:
    inputs = {
        "model": model, "positive": ("positive", 0), "negative": ("negative", 0), "latent_image": ("latent", 0),
    }  # fmt: skip
    return node("QandC_Sample", inputs, f"Sample: {label}", label=label, **WAN_SETTINGS)


def prompt(text: str) -> Node:
    return {**node("CLIPTextEncode", {"clip": ("clip", 0)}, text=text), "size": [300, 110]}


WAN = Template(
    "9 Quantize Wan 2.1",
    {
        "note": note(
            "## Quantize a model of a stock loader\n\nWan 2.1 (1.3B) as the example; Flux, Qwen-Image, Z-Image and "
            "other models go the same way: put their loaders on the left.\n\nNeeds three files (Apache-2.0); the "
            "frontend offers to download them:\n\n"
            + "".join(f"- models/{folder}/{name}\n" for folder, name in WAN_FILES.values())
            + "\nCalibration samples a few videos, with the prompts that are wired: write some of your own. The saved "
            "file, in output/diffusion_models, is for **Load Diffusion Model**.",
            400, 340,
        ),
        "load": node("UNETLoader", unet_name=WAN_FILES["UNETLoader"][1]),
        "clip": node("CLIPLoader", clip_name=WAN_FILES["CLIPLoader"][1], type="wan"),
        "vae": node("VAELoader", vae_name=WAN_FILES["VAELoader"][1]),
        "shift": node("ModelSamplingSD3", {"model": ("load", 0)}, shift=8.0),
        "positive": prompt("a fox runs through fresh snow, morning light"),
        "negative": prompt("blurry, low quality"),
        "latent": node("EmptyHunyuanLatentVideo", width=832, height=480, length=33),
        "calibrate": {
            **node(
                "QandC_TAPCalibrate",
                {
                    "model": ("shift", 0), "positive": ("positive", 0), "negative": ("negative", 0),
                    "latent_image": ("latent", 0),
                },
                **WAN_SETTINGS, trajectories=4, samples=40, batch_size=1,
            ),
            "down": 810,
        },
        "quantize": {
            **node("QandC_Quantize", {"model": ("shift", 0), "calibration": ("calibrate", 0)}), "down": 720,
        },
        "save": node("ModelSave", {"model": ("quantize", 0)}, filename_prefix="diffusion_models/wan2.1_t2v_1.3B_w8a8"),
        "sample_full": wan_sample("16 bits", ("shift", 0)),
        "sample_fast": wan_sample("8 bits", ("quantize", 0)),
        "decode_full": {**decoded("full"), "down": BELOW_WIRES["decode_full"]},
        "decode_fast": decoded("fast"),
        "compare": {
            **node("QandC_Compare", {
                "images.image0": ("decode_full", 0), "images.image1": ("decode_fast", 0),
                "reports.report0": ("sample_full", 1), "reports.report1": ("sample_fast", 1),
            }),
            "size": [860, 800],
        },
    },
    [
        ["note", "load", "clip"],
        ["shift", "positive", "negative", "latent"],
        ["calibrate"],
        ["quantize"],
        [*SAMPLED, "save"],
        ["decode_full", "decode_fast"],
        ["compare"],
    ],
    [
        group("Text and video size", BLUE, "shift", "positive", "negative", "latent"),
        group("Calibrate and quantize", GREEN, "calibrate", "quantize"),
        group("Check it", VIOLET, "sample_full", "sample_fast"),
    ],
    {
        type: {
            "name": name,
            "url": "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
            f"{folder}/{name}",
            "directory": folder,
        }
        for type, (folder, name) in WAN_FILES.items()
    },
    runs_here=False,
)  # fmt: skip

TEMPLATES = [QUICKSTART, ABLATION, DIT_XL, QUANTIZE, WAN]
