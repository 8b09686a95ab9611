import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unziplora.errors import UserError
from unziplora.metrics.measures import WEIGHTS, Plain, Trained

DATA = Path(__file__).parents[1] / "data" / "bench"
DEMO = Path(__file__).parents[2] / "src" / "unziplora" / "models" / "bundled" / "demo"
FILES = sorted(DATA.glob("*.webp"))
THINGS, HANDS, STYLES = zip(*(file.stem.split(".") for file in FILES), strict=True)
IMAGES = [Image.open(file).convert("RGB") for file in FILES]


def pairs(wanted: str) -> list[tuple[int, int]]:
    """Pairs of pictures that agree in exactly the named ones of thing, hand and style."""
    labels = {"thing": THINGS, "hand": HANDS, "style": STYLES}
    every = [(a, b) for a in range(len(FILES)) for b in range(a)]
    return [(a, b) for a, b in every if all((row[a] == row[b]) == (name in wanted) for name, row in labels.items())]


def alike(rows: torch.Tensor, wanted: str) -> torch.Tensor:
    """Cosines of all such pairs."""
    return torch.stack([rows[a] @ rows[b] for a, b in pairs(wanted)])


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


class TestTrained:
    def test_rows_have_unit_length_one_per_picture(self, trained):
        demo = [Image.open(DEMO / name) for name in ("first.png", "second.png")]
        for embed, width in ((trained.content, 96), (trained.concept, 96), (trained.style, 64)):
            rows = embed([*IMAGES, *demo])
            assert rows.shape == (len(IMAGES) + 2, width)
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))

    def test_the_same_drawing_is_nearer_than_the_same_thing_by_another_hand(self, trained):
        rows = trained.content(IMAGES)
        same, other = alike(rows, "thing hand"), alike(rows, "thing style")
        assert same.mean() > other.mean() + 0.1
        assert same.mean() > alike(rows, "style").mean() + 0.3

    def test_the_same_thing_by_another_hand_is_nearer_than_another_thing(self, trained):
        rows = trained.concept(IMAGES)
        assert alike(rows, "thing").mean() > alike(rows, "hand style").mean() + 0.2

    def test_the_same_style_is_nearer_than_the_same_drawing(self, trained):
        rows = trained.style(IMAGES)
        assert alike(rows, "style").min() > alike(rows, "thing hand").max()

    def test_demo_images_are_recognized_after_softening(self, trained):
        first, second = (Image.open(DEMO / name).convert("RGB") for name in ("first.png", "second.png"))
        soft = [image.resize((48, 48), Image.Resampling.BICUBIC) for image in (first, second)]
        for embed in (trained.content, trained.concept, trained.style):
            rows = embed([first, second, *soft])
            known, mistaken = (rows[0] @ rows[2], rows[1] @ rows[3]), (rows[0] @ rows[3], rows[1] @ rows[2])
            assert min(known) > max(*mistaken, rows[0] @ rows[1])

    def test_batches_make_no_difference(self, trained):
        many = trained.style(IMAGES * 6)
        torch.testing.assert_close(many[-len(IMAGES) :], trained.style(IMAGES))

    def test_weights_are_small_and_half_precision(self):
        files = list(WEIGHTS.glob("*.safetensors"))
        assert sum(file.stat().st_size for file in files) <= 3_200_000
        assert {value.dtype for file in files for value in load_file(file).values()} == {torch.float16}

    def test_missing_and_foreign_weights_are_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"shape.safetensors: no weights"):
            Trained(tmp_path)
        shutil.copy(WEIGHTS / "shape.safetensors", tmp_path)
        save_file({"other": torch.zeros(2)}, tmp_path / "style.safetensors")
        with pytest.raises(UserError, match=r"style.safetensors: no weights.*recipes.base.identity"):
            Trained(tmp_path)


def test_plain_has_unit_rows_and_separates_styles():
    measure = Plain()
    for embed in (measure.content, measure.concept, measure.style):
        torch.testing.assert_close(embed(IMAGES).norm(dim=1), torch.ones(len(IMAGES)))
    rows = measure.style(IMAGES)
    assert alike(rows, "style").mean() > alike(rows, "thing hand").mean()
