"""The device: choose it, describe it, make it deterministic, compile for it."""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.base.console import count
from lm.base.errors import EnvironmentFault
from lm.base.settings import DTYPES, Dtype

# variables that make the numeric libraries choose other instructions or cut sums otherwise
_SWITCHES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC",
    "ONEDNN_MAX_CPU_ISA",
)
# mallopt(3): M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD; their numbers are glibc's interface
_MALLOPT = {-4: 0, -1: 2**31 - 1, -2: 64 << 20}
# by which users set the allocator of a GPU; without them its segments grow, since a fixed one that
# held a micro-batch leaves holes into which no validation fits
_ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
_COMPILERS = ("c++", "g++", "clang++")
_C_COMPILERS = ("gcc", "clang")  # triton/runtime/build.py: CC, or else one of these
CompilerOptions = dict[str, str | int | bool | Callable[..., Any]]
# torch.compile: no Python between kernels, and recomputation stays where checkpointing put it
_CPU_COMPILER: CompilerOptions = {
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "reorder_for_locality": False,
}
# (rows, inner, columns) of products that threads share: the second on Zen 4, the others with AMX
_CUT_DIFFERENTLY = ((64, 64, 64), (128, 128, 128), (768, 128, 384))
Function = TypeVar("Function", bound=Callable[..., Any])


def choose_device(name: str) -> torch.device:
    """Return the named device, or for "auto" CUDA, else MPS, else the CPU.

    Make a GPU that is named by its number, as in "cuda:1", the current one. Raises
    EnvironmentFault for a device that is not there: it is never replaced in silence.
    """
    kinds = ("cuda", "mps", "cpu")
    available = [kind for kind in kinds if torch.get_device_module(kind).is_available()]
    if "cuda" in available and not _ALLOCATOR & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read when CUDA starts
    if name == "auto":
        return torch.device(available[0])
    numbers = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    if name not in available + numbers:
        raise EnvironmentFault(
            f"device {name}: not available (this torch {torch.__version__} has: "
            f"{', '.join(numbers + available)}); use one of these, or auto"
        )
    if name in numbers:
        torch.cuda.set_device(name)
    return torch.device(name)


def describe(device: torch.device) -> str:
    """Return the device in words, e.g. "cpu (2 threads, AVX512)"."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"cpu ({count(torch.get_num_threads(), 'thread')}, {capability})"
    return device.type


def environment(device: torch.device, compiles: bool) -> dict[str, str]:
    """Return what decides the bits of a computation, apart from code, settings and data."""
    found = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        **{package: version(package) for package in ("numpy", "safetensors", "tokenizers")},
        "device": describe(device),
    }
    if device.type == "cuda":
        found |= _cuda(device)
    else:
        found["processor"] = _processor()
    if compiles:
        found["compiler"] = _triton() if device.type == "cuda" else _compiler()
    return found | {name: os.environ[name] for name in _SWITCHES if name in os.environ}


def _cuda(device: torch.device) -> dict[str, str]:
    """Return what decides the bits of a GPU's work: hardware, driver, libraries, precision.

    The CPU draws the first weights: their bits depend on its vector instructions, not on its
    maker. Its C++ compiler makes nothing that computes here.
    """
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "compute_capability": f"{major}.{minor}",
        "cuda": f"{torch.version.cuda}, driver {_driver()}",
        "libraries": f"cuBLAS {_cublas()}, cuDNN {torch.backends.cudnn.version()}",
        "float32_products": torch.get_float32_matmul_precision(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def _driver() -> str:
    """Return the version of NVIDIA's driver from NVML, which comes with it."""
    said = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        nvml.nvmlInit_v2()
        nvml.nvmlSystemGetDriverVersion(said, len(said))
        nvml.nvmlShutdown()
    except OSError:
        return "unknown"
    return said.value.decode() or "unknown"


def _cublas() -> str:
    """Return the version of the cuBLAS that torch has loaded, with or without a package."""
    try:
        library = ctypes.CDLL(f"libcublas.so.{str(torch.version.cuda).partition('.')[0]}")
    except OSError:
        return "unknown"
    found = [ctypes.c_int() for _ in range(3)]
    for part, number in enumerate(found):  # MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL
        library.cublasGetProperty(part, ctypes.byref(number))
    return ".".join(str(number.value) for number in found)


def _triton() -> str:
    """Return the version of the compiler that torch.compile uses on a GPU."""
    return f"triton {import_module('triton').__version__}"  # its package has other names, too


def _processor() -> str:
    """Return the CPU's maker and matrix instructions, by which libraries choose their kernels."""
    maker = platform.processor() or platform.machine()
    if sys.platform == "linux":
        maker = field_of("/proc/cpuinfo", "vendor_id") or maker
    return " ".join([maker, *_cpu_extras()])


def _cpu_extras() -> list[str]:
    """Return which instructions for products in bfloat16 the CPU has."""
    cpu: Any = torch.cpu  # the checks are there, but not in the type stubs
    extras = {"avx512_bf16": cpu._is_avx512_bf16_supported(), "amx": cpu._is_amx_tile_supported()}
    return [name for name, there in extras.items() if there]


def multiplies_natively(device: torch.device, dtype: Dtype) -> bool:
    """Return whether products in a 16-bit type are faster here than in float32."""
    if device.type == "cpu":
        return DTYPES[dtype].cpu_gains and bool(_cpu_extras())
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major + minor / 10 >= DTYPES[dtype].cuda_gains
    return False  # on MPS nobody has measured it


def native_dtype(device: torch.device) -> Dtype:
    """Return the dtype in which the device multiplies fastest without losing range."""
    return "bfloat16" if multiplies_natively(device, "bfloat16") else "float32"


def field_of(file: str, name: str, separator: str = ":") -> str | None:
    """Return the value of a name in a file of "name: value" lines, or None."""
    with open(file, encoding="utf-8") as lines:
        return next(
            (line.partition(separator)[2].strip() for line in lines if line.startswith(name)), None
        )


def _compiler() -> str:
    """Return the version line of the C++ compiler that torch.compile uses on a CPU."""
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        return "none"
    said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    return said.partition("\n")[0]


def prepare(device: torch.device, num_threads: int | None) -> None:
    """Set torch and the process up for training: deterministic, and keeping freed memory.

    By default glibc maps each large tensor anew and the kernel clears its pages, which takes up to
    a third of a step on a CPU.
    """
    make_deterministic(device, num_threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in _MALLOPT.items():
            libc.mallopt(parameter, value)


def make_deterministic(device: torch.device, num_threads: int | None) -> None:
    """Make torch choose kernels that give the same bits every time, and fail where it has none.

    For attention on CUDA that is FlashAttention, the memory-efficient kernel or plain formulas (see
    `lm.model.kernels.attention`), whose backward passes then add in one order.
    On a CPU the number of threads decides how sums are cut into parts: None leaves it to torch.
    Raises EnvironmentFault if OpenMP gives fewer threads than it promises: oneDNN then leaves
    parts of a product unwritten.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    torch.set_deterministic_debug_mode("error")  # without importing the compiler; see compiled()
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first matmul
        torch.backends.cudnn.benchmark = False
        # torch prefers it on an H100 (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), but
        # its backward pass adds in no fixed order (attention_backward.cu)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        for rows, inner, columns in _CUT_DIFFERENTLY:
            left = torch.ones(rows, inner, dtype=torch.bfloat16)
            right = torch.ones(inner, columns, dtype=torch.bfloat16)
            if not (left @ right == inner).all():
                raise EnvironmentFault(
                    f"OpenMP promises {torch.get_num_threads()} threads and gives fewer; unset "
                    "OMP_DYNAMIC, OMP_THREAD_LIMIT, OMP_MAX_ACTIVE_LEVELS or set "
                    "train.num_threads: 1"
                )


def autocast(device: torch.device, dtype: Dtype) -> AbstractContextManager[Any]:
    """Compute matrix products in `dtype`; parameters, norms and losses stay float32."""
    if not DTYPES[dtype].autocast:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on the device, without waiting for the copy to a GPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def compiled(function: Function, device: torch.device, cuda_graph: bool = False) -> Function:
    """Compile a function. Raises EnvironmentFault, now or when it is called, if that fails.

    With `cuda_graph`, for CUDA alone, one launch runs all kernels of a part that Inductor can
    capture, and each call overwrites the tensors that the call before returned.
    """
    otherwise = "or set train.compile: false"
    if reason := no_compiling(device) or no_loading(device):
        raise EnvironmentFault(f"torch.compile: {reason} {otherwise}")
    from torch._dynamo import config  # takes 1.5 s
    from torch._dynamo.exc import BackendCompilerFailed

    config.trace_autograd_ops = True  # the function may take gradients inside
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(True)  # the same, and the compiler knows of it
    options: CompilerOptions = {"triton.cudagraphs": cuda_graph}
    if device.type == "cpu":
        options = _CPU_COMPILER
    fast = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return fast(*arguments)
        except torch.OutOfMemoryError:
            torch.compiler.reset()  # torch 2.11 cannot go on after a CUDA graph that did not fit
            raise
        except BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise EnvironmentFault(
                f"torch.compile: {reason}; fix the compiler {otherwise}"
            ) from error

    return call  # type: ignore[return-value]


def no_compiling(device: torch.device) -> str | None:
    """Return why torch.compile cannot work here, with a remedy, or None if it can."""
    if device.type == "cpu" and not any(map(shutil.which, _COMPILERS)):
        return "no C++ compiler found; install g++"
    if device.type == "cuda":
        names = [os.environ["CC"]] if "CC" in os.environ else _C_COMPILERS
        if not any(map(shutil.which, names)):
            return f"triton finds no C compiler ({' or '.join(names)}); install gcc"
        if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
            return "triton finds no Python.h; install Python's headers (python3-dev)"
    if device.type == "cpu" and " " in torch.__file__:
        # torch hands its own path to the linker without quotes
        return (
            f"torch.compile fails where torch's path has a space ({Path(torch.__file__).parent}); "
            "move the project"
        )
    return None


@functools.cache
def no_loading(device: torch.device) -> str | None:
    """Return why what torch.compile builds cannot be loaded, with a remedy, or None if it can.

    Build a library of one line in torch's cache folder, which takes some tenths of a second.
    """
    if device.type != "cpu":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    elsewhere = "set TORCHINDUCTOR_CACHE_DIR to another folder"
    try:
        compiler = get_cpp_compiler()
    except RuntimeError:
        return "no C++ compiler works; fix the one that CXX names, or g++"
    try:
        if " " in (folder := cache_dir()):
            return f"its folder must have no space ({folder}); {elsewhere}"
        with tempfile.TemporaryDirectory(dir=folder) as place:
            source, library = Path(place, "probe.cpp"), Path(place, "probe.so")
            source.write_text('extern "C" int probe() { return 0; }\n')
            command = [compiler, "-shared", "-fPIC", "-o", str(library), str(source)]
            built = subprocess.run(command, capture_output=True, text=True)
            if built.returncode != 0:
                said = built.stderr.strip().partition("\n")[0]
                return f"{compiler} fails ({said}); fix it"
            ctypes.CDLL(str(library))  # not where the folder is mounted noexec
    except OSError as error:
        said = str(error).partition("\n")[0]
        return f"it cannot build and load a library ({said}); {elsewhere}"
    return None


class Stopwatch:
    """Add up the seconds that a device works; a GPU's are read only when it is done."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.seconds = device.type == "cuda", 0.0
        self.laps: list[tuple[Any, Any]] = []

    @contextmanager
    def lap(self) -> Iterator[None]:
        """Add the time that the device takes in this context."""
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.laps.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began

    def take(self) -> float:
        """Return the seconds since the last call. Before it, wait for a GPU to finish."""
        laps, self.laps = self.laps, []
        seconds = self.seconds + sum(start.elapsed_time(end) / 1000 for start, end in laps)
        self.seconds = 0.0
        return seconds
