"""Write and read tensors in safetensors files; opening one runs no code."""

import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lm.base.errors import InputError
from lm.base.files import replacing, require_file

MAX_HEADER_BYTES = 1 << 24  # enough for 100,000 tensors


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file, for use by `with`. Raises InputError if it is not one."""
    require_file(path)
    with open(path, "rb") as file:
        require_short_header(str(path), file.read(8))
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None


def require_short_header(name: str, head: bytes) -> None:
    """Raise InputError if the first bytes of a safetensors file announce a huge header."""
    if (length := int.from_bytes(head[:8], "little")) > MAX_HEADER_BYTES:
        raise InputError(
            f"{name}: not a safetensors file (a header of {length:,} bytes; no model needs more "
            f"than {MAX_HEADER_BYTES:,})"
        )


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous and without shared memory, as safetensors needs them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        result[name] = tensor
    return result


def write_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write tensors that share no memory to `path`; see `replacing`."""
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as scratch:
        scratch.touch()
        mode = scratch.stat().st_mode  # safetensors would let only the owner read the file
        try:
            safetensors.torch.save_file(tensors, scratch, metadata)
        except SafetensorError as error:  # "I/O error: ... (os error 28)"
            if not (number := re.search(r"os error (\d+)", str(error))):
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        scratch.chmod(mode)
