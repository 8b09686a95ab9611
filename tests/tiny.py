"""A randomly initialized pipeline of SDXL's topology, small enough for tests, and its checkpoint layouts."""

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from unziplora.lora.inject import attention_linears

WIDTHS = (16, 24)  # of the two text encoders; single-file loading tells them apart by width
SIDE = 64  # pixels
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def vocabulary() -> dict[str, int]:
    """CLIP's vocabulary without merges: every byte, every byte at a word's end, and the two markers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary(), merges=[], pad_token=pad, model_max_length=77)


def text_config(width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_act="quick_gelu" if width == WIDTHS[0] else "gelu",
    )


def unet(**changes: object) -> UNet2DConditionModel:
    config = {
        "sample_size": SIDE // 8,
        "block_out_channels": (8, 16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": sum(WIDTHS),
        "norm_num_groups": 4,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTHS[1],
    }
    return UNet2DConditionModel(**{**config, **changes})


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def pipeline(seed: int = 0, **changes: object) -> StableDiffusionXLPipeline:
    """The whole pipeline; `changes` go into the UNet's configuration. The caller's RNG is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = CLIPTextModel(text_config(WIDTHS[0], 2)).eval()
        # original SDXL checkpoints are known by a key of layer 9 of the second text encoder
        second = CLIPTextModelWithProjection(text_config(WIDTHS[1], 10)).eval()
        pipe = StableDiffusionXLPipeline(
            vae=vae().eval(),
            text_encoder=first,
            text_encoder_2=second,
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer("!"),
            unet=unet(**changes).eval(),
            scheduler=EulerDiscreteScheduler(**SCHEDULER),
            add_watermarker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_lora(unet: torch.nn.Module, seed: int, paths: list[str] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """A rank-2 LoRA, on all attention linears by default, strong enough to change pictures visibly."""
    draw = torch.Generator().manual_seed(seed)
    pairs = {}
    for path in paths or attention_linears(unet):
        out, *wide = unet.get_submodule(path).weight.shape
        up = torch.randn(out, 2, *[1] * (len(wide) - 1), generator=draw) / 4
        pairs[path] = (torch.randn(2, *wide, generator=draw) / 4, up)
    return pairs


def save_checkpoint(pipe: StableDiffusionXLPipeline, path: Path) -> None:
    """Write one file in the layout of the original SDXL checkpoints (sgm names, as finetunes come)."""
    tensors: dict[str, Tensor] = {}
    for key, value in pipe.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet_key(key)] = value
    for key, value in pipe.vae.state_dict().items():
        name = _vae_key(key)
        if ".attn_1." in name and value.ndim == 2:
            value = value[:, :, None, None]
        tensors["first_stage_model." + name] = value
    for key, value in pipe.text_encoder.state_dict().items():
        name = "text_model." + key.removeprefix("text_model.")
        tensors["conditioner.embedders.0.transformer." + name] = value
    tensors.update(_open_clip(pipe.text_encoder_2.state_dict()))
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)


def _unet_key(key: str) -> str:
    heads = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for new, old in heads.items():
        if key.startswith(new + "."):
            key = old + key[len(new) :]
    rules = [
        (r"down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{1 + 3 * int(m[1]) + int(m[2])}.0"),
        (r"down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{1 + 3 * int(m[1]) + int(m[2])}.1"),
        (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 + 3 * int(m[1])}.0.op"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0"),
        (r"up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1"),
        (r"up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"output_blocks.{2 + 3 * int(m[1])}.2.conv"),
    ]
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    if re.match(r"(input_blocks|output_blocks)\.\d\.0\.|middle_block\.[02]\.", key):
        for new, old in {
            ".norm1.": ".in_layers.0.",
            ".conv1.": ".in_layers.2.",
            ".norm2.": ".out_layers.0.",
            ".conv2.": ".out_layers.3.",
            ".time_emb_proj.": ".emb_layers.1.",
            ".conv_shortcut.": ".skip_connection.",
        }.items():
            key = key.replace(new, old)
    return key


def _vae_key(key: str) -> str:
    key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", key)
    key = re.sub(r"down_blocks\.(\d)", r"down.\1", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for new, old in {
        ".resnets.": ".block.",
        "conv_shortcut": "nin_shortcut",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "mid_block.attentions.0.to_": "mid.attn_1.",
        "conv_norm_out": "norm_out",
    }.items():
        key = key.replace(new, old)
    return key


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            value = torch.cat([state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for new, old in {
            "encoder.layers.": "transformer.resblocks.",
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
            "self_attn.out_proj": "attn.out_proj",
            "final_layer_norm": "ln_final",
            "embeddings.token_embedding": "token_embedding",
            "embeddings.position_embedding.weight": "positional_embedding",
        }.items():
            name = name.replace(new, old)
        if name == "text_projection.weight":
            name, value = "text_projection", value.T
        tensors["conditioner.embedders.1.model." + name] = value
    return tensors
