"""The machine that computes: device, precision, threads and the allocator."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from unicon_pipeline.errors import UniconError

logger = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 2**31 - 1


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one; asking for CUDA where there is none is an error."""
    if name not in DEVICES:
        raise UniconError(f"--device {name}: choose one of {', '.join(DEVICES)}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UniconError("--device cuda: torch sees no CUDA device here. Use --device cpu, or install a CUDA torch.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` takes the fastest type the hardware computes natively: bfloat16, else float16 on CUDA, else float32."""
    if name not in ("auto", *PRECISIONS):
        raise UniconError(f"--precision {name}: choose one of auto, {', '.join(PRECISIONS)}.")
    if name != "auto":
        precision = PRECISIONS[name]
        if precision is torch.float16 and device.type == "cpu":
            raise UniconError("--precision fp16 needs a CUDA device; on a CPU use bf16, fp32 or auto.")
        return precision
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if cpu_computes_bfloat16() else torch.float32


def cpu_computes_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; emulation would be slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


@contextlib.contextmanager
def autocast(device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """Mixed precision for a forward pass; nothing at all in float32."""
    if precision is torch.float32:
        yield
        return
    guard = _DepthTwoInFloat32() if device.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(device.type, precision), guard:
        yield


class _DepthTwoInFloat32(TorchFunctionMode):
    """Keeps one kind of convolution out of bfloat16 on a CPU: three deep kernels on maps that are two deep.

    Their weight gradient comes out of oneDNN as what happened to be in memory (seen with torch 2.14: values
    up to 1e38, NaN, and another result each time); all other shapes tried are right.
    """

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is torch.conv3d and arguments[0].shape[2] == 2 and arguments[1].shape[2] > 2:
            low = torch.get_autocast_dtype("cpu")
            with torch.autocast("cpu", enabled=False):
                exact = [a.float() if isinstance(a, torch.Tensor) else a for a in arguments]
                return function(*exact, **options).to(low)
        return function(*arguments, **options)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For fits of small heads: their layers are done before a second thread has begun."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What decides whether two runs of one network give the same bits."""
    return {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": cpu_computes_bfloat16(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def keep_freed_pages() -> None:
    """For training on a CPU: memory of maps that are gone is kept for the next ones."""
    # Every feature map of a 3-D network is above glibc's mmap threshold, so each layer would map and fault in
    # its pages anew and give them back at once; kept, the same forward pass takes about 60 % of the time.
    if platform.system() != "Linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        kept = libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES) and libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
    except (OSError, AttributeError):
        kept = False
    if not kept:
        logger.debug("this C library has no mallopt; memory is returned to the system between layers")
