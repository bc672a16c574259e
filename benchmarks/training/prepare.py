"""Makes drawings.safetensors of the npm packages that qandc_core/demo/ATTRIBUTION.md lists; needs resvg-py.

python -m benchmarks.training.prepare DIR, where DIR holds the archives that `npm pack` wrote.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .classes import CLASSES, PictureClass
from .drawings import Drawings, save_drawings

SIZE = 64


@dataclass(frozen=True)
class Package:
    """An npm package, whose drawings it holds, and their licence, as the package says."""

    npm: str
    version: str
    artist: str
    licence: str

    @property
    def archive(self) -> str:
        return f"{self.npm.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package("@iconify-json/noto", "1.2.9", "Google", "Apache-2.0"),
    Package("@iconify-json/noto-v1", "1.2.5", "Google", "Apache-2.0"),
    Package("@iconify-json/fxemoji", "1.2.2", "Mozilla", "Apache-2.0"),
    Package("@iconify-json/twemoji", "1.2.5", "Twitter", "CC-BY-4.0"),
    Package("@iconify-json/emojione", "1.2.3", "EmojiTwo", "CC-BY-4.0"),
    Package("@iconify-json/streamline-emojis", "1.2.4", "Streamline", "CC-BY-4.0"),
    Package("@iconify-json/fluent-emoji-flat", "1.2.6", "Microsoft", "MIT"),
    Package("@lobehub/fluent-emoji-3d", "1.1.0", "Microsoft", "MIT"),
)


def member(archive: Path, name: str) -> bytes | None:
    with tarfile.open(archive) as tar:
        try:
            file = tar.extractfile(f"package/{name}")
        except KeyError:
            return None
        return file.read() if file else None


def svg_of(icons: dict[str, Any], name: str) -> str | None:
    """The SVG of an icon of an Iconify set, or None where the set has no such icon."""
    icon = icons["icons"].get(name)
    if icon is None and name in icons.get("aliases", {}):
        icon = icons["icons"].get(icons["aliases"][name]["parent"])
    if icon is None:
        return None
    size = {key: icon.get(key, icons.get(key, default)) for key, default in
            {"left": 0, "top": 0, "width": 16, "height": 16}.items()}  # fmt: skip
    box = " ".join(map(str, size.values()))
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} width="{size["width"]}" height="{size["height"]}" viewBox="{box}">{icon["body"]}</svg>'


def render(svg: str) -> Image.Image:
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE))))


def drawings_of(package: Package, folder: Path) -> Iterator[tuple[int, Image.Image]]:
    """(class, picture) of every drawing in a package."""
    archive = folder / package.archive
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} is missing; run: npm pack {package.npm}@{package.version}")
    content = member(archive, "icons.json")
    if content is None:
        for label, thing in enumerate(CLASSES):
            for code in thing.codes:
                picture = member(archive, f"assets/{code}.webp")
                if picture is not None:
                    yield label, Image.open(io.BytesIO(picture))
        return
    icons = json.loads(content)
    for label, thing in enumerate(CLASSES):
        found = (svg_of(icons, name) for name in names_in(package, thing))
        for svg in dict.fromkeys(svg for svg in found if svg is not None):
            yield label, render(svg)


def names_in(package: Package, thing: PictureClass) -> tuple[str, ...]:
    return thing.fxemoji if package.npm.endswith("fxemoji") else thing.names


def centred(picture: Image.Image) -> Tensor:
    """Colour and alpha (4, 64, 64) uint8; the drawing fills 7/8 of the square, its colour reaches under the edge."""
    picture = picture.convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())
    inner = SIZE * 7 // 8
    scale = inner / max(picture.size)
    # Premultiplied, so that the colour of transparent pixels does not bleed into the edge.
    small = picture.convert("RGBa").resize([max(1, round(s * scale)) for s in picture.size], Image.Resampling.LANCZOS)
    square = Image.new("RGBa", (SIZE, SIZE))
    square.paste(small, ((SIZE - small.width) // 2, (SIZE - small.height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def prepare(folder: Path) -> Drawings:
    pictures, labels, artists = [], [], []
    for number, package in enumerate(PACKAGES):
        for label, picture in drawings_of(package, folder):
            pictures.append(centred(picture))
            labels.append(label)
            artists.append(number)
    return Drawings(torch.stack(pictures), torch.tensor(labels), torch.tensor(artists))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the archives that npm pack wrote")
    parser.add_argument("--out", type=Path, help="default: drawings.safetensors in that folder")
    args = parser.parse_args()
    drawings = prepare(args.folder)
    out = args.out or args.folder / "drawings.safetensors"
    save_drawings(drawings, out, {package.npm: f"{package.version}, {package.licence}" for package in PACKAGES})
    counts = drawings.labels.bincount(minlength=len(CLASSES))
    print(f"{len(drawings.labels)} drawings of {len(CLASSES)} things in {out}: {int(counts.min())} to "
          f"{int(counts.max())} of each")  # fmt: skip


if __name__ == "__main__":
    main()
