"""A campaign's numbers without its texts."""

import json
import shutil

import pyarrow.parquet as pq

from srlm_core import publishing, store


def everything(folder):
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_nothing_that_anybody_wrote_and_no_path_is_in_it(scripted, tmp_path):
    file, judge = tmp_path / "mine" / "rows.jsonl", tmp_path / "their" / "judge"
    file.parent.mkdir()
    shutil.copytree(scripted("iterations=0", name="other") / "models" / "M1", judge)
    rows = [{"instruction": f"Name river number {n}.", "response": f"It is the Ouse, {n}."} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "Quarrelsome row"}]))
    named = (f"seed_data.ift={json.dumps(str(file))}", f"evaluation.judge={json.dumps(str(judge))}")
    folder = scripted("iterations=1", *named)
    page = publishing.publish(folder, tmp_path / "published")
    written = everything(tmp_path / "published")
    assert page in written
    texts = {"Quarrelsome row", "Name river number", str(tmp_path)}
    for part in folder.glob("iter_01/*/part-*.parquet"):
        for row in pq.read_table(part).to_pylist():
            texts |= {row[name] for name in ("response", "text", "chosen") if len(row.get(name) or "") > 20}
    assert len(texts) > 20
    for path, content in written.items():
        assert not [text for text in texts if text in content], path.name
    assert json.loads((tmp_path / "published/config.json").read_text())["seed_data"]["ift"] == "rows.jsonl"
    assert "Judged by judge, frozen" in page.read_text()
    assert "This copy holds no text" in page.read_text()


def test_every_number_is_in_it(scripted, tmp_path):
    folder = scripted("iterations=1")
    publishing.publish(folder, tmp_path / "published")
    found = store.read_json(tmp_path / "published/evaluation.json")
    assert found["M2"] == store.read_json(folder / "evaluation/M2/results.json")
    assert found["head_to_head"] == store.read_json(folder / "evaluation/head_to_head/results.json")
    assert [row["model"] for row in store.read_json(tmp_path / "published/models.json")] == list(found)[:-1]
    assert (tmp_path / "published/figures/judge_accuracy.svg").exists()


def test_a_campaign_that_has_not_begun_can_be_published(tmp_path):
    (tmp_path / "empty").mkdir()
    page = publishing.publish(tmp_path / "empty", tmp_path / "published")
    assert "Not finished" in page.read_text()
