"""Recognizes the model that a file belongs to by its weights, in whatever precision they were loaded.

A hash of the weights tells models apart exactly, and also one file from itself: loaded in bfloat16 and in float16 the
values differ by a rounding. No hash can be the same for both, because values near the border of two roundings fall on
different sides. So a fingerprint carries beside its hash a sketch, a few values of every weight and their dtypes. Equal
hashes are the same model. Where hashes differ, and only where precisions do too, the values must agree within the
rounding of the coarser precision, every one of them: a fine-tuned model fails where its change is larger than that.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

VALUES, MOST = 8, 2048  # of one weight, and of all
MARKS = {
    torch.float64: "d",
    torch.float32: "f",
    torch.float16: "h",
    torch.bfloat16: "b",
    torch.float8_e4m3fn: "e",
    torch.float8_e5m2: "E",
}
OTHER = "o"  # integers, which no precision changes
# Largest relative distance of neighbours, smallest normal number and largest number.
ROUNDING = {
    mark: (torch.finfo(dtype).eps, torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype, mark in MARKS.items()
}


class Fingerprint(str):
    """32 hexadecimal digits, with the sketch of the weights that they stand for; "" where a file of before has none."""

    sketch: str

    def __new__(cls, digits: str, sketch: str = "") -> Fingerprint:
        made = super().__new__(cls, digits)
        made.sketch = sketch
        return made

    @classmethod
    def of(cls, value: str) -> Fingerprint:
        return value if isinstance(value, cls) else cls(value)

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.sketch


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> Fingerprint:
    """Fingerprint of weights by name."""
    digest, structure = hashlib.sha256(), hashlib.sha256()
    each = min(VALUES, max(1, MOST // max(1, len(tensors))))
    marks, values = "", list[Tensor]()
    for name, value in sorted(tensors.items()):
        flat = value.detach().flatten()
        # A few thousand values of each tensor tell models apart; hashing gigabytes would not tell more.
        sample = flat[:: max(1, flat.numel() // 2048)].float().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
        structure.update(f"{name}{tuple(value.shape)}".encode())
        places = torch.linspace(0, max(0, len(sample) - 1), min(each, len(sample))).long()
        marks += MARKS.get(value.dtype, OTHER) * len(places)
        values.append(sample[places])
    kept = torch.cat(values) if values else torch.zeros(0)
    text = base64.b64encode(kept.numpy().tobytes()).decode()
    return Fingerprint(digest.hexdigest()[:32], f"{structure.hexdigest()[:16]}:{marks}:{text}")


def same_model(one: str, other: str) -> bool:
    """True if two fingerprints are of one model, in equal or in different precisions."""
    if one == other:
        return True
    sketches = [getattr(found, "sketch", "").split(":") for found in (one, other)]
    if any(len(sketch) != 3 for sketch in sketches):
        return False
    (structure, marks, text), (other_structure, other_marks, other_text) = sketches
    if structure != other_structure or marks == other_marks or len(marks) != len(other_marks):
        return False
    return bool(agree(decoded(text), marks, decoded(other_text), other_marks).all())


def decoded(text: str) -> Tensor:
    content = bytearray(base64.b64decode(text))
    return torch.frombuffer(content, dtype=torch.float32).double() if content else torch.zeros(0).double()


def agree(a: Tensor, marks_a: str, b: Tensor, marks_b: str) -> Tensor:
    """True for each pair of values that can be roundings of one number: equal where their precisions are."""
    size = torch.maximum(a.abs().nan_to_num(0, 0, 0), b.abs().nan_to_num(0, 0, 0))
    bound, overflow = torch.zeros_like(size), torch.zeros_like(size, dtype=torch.bool)
    different = torch.tensor([x != y for x, y in zip(marks_a, marks_b)])
    for marks, value in ((marks_a, a), (marks_b, b)):
        eps, tiny, most = (torch.tensor(limits).double() for limits in zip(*(limits_of(mark) for mark in marks)))
        bound += eps * torch.maximum(size, tiny)
        overflow |= ~(value.abs() < most) & (size >= most)  # becomes infinity, NaN or the largest
    near = (a - b).abs() <= bound
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(different, near | overflow | same, same)


def limits_of(mark: str) -> tuple[float, float, float]:
    return ROUNDING.get(mark, (0.0, 0.0, float("inf")))
