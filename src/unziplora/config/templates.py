"""Prompt templates, in which {token}, {content} and {style} stand for words."""

from __future__ import annotations

import re
from collections.abc import Mapping

from unziplora.errors import UserError

_WORD = re.compile(r"\{([^{}]*)\}")


def fill(template: str, words: Mapping[str, str]) -> str:
    """Put words into a template; a style that ends in "style" does not say it twice.

    Raises:
        UserError: the template asks for a word that is not known, or a brace has no partner.
    """
    if set("{}") & set(_WORD.sub("", template)):
        raise UserError(f"prompt {template!r}: a brace has no partner; braces are for words such as {{token}}")

    def word(match: re.Match[str]) -> str:
        if match[1] not in words:
            known = ", ".join(f"{{{name}}}" for name in words) or "none, because no run folder is given"
            raise UserError(f"prompt {template!r}: {match[0]} is not known here; known: {known}")
        return words[match[1]]

    return _WORD.sub(word, template).replace("style style", "style")
