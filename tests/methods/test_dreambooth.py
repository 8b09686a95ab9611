"""DreamBooth on a tiny base: trained layers, prior, text encoders, stored class images, files, resuming."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import trainings
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from trainings import GENERATED, SHORT

from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.recipe import resolve
from unziplora.errors import Interrupted, UserError
from unziplora.formats import writers
from unziplora.formats.files import read_lora
from unziplora.lora.inject import adapted_layers, attention_linears, remove
from unziplora.methods.class_images import class_images
from unziplora.methods.dreambooth import DreamBooth
from unziplora.models.base import Base
from unziplora.models.text import Conditioning, embed
from unziplora.sampling.pipeline import Settings
from unziplora.sampling.sample import sample
from unziplora.training import text_encoder_lora as text_lora
from unziplora.training.loss import Examples, denoising_loss, generator
from unziplora.training.runner import run_training
from unziplora.training.trainer import Trainer
from unziplora.utils.progress import Progress

Make = Callable[..., DreamBoothConfig]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNZIPLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Make:
    for number in (1, 2):
        picture = Image.effect_mandelbrot((80, 80), (-2, -1.5, number, 1.5), 20).convert("RGB")
        picture.save(tmp_path / f"cat{number}.png")

    def make(**changes: object) -> DreamBoothConfig:
        keys: dict[str, object] = {
            "images": [tmp_path / "cat1.png", tmp_path / "cat2.png"],
            "base": str(tiny_folder),
            "out": tmp_path / "run",
            "content": "cat",
            "rank": 2,
            "learning_rate": 1e-2,
            "text_learning_rate": 1e-2,
            "prior_images": 3,
        }
        return resolve(DreamBoothConfig, {**SHORT, **GENERATED, **keys, **changes})

    return make


build = partial(trainings.build, DreamBooth)


def run(method: DreamBooth) -> None:
    trainer = Trainer(method, method.config)
    for step in range(method.config.steps):
        trainer.step(step)


class TestConfig:
    @pytest.mark.parametrize(
        ("words", "prompt", "product"),
        [
            ({"content": "cat", "style": None}, "a sks cat", "content"),
            ({"content": None, "style": "ink style"}, "an image in ink style", "style"),
            ({"content": "cat", "style": "ink"}, "a sks cat in ink style", "lora"),
        ],
    )
    def test_words_set_prompts_and_file_name(self, config: Make, words: dict[str, str], prompt: str, product: str):
        recipe = config(**words)
        assert recipe.image_prompts() == [prompt, prompt]
        assert recipe.product == product

    def test_each_image_may_have_its_own_prompt(self, config: Make):
        assert config(prompts=["a {token} one", "two"]).image_prompts() == ["a sks one", "two"]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"content": None}, "nothing to learn: give a word"),
            ({"prompts": ["a", "b", "c"]}, "3 prompts for 2 images"),
            ({"content": " "}, "must not be blank"),
            ({"targets": ["embeddings"]}, "targets"),
            ({"optimizer": "prodigy"}, "set learning_rate to 1"),
            (
                {"optimizer": "prodigy", "learning_rate": 1.0, "text_encoders": True},
                "set learning_rate and text_learning_rate to 1",
            ),
        ],
    )
    def test_unusable_settings_are_refused(self, config: Make, wrong: dict[str, object], message: str):
        with pytest.raises(UserError, match=message):
            config(**wrong)

    def test_bundled_base_has_a_preset(self, config: Make):
        assert config(base="bundled").learning_rate == 1e-2  # the user's own
        assert (
            resolve(DreamBoothConfig, {"images": ["a.png"], "content": "a", "out": "b", "base": "bundled"}).rank == 16
        )


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        (["feed-forward", "projections"], (".proj", ".net.2", "proj_in", "proj_out")),
        (["convolutions"], (".conv1", ".conv2", ".conv_shortcut", ".conv")),
    ],
)
def test_only_the_lora_trains_and_only_in_its_targets(
    tiny_base: Base, config: Make, targets: list[str], ends: tuple[str, ...]
):
    frozen = {name: value.clone() for name, value in tiny_base.unet.state_dict().items()}
    method = build(tiny_base, config(targets=targets))
    run(method)
    assert all(path.endswith(ends) for path in method.branches["content"])
    assert all(branch.delta().abs().max() > 0 for branch in method.branches["content"].values())
    assert {"content"} == {name for layer in adapted_layers(tiny_base.unet).values() for name in layer.branches}
    remove(tiny_base.unet)
    after = tiny_base.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_loss_uses_each_image_with_its_own_prompt(tiny_base: Base, config: Make):
    method = build(tiny_base, config(prompts=["one", "two"], batch_size=2, seed=5))
    rows = embed(tiny_base, ["one", "two"])
    torch.testing.assert_close(method.data.examples.conditioning.tokens, rows.tokens)
    (loss,) = method.losses(0)
    draw = generator(5, "train", 0)
    start = int(torch.randint(2, (1,), generator=draw))
    order = [(start + k) % 2 for k in range(2)]
    times = torch.randint(1000, (2,), generator=draw)
    noise = torch.randn(method.data.examples.latents.shape, generator=draw)
    schedule = DDPMScheduler.from_config(tiny_base.scheduler.config)
    noisy = schedule.add_noise(method.data.examples.latents[order], noise, times)
    added = {"text_embeds": rows.pooled[order], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    predicted = tiny_base.unet(noisy, times, rows.tokens[order], added_cond_kwargs=added).sample
    torch.testing.assert_close(loss, (predicted - noise).square().mean())


class TestPrior:
    def test_second_term_is_the_weighted_loss_on_class_images(self, tiny_base: Base, config: Make):
        method = build(tiny_base, config(prior=0.5))
        prior = method.data.priors["content"]
        assert len(prior.latents) == 3
        torch.testing.assert_close(prior.conditioning.tokens[:1], embed(tiny_base, ["a cat"]).tokens)
        _, second = method.losses(1)
        draw = generator(0, "prior", 1)
        expected = denoising_loss(
            tiny_base.unet, method.scheduler, method.data.priors["content"], draw=draw, batch_size=1
        )
        torch.testing.assert_close(second, 0.5 * expected)

    def test_class_images_depend_on_generation_keys_and_not_on_those_of_samples(self, fresh_base, config: Make):
        first, same, other = (
            build(fresh_base(), config(prior=1.0, prior_images=1, **changes)).data.priors["content"].latents
            for changes in ({}, {"sample_steps": 3, "sample_guidance": 4.0}, {"generated_guidance": 4.0})
        )
        assert torch.equal(first, same)
        assert not torch.allclose(first, other, atol=1e-3)

    @pytest.mark.slow
    def test_prior_loss_rises_less_with_prior_preservation(self, fresh_base: Callable[[], Base], config: Make):
        """With class images in the loss, a LoRA changes the prediction for the class prompt less."""
        moved = {}
        for weight in (1e-9, 30.0):
            base = fresh_base()
            method = build(base, config(prior=weight, steps=15, max_grad_norm=1e9))
            prior = method.data.priors["content"]

            def error(method: DreamBooth = method, base: Base = base, prior: Examples = prior) -> float:
                draws = [generator("test", k) for k in range(8)]
                with torch.no_grad():
                    losses = [denoising_loss(base.unet, method.scheduler, prior, draw=d, batch_size=3) for d in draws]
                return float(torch.stack(losses).mean())

            before = error()
            run(method)
            moved[weight] = error() - before
        assert moved[30.0] < moved[1e-9]

    def test_class_images_are_generated_once_and_reused(self, tiny_base: Base, tmp_path: Path):
        messages: list[str] = []
        settings = Settings(steps=1, guidance=1.0, width=64, height=64, batch_size=2)
        first = class_images(tiny_base, "a cat", 3, settings, messages.append)
        (folder,) = (tmp_path / "cache" / "class-pictures").iterdir()
        assert len(list(folder.glob("*.png"))) == 3
        again = class_images(tiny_base, "a cat", 4, settings, messages.append)
        assert [message.split()[1] for message in messages] == ["3", "1"]
        assert [p.tobytes() for p in again[:3]] == [p.tobytes() for p in first]
        assert class_images(tiny_base, "a cat", 2, settings, messages.append)[0].tobytes() == first[0].tobytes()
        assert len(messages) == 2
        (folder / "._0.png").write_bytes(b"what macOS keeps of a file on other drives")
        assert class_images(tiny_base, "a cat", 2, settings, messages.append)[0].tobytes() == first[0].tobytes()
        class_images(tiny_base, "a dog", 1, settings, messages.append)
        assert len(messages) == 3

    def test_fingerprints_of_different_bases_differ(self, fresh_base: Callable[[], Base]):
        one, two = fresh_base(), fresh_base()
        assert one.fingerprint() == two.fingerprint()
        with torch.no_grad():
            two.unet.conv_in.weight[0, 0, 0, 0] += 1
        assert one.fingerprint() != two.fingerprint()

    def test_images_of_the_user_count_as_class_images(self, tiny_base: Base, tmp_path: Path):
        own = tmp_path / "cats"
        own.mkdir()
        Image.new("RGB", (100, 70), "red").save(own / "mine.jpg")
        pictures = class_images(tiny_base, "a cat", 1, Settings(steps=1, guidance=1.0, width=64), [].append, own)
        assert [picture.size for picture in pictures] == [(64, 64)]
        settings = Settings(steps=1, guidance=1.0, width=64)
        first = class_images(tiny_base, "a cat", 3, settings, [].append, own)
        again = class_images(tiny_base, "a cat", 3, settings, [].append, own)
        assert [p.tobytes() for p in first] == [p.tobytes() for p in again]
        assert first[2].tobytes() == pictures[0].tobytes()  # 1000001.png, 1000002.png, mine.jpg
        (own / "1000001.png").unlink()
        assert len(class_images(tiny_base, "a cat", 3, settings, [].append, own)) == 3
        (own / "broken.png").write_bytes(b"no picture")
        with pytest.raises(UserError, match=r"broken\.png"):
            class_images(tiny_base, "a cat", 4, settings, [].append, own)


class TestTextEncoders:
    @pytest.mark.slow
    def test_only_adapters_train_and_the_file_reproduces_the_trained_embedding(
        self, tiny_folder: Path, config: Make, tmp_path: Path
    ):
        from unziplora.models.base import load_base

        base = load_base(str(tiny_folder))
        before = embed(base, ["a sks cat"])
        frozen = [{n: p.clone() for n, p in encoder.named_parameters()} for encoder in base.text_encoders]
        method = build(base, config(text_encoders=True, alpha=1.0, prior=1.0))
        run(method)
        for encoder, values in zip(base.text_encoders, frozen, strict=True):
            now = {n.replace(".base_layer", ""): p for n, p in encoder.named_parameters()}
            assert all(torch.equal(now[name], value) for name, value in values.items())
        trained = embed(base, ["a sks cat"])
        assert (trained.tokens - before.tokens).abs().max() > 1e-4
        fresh = load_base(str(tiny_folder))
        lora = method.export()["content"]
        fresh.pipe.load_lora_weights(writers.diffusers(lora.text, None)[0])
        torch.testing.assert_close(embed(fresh, ["a sks cat"]).tokens, trained.tokens, atol=1e-5, rtol=1e-5)

    @pytest.mark.slow
    def test_step_encodes_only_the_prompts_that_it_draws(
        self, tiny_folder: Path, config: Make, monkeypatch: pytest.MonkeyPatch
    ):
        from unziplora.models.base import load_base

        base, prompts = load_base(str(tiny_folder)), ["a sks cat", "a sks cat at night"]
        method = build(base, config(text_encoders=True, prompts=prompts, batch_size=1))
        rows = embed(base, prompts)
        known = replace(method.data.examples.conditioning, tokens=rows.tokens, pooled=rows.pooled)
        read: list[str] = []

        def encode(base: Base, texts: list[str]) -> Conditioning:
            read.extend(texts)
            return text_lora_encode(base, texts)

        text_lora_encode = text_lora.encode_each
        monkeypatch.setattr(text_lora, "encode_each", encode)
        for step in range(6):
            draw = generator(method.config.seed, "train", step)
            examples = replace(method.data.examples, conditioning=known)
            expected = denoising_loss(method.unet, method.scheduler, examples, draw=draw, **method.config.noising())
            (loss,) = method.losses(step)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert len(read) == 6
        assert set(read) == set(prompts)

    @pytest.mark.slow
    def test_run_writes_text_encoder_keys_and_samples_with_them(self, config: Make, tmp_path: Path):
        run = run_training(DreamBooth, config(text_encoders=True))
        names = set(load_file(run.content))
        for encoder in ("te1", "te2"):  # kohya's names, which are all that ComfyUI looks for
            assert f"lora_{encoder}_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in names
        from unziplora.config.sample import SampleConfig

        paths = sample(SampleConfig(content=run.path, out=tmp_path / "samples", steps=1, guidance=1))
        assert [path.name for path in paths] == ["0.png"]


class TestRun:
    @pytest.mark.slow
    def test_run_writes_one_lora_a_card_and_samples(self, config: Make):
        run = run_training(
            DreamBooth, config(content=None, style="ink", sample_seeds=[0], formats=["kohya", "diffusers"])
        )
        assert sorted(path.name for path in run.path.glob("*.safetensors")) == [
            "run-style.diffusers.safetensors",
            "run-style.safetensors",
        ]
        lora = read_lora(run.style)
        assert lora.metadata["modelspec.trigger_phrase"] == "in ink style"
        assert len(lora.modules) == len(attention_linears(tiny.unet()))
        text = run.card.read_text()
        assert "DreamBooth LoRA" in text
        assert "unziplora sample --style" in text
        assert run.sheet(4).is_file()

    @pytest.mark.slow
    @pytest.mark.parametrize("text", [False, True])
    def test_resumed_run_equals_an_uninterrupted_one(self, config: Make, tmp_path: Path, text: bool):
        keys = {"text_encoders": text, "prior": 1.0}
        whole = run_training(DreamBooth, config(out=tmp_path / "whole", **keys))

        def interrupt(event: Progress) -> None:
            if event.step == 3 and event.loss == event.loss:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted, match="unziplora train dreambooth --resume"):
            run_training(DreamBooth, config(out=tmp_path / "cut", **keys), progress=interrupt)
        cut = run_training(DreamBooth, config(out=tmp_path / "cut", **keys), resume=True)
        one, two = read_lora(whole.content), read_lora(cut.content)
        assert one.modules.keys() == two.modules.keys()
        assert all(torch.equal(a, b) for m in one.modules for a, b in zip(one.modules[m], two.modules[m], strict=True))
        assert one.text.keys() == two.text.keys()
        assert bool(one.text) == text
        assert all(torch.equal(a, b) for m in one.text for a, b in zip(one.text[m], two.text[m], strict=True))
