"""Tensors of which each process keeps some rows, as torch's fully_shard cuts them (DTensor).

Of R rows and N processes, rank r keeps the rows r c to (r + 1) c, c = ceil(R / N); the last ranks
have fewer, or none. Functions that also take ordinary tensors return those as they are.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lm.machine.collectives import all_gather_single


def is_shared(tensor: Tensor) -> bool:
    """Return whether this process keeps only its rows of the tensor."""
    return hasattr(tensor, "placements")  # of DTensor, whose import takes half a second


def local(tensor: Tensor) -> Tensor:
    """Return the rows that this process keeps; changing them changes the tensor."""
    shared: Any = tensor
    rows: Tensor = shared.to_local() if is_shared(tensor) else tensor
    return rows


def whole(tensor: Tensor) -> Tensor:
    """Return all rows. Every process must call this: the rows are gathered from all."""
    shared: Any = tensor
    rows: Tensor = shared.full_tensor() if is_shared(tensor) else tensor
    return rows


def cut_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Return a whole tensor, which every process has, cut as `pattern` is."""
    if not is_shared(pattern):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = pattern.device_mesh, pattern.placements  # type: ignore[attr-defined]
    tensor = tensor.to(pattern.device)
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def staged(rows: Tensor, pattern: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return a tensor in CPU memory, cut as `pattern` is, of which this process keeps `rows`.

    `group` holds the same processes, connected for the CPU.
    """
    if not is_shared(pattern):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = mesh_of(group, "cpu"), pattern.placements  # type: ignore[attr-defined]
    shape, stride = pattern.shape, pattern.stride()
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


@functools.cache
def mesh_of(group: dist.ProcessGroup | None, device_type: str) -> Any:
    """Return a group as the mesh that DTensor wants, with one device for each process."""
    from torch.distributed.device_mesh import DeviceMesh  # takes half a second

    assert group is not None
    return DeviceMesh.from_group(group, device_type)


def group_of(tensor: Tensor) -> dist.ProcessGroup:
    """Return the processes that share a tensor."""
    group: dist.ProcessGroup = tensor.device_mesh.get_group()  # type: ignore[attr-defined]
    return group


def collect(shares: list[Tensor], like: Tensor) -> Tensor | None:
    """Exchange rows so that rank i gets the whole of matrix i, (rows, C), or None beyond the last.

    shares[i] (my rows, C) is this process's part of matrix i, at most one for each process. `like`
    is a shared tensor of the same shape as the matrices.
    """
    group, (rows, columns) = group_of(like), like.shape
    size, rank = group.size(), group.rank()
    most = -(-rows // size)
    sent = shares[0].new_zeros(size, most, columns)  # [i]: my rows of matrix i, to process i
    for to, share in zip(sent, shares, strict=False):
        to[: len(share)] = share
    received = torch.empty_like(sent)  # [j]: process j's rows of my matrix
    dist.all_to_all_single(received, sent, group=group)
    return received.flatten(0, 1)[:rows] if rank < len(shares) else None


def hand_out(matrix: Tensor | None, count: int, dtype: torch.dtype, like: Tensor) -> list[Tensor]:
    """Undo `collect`: send back the rows of `matrix`; return my rows of each of `count` matrices.

    `matrix` (rows, C) is this process's whole one, if it has one.
    """
    group, (rows, columns) = group_of(like), like.shape
    size, kept = group.size(), len(local(like))
    most = -(-rows // size)
    sent = torch.zeros(size * most, columns, dtype=dtype, device=like.device)
    if matrix is not None:
        sent[:rows] = matrix
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return [part[:kept] for part in received.view(size, most, columns)[:count]]


def sums_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares of each row of each tensor, in their order, in float64.

    Every process gets the same numbers, whatever the number of processes; norms in float32 would
    depend on it.
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
    all_gather_single(everyones.view(-1), mine, group=group_of(first))
    parts = zip(everyones.split(rows, dim=1), tensors, strict=True)
    return torch.cat([part.flatten()[: len(tensor)] for part, tensor in parts])
