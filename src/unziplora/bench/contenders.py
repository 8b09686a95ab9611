"""Methods of the benchmark: each makes LoRAs from a case, with the recipes that users have.

To add a method, write a class like those below, then add it to `METHODS` and its name to `MethodName` in
`unziplora.config.bench`. "Your own method" in docs/benchmark.md is an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from unziplora.bench.cases import Case
from unziplora.bench.workspace import Workspace, json_hash, training_settings
from unziplora.config.bases import is_bundled
from unziplora.config.blora import BLoraConfig
from unziplora.config.dreambooth import DreamBoothConfig
from unziplora.config.recipe import KINDS
from unziplora.config.split import BUNDLED, PAPER, SplitConfig
from unziplora.config.training import TrainingConfig
from unziplora.config.zip import ZipConfig
from unziplora.errors import UserError
from unziplora.formats.files import read_lora
from unziplora.lora.weights import Lora
from unziplora.methods.ziplora.inputs import complete
from unziplora.utils.inputs import read_toml

ORACLE_TIMES = 3
"""The oracle trains for this multiple of DreamBooth's steps."""


@dataclass(frozen=True)
class Adapters:
    """LoRAs that a method makes from one case, or from two.

    Attributes:
        merged: one LoRA of both; None if content and style are attached together.
        prompts: templates for the content LoRA and the style LoRA when both are attached; None: one prompt for both.
        content_phrase: template of the words that call the content.
        style_phrase: template of the words that call the style, in front of "style".
    """

    content: Lora | None = None
    style: Lora | None = None
    merged: Lora | None = None
    prompts: tuple[str, str] | None = None
    content_phrase: str = "a {token} {content}"
    style_phrase: str = "{style}"


@dataclass(frozen=True)
class Contender(ABC):
    """Method of the benchmark. Every training runs once and stays in the workspace.

    Attributes:
        name: in tables and folders.
        seeded: the training seed changes the result.
    """

    name: str
    seeded: ClassVar[bool] = True

    @abstractmethod
    def recipes(self, workspace: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        """Return the resolved recipes of all trainings for one case.

        Stored scores are reused while these stay the same; a method without recipes has to delete its folder to be
        measured again.
        """

    @abstractmethod
    def train(self, workspace: Workspace, case: Case, seed: int) -> Adapters:
        """Return the LoRAs of one case; the base is `workspace.config.base`."""

    def mix(self, workspace: Workspace, case: Case, partner: Case, seed: int) -> Adapters:
        """Return LoRAs for the content of one case with the style of another; by default those of two trainings."""
        own, other = self.train(workspace, case, seed), self.train(workspace, partner, seed)
        return replace(own, style=other.style)


@dataclass(frozen=True)
class Untrained(Contender):
    """Base without LoRA: the effect of the words alone."""

    seeded: ClassVar[bool] = False

    def recipes(self, workspace: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        return []

    def train(self, workspace: Workspace, case: Case, seed: int) -> Adapters:
        """Return no LoRA, and a prompt without the rare word, which means nothing to the base."""
        return Adapters(content_phrase="a {content}")


@dataclass(frozen=True)
class Split(Contender):
    """UnZipLoRA with the settings of the method `based_on`, changed by `changes`."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    based_on: str = "unziplora"

    def recipes(self, workspace: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        return [self.recipe(workspace, case, seed)]

    def recipe(self, workspace: Workspace, case: Case, seed: int) -> SplitConfig:
        """Return the recipe of the training."""
        return workspace.recipe(SplitConfig, self.name, case, seed, "split", case.words, self.settings(workspace))

    def settings(self, workspace: Workspace) -> dict[str, Any]:
        """Return the settings of `based_on`, then `changes`, then the overrides of this method; the last one wins."""
        return {**workspace.settings(self.based_on), **self.changes, **workspace.settings(self.name)}

    def train(self, workspace: Workspace, case: Case, seed: int) -> Adapters:
        recipe = self.recipe(workspace, case, seed)
        run = workspace.train_once(recipe)
        prompts = (recipe.content_prompt, recipe.style_prompt) if recipe.separates_prompts else None
        return Adapters(read_lora(run.content), read_lora(run.style), prompts=prompts)


@dataclass(frozen=True)
class Paper(Split):
    """UnZipLoRA as published; on the bundled base, rates, rank and steps fit its size."""

    def settings(self, workspace: Workspace) -> dict[str, Any]:
        """Return the preset `paper` with a number format and an optimizer that run everywhere."""
        size = BUNDLED if is_bundled(workspace.config.base) else {}
        published = {name: value for name, value in PAPER.items() if name not in ("optimizer", "precision")}
        return {**size, **published, "optimizer": "adamw", "preset": "paper", **workspace.settings(self.name)}


@dataclass(frozen=True)
class BLoraHalves(Contender):
    """B-LoRA: one training, divided by blocks."""

    def recipes(self, workspace: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        return [self.recipe(workspace, case, seed)]

    def recipe(self, workspace: Workspace, case: Case, seed: int) -> BLoraConfig:
        """Return the recipe of the training.

        The bundled base gets its own block map, because the published blocks learn nothing there.
        """
        blocks = {"blocks": "bundled"} if is_bundled(workspace.config.base) else {}
        settings = workspace.settings(self.name)
        return workspace.recipe(BLoraConfig, self.name, case, seed, "blora", case.words, blocks, settings)

    def train(self, workspace: Workspace, case: Case, seed: int) -> Adapters:
        """Return both halves; the rare word calls the style, as in the training."""
        run = workspace.train_once(self.recipe(workspace, case, seed))
        return Adapters(read_lora(run.content), read_lora(run.style), style_phrase="{token}")


@dataclass(frozen=True)
class DreamBoothPair(Contender):
    """Two DreamBooth LoRAs of the same image, one with a prompt for the content, one with a prompt for the style."""

    def recipes(self, workspace: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        return [self.recipe(workspace, case, seed, kind) for kind in KINDS]

    def recipe(self, workspace: Workspace, case: Case, seed: int, kind: str) -> DreamBoothConfig:
        """Return the recipe of the content LoRA or of the style LoRA."""
        settings = ({kind: case.words[kind]}, workspace.settings(self.name).get(kind, {}))
        return workspace.recipe(DreamBoothConfig, self.name, case, seed, kind, *settings)

    def train(self, workspace: Workspace, case: Case, seed: int) -> Adapters:
        content, style = (self.lora_file(workspace, case, seed, kind) for kind in KINDS)
        return Adapters(read_lora(content), read_lora(style))

    def lora_file(self, workspace: Workspace, case: Case, seed: int, kind: str) -> Path:
        """Return the file of one of the two LoRAs, after training it if necessary."""
        return workspace.train_once(self.recipe(workspace, case, seed, kind)).lora(kind)


@dataclass(frozen=True)
class Oracle(DreamBoothPair):
    """Upper end of the scale: DreamBooth on the same drawing in many styles, and on the same style of many drawings."""

    def recipe(self, workspace: Workspace, case: Case, seed: int, kind: str) -> DreamBoothConfig:
        """Return a longer DreamBooth recipe for the oracle's images, each with its own prompt.

        It starts from DreamBooth's defaults, not from the searched settings, so that a search does not change the
        scale. Convolutions learn too, because no method should rise above the scale. For the style the text encoders
        learn too: if the base has no word for a style, the UNet alone learns little from any number of images.
        """
        content = kind == "content"
        examples = case.oracle_content if content else case.oracle_style
        prompt = "a {{token}} {{content}} in {} style" if content else "a {} in {{style}} style"
        images = {
            "images": workspace.image_files(case, kind, examples),
            "prompts": [prompt.format(example.word) for example in examples for _ in example.images],
        }
        defaults = DreamBoothPair("dreambooth").recipe(replace(workspace, overrides={}), case, seed, kind)
        text = {} if content else {"text_encoders": True, "text_learning_rate": defaults.learning_rate}
        longer = {kind: case.words[kind], "steps": ORACLE_TIMES * defaults.steps, **CONVOLUTIONS}
        settings = (images, longer, text, workspace.settings(self.name).get(kind, {}))
        return workspace.recipe(DreamBoothConfig, self.name, case, seed, kind, *settings)


@dataclass(frozen=True)
class Zipped(Contender):
    """Two DreamBooth LoRAs merged into one.

    Attributes:
        method: as in `ZipConfig`.
    """

    method: str
    pair: ClassVar[DreamBoothPair] = DreamBoothPair("dreambooth")

    def recipes(self, workspace: Workspace, case: Case, seed: int) -> list[TrainingConfig]:
        return [*self.pair.recipes(workspace, case, seed), self.recipe(workspace, case, case, seed)]

    def recipe(self, workspace: Workspace, case: Case, styled: Case, seed: int) -> ZipConfig:
        """Return the recipe that merges the content of `case` with the style of `styled`.

        The folder's name contains a hash of both DreamBooth recipes.
        """
        recipes = self.pair.recipe(workspace, case, seed, "content"), self.pair.recipe(workspace, styled, seed, "style")
        digest = json_hash([training_settings(recipe) for recipe in recipes])[:6]
        name = f"zip-{digest}" if case.slug == styled.slug else f"zip-{styled.slug}-{digest}"
        loras = {"content_lora": recipes[0].out, "style_lora": recipes[1].out}
        settings = (loras, {"method": self.method, "parts": True}, workspace.settings(self.name))
        return workspace.recipe(ZipConfig, self.name, case, seed, name, *settings)

    def train(self, workspace: Workspace, case: Case, seed: int) -> Adapters:
        return self.mix(workspace, case, case, seed)

    def mix(self, workspace: Workspace, case: Case, partner: Case, seed: int) -> Adapters:
        self.pair.lora_file(workspace, case, seed, "content")
        self.pair.lora_file(workspace, partner, seed, "style")
        run = workspace.train_once(complete(self.recipe(workspace, case, partner, seed)))
        content, style, merged = (read_lora(run.lora(name)) for name in ("content", "style", "lora"))
        return Adapters(merged, merged, merged) if self.method == "direct" else Adapters(content, style, merged)


JOINT: dict[str, Any] = {"content_alone": 0.0, "content_variants": False, "style_alone": 0.0, "style_variants": False}
"""Settings that train both LoRAs in every step, on the image as it is."""

ATTENTION: dict[str, Any] = {"targets": ["attention"]}
"""Settings that adapt the layers that the paper adapts."""

CONVOLUTIONS: dict[str, Any] = {"targets": ["attention", "convolutions"]}
"""Settings that adapt the layers at the latents' full size too."""


def _separations(count: int) -> dict[str, Any]:
    """Return settings with only the first `count` separations of the paper, and nothing beyond the paper."""
    names = ("prompt_separation", "column_separation", "block_separation")
    return {**{name: number < count for number, name in enumerate(names)}, **JOINT, **ATTENTION, "phrase_steps": 0}


METHODS: dict[str, Contender] = {
    method.name: method
    for method in (
        Untrained("base"),
        Split("unziplora"),
        Paper("paper"),
        Split("joint", _separations(0)),
        Split("prompt", _separations(1)),
        Split("column", _separations(2)),
        Split("block", _separations(3)),
        Split("words", {**JOINT, **ATTENTION}),
        Split("attention", ATTENTION),
        DreamBoothPair("dreambooth"),
        BLoraHalves("blora"),
        Zipped("ziplora", "zip"),
        Zipped("null-space", "null-space"),
        Zipped("direct", "direct"),
        Oracle("oracle"),
    )
}


def read_settings(file: Path | None) -> dict[str, Any]:
    """Read settings by method from a TOML file; DreamBooth and the oracle have a table for each of two trainings.

    Raises:
        UserError: the file does not exist, or contains a method or a table that does not exist.
    """
    tables = read_toml(file) if file else {}
    for name, table in tables.items():
        if name not in METHODS:
            raise UserError(f"{file}: unknown method {name!r}; the methods are {', '.join(METHODS)}")
        if not isinstance(table, dict):
            raise UserError(f"{file}: {name} is {table!r}; make it a table of settings, [{name}]")
        method = METHODS[name]
        if "seeds" in table:
            raise UserError(f"{file}: [{name}] has seeds; the benchmark measures each seed: remove them")
        if isinstance(method, Untrained) and table:
            raise UserError(f"{file}: [{name}] is the base without LoRA and has no settings: remove them")
        if isinstance(method, DreamBoothPair):
            for training, settings in table.items():
                if training not in KINDS or not isinstance(settings, dict):
                    raise UserError(
                        f"{file}: [{name}] has two trainings: put its settings into [{name}.content] and "
                        f"[{name}.style], not into {training!r}"
                    )
    return tables
