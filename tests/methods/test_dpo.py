"""Offline DPO: one training on what people ranked."""

import json

from srlm_core import report, show, store


def groups(path):
    rows = [
        {"prompt": f"Describe colour {i}.", "responses": [
            {"text": f"fair {i}", "rank": 1}, {"text": f"best {i}", "rank": 0}, {"text": f"worst {i}", "rank": 2},
            {"text": f"as bad {i}", "rank": 2},
        ]} for i in range(6)
    ]  # fmt: skip
    rows.append({"prompt": "Which is it?", "responses": [{"text": "a", "rank": 1}, {"text": "b", "rank": 1}]})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return f"seed_data.eft={json.dumps(str(path))}"


def test_best_against_worst_of_each_group_and_no_engine(tmp_path, scripted):
    started = []

    def watch(what, details):
        if what == "engine_start":
            started.append(details["model"])

    sets = (groups(tmp_path / "ranked.jsonl"), "seed_data.eft_groups=null", "evaluation.models=none")
    folder = scripted(*sets, recipe="dpo", observers=[watch])
    pairs = list(store.iter_rows(folder / "iter_01" / "pairs"))
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [(f"best {i}", f"worst {i}") for i in range(6)]
    (aside,) = store.read_json(folder / "bootstrap" / "set_aside" / "eft.json")
    assert "Which is it?" in aside["text"]
    assert store.read_json(folder / "models" / "M2" / "complete.json")["rows"] == 6
    assert started == []
    told = show.show(folder, pairs[0]["prompt_id"])
    assert "chosen, as it stands in the pair\n  │ best 0" in told
    assert "No responses yet" not in told
    report.write_report(folder)
    page = (folder / "report" / "report.md").read_text()
    assert "these pairs were made to train on: 6 in iteration 1" in page
    assert "worst 3" in page
