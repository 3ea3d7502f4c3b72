"""Resizing against scikit-image as nnU-Net calls it: seconds, and the largest difference.

    python tests/benchmarks/resampling.py [--pairs 30] [--threads 2]

Random shape pairs, up and down, every third with one axis resampled on its own. Each pair resizes an image (cubic),
logits (linear) and label maps: `anatomy`, connected regions as labels are, and `noise`, where labels meet at every
voxel. Both sides run one after the other on the same arrays, each twice, and the faster run counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from scipy import ndimage

from unicon_pipeline.label_resize import resize_labels
from unicon_pipeline.resize import axis_orders, resize

WHAT = ("image", "logits", "anatomy", "noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    print(f"{'what':8}{'from':>18}{'to':>18}{'axis':>6}{'nnU-Net s':>11}{'ours s':>9}{'ratio':>7}  difference")
    ratios: dict[str, list[float]] = {}
    for pair in range(options.pairs):
        source, target, spacings = _shapes(rng, anisotropic=pair % 3 == 2)
        for what in WHAT:
            ours, theirs, difference = _compare(what, source, target, spacings, rng)
            ratios.setdefault(what, []).append(theirs / ours)
            alone = "own z" if 0 in axis_orders(*spacings, order=3) else ""
            print(
                f"{what:8}{'x'.join(map(str, source)):>18}{'x'.join(map(str, target)):>18}{alone:>6}"
                f"{theirs:>11.2f}{ours:>9.3f}{theirs / ours:>7.1f}  {difference}",
                flush=True,
            )
    for what, values in ratios.items():
        print(f"{what}: n={len(values)}, median {np.median(values):.1f} times faster, slowest {min(values):.1f} times")


def _shapes(rng: np.random.Generator, anisotropic: bool) -> tuple[tuple, tuple, tuple[tuple, tuple]]:
    if anisotropic:
        source = (int(rng.integers(20, 60)), *rng.integers(120, 320, 2).tolist())
        current = (5.0, 1.0, 1.0)
    else:
        source = tuple(rng.integers(60, 220, 3).tolist())
        current = (1.5, 1.2, 1.2)
    scale = rng.uniform(0.5, 1.6, 3)
    target = tuple(max(8, round(size * factor)) for size, factor in zip(source, scale))
    wanted = tuple(spacing * n / m for spacing, n, m in zip(current, source, target))
    return source, target, (current, wanted)


def _compare(
    what: str, source: tuple, target: tuple, spacings: tuple[tuple, tuple], rng: np.random.Generator
) -> tuple[float, float, str]:
    """Seconds of ours and theirs, and how far apart the results are."""
    labels = what in ("anatomy", "noise")
    array = rng.normal(size=(1, *source)).astype(np.float32)
    if what == "anatomy":
        array = ndimage.zoom(rng.normal(size=(1, 8, 8, 8)), (1, *(n / 8 for n in source)), order=3)[:, : source[0]]
    if labels:
        array = np.digitize(array, (0.8, 1.6, 2.2)).astype(np.uint8)
    order = 3 if what == "image" else 1
    orders = axis_orders(*spacings, order=order)
    ours_s, ours = _fastest(
        lambda: resize_labels(array[0], target, orders)[None] if labels else resize(array, target, orders)
    )
    theirs_s, theirs = _fastest(
        lambda: resample_data_or_seg_to_shape(
            array, target, *spacings, is_seg=labels, order=order, order_z=0, force_separate_z=None
        )
    )
    if labels:
        return ours_s, theirs_s, f"{(ours == theirs).mean():.6%} of labels equal"
    return ours_s, theirs_s, f"{np.abs(ours - theirs).max() / np.ptp(array):.1e} of the range"


def _fastest(call: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


if __name__ == "__main__":
    main()
