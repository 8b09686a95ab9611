"""Text that is safe to show."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unziplora.utils.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\u001b[31mred\\u001b[0m"),
        ("\x9b2J", "\\u009b2J"),
        ("a\rb\x08\x7f\0", "a\\u000db\\u0008\\u007f\\u0000"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("caf\udce9", "caf\\udce9"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("café 猫 👩‍🎨 שלום", "café 猫 👩‍🎨 שלום"),
    ],
)
def test_only_commands_and_overrides_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_escaped_json_is_the_same_json(text: str) -> None:
    shown = printable(json.dumps({text: text}, ensure_ascii=False))
    assert json.loads(shown) == {text: text}
    assert not any(0x7F <= ord(letter) < 0xA0 or ord(letter) < 32 for letter in shown)
