import pytest

from unziplora.config.probe import ProbeConfig, WordPair
from unziplora.config.recipe import resolve
from unziplora.errors import UserError

WORDS = {"contents": ["cat", "dog", "fox"], "styles": ["ink", "oil paint"]}


def test_a_pair_swaps_one_word_on_each_axis():
    first, second = ProbeConfig(**WORDS, pairs=2).word_pairs()
    assert first == WordPair("cat", "ink", "dog", "oil paint")
    assert second == WordPair("dog", "oil paint", "fox", "ink")


@pytest.mark.parametrize(("contents", "styles"), [(2, 2), (3, 2), (6, 5), (3, 7)])
def test_no_swap_comes_twice_however_many_pairs_are_asked_for(contents: int, styles: int):
    most = contents * min(contents - 1, styles * (styles - 1))
    config = ProbeConfig(
        contents=[f"thing {n}" for n in range(contents)], styles=[f"look {n}" for n in range(styles)], pairs=most
    )
    pairs = config.word_pairs()
    assert all(pair.content != pair.other_content and pair.style != pair.other_style for pair in pairs)
    assert len({(pair.content, pair.other_content, pair.style) for pair in pairs}) == most
    assert len({(pair.content, pair.style, pair.other_style) for pair in pairs}) == most
    assert {pair.content for pair in pairs} == set(config.contents)


def test_the_defaults_have_pairs_with_every_word():
    config = ProbeConfig()
    pairs = config.word_pairs()
    assert len(pairs) == config.pairs
    assert {pair.content for pair in pairs} == set(config.contents)
    assert {pair.style for pair in pairs} == set(config.styles)
    assert config.fill(pairs[0].content, pairs[0].style) == "a house in pencil sketch style"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"contents": ["cat"]}, "contents: "),
        ({"contents": ["cat", " "]}, "a word is empty"),
        ({"styles": ["ink", "Ink "]}, "'Ink' is there twice"),
        ({"styles": ["ink", "Cat"]}, "'cat' is both a content and a style"),
        ({"pairs": 7}, "3 contents and 2 styles make 6 pairs at most, not 7"),
        ({"prompt": "a {content}"}, "must name {style} once"),
        ({"measure": "clip"}, "unknown key 'measure'"),
        ({"seeds": [-1]}, "from 0 on"),
        ({"style_block": 2}, "did you mean 'style_blocks'"),
    ],
)
def test_configurations_that_cannot_be_are_refused(keys: dict, message: str):
    with pytest.raises(UserError, match=message):
        resolve(ProbeConfig, {**WORDS, "pairs": 1}, keys)
