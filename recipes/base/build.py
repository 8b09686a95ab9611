"""Build the image world from package registries: ``python -m recipes.base.build FOLDER``.

Drawings come from npm (`npm` must be installed) and, for Symbola, from Debian (`apt-get`; left out where
that is missing). `world.json` lists the concepts and their names in each set.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes import run
from recipes.base.filters.common import Pixels
from unziplora.errors import UserError

WORLD = Path(__file__).with_name("world.json")
ICONIFY = "@iconify/json@2.2.535"
FLUENT_3D = "@lobehub/fluent-emoji-3d@1.1.0"
NOTO_MONO = "@fontsource/noto-emoji@5.3.2"
SIZE = 128
Draw = Callable[[], Pixels]


class Package:
    """Package of npm, downloaded once into `folder` and read without unpacking."""

    def __init__(self, name: str, folder: Path):
        stem = name.rsplit("@", 1)[0].lstrip("@").replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob(f"{stem}-*.tgz")):
            if not shutil.which("npm"):
                raise UserError("npm is missing: install Node.js, or put emoji128.zip in place by hand")
            subprocess.run(["npm", "pack", "--silent", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        self.archive = tarfile.open(next(folder.glob(f"{stem}-*.tgz")))  # noqa: SIM115
        self.members = {m.name.removeprefix("package/"): m for m in self.archive.getmembers()}

    def read(self, path: str) -> bytes:
        """Read the bytes of a file."""
        return self.archive.extractfile(self.members[path]).read()


def plain(code: str) -> str:
    """Remove variation selectors from a code point sequence: "2600-fe0f" becomes "2600"."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f").lstrip("0")


def svg(icons: dict, name: str) -> str:
    """Return an icon of an iconify set as an SVG document."""
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="{box}" width="{width}" height="{height}" color="#000">{icon["body"]}</svg>'


def rgba(data: bytes) -> Pixels:
    """Decode an image file as RGBA."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


def rasterize(document: str, width: int = 256) -> Pixels:
    """Draw an SVG document as RGBA."""
    import resvg_py

    return rgba(bytes(resvg_py.svg_to_bytes(svg_string=document, width=width, height=width, skip_system_fonts=True)))


def iconify(key: str, world: dict, packages: Path) -> Iterator[tuple[str, Draw]]:
    """Yield the drawings of an iconify set, by code point or else by the set's own name."""
    icons = json.loads(Package(ICONIFY, packages).read(f"json/{key}.json"))
    by_code = {plain(code): name for code, name in icons.get("chars", {}).items()}
    names = world["names"].get(key, {})
    known = icons["icons"].keys() | icons.get("aliases", {}).keys()
    for concept in world["concepts"]:
        slug = concept["slug"]
        name = by_code.get(concept["code"]) or names.get(slug, slug)
        if name in known:
            yield slug, lambda name=name: rasterize(svg(icons, name))


def images(key: str, world: dict, packages: Path) -> Iterator[tuple[str, Draw]]:
    """Yield rendered images named by code point."""
    package = Package(FLUENT_3D, packages)
    files = {plain(Path(name).stem): name for name in package.members if name.endswith(".webp")}
    for concept in world["concepts"]:
        if name := files.get(concept["code"]):
            yield (
                concept["slug"],
                lambda name=name: np.asarray(Image.open(io.BytesIO(package.read(name))).convert("RGBA")),
            )


def glyph(data: bytes, code: int, size: int = 220) -> Pixels:
    """Draw a character of a font, black on transparent."""
    font = ImageFont.truetype(io.BytesIO(data), size)
    image = Image.new("L", (560, 480), 0)
    ImageDraw.Draw(image).text((280, 240), chr(code), font=font, fill=255, anchor="mm")
    alpha = np.asarray(image)
    return np.dstack([np.zeros((*alpha.shape, 3), np.uint8), alpha])


def in_ranges(code: int, ranges: str) -> bool:
    """Return true if a code point is in a CSS unicode-range."""
    for part in ranges.replace("U+", "").split(","):
        first, _, last = part.partition("-")
        if int(first, 16) <= code <= int(last or first, 16):
            return True
    return False


def noto_mono(key: str, world: dict, packages: Path) -> Iterator[tuple[str, Draw]]:
    """Yield glyphs of Noto Emoji, whose npm package is split into subsets."""
    package = Package(NOTO_MONO, packages)
    weight = 300 if key.endswith("light") else 700
    subsets = {part.strip("[]"): ranges for part, ranges in json.loads(package.read("unicode.json")).items()}
    for concept in single_characters(world):
        code = int(concept["code"], 16)
        for part, ranges in subsets.items():
            path = f"files/noto-emoji-{part}-{weight}-normal.woff"
            if path in package.members and in_ranges(code, ranges):
                yield concept["slug"], lambda path=path, code=code: glyph(package.read(path), code)
                break


def symbola(key: str, world: dict, packages: Path) -> Iterator[tuple[str, Draw]]:
    """Yield the glyphs that Symbola has, from Debian's package."""
    if not shutil.which("apt-get"):
        print("symbola left out: apt-get is missing")
        return
    if not list(packages.glob("fonts-symbola*.deb")):
        subprocess.run(["apt-get", "download", "-qq", "fonts-symbola"], cwd=packages, check=True)
    subprocess.run(["dpkg", "-x", next(packages.glob("fonts-symbola*.deb")), packages / "symbola"], check=True)
    data = next((packages / "symbola").rglob("Symbola*.ttf")).read_bytes()
    missing = glyph(data, 0x10FFFE)
    for concept in single_characters(world):
        code = int(concept["code"], 16)
        if not np.array_equal(glyph(data, code), missing):
            yield concept["slug"], lambda code=code: glyph(data, code)


def single_characters(world: dict) -> list[dict]:
    """Return the concepts of one code point."""
    return [concept for concept in world["concepts"] if "-" not in concept["code"]]


def source(key: str) -> Callable[[str, dict, Path], Iterator[tuple[str, Draw]]]:
    """Return the reader of a set."""
    special = {"fluent-3d": images, "noto-mono-light": noto_mono, "noto-mono-bold": noto_mono, "symbola": symbola}
    return special.get(key, iconify)


def fit(drawing: Pixels, share: float = 0.9) -> Pixels | None:
    """Crop to the drawing, center it on a square of which it fills `share`, average down to 128 pixels."""
    ys, xs = np.where(drawing[..., 3] > 8)
    if len(ys) < 20:
        return None
    crop = drawing[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.float32)
    side = round(max(crop.shape[:2]) / share)
    square = np.zeros((side, side, 4), np.float32)
    top, left = (side - crop.shape[0]) // 2, (side - crop.shape[1]) // 2
    square[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    square[..., :3] *= square[..., 3:] / 255
    method = cv2.INTER_AREA if side >= SIZE else cv2.INTER_CUBIC
    small = cv2.resize(square, (SIZE, SIZE), interpolation=method)
    alpha = np.clip(small[..., 3:], 0, 255)
    color = np.where(alpha > 0.5, small[..., :3] * 255 / np.maximum(alpha, 1e-3), 255)
    return np.clip(np.dstack([color, alpha]), 0, 255).round().astype(np.uint8)


def build(folder: Path, *, sets: list[str] | None = None, limit: int | None = None) -> int:
    """Write `emoji128.zip` and `meta.json`; return the number of drawings."""
    world = json.loads(WORLD.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    count, temporary = 0, folder / "emoji128.tmp"
    with zipfile.ZipFile(temporary, "w") as archive:
        for key in sets or [entry["key"] for entry in world["sets"]]:
            drawings = list(islice(source(key)(key, world, folder / "packages"), limit))
            for slug, draw in drawings:
                drawing = fit(draw())
                if drawing is not None:
                    data = io.BytesIO()
                    Image.fromarray(drawing).save(data, "webp", lossless=True, exact=True)
                    archive.writestr(f"{key}/{slug}.webp", data.getvalue())
                    count += 1
            print(f"{key}: {len(drawings)} drawings", flush=True)
    temporary.replace(folder / "emoji128.zip")
    shutil.copyfile(WORLD, folder / "meta.json")
    return count


def main() -> None:
    """Build the world in a folder; this takes several minutes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".work/base/world"))
    parser.add_argument("--sets", nargs="*", help="only these sets")
    parser.add_argument("--limit", type=int, help="at most this many drawings of each set, to try it out")
    options = parser.parse_args()
    print(f"{build(options.folder, sets=options.sets, limit=options.limit)} drawings")


if __name__ == "__main__":
    run(main)
