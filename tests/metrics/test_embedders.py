from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from unziplora.errors import UserError
from unziplora.metrics.embedders import ImageModel

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
IMAGES = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("RGB", (40, 40), "red")]


def clip_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def csd(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SMALL, intermediate_size=32, projection_dim=12)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "csd")
    clip_processor().save_pretrained(tmp_path / "csd")
    return tmp_path / "csd"


def save_dino(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


class TestCsd:
    def test_rows_are_the_projected_embeddings_at_unit_length(self, csd):
        rows = ImageModel("csd", str(csd)).embed(IMAGES)
        pixels = clip_processor()([p.convert("RGB") for p in IMAGES], return_tensors="pt")["pixel_values"]
        model = CLIPVisionModelWithProjection.from_pretrained(csd)
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        expected = pooled @ model.visual_projection.weight.T
        torch.testing.assert_close(rows, expected.detach() / expected.detach().norm(dim=1, keepdim=True))

    def test_fingerprint_is_of_the_type_and_the_weights(self, csd, tmp_path):
        first = ImageModel("csd", str(csd)).fingerprint()
        assert first == ImageModel("csd", str(csd)).fingerprint()
        assert first.startswith("clip_vision_model ")
        other = CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, intermediate_size=32, projection_dim=12))
        other.save_pretrained(tmp_path / "other")
        clip_processor().save_pretrained(tmp_path / "other")
        assert ImageModel("csd", str(tmp_path / "other")).fingerprint() != first

    def test_model_without_projection_is_refused(self, tmp_path):
        CLIPVisionModel(CLIPVisionConfig(**SMALL, intermediate_size=32)).save_pretrained(tmp_path)
        clip_processor().save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"visual_projection.weight is not in its weights"):
            ImageModel("csd", str(tmp_path))

    def test_refuses_a_model_of_another_kind(self, tmp_path):
        folder = save_dino(ViTModel(ViTConfig(**SMALL, intermediate_size=32)), tmp_path)
        with pytest.raises(UserError, match="this is a vit model; give a CLIPVisionModelWithProjection"):
            ImageModel("csd", folder)


class TestDino:
    def test_rows_are_the_class_tokens_at_unit_length(self, tmp_path):
        config = ViTConfig(**SMALL, intermediate_size=32)
        for model in (ViTModel(config, add_pooling_layer=False), Dinov2Model(Dinov2Config(**SMALL))):
            torch.manual_seed(1)
            folder = save_dino(model.eval(), tmp_path / type(model).__name__)
            rows = ImageModel("dino", folder).embed(IMAGES)
            process = ViTImageProcessor.from_pretrained(folder)
            pixels = process([p.convert("RGB") for p in IMAGES], return_tensors="pt")["pixel_values"]
            token = model(pixel_values=pixels).last_hidden_state[:, 0].detach()
            torch.testing.assert_close(rows, token / token.norm(dim=1, keepdim=True))

    def test_pickled_weights_and_empty_folders_are_refused(self, tmp_path):
        with pytest.raises(UserError, match="no model can be loaded from here"):
            ImageModel("dino", str(tmp_path))
        folder = Path(save_dino(ViTModel(ViTConfig(**SMALL, intermediate_size=32)), tmp_path / "vit"))
        weights = ViTModel.from_pretrained(folder).state_dict()
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"--dino .*no model can be loaded"):
            ImageModel("dino", str(folder))


class TestClip:
    def test_rows_are_the_image_embeddings(self, tmp_path):
        torch.manual_seed(2)
        vision = {**SMALL, "intermediate_size": 32}
        config = CLIPConfig(text_config=tiny.text_config(16, 2).to_dict(), vision_config=vision, projection_dim=12)
        model, processor = CLIPModel(config).eval(), CLIPProcessor(clip_processor(), tiny.tokenizer())
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        images = [image.convert("RGB") for image in IMAGES]
        with torch.no_grad():
            made = model(**processor(text=["a"], images=images, return_tensors="pt"))
        torch.testing.assert_close(ImageModel("clip", str(tmp_path)).embed(IMAGES), made.image_embeds)

    def test_other_models_are_refused(self, csd):
        with pytest.raises(UserError, match="give a CLIP model"):
            ImageModel("clip", str(csd))
