"""Prompt templates with the placeholders {token}, {content} and {style}."""

from __future__ import annotations

import re
from collections.abc import Mapping

from unziplora.errors import UserError

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}( style\b)?")
"""A placeholder, and the word "style" if it follows."""


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
            raise UserError(f"prompt {template!r}: {{{name}}} is not known here; known: {known}")
        repeated = name == "style" and re.search(r"\bstyle$", words[name])
        return words[name] if repeated else words[name] + following

    return _PLACEHOLDER.sub(word, template)
