"""Caches of core or of other packs on the same model, found by the names of what they set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# EasyCache, LazyCache, TeaCache, MagCache, FBCache and DiCache say it in their names.
NAMES = ("cache", "spectrum", "wavespeed", "taylorseer")
EXACT = ("kv_cache", "kvcache", "animate2_cache", "image21cache", "image21_cache")  # keys, values or a fixed prefix
OURS = "qandc"
LONE = re.compile(r"(?<![a-z])cache")
PACK = __name__.partition(".nodes.")[0]


def other_caches(patcher, model_options: dict[str, Any]) -> list[str]:
    """One sentence where another cache is on the model."""
    found = sorted({name for key, value in parts(patcher, model_options) if (name := telling(key, value))})
    if not found:
        return []
    names = ", ".join(found[:2])
    return [f"another cache is on the model ({names}): each skips steps without knowing of the other; remove one"]


def parts(patcher, model_options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Everything that is set on a model, by the name that it is set under."""
    options = model_options.get("transformer_options", {})
    for name, value in options.items():
        if name != "wrappers" and value is not None and value is not False:
            yield str(name), None
    for keyed in (*patcher.wrappers.values(), *options.get("wrappers", {}).values()):
        for key, wrappers in keyed.items():
            yield from ((str(key), wrapper) for wrapper in wrappers)
    for name, value in model_options.items():
        for part in value if isinstance(value, list) else [value]:
            if callable(part):
                yield str(name), part
    for name, value in patcher.object_patches.items():
        yield str(name), value


def telling(key: str, value: Any) -> str:
    """The name that says that this is another cache; "" where none does.

    A module that is only called cache, as many are, says nothing.
    """
    named = value if hasattr(value, "__qualname__") else type(value)
    module, name = str(named.__module__), named.__qualname__
    if key.startswith(OURS) or module.startswith(f"{PACK}."):
        return ""
    return next((text for text in (key, name, LONE.sub("", module.lower())) if is_cache(text.lower())), "")


def is_cache(name: str) -> bool:
    return any(word in name for word in NAMES) and not any(word in name for word in EXACT)
