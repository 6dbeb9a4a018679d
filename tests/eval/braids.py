"""A small braid and its tokenizer, for tests of evaluation."""

import random
from pathlib import Path

import torch
from lm_eval.api.instance import Instance

from data.tokenizer import Tokenizer, load_tokenizer
from model.hybrid import HybridLM, Precision
from tests.data.corpus import text
from tests.model.test_hybrid import built, samba

PAIRS = [  # the first three share their context
    ("def index(self):", " return value"),
    ("def index(self):", " return name"),
    ("def index(self):", " value if name else print(index)\n"),
    ("", "import print"),
    ("if value  ", "else"),  # spaces at the end belong to the continuation
    ("for name", "s in value:\n    print(name)"),
    ("日本", "語のテキスト"),
    ("return self " * 12, "value"),
    ("x", "y"),
]


def braid(vocab_size: int) -> HybridLM:
    return built(samba(vocab_size=vocab_size))


def in_float64(model: HybridLM) -> HybridLM:
    """The same weights, computed in float64."""
    exact = HybridLM(model.config, Precision(torch.float64, torch.float64)).double()
    exact.load_state_dict(model.state_dict())
    return exact


def train_json_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE tokenizer.json whose post-processor puts bos in front, as an exported model has it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text(seed) for seed in range(20)], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    """Requests of lm-eval."""
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def shuffled(items: list, seed: int = 0) -> tuple[list, list[int]]:
    """The items in another order, and where each of them went."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return [items[index] for index in order], order
