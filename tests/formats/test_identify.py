import pytest
import sdxl

from unziplora.formats import identify

TRANSFORMER = "a diffusion transformer (SD3, FLUX, Qwen-Image, LTX …)"
SDXL_CHECKPOINT = (
    "model.diffusion_model.label_emb.0.0.weight",
    "first_stage_model.decoder.conv_in.weight",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
    "conditioner.embedders.1.model.text_projection",
)


@pytest.mark.parametrize(
    ("names", "kind", "family"),
    [
        (SDXL_CHECKPOINT, identify.CHECKPOINT, None),
        ([f"{kohya}.lora_up.weight" for kohya, *_ in sdxl.recorded()], identify.LORA, None),
        ([f"unet.{path}.lora_B.weight" for _, path, _ in sdxl.recorded()], identify.LORA, None),
        ([path + ".weight" for _, path, _ in sdxl.recorded()], "a UNet alone (plain weights)", None),
        (["unet.mid_block.attentions.0.proj_in.hada_w1_a"], identify.LORA, None),
        (["model.diffusion_model.double_blocks.0.img_mod.lin.weight"], identify.CHECKPOINT, "FLUX or HunyuanVideo"),
        (["lora_unet_double_blocks_0_img_mod_lin.lora_up.weight"], identify.LORA, "FLUX or HunyuanVideo"),
        (["transformer_blocks.0.attn.add_q_proj.lora_A.weight"], identify.LORA, TRANSFORMER),
        (["diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight"], identify.LORA, TRANSFORMER),
        (["lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight"], identify.LORA, TRANSFORMER),
        (["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"], identify.LORA, None),
        ([*SDXL_CHECKPOINT, "edm_mean"], identify.CHECKPOINT, "Playground 2.5 (EDM noise schedule)"),
        ([*SDXL_CHECKPOINT, "edm_vpred.sigma_max"], identify.CHECKPOINT, "CosXL (EDM noise schedule)"),
        (["control_model.x", "model.diffusion_model.x"], "a ControlNet", None),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a file of plain weights", None),
        (["something"], "a file of an unknown kind", None),
        (
            ["state.method.content.mid_block.attentions.0.to_q.lora_A"],
            "a checkpoint that its run continues from",
            None,
        ),
        ([], "a file without tensors", None),
    ],
)
def test_kind_and_family_follow_from_the_names_of_tensors(names, kind, family):
    assert (identify.kind(names), identify.family(names)) == (kind, family)


@pytest.mark.parametrize(
    ("class_name", "family"),
    [
        ("StableDiffusionPipeline", "Stable Diffusion 1 or 2"),
        ("StableDiffusion3Img2ImgPipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "FLUX"),
        ("Flux2Pipeline", "FLUX.2"),
        ("PixArtAlphaPipeline", "PixArt"),
        ("KolorsPipeline", "Kolors"),
        ("SomethingNew", "a SomethingNew"),
    ],
)
def test_every_pipeline_of_a_family_is_named(class_name, family):
    assert identify.pipeline_family(class_name) == family
