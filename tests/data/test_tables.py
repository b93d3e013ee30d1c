import csv
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletx.data import DataError, Example, load_table, read_rows, read_table, tables

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
LABELS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
EXAMPLES = st.lists(
    st.tuples(TEXTS, LABELS.map(str.strip).filter(bool)).map(Example._make), min_size=1, max_size=20
)
SUFFIXES = [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"]


def write(path, examples, names=("text", "label")):
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(names)
            writer.writerows(examples)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        columns = zip(*examples, strict=True)
        parquet.write_table(
            pyarrow.table({n: list(c) for n, c in zip(names, columns, strict=True)}), path
        )
    else:
        with path.open("w", encoding="utf-8") as file:
            for example in examples:
                file.write(json.dumps(dict(zip(names, example, strict=True))) + "\n")
    return path


def read(path, text="text", label="label"):
    return list(read_table(path, text=text, label=label))


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(examples=EXAMPLES)
def test_table_reads_back_what_was_written(suffix, examples, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / f"rows{suffix}"
    assert read(write(path, examples)) == examples


def test_table_reads_without_labels(tmp_path):
    path = write(tmp_path / "rows.csv", [("a film", "good")])
    assert list(read_table(path, text="text")) == [Example("a film", "")]


def test_table_reads_a_byte_order_mark_away(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\n\xc3\xa9t\xc3\xa9,x\r\n")
    assert read(path) == [Example("été", "x")]


def test_table_keeps_line_breaks_inside_quotes(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"one\ntwo, ""three""",x\n\nfour,y\n')
    assert read(path) == [Example('one\ntwo, "three"', "x"), Example("four", "y")]


def test_table_reads_a_missing_text_as_empty(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": null, "label": "x"}\n\n{"text": "", "label": "y"}\n')
    assert read(path) == [Example("", "x"), Example("", "y")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a", "a"), (" a ", "a"), (3, "3"), (-1, "-1"), (True, "true"), (False, "false"), (2.0, "2")],
)
def test_label_is_written_as_text(value, expected):
    assert next(read_rows([{"t": "x", "l": value}], text="t", label="l")).label == expected


@pytest.mark.parametrize("value", [None, "", "  ", float("nan"), 1.5, [1], {"a": 1}])
def test_label_is_refused_when_it_names_no_class(value):
    rows = read_rows([{"t": "x", "l": "a"}, {"t": "x", "l": value}], text="t", label="l")
    with pytest.raises(DataError, match=r"label must be given in every row of data, .* in row 2"):
        list(rows)


def test_parquet_labels_may_be_numbers_with_gaps(tmp_path):
    path = write(tmp_path / "rows.parquet", [("a", 1.0), ("b", None)])
    rows = read_table(path, text="text", label="label")
    assert next(rows) == Example("a", "1")
    with pytest.raises(DataError, match=r"got label=None in row 2, column 'label'"):
        next(rows)


def refused(tmp_path, content, match, name="rows.csv", **columns):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=match):
        read(path, **columns)


def test_missing_file_is_named_with_the_nearest(tmp_path):
    write(tmp_path / "reviews.csv", [("a", "b")])
    match = r"data must name a file that exists, got data=.*review\.csv\. Did you mean .*reviews"
    with pytest.raises(DataError, match=match):
        read_table(tmp_path / "review.csv", text="text")
    with pytest.raises(DataError, match=r"Check the path\."):
        read_table(tmp_path / "none" / "x.csv", text="text")


def test_folder_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"data must be a file, got data=the folder .*Name the file"
    ):
        read_table(tmp_path, text="text")


def test_unknown_suffix_is_refused_with_the_known_ones(tmp_path):
    match = (
        r"data must end in one of \.csv, \.tsv, \.jsonl, \.ndjson, \.parquet, got data=.*rows\.xlsx"
    )
    refused(tmp_path, "x", match, name="rows.xlsx")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_file_is_refused(suffix, tmp_path):
    refused(tmp_path, b"", r"data must hold at least one row, got .* with 0 bytes", f"rows{suffix}")


@pytest.mark.parametrize("content", ["text,label\n", "\n\n", "text,label\n\n\n"])
def test_file_without_rows_is_refused(content, tmp_path):
    refused(tmp_path, content, r"data must hold at least one row, got .* without any")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wrong_column_is_named_with_the_nearest(suffix, tmp_path):
    path = write(tmp_path / f"rows{suffix}", [("a", "b")], names=("Text", "stars"))
    match = rf"text must be a column of rows{suffix}, got text='text'\. The columns are 'Text', "
    with pytest.raises(DataError, match=match + r"'stars'\. Did you mean 'Text'\?"):
        read_table(path, text="text", label="stars")
    with pytest.raises(DataError, match=r"label must be a column of .*, got label='zzz'\. The c"):
        read_table(path, text="Text", label="zzz")


def test_one_column_for_both_is_refused(tmp_path):
    path = write(tmp_path / "rows.csv", [("a", "b")])
    with pytest.raises(
        DataError, match=r"label must be another column than text, got label='text'"
    ):
        read_table(path, text="text", label="text")


def test_column_that_occurs_twice_is_refused(tmp_path):
    match = r"text must name a single column of rows\.csv, got text=2 columns 'text'"
    refused(tmp_path, "text,label,text\na,b,c\n", match)


@given(before=st.lists(st.text("aé", max_size=9), max_size=9), byte=st.integers(0x80, 0xC1))
def test_bytes_that_are_not_utf8_are_named_by_their_place(before, byte, tmp_path_factory):
    head = "".join(f"{text},x\n" for text in before)
    head = f"text,label\n{head}".encode()
    path = tmp_path_factory.mktemp("bad") / "rows.csv"
    path.write_bytes(head + b"caf" + bytes([byte]) + b",x\n")
    offset, line = len(head) + 3, len(before) + 2
    match = rf"data must be UTF-8 text in .*, got data=byte 0x{byte:02x} at offset {offset} "
    with pytest.raises(DataError, match=match + rf"\(line {line}\)\. Save it as UTF-8.*iconv"):
        read(path)


def test_utf16_file_is_refused(tmp_path):
    refused(tmp_path, "text,label\na,b\n".encode("utf-16"), r"byte 0xff at offset 0 \(line 1\)")


@pytest.mark.parametrize("broken", ['{"text": "a", "lab', '{"text": "a"} x', "text", "{,}"])
def test_broken_json_line_is_named_by_its_number(broken, tmp_path):
    content = '{"text": "a", "label": "x"}\n\n' + broken + "\n"
    match = r"data must be JSON lines in .*, got data=.* in line 3\. Write one whole JSON object on"
    refused(tmp_path, content, match, "rows.jsonl")


@pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ('"a"', "str"), ("null", "NoneType")])
def test_json_line_that_is_no_object_is_refused(line, kind, tmp_path):
    match = rf"data must hold JSON objects in .*, got data={kind} in line 1\. Write each row as"
    refused(tmp_path, line + "\n", match, "rows.jsonl")


def test_deeply_nested_json_is_refused(tmp_path):
    refused(tmp_path, "[" * 100_000, r"data must be JSON lines in .* in line 1", "rows.jsonl")


def test_half_a_surrogate_pair_in_json_is_refused(tmp_path):
    content = '{"text": "\\ud800", "label": "x"}\n'
    refused(tmp_path, content, r"data must be JSON lines .*surrogates.* in line 1", "rows.jsonl")


def test_text_that_is_no_text_is_refused(tmp_path):
    match = r"text must be text in every row of rows\.jsonl, got text=int in row 2, column 'text'"
    content = '{"text": "a", "label": "x"}\n{"text": 5, "label": "x"}\n'
    refused(tmp_path, content, match, "rows.jsonl")
    match = r"label must be given in every row .* got label=nothing in row 2 \(line 3\), column"
    content = '{"text": "a", "label": "x"}\n\n{"text": "b"}\n'
    refused(tmp_path, content, match, "rows.jsonl")


@pytest.mark.parametrize("row", ["a", "a,b,c"])
def test_row_of_another_width_is_named(row, tmp_path):
    n = row.count(",") + 1
    match = rf"data must have 2 fields in every row of .*, got data={n} fields in row 2 \(line 5\)"
    refused(tmp_path, f'text,label\n"x\ny\n",a\n{row}\n', match)


@pytest.mark.parametrize("content", ['a,x\n"never closed,x\nb,y\n', 'a,x\n"b" c,x\n'])
def test_bad_quotes_are_named_by_the_row_that_begins_them(content, tmp_path):
    match = r"data must be well quoted in .*row 2, which begins in line 3\. Close every quote"
    refused(tmp_path, "text,label\n" + content, match)


def test_field_without_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_MAX_FIELD", 1)
    limit = csv.field_size_limit()
    content = 'text,label\na,x\n"' + "never closed,x\n" * limit
    refused(tmp_path, content[: 2 * limit], r"field larger than field limit .*begins in line 3")


def test_line_without_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_MAX_LINE", 100)
    match = r"data must have line ends in .*, got data=line 1 with more than 100 bytes\. Is it one"
    refused(tmp_path, "[" + '{"text": "a"},' * 20, match, "rows.jsonl")


def test_damaged_parquet_is_refused(tmp_path):
    path = write(tmp_path / "rows.parquet", [("a film", "x")] * 50)
    whole = path.read_bytes()
    for broken in (b"PAR1" + b"x" * 40, whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"data must be a whole Parquet file, got .*Write it"):
            read(path)


def test_table_of_long_texts_is_read_whole(tmp_path):
    examples = [Example("word " * 40_000, "x")]
    assert read(write(tmp_path / "rows.csv", examples)) == examples


def peak_of_reading(path):
    tracemalloc.start()
    try:
        n = sum(1 for _ in read_table(path, text="text", label="label"))
        return n, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def rows_of(n):
    return ((f"text number {i} of a table " * 4, f"class {i % 4}") for i in range(n))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_memory_of_reading_does_not_grow_with_the_file(suffix, tmp_path):
    small = write(tmp_path / f"small{suffix}", rows_of(2_000))
    large = write(tmp_path / f"large{suffix}", rows_of(100_000))
    peak_of_reading(small)  # what the first call loads is not the file's
    n_small, few = peak_of_reading(small)
    n_large, many = peak_of_reading(large)
    assert (n_small, n_large) == (2_000, 100_000)
    assert many <= 1.5 * few
    assert many < large.stat().st_size / 50


def test_memory_of_reading_does_not_grow_with_the_file_when_parquet(tmp_path):
    import pyarrow

    large = write(tmp_path / "large.parquet", rows_of(100_000))
    before = pyarrow.default_memory_pool()
    pool = pyarrow.system_memory_pool()
    pyarrow.set_memory_pool(pool)
    try:
        n, peak = peak_of_reading(large)
    finally:
        pyarrow.set_memory_pool(before)
    n_bytes = sum(len(text) for text, _ in rows_of(100_000))
    assert n == 100_000
    assert 0 < pool.max_memory() < n_bytes / 4
    assert peak < n_bytes / 10


@settings(max_examples=20)
@given(n=st.integers(10, 80), seed=st.integers(-5, 5))
def test_load_table_divides_a_file_into_disjoint_splits(n, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("split") / "rows.jsonl"
    examples = [Example(f"text {i}", f"class {i % 3}") for i in range(n)]
    write(path, [*examples, examples[0], Example("  ", "class 0"), Example("both", "class 0")])
    with path.open("a") as file:
        file.write('{"text": "both", "label": "class 1"}\n')
    splits = load_table(path, text="text", label="label", validation=2, test=0.2, seed=seed)
    sets = [set(part) for part in splits.parts().values()]
    assert set.union(*sets) == set(examples)
    assert [len(s) for s in sets] == [len(part) for part in splits.parts().values()]
    assert sum(map(len, sets)) == n
    assert len(splits.validation) == 2
    assert len(splits.test) == round(0.2 * n)
    assert splits.n_rows == n + 4
    assert splits.dropped == (1, 2, 1)
    assert splits.labels == ("class 0", "class 1", "class 2")
    assert splits.source == str(path)
    assert next(iter(splits.test)) in splits.test
    assert Example("both", "class 0") not in splits.train


def test_load_table_says_when_the_file_changed(tmp_path):
    path = write(tmp_path / "rows.csv", [(f"text {i}", f"c{i % 2}") for i in range(20)])
    splits = load_table(path, text="text", label="label")
    write(path, [(f"text {i}", f"c{i % 2}") for i in range(21)])
    with pytest.raises(DataError, match=r"data must hold 20 rows, .* got data=21 rows\. Do not"):
        list(splits.train)
