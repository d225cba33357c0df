import pytest

from srlm_core import data
from srlm_core.errors import ConfigError, DataError


def test_malformed_lines_are_set_aside_with_their_number_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\nnot json\n{"promt": "x"}\n[1]\n\n{"prompt": "two"}\n')
    found = data.load(path, data.check_prompt)
    assert [row["prompt"] for row in found.rows] == ["one", "two"]
    assert [line.line for line in found.set_aside] == [2, 3, 4]
    assert "prompt" in found.set_aside[1].reason


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "empty file"), (b"x\ny\n", "2 lines, none usable"), (b'{"prompt": "caf\xe9"}', "UTF-8")],
)
def test_a_file_without_a_good_line_is_an_error_that_says_why(tmp_path, content, told):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        data.load(path, data.check_prompt)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        data.load(tmp_path / "nowhere.jsonl", data.check_prompt)


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\n\ntwo\n")
    assert [row["prompt"] for row in data.load(path, data.check_prompt).rows] == ["one", "two"]


def test_a_line_separator_inside_json_does_not_cut_the_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert len(data.load(path, data.check_prompt).rows) == 1


def test_spreading_takes_kinds_evenly_and_keeps_the_order():
    rows = [{"kind": kind, "n": n} for n, kind in enumerate("aaaabbc")]
    assert [row["n"] for row in data.spread(rows, 4)] == [0, 1, 4, 6]
    assert data.spread(rows, None) == rows


def test_kinds_are_taken_by_name_and_an_unknown_one_is_an_error_that_names_them():
    rows = [{"kind": kind} for kind in ("code", "poem", "code")]
    assert data.of_kinds(rows, ["code"], "seed_data.ift_kinds") == [{"kind": "code"}] * 2
    assert data.of_kinds(rows, [], "seed_data.ift_kinds") == rows
    with pytest.raises(ConfigError, match=r"seed_data.ift_kinds: expected kinds .*code, poem.*got 'poems'"):
        data.of_kinds(rows, ["poems"], "seed_data.ift_kinds")
