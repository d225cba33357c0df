"""SPIN: people's answer against the model's own."""

import json

import pyarrow as pa

from srlm_core import schemas, store
from srlm_core.config import RunConfig
from srlm_core.engines.protocol import Completion
from srlm_core.methods import spin, steps
from srlm_core.methods.record import Shard
from srlm_core.prompts import Kept

GIVEN = tuple(
    {"instruction": f"Say {word}.", "response": f"Gladly: {word}."} for word in ("one", "two", "three", "four", "five")
)

CONFIG = RunConfig.model_validate({"method": "spin", "responses": {"n": 1}})


class Says:
    def __init__(self, *texts):
        self.texts = texts

    def generate(self, requests):
        for request, (text, reason) in zip(requests, self.texts, strict=True):
            assert request.n == 1
            yield Completion(request.id, 0, text, 3, reason)


def shard(engine=None, **inputs: pa.Table) -> Shard:
    return Shard(
        config=CONFIG, iteration=2, number=0, wanted=len(GIVEN), given=GIVEN, policy="M2",
        models={"policy": "M2"}, engine=engine, kept=Kept.start([], None, 0.7), inputs=inputs,
    )  # fmt: skip


def test_the_human_answer_is_chosen_and_what_gives_itself_away_makes_no_pair():
    asked, _ = spin.take_prompts(shard())
    engine = Says(
        ("Here: one.", "stop"), ("Here: tw", "length"), ("Gladly: three. ", "stop"), (" ", "stop"), ("5", "stop")
    )
    said, drops = steps.respond(shard(engine, prompts=asked))
    made, left_out = spin.pair(shard(prompts=asked, responses=said, **{"drops:responses": drops}))
    assert [(row["chosen"], row["rejected"]) for row in made.to_pylist()] == [
        ("Gladly: one.", "Here: one."), ("Gladly: five.", "5")
    ]  # fmt: skip
    assert left_out["reason"].to_pylist() == ["cut", "same_as_the_human", "empty"]
    ids = dict(zip(said["response"].to_pylist(), said["response_id"].to_pylist(), strict=True))
    assert made["rejected_id"].to_pylist() == [ids["Here: one."], ids["5"]]
    assert made["chosen_score"].null_count == made["rejected_score"].null_count == 2


def test_a_prompt_that_did_not_fit_is_dropped():
    asked, _ = spin.take_prompts(shard())
    made, left_out = spin.pair(shard(prompts=asked, responses=schemas.RESPONSES.empty_table()))
    assert made.num_rows == 0
    assert left_out["reason"].to_pylist() == ["no_response"] * 5


def test_it_asks_as_the_trainer_lays_out():
    """SP-1: one template for sampling and training: both get the same messages."""
    asked, _ = spin.take_prompts(shard())
    assert asked["messages"].to_pylist() == [[{"role": "user", "content": row["instruction"]}] for row in GIVEN]


def test_a_campaign_trains_on_the_last_two_iterations_and_m1_is_the_baseline(tmp_path, scripted):
    ift = tmp_path / "ift.jsonl"
    again = {**GIVEN[0], "response": "A second answer to what was asked before."}
    ift.write_text("".join(f"{json.dumps(row)}\n" for row in [*GIVEN, again]))
    sets = (f"seed_data.ift={json.dumps(str(ift))}", "evaluation.models=policy", "iterations=3")
    folder = scripted(*sets, recipe="spin", name="spin")
    first, baseline = (store.read_json(folder / "models" / name / "complete.json") for name in ("M1", "sft_baseline"))
    assert first == baseline
    assert not (folder / "bootstrap" / "eft.parquet").exists()
    rows = [store.read_json(folder / "models" / f"M{t}" / "complete.json")["rows"] for t in (2, 3, 4)]
    made = [sum(1 for _ in store.iter_rows(folder / f"iter_0{t}" / "pairs")) for t in (1, 2, 3)]
    assert rows == [made[0], made[0] + made[1], made[1] + made[2]]
    human = {row["instruction"]: row["response"] for row in GIVEN}
    pairs = list(store.iter_rows(folder / "iter_02" / "pairs"))
    assert pairs
    assert all(row["chosen"] == human[row["messages"][0]["content"]] for row in pairs)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    scripted(*sets, recipe="spin", name="spin")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def test_other_human_answers_make_other_pairs(tmp_path, scripted):
    ift = tmp_path / "ift.jsonl"
    sets = (f"seed_data.ift={json.dumps(str(ift))}", "evaluation.models=none", "iterations=1")
    ift.write_text("".join(f"{json.dumps(row)}\n" for row in GIVEN))
    folder = scripted(*sets, recipe="spin")
    ift.write_text("".join(f"{json.dumps(row | {'response': 'No.'})}\n" for row in GIVEN))
    scripted(*sets, recipe="spin")
    assert {row["chosen"] for row in store.iter_rows(folder / "iter_01" / "pairs")} == {"No."}
