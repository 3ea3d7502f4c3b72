"""What is in a phantom: one body, its lesions, findings and survival, as numbers without any grid.

Coordinates are patient axes in mm around the body's centre: x to the left, y to the back, z to the head (LPS).

What can be learnt, on purpose: lesions are labelled; some are nearly iso-dense on CT and need PET, some
take up no tracer and need CT, and myocardium, liver and consolidation are warm without being lesions.
The hazard rises with lesion volume, uptake, age and stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

XYZ = tuple[float, float, float]

PREVALENCE = {  # of each finding; 25 to 50 %, so that small cohorts hold both answers
    "nodule": 0.45, "mass": 0.4, "pleural_effusion": 0.35, "consolidation": 0.35,
    "cardiomegaly": 0.4, "emphysema": 0.35, "bone_lesion": 0.35,
}  # fmt: skip
_STAGE_EFFECT = {"I": -0.8, "II": -0.2, "III": 0.3, "IV": 1.0}
_TIME_SCALE_DAYS, _WEIBULL_SHAPE, _CENSORING_MEAN_DAYS, _STUDY_DAYS = 900.0, 1.3, 1500.0, 1825.0


@dataclass(frozen=True)
class Lesion:
    """An ellipsoid with a lobulated surface: `centre_xyz` and `semi_xyz_mm` in mm, `hu` on CT, `suv` on PET."""

    site: str
    centre_xyz: XYZ
    semi_xyz_mm: XYZ
    hu: float
    suv: float

    @property
    def volume_ml(self) -> float:
        return 4 / 3 * float(np.pi * np.prod(self.semi_xyz_mm)) / 1000


@dataclass(frozen=True)
class Anatomy:
    """One body: half axes and thicknesses in mm, densities in HU, uptake in SUV."""

    half_x: float
    half_y: float
    fat: float
    chest_x: float  # half axes of the rib cage
    chest_y: float
    heart: float  # 1.0 is a normal heart
    arms: bool
    turn: float  # radians around z
    shift_xyz: XYZ
    lung_hu: float
    liver_hu: float
    liver_suv: float
    heart_suv: float  # of the left ventricle's wall
    consolidation_suv: float
    noise_hu: float
    fwhm_mm: float  # of the PET

    @property
    def heart_ellipsoid(self) -> tuple[XYZ, XYZ]:
        grow = self.heart
        return (30.0, -28.0, -45.0), (50 * grow, 41 * grow, 45 * grow)

    @property
    def liver_ellipsoid(self) -> tuple[XYZ, XYZ]:
        return (-52.0, 0.0, -138.0), (self.chest_x - 40, self.chest_y - 2, 74.0)

    @property
    def stomach_ellipsoid(self) -> tuple[XYZ, XYZ]:
        return (72.0, 10.0, -142.0), (56.0, self.chest_y - 14, 60.0)


@dataclass(frozen=True)
class Scene:
    """Everything about a phantom but its voxels; `log_hazard` is the oracle that drew `time_days`."""

    seed: int
    anatomy: Anatomy
    lesions: tuple[Lesion, ...]
    findings: dict[str, int]
    clinical: dict[str, float | str | None]
    time_days: float
    event: int
    log_hazard: float


def draw_scene(seed: int) -> Scene:
    """Draws body, findings, lesions and survival. Fast (no voxels), so whole cohorts can be drawn."""
    for_body, for_lesions, for_outcome = generators(seed, "scene", 3)
    findings = {name: int(for_body.random() < p) for name, p in PREVALENCE.items()}
    anatomy = _draw_anatomy(for_body, findings)
    lesions = _draw_lesions(for_lesions, anatomy, findings)
    return Scene(int(seed), anatomy, lesions, findings, **_draw_outcome(for_outcome, lesions))


def generators(seed: int, purpose: str, count: int) -> list[np.random.Generator]:
    """Independent random streams of one purpose; adding one never changes the others."""
    root = np.random.SeedSequence([int(seed), *purpose.encode()])
    return [np.random.default_rng(child) for child in root.spawn(count)]


def _draw_anatomy(rng: np.random.Generator, findings: dict[str, int]) -> Anatomy:
    arms = bool(rng.random() < 0.25)
    half_x = rng.uniform(138, 148) if arms else rng.uniform(145, 172)
    half_y, fat = rng.uniform(102, 120), rng.uniform(8, 18)
    return Anatomy(
        half_x=half_x, half_y=half_y, fat=fat, chest_x=half_x - fat - rng.uniform(14, 20),
        chest_y=half_y - fat - rng.uniform(14, 20), arms=arms,
        heart=rng.uniform(1.25, 1.4) if findings["cardiomegaly"] else rng.uniform(0.88, 1.04),
        turn=np.deg2rad(rng.uniform(-5, 5)),
        shift_xyz=(rng.uniform(-9, 9), rng.uniform(-9, 9), rng.uniform(-12, 12)),
        lung_hu=rng.uniform(-935, -915) if findings["emphysema"] else rng.uniform(-870, -835),
        liver_hu=rng.uniform(54, 66), liver_suv=rng.uniform(2.1, 2.9),
        heart_suv=rng.uniform(3, 8) if rng.random() < 0.5 else rng.uniform(1.4, 2),
        consolidation_suv=rng.uniform(1.5, 2.6), noise_hu=rng.uniform(10, 20), fwhm_mm=rng.uniform(5.3, 6.7),
    )  # fmt: skip


def _draw_lesions(rng: np.random.Generator, body: Anatomy, findings: dict[str, int]) -> tuple[Lesion, ...]:
    """One to four lesions: nodules and a mass where those findings say so, and hidden ones elsewhere."""
    wanted: list[tuple[str, float]] = []
    if findings["mass"]:
        wanted.append((str(rng.choice(["lung", "mediastinum"])), rng.uniform(32, 40)))
    if findings["nodule"]:
        wanted += [("lung", rng.uniform(8, 24)) for _ in range(rng.integers(1, 3))]
    hidden = max(int(rng.integers(0, 3)), 0 if wanted else 1)
    for _ in range(min(hidden, 4 - len(wanted))):
        site = str(rng.choice(["mediastinum", "liver", "chest_wall"]))
        wanted.append((site, rng.uniform(12, 24 if site == "chest_wall" else 28)))
    lesions: list[Lesion] = []
    for site, diameter in wanted:
        lesions.append(_draw_lesion(rng, body, site, diameter, lesions))
    return tuple(lesions)


def _draw_lesion(
    rng: np.random.Generator, body: Anatomy, site: str, diameter: float, others: Sequence[Lesion]
) -> Lesion:
    stretch = np.exp(rng.uniform(-0.15, 0.15, 3))
    semi = diameter / 2 * stretch / np.prod(stretch) ** (1 / 3)
    for _ in range(200):  # a crowded chest may leave no room; the last place is then taken as it is
        centre = _draw_place(rng, body, site)
        apart = all(np.linalg.norm(centre - other.centre_xyz) > diameter / 2 + 26 for other in others)
        if apart and _has_room(centre, diameter / 2, body, site):
            break
    # Cold lesions need CT, so they are drawn only where CT shows them.
    cold = rng.random() < {"lung": 0.2, "liver": 0.3}.get(site, 0.0)
    hu = {"lung": rng.uniform(15, 55), "mediastinum": rng.uniform(38, 54), "chest_wall": rng.uniform(44, 58),
          "liver": rng.uniform(5, 20) if cold else body.liver_hu + rng.uniform(-10, 0)}[site]  # fmt: skip
    suv = rng.uniform(0.7, 1.5) if cold else float(np.exp(rng.uniform(np.log(4.5), np.log(20))))
    return Lesion(site, tuple(centre.tolist()), tuple(semi.tolist()), float(hu), float(suv))


def _draw_place(rng: np.random.Generator, body: Anatomy, site: str) -> np.ndarray:
    if site == "lung":
        side = rng.choice([-1, 1])
        return np.array([side * rng.uniform(35, body.chest_x - 12), rng.uniform(-60, 60), rng.uniform(-75, 115)])
    if site == "mediastinum":
        return rng.uniform([-16, -40, 15], [16, 22, 95])
    if site == "liver":
        centre, semi = body.liver_ellipsoid
        return centre + rng.uniform([-0.5, -0.5, 0.15], [0.5, 0.5, 0.6]) * semi
    angle = rng.choice([0, np.pi]) + rng.uniform(-1.1, 1.1)
    x, y = (body.half_x - body.fat - 11) * np.cos(angle), (body.half_y - body.fat - 11) * np.sin(angle)
    return np.array([x, y, rng.uniform(-60, 80)])


def _has_room(centre: np.ndarray, radius: float, body: Anatomy, site: str) -> bool:
    def outside(ellipsoid: tuple[XYZ, XYZ], margin: float) -> bool:
        return bool(np.sum(((centre - ellipsoid[0]) / (np.array(ellipsoid[1]) + margin)) ** 2) > 1)

    if site == "mediastinum":
        return outside(body.heart_ellipsoid, radius * 0.5)
    if site != "lung":
        return True
    x, y, z = centre
    inside_chest = (x / (body.chest_x - radius)) ** 2 + (y / (body.chest_y - radius)) ** 2 + (z / 150) ** 4 < 1
    organs = (body.heart_ellipsoid, body.liver_ellipsoid, body.stomach_ellipsoid)
    clear = abs(x) > 24 + radius and all(outside(organ, radius) for organ in organs)
    return bool(inside_chest and clear)


def _draw_outcome(rng: np.random.Generator, lesions: Sequence[Lesion]) -> dict[str, Any]:
    volume, peak = sum(lesion.volume_ml for lesion in lesions), max(lesion.suv for lesion in lesions)
    age, weight = float(round(np.clip(rng.normal(64, 10), 30, 90))), float(round(rng.normal(75, 13), 1))
    male, stage = rng.random() < 0.55, str(rng.choice(list(_STAGE_EFFECT), p=[0.2, 0.3, 0.3, 0.2]))
    log_hazard = 0.75 * np.log(volume / 10) + 0.8 * np.log(peak / 10) + 0.04 * (age - 64) + 0.4 * (male - 0.55)
    log_hazard += _STAGE_EFFECT[stage]
    waiting = _TIME_SCALE_DAYS * (rng.exponential() * np.exp(-log_hazard)) ** (1 / _WEIBULL_SHAPE)
    censored = min(rng.exponential(_CENSORING_MEAN_DAYS), _STUDY_DAYS)
    gap = rng.random(3) < (0.05, 0.1, 0.15)
    clinical = {
        "age": None if gap[0] else age,
        "sex": "M" if male else "F",
        "stage": None if gap[1] else stage,
        "weight_kg": None if gap[2] else weight,
    }
    return {
        "clinical": clinical,
        "time_days": float(max(1, round(min(waiting, censored)))),
        "event": int(waiting <= censored),
        "log_hazard": float(log_hazard),
    }
