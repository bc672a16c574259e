"""The templates that ship with the pack, as nodes in columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

BLUE, GREEN = "#3f789e", "#4a8a5a"
Node = dict[str, Any]
Promoted = tuple[str, str] | tuple[str, str, str]  # members, with spaces between; their widget; a name for it


@dataclass(frozen=True)
class Subgraph:
    """`members` become one node; `promoted` are their widgets that it shows.

    A promoted widget is of one member or of several, which then share its value, and may be shown under another name.
    `inputs` and `outputs` name the models that go into a member and what comes out of one. `alone`: the other nodes
    only say what comes in and goes out, and are taken off again. `down` and `size` are as of other nodes.
    """

    title: str
    members: list[str]
    promoted: list[Promoted]
    alone: bool = False
    key: str = "subgraph"
    down: int = 0
    size: tuple[int, int] = (400, 0)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)

    def columns(self, nodes: dict[str, Node]) -> list[list[str]]:
        """The members from left to right, each as near to what it is wired to as it can be, so that wires are short."""
        before: dict[str, int] = {}

        def ahead(key: str) -> int:
            if key not in before:
                targets = {k for k in self.members if key in {source for source, _ in nodes[k]["inputs"].values()}}
                before[key] = 1 + max(map(ahead, targets), default=-1)
            return before[key]

        deepest = max(map(ahead, self.members))
        return [[key for key in self.members if before[key] == column] for column in range(deepest, -1, -1)]

    def spec(self, nodes: dict[str, Node]) -> dict[str, Any]:
        promoted = [
            {"keys": keys.split(), "name": name, "shown": (*shown, name)[0]} for keys, name, *shown in self.promoted
        ]
        return {**asdict(self), "columns": self.columns(nodes), "promoted": promoted}


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
    gap: int = 60

    def spec(self) -> dict[str, Any]:
        inner = [subgraph.spec(self.nodes) for subgraph in self.subgraphs]
        return {
            "nodes": self.nodes, "columns": self.columns, "groups": self.groups, "subgraphs": inner, "gap": self.gap
        }  # fmt: skip

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


Run = tuple[tuple[str, int], str, dict[str, Any]]  # the model, a label, and settings of the sampler


def sampled(runs: dict[str, Run], repeats: int = 0, given: Callable[..., Any] = wires) -> dict[str, Node]:
    """A Sample and a VAE Decode for every run, and the Compare of all, which samples them `repeats` times again."""
    nodes, inputs = {}, {}
    for i, (key, (model, label, settings)) in enumerate(runs.items()):
        nodes[f"sample_{key}"] = node("QandC_Sample", given(model), f"Sample: {label}", label=label, **settings)
        nodes[f"decode_{key}"] = node("VAEDecode", {"samples": (f"sample_{key}", 0), "vae": ("vae", 0)})
        inputs |= {f"images.image{i}": (f"decode_{key}", 0)}
    for i, key in enumerate(runs):
        inputs |= {f"reports.report{i}": (f"sample_{key}", 1)}
    nodes["compare"] = {
        **node("QandC_Compare", inputs, repeats=repeats),
        "size": [860, min(440 + 180 * len(runs), 1080)],
    }
    return nodes


def same_noise(title: str, runs: dict[str, str], **place: Any) -> Subgraph:
    """What `sampled` makes but Compare, with one seed for all; `runs` are their labels."""
    samples, decoders = ([f"{part}_{key}" for key in runs] for part in ("sample", "decode"))
    return Subgraph(
        title, [*samples, "vae", *decoders], [(" ".join(samples), "seed"), ("vae", "vae_name")], key="runs",
        inputs=dict(zip(samples, runs.values())),
        outputs={**dict(zip(decoders, runs.values())), **{s: f"report: {runs[s[7:]]}" for s in samples}}, **place,
    )  # fmt: skip


def down(nodes: dict[str, Node], **pixels: int) -> dict[str, Node]:
    return {key: {**spec, "down": pixels.get(key, 0)} for key, spec in nodes.items()}


DEMO = {"steps": 50, "cfg": 2.0, "sampler_name": "ddpm", "scheduler": "normal"}
SMOOTH = {**DEMO, "sampler_name": "ddim"}  # adds no noise, so that predictions can be forecast
XL = {"steps": 50, "cfg": 4.0, "sampler_name": "ddpm", "scheduler": "normal"}
CALIBRATION = {"trajectories": 16, "samples": 200}
SOURCES = ("load", "label", "latent", "vae")
THINGS = "cat, panda, penguin, butterfly, apple, sunflower, rocket, house, heart, car"
DEMO_SOURCES = sources("built-in demo", THINGS, 32, 10, "pixel_space")

CHAIN = Subgraph(
    "Calibrate, quantize, compensate", ["calibrate", "quantize", "compensate"],
    [("calibrate", "trajectories"), ("quantize", "format"), ("compensate", "pairs")], down=240, size=(300, 0),
)  # fmt: skip
# The chain stands above the wires from the model to the runs.
CHAIN_COLUMNS = [["note", "load", "label", "latent"], ["cache"], ["subgraph"], ["runs"], ["compare"]]
CHAIN_GROUPS = [
    group("Model and classes", BLUE, "load", "label", "latent"),
    group("Cached, quantized, compensated", GREEN, "cache", "subgraph"),
]
TWICE = "The same noise, twice"
CHAIN_RUNS = same_noise(TWICE, {"full": "full precision", "fast": "Q&C"}, down=740, size=(300, 0))
QUICKSTART = Template(
    "1 Quickstart",
    {
        "note": note(
            "## Q&C quickstart\n\nPress **Run**. Nothing is downloaded: the built-in model draws forty things, such as "
            "cats, rockets and hearts.\n\n"
            "1. **Apply Cache** computes one step in three and forecasts the others.\n"
            "2. In the subgraph **TAP Calibrate** samples with the cache on and notes what every layer sees, "
            "**Quantize** turns the layers into 8-bit integers, and **Variance Compensate** corrects the drift "
            "of both.\n"
            "3. Both models sample the same noise, and **Compare** measures.\n\n"
            "Run again with another seed: calibration is kept, only sampling runs.",
            340, 300,
        ),
        **down(
            {
                **DEMO_SOURCES,
                **chain(SMOOTH, CALIBRATION, 16, {"policy": "speedup", "policy.speedup": 3.0}),
                **sampled({
                    "full": (("load", 0), "full precision", SMOOTH),
                    "fast": (("compensate", 0), "Q&C", SMOOTH),
                }, repeats=2),
            },
        ),
    },
    CHAIN_COLUMNS, CHAIN_GROUPS, subgraphs=(CHAIN, CHAIN_RUNS),
)  # fmt: skip

SIX = {
    "full": "full precision", "quantized": "quantized only", "cached": "cached only", "both": "quantized and cached",
    "fast": "Q&C, all parts", "fewer": "full precision, 17 steps",
}  # fmt: skip
SIX_MODELS = {"full": "load", "quantized": "quantize_only", "cached": "cache", "both": "quantize", "fast": "compensate"}
ABLATION = Template(
    "Paper, ablation",
    {
        "note": note(
            "## What each part does\n\nSix runs from the same noise: full precision, quantized only, cached only, both "
            "together without and with variance compensation, and full precision with as many steps as the cached runs "
            "compute.\n\nThe parts and the runs are in the two subgraphs. Times are measured on this machine.",
            320, 300,
        ),
        **DEMO_SOURCES,
        **chain(DEMO, CALIBRATION, 32),
        "quantize_only": node(
            "QandC_Quantize", {"model": ("load", 0), "calibration": ("calibrate", 0)}, "Quantize, no cache",
            method="paper",
        ),
        **sampled({
            run: ((SIX_MODELS.get(run, "load"), 0), label, {**DEMO, "steps": 17} if run == "fewer" else DEMO)
            for run, label in SIX.items()
        }),
    },
    [["note", "load", "label", "latent"], ["subgraph"], ["runs"], ["compare"]],
    [group("Model and classes", BLUE, "load", "label", "latent")],
    subgraphs=(
        Subgraph(
            "The parts", ["cache", "calibrate", "quantize", "compensate", "quantize_only"],
            [("cache", "policy.interval"), ("calibrate", "trajectories"), ("quantize quantize_only", "format")],
            size=(320, 0),
            outputs={
                "cache": "cached", "quantize_only": "quantized", "quantize": "quantized and cached",
                "compensate": "all parts",
            },
        ),
        same_noise("Six runs from the same noise", SIX, down=560, size=(320, 0)),
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
            340, 320,
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
    subgraphs=(CHAIN, CHAIN_RUNS),
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
            360, 340,
        ),
        **down(
            {
                **DEMO_SOURCES,
                "calibrate": node("QandC_TAPCalibrate", wires(("load", 0)), **SMOOTH, **CALIBRATION),
                "quantize": node("QandC_Quantize", {"model": ("load", 0), "calibration": ("calibrate", 0)}),
                "save": node("ModelSave", {"model": ("quantize", 0)}, filename_prefix="diffusion_models/built_in_w8a8"),
                **sampled({
                    "full": (("load", 0), "full precision", SMOOTH),
                    "fast": (("quantize", 0), "quantized", SMOOTH),
                }),
            },
            label=-10, latent=-20, calibrate=394, quantize=280, save=60,
        ),
    },
    [["load", "label", "latent", "note"], ["calibrate"], ["quantize"], ["runs", "save"], ["compare"]],
    [
        group("Model and classes", BLUE, "load", "label", "latent"),
        group("Calibrate and quantize", GREEN, "calibrate", "quantize"),
    ],
    subgraphs=(same_noise(TWICE, {"full": "full precision", "fast": "quantized"}, size=(300, 0)),),
)  # fmt: skip

WAN_FILES = {
    "UNETLoader": ("diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors"),
    "CLIPLoader": ("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    "VAELoader": ("vae", "wan_2.1_vae.safetensors"),
}
WAN_SETTINGS = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple"}


def wan_wires(model: tuple[str, int]) -> dict[str, tuple[str, int]]:
    return {"model": model, "positive": ("positive", 0), "negative": ("negative", 0), "latent_image": ("latent", 0)}


def prompt(text: str) -> Node:
    return node("CLIPTextEncode", {"clip": ("clip", 0)}, text=text)


WAN = Template(
    "9 Quantize Wan 2.1",
    {
        "note": {"down": 80, **note(
            "## Quantize a model of a stock loader\n\nWan 2.1 (1.3B) as the example; Flux, Qwen-Image, Z-Image and "
            "other models go the same way: in place of the subgraph put loaders, prompts and latent of your own "
            "workflow.\n\nNeeds three files (Apache-2.0); the "
            "frontend offers to download them:\n\n"
            + "".join(f"- models/{folder}/{name}\n" for folder, name in WAN_FILES.values())
            + "\nCalibration samples a few videos, with the prompts that are wired: write some of your own. The saved "
            "file, in output/diffusion_models, is for **Load Diffusion Model**.",
            360, 340,
        )},
        "load": node("UNETLoader", unet_name=WAN_FILES["UNETLoader"][1]),
        "clip": node("CLIPLoader", clip_name=WAN_FILES["CLIPLoader"][1], type="wan"),
        "vae": node("VAELoader", vae_name=WAN_FILES["VAELoader"][1]),
        "shift": node("ModelSamplingSD3", {"model": ("load", 0)}, shift=8.0),
        "positive": prompt("a fox runs through fresh snow, morning light"),
        "negative": prompt("blurry, low quality"),
        "latent": node("EmptyHunyuanLatentVideo", width=832, height=480, length=33),
        **down(
            {
                "calibrate": node(
                    "QandC_TAPCalibrate", wan_wires(("shift", 0)), **WAN_SETTINGS, trajectories=4, samples=40,
                    batch_size=1,
                ),
                "quantize": node("QandC_Quantize", {"model": ("shift", 0), "calibration": ("calibrate", 0)}),
                "save": node(
                    "ModelSave", {"model": ("quantize", 0)}, filename_prefix="diffusion_models/wan2.1_t2v_1.3B_w8a8"
                ),
                **sampled({
                    "full": (("shift", 0), "16 bits", WAN_SETTINGS), "fast": (("quantize", 0), "8 bits", WAN_SETTINGS),
                }, given=wan_wires),
            },
            label=-10, latent=-20, calibrate=394, quantize=280, save=60,
        ),
    },
    [["subgraph", "note"], ["calibrate"], ["quantize"], ["runs", "save"], ["compare"]],
    [group("Calibrate and quantize", GREEN, "calibrate", "quantize")],
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
    subgraphs=(
        Subgraph(
            "Model, prompts, size", ["load", "clip", "shift", "positive", "negative", "latent"],
            [
                ("load", "unet_name"), ("positive", "text", "prompt"), ("negative", "text", "negative prompt"),
                ("latent", "width"), ("latent", "height"), ("latent", "length"),
            ],
            size=(340, 0), outputs={"positive": "positive", "negative": "negative"},
        ),
        same_noise(TWICE, {"full": "16 bits", "fast": "8 bits"}, size=(300, 0)),
    ),
)  # fmt: skip

TEMPLATES = [QUICKSTART, ABLATION, DIT_XL, QUANTIZE, WAN]
