"""CLIPTokenizer with a small vocabulary: the first merges of CLIP's own byte-pair encoding."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTokenizer

from unziplora.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = Path(__file__).with_name("merges.txt")
MAX_LENGTH = 77


def read_merges(count: int) -> list[tuple[str, str]]:
    """Read the first `count` merges of CLIP, most frequent first.

    Raises:
        UserError: `merges.txt` has fewer.
    """
    lines = [line for line in MERGES.read_text().splitlines() if not line.startswith("#version")]
    if count > len(lines):
        raise UserError(f"merges.txt has {len(lines)} merges, not {count}: set [clip] merges lower")
    return [(left, right) for left, right in (line.split() for line in lines[:count])]


def byte_symbols() -> list[str]:
    """Return the printable symbol of each byte, in CLIP's order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + n) for n in range(256 - len(plain))]
    return [chr(b) for b in plain] + others


def build_tokenizer(merges: list[tuple[str, str]], pad_token: str = END) -> CLIPTokenizer:
    """Return a tokenizer with these merges and ids in CLIP's order: bytes, word-final bytes, merges, start, end."""
    symbols = byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=MAX_LENGTH)
