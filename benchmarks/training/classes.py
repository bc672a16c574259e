"""The things that the built-in model draws, and which drawing of which package shows them.

A class is one thing seen one way, so that the drawings of different artists agree in shape: broad categories come out
as coloured clouds. `hue` is how far the colours may turn, in turns: a heart may have any colour, a lemon may not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PictureClass:
    """`names` are those of the Unicode standard, `codes` the same by code point, `fxemoji` those of that package."""

    name: str
    names: tuple[str, ...]
    codes: tuple[str, ...]
    fxemoji: tuple[str, ...] = ()
    hue: float = 0.03
    flip: bool = True


ANY = 0.5

CLASSES = (
    PictureClass("cat", ("cat-face", "grinning-cat", "kissing-cat"), ("1f431", "1f63a", "1f63d"), ("cat",)),
    PictureClass("dog", ("dog-face",), ("1f436",), ("dog",)),
    PictureClass("panda", ("panda", "panda-face"), ("1f43c",), ("pandaface",)),
    PictureClass("fox", ("fox", "fox-face"), ("1f98a",), ("foxsmiling",)),
    PictureClass("frog", ("frog", "frog-face"), ("1f438",), ("frog",), hue=0.05),
    PictureClass("pig", ("pig-face",), ("1f437",), ("pig",)),
    PictureClass("penguin", ("penguin",), ("1f427",), ("penguin",), hue=0.05),
    PictureClass("ladybird", ("lady-beetle",), ("1f41e",), ("ladybeetle",)),
    PictureClass("fish", ("tropical-fish",), ("1f420",), ("tropicalfish",), hue=ANY),
    PictureClass("butterfly", ("butterfly",), ("1f98b",), hue=ANY),
    PictureClass("apple", ("red-apple", "green-apple"), ("1f34e", "1f34f"), ("redapple", "greenapple")),
    PictureClass("lemon", ("lemon",), ("1f34b",), ("lemon",), hue=0.015),
    PictureClass("banana", ("banana",), ("1f34c",), ("banana",), hue=0.015),
    PictureClass("watermelon", ("watermelon",), ("1f349",), ("watermelon",)),
    PictureClass("strawberry", ("strawberry",), ("1f353",), ("strawberry",)),
    PictureClass("cherries", ("cherries",), ("1f352",), ("cherries",)),
    PictureClass("mushroom", ("mushroom",), ("1f344",), ("mushroom",)),
    PictureClass("hamburger", ("hamburger",), ("1f354",), ("hamburger",), hue=0.015),
    PictureClass("doughnut", ("doughnut",), ("1f369",), ("doughnut",)),
    PictureClass("sunflower", ("sunflower",), ("1f33b",), ("sunflower",), hue=0.015),
    PictureClass("tulip", ("tulip",), ("1f337",), ("tulip",), hue=0.06),
    PictureClass("cactus", ("cactus",), ("1f335",), ("cactus",), hue=0.04),
    PictureClass("fir tree", ("evergreen-tree",), ("1f332",), ("evergreen",), hue=0.04),
    PictureClass("palm tree", ("palm-tree",), ("1f334",), ("palmtree",)),
    PictureClass("sun", ("sun",), ("2600-fe0f",), ("sunrays",), hue=0.015),
    PictureClass("moon", ("crescent-moon",), ("1f319",), ("crescentmoon",), hue=0.015),
    PictureClass("rocket", ("rocket",), ("1f680",), ("rocket",), hue=ANY),
    PictureClass("house", ("house",), ("1f3e0",), ("housebuilding",), hue=ANY),
    PictureClass("balloon", ("balloon",), ("1f388",), ("balloon",), hue=ANY),
    PictureClass("umbrella", ("umbrella",), ("2602-fe0f",), hue=ANY),
    PictureClass("heart", ("red-heart", "heart-suit"), ("2764-fe0f",), ("redheart",), hue=ANY),
    PictureClass("star", ("star",), ("2b50",), ("star",), hue=0.015),
    PictureClass("present", ("wrapped-gift",), ("1f381",), ("present",), hue=ANY),
    PictureClass("football", ("soccer-ball",), ("26bd",), ("soccerball",)),
    PictureClass("snowman", ("snowman-without-snow",), ("26c4",), ("snowmanwithoutsnow",)),
    PictureClass("ghost", ("ghost",), ("1f47b",), ("ghost",)),
    PictureClass("pumpkin", ("jack-o-lantern",), ("1f383",), ("jackolantern",), hue=0.015),
    PictureClass(
        "smiley",
        ("grinning-face", "grinning-face-with-big-eyes", "grinning-face-with-smiling-eyes"),
        ("1f600", "1f603", "1f604"),
        ("grinwide", "grin"),
        hue=0.015,
    ),
    PictureClass("sailboat", ("sailboat",), ("26f5",), hue=0.06),
    PictureClass("car", ("automobile",), ("1f697",), ("automobile",), hue=ANY),
)
