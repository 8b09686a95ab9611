"""Text from files and people, made safe to show and laid out as tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# C0 and C1 controls but tab and line feed, marks and overrides of direction, line separators, half characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Escape the characters that command a terminal or hide what follows, as `\u001b`; JSON stays the same JSON."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format cells as a Markdown table; a bar or a line end in a cell would end it, even in code."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([first, "|---" * len(head) + "|", *others])
