"""Pairs of earlier iterations among those that a model is trained on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_core import recipes, store, training
from srlm_core.errors import ConfigError, StoreError
from srlm_core.loop import _replayed

SETS = ("iterations=3", "evaluation.models=none")


def ids(folder, t):
    return [row["pair_id"] for row in store.iter_rows(folder / f"iter_{t:02d}" / "pairs")]


def trained(folder, t):
    return [row["id"] for row in store.read_part(folder / f"iter_{t:02d}" / "training" / "rows.parquet").to_pylist()]


def test_at_most_300_of_1000_and_150_of_those_before():
    old = [f"pair {number}" for number in range(1000)]
    assert [len(training.draw(old, share, 1, 2)) for share in (0.3, 0.15, 0.075)] == [300, 150, 75]
    assert training.draw(old, 0.3, 1, 2) == training.draw(old[::-1], 0.3, 1, 2)
    assert training.draw(old, 0.3, 1, 2) != training.draw(old, 0.3, 1, 3)
    assert training.draw(old, 0.3, 1, 2) != training.draw(old, 0.3, 2, 2)


@given(st.sets(st.text(max_size=4), max_size=30), st.floats(0, 1))
def test_the_cap_holds_and_nothing_is_lost_to_rounding(old, share):
    drawn = training.draw(old, share, 0)
    assert drawn <= old
    assert len(drawn) <= share * len(old) + 1e-6
    assert len(drawn) > share * len(old) - 1


def test_a_campaign_replays_half_as_much_of_what_is_older(scripted):
    folder = scripted(*SETS, "training.dpo.replay=0.5", name="replay")
    one, two, three = (ids(folder, t) for t in (1, 2, 3))
    assert trained(folder, 1) == one
    assert trained(folder, 2)[-len(two) :] == two
    assert trained(folder, 3)[-len(three) :] == three
    assert len(set(trained(folder, 2)) & set(one)) == len(one) // 2
    assert len(set(trained(folder, 3)) & set(two)) == len(two) // 2
    assert len(set(trained(folder, 3)) & set(one)) == len(one) // 4
    assert len(trained(folder, 3)) == len(set(trained(folder, 3)))
    assert store.read_json(folder / "models" / "M4" / "complete.json")["rows"] == len(trained(folder, 3))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    scripted(*SETS, "training.dpo.replay=0.5", name="replay")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def test_the_same_seed_replays_the_same_and_another_share_trains_anew(scripted):
    folder = scripted(*SETS, "iterations=2", "training.dpo.replay=0.5", name="a")
    again = scripted(*SETS, "iterations=2", "training.dpo.replay=0.5", name="b")
    assert trained(folder, 2) == trained(again, 2)
    marker = store.read_json(folder / "models" / "M3" / "complete.json")
    scripted(*SETS, "iterations=2", "training.dpo.replay=0.25", name="a")
    assert store.read_json(folder / "models" / "M3" / "complete.json")["fingerprint"] != marker["fingerprint"]


class Folder:
    """As much of a run as a replay looks at."""

    def __init__(self, folder):
        self.campaign, self.config = store.Campaign(folder.parent, folder.name), recipes.load("smoke")


def test_a_part_that_is_damaged_or_gone_is_an_error_and_what_there_never_was_is_none(scripted):
    folder = scripted("iterations=1", "evaluation.models=none")
    assert _replayed(Folder(folder), 1, 0.3) == []
    (drawn,) = {part.only for part in _replayed(Folder(folder), 2, 1.0)}
    assert drawn == set(ids(folder, 1))
    path = folder / "iter_01" / "pairs" / "part-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"part-00001\.parquet, but it is damaged.*training\.dpo\.replay=0"):
        _replayed(Folder(folder), 2, 0.3)
    path.unlink()
    with pytest.raises(StoreError, match=r"part-00001\.parquet, but none is there"):
        _replayed(Folder(folder), 2, 0.3)
    assert _replayed(Folder(folder), 2, 0.0) == []


def test_replay_goes_with_the_latest_data_only():
    with pytest.raises(ConfigError, match=r"training\.dpo\.replay=0\.3 .*training\.dpo\.data='cumulative'"):
        recipes.load("smoke", overrides=["training.dpo.replay=0.3", "training.dpo.data=cumulative"])


def test_what_is_scheduled_for_training_is_in_its_fingerprint(scripted):
    """Another rate from iteration 2 on makes another M3, and the same M2."""
    folder, made = None, []
    for rate in ("1e-6", "2e-6"):
        change = f'schedule=[{{iteration=2, set={{"training.dpo.learning_rate"={rate}}}}}]'
        folder = scripted("iterations=2", "evaluation.models=none", change)
        made.append([store.read_json(folder / "models" / f"M{t}" / "complete.json")["fingerprint"] for t in (2, 3)])
    assert made[0][0] == made[1][0]
    assert made[0][1] != made[1][1]
