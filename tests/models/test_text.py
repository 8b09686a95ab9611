import warnings

import pytest
import torch

from unziplora.errors import UserError
from unziplora.models.base import Base
from unziplora.models.text import Prompts, embed, embed_negative, embed_prompts, join_streams, time_ids, unread_end


def test_embeddings_equal_the_pipelines(shared_base: Base):
    result = embed(shared_base, ["a cat", "a sketch"])
    for row, text in enumerate(["a cat", "a sketch"]):
        tokens, _, pooled, _ = shared_base.pipe.encode_prompt(text, device=shared_base.device)
        assert torch.equal(result.tokens[row], tokens[0])
        assert torch.equal(result.pooled[row], pooled[0])


def test_embedding_does_not_depend_on_its_neighbors(shared_base: Base):
    alone, among = embed(shared_base, ["a cat"]), embed(shared_base, ["dog", "a cat", "dog"])
    assert torch.equal(alone.tokens[0], among.tokens[1])
    assert torch.equal(among.tokens[0], among.tokens[2])


def test_join_streams_concatenates_full_content_and_style(shared_base: Base):
    rows = embed(shared_base, ["a cat in ink", "a cat", "ink"])
    tokens = join_streams(*rows.tokens.split(1))
    assert tokens.shape == (1, 77, 3 * 40)
    for part, expected in zip(tokens.split(40, dim=-1), rows.tokens.split(1), strict=True):
        assert torch.equal(part, expected)
    result = embed_prompts(shared_base, Prompts("a cat in ink", "a cat", "ink"))
    assert torch.equal(result.tokens, tokens)
    assert torch.equal(result.pooled, rows.pooled[:1])


def test_empty_negative_prompt_is_zeros(shared_base: Base):
    both = embed_negative(shared_base, ["", "blurry"])
    assert not both.tokens[0].any()
    assert not both.pooled[0].any()
    assert torch.equal(both.tokens[1], embed(shared_base, ["blurry"]).tokens[0])


def test_empty_negative_prompt_is_encoded_without_force_zeros(tiny_base: Base):
    tiny_base.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert torch.equal(embed_negative(tiny_base, [""]).tokens, embed(tiny_base, [""]).tokens)


def test_too_long_prompt_warns_with_the_unread_end(shared_base: Base):
    # every letter is one token in the tiny vocabulary
    text = "a" * 75 + " tail"
    with pytest.warns(UserWarning, match=r"75 tokens; not read: 't ?a ?i ?l'"):
        long = embed(shared_base, [text])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(long.tokens, embed(shared_base, ["a" * 75]).tokens)
    assert unread_end(shared_base, "a cat") == ""


@pytest.mark.parametrize("texts", [("",), ("a cat", " ", "ink"), ("a cat", "a cat", "")])
def test_empty_prompts_are_refused(texts: tuple[str, ...]):
    with pytest.raises(UserError, match="prompt is empty"):
        Prompts(*texts)


def test_two_of_three_prompts_are_refused():
    with pytest.raises(UserError, match="go together"):
        Prompts("a cat in ink", "a cat")


def test_time_ids_are_original_size_crop_and_target_size():
    assert time_ids(64, 32, 2).tolist() == [[32, 64, 0, 0, 32, 64]] * 2
