"""Rows of a batch from every form of source, and faults that are found before anything starts."""

import json
from pathlib import Path

import pytest
from fake_jobs import begin, recipe, train
from PIL import Image

from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.recipe import resolve
from unziplora.config.split import SplitConfig
from unziplora.config.zip import ZipConfig
from unziplora.errors import UserError
from unziplora.jobs import rows as module
from unziplora.jobs.rows import Row, read_rows
from unziplora.jobs.trainings import TRAININGS, training_of
from unziplora.methods.unziplora.seeds import settle_seed
from unziplora.runs.folder import RunFolder
from unziplora.utils.inputs import read_toml


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["cat.png", "Dog 1.jpg", "more/cat.png"]):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "check", lambda config: config)


def read(source: Path, text: str | None = None, **defaults: object) -> list[Row]:
    if text is not None:
        source.write_text(text, encoding="utf-8")
    return read_rows(source, source.parent / "out", {"base": "bundled", **defaults})


def finished(row: Row) -> RunFolder:
    with RunFolder.created(row.config.out, row.config) as run:
        train(run, lambda _: None)
    return run


def test_folder_gives_a_row_for_each_image(photos: Path) -> None:
    rows = read(photos, content="cat", style="ink")
    assert [(row.place, row.config.out.name) for row in rows] == [("Dog 1.jpg", "Dog-1"), ("cat.png", "cat")]
    assert all(row.config.images[0].is_file() for row in rows)


@pytest.mark.usefixtures("unchecked")
def test_tables_of_all_forms_give_the_same_rows(photos: Path) -> None:
    forms = {
        "rows.csv": 'image,content,style,rank,sample_seeds\ncat.png,cat,"ink, wash",8,1;2\n\nDog 1.jpg,dog,oil,,\n',
        "excel.csv": "\ufeffimage;content;style;rank;sample_seeds\r\ncat.png;cat;ink, wash;8;1|2\r\n"
        "Dog 1.jpg;dog;oil;;\r\n",
        "rows.jsonl": json.dumps(
            {"image": "cat.png", "content": "cat", "style": "ink, wash", "rank": 8, "sample_seeds": [1, 2]}
        )
        + "\n\n"
        + json.dumps({"image": ["Dog 1.jpg"], "content": "dog", "style": "oil"}),
        "rows.toml": '["cat"]\ncontent = "cat"\nstyle = "ink, wash"\nrank = 8\nsample_seeds = [1, 2]\n'
        '["Dog 1.jpg"]\ncontent = "dog"\nstyle = "oil"\n',
        "array.toml": '[[run]]\nimage = "cat.png"\ncontent = "cat"\nstyle = "ink, wash"\nrank = 8\n'
        'sample_seeds = [1, 2]\n[[run]]\nimage = "Dog 1.jpg"\ncontent = "dog"\nstyle = "oil"\n',
    }
    for name, text in forms.items():
        first, second = read(photos / name, text)
        expected = recipe(
            photos / "out" / "cat", images=[photos / "cat.png"], style="ink, wash", rank=8, sample_seeds=[1, 2]
        ).model_copy(update={"steps": first.config.steps})
        assert first.config == expected, name
        assert second.config.images == [photos / "Dog 1.jpg"]
        assert second.config.out == photos / "out" / "Dog-1"
        assert second.config.rank == SplitConfig.presets["bundled"]["rank"]


@pytest.mark.usefixtures("unchecked")
def test_row_may_name_another_method_and_flags_that_it_lacks_are_left_out(photos: Path) -> None:
    text = 'content_steps = 7\n[cat]\nmethod = "dreambooth"\ncontent = "cat"\n[both]\nmethod = "zip"\n'
    text = text.replace("content_steps = 7\n", "") + 'content_lora = "a"\nstyle_lora = "b.safetensors"\n'
    first, second = read(photos / "rows.toml", text, style="ink", phrase_steps=0)
    assert isinstance(first.config, DreamBoothConfig)
    assert isinstance(second.config, ZipConfig)
    assert second.config.content_lora == photos / "a"
    assert second.config.out.name == "a-b"


@pytest.mark.usefixtures("unchecked")
def test_equal_names_are_numbered_and_chosen_ones_refused(photos: Path) -> None:
    text = "image,content,style,name\ncat.png,cat,ink,\nmore/cat.png,cat,ink,\ncat.png,cat,oil,CAT\n"
    with pytest.raises(UserError, match=r"line 4: the run folder .*CAT is that of line 2 too"):
        read(photos / "rows.csv", text)
    rows = read(photos / "rows.csv", text.replace("CAT", "oil"))
    assert [row.config.out.name for row in rows] == ["cat", "cat-2", "oil"]


@pytest.mark.usefixtures("unchecked")
def test_same_training_twice_is_refused(photos: Path) -> None:
    text = "image,content,style\ncat.png,cat,ink\ncat.png,cat,oil\ncat.png,cat,ink\n"
    with pytest.raises(UserError, match="line 4: the same image with the same settings as line 2"):
        read(photos / "rows.csv", text)


@pytest.mark.usefixtures("unchecked")
def test_rows_of_one_base_come_together(photos: Path) -> None:
    text = "image,content,style,base\ncat.png,a,ink,x/one\ncat.png,b,ink,x/two\ncat.png,c,ink,x/one\n"
    assert [row.config.content for row in read(photos / "rows.csv", text)] == ["a", "c", "b"]


def test_all_faults_are_told_together_with_their_lines(photos: Path) -> None:
    text = (
        "image,content,style,rank,stile,method\n"
        "cat.png,cat,ink,,,\n"
        "gone.png,cat,ink,,,\n"
        "cat.png,dog,ink,many,,\n"
        "cat.png,fox,,,ink,\n"
        "cat.png,fox,ink,,,magic\n"
        "cat.png,owl,ink,8,,,too much\n"
    )
    with pytest.raises(UserError) as caught:
        read(photos / "rows.csv", text)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("rows.csv: nothing was started, because there are faults")
    assert [line.strip().partition(":")[0] for line in lines[1:]] == [f"line {n}" for n in (3, 4, 5, 5, 6, 7)]
    assert "gone.png: no such image" in lines[1]
    assert "rank" in lines[2]
    assert "'stile': did you mean 'style'?" in str(caught.value)
    assert "choose one of split, dreambooth, blora, zip" in lines[5]
    assert "more cells than names" in lines[6]
    assert not (photos / "out").exists()


def test_fault_of_many_rows_is_told_once(photos: Path) -> None:
    with pytest.raises(UserError, match=r"Dog 1.jpg, cat.png: content is missing") as caught:
        read(photos)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"image": "cat.png"', "line 1: not valid JSON"),
        ("rows.jsonl", "[1]", "line 1: not an object"),
        ("ROWS.JSONL", "[1]", "line 1: not an object"),
        ("rows.toml", "[cat", "not valid TOML"),
        ("rows.toml", "a = 1\n\n['cat']\n", "line 3: unknown key 'a'"),
        ("rows.csv", "image\n", "names no image"),
        ("rows.txt", "cat.png", "a batch is a folder of images, or"),
        ("rows.csv", 'image\n"cat', "cannot be read"),
    ],
)
def test_unreadable_sources_are_refused(photos: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(photos / name, text, content="cat", style="ink")


def test_default_that_no_method_knows_is_refused(photos: Path) -> None:
    with pytest.raises(UserError, match=r"^unknown key 'stpes': did you mean 'steps'\?$"):
        read(photos, content="cat", style="ink", stpes=5)


@pytest.mark.usefixtures("unchecked")
def test_only_cells_are_split(photos: Path) -> None:
    Image.new("RGB", (64, 64)).save(photos / "a;b.png")
    keys = {"images": "a;b.png", "content": "cat", "style": "ink"}
    for name, text in {
        "rows.toml": '[row]\nimages = "a;b.png"\ncontent = "cat"\nstyle = "ink"\n',
        "rows.jsonl": json.dumps(keys),
    }.items():
        (row,) = read(photos / name, text)
        assert [path.name for path in row.config.images] == ["a;b.png"]
    (row,) = read(photos / "rows.csv", "images,content,style\ncat.png|Dog 1.jpg,cat,ink\n")
    assert [path.name for path in row.config.images] == ["cat.png", "Dog 1.jpg"]


def test_table_in_another_encoding_says_what_to_do(photos: Path) -> None:
    for name, data in {"rows.csv": "image\nkäse.png".encode("cp1252"), "rows.toml": "a = 1".encode("utf-16")}.items():
        (photos / name).write_bytes(data)
        with pytest.raises(UserError, match="it is not text in UTF-8: save it as UTF-8"):
            read(photos / name)


def test_missing_source_is_named(tmp_path: Path) -> None:
    for name in ("photso", "rows.csv"):
        with pytest.raises(UserError, match=f"{name}: no such file or folder"):
            read_rows(tmp_path / name, tmp_path, {})


@pytest.mark.usefixtures("unchecked")
def test_finished_and_begun_runs_must_have_the_same_settings(photos: Path) -> None:
    (row, _) = read(photos, content="cat", style="ink")[::-1]
    with RunFolder.created(row.config.out, row.config) as run:
        pass
    assert len(read(photos, content="cat", style="oil")) == 2  # nothing was learned yet
    train(run, lambda _: None)
    assert len(read(photos, content="cat", style="ink", sample_steps=3)) == 2
    with pytest.raises(UserError, match=r"cat\.png: .*cat contains a run with other settings \(style\)"):
        read(photos, content="cat", style="oil")


@pytest.mark.usefixtures("unchecked")
def test_finished_run_of_several_seeds_is_the_same_row_again(photos: Path) -> None:
    (row, _) = read(photos, content="cat", style="ink", seeds=3)[::-1]
    run = finished(row)
    for seed in (0, 1):
        (run.path / "seeds" / str(seed)).mkdir(parents=True)
    run.check_file.write_text(json.dumps({"seed": 2}))
    settle_seed(run)
    assert "seeds = 1" in run.config_file.read_text()
    assert len(read(photos, content="cat", style="ink", seeds=3)) == 2
    with pytest.raises(UserError, match=r"other settings \(seeds\)"):
        read(photos, content="cat", style="ink", seeds=2)
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        read(photos, content="cat", style="ink", seed=1, seeds=3)


@pytest.mark.usefixtures("unchecked")
def test_finished_run_that_was_trained_on_is_the_same_row_again(photos: Path) -> None:
    (row, _) = read(photos, content="cat", style="ink", steps=4)[::-1]
    run = finished(row)
    run.reopen(row.config.model_copy(update={"steps": 6}))
    run.card.write_text("# cat")
    assert len(read(photos, content="cat", style="ink", steps=4)) == 2
    with pytest.raises(UserError, match=r"other settings \(steps\)"):
        read(photos, content="cat", style="ink", steps=8)


def test_row_has_the_recipe_that_the_check_completed(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "check", lambda config: config.model_copy(update={"rank": 5}))
    assert [row.config.rank for row in read(photos, content="cat", style="ink")] == [5, 5]


@pytest.mark.usefixtures("unchecked")
def test_folder_of_something_else_is_refused(photos: Path) -> None:
    (photos.parent / "out" / "cat").mkdir(parents=True)
    (photos.parent / "out" / "cat" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"cat\.png: .*not empty"):
        read(photos, content="cat", style="ink")


def test_every_configuration_is_known_by_its_keys(tmp_path: Path) -> None:
    keys = {"images": [tmp_path / "cat.png"], "content": "cat", "style": "ink", "content_lora": "a", "style_lora": "b"}
    for name, training in TRAININGS.items():
        known = {key: value for key, value in keys.items() if key in training.recipe.model_fields}
        config = resolve(training.recipe, known, {"out": tmp_path / name})
        with RunFolder.created(config.out, config) as run:
            assert training_of(read_toml(run.config_file)) is training
    assert training_of(read_toml(begin(tmp_path / "x").config_file)) is TRAININGS["split"]
    with pytest.raises(UserError, match="belongs to no method"):
        training_of({"magic": 1})
