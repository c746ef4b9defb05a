"""Measure the machine: memory that is free or held, and the rate of matrix products."""

import os
import resource
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import assert_never

import torch

from lm.base.errors import EnvironmentFault
from lm.base.settings import Dtype
from lm.machine.device import field_of

SURELY = 1.2  # times the free memory does not fit: a plan is off by a tenth or two
# FLOP/s of dense products by the vendors' data sheets: bfloat16 or float16, TF32, float32. NVIDIA
# H100 Tensor Core GPU (SXM, PCIe), H200 Tensor Core GPU, A100 Tensor Core GPU data sheets; Ada GPU
# architecture white paper, appendix A (with sums in float32). Sparsity, which doubles them, is off.
_DATA_SHEETS = {
    "H100 NVL": (835e12, 417e12, 60e12),
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100": (989e12, 494e12, 67e12),
    "H200": (989e12, 494e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "RTX 4090": (165.2e12, 82.6e12, 82.6e12),
}


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: by torch on CUDA, by the process elsewhere.

    On MPS torch records no peak: what the GPU holds may be missing.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(FileNotFoundError):  # on Linux, where ru_maxrss begins with what the parent held
        if peak := field_of("/proc/self/status", "VmHWM"):
            return int(peak.split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory_bytes() -> int:
    """Return the memory that the process holds now (on Linux), or held at most so far."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory_bytes(torch.device("cpu"))


def free_memory_bytes(device: torch.device, sharing: int = 1) -> int | None:
    """Return the memory that a process can still take; `sharing` processes share the RAM.

    RAM is limited by cgroups and by the process's own limit (ulimit -v) too. Return None where the
    system does not say.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held  # torch keeps what was freed
    if sys.platform != "linux":
        return None
    available = field_of("/proc/meminfo", "MemAvailable")
    free = [int(available.split()[0]) * 1024] if available else []
    shares = [size // sharing for size in free + _left_in_cgroups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        shares.append(max(0, limit - pages * os.sysconf("SC_PAGE_SIZE")))
    return min(shares, default=None)


def _left_in_cgroups() -> list[int]:
    """Return what each cgroup above this process (v2, v1) leaves; page cache counts as free."""
    left = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        root = Path("/sys/fs/cgroup", controllers)
        own = root / path.lstrip("/")
        for group in (own, *own.parents[: len(own.relative_to(root).parts)]):
            with suppress(OSError, ValueError):  # not mounted here, or "max": no limit
                limit, used = (int((group / name).read_text()) for name in names[:2])
                cache = field_of(str(group / "memory.stat"), names[2], separator=" ") or "0"
                left.append(max(0, limit - used + int(cache)))
    return left


def require_memory(
    what: str, needed: float, free: float | None, remedy: str, times: float = SURELY
) -> None:
    """Raise EnvironmentFault if `needed` bytes exceed `times` the `free` ones; None: not known."""
    if free is not None and needed > times * free:
        raise EnvironmentFault(
            f"{what} {needed / 1e6:,.0f} MB of memory, {free / 1e6:,.0f} MB are free; {remedy}"
        )


def matmul_flops_per_second(device: torch.device, dtype: Dtype) -> float:
    """Measure the rate of a large matrix product, used as the peak without a data sheet."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    synchronise = torch.get_device_module(device).synchronize
    seconds = []
    for _ in range(4):
        synchronise()
        start = time.perf_counter()
        a @ a
        synchronise()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def data_sheet_flops_per_second(device: torch.device, dtype: Dtype) -> float | None:
    """Return the vendor's peak for dense products, or None for a device not listed above."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known, (half, tf32, float32) in _DATA_SHEETS.items():
        if known in name:
            match dtype:
                case "bfloat16" | "float16":
                    return half
                case "float32":
                    return tf32 if torch.get_float32_matmul_precision() != "highest" else float32
                case _:
                    assert_never(dtype)
    return None
