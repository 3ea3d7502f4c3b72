"""What training costs with a foundation, and what a machine can do; for the planner, without torch.

Nothing is timed: speeds come from a table, so one machine always gives the same plan.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from unicon_pipeline.contract import FoundationSpec

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

_DECODER_LEVEL_MAPS = 64  # of a decoder that adds the resolutions finer than the foundation's finest level


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


def training_costs(
    spec: FoundationSpec, modalities: tuple[str, ...], view: str, memory_gb: float, on_cpu: bool
) -> Costs:
    """What one input voxel costs, and how many the memory (GB) and, on a CPU, the time allow.

    Args:
        view: "patch" (with a decoder) or "volume" (without).
    """
    per_level = [level.conv_maps / math.prod(level.stride_zyx) for level in spec.pyramid]
    elements, macs = sum(per_level), spec.encoder_macs_per_voxel
    if view == "patch":  # a decoder mirrors the encoder
        elements, macs = 2 * elements, 2 * macs
        if max(spec.pyramid[0].stride_zyx) > 1:
            elements += _DECODER_LEVEL_MAPS
    # Stems of further modalities work at the finest level.
    elements += per_level[0] * sum(modality not in spec.input.modalities for modality in modalities)
    width = min(1.0, spec.pyramid[0].channels / _FULL_SPEED_CHANNELS)
    budget = _REFERENCE_ELEMENTS * memory_gb / _REFERENCE_GB / elements
    if not on_cpu:
        flops = width * next(speed for limit, speed in _GPU_FLOPS if memory_gb <= limit)
        return Costs(elements, macs, flops, budget, "GPU of this size")
    cores, precision = _cores(), _cpu_precision()
    # The reference CPU's speed and not this one's, so that the plan is the same on every CPU.
    reference = width * _REFERENCE_CORES * _CORE_FLOPS["float32"]
    by_time = _CPU_STEP_SECONDS * reference / (MIN_BATCH * max(macs, 1.0) * 2 * TRAINING_PASSES)
    budget = min(budget, max(by_time, _CPU_MIN_VOXELS))
    return Costs(elements, macs, width * cores * _CORE_FLOPS[precision], budget, f"CPU ({cores} cores, {precision})")


def needed_gb(costs: Costs, voxels: int, batch: int) -> float:
    """Memory in GB to train on batches of `batch` inputs of `voxels` each."""
    return _REFERENCE_GB * costs.elements * voxels * batch / MIN_BATCH / _REFERENCE_ELEMENTS


def _cores() -> int:
    # Not os.cpu_count alone: a container or scheduler may allow fewer.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_precision() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in facts else "float32"
