import pytest

from srlm_core import data
from srlm_core.errors import ConfigError, DataError


def test_malformed_rows_are_set_aside_with_their_number_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\nnot json\n{"promt": "x"}\n[1]\n\n{"prompt": "two"}\n')
    found = data.load(path, "prompts")
    assert [row["prompt"] for row in found.rows] == ["one", "two"]
    assert [aside.line for aside in found.set_aside] == [2, 3, 4]
    assert "got promt" in found.set_aside[1].reason


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "expected prompts in .*, got an empty file"),
        (b"x\ny\n", r"2 row\(s\) of no known form; first: not JSON"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 0xe9"),
    ],
)
def test_a_file_without_a_good_row_is_an_error_that_says_why(tmp_path, content, told):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        data.load(path, "prompts")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        data.load(tmp_path / "nowhere.jsonl", "prompts")


def test_rankings_without_written_judgments_cannot_teach_judging_as_they_are(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "p", "responses": [{"text": "a", "rank": 0}, {"text": "b", "rank": 1}]}\n')
    assert len(data.load(path, "groups").rows) == 1
    with pytest.raises(DataError, match=r"1 row\(s\) of ranked groups.*expected a 'score' from 0 to 5"):
        data.load(path, "groups", check=data.check_judged)


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
