"""Raw text to token shards: `prepare(config)`. Can be killed anywhere and goes on where it was.

Documents are read in order and written in numbered parts. A part is a pair of token files per split and, last, a small
record under `parts/`; each gets its name by a rename. A rerun reads the records, goes on behind the last of them and
arrives at the same bytes as a run without interruption. `manifest.json` is written when all is there.

Each document is stored as begin + tokens + end. The first token of the text is then predicted too (from `begin`), and
so is where the text ends.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.compress import compressed_sizes
from data.files import DataError, exclusive, read_json, sha256_of, write_durably, write_json
from data.indexed import token_dtype
from data.mixture import Mixture, WeightedShards
from data.parts import NOTHING, PARTS, Part, PartWriter, read_parts, texts, total
from data.sampling import training_sample
from data.shards import MANIFEST, SPLITS, Manifest, ShardSet, TokenizerRecord
from data.sources import PythonStdlib, Source
from data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

SETTINGS = "settings.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")

Log = Callable[[str], None]


def _require(ok: bool, key: str, got: object, wants: str) -> None:
    if not ok:
        raise ValueError(f"{key}: got {got!r}, wants {wants}")


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: trained on the source, or a given one.

    vocab_size: pieces of the SentencePiece model that is trained (ignored with `model`). model: path of a SentencePiece
    model or a Hugging Face tokenizer.json to use instead. train_bytes: how much text it is trained on, at most.
    """

    vocab_size: int = 8192
    model: str | None = None
    train_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        _require(self.vocab_size > 0, "vocab_size", self.vocab_size, "a positive number of pieces")
        _require(self.train_bytes > 0, "train_bytes", self.train_bytes, "a positive number of bytes")


@dataclass(frozen=True)
class DataConfig:
    """What is read and where it is put.

    source: the text. path: folder of the prepared data. validation_fraction: share of documents that are held out,
    chosen by the hash of their text. shard_bytes: text in one part, which is what an interruption costs at most.
    workers: threads that encode, none for one per CPU.
    """

    source: Source = field(default_factory=PythonStdlib)
    path: str = "prepared/python-stdlib"
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation_fraction: float = 0.01
    shard_bytes: int = 256 << 20
    workers: int | None = None

    def __post_init__(self) -> None:
        inside = 0 < self.validation_fraction < 1
        _require(inside, "validation_fraction", self.validation_fraction, "a number between 0 and 1")
        _require(self.shard_bytes > 0, "shard_bytes", self.shard_bytes, "a positive number of bytes")
        _require(self.workers is None or self.workers > 0, "workers", self.workers, "a positive number, or none")


@dataclass(frozen=True)
class PreparedData:
    """A finished folder. tokenizer: path of its tokenizer."""

    folder: Path
    train: ShardSet
    validation: ShardSet

    @property
    def manifest(self) -> Manifest:
        return self.train.manifest

    @property
    def tokenizer(self) -> Path:
        return self.train.tokenizer_path

    @property
    def tokenizer_sha256(self) -> str:
        return self.manifest.tokenizer.sha256

    def verify(self, rank: int = 0, size: int = 1) -> None:
        """Reads and hashes every file, or this rank's share of them. Raises DataError naming a damaged one."""
        self.train.verify(rank, size)
        self.validation.verify(rank, size)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError unless a model with `vocab_size` tokens can read the data."""
        if vocab_size < self.train.vocab_size:
            raise DataError(
                f"model.vocab_size: got {vocab_size}, wants at least the {self.train.vocab_size} of {self.tokenizer}"
            )

    def mixture(self, sequence_length: int, seed: int) -> Mixture:
        return Mixture([WeightedShards(self.train, 1.0)], sequence_length=sequence_length, seed=seed)


def prepare(config: DataConfig, out: Path | None = None, log: Log = print) -> PreparedData:
    """Prepares `config.source` in the folder `out` (default `config.path`); a finished folder is recognised.

    Raises DataError (a ValueError) for a source that cannot be read, a vocabulary that the text does not support, a
    folder prepared with other settings or from a source that has changed, and an empty split.
    """
    folder = Path(config.path) if out is None else out
    if not (folder / MANIFEST).is_file():
        config.source.listing()  # a source that is not there is said before anything is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder):
            if (folder / MANIFEST).is_file():
                return _recognise(config, folder, log)
            _begin(config, folder)
            tokenizer = _tokenizer(config, folder, log)
            parts = _write_parts(config, folder, tokenizer, log)
            prepared = _finish(config, folder, tokenizer, parts)
    except OSError as error:
        raise DataError(f"data.path: {folder} cannot be written: {error.strerror or error}") from None
    report(prepared, log)
    return prepared


def open_prepared(config: DataConfig, verify: bool = True) -> PreparedData:
    """Opens what `prepare` made, for training. verify: read and hash every file first.

    Raises DataError when it is not there, was made with other settings, or is damaged.
    """
    folder = Path(config.path)
    if not (folder / MANIFEST).is_file():
        raise DataError(f"data.path: {folder} holds no prepared data, wants a folder that `braid prepare` has finished")
    _check_finished(config, folder)
    prepared = PreparedData(folder, *(ShardSet(folder, split) for split in SPLITS))
    if verify:
        prepared.verify()
    return prepared


def report(prepared: PreparedData, log: Log) -> None:
    """Says what the folder holds: counts, hashes, and how well general compressors do on the held-out text."""
    manifest = prepared.manifest
    documents = sum(split.documents for split in manifest.splits.values())
    text_bytes = sum(split.text_bytes for split in manifest.splits.values())
    tokens = sum(split.tokens for split in manifest.splits.values())
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(manifest.skipped.items())) or "none"
    log(f"corpus {manifest.corpus_sha256[:16]}: {documents:,} documents, {text_bytes:,} bytes; skipped: {skipped}")
    log(f"tokens {tokens:,} ({text_bytes / max(1, tokens - 2 * documents):.2f} bytes per token, begin and end aside)")
    for name, split in manifest.splits.items():
        log(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.text_bytes:,} bytes")
    if manifest.inexact:
        log(f"the tokenizer does not give back {manifest.inexact:,} of the held-out documents byte for byte")
    found = manifest.compression
    log(
        f"held-out text by zlib -9: {found.zlib_bytes:,} bytes ({found.zlib_bits_per_byte:.3f} bits per byte), "
        f"by xz -9: {found.xz_bytes:,} ({found.xz_bits_per_byte:.3f})"
    )
    log(f"{prepared.folder}: ready, fingerprint {manifest.fingerprint[:16]}")


def _settings(config: DataConfig, tokenizer: dict[str, Any] | None = None) -> dict[str, Any]:
    """All that decides the prepared data, as plain values: a given tokenizer by its hash, or as in `tokenizer`."""
    if tokenizer is None and config.tokenizer.model is not None:
        tokenizer = {"model_sha256": sha256_of(Path(config.tokenizer.model))}
    elif tokenizer is None:
        tokenizer = asdict(config.tokenizer)
    source = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config.source).items()}
    return {
        "source": source,
        "tokenizer": tokenizer,
        "validation_fraction": config.validation_fraction,
        "shard_bytes": config.shard_bytes,
    }


def _check_settings(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    old, new = _flat(before), _flat(now)
    for key in sorted(old.keys() | new.keys()):
        if key != "listing" and old.get(key) != new.get(key):
            raise DataError(
                f"data.{key}: got {new.get(key)!r}, but {folder} was prepared with {old.get(key)!r}; "
                "wants the same, another data.path, or the folder removed"
            )


def _check_finished(config: DataConfig, folder: Path) -> dict[str, Any]:
    """The settings of a finished folder, which are those of `config`."""
    settings = Manifest.read(folder).settings
    model = config.tokenizer.model
    gone = model is not None and not Path(model).exists()  # the folder has its own copy
    _check_settings(settings, _settings(config, settings["tokenizer"] if gone else None), folder)
    return settings


def _check_listing(before: dict[str, Any], listing: str, folder: Path) -> None:
    if before["listing"] != listing:
        raise DataError(
            f"data.source: its files are not those that {folder} was prepared from; "
            "wants the same, another data.path, or the folder removed"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _recognise(config: DataConfig, folder: Path, log: Log) -> PreparedData:
    settings = _check_finished(config, folder)
    try:
        listing = config.source.listing()
    except DataError:
        log(f"{folder}: the source is no longer there; using what was prepared from it")
    else:
        _check_listing(settings, listing, folder)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    prepared = PreparedData(folder, *(ShardSet(folder, split) for split in SPLITS))
    log(f"{folder}: already prepared, fingerprint {prepared.manifest.fingerprint[:16]}")
    return prepared


def _begin(config: DataConfig, folder: Path) -> None:
    """Notes the settings of the work that begins, or checks that they are those of the work that goes on."""
    path = folder / PARTS / SETTINGS
    listing = config.source.listing()
    begun = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if path.is_file() and begun:
        before = read_json(path)
        _check_settings(before, _settings(config), folder)
        _check_listing(before, listing, folder)
        return
    path.parent.mkdir(exist_ok=True)
    write_json(path, {**_settings(config), "listing": listing})


def _tokenizer(config: DataConfig, folder: Path, log: Log) -> Tokenizer:
    """The tokenizer in the folder: copied, trained, or there from an earlier attempt."""
    given = config.tokenizer.model
    path = folder / ("tokenizer.json" if given is not None and given.endswith(".json") else "tokenizer.model")
    if not path.is_file():
        if given is not None:
            load_tokenizer(Path(given))
            write_durably(path, Path(given).read_bytes())
        else:
            texts = training_sample(config.source.records(), config.tokenizer.train_bytes, config.validation_fraction)
            if not texts:
                raise DataError(f"data.source: holds no text to train a tokenizer on ({_kind(config.source)})")
            log(
                f"training a tokenizer of {config.tokenizer.vocab_size:,} pieces on {sum(map(len, texts)):,} characters"
            )
            write_durably(path, train_sentencepiece(texts, config.tokenizer.vocab_size))
    return load_tokenizer(path)


def _kind(source: Source) -> str:
    return " ".join(str(value) for value in (source.kind, getattr(source, "path", "")) if value)


def _write_parts(config: DataConfig, folder: Path, tokenizer: Tokenizer, log: Log) -> list[Part]:
    """Writes the parts that are missing; returns all."""
    from tqdm import tqdm

    parts = read_parts(folder)
    if parts:
        log(f"{folder}: going on after part {len(parts)}, record {parts[-1].next_record:,}")
    records = config.source.records(parts[-1].next_record if parts else 0)
    done = sum(sum(part.text_bytes.values()) for part in parts)
    size = config.source.size_bytes()
    with tqdm(total=size, initial=done, unit="B", unit_scale=True, desc="tokens", disable=None) as bar:
        workers = config.workers or os.cpu_count() or 1
        writer = PartWriter(folder, tokenizer, config.validation_fraction, config.shard_bytes, workers, bar.update)
        while part := writer.write(len(parts), parts[-1] if parts else NOTHING, records):
            parts.append(part)
    return parts


def _finish(config: DataConfig, folder: Path, tokenizer: Tokenizer, parts: list[Part]) -> PreparedData:
    """Writes the manifest: from here on the folder is prepared data."""
    splits = {split: total(split, parts) for split in SPLITS}
    skipped: dict[str, int] = {}
    for part in parts:
        for reason, count in part.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    documents = sum(split.documents for split in splits.values())
    if not all(split.documents for split in splits.values()):
        _discard(folder, parts)
    if not documents:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        raise DataError(
            f"data.source: {_kind(config.source)} holds no document" + (f" (skipped: {why})" if why else "")
        )
    for name, split in splits.items():
        if not split.documents:
            fraction = config.validation_fraction
            raise DataError(
                f"data.validation_fraction: {fraction} of {documents} documents leaves none for {name}; "
                f"wants a {'larger' if name == 'validation' else 'smaller'} fraction, or more documents"
            )
    manifest = Manifest(
        dtype=str(token_dtype(tokenizer.vocab_size)),
        tokenizer=TokenizerRecord(
            tokenizer.path.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.pad
        ),
        splits=splits,
        corpus_sha256=parts[-1].corpus,
        skipped=skipped,
        inexact=sum(part.inexact for part in parts),
        compression=compressed_sizes(texts(folder, splits["validation"], tokenizer)),
        settings=read_json(folder / PARTS / SETTINGS),
    )
    manifest.write(folder)
    shutil.rmtree(folder / PARTS)
    return PreparedData(folder, *(ShardSet(folder, split) for split in SPLITS))


def _discard(folder: Path, parts: list[Part]) -> None:
    """Removes work that cannot become prepared data, so that other settings may be tried in the same folder."""
    names = [f"{file.name}.{suffix}" for part in parts for file in part.files.values() for suffix in ("bin", "idx")]
    for name in (*names, *TOKENIZER_FILES):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS)
