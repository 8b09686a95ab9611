"""Images of any format and mode, as RGB images and tensors of the size at which they are learned."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unziplora.errors import UserError
from unziplora.images.colors import to_gray, to_rgb
from unziplora.images.files import SMALLEST_SIDE, Box, open_upright

Size = tuple[int, int]
"""Width and height in pixels."""

_LOSS_LIMIT = 0.05
"""Share of an image above which what is cut off is a flaw. SDXL's buckets cut off less than 4 %."""


@dataclass(frozen=True)
class ImageFile:
    """An image to learn from, with its subject mask and the part to use, in pixels of the upright image, if any."""

    path: Path
    mask: Path | None = None
    crop: Box | None = None


class Enlarged(NamedTuple):
    """Flaw of a training image: it has fewer pixels than are learned."""

    path: Path
    size: Size
    learned: Size

    def __str__(self) -> str:
        return (
            f"{self.path} is only {self.size[0]}×{self.size[1]} pixels and was enlarged to "
            f"{self.learned[0]}×{self.learned[1]}; a larger original gives sharper results"
        )


class Cut(NamedTuple):
    """Flaw of a training image: much of it, or of its subject if there is a mask, is cut off.

    Attributes:
        share: cut off, of the image or of the subject.
    """

    path: Path
    size: Size
    learned: Size
    share: float
    of_subject: bool

    @property
    def sides(self) -> str:
        wide = self.size[0] * self.learned[1] > self.size[1] * self.learned[0]
        return "left and right" if wide else "top and bottom"

    @property
    def loss(self) -> str:
        """What is lost, without a remedy."""
        return (
            f"{self.share:.0%} of {'the subject in ' * self.of_subject}{self.path} ({self.size[0]}×{self.size[1]}) is "
            f"cut off at the {self.sides} to make it {self.learned[0]}×{self.learned[1]}"
        )

    def __str__(self) -> str:
        return f"{self.loss}; choose the part with --crop X,Y,W,H, or keep all of it with --fit pad"


Flaw = Enlarged | Cut


@dataclass(frozen=True)
class TrainingImage:
    """An image as it is learned.

    Attributes:
        image: RGB, of the training size.
        sizes: SDXL's size conditioning: height and width of the whole image scaled to the training size, top and left
            of the part used, height and width of that part.
        mask: subject mask [1, H, W] in 0…1, or None.
        inside: 1 where the image is and 0 in its padding, [1, H, W]; None without padding.
        flaws: losses on the way to the training size that a person should know of.
    """

    image: Image.Image
    sizes: tuple[int, int, int, int, int, int]
    mask: Tensor | None = None
    inside: Tensor | None = None
    flaws: tuple[Flaw, ...] = ()

    def learned(self) -> Image.Image:
        """Return the image faded where it does not count."""
        if self.mask is None:
            return self.image
        faded = Image.blend(self.image, Image.new("RGB", self.image.size, "white"), 0.8)
        return Image.composite(self.image, faded, Image.fromarray((self.mask[0] * 255).round().byte().numpy()))


@dataclass(frozen=True)
class _Opened:
    """An opened image, reduced if it has many pixels, the size of the part used before that, and its mask."""

    file: ImageFile
    image: Image.Image
    size: Size
    mask: Image.Image | None

    @property
    def center(self) -> tuple[float, float]:
        """Center of the subject as shares of width and height; of the image without a mask."""
        box = self.mask and self.mask.point(lambda level: 255 * (level > 127)).getbbox()
        if not self.mask or not box:
            return 0.5, 0.5
        return (box[0] + box[2]) / 2 / self.mask.width, (box[1] + box[3]) / 2 / self.mask.height


def load_image(path: Path, size: int | Size) -> Image.Image:
    """Open an image as RGB, as its middle of a width and height (Lanczos), or as a square with a side in pixels.

    Turns it by its EXIF data, converts colors to sRGB, puts transparency on white, and takes the first frame of an
    animation. Warns where that loses something.

    Raises:
        UserError: missing, a folder, empty, truncated, too large, of another format, or not an image.
        MachineError: no permission, or not enough memory.
    """
    (loaded,) = load_images([ImageFile(path)], [(size, size) if isinstance(size, int) else size])
    warn_of_flaws(loaded.flaws)
    return loaded.image


def warn_of_flaws(flaws: Iterable[Flaw]) -> None:
    """Warn of what images lost on the way to their training size."""
    for flaw in flaws:
        warnings.warn(str(flaw), stacklevel=3)


def load_images(
    files: Sequence[ImageFile], sizes: Sequence[Size], *, whole: bool = False, uncropped: bool = False
) -> list[TrainingImage]:
    """Open images and their masks once each, all in the one of some sizes that cuts off least of any image.

    What is cut off lies at opposite edges, or away from the subject if there is a mask. The flaws of the
    result cause no warnings.

    Args:
        whole: cut off nothing, and pad with white.
        uncropped: condition on the size as if the part used were the whole image.

    Raises:
        UserError: as `load_image`; a crop is outside its image; a mask is black where its image is used, or not of its
            shape.
        MachineError: no permission, or not enough memory.
    """
    side = max(min(size) for size in sizes)
    opened = [_open(file, side) for file in files]

    def lost(size: Size) -> tuple[float, int]:
        return round(max((share_lost(one.size, size) for one in opened), default=0), 6), -size[0] * size[1]

    size = min(sizes, key=lost)
    return [_padded(one, size) if whole else _fitted(one, size, uncropped) for one in opened]


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a tensor [3, H, W] in −1…1."""
    values = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32))
    return values.permute(2, 0, 1) / 127.5 - 1


def _open(file: ImageFile, side: int) -> _Opened:
    crop = file.crop
    image, size = open_upright(file.path, side, to_rgb, (lambda _: crop) if crop else None)
    mask = None
    if file.mask is not None:
        mask, mask_size = open_upright(file.mask, 2 * side, to_gray, partial(_scaled, crop, size) if crop else None)
        if abs(mask_size[0] * size[1] - mask_size[1] * size[0]) > max(*mask_size, *size):  # a pixel of rounding is fine
            raise UserError(
                f"mask {file.mask} is {mask_size[0]}×{mask_size[1]} pixels, its image {size[0]}×{size[1]}: "
                "make the mask the same size as the image"
            )
    return _Opened(file, image, crop[2:] if crop else size, mask)


def _scaled(crop: Box, image: Size, mask: Size) -> Box:
    """Convert an image's crop to pixels of its mask, which may have another size."""
    edges = crop[0], crop[1], crop[0] + crop[2], crop[1] + crop[3]
    left, top, right, bottom = (round(edge * mask[axis % 2] / image[axis % 2]) for axis, edge in enumerate(edges))
    return left, top, right - left, bottom - top


def share_lost(image: Size, size: Size) -> float:
    """Return the share of an image that is cut off to give it the proportions of a size."""
    ratio = image[0] * size[1] / (image[1] * size[0])
    return 1 - min(ratio, 1 / ratio)


def _fitted(one: _Opened, size: Size, uncropped: bool) -> TrainingImage:
    """Cut the proportions of a size out of an image, and scale that part to it."""
    image, centering = one.image, _centering(one, size)
    scale = max(size[0] / image.width, size[1] / image.height)
    whole = round(image.width * scale), round(image.height * scale)
    left, top = (round((whole[axis] - size[axis]) * centering[axis]) for axis in (0, 1))
    mask = None
    if one.mask is not None:
        mask = _tensor(ImageOps.fit(one.mask, size, Image.Resampling.BOX, centering=centering))
        if not mask.any():
            raise UserError(f"mask {one.file.mask} is black where the image is used: paint the subject white")
    flaws = (*_enlarged(one, size, max(size[0] / one.size[0], size[1] / one.size[1])), *_cut(one, size, mask))
    fitted = ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=centering)
    if uncropped:
        whole, left, top = size, 0, 0
    return TrainingImage(fitted, (whole[1], whole[0], top, left, size[1], size[0]), mask, flaws=flaws)


def _centering(one: _Opened, size: Size) -> tuple[float, float]:
    """Return the share of what is cut off that lies left and above, so that the subject is in the middle."""
    ratio = one.image.width * size[1] / (one.image.height * size[0])
    shares = min(1.0, 1 / ratio), min(1.0, ratio)  # of width and height that stay
    cut = [1 - share for share in shares]
    return tuple(  # type: ignore[return-value]
        min(1.0, max(0.0, (center - share / 2) / off)) if off > 0 and center != 0.5 else 0.5
        for center, share, off in zip(one.center, shares, cut, strict=True)
    )


def _padded(one: _Opened, size: Size) -> TrainingImage:
    """Scale an image so that all of it is inside a size, in the middle, on white.

    Raises:
        UserError: it would be too thin to learn from; its mask is black.
    """
    factor = min(size[0] / one.size[0], size[1] / one.size[1])
    if factor * min(one.size) < SMALLEST_SIDE:
        raise UserError(
            f"{one.file.path} ({one.size[0]}×{one.size[1]}) would be thinner than {SMALLEST_SIDE} pixels if all of it "
            f"were scaled into {size[0]}×{size[1]}: choose a part with --crop X,Y,W,H"
        )
    flaws = _enlarged(one, size, factor)
    padded = ImageOps.pad(one.image, size, Image.Resampling.LANCZOS, color="white")
    everywhere = Image.new("L", one.image.size, 255)
    inside = _tensor(ImageOps.pad(everywhere, size, Image.Resampling.BOX, color=0))
    mask = None
    if one.mask is not None:
        shape = one.mask.resize(one.image.size, Image.Resampling.BOX)
        mask = _tensor(ImageOps.pad(shape, size, Image.Resampling.BOX, color=0))
        if not mask.any():
            raise UserError(f"mask {one.file.mask} is black: paint the subject white")
    sizes = (size[1], size[0], 0, 0, size[1], size[0])
    return TrainingImage(padded, sizes, mask, None if bool(inside.all()) else inside, flaws)


def _tensor(gray: Image.Image) -> Tensor:
    """Convert a gray image to a tensor [1, H, W] in 0…1."""
    return torch.from_numpy(np.array(gray, dtype=np.float32) / 255)[None]


def _enlarged(one: _Opened, size: Size, factor: float) -> tuple[Flaw, ...]:
    return (Enlarged(one.file.path, one.size, size),) if factor > 1 else ()


def _cut(one: _Opened, size: Size, mask: Tensor | None) -> tuple[Flaw, ...]:
    """Return the flaw of an image of which much is cut off; with a mask, if some of the subject is."""
    lost = share_lost(one.size, size)
    if one.mask is not None and mask is not None:
        kept = float(mask.mean()) * (1 - lost) / (np.asarray(one.mask).mean() / 255)
        lost = 1 - kept
    return (Cut(one.file.path, one.size, size, lost, mask is not None),) if lost > _LOSS_LIMIT else ()
