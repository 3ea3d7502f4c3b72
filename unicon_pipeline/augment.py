"""Random changes of training samples, without torch: nnU-Net's recipe, cheap enough for two cores.

Rotation and scaling are one affine map around the patch's centre, in millimetres, so anisotropic voxels do not shear
the anatomy. It is drawn before anything is read: only the changed samples (about a third) read more than their
patch. The intensity changes are batchgenerators', which draws from the global generators of numpy and of Python:
call `change_intensity` inside `seeded_globals`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from batchgenerators.augmentations.color_augmentations import (
    augment_brightness_multiplicative,
    augment_contrast,
    augment_gamma,
)
from batchgenerators.augmentations.noise_augmentations import augment_gaussian_blur, augment_gaussian_noise
from batchgenerators.augmentations.resample_augmentations import augment_linear_downsampling_scipy
from batchgenerators.augmentations.utils import rotate_coords_3d
from scipy.ndimage import affine_transform

from unicon_pipeline.contract import ZYX, IntensityRule, SpacingZYX

FLAT_PATCH_RATIO = 3.0  # longest over shortest patch edge above which a patch turns in its plane only
PATCH_SCALES = (0.7, 1.4)
# A tumour's size is what a case-level target often depends on, so whole volumes keep their scale nearly.
VOLUME_SCALES = (0.9, 1.1)

ROTATION_PROBABILITY = 0.2
SCALE_PROBABILITY = 0.2
MIRROR_PROBABILITY = 0.5
NOISE_PROBABILITY = 0.1
BLUR_PROBABILITY = 0.2
BRIGHTNESS_PROBABILITY = 0.15
CONTRAST_PROBABILITY = 0.15
LOW_RESOLUTION_PROBABILITY = 0.25
INVERTED_GAMMA_PROBABILITY = 0.1
GAMMA_PROBABILITY = 0.3
CHANNEL_PROBABILITY = 0.5  # of each channel, for blur and low resolution


@dataclass(frozen=True)
class SpatialChange:
    """How a sample is taken from its case.

    `matrix_zyx`: (3, 3), from voxel offsets off the sample's centre to voxel offsets in the case; None: neither
    turned nor scaled. `mirrored_zyx`: which axes are flipped afterwards.
    """

    matrix_zyx: np.ndarray | None
    mirrored_zyx: tuple[bool, bool, bool]

    def reach(self, shape_zyx: ZYX) -> np.ndarray:
        """How far from its centre a sample of this shape reaches into the case, in voxels (z, y, x)."""
        half = (np.array(shape_zyx) - 1) / 2
        return half if self.matrix_zyx is None else np.abs(self.matrix_zyx) @ half


UNCHANGED = SpatialChange(None, (False, False, False))


@dataclass(frozen=True)
class IntensityRecipe:
    """Ranges of the random intensity changes of one modality, on the normalised scale; None: never."""

    noise_deviation: tuple[float, float]
    brightness: tuple[float, float]
    contrast: tuple[float, float] | None
    gamma: tuple[float, float] | None


FULL_RECIPE = IntensityRecipe((0.0, 0.1), (0.75, 1.25), (0.75, 1.25), (0.7, 1.5))
# An SUV must stay an SUV: scanners differ by about a tenth in calibration, and by noise and resolution.
UPTAKE_RECIPE = IntensityRecipe((0.0, 0.05), (0.9, 1.1), None, None)


def recipe_for(rule: IntensityRule) -> IntensityRecipe:
    """Which intensity changes a modality takes."""
    return UPTAKE_RECIPE if rule.unit == "SUV" else FULL_RECIPE


def flat_axis(shape_zyx: ZYX) -> int | None:
    """The short axis of a flat patch, around which alone it may turn; None for a patch that turns freely."""
    return int(np.argmin(shape_zyx)) if max(shape_zyx) / min(shape_zyx) > FLAT_PATCH_RATIO else None


def draw_spatial_change(
    generator: np.random.Generator, shape_zyx: ZYX, spacing_zyx_mm: SpacingZYX, scales: tuple[float, float]
) -> SpatialChange:
    """Draws rotation (30 degrees around each axis; any angle in a flat patch's plane), scale and mirroring."""
    axis = flat_axis(shape_zyx)
    linear = np.eye(3)
    turned = generator.random() < ROTATION_PROBABILITY
    scaled = generator.random() < SCALE_PROBABILITY
    if turned:
        limits = np.full(3, np.pi / 6) if axis is None else np.where(np.arange(3) == axis, np.pi, 0.0)
        linear = rotate_coords_3d(linear, *generator.uniform(-limits, limits))
    if scaled:
        # as likely to shrink as to grow, whatever the lengths of the two ranges
        bounds = (scales[0], 1.0) if generator.random() < 0.5 else (1.0, scales[1])
        scale = np.full(3, generator.uniform(*bounds))
        if axis is not None:
            scale[axis] = 1.0
        linear = linear * scale
    mirrored = tuple(bool(flip) for flip in generator.random(3) < MIRROR_PROBABILITY)
    if not (turned or scaled):
        return SpatialChange(None, mirrored)
    spacing = np.array(spacing_zyx_mm)
    return SpatialChange(linear * spacing / spacing[:, None], mirrored)


def resample(
    array_czyx: np.ndarray, change: SpatialChange, centre_zyx: np.ndarray, shape_zyx: ZYX, fill: Sequence[float]
) -> np.ndarray:
    """The turned and scaled sample, not yet mirrored.

    Args:
        array_czyx: floats are interpolated linearly, integers (labels) by the nearest voxel.
        change: its matrix must not be None.
        centre_zyx: where the sample's centre lies, in voxel indices of `array_czyx`.
        shape_zyx: the sample's shape.
        fill: value of each channel outside of `array_czyx`.
    """
    offset = centre_zyx - change.matrix_zyx @ ((np.array(shape_zyx) - 1) / 2)
    order = 1 if array_czyx.dtype.kind == "f" else 0
    result = np.empty((len(array_czyx), *shape_zyx), array_czyx.dtype)
    for channel, values in enumerate(array_czyx):
        affine_transform(values, change.matrix_zyx, offset, output=result[channel], order=order, cval=fill[channel])
    return result


def mirror(array_czyx: np.ndarray, change: SpatialChange) -> np.ndarray:
    """The sample with its mirrored axes flipped, contiguous."""
    flips = tuple(slice(None, None, -1 if flip else None) for flip in change.mirrored_zyx)
    return np.ascontiguousarray(array_czyx[(slice(None), *flips)])


def change_intensity(image_czyx: np.ndarray, recipes: Sequence[IntensityRecipe | None]) -> None:
    """Changes normalised intensities in place; a channel whose recipe is None (absent) is left alone.

    The order is nnU-Net's, and so is drawing once per sample whether a change happens and per channel how strong.
    Draws from numpy's and Python's global generators.
    """
    channels = [(image_czyx[i : i + 1], recipe) for i, recipe in enumerate(recipes) if recipe is not None]
    axis = flat_axis(image_czyx.shape[1:])
    if np.random.uniform() < NOISE_PROBABILITY:
        for channel, recipe in channels:
            augment_gaussian_noise(channel, recipe.noise_deviation)
    if np.random.uniform() < BLUR_PROBABILITY:
        for channel, _ in channels:
            augment_gaussian_blur(channel, (0.5, 1.0), p_per_channel=CHANNEL_PROBABILITY)
    if np.random.uniform() < BRIGHTNESS_PROBABILITY:
        for channel, recipe in channels:
            augment_brightness_multiplicative(channel, recipe.brightness)
    if np.random.uniform() < CONTRAST_PROBABILITY:
        for channel, recipe in channels:
            if recipe.contrast is not None:
                augment_contrast(channel, recipe.contrast)
    if np.random.uniform() < LOW_RESOLUTION_PROBABILITY:
        for channel, _ in channels:
            # up again linearly: nnU-Net's cubic costs five times as much
            augment_linear_downsampling_scipy(
                channel,
                zoom_range=(0.5, 1.0),
                p_per_channel=CHANNEL_PROBABILITY,
                order_downsample=0,
                order_upsample=1,
                ignore_axes=None if axis is None else (axis,),
            )
    for inverted, probability in ((True, INVERTED_GAMMA_PROBABILITY), (False, GAMMA_PROBABILITY)):
        if np.random.uniform() < probability:
            for channel, recipe in channels:
                if recipe.gamma is not None:
                    channel[:] = augment_gamma(channel, recipe.gamma, inverted, per_channel=True, retain_stats=True)


@contextmanager
def seeded_globals(seed: np.random.SeedSequence) -> Iterator[None]:
    """Seeds numpy's and Python's global generators, and puts their former states back at the end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    words = [int(word) for word in seed.generate_state(8)]
    np.random.seed(words[:4])
    random.seed(sum(word << (32 * i) for i, word in enumerate(words[4:])))
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
