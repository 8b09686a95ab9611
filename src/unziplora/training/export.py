"""The files that a run ends with: its LoRAs in every configured layout, and the card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from unziplora.config.training import TrainingConfig
from unziplora.formats.files import write_lora
from unziplora.formats.header import metadata_for
from unziplora.formats.sdxl import LAYERS, has_sdxl_widths
from unziplora.lora.algebra import shape
from unziplora.lora.weights import Lora
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import RunDescription, card, shared_settings
from unziplora.utils.files import atomic_write


@dataclass(frozen=True)
class Provenance:
    """Origin of a run's LoRAs as the headers of their files record it; the defaults are SDXL's.

    Attributes:
        base: name of the base.
        size: width and height of the training images in pixels.
        prediction_type: the base's prediction type by diffusers' name.
        zero_terminal_snr: the base's noise schedule ends in pure noise.
        layers_per_block: resnets per block of the base's UNet.
        thumbnails: images for galleries by LoRA name; the others have that of "".
        entries: header entries that replace those computed from the fields above; an empty value removes one.
    """

    base: str
    size: tuple[int, int] = (1024, 1024)
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False
    layers_per_block: int = LAYERS
    thumbnails: Mapping[str, Image.Image] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)

    def header(self, title: str, config: TrainingConfig, description: RunDescription, name: str) -> dict[str, str]:
        """Return the header of the LoRA of this name: its trigger words, its origin and the settings of its run."""
        lora = description.files[name]
        metadata = metadata_for(
            title=title,
            trigger=lora.trigger,
            hint=f'Add to any prompt: "{lora.trigger}". {lora.hint}'.strip(),
            base=self.base,
            resolution=self.size,
            prediction=self.prediction_type,
            zero_terminal_snr=self.zero_terminal_snr,
            layers_per_block=self.layers_per_block,
            method=f"{description.method}, {name} LoRA",
            settings=shared_settings(config),
            thumbnail=self.thumbnails.get(name, self.thumbnails.get("")),
        )
        return {key: value for key, value in {**metadata, **self.entries}.items() if value}


def write_loras(
    run: RunFolder,
    config: TrainingConfig,
    description: RunDescription,
    provenance: Provenance,
    loras: Mapping[str, Lora],
    report: Callable[[Path], object],
    step: int | None = None,
) -> None:
    """Write LoRAs into a run folder in every configured layout.

    Args:
        loras: by file name.
        report: called after every file.
        step: steps done, for LoRAs to keep from the middle of a run.

    Raises:
        MachineError: disk full, no permission.
    """
    for name, lora in loras.items():
        paths = {layout: run.lora(name, layout) for layout in config.formats}
        if step is not None:
            paths = {layout: run.kept_lora(name, step, layout) for layout in config.formats}
        header = provenance.header(paths["kohya"].stem, config, description, name)
        for layout, path in paths.items():
            write_lora(lora, path, layout, metadata=header, dtype=config.save_precision)
            report(path)


def write_card(
    run: RunFolder,
    config: TrainingConfig,
    description: RunDescription,
    loras: Mapping[str, Lora],
    findings: Sequence[str] = (),
) -> None:
    """Write the card, the last file of a run.

    Args:
        findings: sentences of a check of the LoRAs.

    Raises:
        MachineError: disk full, no permission.
    """
    shapes = {path: shape(pair)[:2] for lora in loras.values() for path, pair in lora.modules.items()}
    atomic_write(run.card, card(run, config, description, has_sdxl_widths(shapes), findings))
