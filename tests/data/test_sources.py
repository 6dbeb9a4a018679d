"""Every source yields the same records in the same order, counts what it cannot use, and says what is wrong."""

import gzip
import json
import sysconfig
from pathlib import Path

import pytest

from data.sources import Document, HFDataset, JsonLines, PythonStdlib, Skipped, Source, TextFolder

ROWS = ["first\n", "second \u2581 \x00", "", "third"]


def texts(source: Source, start: int = 0) -> list[str]:
    return [record.text.decode() for record in source.records(start) if isinstance(record, Document)]


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(params=["text", "jsonl", "gzip", "parquet", "saved"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """ROWS in every format."""
    rows = [{"text": row} for row in ROWS]
    if request.param == "text":
        for number, row in enumerate(ROWS):
            (tmp_path / f"{number}.txt").write_text(row, encoding="utf-8", newline="")
        return TextFolder(str(tmp_path))
    if request.param == "jsonl":
        return JsonLines(str(jsonl(tmp_path / "a.jsonl", rows)))
    if request.param == "gzip":
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(tmp_path / "plain", rows).read_bytes()))
        return JsonLines(str(tmp_path))
    import datasets

    table = datasets.Dataset.from_list(rows)
    if request.param == "saved":
        table.save_to_disk(str(tmp_path / "saved"))
        return HFDataset(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    return HFDataset("parquet", data_files=(str(tmp_path / "*.parquet"),))


def test_all_formats_hold_the_same_text_and_can_be_entered_anywhere(source: Source):
    """Breaks when a resumed preparation would repeat or lose a record of some format."""
    everything = list(source.records())
    assert texts(source) == ["first\n", "second \u2581 \x00", "third"]
    assert [record.reason for record in everything if isinstance(record, Skipped)] == ["empty"]
    for start in range(len(ROWS) + 1):
        assert list(source.records(start)) == everything[start:]
    assert source.listing() == source.listing()


def test_line_ends_and_leading_marks_are_kept(tmp_path: Path):
    """Breaks when files are read in text mode, which would rewrite line ends."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert next(TextFolder(str(tmp_path)).records()) == Document("a.txt", b"\xef\xbb\xbfa\r\nb\rc\n")


def test_bytes_that_are_no_text_are_counted_not_hidden(tmp_path: Path):
    """Breaks when broken UTF-8 stops a preparation or slips into it."""
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    assert list(TextFolder(str(tmp_path)).records()) == [Skipped("a.txt", "not valid UTF-8")]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n\n{"text": "\\ud800"}\n{"text": null}\n')
    reasons = [record.reason for record in JsonLines(str(tmp_path)).records() if isinstance(record, Skipped)]
    assert reasons == ["not valid UTF-8", "not valid UTF-8", "empty"]


def test_files_come_in_one_order_with_every_pattern_once(tmp_path: Path):
    """Breaks when the corpus hash depends on the file system or a file that matches twice is read twice."""
    for name in ("b/x.txt", "a/y.txt", "a/z.md", "c.rst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = TextFolder(str(tmp_path), ("**/*.txt", "a/*", "**/*.md")).records()
    assert [record.id for record in found] == ["a/y.txt", "a/z.md", "b/x.txt"]


def test_a_changed_file_changes_the_listing(tmp_path: Path):
    """Breaks when a finished folder would be taken for up to date although its source has grown."""
    (tmp_path / "a.txt").write_text("one")
    before = TextFolder(str(tmp_path)).listing()
    (tmp_path / "a.txt").write_text("longer")
    assert TextFolder(str(tmp_path)).listing() != before


def test_the_standard_library_is_read_without_packages():
    """Breaks when installed packages leak into the quickstart's corpus."""
    records = PythonStdlib().records()
    first = next(records)
    root = Path(sysconfig.get_paths()["stdlib"])
    _, names = PythonStdlib()._files()
    assert names == sorted(names)
    assert "json/__init__.py" in names
    assert not any("site-packages" in name for name in names)
    assert isinstance(first, Document)
    assert first.text == (root / first.id).read_bytes()
    assert PythonStdlib().size_bytes() == sum((root / name).stat().st_size for name in names)


@pytest.mark.parametrize(
    ("make", "wants"),
    [
        (lambda folder: TextFolder(str(folder / "none")), "none', wants an existing folder"),
        (lambda folder: TextFolder(str(folder)), r"holds no file that matches \*\*/\*.txt"),
        (lambda folder: JsonLines(str(folder / "none.jsonl")), "wants an existing folder"),
        (lambda folder: HFDataset("owner/name"), "wants an existing local folder or one of parquet"),
        (lambda folder: HFDataset("parquet", data_files=("none*.parquet",)), "no file matches 'none"),
    ],
)
def test_missing_sources_are_one_clear_line(make, wants: str, tmp_path: Path):
    """Breaks when a missing folder gives an empty corpus, or a request to the network."""
    for use in (lambda source: source.listing(), lambda source: list(source.records())):
        with pytest.raises(ValueError, match=wants) as error:
            use(make(tmp_path))
        assert "\n" not in str(error.value)


def test_a_broken_link_is_an_error(tmp_path: Path):
    """Breaks when an unreadable file silently drops out of the corpus."""
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: No such file"):
        list(TextFolder(str(tmp_path)).records())


@pytest.mark.parametrize(
    ("rows", "wants"),
    [
        ([{"text": "a"}, {"body": "b"}], r"a\.jsonl:2 has no 'text', wants one of body"),
        ([{"text": 3}], r"'text' of a\.jsonl:1 is a number, wants a string"),
        (["text"], r"a\.jsonl:1 is a string, wants a JSON object"),
    ],
)
def test_wrong_rows_name_file_and_line(rows: list[object], wants: str, tmp_path: Path):
    """Breaks when a mistake in a field's name would prepare nothing, or some of the rows."""
    with pytest.raises(ValueError, match=wants):
        list(JsonLines(str(jsonl(tmp_path / "a.jsonl", rows))).records())


def test_damaged_files_are_one_clear_line(tmp_path: Path):
    """Breaks when a truncated file ends the corpus early, or in a traceback of a library."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"')
    with pytest.raises(ValueError, match=r"a\.jsonl:1 is not valid JSON"):
        list(JsonLines(str(tmp_path)).records())
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-20])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz cannot be read"):
        list(JsonLines(str(tmp_path)).records())
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="data.source: parquet"):
        list(HFDataset("parquet", data_files=(str(tmp_path / "c.parquet"),)).records())


def test_wrong_columns_and_splits_name_the_right_ones(tmp_path: Path):
    """Breaks when a wrong column or split gives an empty corpus."""
    import datasets

    table = datasets.Dataset.from_list([{"body": "a"}])
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match="data.source.field: got 'text', wants one of the columns body"):
        list(HFDataset(str(tmp_path)).records())
    with pytest.raises(ValueError, match="split 'test' is not among train"):
        list(HFDataset(str(tmp_path), split="test", field="body").records())


def test_a_document_too_large_for_memory_is_refused(tmp_path: Path):
    """Breaks when a huge file given as text ends in MemoryError instead of advice."""
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ValueError, match="wants documents of at most 1024 MiB"):
        list(TextFolder(str(tmp_path)).records())
