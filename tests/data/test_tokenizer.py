"""`decode(encode(x)) == x` for every valid UTF-8 text, with clear errors and one face for both libraries."""

import random
from pathlib import Path

import numpy as np
import pytest

from data.tokenizer import BOUNDARY, Tokenizer, load_tokenizer, train_sentencepiece
from tests.data.corpus import nasty_strings, text

CORPUS = [text(seed) for seed in range(30)] + ["<s> <0x0A> </s>\n" * 40, "\tif x:\n\t\treturn\r\n" * 40]
STRINGS = nasty_strings()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(CORPUS, 400))
    return path


@pytest.fixture(scope="module")
def ours(model: Path) -> Tokenizer:
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(params=["ours", "hugging_face"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_every_text_survives(tokenizer: Tokenizer):
    """Breaks when any character is normalised, merged or lost."""
    for string, ids in zip(STRINGS, tokenizer.encode_batch(STRINGS, workers=2), strict=True):
        assert tokenizer.decode(ids) == string
        assert tokenizer.decode_bytes(ids) == string.encode()
        assert tokenizer.encode(string.encode()) == ids.tolist()


def test_names_of_special_tokens_in_text_are_text(tokenizer: Tokenizer):
    """Breaks when a document that mentions <s> would begin a new document."""
    ids = tokenizer.encode("<s></s><pad><unk>")
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(ids)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == "<s></s><pad><unk>"


def test_any_ids_decode(tokenizer: Tokenizer):
    """Breaks when a sampled id, or half a character, ends generation with an exception."""
    draw = random.Random(0)
    for _ in range(50):
        tokenizer.decode([draw.randrange(tokenizer.vocab_size + 50) for _ in range(20)])
    assert tokenizer.decode([tokenizer.vocab_size, -1]) == "\ufffd\ufffd"


def test_streaming_gives_whole_characters(ours: Tokenizer):
    """Breaks when a character of several byte pieces is shown in halves."""
    for string in STRINGS:
        parts = list(ours.stream(ours.encode(string)))
        assert "".join(parts) == string
    half = ours.encode("😀")[:-1]
    assert "".join(ours.stream(half)) == "\ufffd"


def test_whitespace_is_worth_its_own_pieces(ours: Tokenizer):
    """Breaks when newlines, tabs or indentation cost a token per character."""
    for run in ("    ", "\n", "\r\n", "\t\t", ":\n"):
        assert len(ours.encode(run)) == 1, run


def test_long_texts_are_cut_where_it_makes_no_difference(ours: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Breaks when ids depend on how a document was segmented for memory."""
    strings = [*STRINGS, *CORPUS]
    whole = [ours.encode(string) for string in strings]
    monkeypatch.setattr("data.tokenizer.SEGMENT_CHARS", 5)
    monkeypatch.setattr("data.tokenizer.GROUP_CHARS", 40)
    assert any(BOUNDARY.search(string) for string in strings)
    assert [ours.encode(string) for string in strings] == whole


def test_texts_without_a_place_to_cut_still_survive(ours: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Breaks when a minified file or unspaced script needs unbounded memory, or loses text at a cut."""
    monkeypatch.setattr("data.tokenizer.SEGMENT_CHARS", 10)
    monkeypatch.setattr("data.tokenizer.LONGEST_SEGMENT_CHARS", 20)
    string = "日本語\u2581x" * 100
    assert ours.decode(ours.encode(string)) == string


def test_the_scheme_is_that_of_a_hugging_face_fast_tokenizer(ours: Tokenizer, model: Path):
    """Breaks when the export to a fast tokenizer could no longer agree: raw byte pairs with byte fallback."""
    import sentencepiece
    import tokenizers
    from tokenizers import decoders, models

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    kinds = (pieces.is_control, pieces.is_unknown, pieces.is_byte)
    plain = {i for i in range(pieces.vocab_size()) if not any(kind(i) for kind in kinds)}
    names = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    vocabulary = {name.replace("\u2581", " ") if i in plain else name: i for i, name in enumerate(names)}
    known = {name: i for name, i in vocabulary.items() if i in plain}
    merges = []
    for name in sorted(known, key=known.__getitem__):
        pairs = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        merges += sorted((a, b) for a, b in pairs if a in known and b in known)
    fast = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for string in [*STRINGS, *CORPUS]:
        ids = fast.encode(string, add_special_tokens=False).ids
        assert ids == ours.encode(string)
        assert fast.decode(ids) == string


def test_training_is_repeatable(model: Path):
    """Breaks when two preparations of one corpus would give different tokens."""
    assert train_sentencepiece(CORPUS, 400) == model.read_bytes()


@pytest.mark.parametrize(
    ("texts", "vocab_size", "wants"),
    [
        (["hello world"], 8192, r"vocab_size: got 8192, but this text supports at most (\d+) pieces"),
        (["hello world"], 100, r"vocab_size: got 100, wants at least \d+"),
        ([], 300, "holds no text"),
        (["\u2581\0"], 300, "holds no text"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_line(texts: list[str], vocab_size: int, wants: str):
    """Breaks when SentencePiece's own message reaches the user."""
    with pytest.raises(ValueError, match=wants) as error:
        train_sentencepiece(texts, vocab_size)
    assert "\n" not in str(error.value)


def test_the_largest_possible_vocabulary_is_possible(tmp_path: Path):
    """Breaks when the advice in the error does not work."""
    with pytest.raises(ValueError, match=r"at most (\d+)") as error:
        train_sentencepiece(["hello world hello"], 8192)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    path = tmp_path / "m.model"
    path.write_bytes(train_sentencepiece(["hello world hello"], largest))
    assert load_tokenizer(path).vocab_size == largest


def test_text_that_sentencepiece_reserves_can_be_trained_on(tmp_path: Path):
    """Breaks when a character that SentencePiece keeps for itself empties or spoils the training text."""
    texts = ["".join(f"word{n % 7} \u2585\u2581\0 <s> <0x0A> <unk>\n" for n in range(50))]
    path = tmp_path / "m.model"
    path.write_bytes(train_sentencepiece(texts, 275))
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_what_is_not_text_is_refused(ours: Tokenizer):
    """Breaks when broken input is silently replaced."""
    for wrong in (b"\xff", "\ud800"):
        with pytest.raises(ValueError, match="not valid UTF-8"):
            ours.encode(wrong)


@pytest.mark.parametrize(
    ("name", "content", "wants"),
    [
        ("m.model", b"junk", r"m\.model: is no SentencePiece model"),
        ("m.json", b"{}", r"m\.json: is no tokenizer\.json"),
        ("m.json", b"\xff", r"m\.json: is no tokenizer\.json"),
        ("m.model", None, r"m\.model: cannot be read: No such file"),
    ],
)
def test_damaged_tokenizers_are_one_clear_line(name: str, content: bytes | None, wants: str, tmp_path: Path):
    """Breaks when a wrong file ends in a library's traceback."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=wants):
        load_tokenizer(tmp_path / name)


def test_a_foreign_model_keeps_its_own_rules(tmp_path: Path):
    """Breaks when a model with a dummy prefix would gain a space, or be cut where that changes its ids."""
    import io

    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([word for text in CORPUS for word in text.split("\n")]),
        model_writer=made,
        model_type="unigram",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        pad_id=-1,
        bos_id=-1,
        minloglevel=3,
    )
    path = tmp_path / "m.model"
    path.write_bytes(made.getvalue())
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("def value")) == "def value"
    assert tokenizer.bos == tokenizer.eos == tokenizer.pad
    long = " ".join(["value"] * 20_000)
    assert np.array_equal(tokenizer.encode_batch([long])[0], tokenizer._backend._model.encode(long))


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path):
    """Breaks when documents would run into each other."""
    import tokenizers
    from tokenizers import models

    tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "m.json"))
    with pytest.raises(ValueError, match="has no token that ends a text, wants one of </s>"):
        load_tokenizer(tmp_path / "m.json")
