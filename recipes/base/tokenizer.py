"""A CLIPTokenizer of few words: its merges are the first ones of CLIP's own byte-pair encoding."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WHEEL = "open_clip_torch==3.3.0"
MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"
MAX_LENGTH = 77


def fetch_merges(cache: Path, count: int) -> list[tuple[str, str]]:
    """The first `count` merges of CLIP, from the open_clip wheel on PyPI (kept in `cache`)."""
    path = cache / "merges.txt"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                text = gzip.decompress(wheel.read(MEMBER)).decode()
        cache.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(text.split("\n")[1 : 49152 - 256 - 2 + 1]))
    lines = path.read_text().split("\n")[:count]
    return [(left, right) for left, right in (line.split() for line in lines)]


def byte_symbols() -> list[str]:
    """The printable symbol of each byte, in CLIP's order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + n) for n in range(256 - len(plain))]
    return [chr(b) for b in plain] + others


def build_tokenizer(merges: list[tuple[str, str]], pad_token: str = END) -> CLIPTokenizer:
    """A tokenizer with these merges; ids are CLIP's layout: bytes, word-final bytes, merges, start, end."""
    symbols = byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=MAX_LENGTH)
