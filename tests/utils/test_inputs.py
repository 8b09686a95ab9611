"""Files that people bring, whatever they are and contain."""

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unziplora.config.recipe import resolve, to_toml
from unziplora.config.sample import SampleConfig
from unziplora.config.split import SplitConfig
from unziplora.errors import UserError
from unziplora.formats.files import read_lora
from unziplora.formats.inspect import inspect
from unziplora.formats.safetensors import HEADER_LIMIT, read_header
from unziplora.images.files import open_upright
from unziplora.lora.blocks import read_blocks
from unziplora.models.sizes import inspect_base
from unziplora.utils.inputs import MOST_DOTS, TEXT_LIMIT, TOML_LIMIT, open_regular, parse_json, read_json, read_toml


@pytest.fixture(autouse=True)
def _never_waits() -> Iterator[None]:
    """Fail a test that waits for a pipe."""

    def fail(*_: object) -> None:
        raise AssertionError("waited for a file that never ends")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def socket_file(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "any file": ("a.bin", open_regular),
    "settings": ("a.toml", read_toml),
    "JSON": ("a.json", read_json),
    "block map": ("a.toml", lambda path: read_blocks(str(path))),
    "image": ("a.png", lambda path: open_upright(path, 64)),
    "LoRA": ("a.safetensors", read_lora),
    "header": ("a.safetensors", read_header),
    "inspection": ("a.safetensors", inspect),
    "base": ("a.safetensors", lambda path: inspect_base(str(path))),
}


@pytest.mark.parametrize("make", [folder, pipe, device, socket_file], ids=lambda make: make.__name__)
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_opened(tmp_path: Path, reader: str, make: Callable[[Path], None]) -> None:
    name, read = READERS[reader]
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"a\.(bin|toml|json|png|safetensors)|{tmp_path}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["unet/config.json", "tokenizer/vocab.json", "vae/diffusion_pytorch_model.safetensors"]
)
def test_pipe_in_the_folder_of_a_base_is_refused(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    for file in (file for file in tiny_folder.rglob("*") if file.is_file()):
        (tmp_path / file.relative_to(tiny_folder)).parent.mkdir(exist_ok=True)
        (tmp_path / file.relative_to(tiny_folder)).symlink_to(file)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="pipe"):
        inspect_base(str(tmp_path))


@pytest.mark.parametrize("length", [HEADER_LIMIT + 1, 6 * 10**9, 2**63, 2**64 - 1])
def test_header_beyond_the_limit_is_not_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(7 * 10**9)  # sparse: takes no room
    for read in (read_header, read_lora, inspect):
        with pytest.raises(UserError, match="truncated, or not a safetensors file"):
            read(path)


@pytest.mark.parametrize(("limit", "read"), [(TOML_LIMIT, read_toml), (TEXT_LIMIT, read_json)])
def test_text_beyond_the_limit_is_not_read(tmp_path: Path, limit: int, read: Callable[[Path], Any]) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(100 * limit)
    with pytest.raises(UserError, match="this is not a settings file"):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "[" * 1000 + "]" * 1000,
        "a." * 50_000 + "a = 1",
        "[" + "a." * (MOST_DOTS + 1) + "a]",
        "a = " + "9" * 5000,
        'a = "\\ud800"',
        "a = 1\na = 2",
        "a = \0",
        'a = "\x1b[31m"',
    ],
    ids=lambda text: text[:12],
)
def test_hostile_toml_is_refused_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError, match="not valid TOML"):
        read_toml(tmp_path / "a.toml")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, '{"a": "\\ud800"}', "9" * 5000, "{", "", '{"a": 1}x', '{"\\udfff": 1}'],
    ids=lambda text: text[:12],
)
def test_hostile_json_is_an_error_of_values(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (of any kind)
        parse_json(text)


NUMBERS = st.integers() | st.floats(allow_subnormal=False) | st.sampled_from([10**400, 2**63])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
WORDS = {"images": ["cat.png"], "content": "cat", "style": "ink", "out": "runs/cat"}


@given(st.dictionaries(st.sampled_from(list(SplitConfig.model_fields)) | st.text(max_size=9), VALUES, max_size=4))
def test_settings_of_any_value_are_a_recipe_or_refused(settings: dict[str, Any]) -> None:
    for model, start in ((SplitConfig, WORDS), (SampleConfig, {"content": "a"})):
        with suppress(UserError):
            config = resolve(model, start, settings)
            assert to_toml(config)
            assert json.loads(config.model_dump_json())


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_settings_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    for read in (read_toml, read_json, lambda path: read_blocks(str(path))):
        with suppress(UserError):
            assert read(path) is not None
