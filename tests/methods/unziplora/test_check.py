"""The check of a finished split: what it says, where it is written, and that it never costs a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from trainings import SHORT

from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.errors import UserError
from unziplora.methods.unziplora import check
from unziplora.methods.unziplora.method import split
from unziplora.metrics.measures import Plain
from unziplora.metrics.separation import Alone, Part, Separation
from unziplora.training.method import View

GOOD = Part(learned=0.9, learned_before=0.2, leaked=0.1, leaked_before=0.1, obeyed=0.9)
WEAK = Part(learned=0.25, learned_before=0.2, leaked=0.1, leaked_before=0.1, obeyed=0.9)
LEAKING = Part(learned=0.9, learned_before=0.2, leaked=0.6, leaked_before=0.2, obeyed=0.9)
WORDS = {"images": ["cat.png"], "content": "cat", "style": "ink", "out": "run"}


@pytest.mark.parametrize(
    ("found", "sentences"),
    [
        (Separation(GOOD, GOOD), []),
        (Separation(WEAK, GOOD), ["draws this cat hardly better than the base: raise content_learning_rate (0.0015)"]),
        (Separation(LEAKING, GOOD), ["The content carries the style along: lower content_learning_rate (0.0015)"]),
        (Separation(GOOD, WEAK), ["hardly brings the style: raise style_learning_rate (0.002) or steps (240)"]),
        (Separation(GOOD, LEAKING), ["The style carries the subject along: lower style_learning_rate (0.002)"]),
        (Separation(WEAK, LEAKING), ["hardly better", "carries the subject along"]),
    ],
)
def test_each_fault_has_a_sentence_with_the_setting_to_change(found: Separation, sentences: list[str]):
    lines = check._sentences(found, resolve(SplitConfig, {**WORDS, "base": "bundled"}))
    assert len(lines) == len(sentences)
    assert all(part in line for part, line in zip(sentences, lines, strict=True))


def test_rare_word_is_left_out_where_it_is_a_word() -> None:
    desks = resolve(SplitConfig, {**WORDS, "content": "desks", "token": "sk"})
    assert check.without_token("a sk desks in oil painting style", desks) == "a desks in oil painting style"


def test_headline_has_the_scores():
    assert check._headline(Separation(GOOD, GOOD)) == (
        "Content and style came apart to 0.90 of 1 (content alone 0.90, style alone 0.90)."
    )


def test_each_lora_draws_alone_and_the_base_the_same_without_the_rare_word(monkeypatch: pytest.MonkeyPatch):
    def draw(base: object, method: object, drawing: SplitConfig, view: View) -> list[tuple[object, ...]]:
        return [(view.prompts.full, view.off, seed) for seed in drawing.sample_seeds]

    monkeypatch.setattr(check, "generate_view", draw)
    monkeypatch.setattr(check, "measure_separation", lambda *_, **alone: drawn.update(alone) or Separation(GOOD, GOOD))
    drawn: dict[str, Alone] = {}
    recipe = resolve(SplitConfig, {**WORDS, "base": "bundled", "style": "watercolor painting"})
    check.check_loras(SimpleNamespace(images=[]), recipe, SimpleNamespace(device="cpu"))
    styles, both = ("pencil sketch", "oil painting"), ("content", "style")
    assert drawn["content"] == Alone(
        [(f"a sks cat in {style} style", ("style",), seed) for style in styles for seed in (0, 1)],
        [(f"a cat in {style} style", both, seed) for style in styles for seed in (0, 1)],
    )
    subjects = [f"a {subject} in watercolor painting style" for subject in ("house", "guitar")]
    assert drawn["style"] == Alone(
        [(subject, ("content",), seed) for subject in subjects for seed in (0, 1)],
        [(subject, both, seed) for subject in subjects for seed in (0, 1)],
    )


def test_bundled_base_is_checked_and_others_by_two_models_alone():
    assert resolve(SplitConfig, {**WORDS, "base": "bundled"}).is_checked()
    assert not resolve(SplitConfig, {**WORDS, "base": "bundled", "sample_seeds": []}).is_checked()
    assert not resolve(SplitConfig, {**WORDS, "base": "other"}).is_checked()
    assert resolve(SplitConfig, {**WORDS, "base": "other", "dino": "d", "clip": "c"}).is_checked()
    with pytest.raises(UserError, match="the check takes two models"):
        resolve(SplitConfig, {**WORDS, "base": "other", "dino": "d"})


@pytest.fixture
def config(tmp_path: Path, tiny_folder: Path):
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(tmp_path / "cat.png")

    def make(**changes: object) -> SplitConfig:
        own = {"images": [tmp_path / "cat.png"], "base": str(tiny_folder), "out": tmp_path / "run"}
        short = {**SHORT, "steps": 2, "rank": 2, "column_separation": False, "sample_seeds": [0, 1]}
        return resolve(SplitConfig, {**WORDS, **short, **own, "dino": "d", "clip": "c", **changes})

    return make


def test_figures_are_in_the_folder_and_sentences_in_the_card(config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check, "check_models", lambda config: None)
    monkeypatch.setattr("unziplora.methods.unziplora.method.check_models", lambda config: None)
    monkeypatch.setattr(check, "_measure", lambda config, device: Plain())
    monkeypatch.setattr(check, "SEEDS", [0])
    monkeypatch.setattr(check, "STEPS", 2)
    run = split(config())
    found = json.loads(run.check_file.read_text())
    assert 0 <= found["score"] <= 1
    assert set(found["content"]) == {"learned", "learned_before", "leaked", "leaked_before", "obeyed", "score"}
    # hardly trained LoRAs draw what the base draws
    assert found["content"]["learned"] == pytest.approx(found["content"]["learned_before"], abs=0.1)
    assert found["content"]["obeyed"] > 0.9
    card = run.card.read_text()
    assert "## Check" in card
    assert found["findings"][0] in card
    assert len(found["findings"]) >= 3  # neither LoRA has learned anything


def test_named_models_check_any_base(config, vision_models: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check, "SEEDS", [0])
    monkeypatch.setattr(check, "STEPS", 2)
    run = split(config(dino=vision_models["dino"], clip=vision_models["clip"]))
    found = json.loads(run.check_file.read_text())
    assert found["content"]["obeyed"] == pytest.approx(1, abs=0.05)
    assert run.config(SplitConfig).dino == vision_models["dino"]
    assert vision_models["dino"] not in run.card.read_text()  # a path of this machine


def test_check_that_is_not_possible_does_not_cost_the_run(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("unziplora.methods.unziplora.method.check_models", lambda config: None)
    (tmp_path / "d").mkdir()
    with pytest.warns(UserWarning, match=r"no check of the LoRAs, which are complete: --dino .*/d: no model"):
        run = split(config(dino=str(tmp_path / "d"), clip=str(tmp_path / "d")))
    assert run.card.is_file()
    assert not run.check_file.exists()


def test_missing_model_is_refused_before_anything_is_trained(config, tmp_path: Path):
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match=r"--dino .*: no model can be loaded from here"):
        split(config(dino=str(tmp_path / "d"), clip=str(tmp_path / "d")))
    assert not (tmp_path / "run").exists()
