"""Tiny corpora, and prepared data made of them."""

import random
from pathlib import Path

from data.prepare import DataConfig, PreparedData, TokenizerConfig, prepare
from data.sources import TextFolder

WORDS = ("def", "return", "self", "value", "index", "name", "if", "else", "for", "in", "import", "print", "item")
NASTY = [
    "",
    " ",
    "    \t\t \n\n  \r\n\r",
    "\u2581",
    "a\u2581 \u2581\u2581b  \u2581",
    "<s></s><pad><unk><0x0A><0xE2><0x96><0x81>",
    "\x00\x01\x1f\x7f a\x00b",
    "\u2585 \u2047 \ufffd \ufeff \u200b\u00a0\u3000",
    "\ufdd0\U0010ffff\ue000",
    "e\u0301 \ufb01 \u212b \u1100\u1161",
    "日本語のテキスト 😀👩\u200d👩\u200d👧 \u202eabc",
    "\u2028\u2029\x85\x0b\x0c",
]


def text(seed: int, words: int = 120) -> str:
    """Code-like text: lines, indentation, a few rare characters."""
    draw = random.Random(seed)
    lines = []
    for _ in range(words // 6):
        indent = "    " * draw.randrange(4)
        lines.append(
            indent + " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 9))) + draw.choice([":", ""])
        )
    return "\n".join([*lines, draw.choice(NASTY), f"# document {seed}", ""])


def nasty_strings(count: int = 200) -> list[str]:
    """Random strings over an alphabet of everything that a tokenizer may stumble over."""
    alphabet = [*"ab \t\n\r<>s/0x", *NASTY, *WORDS, "\u2581", "  ", "é", "😀", "\0"]
    draw = random.Random(7)
    made = ["".join(draw.choices(alphabet, k=draw.randrange(1, 30))) for _ in range(count)]
    return [*NASTY, *made]


def write_corpus(folder: Path, documents: int = 60, words: int = 120) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        (folder / f"{number:03d}.txt").write_text(text(number, words), encoding="utf-8", newline="")
    return folder


def config(corpus: Path, out: Path, **changes: object) -> DataConfig:
    settings: dict[str, object] = {
        "source": TextFolder(str(corpus)),
        "path": str(out),
        "tokenizer": TokenizerConfig(vocab_size=360),
        "validation_fraction": 0.2,
        "workers": 2,
    }
    return DataConfig(**(settings | changes))  # type: ignore[arg-type]


def quiet(message: str) -> None:
    """A log that nobody reads."""


def make(folder: Path, **changes: object) -> PreparedData:
    """A small corpus, prepared."""
    return prepare(config(write_corpus(folder / "corpus"), folder / "out", **changes), log=quiet)
