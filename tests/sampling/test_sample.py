import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from unziplora.config.bases import BUNDLED_BASE, SDXL
from unziplora.config.blora import BLoraConfig
from unziplora.config.recipe import resolve, to_toml
from unziplora.config.sample import SampleConfig
from unziplora.config.split import SplitConfig
from unziplora.errors import MachineError, UserError
from unziplora.formats.files import read_lora, write_lora
from unziplora.formats.safetensors import body_hash, read_tensors
from unziplora.lora.algebra import fold_output
from unziplora.lora.inject import TARGETS, adapted_layers, add_lora, attention_linears, target_layers
from unziplora.lora.weights import Lora
from unziplora.models.base import Base, Scale
from unziplora.models.text import Prompts
from unziplora.sampling.pipeline import Settings, generate_latents
from unziplora.sampling.prompts import plan_prompts
from unziplora.sampling.sample import sample, write_image
from unziplora.sampling.session import open_session, plan_sampling, shared_names
from unziplora.sampling.sources import (
    LoraSource,
    choose_base,
    choose_size,
    find_lora,
    find_loras,
    loras_of,
    training_base,
)

FAST = Settings(steps=2)


def make_run(folder: Path, base: Base, source: Path, content: str, style: str, seed: int) -> Path:
    """Write the files of a run: two LoRAs and the configuration."""
    config = resolve(
        SplitConfig, {"images": ["x.png"], "content": content, "style": style, "out": folder, "base": str(source)}
    )
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(config))
    for kind, offset in (("content", 0), ("style", 1)):
        lora = Lora(tiny.random_lora(base.unet, seed + offset))
        write_lora(lora, folder / f"{kind}.safetensors", dtype="fp32")
    return folder


@pytest.fixture(scope="module")
def cat(shared_base: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "cat", shared_base, tiny_folder, "cat", "ink", 1)


@pytest.fixture(scope="module")
def dog(shared_base: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "dog", shared_base, tiny_folder, "dog", "oil paint", 11)


def latents(config: SampleConfig, base: Base, seed: int = 0) -> torch.Tensor:
    with open_session(config, base) as session:
        return generate_latents(base, session.prompts[0], [seed], FAST)


def expected(base: Base, prompts: Prompts | str, **loras: int) -> torch.Tensor:
    """Generate latents with branches added directly, by LoRA name and seed."""
    pairs = {name: tiny.random_lora(base.unet, seed) for name, seed in loras.items()}
    for name, lora in pairs.items():
        add_lora(base.unet, name, lora, stream=name)
    return generate_latents(base, prompts, [0], FAST)


def test_content_alone_and_style_alone_use_their_runs_prompts(fresh_base, cat: Path):
    result = latents(SampleConfig(content=cat), fresh_base())
    torch.testing.assert_close(result, expected(fresh_base(), "a sks cat", content=1), rtol=1e-4, atol=1e-4)
    result = latents(SampleConfig(style=cat), fresh_base())
    torch.testing.assert_close(result, expected(fresh_base(), "an image in ink style", style=2), rtol=1e-4, atol=1e-4)


def test_both_see_three_prompts(fresh_base, cat: Path):
    prompts = Prompts("a sks cat in ink style", "a sks cat", "an image in ink style")
    result = latents(SampleConfig(content=cat, style=cat), fresh_base())
    torch.testing.assert_close(result, expected(fresh_base(), prompts, content=1, style=2), rtol=1e-4, atol=1e-4)


def test_direct_addition_sees_one_prompt(fresh_base, cat: Path):
    result = latents(SampleConfig(content=cat, style=cat, mode="direct"), fresh_base())
    want = expected(fresh_base(), "a sks cat in ink style", content=1, style=2)
    torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-4)


def test_content_of_one_run_with_style_of_another(fresh_base, cat: Path, dog: Path):
    prompts = Prompts("a sks cat in oil paint style", "a sks cat", "an image in oil paint style")
    result = latents(SampleConfig(content=cat, style=dog), fresh_base())
    torch.testing.assert_close(result, expected(fresh_base(), prompts, content=1, style=12), rtol=1e-4, atol=1e-4)


def test_file_equals_its_run(fresh_base, cat: Path, tmp_path: Path):
    for layout in ("kohya", "diffusers"):
        lora = Lora(tiny.random_lora(fresh_base().unet, 1))
        write_lora(lora, tmp_path / f"{layout}.safetensors", layout, dtype="fp32")
        config = SampleConfig(content=tmp_path / f"{layout}.safetensors", prompts=["a sks cat"])
        result = latents(config, fresh_base())
        torch.testing.assert_close(result, latents(SampleConfig(content=cat), fresh_base()), rtol=1e-4, atol=1e-4)


def test_exported_file_equals_the_branch(fresh_base, tmp_path: Path):
    """Column mask, soft scale and strength of a trained branch, folded into a file of each layout."""
    base = fresh_base()
    branches = add_lora(base.unet, "content", tiny.random_lora(base.unet, 1), strength=0.5)
    for branch in branches.values():
        branch.mask.copy_(torch.arange(len(branch.mask)) % 3 != 0)
        branch.scale.data.uniform_(0, 1)
    want = generate_latents(base, "a cat", [0], FAST)
    folded = {path: fold_output((b.down.detach(), b.up.detach()), b.columns().detach()) for path, b in branches.items()}
    for layout in ("kohya", "diffusers"):
        file = tmp_path / f"{layout}.safetensors"
        write_lora(Lora(folded), file, layout, dtype="fp32")
        result = latents(SampleConfig(content=file, prompts=["a cat"]), fresh_base())
        torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-4)


def test_strength_zero_and_all_blocks_zero_are_the_base(fresh_base, shared_base: Base, cat: Path):
    want = generate_latents(shared_base, "a sks cat in ink style", [0], FAST)
    off = SampleConfig(content=cat, style=cat, content_strength=0, style_strength=0)
    assert torch.equal(latents(off, fresh_base()), want)
    blocks = ["down_blocks=0", "mid_block=0", "up_blocks=0"]
    off = SampleConfig(content=cat, style=cat, content_blocks=blocks, style_blocks=blocks)
    assert torch.equal(latents(off, fresh_base()), want)


def test_longest_block_name_counts_and_multiplies_the_strength(tiny_base: Base, cat: Path):
    blocks = ["up_blocks=0", "up_blocks.0.attentions.1=0.5"]
    config = SampleConfig(content=cat, content_strength=3, content_blocks=blocks)
    plain = read_lora(cat / "content.safetensors").modules
    with open_session(config, tiny_base):
        result = {path: layer.branches["content"].delta() for path, layer in adapted_layers(tiny_base.unet).items()}
    for path, delta in result.items():
        down, up = plain[path]
        kept = path.startswith("up_blocks.0.attentions.1.")
        strength = 1.5 if kept else 0.0 if path.startswith("up_blocks.") else 3.0
        torch.testing.assert_close(delta, strength * up @ down)


def test_base_is_restored(tiny_base: Base, shared_base: Base, cat: Path):
    latents(SampleConfig(content=cat, style=cat), tiny_base)
    assert not adapted_layers(tiny_base.unet)
    assert tiny_base.unet.state_dict().keys() == shared_base.unet.state_dict().keys()


def test_convolutions_and_text_encoders_act_and_are_removed(fresh_base, shared_base: Base, tmp_path: Path):
    base = fresh_base()
    paths = [*attention_linears(base.unet), "down_blocks.1.resnets.0.conv1"]
    q = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    text = {q: (torch.randn(2, 24), torch.randn(24, 2))}
    file = tmp_path / "locon.safetensors"
    write_lora(Lora(tiny.random_lora(base.unet, 1, paths), {}, text), file, dtype="fp32")
    config = SampleConfig(content=file, prompts=["a cat"])
    changed = latents(config, base)
    plain = generate_latents(shared_base, "a cat", [0], FAST)
    assert not torch.allclose(changed, plain, atol=1e-2)
    torch.testing.assert_close(latents(SampleConfig(**{**config.model_dump(), "content_strength": 0}), base), plain)
    torch.testing.assert_close(generate_latents(base, "a cat", [0], FAST), plain)


def test_convolutions_of_both_loras_act_with_separate_prompts(fresh_base, tmp_path: Path):
    """Convolutions read no prompt: with three equal prompts both modes are the same."""
    base = fresh_base()
    paths = [*attention_linears(base.unet), "down_blocks.0.resnets.0.conv1", "up_blocks.0.upsamplers.0.conv"]
    files = {name: tmp_path / f"{name}.safetensors" for name in ("content", "style")}
    for seed, file in enumerate(files.values()):
        write_lora(Lora(tiny.random_lora(base.unet, seed, paths)), file, dtype="fp32")
    direct = latents(SampleConfig(**files, mode="direct", prompts=["x"]), base)
    words = {"prompts": ["x"], "content_prompt": "x", "style_prompt": "x"}
    torch.testing.assert_close(latents(SampleConfig(**files, mode="separate", **words), base), direct)


def test_text_encoder_lora_acts_on_all_prompts_has_a_strength_and_is_removed(fresh_base, shared_base: Base, tmp_path):
    base, files = fresh_base(), {}
    v = "text_encoder_2.text_model.encoder.layers.0.self_attn.v_proj"
    text = {v: (torch.randn(2, 24), torch.randn(24, 2))}
    for seed, (name, part) in enumerate({"content": {}, "style": text, "wordless": {}}.items()):
        files[name] = tmp_path / f"{name}.safetensors"
        write_lora(Lora(tiny.random_lora(base.unet, min(seed, 1)), {}, part), files[name], dtype="fp32")
    words = {"mode": "separate", "prompts": ["x"], "content_prompt": "a cat", "style_prompt": "ink"}

    def made(style: str, base: Base = base, **more: object) -> torch.Tensor:
        return latents(SampleConfig(content=files["content"], style=files[style], **{**words, **more}), base)

    with_text, without = made("style"), made("wordless")
    assert not torch.allclose(with_text, without, atol=1e-2)
    torch.testing.assert_close(made("style", style_strength=0), made("wordless", style_strength=0))
    assert not any("lora" in name for encoder in base.text_encoders for name, _ in encoder.named_parameters())
    torch.testing.assert_close(
        generate_latents(base, "a cat", [0], FAST), generate_latents(shared_base, "a cat", [0], FAST)
    )


@pytest.mark.parametrize("targets", [["attention"], TARGETS])
def test_diffusers_and_our_branches_agree(fresh_base, tmp_path: Path, targets: list[str]):
    """The same file, once through PEFT and once through our layers."""
    file, unet = tmp_path / "lora.safetensors", fresh_base().unet
    write_lora(Lora(tiny.random_lora(unet, 1, target_layers(unet, targets))), file, dtype="fp32")
    ours = latents(SampleConfig(content=file, prompts=["a cat"], content_strength=0.7), fresh_base())
    base = fresh_base()
    base.pipe.load_lora_weights(str(file), adapter_name="x")
    base.pipe.set_adapters(["x"], [0.7])
    torch.testing.assert_close(ours, generate_latents(base, "a cat", [0], FAST), rtol=1e-4, atol=1e-4)


def test_images_are_named_by_seed_and_contain_their_settings(tiny_base: Base, cat: Path, tmp_path: Path):
    config = SampleConfig(content=cat, seeds=[3, 5], steps=1, out=tmp_path / "out", negative="blurry", guidance=4)
    paths = sample(config, tiny_base)
    assert [path.name for path in paths] == ["3.png", "5.png"]
    with Image.open(paths[1]) as image:
        assert image.size == (64, 64)
        settings = json.loads(image.text["unziplora"])
        lines = image.text["parameters"].splitlines()
    assert (settings["seed"], settings["prompt"], settings["content_strength"]) == (5, "a sks cat", 1.0)
    assert lines[:2] == ["a sks cat", "Negative prompt: blurry"]
    assert lines[2].startswith("Steps: 1, Sampler: base, CFG scale: 4, Seed: 5, Size: 64x64, Model: tiny-xl")
    digest = read_lora(cat / "content.safetensors").metadata["sshs_model_hash"]
    assert f'Lora hashes: "{cat.name}-content: {digest[:12]}"' in lines[2]
    assert settings["loras"] == {f"{cat.name}-content": digest}
    assert (settings["content"], "style" in settings) == (f"{cat.name}-content", False)
    assert str(cat.parent) not in json.dumps([settings, lines])


def test_lora_without_a_recorded_hash_has_the_same_one(cat: Path, tmp_path: Path):
    tensors, metadata = read_tensors(cat / "style.safetensors")
    save_file(tensors, tmp_path / "plain.safetensors")
    assert body_hash(tmp_path / "plain.safetensors") == metadata["sshs_model_hash"]


def test_only_the_same_image_is_overwritten(tiny_base: Base, cat: Path, tmp_path: Path):
    config = SampleConfig(content=cat, steps=1, out=tmp_path)
    assert [path.name for path in sample(config, tiny_base)] == ["0.png"]
    assert [path.name for path in sample(config, tiny_base)] == ["0.png"]
    other = SampleConfig(content=cat, steps=2, out=tmp_path)
    assert [path.name for path in sample(other, tiny_base)] == ["0-2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-2.png", "0.png"]


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims to have a size, with some chunks and no pixels."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (header, *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


FOREIGN = {
    "pixels": png(60_000, 60_000),
    "text": png(8, 8, (b"zTXt", b"unziplora\0\0" + zlib.compress(bytes(2**27)))),
    "long text": png(8, 8, *[(b"iTXt", b"unziplora\0\0\0\0\0" + b"a" * 2**20)] * 70),
    "no PNG": b"\xff\xd8\xff",
    "empty": b"",
}


@pytest.mark.parametrize("foreign", [*FOREIGN, "folder", "pipe", "device"])
def test_no_file_in_the_way_stops_the_writing_of_an_image(tmp_path: Path, foreign: str):
    path, text = tmp_path / "0.png", {"unziplora": "{}"}
    if foreign == "folder":
        path.mkdir()
    elif foreign == "pipe":
        os.mkfifo(path)
    elif foreign == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(FOREIGN[foreign])
    assert write_image(Image.new("RGB", (8, 8)), path, text) == tmp_path / "0-2.png"
    assert write_image(Image.new("RGB", (8, 8)), path, text) == tmp_path / "0-2.png"


@given(st.lists(st.tuples(st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf"]), st.binary(max_size=60)), max_size=3))
def test_image_is_written_next_to_any_embedded_text(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[tuple[bytes, bytes]]
):
    path = tmp_path_factory.mktemp("text") / "0.png"
    path.write_bytes(png(8, 8, *chunks))
    assert write_image(Image.new("RGB", (8, 8)), path, {"unziplora": "{}"}).name == "0-2.png"


def test_several_prompts_are_numbered_and_progress_runs_over_all(tiny_base: Base, tmp_path: Path):
    reports = []
    config = SampleConfig(prompts=["a cat", "a dog"], steps=1, seeds=[4, 4, 6], out=tmp_path)
    paths = sample(config, tiny_base, lambda *report: reports.append(report))
    assert [path.name for path in paths] == ["01-4.png", "01-6.png", "02-4.png", "02-6.png"]
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_base_of_the_run_is_loaded(cat: Path, tmp_path: Path):
    (path,) = sample(SampleConfig(style=cat, steps=1, out=tmp_path, device="cpu"))
    with Image.open(path) as image:
        assert json.loads(image.text["unziplora"])["base"] == "tiny-xl"


def test_words_and_base_are_read_from_a_files_header(tiny_base: Base, tmp_path: Path):
    words = {"token": "ohwx", "content": "fox", "style": "chalk", "base": "somebody/some-xl"}
    settings = {**words, **{name: key.default for name, key in SplitConfig.keys().items() if name.endswith("_prompt")}}
    for kind, seed in (("content", 1), ("style", 2)):
        lora = Lora(tiny.random_lora(tiny_base.unet, seed), {"unziplora.settings": json.dumps(settings)})
        write_lora(lora, tmp_path / f"my-{kind}.safetensors")
    config = SampleConfig(content=tmp_path / "my-content.safetensors", style=tmp_path / "my-style.safetensors")
    with open_session(config, tiny_base) as session:
        assert session.prompts == [Prompts("a ohwx fox in chalk style", "a ohwx fox", "an image in chalk style")]


@pytest.mark.parametrize(
    ("content", "style", "filled"),
    [
        ("split", "blora", ("a sks cat in v7 style", "a sks cat", "an image in v7 style")),
        ("blora", "split", ("A v7 in ink style", "A v7", "an image in ink style")),
        ("blora", "blora", ("A v7", "A v7", "an image in v7 style")),
        ("split", "split", ("a sks cat in ink style", "a sks cat", "an image in ink style")),
    ],
)
def test_prompts_use_the_words_of_each_loras_own_run(tmp_path: Path, content: str, style: str, filled):
    shared = {"images": ["x.png"], "base": "b"}
    split = SplitConfig(**shared, content="cat", style="ink", out=tmp_path / "split")
    for config in (split, BLoraConfig(**shared, token="v7", out=tmp_path / "blora")):
        config.out.mkdir()
        (config.out / "config.toml").write_text(to_toml(config))
        for kind in ("content", "style"):
            save_file({"x": torch.zeros(1)}, config.out / f"{kind}.safetensors")
    sources = [find_lora(tmp_path / content, "content"), find_lora(tmp_path / style, "style")]
    config = SampleConfig(content=tmp_path / content, style=tmp_path / style, mode="separate")
    (prompts,) = plan_prompts(config, sources)
    assert (prompts.full, prompts.content, prompts.style) == filled


def test_words_are_filled_into_prompts(cat: Path, dog: Path):
    sources = [find_lora(cat, "content"), find_lora(dog, "style")]
    config = SampleConfig(content=cat, style=dog, prompts=["{token} {content} as {style} style"])
    (prompts,) = plan_prompts(config, sources)
    assert prompts == Prompts("sks cat as oil paint style", "a sks cat", "an image in oil paint style")
    with pytest.raises(UserError, match=r"\{color\} is not known here; known: \{token\}, \{content\}, \{style\}"):
        plan_prompts(SampleConfig(content=cat, style=dog, prompts=["{color}"]), sources)


def test_different_bases_ask_for_a_choice(cat: Path, dog: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    text = (dog / "config.toml").read_text().splitlines()
    (other / "config.toml").write_text("\n".join('base = "x/y"' if t.startswith("base =") else t for t in text))
    (other / "style.safetensors").write_bytes((dog / "style.safetensors").read_bytes())
    sources = [find_lora(cat, "content"), find_lora(other, "style")]
    config = SampleConfig(content=cat, style=other)
    with pytest.raises(UserError, match="different bases"):
        choose_base(config, sources)
    assert choose_base(SampleConfig(content=cat, style=other, base="x/y"), sources) == "x/y"


def headed(folder: Path, base: Base, kind: str, **metadata: str) -> Path:
    """Write a LoRA file outside a run, with this header."""
    write_lora(Lora(tiny.random_lora(base.unet, 1)), folder / f"my-{kind}.safetensors", metadata=metadata)
    return folder / f"my-{kind}.safetensors"


class TestBaseOfAFile:
    """Headers of LoRA files contain only the last part of their base's path."""

    def test_unavailable_base_asks_for_its_path(self, tiny_base: Base, tmp_path: Path):
        file = headed(tmp_path, tiny_base, "content", ss_sd_model_name="ponyXL.safetensors")
        config = SampleConfig(content=file, prompts=["x"])
        with pytest.raises(UserError, match=r"my-content\.safetensors: trained on ponyXL\.safetensors, .* with --base"):
            sample(config)
        sources = find_loras(config)
        assert choose_base(config.model_copy(update={"base": "x/y"}), sources) == "x/y"

    @pytest.mark.parametrize("name", ["sd_xl_base_1.0_0.9vae.safetensors", "stabilityai/stable-diffusion-xl-base-1.0"])
    def test_file_names_of_sdxl_are_recognized(self, tiny_base: Base, tmp_path: Path, name: str):
        config = SampleConfig(content=headed(tmp_path, tiny_base, "content", ss_sd_model_name=name))
        assert choose_base(config, find_loras(config)) == SDXL

    def test_path_in_a_run_resolves_a_base_name(self, tiny_base: Base, tiny_folder: Path, cat: Path, tmp_path: Path):
        style = headed(tmp_path, tiny_base, "style", ss_sd_model_name=tiny_folder.name)
        config = SampleConfig(content=cat, style=style)
        assert choose_base(config, find_loras(config)) == str(tiny_folder)
        other = SampleConfig(content=cat, style=headed(tmp_path, tiny_base, "style", ss_sd_model_name="ponyXL"))
        with pytest.raises(UserError, match="different bases"):
            choose_base(other, find_loras(other))

    @pytest.mark.parametrize("run", ["/models/sd_xl_base_1.0.safetensors", "/models/sd_xl_base_1.0_0.9vae.safetensors"])
    def test_path_of_stabilitys_file_is_the_base_that_a_header_names(self, run: str, tmp_path: Path):
        content = LoraSource("content", tmp_path / "content.safetensors", settings={"base": run})
        style = LoraSource(
            "style", tmp_path / "a.safetensors", header={"ss_sd_model_name": "sd_xl_base_1.0.safetensors"}
        )
        assert training_base([content, style]) == training_base([style, content]) == run
        other = LoraSource("style", tmp_path / "a.safetensors", header={"ss_sd_model_name": "pony.safetensors"})
        with pytest.raises(UserError, match="different bases"):
            training_base([content, style, other])

    def test_missing_prompt_error_names_trigger_words(self, tiny_base: Base, tmp_path: Path):
        tags = json.dumps({"10_cat": {"mycat": 10, "sitting": 3}})
        file = headed(tmp_path, tiny_base, "content", ss_tag_frequency=tags)
        with pytest.raises(UserError, match="with its trigger words: mycat"):
            sample(SampleConfig(content=file), tiny_base)


def test_lora_for_another_size_does_not_fit(tiny_base: Base, tmp_path: Path):
    pairs = tiny.random_lora(tiny.unet(block_out_channels=(8, 16, 64)), 1)
    write_lora(Lora(pairs), tmp_path / "wide.safetensors", dtype="fp32")
    with pytest.raises(UserError, match="does not fit base tiny-xl"):
        latents(SampleConfig(content=tmp_path / "wide.safetensors", prompts=["x"]), tiny_base)
    assert not adapted_layers(tiny_base.unet)


def test_unusable_sources_are_refused(tiny_base: Base, cat: Path, tmp_path: Path):
    def refused(message: str, **keys: object) -> None:
        with pytest.raises(UserError, match=message):
            sample(SampleConfig(**{"out": tmp_path / "out", **keys}), tiny_base)

    refused("no such run folder or LoRA file", content=tmp_path / "nowhere")
    refused("cannot be opened", content="x" * 300)
    refused("this is not a run folder", content=tmp_path)
    (tmp_path / "config.toml").touch()
    refused("the run is not finished", content=tmp_path)
    (tmp_path / "lora.safetensors").touch()
    refused(r"it contains lora\.safetensors: give the file that you mean", content=tmp_path)
    (tmp_path / "lora.safetensors").unlink()
    refused(
        "has no modules in block 'up_block'; it has down_blocks.1.attentions.0",
        content=cat,
        content_blocks=["up_block=0"],
    )
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps({}))
    refused("pickle", content=tmp_path / "evil.safetensors")
    plain = tmp_path / "plain.safetensors"
    write_lora(Lora(tiny.random_lora(tiny_base.unet, 1)), plain)
    refused("describe the image with --prompts", content=plain)
    refused("give --style-prompt", content=cat, style=plain, mode="separate", prompts=["x"])
    refused("is a file", content=cat, out=plain)
    assert not (tmp_path / "out").exists()


def test_unwritable_folder_is_a_machine_error(tiny_base: Base, cat: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="a file is where a folder should be"):
        sample(SampleConfig(content=cat, steps=1, out=tmp_path / "file" / "out"), tiny_base)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "nothing to show"),
        ({"prompts": [" "]}, "a prompt is empty"),
        ({"prompts": ["x"], "seeds": []}, "seeds"),
        ({"prompts": ["x"], "seeds": [-1]}, "from 0 on"),
        ({"prompts": ["x"], "steps": 0}, "steps: .*greater than or equal to 1"),
        ({"prompts": ["x"], "batch_size": 0}, "batch_size: .*greater than or equal to 1"),
        ({"prompts": ["x"], "width": 100}, "width: must be a multiple of 8; the nearest is 96"),
        ({"prompts": ["x"], "scheduler": "eular"}, "did you mean 'euler'"),
        ({"prompts": ["x"], "content_blocks": ["up=0"]}, "give --content too"),
        ({"style": "x", "content_strength": 0.5}, "content_strength without a content LoRA: give --content too"),
        ({"content": "x", "style_strength": 0}, "style_strength without a style LoRA: give --style too"),
        ({"content": "x", "content_blocks": ["up"]}, "write block=strength"),
        ({"content": "x", "content_blocks": ["up=much"]}, "write block=strength"),
        ({"content": "x", "content_strength": float("nan")}, "finite"),
        ({"content": "x", "mode": "separate"}, "give --content and --style"),
        ({"content": "x", "content_prompt": "a cat"}, "content_prompt is for two LoRAs"),
        ({"content": "x", "style": "y", "mode": "direct", "style_prompt": "ink"}, "style_prompt is for two LoRAs"),
        ({"prompts": ["x"], "stepps": 3}, "did you mean 'steps'"),
    ],
)
def test_contradictory_configurations_are_refused(keys: dict, message: str):
    with pytest.raises(UserError, match=message):
        resolve(SampleConfig, keys)


def test_scheduler_is_found_by_its_usual_names():
    assert SampleConfig(prompts=["x"], scheduler="DPM++ 2M Karras").scheduler == "dpm++_2m_karras"
    assert SampleConfig(prompts=["x"], scheduler="Euler a").scheduler == "euler_a"


def test_shared_name_is_that_of_the_link_and_keeps_other_dots(tmp_path: Path):
    (tmp_path / "31e35c80").touch()
    (tmp_path / "ink.safetensors").symlink_to(tmp_path / "31e35c80")
    files = [tmp_path / name for name in ("ink.safetensors", "ink-v1.5.safetensors", "ink-v1.6")]
    assert list(shared_names(files).values()) == ["ink", "ink-v1.5", "ink-v1.6"]


def test_files_of_one_name_are_shared_under_different_names(tmp_path: Path):
    names = ["cat/style", "cat/pytorch_lora_weights", "ink/pytorch_lora_weights", "x/a/lora", "y/a/lora"]
    files = [tmp_path / f"{name}.safetensors" for name in names]
    shared = ["cat-style", "cat-pytorch_lora_weights", "ink-pytorch_lora_weights", "a-lora", "a-lora-2"]
    assert shared_names(files) == dict(zip(files, shared, strict=True))
    assert shared_names(files[1:2]) == {files[1]: "pytorch_lora_weights"}


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [True, False])
def test_every_lora_file_is_read_once(
    tiny_base: Base, cat: Path, dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool
):
    read: list[Path] = []

    def counted(path: Path, *arguments: object) -> Lora:
        read.append(path)
        return read_lora(path, *arguments)

    monkeypatch.setattr("unziplora.sampling.session.read_lora", counted)
    monkeypatch.setattr("unziplora.sampling.session.open_base", lambda *_: tiny_base)
    base = tiny_base if loaded else None
    sample(SampleConfig(content=cat, style=dog, steps=1, seeds=[0, 1], out=tmp_path / "out"), base)
    assert read == [cat / "content.safetensors", dog / "style.safetensors"]
    file = cat / "style.safetensors"
    sample(SampleConfig(content=file, style=file, mode="direct", prompts=["x"], steps=1, out=tmp_path / "out"), base)
    assert read[2:] == [file]


@pytest.mark.parametrize(
    ("name", "method", "kind"),
    [
        ("freestyle-cat", None, "content"),
        ("lifestyle", None, "content"),
        ("cat", None, "content"),
        ("ink_style", None, "style"),
        ("PixelArtStyle", None, "style"),
        ("Styles-XL-v1.0", None, "style"),
        ("freestyle-cat", "UnZipLoRA (arXiv 2412.04465), style LoRA", "style"),
        ("ink_style", "UnZipLoRA (arXiv 2412.04465), content LoRA", "content"),
        ("ink_style", "ZipLoRA (arXiv 2311.13600), lora LoRA", "content"),
    ],
)
def test_a_file_is_a_style_by_its_header_or_a_word_of_its_name(
    tmp_path: Path, name: str, method: str | None, kind: str
):
    file = tmp_path / f"{name}.safetensors"
    save_file({"x": torch.zeros(1)}, file, {"unziplora.method": method} if method else None)
    assert loras_of(file) == {kind: file}


@pytest.mark.parametrize("kind", ["content", "style"])
@pytest.mark.parametrize("recorded", ["content", "style", "lora", None])
def test_file_of_the_other_kind_brings_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, recorded: str | None, kind: str
):
    header = {"unziplora.method": f"UnZipLoRA (arXiv 2412.04465), {recorded} LoRA"} if recorded else None
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", header)
    assert find_lora(tmp_path / "x.safetensors", kind).kind == kind
    swapped = f"x.safetensors: this is a {recorded} LoRA by its header, used for the {kind}"
    messages = [str(warning.message) for warning in recwarn]
    assert [swapped in message for message in messages] == ([] if recorded in (kind, "lora", None) else [True])


def test_path_of_the_bundled_base_is_the_bundled_base():
    sources = [
        LoraSource("content", Path("a.safetensors"), {"base": "bundled"}),
        LoraSource("style", Path("b.safetensors"), {"base": str(BUNDLED_BASE)}),
    ]
    assert choose_base(SampleConfig(content="a", style="b"), sources) == "bundled"


def test_own_words_with_braces_are_not_filled_again():
    settings = {"token": "sks", "content": "{cat}", "style": "ink", "content_prompt": "a {token} {content}"}
    source = LoraSource("content", Path("a.safetensors"), settings)
    assert plan_prompts(SampleConfig(content="a"), [source]) == [Prompts("a sks {cat}")]


@pytest.mark.parametrize(
    ("keys", "trained", "size"),
    [
        ({}, "832x1216", (832, 1216)),
        ({}, "384x672", (768, 1344)),  # trained at 512 pixels
        ({}, "1024x1024", (None, None)),
        ({}, "512x512", (None, None)),
        ({}, "0x0", (None, None)),
        ({}, "wide", (None, None)),
        ({"width": 512}, "832x1216", (512, None)),
        ({"width": 512, "height": 640}, "832x1216", (512, 640)),
    ],
)
def test_default_size_has_the_proportions_of_the_training(keys: dict, trained: str, size: tuple):
    header = {"modelspec.resolution": trained, "unziplora.version": "1"}
    config, scale = SampleConfig(content="a", **keys), Scale(1024, 8)
    assert choose_size(config, [LoraSource("content", Path("a"), header=header)], scale) == size
    foreign = LoraSource("content", Path("a"), header={"modelspec.resolution": trained})
    assert choose_size(config, [foreign], scale) == (config.width, config.height)


def test_weights_in_prompts_cause_one_warning(shared_base: Base):
    config = SampleConfig(prompts=["a (cat:1.2)", "the (cat:1.2) again"], negative="[blurry]")
    with pytest.warns(UserWarning, match=r"plain letters.*: \(cat:1.2\), \[blurry\]$") as caught:
        plan_sampling(config, shared_base)
    assert len(caught) == 1


def test_lora_of_another_base_is_noticed_before_weights_are_read(
    shared_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_lora(Lora(tiny.random_lora(shared_base.unet, 0)), tmp_path / "a.safetensors", dtype="fp32")
    monkeypatch.setattr("unziplora.sampling.session.open_base", lambda *_: pytest.fail("weights were read"))
    config = SampleConfig(content=str(tmp_path / "a.safetensors"), base="bundled", prompts=["a cat"])
    with pytest.raises(UserError, match=r"a\.safetensors does not fit base .*bundled.* in the LoRA and .* in the base"):
        sample(config)
