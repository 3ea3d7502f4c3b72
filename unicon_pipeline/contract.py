"""What a foundation declares about itself, without torch: how it wants its input, what it gives.

Planner, preprocessing, stems and heads read only these records; a test holds them against the real
network of every family.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from unicon_pipeline.errors import PlanError

ZYX = tuple[int, int, int]
SpacingZYX = tuple[float, float, float]

NOT_STATED = "not stated"  # the licence of weights that say nothing about it


@dataclass(frozen=True)
class IntensityRule:
    """How one modality's values become network input.

    `piecewise`: linear interpolation between knots, constant beyond the outer ones. Two knots are a
    clipped affine map, so windows and clip-then-z-score (nnU-Net's CT rule) are the same rule.
    For modalities without a physical unit, each over the cropped image: `zscore`: mean 0, standard deviation 1;
    `zscore_nonzero`: the same over the voxels inside the image's nonzero region, the others are left at 0;
    `minmax`: 0 to 1. `identity`: as they are.
    """

    scheme: str
    unit: str
    knots_in: tuple[float, ...] = ()
    knots_out: tuple[float, ...] = ()


@dataclass(frozen=True)
class FeatureLevel:
    """One level of a feature pyramid: `stride_zyx` input voxels per feature voxel, `channels` maps.

    `conv_maps` counts the maps that a forward pass keeps at this level for the backward pass
    (channels x convolutions, 1x1x1 shortcuts left out); the planner's memory rule needs it.
    """

    stride_zyx: ZYX
    channels: int
    conv_maps: int

    def __post_init__(self) -> None:
        if min(*self.stride_zyx, self.channels) < 1:
            raise ValueError(f"a level has strides and channels of at least 1, not {self.stride_zyx}, {self.channels}.")


@dataclass(frozen=True)
class InputContract:
    """How a foundation was trained to be fed.

    `orientation`: arrays are z, y, x of an image stored in this patient orientation ("LPS" is ITK's), or, in small
    letters, with its stored axes in this order ("xyz" without a change); None: as stored. `spacing_zyx_mm`: None means
    any. `fixed_shape_zyx`: the only input shape that works, or None. `divisible_by_zyx`: input shapes must be multiples
    of this.
    `intensity`: modality -> rule, at least for the native modalities.
    """

    modalities: tuple[str, ...]
    orientation: str | None
    spacing_zyx_mm: SpacingZYX | None
    fixed_shape_zyx: ZYX | None
    divisible_by_zyx: ZYX
    intensity: dict[str, IntensityRule]


@dataclass(frozen=True)
class Conventions:
    """Habits that a trained network depends on; the defaults are this package's own.

    `crop`: to the "body", to the "nonzero" region (nnU-Net), or "none". `padding`: what fills a tile beyond the image:
    "air", or "zero" after normalisation (nnU-Net). `mirror_axes`: of z, y, x (0, 1, 2) those mirrored in training.
    """

    crop: str = "body"
    padding: str = "air"
    mirror_axes: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        known = self.crop in ("body", "nonzero", "none") and self.padding in ("air", "zero")
        if not known or not set(self.mirror_axes) <= {0, 1, 2}:
            raise ValueError(f"unknown conventions: crop {self.crop}, padding {self.padding}, axes {self.mirror_axes}.")


@dataclass(frozen=True)
class FoundationSpec:
    """The declaration in `foundation.json`.

    `architecture` is a key of the foundation registry and `arch_kwargs` its JSON arguments.
    `projection`: the level at which input modalities are fused (output of the input projection).
    `pyramid`: finest to coarsest. `kind`: `pyramid` or `tokens`.
    `encoder_macs_per_voxel`: multiply-accumulates of one forward pass per input voxel.
    """

    architecture: str
    arch_kwargs: dict[str, Any]
    input: InputContract
    kind: str
    projection: FeatureLevel
    pyramid: tuple[FeatureLevel, ...]
    embedding_channels: int
    encoder_macs_per_voxel: float
    licence: str
    provenance: dict[str, Any] = field(default_factory=dict)
    load_report: dict[str, Any] = field(default_factory=dict)
    schema_version: int = 1

    def __post_init__(self) -> None:
        if not self.input.modalities or not self.pyramid:
            raise ValueError("a foundation has at least one native modality and one level of features.")
        strides = [level.stride_zyx for level in self.pyramid]
        if self.kind not in ("pyramid", "tokens") or (self.kind == "tokens" and len(set(strides)) > 1):
            raise ValueError(f"a foundation is a pyramid, or tokens at one stride; not {self.kind} at {strides}.")
        chain = [*strides, self.input.divisible_by_zyx]
        if not all(_divides(fine, coarse) for fine, coarse in zip(chain, chain[1:])):
            raise ValueError(
                f"the strides {strides} must go from fine to coarse, each a divisor of the next, and the last one "
                f"of the input's divisor {self.input.divisible_by_zyx}."
            )


def filled_strides(strides: Iterable[ZYX]) -> tuple[ZYX, ...]:
    """Full resolution, `strides` and what lies between them, finest first.

    A step multiplies an axis by 1 or by one prime factor (2, in most networks), so that neither a decoder nor a
    stem has to leap over voxels.

    Raises:
        PlanError: a stride is no multiple of the next finer one.
    """
    path = [(1, 1, 1)]
    for stride in sorted(set(strides)):
        if not _divides(path[-1], stride):
            raise PlanError(f"No path leads from features of stride {path[-1]} to those of stride {stride}.")
        while path[-1] != stride:
            path.append(tuple(fine * _smallest_factor(coarse // fine) for fine, coarse in zip(path[-1], stride)))
    return tuple(path)


def _divides(fine: ZYX, coarse: ZYX) -> bool:
    return all(large >= small and large % small == 0 for small, large in zip(fine, coarse))


def _smallest_factor(number: int) -> int:
    return next((factor for factor in range(2, number) if number % factor == 0), number)


# Air, fat and muscle, bone: half of the output range is spent on -200..300 HU, where soft tissues differ.
CT_HU_RULE = IntensityRule("piecewise", "HU", (-1000.0, -200.0, 300.0, 1500.0), (-2.0, -1.0, 1.5, 2.5))

# A fixed scale, so that an SUV means the same in every image; finer where lesions separate from tissue (below 10).
PET_SUV_RULE = IntensityRule("piecewise", "SUV", (0.0, 2.5, 10.0, 50.0), (0.0, 1.0, 2.5, 4.5))
