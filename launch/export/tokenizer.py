"""A run's tokenizer as a Hugging Face fast tokenizer that begins every text as training did.

SentencePiece byte pairs become the same byte pairs: pieces by their order of merging, byte fallback, no normalisation
but what the model itself asks for. Names of special tokens inside a text stay plain text (`split_special_tokens`).
"""

from pathlib import Path
from typing import Any

from data.tokenizer import SPACE, Tokenizer

PROBES = (
    "def f(x):\n\treturn x  # braids\n\n\nclass A:\n    pass\n",
    "The state-space model reads 1,024 tokens; it's 3.5x faster.",
    "  leading, trailing and   inner spaces  ",
    "naïve façade, Ærøskøbing, Ελληνικά, русский, हिन्दी, 中文字符, 日本語, 한국어, \U0001f9f6\U0001f600",
    "<s> and </s>, <pad> and <unk> are plain text here",
    "\u2581 is no space, \u00a0 is no space either, e\u0301 stays two, \x01 stays",
)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json; see `check_agreement`."""
    from transformers import PreTrainedTokenizerFast

    fast = _from_json(tokenizer.path) if tokenizer.path.suffix == ".json" else _from_sentencepiece(tokenizer.path)
    begin, end, pad = (fast.id_to_token(token) for token in (tokenizer.bos, tokenizer.eos, tokenizer.pad))
    fast.post_processor = _begin_with(begin, tokenizer.bos)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        padding_side="left",
    )
    wrapped.save_pretrained(folder)


def check_agreement(tokenizer: Tokenizer, ids: list[list[int]], spelled: list[str]) -> None:
    """Raises ValueError unless these are the ids that `tokenizer` gives for the probes, and their text."""
    refusal = f"tokenizer: {tokenizer.path} cannot be written as a fast tokenizer that agrees with it:"
    for text, theirs, back in zip(PROBES, ids, spelled, strict=True):
        ours = tokenizer.encode(text)
        if theirs != [tokenizer.bos, *ours]:
            raise ValueError(f"{refusal} {text!r} gives {theirs[:12]}..., wants {[tokenizer.bos, *ours][:12]}...")
        if back != tokenizer.decode(ours):
            raise ValueError(f"{refusal} {text!r} comes back as {back!r}")


def _begin_with(name: str, token: int) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{name}:0 $A:0", pair=f"{name}:0 $A:0 {name}:1 $B:1", special_tokens=[(name, token)]
    )


def _from_json(path: Path) -> Any:
    import tokenizers

    fast = tokenizers.Tokenizer.from_file(str(path))
    fast.no_truncation()
    fast.no_padding()
    return fast


def _from_sentencepiece(path: Path) -> Any:
    """Byte-pair and unigram models, with the normalisation that they declare."""
    import tokenizers
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from tokenizers import AddedToken, decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    pieces = SentencePieceProcessor(model_file=str(path))
    size = pieces.vocab_size()
    special = [i for i in range(size) if pieces.is_control(i) or pieces.is_unknown(i)]
    apart = {*special, *(i for i in range(size) if pieces.is_byte(i))}
    rules = proto.normalizer_spec
    keeps_text = not (rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces)
    # Where nothing is normalised, pieces hold real spaces, so that U+2581 in a text is itself.
    space = " " if keeps_text else SPACE
    names = [pieces.id_to_piece(i) for i in range(size)]
    names = [name if i in apart else name.replace(SPACE, space) for i, name in enumerate(names)]
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        plain = {name: i for i, name in enumerate(names) if i not in apart}
        model: Any = models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=_merges(plain, {name: pieces.get_score(i) for name, i in plain.items()}),
            byte_fallback=proto.trainer_spec.byte_fallback,
            unk_token=names[pieces.unk_id()],
            fuse_unk=True,
        )
    else:
        # Names of bytes and special tokens in a text must lose against any other spelling.
        scores = [(name, -1e6 if i in apart else pieces.get_score(i)) for i, name in enumerate(names)]
        model = models.Unigram(scores, unk_id=pieces.unk_id(), byte_fallback=proto.trainer_spec.byte_fallback)
    fast = tokenizers.Tokenizer(model)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if not keeps_text:
        steps += [normalizers.Prepend(SPACE)] if rules.add_dummy_prefix else []
        steps.append(normalizers.Replace(" ", SPACE))
        fast.normalizer = normalizers.Sequence(steps)
    spelled: list[Any] = [] if keeps_text else [decoders.Replace(SPACE, " ")]
    spelled += [decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        spelled.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(spelled)
    fast.add_special_tokens([AddedToken(names[i], normalized=False, special=True) for i in special])
    return fast


def _merges(plain: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the first to be merged first."""
    merges = []
    for name in sorted(plain, key=lambda name: (-scores[name], plain[name])):
        pairs = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        merges += sorted((a, b) for a, b in pairs if a in plain and b in plain)
    return merges
