"""Work that is done once: results kept in a folder, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..files import read_json, read_safetensors, save_tensors, save_text

T = TypeVar("T")


class Kept:
    """What was made under some settings; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder

    def under(self, settings: Any) -> Kept:
        """What is made under these settings too, which JSON can write."""
        if self.folder is None:
            return self
        text = json.dumps(settings, sort_keys=True, default=str)
        return Kept(self.folder / hashlib.sha256(text.encode()).hexdigest()[:16])

    def file(self, name: str, make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
        """What the file holds, made first where it is absent."""
        if self.folder is None:
            return make()
        path = self.folder / name
        if not path.is_file():
            save(make(), path)
        return load(path)

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        return self.file(
            f"{name}.safetensors",
            make,
            lambda made, path: save_tensors(made, path, {}),
            lambda path: read_safetensors(path)[0],
        )

    def tensor(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        return self.tensors(name, lambda: {"value": make()})["value"]

    def json(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self.file(f"{name}.json", make, lambda made, path: save_text(json.dumps(made), path), read_json)
