"""Style phrase: offsets are fitted to images, and distilled into a LoRA of the text encoders."""

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from unziplora.config.recipe import resolve
from unziplora.config.sample import SampleConfig
from unziplora.config.split import SplitConfig
from unziplora.errors import Interrupted, NonFiniteLoss, UserError
from unziplora.formats import writers
from unziplora.formats.files import read_lora
from unziplora.images.filters import FILTERS, filtered
from unziplora.methods.data import latents_of
from unziplora.methods.unziplora import style_phrase
from unziplora.methods.unziplora.method import UnZipLora, split
from unziplora.methods.unziplora.style_phrase import Distillation, Inversion, _distillation_prompts
from unziplora.methods.unziplora.textual_inversion import PhraseOffsets, token_embeddings
from unziplora.models.base import Base, load_base
from unziplora.models.text import Conditioning, Prompts, embed, encode_batch, image_conditioning, time_ids
from unziplora.sampling.sample import sample
from unziplora.training.loss import Examples, denoising_loss, generator
from unziplora.training.method import OpenedImages, Setup
from unziplora.training.phases import Phases
from unziplora.training.preflight import open_images
from unziplora.utils.progress import Progress

Make = Callable[..., SplitConfig]
PROMPT = "a cat in ink wash style"


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Make:
    picture = tmp_path / "cat.png"
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(picture)

    def make(**changes: Any) -> SplitConfig:
        values: dict[str, Any] = {"images": [picture], "base": str(tiny_folder), "out": tmp_path / "run"}
        values |= {"content": "cat", "style": "ink wash", "rank": 4, "steps": 2, "column_periods": 1}
        values |= {"column_warmup": 1, "score_timesteps": 1, "device": "cpu", "sample_seeds": [], "generated_steps": 2}
        return resolve(SplitConfig, {**values, "phrase_steps": 4, "save_precision": "fp32", **changes})

    return make


def picture(base: Base) -> Examples:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Examples(latents, image_conditioning(base, Prompts(PROMPT), time_ids(64, 64)))


def setup_of(recipe: SplitConfig) -> Setup:
    base = load_base(recipe.base)
    return Setup(base, open_images(UnZipLora, recipe, base.scale), nullcontext, lambda _: None)


@pytest.fixture
def base(tiny_folder: Path) -> Base:
    return load_base(str(tiny_folder))


def fit(phrase: PhraseOffsets, examples: Examples, recipe: SplitConfig) -> None:
    setup = Setup(phrase.base, OpenedImages(phrase.base.scale, (64, 64)), nullcontext, lambda _: None)
    setup.phases.learn(Inversion(phrase, setup, examples, recipe, phrase.base.unet))


class TestOffsets:
    def test_phrase_longer_than_a_prompt_is_refused(self, base: Base) -> None:
        with pytest.raises(UserError, match=r"tokens long, and a prompt has 75; shorten it"):
            PhraseOffsets(base, "ink " * 90)

    def test_offsets_are_added_only_where_the_whole_phrase_occurs(self, base: Base):
        phrase, encoder, tokenizer = PhraseOffsets(base, "ink wash"), base.text_encoders[0], base.tokenizers[0]
        with torch.no_grad():
            for offsets in phrase.learned:
                offsets += torch.arange(1.0, offsets.shape[1] + 1)[:, None]
        tokens = tokenizer([PROMPT, "an ink washer, ink"], padding=True, return_tensors="pt").input_ids
        table = token_embeddings(encoder)
        plain = table(tokens)
        with phrase.applied():
            added = (table(tokens) - plain)[..., 0]
        start = tokenizer("a cat in", add_special_tokens=False).input_ids
        length = len(phrase.token_ids[0])
        expected = torch.zeros(tokens.shape)
        expected[0, 1 + len(start) : 1 + len(start) + length] = torch.arange(1.0, length + 1)
        torch.testing.assert_close(added, expected, atol=1e-5, rtol=0)
        assert torch.equal(table(tokens), plain)

    def test_weight_one_turns_a_token_into_the_known_one(self, base: Base):
        phrase = PhraseOffsets(base, "ink wash", known_words=["sign", "neon sign"])
        for number in (0, 1):
            tokenizer, table = base.tokenizers[number], token_embeddings(base.text_encoders[number])
            known = sorted(set(tokenizer("neon sign", add_special_tokens=False).input_ids))
            token = tokenizer("sign", add_special_tokens=False).input_ids[-1]
            with torch.no_grad():
                phrase.learned[number][:, :, known.index(token)] = 1.0
            with phrase.applied(), torch.no_grad():
                read = table(torch.tensor([phrase.token_ids[number]]))
                torch.testing.assert_close(read[0], table.weight[token].expand_as(read[0]), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(("words", "rate"), [([], 1e-3), (["sign"], 1e-2)])
    def test_offsets_and_shares_have_their_own_learning_rates(
        self, base: Base, config: Make, words: list[str], rate: float
    ):
        phrase = PhraseOffsets(base, "ink wash", known_words=words)
        fit(phrase, picture(base), config(phrase_steps=1, phrase_learning_rate=1e-3, phrase_word_rate=1e-2))
        # Adam's first step is the rate, whatever the loss.
        assert max(values.abs().max().item() for values in phrase.learned) == pytest.approx(rate, rel=0.01)

    def test_a_phrase_of_known_words_stays_a_mixture(self, base: Base, config: Make):
        phrase = PhraseOffsets(base, "ink wash", known_words=["neon sign", "oil painting", "mosaic"])
        fit(phrase, picture(base), config(phrase_steps=12, phrase_word_rate=1))
        for shares in phrase.learned:
            assert shares.any()
            assert shares.min() >= 0
            assert shares.sum(-1).max() <= 1 + 1e-6

    def test_a_phrase_that_diverges_is_named(self, base: Base, config: Make):
        phrase = PhraseOffsets(base, "ink wash")
        with pytest.raises(NonFiniteLoss, match=r"of the phrase: the loss is nan\. Start a new run with a lower rate"):
            fit(phrase, picture(base), config(phrase_steps=9, phrase_learning_rate=1e30))

    def test_shares_are_brought_back_to_a_mixture(self, base: Base):
        phrase = PhraseOffsets(base, "ink", known_words=["neon sign"])
        with torch.no_grad():
            for shares in phrase.learned:
                shares[..., :3] = torch.tensor([-1.0, 0.5, 1.5])
                shares[..., 3:] = 0
        phrase.keep_mixture()
        for shares in phrase.learned:
            torch.testing.assert_close(shares[0, 0, :3], torch.tensor([0, 0.25, 0.75]))

    def test_prompts_of_one_batch_may_have_different_variants(self, base: Base):
        phrase = PhraseOffsets(base, "ink wash", variants=3)
        with torch.no_grad():
            for offsets in phrase.learned:
                offsets += torch.tensor([0.0, 1.0, 5.0])[:, None, None]
        with torch.no_grad(), phrase.applied(torch.tensor([2, 0, 1])):
            rows = encode_batch(base, [PROMPT] * 3).tokens
        torch.testing.assert_close(rows[1:2], embed(base, [PROMPT]).tokens)
        with phrase.applied(torch.tensor([2])):
            torch.testing.assert_close(rows[:1], embed(base, [PROMPT]).tokens)

    @pytest.mark.slow
    def test_each_variant_learns_from_its_own_images_only(self, base: Base, config: Make):
        phrase = PhraseOffsets(base, "ink wash", variants=2)
        examples = Examples(torch.randn(4, 4, 8, 8), image_conditioning(base, Prompts(PROMPT), time_ids(64, 64, 4)))
        fit(phrase, examples, config(phrase_steps=1, batch_size=1))
        learned = [[bool(reading.any()) for reading in offsets] for offsets in phrase.learned]
        assert sorted(learned[0]) == [False, True]
        assert learned[0] == learned[1]
        fit(phrase, examples, config(phrase_steps=8, batch_size=2))
        assert all(offsets.abs().min() > 0 for offsets in phrase.learned)

    @pytest.mark.parametrize(("image", "variant"), [(1, 0), (2, 1), (5, 2)])
    def test_image_teaches_the_variant_that_it_belongs_to(
        self, base: Base, config: Make, monkeypatch: pytest.MonkeyPatch, image: int, variant: int
    ):
        """Two images in three variants: 0 and 1 of the first variant, 2 and 3 of the second, 4 and 5 of the third."""
        monkeypatch.setattr(style_phrase, "_draw_images", lambda *_: torch.tensor([image]))
        phrase = PhraseOffsets(base, "ink wash", variants=3)
        examples = Examples(torch.randn(6, 4, 8, 8), image_conditioning(base, Prompts(PROMPT), time_ids(64, 64, 6)))
        fit(phrase, examples, config(phrase_steps=1, batch_size=1))
        for offsets in phrase.learned:
            assert [bool(reading.any()) for reading in offsets] == [number == variant for number in range(3)]

    def test_prompt_of_an_image_is_read_with_the_offsets_of_its_variant(self, base: Base, config: Make):
        recipe, phrase = config(), PhraseOffsets(base, "ink wash", variants=3)
        with torch.no_grad():
            for offsets in phrase.learned:
                offsets += torch.tensor([0.0, 1.0, 5.0])[:, None, None]
        examples = Examples(torch.zeros(6, 4, 8, 8), image_conditioning(base, Prompts(PROMPT), time_ids(64, 64, 6)))
        tokens = style_phrase.encode_variant_prompts(phrase, examples, recipe).conditioning.tokens
        for row, variant in zip(tokens, (0, 0, 1, 1, 2, 2), strict=True):
            with torch.no_grad(), phrase.applied(torch.tensor([variant])):
                expected = encode_batch(base, ["a sks cat in ink wash style"]).tokens[0]
            torch.testing.assert_close(row, expected.repeat(1, 3))

    @pytest.mark.slow
    def test_schedule_applies_to_the_phrase_too(self, base: Base, config: Make):
        moved = {}
        for schedule in ("constant", "cosine"):
            phrase = PhraseOffsets(base, "ink wash")
            recipe = config(phrase_steps=8, phrase_learning_rate=1e-3, schedule=schedule)
            fit(phrase, picture(base), recipe)
            moved[schedule] = max(offsets.abs().max().item() for offsets in phrase.learned)
        # Adam moves a number by about the rate in every step: the sums of eight rates.
        assert moved["cosine"] < 1.1 * 4.5e-3 < moved["constant"] < 1.1 * 8e-3

    @pytest.mark.slow
    def test_fitting_lowers_the_loss_and_changes_nothing_else(self, base: Base, config: Make):
        scheduler, examples = DDPMScheduler.from_config(base.scheduler.config), picture(base)
        phrase = PhraseOffsets(base, "ink wash")
        frozen = [parameter.clone() for module in (base.unet, *base.text_encoders) for parameter in module.parameters()]

        def loss() -> float:
            with phrase.applied():
                conditioning = image_conditioning(base, Prompts(PROMPT), time_ids(64, 64))
            styled = Examples(examples.latents, conditioning)
            return float(denoising_loss(base.unet, scheduler, styled, batch_size=64, draw=generator("test")))

        before = loss()
        fit(phrase, examples, config(phrase_steps=30, phrase_learning_rate=0.1))
        assert loss() < before - 1e-4
        now = [parameter for module in (base.unet, *base.text_encoders) for parameter in module.parameters()]
        assert all(torch.equal(one, two) for one, two in zip(frozen, now, strict=True))


def test_variants_of_several_images_follow_filter_by_filter(base: Base):
    images = [Image.effect_noise((64, 64), sigma).convert("RGB") for sigma in (20, 90)]
    conditioning = Conditioning(torch.zeros(2, 7, 40), torch.zeros(2, 24), torch.tensor([[0.0] * 6, [1.0] * 6]))
    weights = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    examples = style_phrase._add_variants(base, images, Examples(latents_of(base, images), conditioning, weights))
    shown = [filtered(image) for image in images]
    expected = latents_of(base, [shown[image][variant] for variant in range(1 + len(FILTERS)) for image in (0, 1)])
    torch.testing.assert_close(examples.latents, expected)
    assert examples.conditioning.time_ids[:, 0].tolist() == [0, 1] * (1 + len(FILTERS))
    assert examples.weights[:, 0, 0, 0].tolist() == [0, 1] * (1 + len(FILTERS))


def test_three_quarters_of_the_samples_and_their_part_of_the_rest_are_the_images_themselves(base: Base):
    phrase = PhraseOffsets(base, "ink", variants=3)
    drawn = style_phrase._draw_images(phrase, 6, 30_000, generator("test"))
    shares = torch.bincount(drawn, minlength=6) / 30_000
    original, other = (0.75 + 0.25 / 3) / 2, 0.25 / 6
    torch.testing.assert_close(shares, torch.tensor([original] * 2 + [other] * 4), atol=0.01, rtol=0)


def test_phrase_occurs_where_all_of_its_tokens_do(base: Base):
    phrase = PhraseOffsets(base, "pencil sketch")
    assert phrase.occur_in("a house in pencil sketch style")
    assert phrase.occur_in("pencil sketch")
    assert not phrase.occur_in("a pencil in sketch style")
    assert not phrase.occur_in("a house in pencil style")


@pytest.mark.parametrize("style", ["ink wash", "pencil sketch"])  # the second is one of `OTHER_STYLES`
def test_no_prompt_of_distillation_is_to_be_embedded_both_ways(base: Base, config: Make, style: str):
    with_phrase, without_phrase = _distillation_prompts(PhraseOffsets(base, style), config(style=style))
    assert all(style in prompt for prompt in with_phrase)
    assert len(without_phrase) > 40
    assert not any(style in prompt for prompt in without_phrase)


@pytest.mark.slow
def test_distillation_changes_prompts_with_the_phrase_only(config: Make):
    style = "pencil sketch"
    base, prompts = load_base("bundled"), [f"a sks cat in {style} style", "a tree", "a zebra in neon sign style"]
    phrase = PhraseOffsets(base, style)
    with torch.no_grad():
        for offsets in phrase.learned:
            offsets += torch.randn(offsets.shape, generator=torch.Generator().manual_seed(1)) / 20
        with phrase.applied():
            goal = encode_batch(base, prompts[:1]).tokens
        plain = encode_batch(base, prompts).tokens
    distillation = Distillation(phrase, config(rank=16, style=style))
    Phases().learn(distillation)
    adapter = distillation.lora
    distilled = embed(base, prompts).tokens
    wide = (goal - plain[:1]).square().mean()
    assert (distilled[:1] - goal).square().mean() < 0.05 * wide
    assert (distilled[1:] - plain[1:]).square().mean() < 0.1 * wide
    with adapter.off():
        torch.testing.assert_close(embed(base, ["a tree"]).tokens, plain[1:2])
    fresh = load_base(base.name)
    fresh.pipe.load_lora_weights(writers.diffusers(adapter.export(), None)[0])
    torch.testing.assert_close(embed(fresh, prompts[:1]).tokens, distilled[:1], atol=1e-5, rtol=1e-5)


class TestSplit:
    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("unziplora.methods.unziplora.style_phrase.DISTILLATION_STEPS", 2)

    @pytest.mark.slow
    def test_only_the_style_file_has_a_part_for_text_encoders(self, config: Make):
        run = split(config())
        assert not read_lora(run.content).text
        assert any(name.startswith("text_encoder_2.") for name in read_lora(run.style).text)

    @pytest.mark.slow
    def test_each_variant_has_its_own_conditioning(self, tiny_folder: Path, config: Make):
        recipe = config(content_variants=True, content_alone=0.9, phrase_steps=32, batch_size=8)
        setup = setup_of(recipe)
        method = UnZipLora.build(recipe, setup)
        variants = method.data.alone["content"]
        assert len(variants.latents) == len(variants.conditioning.tokens) == 1 + len(FILTERS)
        assert torch.equal(variants.latents[:1], method.data.examples.latents)
        assert (
            len({tuple(latent.flatten().tolist()) for latent in variants.latents}) >= 8
        )  # a gray one has no hue to turn
        tokens = variants.conditioning.tokens
        assert len({tuple(rows.flatten().tolist()) for rows in tokens}) == len(tokens)
        assert torch.equal(tokens[..., : tokens.shape[-1] // 3], tokens[..., -(tokens.shape[-1] // 3) :])

    @pytest.mark.slow
    def test_phrase_is_learned_with_gradient_checkpointing_if_configured(
        self, tiny_folder: Path, config: Make, monkeypatch: pytest.MonkeyPatch
    ):
        checkpointed = []

        step = Inversion.step

        def spy(self: Inversion, number: int) -> float:
            checkpointed.append(self.offsets.base.unet.is_gradient_checkpointing)
            return step(self, number)

        monkeypatch.setattr(Inversion, "step", spy)
        tokens = []
        for saving in (True, False):
            recipe = config(gradient_checkpointing=saving, phrase_steps=1, phrase_learning_rate=0.1)
            setup = setup_of(recipe)
            tokens.append(UnZipLora.build(recipe, setup).data.examples.conditioning.tokens)
        assert checkpointed == [True, False]
        torch.testing.assert_close(*tokens)

    @pytest.mark.slow
    def test_class_images_do_not_depend_on_the_learned_phrase(
        self, config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ):
        latents = []
        for steps in (0, 3):
            monkeypatch.setenv("UNZIPLORA_CACHE", str(tmp_path / f"cache-{steps}"))
            recipe = config(phrase_steps=steps, content_prior=1.0, prior_images=1, phrase_learning_rate=1.0)
            recipe = recipe.model_copy(update={"content_class_prompt": "a {content} in {style} style"})
            method = UnZipLora.build(recipe, setup_of(recipe))
            latents.append(method.data.priors["content"].latents)
        assert torch.equal(*latents)

    @pytest.mark.slow
    @pytest.mark.parametrize(("killed", "stops"), [(False, [3, 5]), (True, [3, 9])])
    def test_resumed_run_equals_an_uninterrupted_one_wherever_it_stopped(
        self, config: Make, tmp_path: Path, killed: bool, stops: list[int]
    ):
        """Of ten steps four learn the phrase, two the text encoders' LoRA, and four train."""
        more = {"steps": 4, "checkpoint_every": 2, "content_variants": not killed, "content_alone": 0.5}
        whole = split(config(out=tmp_path / "whole", **more))
        places = {3: "4 of the phrase", 5: "2 of the text encoders' LoRA", 9: "4"}
        for stop in stops:
            out, seen = tmp_path / str(stop), []

            def interrupt(event: Progress, stop: int = stop) -> None:
                if event.step == stop and event.loss == event.loss:
                    if killed:
                        raise SystemError
                    os.kill(os.getpid(), signal.SIGINT)

            done = {3: 3, 5: 1, 9: 3}[stop]
            with pytest.raises(SystemError if killed else Interrupted) as stopped:
                split(config(out=out, **more), progress=interrupt)
            if not killed:
                assert f"stopped after step {done} of {places[stop]}, checkpoint saved" in str(stopped.value)
            cut = split(config(out=out, **more), resume=True, progress=seen.append)
            steps = [event.step for event in seen if event.loss == event.loss]
            saved = {3: 2, 5: 4, 9: 8}[stop] if killed else stop
            assert steps == list(range(saved + 1, 11))
            assert {event.steps for event in seen} == {10}
            for name in ("content", "style"):
                one, two = (load_file(getattr(run, name)) for run in (whole, cut))
                assert one.keys() == two.keys()
                assert all(torch.equal(one[key], two[key]) for key in one)

    def test_variants_without_a_learned_phrase_or_steps_alone_are_refused(self, config: Make):
        for lacking in ({"phrase_steps": 0, "content_alone": 0.5}, {"content_alone": 0.0}):
            with pytest.raises(UserError, match="set content_alone and phrase_steps above 0"):
                config(content_variants=True, **lacking)

    @pytest.mark.slow
    def test_both_files_work_together_alone_and_with_separate_prompts(self, config: Make, tmp_path: Path):
        run = split(config(sample_seeds=[0], sample_steps=1, content_learning_rate=0.1, style_learning_rate=0.1))
        images = {}
        for number, mode in enumerate(("separate", "direct")):
            settings = {"content": run.path, "style": run.path, "mode": mode, "steps": 2, "guidance": 1}
            (path,) = sample(SampleConfig(**settings, out=tmp_path / str(number)))
            images[mode] = Image.open(path).tobytes()
        for kind in ("content", "style"):
            (path,) = sample(SampleConfig(**{kind: run.path}, steps=2, guidance=1, out=tmp_path / kind))
            images[kind] = Image.open(path).tobytes()
        assert len(set(images.values())) == 4
