from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from tiny import random_lora

from unziplora.config.sample import SCHEDULERS
from unziplora.errors import MachineError, OutOfMemory, UserError
from unziplora.lora.inject import adapted_layers, add_lora, attention_linears
from unziplora.lora.layer import BranchedLinear
from unziplora.models.base import Base
from unziplora.models.text import Prompts
from unziplora.sampling.pipeline import Settings, decode, generate, generate_latents
from unziplora.sampling.schedulers import make_scheduler

FAST = Settings(steps=2)
CAT = Prompts("a sks cat in ink style", "a sks cat", "an image in ink style")


@pytest.fixture
def split_base(tiny_base: Base) -> Base:
    """The tiny base with a content and a style LoRA, as training leaves it."""
    content, style = random_lora(tiny_base.unet, 1), random_lora(tiny_base.unet, 2)
    add_lora(tiny_base.unet, "content", content, stream="content")
    add_lora(tiny_base.unet, "style", style, stream="style")
    return tiny_base


def turn(base: Base, **strengths: float) -> None:
    for layer in adapted_layers(base.unet).values():
        for name, strength in strengths.items():
            layer.branches[name].strength = strength


def test_three_equal_prompts_are_direct_addition(split_base: Base):
    text = "a sks cat in ink style"
    joined = generate_latents(split_base, Prompts(text, text, text), [0], FAST)
    direct = generate_latents(split_base, text, [0], FAST)
    # one product for both LoRAs, or one each: the same but for the order of the sum
    torch.testing.assert_close(joined, direct, rtol=1e-4, atol=1e-4)


def test_three_prompts_differ_from_one(split_base: Base):
    joined = generate_latents(split_base, CAT, [0], FAST)
    assert not torch.allclose(joined, generate_latents(split_base, CAT.full, [0], FAST), atol=1e-3)


def test_strength_zero_is_the_base(split_base: Base, shared_base: Base):
    turn(split_base, content=0.0, style=0.0)
    expected = generate_latents(shared_base, CAT.full, [0], FAST)
    assert torch.equal(generate_latents(split_base, CAT.full, [0], FAST), expected)
    assert torch.equal(generate_latents(split_base, CAT, [0], FAST), expected)


def test_content_lora_is_blind_to_the_style_prompt(split_base: Base):
    other = Prompts(CAT.full, CAT.content, "something else")
    assert not torch.equal(generate_latents(split_base, CAT, [0], FAST), generate_latents(split_base, other, [0], FAST))
    turn(split_base, style=0.0)
    assert torch.equal(generate_latents(split_base, CAT, [0], FAST), generate_latents(split_base, other, [0], FAST))


def test_style_lora_is_blind_to_the_content_prompt(split_base: Base):
    other = Prompts(CAT.full, "something else", CAT.style)
    turn(split_base, content=0.0)
    assert torch.equal(generate_latents(split_base, CAT, [0], FAST), generate_latents(split_base, other, [0], FAST))


def test_frozen_base_sees_the_full_prompt_alone(split_base: Base, shared_base: Base):
    turn(split_base, content=0.0, style=0.0)
    other = Prompts("another image", CAT.content, CAT.style)
    result = generate_latents(split_base, other, [0], FAST)
    assert torch.equal(result, generate_latents(shared_base, "another image", [0], FAST))


def test_three_prompts_work_on_layers_without_loras(tiny_base: Base):
    """B-LoRA adapts two blocks alone; the other cross-attentions must split the joined embeddings too."""
    paths = [p for p in attention_linears(tiny_base.unet) if p.startswith("up_blocks.0.attentions.0")]
    add_lora(tiny_base.unet, "content", random_lora(tiny_base.unet, 1, paths), stream="content")
    before = set(adapted_layers(tiny_base.unet))
    text = CAT.full
    joined = generate_latents(tiny_base, Prompts(text, text, text), [0], FAST)
    assert set(adapted_layers(tiny_base.unet)) == before == set(paths)
    assert torch.equal(joined, generate_latents(tiny_base, text, [0], FAST))


def test_negative_prompt_reaches_all_streams_or_each_its_own(split_base: Base):
    one = generate_latents(split_base, CAT, [0], Settings(steps=2, negative="blurry"))
    three = generate_latents(split_base, CAT, [0], Settings(steps=2, negative=("blurry",) * 3))
    assert torch.equal(one, three)
    for index in range(3):
        negative = ["blurry"] * 3
        negative[index] = "a dog"
        changed = generate_latents(split_base, CAT, [0], Settings(steps=2, negative=tuple(negative)))
        assert not torch.equal(changed, one)


def test_guidance_rescale_reaches_the_pipeline(shared_base: Base):
    plain = generate_latents(shared_base, "a cat", [0], FAST)
    rescaled = generate_latents(shared_base, "a cat", [0], Settings(steps=2, guidance_rescale=0.7))
    assert not torch.allclose(plain, rescaled, atol=1e-3)


def test_guidance_one_needs_no_negative_prompt(split_base: Base):
    one = generate_latents(split_base, CAT, [0], Settings(steps=2, guidance=1.0))
    assert torch.equal(one, generate_latents(split_base, CAT, [0], Settings(steps=2, guidance=1.0, negative="x")))


def test_image_depends_only_on_its_seed(shared_base: Base):
    before = torch.get_rng_state()
    alone = generate_latents(shared_base, "a cat", [7], FAST)
    among = generate_latents(shared_base, "a cat", [3, 7, 5], FAST)
    batched = generate_latents(shared_base, "a cat", [3, 7, 5], Settings(steps=2, batch_size=3))
    assert torch.equal(alone[0], among[1])
    torch.testing.assert_close(alone[0], batched[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(among[0], among[1], atol=1e-2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", *SCHEDULERS])
def test_every_scheduler_is_reproducible_also_in_batches(shared_base: Base, name: str):
    settings = Settings(steps=3, scheduler=name)
    one = generate_latents(shared_base, "a cat", [7], settings)
    assert torch.isfinite(one).all()
    assert torch.equal(one, generate_latents(shared_base, "a cat", [7], settings))
    batched = generate_latents(shared_base, "a cat", [3, 7], Settings(steps=3, scheduler=name, batch_size=2))
    torch.testing.assert_close(one[0], batched[1], rtol=1e-3, atol=1e-3)


def test_default_images_equal_diffusers_pipeline(shared_base: Base):
    expected = shared_base.pipe(
        "a cat", num_inference_steps=2, guidance_scale=5.0, generator=torch.Generator().manual_seed(0)
    ).images[0]
    (result,) = generate(shared_base, "a cat", [0], Settings(steps=2))
    assert result.size == (64, 64)
    assert result.tobytes() == expected.tobytes()


def test_size_defaults_to_the_bases(shared_base: Base):
    assert generate(shared_base, "a cat", [0], Settings(steps=1, width=80, height=40))[0].size == (80, 40)
    assert generate_latents(shared_base, "a cat", [0, 1], Settings(steps=1)).shape == (2, 4, 8, 8)


def test_progress_counts_the_steps_of_all_images(shared_base: Base):
    reports: list[tuple[int, int]] = []
    generate_latents(
        shared_base, "a cat", [0, 1, 2], Settings(steps=2, batch_size=2), lambda *report: reports.append(report)
    )
    assert reports == [(2, 6), (4, 6), (5, 6), (6, 6)]


def test_progress_of_a_scheduler_with_two_timesteps_per_step_ends_at_its_total(shared_base: Base):
    reports: list[tuple[int, int]] = []
    settings = Settings(steps=3, scheduler="heun", batch_size=1)
    generate_latents(shared_base, "a cat", [0, 1], settings, lambda *report: reports.append(report))
    done = [steps for steps, total in reports if total == 6]
    assert len(done) == len(reports) == 10
    assert done == sorted(done)
    assert done[4] == 3
    assert done[-1] == 6


def test_unet_is_left_in_training_mode(tiny_base: Base):
    tiny_base.unet.train()
    generate_latents(tiny_base, CAT, [0], FAST)
    assert tiny_base.unet.training
    assert not any(isinstance(module, BranchedLinear) for module in tiny_base.unet.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100}, "width 100: must be a multiple of 8; the nearest is 96"),
        ({"height": 4}, "height 4"),
    ],
)
def test_invalid_settings_are_refused(shared_base: Base, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        generate(shared_base, "a cat", [0], Settings(**settings))


def test_zero_terminal_snr_starts_at_the_last_timestep(tiny_base: Base):
    config = {**tiny_base.scheduler.config, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    tiny_base.pipe.scheduler = type(tiny_base.scheduler).from_config(config)
    scheduler = make_scheduler(tiny_base, "ddim")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.isfinite(generate_latents(tiny_base, "a cat", [0], FAST)).all()
    with pytest.raises(UserError, match="zero-terminal SNR"):
        make_scheduler(tiny_base, "heun")


@pytest.mark.parametrize("options", [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_named_scheduler_has_no_options_of_the_bases_own(shared_base: Base, name: str, options: dict):
    schedule = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "timestep_spacing": "leading"}
    own, plain = (
        SimpleNamespace(name="own", zero_terminal_snr=False, scheduler=DPMSolverMultistepScheduler(**schedule, **more))
        for more in ({"algorithm_type": "sde-dpmsolver++", **options}, {})
    )
    first, second = make_scheduler(own, name), make_scheduler(plain, name)
    assert first.config == second.config
    assert schedule.items() <= first.config.items()
    assert make_scheduler(own, "base").config.algorithm_type == "sde-dpmsolver++"


def test_out_of_memory_is_a_machine_error(tiny_base: Base, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(tiny_base.unet, "forward", full)
    with pytest.raises(MachineError, match="smaller size"):
        generate_latents(tiny_base, "a cat", [0], FAST)


def distance(one: Image.Image, two: Image.Image) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(two, float)).mean())


def test_image_too_large_for_memory_is_decoded_in_tiles(tiny_base: Base, monkeypatch: pytest.MonkeyPatch):
    vae, whole = tiny_base.vae, type(tiny_base.vae).decode
    latents = torch.randn(1, vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    (expected,) = decode(tiny_base, latents)
    sizes, tiled = (vae.tile_sample_min_size, vae.tile_latent_min_size), []

    def short(self: object, latent: torch.Tensor, **options: object) -> object:
        tiled.append(vae.use_tiling)
        if not vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(vae, latent, **options)

    monkeypatch.setattr(type(vae), "decode", short)
    (image,) = decode(tiny_base, latents)
    assert tiled == [False, True]
    assert image.size == expected.size
    # Tiles are normalized each by itself, so it is not the same image, but nearer to it than any other.
    (other,) = decode(tiny_base, latents.flip(-1))
    assert distance(image, expected) < 0.6 * distance(other, expected)
    assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size) == (False, *sizes)
    monkeypatch.setattr(type(vae), "decode", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(OutOfMemory, match="decoding an image"):
        decode(tiny_base, latents)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB). Tried to allocate 192.00 MB on private pool."),
    ],
)
def test_vae_too_large_for_the_gpu_is_out_of_memory(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
):
    def full(*_: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(tiny_base.vae, "to", full)
    with pytest.raises(OutOfMemory, match="decoding an image"):
        decode(tiny_base, torch.zeros(1, 4, 8, 8))


def test_other_errors_are_not_out_of_memory(tiny_base: Base, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(tiny_base.vae), "decode", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shape")))
    with pytest.raises(RuntimeError, match="shape"):
        decode(tiny_base, torch.zeros(1, 4, 8, 8))


def test_nan_causes_a_warning_and_an_image(shared_base: Base):
    with pytest.warns(UserWarning, match="NaN"):
        assert len(decode(shared_base, torch.full((1, 4, 8, 8), float("nan")))) == 1


def test_cross_combination_takes_each_lora_from_its_own_run(fresh_base: Callable[[], Base]):
    """The content of one run with the style of another is their sum, in any order."""
    first, second = fresh_base(), fresh_base()
    content, style = random_lora(first.unet, 1), random_lora(first.unet, 9)
    add_lora(first.unet, "content", content, stream="content")
    add_lora(first.unet, "style", style, stream="style")
    add_lora(second.unet, "style", style, stream="style")
    add_lora(second.unet, "content", content, stream="content")
    one, other = (generate_latents(base, CAT, [0], FAST) for base in (first, second))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
