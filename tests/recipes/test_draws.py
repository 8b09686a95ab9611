"""Batches that processes draw ahead, and grades on several processes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.base.captions import restyled
from recipes.base.config import Recipe
from recipes.base.grades import grade_all, grade_each
from recipes.base.unet import UnetStage


def ahead(recipe: Recipe, workers: int) -> UnetStage:
    settings = recipe.unet.model_copy(update={"workers": workers, "steps": 9, "blended": 0.5})
    return UnetStage(recipe.model_copy(update={"unet": settings}))


@pytest.fixture(scope="module")
def stages(trained: Recipe) -> tuple[UnetStage, UnetStage]:
    return ahead(trained, 0), ahead(trained, 2)


def test_batches_drawn_ahead_equal_batches_drawn_when_needed(stages) -> None:
    plain, early = stages
    for step in (0, 1, 2, 7, 8, 3):
        a, b = plain.batches.at(step), early.batches.at(step)
        assert a.prompts == b.prompts
        assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("indices", "timesteps", "mask"))
    assert plain.batches.at(1).prompts != plain.batches.at(2).prompts


def test_token_ids_and_words_have_the_same_conditions(stages) -> None:
    plain, early = stages
    (hidden, added), (same, other) = (stage.conditions(stage.batches.at(4)) for stage in stages)
    torch.testing.assert_close(hidden, same, rtol=1e-2, atol=2e-2)  # those from words are cached in bfloat16
    torch.testing.assert_close(added["text_embeds"], other["text_embeds"])
    assert plain.loss(4)[0].item() == pytest.approx(early.loss(4)[0].item(), rel=1e-2)


def test_conditions_go_towards_the_prompts_of_other_styles(stages) -> None:
    stage, _ = stages
    batch = stage.batches.at(4)
    hidden, added = stage.conditions(batch)
    own, own_added = stage.conditions(replace(batch, blend=None))
    other, other_added = stage.conditions(replace(batch, blend=None, prompts=batch.blend.prompts))
    for number, weight in enumerate(batch.blend.weights.tolist()):
        expected = own[number] + weight * (other[number] - own[number])
        torch.testing.assert_close(hidden[number], expected)
        pooled, towards = own_added["text_embeds"][number], other_added["text_embeds"][number]
        torch.testing.assert_close(added["text_embeds"][number], pooled + weight * (towards - pooled))


def test_an_image_stands_for_what_is_nearer_to_its_style_more_often(stages) -> None:
    deck = stages[0].batches.deck
    rng = np.random.default_rng(0)
    chosen, prompts = deck.draw(2000, rng)
    weights = deck.blend(chosen, prompts, 0.5, rng).weights
    assert (weights > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    # of the density 2 (1 − w) the half 1/2 … 1 has a quarter
    assert (weights[weights > 0] > 0.5).float().mean().item() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    ("prompt", "other"),
    [
        ("a cat in pencil sketch style on blue paper", "a cat in neon sign style on blue paper"),
        ("a wax crayon, graphite pencil drawing", "a wax crayon, neon sign"),
        ("a cat", "a cat"),
        ("", ""),
    ],
)
def test_style_words_are_exchanged(prompt: str, other: str) -> None:
    assert restyled(prompt, "pencil", "neon sign") == other


def test_grades_do_not_depend_on_the_number_of_processes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
    (one, words), (two, same) = grade_all(pixels, 5, 1), grade_all(pixels, 5, 2)
    assert np.array_equal(one, two)
    assert words == same
    first, _ = grade_each(pixels[256:], np.random.default_rng((5, 256)))
    assert np.array_equal(one[256:], first)


def test_parts_get_the_grades_of_all_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
    (all_at_once, words), (part, same) = grade_all(pixels, 5, 1), grade_all(pixels[256:], 5, 1, first=256)
    assert np.array_equal(all_at_once[256:], part)
    assert words[256:] == same
