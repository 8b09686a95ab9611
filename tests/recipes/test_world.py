"""World of images: exclusions from training, deterministic rendering, storage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy import shape

from recipes.base.config import Recipe, Style, WorldSettings
from recipes.base.dataset import Images, stored_images
from recipes.base.filters import FILTERS
from recipes.base.world import (
    NEVER_FILTERS,
    NEVER_SETS,
    Item,
    World,
    held_out_concepts,
    is_held_out_pair,
)
from unziplora.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes" / "base"


def with_style(settings: WorldSettings, **style: object) -> WorldSettings:
    return settings.model_copy(update={"styles": {"bad": Style(**style)}})


def test_forty_concepts_are_held_out_of_shipped_recipes() -> None:
    assert len(held_out_concepts()) == 40
    recipes = sorted(RECIPES.glob("*.toml"))
    assert len(recipes) >= 5
    for recipe in map(Recipe.read, recipes):
        assert recipe.world.concepts == "all" or not set(recipe.world.concepts) & held_out_concepts()
        styles = recipe.world.styles.values()
        assert not {s for style in styles for s in style.sets} & NEVER_SETS
        assert not set(recipe.world.drawings) & NEVER_SETS
        assert not {style.filter for style in styles} & NEVER_FILTERS


def test_all_concepts_leave_out_people_clocks_and_held_out(world_settings: WorldSettings) -> None:
    world = World(world_settings.model_copy(update={"concepts": "all"}))
    assert set(world.trained_concepts) == {"red-apple", "key", "star", "house"}


@pytest.mark.parametrize("name", sorted(NEVER_SETS))
def test_never_trained_sets_are_refused(world_settings: WorldSettings, name: str) -> None:
    with pytest.raises(UserError, match="never trained"):
        World(with_style(world_settings, sets=[name]))
    with pytest.raises(UserError, match="never trained"):
        World(world_settings.model_copy(update={"drawings": [name]}))


def test_never_trained_filters_held_out_concepts_and_licences_are_refused(world_settings: WorldSettings) -> None:
    for name in sorted(NEVER_FILTERS):
        with pytest.raises(UserError, match="never trained"):
            World(with_style(world_settings, filter=name))
    with pytest.raises(UserError, match="held out"):
        World(world_settings.model_copy(update={"concepts": [sorted(held_out_concepts())[0]]}))
    with pytest.raises(UserError, match="licence"):
        World(with_style(world_settings, sets=["shared-alike"]))


def test_pairs_are_held_out_by_a_fixed_rule(world_settings: WorldSettings) -> None:
    assert is_held_out_pair("banana", "watercolor", 0.1)
    assert not is_held_out_pair("red-apple", "watercolor", 0.1)
    world = World(world_settings)
    trained = {(item.concept, item.style) for item in world.items()}
    held_out = {(item.concept, item.style) for item in world.items(held_out_pairs=True)}
    assert held_out
    assert not trained & held_out
    assert all(is_held_out_pair(*pair, 0.2) for pair in held_out)
    assert not any(style == "flat" for _, style in held_out)
    assert len(trained | held_out) == 4 * 3


@pytest.mark.parametrize("name", sorted(FILTERS))
@pytest.mark.parametrize("size", [64, 128])
def test_filters_are_deterministic_and_keep_the_size(name: str, size: int) -> None:
    rgba = shape(3, 1)[:: 128 // size, :: 128 // size].copy()
    before = rgba.copy()
    one, two = (FILTERS[name](rgba, np.random.default_rng(5)) for _ in range(2))
    assert one.shape == (size, size, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, two)
    assert np.array_equal(rgba, before)
    assert one.std() > 5


def test_render_is_deterministic(world_settings: WorldSettings) -> None:
    items = list(World(world_settings).items())
    for item in items[:4]:
        first, second = (World(world_settings).render(item) for _ in range(2))
        assert first.shape == (32, 32, 3)
        assert np.array_equal(first, second)


def test_other_settings_render_images_again(
    world_settings: WorldSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[str] = []

    def ask(name: str, settings: WorldSettings = world_settings, other: object = None) -> None:
        def make() -> Images:
            rendered.append(name)
            return Images(np.full((1, 2, 2, 3), len(rendered), np.uint8), [Item("key", "fxemoji", "flat")])

        images = stored_images(tmp_path / "pictures.npy", settings, other, make)
        assert images.pixels[0, 0, 0, 0] == len(rendered)
        assert images.items == [Item("key", "fxemoji", "flat")]

    ask("first")
    ask("again")
    ask("resolution", world_settings.model_copy(update={"resolution": 16}))
    ask("other", other=1)
    monkeypatch.setattr("recipes.base.dataset.held_out_concepts", lambda: frozenset({"key"}))
    ask("held out", other=1)
    (tmp_path / "pictures.json").unlink()
    ask("half-written", other=1)
    assert rendered == ["first", "resolution", "other", "held out", "half-written"]
