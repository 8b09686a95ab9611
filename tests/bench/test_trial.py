"""A trial on tiny random models: its arms, its queue, its report and what is not in it."""

import errno
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from unziplora.bench import trial_run
from unziplora.bench.cost import COST, Cost, read_cost
from unziplora.bench.trial import ARMS, LocalScaling, Trial, load_images, open_trial
from unziplora.bench.trial_run import Forecast, announce, foresee, run_trial, submit
from unziplora.config.blora import BLoraConfig
from unziplora.config.recipe import resolve
from unziplora.config.split import BUNDLED, PAPER, SplitConfig
from unziplora.config.training import SMALL as SMALL_BASE
from unziplora.config.trial import ADDITIONS, CONVOLUTIONS, TrialConfig
from unziplora.errors import Interrupted, MachineError, UserError
from unziplora.jobs.queue import Queue
from unziplora.jobs.state import find_runs, record_failure
from unziplora.jobs.trainings import Trainer
from unziplora.metrics.embedders import ImageModel
from unziplora.runs.folder import RunFolder
from unziplora.utils.progress import Callback, Progress

pytestmark = pytest.mark.filterwarnings("ignore:no GPU")

PAIR = {"steps": 2, "rank": 2}
TINY = {**PAIR, "column_periods": 1, "column_warmup": 1, "score_timesteps": 1}
OVERRIDES = {
    **{name: TINY for name in ("default", "default-x3", "default-x10", "convolutions", "paper")},
    "additions": {**TINY, "phrase_steps": 1},
    "blora": PAIR,
    "dreambooth": {"content": PAIR, "style": PAIR},
}
IMAGES = {"okapi-photo": ("okapi", "cloisonne"), "xerus-photo": ("xerus", "sgraffito")}
IMAGES |= {"quokka-photo": ("quokka", "marquetry"), "numbat-photo": ("numbat", "intarsia")}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures-of-jane"
    folder.mkdir()
    lines = []
    for number, (stem, (content, style)) in enumerate(IMAGES.items()):
        Image.radial_gradient("L").rotate(90 * number).resize((64, 64)).save(folder / f"{stem}.png")
        lines.append(f'["{stem}.png"]\ncontent = "{content}"\nstyle = "{style}"\n')
    (folder / "words.toml").write_text("\n".join(lines))
    return folder


Make = Callable[..., TrialConfig]


@pytest.fixture
def make(photos: Path, tmp_path: Path, tiny_folder: Path, vision_models: dict[str, str]) -> Make:
    """Return a function that makes a trial of one seed, one image per prompt and one denoising step."""

    def make(**keys: Any) -> TrialConfig:
        small = {"seeds": [0], "samples": 1, "sample_steps": 1, "guidance": 1.0, "precision": "fp32"}
        places = {"pictures": photos, "out": tmp_path / "trial", "base": str(tiny_folder)}
        return TrialConfig(**{**places, **vision_models, **small, **keys})

    return make


def silent(event: Progress) -> None:
    return None


def only(photos: Path, *stems: str) -> None:
    """Leave only these images in a folder."""
    lines = [f'["{s}.png"]\ncontent = "{IMAGES[s][0]}"\nstyle = "{IMAGES[s][1]}"\n' for s in stems]
    (photos / "words.toml").write_text("\n".join(lines))
    for file in photos.glob("*.png"):
        if file.stem not in stems:
            file.unlink()


class TestArms:
    @pytest.fixture
    def recipes(self, make: Make, tmp_path: Path) -> dict[str, list[Any]]:
        trial = open_trial(make(), folder=tmp_path / "elsewhere")
        return {name: trial.recipes((name, "okapi-photo", 0)) for name in ARMS}

    def test_default_is_the_preset(self, recipes: dict[str, list[Any]]):
        (recipe,) = recipes["default"]
        plain = SplitConfig(images=["x"], content="x", style="y", out="x")
        learned = ("steps", "rank", "content_learning_rate", "style_learning_rate", "blocks", "phrase_steps")
        assert recipe.preset == "default"
        assert recipe.model_dump(include=set(learned)) == plain.model_dump(include=set(learned))

    @pytest.mark.parametrize(("arm", "factor"), [("default-x3", 3), ("default-x10", 10)])
    def test_two_arms_change_nothing_but_the_rates(self, recipes: dict[str, list[Any]], arm: str, factor: int):
        (plain,), (faster,) = recipes["default"], recipes[arm]
        changed = {name for name, value in faster if value != getattr(plain, name)}
        assert changed == {"out", "content_learning_rate", "style_learning_rate"}
        assert faster.content_learning_rate == pytest.approx(factor * 5e-5)
        assert faster.style_learning_rate == pytest.approx(factor * 5e-5)

    def test_additions_are_those_of_the_bundled_preset_without_what_fits_its_base(self, recipes: dict[str, list[Any]]):
        (plain,), (more,) = recipes["default"], recipes["additions"]
        changed = {name for name, value in more if value != getattr(plain, name)}
        assert changed == {"out", *ADDITIONS}
        assert {name: getattr(more, name) for name in ADDITIONS} == {name: BUNDLED[name] for name in ADDITIONS}
        tied = {*SMALL_BASE, "content_learning_rate", "style_learning_rate", "schedule", "blocks", "phrase_words"}
        tied |= {"column_warmup", "score_timesteps"}
        assert set(BUNDLED) == {*ADDITIONS, *CONVOLUTIONS, *tied}

    def test_convolutions_come_without_columns_and_blocks(self, recipes: dict[str, list[Any]]):
        (plain,), (more,) = recipes["default"], recipes["convolutions"]
        assert {name for name, value in more if value != getattr(plain, name)} == {"out", *CONVOLUTIONS}
        assert more.targets == ["attention", "convolutions"]

    def test_paper_is_the_preset_with_an_optimizer_that_runs_everywhere(self, recipes: dict[str, list[Any]]):
        (recipe,) = recipes["paper"]
        published = {name: value for name, value in PAPER.items() if name not in ("optimizer", "precision")}
        assert {name: getattr(recipe, name) for name in published} == published

    def test_dreambooth_trains_two_loras_and_blora_one_run(self, recipes: dict[str, list[Any]]):
        assert [recipe.out.name for recipe in recipes["dreambooth"]] == ["dreambooth-0-content", "dreambooth-0-style"]
        (recipe,) = recipes["blora"]
        assert isinstance(recipe, BLoraConfig)
        assert (recipe.blocks, recipe.steps) == ("blora", 1000)
        assert recipes["base"] == []

    def test_help_names_every_arm(self):
        text = str(TrialConfig.model_fields["arms"].description)
        assert all(f"{name}:" in text or f"{name}," in text or f"{name};" in text for name in ARMS)


class TestImages:
    def test_image_without_words_is_left_out_with_a_warning(self, photos: Path):
        Image.new("RGB", (64, 64)).save(photos / "other.jpg")
        with pytest.warns(UserWarning, match=r"no words for other\.jpg, which are left out"):
            assert list(load_images(photos, 64)) == list(IMAGES)

    def test_folders_without_images_or_words_are_refused(self, photos: Path, tmp_path: Path):
        with pytest.raises(UserError, match="no such folder; name one with images"):
            load_images(tmp_path / "nowhere", 64)
        (photos / "words.toml").unlink()
        with pytest.raises(UserError, match="write the words of each image there"):
            load_images(photos, 64)
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="contains no images"):
            load_images(tmp_path / "empty", 64)


class TestOpening:
    def test_local_scaling_compares_with_the_other_images(self, make: Make, vision_models: dict[str, str]):
        trial = open_trial(make())
        case = trial.cases["xerus-photo"]
        *_, scaled = trial.case_measures(case)
        assert isinstance(scaled, LocalScaling)
        csd = ImageModel("csd", vision_models["csd"])
        others = [other.image for slug, other in trial.cases.items() if slug != "xerus-photo"]
        torch.testing.assert_close(scaled.reference, csd.embed(others))
        features, truth = csd.embed([others[0]]), csd.embed([case.image])
        usual = [float((row @ scaled.reference.T).mean()) for row in (features, truth)]
        expected = 2 * float(features @ truth.T) - sum(usual)
        assert scaled.compare(features, truth) == [pytest.approx(expected, abs=1e-5)]

    def test_mark_of_local_scaling_changes_with_another_reference_image_only(self, make: Make, photos: Path):
        def marks() -> dict[str, str]:
            trial = open_trial(make())
            return {slug: trial.case_measures(case)[-1].weights_hash for slug, case in trial.cases.items()}

        before = marks()
        Image.new("RGB", (64, 64), "red").save(photos / "xerus-photo.png")
        after = marks()
        assert [slug for slug in IMAGES if before[slug] == after[slug]] == ["xerus-photo"]

    def test_an_image_under_two_names_is_no_reference_of_itself(self, make: Make, photos: Path):
        shutil.copy(photos / "xerus-photo.png", photos / "copy.png")
        with (photos / "words.toml").open("a") as file:
            file.write('["copy.png"]\ncontent = "xerus"\nstyle = "ink"\n')
        trial = open_trial(make())
        for slug in ("xerus-photo", "copy"):
            *_, scaled = trial.case_measures(trial.cases[slug])
            assert isinstance(scaled, LocalScaling)
            others = [trial.cases[other].image for other in IMAGES if other != "xerus-photo"]
            torch.testing.assert_close(scaled.reference, trial.measures[-1].style(others))

    def test_other_models_under_the_same_name_score_again(self, make: Make, vision_models: dict[str, str]):
        def marks() -> list[str]:
            trial = open_trial(make())
            return [measure.weights_hash for measure in trial.case_measures(trial.cases["xerus-photo"])]

        before = marks()
        file = Path(vision_models["csd"]) / "preprocessor_config.json"
        text = file.read_text()
        try:
            file.write_text(json.dumps({**json.loads(text), "image_mean": [0.1, 0.1, 0.1]}))
            after = marks()
        finally:
            file.write_text(text)
        assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, False]

    def test_three_images_have_no_local_scaling(self, make: Make, photos: Path):
        only(photos, "okapi-photo", "xerus-photo", "numbat-photo")
        with pytest.warns(UserWarning, match="no CSLS read-out of CSD: it needs 4 images, and there are 3"):
            trial = open_trial(make())
        assert trial.case_measures(trial.cases["okapi-photo"]) == trial.measures

    def test_missing_gpu_is_a_warning(self, make: Make, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("unziplora.bench.trial.pick_device", lambda name: torch.device("cpu"))
        with pytest.warns(UserWarning, match="no GPU"):
            open_trial(make())

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"base": "nowhere"}, "base 'nowhere': no such file or folder"),
            ({"csd": str(Path(__file__).parent)}, "--csd .*: no model can be loaded from here"),
        ],
    )
    def test_missing_base_and_models_are_refused(self, make: Make, keys: dict[str, str], message: str):
        with pytest.raises(UserError, match=message):
            open_trial(make(**keys))

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"clip": None, "dino": None, "csd": None}, "give --clip and --dino, or --csd"),
            ({"dino": None}, "give both, or neither"),
            ({"arms": ["magic"]}, "arms.0"),
            ({"seeds": [-1]}, "seeds are whole numbers"),
        ],
    )
    def test_contradictory_settings_are_refused(self, make: Make, keys: dict[str, Any], message: str):
        with pytest.raises(UserError, match=message):
            resolve(TrialConfig, {**make().model_dump(), **keys})


class TestForecast:
    def test_trainings_images_and_disk_are_counted(self, make: Make):
        config = make(arms=["base", "default", "dreambooth"], seeds=[0, 1, 2], samples=2)
        trial = open_trial(config, overrides=OVERRIDES)
        forecast = foresee(trial)
        assert forecast.trainings == 4 * 3 * (1 + 2)
        assert forecast.samples == 4 * (1 + 3 + 3) * (4 + 4 + 1) * 2  # the base has no seeds
        assert set(forecast.memory) == {"default", "dreambooth"}
        text = "\n".join(forecast.lines())
        assert "trainings: 36; images to sample and score: 504" in text
        assert "on the disk, where" in text

    @pytest.mark.slow
    def test_what_is_there_needs_no_disk_again(self, make: Make):
        trial = open_trial(make(arms=["base", "default"]), overrides=OVERRIDES)
        before = foresee(trial)
        for unit in trial.units:
            for run in trial.trainings(unit):
                run.path.mkdir(parents=True)
                run.card.touch()
        trained = foresee(trial)
        assert trained.disk == trained.samples * 3 * 64 * 64 < before.disk
        for unit in trial.units:
            trial.scores_file(unit).parent.mkdir(parents=True)
            trial.scores_file(unit).touch()
        assert foresee(trial).disk == 0

    def test_disk_of_the_loras_is_that_of_their_files(self, make: Make, photos: Path):
        only(photos, "okapi-photo")
        rank = {"default": {**TINY, "rank": 64}}
        trial = open_trial(make(arms=["default"]), overrides=rank)
        with_small = foresee(open_trial(make(arms=["default"]), overrides={"default": {**TINY, "rank": 32}}))
        (recipe,) = trial.recipes(("default", "okapi-photo", 0))
        more = foresee(trial).disk - with_small.disk
        run = trained(recipe)
        tensors = [tensor for path in (run.content, run.style) for tensor in load_file(path).values()]
        factors = sum(tensor.numel() for tensor in tensors if tensor.ndim == 2)
        assert more == (2 + 36) * factors // 2  # of half the rank: the files in fp16, three checkpoints in fp32

    def test_too_little_disk_or_memory_is_a_warning(self, make: Make):
        forecast = Forecast(1, ["paper"], 1, 1, 2**31, 2**30, {"paper": 2**34}, ["paper"])
        trial = open_trial(make())
        with pytest.warns(UserWarning, match=r"2\.0 GiB are needed and 1\.0 GiB are free"):
            announce(trial, forecast)
        with pytest.warns(UserWarning, match="memory may not suffice for paper"):
            announce(trial, forecast)

    def test_arm_whose_settings_cannot_be_trained_is_named(self, make: Make):
        trial = open_trial(make(arms=["default"]), overrides={"default": {**TINY, "resolution": 17}})
        with pytest.raises(UserError, match="arm default: resolution 17"):
            foresee(trial)


def trained(recipe: SplitConfig) -> RunFolder:
    """Train a recipe from the start."""
    with RunFolder.created(recipe.out, recipe) as run:
        pass
    Trainer()(run, silent)
    return run


class FakeTrainer(Trainer):
    """Trains nothing: writes the file that marks a run as finished, or fails for an image."""

    def __init__(self, failing: str = "xerus-photo") -> None:
        super().__init__()
        self.failing = failing

    def __call__(self, run: RunFolder, progress: Callback) -> None:
        progress(Progress(1, 2, 0.5, 1.0, memory_bytes=3 * 2**20))
        if run.path.parent.name == self.failing:
            raise UserError(f"{run.path}: a secret reason")
        run.card.write_text("# finished")


@pytest.mark.slow
def test_all_arms_are_trained_scored_and_reported_without_a_trace_of_the_user(
    make: Make, photos: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("unziplora.methods.unziplora.style_phrase.DISTILLATION_STEPS", 1)
    messages: list[str] = []
    monkeypatch.chdir(tiny_folder.parent)
    config = make(arms=list(ARMS), base=tiny_folder.name)
    only(photos, "okapi-photo")
    report = run_trial(config, lambda event: messages.append(event.message or ""), overrides=OVERRIDES)

    assert [arm.name for arm in report.arms] == list(ARMS)
    assert [(arm.scored, arm.planned) for arm in report.arms] == [(1, 1)] * len(ARMS)
    assert [(score["image"], score["arm"], score["seed"]) for score in report.scores] == [(1, name, 0) for name in ARMS]
    titles = {"style CLIP-I", "style CSD", "style DINO", "content DINO", "content CSD"}
    assert all(score["figures"].keys() == titles for score in report.scores)
    different = {json.dumps(score["figures"]) for score in report.scores}
    assert len(different) > 4  # two steps at small rates change little
    assert all(arm.memory and arm.minutes is not None for arm in report.arms if arm.name != "base")
    assert any(f"of {len(ARMS)} results, about" in message for message in messages)
    assert sum(message.startswith("loading base") for message in messages) == 1
    runs = find_runs(config.out / "runs")
    assert {run.state for run in runs} == {"finished"}
    assert len(runs) == 9  # none of the base, two of DreamBooth
    assert not list(config.out.rglob("step-*.safetensors"))
    sheet = Image.open(config.out / "sheets" / "image-1.png")
    assert sheet.width > 9 * 64
    assert sheet.height > len(ARMS) * 64

    with zipfile.ZipFile(config.out / "report.zip") as archive:
        names = archive.namelist()
        text = "\n".join(archive.read(name).decode() for name in names)
    assert sorted(names) == ["report.json", "report.md"]
    private = ["okapi", "cloisonne", "jane", "photo", tmp_path.name, tiny_folder.name, str(tmp_path), "/"]
    text = text.replace("stabilityai/", "")
    assert [word for word in private if word in text] == []
    assert (config.out / "report.md").read_text() == zipfile.ZipFile(config.out / "report.zip").read(
        "report.md"
    ).decode()

    shared = run_trial(config.model_copy(update={"share_images": True}), overrides=OVERRIDES)
    assert shared.scores == report.scores
    assert shared.words == [{"content": "okapi", "style": "cloisonne"}]
    with zipfile.ZipFile(config.out / "report.zip") as archive:
        assert sorted(archive.namelist()) == ["report.json", "report.md", "sheets/image-1.png"]


@pytest.mark.slow
def test_csls_of_each_image_is_that_of_its_samples_among_the_other_images(make: Make, vision_models: dict[str, str]):
    config = make(arms=["base"])
    report = run_trial(config)
    csd = ImageModel("csd", vision_models["csd"])
    photos = csd.embed([case.image for case in load_images(config.pictures, 64).values()])
    for score in report.scores:
        own = score["image"] - 1
        samples = sorted((config.out / "results" / list(IMAGES)[own] / "base-0" / "samples").glob("style-*.png"))
        features, truth = csd.embed([Image.open(path) for path in samples]), photos[own]
        others = torch.cat([photos[:own], photos[own + 1 :]])
        expected = 2 * features @ truth - (features @ others.T).mean(1) - (others @ truth).mean()
        assert score["figures"]["style CSLS"] == pytest.approx(float(expected.mean()), abs=1e-4)
        assert score["figures"]["style CSD"] == pytest.approx(float((features @ truth).mean()), abs=1e-4)
    assert len(report.scores) == 4


@pytest.mark.slow
def test_interrupted_trial_goes_on_from_the_checkpoint_with_the_same_result(make: Make, photos: Path, tmp_path: Path):
    only(photos, "okapi-photo")
    six = {"default": {**TINY, "steps": 6, "checkpoint_every": 2}}
    config = make(arms=["default"])
    whole = run_trial(config.model_copy(update={"out": tmp_path / "whole"}), overrides=six)

    def stop(event: Progress) -> None:
        if event.step == 3 and event.steps == 6 and event.loss == event.loss:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command continues"):
        run_trial(config, stop, overrides=six)
    run = RunFolder(config.out / "runs" / "okapi-photo" / "default-0")
    assert run.steps()
    assert [job.state for job in Queue(config.out / "runs").jobs()] == ["interrupted"]
    seen: list[int] = []
    again = run_trial(config, lambda event: seen.append(event.step) if event.steps == 6 else None, overrides=six)
    assert min(step for step in seen if step) > 1
    assert again.scores == whole.scores
    first, second = (
        load_file(folder / "runs" / "okapi-photo" / "default-0" / "default-0-style.safetensors")
        for folder in (tmp_path / "whole", config.out)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_run_with_other_settings_is_refused_before_anything_is_trained(make: Make, photos: Path):
    only(photos, "okapi-photo")
    config = make(arms=["default"])
    run_trial(config, overrides=OVERRIDES)
    with pytest.raises(UserError, match="this run was made with rank 2, not 4"):
        run_trial(config, overrides={"default": {**TINY, "rank": 4}})


class TestFailures:
    @pytest.fixture
    def trial(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> Trial:
        monkeypatch.setattr("unziplora.bench.trial.evaluate", self.evaluate)
        trial = open_trial(make(arms=["base", "default"]), overrides=OVERRIDES)
        trial.trainer = FakeTrainer()
        monkeypatch.setattr(trial_run, "open_trial", lambda *_: trial)
        return trial

    @staticmethod
    def evaluate(workspace: Any, base: Any, measures: Any, arm: Any, cases: Any, case: Any, seed: int) -> Any:
        values = {measure.name: {"content": 0.25, "style": 0.75} for measure in measures}
        pictures = [
            {"task": task, "target": "x", "file": "gone.png", "values": values} for task in ("content", "style")
        ]
        return {"measures": list(values), "pictures": pictures, "seconds": {"sampling": 30.0}, "settings": "same"}

    @pytest.mark.slow
    def test_failed_training_stops_no_other_and_is_tried_again(self, trial: Trial):
        with pytest.raises(MachineError, match=r"1 of the trial's .*failed, the first because of\n .*secret reason"):
            run_trial(trial.config)
        assert len(trial.results) == 4 + 3
        text = (trial.workspace.folder / "report.md").read_text()
        assert "| default | 3 of 4 |" in text
        assert "secret" not in text
        assert [job.state for job in Queue(trial.workspace.runs).jobs()] == ["failed"]
        trial.trainer = type(
            "Good", (FakeTrainer,), {"__call__": lambda self, run, progress: run.card.write_text("#")}
        )()
        assert [arm.scored for arm in run_trial(trial.config).arms] == [4, 4]

    def test_memory_that_does_not_suffice_for_sampling_stops_nothing_else(
        self, trial: Trial, monkeypatch: pytest.MonkeyPatch
    ):
        def exhausted(*args: Any) -> Any:
            if args[3].name == "base" and args[5].slug == "numbat-photo":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.evaluate(*args)

        monkeypatch.setattr("unziplora.bench.trial.evaluate", exhausted)
        trial.trainer = FakeTrainer(failing="")
        with pytest.raises(MachineError, match="base, numbat-photo, seed 0: CUDA out of memory"):
            run_trial(trial.config)
        assert len(trial.results) == 7
        assert trial.seconds_left() == 0

    @pytest.mark.parametrize("fault", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS")])
    def test_nothing_is_trained_where_nothing_can_be_sampled(
        self, trial: Trial, monkeypatch: pytest.MonkeyPatch, fault: Exception
    ):
        def failing(*_: Any) -> Any:
            raise fault

        messages: list[str] = []
        trial.progress = lambda event: messages.append(event.message or "")
        monkeypatch.setattr("unziplora.bench.trial.evaluate", failing)
        with pytest.raises(MachineError, match=f"nothing can be sampled and scored here: {fault}"):
            run_trial(trial.config)
        assert f"base, okapi-photo, seed 0: no result: {fault}" in messages
        assert {job.state for job in Queue(trial.workspace.runs).jobs()} == {"queued"}

    def test_full_disk_ends_the_trial(self, trial: Trial, monkeypatch: pytest.MonkeyPatch):
        def full(*_: Any) -> Any:
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr("unziplora.bench.trial.evaluate", full)
        with pytest.raises(OSError, match="no space"):
            run_trial(trial.config)

    def test_queue_is_that_of_the_present_settings(self, trial: Trial):
        assert len(submit(trial).jobs()) == 4
        trial.cases = {slug: trial.cases[slug] for slug in ("quokka-photo", "okapi-photo")}
        assert [job.name for job in submit(trial).jobs()] == ["quokka-photo/default-0", "okapi-photo/default-0"]

    def test_run_that_has_learned_nothing_gets_the_present_settings(self, trial: Trial):
        submit(trial)
        first = RunFolder(trial.workspace.runs / "okapi-photo" / "default-0")
        trial.resolved = {
            unit: [recipe.model_copy(update={"precision": "bf16", "rank": 3}) for recipe in trial.recipes(unit)]
            for unit in trial.units
        }
        record_failure(first, UserError("a wrong word"))
        assert {job.state for job in submit(trial).jobs()} == {"queued"}
        saved = first.config(SplitConfig)
        assert (saved.precision, saved.rank) == ("bf16", 3)

    def test_all_runs_that_learned_with_other_settings_are_named(self, trial: Trial):
        for job in submit(trial).jobs()[:2]:
            job.run.card.write_text("# finished")
        trial.resolved = {
            unit: [recipe.model_copy(update={"rank": 3}) for recipe in trial.recipes(unit)] for unit in trial.units
        }
        with pytest.raises(UserError, match=r"(?s)default-0: this run was made with rank 2, not 3.*\n.*rank 2, not 3"):
            submit(trial)
        assert len(Queue(trial.workspace.runs).jobs()) == 4

    def test_run_in_the_hands_of_another_worker_is_waited_for(self, trial: Trial, monkeypatch: pytest.MonkeyPatch):
        waited: list[float] = []
        monkeypatch.setattr(trial_run.time, "sleep", waited.append)
        real = trial_run.state_of
        monkeypatch.setattr(trial_run, "state_of", lambda run: real(run) if waited else "running")
        with pytest.raises(MachineError, match="secret reason"):
            run_trial(trial.config)
        assert waited == [trial_run.POLL]

    def test_canceled_training_is_queued_again_and_a_waiting_one_only_once(self, trial: Trial):
        queue = submit(trial)
        names = [job.name for job in queue.jobs()]
        assert len(names) == 4
        queue.cancel(names[0])
        assert len(queue.jobs()) == 3
        assert [job.name for job in submit(trial).jobs()] == [job.name for job in submit(trial).jobs()] == names

    def test_cost_is_noted_and_shown_per_image(self, trial: Trial):
        with pytest.raises(MachineError):
            run_trial(trial.config)
        costs = [read_cost(run) for unit in trial.results for run in trial.trainings(unit)]
        assert [cost.memory for cost in costs if cost] == [3 * 2**20] * 3
        for unit in trial.results:
            for run in trial.trainings(unit):
                (run.path / COST).write_text(json.dumps(Cost(90.0, 2**30)._asdict()))
        assert trial.seconds_left() == 0  # a failed training takes no more time
        left = {unit: result for unit, result in trial.results.items() if unit[1] != "numbat-photo"}
        assert replace(trial, results=left).seconds_left() == pytest.approx(30 + (90 + 30))
        report = trial_run.write_trial(trial)
        default = report.arms[1]
        assert (default.minutes, default.sampling_minutes, default.memory) == (1.5, 0.5, 2**30)
        assert (
            "| default | 3 of 4 | 1 min 30 s | 30 s | 1.0 GiB |" in (trial.workspace.folder / "report.md").read_text()
        )

    def test_figures_of_every_measure_have_their_columns(self, trial: Trial):
        with pytest.raises(MachineError):
            run_trial(trial.config)
        text = (trial.workspace.folder / "report.md").read_text()
        head = re.search(r"^\| method \|.*$", text, re.MULTILINE)
        assert head is not None
        styles, contents = ["CLIP-I", "CSD", "CSLS", "DINO"], ["DINO", "CSD", "CSLS"]
        titles = [*(f"style {name}" for name in styles), *(f"content {name}" for name in contents)]
        assert head[0].strip("| ").split(" | ")[1:] == titles
        assert "the 3 nearest of the 3 other images" in text
        assert replace(trial, results={}).seconds_left() is None
