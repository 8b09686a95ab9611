import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import Colors, Fake, draw, solid

from unziplora.bench import evaluate as protocol
from unziplora.bench.cases import Case
from unziplora.bench.contenders import METHODS, Adapters
from unziplora.bench.evaluate import Task, evaluate, make_tasks, sample_task, score_images
from unziplora.bench.workspace import Workspace
from unziplora.config.bench import ABLATION
from unziplora.config.split import SplitConfig
from unziplora.errors import UserError
from unziplora.lora.algebra import delta
from unziplora.lora.inject import adapted_layers
from unziplora.lora.weights import Lora
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.runs.folder import RunFolder

Cases = dict[str, Case]
SMALL = {"steps": 2, "rank": 2, "batch_size": 1, "column_periods": 1, "column_warmup": 1, "score_timesteps": 1}
SMALL |= {"generated_steps": 1, "generated_guidance": 1.0}


class TestTasks:
    def test_every_task_has_its_prompt_loras_and_truth(self, cases: Cases):
        content, style, other = Lora({}), Lora({}), Lora({})
        templates = ("a {token} {content}", "an image in {style} style")
        alone, mixed = Adapters(content, style, prompts=templates), Adapters(content, other, prompts=templates)
        cat, dog = cases["cat"], replace(cases["dog"], style="clay")
        found = {task.slug: task for task in make_tasks(cat, dog, alone, mixed, "sks")}
        assert list(found) == ["content-neon-sign", "content-oil", "style-key", "both-cat", "mix-dog"]
        assert found["content-neon-sign"].prompts == Prompts("a sks cat in neon sign style")
        assert found["content-neon-sign"].loras == {"content": content}
        assert found["style-key"].prompts == Prompts("a key in ink style")
        assert found["style-key"].loras == {"style": style}
        assert len(found["style-key"].truths) == 2
        assert found["both-cat"].prompts == Prompts("a sks cat in ink style", "a sks cat", "an image in ink style")
        assert found["both-cat"].truths == (cat.image,)
        assert found["mix-dog"].prompts == Prompts("a sks cat in clay style", "a sks cat", "an image in clay style")
        assert found["mix-dog"].loras == {"content": content, "style": other}
        assert found["mix-dog"].truths == (cat.mix,)

    def test_case_that_is_its_own_partner_is_not_mixed(self, cases: Cases):
        alone = Adapters(Lora({}), Lora({}))
        made = make_tasks(cases["cat"], cases["cat"], alone, alone, "sks")
        assert [task.kind for task in made] == ["content", "content", "style", "both"]

    def test_merged_lora_has_one_prompt_and_the_base_no_rare_word(self, cases: Cases):
        part, merged = Lora({}), Lora({})
        made = make_tasks(cases["cat"], cases["dog"], Adapters(part, part, merged), Adapters(part, part, merged), "sks")
        assert made[-1].loras == {"lora": merged}
        assert made[-1].prompts == Prompts("a sks cat in ink style")
        nothing = Adapters(content_phrase="a {content}")
        plain = make_tasks(cases["cat"], cases["dog"], nothing, nothing, "sks")
        assert not any(task.loras for task in plain)
        assert not any("sks" in task.prompts.full for task in plain)


class TestScore:
    def test_content_alone_is_compared_with_the_drawing_in_that_style(self, cases: Cases):
        cat = cases["cat"]
        truth, copy, ignored = cat.targets[1].images[0], cat.image, solid(0, 160)
        task = Task("content", "oil", Prompts("x"), {}, (truth,))
        right, copied, plain = score_images(Colors(), cat, task, [truth, copy, ignored])
        turn = np.cos((160 - 40) / 255 * np.pi / 2)  # between the truth's style and the picture's
        assert right == pytest.approx({"content": 1.0, "style": 1.0, "score": 1.0, "leak": 0.0}, abs=1e-5)
        assert copied == pytest.approx({"content": 1.0, "style": turn, "score": turn**0.5, "leak": 1 - turn}, abs=1e-5)
        identity = np.cos(200 / 255 * np.pi / 2)
        assert plain["score"] == pytest.approx(identity**0.5, abs=1e-5)
        assert plain["leak"] == pytest.approx(0.0, abs=1e-5)

    def test_style_alone_is_compared_with_other_concepts_in_that_style(self, cases: Cases):
        cat = cases["cat"]
        task = Task("style", "key", Prompts("x"), {}, (solid(0, 40, 10), solid(0, 40, 30)))
        (row,) = score_images(Colors(), cat, task, [solid(200, 40, 20)])
        kind = np.cos(10 / 255 * np.pi / 2)
        assert row["style"] == pytest.approx(1.0, abs=1e-5)
        assert row["content"] == pytest.approx(kind, abs=1e-5)
        assert row["score"] == pytest.approx(kind**0.5, abs=1e-5)
        assert row["leak"] == pytest.approx(1 - np.cos(200 / 255 * np.pi / 2), abs=1e-5)  # the cat came along

    def test_measure_may_compare_in_its_own_way(self, cases: Cases):
        class Halved(Colors):
            def compare(self, features: torch.Tensor, truths: torch.Tensor) -> list[float]:
                return [float(value) / 2 for value in (features @ truths.T).mean(1)]

        cat = cases["cat"]
        task = Task("content", "oil", Prompts("x"), {}, (cat.targets[1].images[0],))
        (plain,), (halved,) = (score_images(measure, cat, task, [cat.image]) for measure in (Colors(), Halved()))
        assert halved == pytest.approx({name: value / 2 for name, value in plain.items()}, abs=1e-6)

    def test_both_together_have_no_leak(self, cases: Cases):
        task = Task("both", "cat", Prompts("x"), {}, (cases["cat"].image,))
        assert score_images(Colors(), cases["cat"], task, [cases["cat"].image])[0].keys() == {
            "content",
            "style",
            "score",
        }


def test_sampling_uses_the_loras_and_restores_the_base(tiny_base: Base, fake: Fake, workspace: Workspace, cases: Cases):
    made = fake.train(workspace, cases["cat"], 0)
    plain, content, both = (
        Task("content", "x", Prompts("a cat"), {}, ()),
        Task("content", "x", Prompts("a cat"), {"content": made.content}, ()),
        Task("both", "x", Prompts("a cat", "a cat", "ink"), {"content": made.content, "style": made.style}, ()),
    )
    before, first, second, after = (
        sample_task(tiny_base, task, [3], 2, 2.5)[0] for task in (plain, content, both, plain)
    )
    assert before.tobytes() == after.tobytes()
    assert len({image.tobytes() for image in (before, first, second)}) == 3
    assert not adapted_layers(tiny_base.unet)


class TestEvaluate:
    @pytest.fixture(autouse=True)
    def _quick_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(protocol, "generate", draw)

    def run(self, workspace: Workspace, base: Base, fake: Fake, cases: Cases, *measures: Colors) -> dict[str, Any]:
        return evaluate(workspace, base, measures or (Colors(),), fake, cases, cases["cat"], 0)

    def test_scores_contain_every_image(self, workspace: Workspace, tiny_base: Base, fake: Fake, cases: Cases):
        found = self.run(workspace, tiny_base, fake, cases)
        folder = workspace.run_folder("fake", cases["cat"], 0)
        assert json.loads((folder / "scores.json").read_text()) == found
        assert [(row["task"], row["target"]) for row in found["pictures"]] == [
            ("content", "neon sign"), ("content", "oil"), ("style", "key"), ("both", "cat"), ("mix", "dog"),
        ]  # fmt: skip
        assert all((folder / row["file"]).is_file() for row in found["pictures"])
        assert not list(folder.glob(".*"))

    def test_finished_work_is_reused(self, workspace: Workspace, tiny_base: Base, fake: Fake, cases: Cases):
        first, trained = self.run(workspace, tiny_base, fake, cases), list(fake.trained)
        assert self.run(workspace, tiny_base, fake, cases) == first
        assert fake.trained == trained

    def test_another_measure_scores_the_same_images(
        self, workspace: Workspace, tiny_base: Base, fake: Fake, cases: Cases, monkeypatch: pytest.MonkeyPatch
    ):
        first = self.run(workspace, tiny_base, fake, cases)
        monkeypatch.setattr(protocol, "generate", None)
        again = self.run(workspace, tiny_base, fake, cases, Colors("one"), Colors("two"))
        assert again["measures"] == ["one", "two"]
        assert again["seconds"] == first["seconds"]
        values = [row["values"] for row in again["pictures"]]
        assert [v["one"] for v in values] == [row["values"]["colors"] for row in first["pictures"]]

    def test_other_weights_of_a_measure_score_again(
        self, workspace: Workspace, tiny_base: Base, fake: Fake, cases: Cases, monkeypatch: pytest.MonkeyPatch
    ):
        def asked(digest: str) -> int:
            measure = Colors()
            measure.weights_hash = digest
            self.run(workspace, tiny_base, fake, cases, measure)
            return measure.asked

        assert asked("old") > 0
        monkeypatch.setattr(protocol, "generate", None)
        assert asked("old") == 0
        assert asked("new") > 0
        assert asked("new") == 0

    def test_stored_scores_of_more_measures_are_reused(
        self, workspace: Workspace, tiny_base: Base, fake: Fake, cases: Cases, monkeypatch: pytest.MonkeyPatch
    ):
        both = self.run(workspace, tiny_base, fake, cases, Colors("one"), Colors("two"))
        monkeypatch.setattr(protocol, "generate", None)
        trained = list(fake.trained)
        assert self.run(workspace, tiny_base, fake, cases, Colors("two")) == both
        assert fake.trained == trained

    @pytest.mark.slow
    @pytest.mark.parametrize("change", ["steps", "sampling", "picture"])
    def test_other_settings_are_evaluated_again(
        self, workspace: Workspace, tiny_base: Base, fake: Fake, cases: Cases, change: str
    ):
        first = self.run(workspace, tiny_base, fake, cases)
        if change == "steps":
            fake.steps = 2
        if change == "sampling":
            workspace = replace(workspace, config=workspace.config.model_copy(update={"sample_steps": 3}))
        if change == "picture":
            cases["cat"] = replace(cases["cat"], image=solid(1, 2))
        count = len(fake.trained)
        assert self.run(workspace, tiny_base, fake, cases)["settings"] != first["settings"]
        assert len(fake.trained) > count

    def test_images_of_an_interrupted_sampling_are_made_again(
        self, workspace: Workspace, tiny_base: Base, fake: Fake, cases: Cases, monkeypatch: pytest.MonkeyPatch
    ):
        first = self.run(workspace, tiny_base, fake, cases)
        fake.steps, real, calls = 2, protocol.generate, []

        def stopped(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*args, **options)

        monkeypatch.setattr(protocol, "generate", stopped)
        with pytest.raises(KeyboardInterrupt):
            self.run(workspace, tiny_base, fake, cases)
        fake.steps = 1
        monkeypatch.setattr(protocol, "generate", real)
        (workspace.run_folder("fake", cases["cat"], 0) / "scores.json").unlink()
        again = self.run(workspace, tiny_base, fake, cases)
        assert again["pictures"] == first["pictures"]


class TestMethods:
    @pytest.fixture
    def workspace(self, workspace: Workspace) -> Workspace:
        pair = {"steps": 2, "rank": 2, "batch_size": 1, "generated_steps": 1, "generated_guidance": 1.0}
        told = {**pair, "sample_guidance": 3.0}  # which a merger takes over
        merger = {"steps": 2, "generated_steps": 1, "generated_guidance": 1.0}
        overrides = {"unziplora": SMALL, "blora": pair, "ziplora": merger} | {
            name: {"content": told, "style": told} for name in ("dreambooth", "oracle")
        }
        return replace(workspace, overrides=overrides)

    def test_ablation_adds_one_separation_at_a_time_to_the_same_settings(self, workspace: Workspace, cases: Cases):
        more = {"phrase_steps": 3, "content_alone": 0.5, "content_variants": True, "style_alone": 0.1}
        more |= {"style_variants": True, "targets": ["attention", "convolutions"], "column_separation": False}
        workspace = replace(workspace, overrides={"unziplora": {**SMALL, **more}})
        seen, told, targets = [], [], []
        for name in ABLATION:
            (recipe,) = METHODS[name].recipes(workspace, cases["cat"], 0)
            assert isinstance(recipe, SplitConfig)
            assert recipe.steps == 2
            seen.append((recipe.prompt_separation, recipe.column_separation, recipe.block_separation))
            alone = recipe.content_alone, recipe.content_variants, recipe.style_alone, recipe.style_variants
            told.append((recipe.phrase_steps, *alone))
            targets.append(recipe.targets)
        assert seen[:4] == [(False,) * 3, (True, False, False), (True, True, False), (True,) * 3]
        joint = (0.0, False, 0.0, False)
        assert told == [*[(0, *joint)] * 4, (3, *joint), *[(3, 0.5, True, 0.1, True)] * 2]
        assert targets == [*[["attention"]] * 6, ["attention", "convolutions"]]

    def test_paper_has_published_settings_and_the_size_of_the_base(self, workspace: Workspace, cases: Cases):
        bundled = replace(workspace, config=workspace.config.model_copy(update={"base": "bundled"}))
        (small,), (large,) = (METHODS["paper"].recipes(one, cases["cat"], 0) for one in (bundled, workspace))
        assert isinstance(small, SplitConfig)
        assert isinstance(large, SplitConfig)
        for recipe in (small, large):
            assert recipe.official_code
            assert recipe.style_prompt == "a {content} in {style} style"
            assert (recipe.phrase_steps, recipe.content_alone, recipe.style_alone) == (0, 0, 0)
            assert recipe.column_separation
            assert recipe.block_separation
            assert (recipe.optimizer, recipe.precision, recipe.column_warmup) == ("adamw", "fp32", 1)
        assert (small.rank, small.content_learning_rate, small.steps) == (16, 1.5e-3, 240)
        assert (large.rank, large.content_learning_rate, large.steps) == (64, 5e-5, 600)

    def test_oracle_trains_longer_with_a_prompt_per_image(self, workspace: Workspace, cases: Cases):
        searched = {"dreambooth": {"content": {"steps": 7, "rank": 2}}}
        content, style = METHODS["oracle"].recipes(replace(workspace, overrides=searched), cases["cat"], 0)
        assert content.image_prompts() == ["a sks cat in oil style"]
        assert style.image_prompts() == ["a bell in ink style", "a hat in ink style"]
        plain, _ = METHODS["dreambooth"].recipes(replace(workspace, overrides={}), cases["cat"], 0)
        assert (content.steps, content.rank) == (3 * plain.steps, plain.rank)
        assert (content.text_encoders, style.text_encoders) == (False, True)
        assert style.text_learning_rate == style.learning_rate == plain.learning_rate
        assert [path.is_file() for path in style.images] == [True, True]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["unziplora", "blora", "dreambooth", "oracle"])
    def test_training_runs_once_and_makes_two_loras(self, workspace: Workspace, cases: Cases, name: str):
        made = METHODS[name].train(workspace, cases["cat"], 0)
        files = {path: path.stat().st_mtime_ns for path in workspace.folder.rglob("*.safetensors")}
        assert len(files) == 2
        again = METHODS[name].train(workspace, cases["cat"], 0)
        assert {path: path.stat().st_mtime_ns for path in files} == files
        assert made.content is not None
        assert made.style is not None
        assert made.content.modules.keys() == again.content.modules.keys()
        assert not list(workspace.folder.rglob("samples/*.png"))

    @pytest.mark.slow
    def test_zip_and_sum_merge_the_same_dreambooth_loras(self, workspace: Workspace, cases: Cases):
        cat, dog = cases["cat"], cases["dog"]
        pair = METHODS["dreambooth"].train(workspace, cat, 0)
        direct, zipped = (METHODS[name].train(workspace, cat, 0) for name in ("direct", "ziplora"))
        path = next(iter(pair.content.modules))
        total = delta(pair.content.modules[path]) + delta(pair.style.modules[path])
        torch.testing.assert_close(delta(direct.merged.modules[path]), total, rtol=1e-2, atol=1e-5)
        parts = delta(zipped.content.modules[path]) + delta(zipped.style.modules[path])
        torch.testing.assert_close(delta(zipped.merged.modules[path]), parts, rtol=1e-2, atol=1e-5)
        projected = METHODS["null-space"].train(workspace, cat, 0)
        torch.testing.assert_close(projected.style.modules[path], pair.style.modules[path], rtol=1e-2, atol=1e-5)
        assert not torch.allclose(delta(projected.content.modules[path]), delta(pair.content.modules[path]), rtol=1e-2)
        METHODS["ziplora"].mix(workspace, cat, dog, 0)
        assert METHODS["ziplora"].train(workspace, cat, 0).merged.modules.keys() == zipped.merged.modules.keys()
        assert len(list(workspace.run_folder("ziplora", cat, 0).glob("zip-dog-*/*-lora.safetensors"))) == 1
        assert not (workspace.run_folder("dreambooth", dog, 0) / "content").exists()

    def test_merger_of_other_loras_has_another_folder(self, workspace: Workspace, cases: Cases):
        now = replace(workspace, overrides={"dreambooth": {"style": {"learning_rate": 0.5}}})
        before, after = (METHODS["ziplora"].recipes(one, cases["cat"], 0)[-1] for one in (workspace, now))
        assert before.out != after.out
        assert METHODS["ziplora"].recipes(workspace, cases["cat"], 0)[-1].out == before.out

    @pytest.mark.slow
    def test_mix_combines_content_of_one_case_with_style_of_the_other(self, workspace: Workspace, cases: Cases):
        cat, dog = cases["cat"], cases["dog"]
        mixed = METHODS["unziplora"].mix(workspace, cat, dog, 0)
        mine, other = (METHODS["unziplora"].train(workspace, case, 0) for case in (cat, dog))
        path = list(mine.content.modules)[-1]
        assert torch.equal(mixed.content.modules[path][0], mine.content.modules[path][0])
        assert torch.equal(mixed.style.modules[path][1], other.style.modules[path][1])

    @pytest.mark.slow
    def test_run_with_other_settings_is_refused(self, workspace: Workspace, cases: Cases):
        METHODS["unziplora"].train(workspace, cases["cat"], 0)
        other = replace(workspace, overrides={"unziplora": {**SMALL, "rank": 4}})
        with pytest.raises(UserError, match="this run was made with rank 2, not 4"):
            METHODS["unziplora"].train(other, cases["cat"], 0)

    @pytest.mark.slow
    def test_run_of_another_image_is_refused(self, workspace: Workspace, cases: Cases):
        METHODS["unziplora"].train(workspace, cases["cat"], 0)
        changed = replace(cases["cat"], image=solid(1, 2))
        with pytest.raises(UserError, match="this run was made with images"):
            METHODS["unziplora"].train(workspace, changed, 0)

    def test_interrupted_run_is_resumed(self, workspace: Workspace, cases: Cases, monkeypatch: pytest.MonkeyPatch):
        (recipe,) = METHODS["unziplora"].recipes(workspace, cases["cat"], 0)
        asked: list[bool] = []

        def job(config: SplitConfig, resume: bool = False, progress: object = None) -> RunFolder:
            asked.append(resume)
            return RunFolder(config.out)

        monkeypatch.setattr("unziplora.methods.unziplora.method.split", job)
        with RunFolder.created(recipe.out, recipe) as run:
            workspace.train_once(recipe)
            run.content.touch()  # a plain sum has no checkpoints
            workspace.train_once(recipe)
            run.content.unlink()
            run.checkpoint(1, lambda file: file.write(b"x"))
            workspace.train_once(recipe)
        assert asked == [False, True, True]
