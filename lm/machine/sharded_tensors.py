"""Tensors of which each process keeps some rows, as torch's fully_shard cuts them (DTensor).

Of R rows and N processes, rank r keeps the rows r c to (r + 1) c, c = ceil(R / N); the last ranks
have fewer, or none. Functions that also take ordinary tensors give those back as they are.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_shared(tensor: Tensor) -> bool:
    """Whether this process keeps only its rows of the tensor."""
    return hasattr(tensor, "placements")  # of DTensor, whose import takes half a second


def local(tensor: Tensor) -> Tensor:
    """The rows that this process keeps; changing them changes the tensor."""
    shared: Any = tensor
    rows: Tensor = shared.to_local() if is_shared(tensor) else tensor
    return rows


def whole(tensor: Tensor) -> Tensor:
    """All rows, gathered from all processes, which must all ask for them."""
    shared: Any = tensor
    rows: Tensor = shared.full_tensor() if is_shared(tensor) else tensor
    return rows


def cut_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, known to all processes, shared out as `pattern` is."""
    if not is_shared(pattern):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = pattern.device_mesh, pattern.placements  # type: ignore[attr-defined]
    tensor = tensor.to(pattern.device)
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def staged(rows: Tensor, pattern: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A tensor in the memory of the CPU of which this process keeps `rows`, cut as `pattern` is.

    `group` are the same processes, connected for the CPU.
    """
    if not is_shared(pattern):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = mesh_of(group, "cpu"), pattern.placements  # type: ignore[attr-defined]
    shape, stride = pattern.shape, pattern.stride()
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


@functools.cache
def mesh_of(group: dist.ProcessGroup | None, device_type: str) -> Any:
    """Processes as the mesh that DTensor wants, one of their devices each."""
    from torch.distributed.device_mesh import DeviceMesh  # half a second: who shards pays

    assert group is not None
    return DeviceMesh.from_group(group, device_type)


def group_of(tensor: Tensor) -> dist.ProcessGroup:
    """The processes that share a tensor."""
    group: dist.ProcessGroup = tensor.device_mesh.get_group()  # type: ignore[attr-defined]
    return group


def bounds(rows: int, size: int, rank: int) -> tuple[int, int]:
    """First and last + 1 of the rows that a rank keeps."""
    most = -(-rows // size)
    return min(rank * most, rows), min((rank + 1) * most, rows)


def collect(shares: list[Tensor], rows: int, group: dist.ProcessGroup) -> Tensor | None:
    """Of up to N matrices, of which each process has its rows, the one numbered as my rank.

    shares[i] (my rows, C) is of matrix i. Returns (rows, C), or None if there is none for me.
    """
    size, rank, columns = group.size(), group.rank(), shares[0].shape[1]
    most = -(-rows // size)
    sent = shares[0].new_zeros(size, most, columns)  # [i]: my rows of matrix i, to process i
    for to, share in zip(sent, shares, strict=False):
        to[: len(share)] = share
    received = torch.empty_like(sent)  # [j]: process j's rows of my matrix
    dist.all_to_all_single(received, sent, group=group)
    return received.flatten(0, 1)[:rows] if rank < len(shares) else None


def hand_out(
    matrix: Tensor | None, count: int, shape: torch.Size, dtype: torch.dtype, like: Tensor
) -> list[Tensor]:
    """The reverse of `collect`: everybody's matrix goes back; returns my rows of each of `count`.

    `matrix` (rows, C) is mine, if I had one; `like` is a tensor of the processes that share it.
    """
    group = group_of(like)
    size, (rows, columns) = group.size(), shape
    most = -(-rows // size)
    sent = torch.zeros(size * most, columns, dtype=dtype, device=like.device)
    if matrix is not None:
        sent[:rows] = matrix
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    first, last = bounds(rows, size, group.rank())
    return [part[: last - first] for part in received.view(size, most, columns)[:count]]


def sums_of_squares(tensors: list[Tensor]) -> Tensor:
    """The sum of squares of each row of each tensor, in their order, float64, on all processes.

    It does not depend on how many share them, which their norm in float32 does.
    """
    first = next((t for t in tensors if is_shared(t)), None)
    size = 1 if first is None else group_of(first).size()
    rows = [-(-len(t) // size) for t in tensors]  # of a process at most
    mine = torch.zeros(sum(rows), dtype=torch.float64, device=local(tensors[0]).device)
    for tensor, place in zip(map(local, tensors), mine.split(rows), strict=True):
        if len(tensor):
            flat = tensor.reshape(len(tensor), -1)
            norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
            place[: len(tensor)] = norms.square()
    if first is None:
        return mine
    everyones = torch.empty(size, len(mine), dtype=torch.float64, device=mine.device)
    dist.all_gather_single(everyones.view(-1), mine, group=group_of(first))
    parts = zip(everyones.split(rows, dim=1), tensors, strict=True)
    return torch.cat([part.flatten()[: len(tensor)] for part, tensor in parts])
