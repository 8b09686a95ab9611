import json
from dataclasses import replace
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
from unziplora.probe.probe import attention_blocks, find_blocks, generate_pair, movements, swap, swapped
from unziplora.sampling.pipeline import Settings, generate_latents

P, Q = "a cat in ink style", "a dog in ink style"
BLOCKS = [
    *(f"down_blocks.{level}.attentions.{number}" for level in (1, 2) for number in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{level}.attentions.{number}" for level in (0, 1) for number in (0, 1, 2)),
]
FAST = Settings(steps=2)
QUICK: dict[str, Any] = {
    "pairs": 2,
    "contents": ["cat", "dog", "fox"],
    "styles": ["ink", "oil"],
    "steps": 1,
    "guidance": 1.0,
}


def hooks(base: Base) -> int:
    return sum(len(module._forward_pre_hooks) for module in base.unet.modules())


def record(base: Base) -> dict[str, torch.Tensor]:
    """Record the input of every layer of the cross-attentions in the first step, by path."""
    seen: dict[str, torch.Tensor] = {}
    for name, module in base.unet.named_modules():
        if ".attn2." in name and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0].clone()))
    return seen


def test_attention_blocks_come_in_the_order_of_computation(shared_base: Base):
    assert attention_blocks(shared_base.unet) == BLOCKS


class TestSwap:
    def test_swap_of_no_block_equals_the_prompt(self, tiny_base: Base):
        assert torch.equal(swap(tiny_base, P, Q, (), [3], FAST), generate_latents(tiny_base, P, [3], FAST))

    def test_swap_of_all_blocks_equals_the_other_prompt_except_for_the_pooled_embedding(self, tiny_base: Base):
        made, other = swap(tiny_base, P, Q, BLOCKS, [3], FAST), generate_latents(tiny_base, Q, [3], FAST)
        assert not torch.allclose(made, other, atol=1e-4)
        # the pooled embedding comes in through the first columns of this layer alone
        tiny_base.unet.add_embedding.linear_1.weight.data[:, : tiny.WIDTHS[1]] = 0
        made, other = swap(tiny_base, P, Q, BLOCKS, [3], FAST), generate_latents(tiny_base, Q, [3], FAST)
        torch.testing.assert_close(made, other)
        assert not torch.allclose(made, generate_latents(tiny_base, P, [3], FAST), atol=1e-4)

    @pytest.mark.parametrize("block", ["mid_block.attentions.0", "up_blocks.0.attentions.1"])
    def test_only_keys_and_values_of_that_block_receive_the_other_prompt(self, tiny_base: Base, block: str):
        seen = record(tiny_base)
        swap(tiny_base, P, Q, [block], [3], Settings(steps=1))
        texts = embed(tiny_base, [P, Q]).tokens
        empty = embed_negative(tiny_base, [""]).tokens[0]
        keys = {name: value for name, value in seen.items() if name.endswith(("to_k", "to_v"))}
        assert len(keys) == 2 * (2 * 1 + 2 * 2 + 2 + 3 * 2 + 3 * 1)  # attn2 per block: 1, or 2 in the innermost level
        for name, value in keys.items():
            text = texts[1] if name.startswith(block + ".") else texts[0]
            assert torch.equal(value, torch.stack([empty, text])), name

    def test_layers_before_that_block_are_unchanged(self, fresh_base):
        plain, changed = fresh_base(), fresh_base()
        seen, seen_changed = record(plain), record(changed)
        block = "up_blocks.0.attentions.1"
        swap(plain, P, Q, (), [3], Settings(steps=1))
        swap(changed, P, Q, [block], [3], Settings(steps=1))
        different = [name for name in seen if not torch.equal(seen[name], seen_changed[name])]
        first = f"{block}.transformer_blocks.0.attn2"
        assert different[:3] == [f"{first}.to_k", f"{first}.to_v", f"{first}.to_out.0"]
        assert f"{first}.to_q" not in different

    def test_result_depends_only_on_the_seed(self, tiny_base: Base):
        block = ["up_blocks.0.attentions.1"]
        both = swap(tiny_base, P, Q, block, [1, 3], Settings(steps=2, batch_size=2))
        torch.testing.assert_close(both[1:], swap(tiny_base, P, Q, block, [3], FAST), rtol=1e-3, atol=1e-3)

    def test_no_hook_and_no_layer_remains(self, tiny_base: Base):
        with swapped(tiny_base.unet, BLOCKS):
            assert hooks(tiny_base) == 17
        swap(tiny_base, P, Q, BLOCKS, [3], Settings(steps=1))
        assert hooks(tiny_base) == 0
        assert not adapted_layers(tiny_base.unet)

    def test_no_hook_remains_after_an_error(self, tiny_base: Base):
        def stop(done: int, total: int) -> None:
            assert hooks(tiny_base) == 18  # 17 and that of the adapted layers
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            swap(tiny_base, P, Q, BLOCKS, [3], FAST, stop)
        with pytest.raises(UserError):
            swap(tiny_base, P, Q, BLOCKS, [3], replace(FAST, width=4))
        assert hooks(tiny_base) == 0
        assert not adapted_layers(tiny_base.unet)


class Gray:
    """Measure with one number per image: red for content, green for style."""

    def content(self, images) -> torch.Tensor:
        return torch.tensor([[image.getpixel((0, 0))[0] / 100] for image in images])

    def style(self, images) -> torch.Tensor:
        return torch.tensor([[image.getpixel((0, 0))[1] / 100] for image in images])


def test_movements_compare_each_seed_with_its_own_references():
    def dots(*values: tuple[int, int]) -> list[Image.Image]:
        return [Image.new("RGB", (1, 1), (*value, 0)) for value in values]

    rows = [dots((0, 9), (100, 9)), dots((25, 9), (100, 9)), dots((50, 10), (200, 9)), dots((100, 10), (200, 19))]
    torch.testing.assert_close(movements(Gray(), "content", rows), torch.tensor([[0.25, 0.0], [0.5, 1.0]]))
    torch.testing.assert_close(movements(Gray(), "style", rows), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


@pytest.mark.slow
def test_images_of_a_pair_swap_one_word(tiny_base: Base):
    config = ProbeConfig(**QUICK, seeds=[4, 5])
    pair, blocks = config.word_pairs()[0], ["mid_block.attentions.0", "up_blocks.0.attentions.1"]
    images = generate_pair(tiny_base, config, pair, blocks)
    assert {axis: [len(row) for row in rows] for axis, rows in images.items()} == {"content": [2] * 5, "style": [2] * 5}

    def same(images: list[Image.Image], prompt: str, other: str, choice: list[str]) -> bool:
        latents = swap(tiny_base, prompt, other, choice, [4, 5], Settings(steps=1, guidance=1.0))
        made = tiny_base.vae.decode(latents / tiny_base.vae.config.scaling_factor, return_dict=False)[0]
        wanted = tiny_base.pipe.image_processor.postprocess(made.detach(), output_type="pil")
        pairs = [
            (torch.tensor(list(one.tobytes())), torch.tensor(list(two.tobytes())))
            for one, two in zip(images, wanted, strict=True)
        ]
        return all((one - two).abs().max() <= 1 for one, two in pairs)

    start, dog, oil = "a cat in ink style", "a dog in ink style", "a cat in oil style"
    assert images["content"][0] is images["style"][0]
    assert same(images["content"][0], start, start, [])
    assert same(images["content"][1], start, dog, blocks[:1])
    assert same(images["content"][3], start, dog, blocks)
    assert same(images["content"][4], dog, dog, [])
    assert same(images["style"][2], start, oil, blocks[1:])
    assert same(images["style"][4], oil, oil, [])


@pytest.fixture(scope="module")
def finished(shared_base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[ProbeConfig, Any, list]:
    """Probe the tiny base; return configuration, findings and progress."""
    config = ProbeConfig(**QUICK, seeds=[0, 7], batch_size=2, out=tmp_path_factory.mktemp("probe") / "out", base="tiny")
    seen: list[tuple[int, int]] = []
    findings = find_blocks(config, shared_base, progress=lambda *report: seen.append(report))
    return config, findings, seen


class TestProbe:
    @pytest.mark.slow
    def test_every_block_has_scores(self, finished):
        config, findings, _ = finished
        assert list(findings.blocks) == BLOCKS
        assert (findings.base, findings.measure) == ("tiny-xl", "statistics")
        for row in [*findings.blocks.values(), findings.together]:
            for score in (row.content, row.style):
                assert 0 <= score.mean <= 1
                assert score.pairs == config.pairs

    def test_block_map_fits_the_base(self, finished, shared_base: Base):
        _config, findings, _ = finished
        blocks = read_blocks(findings.files["map"])
        assert (list(blocks.content), list(blocks.style)) == (findings.content, findings.style)
        check_blocks(blocks, attention_linears(shared_base.unet))

    def test_stored_movements_average_to_the_scores(self, finished):
        config, findings, _ = finished
        stored = json.loads((config.out / "probe.json").read_text())
        assert stored["pairs"][0] == {"content": "cat", "style": "ink", "other_content": "dog", "other_style": "oil"}
        for block, row in findings.blocks.items():
            values = torch.tensor(stored["movements"]["style"][block])
            assert values.shape == (2, 2)
            assert values.mean().item() == pytest.approx(row.style.mean, abs=1e-4)
            assert stored["blocks"][block]["content"]["mean"] == row.content.mean
        assert stored["config"]["seeds"] == [0, 7]

    def test_folder_contains_map_figures_plot_and_images_only(self, finished):
        config, findings, _ = finished
        names = {path.name for path in config.out.iterdir()}
        assert names == {"blocks.toml", "probe.json", "probe.png", "pictures.png"}
        assert {Path(path).name for path in findings.files.values()} == names
        with Image.open(config.out / "pictures.png") as image:
            assert image.height > 14 * 192  # P, eleven blocks, all of them, Q
            assert image.width > 4 * 192  # two seeds of both swaps

    def test_progress_counts_the_steps_of_all_images(self, finished):
        _, _, seen = finished
        total = 2 * 27 * 2  # pairs · pictures · seeds, one step each
        assert seen == [(done, total) for done in range(2, total + 1, 2)]  # two seeds at once


@pytest.mark.slow
def test_custom_measure_replaces_the_configured_one(tiny_base: Base, tmp_path: Path):
    counts = []

    class Mine(Statistics):
        def content(self, images) -> torch.Tensor:
            counts.append(len(images))
            return super().content(images)

    keys = {**QUICK, "pairs": 1, "seeds": [0], "content_blocks": 1, "style_blocks": 0}
    findings = find_blocks(ProbeConfig(**keys, out=tmp_path / "out"), tiny_base, Mine())
    assert counts == [14]
    assert findings.measure == "mine"
    assert len(findings.content) <= 1
    assert findings.style == []
    assert findings.together.content.error is None


@pytest.mark.slow
def test_unusable_base_device_size_and_folder_are_refused(tiny_base: Base, tmp_path: Path):
    class Blind:
        def content(self, images) -> torch.Tensor:
            return torch.ones(len(images), 1)

        style = content

    def refused(message: str, loaded: Base | None = tiny_base, **keys: object) -> None:
        with pytest.raises(UserError, match=message):
            find_blocks(
                ProbeConfig(**{**QUICK, "pairs": 1, "seeds": [0], "out": tmp_path / "out", **keys}), loaded, Blind()
            )

    refused("base 'nowhere/at/all': no such file or folder", None, base="nowhere/at/all")
    refused("device 'warp'", None, device="warp")
    assert not (tmp_path / "out").exists()
    refused("whatever the content words: name words that it knows with --contents")
    refused("multiple of 8", resolution=20)
    assert not any((tmp_path / "out").iterdir())
    (tmp_path / "out" / "pictures.png").touch()  # of a result that a kill interrupted
    refused("multiple of 8", resolution=20)
    (tmp_path / "out" / "blocks.toml").touch()
    refused("exists and is not an empty folder")
    refused("exists and is not an empty folder", out=tmp_path / "out" / "blocks.toml")
    with pytest.raises(MachineError, match="a file is where a folder should be"):
        find_blocks(ProbeConfig(**QUICK, out=tmp_path / "out" / "blocks.toml" / "deep"), tiny_base)
    assert hooks(tiny_base) == 0
