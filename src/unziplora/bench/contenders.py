"""The methods of the benchmark: how each makes LoRAs from a case, by the recipes that users have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from unziplora.bench.cases import Case
from unziplora.bench.contender import Adapters, Contender, Paired
from unziplora.bench.workspace import Workspace, fingerprint, plain
from unziplora.config.bases import is_bundled
from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.recipe import KINDS, read_toml, resolve
from unziplora.config.split import BUNDLED, PAPER, SplitConfig
from unziplora.config.training import TrainingConfig
from unziplora.config.zip import ZipConfig
from unziplora.errors import UserError
from unziplora.formats.files import read_lora
from unziplora.methods.blora import train_blora
from unziplora.methods.dreambooth import train_dreambooth
from unziplora.methods.unziplora.method import split
from unziplora.methods.ziplora.inputs import complete
from unziplora.methods.ziplora.method import zip_loras

ORACLE_TIMES = 3
"""The oracle trains for this multiple of DreamBooth's steps."""


@dataclass(frozen=True)
class Untrained:
    """The base without LoRA: what the words alone do."""

    name: str = "base"
    seeded: ClassVar[bool] = False

    def recipes(self, place: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        """Nothing."""
        return []

    def train(self, place: Workspace, case: Case, seed: int) -> Adapters:
        """No LoRA; the base does not know the rare word."""
        return Adapters(subject="a {content}")

    def mix(self, place: Workspace, case: Case, partner: Case, seed: int) -> Adapters:
        """As `train`."""
        return self.train(place, case, seed)


@dataclass(frozen=True)
class Split(Paired):
    """UnZipLoRA; with keys of its own, it is the same as `home` but for these."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    home: str = "unziplora"

    def recipes(self, place: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        """One training."""
        return [self.recipe(place, case, seed)]

    def recipe(self, place: Workspace, case: Case, seed: int) -> SplitConfig:
        """The training."""
        out = place.run_folder(self.name, case, seed) / "split"
        return resolve(SplitConfig, {**place.common(case, seed), **case.words, **self.given(place), "out": out})

    def given(self, place: Workspace) -> dict[str, Any]:
        """The settings of `home`, the method's own keys, the settings for this method: the last one counts."""
        return {**place.settings(self.home), **self.keys, **place.settings(self.name)}

    def train(self, place: Workspace, case: Case, seed: int) -> Adapters:
        """Both LoRAs from one training."""
        recipe = self.recipe(place, case, seed)
        run = place.finish(split, recipe)
        prompts = (recipe.content_prompt, recipe.style_prompt) if recipe.prompt_separation else None
        return Adapters(read_lora(run.content), read_lora(run.style), prompts=prompts)


@dataclass(frozen=True)
class Paper(Split):
    """UnZipLoRA as published; on the bundled base with the rates, rank and steps that fit its size."""

    def given(self, place: Workspace) -> dict[str, Any]:
        """The preset `paper`, in the number format and with the optimizer that run everywhere."""
        size = BUNDLED if is_bundled(place.config.base) else {}
        plain = {name: value for name, value in PAPER.items() if name not in ("optimizer", "precision")}
        return {**size, **plain, "optimizer": "adamw", "preset": "paper", **place.settings(self.name)}


@dataclass(frozen=True)
class BLoraHalves(Paired):
    """B-LoRA: one training, cut by blocks."""

    def recipes(self, place: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        """One training."""
        return [self.recipe(place, case, seed)]

    def recipe(self, place: Workspace, case: Case, seed: int) -> BLoraConfig:
        """The training; on the bundled base with its own block map, for in the published blocks nothing is learned."""
        out = place.run_folder(self.name, case, seed) / "blora"
        blocks = {"blocks": "bundled"} if is_bundled(place.config.base) else {}
        given = {**blocks, **place.settings(self.name), "out": out}
        return resolve(BLoraConfig, {**place.common(case, seed), **case.words, **given})

    def train(self, place: Workspace, case: Case, seed: int) -> Adapters:
        """Both halves; the style goes by the rare word, as it was trained."""
        run = place.finish(train_blora, self.recipe(place, case, seed))
        return Adapters(read_lora(run.content), read_lora(run.style), manner="{token}")


@dataclass(frozen=True)
class DreamBooths(Paired):
    """Two DreamBooth LoRAs of the same picture, one told of the content, the other of the style."""

    def recipes(self, place: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        """Two trainings: content, style."""
        return [self.recipe(place, case, seed, kind) for kind in KINDS]

    def recipe(self, place: Workspace, case: Case, seed: int, kind: str) -> DreamBoothConfig:
        """One of the two."""
        given = place.settings(self.name, kind)
        out = place.run_folder(self.name, case, seed) / kind
        return resolve(DreamBoothConfig, {**place.common(case, seed), kind: getattr(case, kind), **given, "out": out})

    def train(self, place: Workspace, case: Case, seed: int) -> Adapters:
        """Both LoRAs."""
        content, style = (self.file(place, case, seed, kind) for kind in KINDS)
        return Adapters(read_lora(content), read_lora(style))

    def file(self, place: Workspace, case: Case, seed: int, kind: str) -> Path:
        """One of the two, trained if it is not there."""
        return place.finish(train_dreambooth, self.recipe(place, case, seed, kind)).lora(kind)


@dataclass(frozen=True)
class Oracle(DreamBooths):
    """What is within reach: DreamBooth on the same drawing in many styles, and on the same style of many drawings."""

    def recipe(self, place: Workspace, case: Case, seed: int, kind: str) -> DreamBoothConfig:
        """DreamBooth's defaults, whatever is searched for it, on the oracle's pictures with a prompt each, and longer.

        So a scale stays what it is while settings are chosen by it. For the style the text encoders learn too: of a
        style whose name says nothing to the base, the UNet alone learns little from any number of pictures.
        """
        content = kind == "content"
        examples = case.oracle_content if content else case.oracle_style
        prompt = "a {{token}} {{content}} in {} style" if content else "a {} in {{style}} style"
        pictures = {
            "images": place.pictures(case, kind, examples),
            "prompts": [prompt.format(example.word) for example in examples for _ in example.pictures],
        }
        plain = DreamBooths("dreambooth").recipe(replace(place, overrides={}), case, seed, kind)
        texts = {} if content else {"text_encoders": True, "text_learning_rate": plain.learning_rate}
        given = {"steps": ORACLE_TIMES * plain.steps, **texts, **place.settings(self.name, kind)}
        out = place.run_folder(self.name, case, seed) / kind
        words = {kind: getattr(case, kind)}
        return resolve(DreamBoothConfig, {**place.common(case, seed), **words, **pictures, **given, "out": out})


@dataclass(frozen=True)
class Zipped:
    """The two DreamBooth LoRAs in one: by ZipLoRA's trained columns, or as their plain sum."""

    name: str
    how: str
    seeded: ClassVar[bool] = True
    pair: ClassVar[DreamBooths] = DreamBooths("dreambooth")

    def recipes(self, place: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        """Two trainings and their merger."""
        return [*self.pair.recipes(place, case, seed), self.recipe(place, case, case, seed)]

    def recipe(self, place: Workspace, case: Case, styled: Case, seed: int) -> ZipConfig:
        """The merger of one case's content and a case's style, in a folder that says of which trainings they are."""
        pair = self.pair.recipe(place, case, seed, "content"), self.pair.recipe(place, styled, seed, "style")
        mark = fingerprint([plain(recipe) for recipe in pair])[:6]
        name = f"zip-{mark}" if case.slug == styled.slug else f"zip-{styled.slug}-{mark}"
        given = {f"{k}_lora": self._run(place, c, seed, k) for k, c in (("content", case), ("style", styled))}
        out = place.run_folder(self.name, case, seed) / name
        common = {name: value for name, value in place.common(case, seed).items() if name != "images"}
        made = {"method": self.how, "parts": True, **place.settings(self.name), "out": out}
        return resolve(ZipConfig, {**common, **given, **made})

    def _run(self, place: Workspace, case: Case, seed: int, kind: str) -> Path:
        return place.run_folder(self.pair.name, case, seed) / kind

    def train(self, place: Workspace, case: Case, seed: int) -> Adapters:
        """The merger and its two parts."""
        return self.mix(place, case, case, seed)

    def mix(self, place: Workspace, case: Case, partner: Case, seed: int) -> Adapters:
        """A merger of its own for every pair."""
        self.pair.file(place, case, seed, "content")
        self.pair.file(place, partner, seed, "style")
        run = place.finish(zip_loras, complete(self.recipe(place, case, partner, seed)))
        content, style, merged = (read_lora(run.lora(name)) for name in ("content", "style", "lora"))
        return Adapters(content, style, merged) if self.how == "zip" else Adapters(merged, merged, merged)


TOGETHER: dict[str, Any] = {"content_alone": 0.0, "content_variants": False, "style_alone": 0.0}
"""Both LoRAs in every step, and the picture as it is."""


def _separations(count: int) -> dict[str, Any]:
    """The first of the published separations, and nothing that is not of the paper."""
    names = ("prompt_separation", "column_separation", "block_separation")
    return {**{name: number < count for number, name in enumerate(names)}, **TOGETHER, "phrase_steps": 0}


METHODS: dict[str, Contender] = {
    method.name: method
    for method in (
        Untrained(),
        Split("unziplora"),
        Paper("paper"),
        Split("joint", _separations(0)),
        Split("prompt", _separations(1)),
        Split("column", _separations(2)),
        Split("block", _separations(3)),
        Split("words", TOGETHER),
        DreamBooths("dreambooth"),
        BLoraHalves("blora"),
        Zipped("ziplora", "zip"),
        Zipped("direct", "direct"),
        Oracle("oracle"),
    )
}


def read_settings(file: Path | None) -> dict[str, Any]:
    """Keys by method, of the two DreamBooth LoRAs and the oracle's by training, from a TOML file.

    Raises:
        UserError: no such file, or something in it that no method reads.
    """
    found = read_toml(file) if file else {}
    for name, given in found.items():
        if name not in METHODS:
            raise UserError(f"{file}: no method {name!r}: there are {', '.join(METHODS)}")
        if not isinstance(given, dict):
            raise UserError(f"{file}: {name} is {given!r}; it must be a table of settings, [{name}]")
        method = METHODS[name]
        if isinstance(method, Untrained) and given:
            raise UserError(f"{file}: [{name}] is the base without LoRA, which has no settings")
        if isinstance(method, DreamBooths):
            for part, keys in given.items():
                if part not in KINDS or not isinstance(keys, dict):
                    raise UserError(
                        f"{file}: [{name}] has two trainings: give its settings in [{name}.content] and "
                        f"[{name}.style], not in {part!r}"
                    )
    return found
