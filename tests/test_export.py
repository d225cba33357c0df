"""What leaves: a folder that others load, with cards that say only what the campaign's records say."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from made_up import campaign as made_up
from markdown_it import MarkdownIt

from flows import leaving
from flows.leaving import export
from srlm_core import cards, store
from srlm_core.errors import ConfigError, ModelError, StoreError


def write(folder, model=None, to=None, *, push=None, public=False, datasets=False):
    return export(folder.parent, folder.name, model, to, push=push, public=public, datasets=datasets)


@pytest.fixture
def finished(scripted):
    return scripted("iterations=1")


def front_matter(folder):
    from huggingface_hub.repocard import metadata_load

    return metadata_load(folder / "README.md")


def test_the_model_goes_with_its_card_and_without_what_is_the_campaigns(finished):
    told = write(finished)
    assert told == {"model": str(finished / "export" / "M2")}
    there = finished / "export" / "M2"
    assert sorted(path.name for path in there.iterdir()) == ["README.md", "scripted.json", "srlm.json"]
    assert (there / "scripted.json").read_bytes() == (finished / "models" / "M2" / "scripted.json").read_bytes()
    lineage = store.read_json(there / "srlm.json")["lineage"]
    assert [one["model"] for one in lineage] == ["M0", "M1", "M2"]
    assert lineage[0]["digest"] == lineage[1]["init_from"][1]


def test_the_card_says_how_on_what_with_what_result_and_what_it_cannot_say(finished):
    write(finished)
    card = (finished / "export" / "M2" / "README.md").read_text()
    marker = store.read_json(finished / "models" / "M2" / "complete.json")
    judged = store.read_json(finished / "evaluation" / "M2" / "results.json")["judge"]["pairwise_accuracy_tie_half"]
    assert marker["digest"] in card
    assert f"{judged['value']:.2f} ± {judged['stderr']:.2f} (n = {judged['n']})" in card
    for said in ("# How it was trained", "## What was measured", "### Head to head", "## Limitations", "## Lineage",
                 "Judged by M0, frozen", "points where longer", "prompts.target", "seed 0", "Not a language model",
                 "pyarrow" if (finished / "provenance.json").exists() else "seed"):  # fmt: skip
        assert said in card.replace("\\", ""), said
    data = front_matter(finished / "export" / "M2")
    assert data["pipeline_tag"] == "text-generation"
    assert "license" not in data
    assert "base_model" not in data
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == pytest.approx(judged["value"], abs=1e-4)


def test_the_datasets_load_by_name_with_every_row_and_column(finished):
    import datasets

    write(finished, datasets=True)
    folder = finished / "export" / "datasets"
    names = [one["config_name"] for one in front_matter(folder)["configs"]]
    assert names[:4] == ["prompts", "responses", "judgments", "pairs"]
    assert "drops" in names
    for name in ("prompts", "responses", "judgments", "pairs"):
        loaded = datasets.load_dataset(str(folder), name, split="train", cache_dir=str(finished / "cache"))
        assert loaded.to_list() == list(store.iter_rows(finished / "iter_01" / name))
    card = (folder / "README.md").read_text()
    rows = sum(1 for _ in store.iter_rows(finished / "iter_01" / "responses"))
    assert f"Iteration 1: {rows} rows" in card
    assert "| verdict | double | yes | srlm, read in `text`" in card.replace("\\", "")


def test_texts_of_models_cannot_leave_their_fence_nor_a_table(tmp_path):
    hostile = "```\n</details><script>alert(1)</script>\n# A heading\n| a | b |\n---\nlicense: mit\n---\n````"
    folder = made_up(tmp_path, texts={"r1": hostile, "r2": hostile, "p1": hostile, "jr1": hostile})
    for model in ("sft_baseline", "M1", "M2"):
        store.write_json(folder / "models" / model / "scripted.json", {"skill": 0.4})
    tables = ("prompts", "responses", "judgments", "pairs")
    parts = {name: {1: store.parts(folder / "iter_01" / name)[:1]} for name in tables}
    card = cards.dataset_card(folder, leaving.config_of(folder), parts)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)
    assert not [token for token in tokens if token.type in ("html_block", "html_inline")]
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == ["Datasets of the campaign made\\-up", "prompts", "responses", "judgments", "pairs"]
    assert "license" not in card.data.to_dict()
    fenced = [token.content for token in tokens if token.type == "fence" and "alert" in token.content]
    assert len(fenced) >= 5


def test_a_hostile_campaign_name_and_setting_stay_text(tmp_path):
    folder = made_up(tmp_path, name="<b>x|y", model={"path": "evil](http://x)/`<img src=x>`"})
    card = cards.model_card(folder, leaving.config_of(folder), "M2", None, None)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)
    assert "<img" not in html
    assert "<b>" not in html
    assert 'href="http://x' not in html


def test_no_path_of_this_machine_is_in_a_card(scripted, tmp_path):
    file = tmp_path / "mine" / "rows.jsonl"
    file.parent.mkdir()
    rows = [{"instruction": f"Name river number {n}.", "response": f"It is the Ouse, {n}."} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = scripted("iterations=1", f"seed_data.ift={json.dumps(str(file))}")
    write(folder, datasets=True)
    for card in (folder / "export").rglob("README.md"):
        assert str(tmp_path) not in card.read_text().replace("\\", "")
    assert "rows.jsonl" in (folder / "export" / "M2" / "README.md").read_text().replace("\\", "")


def test_the_license_is_the_bases_or_none(tmp_path):
    assert cards.license_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: llama3.2\n---\n# Base\n")
    assert cards.license_of(tmp_path) == "llama3.2"
    (tmp_path / "README.md").unlink()
    store.write_json(tmp_path / "source.json", {"package": "no-such-package"})
    assert cards.license_of(tmp_path) is None
    assert cards.hub_id("HuggingFaceTB/SmolLM2-135M")
    assert not cards.hub_id(str(tmp_path))


def test_it_replaces_its_own_export_and_nobody_elses_folder(finished, tmp_path):
    write(finished)
    write(finished)
    (tmp_path / "mine" / "M2").mkdir(parents=True)
    (tmp_path / "mine" / "M2" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="expected an empty folder, or an earlier export"):
        write(finished, to=tmp_path / "mine")
    assert (tmp_path / "mine" / "M2" / "thesis.tex").exists()


def test_weights_that_are_not_what_the_record_says_do_not_leave(finished):
    store.write_json(finished / "models" / "M2" / "scripted.json", {"skill": 0.99})
    with pytest.raises(ModelError, match="changed or damaged"):
        write(finished)
    assert not (finished / "export").exists()


def test_what_cannot_be_exported_is_said(finished, monkeypatch):
    with pytest.raises(StoreError, match="There are: M1, M2, sft_baseline"):
        write(finished, "M9")
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        write(finished, push="no-owner")
    monkeypatch.setenv("HF_HOME", str(finished))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(finished / "none"))
    with pytest.raises(StoreError, match="Set HF_TOKEN"):
        write(finished, push="me/mine")


# --- to a hub -------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            answer = {"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name}
        elif "/preupload/" in self.path:
            wanted = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]}
        else:
            answer = {"success": True, "commitUrl": f"http://{self.headers['Host']}/c/1", "commitOid": "1" * 40}
        said = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_GET(self):
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def srlm(folder, endpoint, *more):
    surroundings = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_planted", "HF_HUB_DISABLE_TELEMETRY": "1",
                    "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder.parent / "hf")}  # fmt: skip
    command = [sys.executable, "-m", "flows.cli", "export", folder.name, "--root", str(folder.parent), *more]
    return subprocess.run(
        command, capture_output=True, text=True, env=surroundings, cwd=Path(__file__).parents[1], check=False
    )


@pytest.mark.cluster
def test_a_push_makes_private_repositories_and_uploads_what_was_exported(finished, hub):
    done = srlm(finished, f"http://127.0.0.1:{hub.server_port}", "--push", "me/mine", "--datasets")
    assert done.returncode == 0, done.stderr
    made = [json.loads(body) for path, _, body in hub.asked if path == "/api/repos/create"]
    assert [(one["name"], one.get("type", "model"), one.get("private") or one.get("visibility") == "private")
            for one in made] == [("mine", "model", True), ("mine-data", "dataset", True)]  # fmt: skip
    assert {token for _, token, _ in hub.asked} == {"Bearer hf_planted"}
    sent = {}
    for path, _, body in hub.asked:
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    where = path.split("/commit/")[0]
                    sent[where, line["value"]["path"]] = base64.b64decode(line["value"]["content"])
    assert sent["/api/models/me/mine", "README.md"] == (finished / "export" / "M2" / "README.md").read_bytes()
    assert ("/api/models/me/mine", "scripted.json") in sent
    assert ("/api/datasets/me/mine-data", "pairs/iter_01-00000.parquet") in sent
    assert "me/mine-data" in sent["/api/models/me/mine", "README.md"].decode().replace("\\", "")
    assert "hf_planted" not in done.stdout + done.stderr


@pytest.mark.cluster
def test_a_hub_that_is_away_is_an_error_and_the_export_stays(finished):
    done = srlm(finished, "http://127.0.0.1:9", "--push", "me/mine")
    assert done.returncode == 1
    assert "Nothing is lost: what was exported is in" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hf_planted" not in done.stdout + done.stderr
    assert (finished / "export" / "M2" / "README.md").exists()


# --- a real model ---------------------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.cluster
def test_the_exported_model_loads_with_transformers_and_says_the_same(tmp_path):
    import torch
    from engines.tiny import tiny_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from srlm_core.engines.models import model_digest

    folder = made_up(tmp_path, model={"path": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    tiny_model(folder / "models" / "M2", seed=3)
    marker = store.read_json(folder / "models" / "M2" / "complete.json")
    digest = model_digest(folder / "models" / "M2", tmp_path / ".cache" / "models")
    store.write_json(folder / "models" / "M2" / "complete.json", {**marker, "digest": digest})
    write(folder, "M2")
    there = folder / "export" / "M2"
    assert (there / "model.safetensors").stat().st_nlink == 2
    asked = AutoTokenizer.from_pretrained(there)("Why is the sky blue?", return_tensors="pt")
    said = [AutoModelForCausalLM.from_pretrained(path)(**asked).logits for path in (there, folder / "models" / "M2")]
    assert torch.equal(*said)
    data = front_matter(there)
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["library_name"] == "transformers"
    assert digest in (there / "README.md").read_text()
