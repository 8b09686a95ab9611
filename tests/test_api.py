"""The Python front door on the tiny base."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unziplora
from unziplora.config.split import SplitConfig
from unziplora.models.base import Base, load_base
from unziplora.runs.folder import RunFolder

TINY = {
    "steps": 2,
    "rank": 2,
    "column_separation": False,
    "sample_steps": 1,
    "sample_seeds": [0],
    "style_learning_rate": 1e-1,
    "content_learning_rate": 1e-1,
    "progress": False,
}
NOTEBOOK = Path(__file__).parents[1] / "examples" / "split.ipynb"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((64, 64), 80).convert("RGB")


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> unziplora.Run:
    out = tmp_path_factory.mktemp("runs") / "cat"
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    return unziplora.split(noise, content="cat", style="ink", base=tiny_folder, out=out, **TINY)


def test_import_loads_neither_torch_nor_pydantic() -> None:
    code = "import sys, unziplora; print({'torch', 'pydantic', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_every_public_name_loads() -> None:
    assert all(getattr(unziplora, name) is not None for name in unziplora.__all__)
    assert set(unziplora.__all__) <= set(dir(unziplora))
    with pytest.raises(AttributeError, match="splitt"):
        _ = unziplora.splitt


@pytest.mark.slow
def test_split_writes_both_loras_and_their_sheet(run: unziplora.Run) -> None:
    assert set(run.loras) == {"content", "style"}
    assert run._repr_png_().startswith(b"\x89PNG")
    assert run.card.is_file()


@pytest.mark.slow
def test_run_folders_are_named_after_the_file_and_numbered(tiny_folder: Path, image: Image.Image) -> None:
    image.save("My cat.png")
    settings = {"content": "cat", "style": "ink", "base": tiny_folder, **TINY, "sample_seeds": []}
    runs = [unziplora.split("My cat.png", **settings) for _ in range(2)]
    assert [run.path for run in runs] == [Path("runs/My-cat"), Path("runs/My-cat-2")]


@pytest.mark.slow
def test_image_in_memory_gives_what_its_file_gives(tiny_folder: Path, image: Image.Image) -> None:
    image.save("cat.png")
    settings = {"content": "cat", "style": "ink", "base": tiny_folder, **TINY, "sample_seeds": []}
    one = unziplora.split(image, out="one", **settings)
    two = unziplora.split("cat.png", out="two", **settings)
    for name in ("content", "style"):
        first, second = (unziplora.read_lora(run.loras[name]).modules for run in (one, two))
        assert all(torch.equal(a, b) for path in first for a, b in zip(first[path], second[path], strict=True))


def test_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = RunFolder(tmp_path / "home" / "runs" / "cat")
    config = SplitConfig(images=["cat.png"], content="cat", style="ink", base="bundled", out=run.path)
    with RunFolder.created(run.path, config):
        run.log(step=1)
    run.checkpoint(1, lambda file: file.write(b"state"))
    assert [one.run.path for one in unziplora.find_runs("~/runs")] == [run.path]
    assert unziplora.Queue("~/runs").add("~/runs/cat")[0].run.path == run.path
    for request in ({"resume": True}, {"extend": 2}):
        with pytest.raises(unziplora.UserError, match=r"home/runs/cat|cat\.png"):
            unziplora.split(out="~/runs/cat", progress=False, **request)
    with pytest.raises(unziplora.UserError, match=r"home/photos: a batch is a folder|home/photos: no such"):
        unziplora.batch("~/photos", content="cat", style="ink", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["feed-forward", "convolutions"])
def test_layers_that_read_no_prompts_learn_alone(tiny_folder: Path, image: Image.Image, target: str) -> None:
    settings = {"content": "cat", "style": "ink", "base": tiny_folder, **TINY, "block_separation": False}
    run = unziplora.split(image, out="cat", targets=[target], phrase_steps=2, **settings)
    found = unziplora.read_lora(run.loras["content"]).modules
    assert found
    assert not any(".attn" in path for path in found)


@pytest.mark.slow
def test_interrupted_run_is_resumed_from_its_folder(tiny_folder: Path, image: Image.Image) -> None:
    def stop_at_the_first_step(event: object) -> None:
        if event.step == 1:
            raise KeyboardInterrupt

    settings = {"content": "cat", "style": "ink", "base": tiny_folder, **TINY, "checkpoint_every": 1}
    with pytest.raises((unziplora.Interrupted, KeyboardInterrupt)):
        unziplora.split(image, out="cat", **{**settings, "progress": stop_at_the_first_step})
    run = unziplora.split(out="cat", resume=True, progress=False)
    assert set(run.loras) == {"content", "style"}


def snapshot(base: Base) -> dict[str, object]:
    """Everything of a pipeline that a call could leave changed."""
    parts = {"unet": base.unet, "vae": base.vae, "one": base.text_encoders[0], "two": base.text_encoders[1]}
    return {
        **{f"{name} {key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()},
        **{f"{name} mode": part.training for name, part in parts.items()},
        **{f"{name} modules": [key for key, _ in part.named_modules()] for name, part in parts.items()},
        **{f"{name} trains": [p.requires_grad for p in part.parameters()] for name, part in parts.items()},
        "scheduler": dict(base.scheduler.config),
    }


def equal(one: object, two: object) -> bool:
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_pipeline_in_memory_is_left_as_it_was(tiny_folder: Path, image: Image.Image, training: bool) -> None:
    base = load_base(str(tiny_folder))
    base.unet.train(training).requires_grad_(training)
    before = snapshot(base)
    run = unziplora.split(image, content="cat", style="ink", pipe=base.pipe, **TINY)
    unziplora.sample(run, pipe=base.pipe, steps=1, progress=False)
    after = snapshot(base)
    assert before.keys() == after.keys()
    assert all(equal(before[key], after[key]) for key in before)


@pytest.mark.slow
def test_run_on_a_loaded_base_finds_it_again(tiny_folder: Path, image: Image.Image) -> None:
    settings = {"content": "cat", "style": "ink", **TINY, "sample_seeds": []}
    run = unziplora.split(image, base=load_base(str(tiny_folder)), **settings)
    assert len(unziplora.sample(run, steps=1, progress=False)) == 1


def test_base_and_pipe_together_are_refused(tiny_base: Base, image: Image.Image) -> None:
    with pytest.raises(unziplora.UserError, match="one of them"):
        unziplora.split(image, content="cat", style="ink", base="bundled", pipe=tiny_base.pipe, **TINY)


def test_unknown_key_names_the_nearest(image: Image.Image) -> None:
    with pytest.raises(unziplora.UserError, match="did you mean 'rank'"):
        unziplora.split(image, content="cat", style="ink", base="bundled", rnak=3)


def test_samples_contain_their_settings_and_are_saved_where_asked(run: unziplora.Run, tiny_base: Base) -> None:
    images = unziplora.sample(content=run, prompts="a sks cat", base=tiny_base, steps=1, seeds=[3, 4], progress=False)
    assert [json.loads(image.info["unziplora"])["seed"] for image in images] == [3, 4]
    assert not Path("samples").exists()
    (saved,) = unziplora.sample(run, base=tiny_base, steps=1, out="here", progress=False)
    with Image.open("here/0.png") as file:
        assert file.text["unziplora"] == saved.info["unziplora"]


@pytest.mark.slow
def test_grid_is_a_labeled_sheet(run: unziplora.Run, tiny_base: Base) -> None:
    sheet = unziplora.grid(run, base=tiny_base, steps=1, style_strengths=[0, 1], out="grid.png", progress=False)
    assert sheet.width > 2 * 64
    assert Path("grid.png").is_file()


def test_zip_merges_two_runs(run: unziplora.Run) -> None:
    merged = unziplora.zip_loras(run, run, method="direct", progress=False)
    assert merged.path == Path("runs/cat-cat")
    assert list(merged.loras) == ["lora"]


def prediction(pipe: object) -> torch.Tensor:
    """The UNet's prediction on fixed inputs."""
    draw = torch.Generator().manual_seed(0)
    config = pipe.unet.config
    pooled = pipe.unet.add_embedding.linear_1.in_features - 6 * config.addition_time_embed_dim
    with torch.no_grad():
        return pipe.unet(
            torch.randn(1, config.in_channels, 8, 8, generator=draw),
            10,
            torch.randn(1, 7, config.cross_attention_dim, generator=draw),
            added_cond_kwargs={"text_embeds": torch.randn(1, pooled, generator=draw), "time_ids": torch.ones(1, 6)},
        ).sample


def dense(pipe: object, loras: dict[str, float], run: unziplora.Run) -> object:
    """A copy of a pipeline's UNet with strength · B A added to its weights."""
    changed = copy.copy(pipe)
    changed.register_modules(unet=copy.deepcopy(pipe.unet))
    for name, strength in loras.items():
        for path, (down, up) in unziplora.read_lora(run.loras[name]).modules.items():
            changed.unet.get_submodule(path).weight.data += strength * up @ down
    return changed


@pytest.mark.parametrize("images", [np.zeros((8, 8, 3)), [np.zeros((8, 8, 3))], torch.zeros(3, 8, 8), b"cat.png", None])
def test_what_is_no_image_is_named(images: object) -> None:
    with pytest.raises(unziplora.UserError, match=r"is neither a path nor a PIL image; Image\.fromarray"):
        unziplora.split(images, content="cat", style="ink", base="bundled")  # type: ignore[arg-type]


def test_run_of_a_folder_without_loras_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = unziplora.Run("~/typo")  # type: ignore[arg-type]
    assert run.path == tmp_path / "typo"
    with pytest.raises(unziplora.UserError, match="typo: no finished run with LoRAs is here"):
        run.load_into(None)  # type: ignore[arg-type]


def test_base_is_opened_by_the_names_of_the_keys(tiny_folder: Path) -> None:
    base = unziplora.load_base(tiny_folder, "bf16", device="cpu")
    assert (base.unet.dtype, base.unet.device) == (torch.bfloat16, torch.device("cpu"))
    with pytest.raises(unziplora.UserError, match="device 'toaster' is not available here"):
        unziplora.load_base(tiny_folder, device="toaster")


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")
def test_loaded_runs_equal_dense_products_and_replace_each_other(tiny_folder: Path, run: unziplora.Run) -> None:
    pipe, plain = load_base(str(tiny_folder)).pipe, load_base(str(tiny_folder)).pipe
    run.load_into(pipe, content=0.7, style=0.3)
    both = dense(plain, {"content": 0.7, "style": 0.3}, run)
    torch.testing.assert_close(prediction(pipe), prediction(both), rtol=1e-4, atol=1e-5)
    run.load_into(pipe, content=1.0, style=None)
    changed = dense(plain, {"content": 1.0, "style": 0.3}, run)
    torch.testing.assert_close(prediction(pipe), prediction(changed), rtol=1e-4, atol=1e-5)
    pipe.set_adapters(["content", "style"], [0.5, 0.0])
    half = dense(plain, {"content": 0.5}, run)
    torch.testing.assert_close(prediction(pipe), prediction(half), rtol=1e-4, atol=1e-5)
    run.load_into(pipe, content=0.5, style=0)
    assert pipe.get_list_adapters() == {"unet": ["content"]}
    torch.testing.assert_close(prediction(pipe), prediction(half), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_notebook_runs_on_the_bundled_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unziplora.methods.unziplora.style_phrase.DISTILLATION_STEPS", 1)
    parameters = {
        "image": str(Path(unziplora.__file__).parent / "models" / "bundled" / "demo" / "first.png"),
        "content": "rocket",
        "style": "linocut",
        "base": "bundled",
        "settings": {"steps": 1, "phrase_steps": 1, "sample_steps": 1, "sample_seeds": [0], "progress": False},
        "sampling": {"steps": 1, "progress": False},
    }
    names: dict[str, object] = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and "setup" not in tags:
            exec("".join(cell["source"]), names)
            names.update(parameters if "parameters" in tags else {})
    assert names["picture"].size == (128, 128)
    assert names["sheet"].width > 2 * 128
    assert len(names["images"]) == 3
