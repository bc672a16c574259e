"""The drawn pictures: what the script draws is what is committed, and it fits where it is shown."""

import json
import re
import struct
from pathlib import Path

import pytest

from docs.draw import PICTURES, ROOT, pictures

NODES = json.loads(Path(__file__).with_name("object_info.json").read_text(encoding="utf-8"))
PANEL = 220  # pixels: the help panel of a window of 1280


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


def test_every_node_has_a_wiring_picture():
    assert set(NODES) <= set(PICTURES)


def test_the_committed_pictures_are_those_that_the_script_draws():
    drawn = {path: path.read_text(encoding="utf-8") if path.is_file() else "" for path in pictures()}
    stale = [str(path) for path, content in pictures().items() if drawn[path] != content]
    assert not stale, "run python -m docs.draw"


@pytest.mark.parametrize("node", NODES)
def test_wiring_pictures_fit_the_panel_and_name_real_inputs(node):
    boxes, wires = PICTURES[node]
    for wire in wires:
        reached = [box for box in boxes if box.row == wire.bottom and box.sides[0] < wire.x < box.sides[1]]
        left = [box for box in boxes if box.row == wire.top and box.sides[0] < wire.x < box.sides[1]]
        assert len(reached) == len(left) == 1, wire
    drawn = (ROOT / "web" / "docs" / node / "wiring.svg").read_text(encoding="utf-8")
    assert int(re.search(r'width="(\d+)"', drawn)[1]) <= PANEL


def test_icon_and_banner_are_as_the_registry_takes_them():
    width, height = png_size(ROOT / "docs" / "icon.png")
    assert width == height <= 400
    width, height = png_size(ROOT / "docs" / "banner.png")
    assert width * 9 == height * 21
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for key in ("Icon", "Banner"):
        url = re.search(
            rf'^{key} = "https://raw.githubusercontent.com/OWNER/ComfyUI-QandC/main/([^"]+)"', project, re.M
        )
        assert (ROOT / url[1]).is_file()
