import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srlm_core import sources
from srlm_core.errors import DataError
from srlm_core.sources.files import Broken, objects

ROWS = [{"instruction": "Say hi, to all", "output": "Hi"}, {"instruction": "Zwölf?", "output": "a\nb"}]


def write(path, rows):
    """Write rows in the format that the file's name says."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    match path.name.split(".", 1)[1]:
        case "jsonl":
            path.write_text(lines, encoding="utf-8-sig")
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(rows))
        case "wrapped.json":
            path.write_text(json.dumps({"version": "1", "data": rows}))
        case "lines.json":
            path.write_text(lines, encoding="utf-8")
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case "csv":
            quoted = "".join(f'"{row["instruction"]}","{row["output"]}"\r\n' for row in rows)
            path.write_text(f"instruction,output\r\n{quoted}", encoding="utf-8-sig", newline="")
        case "tsv.gz":
            quoted = "".join(f'{row["instruction"]}\t"{row["output"]}"\n' for row in rows)
            path.write_bytes(gzip.compress(f"instruction\toutput\n{quoted}".encode()))
    return path


@pytest.mark.parametrize(
    "name", ["jsonl", "jsonl.gz", "json", "wrapped.json", "lines.json", "parquet", "csv", "tsv.gz"]
)
def test_every_format_holds_the_same_rows(tmp_path, name):
    path = write(tmp_path / f"a.{name}", ROWS)
    assert [row for _, row in objects(str(path))] == ROWS
    assert [row["response"] for row in sources.read(str(path)).examples] == ["Hi", "a\nb"]


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\n\ntwo\r\n")
    assert list(objects(str(path))) == [(1, {"prompt": "one"}), (3, {"prompt": "two"})]


def test_a_line_separator_inside_json_does_not_cut_the_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert list(objects(str(path))) == [(1, {"prompt": "a\u2028b"})]


def test_a_line_in_another_encoding_is_set_aside_alone(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}\n{"prompt": "tea"}\n')
    (first, broken), (second, row) = objects(str(path))
    assert (first, second, row) == (1, 2, {"prompt": "tea"})
    assert isinstance(broken, Broken)
    assert "byte 0xe9" in broken.reason


def test_a_row_with_too_many_or_too_few_fields_is_set_aside(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt,n\na,1\nb\nc,1,2\n")
    rows = [row for _, row in objects(str(path))]
    assert rows[0] == {"prompt": "a", "n": "1"}
    assert [isinstance(row, Broken) for row in rows] == [False, True, True]


@pytest.mark.parametrize("name", ["half.jsonl.gz", "not.jsonl.gz", "not.parquet"])
def test_a_damaged_file_is_an_error_that_says_so(tmp_path, name):
    whole = gzip.compress(b'{"prompt": "x"}\n' * 1000)
    (tmp_path / name).write_bytes(whole[:40] if name.startswith("half") else b"nothing of the kind")
    with pytest.raises(DataError, match="expected a whole, readable file"):
        list(objects(str(tmp_path / name)))


def test_a_dataset_is_read_from_a_folder_in_the_hubs_layout(tmp_path):
    (tmp_path / "data").mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert [row for _, row in objects(str(tmp_path))] == ROWS
    assert [row for _, row in objects(f"{tmp_path}:test")] == ROWS[:1]
    with pytest.raises(DataError, match="a split 'other'"):
        list(objects(f"{tmp_path}:other"))


def test_what_is_neither_a_file_nor_a_dataset_is_named(tmp_path):
    with pytest.raises(DataError, match=r"got none. Check the path"):
        list(objects(str(tmp_path / "no.jsonl")))
