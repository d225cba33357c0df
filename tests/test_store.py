import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_core import schemas, store
from srlm_core.errors import StoreError

ROWS = pa.table({"id": ["a", "b"], "x": [1.0, None]})
DROPS = schemas.DROPS.empty_table()


def made(folder, fingerprint="f", calls=None, passes=1):
    def make(present):
        if calls is not None:
            calls.append(present)
        return store.Fresh(ROWS, DROPS, 7)

    return store.materialize(
        folder / "part-00000.parquet", fingerprint, make, drops=folder / "d.parquet", passes=passes
    )


def test_present_and_matching_is_reused(tmp_path):
    calls = []
    made(tmp_path, calls=calls)
    again = made(tmp_path, calls=calls)
    assert len(calls) == 1
    assert again.reused


def test_another_fingerprint_makes_it_again(tmp_path):
    calls = []
    made(tmp_path, "f", calls)
    made(tmp_path, "g", calls)
    assert calls == [None, None]


def test_more_passes_complete_what_is_there_and_fewer_reuse_it(tmp_path):
    calls = []
    made(tmp_path, calls=calls, passes=3)
    made(tmp_path, calls=calls, passes=5)
    assert calls[1].equals(ROWS)  # handed the present rows, to add to
    made(tmp_path, calls=calls, passes=2)
    assert len(calls) == 2


def test_a_part_says_what_it_cost_and_added_passes_add_to_it(tmp_path):
    path = made(tmp_path, passes=1).path
    assert store.tokens_of(path) == 7
    made(tmp_path, passes=2)
    assert store.tokens_of(path) == 14
    path.write_bytes(b"PAR1")
    assert store.tokens_of(path) is None


@pytest.mark.parametrize(("fingerprint", "passes", "linked"), [("f", 1, True), ("g", 1, False), ("f", 2, False)])
def test_a_part_that_another_campaign_made_of_the_same_things_is_linked(tmp_path, fingerprint, passes, linked):
    theirs = made(tmp_path / "theirs")
    mine, drops = tmp_path / "mine" / "part-00000.parquet", tmp_path / "mine" / "d.parquet"
    found = store.materialize(
        mine, fingerprint, lambda present: store.Fresh(ROWS, DROPS), drops=drops, passes=passes,
        elsewhere=[(tmp_path / "none", tmp_path / "none"), (theirs.path, tmp_path / "theirs" / "d.parquet")],
    )  # fmt: skip
    assert found.reused == linked
    assert (mine.stat().st_ino == theirs.path.stat().st_ino) == linked
    assert drops.exists()


def test_no_flipped_byte_changes_a_row_unseen_and_the_part_is_made_again(tmp_path):
    path = made(tmp_path).path
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        stamp = store.stamp_of(path)
        # a flip may land where it changes nothing that is read, such as the writer's name; then the rows are the same
        assert stamp is None or store.read_part(path).equals(ROWS)
        made(tmp_path)
        assert store.read_part(path).equals(ROWS)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_part_that_is_cut_short_is_made_again(tmp_path, keep):
    path = made(tmp_path).path
    path.write_bytes(path.read_bytes()[:keep])
    assert store.stamp_of(path) is None
    assert not made(tmp_path).reused


def test_lost_drops_make_the_part_again(tmp_path):
    made(tmp_path)
    (tmp_path / "d.parquet").unlink()
    assert not made(tmp_path).reused


def test_a_full_disk_says_what_to_do_and_keeps_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    store.write_json(path, {"old": 1})

    def fill(aside):
        aside.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StoreError, match=r"free\n? ?some space"):
        store.write_atomically(path, fill)
    assert store.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_one_file_leave_one_of_their_texts_whole(tmp_path):
    path, texts = tmp_path / "x.txt", [letter * 100_000 for letter in "abcd"]
    with ThreadPoolExecutor(4) as threads:
        for writing in [threads.submit(store.write_text, path, text) for text in texts * 25]:
            writing.result()
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_one_process_per_campaign(tmp_path):
    with store.Campaign(tmp_path, "c"):
        other = store.Campaign(tmp_path, "c")
        with pytest.raises(StoreError, match="another process"):
            other.__enter__()
    with store.Campaign(tmp_path, "c"):
        pass


def test_a_folder_that_cannot_be_written_to_is_said_so(tmp_path):
    (tmp_path / "c" / ".lock").mkdir(parents=True)  # root may write wherever permissions say no
    (tmp_path / "file").write_text("")
    for root, name in ((tmp_path, "c"), (tmp_path / "file", "c")):
        with (
            pytest.raises(StoreError, match=r"expected a writable folder at .*, got: .* --root"),
            store.Campaign(root, name),
        ):
            pass


def test_what_a_killed_writer_left_is_swept(tmp_path):
    (tmp_path / "c" / "iter_01").mkdir(parents=True)
    left = tmp_path / "c" / "iter_01" / ".part-00000.parquet.999.tmp"
    left.write_text("half")
    model = tmp_path / "c" / "models" / ".M2.tmp"
    model.mkdir(parents=True)
    (model / "weights").write_text("half")
    with store.Campaign(tmp_path, "c"):
        assert not left.exists()
        assert not model.exists()


@given(st.lists(st.one_of(st.text(), st.integers(), st.booleans()), max_size=4))
def test_seeds_lie_256_apart_and_in_range(where):
    seed = store.seed_for(*where)
    assert 0 <= seed < 2**31
    assert seed % 256 == 0


def test_digests_do_not_depend_on_the_process():
    assert store.digest({"b": 1, "a": 2}) == store.digest({"a": 2, "b": 1})


def test_a_digest_of_rows_survives_the_file(tmp_path):
    stamp = store.write_part(tmp_path / "p.parquet", ROWS, "f")
    assert store.rows_digest([store.read_part(tmp_path / "p.parquet")], ROWS.schema) == stamp.digest


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_pieces_make_the_same_part_as_the_whole(tmp_path_factory, sizes):
    folder = tmp_path_factory.mktemp("pieces")
    whole = pa.table({"id": [str(number) for number in range(sum(sizes))]}, schema=pa.schema([("id", pa.string())]))
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    pieces = (whole.slice(start, size) for start, size in zip(starts, sizes, strict=True))
    stamp = store.write_stream(folder / "pieces", pieces, whole.schema, "f")
    assert stamp == store.write_part(folder / "whole", whole, "f") == store.stamp_of(folder / "pieces")
    assert store.read_part(folder / "pieces").equals(whole)


def test_small_pieces_share_a_row_group(tmp_path):
    piece = pa.table({"id": [str(number) for number in range(400)]})
    store.write_stream(tmp_path / "part", [piece] * 4, piece.schema, "f")
    found = pq.ParquetFile(tmp_path / "part").metadata
    assert [found.row_group(number).num_rows for number in range(found.num_row_groups)] == [1200, 400]


def test_a_digest_is_the_same_on_every_machine():
    # sha256 of ["prompt",1,"a"], first 16 hex digits
    assert store.digest("prompt", 1, "a") == __import__("hashlib").sha256(b'["prompt",1,"a"]').hexdigest()[:16]
