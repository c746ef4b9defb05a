"""The machine: which device, in which precision, and how fast it can be."""

import functools
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.errors import EnvironmentFault

Dtype = Literal["float32", "bfloat16", "float16"]
# variables that make the CPU libraries choose other instructions
_INSTRUCTION_SWITCHES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)
Function = TypeVar("Function", bound=Callable[..., Any])


def available_devices() -> list[str]:
    """The kinds of device this torch can use here, the fastest first."""
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    return [name for name, there in found.items() if there]


def choose_device(name: str) -> torch.device:
    """The named device, or for "auto" CUDA, else MPS, else the CPU.

    Raises EnvironmentFault for one that is not there: it is never replaced in silence.
    """
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise EnvironmentFault(
            f"device {name}: not available (this torch {torch.__version__} has: "
            f"{', '.join(available)}); set runtime.device: auto"
        )
    return torch.device(name)


def describe(device: torch.device) -> str:
    """The device in words, e.g. "cpu (2 threads, AVX512)"."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"cpu ({torch.get_num_threads()} threads, {capability})"
    return device.type


def environment(device: torch.device) -> dict[str, str]:
    """What decides, beside code, settings and data, which bits a computation gives."""
    switches = {name: os.environ[name] for name in _INSTRUCTION_SWITCHES if name in os.environ}
    return {"torch": torch.__version__, "device": describe(device), **switches}


def make_deterministic(device: torch.device) -> None:
    """Make torch choose kernels that give the same bits every time, and fail where it has none."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first matmul
        torch.backends.cudnn.benchmark = False


def autocast(device: torch.device, dtype: Dtype) -> AbstractContextManager[Any]:
    """Matrix products in `dtype`; parameters, norms and losses stay float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def compiled(function: Function, device: torch.device) -> Function:
    """`function` by torch.compile. Raises EnvironmentFault, now or when called, where it fails."""
    otherwise = "or set train.compile: false"
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise EnvironmentFault(
            f"train.compile = true: no C++ compiler found; install g++ {otherwise}"
        )
    if device.type == "cpu" and " " in torch.__file__:
        raise EnvironmentFault(  # it hands its own path to the linker without quotes
            f"train.compile = true: torch.compile fails where torch's path has a space "
            f"({Path(torch.__file__).parent}); move the project {otherwise}"
        )
    from torch._dynamo.exc import BackendCompilerFailed  # costs 1.5 s: only who compiles pays

    fast = torch.compile(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return fast(*arguments)
        except BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise EnvironmentFault(
                f"train.compile = true: {reason}; mend the compiler {otherwise}"
            ) from error

    return call  # type: ignore[return-value]


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on the device; to a GPU without waiting for the copy."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: by torch on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matmul_flops_per_second(device: torch.device, dtype: Dtype) -> float:
    """The rate of a large matrix product here and now: the ceiling that MFU is a share of."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(7):
        synchronise(device)
        start = time.perf_counter()
        a @ a
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def performance(
    device: torch.device,
    dtype: Dtype,
    step_seconds: list[float],
    tokens_per_step: int,
    flops_per_token: float,
) -> dict[str, Any]:
    """Speed and memory of a finished run; MFU is the share of a measured matrix product's rate."""
    step_s = statistics.median(step_seconds) if step_seconds else float("nan")
    peak = matmul_flops_per_second(device, dtype)
    tokens_per_second = tokens_per_step / step_s
    return {
        "device": describe(device),
        "dtype": dtype,
        "tokens_per_second": round(tokens_per_second, 1),
        "step_seconds_median": round(step_s, 6),
        "peak_memory_bytes": peak_memory_bytes(device),
        "flops_per_token": flops_per_token,
        "matmul_flops_per_second": round(peak),
        "mfu": round(tokens_per_second * flops_per_token / peak, 4),
    }
