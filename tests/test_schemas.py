import pytest
from made_up import pair
from tables import judgments, prompts

from srlm_core import schemas, training


def test_conforming_twice_changes_nothing():
    once = schemas.conform(prompts("a?"), schemas.PROMPTS)
    assert schemas.conform(once, schemas.PROMPTS).equals(once)


def test_a_misspelt_column_is_an_error_not_a_null():
    with pytest.raises(ValueError, match="detial"):
        schemas.table([{"id": "x", "stage": "s", "reason": "r", "iteration": 1, "detial": None}], schemas.DROPS)


def test_a_missing_value_is_an_error_where_none_may_be():
    with pytest.raises(ValueError, match="reason"):
        schemas.table([{"id": "x", "stage": "s", "reason": None, "iteration": 1, "detail": None}], schemas.DROPS)


def test_a_sentinel_is_no_verdict():
    with pytest.raises(ValueError, match="verdict"):
        judgments([("a", 0, -1.0)])


def test_a_verdict_comes_with_no_reason_and_no_verdict_with_one():
    rows = judgments([("a", 0, None)]).to_pylist()
    rows[0]["unreadable_reason"] = None
    with pytest.raises(ValueError, match="reason why"):
        schemas.table(rows, schemas.JUDGMENTS)


def test_a_key_that_occurs_twice_is_an_error():
    rows = prompts("a?").to_pylist()
    with pytest.raises(ValueError, match="prompt_id"):
        schemas.table(rows * 2, schemas.PROMPTS)


def test_a_pair_of_a_response_with_itself_is_an_error():
    row = dict.fromkeys(schemas.PAIRS.names, "x") | {
        "iteration": 1,
        "messages": [],
        "chosen_score": 1.0,
        "rejected_score": 0.0,
        "label": 1.0,
        "weight": 1.0,
    }
    with pytest.raises(ValueError, match="itself"):
        schemas.table([row], schemas.PAIRS)


def test_what_a_pair_is_worth_goes_along_to_training():
    sure, unsure = ({**pair({}), "pair_id": name, "label": label, "weight": 0.5, "rejected_score": score}
                    for name, label, score in (("a", 1.0, 2.0), ("b", None, None)))  # fmt: skip
    rows = training.preferences(schemas.table([sure, unsure], schemas.PAIRS)).to_pylist()
    worth = ("label", "weight", "chosen_score", "rejected_score")
    assert [[row[name] for name in worth] for row in rows] == [[1.0, 0.5, 13 / 3, 2.0], [None, 0.5, 13 / 3, None]]


def test_null_verdicts_survive_a_file(tmp_path):
    from srlm_core import store

    rows = judgments([("a", 0, None), ("a", 1, 4.0)])
    store.write_part(tmp_path / "j.parquet", rows, "f")
    assert store.read_part(tmp_path / "j.parquet")["verdict"].to_pylist() == [None, 4.0]


@pytest.mark.parametrize("name", list(schemas.SCHEMAS))
def test_every_dataset_loads_with_the_datasets_library(name, scripted, tmp_path):
    import datasets

    folder = scripted()
    files = [str(path) for path in sorted((folder / "iter_01" / name).glob("*.parquet"))]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded.column_names == schemas.SCHEMAS[name].names
