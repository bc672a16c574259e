from __future__ import annotations

from functools import cache
from pathlib import Path

from comfy_api.v0_0_2 import io

from ..qandc_core.demo import CLASS_NAMES
from ..qandc_core.diffusion.classes import NO_CLASS, class_tokens
from .schema import CATEGORY, parse_numbers

NONE = "none"


class ClassLabel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_ClassLabel",
            display_name="Class Label",
            category=CATEGORY,
            description="Selects the classes that a class-conditional DiT generates: one, or several that the images "
            "of a batch take in turn.",
            search_aliases=["imagenet", "class id", "conditioning", "label"],
            inputs=[
                io.String.Input(
                    "classes",
                    default="0-9",
                    tooltip="Class ids, ranges or names, separated by commas: 207, 360-365, golden retriever, or of "
                    "the built-in model: 0-9, panda. Image 1 takes the first, image 2 the second, and so on, starting "
                    "over at the end. A name that both models know, such as lemon, is ImageNet's.",
                ),
                io.Combo.Input(
                    "imagenet_class",
                    options=[NONE, *choices()],
                    default=NONE,
                    tooltip="Pick one ImageNet class by name (type to search); it replaces the list above.",
                ),
                io.Combo.Input(
                    "built_in_class",
                    options=[NONE, *CLASS_NAMES],
                    default=NONE,
                    optional=True,
                    tooltip="Pick one thing that the built-in model draws; it replaces the list above.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive", tooltip="The classes."),
                io.Conditioning.Output("negative", display_name="negative", tooltip="No class, for guidance."),
            ],
        )

    @classmethod
    def execute(cls, classes: str, imagenet_class: str, built_in_class: str = NONE) -> io.NodeOutput:
        if built_in_class != NONE and imagenet_class != NONE:
            raise ValueError("Two classes are picked, one of ImageNet and one of the built-in model; set one to none.")
        picked = {**choices(), **built_in()}.get(imagenet_class if built_in_class == NONE else built_in_class)
        labels = parse_classes(classes) if picked is None else (picked,)
        return io.NodeOutput([[class_tokens(labels), {}]], [[class_tokens([NO_CLASS]), {}]])


@cache
def imagenet_names() -> tuple[str, ...]:
    return tuple(Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines())


@cache
def choices() -> dict[str, int]:
    """Combo entries; the id tells the two cranes and the two maillots apart."""
    return {f"{name} ({index})": index for index, name in enumerate(imagenet_names())}


@cache
def built_in() -> dict[str, int]:
    return {name: index for index, name in enumerate(CLASS_NAMES)}


def parse_classes(text: str) -> tuple[int, ...]:
    """Class ids of the list; names are ImageNet's where both models know them."""
    names = built_in() | {name.lower(): index for index, name in reversed(list(enumerate(imagenet_names())))}
    return parse_numbers(text, names, "207, 360-365, golden retriever")
