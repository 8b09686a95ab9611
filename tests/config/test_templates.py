"""Prompt templates: placeholders, unmatched braces, and a "style" that would be said twice."""

import warnings

import pytest

from unziplora.config.templates import fill, in_style, plain_words, warn_of_ui_syntax
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


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a cat", "cat"),
        ("An  owl", "owl"),
        ("the big dog", "big dog"),
        ("A-frame house", "A-frame house"),
        ("a-ha band", "a-ha band"),
        ("theatre", "theatre"),
        ("apple", "apple"),
        ("a", "a"),
        ("in ink style", "in ink style"),
    ],
)
def test_articles_are_dropped_from_words(text: str, plain: str) -> None:
    assert plain_words(text) == plain
    assert fill("a {token} {content}", {"token": "sks", "content": plain_words("a cat")}) == "a sks cat"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("in ink style", "ink"),
        ("in an ink style", "ink"),
        ("ink style", "ink style"),
        ("in watercolor", "watercolor"),
        ("a pencil sketch", "pencil sketch"),
        ("in the style of Van Gogh", "Van Gogh"),
        ("freestyle", "freestyle"),
        ("in freestyle", "freestyle"),
        ("instyle", "instyle"),
        ("art style of Moebius", "art style of Moebius"),
        ("style", "style"),
        ("in style", "style"),
    ],
)
def test_templates_say_in_and_style_for_a_style(text: str, plain: str) -> None:
    assert plain_words(text, style=True) == plain
    for style in ("in ink style", "ink style"):
        assert fill("an image in {style} style", {"style": plain_words(style, style=True)}) == "an image in ink style"


@pytest.mark.parametrize("text", ["a {cat}", "{a|b}", "cat}", "{"])
def test_braces_in_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="braces stand for placeholders in prompts"):
        plain_words(text)


def test_choices_in_a_template_are_explained() -> None:
    with pytest.raises(UserError, match=r"\{a\|b\} is not known here; of choices, write one"):
        fill("{a|b}", {"content": "cat"})


@pytest.mark.parametrize(
    "syntax",
    [
        *("(cat:1.2)", "(red cat, blue hat:1.1)", "(masterpiece:1)", "(cat: .8 )", "((cat))", "(cat)1.3", "(cat)++"),
        *(
            "[cat]",
            "[cat:dog:0.5]",
            "<lora:ink-v1.5:0.8>",
            "<lyco:x:1>",
            "embedding:easynegative",
            "__color__",
            "BREAK",
        ),
        *("AND", r"\("),
    ],
)
def test_syntax_of_user_interfaces_is_named_once(syntax: str) -> None:
    prompts = [f"a sks cat {syntax} in ink style", f"a dog {syntax} on a beach"]
    with pytest.warns(UserWarning, match="read as plain letters") as caught:
        warn_of_ui_syntax(prompts)
    assert [str(warning.message).partition("here: ")[2] for warning in caught] == [syntax]


@pytest.mark.parametrize(
    "text",
    [
        *("a cat (animal)", "(a) and (b)", "a film still (16:9)", "(2:1) format", "(aspect 16:9)", "Psalm (23:4)"),
        *("cat (1990)", "an image in [v] style", "BLACK AND WHITE PHOTO", "NEW YORK BREAK DANCE", "a breakfast", "c++"),
        *("a (very (nested) thing) here", "rock (AND roll)", "a <cat-toy>", "ratio 4:3"),
    ],
)
def test_ordinary_prompts_cause_no_warning(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_ui_syntax([text])


def test_a_style_that_ends_in_that_word_gets_no_other() -> None:
    assert in_style("a cat", "anime style") == "a cat in anime style"
    assert in_style("a cat", "oil painting") == "a cat in oil painting style"
