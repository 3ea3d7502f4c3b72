"""PET activity (Bq/ml) to standardised uptake values by body weight (SUVbw).

SUV = activity x body weight in g / (injected dose x 2^(-delay / half-life)): the concentration relative to the dose
spread evenly over a body of 1 g/ml. As in the QIBA profile for FDG-PET/CT and its vendor-neutral pseudo-code for DICOM
files whose DecayCorrection is START; where it is ADMIN, the image is already corrected to the injection: delay 0.
"""

from __future__ import annotations

import math

from unicon_pipeline.errors import DatasetError

_MOST_HALF_LIVES = 10.0
# What is plausible, and what to think of otherwise. From preterm babies to the heaviest patients; from a trace to
# water and rubidium in the heart; from rubidium (76 s) to iodine-124 (4.2 days).
_RANGES = {
    "body weight": (0.5, 500.0, "kg", "Was it given in g or pounds?"),
    "dose": (1e6, 1e10, "Bq", "Was it given in MBq (1 MBq = 1e6 Bq) or mCi (1 mCi = 3.7e7 Bq)?"),
    "half-life": (60.0, 1e6, "s", "Was it given in minutes or hours? Fluorine-18 has 6586 s (109.77 min)."),
}


def suv_factor(weight_kg: float, dose_bq: float, half_life_s: float, seconds_to_scan: float) -> float:
    """What turns Bq/ml into SUVbw.

    Args:
        dose_bq: injected activity at the time of injection, less what stayed in the syringe.
        seconds_to_scan: from injection to the time that the image is decay-corrected to (mostly the scan's start).

    Raises:
        DatasetError: a value is not plausible in its unit, or the scan is before the injection.
    """
    for (what, (low, high, unit, hint)), value in zip(_RANGES.items(), (weight_kg, dose_bq, half_life_s)):
        if not low <= value <= high:
            raise DatasetError(f"The {what} is {value:g} {unit}; expected {low:g} to {high:g} {unit}. {hint}")
    if not 0 <= seconds_to_scan < math.inf:
        raise DatasetError(
            f"The scan is {seconds_to_scan:g} s after the injection; expected 0 or more. Are the two times swapped?"
        )
    if seconds_to_scan > _MOST_HALF_LIVES * half_life_s:
        raise DatasetError(
            f"The scan is {seconds_to_scan / half_life_s:.3g} half-lives after the injection, when nothing would be "
            f"left to see; expected at most {_MOST_HALF_LIVES:g}. Are half-life and times right, and in seconds?"
        )
    return 1000.0 * weight_kg / (dose_bq * 2.0 ** (-seconds_to_scan / half_life_s))
