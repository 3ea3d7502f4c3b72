"""Reading random patches: our store against nnU-Net's (blosc2 too, with its own chunks, blocks and compression).

    python tests/benchmarks/store_reading.py [--preprocessed FOLDER] [--cases 3] [--patches 100]

Both sides store the same arrays and read the same patches of image and labels, one thread, in turns, as their data
loaders do: nnU-Net's opens the case anew for each patch, ours keeps it open. `cut` is the reading alone, without
opening, in ms. FOLDER holds cases that nnU-Net has preprocessed
(`<case>.b2nd`, `<case>_seg.b2nd`); without it, cases of CT and PET are made: 2 x 200 x 300 x 300, smooth shapes with
noise, once quantised as an image that keeps its spacing is, once interpolated as a resampled one is.

`decompressed` counts the bytes of all blocks that a patch touches, from the shapes; a patch itself has `patch` bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from scipy import ndimage

from unicon_pipeline import store

PATCHES = ((32, 96, 96), (64, 128, 128), (56, 192, 192))
META = {"present": ["CT", "PET"], "foreground": {}}

Place = tuple[slice, ...]
Open = Callable[[str], tuple[blosc2.NDArray, blosc2.NDArray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preprocessed", type=Path)
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--patches", type=int, default=100)
    options = parser.parse_args()
    print(f"{'arrays':12}{'patch':>12}{'':>9}{'patches/s':>11}{'cut ms':>8}{'decompressed MB':>17}{'stored MB':>11}")
    ratios = []
    for name, cases in _all_cases(options.preprocessed, options.cases):
        for patch in PATCHES:
            if all(size >= edge for array, _ in cases for size, edge in zip(array.shape[1:], patch)):
                ratios.append(_compare(name, cases, patch, options.patches))
    print(f"patches per second, ours / nnU-Net's: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


def _all_cases(folder: Path | None, count: int) -> Iterator[tuple[str, list[tuple[np.ndarray, np.ndarray]]]]:
    if folder is None:
        yield "kept", [_made(seed, resampled=False) for seed in range(count)]
        yield "resampled", [_made(seed, resampled=True) for seed in range(count)]
        return
    labels = sorted(folder.glob("*_seg.b2nd"))[:count]
    images = [path.with_name(path.name.replace("_seg.b2nd", ".b2nd")) for path in labels]
    yield (
        folder.parent.name[:11],
        [
            (blosc2.open(str(image))[...], np.maximum(blosc2.open(str(label))[0], 0))
            for image, label in zip(images, labels)
        ],
    )


def _made(seed: int, resampled: bool) -> tuple[np.ndarray, np.ndarray]:
    """CT and PET, normalised, and labels; quantised as their files are, then interpolated where resampled."""
    rng = np.random.default_rng(seed)
    shape = (200, 240, 240) if resampled else (200, 300, 300)
    coarse = ndimage.zoom(rng.normal(size=(2, 10, 12, 12)), (1, *(size / n for size, n in zip(shape, (10, 12, 12)))))
    ct = np.rint(300 * coarse[0] + 15 * rng.normal(size=shape)).clip(-1000, 1000) / 300
    pet = np.rint(2000 * np.maximum(coarse[1] + 0.05 * rng.normal(size=shape), 0)) / 2000
    array, labels = np.stack([ct, pet]).astype(np.float32), (coarse[1] > 1.2).astype(np.int16)
    if resampled:
        array, labels = ndimage.zoom(array, (1, 1, 1.25, 1.25), order=3), ndimage.zoom(labels, (1, 1.25, 1.25), order=0)
    return array, labels


def _compare(name: str, cases: list[tuple[np.ndarray, np.ndarray]], patch: tuple[int, int, int], count: int) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, (array, labels) in enumerate(cases):
            _store_both(folder, f"case{number}", array, labels, patch)
        places = list(_places(cases, patch, count))
        sides = {"ours": _ours(folder / "ours"), "nnU-Net": _theirs(folder / "theirs")}
        seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for case_id, place in places:  # in turns, so that whatever else the machine does slows both
            patches = []
            for side, opened in sides.items():
                started = time.perf_counter()
                arrays = opened(case_id)
                middle = time.perf_counter()
                patches.append([array[(Ellipsis, *place)] for array in arrays])
                ended = time.perf_counter()
                seconds[side].append((ended - started, ended - middle))
            for one, other in zip(*patches):
                np.testing.assert_array_equal(one, other.reshape(one.shape))
        medians = {side: np.median(values, axis=0) for side, values in seconds.items()}
        for side, files in (("ours", "ours"), ("nnU-Net", "theirs")):
            paths = sorted((folder / files).rglob("*.b2nd"))
            touched = _decompressed(paths, places)
            size = sum(path.stat().st_size for path in paths)
            print(
                f"{name:12}{'x'.join(map(str, patch)):>12}{side:>9}{1 / medians[side][0]:>11.0f}"
                f"{1e3 * medians[side][1]:>8.2f}{touched / 1e6:>17.2f}{size / 1e6:>11.0f}"
            )
    voxels = int(np.prod(patch))
    print(f"{'':12}{'':>12}{'patch':>9}{'':>19}{voxels * (4 * len(cases[0][0]) + 1) / 1e6:>17.2f}")
    return float(medians["nnU-Net"][0] / medians["ours"][0])


def _store_both(folder: Path, case_id: str, array: np.ndarray, labels: np.ndarray, patch: tuple[int, int, int]) -> None:
    store.write_case(folder / "ours", case_id, array, labels, META, patch)
    (folder / "theirs").mkdir(exist_ok=True)
    segmentation = labels[None].astype(np.int16)  # as its preprocessor stores it
    blocks, chunks = comp_blosc2_params(array.shape, patch, array.itemsize)
    label_blocks, label_chunks = comp_blosc2_params(segmentation.shape, patch, segmentation.itemsize)
    nnUNetDatasetBlosc2.save_case(
        array, segmentation, {}, str(folder / "theirs" / case_id),
        chunks=chunks, blocks=blocks, chunks_seg=label_chunks, blocks_seg=label_blocks,
    )  # fmt: skip


def _places(
    cases: list[tuple[np.ndarray, np.ndarray]], patch: tuple[int, int, int], count: int
) -> Iterator[tuple[str, Place]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        number = int(rng.integers(len(cases)))
        starts = [int(rng.integers(size - edge + 1)) for size, edge in zip(cases[number][0].shape[1:], patch)]
        yield f"case{number}", tuple(slice(start, start + edge) for start, edge in zip(starts, patch))


def _ours(folder: Path) -> Open:
    cases = {case_id: store.open_case(folder, case_id) for case_id in store.stored_case_ids(folder)}
    return lambda case_id: (cases[case_id].array, cases[case_id].labels)


def _theirs(folder: Path) -> Open:
    dataset = nnUNetDatasetBlosc2(str(folder))
    return lambda case_id: dataset.load_case(case_id)[:2]


def _decompressed(paths: list[Path], places: list[tuple[str, Place]]) -> float:
    """Mean bytes of the blocks that a patch touches, image and labels together."""
    layouts = {path: _layout(path) for path in paths}
    total = 0
    for case_id, place in places:
        for path, (shape, chunks, blocks, itemsize) in layouts.items():
            if case_id in path.relative_to(path.parents[1]).as_posix().replace("_seg", ""):
                full = (*(slice(0, size) for size in shape[:-3]), *place)
                edges = [_touched(*axis) for axis in zip(full, shape, chunks, blocks)]
                total += itemsize * int(np.prod(edges))
    return total / len(places)


def _layout(path: Path) -> tuple[tuple, tuple, tuple, int]:
    array = blosc2.open(str(path))
    return array.shape, array.chunks, array.blocks, array.dtype.itemsize


def _touched(place: slice, size: int, chunk: int, block: int) -> int:
    """Elements along one axis in blocks that overlap `place`; the blocks start anew with each chunk."""
    total = 0
    for start in range(0, size, chunk):
        for low in range(start, min(start + chunk, size), block):
            high = min(low + block, start + chunk)
            total += (high - low) * (low < place.stop and high > place.start)
    return total


if __name__ == "__main__":
    main()
