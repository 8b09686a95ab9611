"""Prompt templates: placeholders, unmatched braces, and a "style" that would be said twice."""

import pytest

from unziplora.config.templates import fill
from unziplora.errors import UserError


@pytest.mark.parametrize(
    ("template", "style", "filled"),
    [
        ("a fox in {style} style", "ink", "a fox in ink style"),
        ("a fox in {style} style", "comic style", "a fox in comic style"),
        ("a fox in {style} style, at night", "comic style", "a fox in comic style, at night"),
        ("a fox in {style} style", "style", "a fox in style"),
        ("a fox in {style} style", "freestyle", "a fox in freestyle style"),
        ("a fox in {style} styles", "comic style", "a fox in comic style styles"),
        ("a fox in {style}, style", "comic style", "a fox in comic style, style"),
    ],
)
def test_template_style_is_dropped_after_a_style_that_ends_in_that_word(template: str, style: str, filled: str) -> None:
    assert fill(template, {"style": style}) == filled


@pytest.mark.parametrize("text", ["freestyle style photo", "a style style", "hairstyle styles", "in free-style style"])
def test_words_of_the_user_are_never_changed(text: str) -> None:
    assert fill(text, {"style": "comic style"}) == text
    assert fill("{content} in {style}", {"content": text, "style": text}) == f"{text} in {text}"
    assert fill("{content} style", {"content": "comic style"}) == "comic style style"


@pytest.mark.parametrize("template", ["a {content", "a content}", "a {{content}}", "{"])
def test_unmatched_braces_are_reported(template: str) -> None:
    with pytest.raises(UserError, match=r"unmatched brace; write placeholders as \{token\}"):
        fill(template, {"content": "cat"})


def test_unknown_placeholder_is_reported_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"\{color\} is not known here; known: \{content\}, \{style\}"):
        fill("{color} style", {"content": "cat", "style": "ink"})
