import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from unziplora.errors import MachineError, UserError
from unziplora.formats.safetensors import Header, read_header
from unziplora.models import hub as base_hub
from unziplora.models.base import BUNDLED, Base, borrowed, load_base
from unziplora.models.checkpoint import clip_tokenizer, is_full_size
from unziplora.models.device import computing_on, flushed_denormals, pick_device, pick_dtype
from unziplora.sampling.pipeline import Settings, generate


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that may be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folder_is_opened_frozen(shared_base: Base):
    assert shared_base.name == "tiny-xl"
    assert (shared_base.resolution, shared_base.prediction_type) == (64, "epsilon")
    assert not shared_base.zero_terminal_snr
    for part in [shared_base.unet, shared_base.vae, *shared_base.text_encoders]:
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_fingerprint_depends_on_the_weights_alone(fresh_base, shared_base: Base, tiny_folder: Path):
    half, other = load_base(str(tiny_folder), torch.bfloat16), fresh_base()
    assert half.fingerprint() == other.fingerprint() == shared_base.fingerprint()
    with torch.no_grad():
        other.unet.conv_out.bias += 0.1
    assert other.fingerprint() != shared_base.fingerprint()


def test_tiny_bases_share_no_unet(fresh_base, shared_base: Base):
    one, other = fresh_base(), fresh_base()
    assert len({id(base.unet) for base in (one, other, shared_base)}) == 3
    assert one.vae is shared_base.vae


def test_single_file_has_the_weights_of_the_folder(shared_base: Base, tiny_checkpoint: Path):
    loaded = load_base(str(tiny_checkpoint))
    assert (loaded.name, loaded.resolution) == ("tiny", 64)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected = getattr(shared_base.pipe, part).state_dict()
        result = getattr(loaded.pipe, part).state_dict()
        assert expected.keys() == result.keys()
        assert all(torch.equal(expected[key], result[key]) for key in expected)


def test_single_file_is_known_by_its_path(tiny_checkpoint: Path):
    assert load_base(str(tiny_checkpoint)).pipe.name_or_path == str(tiny_checkpoint)


def test_single_file_may_lie_inside_its_diffusers_folder(folder: Path, tiny_checkpoint: Path):
    shutil.copy(tiny_checkpoint, folder / "model.safetensors")
    assert load_base(str(folder / "model.safetensors")).name == "model"


def test_vae_stays_in_fp32_with_force_upcast(folder: Path, tiny_checkpoint: Path):
    for source in (folder, tiny_checkpoint):
        base = load_base(str(source), dtype=torch.bfloat16)
        assert base.dtype == torch.bfloat16
        assert base.text_encoders[1].dtype == torch.bfloat16
        assert base.vae.dtype == torch.float32
    edit(folder / "vae" / "config.json", force_upcast=False)
    assert load_base(str(folder), dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def test_fp16_files_serve_fp32_only_without_other_files(folder: Path, tiny_folder: Path):
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for path in (folder / part).glob("*.safetensors"):
            halves = {key: value.half() for key, value in load_file(path).items()}
            save_file(halves, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
            path.unlink()
    only_halves = load_base(str(folder))  # nothing else is there
    assert only_halves.dtype == torch.float32
    shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    expected = load_base(str(tiny_folder)).unet.conv_in.weight
    assert torch.equal(load_base(str(folder)).unet.conv_in.weight, expected)
    assert torch.equal(only_halves.unet.conv_in.weight, expected.half().float())


def test_single_parts_may_be_fp16_files(folder: Path):
    for path in (folder / "unet").glob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert load_base(str(folder)).unet.conv_in.weight.dtype == torch.float32


def test_shards_are_read_and_a_missing_one_is_named(folder: Path, shared_base: Base):
    next((folder / "unet").glob("*.safetensors")).unlink()
    shared_base.unet.save_pretrained(folder / "unet", max_shard_size="500KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_base(str(folder)).unet.conv_in.weight, shared_base.unet.conv_in.weight)
    shards[0].unlink()
    with pytest.raises(UserError, match=f"{shards[0].name}: missing"):
        load_base(str(folder))


def test_tiny_autoencoder_gives_the_pipelines_images(shared_base: Base, tmp_path: Path):
    """Small bases come with a VAE of TAESDXL's class."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    parts = {**shared_base.pipe.components, "vae": vae}
    type(shared_base.pipe)(**parts, add_watermarker=False).save_pretrained(tmp_path / "taesd")
    base = load_base(str(tmp_path / "taesd"))
    expected = base.pipe("a cat", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    (result,) = generate(base, "a cat", [0], Settings(steps=1))
    assert base.resolution == 64
    assert result.tobytes() == expected.tobytes()


def test_v_prediction_and_zero_terminal_snr_are_read_from_the_scheduler(folder: Path):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    base = load_base(str(folder))
    assert base.prediction_type == "v_prediction"
    assert base.zero_terminal_snr


def test_v_prediction_is_read_from_the_marks_of_a_single_file(tiny_checkpoint: Path, tiny_folder: Path, tmp_path: Path):
    marked = tmp_path / "marked.safetensors"
    save_file({**load_file(tiny_checkpoint), "v_pred": torch.ones(0), "ztsnr": torch.ones(0)}, marked)
    (tmp_path / "marked").symlink_to(tiny_folder)
    base = load_base(str(marked))
    assert base.prediction_type == "v_prediction"
    assert base.zero_terminal_snr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "inpainting"),
        ({"addition_embed_type": None}, "Stable Diffusion 1 or 2"),
    ],
)
def test_other_unets_are_refused(folder: Path, change: dict, message: str):
    edit(folder / "unet" / "config.json", **change)
    with pytest.raises(UserError, match=message):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "Stable Diffusion 1 or 2"),
        ({"_class_name": "FluxPipeline"}, "FLUX"),
        ({"_class_name": "SomethingNew"}, "SomethingNew"),
        ({"text_encoder": [None, None]}, "refiner"),
    ],
)
def test_other_pipelines_are_refused(folder: Path, change: dict, message: str):
    edit(folder / "model_index.json", **change)
    with pytest.raises(UserError, match=message):
        load_base(str(folder))


@pytest.mark.parametrize(
    "change", [{"prediction_type": "sample"}, {"_class_name": "EDMEulerScheduler"}, {"_class_name": "FlowMatchX"}]
)
def test_other_noise_schedules_are_refused(folder: Path, change: dict):
    edit(folder / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(UserError, match="noise schedule"):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["cond_stage_model.transformer.text_model.x", "model.diffusion_model.x"], "Stable Diffusion 1"),
        (["cond_stage_model.model.transformer.x", "model.diffusion_model.x"], "Stable Diffusion 2"),
        (["conditioner.embedders.0.model.x", "model.diffusion_model.x"], "refiner"),
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "FLUX"),
        (["lora_unet_input_blocks_4_1_proj_in.alpha"], "a LoRA"),
        (["down_blocks.0.resnets.0.conv1.weight"], "UNet alone"),
        (["model.diffusion_model.x", "conditioner.embedders.1.model.x"], "without VAE, first text encoder"),
        (["something"], "a file of an unknown kind"),
    ],
)
def test_other_single_files_are_refused(tmp_path: Path, keys: list[str], message: str):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(1) for key in keys}, path)
    with pytest.raises(UserError, match=message):
        load_base(str(path))


def test_small_checkpoint_without_configuration_names_the_missing_folder(tiny_checkpoint: Path, tmp_path: Path):
    path = Path(shutil.copy(tiny_checkpoint, tmp_path / "alone.safetensors"))
    with pytest.raises(UserError, match="put a folder 'alone' next"):
        load_base(str(path))


def test_inpainting_checkpoint_is_refused(tmp_path: Path):
    tiny.save_checkpoint(tiny.pipeline(in_channels=9), tmp_path / "inpaint.safetensors")
    with pytest.raises(UserError, match="inpainting"):
        load_base(str(tmp_path / "inpaint.safetensors"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_folder_with_a_part_missing_or_truncated_is_refused(folder: Path, part: str):
    weights = next((folder / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{part}/.*truncated"):
        load_base(str(folder))
    weights.unlink()
    with pytest.raises(UserError, match=f"{part}: the weights are missing"):
        load_base(str(folder))
    weights.with_suffix(".bin").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="pickle"):
        load_base(str(folder))


@pytest.mark.parametrize("part", ["unet/config.json", "vae/config.json", "scheduler", "tokenizer", "tokenizer_2"])
def test_incomplete_folder_is_refused(folder: Path, part: str):
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=f"{part.split('/')[0]}.*missing"):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("key", "value"), [("version", "1"), ("padding", 0), ("pre_tokenizer", {"type": "x"}), ("decoder", [1])]
)
def test_folder_with_a_damaged_tokenizer_is_refused(folder: Path, key: str, value: object):
    path = folder / "tokenizer_2" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=r"cannot be loaded: .*Download it again"):
        load_base(str(folder))


def test_checkpoint_with_weights_missing_is_refused(tiny_checkpoint: Path, tiny_folder: Path, tmp_path: Path):
    tensors = load_file(tiny_checkpoint)
    del tensors["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    (tmp_path / "less").symlink_to(tiny_folder)
    with pytest.raises(UserError, match="weights are missing from the file"):
        load_base(str(tmp_path / "less.safetensors"))


def test_folder_with_weights_missing_is_refused(folder: Path):
    path = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    del tensors["mid_block.resnets.0.conv1.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"missing, such as mid_block\.resnets\.0\.conv1\.weight"):
        load_base(str(folder))


def test_pickles_are_refused_under_any_name(tmp_path: Path):
    for name in ("base.ckpt", "base.pt", "base.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(UserError, match="pickle"):
            load_base(str(tmp_path / name))


def test_truncated_and_foreign_files_are_refused(tiny_checkpoint: Path, tmp_path: Path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(tiny_checkpoint.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        load_base(str(path))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6938078334\n")
    with pytest.raises(UserError, match="git lfs pull"):
        load_base(str(path))
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"not a \.safetensors file"):
        load_base(str(tmp_path / "base.gguf"))


def test_missing_bases_are_refused(tmp_path: Path):
    for source in (
        tmp_path / "nowhere",
        "nowhere.safetensors",
        "a/b.safetensors",
        "not a name",
        "./a",
        "../a",
        "a/b--c",
    ):
        with pytest.raises(UserError, match="no such file or folder"):
            load_base(str(source))
    with pytest.raises(UserError, match=r"model_index\.json is missing"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("part", ["text_encoder_2", "vae"])
def test_pipeline_in_memory_needs_all_parts(fresh_base: Callable[[], Base], part: str):
    pipe = fresh_base().pipe
    setattr(pipe, part, None)
    with pytest.raises(UserError, match="a base of SDXL's topology is needed"), borrowed(pipe):
        pass


@pytest.mark.parametrize(("name", "variant"), [("unet/a.fp16.safetensors", "fp16"), ("unet/a.safetensors", None)])
def test_fp16_files_serve_fp32_where_there_are_no_others(monkeypatch: pytest.MonkeyPatch, tiny_folder, name, variant):
    names, asked = ["model_index.json", name], {}
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in names])
    monkeypatch.setattr("huggingface_hub.model_info", lambda source: info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(tiny_folder / "model_index.json"))

    def download(source: str, **options: object) -> str:
        asked.update(options)
        return str(tiny_folder)

    monkeypatch.setattr(base_hub.StableDiffusionXLPipeline, "download", download)
    base_hub.download("somebody/some-xl", torch.float32)
    assert asked["variant"] == variant


def test_unreachable_hub_is_a_machine_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MachineError, match=r"no such folder here.* the hub cannot be reached"):
        load_base("somebody/some-xl")


def test_hub_model_is_checked_and_then_opened_as_a_folder(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, shared_base: Base
):
    class Info:
        siblings = ()

    class File:
        rfilename = "model_index.json"

    info = Info()
    monkeypatch.setattr("huggingface_hub.model_info", lambda source: info)
    with pytest.raises(UserError, match="not a diffusers pipeline"):
        load_base("somebody/some-xl")
    info.siblings = (File(),)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(tiny_folder / "model_index.json"))
    monkeypatch.setattr(base_hub.StableDiffusionXLPipeline, "download", lambda *a, **k: str(tiny_folder))
    base = load_base("somebody/some-xl")
    assert base.name == "somebody/some-xl"
    assert torch.equal(base.unet.conv_in.weight, shared_base.unet.conv_in.weight)


def test_full_memory_is_a_machine_error(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path):
    def full(*args: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr("unziplora.models.base.StableDiffusionXLPipeline.from_pretrained", full)
    with pytest.raises(MachineError, match="not enough memory"):
        load_base(str(tiny_folder))


def test_configuration_of_sdxl_checkpoints_has_sdxls_sizes():
    """Parameter counts of stabilityai/stable-diffusion-xl-base-1.0."""
    folder = BUNDLED / "sdxl"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
        first = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / "text_encoder_2"))
    counts = [sum(p.numel() for p in part.parameters()) for part in (unet, first, second)]
    assert counts == [2_567_463_684, 123_060_480, 694_659_840]
    shapes = {"model.diffusion_model." + tiny._unet_key(k): tuple(v.shape) for k, v in unet.state_dict().items()}
    assert is_full_size(Header(shapes, {}))


def test_tokenizer_of_sdxl_checkpoints_gives_clips_ids():
    """Token ids of openai/clip-vit-large-patch14."""
    first, second = clip_tokenizer(), clip_tokenizer(pad="!")
    assert first("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert first("a", padding="max_length", max_length=5).input_ids == [49406, 320, 49407, 49407, 49407]
    assert second("a", padding="max_length", max_length=5).input_ids == [49406, 320, 49407, 0, 0]


def test_small_checkpoint_is_not_taken_for_full_size(tiny_checkpoint: Path):
    assert not is_full_size(read_header(tiny_checkpoint))


@pytest.mark.parametrize(("real", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_gpu_that_only_emulates_bf16_computes_in_fp16(monkeypatch: pytest.MonkeyPatch, real: bool, dtype: torch.dtype):
    """On Turing and older, torch reports bf16 as supported if emulation counts."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(asked.append(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: real or including_emulation)
    assert pick_dtype("auto", torch.device("cuda:1")) == dtype
    assert asked == [torch.device("cuda:1")]


def test_device_and_precision_by_name():
    assert pick_device("cpu").type == "cpu"
    assert pick_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="not available"):
        pick_device("toaster")
    for name in ("meta", "hpu"):
        with pytest.raises(UserError, match=f"device '{name}' is not available here"):
            pick_device(name)
    assert pick_dtype("auto", "cpu") == torch.float32
    assert pick_dtype("bf16", "cpu") == torch.bfloat16


def product_of_denormals() -> float:
    return (torch.tensor([1e-40]) * 1).item()


@pytest.mark.parametrize("before", [True, False])
def test_denormals_are_flushed_on_a_cpu_and_restored(before: bool):
    if not torch.set_flush_denormal(before):
        pytest.skip("this processor cannot")
    try:
        with flushed_denormals(torch.device("cpu")):
            assert product_of_denormals() == 0
        assert (product_of_denormals() == 0) == before
        with flushed_denormals(torch.device("cuda")):
            assert (product_of_denormals() == 0) == before
    finally:
        torch.set_flush_denormal(True)


def test_loading_a_base_leaves_denormals_alone(tiny_folder: Path):
    torch.set_flush_denormal(False)
    try:
        load_base(str(tiny_folder))
        assert product_of_denormals() > 0
    finally:
        torch.set_flush_denormal(True)


def test_computing_on_makes_a_gpu_current_only_inside(monkeypatch: pytest.MonkeyPatch):
    events: list[object] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        events.append(device)
        yield
        events.append("restored")

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: events.append("set"))
    device = torch.device("cuda:1")
    with computing_on(device):
        assert events == [torch.device("cuda:1")]
    assert events == [torch.device("cuda:1"), "restored"]


def test_device_is_named_as_its_tensors_name_it(monkeypatch: pytest.MonkeyPatch):
    """A GPU without a number would seem another device than the one that its tensors are on."""
    numbered = SimpleNamespace(item=lambda: 0.0, device=torch.device("cuda:0"))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: numbered)
    assert pick_device("cuda") == torch.device("cuda:0")


def test_folder_name_keeps_its_dots(tiny_folder: Path, tmp_path: Path):
    (tmp_path / "sdxl-v1.0").symlink_to(tiny_folder)
    assert load_base(str(tmp_path / "sdxl-v1.0")).name == "sdxl-v1.0"
