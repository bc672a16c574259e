"""Whether users find the nodes by the words they look for, and can read their help, in the frontend's own panels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.frontend import chromium, open_frontend
from tests.comfyui.checkouts import parameters
from tests.comfyui.server import Server

ROOT = Path(__file__).parents[2]
CACHE, QUANTIZE, ENCODER = "QandC_ApplyCache", "QandC_Quantize", "QandC_QuantizeTextEncoder"
WORDS = {
    "cache": CACHE, "faster": CACHE, "speed up": CACHE, "accelerate": CACHE, "skip steps": CACHE, "teacache": CACHE,
    "spectrum": CACHE, "\u52a0\u901f": CACHE, "int8": QUANTIZE, "fp8": QUANTIZE, "int4": QUANTIZE,
    "quantize": QUANTIZE, "smaller": QUANTIZE, "VRAM": QUANTIZE, "\u91cf\u5316": QUANTIZE,
    "t5xxl": ENCODER, "quantize clip": ENCODER, "umt5": ENCODER,
}  # fmt: skip
# Stock nodes have these in their names: EasyCache, LazyCache, Flux KV Cache.
IN_STOCK_NAMES = {"cache"}
BLUEPRINT = "Speed up"  # of this pack, with Apply Cache in it

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium: install it, or set CHROMIUM to its path")


@pytest.fixture(scope="module", params=parameters()[:1])
def server(request, tmp_path_factory) -> Iterator[Server]:
    with Server(request.param, tmp_path_factory.mktemp("search")) as running:
        yield running


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_words_that_users_look_for_find_the_node_among_the_first(server, locale):
    names = json.loads((ROOT / "locales" / locale / "nodeDefs.json").read_text(encoding="utf-8"))
    with open_frontend(server.address, 1280, 800, locale) as frontend:
        found = frontend.search(*WORDS)
    missed = {
        word: found[word][:5]
        for word, node in WORDS.items()
        for first in [5 if word in IN_STOCK_NAMES else 3]
        if not any(text.startswith((names[node]["display_name"], BLUEPRINT)) for text in found[word][:first])
    }
    assert not missed


@pytest.mark.parametrize(
    "locale, nodes_2",
    [("en", False), ("en", True), ("zh", False), ("zh", True), ("ja", True)],
    ids=lambda value: value if isinstance(value, str) else "nodes 2.0" if value else "classic",
)
def test_help_opens_from_the_toolbox_and_fits_the_panel(server, locale, nodes_2):
    """In a language that the pack has no pages for, it is English."""
    written = locale if locale == "zh" else "en"
    names = json.loads((ROOT / "locales" / written / "nodeDefs.json").read_text(encoding="utf-8"))
    with open_frontend(server.address, 1280, 800, locale, nodes_2) as frontend:
        for node in names:
            shown = frontend.help(node)
            assert shown["title"] == names[node]["display_name"], node
            assert shown["picture"] > 0, f"the picture of {node} is not loaded"
            assert shown["needed"] <= shown["width"], f"{node} needs {shown['needed']} of {shown['width']} pixels"
        assert frontend.errors == []
