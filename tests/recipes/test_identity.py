"""Networks that identify drawings, concepts and styles, at toy size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from toy import After

from recipes.base import identity_data
from recipes.base.config import Recipe, WorldSettings
from recipes.base.dataset import Images
from recipes.base.grades import Grade, grade_some, hue_matrix
from recipes.base.identity import IdentitySettings, IdentityStage, ShapeStage, StyleStage, equal, supcon, write
from recipes.base.identity_data import disturb, natural_and_filtered, natural_sets, open_world
from recipes.base.identity_report import Shown, Trials, auc, judge
from recipes.base.loop import train
from recipes.base.world import NEVER_FILTERS, NEVER_SETS, held_out_concepts
from unziplora.metrics.networks import ShapeNet

FEW = {"steps": 4, "warmup": 1, "log_every": 2, "width": 8}


@pytest.fixture(scope="module")
def at_64(world_settings: WorldSettings, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The toy world at the size of the networks' input."""
    world = world_settings.model_copy(update={"resolution": 64})
    return Recipe(name="toy", output=tmp_path_factory.mktemp("identity"), world=world)


@pytest.fixture(scope="module")
def images(at_64: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(folder)
    return natural_and_filtered(at_64, folder)


class TestSupcon:
    def test_equals_the_sum_over_anchors_and_positives(self):
        torch.manual_seed(0)
        rows = torch.nn.functional.normalize(torch.randn(6, 5), dim=1)
        labels, ignored = [0, 0, 0, 1, 1, 2], {(0, 1), (1, 0), (2, 4), (4, 2)}
        anchors = []
        for i in range(6):
            others = [a for a in range(6) if a != i and (i, a) not in ignored]
            total = sum(math.exp(float(rows[i] @ rows[a]) / 0.2) for a in others)
            chances = [
                math.log(math.exp(float(rows[i] @ rows[p]) / 0.2) / total) for p in others if labels[p] == labels[i]
            ]
            if chances:
                anchors.append(-sum(chances) / len(chances))
        mask = torch.zeros(6, 6, dtype=torch.bool)
        for pair in ignored:
            mask[pair] = True
        loss = supcon(rows, equal(list(labels)), mask, temperature=0.2)
        assert len(anchors) == 5
        assert loss.item() == pytest.approx(sum(anchors) / 5, rel=1e-5)

    def test_gradient_is_finite_and_moves_pairs_together(self):
        rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2], [0.2, 1.0], [-1.0, 0.1]]), dim=1)
        rows.requires_grad_()
        supcon(rows, equal(["a", "a", "b"])).backward()
        assert torch.isfinite(rows.grad).all()
        assert -rows.grad[0] @ (rows[1] - rows[0]).detach() > 0


class TestImages:
    def test_test_drawings_filters_and_concepts_are_left_out(self, images: Images):
        assert not {item.drawing for item in images.items} & NEVER_SETS
        assert not {item.filter for item in images.items} & NEVER_FILTERS
        assert not {item.concept for item in images.items} & held_out_concepts()
        assert images.pixels.shape[1:] == (64, 64, 3)

    def test_share_alike_sets_are_left_out(self, at_64: Recipe):
        assert natural_sets(open_world(at_64)) == ["noto", "twemoji", "fluent-3d"]

    def test_drawings_of_a_variant_share_the_paper(self, at_64: Recipe):
        world = open_world(at_64)
        items = [identity_data.Item(c, "noto", "chalk", "chalk", v) for c, v in (("key", 0), ("star", 0), ("key", 1))]
        key, star, other = (identity_data.render(world, item)[:6, :6].astype(int) for item in items)
        assert np.array_equal(key, star)
        assert not np.array_equal(key, other)


class TestGrade:
    def test_only_the_empty_grade_changes_nothing(self):
        rng = np.random.default_rng(0)
        pixels = rng.random((64, 64, 3))
        assert np.allclose(Grade.none().apply(pixels, rng), pixels)
        for _ in range(20):
            graded = Grade.draw(rng).apply(pixels, rng)
            assert graded.min() >= 0
            assert graded.max() <= 1
            assert np.abs(graded - pixels).mean() > 0.02

    def test_hues_turn_around_grey(self):
        third = hue_matrix(2 * math.pi / 3, 1.0)
        assert np.allclose(third @ [1, 0, 0], [0, 1, 0])
        assert np.allclose(hue_matrix(1.0, 0.0) @ [0.9, 0.3, 0.3], 0.5)

    @pytest.mark.parametrize(
        ("light", "texture", "angle", "words"),
        [
            ((1.0, 0.99, 0.98), 0.0, None, "white paper"),
            ((0.7, 0.8, 0.95), 0.3, None, "grainy blue paper"),
            ((0.95, 0.9, 0.7), 0.3, 0.5, "hatched yellow paper"),
        ],
    )
    def test_grade_names_its_paper(self, light: tuple, texture: float, angle: float | None, words: str):
        assert replace(Grade.none(), light=np.array(light), texture=texture, angle=angle).words == words

    def test_share_of_images_is_graded(self):
        pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        changed = {
            share: (grade_some(pixels, share, np.random.default_rng(1)) != pixels).any((1, 2, 3)).sum()
            for share in (0.0, 0.5, 1.0)
        }
        assert changed[0.0] == 0
        assert 0 < changed[0.5] < 8
        assert changed[1.0] == 8

    def test_disturbing_is_mild_and_repeatable(self):
        pixels = torch.zeros(2, 3, 64, 64)
        pixels[:, :, 24:40, 24:40] = 1
        torch.manual_seed(0)
        one = disturb(pixels, np.random.default_rng(1))
        torch.manual_seed(0)
        assert torch.equal(one, disturb(pixels, np.random.default_rng(1)))
        assert 0 < (one - pixels).abs().mean() < 0.3


def settings(**change: int) -> IdentitySettings:
    return IdentitySettings(**(FEW | {"groups": 4, "drawings": 2, "each": 2, "batch": 16} | change))


@pytest.mark.parametrize("kind", [ShapeStage, StyleStage])
def test_resumed_equals_uninterrupted(kind: type[IdentityStage], at_64: Recipe, images: Images, tmp_path: Path) -> None:
    once = at_64.model_copy(update={"output": tmp_path / "once"})
    straight = kind(once, images, settings())
    assert train(straight, After(1000))
    other = at_64.model_copy(update={"output": tmp_path / "again"})
    assert not train(kind(other, images, settings()), After(2))
    resumed = kind(other, images, settings())
    assert train(resumed, After(1000))
    for mine, theirs in zip(straight.net.parameters(), resumed.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    write(resumed, tmp_path)
    saved = load_file(tmp_path / f"{resumed.name}.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float16}


def test_batches_contain_hard_negatives(at_64: Recipe, images: Images) -> None:
    stage = ShapeStage(at_64, images, settings())
    drawn = [stage.drawn[i] for i in stage.choose(np.random.default_rng(0))]
    for concept in {concept for _, concept in drawn}:
        groups = [group for group, other in drawn if other == concept]
        assert len(set(groups)) == 2
        assert all(groups.count(group) == 2 for group in groups)
    style = StyleStage(at_64, images, settings(each=3))
    chosen, classes, _ = style.choose(np.random.default_rng(0))
    named = {(c, images.items[i].style) for i, c in zip(chosen, classes, strict=True)}
    assert len(named) == 4
    assert len({name for _, name in named}) < 4
    assert all(classes.count(c) == 3 for c in classes)


class TestReport:
    def test_auc_counts_ties_half(self):
        assert auc(np.array([0.9, 0.5]), np.array([0.1, 0.5])) == (1 + 1 + 1 + 0.5) / 4

    def test_trials_have_one_target_and_rivals_of_every_kind(self):
        trials = Trials([f"thing{n}" for n in range(20)], ["clay", "neon", "oil", "mosaic"], 3)
        for _ in range(20):
            query, target, *wrong = trials.content()
            assert len(wrong) == 15
            assert (query.concept, query.drawing) == (target.concept, target.drawing)
            assert query.look != target.look
            assert (query.concept, query.drawing) not in {(w.concept, w.drawing) for w in wrong}
            assert sum(w.concept == query.concept for w in wrong) == 3
            query, target, *wrong = trials.concept()
            assert query.drawing != target.drawing
            assert query.concept == target.concept
            assert query.concept not in {w.concept for w in wrong}
            query, target, *wrong = trials.style()
            assert query.look == target.look
            assert query.concept != target.concept
            assert len({w.look for w in wrong} | {query.look}) == 12 == len(wrong) + 1
            assert sum(w.filter == query.filter for w in wrong) == 2

    def test_perfect_measure_scores_one(self, at_64: Recipe):
        world = open_world(at_64)
        things = ["red-apple", "key"]
        trial = [Shown(things[i], "noto", "neon", r) for i, r in ((0, 0), (0, 1), (1, 0))]
        figures = judge(lambda images: torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), [trial], world)
        assert figures == {"right": 1.0, "auc": 1.0}


def test_narrow_network_has_the_shipped_embedding_size() -> None:
    content, concept = ShapeNet(8)(torch.zeros(2, 3, 64, 64))
    assert content.shape == concept.shape == (2, 96)
