"""Sound inputs of every sort, which the fuzzed ones are made from."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from torch import Tensor

from reliability.workshop import Workshop
from tests import tiny
from unziplora.formats.files import write_lora
from unziplora.lora.weights import Lora

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def make_corpus(shop: Workshop, folder: Path, finished: Path) -> None:
    """Write sound inputs into folders named after their sort.

    Args:
        finished: a finished run.
    """
    for name in ("lora", "peft", "image", "checkpoint", "base", "run", "toml"):
        (folder / name).mkdir(parents=True)
    _loras(shop, folder / "lora")
    _peft(shop, folder / "peft" / "adapter")
    _images(folder / "image")
    tiny.save_checkpoint(shop.base.pipe, folder / "checkpoint" / "tiny.safetensors")
    shutil.copytree(shop.folder / "tiny-xl", folder / "checkpoint" / "tiny")  # its configuration
    shutil.copytree(shop.folder / "tiny-xl", folder / "base" / "tiny-xl")
    shutil.copytree(finished, folder / "run" / "cat")
    _tables(shop, folder / "toml", finished)


def _loras(shop: Workshop, folder: Path) -> None:
    pairs = tiny.random_lora(shop.base.unet, 1)
    few = {path: pairs[path] for path in [*list(pairs)[:6], Q]}
    text = {TEXT: (torch.ones(2, 16), torch.ones(16, 2))}
    for layout in ("kohya", "diffusers"):
        write_lora(Lora(few, text=text), folder / f"{layout}.safetensors", layout)
    down, up = pairs[Q]
    kohya = "lora_unet_" + Q.replace(".", "_")
    layouts: dict[str, dict[str, Tensor]] = {
        "double_prefix": {f"unet.unet.{Q}.lora.down.weight": down, f"unet.unet.{Q}.lora.up.weight": up},
        "peft_keys": {f"base_model.model.{Q}.lora_A.weight": down, f"base_model.model.{Q}.lora_B.weight": up},
        "loha": {f"{kohya}.hada_{part}": down for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
        "dora": {
            f"{kohya}.lora_down.weight": down,
            f"{kohya}.lora_up.weight": up,
            f"{kohya}.dora_scale": torch.ones(up.shape[0], 1),
        },
        "alpha": {
            f"{kohya}.lora_down.weight": down,
            f"{kohya}.lora_up.weight": up,
            f"{kohya}.alpha": torch.tensor(2.0),
        },
    }
    adapter = {"lora_alpha": 4, "r": 2, "alpha_pattern": {"to_q": 8}, "rank_pattern": {}, "peft_type": "LORA"}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in adapter.items()})}
    for name, tensors in layouts.items():
        copies = {key: value.clone().contiguous() for key, value in tensors.items()}
        save_file(copies, folder / f"{name}.safetensors", metadata | {"ss_tag_frequency": '{"a": {"sks cat": 3}}'})


def _peft(shop: Workshop, folder: Path) -> None:
    folder.mkdir()
    down, up = tiny.random_lora(shop.base.unet, 1)[Q]
    tensors = {f"base_model.model.{Q}.lora_A.weight": down, f"base_model.model.{Q}.lora_B.weight": up}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["to_q"],
        "alpha_pattern": {"mid_block": 8},
        "rank_pattern": {"to_q": 2},
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _images(folder: Path) -> None:
    image = Image.effect_mandelbrot((40, 32), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", json.dumps({"nodes": ["x"] * 50}), zip=True)
    text.add_itxt("parameters", "a cat")
    image.save(folder / "text.png", pnginfo=text)
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("P").save(folder / "palette.png", transparency=3)
    image.convert("I;16").save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif, progressive=True)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "image.webp", lossless=True)
    image.save(folder / "image.bmp")
    image.save(folder / "image.tif", compression="tiff_lzw")
    image.save(folder / "frames.gif", save_all=True, append_images=[image.rotate(90)])
    for file in list(folder.iterdir()):
        Image.open(io.BytesIO(file.read_bytes())).load()


def _tables(shop: Workshop, folder: Path, finished: Path) -> None:
    shutil.copy(finished / "config.toml", folder / "split.toml")
    (folder / "blocks.toml").write_text(
        'content = ["up_blocks.0.attentions.0"]\nstyle = ["up_blocks.0.attentions.1", "mid_block.attentions.0"]\n'
    )
    (folder / "settings.toml").write_text("[unziplora]\nsteps = 3\n[dreambooth.content]\nrank = 4\n[blora]\nrank = 2\n")
    words = [
        f'["{image}"]\ncontent = "{word}"\nstyle = "ink"\n'
        for image, word in (("text.png", "cat"), ("turned.jpg", "fox"))
    ]
    (folder / "words.toml").write_text("".join(words))
