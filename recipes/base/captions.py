"""Prompts of the world: content and style, content alone, style alone, empty."""

from __future__ import annotations

from typing import Literal

import numpy as np

Kind = Literal["full", "content", "style", "empty"]

STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "flat": ("flat vector emoji", "flat cartoon icon", "simple flat illustration"),
    "3d": ("glossy 3d render", "smooth 3d icon", "3d render"),
    "gradient": ("soft gradient cartoon", "shaded cartoon emoji"),
    "ink": ("thin ink line drawing", "fine line art", "ink outline drawing"),
    "bold": ("thick ink line drawing", "bold line art", "thick black outline drawing"),
    "stencil": ("black and white stencil icon", "stencil", "bold black and white icon"),
    "glyph": ("solid black glyph", "black silhouette icon", "monochrome glyph"),
    "engraved": ("hand inked pictogram", "engraved pictogram", "old engraving"),
    "pencil": ("pencil sketch", "graphite pencil drawing", "hatched pencil drawing"),
    "crayon": ("wax crayon drawing", "child's crayon drawing", "crayon"),
    "chalk": ("chalk drawing on a blackboard", "pastel chalk drawing", "chalkboard drawing"),
    "blueprint": ("blueprint", "technical blueprint drawing", "blueprint drawing"),
    "linocut": ("linocut print", "block print", "one color linocut"),
    "watercolor": ("watercolor painting", "watercolor", "wet watercolor wash"),
    "oil": ("oil painting", "thick oil painting", "oil on canvas"),
    "pointillism": ("pointillism painting", "painting of colored dots", "pointillist"),
    "halftone": ("pop art halftone", "comic pop art", "halftone print"),
    "neon": ("neon sign", "glowing neon", "neon lights"),
    "pixelart": ("pixel art", "8-bit pixel art", "retro game sprite"),
    "mosaic": ("tile mosaic", "mosaic", "roman mosaic"),
    "crossstitch": ("cross stitch", "cross stitch embroidery", "embroidery"),
    "stained": ("stained glass", "stained glass window", "leaded glass"),
    "clay": ("clay model", "plasticine", "modelled clay"),
}

FULL = (
    "{content} in {style} style",
    "{content}, {style}",
    "a {style} of {content}",
    "{content} in the style of {style}",
)
CONTENT = ("{content}", "an image of {content}", "a picture of {content}")
STYLE = ("an image in {style} style", "{style} style", "a picture in {style} style", "{style}")

COLORS = frozenset(
    {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gray"}
    | {"golden", "silver", "dark", "light"}
)
NOT_COLORS = frozenset({"light bulb", "black nib", "white flower", "orange book"})


def strip_colors(caption: str) -> str:
    """Remove color words from a caption, for images that are black: "red apple" becomes "apple"."""
    if caption in NOT_COLORS:
        return caption
    words = [word for word in caption.split() if word not in COLORS]
    return " ".join(words) or caption


def with_article(caption: str) -> str:
    """Put an article before a caption: "apple" becomes "an apple"; "cherries" stays as it is."""
    last = caption.split()[-1]
    if last.endswith("s") and not last.endswith(("us", "ss")):
        return caption
    return f"{'an' if caption[0] in 'aeiou' else 'a'} {caption}"


def fill(template: str, caption: str | None, style_words: str | None) -> str:
    """Fill a template; the article before a style agrees with it."""
    text = template.format(content=with_article(caption) if caption else "", style=style_words or "")
    if text.startswith("a ") and text[2] in "aeiou":
        text = "an " + text[2:]
    return text


def wordings(kind: Kind, caption: str | None = None, style: str | None = None) -> list[str]:
    """Return every prompt of a kind for a caption and a style (a key of STYLE_WORDS), the plainest first."""
    if kind == "empty":
        return [""]
    if kind == "content":
        return [fill(template, caption, None) for template in CONTENT]
    words = STYLE_WORDS[style or ""]
    if kind == "style":
        return [fill(template, None, word) for word in words for template in STYLE]
    return [fill(template, caption, word) for word in words for template in FULL]


def restyled(prompt: str, style: str, other: str) -> str:
    """Put other words in the place of a style's words in a prompt; a prompt that names no style stays as it is."""
    words = (words for words in sorted(STYLE_WORDS[style], key=len, reverse=True) if words in prompt)
    own = next(words, None)
    return prompt if own is None else other.join(prompt.rsplit(own, 1))


def draw_prompt(
    kind: Kind, caption: str, style: str, rng: np.random.Generator, *, black: bool = False, paper: str = ""
) -> str:
    """Draw a random wording, without color words if the image cannot show them, and with the paper if there is one."""
    choices = wordings(kind, strip_colors(caption) if black or paper else caption, style)
    prompt = choices[int(rng.integers(len(choices)))]
    return f"{prompt} on {paper}" if prompt and paper else prompt
