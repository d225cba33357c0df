"""The rows of a file, one by one, whatever it is written in. Each has the number by which the user finds it again."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from srlm_core.errors import DataError

Row = dict[str, Any]


class Broken(NamedTuple):
    """A row that could not even be read."""

    reason: str
    text: str


def objects(where: str) -> Iterator[tuple[int, Row | Broken]]:
    """Yield (line or row number, row) of a file, a dataset's folder, or a dataset of the hub (`owner/name[:split]`).

    Raises DataError where nothing is there, or where the file itself is damaged.
    """
    path = Path(where).expanduser()
    if path.is_file():
        try:
            yield from _of_file(path)
        except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
            wrong = f"expected a whole, readable file at {path}, got: {error}. Make or fetch it again."
            raise DataError(wrong) from error
    else:
        yield from _of_dataset(where)


def _of_file(path: Path) -> Iterator[tuple[int, Row | Broken]]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[-2:-1] if zipped else suffixes[-1:]) or [""]
    if kind == [".parquet"]:
        yield from enumerate(_of_parquet(path), start=1)
        return
    with cast("BinaryIO", gzip.open(path) if zipped else path.open("rb")) as file:
        match kind[0]:
            case ".csv" | ".tsv":
                yield from _of_csv(file, "," if kind == [".csv"] else "\t")
            case ".json":
                yield from _of_json(file)
            case ".txt":
                yield from ((number, _prompt(line)) for number, line in _lines(file))
            case _:
                yield from ((number, _object(line)) for number, line in _lines(file))


def _lines(file: BinaryIO) -> Iterator[tuple[int, str | Broken]]:
    # cut at line feeds alone: JSON strings may hold U+2028 and its like
    for number, raw in enumerate(file, start=1):
        line = _text(raw)
        if isinstance(line, Broken) or line.strip():
            yield number, line


def _text(raw: bytes) -> str | Broken:
    try:
        return raw.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8: byte {raw[error.start]:#04x}. Convert the file, e.g. `iconv -f latin1 -t utf-8`"
        return Broken(wrong, raw.decode("utf-8", "replace"))


def _prompt(line: str | Broken) -> Row | Broken:
    return line if isinstance(line, Broken) else {"prompt": line}


def _object(line: str | Broken) -> Row | Broken:
    if isinstance(line, Broken):
        return line
    try:
        return _as_row(json.loads(line), line)
    except ValueError as error:
        return Broken(f"not JSON: {error}", line)


def _as_row(found: Any, text: str) -> Row | Broken:
    return found if isinstance(found, dict) else Broken(f"expected an object, got {type(found).__name__}", text)


def _of_json(file: BinaryIO) -> Iterator[tuple[int, Row | Broken]]:
    """Read a list of objects, an object that holds one, or JSON lines under another name."""
    raw = file.read()
    try:
        whole = json.loads(raw)
    except ValueError:
        lines = ((number, _text(line)) for number, line in enumerate(raw.split(b"\n"), start=1) if line.strip())
        yield from ((number, _object(line)) for number, line in lines)
        return
    listed = whole if isinstance(whole, list) else _held_by(whole)
    yield from ((number, _as_row(row, str(row))) for number, row in enumerate(listed, start=1))


def _held_by(whole: Any) -> list[Any]:
    """Unwrap {"version": …, "data": [rows]}; any other object is a row itself."""
    lists = [value for value in whole.values() if isinstance(value, list)] if isinstance(whole, dict) else []
    wraps = len(lists) == 1 and "data" in whole
    return lists[0] if wraps else [whole]


def _of_csv(file: BinaryIO, delimiter: str) -> Iterator[tuple[int, Row | Broken]]:
    csv.field_size_limit(2**31 - 1)
    text = (line.decode("utf-8-sig", "replace") for line in file)
    for number, row in enumerate(csv.DictReader(text, delimiter=delimiter), start=1):
        if None in row or None in row.values():
            yield number, Broken("expected as many fields as the header has", delimiter.join(map(str, row.values())))
        else:
            yield number, row


def _of_parquet(path: Path) -> Iterator[Row]:
    for batch in pq.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _of_dataset(where: str) -> Iterator[tuple[int, Row | Broken]]:
    name, _, split = where.partition(":")
    if not Path(name).expanduser().is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise DataError(
            f"expected a file, a dataset's folder or a dataset of the hub (owner/name) at {where!r}, got none. "
            "Check the path."
        )
    import datasets

    try:
        rows = datasets.load_dataset(str(Path(name).expanduser()), split=split or "train")
    except Exception as error:  # whatever the hub, the network or a folder's own layout bring
        raise DataError(
            f"expected a dataset {name!r} with a split {split or 'train'!r}, got: {error}. Check its name; where the "
            "hub cannot be reached, name a file of yours, or the folder of a copy."
        ) from error
    yield from enumerate((dict(row) for row in rows), start=1)
