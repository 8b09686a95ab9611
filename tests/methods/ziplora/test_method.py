"""ZipLoRA on a tiny base: identities of the merge, trained scales, loss, refusals, resuming."""

import json
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from trainings import GENERATED, SHORT

from unziplora.config.recipe import resolve, to_toml
from unziplora.config.sample import SampleConfig
from unziplora.config.split import SplitConfig
from unziplora.config.zip import ZipConfig, joined_prompt
from unziplora.errors import Interrupted, UserError
from unziplora.formats.files import read_lora, write_lora
from unziplora.formats.header import metadata_for
from unziplora.images.preprocess import ImageFile
from unziplora.lora.algebra import Pair, delta
from unziplora.lora.inject import attention_linears, remove
from unziplora.lora.layer import Branch
from unziplora.lora.weights import Lora
from unziplora.methods.class_images import FIRST_SEED
from unziplora.methods.ziplora.inputs import complete, learned_images, merge, read_loras
from unziplora.methods.ziplora.method import ZipLora, scale_input, zip_loras
from unziplora.models.base import Base, load_base
from unziplora.models.text import embed
from unziplora.sampling.adapters import AttachedLoras, NamedLora
from unziplora.sampling.pipeline import Settings, generate_latents
from unziplora.sampling.prompts import plan_prompts
from unziplora.sampling.sample import sample
from unziplora.sampling.sources import find_lora, loras_of
from unziplora.training import runner as job
from unziplora.training.loss import generator
from unziplora.training.method import ImageGroup
from unziplora.training.trainer import Trainer
from unziplora.utils.progress import Progress

Make = Callable[..., ZipConfig]
CONVOLUTION = "up_blocks.1.resnets.0.conv1"
FEED = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def pairs(unet: nn.Module, paths: list[str], rank: int, seed: int) -> dict[str, Pair]:
    """Return a LoRA of a rank with a visible effect."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {path: unet.get_submodule(path).weight.shape for path in paths}
    return {
        path: (
            torch.randn(rank, *wide, generator=draw) / 4,
            torch.randn(out, rank, *[1] * (len(wide) - 1), generator=draw) / 4,
        )
        for path, (out, *wide) in shapes.items()
    }


@pytest.fixture(scope="session")
def loras(shared_base: Base) -> dict[str, Lora]:
    """A content LoRA of rank 2 on all attentions, a style LoRA of rank 3 on those of the decoder and one more layer.

    Both change one convolution.
    """
    attention = attention_linears(shared_base.unet)
    decoder = [CONVOLUTION, *(path for path in attention if path.startswith("up_blocks"))]
    return {
        "content": Lora(pairs(shared_base.unet, [*attention, CONVOLUTION], 2, 1)),
        "style": Lora(pairs(shared_base.unet, [*decoder, FEED], 3, 2)),
    }


@pytest.fixture
def files(loras: dict[str, Lora], tmp_path: Path) -> dict[str, Path]:
    """Write the two as kohya's files without metadata, one of them with its own alpha."""
    for name, alpha in (("content", 1.0), ("style", None)):
        write_lora(loras[name], tmp_path / f"{name}-lora.safetensors", alpha=alpha, dtype="fp32")
        tensors = load_file(tmp_path / f"{name}-lora.safetensors")
        assert all(key.startswith("lora_unet_") for key in tensors)
        save_file(tensors, tmp_path / f"{name}-lora.safetensors")
    return {name: tmp_path / f"{name}-lora.safetensors" for name in loras}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.effect_mandelbrot((80, 80), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture
def config(files: dict[str, Path], picture: Path, tiny_folder: Path, tmp_path: Path) -> Make:
    def make(**changes: object) -> ZipConfig:
        keys: dict[str, object] = {
            "content_lora": files["content"],
            "style_lora": files["style"],
            "content_images": [picture],
            "style_images": [picture],
            "content_prompt": "a {token} cat",
            "style_prompt": "an image in ink style",
            "base": str(tiny_folder),
            "out": tmp_path / "run",
        }
        return resolve(ZipConfig, {**SHORT, **GENERATED, **keys, **changes})

    return make


build = partial(trainings.build, ZipLora)


def trained(base: Base, config: ZipConfig) -> ZipLora:
    method = build(base, config)
    trainer = Trainer(method, config)
    for step in range(config.steps):
        trainer.step(step)
    return method


@torch.no_grad()
def output(base: Base) -> Tensor:
    """The UNet's prediction on a fixed input."""
    draw = torch.Generator().manual_seed(9)
    added_kwargs = {"text_embeds": torch.randn(1, 24, generator=draw), "time_ids": torch.ones(1, 6)}
    sample, tokens = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 7, 40, generator=draw)
    return base.unet(sample, 500, tokens, added_cond_kwargs=added_kwargs).sample


def added(base: Base, *parts: dict[str, Pair]) -> Base:
    """The base with ΔW added to its weights."""
    with torch.no_grad():
        for part in parts:
            for path, pair in part.items():
                base.unet.get_submodule(path).weight += delta(pair)
    return base


class TestScale:
    def test_scale_acts_on_input_features(self):
        update, columns = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 1.0])
        branch = Branch(torch.eye(2), update.clone())
        scale = scale_input(branch)
        torch.testing.assert_close(branch.delta(), update)
        scale.columns.data = columns
        torch.testing.assert_close(branch.delta(), torch.tensor([[10.0, 2.0], [30.0, 4.0]]))
        torch.testing.assert_close(branch.delta(), delta((torch.diag(columns), update)))
        assert not torch.equal(branch.delta(), delta((torch.eye(2), columns[:, None] * update)))

    def test_scale_acts_on_the_input_channels_of_a_convolution(self):
        down, up, columns = torch.randn(3, 4, 3, 3), torch.randn(5, 3, 1, 1), torch.rand(4)
        branch = Branch(down.clone(), up.clone())
        scale_input(branch).columns.data = columns
        dense = torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
        torch.testing.assert_close(branch.delta(), torch.einsum("oihw,ij->ojhw", dense, torch.diag(columns)))

    def test_scale_switched_off_leaves_the_lora_unchanged(self):
        branch = Branch(torch.eye(2), torch.ones(2, 2))
        scale = scale_input(branch)
        scale.columns.data.fill_(3.0)
        scale.on = False
        assert torch.equal(branch.delta(), torch.ones(2, 2))


class TestIdentities:
    def test_untrained_merge_is_the_sum(self, tiny_base: Base, fresh_base: Callable[[], Base], loras, config: Make):
        method = build(tiny_base, config())
        expected = output(added(fresh_base(), loras["content"].modules, loras["style"].modules))
        torch.testing.assert_close(output(tiny_base), expected, rtol=1e-4, atol=1e-5)
        for name, lora in loras.items():
            with method.only(name):
                torch.testing.assert_close(
                    output(tiny_base), output(added(fresh_base(), lora.modules)), rtol=1e-4, atol=1e-5
                )

    def test_exported_lora_gives_the_trained_predictions(
        self, tiny_base: Base, fresh_base: Callable[[], Base], config: Make
    ):
        method = trained(tiny_base, config(learning_rate=0.1, steps=2))
        exported, merged, plain = method.export()["lora"], output(tiny_base), fresh_base()
        torch.testing.assert_close(output(added(plain, exported.modules)), merged, rtol=1e-4, atol=1e-5)
        with method.off(("scales",)):
            assert not torch.allclose(output(tiny_base), merged, atol=1e-3)
        assert torch.equal(output(tiny_base), merged)

    def test_lora_alone_is_unchanged_by_training(self, tiny_base: Base, fresh_base, loras, config: Make):
        method = trained(tiny_base, config(learning_rate=0.1, steps=2))
        with method.only("style"):
            expected = output(added(fresh_base(), loras["style"].modules))
            torch.testing.assert_close(output(tiny_base), expected, rtol=1e-4, atol=1e-5)

    def test_ranks_add_up_and_a_layer_of_one_lora_passes_through(self, tiny_base: Base, loras, config: Make):
        method = trained(tiny_base, config(parts=True, steps=2))
        exported = method.export()
        shared = {path for path in loras["content"].modules if path.startswith("up_blocks")}
        assert method.scales["content"].keys() == method.scales["style"].keys() == shared
        for path, (down, up) in exported["lora"].modules.items():
            assert down.shape[0] == up.shape[1] == (5 if path in shared else 3 if path == FEED else 2)
            ones = [exported[name].modules[path] for name in ("content", "style") if path in exported[name].modules]
            torch.testing.assert_close(delta((down, up)), sum(delta(pair) for pair in ones))
        torch.testing.assert_close(delta(exported["lora"].modules[FEED]), delta(loras["style"].modules[FEED]))

    def test_strengths_weigh_the_loras_before_merging(self, tiny_base: Base, fresh_base, loras, config: Make):
        method = build(tiny_base, config(content_strength=0.5, style_strength=-2.0))
        for name, weight in (("content", 0.5), ("style", -2.0)):
            weighted = {path: (down, weight * up) for path, (down, up) in loras[name].modules.items()}
            with method.only(name):
                torch.testing.assert_close(
                    output(tiny_base), output(added(fresh_base(), weighted)), rtol=1e-4, atol=1e-5
                )


class TestLoss:
    def test_loss_and_gradients_match_the_equation_of_the_paper(
        self, tiny_base: Base, fresh_base: Callable[[], Base], loras: dict[str, Lora], config: Make
    ):
        """Derived again with dense matrices: W0 + ΔW_c diag(m_c) + ΔW_s diag(m_s), against W0 + ΔW of one."""
        method = build(tiny_base, config(batch_size=2, seed=5, orthogonality=0.3))
        draw = torch.Generator().manual_seed(0)
        for scale in (scale for name in method.scales for scale in method.scales[name].values()):
            scale.columns.data = torch.randn(scale.columns.shape, generator=draw)
        terms = list(method.losses(7))
        torch.stack(terms).sum().backward()

        plain, rows = fresh_base(), embed(fresh_base(), ["a sks cat", "an image in ink style"])
        weights = {name: value.detach() for name, value in plain.unet.state_dict().items()}
        columns = {
            name: {path: scale.columns.detach().clone().requires_grad_() for path, scale in method.scales[name].items()}
            for name in loras
        }
        updates = {name: {path: delta(pair) for path, pair in lora.modules.items()} for name, lora in loras.items()}

        def predict(noisy: Tensor, times: Tensor, row: int, changes: list[dict[str, Tensor]]) -> Tensor:
            now = dict(weights)
            for change in changes:
                now.update({f"{path}.weight": now[f"{path}.weight"] + update for path, update in change.items()})
            added_kwargs = {
                "text_embeds": rows.pooled[[row, row]],
                "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
            }
            return functional_call(
                plain.unet, now, (noisy, times, rows.tokens[[row, row]]), {"added_cond_kwargs": added_kwargs}
            )[0]

        schedule = DDPMScheduler.from_config(plain.scheduler.config)
        scaled = [  # input features are the second axis, of convolutions too
            {p: (u.movedim(1, -1) * columns[n].get(p, 1.0)).movedim(-1, 1) for p, u in updates[n].items()}
            for n in updates
        ]
        derived = []
        for row, name in enumerate(("content", "style")):
            step = generator(5, "zip", name, 7)
            torch.randint(1, (1,), generator=step)
            times = torch.randint(1000, (2,), generator=step)
            clean = method.data.alone[name].latents[[0, 0]]
            noisy = schedule.add_noise(clean, torch.randn(clean.shape, generator=step), times)
            with torch.no_grad():
                expected = predict(noisy, times, row, [updates[name]])
            derived.append((predict(noisy, times, row, scaled) - expected).pow(2).mean())
        content, style = columns["content"], columns["style"]
        derived.append(0.3 * sum((content[p] * style[p]).abs().mean() for p in content) / len(content))
        sum(derived).backward()
        torch.testing.assert_close(torch.stack(terms), torch.stack(derived), rtol=1e-4, atol=1e-7)
        for name, by_path in columns.items():
            for path, m in by_path.items():
                torch.testing.assert_close(method.scales[name][path].columns.grad, m.grad, rtol=1e-3, atol=1e-7)

    def test_loss_is_zero_without_a_second_lora(self, tiny_base: Base, config: Make):
        method = build(tiny_base, config(style_strength=0.0, orthogonality=0.0))
        terms = list(method.losses(0))
        assert len(terms) == 2
        assert terms[0] < 1e-10  # the merged LoRA is the content LoRA
        assert terms[1] > 1e-6

    def test_min_snr_noise_offset_and_shift_match_values_by_hand(self, tiny_base: Base, config: Make):
        changes = {"min_snr_gamma": 0.5, "noise_offset": 0.25, "timestep_shift": 0.5}
        method, inputs = build(tiny_base, config(batch_size=2, seed=7, **changes)), []

        def predict(sample: Tensor, **_: object) -> tuple[Tensor]:
            """Differ by 1 and by 3 from what one LoRA alone predicts."""
            inputs.append(sample)
            return (torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand_as(sample),)

        method.unet, method.predict = lambda sample, **_: (torch.zeros_like(sample),), predict
        loss = next(iter(method.losses(7)))
        step = generator(7, "zip", "content", 7)
        torch.randint(1, (1,), generator=step)
        even = (torch.randint(1000, (2,), generator=step) + 0.5) / 1000
        times = (500 * even / (1 - even / 2)).long()
        alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[times].view(2, 1, 1, 1)
        weights = (0.5 / (alpha / (1 - alpha))).clamp(max=1).flatten().tolist()
        assert weights[0] == 1 > weights[1]  # one on either side of γ
        assert loss.item() == pytest.approx((weights[0] * 1 + weights[1] * 9) / 2, rel=1e-4)
        clean = method.data.alone["content"].latents[[0, 0]]
        noise = torch.randn(clean.shape, generator=step) + 0.25 * torch.randn(2, 4, 1, 1, generator=step)
        torch.testing.assert_close(inputs[0], alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)

    @pytest.mark.slow
    def test_training_lowers_the_distance_to_both_loras(self, tiny_base: Base, config: Make):
        @torch.no_grad()
        def distance() -> float:
            return sum(float(method._distance(name, step)) for name in method.scales for step in (100, 101, 102))

        method = build(tiny_base, config(steps=12, learning_rate=0.1))
        before = distance()
        trainer = Trainer(method, method.config)
        for step in range(12):
            trainer.step(step)
        assert distance() < 0.9 * before


@pytest.mark.slow
def test_only_the_scales_train(tiny_base: Base, loras: dict[str, Lora], config: Make):
    frozen = {name: value.clone() for name, value in tiny_base.unet.state_dict().items()}
    method = build(tiny_base, config())
    for term in method.losses(0):
        term.backward()
    with_gradient = {name for name, p in tiny_base.unet.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(name.endswith("parametrizations.down.0.columns") for name in with_gradient)
    assert len(with_gradient) == sum(len(scales) for scales in method.scales.values())
    assert {name for name, p in tiny_base.unet.named_parameters() if p.requires_grad and ".branches." in name} == (
        with_gradient
    )
    remove(tiny_base.unet)
    method = trained(tiny_base, config(learning_rate=0.1, steps=2))
    assert all(bool((s.columns != 1).any()) for scales in method.scales.values() for s in scales.values())
    for name, lora in loras.items():
        for path, (down, up) in lora.modules.items():
            branch = method.branches[name][path]
            with method.off(("scales",)):
                torch.testing.assert_close(branch.down, down)
                torch.testing.assert_close(branch.up, up)
    remove(tiny_base.unet)
    after = tiny_base.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


@pytest.mark.slow
def test_default_learning_rate_moves_scales_and_5e_5_hardly_does(tiny_base: Base, config: Make):
    moved = {}
    for rate in (1e-2, 5e-5):
        method = trained(tiny_base, config(learning_rate=rate, steps=3))
        moved[rate] = max((s.columns.detach() - 1).abs().max().item() for s in method.scales["content"].values())
        remove(tiny_base.unet)
    assert moved[1e-2] == pytest.approx(3e-2, rel=0.2)
    assert moved[5e-5] < 3e-4


class TestPictures:
    def test_lora_without_images_generates_some(self, tiny_base: Base, fresh_base, loras, config: Make):
        messages: list[str] = []
        method = build(tiny_base, config(content_images=[], teacher_images=2, generated_guidance=2), messages)
        assert messages == ["generating 2 images with the content LoRA: a sks cat"]
        other = fresh_base()
        mounted = AttachedLoras(other, [NamedLora("content", loras["content"], {}, "")])
        settings = Settings(steps=1, guidance=2.0, width=64, height=64)
        expected = generate_latents(other, "a sks cat", [FIRST_SEED, FIRST_SEED + 1], settings)
        torch.testing.assert_close(method.data.alone["content"].latents, expected)
        mounted.remove()
        plain = generate_latents(other, "a sks cat", [FIRST_SEED], settings)
        assert not torch.allclose(plain, expected[:1], atol=1e-3)
        assert len(method.images) == 1  # the style's

    def test_images_prompts_base_and_guidance_come_from_run_folders(self, files, picture: Path, tiny_folder, tmp_path):
        for name, images in (("content", [picture, tmp_path / "gone.png"]), ("style", [tmp_path / "gone.png"])):
            words = {"content": f"{name}-thing", "style": f"{name} ink", "images": images, "token": "v7"}
            run = SplitConfig(
                base=str(tiny_folder), out=tmp_path / name, sample_guidance=3.0, generated_guidance=2.0, **words
            )
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.toml").write_text(to_toml(run))
            files[name].rename(tmp_path / name / f"{name}.safetensors")
        recipe = ZipConfig(content_lora=tmp_path / "content", style_lora=tmp_path / "style", out=tmp_path / "run")
        full = complete(recipe)
        assert full.filled_prompts() == {
            "content": "a v7 content-thing",
            "style": "an image in style ink style",
            "full": "a v7 content-thing in style ink style",
        }
        assert (full.base, full.sample_guidance, full.generated_guidance) == (str(tiny_folder), 3.0, 2.0)
        assert (full.content_images, full.style_images) == ([picture], [])
        assert complete(full) == full
        own = complete(recipe.model_copy(update={"content_images": [], "content_prompt": "x", "base": "y"}))
        assert (own.content_images, own.content_prompt, own.base) == ([], "x", "y")

    def test_images_of_a_run_keep_their_crops_where_one_of_them_is_gone(self, loras, files, tmp_path: Path):
        here = tmp_path / "here.png"
        Image.new("RGB", (64, 64)).save(here)
        crops = ["0,0,32,32", "8,0,56,64", "0,8,64,56"]
        keys = {"images": [tmp_path / "gone.png", here, here], "crop": crops, "fit": "pad"}
        run = SplitConfig(content="cat", style="ink", out=tmp_path / "cat", base="bundled", **keys)
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "config.toml").write_text(to_toml(run))
        files["content"].rename(tmp_path / "cat" / "cat-content.safetensors")
        recipe = ZipConfig(content_lora=tmp_path / "cat", style_lora=files["style"], out=tmp_path / "run")
        full = complete(recipe.model_copy(update={"style_prompt": "ink"}))
        boxes = ((8, 0, 56, 64), (0, 8, 64, 56))
        assert learned_images(full, "content") == ImageGroup([ImageFile(here, None, box) for box in boxes], "pad")

    def test_prompts_come_from_the_header_of_our_own_files(self, loras, files, tmp_path: Path):
        run = SplitConfig(images=["a.png"], content="cat", style="ink", out=tmp_path / "x", base="bundled")
        metadata = metadata_for(title="x", settings=run.model_dump(mode="json", exclude={"images"}))
        write_lora(loras["content"], tmp_path / "mine.safetensors", metadata=metadata)
        keys = {"style_lora": files["style"], "style_prompt": "oil painting", "out": tmp_path / "run"}
        full = complete(ZipConfig(content_lora=tmp_path / "mine.safetensors", **keys))
        assert full.filled_prompts()["full"] == "a sks cat, oil painting"
        assert full.base == "bundled"

    def test_runs_of_different_bases_need_a_chosen_base(self, config: Make, files, loras, tmp_path: Path):
        for name, base in (("content", "one"), ("style", "two")):
            write_lora(loras[name], files[name], metadata={"unziplora.settings": json.dumps({"base": base})})
        recipe = ZipConfig(content_lora=files["content"], style_lora=files["style"], out=tmp_path / "run")
        with pytest.raises(UserError, match=r"different bases(.|\n)*--base"):
            complete(recipe)
        assert complete(config()).base == config().base


def test_joined_prompt_contains_both():
    assert joined_prompt("a sks cat", "an image in pencil sketch style") == "a sks cat in pencil sketch style"
    assert joined_prompt("a sks cat", "oil painting") == "a sks cat, oil painting"
    assert joined_prompt("a sks cat", "in ink style") == "a sks cat in ink style"
    assert joined_prompt("a sks cat", "a dog in a hat in ink style") == "a sks cat in ink style"


class TestRun:
    @pytest.mark.slow
    def test_run_writes_one_lora_with_its_prompts_that_can_be_sampled(self, config: Make, tmp_path: Path):
        run = zip_loras(config(sample_seeds=[0], formats=["kohya", "diffusers"], parts=True))
        files = {p.name for p in run.path.rglob("*") if p.is_file() and not p.name.startswith(".")}
        names = {f"run-{n}{layout}.safetensors" for n in ("lora", "content", "style") for layout in ("", ".diffusers")}
        assert files == {
            "README.md",
            "config.toml",
            "log.jsonl",
            "run-step000004.png",
            "step-000004.safetensors",
            *names,
        }
        merged, twin = read_lora(run.lora("lora")), read_lora(run.lora("lora", "diffusers"))
        assert merged.metadata["modelspec.trigger_phrase"] == "a sks cat in ink style"
        assert "ZipLoRA" in run.card.read_text()
        content, style = read_lora(run.content), read_lora(run.style)
        assert style.metadata["modelspec.trigger_phrase"] == "in ink style"
        for path, pair in merge({"content": content, "style": style}).modules.items():
            torch.testing.assert_close(delta(merged.modules[path]), delta(pair))
            torch.testing.assert_close(delta(twin.modules[path]), delta(pair))
        assert loras_of(run.path) == {"content": run.lora("lora")}
        source = find_lora(run.lora("lora"), "content")
        assert plan_prompts(SampleConfig(content=run.lora("lora")), [source])[0].full == "a sks cat in ink style"
        (path,) = sample(SampleConfig(content=run.lora("lora"), steps=1, device="cpu", out=tmp_path / "samples"))
        assert path.is_file()

    @pytest.mark.slow
    @pytest.mark.parametrize("stop", [1, 3])
    def test_resumed_run_equals_an_uninterrupted_one(self, config: Make, tmp_path: Path, stop: int):
        """One LoRA generates its images, and generates them again in the resumed run."""
        changes = {"style_images": [], "teacher_images": 1, "learning_rate": 0.1}
        whole = zip_loras(config(out=tmp_path / "whole", **changes))

        def interrupt(event: Progress) -> None:
            if event.step == stop and event.loss == event.loss:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted, match="unziplora zip --resume"):
            zip_loras(config(out=tmp_path / "cut", **changes), progress=interrupt)
        cut = zip_loras(config(out=tmp_path / "cut", **changes), resume=True)
        one, two = load_file(whole.lora("lora")), load_file(cut.lora("lora"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)

    @pytest.mark.slow
    def test_scales_train_in_low_precision(self, config: Make):
        run = zip_loras(config(precision="bf16", learning_rate=0.1, gradient_checkpointing=True))
        plain = merge(read_loras(config()))
        merged = read_lora(run.lora("lora"))
        path = next(path for path in merged.modules if path.startswith("up_blocks"))
        assert not torch.allclose(delta(merged.modules[path]), delta(plain.modules[path]), atol=1e-3)


class TestDirect:
    @pytest.fixture(autouse=True)
    def _no_base(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> None:
            raise AssertionError("a plain sum needs no base")

        monkeypatch.setattr(job, "load_base", refuse)

    def test_direct_merge_is_the_exact_weighted_sum(self, config: Make, loras: dict[str, Lora]):
        changes = {"base": "no/such/base", "content_images": ["gone.png"]}
        run = zip_loras(config(method="direct", content_strength=0.5, style_strength=2.0, parts=True, **changes))
        merged = read_lora(run.lora("lora"))
        content, style = loras["content"].modules, loras["style"].modules
        assert merged.modules.keys() == content.keys() | style.keys()
        for path, pair in merged.modules.items():
            expected = [0.5 * delta(content[path])] if path in content else []
            expected += [2.0 * delta(style[path])] if path in style else []
            torch.testing.assert_close(delta(pair), sum(expected))
        torch.testing.assert_close(delta(read_lora(run.style).modules[FEED]), 2.0 * delta(style[FEED]))
        assert merged.metadata["unziplora.method"] == "direct addition, lora LoRA"
        assert "direct addition" in run.card.read_text()
        assert not run.steps()
        with pytest.raises(UserError, match="contains a finished run"):
            zip_loras(config(method="direct", **changes))
        with pytest.raises(UserError, match="finished"):
            zip_loras(run.config(ZipConfig), resume=True)

    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    def test_null_space_merge_projects_the_content_off_the_principal_inputs_of_the_style(
        self, config: Make, loras: dict[str, Lora], share: float
    ):
        changes = {"base": "no/such/base", "content_images": ["gone.png"], "parts": True}
        run = zip_loras(config(method="null-space", projection=share, **changes))
        content, style = loras["content"].modules, loras["style"].modules
        merged, projected = read_lora(run.lora("lora")).modules, read_lora(run.content).modules
        for path, pair in content.items():
            expected = delta(pair)
            if path in style:
                _, s, vh = torch.linalg.svd(delta(style[path]).flatten(1))
                kept = next(k for k in range(1, len(s) + 1) if (s[:k] ** 2).sum() >= 0.9 * (s**2).sum())
                projection = torch.eye(len(vh)) - share * vh[:kept].T @ vh[:kept]
                expected = (expected.flatten(1) @ projection).reshape(expected.shape)
                torch.testing.assert_close(delta(merged[path]), expected + delta(style[path]), rtol=1e-2, atol=1e-3)
            torch.testing.assert_close(delta(projected[path]), expected, rtol=1e-2, atol=1e-3)
        assert "null-space projection (arXiv 2511.11051)" in run.card.read_text()

    def test_missing_lora_of_a_resumed_merge_is_named_with_the_file_of_its_settings(self, config: Make):
        with pytest.raises(UserError, match=r"gone: no such(.|\n)*settings in .*run/config\.toml"):
            zip_loras(config(method="direct", content_lora="gone"), resume=True)

    def test_trigger_words_and_base_from_headers_are_enough(
        self, config: Make, loras: dict[str, Lora], files: dict[str, Path]
    ):
        for name, lora in loras.items():
            tags = {"ss_tag_frequency": json.dumps({"1": {f"my{name}": 9}}), "ss_sd_model_name": "ponyXL.safetensors"}
            write_lora(lora, files[name], metadata=tags)
        left_out = {"content_prompt": None, "style_prompt": None, "base": None}
        keys = config(method="direct").model_dump(exclude_unset=True, exclude=set(left_out))
        run = zip_loras(ZipConfig(**keys))
        header = read_lora(run.lora("lora")).metadata
        assert (header["ss_sd_model_name"], header["modelspec.trigger_phrase"]) == (
            "ponyXL.safetensors",
            "mycontent, mystyle",
        )
        assert "base_model" not in run.card.read_text()
        with pytest.raises(UserError, match=r"trained on ponyXL\.safetensors, .* with --base"):
            zip_loras(ZipConfig(**{**keys, "method": "zip", "out": keys["out"].with_name("other")}))

    def test_direct_merge_keeps_text_encoders_convolutions_and_base_metadata(
        self, config: Make, loras: dict[str, Lora], files: dict[str, Path]
    ):
        draw = torch.Generator().manual_seed(3)
        conv = torch.randn(2, 8, 3, 3, generator=draw), torch.randn(8, 2, 1, 1, generator=draw)
        text = torch.randn(2, 16, generator=draw), torch.randn(16, 2, generator=draw)
        name = "down_blocks.0.resnets.0.conv1"
        other = replace(loras["style"], modules={**loras["style"].modules, name: conv}, text={TEXT: text})
        write_lora(other, files["style"], metadata={"ss_resolution": "(512, 512)"}, dtype="fp32")
        both = replace(loras["content"], text={TEXT: text})
        write_lora(both, files["content"], metadata={"modelspec.prediction_type": "v"}, dtype="fp32")
        merged = read_lora(zip_loras(config(method="direct", style_strength=0.5)).lora("lora"))
        torch.testing.assert_close(delta(merged.modules[name]), 0.5 * delta(conv))
        (path,) = merged.text
        torch.testing.assert_close(delta(merged.text[path]), 1.5 * delta(text))
        assert merged.text[path][0].shape[0] == 4
        assert merged.metadata["modelspec.prediction_type"] == "v"
        assert merged.metadata["ss_resolution"] == "(512, 512)"  # the content's header is silent
        assert "ss_zero_terminal_snr" not in merged.metadata  # nobody tells


class TestTextEncoders:
    @pytest.fixture
    def own_base(self, tiny_folder: Path) -> Base:
        """Return a base whose text encoders the test may change too."""
        return load_base(str(tiny_folder))

    @pytest.fixture
    def pair(self, loras: dict[str, Lora], files: dict[str, Path]) -> Pair:
        """Return the style LoRA's update of a text encoder."""
        draw = torch.Generator().manual_seed(3)
        pair = torch.randn(2, 16, generator=draw), torch.randn(16, 2, generator=draw)
        write_lora(replace(loras["style"], text={TEXT: pair}), files["style"], dtype="fp32")
        return pair

    def test_teachers_use_their_own_text_encoders_and_the_merged_lora_both(
        self, own_base: Base, shared_base: Base, tiny_folder: Path, config: Make, pair: Pair
    ):
        teachers = build(own_base, config()).data
        plain, styled = shared_base, load_base(str(tiny_folder))
        with torch.no_grad():
            styled.text_encoders[0].get_submodule(TEXT.removeprefix("text_encoder.text_model.")).weight += delta(pair)
        for teacher, base, prompt in (
            (teachers.alone["content"], plain, "a sks cat"),
            (teachers.alone["style"], styled, "an image in ink style"),
            (teachers.merged["content"], styled, "a sks cat"),
            (teachers.merged["style"], styled, "an image in ink style"),
        ):
            expected = embed(base, [prompt])
            torch.testing.assert_close(teacher.conditioning.tokens, expected.tokens, rtol=1e-4, atol=1e-5)
        assert torch.equal(teachers.alone["content"].latents, teachers.merged["content"].latents)

    @pytest.mark.usefixtures("pair")
    def test_text_encoder_parts_are_switched_off_with_their_lora(self, own_base: Base, shared_base: Base, config: Make):
        method, prompt = build(own_base, config()), ["a sks cat in ink style"]
        plain, both = embed(shared_base, prompt).tokens, embed(own_base, prompt).tokens
        with method.off(("style", "scales")):
            torch.testing.assert_close(embed(own_base, prompt).tokens, plain)
        with method.off(("content",)):
            assert torch.equal(embed(own_base, prompt).tokens, both)
        assert not torch.allclose(both, plain, atol=1e-3)
        assert torch.equal(embed(own_base, prompt).tokens, both)

    @pytest.mark.slow
    def test_merged_file_contains_text_encoder_parts_at_their_strength(self, config: Make, pair: Pair):
        run = zip_loras(config(style_strength=0.5, parts=True, sample_seeds=[1]))
        for name in ("lora", "style"):
            assert read_lora(run.lora(name)).text.keys() == {TEXT}
            torch.testing.assert_close(delta(read_lora(run.lora(name)).text[TEXT]), 0.5 * delta(pair))
        assert not read_lora(run.content).text

    def test_lora_with_a_text_encoder_part_generates_images(self, own_base: Base, config: Make, pair: Pair):
        method = build(own_base, config(style_images=[], teacher_images=1))
        assert method.data.alone["style"].latents.shape[0] == 1
        assert method.data.loras["style"].text[TEXT][0].shape == pair[0].shape


class TestRefusals:
    def test_loras_without_common_layers_are_refused(
        self, config: Make, loras: dict[str, Lora], files: dict[str, Path]
    ):
        write_lora(Lora({FEED: loras["style"].modules[FEED]}), files["style"])
        with pytest.raises(UserError, match=r"no layer in common(.|\n)*--method direct"):
            zip_loras(config())
        assert not config().out.exists()

    def test_loras_of_another_base_are_refused_before_the_run_begins(self, config: Make):
        with pytest.raises(UserError, match=r"content-lora\.safetensors does not fit base bundled"):
            zip_loras(config(base="bundled"))
        assert not config().out.exists()

    @pytest.mark.parametrize("method", ["zip", "direct"])
    def test_loras_of_different_widths_are_refused(
        self, config: Make, loras: dict[str, Lora], files: dict[str, Path], method: str
    ):
        path = next(path for path in loras["style"].modules if path.startswith("up_blocks"))
        write_lora(Lora({path: (torch.ones(1, 7), torch.ones(5, 1))}), files["style"])
        with pytest.raises(UserError, match=r"different shapes(.|\n)*5×7"):
            zip_loras(config(method=method))

    def test_lora_of_another_base_is_refused(self, config: Make, tmp_path: Path):
        tiny.pipeline(block_out_channels=(8, 16, 64), attention_head_dim=(1, 2, 4)).save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=r"content-lora.safetensors does not fit base .*other"):
            zip_loras(config(base=str(tmp_path / "other")))
        assert not list((tmp_path / "run").rglob("*.safetensors"))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"content_prompt": None}, "training prompt unknown(.|\n)*--content-prompt"),
            ({"style_prompt": "a {thing}"}, "is not known here"),
            ({"style_lora": Path("gone.safetensors")}, "no such run folder or LoRA file"),
            ({"content_images": [Path("gone.png")]}, "no such image"),
            ({"base": "no/such/base"}, "no such file or folder"),
            ({"style_prompt": " "}, "must not be blank"),
            ({"content_strength": float("nan")}, "content_strength"),
        ],
    )
    def test_unusable_settings_are_refused_before_a_folder_is_made(
        self, config: Make, tmp_path: Path, change: dict[str, object], message: str
    ):
        with pytest.raises(UserError, match=message):
            zip_loras(config(**change))
        assert not (tmp_path / "run").exists()
