"""Captions and the tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from recipes.base.captions import STYLE_WORDS, draw_prompt, strip_colors, with_article, wordings
from recipes.base.filters import FILTERS
from recipes.base.tokenizer import build_tokenizer, read_merges
from recipes.base.world import Item
from unziplora.errors import UserError


def test_plainest_wording_comes_first() -> None:
    assert wordings("full", "red apple", "watercolor")[0] == "a red apple in watercolor painting style"
    assert wordings("content", "red apple")[0] == "a red apple"
    assert wordings("style", style="watercolor")[0] == "an image in watercolor painting style"
    assert wordings("empty") == [""]


def test_every_kind_has_several_wordings_that_differ() -> None:
    assert set(FILTERS) <= set(STYLE_WORDS)
    for style in STYLE_WORDS:
        for kind in ("full", "style"):
            prompts = wordings(kind, "key", style)
            assert len(set(prompts)) == len(prompts) >= 6
    assert len(set(wordings("content", "key"))) == 3
    plainest = [wordings("full", "key", style)[0] for style in STYLE_WORDS]
    assert len(set(plainest)) == len(plainest)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("red apple", "an apple"), ("light bulb", "a light bulb"), ("cherries", "cherries"), ("cactus", "a cactus")],
)
def test_caption_loses_colors_and_gets_an_article(caption: str, expected: str) -> None:
    assert with_article(strip_colors(caption)) == expected


def test_prompts_of_black_images_name_no_color() -> None:
    assert Item("red-apple", "noto-mono-light", "ink").black
    assert Item("red-apple", "noto", "pencil", "pencil").black
    assert not Item("red-apple", "noto", "oil", "oil").black
    rng = np.random.default_rng(0)
    assert not any("red" in draw_prompt("full", "red apple", "ink", rng, black=True).split() for _ in range(20))


def test_article_agrees_with_style() -> None:
    assert "an oil painting of a key" in wordings("full", "key", "oil")


MERGES = [("a", "p"), ("ap", "p"), ("app", "l"), ("appl", "e</w>"), ("r", "e"), ("re", "d</w>")]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_tokenizer_round_trips(tmp_path: Path, pad: str) -> None:
    tokenizer = build_tokenizer(MERGES, pad_token=pad)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for prompt in ("a red apple", "sks", "Käse 3d!", ""):
        ids = tokenizer(prompt, padding="max_length", truncation=True).input_ids
        assert ids == loaded(prompt, padding="max_length", truncation=True).input_ids
        assert len(ids) == 77
        assert ids[0] == tokenizer.bos_token_id
        assert max(ids) == tokenizer.eos_token_id == len(tokenizer) - 1
        assert ids[-1] == tokenizer.pad_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer("red apple").input_ids[1:-1]) == ["red</w>", "apple</w>"]
    assert tokenizer("sks").input_ids[1:-1] == tokenizer.convert_tokens_to_ids(["s", "k", "s</w>"])


def test_merges_are_a_prefix_with_common_words() -> None:
    assert read_merges(2) == [("i", "n"), ("t", "h")]
    tokenizer = build_tokenizer(read_merges(3500))
    assert len(tokenizer) == 2 * 256 + 3500 + 2
    assert tokenizer.convert_ids_to_tokens(tokenizer("red apple").input_ids[1:-1]) == ["red</w>", "apple</w>"]
    assert len(tokenizer("sks").input_ids) == 4
    with pytest.raises(UserError, match="merges"):
        read_merges(50_000)


def test_prompts_of_graded_images_name_paper_and_no_color() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_prompt("full", "red apple", "watercolor", rng, paper="grainy blue paper") for _ in range(20)]
    assert all(prompt.endswith(" on grainy blue paper") and "red" not in prompt.split() for prompt in drawn)
    assert draw_prompt("empty", "red apple", "watercolor", rng, paper="grainy blue paper") == ""
