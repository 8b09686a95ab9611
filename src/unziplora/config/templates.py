"""Prompt templates with the placeholders {token}, {content} and {style}, and the words that go into them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping

from unziplora.errors import UserError

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}( style\b)?")
"""A placeholder, and the word "style" if it follows."""

_ARTICLE = re.compile(r"(?:an?|the)\s+(?=\S)", re.IGNORECASE)
_IN_STYLE = re.compile(r"in\s+(?:(?:an?|the)\s+)?(?:style\s+of\s+)?(\S.*?)(?:\s+style)?", re.IGNORECASE)

_UI_SYNTAX = re.compile(
    "|".join(
        (
            r"\([^():]{0,200}[^\W\d][^():]{0,200}(?:(?<!\d):\s*[-+]?\d*\.?\d+|:\s*\d*\.\d+)\s*\)",  # (cat:1.2)
            r"\({2,}[^()]+\){2,}",
            r"\([^()]+\)(?:\d*\.\d+|\++(?!\w)|--+(?!\w))",  # (cat)1.2, (cat)++
            r"\[+[^\[\]]{2,}\]+",  # not the [v] of papers
            r"<(?:lora|lyco|hypernet):[^<>]*>",
            r"(?<![A-Z] )\bBREAK\b(?! [A-Z]{2})",
            r"(?<=[a-z\d,.)] )AND(?= [a-z(])",
            r"\bembedding:[^\s,()]+",
            r"\b__[\w/*-]+__\b",  # a file of wildcards
            r"\\[()]",
        )
    )
)
"""Syntax that user interfaces interpret, and text encoders read as letters."""


def fill(template: str, words: Mapping[str, str]) -> str:
    """Fill words into a template. After a style that ends in the word "style", the template's own "style" is dropped.

    Raises:
        UserError: the template names an unknown placeholder, or a brace is unmatched.
    """
    if set("{}") & set(_PLACEHOLDER.sub("", template)):
        raise UserError(f"prompt {template!r}: unmatched brace; write placeholders as {{token}}")

    def word(match: re.Match[str]) -> str:
        name, following = match[1], match[2] or ""
        if name not in words:
            known = ", ".join(f"{{{name}}}" for name in words) or "none, because no run folder is given"
            hint = "; of choices, write one" if "|" in name else ""
            raise UserError(f"prompt {template!r}: {{{name}}} is not known here{hint}; known: {known}")
        repeated = name == "style" and re.search(r"\bstyle$", words[name])
        return words[name] if repeated else words[name] + following

    return _PLACEHOLDER.sub(word, template)


def in_style(prompt: str, style: str) -> str:
    """Return a prompt in a style; one that ends in the word "style" gets no other."""
    return f"{prompt} in {fill('{style} style', {'style': style})}"


def plain_words(text: str, style: bool = False) -> str:
    """Return words as templates need them: "a cat" becomes "cat", and the style "in ink style" becomes "ink".

    Raises:
        ValueError: nothing is left, or there are braces, which only templates may have.
    """
    if not text.strip():
        raise ValueError("must not be blank")
    if set("{}") & set(text):
        raise ValueError("braces stand for placeholders in prompts: leave them out of words")
    text = " ".join(text.split())
    if style and (named := _IN_STYLE.fullmatch(text)):
        return named[1]
    return _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text


def same_words(one: str, other: str) -> bool:
    """Return whether two styles or subjects are the same, whatever their case and a "style" at their end."""
    return one.casefold().removesuffix(" style") == other.casefold().removesuffix(" style")


def ui_syntax(prompts: Iterable[str]) -> list[str]:
    """Return the parts of prompts that user interfaces interpret; here they are read as letters."""
    return list(dict.fromkeys(match[0] for text in prompts for match in _UI_SYNTAX.finditer(text)))


def warn_of_ui_syntax(prompts: Iterable[str]) -> None:
    """Warn once of syntax that user interfaces interpret, because here it is read as letters."""
    if matches := ui_syntax(prompts):
        warnings.warn(
            f"read as plain letters, because weights, LoRAs and other syntax of user interfaces have no effect in "
            f"prompts here: {', '.join(matches)}",
            stacklevel=2,
        )
