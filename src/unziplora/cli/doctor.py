"""`unziplora doctor`: check this machine, and name the settings that fit it."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import click
from pydantic import BaseModel

from unziplora.cli.options import json_option
from unziplora.cli.output import emit, stdout_to_stderr
from unziplora.utils.progress import size

GIB = 2**30
PACKAGES = ("unziplora", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pillow")
EXTRAS = {
    "bitsandbytes": "8-bit AdamW, for small cards",
    "prodigyopt": "the Prodigy optimizer",
    "tensorboard": "curves in TensorBoard",
    "wandb": "curves in Weights & Biases",
    "trackio": "curves in Trackio",
}
"""Optional packages and their purposes."""

SDXL_GB, SDXL_GB_CPU = 7, 14
"""Download size of SDXL in fp16, and in fp32 for a CPU."""

HUB = "https://huggingface.co"
FITTING: list[tuple[float, str]] = [
    (19.5, ""),
    (11.5, "--gradient-checkpointing"),
    (9.5, "--gradient-checkpointing --optimizer adamw8bit"),
    (7.5, "--gradient-checkpointing --optimizer adamw8bit --resolution 512"),
]
"""Minimum GPU memory in GiB, and the flags with which SDXL trains in it."""

FITTING_CPU: list[tuple[float, str]] = [
    (36, ""),
    (21, "with --gradient-checkpointing "),
    (13, "with --gradient-checkpointing --precision bf16 "),
]
"""Minimum RAM in GiB, part of which the system takes, and the flags with which SDXL trains in it."""


@dataclass(frozen=True)
class Check:
    """One finding: 'ok', 'note' (works, but less well) or 'problem' (must be fixed), with advice."""

    name: str
    state: Literal["ok", "note", "problem"]
    text: str


class Device(BaseModel):
    """A device to train on: its name for `--device`, its product name, and its memory in bytes."""

    name: str
    model: str
    memory_free: int
    memory_total: int
    bf16: bool


class Report(BaseModel):
    """Findings of `doctor`."""

    python: str
    system: str
    packages: dict[str, str]
    devices: list[Device]
    checks: list[Check]
    advice: str

    @property
    def ready(self) -> bool:
        """Check that nothing must be fixed."""
        return all(check.state != "problem" for check in self.checks)

    def __str__(self) -> str:
        marks = {"ok": "ok      ", "note": "note    ", "problem": "PROBLEM "}
        rows = [f"{marks[check.state]}{check.name:<14}{check.text}" for check in self.checks]
        return "\n".join([*rows, "", self.advice])


def examine(online: bool = False) -> Report:
    """Look at versions, devices, memory, disk and optional packages.

    Args:
        online: also try to reach the model hub; otherwise nothing is sent anywhere.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    devices = find_devices()
    packages = {name: number for name in PACKAGES if (number := installed(name)) is not None}
    missing = "not installed: run `pip install .` in the clone of unziplora"
    checks = [
        Check("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}"),
        *(Check(name, "problem", missing) for name in PACKAGES if name not in packages),
        Check("packages", "ok", ", ".join(f"{name} {number}" for name, number in packages.items())),
        *(_device(device) for device in devices),
        _disk(shutil.disk_usage(Path.cwd()).free),
        _model_cache(Path(HF_HUB_CACHE), SDXL_GB_CPU if devices[0].name == "cpu" else SDXL_GB),
        *(_extra(name) for name in EXTRAS),
        *([_hub()] if online else []),
    ]
    return Report(
        python=platform.python_version(),
        system=platform.platform(),
        packages=packages,
        devices=devices,
        checks=checks,
        advice=advice(devices[0], installed("bitsandbytes") is not None),
    )


def installed(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_devices() -> list[Device]:
    """List the devices that torch can compute on, best first; the CPU is always last."""
    import psutil
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(index)
        devices.append(Device(name=f"cuda:{index}", model=name, memory_free=free, memory_total=total, bf16=bf16))
    memory = psutil.virtual_memory()
    sizes = {"memory_free": memory.available, "memory_total": memory.total}
    if torch.backends.mps.is_available():
        devices.append(Device(name="mps", model="Apple GPU", bf16=False, **sizes))
    model = f"{psutil.cpu_count(logical=False) or 1} cores, {platform.machine()}"
    return [*devices, Device(name="cpu", model=model, bf16=False, **sizes)]


def advice(device: Device, eight_bit: bool) -> str:
    """Name the command that fits a device; the limits are those of `memory.estimate` for SDXL, with some room."""
    import torch

    gib = device.memory_total / GIB
    table = FITTING_CPU if device.name == "cpu" else FITTING
    if device.name == "mps":  # bitsandbytes needs CUDA
        table = [(least, flags) for least, flags in table if "adamw8bit" not in flags]
    flags = next((flags for least, flags in table if gib >= least), None)
    if device.name == "cpu":
        sdxl = "SDXL does not fit" if flags is None else f"SDXL would fit {flags}but is very slow"
        note = "" if torch.version.cuda else "\nWith an NVIDIA card: this torch is the build for CPUs; README, Install."
        return f"No GPU: the bundled small base runs in minutes; {sdxl}. Try it with: unziplora demo{note}"
    if flags is None:
        return f"{device.model} has {gib:.0f} GiB: too little for SDXL; try the small base: unziplora demo"
    if "adamw8bit" in flags and not eight_bit:
        flags += "   (first: pip install bitsandbytes)"
    return f"{device.model}, {gib:.0f} GiB: unziplora split IMAGE --content WORD --style WORDS {flags}".rstrip()


def _device(device: Device) -> Check:
    text = f"{device.model}, {size(device.memory_total)} ({size(device.memory_free)} free)"
    if device.name.startswith("cuda"):
        text += ", bf16" if device.bf16 else ", no bf16: fp16 is used"
    if device.name != "cpu" and device.memory_free < 0.5 * device.memory_total:
        return Check(device.name, "note", f"{text}; other programs use more than half of it")
    return Check(device.name, "ok", text)


def _disk(free: int) -> Check:
    text = f"{size(free)} free in {Path.cwd()}"
    if free < GIB:
        return Check("disk", "problem", f"{text}: a run needs 1 GiB; free some space")
    return Check("disk", "ok", text)


def _model_cache(folder: Path, needed: int) -> Check:
    """Check for enough room for SDXL, in GB, in the hub's cache or in its nearest parent that exists."""
    folder = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    text = f"{size(free)} free in {folder}"
    if free < (needed + 3) * GIB:
        return Check(
            "model cache", "note", f"{text}: SDXL takes {needed} GB to download; set HF_HOME to use another folder"
        )
    return Check("model cache", "ok", text)


def _extra(name: str) -> Check:
    purpose, number = EXTRAS[name], installed(name)
    if number and find_spec(name):
        return Check(name, "ok", f"{number}: {purpose}")
    return Check(name, "note", f"not installed; for {purpose}: pip install {name}")


def _hub() -> Check:
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(HUB, method="HEAD"), timeout=10):
            return Check("model hub", "ok", f"{HUB} answers")
    except (OSError, ValueError) as error:
        advice = "give --base a folder or file on this machine"
        return Check("model hub", "note", f"{HUB} does not answer ({error}): {advice}")


@click.command("doctor", short_help="Check whether this machine is ready, and name the settings that fit it.")
@click.option("--online", is_flag=True, help="Also try to reach huggingface.co.")
@json_option
def doctor_command(online: bool, as_json: bool) -> None:
    """Check whether this machine is ready, and name the settings that fit it.

    Versions, devices, memory, disk, optional packages. Nothing is sent anywhere unless --online asks whether the
    model hub can be reached.

    \b
      unziplora doctor
    """
    with stdout_to_stderr():
        report = examine(online=online)
    emit(report, str(report), as_json)
    if not report.ready:
        raise click.exceptions.Exit(1)
