"""The campaign folder: the files are the truth.

A part is written aside and renamed into place; its footer holds the fingerprint of what made it and a digest of
its rows. Present and matching is reused; damaged, missing or different is made again. So resume is the same command.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from srlm_core.errors import StoreError

_spell = msgspec.json.Encoder(order="deterministic").encode
Written = TypeVar("Written")
ROW_GROUP = 1024
"""Rows that a row group has at least, but for the last."""
_FINGERPRINT, _DIGEST, _EXTRA = b"srlm.fingerprint", b"srlm.digest", b"srlm.extra"


def canonical(value: Any) -> bytes:
    """Return one spelling of a JSON value: sorted keys, no blanks, NaN as null."""
    return _spell(value)


def digest(*values: Any, length: int = 16) -> str:
    """Hash JSON values; stable across machines and processes, unlike the built-in hash of text."""
    return hashlib.sha256(canonical(list(values))).hexdigest()[:length]


def seed_for(*where: Any) -> int:
    """Derive a seed in [0, 2**31) from where a random choice is made, so a shard can be redone alone.

    The low 8 bits are zero: a request for n samples draws from the streams seed .. seed + n - 1.
    """
    return int.from_bytes(hashlib.sha256(canonical(list(where))).digest()[:4], "big") >> 1 & ~0xFF


def write_atomically(path: Path, write: Callable[[Path], Written]) -> Written:
    """Let `write` fill a temporary file in the same folder, flush it to the disk, rename it, return what it returned.

    Raises StoreError on a full disk; what was there before is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own for each thread: two that write the same file must not rename each other's away
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        written = write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        return written
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"expected room for {path}, got a full disk ({error.strerror}). Everything finished is kept: "
                f"free some space on the disk of {path.parent} and run the same command again."
            ) from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, readable by people."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False, default=str)
    write_atomically(path, lambda aside: _write_text(aside, text + "\n"))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda aside: _write_text(aside, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; None where it is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Stamp(NamedTuple):
    """What a part says of itself."""

    fingerprint: str
    digest: str
    extra: dict[str, Any]


def rows_digest(pieces: Iterable[pa.Table | pa.RecordBatch], schema: pa.Schema) -> str:
    """Hash the content of a table in pieces, row by row: not its encoding, which differs before and after a file."""
    sink = hashlib.sha256(canonical(schema.names))
    for piece in pieces:
        _hash_rows(sink, piece)
    return sink.hexdigest()[:16]


def _hash_rows(sink: Any, rows: pa.Table | pa.RecordBatch) -> None:
    for start in range(0, rows.num_rows, 1024):
        for row in rows.slice(start, 1024).to_pylist():
            sink.update(canonical(row))


def write_part(path: Path, rows: pa.Table, fingerprint: str, extra: Mapping[str, Any] | None = None) -> Stamp:
    """Write one part with page checksums, its fingerprint, digest and `extra` in the footer."""
    return write_stream(path, [rows], rows.schema, fingerprint, extra)


def write_stream(
    path: Path,
    pieces: Iterable[pa.Table],
    schema: pa.Schema,
    fingerprint: str,
    extra: Mapping[str, Any] | None = None,
) -> Stamp:
    """Write one part out of pieces that come one after the other: a row group of them is in memory at a time."""
    schema, sink = schema.remove_metadata(), hashlib.sha256(canonical(schema.names))

    def write(aside: Path) -> Stamp:
        # no statistics: they are in no checksum, and a reader that skips by damaged ones would lose rows silently
        with pq.ParquetWriter(
            aside, schema, compression="zstd", write_page_checksum=True, write_statistics=False
        ) as writer:
            for group in _row_groups(pieces):
                writer.write_table(group.replace_schema_metadata(None))
                _hash_rows(sink, group)
            stamp = Stamp(fingerprint, sink.hexdigest()[:16], dict(extra or {}))
            writer.add_key_value_metadata({
                _FINGERPRINT: stamp.fingerprint, _DIGEST: stamp.digest,
                _EXTRA: json.dumps(stamp.extra, sort_keys=True),
            })  # fmt: skip
        return stamp

    return write_atomically(path, write)


def _row_groups(pieces: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Put small pieces together; none is empty: a row group of no rows stops the datasets library from loading."""
    held: list[pa.Table] = []
    for piece in pieces:
        held.append(piece)
        if sum(rows.num_rows for rows in held) >= ROW_GROUP:
            yield pa.concat_tables(held)
            held = []
    if any(rows.num_rows for rows in held):
        yield pa.concat_tables(held)


def read_part(path: Path) -> pa.Table:
    """Read one part, its page checksums verified. Raises OSError if it is cut short or a data page is damaged."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read().replace_schema_metadata(None)


def stamp_of(path: Path) -> Stamp | None:
    """Return what an intact part says of itself; None where it is absent or damaged.

    Page checksums do not cover headers and footer, so the rows are held against the digest as well.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            meta = file.metadata.metadata
            stamp = Stamp(meta[_FINGERPRINT].decode(), meta[_DIGEST].decode(), json.loads(meta[_EXTRA]))
            return stamp if stamp.digest == rows_digest(file.iter_batches(1024), file.schema_arrow) else None
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None


def parts(folder: Path) -> list[Path]:
    """List a dataset's parts in shard order."""
    return sorted(folder.glob("part-*.parquet"))


def iter_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Stream a dataset's rows as dicts, one part in memory at a time."""
    for path in parts(folder):
        yield from read_part(path).to_pylist()


class Made(NamedTuple):
    """A part that exists: where, and what it says of itself."""

    path: Path
    stamp: Stamp
    reused: bool

    @property
    def identity(self) -> list[str]:
        """What a later part's fingerprint holds of this one."""
        return [self.stamp.fingerprint, self.stamp.digest]


class Fresh(NamedTuple):
    """What a part is written from."""

    rows: pa.Table
    drops: pa.Table
    tokens: int = 0
    """Tokens that models generated for it."""


def materialize(
    path: Path,
    fingerprint: str,
    make: Callable[[pa.Table | None], Fresh],
    *,
    drops: Path,
    passes: int = 1,
    elsewhere: Iterable[Sequence[Path]] = (),
    fetch: Callable[[Path, Path], bool] | None = None,
) -> Made:
    """Return the part at `path` if it is intact and was made from the same things; else make it.

    `make` is handed the present rows where they are good but hold fewer than `passes` judgment passes, else null. The
    drops are written first, so that the part's existence means both are there. `elsewhere`: where another campaign
    may hold the same part and its drops; one that was made from the same things is linked. `fetch` brings both to
    their places from a mirror, and says whether it did; then they are looked at like any others.
    """
    stamp = _whole(path, drops, fingerprint)
    if stamp is None:
        for part, left_out in elsewhere:
            twin = _whole(part, left_out, fingerprint)
            if twin and twin.extra["passes"] == passes:
                link(left_out, drops)
                link(part, path)
                return Made(path, twin, True)
    if stamp is None and fetch is not None and fetch(path, drops):
        stamp = _whole(path, drops, fingerprint)
    if stamp is not None and stamp.extra["passes"] >= passes:
        return Made(path, stamp, True)
    fresh = make(None if stamp is None else read_part(path))
    spent = fresh.tokens + (0 if stamp is None else stamp.extra.get("tokens", 0))
    write_part(drops, fresh.drops, fingerprint)
    return Made(path, write_part(path, fresh.rows, fingerprint, {"passes": passes, "tokens": spent}), False)


def _whole(path: Path, drops: Path, fingerprint: str) -> Stamp | None:
    """Return what a part says of itself if it and its drops are intact and were made from the same things."""
    stamp, beside = stamp_of(path), stamp_of(drops)
    return stamp if stamp and beside and stamp.fingerprint == fingerprint == beside.fingerprint else None


def tokens_of(path: Path) -> int | None:
    """Return the tokens that models generated for a part; None where it does not say, or is damaged."""
    try:
        return json.loads(pq.read_metadata(path).metadata[_EXTRA]).get("tokens")
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None


def link(source: Path, target: Path) -> None:
    """Give a finished file a second name; copied where links do not work. Safe: it is only ever renamed over."""

    def write(aside: Path) -> None:
        aside.unlink(missing_ok=True)
        link_or_copy(source, aside)

    write_atomically(target, write)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Link a file, or copy it: to another file system, or on one without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class Campaign:
    """One campaign's folder: runs/<name>/."""

    def __init__(self, root: Path, name: str, others: Sequence[str] = ()) -> None:
        self.root, self.name = root, name
        self.others = [root / other for other in others]
        """Folders of campaigns that may have made some of the same."""
        self.folder = root / name
        self._lock = FileLock(self.folder / ".lock")

    def __enter__(self) -> "Campaign":
        self.take()
        for leftover in self.leftovers():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
        return self

    def take(self) -> None:
        """Make sure that nobody else works on it, and leave it as it is. Raises StoreError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # a lock of the operating system: it is gone with its process, however that ends
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(
                f"expected campaign {self.name!r} to be free, but another process works on it ({self.folder}). "
                "Wait for it, stop it, or start a campaign of another name with --name."
            ) from error
        except OSError as error:
            raise StoreError(
                f"expected a writable folder at {self.folder}, got: {error}. Choose another with --root."
            ) from error

    def leftovers(self) -> list[Path]:
        """List what a process left that was killed while it wrote."""
        return list(self.folder.rglob(".*.tmp"))

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    def elsewhere(self, *paths: Path) -> Iterator[tuple[Path, ...]]:
        """Say where the other campaigns would hold these files of this one."""
        for other in self.others:
            yield tuple(other / path.relative_to(self.folder) for path in paths)

    def iteration(self, t: int) -> Path:
        """Folder of iteration t: made with M_t, trains M_{t+1}."""
        return self.folder / f"iter_{t:02d}"

    def model(self, name: str) -> Path:
        """Folder of a trained model: sft_baseline, M1, M2 and so on."""
        return self.folder / "models" / name

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    @property
    def report(self) -> Path:
        return self.folder / "report"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"


def part_path(folder: Path, shard: int) -> Path:
    """Path of one shard of a dataset."""
    return folder / f"part-{shard:05d}.parquet"


def drops_path(folder: Path, dataset: str, shard: int) -> Path:
    """Path of what was left out while one shard of a dataset was made."""
    return folder / "drops" / f"part-{dataset}-{shard:05d}.parquet"


def forget_later_parts(folder: Path, dataset: str, shards: int) -> None:
    """Delete the parts of shards that no longer exist, so that a folder holds one dataset and nothing else."""
    for path in [*parts(folder / dataset), *(folder / "drops").glob(f"part-{dataset}-*.parquet")]:
        if int(path.stem.rpartition("-")[2]) >= shards:
            path.unlink()


def forget_datasets(folder: Path, keep: Set[str]) -> None:
    """Delete the datasets of a folder that are not made any more, with what was left out of them."""
    for name in {path.name for path in folder.iterdir() if path.is_dir()} - keep:
        forget_later_parts(folder, name, 0)


def clone(source: Path, target: Path) -> None:
    """Copy a campaign folder for a fork; finished parts and weights share their contents by hard links.

    Safe because those are never written in place, only renamed over. Everything else is copied.
    """

    def share(src: str, dst: str) -> None:
        finished = Path(src).suffix in (".parquet", ".safetensors")
        (link_or_copy if finished else shutil.copy2)(src, dst)

    shutil.copytree(
        source,
        target,
        copy_function=share,
        ignore=shutil.ignore_patterns(".lock", "logs", "report", "checkpoints", "export"),
    )
