import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fakes import Colors, solid
from PIL import Image

from unziplora.bench import evaluate
from unziplora.bench.cases import Case
from unziplora.bench.contenders import Adapters, Contender
from unziplora.bench.evaluate import Task
from unziplora.bench.run import run_benchmark
from unziplora.bench.search import Setting, grid_settings, search_settings
from unziplora.bench.session import open_session
from unziplora.bench.workspace import Workspace
from unziplora.config.bench import BenchConfig
from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.split import SplitConfig
from unziplora.config.training import TrainingConfig
from unziplora.config.zip import ZipConfig
from unziplora.errors import UserError
from unziplora.models.base import Base
from unziplora.utils.inputs import read_toml

Cases = dict[str, Case]


class TestGrid:
    def test_longer_searches_begin_like_shorter_ones_and_the_longest_is_complete(self):
        assert grid_settings(20)[:5] == grid_settings(5)
        assert len(set(grid_settings(108))) == 108

    def test_the_first_few_settings_try_every_value_of_steps_ratio_and_rank(self):
        few = grid_settings(3)
        assert {s.steps for s in few} == {150, 300, 600}
        assert {s.ratio for s in few} == {0.25, 0.5, 1.0}
        assert {s.rank for s in few} == {8, 16, 32}
        assert {s.rate for s in grid_settings(7)} == {3e-4, 1e-3, 2e-3, 4e-3}

    def test_more_settings_than_the_grid_has_are_refused(self):
        with pytest.raises(UserError, match="--search 109 is too large: the grid has 108 settings"):
            grid_settings(109)

    def test_a_setting_means_the_same_for_every_method(self):
        setting = Setting(2e-3, 0.25, 300, 16)
        words = {"images": ["x.png"], "out": "run"}
        split = SplitConfig(**words, content="cat", style="ink", **setting.overrides("unziplora"))
        assert (split.content_learning_rate, split.style_learning_rate) == (2e-3, 5e-4)
        assert (split.steps, split.rank) == (300, 16)
        pair = setting.overrides("dreambooth")
        content, style = (DreamBoothConfig(**words, **{kind: "word"}, **pair[kind]) for kind in pair)
        assert (content.learning_rate, style.learning_rate) == (2e-3, 5e-4)
        assert {content.steps, style.steps} == {300}
        assert BLoraConfig(**words, **setting.overrides("blora")).learning_rate == 2e-3
        zipped = ZipConfig(out="run", content_lora="a", style_lora="b", **setting.overrides("ziplora"))
        assert (zipped.learning_rate, zipped.steps) == (0.02, 100)


@dataclass(frozen=True)
class Painter(Contender):
    """Method without LoRA whose images are as good as its number of steps, which is its prompt."""

    def recipes(self, workspace: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        return [TrainingConfig(out="run", steps=self.quality(workspace.settings(self.name)))]

    def quality(self, settings: Mapping[str, Any]) -> int:
        return int(settings.get("steps", {"base": 1, "oracle": 1000}.get(self.name, 2)))

    def train(self, workspace: Workspace, case: Case, seed: int) -> Adapters:
        steps = str(self.quality(workspace.settings(self.name)))
        return Adapters(content_phrase=steps, style_phrase=steps)


class Steps(Colors):
    """Knows how good a picture is from the steps written into its red channel."""

    def content(self, images: Any) -> torch.Tensor:
        level = [image.getpixel((0, 0))[0] / 255 for image in images]
        return torch.tensor([[1.0 if value > 0.99 else value, (1 - min(value, 1) ** 2) ** 0.5] for value in level])

    concept = style = content


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch, cases: Cases) -> Cases:
    """Paint images as red as the number of steps in their prompt, up to 1000; truths are entirely red."""

    def paint(base: Base, task: Task, seeds: Sequence[int], *_: object) -> list[Image.Image]:
        steps = int(re.search(r"\d+", task.prompts.full)[0])
        return [solid(round(steps * 254 / 1000), 0) for _ in seeds]

    monkeypatch.setattr(evaluate, "sample_task", paint)
    red = (solid(255, 0),)

    def absolute(case: Case) -> Case:
        examples = {name: tuple(replace(e, images=red) for e in getattr(case, name)) for name in ("targets", "others")}
        return replace(case, mix=red[0], image=red[0], **examples)

    return {slug: absolute(case) for slug, case in cases.items()}


@pytest.fixture
def searching(config: BenchConfig) -> BenchConfig:
    return config.model_copy(update={"search": 4, "methods": ["unziplora", "blora", "joint"]})


def test_best_of_the_same_settings_wins_for_every_method(searching: BenchConfig, tiny_base: Base, painted: Cases):
    methods = {name: Painter(name) for name in ("base", "oracle", "unziplora", "blora", "joint")}
    opened = open_session(searching, None, tiny_base, [Steps()], painted, methods)
    found = search_settings(searching, session=opened)
    assert list(found.scores) == ["unziplora", "blora"]  # joint takes over what unziplora gets
    assert found.scores["unziplora"] == found.scores["blora"]
    most = max(setting.steps for setting in grid_settings(4))
    assert {best["steps"] for best in found.best.values()} == {most}
    assert found.scores["blora"].index(max(found.scores["blora"])) == [s.steps for s in grid_settings(4)].index(most)
    assert read_toml(found.file) == found.best
    told = json.loads((searching.out / "search.json").read_text())
    assert (told["scores"], told["means"]) == (found.scores, found.means)
    assert sorted(path.name for path in (searching.out / "search" / "blora").iterdir()) == ["00", "01", "02", "03"]

    final = searching.model_copy(update={"search": 0, "settings": found.file, "methods": ["base", "blora", "oracle"]})
    report = run_benchmark(final, base=tiny_base, measures=[Steps()], cases=painted, methods=methods)
    assert report.of("colors")[1].seeds[0]["headline"] == pytest.approx(max(found.scores["blora"]))


def test_settings_outside_the_grid_stay(searching: BenchConfig, tiny_base: Base, painted: Cases):
    file = searching.out.parent / "given.toml"
    file.write_text(
        '[blora]\nblocks = "bundled"\nsteps = 7\n[dreambooth.content]\nalpha = 2.0\n[oracle.style]\nsteps = 9\n'
    )
    methods = {name: Painter(name) for name in ("base", "oracle", "blora", "dreambooth")}
    config = searching.model_copy(update={"settings": file, "methods": ["blora", "dreambooth"]})
    found = search_settings(config, session=open_session(config, None, tiny_base, [Steps()], painted, methods))
    assert found.best["blora"]["blocks"] == "bundled"
    assert found.best["blora"]["steps"] in {setting.steps for setting in grid_settings(4)}
    assert set(found.best["dreambooth"]["content"]) == {"alpha", "learning_rate", "steps", "rank"}
    assert read_toml(found.file) == {**found.best, "oracle": {"style": {"steps": 9}}}


def test_best_mean_decides_if_every_score_is_0(searching: BenchConfig, tiny_base: Base, painted: Cases):
    class Half(Steps):
        """More steps make the other things better; the drawing is worse than the base's with every setting."""

        def concept(self, images: Any) -> torch.Tensor:
            return Steps.content(self, images)

        def style(self, images: Any) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]] * len(images))

        def content(self, images: Any) -> torch.Tensor:
            level = [image.getpixel((0, 0))[0] / 255 for image in images]
            likeness = [1.0 if value > 0.9 else 0.1 if value > 0.01 else 0.5 for value in level]
            return torch.tensor([[value, (1 - value**2) ** 0.5] for value in likeness])

    methods = {name: Painter(name) for name in ("base", "oracle", "unziplora", "blora")}
    found = search_settings(searching, session=open_session(searching, None, tiny_base, [Half()], painted, methods))
    assert found.scores["blora"] == [0.0] * 4
    steps = [setting.steps for setting in grid_settings(4)]
    assert max(zip(found.means["blora"], steps, strict=True))[1] == max(steps)
    assert found.best["blora"]["steps"] == max(steps)


def test_search_without_a_scale_is_refused(searching: BenchConfig, tiny_base: Base, painted: Cases):
    methods = {name: Painter("base" if name == "oracle" else name) for name in ("base", "oracle", "blora")}
    opened = open_session(searching, None, tiny_base, [Steps()], painted, methods)
    with pytest.raises(UserError, match="no scale to choose settings by"):
        search_settings(searching, session=opened)
    assert not (searching.out / "settings.toml").exists()
