"""Class ids, and class ids as the tokens of a prompt.

ComfyUI's conditioning nodes, and those of other packs, compute with the tensor of a prompt (N, tokens, width): they
zero it, append to it, mix it. So a list of classes is written as such a tensor, one token (1, id, id^2) for each class,
and what a node did to it can be read off again: zeros mean no class, an appended token is one more class, and a mean of
two classes is neither, for then the third number is not the square of the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WIDTH = 3
NO_CLASS = -1


def check_labels(class_labels: Sequence[int] | Tensor, num_classes: int, has_null_class: bool = True) -> Tensor:
    """Class ids as int64 (N,); the null class num_classes is allowed where the model has one."""
    labels = torch.as_tensor(class_labels)
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
        raise ValueError("class_labels must be a non-empty list of integer class ids.")
    if labels.min() < 0 or labels.max() >= num_classes + has_null_class:
        null = f", and {num_classes} for no class" if has_null_class else " and none for no class"
        raise ValueError(
            f"class id {int(labels.min() if labels.min() < 0 else labels.max())} is out of range: this model has the "
            f"classes 0 to {num_classes - 1}{null}."
        )
    return labels.long()


def balanced_labels(count: int, classes: int) -> Tensor:
    """Every class in turn, so that any leading part of the list is balanced."""
    return torch.arange(count) % classes


def class_tokens(class_labels: Sequence[int]) -> Tensor:
    """Tokens (1, len(class_labels), 3) of a list of classes, float32; NO_CLASS gives zeros."""
    ids = torch.tensor(class_labels, dtype=torch.float64)
    return (torch.stack([ids**0, ids, ids**2], dim=-1) * (ids != NO_CLASS)[:, None])[None].float()


def is_classes(tokens: Tensor | None) -> bool:
    """True if these may be class tokens rather than those of a text."""
    return tokens is not None and tokens.ndim == 3 and tokens.shape[-1] == WIDTH


def read_classes(tokens: Tensor | None, num_classes: int, has_null_class: bool = True) -> Tensor:
    """Class ids of the images in turn, int64 (images,); num_classes for no class, which is what zeros and None mean.

    Image i takes token i of conditioning i, both from the start again; mostly all images share one conditioning.
    Raises ValueError on the tokens of a text, on classes that were mixed or scaled, on ids that are out of range, and
    on no class where the model was trained without one.
    """
    if tokens is None:
        tokens = class_tokens([NO_CLASS])
    if not is_classes(tokens):
        raise ValueError("This model generates classes, not text; connect the node Class Label instead of a prompt.")
    image = torch.arange(math.lcm(*tokens.shape[:2]))
    tokens = tokens.cpu().double()[image % len(tokens), image % tokens.shape[1]]
    absent, (one, ids, squares) = (tokens == 0).all(dim=-1), tokens.unbind(dim=-1)
    near = ids.round()  # a class averaged with itself is off by float32's rounding
    whole = ((one - 1).abs() < 1e-5) & ((ids - near).abs() < 1e-2)
    whole &= (squares - near**2).abs() <= 5e-7 * near.clamp(min=100) ** 2
    if not (whole | absent).all():
        raise ValueError(
            "A class-conditional model generates whole classes, and a node before it mixes or scales some (such as "
            "ConditioningAverage or ConditioningMultiply); use ConditioningCombine for several."
        )
    labels = check_labels(torch.where(absent, num_classes, near).long(), num_classes)
    return with_null_class(labels, num_classes, has_null_class)


def with_null_class(labels: Tensor, num_classes: int, has_null_class: bool) -> Tensor:
    """The labels; ValueError where they ask for no class and the model has none."""
    if not has_null_class and (labels == num_classes).any():
        raise ValueError(
            f"This model has {num_classes} classes and none for no class; connect the positive of Class Label to both "
            "inputs, and sample with cfg 1."
        )
    return labels
