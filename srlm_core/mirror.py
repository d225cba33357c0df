"""mirror: finished parts and models copied to object storage as they come, and fetched where the folder lacks them.

Any file system that fsspec knows will do: `s3://bucket/prefix`, `gs://…`, `file:///…`. The folder stays the truth: what
is fetched is held against fingerprint and digest like what lies there. A model's marker is copied last.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from fsspec.core import url_to_fs
from fsspec.registry import known_implementations
from fsspec.utils import get_protocol

from srlm_core import store, weights
from srlm_core.errors import ConfigError, StoreError
from srlm_core.store import Campaign

log = logging.getLogger("srlm")

EVERY_S = 5.0
"""Seconds between two looks at the folder while it runs."""
TRIES = 3
"""Attempts at the end, and at fetching a file."""
_LEFT_OUT = {"logs", "checkpoints", "export"}
RECORD = ".mirror.json"
_UNMADE = (OSError, RuntimeError, ValueError)
"""What file systems raise where something is not to be had; s3fs translates its own to OSError."""


class Mirror:
    """One campaign's copy under a URL; a context manager, within which a thread keeps it up."""

    def __init__(self, url: str, campaign: Campaign, *, wait_s: float = 1.0) -> None:
        self.url, self._folder, self._wait_s = f"{url.rstrip('/')}/{campaign.name}", campaign.folder, wait_s
        self._fs, self._prefix = _file_system(self.url)
        if Path(self._prefix).resolve().is_relative_to(campaign.root.resolve()):
            raise ConfigError(
                f"storage.mirror: expected a place outside the campaigns' folder {campaign.root}, got {url!r}: it is "
                "to survive that folder."
            )
        self._lock, self._wake, self._stop = threading.Lock(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._told = ""
        self._there: set[str] = set()
        """What the mirror holds, by name within the campaign."""
        self._copied: dict[str, list[int]] = {}
        """Of these, size and time of change of the file here when it was copied or fetched."""

    def __enter__(self) -> Self:
        """See that the mirror can be read and written, and what it holds. Raises StoreError, saying what to do."""
        try:
            self._there = {self._name(path) for path in self._fs.find(self._prefix)}
        except FileNotFoundError:
            self._there = set()
        except Exception as error:  # whatever a file system's own library raises without credentials
            raise self._refused("read", error) from error
        kept = store.read_json(self._folder / RECORD) or {}
        known = kept.get("files", {}) if kept.get("url") == self.url else {}
        self._copied = {name: stamp for name, stamp in known.items() if name in self._there}
        try:
            self._copy("config.json")
        except Exception as error:
            raise self._refused("write", error) from error
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        if kind is None or issubclass(kind, Exception):  # Ctrl-C: leave at once, the next run copies the rest
            for attempt in range(TRIES):
                if self._copy_all(everything=True):
                    break
                time.sleep(self._wait_s * 2**attempt)
        if left := self._lacking(everything=True):
            log.warning("%d files are not in %s yet; the same command tries again: %s", len(left), self.url, left[0])

    def __call__(self, what: str, details: dict[str, Any]) -> None:
        """Observe the loop: something was finished, so look soon."""
        if what in ("part", "model", "evaluation", "iteration"):
            self._wake.set()

    # --- copied there -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._stop.wait(self._wait_s)
            self._wake.clear()
            if not self._stop.is_set() and not self._copy_all(everything=False):
                self._stop.wait(EVERY_S)
                self._wake.set()  # again

    def _copy_all(self, *, everything: bool) -> bool:
        """Copy what the mirror lacks; whether all of it is there now."""
        failed: set[str] = set()
        for name in self._lacking(everything=everything):
            if not everything and self._stop.is_set():
                return False
            whose, _, file = name.rpartition("/")
            if file == weights.MARKER and whose in failed:
                continue  # it would call a model whole that is not
            try:
                self._copy(name)
            except FileNotFoundError:
                continue  # made again or dropped meanwhile
            except Exception as error:  # the seam: the mirror may be away, the campaign goes on
                failed.add(whose)
                self._tell(name, error)
        with suppress(OSError):
            store.write_json(self._folder / RECORD, {"url": self.url, "files": dict(self._copied)})
        return not failed

    def _lacking(self, *, everything: bool) -> list[str]:
        """List what is to be copied, markers last; what is written again all the time only at the end."""
        found = (path for path in self._files() if everything or _is_final(path.relative_to(self._folder)))
        stale = {name for path in found if self._copied.get(name := self._name_here(path)) != _stamp(path)}
        stale |= {_marker_of(name) for name in stale if name.startswith("models/")}  # of other weights from now on
        return sorted(stale, key=lambda name: (name.endswith("/" + weights.MARKER), name))

    def _files(self) -> Iterator[Path]:
        """Walk what is worth a copy: not what a training is busy with, nor a model without its marker."""
        for at, folders, names in os.walk(self._folder):
            here = Path(at)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _LEFT_OUT)
            if here.parent == self._folder / "models" and not (here / weights.MARKER).exists():
                continue
            within = "training" in here.relative_to(self._folder).parts
            for name in names:
                if not name.startswith(".") and name != weights.DROPPED and (not within or name.endswith(".parquet")):
                    yield here / name

    def _copy(self, name: str) -> None:
        path = self._folder / name
        stamp, marker = _stamp(path), _marker_of(name)
        if name.startswith("models/") and name != marker and marker in self._there:
            self._fs.rm_file(self._remote(marker))
            self._forget(marker)
        self._fs.put_file(str(path), self._remote(name))
        with self._lock:
            self._there.add(name)
            self._copied[name] = stamp

    def _forget(self, name: str) -> None:
        with self._lock:
            self._there.discard(name)
            self._copied.pop(name, None)

    def _tell(self, name: str, error: Exception) -> None:
        told = f"{type(error).__name__}: {str(error).strip()[:300]}"
        if told != self._told:
            self._told = told
            log.warning("%s could not be copied to %s and will be tried again: %s", name, self.url, told)

    def holds(self, folder: Path) -> bool:
        """Whether a finished model lies there as it does here."""
        names = [self._name_here(path) for path in [*weights.files(folder), folder / weights.MARKER]]
        return all(name in self._copied and self._copied[name] == _stamp(self._folder / name) for name in names)

    # --- fetched from there -----------------------------------------------------------------------------------------

    def fetch(self, *paths: Path) -> bool:
        """Bring files to their places, all or none; whether they were brought. What was copied from here stays."""
        names = [self._name_here(path) for path in paths]
        if not self._there.issuperset(names) or all(
            path.exists() and self._copied.get(name) == _stamp(path) for path, name in zip(paths, names, strict=True)
        ):
            return False
        for path, name in zip(paths, names, strict=True):
            self._fetch(path, name)
        return True

    def fetch_folder(self, folder: Path, *, but: Iterable[str] = ()) -> None:
        """Bring all that the mirror holds below a folder, but for files of these names."""
        prefix, left_out = f"{self._name_here(folder)}/", {*but}
        for name in sorted(self._there):
            if name.startswith(prefix) and Path(name).name not in left_out:
                self._fetch(self._folder / name, name)

    def read_json(self, path: Path) -> Any:
        """Read a JSON file of the mirror; None where it holds none."""
        name = self._name_here(path)
        if name not in self._there:
            return None
        aside = path.with_name(f".{path.name}.fetched.tmp")
        try:
            self._fetch(aside, name)
            return store.read_json(aside)
        finally:
            aside.unlink(missing_ok=True)

    def _fetch(self, path: Path, name: str) -> None:
        for attempt in range(1, TRIES + 1):
            try:
                store.write_atomically(path, lambda aside: self._fs.get_file(self._remote(name), str(aside)))
            except StoreError:
                raise  # this disk is full
            except FileNotFoundError:
                self._forget(name)
                return
            except _UNMADE as error:
                if attempt == TRIES:
                    raise StoreError(
                        f"expected to fetch {name} from {self.url}, got: {error}. Run the same command again; with "
                        "storage.mirror=null what is missing here is made again instead."
                    ) from error
                time.sleep(self._wait_s * attempt)
            else:
                with self._lock:
                    self._copied[name] = _stamp(path)
                return

    # --- names ------------------------------------------------------------------------------------------------------

    def _name(self, remote: str) -> str:
        return remote.removeprefix(self._prefix).lstrip("/")

    def _name_here(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _remote(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _refused(self, doing: str, error: Exception) -> StoreError:
        return StoreError(
            f"storage.mirror: expected to {doing} {self.url}, got {type(error).__name__}: {str(error).strip()[:300]}. "
            "Credentials come from the environment, for s3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            "AWS_ENDPOINT_URL; or set storage.mirror=null."
        )


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path on it. Raises ConfigError, naming the package that is missing."""
    here = get_protocol(url) in ("file", "local")
    try:
        file_system, path = url_to_fs(url, **({"auto_mkdir": True} if here else {}))
    except ImportError as error:
        package = known_implementations[get_protocol(url)]["class"].split(".")[0]
        raise ConfigError(
            f"storage.mirror: expected a file system for {url}, got: {error}. Run `pip install {package}`."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"storage.mirror: expected a URL that fsspec knows, such as s3://bucket/prefix, got {url!r}: {error}."
        ) from error
    return file_system, path.rstrip("/")


def _marker_of(name: str) -> str:
    return f"{name.rpartition('/')[0]}/{weights.MARKER}"


def _is_final(name: Path) -> bool:
    """Whether a file is written once, by its place: a part, or a model's."""
    return name.suffix == ".parquet" or name.parts[0] == "models"


def _stamp(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return []
    return [stat.st_size, stat.st_mtime_ns]
