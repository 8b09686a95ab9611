"""The run folder: nothing half-written, nothing overwritten, resumable."""

import errno
import fcntl
import json
import os
import resource
import signal
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from crashes import snapshots
from PIL import ExifTags, Image, ImageCms
from safetensors import SafetensorError

from unziplora.config.split import SplitConfig
from unziplora.errors import MachineError, UserError, disk_full
from unziplora.images.colors import to_rgb
from unziplora.images.files import open_upright
from unziplora.runs.folder import RunFolder
from unziplora.runs.model_card import base_name
from unziplora.sampling.sources import find_lora, loras_of
from unziplora.training.runner import in_run_folder
from unziplora.utils.files import atomic_folder, atomic_write, explain, write_png


def recipe(out: Path, **changes: object) -> SplitConfig:
    return SplitConfig(**{"images": [Path("cat.jpg")], "content": "cat", "style": "sketch", "out": out, **changes})


def create(path: Path, config: SplitConfig) -> RunFolder:
    with RunFolder.created(path, config) as run:
        return run


def resume(path: Path, config: SplitConfig) -> RunFolder:
    with RunFolder.resumed(path, config) as run:
        return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create(tmp_path / "cat", recipe(tmp_path / "cat"))


def test_config_toml_of_the_user_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("# my notes\n")
    with pytest.raises(UserError, match="exists already and is not empty"):
        create(tmp_path, recipe(tmp_path))
    assert (tmp_path / "config.toml").read_text() == "# my notes\n"


def fill(folder: Path) -> None:
    atomic_write(folder / "a.bin", b"a" * 1000)
    atomic_write(folder / "deep" / "b.bin", b"b")


def test_new_folder_contains_the_configuration_with_absolute_paths(run: RunFolder) -> None:
    saved = run.config(SplitConfig)
    assert saved.images == [Path("cat.jpg").resolve()]
    assert saved.out == run.path.resolve()
    assert saved.content == "cat"
    assert run.samples.is_dir()
    assert run.checkpoints.is_dir()


def test_a_key_that_is_newer_than_the_run_has_its_default_and_not_what_the_preset_says(tmp_path: Path) -> None:
    """A preset may change with a version; the LoRAs of a run that began before do not."""
    run = create(tmp_path / "cat", recipe(tmp_path / "cat", base="bundled"))
    before, key = run.config(SplitConfig), "schedule"
    lines = run.config_file.read_text().splitlines()
    run.config_file.write_text("\n".join(line for line in lines if not line.startswith(key)))
    default = SplitConfig.model_fields[key].default
    assert before.schedule != default
    assert run.config(SplitConfig) == before.model_copy(update={key: default})


def test_damaged_setting_is_named_with_its_file(run: RunFolder) -> None:
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("masks", "iasks"))
    with pytest.raises(UserError, match=r"config\.toml: unknown key 'iasks'.*'masks'"):
        run.config(SplitConfig)


def test_path_of_a_base_becomes_absolute_and_a_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-xl").mkdir()
    for base, saved in (("tiny-xl", str(tmp_path / "tiny-xl")), ("bundled", "bundled"), ("some/xl", "some/xl")):
        run = create(tmp_path / saved.replace("/", "-"), recipe(Path("x"), base=base))
        assert run.config(SplitConfig).base == saved


def test_linked_base_keeps_its_own_name(tmp_path: Path) -> None:
    """As in the hub's cache, where a model's name links to a file that is named by its hash."""
    (tmp_path / "31e35c80").touch()
    (tmp_path / "my-xl.safetensors").symlink_to(tmp_path / "31e35c80")
    config = recipe(tmp_path / "cat", base=str(tmp_path / "my-xl.safetensors"))
    assert create(config.out, config).config(SplitConfig).base == config.base
    assert base_name(config) == "my-xl.safetensors"


@pytest.mark.parametrize("again", [False, True])
def test_folder_stays_locked_from_its_check_to_the_end_of_the_work(tmp_path: Path, again: bool) -> None:
    config = recipe(tmp_path / "cat")
    if again:
        create(config.out, config)

    def work(run: RunFolder) -> None:
        for other in (create, resume):
            with pytest.raises(UserError, match=f"process {os.getpid()} is training into this folder"):
                other(config.out, config)

    in_run_folder(config, again, work)
    with RunFolder(config.out).lock():
        pass


def test_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty: choose another --out"):
        create(tmp_path, recipe(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cat"
    path.write_text("mine")
    with pytest.raises(UserError, match="choose another --out"):
        create(path, recipe(path))
    with pytest.raises(MachineError, match="a file is where a folder should be"):
        create(path / "deeper", recipe(path / "deeper"))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("left", ["content.safetensors", "samples/000600.png", "checkpoints/step-000200/x"])
def test_run_that_has_learned_something_is_never_overwritten(run: RunFolder, left: str) -> None:
    (run.path / left).parent.mkdir(exist_ok=True)
    (run.path / left).write_text("result")
    with pytest.raises(UserError, match="--resume"):
        create(run.path, recipe(run.path))


def test_run_that_failed_before_its_first_step_may_start_again(run: RunFolder) -> None:
    run.log(step=0, note="base missing")
    again = create(run.path, recipe(run.path, rank=8))
    assert again.config(SplitConfig).rank == 8
    assert again.read_log() == []


def test_resume_with_other_settings_names_the_differences(run: RunFolder) -> None:
    with pytest.raises(UserError, match=r"rank: 64 → 8") as caught:
        resume(run.path, recipe(run.path, rank=8))
    assert "seed" not in str(caught.value)
    resume(run.path, recipe(run.path, checkpoint_every=7, sample_seeds=[5], sample_steps=9, sample_guidance=3.0))


def test_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to resume"):
        resume(tmp_path, recipe(tmp_path))


def test_damaged_configuration_is_named(run: RunFolder) -> None:
    run.config_file.write_text("rank = [")
    with pytest.raises(UserError, match=r"config\.toml: not valid TOML"):
        run.config(SplitConfig)


def fill_file(file: BinaryIO) -> None:
    file.write(b"a" * 1000)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_checkpoints_are_kept(run: RunFolder) -> None:
    assert run.steps() == []
    for step in (200, 400, 600):
        path = run.checkpoint(step, fill_file)
    assert path == run.checkpoint_file(600)
    assert run.steps() == [400, 600]
    run.checkpoint(600, fill_file)  # once more in the same place
    assert names(run.checkpoints) == ["step-000400.safetensors", "step-000600.safetensors"]


def test_checkpoint_that_a_run_fell_back_from_gives_way_to_the_next_ones(run: RunFolder) -> None:
    run.checkpoint(200, fill_file)
    run.checkpoint(400, fill_file)
    run.checkpoint(300, fill_file)
    assert run.steps() == [200, 300]


def test_failed_checkpoint_leaves_the_previous_ones(run: RunFolder) -> None:
    run.checkpoint(200, fill_file)

    def fail(error: Exception) -> Callable[[BinaryIO], None]:
        def write(file: BinaryIO) -> None:
            fill_file(file)
            raise error

        return write

    with pytest.raises(MachineError, match="disk is full"):
        run.checkpoint(400, fail(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(RuntimeError, match="a bug"):
        run.checkpoint(400, fail(RuntimeError("a bug")))
    assert names(run.checkpoints) == ["step-000200.safetensors"]


def test_process_killed_while_writing_leaves_no_incomplete_checkpoint(run: RunFolder) -> None:
    run.checkpoint(200, fill_file)
    child = os.fork()
    if not child:
        with run.lock():
            run.checkpoint(400, lambda file: [file.write(b"half"), os.kill(os.getpid(), signal.SIGKILL)])
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(names(run.checkpoints)) == 2
    assert run.steps() == [200]
    resume(run.path, recipe(run.path))
    assert names(run.checkpoints) == ["step-000200.safetensors"]
    with run.lock():  # the lock of the dead process is released
        pass


def test_second_process_is_refused(run: RunFolder) -> None:
    with run.lock():
        with pytest.raises(UserError, match=f"process {os.getpid()} is training"), RunFolder(run.path).lock():
            pass
        with pytest.raises(UserError, match="is training into this folder"):
            create(run.path, recipe(run.path))
        half = run.checkpoints / ".step-000200.safetensors.0123abcd"
        half.touch()
        with pytest.raises(UserError, match="is training into this folder"):
            resume(run.path, recipe(run.path))
        assert half.is_file()  # the process that writes it goes on
    resume(run.path, recipe(run.path))
    assert not half.exists()


def test_half_written_log_line_is_ignored_and_later_steps_are_deleted(run: RunFolder) -> None:
    for step in (1, 2, 3):
        run.log(step=step, loss=float("nan") if step == 2 else 0.5)
    with run.log_file.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in run.read_log()] == [1, 2, 3]
    assert run.read_log()[1]["loss"] is None
    run.rewind_log(2)
    assert [json.loads(line)["step"] for line in run.log_file.read_text().splitlines()] == [1, 2]


def test_writing_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    atomic_write(path, "one")

    def broken(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        atomic_write(path, broken)
    assert path.read_text() == "one"
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
    assert path.stat().st_mode & 0o444 == 0o444


def test_new_files_get_the_permissions_of_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to the whole process"))
        atomic_write(tmp_path / "a.txt", "text")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_files_are_synced_by_a_writable_handle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to sync read-only handles, with EBADF."""
    synced = []

    def windows(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            synced.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, "fsync", windows)
    atomic_folder(tmp_path / "folder", fill)
    atomic_write(tmp_path / "file", "text")
    assert len(synced) > 1
    assert os.O_RDONLY not in synced


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_error_names_the_fault_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(MachineError, match=message):
        atomic_write(tmp_path / "a.txt", "text")
    with pytest.raises(MachineError, match=message):
        atomic_folder(tmp_path / "folder", fill)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_no_files(run: RunFolder) -> None:
    """A limit on the size of files replaces a full disk, because then the system itself refuses the write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        with pytest.raises(MachineError, match="disk is full"):
            run.checkpoint(200, fill_file)
        with pytest.raises(MachineError, match="disk is full"):
            write_png(run.sheet(200), Image.effect_noise((200, 200), 90))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert names(run.checkpoints) == names(run.samples) == []


def test_run_that_stopped_between_its_files_is_not_a_content_lora(run: RunFolder) -> None:
    run.content.touch()
    assert loras_of(run.path) == {"content": run.path, "style": run.path}
    with pytest.raises(UserError, match=r"no cat-style\.safetensors in it; the run is not finished: resume it"):
        find_lora(run.path, "style")
    run.card.touch()
    assert loras_of(run.path) == {"content": run.path}
    with pytest.raises(UserError, match=r"it contains cat-content\.safetensors: give the file that you mean"):
        find_lora(run.path, "style")


class TestLoraFiles:
    def test_names_begin_with_that_of_the_folder(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "cat")
        assert run.content == tmp_path / "cat" / "cat-content.safetensors"
        assert run.lora("style", "diffusers").name == "cat-style.diffusers.safetensors"

    @pytest.mark.parametrize(
        ("folder", "name"),
        [("my cat: v1.0", "my-cat-v1.0"), ("Häuser", "Häuser"), ("-x", "x"), ("<lora:a:1>", "lora-a-1"), ("…", "run")],
    )
    def test_names_contain_no_signs_that_prompts_and_shells_read(self, tmp_path: Path, folder: str, name: str) -> None:
        assert RunFolder(tmp_path / folder).style.name == f"{name}-style.safetensors"

    def test_name_of_a_long_folder_leaves_room_for_the_ending(self, tmp_path: Path) -> None:
        file = RunFolder(tmp_path / ("漢" * 85)).lora("content", "diffusers")
        assert len(f".{file.name}.12345678".encode()) < 255

    @pytest.mark.parametrize("old", ["content.safetensors", "before-content.safetensors"])
    def test_files_of_an_older_or_renamed_run_are_found(self, run: RunFolder, old: str) -> None:
        (run.path / old).touch()
        (run.path / "dis-content.diffusers.safetensors").touch()
        assert run.content.name == old
        assert list(run.loras) == ["content"]
        assert run.lora_name(run.path / old) == "content"
        run.card.touch()
        assert loras_of(run.path) == {"content": run.path}

    def test_file_with_the_own_name_wins_and_others_are_no_parts_of_the_run(self, run: RunFolder) -> None:
        for name in ("a-content.safetensors", "cat-content.safetensors", "content.safetensors", "x.safetensors"):
            (run.path / name).touch()
        assert run.content.name == "cat-content.safetensors"
        assert run.lora_name(run.path / "x.safetensors") is None
        assert run.lora_name(run.path / "a-content.safetensors") is None

    def test_files_of_other_tools_in_a_plain_folder_are_not_a_run(self, tmp_path: Path) -> None:
        (tmp_path / "ink-style.safetensors").touch()
        assert not RunFolder(tmp_path).loras


class TestForeignDrives:
    """Drives that lack a protection: one line of warning, and everything works."""

    def lacks(self, monkeypatch: pytest.MonkeyPatch, name: str, number: int, folders_only: bool = False) -> None:
        module: Any = fcntl if name == "flock" else os
        original = getattr(module, name)

        def refuse(target: Any, *args: Any) -> Any:
            if not folders_only or stat.S_ISDIR(os.fstat(target).st_mode):
                raise OSError(number, os.strerror(number))
            return original(target, *args)

        monkeypatch.setattr(module, name, refuse)

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
    @pytest.mark.parametrize("folders_only", [True, False])
    def test_drive_without_sync(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folders_only: bool
    ) -> None:
        self.lacks(monkeypatch, "fsync", number, folders_only)
        with pytest.warns(UserWarning, match="this drive does not sync files") as caught:
            create(tmp_path / "cat", recipe(tmp_path / "cat")).checkpoint(200, fill_file)
        assert len({str(warning.message) for warning in caught}) == 1
        assert RunFolder(tmp_path / "cat").steps() == [200]

    @pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL])
    def test_drive_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.lacks(monkeypatch, "flock", number)
        with pytest.warns(UserWarning, match="no locks; let only one process train here"):
            run = create(tmp_path / "cat", recipe(tmp_path / "cat"))
        with pytest.warns(UserWarning, match="no locks"):
            resume(run.path, recipe(run.path))

    def test_drive_that_does_not_move_folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lacks(monkeypatch, "rename", errno.EXDEV)
        run = create(tmp_path / "cat", recipe(tmp_path / "cat"))
        assert run.unfinished
        assert names(tmp_path) == ["cat"]

    @pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM, errno.ENOTSUP])
    def test_drive_that_does_not_replace_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        replace = os.replace

        def refuse(source: Path, target: Path) -> None:
            if os.path.exists(target):
                raise OSError(number, os.strerror(number))
            replace(source, target)

        monkeypatch.setattr(os, "replace", refuse)
        atomic_write(tmp_path / "a", "one")
        with pytest.warns(UserWarning, match="does not replace files in one step"):
            atomic_write(tmp_path / "a", "two")
        assert (tmp_path / "a").read_text() == "two"
        assert names(tmp_path) == ["a"]


class TestImagesInMemory:
    image = Image.effect_noise((8, 8), 90)

    def test_image_of_a_failed_request_goes_again(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "cat")
        with pytest.raises(UserError, match="wrong"), run.stored({2: self.image}):
            raise UserError("wrong" if (run.path / "images" / "2.png").is_file() else "nothing stored")
        assert not run.path.exists()

    def test_images_of_a_process_that_begins_a_run_are_neither_replaced_nor_removed(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "cat")
        with run.stored({1: self.image}) as files:
            before = files[1].read_bytes()
            with (
                pytest.raises(UserError, match="is training into this folder"),
                run.stored({1: Image.new("L", (8, 8))}),
            ):
                pass
            assert files[1].read_bytes() == before
        assert not run.path.exists()

    def test_image_of_an_unfinished_run_is_never_overwritten(self, run: RunFolder) -> None:
        with run.stored({1: self.image}) as files:
            before = files[1].read_bytes()
        run.checkpoint(200, fill_file)
        with pytest.raises(UserError, match="unfinished run"), run.stored({1: Image.new("L", (8, 8))}):
            pass
        assert files[1].read_bytes() == before

    def test_resumed_run_takes_the_same_image_and_refuses_another(self, run: RunFolder) -> None:
        with run.stored({1: self.image}):
            pass
        with run.stored({1: self.image}, resume=True) as files:
            assert files[1].is_file()
        with (
            pytest.raises(UserError, match="image 1: different content"),
            run.stored({1: Image.new("L", (8, 8))}, True),
        ):
            pass

    @pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr", "HSV", "LAB", "L", "F"])
    def test_image_is_stored_as_its_file_is_read(self, tmp_path: Path, mode: str) -> None:
        image = Image.effect_noise((32, 16), 90).convert("RGB").convert(mode)
        image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        suffix = {"RGB": "jpg", "CMYK": "jpg", "YCbCr": "jpg", "L": "jpg"}.get(mode, "tif")
        if mode != "HSV":  # no file has it
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 6
            options = {} if mode in ("LAB", "CMYK") else {"icc_profile": image.info["icc_profile"]}
            image.save(tmp_path / f"a.{suffix}", exif=exif, **options)
            image = Image.open(tmp_path / f"a.{suffix}")
        with RunFolder(tmp_path / "cat").stored({1: image}) as files:
            stored, size = open_upright(files[1], 8, to_rgb)
            if mode != "HSV":
                file, turned = open_upright(tmp_path / f"a.{suffix}", 8, to_rgb)
                assert size == turned == (16, 32)
                assert stored.tobytes() == file.tobytes()
            else:
                assert stored.tobytes() == image.convert("RGB").tobytes()


def test_resumed_run_keeps_settings_that_may_change_for_the_next_process(run: RunFolder) -> None:
    before = run.config_file.read_text()
    resume(run.path, run.config(SplitConfig))
    assert run.config_file.read_text() == before
    resume(run.path, recipe(run.path, precision="fp32", gradient_checkpointing=True))
    after = run.config(SplitConfig)
    assert (after.precision, after.gradient_checkpointing, after.rank) == ("fp32", True, recipe(run.path).rank)
    assert run.config_file.read_text().count("\n") == before.count("\n")
    run.checkpoint(2, fill_file)
    resume(run.path, recipe(run.path, precision="bf16", rank=3))  # who reads the checkpoint refuses another rank
    after = run.config(SplitConfig)
    assert (after.precision, after.rank) == ("bf16", recipe(run.path).rank)


def test_new_run_that_fails_before_it_learns_leaves_no_trace(tmp_path: Path) -> None:
    out = tmp_path / "cat"
    with pytest.raises(MachineError, match="no network"), RunFolder.created(out, recipe(out)):
        raise MachineError("no network")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MachineError, match="disk"), RunFolder.created(out, recipe(out)) as run:
        raise MachineError(f"disk of {run.checkpoint(200, fill_file)}")
    assert run.steps() == [200]


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a run that failed", "a run that was killed"])
@pytest.mark.parametrize("fails", [False, True])
def test_folder_can_be_resumed_or_started_again_at_every_moment_of_its_start(
    tmp_path: Path, before: str, fails: bool
) -> None:
    folder, out = tmp_path / "folder", tmp_path / "folder" / "cat"
    out.mkdir(parents=True)
    if before == "nothing":
        out.rmdir()
    elif before != "an empty folder":
        run = create(out, recipe(out))
        run.log(step=1)
        (out / "trackers").mkdir()

    def start() -> None:
        if before == "a run that failed":
            RunFolder(out)._remove_traces()
        with suppress(UserError), RunFolder.created(out, recipe(out)) as run:
            run.log(step=1)
            if fails:
                raise UserError("wrong")

    states = snapshots(folder, start, tmp_path / "killed")
    assert len(states) > 5
    for state in states:
        run = RunFolder(state / "cat")
        assert resume(run.path, recipe(out)) if run.config_file.exists() else run.is_free(), state.name
        if not run.path.exists() or not run.unfinished:
            create(run.path, recipe(run.path))


def test_leftovers_of_a_killed_start_are_removed(tmp_path: Path) -> None:
    for name in (".cat.0123abcd", ".cat.old", ".dog.0123abcd"):
        (tmp_path / name / "samples").mkdir(parents=True)
    create(tmp_path / "cat", recipe(tmp_path / "cat"))
    assert names(tmp_path) == [".cat.old", ".dog.0123abcd", "cat"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_recognized_by_its_number(error: Exception) -> None:
    assert disk_full(error)


def test_full_disk_behind_another_error_is_recognized() -> None:
    error = RuntimeError("cannot save")
    error.__cause__ = OSError(errno.ENOSPC, "")
    assert disk_full(error)
    assert "disk is full" in str(explain(Path("a"), error))
    assert not disk_full(RuntimeError("no space left on device"))
