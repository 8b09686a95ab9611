"""One training run of any method: from a configuration to a run folder."""

from __future__ import annotations

import gc
import json
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import torch
from torch.amp import GradScaler

from unziplora.config.training import TrainingConfig
from unziplora.errors import Interrupted, NonFiniteLoss, OutOfMemory, UserError, disk_full, first_line, out_of_memory
from unziplora.models.base import Base, load_base, restored
from unziplora.models.device import computing_on, pick_device, pick_dtype
from unziplora.models.sizes import must_be_downloaded
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import base_name, folder_argument, shared_settings
from unziplora.training.checkpoint import Checkpoint, changes, newest_checkpoint, run_facts
from unziplora.training.cuda_graphs import Recorder, recording
from unziplora.training.export import Provenance, write_card, write_loras
from unziplora.training.method import Findings, Method, OpenedImages, Setup
from unziplora.training.phases import Phases
from unziplora.training.preflight import check_run, open_images, warn_of_memory
from unziplora.training.sample_sheet import Samples, generate_samples
from unziplora.training.trackers import Tracker, trackers
from unziplora.training.trainer import StepReport, Trainer, is_due, train
from unziplora.utils.files import atomic_write, explain, write_png
from unziplora.utils.progress import Callback, Progress
from unziplora.utils.signals import STOP, caught

C = TypeVar("C", bound=TrainingConfig)


def run_training(
    kind: type[Method[C]],
    config: C,
    resume: bool = False,
    progress: Callback | None = None,
    base: Base | None = None,
) -> RunFolder:
    """Train a method's LoRAs as configured and write them into a run folder.

    Args:
        kind: the method.
        config: its recipe.
        resume: continue an interrupted run in `config.out` from its last checkpoint, with the same result as
            if it had not been interrupted, or a finished one that is to have more steps.
        progress: called after every step and after every file.
        base: used, on its device and in its number format, instead of loading `config.base`. It is restored
            afterwards, even if the run fails.

    Raises:
        UserError: an image, a word, the base, the folder or a setting is not usable.
        MachineError: disk full, no permission, out of memory.
        Interrupted: stopped on request; its message names the command that continues.
    """

    def work(run: RunFolder) -> None:
        training = TrainingRun(kind, config, progress or (lambda _: None), run, images, device, base)
        try:
            with computing_on(device):
                training.execute()
        except KeyboardInterrupt:  # outside the loop, which finishes its step
            if not training.finished:
                raise training.stopped("stopped; what is not saved yet will be done again") from None

    with nullcontext() if base is None else restored(base):
        with named_settings(config, resume):
            images = check_run(kind, config, base)
            device = pick_device(config.device) if base is None else base.device
        if base is None:
            warn_of_memory(kind, config, images.size)
        return in_run_folder(config, resume, work, extendable=True)


@contextmanager
def named_settings(config: TrainingConfig, resume: bool) -> Iterator[None]:
    """Name the file that a resumed run has its settings from, if one of them turns out to be unusable."""
    try:
        yield
    except UserError as error:
        if not resume:
            raise
        raise UserError(
            f"{error}\nThis run goes on with the settings in {RunFolder(config.out).config_file}; to a file that was "
            "moved, give its new path beside --resume"
        ) from None


def in_run_folder(
    config: TrainingConfig, resume: bool, work: Callable[[RunFolder], None], extendable: bool = False
) -> RunFolder:
    """Do a run's work in its folder, new or resumed, which is locked for other processes meanwhile.

    Args:
        extendable: a finished run may be resumed with more steps.

    Raises:
        UserError: the folder is taken, or its run is finished.
        MachineError: disk full, no permission.
        KeyboardInterrupt: asked to stop by any signal.
    """
    opened = RunFolder.resumed if resume else RunFolder.created
    with opened(config.out, config) as run, caught(signal.default_int_handler, *STOP):
        run.check_extendable(config, extendable)
        try:
            work(run)
        except Exception as error:
            if disk_full(error):
                raise explain(run.path, error) from error
            raise
        run.drop_checkpoints()
    return run


@dataclass
class TrainingRun(Generic[C]):
    """One run of a method in its folder.

    Attributes:
        loaded: base to use, if it is loaded already.
        recent: seconds of the last steps.
        done: steps, those of the phases before the training included.
        samples: those of the last sheet.
    """

    kind: type[Method[C]]
    config: C
    progress: Callback
    run: RunFolder
    images: OpenedImages
    device: torch.device
    loaded: Base | None = None
    recent: list[float] = field(default_factory=list)
    done: int = 0
    finished: bool = False
    samples: Samples | None = None
    base: Base = field(init=False)
    method: Method[C] = field(init=False)
    provenance: Provenance = field(init=False)

    def execute(self) -> None:
        """Train from the last checkpoint or from the start, then export and sample."""
        config, run = self.config, self.run
        facts, checkpoint = run_facts(self.kind, config), newest_checkpoint(run)
        self.check_unchanged(checkpoint, facts)  # before the base is loaded, which takes minutes
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # an earlier run of this process may have used more
        with trackers(config.trackers, run.path / "trackers", flat(config)) as curves:
            base, images = self.loaded or self.load(), self.images
            self.base = base
            facts["base"] = {str(base.dtype): base.fingerprint()}  # before LoRAs are added to it
            if images.scale != base.scale:  # it had to be downloaded first, and is not of SDXL's size
                images = open_images(self.kind, config, base.scale)
            setup = self.setup(images, {} if checkpoint is None else checkpoint.state, facts)
            self.method = self.kind.build(config, setup)
            self.check_unchanged(checkpoint, facts)
            trainer = Trainer(self.method, config, make_scaler(self.device, base.dtype))
            start = self.restore(checkpoint, trainer) if checkpoint is not None and setup.resumed else 0
            checkpoint = None  # frees its memory
            self.provenance = self.describe_origin(setup)
            if run.card.exists():
                self.extend(start)
            self.done = self.kind.phase_steps(config) + start
            self.report("training", memory=True)
            done = self.train(trainer, start, facts, curves)
            del trainer  # the last samples need the room of its optimizers
            if done < config.steps:
                raise self.stopped(f"stopped after step {done} of {config.steps}, checkpoint saved")
            self.finish()
            self.finished = True

    def setup(self, images: OpenedImages, state: Mapping[str, Any], facts: dict[str, Any]) -> Setup:
        """Prepare what the method is built from, and let the phases go on from the state of a checkpoint."""

        def save() -> None:
            path = self.run.checkpoint(0, Checkpoint(0, {"phases": phases.states}, facts).write)
            self.report(f"checkpoint {path}")

        phases = Phases(
            dict(state.get("phases", {})), self.after_step, save, self.config.checkpoint_every, self.stopped
        )
        context = autocast_for(self.device, self.base.dtype)
        setup = Setup(self.base, images, context, self.report, resumed="method" in state, phases=phases)
        facts["generated"] = setup.digests
        return setup

    def extend(self, start: int) -> None:
        """Reopen a finished run, whose LoRAs are kept as those of an earlier step."""
        config = self.config
        if names := config.spread_over_steps():
            warnings.warn(
                f"{' and '.join(names)} spread over all steps, so the result is not exactly that of a run with "
                f"{config.steps} steps from the start",
                stacklevel=2,
            )
        self.keep(start)
        self.run.reopen(config)
        self.report(f"extending from step {start} to {config.steps}")

    def keep(self, step: int) -> None:
        """Write the LoRAs of a step before the last, to choose from."""
        description, loras = self.method.describe(self.config), self.method.export()
        write_loras(self.run, self.config, description, self.provenance, loras, self.report_file, step)

    def load(self) -> Base:
        """Load the configured base."""
        self.report(f"loading base {self.config.base}{_fetching(self.config.base)}")
        return load_base(self.config.base, pick_dtype(self.config.precision, self.device), self.device)

    def check_unchanged(self, checkpoint: Checkpoint | None, facts: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint that belongs to other settings, files or weights."""
        if checkpoint is not None:
            self.run.check_unchanged(changes(checkpoint, facts))

    def restore(self, checkpoint: Checkpoint, trainer: Trainer) -> int:
        """Restore the state of a checkpoint; return the steps done."""
        trainer.load_state_dict(checkpoint.state)
        self.report(f"resuming after step {checkpoint.step}")
        return checkpoint.step

    def finish(self) -> None:
        """Write the LoRAs, the last sample sheet, and the card, which marks the run as finished."""
        config, run, provenance = self.config, self.run, self.provenance
        loras, description = self.method.export(), self.method.describe(config)
        write_loras(run, config, description, provenance, loras, self.report_file)
        gc.collect()  # optimizers; samples need the room
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if config.sample_seeds and (samples := self.last_sample()):
            # Again, with images for galleries: nothing that a sheet takes may lose the LoRAs.
            provenance = replace(provenance, thumbnails={**provenance.thumbnails, **samples.thumbnails()})
            write_loras(run, config, description, provenance, loras, lambda _: None)
        findings = self.check()
        write_card(run, config, description, loras, findings.lines if findings else ())

    def stopped(self, where: str) -> Interrupted:
        """Return the exception for a run that was asked to stop."""
        command = f"unziplora {self.kind.command} --resume --out {folder_argument(self.run.path)}"
        return Interrupted(f"{where}; continue with:\n  {command}")

    def train(self, trainer: Trainer, start: int, facts: dict[str, Any], curves: Sequence[Tracker]) -> int:
        """Train from step `start`; return the steps done.

        Args:
            facts: what the checkpoints belong to.
        """
        config, run = self.config, self.run
        run.rewind_log(start)

        def save(done: int) -> None:
            checkpoint = Checkpoint(done, trainer.state_dict(), facts)
            self.report(f"checkpoint {run.checkpoint(done, checkpoint.write)}")

        def after_step(step: StepReport) -> None:
            figures = {"loss": step.loss, "learning_rate": step.learning_rate}
            run.log(step=step.done, **figures, seconds=round(step.seconds, 4))
            for tracker in curves:
                tracker.log(figures, step=step.done)
            self.after_step(self.kind.phase_steps(config) + step.done, step.loss, step.seconds)

        with recording(self.base.unet, trainer.parameters(), config) as predict:
            self.method.predict = predict

            def show(done: int) -> None:
                if is_due(done, config.save_every):
                    self.keep(done)
                if config.sample_seeds and not run.sheet(done).exists():  # as it may in a resumed run
                    if isinstance(predict, Recorder):
                        predict.clear()  # samples need the room
                    self.sample(done)

            try:
                return train(trainer, start, after_step, save, show)
            except NonFiniteLoss as error:
                advice = self.after_divergence(half=self.base.dtype != torch.float32)
                raise NonFiniteLoss(f"{error}. {advice}") from None

    def after_divergence(self, half: bool) -> str:
        """Advise what to do after a loss that is not finite.

        Args:
            half: the base computes in half precision.
        """
        checkpoint = newest_checkpoint(self.run) if half else None
        if checkpoint is not None and checkpoint.is_finite():
            command = f"unziplora {self.kind.command} --resume --out {folder_argument(self.run.path)} --precision fp32"
            return f"The checkpoint after step {checkpoint.step} is sound; continue from it in fp32:\n  {command}"
        remedy = "--precision fp32 or lower learning rates" if half else "lower learning rates"
        return f"Start a new run, into another --out, with {remedy}; a resumed run keeps its learning rates"

    def describe_origin(self, setup: Setup) -> Provenance:
        """Return what the headers of the LoRA files record about the base and the images."""
        base, images = self.base, self.method.images
        return Provenance(
            base=base_name(self.config),
            size=setup.size,
            prediction_type=base.prediction_type,
            zero_terminal_snr=base.zero_terminal_snr,
            layers_per_block=base.unet.config.layers_per_block,
            thumbnails={"": images[0]} if images else {},
        )

    def report_file(self, path: Path) -> None:
        """Report a file that was written."""
        self.report(f"wrote {path}")

    def sample(self, step: int) -> Samples:
        """Write a labeled sheet of the LoRAs after a step, and return its images."""
        samples = generate_samples(self.base, self.method, self.config, self.samples)
        self.samples, path = samples, self.run.sheet(step)
        write_png(path, samples.sheet(self.method, self.config))
        self.report(f"samples {path}")
        return samples

    def last_sample(self) -> Samples | None:
        """Write the sheet of the finished LoRAs; running out of memory must not fail a run whose LoRAs are saved."""
        try:
            return self.sample(self.config.steps)
        except OutOfMemory as error:
            command = f"unziplora sample {folder_argument(self.run.path)}"
            warnings.warn(f"no samples: {error}. The LoRAs are complete; try `{command}`", stacklevel=2)
            return None

    def check(self) -> Findings | None:
        """Check the finished LoRAs and write the figures; a check that is not possible must not fail their run."""
        try:
            findings = self.method.check_loras(self.base)
        except Exception as error:
            if not (isinstance(error, UserError) or out_of_memory(error)):
                raise
            warnings.warn(f"no check of the LoRAs, which are complete: {first_line(error)}", stacklevel=2)
            return None
        if findings is None:
            self.run.check_file.unlink(missing_ok=True)  # of the run that was extended
            return None
        atomic_write(self.run.check_file, json.dumps({**findings.figures, "findings": findings.lines}, indent=1) + "\n")
        return findings

    def after_step(self, done: int, loss: float, seconds: float) -> None:
        """Report a step, of a phase or of the training, with the mean speed of the last twenty."""
        self.done = done
        self.recent = [*self.recent[-19:], seconds]
        speed = sum(self.recent) / len(self.recent)
        self.progress(Progress(done, self.steps, loss, speed, peak_memory(self.device)))

    @property
    def steps(self) -> int:
        """Number of all steps, those of the phases before the training included."""
        return self.kind.phase_steps(self.config) + self.config.steps

    def report(self, message: str, memory: bool = False) -> None:
        """Report one line."""
        peak = peak_memory(self.device) if memory else None
        self.progress(Progress(self.done, self.steps, memory_bytes=peak, message=message))


def autocast_for(device: torch.device, dtype: torch.dtype) -> Callable[[], AbstractContextManager[object]]:
    """Return the context of forward passes over a base in this number format."""
    if dtype == torch.float32:
        return nullcontext
    return partial(torch.autocast, device.type, dtype=dtype)


def make_scaler(device: torch.device, dtype: torch.dtype) -> GradScaler | None:
    """Return the loss scaler that keeps fp16 gradients from underflow; None for other number formats."""
    return GradScaler(device.type) if dtype == torch.float16 else None


def _fetching(base: str) -> str:
    """Announce the download of a base that is not on this machine, because it delays the next line by minutes."""
    return " (downloading it; SDXL has 7 GB, in fp32 twice that)" if must_be_downloaded(base) else ""


def flat(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings for trackers: numbers and strings, without paths of this machine."""
    values = {key: value for key, value in shared_settings(config).items() if value is not None}
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes on a CUDA device since the run began, else the present bytes of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
