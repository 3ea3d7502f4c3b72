"""Stored cases: what is written is read, in part, and an unfinished or damaged case is never taken for a good one."""

import json
import multiprocessing
import os
import signal
import sys
import time

import numpy as np
import pytest

from unicon_pipeline import store
from unicon_pipeline.errors import DatasetError

META = {"present": ["CT"], "foreground": {"lesion": [[1, 2, 3]]}}
PATCH = (8, 16, 16)


def make(seed=0, shape=(2, 20, 40, 44), largest=3):
    generator = np.random.default_rng(seed)
    array = generator.normal(size=shape).astype(np.float32)
    return array, generator.integers(0, largest + 1, size=shape[1:]).astype(np.int16)


def test_round_trip_whole_and_in_part(tmp_path):
    array, labels = make()
    store.write_case(tmp_path / "with a space", "a.b-c+1", array, labels, META, PATCH)
    case = store.open_case(tmp_path / "with a space", "a.b-c+1")
    np.testing.assert_array_equal(case.array[...], array)
    np.testing.assert_array_equal(case.labels[...], labels)
    np.testing.assert_array_equal(case.array[:, 3:11, 7:23, 20:36], array[:, 3:11, 7:23, 20:36])
    np.testing.assert_array_equal(case.labels[3:11, 7:23, 20:36], labels[3:11, 7:23, 20:36])
    assert case.present == ("CT",) and case.foreground == {"lesion": [[1, 2, 3]]}
    assert store.stored_case_ids(tmp_path / "with a space") == ("a.b-c+1",)


def test_no_labels_and_replacing_a_case_that_had_some(tmp_path):
    array, labels = make()
    store.write_case(tmp_path, "a", array, labels, META)
    store.write_case(tmp_path, "a", array[:1] + 1, None, META)
    case = store.open_case(tmp_path, "a")
    assert case.labels is None
    np.testing.assert_array_equal(case.array[...], array[:1] + 1)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["image.b2nd", "meta.json"]


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.int16), (40000, np.int32)])
def test_labels_take_the_smallest_type_that_holds_them(tmp_path, largest, dtype):
    array = np.zeros((1, 2, 3, 4), np.float32)
    labels = np.zeros((2, 3, 4), np.int32)
    labels[1, 2, 3] = largest
    store.write_case(tmp_path, "a", array, labels, META)
    stored = store.open_case(tmp_path, "a").labels
    assert stored.dtype == dtype and stored[1, 2, 3] == largest


def test_arrays_are_read_only(tmp_path):
    array, labels = make()
    store.write_case(tmp_path, "a", array, labels, META)
    with pytest.raises((ValueError, RuntimeError)):
        store.open_case(tmp_path, "a").array[0, 0, 0, 0] = 1.0


def test_a_patch_is_read_without_the_rest_of_the_file(tmp_path):
    array, _ = make(shape=(1, 64, 64, 64))
    store.write_case(tmp_path, "a", array, None, META, (16, 16, 16))
    path = tmp_path / "a" / store.IMAGE_FILE
    content = bytearray(path.read_bytes())
    # Chunks lie in order, so the second half of the file is the far half of the image.
    start, stop = len(content) // 2, len(content) - 2000
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    case = store.open_case(tmp_path, "a")
    np.testing.assert_array_equal(case.array[:, 5:21, 30:46, 9:25], array[:, 5:21, 30:46, 9:25])
    assert not store.is_sound(tmp_path, "a")


@pytest.mark.parametrize("shape", [(2, 60, 141, 139), (59, 200, 200), (1, 3, 500, 500), (1, 1, 1, 1), (900, 700, 700)])
@pytest.mark.parametrize("patch", [(32, 96, 96), (7, 33, 65), (400, 512, 512)])
def test_blocks_keep_a_random_patch_cheap(shape, patch):
    chunks, blocks = store.chunks_and_blocks(shape, patch, 4)
    assert len(chunks) == len(blocks) == len(shape) and set(chunks[:-3]) <= {1}
    touched = 1.0
    for size, edge, chunk, block in zip(shape[-3:], patch, chunks[-3:], blocks[-3:], strict=True):
        edge = min(edge, size)
        assert 1 <= block <= chunk <= size and block <= -(-edge // 4)
        touched *= min((edge + 2 * (block - 1)) / edge, size / edge)  # the worst place
    assert touched <= 1.5**3
    assert 4 * np.prod(chunks) <= store.MAX_CHUNK_BYTES


def test_a_case_larger_than_one_chunk_may_be_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_CHUNK_BYTES", 10_000)
    array, labels = make(shape=(1, 40, 41, 43))
    store.write_case(tmp_path, "a", array, labels, META, (64, 64, 64))
    case = store.open_case(tmp_path, "a")
    assert 4 * np.prod(case.array.chunks) <= 10_000
    np.testing.assert_array_equal(case.array[...], array)


@pytest.mark.parametrize("failing", [store.IMAGE_FILE, store.LABELS_FILE, store.META_FILE])
def test_an_interrupted_write_leaves_no_visible_case(tmp_path, monkeypatch, failing):
    array, labels = make()
    store.write_case(tmp_path, "a", array, labels, META)
    replace = os.replace

    def fail(source, destination):
        if os.path.basename(destination) == failing:
            raise OSError(28, "No space left on device")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DatasetError, match="No space left.*run again"):
        store.write_case(tmp_path, "a", array + 1, labels, META)
    assert store.stored_case_ids(tmp_path) == ()
    assert not list(tmp_path.rglob("*.partial.*"))
    with pytest.raises(DatasetError, match="no complete preprocessed case"):
        store.open_case(tmp_path, "a")
    monkeypatch.undo()
    store.write_case(tmp_path, "a", array + 1, labels, META)
    np.testing.assert_array_equal(store.open_case(tmp_path, "a").array[...], array + 1)


SMALL, LARGE = (1, 20, 30, 40), (1, 65, 256, 256)  # blosc2 writes what is below 16 MiB in another way


@pytest.mark.parametrize(("shape", "written"), [(SMALL, 0.0), (SMALL, 0.5), (SMALL, 0.999), (LARGE, 0.999)])
def test_a_full_disk_is_one_clear_error(tmp_path, shape, written):
    """A limit on the size of files stands for the disk's end."""
    resource = pytest.importorskip("resource")
    array, labels = make(shape=shape)
    store.write_case(tmp_path, "a", array, labels, META, (32, 96, 96))
    size = (tmp_path / "a" / store.IMAGE_FILE).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * written), limits[1]))
    try:
        with pytest.raises(DatasetError, match="case a cannot be written.*MB are free.*run again"):
            store.write_case(tmp_path, "a", array, labels, META, (32, 96, 96))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.stored_case_ids(tmp_path) == () and not list(tmp_path.rglob("*.partial.*"))
    store.write_case(tmp_path, "a", array, labels, META, (32, 96, 96))
    assert store.is_sound(tmp_path, "a")


def test_the_same_case_gives_the_same_bytes(tmp_path):
    array, labels = make(shape=LARGE)
    for case_id in ("a", "b"):
        store.write_case(tmp_path, case_id, array, labels, META, (32, 96, 96))
    for name in (store.IMAGE_FILE, store.LABELS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_writing_needs_no_second_copy_of_the_case(tmp_path):
    """In a process of its own, whose largest memory is compared before and after."""
    resource = pytest.importorskip("resource")
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_write_large, args=(tmp_path, queue))
    process.start()
    process.join()
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource and queue.get() * unit < 40 << 20


def _write_large(folder, queue):
    import resource

    array = np.random.default_rng(0).normal(size=(1, 64, 512, 512)).astype(np.float32)  # 67 MB, hardly compressible
    store.write_case(folder, "small", array[:, :8, :64, :64], None, META, (32, 96, 96))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store.write_case(folder, "a", array, None, META, (32, 96, 96))
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _write_for_ever(folder):
    array, labels = make()
    for number in range(10_000):
        store.write_case(folder, "a", array + number, labels, META, PATCH)


def test_a_killed_writer_leaves_a_whole_case_or_none(tmp_path):
    context = multiprocessing.get_context("spawn")
    for attempt in range(3):
        process = context.Process(target=_write_for_ever, args=(tmp_path,))
        process.start()
        deadline = time.monotonic() + 15
        while not store.stored_case_ids(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if store.stored_case_ids(tmp_path):
            assert store.is_sound(tmp_path, "a")
            array = store.open_case(tmp_path, "a").array[...]
            np.testing.assert_allclose(array - make()[0], array[0, 0, 0, 0] - make()[0][0, 0, 0, 0], atol=1e-3)
        store.forget_case(tmp_path, "a")
        assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_swept(tmp_path):
    array, labels = make()
    store.write_case(tmp_path, "a", array, labels, META)
    (tmp_path / "b").mkdir()
    for leftover in (tmp_path / "a" / ".12.partial.image.b2nd", tmp_path / "b" / ".12.partial.image.b2nd"):
        leftover.write_bytes(b"half")
    store.sweep_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not list(tmp_path.rglob("*.partial.*")) and store.is_sound(tmp_path, "a")
    store.sweep_unfinished(tmp_path / "nothing here")


def test_damage_is_found(tmp_path):
    array, labels = make()
    for name in (store.IMAGE_FILE, store.LABELS_FILE):
        store.write_case(tmp_path, "a", array, labels, META)
        assert store.is_sound(tmp_path, "a")
        path = tmp_path / "a" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert not store.is_sound(tmp_path, "a")
        path.write_bytes(content[:-5])
        with pytest.raises(DatasetError, match=f"{name} has .* bytes"):
            store.open_case(tmp_path, "a")
        path.unlink()
        assert not store.is_sound(tmp_path, "a")
        with pytest.raises(DatasetError, match=f"{name} is missing"):
            store.open_case(tmp_path, "a")


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 99},
        {"case_id": "b"},
        {"stored": {"../../secret": {"bytes": 1, "crc32": 0}}},
        {"stored": {}},
        {"shape_czyx": [1]},
        {"present": None},
    ],
)
def test_a_foreign_meta_file_is_refused(tmp_path, change):
    array, labels = make()
    store.write_case(tmp_path, "a", array, labels, META)
    path = tmp_path / "a" / store.META_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DatasetError, match="meta.json"):
        store.open_case(tmp_path, "a")
    assert not store.is_sound(tmp_path, "a")


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".hidden", "..", "a\\b", "a\n"])
def test_a_name_cannot_leave_the_folder(tmp_path, name):
    array, labels = make()
    for action in (
        lambda: store.write_case(tmp_path / "cases", name, array, labels, META),
        lambda: store.open_case(tmp_path / "cases", name),
        lambda: store.forget_case(tmp_path / "cases", name),
    ):
        with pytest.raises(DatasetError, match="folder name"):
            action()
    assert not list(tmp_path.iterdir())


def test_arrays_that_do_not_belong_together_are_refused(tmp_path):
    array, labels = make()
    for bad_array, bad_labels, meta, match in (
        (array, labels[1:], META, "labels have shape"),
        (array[0], None, META, "channel, z, y, x"),
        (array, labels - 1, META, "not negative"),
        (array, labels.astype(np.float32), META, "integers"),
        (array, labels, {"present": []}, "foreground"),
    ):
        with pytest.raises(DatasetError, match=match):
            store.write_case(tmp_path, "a", bad_array, bad_labels, meta)
    assert store.stored_case_ids(tmp_path) == ()
