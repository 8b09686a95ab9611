"""The command line, run in this process: results, faults with their exit codes, and what is printed where."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
from PIL import Image
from pydantic import Field

from unziplora import cli
from unziplora.cli import options as flags
from unziplora.cli.output import memory_advice
from unziplora.cli.split import split_command
from unziplora.config.recipe import Recipe, group_of, has_mark, resolve
from unziplora.config.sample import GridConfig, SampleConfig
from unziplora.config.split import SplitConfig
from unziplora.config.zip import ZipConfig
from unziplora.errors import Interrupted, MachineError
from unziplora.formats.files import read_lora, write_lora
from unziplora.lora.weights import Lora
from unziplora.training.trainer import StepReport, Trainer


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Done]

SPLIT = ["split", "cat.png", "--content", "cat", "--style", "pencil sketch"]
QUICK = ["--steps", "4", "--column-periods", "1", "--column-warmup", "1", "--score-timesteps", "1", "--rank", "2"]
SMALL = [*QUICK, "--sample-steps", "1", "--sample-seeds", "0", "--sample-guidance", "1", "--device", "cpu"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command in an empty folder with a picture cat.png in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNZIPLORA_DEBUG", raising=False)
    Image.linear_gradient("L").convert("RGB").resize((80, 80)).save(tmp_path / "cat.png")

    def run(*args: object) -> Done:
        code = cli.main([str(arg) for arg in args])
        found = capsys.readouterr()
        return Done(code, found.out, found.err)

    return run


@pytest.fixture(scope="session")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny base. Read only."""
    folder = tmp_path_factory.mktemp("cli")
    Image.linear_gradient("L").convert("RGB").resize((80, 80)).save(folder / "cat.png")
    args = ["split", folder / "cat.png", *SPLIT[2:], "--base", tiny_folder, "--out", folder / "run", *SMALL, "-q"]
    assert cli.main([str(arg) for arg in args]) == 0
    return folder / "run"


def lora_file(path: Path, rank: int = 4) -> Path:
    draw = torch.Generator().manual_seed(0)
    pair = torch.randn(rank, 16, generator=draw), torch.randn(16, rank, generator=draw)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    write_lora(Lora({name: pair}, {}), path)
    return path


def sections_of(text: str) -> dict[str, str]:
    """Split a help text into its sections by title."""
    return dict(re.findall(r"^(\S[^\n]*):\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL))


class TestHelp:
    def test_needs_neither_torch_nor_patience(self) -> None:
        code = (
            "import sys, time; t = time.process_time()\n"
            "from unziplora.cli import COMMANDS, main\n"
            "for args in ([], *([name] for name in COMMANDS)):\n"
            "    assert main([*args, '--help']) == 0\n"
            "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'numpy', 'PIL'} & set(sys.modules)\n"
            "print(time.process_time() - t, heavy, file=sys.stderr)\n"
            "sys.exit(bool(heavy))\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert float(result.stderr.split()[0]) < 2  # seconds of CPU for nine helps

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_each_command_shows_an_example(self, call: Call, name: str) -> None:
        done = call(name, "--help")
        assert done.code == 0
        assert f"unziplora {name}" in done.out
        assert name in call("--help").out

    @pytest.mark.parametrize(
        ("name", "model"), [("split", SplitConfig), ("sample", SampleConfig), ("grid", GridConfig)]
    )
    def test_every_key_is_a_flag_under_its_group(self, call: Call, name: str, model: type[Recipe]) -> None:
        short, sections = call(name, "--help").out, sections_of(call(name, "--help-all").out)
        for key, field in model.model_fields.items():
            flag = re.compile(rf"^  --(\[no-\])?{key.replace('_', '-')}(\s|$)", re.MULTILINE)
            expert = has_mark(field, "expert")
            title = f"{'Expert: ' if expert else ''}{group_of(field)}"
            assert [other for other, text in sections.items() if flag.search(text)] == [title], key
            assert bool(flag.search(short)) is not expert

    @pytest.mark.parametrize(
        "name",
        [
            *(["train", method] for method in ("dreambooth", "blora")),
            *([name] for name in ("split", "zip", "sample", "grid", "blocks", "bench", "trial")),
        ],
        ids=" ".join,
    )
    def test_help_is_short_and_has_no_expert_flags(self, call: Call, name: list[str]) -> None:
        text = call(*name, "--help").out
        assert len(text.splitlines()) <= 62
        assert "Expert" not in text
        assert "--help-all" in text

    def test_expert_flags_work_without_help_all(self, call: Call, tiny_folder: Path) -> None:
        done = call(*SPLIT, "--base", tiny_folder, "--noise-offset", "0.05", "--dry-run", "--json")
        assert done.json["config"]["noise_offset"] == 0.05

    def test_defaults_and_presets_are_shown(self, call: Call) -> None:
        text = " ".join(call("split", "--help-all").out.split())
        assert "2.9 MB per rank in SDXL's attentions. [default: 64; bundled: 16]" in text
        assert "[default: on]" in text

    def test_no_command_shows_the_help(self, call: Call) -> None:
        done = call()
        assert done.code == 2
        assert "Commands:" in done.err

    @pytest.mark.parametrize(("args", "code"), [(["split", "--help-all"], 0), (["spl\u0394t"], 2)])
    def test_letters_that_a_code_page_lacks_are_escaped(
        self, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int
    ) -> None:
        narrow = io.TextIOWrapper(io.BytesIO(), encoding="iso8859-5")
        monkeypatch.setattr(sys, "stdout" if code == 0 else "stderr", narrow)
        assert cli.main(args) == code
        narrow.flush()
        assert (b" \\xb7" if code == 0 else b"spl\\u0394t") in narrow.buffer.getvalue()

    def test_version(self, call: Call) -> None:
        assert re.fullmatch(r"unziplora \d+\.\d+\.\d+\n", call("--version").out)


class TestWrongRequests:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["spilt"], "no command 'spilt': did you mean 'split'?"),
            (["xyzzy"], "no command 'xyzzy': there are split, train"),
            ([*SPLIT, "--rnak", "3"], "No such option '--rnak'"),
            ([*SPLIT, "--rank", "many"], "'many' is not a valid integer"),
            ([*SPLIT, "--rank", "0"], "rank: Input should be greater than or equal to 1"),
            ([*SPLIT, "--optimizer", "sgd"], "'sgd' is not one of"),
            (["split", "cat.png", "--content", "cat", "--style", "Cat"], "the same word"),
            (["split", "cat.png", "--content", "", "--style", "x"], "content: "),
            (["zip"], "two LoRAs are needed: unziplora zip CONTENT STYLE; see unziplora zip --help"),
            (["demo", "--steps", "0"], "--steps"),
            (["split"], "unziplora split IMAGE …; see unziplora split --help"),
            (["split", "cat.png"], "content is missing (--content): Word for the subject"),
            (["split", "--content", "cat"], "unziplora split IMAGE …; see unziplora split --help"),
            (["zip", "one.safetensors"], "two LoRAs are needed: unziplora zip CONTENT STYLE; see unziplora zip --help"),
            (["sample", "--seeds", "0, 1"], "Repeat the flag: --seeds 0 --seeds 1"),
            (["sample", "--prompts", "x", "--out", "cat.png", "--dry-run"], "cat.png is a file"),
            (["sample", "--prompts", "x", "--out", "new.png", "--dry-run"], "new.png is a file; give a folder"),
            (["sample", "--prompts", "x", "--device", "cud", "--dry-run"], "device 'cud' is not available"),
            (["split", "--resume"], "--resume needs the run folder"),
            (["split", "--extend", "5"], "--extend 5 needs the run folder: unziplora split --extend 5 --out runs/NAME"),
            (["split", "--extend", "5", "--steps", "9", "--out", "r"], "leave --resume and --steps out"),
            (["split", "--extend", "5", "--out", "nowhere"], "no run to extend here"),
            ([*SPLIT, "--resume", "--out", "nowhere"], "no run to resume here"),
            ([*SPLIT, "--config", "gone.toml"], "gone.toml: no such configuration file"),
            (["split", "gone.png", *SPLIT[2:]], "gone.png: no such image"),
            (["inspect"], "Missing argument"),
            (["inspect", "gone.safetensors"], "gone.safetensors: no such file"),
            (["resize", "a.safetensors", "b.safetensors"], "--rank 16, or --energy 0.95"),
            (["sample"], "nothing to show: give --content, --style or --prompts"),
            (["sample", "nowhere"], "nowhere"),
            (["sample", "a cat " * 60], "too long for a file name"),
            (["sample", "~nobody-of-this-name/x"], "a name that no user of this machine has"),
            (["split", "caf\udce9.jpg", *SPLIT[2:]], "caf\\udce9.jpg: this name is not valid text; rename the file"),
            (["demo", "--out", "/"], "this is the root of a disk"),
            (["sample", "--content-blocks", "up"], "content_blocks"),
            (["grid", "cat", "--batch-size", "2"], "No such option '--batch-size'"),
        ],
    )
    def test_one_message_and_exit_code_2(self, call: Call, tmp_path: Path, args: list[str], message: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        done = call(*args)
        assert done.code == 2
        assert done.err.startswith("error: ")
        assert message in done.err
        assert "Traceback" not in done.err
        assert done.out == ""
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_misspelled_key_is_named_before_what_it_leaves_missing(self, call: Call) -> None:
        Path("typo.toml").write_text('imges = ["cat.png"]\n')
        done = call("split", "--config", "typo.toml")
        assert (done.code, done.err) == (2, "error: unknown key 'imges': did you mean 'images'?\n")

    def test_after_a_missing_base_the_same_command_can_be_mended(self, call: Call, tiny_folder: Path) -> None:
        done = call(*SPLIT, "--base", "gone.safetensors", "--quiet")
        assert done.code == 2
        assert "gone.safetensors': no such file or folder" in done.err
        assert call(*SPLIT, "--base", tiny_folder, *QUICK, "--sample-seeds", "none", "--quiet").code == 0

    @pytest.mark.parametrize("more", [(), ("--resolution", "64"), ("--dry-run",)])
    def test_file_that_is_not_a_base_is_reported_and_leaves_no_folder(self, call: Call, more: tuple[str, ...]) -> None:
        done = call(*SPLIT, "--base", lora_file(Path("a.safetensors")), *more, "--out", "runs/x", "--quiet")
        assert done.code == 2
        assert "this is a LoRA; a base of SDXL's topology is needed" in done.err
        assert not Path("runs").exists()

    def test_a_mistyped_flag_brings_up_the_nearest(self, call: Call) -> None:
        assert "--rank" in call(*SPLIT, "--rnak", "3").err

    def test_a_folder_that_is_taken_stays_as_it_is(self, call: Call, finished: Path) -> None:
        before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
        done = call(*SPLIT, "--out", finished)
        assert done.code == 2
        assert "contains a finished run: choose another --out" in done.err
        assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before

    def test_json_contains_the_fault_too(self, call: Call) -> None:
        done = call("split", "gone.png", *SPLIT[2:], "--json")
        assert done.json == {"error": "gone.png: no such image", "exit_code": 2}
        assert done.err == "error: gone.png: no such image\n"


class TestSplit:
    def test_run_folder_is_complete(self, finished: Path) -> None:
        assert (finished / "config.toml").is_file()
        assert read_lora(finished / "run-content.safetensors").modules
        assert read_lora(finished / "run-style.safetensors").modules
        assert list((finished / "samples").glob("*.png"))
        assert "`a sks cat`" in (finished / "README.md").read_text()

    def test_json_is_one_document_and_progress_goes_to_stderr(self, call: Call, tiny_folder: Path) -> None:
        done = call(*SPLIT, "--base", tiny_folder, *SMALL, "--sample-seeds", "none", "--json")
        assert done.code == 0
        assert done.json["content"] == "runs/cat/cat-content.safetensors"
        assert Path(done.json["style"]).is_file()
        assert "step 4/4" in done.err
        assert "\r" not in done.err
        assert "\x1b" not in done.err

    def test_quiet_prints_only_the_result(self, call: Call, tiny_folder: Path) -> None:
        done = call(*SPLIT, "--base", tiny_folder, *QUICK, "--sample-seeds", "none", "--out", "q", "--quiet")
        assert done.code == 0
        assert "step" not in done.err
        assert done.out.splitlines()[0] == "content  q/q-content.safetensors"

    def test_flags_win_over_the_file_and_the_file_over_the_preset(self, call: Call, tiny_folder: Path) -> None:
        Path("my.toml").write_text('content = "dog"\nrank = 3\nsteps = 50\nsample_seeds = [7]\n')
        done = call(*SPLIT, "--base", tiny_folder, "--config", "my.toml", "--steps", "40", "--dry-run", "--json")
        assert done.code == 0
        config = done.json["config"]
        assert (config["content"], config["rank"], config["steps"]) == ("cat", 3, 40)
        assert config["sample_seeds"] == [7]
        assert config["images"] == ["cat.png"]

    def test_a_dry_run_shows_settings_prompts_and_memory_and_writes_one_image(
        self, call: Call, tmp_path: Path, tiny_folder: Path
    ) -> None:
        before = {*tmp_path.rglob("*")}
        done = call(*SPLIT, "--base", tiny_folder, "--dry-run")
        assert done.code == 0
        assert 'out = "runs/cat"' in done.out
        assert "# full: a sks cat in pencil sketch style" in done.out
        assert "together" in done.out
        assert {*tmp_path.rglob("*")} - before == {tmp_path / "runs", tmp_path / "runs/cat-learned.png"}
        assert "# What will be learned, 64×64 pixels: runs/cat-learned.png" in done.out
        assert Image.open("runs/cat-learned.png").size == (64, 64)
        Path("again.toml").write_text(done.out)  # comments included, it is a configuration file
        again = call("split", "--config", "again.toml", "--dry-run").out
        assert again.split("# Memory")[0] == done.out.split("# Memory")[0]

    def test_dry_run_warns_of_a_folder_in_which_no_run_can_begin(self, call: Call, tiny_folder: Path) -> None:
        Path("full").mkdir()
        Path("full/notes.txt").touch()
        done = call(*SPLIT, "--base", tiny_folder, "--out", "full", "--dry-run")
        assert done.code == 0
        assert "refused: full exists already and is not empty: choose another --out" in " ".join(done.err.split())

    @pytest.mark.parametrize(
        ("flags", "warning"),
        [
            (["--steps", "9"], ""),
            (["--rank", "1"], "this run is finished; choose another --out"),
            (["--steps", "9", "--rank", "1"], "these differ: rank: 2 → 1."),
        ],
    )
    def test_dry_run_warns_of_a_run_that_cannot_be_resumed_so(
        self, call: Call, finished: Path, flags: list[str], warning: str
    ) -> None:
        shutil.copytree(finished, "run")
        done = call("split", "--resume", "--out", "run", *flags, "--dry-run")
        assert done.code == 0
        err = " ".join(done.err.split())
        assert warning in err
        assert ("without --dry-run this is refused" in err) is bool(warning)

    def test_dry_run_opens_the_images(self, call: Call, tiny_folder: Path) -> None:
        Path("notes.png").write_text("dear diary")
        done = call("split", "notes.png", *SPLIT[2:], "--base", tiny_folder, "--dry-run")
        assert done.code == 2
        assert "not an image" in done.err

    @pytest.mark.parametrize("dry", [["--dry-run"], ["--out", "never"]])
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--blocks", "sdlx"], "no block map 'sdlx': there are sdxl, blora, bundled"),
            (["--optimizer", "adamw8bit"], "pip install bitsandbytes"),
            (["--resolution", "100"], "must be a multiple of 32"),
            (["--preset", "paper"], "precision fp16 needs a GPU"),
            (["--masks", "gone.png"], "gone.png"),
        ],
    )
    def test_untrainable_settings_are_reported_before_anything_is_loaded(
        self,
        call: Call,
        tiny_folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        args: list[str],
        message: str,
        dry: list[str],
    ) -> None:
        monkeypatch.setattr("unziplora.training.runner.load_base", None)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
        done = call(*SPLIT, "--base", tiny_folder, "--device", "cpu", *args, *dry)
        assert done.code == 2
        assert message in done.err
        assert not Path("never").exists()

    def test_our_warnings_are_single_lines_shown_once(self, call: Call, tiny_folder: Path) -> None:
        Image.new("RGB", (20, 20)).save("tiny.png")
        done = call("split", "tiny.png", *SPLIT[2:], "--base", tiny_folder, "--dry-run")
        assert done.err.count("warning: tiny.png is only 20×20 pixels") == 1
        assert ".py" not in done.err

    def test_resume_takes_up_the_configuration_of_the_run(self, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        from unziplora.runs.folder import RunFolder

        config = resolve(SplitConfig, {"images": ["cat.png"], "content": "cat", "style": "x", "out": "r", "rank": 5})
        with RunFolder.created(Path("r"), config):
            pass
        seen = {}

        def split(config: SplitConfig, resume: bool, progress: object) -> RunFolder:
            seen.update(rank=config.rank, device=config.device, resume=resume, images=config.images)
            return RunFolder(config.out)

        monkeypatch.setattr("unziplora.methods.unziplora.method.split", split)
        assert call("split", "--resume", "--out", "r", "--device", "cpu").code == 0
        assert seen == {"rank": 5, "device": "cpu", "resume": True, "images": [Path("cat.png").resolve()]}
        done = call("split", "--extend", "5", "--out", "r")
        assert (done.code, "continue it with --resume, then extend it" in done.err) == (2, True)
        RunFolder(Path("r")).card.touch()
        Path("more.toml").write_text("steps = 9\nsave_every = 2\n")
        monkeypatch.setattr(
            "unziplora.methods.unziplora.method.split",
            lambda config, resume, progress: (
                seen.update(steps=config.steps, every=config.save_every) or RunFolder(config.out)
            ),
        )
        assert call("split", "--extend", "5", "--out", "r", "--config", "more.toml").code == 0
        assert (seen["steps"], seen["every"]) == (config.steps + 5, 2)

    @pytest.mark.parametrize("flag", ["--resume", "--extend 5"])
    def test_continuing_in_another_way_names_the_command_to_type(self, call: Call, flag: str) -> None:
        from unziplora.runs.folder import RunFolder

        config = resolve(SplitConfig, {"images": ["cat.png"], "content": "cat", "style": "x", "out": "r"})
        with RunFolder.created(Path("r"), config):
            pass
        done = call("split", *flag.split(), "r")
        assert (done.code, f"r is a run, not an image: unziplora split {flag} --out r" in done.err) == (2, True)
        done = call("train", "blora", *flag.split(), "--out", "r")
        assert done.code == 2
        assert f"r: another command made this run: unziplora split {flag} --out r" in done.err

    @pytest.mark.parametrize("flag", [["--resume"], ["--extend", "5"]])
    def test_damaged_settings_of_a_run_are_named_with_their_file(self, call: Call, flag: list[str]) -> None:
        from unziplora.runs.folder import RunFolder

        config = resolve(SplitConfig, {"images": ["cat.png"], "content": "cat", "style": "x", "out": "r", "rank": 5})
        with RunFolder.created(Path("r"), config) as run:
            if "--extend" in flag:
                run.card.touch()
        settings = run.config_file.read_text()
        assert settings.count("rank =") == 1
        run.config_file.write_text(settings.replace("rank =", "rink ="))
        done = call("split", *flag, "--out", "r")
        assert done.code == 2
        assert f"{run.config_file}: " in done.err
        assert "rink" in done.err


class TestTrain:
    def test_dreambooth(self, call: Call, tiny_folder: Path) -> None:
        args = ["cat.png", "--content", "cat", "--base", tiny_folder, "--out", "d", "--rank", "2", "--steps", "2", "-q"]
        small = ["--sample-steps", "1", "--sample-seeds", "0", "--sample-guidance", "1", "--device", "cpu", "--json"]
        done = call("train", "dreambooth", *args, *small)
        assert done.code == 0, done.err
        assert done.json["content"] == "d/d-content.safetensors"
        assert "style" not in done.json
        again = call("sample", "d", "--steps", "1", "--dry-run", "--json")
        assert again.json["config"]["content"] == "d"
        assert again.json["config"]["style"] is None

    def test_both_words_make_one_lora_that_sample_takes(self, call: Call, tiny_folder: Path) -> None:
        words = ["--content", "cat", "--style", "ink", "--base", tiny_folder, "--out", "d", "--rank", "2", "-q"]
        done = call(
            "train", "dreambooth", "cat.png", *words, "--steps", "1", "--sample-seeds", "none", "--device", "cpu"
        )
        assert done.code == 0, done.err
        assert Path("d/d-lora.safetensors").is_file()
        made = call("sample", "d", "--steps", "1", "--guidance", "1", "--json").json["pictures"]
        with Image.open(made[0]) as picture:
            assert picture.text["parameters"].splitlines()[0] == "a sks cat in ink style"

    def test_blora(self, call: Call, tiny_folder: Path) -> None:
        args = ["cat.png", "--base", tiny_folder, "--out", "b", "--rank", "2", "--steps", "1", "--sample-seeds", "none"]
        done = call("train", "blora", *args, "--device", "cpu", "--json")
        assert done.code == 0, done.err
        assert {"content", "style"} <= done.json.keys()

    @pytest.mark.parametrize("method", ["dreambooth", "blora"])
    def test_a_dry_run_shows_prompts_and_memory(self, call: Call, tiny_folder: Path, method: str) -> None:
        words = ["--content", "cat", "--base", tiny_folder, "--device", "cpu"]
        shown = call("train", method, "cat.png", *words, "--dry-run", "--json").json
        assert any("sks" in text for text in shown["prompts"].values())
        assert shown["memory"]["lines"]
        assert list(Path("runs").iterdir()) == [Path(shown["image"])]

    def test_a_dry_run_looks_at_the_class_folder(self, call: Call, tiny_folder: Path) -> None:
        words = ["--content", "cat", "--base", tiny_folder, "--device", "cpu", "--prior", "1"]
        done = call("train", "dreambooth", "cat.png", *words, "--class-folder", "cat.png", "--dry-run")
        assert (done.code, "cat.png: class_folder is a file; name a folder" in done.err) == (2, True)

    def test_wrong_requests(self, call: Call) -> None:
        done = call("train", "dreambooth", "cat.png")
        assert (done.code, "nothing to learn: give a word" in done.err) == (2, True)
        done = call("train", "blora", "gone.png", "--base", "bundled")
        assert (done.code, "gone.png" in done.err) == (2, True)
        done = call("train", "zero")
        assert (done.code, "No such command 'zero'" in done.err) == (2, True)


class TestFaultsOfTheMachine:
    @pytest.fixture
    def failing(self, call: Call, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
        def run(error: BaseException, *args: object) -> Done:
            def split(*_: object, **__: object) -> None:
                raise error

            monkeypatch.setattr("unziplora.methods.unziplora.method.split", split)
            return call(*SPLIT, *args)

        return run

    def test_exit_code_1(self, failing: Callable[..., Done]) -> None:
        done = failing(MachineError("runs/cat: the disk is full"))
        assert (done.code, done.err) == (1, "error: runs/cat: the disk is full\n")

    def test_a_stopped_run_names_the_command_that_resumes(self, failing: Callable[..., Done]) -> None:
        done = failing(Interrupted("stopped after step 3; continue with: unziplora split --resume --out runs/cat"))
        assert done.code == 130
        assert done.err.startswith("stopped after step 3")

    def test_a_second_ctrl_c(self, failing: Callable[..., Done]) -> None:
        assert failing(KeyboardInterrupt()).code == 130

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            MemoryError(),
        ],
    )
    def test_too_little_memory_names_the_next_smaller_setting(
        self, failing: Callable[..., Done], error: Exception
    ) -> None:
        done = failing(error)
        assert done.code == 1
        assert "Next smaller setting: --gradient-checkpointing" in done.err
        assert "--batch-size 2" in failing(error, "--batch-size", "4").err
        assert "--resolution 768" in failing(error, "--gradient-checkpointing").err
        least = ["--gradient-checkpointing", "--resolution", "512", "--rank"]
        assert "--rank 32" in failing(error, *least, "64").err
        assert "smaller base" in failing(error, *least, "4").err

    def test_a_sum_of_loras_of_a_base_that_is_not_here_runs_out_of_memory_too(self, tmp_path: Path) -> None:
        keys = {"content_lora": "a", "style_lora": "b", "method": "direct", "base": "ponyXL", "out": tmp_path / "x"}
        with pytest.raises(MachineError, match="not enough memory"), memory_advice(resolve(ZipConfig, keys)):
            raise MemoryError

    def test_what_the_system_refuses_is_no_bug(self, failing: Callable[..., Done]) -> None:
        for number in (errno.EACCES, errno.EROFS, errno.EIO):
            done = failing(OSError(number, os.strerror(number), "runs/a/a-style.safetensors"))
            assert done.code == 1
            assert done.err.startswith(
                f"error: runs/a/a-style.safetensors: {os.strerror(number)}; check its permissions"
            )

    def test_bug_is_reported_in_one_line_unless_debugging(
        self, failing: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = failing(ZeroDivisionError("division by zero"))
        assert done.code == 1
        assert "a fault in unziplora itself: ZeroDivisionError" in done.err
        assert len(done.err.splitlines()) == 1
        monkeypatch.setenv("UNZIPLORA_DEBUG", "1")
        with pytest.raises(ZeroDivisionError):
            failing(ZeroDivisionError("division by zero"))

    def test_closed_pipe_is_not_a_fault(self, finished: Path) -> None:
        command = [sys.executable, "-m", "unziplora", "inspect", str(finished / "run-style.safetensors")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""


def test_ctrl_c_saves_and_the_printed_command_goes_on(
    call: Call, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, log = Trainer.step, Path("stopped/log.jsonl")

    def stopped_at_three(self: Trainer, number: int) -> StepReport:
        if number == 3:
            monkeypatch.setattr(Trainer, "step", step)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", stopped_at_three)
    args = [*SPLIT, "--base", tiny_folder, *QUICK, "--steps", "6", "--sample-seeds", "none", "--out", "stopped"]
    done = call(*args)
    assert done.code == 130
    resume = done.err.strip().splitlines()[-1].split()
    assert resume[:3] == ["unziplora", "split", "--resume"]
    assert not Path("stopped/stopped-style.safetensors").exists()
    assert call(*resume[1:], "--quiet").code == 0
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 7))
    assert Path("stopped/stopped-style.safetensors").is_file()


class TestFiles:
    def test_inspect(self, call: Call, finished: Path) -> None:
        done = call("inspect", finished / "run-style.safetensors")
        assert done.code == 0
        assert "loads in" in done.out
        assert "pencil sketch" in done.out
        one = call("inspect", finished / "run-style.safetensors", "--json").json
        assert one["ranks"] == {"2": one["modules"]}
        both = call("inspect", finished / "run-style.safetensors", finished / "run-content.safetensors", "--json").json
        assert len(both["files"]) == 2

    def test_inspect_of_a_folder_looks_into_its_subfolders(self, call: Call) -> None:
        lora_file(Path("loras/cat.safetensors"))
        lora_file(Path("loras/style/a/ink.safetensors"))
        Path("loras/run/checkpoints").mkdir(parents=True)
        Path("loras/run/checkpoints/000001.safetensors").touch()
        files = call("inspect", "loras", "--json").json["files"]
        assert [file["path"] for file in files] == ["loras/cat.safetensors", "loras/style/a/ink.safetensors"]

    def test_inspect_of_a_folder_without_files(self, call: Call) -> None:
        Path("empty").mkdir()
        done = call("inspect", "empty")
        assert (done.code, done.err) == (2, "error: empty: there is no .safetensors file in this folder\n")

    def test_inspect_of_a_folder_with_a_file_that_is_not_a_lora(self, call: Call) -> None:
        for path in (lora_file(Path("loras/a.safetensors")), Path("loras/b.safetensors"), Path("loras/c.txt")):
            path.touch()
        done = call("inspect", "loras")
        assert done.code == 2
        assert "loads in" in done.out
        assert done.out.endswith("loras/b.safetensors: the file is empty; fetch it again\n")
        good, bad = call("inspect", "loras", "--json").json["files"]
        assert (good["path"], good["ranks"]) == ("loras/a.safetensors", {"4": 1})
        assert bad == {"path": "loras/b.safetensors", "error": "loras/b.safetensors: the file is empty; fetch it again"}

    def test_escape_sequences_of_headers_and_names_do_not_reach_the_terminal(self, call: Call) -> None:
        path = lora_file(Path("a\x1b[2J\u202e.safetensors"))
        lora = read_lora(path)
        words = {"modelspec.trigger_phrase": "\x1b]0;owned\x07cat\x9b31m", "ss_sd_model_name": "\u202ebase\r"}
        write_lora(lora, path, metadata={**lora.metadata, **words})
        for done in (
            call("inspect", path),
            call("inspect", path, "--json"),
            call("sample", path, "--prompts", "x\x1b[2J", "--dry-run"),
            call("inspect", "\x1b[31mgone.safetensors"),
            call("\x1b[31m"),
            call("split", "--content", "\x9b2J", "--config", "\x1b.toml"),
        ):
            assert done.out + done.err
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", done.out + done.err)
        assert call("inspect", path, "--json").json["trigger_words"] == [words["modelspec.trigger_phrase"]]

    def test_convert_and_back(self, call: Call) -> None:
        path = lora_file(Path("a.safetensors"))
        done = call("convert", path, "b.safetensors", "--layout", "diffusers", "--json")
        assert done.code == 0
        assert done.json["modules"] == 1
        assert call("convert", "b.safetensors", "c.safetensors").code == 0
        before, after = (read_lora(Path(name)).modules for name in ("a.safetensors", "c.safetensors"))
        for name, pair in before.items():
            torch.testing.assert_close(pair[1] @ pair[0], after[name][1] @ after[name][0])

    def test_what_is_there_is_replaced_only_when_asked(self, call: Call) -> None:
        path = lora_file(Path("a.safetensors"))
        Path("b.safetensors").write_text("mine")
        assert call("convert", path, "b.safetensors").code == 2
        assert Path("b.safetensors").read_text() == "mine"
        assert call("convert", path, "b.safetensors", "--force").code == 0

    def test_resize(self, call: Call) -> None:
        path = lora_file(Path("a.safetensors"), rank=4)
        done = call("resize", path, "b.safetensors", "--rank", "2")
        assert done.code == 0
        assert "rank 2" in done.out
        assert call("resize", path, "c.safetensors", "--energy", "0.5", "--json").json["energy"] >= 0.5

    def test_pickles_are_refused(self, call: Call) -> None:
        torch.save({"a": torch.zeros(1)}, "a.pt")
        for command in (["inspect", "a.pt"], ["convert", "a.pt", "b.safetensors"]):
            done = call(*command)
            assert done.code == 2
            assert "it never is; convert it to .safetensors" in done.err


class TestHomeFolder:
    """No shell expands ~ in quotes, or after an equals sign."""

    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        home = tmp_path / "home"
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("USERPROFILE", str(home))
        return home

    def test_files_are_read_from_and_written_to_home(self, call: Call, home: Path) -> None:
        lora_file(home / "a.safetensors")
        assert call("inspect", "~/a.safetensors").code == 0
        done = call("convert", "~/a.safetensors", "~/b.safetensors", "--json")
        assert done.json["path"] == str(home / "b.safetensors")
        assert call("resize", "~/b.safetensors", "~/c.safetensors", "--rank", "1").code == 0
        assert sorted(path.name for path in home.iterdir()) == ["a.safetensors", "b.safetensors", "c.safetensors"]
        assert not Path("~").exists()

    def test_settings_images_and_run_folders_are_found_at_home(self, call: Call, home: Path, tiny_folder: Path) -> None:
        (home / "my.toml").write_text(f"content = 'cat'\nstyle = 'ink'\nbase = '{tiny_folder}'\nblocks = '~/map.toml'")
        (home / "map.toml").write_text("content = ['up_blocks.0']\nstyle = ['up_blocks.1']")
        Path("cat.png").rename(home / "cat.png")
        done = call("split", "~/cat.png", "--config=~/my.toml", "--out=~/run", "--dry-run", "--json")
        assert done.code == 0, done.err
        assert done.json["config"]["images"] == [str(home / "cat.png")]
        assert done.json["config"]["out"] == str(home / "run")

    def test_loras_of_sample_grid_and_zip_are_found_at_home(self, call: Call, home: Path, tiny_folder: Path) -> None:
        lora_file(home / "a.safetensors")
        base = ["--base", tiny_folder, "--dry-run", "--json"]
        for args in (
            ["sample", "~/a.safetensors", "--prompts", "x", *base],
            ["grid", "--content=~/a.safetensors", "--prompts", "x", "--out=~/grid.png", *base],
        ):
            done = call(*args)
            assert done.code == 0, done.err
            assert done.json["config"]["content"] == str(home / "a.safetensors")
        words = ["--content-prompt", "x", "--style-prompt", "y", "--method", "direct"]
        done = call("zip", "~/a.safetensors", "~/a.safetensors", *words, *base)
        assert done.json["config"]["style_lora"] == str(home / "a.safetensors")
        assert done.json["config"]["out"] == "runs/a-a"


class TestPictures:
    def test_sample_a_run(self, call: Call, finished: Path) -> None:
        done = call("sample", finished, "--steps", "1", "--guidance", "1", "--seeds", "0", "--seeds", "1", "--json")
        assert done.code == 0, done.err
        assert len(done.json["pictures"]) == 2
        with Image.open(done.json["pictures"][0]) as picture:
            assert picture.size == (64, 64)

    def test_grid(self, call: Call, finished: Path) -> None:
        options = ["--steps", "1", "--guidance", "1", "--content-strengths", "0.5", "--style-strengths", "1"]
        done = call("grid", finished, *options, "--out", "g.png")
        assert done.code == 0, done.err
        assert done.out == "g.png\n"
        assert Path("g.png").is_file()

    def test_a_dry_run_shows_the_settings(self, call: Call, finished: Path) -> None:
        done = call("sample", finished, "--steps", "3", "--dry-run", "--json")
        assert done.json["config"]["steps"] == 3
        assert done.json["config"]["content"] == done.json["config"]["style"] == str(finished)
        assert done.json["prompts"][0]["full"] == "a sks cat in pencil sketch style"
        assert Path(done.json["base"]).is_dir()
        assert "# prompt: a sks cat in pencil sketch style" in call("sample", finished, "--dry-run").out

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["sample", "nope"], "no such run folder or LoRA file"),
            (["sample", "--base", "nope", "--prompts", "x"], "base 'nope': no such file or folder"),
            (["grid", "--base", "nope", "--prompts", "x"], "base 'nope': no such file or folder"),
            (["blocks", "--base", "nope"], "base 'nope': no such file or folder"),
        ],
    )
    def test_a_dry_run_refuses_what_the_run_would(self, call: Call, args: list[str], message: str) -> None:
        done = call(*args, "--dry-run")
        assert done.code == 2
        assert message in done.err

    def test_one_file_is_one_lora(self, call: Call, finished: Path) -> None:
        for kind, other in (("content", "style"), ("style", "content")):
            file = finished / f"{finished.name}-{kind}.safetensors"
            plan = call("sample", file, "--dry-run", "--json").json
            assert plan["config"][kind] == str(file)
            assert plan["config"][other] is None


class TestFlags:
    class Toy(Recipe):
        numbers: list[int] = Field([1, 2], description="Numbers.")
        pair: tuple[float, float] = Field((0.5, 1.0), description="Pair.")
        dial: float | None = Field(None, description="Dial.")
        switch: bool = Field(True, description="Switch.")
        path: Path | None = Field(None, description="Path.")

    def typed(self, *args: str) -> dict[str, Any]:
        command = click.Command("toy", params=[*flags.key_options(self.Toy)])
        return flags.typed_keys(command.make_context("toy", list(args)))

    def test_only_typed_flags_are_keys(self) -> None:
        assert self.typed() == {}
        assert self.typed("--no-switch", "--dial", "0.5") == {"switch": False, "dial": 0.5}

    def test_lists_and_pairs(self) -> None:
        found = self.typed("--numbers", "3", "--numbers", "4", "--pair", "1", "2")
        assert found == {"numbers": [3, 4], "pair": (1.0, 2.0)}

    def test_none_clears(self) -> None:
        found = self.typed("--numbers", "none", "--dial", "none", "--path", "none")
        assert found == {"numbers": [], "dial": None, "path": None}


def test_warnings_of_libraries_are_hidden(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(module: str, text: str) -> None:
        exec("import warnings; warnings.warn(text, stacklevel=1)", {"__name__": module, "text": text})

    def inspect(*_: object) -> None:
        warn("torch.nn", "deprecated")
        warn("unziplora.x", "told")
        warn("unziplora.x", "told")
        raise KeyboardInterrupt

    monkeypatch.setattr("unziplora.formats.inspect.inspect", inspect)
    done = call("inspect", "a.safetensors")
    assert done.code == 130
    assert done.err.split("\n") == ["warning: told", "", "interrupted", ""]


def test_the_default_run_folder_is_named_after_the_picture() -> None:
    from unziplora.cli.training import run_layers

    def out(name: str | None) -> dict[str, Any]:
        return run_layers(SplitConfig, "split", {}, {}, name, False)[-1]

    assert out("My cat (1)") == {"out": "runs/My-cat-1"}
    assert out("…") == {"out": "runs/image"}
    assert out(None) == {}


@pytest.mark.parametrize(
    ("before", "after"), [(None, ("PASSIVE", "1000")), ("ACTIVE", ("ACTIVE", None)), ("PASSIVE", ("PASSIVE", None))]
)
def test_threads_do_not_keep_the_cores_while_they_wait(
    call: Call, monkeypatch: pytest.MonkeyPatch, before: str | None, after: tuple[str, str | None]
) -> None:
    for name in cli.THREADS:
        monkeypatch.setenv(name, before or "")  # so that it is restored
        monkeypatch.delenv(name)
    if before is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    assert call("--version").code == 0
    assert tuple(map(os.environ.get, cli.THREADS)) == after


def test_commands_are_what_the_help_lists() -> None:
    assert isinstance(split_command, click.Command)
    assert set(cli.COMMANDS) >= {"split", "sample", "grid", "inspect", "convert", "resize", "doctor", "demo"}
