"""What lies at which stride: stems, detail path, neck and decoder as numbers, without torch.

The networks are built from these records, and the planner counts their costs in the same ones.

A foundation may begin coarser than its input: a strided first convolution, or tokens. What is finer is hidden from a
decoder then, of its native modalities too. So the task's head gets a detail path: a small encoder of its own over the
native images (UNETR's, arXiv 2103.10504; PEMMA's, arXiv 2404.13704), whose maps join the skips at the finer strides.
"""

from __future__ import annotations

from dataclasses import dataclass

from unicon_pipeline.contract import ZYX, FeatureLevel, FoundationSpec, filled_strides

DETAIL = ""  # names the detail path beside the stems, which go by their modality
TOKENS = "tokens"

_FEWEST_CHANNELS = 16  # at full resolution; doubled at every coarser level
_MOST_PATH_CHANNELS, _MOST_DECODER_CHANNELS = 128, 320
_FEWEST_STEM_LEVELS = 3


@dataclass(frozen=True)
class SkipLevel:
    """What is on offer at one stride.

    `backbone_channels`: of the foundation, or of the neck over its hidden layers (0: none). `side_channels`: of each
    path beside it, in a fixed order: the detail path, then the stems by modality.
    """

    stride_zyx: ZYX
    backbone_channels: int
    side_channels: tuple[tuple[str, int], ...] = ()

    @property
    def channels(self) -> int:
        return self.backbone_channels + sum(channels for _, channels in self.side_channels)


@dataclass(frozen=True)
class SkipLevels:
    """All that a head can read: `levels`, finest first, from full resolution on.

    `kind`: the foundation's. `hidden_channels`: of its maps as they come, finest or shallowest first. `detail`: levels
    of the detail path over the `native_channels`; empty where the foundation begins at full resolution.
    """

    kind: str
    native_channels: int
    hidden_channels: tuple[int, ...]
    detail: tuple[FeatureLevel, ...]
    levels: tuple[SkipLevel, ...]

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """Width of a decoder at each level but the coarsest, finest first: the foundation's own, within limits.

        Where the foundation begins coarser, its widths (256 at stride 4 in a ResNet-152) would make the decoder cost
        several times the encoder: there they double from level to level.
        """
        if self.detail:
            return tuple(_doubled(index, _MOST_DECODER_CHANNELS) for index in range(len(self.levels) - 1))
        widths = [self.levels[-1].channels]
        for level in reversed(self.levels[:-1]):
            own = level.backbone_channels or widths[-1] // 2
            widths.append(min(max(own, _FEWEST_CHANNELS), _MOST_DECODER_CHANNELS))
        return tuple(widths[:0:-1])

    @property
    def neck(self) -> tuple[tuple[int, tuple[SkipLevel, ...]], ...]:
        """How hidden layers at one stride become a pyramid (without full resolution), finest level first.

        For each level: the hidden layer that serves it (the deepest the coarsest, the others spread evenly), and the
        levels that it passes on its way there. Empty for a foundation that gives a pyramid itself.
        """
        if self.kind != TOKENS:
            return ()
        at_tokens, deepest = len(self.detail), len(self.hidden_channels) - 1
        steps = max(at_tokens - 1, 1)
        return tuple(
            (deepest - round(deepest * (at_tokens - index) / steps), self.levels[index:at_tokens][::-1])
            for index in range(1, at_tokens + 1)
        )


def skip_levels(spec: FoundationSpec, stem_levels: dict[str, tuple[FeatureLevel, ...]]) -> SkipLevels:
    """What the foundation, the stems (by modality) and the detail path offer to a head.

    Strides that none of them has are filled in with empty levels.
    """
    backbone = {level.stride_zyx: level.channels for level in spec.pyramid}
    of_stems = {level.stride_zyx for levels in stem_levels.values() for level in levels}
    strides = filled_strides({spec.projection.stride_zyx, *backbone, *of_stems})
    begins = strides.index(spec.pyramid[0].stride_zyx)
    if spec.kind == TOKENS:
        backbone |= {strides[index]: _doubled(index, _MOST_DECODER_CHANNELS) for index in range(1, begins)}
    detail = residual_levels(strides[:begins])
    sides = {stride: [] for stride in strides}
    for name, levels in ((DETAIL, detail), *sorted(stem_levels.items())):
        for level in levels:
            sides[level.stride_zyx].append((name, level.channels))
    return SkipLevels(
        spec.kind,
        len(spec.input.modalities),
        tuple(level.channels for level in spec.pyramid),
        detail,
        tuple(SkipLevel(stride, backbone.get(stride, 0), tuple(sides[stride])) for stride in strides),
    )


def new_stem_levels(spec: FoundationSpec) -> tuple[FeatureLevel, ...]:
    """Levels of a stem for a modality that the model has not met, finest first.

    At least down to the projection; where that is a patch embedding, all that are finer than it.
    """
    strides = filled_strides({spec.projection.stride_zyx, *(level.stride_zyx for level in spec.pyramid)})
    finer = strides.index(spec.projection.stride_zyx)
    return residual_levels(strides[: max(1, finer) if spec.kind == TOKENS else max(_FEWEST_STEM_LEVELS, finer + 1)])


def residual_levels(strides_zyx: tuple[ZYX, ...], features: tuple[int, ...] = ()) -> tuple[FeatureLevel, ...]:
    """Levels of a path with one residual block (two convolutions) each; the first also takes the input in.

    Args:
        features: channels per level; by default they double from level to level.
    """
    features = features or tuple(_doubled(index, _MOST_PATH_CHANNELS) for index in range(len(strides_zyx)))
    return tuple(
        FeatureLevel(stride, channels, channels * (2 if index else 3))
        for index, (stride, channels) in enumerate(zip(strides_zyx, features, strict=True))
    )


def _doubled(index: int, most: int) -> int:
    return min(_FEWEST_CHANNELS * 2**index, most)
