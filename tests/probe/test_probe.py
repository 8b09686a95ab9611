import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from unziplora.config.probe import ProbeConfig
from unziplora.errors import MachineError, UserError
from unziplora.lora.blocks import check_blocks, read_blocks
from unziplora.lora.inject import adapted_layers, attention_linears
from unziplora.metrics.statistics import Statistics
from unziplora.models.base import Base
from unziplora.models.text import embed, embed_negative
from unziplora.probe.probe import attention_blocks, draw, find_blocks, movements, swap, swapped
from unziplora.sampling.pipeline import Settings, generate_latents

P, Q = "a cat in ink style", "a dog in ink style"
BLOCKS = [
    *(f"down_blocks.{level}.attentions.{number}" for level in (1, 2) for number in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{level}.attentions.{number}" for level in (0, 1) for number in (0, 1, 2)),
]
FAST = Settings(steps=2)
QUICK: dict[str, Any] = {"pairs": 2, "contents": ["cat", "dog", "fox"], "styles": ["ink", "oil"], "steps": 1}


def hooks(base: Base) -> int:
    return sum(len(module._forward_pre_hooks) for module in base.unet.modules())


def record(base: Base) -> dict[str, torch.Tensor]:
    """What every layer of the cross-attentions is given in the first step, by its path."""
    seen: dict[str, torch.Tensor] = {}
    for name, module in base.unet.named_modules():
        if ".attn2." in name and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0].clone()))
    return seen


def test_attention_blocks_come_in_the_order_of_computation(shared_base: Base):
    assert attention_blocks(shared_base.unet) == BLOCKS


class TestSwap:
    def test_of_no_block_is_the_prompt_exactly(self, tiny_base: Base):
        assert torch.equal(swap(tiny_base, P, Q, (), [3], FAST), generate_latents(tiny_base, P, [3], FAST))

    def test_of_all_blocks_is_the_other_prompt_but_for_the_pooled_embedding(self, tiny_base: Base):
        made, other = swap(tiny_base, P, Q, BLOCKS, [3], FAST), generate_latents(tiny_base, Q, [3], FAST)
        assert not torch.allclose(made, other, atol=1e-4)
        # the pooled embedding comes in through the first columns of this layer alone
        tiny_base.unet.add_embedding.linear_1.weight.data[:, : tiny.WIDTHS[1]] = 0
        made, other = swap(tiny_base, P, Q, BLOCKS, [3], FAST), generate_latents(tiny_base, Q, [3], FAST)
        torch.testing.assert_close(made, other)
        assert not torch.allclose(made, generate_latents(tiny_base, P, [3], FAST), atol=1e-4)

    @pytest.mark.parametrize("block", ["mid_block.attentions.0", "up_blocks.0.attentions.1"])
    def test_changes_what_the_keys_and_values_of_that_block_are_given(self, tiny_base: Base, block: str):
        seen = record(tiny_base)
        swap(tiny_base, P, Q, [block], [3], Settings(steps=1))
        texts = embed(tiny_base, [P, Q]).tokens
        empty = embed_negative(tiny_base, [""]).tokens[0]
        keys = {name: given for name, given in seen.items() if name.endswith(("to_k", "to_v"))}
        assert len(keys) == 2 * (2 * 1 + 2 * 2 + 2 + 3 * 2 + 3 * 1)  # attn2 per block: 1, or 2 in the innermost level
        for name, given in keys.items():
            text = texts[1] if name.startswith(block + ".") else texts[0]
            assert torch.equal(given, torch.stack([empty, text])), name

    def test_leaves_all_else_as_it_was_up_to_that_block(self, fresh_base):
        plain, changed = fresh_base(), fresh_base()
        seen, seen_changed = record(plain), record(changed)
        block = "up_blocks.0.attentions.1"
        swap(plain, P, Q, (), [3], Settings(steps=1))
        swap(changed, P, Q, [block], [3], Settings(steps=1))
        different = [name for name in seen if not torch.equal(seen[name], seen_changed[name])]
        first = f"{block}.transformer_blocks.0.attn2"
        assert different[:3] == [f"{first}.to_k", f"{first}.to_v", f"{first}.to_out.0"]
        assert f"{first}.to_q" not in different

    def test_depends_on_the_seed_alone(self, tiny_base: Base):
        block = ["up_blocks.0.attentions.1"]
        both = swap(tiny_base, P, Q, block, [1, 3], Settings(steps=2, batch_size=2))
        torch.testing.assert_close(both[1:], swap(tiny_base, P, Q, block, [3], FAST), rtol=1e-3, atol=1e-3)

    def test_leaves_no_hook_and_no_layer_behind(self, tiny_base: Base):
        with swapped(tiny_base.unet, BLOCKS):
            assert hooks(tiny_base) == 17
        swap(tiny_base, P, Q, BLOCKS, [3], Settings(steps=1))
        assert hooks(tiny_base) == 0
        assert not adapted_layers(tiny_base.unet)

    def test_leaves_no_hook_behind_after_a_fault(self, tiny_base: Base):
        def stop(done: int, total: int) -> None:
            assert hooks(tiny_base) == 18  # 17 and that of the adapted layers
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            swap(tiny_base, P, Q, BLOCKS, [3], FAST, stop)
        with pytest.raises(UserError):
            swap(tiny_base, P, Q, BLOCKS, [], FAST)
        assert hooks(tiny_base) == 0
        assert not adapted_layers(tiny_base.unet)


class Gray:
    """One number per picture as its only feature: the mean of red for content, of green for style."""

    def content(self, pictures) -> torch.Tensor:
        return torch.tensor([[picture.getpixel((0, 0))[0] / 100] for picture in pictures])

    def style(self, pictures) -> torch.Tensor:
        return torch.tensor([[picture.getpixel((0, 0))[1] / 100] for picture in pictures])


def test_movements_are_taken_seed_by_seed_against_their_own_references():
    def dots(*values: tuple[int, int]) -> list[Image.Image]:
        return [Image.new("RGB", (1, 1), (*value, 0)) for value in values]

    rows = [dots((0, 9), (100, 9)), dots((25, 9), (100, 9)), dots((50, 10), (200, 9)), dots((100, 10), (200, 19))]
    torch.testing.assert_close(movements(Gray(), "content", rows), torch.tensor([[0.25, 0.0], [0.5, 1.0]]))
    torch.testing.assert_close(movements(Gray(), "style", rows), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


def test_pictures_of_a_pair_are_swaps_of_one_word(tiny_base: Base):
    config = ProbeConfig(**{**QUICK, "seeds": [4, 5], "guidance": 1.0})
    pair, blocks = config.word_pairs()[0], ["mid_block.attentions.0", "up_blocks.0.attentions.1"]
    drawn = draw(tiny_base, config, pair, blocks)
    assert {axis: [len(row) for row in rows] for axis, rows in drawn.items()} == {"content": [2] * 5, "style": [2] * 5}

    def same(pictures: list[Image.Image], prompt: str, other: str, choice: list[str]) -> bool:
        latents = swap(tiny_base, prompt, other, choice, [4, 5], Settings(steps=1, guidance=1.0))
        made = tiny_base.vae.decode(latents / tiny_base.vae.config.scaling_factor, return_dict=False)[0]
        wanted = tiny_base.pipe.image_processor.postprocess(made.detach(), output_type="pil")
        pairs = [
            (torch.tensor(list(one.tobytes())), torch.tensor(list(two.tobytes())))
            for one, two in zip(pictures, wanted, strict=True)
        ]
        return all((one - two).abs().max() <= 1 for one, two in pairs)

    start, dog, oil = "a cat in ink style", "a dog in ink style", "a cat in oil style"
    assert drawn["content"][0] is drawn["style"][0]
    assert same(drawn["content"][0], start, start, [])
    assert same(drawn["content"][1], start, dog, blocks[:1])
    assert same(drawn["content"][3], start, dog, blocks)
    assert same(drawn["content"][4], dog, dog, [])
    assert same(drawn["style"][2], start, oil, blocks[1:])
    assert same(drawn["style"][4], oil, oil, [])


@pytest.fixture(scope="module")
def finished(shared_base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[ProbeConfig, Any, list]:
    """A probe of the tiny base, its findings, and the progress that it told."""
    config = ProbeConfig(**QUICK, seeds=[0, 7], out=tmp_path_factory.mktemp("probe") / "out", base="tiny")
    seen: list[tuple[int, int]] = []
    findings = find_blocks(config, shared_base, progress=lambda *report: seen.append(report))
    return config, findings, seen


class TestProbe:
    def test_finds_a_score_for_every_block(self, finished):
        config, findings, _ = finished
        assert list(findings.blocks) == BLOCKS
        assert (findings.base, findings.measure) == ("tiny-xl", "statistics")
        for row in [*findings.blocks.values(), findings.together]:
            for score in (row.content, row.style):
                assert 0 <= score.mean <= 1
                assert score.pairs == config.pairs

    def test_writes_a_map_that_fits_the_base(self, finished, shared_base: Base):
        _config, findings, _ = finished
        blocks = read_blocks(findings.files["map"])
        assert (list(blocks.content), list(blocks.style)) == (findings.content, findings.style)
        check_blocks(blocks, attention_linears(shared_base.unet))

    def test_writes_figures_that_the_scores_follow_from(self, finished):
        config, findings, _ = finished
        told = json.loads((config.out / "probe.json").read_text())
        assert told["pairs"][0] == {"content": "cat", "style": "ink", "other_content": "dog", "other_style": "oil"}
        for block, row in findings.blocks.items():
            values = torch.tensor(told["movements"]["style"][block])
            assert values.shape == (2, 2)
            assert values.mean().item() == pytest.approx(row.style.mean, abs=1e-4)
            assert told["blocks"][block]["content"]["mean"] == row.content.mean
        assert told["config"]["seeds"] == [0, 7]

    def test_writes_plot_and_pictures_and_nothing_else(self, finished):
        config, findings, _ = finished
        names = {path.name for path in config.out.iterdir()}
        assert names == {"blocks.toml", "probe.json", "probe.png", "pictures.png"}
        assert {Path(path).name for path in findings.files.values()} == names
        with Image.open(config.out / "pictures.png") as picture:
            assert picture.height > 14 * 192  # P, eleven blocks, all of them, Q
            assert picture.width > 4 * 192  # two seeds of both swaps

    def test_tells_its_progress_over_all_pictures(self, finished):
        _, _, seen = finished
        total = 2 * 27 * 2  # pairs · pictures · seeds, one step each
        assert seen == [(done, total) for done in range(1, total + 1)]


def test_own_measures_will_do(tiny_base: Base, tmp_path: Path):
    asked = []

    class Mine(Statistics):
        def content(self, pictures) -> torch.Tensor:
            asked.append(len(pictures))
            return super().content(pictures)

    keys = {**QUICK, "pairs": 1, "seeds": [0], "content_blocks": 1, "style_blocks": 0}
    findings = find_blocks(ProbeConfig(**keys, out=tmp_path / "out"), tiny_base, Mine())
    assert asked == [14]
    assert findings.measure == "mine"
    assert len(findings.content) <= 1
    assert findings.style == []
    assert findings.together.content.error is None


def test_what_cannot_be_probed_is_refused(tiny_base: Base, tmp_path: Path):
    class Blind:
        def content(self, pictures) -> torch.Tensor:
            return torch.ones(len(pictures), 1)

        style = content

    def refused(message: str, loaded: Base | None = tiny_base, **keys: object) -> None:
        with pytest.raises(UserError, match=message):
            find_blocks(
                ProbeConfig(**{**QUICK, "pairs": 1, "seeds": [0], "out": tmp_path / "out", **keys}), loaded, Blind()
            )

    refused("base 'nowhere/at/all': no such file or folder", None, base="nowhere/at/all")
    refused("device 'warp'", None, device="warp")
    assert not (tmp_path / "out").exists()
    refused("whatever the content words: give words that it knows with --contents")
    refused("multiple of 8", resolution=20)
    assert not any((tmp_path / "out").iterdir())
    (tmp_path / "out" / "blocks.toml").touch()
    refused("exists already and is not an empty folder")
    refused("exists already and is not an empty folder", out=tmp_path / "out" / "blocks.toml")
    with pytest.raises(MachineError, match="a file is where a folder should be"):
        find_blocks(ProbeConfig(**QUICK, out=tmp_path / "out" / "blocks.toml" / "deep"), tiny_base)
    assert hooks(tiny_base) == 0
