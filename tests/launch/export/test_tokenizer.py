"""Tokenizers of other makers as fast tokenizers: agreement or refusal."""

import io
import string
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer, load_tokenizer
from launch.export.tokenizer import PROBES, check_agreement, write_tokenizer
from tests.launch.export.made import CORPUS

transformers = pytest.importorskip("transformers", reason="braid export needs transformers")


def published(tokenizer: Tokenizer, folder: Path) -> tuple[list[list[int]], list[str]]:
    folder.mkdir()
    write_tokenizer(tokenizer, folder)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = [fast(text)["input_ids"] for text in PROBES]
    return ids, [fast.decode(found[1:]) for found in ids]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rules", ["identity", "nmt_nfkc"])
def test_sentencepiece_models_of_other_makers(kind: str, rules: str, tmp_path: Path):
    """Breaks when a model with a dummy prefix, normalisation or unigram scores comes out as another tokenizer."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type=kind,
        vocab_size=450,
        byte_fallback=True,
        normalization_rule_name=rules,
        hard_vocab_limit=False,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        minloglevel=3,
    )
    path = tmp_path / "other.model"
    path.write_bytes(model.getvalue())
    tokenizer = load_tokenizer(path)
    check_agreement(tokenizer, *published(tokenizer, tmp_path / "out"))


def test_a_byte_level_tokenizer_json(tmp_path: Path):
    """Breaks when a tokenizer.json loses its begin token, or gains one twice."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    check_agreement(tokenizer, *published(tokenizer, tmp_path / "out"))


def test_disagreement_is_refused(tmp_path: Path):
    """Breaks when a folder would be published whose tokenizer gives other ids or other text."""
    from data.tokenizer import train_sentencepiece

    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(CORPUS, 400))
    tokenizer = load_tokenizer(path)
    ids, spelled = published(tokenizer, tmp_path / "out")
    check_agreement(tokenizer, ids, spelled)
    with pytest.raises(ValueError, match="cannot be written as a fast tokenizer"):
        check_agreement(tokenizer, [[*ids[0], 5], *ids[1:]], spelled)
    with pytest.raises(ValueError, match="comes back as"):
        check_agreement(tokenizer, ids, ["x", *spelled[1:]])
