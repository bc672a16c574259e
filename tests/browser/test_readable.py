"""The report on Quantize can be read where the node shows it, drawn on the canvas and as HTML ("Nodes 2.0")."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests.browser.frontend import Frontend, chromium, open_frontend
from tests.browser.test_shown import BUILD
from tests.comfyui.checkouts import Checkout, parameters
from tests.comfyui.server import Server

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium: install it, or set CHROMIUM to its path")
NODES = {
    "load": ("QandC_LoadDiT", [0, 0], {}),
    "quantize": ("QandC_Quantize", [400, 0], {"format": "W4A8"}),
    "prefix": ("PreviewAny", [0, 300], {}),  # only what leads to an output is computed
}
WIRES = [("load", "MODEL", "quantize", "model"), ("quantize", "STRING", "prefix", "source")]
REPORT = (
    r"MiB, [0-9.]+ % error of a layer on average.*layers.*Worst layer .*, [0-9.]+ %.*Kernels: .*"
    "Warning: skip: no layer's name contains 'no_such_layer'"
)
SMALLEST = 10  # pixels of a font at a zoom of 1, at which the node is looked at
# The smallest visible element with the report, its words with their places on the page and those of its node.
WORDS = """([id, report]) => {
  const wanted = new RegExp(report, 's'), node = app.graph.getNodeById(id)
  const holds = e => wanted.test(e.textContent) && e.getClientRects().length
  const box = [...document.querySelectorAll('.dom-widget *, [data-node-id] *')].filter(holds)
    .find(e => ![...e.children].some(holds))
  if (!box) return null
  box.dataset.report = id
  const place = ({left, top, right, bottom}) => [left, top, right, bottom]
  const words = [], walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT)
  for (let text; (text = walker.nextNode());) for (const {0: word, index} of text.data.matchAll(/\\S+/g)) {
    const range = document.createRange()
    range.setStart(text, index)
    range.setEnd(text, index + word.length)
    for (const part of range.getClientRects()) words.push([word, place(part)])
  }
  const limits = []
  for (let e = box; e && e !== document.body; e = e.parentElement)
    if (getComputedStyle(e).overflow !== 'visible') limits.push(place(e.getBoundingClientRect()))
  const html = document.querySelector(`[data-node-id="${id}"]`), {ds, canvas} = app.canvas
  const [x, y, width, height] = node.boundingRect, page = canvas.getBoundingClientRect()
  const [left, top] = [page.left + (x + ds.offset[0]) * ds.scale, page.top + (y + ds.offset[1]) * ds.scale]
  limits.push(html ? place(html.getBoundingClientRect())
    : [left, top, left + width * ds.scale, top + height * ds.scale])
  limits.push([0, 0, innerWidth, innerHeight])
  return {words, limits, font: parseFloat(getComputedStyle(box).fontSize) * ds.scale}
}"""


@pytest.fixture(scope="module", params=parameters()[:1])
def server(request, tmp_path_factory) -> Iterator[Server]:
    checkout: Checkout = request.param
    with Server(checkout, tmp_path_factory.mktemp("readable")) as running:
        yield running


def pixels(frontend: Frontend) -> np.ndarray:
    """The page as it is drawn, (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(frontend.page.screenshot())).convert("RGB")).astype(int)


def without(frontend: Frontend, node: int) -> np.ndarray:
    """The page without the words of the report."""
    text = frontend.page.locator(f'[data-report="{node}"]')
    text.evaluate("e => { e.style.visibility = 'hidden' }")
    try:
        return pixels(frontend)
    finally:
        text.evaluate("e => { e.style.visibility = '' }")


def unreadable(frontend: Frontend, node: int, found: dict) -> list[str]:
    """Words that are cut off, hidden by something, or drawn over something."""
    drawn, bare = pixels(frontend), without(frontend, node)
    wrong = []
    for word, (left, top, right, bottom) in found["words"]:
        outside = any(left < a - 1 or top < b - 1 or right > c + 1 or bottom > d + 1 for a, b, c, d in found["limits"])
        area = np.s_[round(top) : round(bottom), round(left) : round(right)]
        below = bare[area].reshape(-1, 3)
        if outside:
            wrong.append(f"{word}: cut off")
        elif not (abs(drawn[area] - bare[area]) > 60).any():
            wrong.append(f"{word}: hidden")
        elif (below.max(0) - below.min(0)).max() > 30:
            wrong.append(f"{word}: over something")
    return wrong


@pytest.mark.parametrize("nodes_2", [False, True], ids=["on the canvas", "as HTML"])
def test_every_word_of_the_report_can_be_read(server, nodes_2):
    """In the size that the node has by itself, at a zoom of 1."""
    with open_frontend(server.address, 1280, 1600, nodes_2=nodes_2) as frontend:
        ids, unwired = frontend.page.evaluate(BUILD, [NODES, WIRES])
        assert unwired == []
        frontend.page.evaluate("() => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [120, 160] }")
        # With a warning, the longest that is said; and made anew for each mode.
        frontend.set_widgets({"max_layer_error": 0.08 + 0.001 * nodes_2, "skip": "no_such_layer"})
        frontend.steady()
        frontend.run()
        frontend.wait_for(f"given => ({WORDS})(given) !== null", [ids["quantize"], REPORT])
        found = frontend.page.evaluate(WORDS, [ids["quantize"], REPORT])
        assert len(found["words"]) > 30 and found["font"] >= SMALLEST
        assert unreadable(frontend, ids["quantize"], found) == []
        assert frontend.errors == []
