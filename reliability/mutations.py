"""Damage to bytes, to values of JSON and TOML, and to safetensors headers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    2**200,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\x00",
    "\x1b[31mred\x1b[0m\x07",
    "\u202egnp.exe",
    "\ud800",
    "x" * 100_000,
    "(a+)+$" + "a" * 40,
    "../../../../etc/passwd",
    "~nobody-of-this-name/x",
    "{content",
    "{0.__class__}",
    [],
    {},
    [[]],
    {"": {"": {}}},
)


def damage_bytes(draw: random.Random, data: bytes) -> bytes:
    """Flip, overwrite, cut, repeat or insert bytes, once to four times."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        start = draw.randrange(len(result) + 1)
        start = min(start, draw.choice((start, 64, 1024)))  # formats keep their structure at the beginning
        length = draw.choice((1, 2, 4, 8, 64, 1024))
        noise = draw.choice((draw.randbytes(length), b"\x00" * length, b"\xff" * length))
        sort = draw.randrange(5)
        if sort == 0 and start < len(result):
            result[start] ^= 1 << draw.randrange(8)
        elif sort == 1:
            result[start : start + length] = noise
        elif sort == 2:
            del result[start:]
        elif sort == 3:
            result[start:start] = result[start : start + length] * draw.choice((1, 50))
        else:
            result[start:start] = noise
    return bytes(result)


def hostile(draw: random.Random) -> Any:
    """Return a value that no reader expects, now and then a very deep one."""
    if draw.random() < 0.95:
        return draw.choice(HOSTILE)
    value: Any = draw.choice(("end", 1, {}))
    for _ in range(draw.choice((20, 200, 2000))):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


def damage_value(draw: random.Random, value: Any) -> Any:
    """Replace, remove, rename, repeat or add something at a random place of a JSON value."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        return _damage_table(draw, dict(value))
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        changed = draw.choice(([], [hostile(draw)], [damage_value(draw, value[place])], [value[place]] * 3))
        return [*value[:place], *changed, *value[place + 1 :]]
    if isinstance(value, str) and value and draw.random() < 0.4:
        return damage_bytes(draw, value.encode(errors="replace")).decode(errors="replace")
    if isinstance(value, int | float) and draw.random() < 0.4:
        return draw.choice((-value, value + 1, value * 1_000_000, str(value), value / 3))
    return hostile(draw)


def _damage_table(draw: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    name = draw.choice(list(value))
    sort = draw.randrange(6)
    if sort == 0:
        del value[name]
    elif sort == 1:
        value[draw.choice(("", "\x1b]0;x\x07", name + "x", name.upper(), "__class__"))] = value.pop(name)
    elif sort == 2:
        value[name] = hostile(draw)
    else:
        value[name] = damage_value(draw, value[name])
    return value


def damage_json(draw: random.Random, file: Path) -> None:
    """Damage the values of a JSON file, or its bytes."""
    value = parsed(file.read_bytes())
    if value is None or draw.random() < 0.3:
        file.write_bytes(damage_bytes(draw, file.read_bytes()))
    else:
        file.write_text(dumps(damage_value(draw, value)), encoding="utf-8", errors="surrogatepass")


def damage_toml(draw: random.Random, file: Path) -> None:
    """Replace, remove or repeat lines and values of a TOML file, or damage its bytes."""
    if draw.random() < 0.3:
        file.write_bytes(damage_bytes(draw, file.read_bytes()))
        return
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines() or [""]
    place = draw.randrange(len(lines))
    name, equals, _ = lines[place].partition("=")
    values = (
        "nan",
        "-inf",
        "1979-05-27",
        "07:32:00",
        "9" * 400,
        "[[[[]]]]",
        "{a = {b = 1}}",
        '"""\n\x7f',
        "0x" + "f" * 99,
    )
    value = draw.choice((*values, dumps(hostile(draw)), "[" * 3000 + "]" * 3000))
    lines[place : place + draw.choice((1, 1, 1, 2))] = draw.choice(([f"{name}{equals}{value}"], [lines[place]] * 2, []))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")


def damage_safetensors(draw: random.Random, file: Path) -> None:
    """Damage the header of a safetensors file, its length, or any bytes."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    sort, header = draw.random(), parsed(data[8 : 8 + length])
    if sort < 0.3 or not isinstance(header, dict):
        file.write_bytes(damage_bytes(draw, data))
    elif sort < 0.4:
        claim = draw.choice((0, 1, length - 1, length + 1, len(data), 2**31, 6 * 10**9, 2**63, 2**64 - 1))
        file.write_bytes(claim.to_bytes(8, "little") + data[8:])
    else:
        if sort < 0.6 and "__metadata__" in header:
            header["__metadata__"] = damage_value(draw, header["__metadata__"])
        else:
            header = damage_value(draw, header)
        raw = dumps(header).encode("utf-8", errors="surrogatepass")
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def parsed(data: bytes) -> Any:
    """Return the value of JSON, or None if an earlier damage made it unreadable."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def dumps(value: Any) -> str:
    """Format JSON however deep it is."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 100_000 + "]" * 100_000
