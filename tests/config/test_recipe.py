"""The configuration: layers, presets, faults, TOML, and the generated documentation."""

import errno
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from unziplora.cli.reference import reference
from unziplora.config.bases import BUNDLED_BASE, is_bundled
from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.recipe import Recipe, resolve, to_toml, with_paths_from
from unziplora.config.sample import SampleConfig
from unziplora.config.split import PRESETS, SplitConfig
from unziplora.config.zip import ZipConfig
from unziplora.errors import MachineError, UserError
from unziplora.utils.inputs import read_toml

GIVEN: dict[str, Any] = {"images": ["cat.jpg"], "content": "cat", "style": "pencil sketch", "out": "runs/cat"}


def fault(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(SplitConfig, {**GIVEN, **changes})
    return str(caught.value)


def test_later_layers_win() -> None:
    config = resolve(SplitConfig, GIVEN, {"rank": 8, "seed": 3}, {"rank": 4})
    assert (config.rank, config.seed, config.steps) == (4, 3, 600)


@pytest.mark.parametrize("preset", PRESETS)
def test_own_keys_win_over_the_preset(preset: str) -> None:
    config = resolve(SplitConfig, GIVEN, {"preset": preset, "steps": 123})
    assert config.steps == 123
    for name, value in PRESETS[preset].items():
        if name != "steps":
            assert getattr(config, name) == value


@pytest.mark.parametrize("base", ["bundled", str(BUNDLED_BASE), f"{BUNDLED_BASE}/", f"{BUNDLED_BASE}/../emoji-xl"])
def test_bundled_base_by_name_or_path_selects_its_preset(base: str) -> None:
    config = resolve(SplitConfig, GIVEN, {"base": base})
    assert (config.base, config.preset) == ("bundled", "auto")
    assert config == SplitConfig(**GIVEN, base="bundled")
    assert config.model_copy(update={"preset": "bundled"}) == SplitConfig(**GIVEN, base="bundled", preset="bundled")
    assert resolve(SplitConfig, GIVEN, {"base": base, "preset": "default"}).rank == 64


@pytest.mark.parametrize("base", ["emoji-xl", "some/bundled", str(BUNDLED_BASE.parent), str(BUNDLED_BASE / "unet")])
def test_other_bases_select_the_default_preset(base: str) -> None:
    assert not is_bundled(base)
    assert SplitConfig(**GIVEN, base=base).rank == 64


@pytest.mark.parametrize(
    ("model", "preset"), [(m, p) for m in (SplitConfig, DreamBoothConfig, BLoraConfig) for p in m.presets]
)
def test_constructor_applies_the_preset_as_resolve_does(model: type[Recipe], preset: str) -> None:
    config = model(**GIVEN, preset=preset, seed=7)
    assert config == resolve(model, GIVEN, {"preset": preset}, {"seed": 7})
    for name, value in model.presets[preset].items():
        assert getattr(config, name) == value


def test_resolved_recipe_reproduces_itself_whatever_its_preset_says(tmp_path: Path) -> None:
    """A run's config.toml holds every value, so a preset that changes later does not change the run."""
    config = SplitConfig(**GIVEN, base="bundled").model_copy(update={"rank": 3, "steps": 77})
    assert SplitConfig(**config.model_dump()) == config
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert resolve(SplitConfig, read_toml(tmp_path / "config.toml")) == config


def test_presets_set_no_key_that_a_saved_recipe_leaves_out() -> None:
    """A value of None is not saved: under a preset with a value it would not come back."""
    for model in (SplitConfig, DreamBoothConfig, BLoraConfig):
        for name in set().union(*model.presets.values()):
            assert type(None) not in get_args(model.model_fields[name].annotation), name


def test_unknown_home_is_reported() -> None:
    assert "out: ~ is followed by a name that no user of this machine has" in fault(out="~no-such-user/x")


def test_unknown_key_suggests_the_nearest() -> None:
    assert fault(rnak=8) == "unknown key 'rnak': did you mean 'rank'?"
    assert fault(zzzz=8) == "unknown key 'zzzz'"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": "many"}, "rank: Input should be a valid integer"),
        ({"rank": 0}, "rank: Input should be greater than or equal to 1 (got 0)"),
        ({"rank": 8.5}, "rank: "),
        ({"optimizer": "sgd"}, "optimizer: Input should be 'adamw', 'adamw8bit' or 'prodigy'"),
        ({"content": "  "}, "content: must not be blank"),
        ({"style": ""}, "style: "),
        ({"images": []}, "images: "),
        ({"images": 7}, "images: "),
        ({"content_learning_rate": -1.0}, "content_learning_rate: "),
        ({"content_learning_rate": float("nan")}, "content_learning_rate: "),
        ({"betas": [0.9]}, "betas"),
        ({"betas": [0.9, 1.5]}, "betas: each is at least 0 and below 1"),
        ({"sample_seeds": [-1]}, "sample_seeds: seeds are whole numbers from 0 on"),
        ({"optimizer": "prodigy", "content_learning_rate": 1.0}, "set content_learning_rate and style_learning_rate"),
        ({"column_separation": "perhaps"}, "column_separation: "),
        ({"content": "Cat", "style": "cat"}, "content and style are the same word ('Cat')"),
        ({"masks": ["a.png", "b.png"]}, "2 masks for 1 images: give one mask per image"),
        ({"resolution": 32_000_000}, "resolution: Input should be less than or equal to 4096"),
        ({"sample_subject": "a {dog}"}, "sample_subject: braces stand for placeholders"),
        ({"sample_style": "{a|b}"}, "sample_style: braces stand for placeholders"),
        ({"content": "{cat"}, "content: braces stand for placeholders"),
        ({"token": "{}"}, "token: braces stand for placeholders"),
        ({"crop": ["1,2,3,4", "1,2,3,4"]}, "2 crops for 1 images: give one crop per image"),
        ({"crop": "1,2,3"}, "crop: '1,2,3': write X,Y,W,H in pixels"),
        ({"crop": "1,2,0,4"}, "X and Y are at least 0, W and H at least 1"),
        ({"crop": [1.5, 2, 3, 4]}, "crop"),
        ({"crop": 7}, "crop: must be a list"),
        ({"content": ""}, "content: must not be empty"),
        ({"out": 3}, "out: must be a path"),
        ({"fit": "stretch"}, "fit: "),
        ({"steps": 30}, "30 steps leave no room for 3 column warm-ups of 10"),
        ({"targets": ["convolutions"]}, "convolutions have none: take 'convolutions' out of targets"),
        ({"targets": []}, "targets: must not be empty"),
    ],
)
def test_each_wrong_value_is_named(changes: dict[str, Any], message: str) -> None:
    assert message in fault(**changes)


def test_words_are_kept_as_templates_need_them() -> None:
    words = {"content": "a cat", "style": "in ink style", "sample_subject": "the house", "sample_style": "a mosaic"}
    config = resolve(SplitConfig, GIVEN, words)
    assert config.prompts()["full"] == "a sks cat in ink style"
    assert (config.sample_subject, config.sample_style) == ("house", "mosaic")
    with pytest.raises(UserError, match="same word"):
        resolve(SplitConfig, GIVEN, {"content": "a cat", "style": "in cat style"})


@pytest.mark.parametrize("crop", ["10,20,300,400", " 10, 20,300,400", [10, 20, 300, 400], [[10, 20, 300, 400]]])
def test_a_crop_may_be_text_or_numbers(crop: Any) -> None:
    assert resolve(SplitConfig, GIVEN, {"crop": crop}).crop == ["10,20,300,400"]


class TestSettingsFile:
    """Relative paths in a TOML file begin at its folder."""

    def read(self, folder: Path, text: str, model: type[Recipe] = SplitConfig) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        (folder / "cat.toml").write_text(text, encoding="utf-8")
        return with_paths_from(folder, read_toml(folder / "cat.toml"), model)

    def test_files_and_folders_do(self, tmp_path: Path) -> None:
        text = """
images = ["cat.jpg", "/there/cat.jpg", "../cat.jpg", "~/cat.jpg"]
out = "runs/cat"
content = "cat"
rank = 4
zzz = "x"
"""
        values = self.read(tmp_path / "here", text)
        here = str(tmp_path / "here")
        assert values["images"] == [f"{here}/cat.jpg", "/there/cat.jpg", f"{here}/../cat.jpg", "~/cat.jpg"]
        assert values["out"] == f"{here}/runs/cat"
        assert (values["content"], values["rank"], values["zzz"]) == ("cat", 4, "x")
        content = self.read(tmp_path / "here", 'content = "runs/cat"', SampleConfig)["content"]
        assert content == f"{here}/runs/cat"  # there a path, above a word

    def test_a_base_or_block_map_does_if_it_is_there(self, tmp_path: Path) -> None:
        text = 'base = "bundled"\nblocks = "sdxl"'
        (tmp_path / "sdxl").mkdir()
        (tmp_path / "my-xl").mkdir()
        (tmp_path / "map.toml").touch()
        assert self.read(tmp_path, text) == {"base": "bundled", "blocks": "sdxl"}
        assert self.read(tmp_path, 'base = "owner/name"')["base"] == "owner/name"
        assert self.read(tmp_path, 'base = "' + "x" * 999 + '"')["base"] == "x" * 999
        values = self.read(tmp_path, 'base = "my-xl"\nblocks = "map.toml"')
        assert values == {"base": str(tmp_path / "my-xl"), "blocks": str(tmp_path / "map.toml")}


def test_all_faults_are_reported_at_once() -> None:
    lines = fault(rank=0, rnak=1, seed=-1).splitlines()
    assert len(lines) == 3


def test_missing_keys_are_explained() -> None:
    with pytest.raises(UserError, match=r'content is missing \(--content\): Word for the subject, such as "cat"'):
        resolve(SplitConfig, {"images": ["a.png"], "style": "x", "out": "y"})


def test_toml_round_trip_keeps_the_configuration(tmp_path: Path) -> None:
    config = resolve(SplitConfig, GIVEN, {"betas": [0.8, 0.9], "sample_seeds": [], "alpha": 3.5, "masks": ["m.png"]})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert resolve(SplitConfig, read_toml(path)) == config


def test_a_toml_file_may_begin_with_a_mark_as_windows_writes_it(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf" + b'content = "cat"')
    assert read_toml(tmp_path / "a.toml") == {"content": "cat"}


def test_tilde_in_paths_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USERPROFILE", "/home/ada")
    config = resolve(SplitConfig, {**GIVEN, "images": ["~/cat.jpg", "b.jpg"], "out": "~/runs/cat", "style": "~"})
    assert config.images == [Path("/home/ada/cat.jpg"), Path("b.jpg")]
    assert (config.out, config.style) == (Path("/home/ada/runs/cat"), "~")


def test_a_preset_of_another_type_and_infinity_are_refused() -> None:
    assert "preset" in fault(preset=["a"])
    assert "max_grad_norm: Input should be a finite number" in fault(max_grad_norm=float("inf"))


@pytest.mark.parametrize("keys", [{"steps": True}, {"rank": False}, {"images": [True]}, {"max_grad_norm": True}])
def test_true_and_false_are_no_numbers(keys: dict[str, object]) -> None:
    assert fault(**keys).startswith(f"{next(iter(keys))}: cannot be true or false")


def test_unreadable_toml_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such configuration file"):
        read_toml(tmp_path / "gone.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("rank = = 3")
    with pytest.raises(UserError, match="not valid TOML"):
        read_toml(broken)
    broken.write_bytes(b"\xff\xfe\0r")
    with pytest.raises(UserError, match="not text in UTF-8"):
        read_toml(broken)
    with pytest.raises(UserError, match="this is a folder, not a file"):
        read_toml(tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MachineError, match=r"broken\.toml: cannot be read \(Permission denied\)"):
        read_toml(broken)


def test_prompts_take_the_words() -> None:
    prompts = resolve(SplitConfig, GIVEN).prompts()
    assert prompts["full"] == "a sks cat in pencil sketch style"
    assert prompts["content"] == "a sks cat"
    assert prompts["style"] == "an image in pencil sketch style"
    for template in ("a {subject}", "a {content.x}", "a {content[x]}", "a {}", "a {content"):
        with pytest.raises(UserError, match=r"is not known here|brace"):
            resolve(SplitConfig, GIVEN, {"full_prompt": template}).prompts()


def test_the_words_that_call_a_style_up() -> None:
    config = resolve(SplitConfig, {**GIVEN, "style": "pencil drawing in sepia"})
    for template in (config.style_prompt, "a {content} in {style} style"):
        assert config.style_trigger(template) == "in pencil drawing in sepia style"
    assert config.style_trigger("a doodle by {token}") == "a doodle by sks"


def test_kohya_layout_is_always_written() -> None:
    assert resolve(SplitConfig, GIVEN, {"formats": ["diffusers"]}).formats == ["kohya", "diffusers"]


def test_a_configuration_cannot_be_changed() -> None:
    config = resolve(SplitConfig, GIVEN)
    with pytest.raises(ValueError, match="frozen"):
        config.rank = 3  # type: ignore[misc]


def test_every_key_is_explained_and_grouped() -> None:
    for name, field in SplitConfig.model_fields.items():
        assert field.description, name
        assert isinstance(field.json_schema_extra, dict), name
        assert field.json_schema_extra["group"], name


def test_the_documentation_of_the_keys_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == reference(), (
        "run: python -m unziplora.cli.reference > docs/configuration.md"
    )


def test_every_key_that_the_documentation_gives_a_command_is_one() -> None:
    models = {"split": SplitConfig, "train dreambooth": DreamBoothConfig, "train blora": BLoraConfig, "zip": ZipConfig}
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", reference(), re.DOTALL | re.MULTILINE))
    for command, model in models.items():
        keys, title = set(), f"`unziplora {command}`"
        while title:
            keys |= set(re.findall(r"^\| `(\w+)` \|", sections[title], re.MULTILINE))
            below = re.search("The keys of “(.+)”, and:", sections[title])
            title = below[1] if below else ""
        assert keys == set(model.model_fields), command


def test_one_text_in_the_place_of_a_list_is_a_list_of_one() -> None:
    recipe = resolve(SplitConfig, {"images": "cat.png", "content": "cat", "style": "ink", "out": "run"})
    assert recipe.images == [Path("cat.png")]
