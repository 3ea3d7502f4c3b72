"""What training costs with a foundation, and what a machine can do; for the planner, without torch.

Nothing is timed: speeds come from a table, so one machine always gives the same plan.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from unicon_pipeline.contract import FeatureLevel, FoundationSpec
from unicon_pipeline.levels import SkipLevels, new_stem_levels, skip_levels

MIN_BATCH = 2
TRAINING_PASSES = 3  # forward, and backward at twice its cost

# nnU-Net's reference: 560e6 feature map elements per sample at batch 2 train in 8 GB.
_REFERENCE_GB, _REFERENCE_ELEMENTS = 8.0, 560e6

# On a CPU time runs out before memory: a training step of two patches may take this long on two AVX-512 cores.
_CPU_STEP_SECONDS, _REFERENCE_CORES, _CPU_MIN_VOXELS = 2.0, 2, 32 * 64 * 64

# Useful FLOP/s a core, from the times of a PlainConvUNet. Layers narrower than 32 channels reach less.
_CORE_FLOPS = {"bfloat16": 175e9, "float32": 90e9}
_FULL_SPEED_CHANNELS = 32
_GPU_FLOPS = ((12.0, 8e12), (32.0, 20e12), (math.inf, 60e12))  # up to so many GB: useful FLOP/s, a cautious guess

_KERNEL = 27  # of a 3x3x3 convolution


@dataclass(frozen=True)
class Machine:
    """What trains. `memory_gb`: what training may use; `on_cpu`: time is the limit then; `source`: who says so."""

    memory_gb: float
    on_cpu: bool
    source: str


# To plan on one machine for another. On a CPU time is the limit, and 2 GB hold what it can train.
PRESETS = {
    "cpu": Machine(2.0, True, "preset cpu"),
    "gpu8": Machine(8.0, False, "preset gpu8"),
    "gpu24": Machine(24.0, False, "preset gpu24"),
    "gpu80": Machine(80.0, False, "preset gpu80"),
}


@dataclass(frozen=True)
class Costs:
    """Per input voxel: feature map elements kept for training, and multiply-accumulates of a forward pass.

    `flops`: per second on `machine`; `budget`: input voxels that each of two samples in a batch may have.
    """

    elements: float
    macs: float
    flops: float
    budget: float
    machine: str


def training_costs(spec: FoundationSpec, modalities: tuple[str, ...], view: str, machine: Machine) -> Costs:
    """What one input voxel costs, and how many the machine's memory and, on a CPU, its time allow.

    Args:
        view: "patch" (with a decoder) or "volume" (without).
    """
    new = tuple(modality for modality in modalities if modality not in spec.input.modalities)
    elements, macs = _per_voxel(spec, new, with_decoder=view == "patch")
    width = min(1.0, spec.pyramid[0].channels / _FULL_SPEED_CHANNELS)
    budget = _REFERENCE_ELEMENTS * machine.memory_gb / _REFERENCE_GB / elements
    if not machine.on_cpu:
        flops = width * next(speed for limit, speed in _GPU_FLOPS if machine.memory_gb <= limit)
        return Costs(elements, macs, flops, budget, "GPU of this size")
    cores, precision = _cores(), _cpu_precision()
    # The reference CPU's speed and not this one's, so that the plan is the same on every CPU; and without the stems,
    # so that all tasks of a foundation see patches of one size.
    reference = width * _REFERENCE_CORES * _CORE_FLOPS["float32"]
    _, shared_macs = _per_voxel(spec, (), with_decoder=view == "patch")
    by_time = _CPU_STEP_SECONDS * reference / (MIN_BATCH * max(shared_macs, 1.0) * 2 * TRAINING_PASSES)
    budget = min(budget, max(by_time, _CPU_MIN_VOXELS))
    return Costs(elements, macs, width * cores * _CORE_FLOPS[precision], budget, f"CPU ({cores} cores, {precision})")


def needed_gb(costs: Costs, voxels: int, batch: int) -> float:
    """Memory in GB to train on batches of `batch` inputs of `voxels` each."""
    return _REFERENCE_GB * costs.elements * voxels * batch / MIN_BATCH / _REFERENCE_ELEMENTS


def _per_voxel(spec: FoundationSpec, new: tuple[str, ...], with_decoder: bool) -> tuple[float, float]:
    """Feature map elements and multiply-accumulates per input voxel, with stems for the `new` modalities."""
    per_level = [level.conv_maps / math.prod(level.stride_zyx) for level in spec.pyramid]
    stems = {modality: new_stem_levels(spec) for modality in new}
    skips = skip_levels(spec, stems)
    parts = [(sum(per_level), spec.encoder_macs_per_voxel)]
    if with_decoder and not skips.detail:  # a decoder mirrors the encoder
        parts *= 2
    parts += [_path_costs(1, levels) for levels in stems.values()]
    if skips.detail and spec.projection.stride_zyx not in [level.stride_zyx for level in spec.pyramid]:
        parts.append((spec.projection.conv_maps / math.prod(spec.projection.stride_zyx), 0.0))
    if with_decoder and skips.detail:
        parts += [_path_costs(skips.native_channels, skips.detail), _decoder_costs(skips), _neck_costs(skips)]
    elements, macs = (sum(costs) for costs in zip(*parts))
    return elements, macs


def _path_costs(channels: int, levels: tuple[FeatureLevel, ...]) -> tuple[float, float]:
    """Of a residual path: a convolution that takes the input in, then two and a shortcut at each level."""
    elements = sum(level.conv_maps / math.prod(level.stride_zyx) for level in levels)
    own = levels[0].channels
    macs = _KERNEL * channels * own
    for level in levels:
        before, own = own, level.channels
        macs += own * (_KERNEL * (before + own) + before) / math.prod(level.stride_zyx)
    return elements, macs


def _decoder_costs(skips: SkipLevels) -> tuple[float, float]:
    """A transposed convolution and two convolutions at each level; the logits cost next to nothing."""
    elements = macs = 0.0
    width = skips.levels[-1].channels
    for level, own in reversed(list(zip(skips.levels, skips.decoder_channels))):
        voxels = math.prod(level.stride_zyx)
        elements += 3 * own / voxels
        macs += own * (width + _KERNEL * (level.channels + 2 * own)) / voxels
        width = own
    return elements, macs


def _neck_costs(skips: SkipLevels) -> tuple[float, float]:
    """Transposed convolutions from hidden layers to finer levels."""
    elements = macs = 0.0
    for source, path in skips.neck:
        width = skips.hidden_channels[source]
        for level in path:
            elements += level.backbone_channels / math.prod(level.stride_zyx)
            macs += width * level.backbone_channels / math.prod(level.stride_zyx)
            width = level.backbone_channels
    return elements, macs


def _cores() -> int:
    # Not os.cpu_count alone: a container or scheduler may allow fewer.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_precision() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in facts else "float32"
