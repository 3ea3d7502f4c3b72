"""A PET image in Bq/ml -> the same image in SUV (by body weight).

    python -m dataset_conversion.suv -i pet.nii.gz -o pet_suv.nii.gz --weight-kg 70 --dose-mbq 370 \\
        --half-life-min 109.77 --injected 10:12 --scanned 11:15
    python -m dataset_conversion.suv -i pet.nii.gz -o pet_suv.nii.gz --factor 0.00028

Times: HH:MM or HH:MM:SS on one day, or both with their dates (2024-05-31T23:40). `--scanned` is what the image is
decay-corrected to: the start of the scan in most DICOM series (DecayCorrection START); with ADMIN, give the time of
injection for both. Half-lives in minutes: fluorine-18 109.77, gallium-68 67.71, carbon-11 20.36, zirconium-89 4704.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date, datetime, time
from pathlib import Path

import numpy as np

from unicon_pipeline.errors import DatasetError, UniconError
from unicon_pipeline.geometry import read_image, write_image
from unicon_pipeline.intensity import check_units
from unicon_pipeline.suv import suv_factor

_PARTS = ("weight_kg", "dose_mbq", "half_life_min", "injected", "scanned")


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry; 0 done, 2 nothing could be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", type=Path, required=True, help="the PET in Bq/ml")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the PET in SUV, to be written")
    parser.add_argument("--weight-kg", type=float, metavar="KG", help="body weight")
    parser.add_argument("--dose-mbq", type=float, metavar="MBQ", help="injected dose, at the time of injection")
    parser.add_argument("--half-life-min", type=float, metavar="MIN", help="of the nuclide")
    parser.add_argument("--injected", metavar="TIME", help="time of injection")
    parser.add_argument("--scanned", metavar="TIME", help="time that the image is decay-corrected to")
    parser.add_argument("--factor", type=float, help="SUV = Bq/ml x this, instead of all of the above")
    options = parser.parse_args(argv)
    given = [name for name in _PARTS if getattr(options, name) is not None]
    if given != ([] if options.factor is not None else list(_PARTS)):
        names = ", ".join("--" + name.replace("_", "-") for name in _PARTS)
        parser.error(f"give either --factor, or all of {names}")
    try:
        factor = options.factor
        if factor is None:
            delay = seconds_between(options.injected, options.scanned)
            factor = suv_factor(options.weight_kg, options.dose_mbq * 1e6, options.half_life_min * 60, delay)
        print(convert(options.input, options.out, factor))
    except (UniconError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


def seconds_between(injected: str, scanned: str) -> float:
    """Seconds from one time to the other; two times of one day, or two dates with times.

    Raises:
        DatasetError: not such times.
    """
    moments = [_moment(text) for text in (injected, scanned)]
    if len({(moment.date() == date.min, moment.tzinfo is None) for moment in moments}) > 1:
        raise DatasetError(f"Give both times with their dates (and time zones), or none: {injected} and {scanned}.")
    if moments[1] < moments[0]:
        raise DatasetError(
            f"The scan ({scanned}) is before the injection ({injected}). Are they swapped? If it was on another day, "
            "give both with their dates, such as 2024-05-31T23:40."
        )
    return (moments[1] - moments[0]).total_seconds()


def convert(source: Path, out: Path, factor: float) -> str:
    """Writes `source` times `factor` to `out`. Returns a summary for a person.

    Raises:
        DatasetError: `source` is in SUV already, or not in SUV after it; nothing is written then.
    """
    if not 0 < factor < float("inf"):
        raise DatasetError(f"The factor is {factor:g}; expected a number above 0, such as 0.00028.")
    image = read_image(source)
    if _is_suv(image.array_zyx, source):
        raise DatasetError(f"{source} is in SUV already (largest value {image.array_zyx.max():g}); use it as it is.")
    array_zyx = image.array_zyx * np.float32(factor)
    if not _is_suv(array_zyx, source):
        raise DatasetError(
            f"{source} times {factor:g} is not SUV: values from {array_zyx.min():g} to {array_zyx.max():g}. Is it in "
            "Bq/ml? Counts first need the rescale slope of the DICOM header. Are dose, weight and times this patient's?"
        )
    write_image(out, array_zyx, image.grid)
    return f"{out}: SUV = {factor:.6g} x Bq/ml, largest {array_zyx.max():.3g}"


def _moment(text: str) -> datetime:
    for parse in (lambda: datetime.combine(date.min, time.fromisoformat(text)), lambda: datetime.fromisoformat(text)):
        try:
            return parse()
        except ValueError:
            continue
    raise DatasetError(f"{text!r} is not a time; expected such as 10:12, 10:12:30 or 2024-05-31T10:12.")


def _is_suv(array_zyx: np.ndarray, source: Path) -> bool:
    try:
        check_units(array_zyx, "PET", source)
    except DatasetError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
