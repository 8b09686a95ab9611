"""Facts that hold for every method: a base is restored after a run, and a LoRA is switched off with all its parts."""

import json
import os
import signal
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import random_lora

from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.split import SplitConfig
from unziplora.config.zip import ZipConfig
from unziplora.errors import Interrupted, UserError
from unziplora.formats.files import read_lora, write_lora
from unziplora.formats.safetensors import read_header
from unziplora.lora.algebra import Pair
from unziplora.lora.inject import add_lora
from unziplora.lora.weights import Lora
from unziplora.methods.adapters import AdapterMethod
from unziplora.methods.blora import BLora, train_blora
from unziplora.methods.dreambooth import DreamBooth, train_dreambooth
from unziplora.methods.unziplora.method import UnZipLora, split
from unziplora.methods.ziplora.method import ZipLora, zip_loras
from unziplora.models.base import Base, load_base
from unziplora.models.text import embed
from unziplora.sampling.pipeline import Settings, generate
from unziplora.training import loss as losses
from unziplora.training import runner
from unziplora.training.loss import Examples, Noised
from unziplora.training.method import Setup
from unziplora.training.preflight import open_images
from unziplora.training.sample_sheet import generate_samples
from unziplora.training.trainer import Trainer
from unziplora.utils.progress import Progress

TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
SPLIT = {"column_periods": 1, "column_warmup": 1, "score_timesteps": 1, "phrase_steps": 2, "content_prior": 1.0}
METHODS: dict[str, tuple[type[AdapterMethod], Callable[..., Any], type, dict[str, Any]]] = {
    "split": (
        UnZipLora,
        split,
        SplitConfig,
        {**SPLIT, "content": "cat", "style": "ink wash", "rank": 2, "prior_images": 1},
    ),
    "dreambooth": (
        DreamBooth,
        train_dreambooth,
        DreamBoothConfig,
        {"content": "cat", "rank": 2, "text_encoders": True, "prior": 1.0, "prior_images": 1},
    ),
    "blora": (BLora, train_blora, BLoraConfig, {"rank": 2}),
    "zip": (
        ZipLora,
        zip_loras,
        ZipConfig,
        {"content_prompt": "a cat", "style_prompt": "ink", "full_prompt": "a cat in ink style", "teacher_images": 1},
    ),
}


@pytest.fixture
def base(tiny_folder: Path) -> Base:
    return load_base(str(tiny_folder))


@pytest.fixture
def configured(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a method's configuration; its `base` cannot be loaded."""
    monkeypatch.setenv("UNZIPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("unziplora.methods.unziplora.style_phrase.DISTILLATION_STEPS", 1)
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(tmp_path / "cat.png")

    def make(name: str, **changes: object) -> Any:
        _, _, kind, keys = METHODS[name]
        common: dict[str, Any] = {"out": tmp_path / "run", "base": "in-memory", "steps": 2, "resolution": 64}
        common |= {"sample_steps": 1, "sample_guidance": 1, "sample_seeds": [0], "gradient_checkpointing": True}
        common |= {"generated_steps": 1, "generated_guidance": 1}
        if name == "zip":
            draw = torch.Generator().manual_seed(0)
            text: Pair = torch.randn(2, 16, generator=draw), torch.randn(16, 2, generator=draw)
            for number, part in enumerate(("content", "style")):
                lora = Lora(random_lora(base.unet, number), text={TEXT: text})
                write_lora(lora, tmp_path / f"{part}.safetensors")
                common[f"{part}_lora"] = tmp_path / f"{part}.safetensors"
        else:
            common["images"] = [tmp_path / "cat.png"]
        return kind(**{**common, **keys, **changes})

    return make


def state(base: Base) -> dict[str, Any]:
    """Everything that a run may leave behind, and what the base computes."""
    # First: transformers adds hooks of its own to a text encoder that is called for the first time.
    row = embed(base, ["a sks cat in ink wash style"])
    (image,) = generate(base, "a sks cat in ink wash style", [3], Settings(steps=2, guidance=2.0))
    parts = {"unet": base.unet, "vae": base.vae, "one": base.text_encoders[0], "two": base.text_encoders[1]}
    weights = {
        f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()
    }
    modes = {name: [module.training for module in part.modules()] for name, part in parts.items()}
    trained = [key for name, part in parts.items() for key, value in part.named_parameters() if value.requires_grad]
    hooks = {
        name: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in part.modules())
        for name, part in parts.items()
    }
    adapters = [getattr(part, "peft_config", None) for part in parts.values()]
    rest = (modes, trained, hooks, adapters, base.unet.is_gradient_checkpointing, image.tobytes())
    return {"weights": weights, "embeddings": {"tokens": row.tokens, "pooled": row.pooled}, "rest": rest}


def check_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert after["rest"] == before["rest"]
    for name in ("weights", "embeddings"):
        assert after[name].keys() == before[name].keys()
        assert all(torch.equal(after[name][key], value) for key, value in before[name].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_base_is_unchanged_after_a_run(name: str, base: Base, configured: Callable[..., Any]):
    train, before = METHODS[name][1], state(base)
    run = train(configured(name), base=base)
    assert run.card.is_file()
    check_same(before, state(base))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_wide_image_is_opened_once_and_learned_in_its_proportions(
    name: str, base: Base, configured: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Image.effect_mandelbrot((330, 192), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(tmp_path / "cat.png")
    opened, shapes, sizes, read, loss = [], set(), set(), Image.open, losses.noised

    def count(file: Any, **options: Any) -> Image.Image:
        opened.append(getattr(file, "name", file))
        return read(file, **options)

    def noised(scheduler: Any, examples: Examples, *rest: Any) -> Noised:
        shapes.add(examples.latents.shape[-2:])
        sizes.update(map(tuple, examples.conditioning.time_ids.tolist()))
        return loss(scheduler, examples, *rest)

    monkeypatch.setattr(Image, "open", count)
    monkeypatch.setattr(losses, "noised", noised)
    monkeypatch.setattr("unziplora.methods.ziplora.method.noised", noised)
    images = {"content_images": [tmp_path / "cat.png"]} if name == "zip" else {}
    run = METHODS[name][1](configured(name, resolution=128, **images), base=base)
    assert opened.count(str(tmp_path / "cat.png")) == 1
    assert shapes == {(12, 20)}  # class images and ZipLoRA's generated images too
    assert (96, 165, 0, 2, 96, 160) in sizes
    assert sizes <= {(96, 165, 0, 2, 96, 160), (96, 160, 0, 0, 96, 160)}
    files = [path for file in ("content", "style", "lora") if (path := run.lora(file)).is_file()]
    assert {read_header(path).metadata["modelspec.resolution"] for path in files} == {"160x96"}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("when", ["in a step", "before the first step"])
def test_base_is_unchanged_after_a_failure(name: str, when: str, base: Base, configured: Callable[..., Any]):
    train, before = METHODS[name][1], state(base)

    def fail(event: Progress) -> None:
        if event.step == 1 if when == "in a step" else event.message == "training":
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        train(configured(name), progress=fail, base=base)
    check_same(before, state(base))


@pytest.mark.slow
def test_modes_and_checkpointing_are_restored(base: Base, configured: Callable[..., Any]):
    base.unet.train()
    base.unet.enable_gradient_checkpointing()
    base.text_encoders[0].train()
    train_blora(configured("blora", gradient_checkpointing=False), base=base)
    assert base.unet.is_gradient_checkpointing
    assert all(module.training for part in (base.unet, base.text_encoders[0]) for module in part.modules())
    assert not base.text_encoders[1].training


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_result_is_that_of_the_base_loaded_by_the_run(
    name: str, base: Base, tiny_folder: Path, tmp_path: Path, configured: Callable[..., Any]
):
    train = METHODS[name][1]
    changes = {"base": str(tiny_folder), "sample_seeds": [], "save_precision": "fp32"}
    one = train(configured(name, out=tmp_path / "one", **changes))
    two = train(configured(name, out=tmp_path / "two", **changes), base=base)
    assert one.loras.keys() == two.loras.keys()
    for name, file in one.loras.items():
        check_equal(file, two.lora(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_loras_kept_from_earlier_steps_and_extended_runs_are_exact(
    name: str, base: Base, tmp_path: Path, configured: Callable[..., Any], recwarn: pytest.WarningsRecorder
):
    """A kept LoRA equals that of a run with as many steps, and an extended run one that had all from the start."""
    train, changes = METHODS[name][1], {"save_precision": "fp32", "sample_seeds": []}
    if name == "split":
        changes |= {"column_separation": False, "content_prior": 0.0}
    shown = {"sample_seeds": [0]} if name == "blora" else {}
    long = train(configured(name, out=tmp_path / "long", steps=3, save_every=2, **{**changes, **shown}), base=base)
    if shown:
        assert [path.name for path in long.sheets] == ["long-step000002.png", "long-step000003.png"]
    assert len(list((long.path / "steps").iterdir())) == len(long.loras)
    run = train(configured(name, out=tmp_path / "short", steps=2, **changes), base=base)
    for lora, file in run.loras.items():
        check_equal(file, long.kept_lora(lora, 2))
    assert train(configured(name, out=run.path, steps=3, **changes), resume=True, base=base) == run
    assert not [warning for warning in recwarn if "spread over all steps" in str(warning.message)]
    assert run.card.is_file()
    assert [json.loads(line)["step"] for line in run.log_file.read_text().splitlines()] == [1, 2, 3]
    for lora, file in run.loras.items():
        check_equal(file, long.lora(lora))
        check_equal(run.kept_lora(lora, 2), long.kept_lora(lora, 2))


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"schedule": "cosine"}, {"column_separation": True}])
def test_extending_what_is_spread_over_all_steps_is_said(
    base: Base, configured: Callable[..., Any], setting: dict[str, Any]
):
    changes = {"column_separation": False, "phrase_steps": 0, "content_prior": 0.0, "sample_seeds": [], **setting}
    run = split(configured("split", **changes), base=base)
    (name,) = setting
    with pytest.warns(
        UserWarning, match=rf"^{name} spread over all steps, so .* not exactly that of a run with 3 steps"
    ):
        split(configured("split", steps=3, **changes), resume=True, base=base)
    assert run.config(SplitConfig).steps == 3


@pytest.mark.slow
def test_run_that_cannot_be_extended_stays_finished(base: Base, configured: Callable[..., Any], tmp_path: Path):
    run = train_blora(configured("blora", sample_seeds=[]), base=base)
    files = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=message):
            train_blora(configured("blora", sample_seeds=[], **changes), resume=True, base=base)
        assert {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == files

    refused("this run is finished")
    refused("this run is finished", steps=1)
    refused("seed: 0 → 1", steps=3, seed=1)
    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    run.checkpoint_file(2).unlink()
    refused("no checkpoint to extend this run from", steps=3)


@pytest.mark.slow
def test_stopped_extension_goes_on_as_any_run(base: Base, configured: Callable[..., Any], tmp_path: Path):
    changes = {"sample_seeds": [], "save_precision": "fp32"}
    long = train_blora(configured("blora", out=tmp_path / "long", steps=4, **changes), base=base)
    run = train_blora(configured("blora", **changes), base=base)

    def stop(event: Progress) -> None:
        if event.step == 3 and event.loss == event.loss:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped after step 3 of 4"):
        train_blora(configured("blora", steps=4, **changes), resume=True, progress=stop, base=base)
    assert run.unfinished
    train_blora(configured("blora", steps=4, **changes), resume=True, base=base)
    check_equal(run.content, long.content)


def test_optimizer_is_freed_before_the_last_samples(
    base: Base, configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    trainers: list[weakref.ref[Trainer]] = []
    freed: list[bool] = []

    def make(*args: Any) -> Trainer:
        trainer = Trainer(*args)
        trainers.append(weakref.ref(trainer))
        return trainer

    def sample(*args: Any) -> Any:
        freed.append(trainers[0]() is None)
        return generate_samples(*args)

    monkeypatch.setattr(runner, "Trainer", make)
    monkeypatch.setattr(runner, "generate_samples", sample)
    train_blora(configured("blora"), base=base)
    assert freed == [True]


def check_equal(one: Path, two: Path) -> None:
    first, second = read_lora(one), read_lora(two)
    for parts, others in ((first.modules, second.modules), (first.text, second.text)):
        assert parts.keys() == others.keys()
        for path, pair in parts.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, others[path], strict=True))


@pytest.mark.parametrize("where", ["unet", "text encoder"])
def test_base_that_contains_loras_is_refused_and_keeps_them(where: str, base: Base, configured: Callable[..., Any]):
    if where == "unet":
        branches = add_lora(base.unet, "own", random_lora(base.unet, 5))
    else:
        from peft import LoraConfig

        base.text_encoders[1].add_adapter(LoraConfig(r=1, target_modules=["q_proj"]))
    config = configured("blora")
    with pytest.raises(UserError, match="contains LoRAs already; remove them"):
        train_blora(config, base=base)
    assert not config.out.exists()
    if where == "unet":
        assert all(base.unet.get_submodule(path).branch("own") is branch for path, branch in branches.items())
    else:
        assert base.text_encoders[1].peft_config


@torch.no_grad()
def computed(base: Base) -> list[torch.Tensor]:
    """What base and LoRAs make of a prompt: its embeddings, and the UNet's prediction from a fixed input."""
    row, draw = embed(base, ["a sks cat in ink wash style"]), torch.Generator().manual_seed(9)
    given = {"text_embeds": torch.randn(1, 24, generator=draw), "time_ids": torch.ones(1, 6)}
    sample, tokens = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 7, 40, generator=draw)
    return [row.tokens, row.pooled, base.unet(sample, 500, tokens, added_cond_kwargs=given).sample]


def perturb(base: Base, method: AdapterMethod, name: str) -> None:
    """Change every part of one LoRA."""
    parts = [branch.up for branch in method.branches[name].values()]
    adapter = "default" if name in method.text else name  # PEFT calls LoRAs from files by their names
    for encoder in base.text_encoders:
        parts += [tensor for key, tensor in encoder.named_parameters() if f".{adapter}." in key]
    with torch.no_grad():
        for part in parts:
            part += torch.rand(part.shape, generator=torch.Generator().manual_seed(7)) / 4


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_switching_a_lora_off_switches_off_all_its_parts(name: str, base: Base, configured: Callable[..., Any]):
    plain = computed(base)
    kind, config = METHODS[name][0], configured(name)
    method = kind.build(config, Setup(base, open_images(kind, config, base.scale), nullcontext, lambda _: None))
    for lora in method.branches:
        before = computed(base)
        with method.off((lora,)):
            off = computed(base)
            perturb(base, method, lora)
            assert all(torch.equal(a, b) for a, b in zip(computed(base), off, strict=True))
        assert not torch.equal(computed(base)[2], before[2])
    assert {"split": True, "dreambooth": True, "blora": False, "zip": True}[name] == (
        not torch.equal(computed(base)[0], plain[0])
    ), "a LoRA with a part for text encoders changes embeddings"
    with method.off((*method.branches, "scales")):
        for a, b in zip(computed(base), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
