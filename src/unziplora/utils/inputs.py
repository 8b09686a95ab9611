"""Files that people bring: only regular ones are opened, and any content leads to a message instead of a crash."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO

from unziplora.errors import MachineError, UserError, first_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT_LIMIT = 32 * 2**20
"""Largest text file in bytes; the longest that a base needs, a vocabulary or an index of weights, has 5 MB."""
TOML_LIMIT, MOST_DOTS = 2**20, 1000
"""Largest TOML file in bytes, and dots in a line of it: the parser's time grows with their square."""

_SPECIAL = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path) -> None:
    """Refuse a folder, pipe, socket or device: opening or reading it could take forever.

    Raises:
        UserError: it is not a regular file.
        OSError: it is missing or out of reach.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise UserError(f"{path}: this is {_SPECIAL.get(kind, 'something else')}, not a file; name a file")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Errors as in `check_regular`."""
    check_regular(path)
    return path.open("rb")


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """Read a text file in UTF-8, with or without the mark that Windows editors write.

    Raises:
        UserError: it is not a regular file, or too large for a text that a person or a program writes.
        OSError, ValueError: it cannot be read, or is not UTF-8.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path}: larger than {limit // 2**20} MiB; this is not a settings file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8: save it as UTF-8") from None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or contains half a character (a lone surrogate).
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        UserError: it is not a regular file, too large, or not a JSON object.
        OSError: it is missing or out of reach.
    """
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: contains no JSON object; copy or download it again")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file of keys.

    Raises:
        UserError: the file is missing or not TOML.
        MachineError: it cannot be read.
    """
    try:
        text = read_text(path, TOML_LIMIT)
        if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
            raise ValueError(f"a line has more than {MOST_DOTS} dots")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML ({first_line(error)})") from None
