"""Photos without a truth: files, refusals and the table."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unziplora.bench.contenders import Adapters
from unziplora.bench.evaluate import make_tasks
from unziplora.bench.photos import load_photos, photo_measures, photo_table
from unziplora.bench.run import run_benchmark
from unziplora.config.bench import BenchConfig
from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.errors import UserError
from unziplora.models.base import Base

Images = list[Image.Image]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, color in (("cat.jpg", "red"), ("fox.png", "blue")):
        Image.new("RGB", (100, 80), color).save(folder / name)
    (folder / "words.toml").write_text(
        '["cat.jpg"]\ncontent = "cat"\nstyle = "pencil sketch"\n["fox.png"]\ncontent = "house"\nstyle = "chalk"\n'
    )
    return folder


class Redness:
    """A measure by hand: the mean of red, or of another channel, as an angle."""

    def __init__(self, name: str, channel: int = 0) -> None:
        self.name, self.channel = name, channel

    def content(self, images: Images) -> Tensor:
        means = [sum(one.getchannel(self.channel).tobytes()) / (one.width * one.height * 255) for one in images]
        angles = torch.tensor(means) * torch.pi / 2
        return F.normalize(torch.stack([angles.cos(), angles.sin()], dim=1), dim=1)

    concept = style = content


def test_photo_is_its_own_truth_and_tasks_use_other_words(photos: Path):
    cases = load_photos(photos, 64)
    assert list(cases) == ["cat", "fox"]
    cat = cases["cat"]
    assert (cat.content, cat.style, cat.partner) == ("cat", "pencil sketch", "cat")
    assert cat.image.size == (64, 64)
    assert cat.image.getpixel((0, 0))[0] > 200
    assert "pencil sketch" not in [example.word for example in cat.targets]
    assert "house" not in [example.word for example in cases["fox"].others]
    assert all(example.images == (cat.image,) for example in (*cat.targets, *cat.others))


def test_what_is_cut_off_is_named_without_flags_that_the_command_lacks(photos: Path):
    with pytest.warns(UserWarning, match=r"20% of .*cat\.jpg \(100×80\) is cut off at the left and right") as caught:
        load_photos(photos, 64)
    assert all("--" not in str(warning.message) for warning in caught)


def test_words_are_read_as_trainings_read_them(photos: Path):
    (photos / "words.toml").write_text('["cat.jpg"]\ncontent = "A Guitar"\nstyle = "in an Oil Painting style"\n')
    (case,) = load_photos(photos, 64).values()
    config = SplitConfig(
        images=[photos / "cat.jpg"], content="A Guitar", style="in an Oil Painting style", base="b", out=photos
    )
    assert (case.content, case.style) == (config.content, config.style) == ("Guitar", "Oil Painting")
    assert "oil painting" not in [example.word for example in case.targets]
    assert "guitar" not in [example.word for example in case.others]


def test_prompts_have_one_style_at_their_end(photos: Path):
    (photos / "words.toml").write_text('["cat.jpg"]\ncontent = "cat"\nstyle = "anime style"\n')
    (case,) = load_photos(photos, 64).values()
    prompts = {task.kind: task.prompts.full for task in make_tasks(case, case, Adapters(), Adapters(), "sks")}
    assert prompts["content"] == "a sks cat in neon sign style"
    assert prompts["style"] == "a penguin in anime style"
    assert prompts["both"] == "a sks cat in anime style"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (None, r'words\.toml has to name each image with its words; add \["cat\.jpg"\]'),
        ("", "has to name each image"),
        ('["cat.jpg"]\ncontent = "cat"\n', "needs exactly the words content and style"),
        ('["gone.jpg"]\ncontent = "cat"\nstyle = "ink"\n', r"gone\.jpg"),
        (
            '["cat.jpg"]\ncontent = "a"\nstyle = "b"\n["cat.png"]\ncontent = "a"\nstyle = "b"\n',
            "two images are called cat",
        ),
        (
            '["cat.jpg"]\ncontent = "a"\nstyle = "b"\n["Cat.png"]\ncontent = "a"\nstyle = "b"\n',
            "two images are called cat",  # their folders are one on Windows and macOS
        ),
        ('["cat.jpg"]\ncontent = ["cat"]\nstyle = "ink"\n', r"words\.toml: 'cat\.jpg' needs .* as text"),
        ('["cat.jpg"]\ncontent = " "\nstyle = "ink"\n', r"words\.toml: 'cat\.jpg': content must not be blank"),
    ],
)
def test_unusable_words_file_is_refused(photos: Path, words: str | None, message: str):
    (photos / "words.toml").unlink(missing_ok=True)
    if words is not None:
        (photos / "words.toml").write_text(words)
    with pytest.raises(UserError, match=message):
        load_photos(photos, 64)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pictures": "photos"}, "give --clip and --dino, or --csd"),
        ({"pictures": "photos", "clip": "a"}, "give --clip and --dino, or --csd"),
        ({"csd": "a"}, "give --pictures"),
        ({"pictures": "photos", "csd": "a", "search": 2}, "neither --search nor --cases"),
        ({"pictures": "photos", "csd": "a", "methods": ["oracle"]}, "name other --methods"),
    ],
)
def test_contradictory_settings_are_refused(keys: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        resolve(BenchConfig, keys)


@pytest.mark.slow
def test_the_table_has_a_row_per_method_without_the_oracle(config: BenchConfig, tiny_base: Base, photos: Path):
    keys = {"pictures": photos, "csd": "a", "clip": "b", "dino": "c", "methods": ["base", "oracle"]}
    both = [Redness("dino-clip: c, b"), Redness("csd: a", channel=2)]
    report = run_benchmark(config.model_copy(update=keys), base=tiny_base, measures=both)
    assert [row.method for row in report.rows] == ["base"]
    figures = report.rows[0].seeds[0]
    assert set(figures) == {"style CLIP-I", "content DINO", "style CSD", "content CSD"}
    assert len(set(figures.values())) == 4
    text = (config.out / "report.md").read_text()
    alone = [
        run_benchmark(config.model_copy(update=keys), base=tiny_base, measures=[one]).rows[0].seeds[0] for one in both
    ]
    assert [set(part) for part in alone] == [{"style CLIP-I", "content DINO"}, {"style CSD", "content CSD"}]
    assert figures == {**alone[0], **alone[1]}
    assert photo_table(report) in text
    assert "| method | style CLIP-I | content DINO | style CSD | content CSD |" in text


def test_dino_compares_contents_clip_styles_and_csd_both(config: BenchConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("unziplora.bench.photos.ImageModel", lambda kind, source: (kind, source))
    first, second = photo_measures(config.model_copy(update={"clip": "b", "dino": "c", "csd": "a"}))
    assert (first.contents, first.styles) == (("dino", "c"), ("clip", "b"))
    assert (second.contents, second.styles) == (("csd", "a"), ("csd", "a"))


@pytest.mark.slow
def test_named_model_measures(config: BenchConfig, tiny_base: Base, photos: Path, vision_models: dict[str, str]):
    given = config.model_copy(update={"pictures": photos, "csd": vision_models["csd"], "methods": ["base"]})
    (row,) = run_benchmark(given, base=tiny_base).rows
    assert set(row.seeds[0]) == {"style CSD", "content CSD"}
    assert all(-1 <= value <= 1 for value in row.seeds[0].values())
    with pytest.raises(UserError, match="no model can be loaded from here"):
        run_benchmark(given.model_copy(update={"csd": str(photos)}), base=tiny_base)
