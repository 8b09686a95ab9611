"""`unziplora blocks` in this process, on the tiny base."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from unziplora.config.probe import ProbeConfig
from unziplora.lora.blocks import read_blocks
from unziplora.probe import probe
from unziplora.utils.inputs import read_toml

Call = Callable[..., tuple[int, str, str]]
QUICK = ["--pairs", "1", "--seeds", "0", "--steps", "1", "--device", "cpu"]


@pytest.mark.slow
def test_prints_the_table_and_split_takes_the_map(call: Call, tiny_folder: Path, tmp_path: Path):
    code, out, err = call("blocks", "--base", tiny_folder, *QUICK, "--out", "found")
    assert code == 0, err
    assert "up_blocks.1.attentions.2" in out
    assert "map       found/blocks.toml" in out
    assert "step 27/27" in err
    found = read_blocks("found/blocks.toml")
    assert not set(found.content) & set(found.style)

    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save("cat.png")
    small = ["--steps", "2", "--column-periods", "1", "--column-warmup", "1", "--score-timesteps", "1", "--rank", "2"]
    args = ["split", "cat.png", "--content", "cat", "--style", "ink", "--base", tiny_folder, "--device", "cpu", *small]
    code, _, err = call(*args, "--sample-seeds", "none", "--blocks", "found/blocks.toml", "--out", "run")
    assert code == 0, err
    assert Path(read_toml(tmp_path / "run" / "config.toml")["blocks"]).name == "blocks.toml"


def test_json_is_one_document_with_scores_map_and_files(call: Call, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def draw(base, config, pair, blocks, progress) -> probe.PairImages:
        gray = Image.linear_gradient("L")
        turned = [[Image.merge("RGB", (gray.rotate(9 * n), gray, gray))] for n in range(len(blocks) + 3)]
        return {"content": turned, "style": turned}

    monkeypatch.setattr(probe, "generate_pair", draw)
    code, out, _ = call("blocks", "--base", tiny_folder, *QUICK, "--json", "--quiet", "--contents", "cat",
                        "--contents", "dog")  # fmt: skip
    assert code == 0
    told = json.loads(out)
    assert len(told["blocks"]) == 11
    assert set(told["blocks"]["mid_block.attentions.0"]) == {"content", "style"}
    assert told["files"]["map"] == "blocks/blocks.toml"
    assert json.loads(Path("blocks/probe.json").read_text())["pairs"][0]["other_content"] == "dog"


@pytest.mark.slow
def test_dry_run_shows_settings_and_pairs_and_makes_nothing(call: Call, tmp_path: Path):
    Path("words.toml").write_text('contents = ["cat", "dog"]\nstyles = ["ink", "oil"]\npairs = 2\n')
    code, out, _ = call("blocks", "--config", "words.toml", "--steps", "7", "--dry-run")
    assert code == 0
    assert "steps = 7" in out
    assert "# cat (dog instead), ink (oil instead)" in out
    assert len(json.loads(call("blocks", "--config", "words.toml", "--dry-run", "--json")[1])["pairs"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["words.toml"]


def test_every_key_is_a_flag_and_the_help_shows_an_example(call: Call):
    code, out, _ = call("blocks", "--help-all")
    assert code == 0
    assert all("--" + name.replace("_", "-") in out for name in ProbeConfig.model_fields)
    assert "unziplora split cat.jpg" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--base", "nowhere"], "base 'nowhere': no such file or folder"),
        (["--contents", "cat"], "contents: "),
        (["--contents", "cat", "--contents", "Cat"], "'Cat' is there twice"),
        (["--pairs", "99"], "30 pairs at most"),
        (["--clip", "no/such/folder"], "--clip no/such/folder: no model can be loaded"),
        (["--measure", "clip"], "No such option '--measure'"),
    ],
)
def test_wrong_requests_are_reported_in_one_message(call: Call, tmp_path: Path, args: list[str], message: str):
    code, out, err = call("blocks", *args)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())
