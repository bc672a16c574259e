"""Caches of core or of other packs on the same model, found by the names of what they set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# EasyCache, LazyCache, TeaCache, MagCache, FBCache and DiCache say it in their names.
NAMES = ("cache", "spectrum", "wavespeed", "taylorseer")
EXACT = ("kv_cache", "kvcache", "animate2_cache", "image21cache", "image21_cache")  # keys, values or a fixed prefix
OURS = "qandc"
PACK = __name__.partition(".nodes.")[0]


def other_caches(patcher, model_options: dict[str, Any]) -> list[str]:
    """One sentence where another cache is on the model."""
    found = sorted({name for names in names_set(patcher, model_options) if (name := first_match(names))})
    if not found:
        return []
    names = ", ".join(found[:2])
    return [f"another cache is on the model ({names}): each skips steps without knowing of the other; remove one"]


def names_set(patcher, model_options: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The names of everything that is set on a model, the telling ones first."""
    options = model_options.get("transformer_options", {})
    for name, value in options.items():
        if name != "wrappers" and value is not None and value is not False:
            yield (str(name),)
    for keyed in (*patcher.wrappers.values(), *options.get("wrappers", {}).values()):
        for key, wrappers in keyed.items():
            yield from ((str(key), origin(wrapper)) for wrapper in wrappers)
    for name, value in model_options.items():
        for part in value if isinstance(value, list) else [value]:
            if callable(part):
                yield str(name), origin(part)
    for name, value in patcher.object_patches.items():
        yield str(name), origin(value)


def first_match(names: tuple[str, ...]) -> str:
    if names[0].startswith(OURS) or names[-1].startswith(f"{PACK}."):
        return ""
    return next((name for name in names if is_cache(name.lower())), "")


def is_cache(name: str) -> bool:
    return any(word in name for word in NAMES) and not any(word in name for word in EXACT)


def origin(value: Any) -> str:
    """Module and name of a function, or of the class of an object."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
