"""What this machine is to the planner: a CPU, or a GPU and its memory.

torch takes seconds to import, so it is asked only where a GPU driver is there.
"""

from __future__ import annotations

import ctypes

from unicon_pipeline.budget import PRESETS, Machine

_GPU_DRIVERS = ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so")


def machine_for(device: str) -> Machine:
    """The machine that `--device` names: auto, cpu or cuda.

    Raises:
        UniconError: CUDA is asked for and not there.
    """
    cpu = Machine(PRESETS["cpu"].memory_gb, True, "this machine's CPU; its limit is time")
    if device == "cpu" or (device == "auto" and not _has_gpu_driver()):
        return cpu
    import torch

    from unicon_pipeline.device import choose_device

    chosen = choose_device(device)
    if chosen.type == "cpu":
        return cpu
    facts = torch.cuda.get_device_properties(chosen)
    return Machine(float(facts.total_memory >> 30), False, f"this machine's {facts.name}")


def _has_gpu_driver() -> bool:
    for name in _GPU_DRIVERS:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False
