"""SCIR-style on the scripted engine: which two are paired, that nobody labels them, and what the trainer is handed."""

import pyarrow.parquet as pq
import pytest
from tables import prompts, responses

from srlm_core import comparisons, pairs, recipes, report, schemas, show, store
from srlm_core.methods import scir
from srlm_core.methods.record import Shard

SMALL = ("iterations=1", "evaluation.models=none")


def read(folder, dataset, t=1):
    return list(store.iter_rows(folder / f"iter_{t:02d}" / dataset))


def paired(*said, seed=0, **changes):
    """Pair the responses (text, finish_reason) to one prompt; returns rows of PAIRS and the reasons of DROPS."""
    config = recipes.load("scir", "smoke", [f"seed={seed}", *(f"pairs.{name}={v}" for name, v in changes.items())])
    rows = responses([("p0", *each) for each in said])
    texts = [text for text, _ in said]
    twice = [f"r{i}" for i, text in enumerate(texts) if text in texts[:i]]
    drops = schemas.table(
        [{"id": i, "stage": "responses", "reason": "duplicate", "iteration": 1, "detail": None} for i in twice],
        schemas.DROPS,
    )
    made, dropped = scir.pair(
        Shard(
            config=config, iteration=1, number=0, wanted=1, given=(), policy="M1", models={}, engine=None, kept=None,
            inputs={"prompts": prompts("a?"), "responses": rows, "drops:responses": drops},
        )
    )  # fmt: skip
    return made.to_pylist(), [row["reason"] for row in dropped.to_pylist()]


def test_a_campaign_pairs_without_a_label_and_asks_in_both_orders(scripted):
    folder = scripted("iterations=2", recipe="scir", name="scir")
    assert not (folder / "iter_01" / "judgments").exists()
    said = {row["response_id"]: row for row in read(folder, "responses")}
    rows = read(folder, "pairs")
    assert rows
    for row in rows:
        assert (row["label"], row["chosen_score"], row["rejected_score"], row["kind"]) == (None, None, None, "response")
        for role in ("chosen", "rejected"):
            assert said[row[f"{role}_id"]]["finish_reason"] == "stop"
            assert said[row[f"{role}_id"]]["prompt_id"] == row["prompt_id"]
        assert row["chosen"].strip() != row["rejected"].strip()
    trained = {row["id"]: row for row in pq.read_table(folder / "iter_01" / "training" / "rows.parquet").to_pylist()}
    ask = comparisons.pairwise().ask
    for row in rows:
        asked, prompt = trained[row["pair_id"]], schemas.conversation(row["messages"])
        assert asked["asked_ab"] == list(ask(prompt=prompt, first=row["chosen"], second=row["rejected"]))
        assert asked["asked_ba"] == list(ask(prompt=prompt, first=row["rejected"], second=row["chosen"]))
    report.write_report(folder)
    page = (folder / "report" / "report.md").read_text()
    assert "SCIR-style: what the shorter of two lacks" in page
    assert "tokens of the chosen" not in page, "none is"
    told = show.show(folder, rows[0]["prompt_id"])
    assert "(no label); trained M2" in told
    assert told.count("← paired") == 2


def test_a_loss_that_is_told_asks_nothing(scripted):
    folder = scripted(*SMALL, name="plain")
    rows = pq.read_table(folder / "iter_01" / "training" / "rows.parquet")
    assert rows["asked_ab"].null_count == rows["asked_ba"].null_count == rows.num_rows > 0


def test_the_same_seed_draws_the_same_pairs_and_another_draws_others():
    four = [(f"answer {i}", "stop") for i in range(4)]
    drawn = {seed: paired(*four, seed=seed)[0] for seed in range(12)}
    assert drawn[3] == paired(*four, seed=3)[0]
    assert len({(rows[0]["chosen_id"], rows[0]["rejected_id"]) for rows in drawn.values()}) > 4
    assert any(rows[0]["chosen_id"] > rows[0]["rejected_id"] for rows in drawn.values()), "either may stand first"


@pytest.mark.parametrize(
    "said",
    [
        [("one", "stop")],
        [("one", "stop"), ("two", "length")],
        [("one", "stop"), ("one", "stop"), ("one", "stop")],
        [("one", "stop"), ("go " * 40, "stop")],
        [],
    ],
    ids=["alone", "cut", "equal", "a loop", "none"],
)
def test_what_may_not_be_chosen_is_not_compared(said):
    rows, reasons = paired(*said)
    assert rows == []
    assert reasons == ["fewer_than_two_to_compare"]


def test_the_two_that_are_left_are_drawn():
    rows, reasons = paired(("one", "stop"), ("cut", "length"), ("one", "stop"), ("two", "stop"), max_chosen_chars=20)
    assert reasons == []
    assert {rows[0]["chosen"], rows[0]["rejected"]} == {"one", "two"}
    assert rows[0]["pair_id"] == pairs.digest(rows[0]["chosen_id"], rows[0]["rejected_id"], 1, "response")


def test_how_far_two_differ_in_length_is_measured():
    """Of 8 and 2 characters the shorter lacks 6 / 8; of 4 and 4 none."""
    rows = [paired((one, "stop"), (other, "stop"))[0][0] for one, other in (("8 of 8 !", "2!"), ("four", "4444"))]
    rows[1]["pair_id"] = "another"
    table = schemas.table(rows, schemas.PAIRS)
    told = scir.measures({"pairs": [table]}, recipes.load("scir", "smoke"))
    assert told["length_gap"].rate.value == pytest.approx((6 / 8 + 0) / 2)
