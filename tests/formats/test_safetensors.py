"""Property tests of headers: any header and any body is a file that is read, or refused by a message."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_files import Q, make

from unziplora.errors import UserError
from unziplora.formats.files import read_lora, write_lora
from unziplora.formats.inspect import inspect
from unziplora.formats.safetensors import read_header

NAME = f"unet.{Q}.lora_A.weight"
KEYS = st.sampled_from([NAME, NAME.replace("_A", "_B"), "__metadata__", "a.alpha", "lora", ""]) | st.text(max_size=9)
NUMBERS = st.integers(-2, 2**70) | st.floats(allow_subnormal=False)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "I8", "BOOL", "C64", "F4", "XX"]) | NUMBERS,
        "shape": st.lists(st.integers(0, 8) | NUMBERS, max_size=4) | st.none(),
        "data_offsets": st.lists(st.integers(0, 64) | NUMBERS | st.text(max_size=2), max_size=3) | st.text(max_size=2),
    },
)
METADATA = st.dictionaries(
    st.sampled_from(["ss_tag_frequency", "modelspec.trigger_phrase", "lora_adapter_metadata", "unziplora.settings"]),
    st.sampled_from(["{}", "[]", "null", '{"a": {"b": 1e999}}', "[" * 2000, '{"unet.lora_alpha": "x"}', "\x1b[31m"])
    | st.text(max_size=20)
    | NUMBERS,
)


def read(path: Any) -> None:
    """Read a file in every way; only a message may come instead of a result."""
    for reader in (read_header, read_lora, lambda path: str(inspect(path)) + inspect(path).model_dump_json()):
        with suppress(UserError):
            assert reader(path) is not None


@given(st.dictionaries(KEYS, ENTRY | METADATA | NUMBERS | st.lists(NUMBERS, max_size=2), max_size=3), st.binary())
def test_any_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], body: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    read(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A LoRA file with a header of ours."""
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    write_lora(make([Q]), path, metadata={"modelspec.trigger_phrase": "a sks cat", "ss_tag_frequency": "{}"})
    return path.read_bytes()


@given(metadata=METADATA)
def test_any_metadata_on_sound_tensors_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, metadata: dict[str, Any]
) -> None:
    length = int.from_bytes(whole[:8], "little")
    text = json.dumps({**json.loads(whole[8 : 8 + length]), "__metadata__": metadata}).encode()
    path = tmp_path_factory.getbasetemp() / "metadata.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    read(path)


@given(st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4), st.integers(0))
def test_flipped_and_missing_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(whole)
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(bytes(data[: len(data) - cut % 64]))
    read(path)
