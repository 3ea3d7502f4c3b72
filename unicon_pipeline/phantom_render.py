"""A phantom scene as voxels: tissues painted one over the other, then a CT and a PET scan of them.

Canvas arrays are z, y, x on the CT's grid; scene coordinates are mm (x left, y back, z head).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import correlate1d
from scipy.special import ive

from unicon_pipeline.contract import ZYX, SpacingZYX
from unicon_pipeline.geometry import Grid, Volume
from unicon_pipeline.phantom_scene import XYZ, Anatomy, Lesion, Scene, generators

ORGANS = {"air": 0, "fat": 1, "muscle": 2, "lung": 3, "bone": 4, "heart": 5, "liver": 6, "other": 7}

# A smaller field of view (z, y, x in mm) shrinks the whole body with it, so that small grids hold a chest too.
_FULL_VIEW_ZYX_MM = (320.0, 300.0, 384.0)
_FWHM_PER_SIGMA = 2.3548
_COUNTS_PER_SUV = 80.0  # per PET voxel: about 8 % noise in the liver


def render(scene: Scene, shape_zyx: ZYX, spacing_zyx_mm: SpacingZYX) -> tuple[Volume, Volume, Volume, Volume]:
    """CT (HU, float32), PET (SUV, float32, own grid), lesions (int16, 1 = lesion) and organs (int16, `ORGANS`)."""
    for_place, for_texture, for_ct, for_pet = generators(scene.seed, "render", 4)
    grid = _ct_grid(shape_zyx, spacing_zyx_mm, for_place)
    canvas = _Canvas(grid, scene.anatomy, for_texture)
    _paint_body(canvas, scene.anatomy)
    _paint_chest(canvas, scene.anatomy, scene.findings, for_texture)
    _paint_organs(canvas, scene.anatomy, scene.findings, for_texture)
    lesions = _paint_lesions(canvas, scene.lesions)
    return (
        Volume(_scan_ct(canvas.hu, scene.anatomy.noise_hu, for_ct), grid),
        scan_pet(canvas.suv, grid, scene.anatomy.fwhm_mm, for_pet),
        Volume(lesions.astype(np.int16), grid),
        Volume(canvas.organs, grid),
    )


def _ct_grid(shape: ZYX, spacing: SpacingZYX, rng: np.random.Generator) -> Grid:
    middle = rng.uniform([-15, -180, -700], [15, -140, -500])
    origin = middle - (np.array(shape[::-1]) - 1) / 2 * np.array(spacing[::-1])
    return Grid(shape, spacing, tuple(np.round(origin, 2).tolist()), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))


class _Canvas:
    """HU, SUV and organ code under a brush; later strokes cover earlier ones, edges are one voxel soft.

    `x`, `y` (y, x plane) and `z` (column) are scene coordinates in mm of every voxel's centre.
    """

    def __init__(self, grid: Grid, body: Anatomy, rng: np.random.Generator) -> None:
        shape, spacing = grid.shape_zyx, np.array(grid.spacing_zyx_mm)
        shrink = np.minimum(1, np.array(shape) * spacing / _FULL_VIEW_ZYX_MM)
        axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing / shrink, strict=True)]
        z, y, x = (axis - shift for axis, shift in zip(axes, body.shift_xyz[::-1], strict=True))
        cos, sin = np.cos(body.turn), np.sin(body.turn)
        self.x = (cos * x[None, :] + sin * y[:, None]).astype(np.float32)
        self.y = (cos * y[:, None] - sin * x[None, :]).astype(np.float32)
        self.z = z.astype(np.float32)[:, None, None]
        self.step_xyz_mm = (spacing / shrink)[::-1]
        self.edge_mm = float(np.prod(self.step_xyz_mm) ** (1 / 3))
        self.axes = axes
        self.hu = np.full(shape, -1000, np.float32)
        self.suv = np.zeros(shape, np.float32)
        self.organs = np.zeros(shape, np.int16)
        self.texture = self.field(rng, 14.0)

    def field(self, rng: np.random.Generator, grain_mm: float) -> np.ndarray:
        """A smooth random field (z, y, x) of about mean 0 and standard deviation 1."""
        weights = []
        for axis in self.axes:
            knots = np.arange(axis[0] - 2 * grain_mm, axis[-1] + 2 * grain_mm + 1, grain_mm)
            bump = np.exp(-0.5 * ((axis[:, None] - knots) / (0.7 * grain_mm)) ** 2)
            weights.append((bump / np.linalg.norm(bump, axis=1, keepdims=True)).astype(np.float32))
        values = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
        for w in weights:  # einsum, not BLAS: its rounding does not depend on the number of threads
            values = np.einsum("abc,na->bcn", values, w)
        return values

    def inside(self, level: np.ndarray, radius_mm: float) -> np.ndarray:
        """Soft membership, 0 to 1, of the body whose surface is `level` = 1."""
        return np.clip(0.5 + (1 - level) * np.float32(radius_mm / self.edge_mm), 0, 1)

    def paint(self, weight: np.ndarray, hu: Any, suv: float, organ: str, where: Any = ...) -> None:
        self.hu[where] += weight * (hu - self.hu[where])
        self.suv[where] += weight * (np.float32(suv) - self.suv[where])
        self.organs[where][weight > 0.5] = ORGANS[organ]

    def ellipsoid(
        self, centre: XYZ, semi: XYZ | np.ndarray, lobes: float = 0.0
    ) -> tuple[tuple[slice, ...], np.ndarray]:
        """Membership of an ellipsoid and the box that holds it; `lobes` dents its surface by the texture."""
        plane = ((self.x - centre[0]) / semi[0]) ** 2 + ((self.y - centre[1]) / semi[1]) ** 2
        column = ((self.z - centre[2]) / semi[2]) ** 2
        limit = (1.3 + 1.5 * self.edge_mm / min(semi)) ** 2
        near = plane < limit
        box = tuple(_span(flags) for flags in (column.ravel() < limit, near.any(axis=1), near.any(axis=0)))
        level = np.sqrt(plane[box[1:]] + column[box[0]])
        if lobes:
            level *= 1 + lobes * np.clip(self.texture[box], -1.5, 1.5)
        return box, self.inside(level, float(np.prod(semi) ** (1 / 3)))


def _span(flags: np.ndarray) -> slice:
    found = np.flatnonzero(flags)
    return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0)


def _paint_body(canvas: _Canvas, body: Anatomy) -> None:
    shoulders = 1 - 0.15 * np.clip((canvas.z - 100) / 60, 0, 1)
    for thickness, hu, suv, organ in ((0.0, -100, 0.3, "fat"), (body.fat, 50, 0.7, "muscle")):
        a, b = body.half_x - thickness, body.half_y - thickness
        plane = (np.abs(canvas.x / a) ** 2.4 + np.abs(canvas.y / b) ** 2.4) ** (1 / 2.4)
        canvas.paint(canvas.inside(plane / shoulders, b), hu + 8 * canvas.texture, suv, organ)
    if body.arms:
        for side in (-1, 1):
            for radius, hu, suv, organ in ((34, -100, 0.3, "fat"), (28, 50, 0.7, "muscle"), (10, 450, 0.9, "bone")):
                box, weight = canvas.ellipsoid((side * (body.half_x + 36), 10, 0), (radius, radius, 1e4))
                canvas.paint(weight, hu, suv, organ, box)


def _paint_chest(canvas: _Canvas, body: Anatomy, findings: dict[str, int], rng: np.random.Generator) -> None:
    """Rib cage, mediastinal fat, lungs with vessels, and what the findings put into them."""
    x, y, z = canvas.x, canvas.y, canvas.z
    cage = np.sqrt((x / body.chest_x) ** 2 + (y / body.chest_y) ** 2 + ((z - 5) / 155) ** 4)
    chest = canvas.inside(cage, body.chest_y)
    canvas.paint(chest, -55 + 30 * canvas.texture, 0.8, "other")
    slanted = np.cos(2 * np.pi * (z + 0.35 * y) / 27) > 0.25
    ribs = np.clip(1.5 - np.abs(cage - 1.09) * body.chest_y / 4, 0, 1) * slanted * (z > -125)
    canvas.paint(ribs, 450 + 60 * canvas.texture, 0.9, "bone")
    middle = canvas.inside(np.sqrt((x / 26) ** 2 + ((y - 12) / (body.chest_y + 12)) ** 2), 26)
    lung = chest * (1 - middle)
    vessels = canvas.texture**2 + canvas.field(rng, 14.0) ** 2
    vessels = np.exp(-vessels / 0.12) * np.exp(-(((np.abs(x) - 30) / 60) ** 2) - (y / 60) ** 2)
    grain = canvas.field(rng, 18.0)
    hu = body.lung_hu + 25 * grain + 0.25 * y
    if findings["emphysema"]:  # holes without any tissue
        hu = np.where(grain > 0.6, -985, hu)
    canvas.paint(lung, hu + 700 * vessels, 0.45, "lung")
    if findings["pleural_effusion"]:
        sides = {0: x < 0, 1: x > 0, 2: x > -1e4}[int(rng.integers(0, 3))]
        level = rng.uniform(2, 24) + 0.35 * (z + 60)
        fluid = lung * sides * np.clip(0.5 + (y - level) / canvas.edge_mm, 0, 1)
        canvas.paint(fluid, 8, 0.6, "other")
    if findings["consolidation"]:
        centre = (rng.choice([-1, 1]) * body.chest_x * 0.6, rng.uniform(-30, 20), rng.uniform(-20, 75))
        semi = rng.uniform([30, 34, 34], [42, 48, 48])
        level = ((x - centre[0]) / semi[0]) ** 2 + ((y - centre[1]) / semi[1]) ** 2 + ((z - centre[2]) / semi[2]) ** 2
        patchy = lung * np.clip((1.2 - level) * 2, 0, 1) * np.clip(0.75 + 0.5 * grain, 0.15, 0.95)
        canvas.paint(patchy, 25, body.consolidation_suv, "other")


def _paint_organs(canvas: _Canvas, body: Anatomy, findings: dict[str, int], rng: np.random.Generator) -> None:
    def stroke(centre: XYZ, semi: XYZ, hu: float, suv: float, organ: str) -> None:
        box, weight = canvas.ellipsoid(centre, semi)
        canvas.paint(weight, hu + 5 * canvas.texture[box], suv, organ, box)

    stroke(*body.stomach_ellipsoid, 44, 1.2, "other")
    stroke(*body.liver_ellipsoid, body.liver_hu, body.liver_suv, "liver")
    stroke(*body.heart_ellipsoid, 45, 1.5, "heart")
    grow = body.heart
    stroke((42.0, -24.0, -50.0), (30 * grow, 27 * grow, 33 * grow), 52, body.heart_suv, "heart")
    stroke((42.0, -24.0, -50.0), (19 * grow, 17 * grow, 22 * grow), 40, 1.5, "heart")
    back = body.chest_y - 20
    stroke((20.0, back - 26, 20.0), (12, 12, 400), 42, 1.5, "other")  # descending aorta
    stroke((8.0, -12.0, 60.0), (14, 20, 32), 42, 1.5, "other")  # great vessels
    stroke((0.0, 8.0, 120.0), (8, 8, 85), -980, 0.2, "air")  # trachea
    stroke((0.0, -body.chest_y - 5, 25.0), (18, 6, 75), 350, 0.9, "bone")  # sternum
    stroke((0.0, back, 0.0), (20, 18, 1e4), 620, 1.0, "bone")  # vertebrae: hard rim, then marrow, then discs
    stroke((0.0, back, 0.0), (15, 13, 1e4), 340, 1.2, "bone")
    stroke((0.0, back + 30, 0.0), (6, 9, 1e4), 480, 0.9, "bone")
    stroke((0.0, back + 20, 0.0), (8, 7, 1e4), 30, 0.8, "other")
    phase = rng.uniform(0, 2 * np.pi)
    box, weight = canvas.ellipsoid((0.0, back, 0.0), (19, 17, 1e4))
    discs = weight * (np.cos(2 * np.pi * canvas.z[box[0]] / 29 + phase) < -0.85)
    canvas.paint(discs, 90, 0.7, "other", box)
    if findings["bone_lesion"]:  # sclerotic and benign: no uptake, not a labelled lesion
        stroke((rng.uniform(-4, 4), back, rng.uniform(-70, 90)), (14, 13, 13), rng.uniform(950, 1100), 0.8, "bone")


def _paint_lesions(canvas: _Canvas, lesions: tuple[Lesion, ...]) -> np.ndarray:
    mask = np.zeros(canvas.hu.shape, bool)
    for lesion in lesions:
        # At least two voxels across, so that no lesion falls between the voxels of a coarse grid.
        semi = np.maximum(lesion.semi_xyz_mm, 1.05 * canvas.step_xyz_mm)
        box, weight = canvas.ellipsoid(lesion.centre_xyz, semi, lobes=0.12)
        canvas.paint(weight, lesion.hu + 6 * canvas.texture[box], lesion.suv, "other", box)
        mask[box] |= weight >= 0.5
    return mask


def _scan_ct(hu: np.ndarray, noise_hu: float, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    for axis in (1, 2):  # reconstruction correlates the noise within a slice; the root keeps its size
        noise = correlate1d(noise, np.array([0.25, 0.5, 0.25]) / np.sqrt(0.375), axis=axis, mode="wrap")
    return np.clip(np.rint(hu + np.float32(noise_hu) * noise), -1024, 3071)


def scan_pet(activity_zyx: np.ndarray, grid: Grid, fwhm_mm: float, rng: np.random.Generator) -> Volume:
    """A PET scan of an activity map: blurred, on the scanner's own grid, with counting noise.

    Args:
        activity_zyx: SUV on `grid` (the CT's).
        fwhm_mm: width of the image of a point source; grids coarser than it are as sharp as they can be.

    Returns:
        SUV in float32, voxels of at least 4 mm in plane, shifted origin and other slice thickness than `grid`.
    """
    slice_mm, pixel_mm = float(rng.choice([3.27, 4.25])), float(rng.choice([4.07, 4.69, 5.31]))
    z_mm, y_mm, x_mm = grid.spacing_zyx_mm
    pixel_mm = round(max(pixel_mm, 1.15 * max(y_mm, x_mm)), 3)
    spacing = (round(max(slice_mm, 0.83 * z_mm), 3), pixel_mm, pixel_mm)
    image, shape, origin_zyx = activity_zyx.astype(np.float32), [], []
    for axis, (step, own_step) in enumerate(zip(grid.spacing_zyx_mm, spacing, strict=True)):
        n_in, start = image.shape[axis], float(rng.uniform(-0.8, 0.8)) * own_step
        n_out = int(np.ceil(n_in * step / own_step))
        # Linear interpolation below widens a point by step^2 / 6 on average; the blur is smaller by that much.
        variance = max((fwhm_mm / _FWHM_PER_SIGMA) ** 2 - step**2 / 6, 0.0) / step**2
        reach = int(np.ceil(4 * np.sqrt(variance))) + 1
        kernel = ive(np.arange(-reach, reach + 1), variance)  # discrete Gaussian: its variance is exact on any grid
        image = correlate1d(image, kernel / kernel.sum(), axis=axis, mode="nearest")
        position = np.clip((start + np.arange(n_out) * own_step) / step, 0, n_in - 1)
        low = np.minimum(position.astype(int), n_in - 2)
        share = (position - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
        image = image.take(low, axis) * (1 - share) + image.take(low + 1, axis) * share
        shape.append(n_out)
        origin_zyx.append(round(grid.origin_xyz_mm[2 - axis] + start, 2))
    counts = rng.poisson((image + 0.01) * _COUNTS_PER_SUV)
    suv = (counts / _COUNTS_PER_SUV).astype(np.float32)
    return Volume(suv, Grid(tuple(shape), spacing, tuple(origin_zyx[::-1]), grid.direction))
