"""Accumulate the gradients of a batch that several processes share.

    micro-batches of this process -> GradientAccumulator -> .grad of the whole batch

    none   OneProcess, in accumulate.py
    ddp    Replicated: every process holds the whole model (torch's DistributedDataParallel)
    fsdp   Sharded: every process keeps some rows of each parameter (torch's fully_shard, FSDP2)

Every micro-batch weighs its loss by 1 / (micro-batches of the batch), and gradients are summed.
`reduction: sum` adds them in whatever order is fast. `tree` adds those of micro-batches 2i and
2i + 1, then those sums in pairs again: one order for 1, 2, 4, 8, ... processes.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lm.machine import collectives
from lm.machine.device import Stopwatch
from lm.machine.processes import Processes
from lm.machine.sharded_tensors import mesh_of
from lm.model.transformer import TransformerLM

LossOf = Callable[[TransformerLM, Tensor, Tensor], Tensor]  # model, x, y -> loss


class GradientAccumulator:
    """Add up the gradients of a batch, micro-batch by micro-batch."""

    def __init__(self, model: TransformerLM, tree: bool) -> None:
        self.model, self.tree, self.sums = model, tree, PairwiseSum()
        self.forward_time = Stopwatch(model.head.device)  # shows which process is slow
        self.watching, self.nonfinite = False, False
        self.alternating = False  # processes take micro-batches in turn

    def add(self, x: Tensor, y: Tensor, weight: Tensor, last: bool) -> Tensor:
        """Run a micro-batch (B, T) forward and backward; return its loss, in nats.

        After the last one every parameter's .grad is that of the whole batch.
        """
        raise NotImplementedError

    def watch(self, gradients: Tensor) -> None:
        """Record whether this process's own gradients are not finite, before they are summed."""
        if self.watching:
            self.nonfinite |= not bool(gradients.isfinite().all())


class PairwiseSum:
    """The sum of 2^k lists of tensors over a balanced binary tree, in the order they come."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, list[Tensor]]] = []  # terms and their sum, the largest first

    def add(self, term: list[Tensor]) -> None:
        """Add the next term, whose memory is reused."""
        count = 1
        while self.parts and self.parts[-1][0] == count:
            _, before = self.parts.pop()
            for total, part in zip(before, term, strict=True):
                total.add_(part)
            term, count = before, 2 * count
        self.parts.append((count, term))

    def take(self) -> list[list[Tensor]]:
        """Remove and return the sums that the next term would be added to, the smallest first."""
        parts, self.parts = self.parts, []
        return [sums for _, sums in reversed(parts)]


def pairwise(terms: Tensor) -> Tensor:
    """Return the same sum over the first dimension: (2^k, n) to (n,)."""
    while len(terms) > 1:
        terms = terms[0::2] + terms[1::2]
    return terms[0]


def own_micro_batches(count: int, processes: Processes, alternating: bool) -> range:
    """Return the numbers of the micro-batches, of `count` in a batch, that this process computes.

    They are neighbours, so that a process can add up its own. With `alternating` it takes every
    N-th, so that the N processes compute neighbours at the same time.
    """
    if alternating:
        return range(processes.rank, count, processes.size)
    share = count // processes.size
    return range(processes.rank * share, (processes.rank + 1) * share)


class _Loss(nn.Module):
    """A module whose forward pass returns the loss, as DistributedDataParallel needs it."""

    def __init__(self, model: TransformerLM, loss_of: LossOf):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss_of(self.model, x, y)


class Replicated(GradientAccumulator):
    """The whole model in every process; the last backward pass reduces the gradients."""

    def __init__(self, model: TransformerLM, loss_of: LossOf, processes: Processes, tree: bool):
        super().__init__(model, tree)
        self.parameters, self.processes = tuple(model.parameters()), processes
        self.before: list[dict[Tensor, Tensor]] = []  # sums that the last gradients are added to
        self.ddp = nn.parallel.DistributedDataParallel(
            _Loss(model, loss_of), gradient_as_bucket_view=True, **collectives.BUFFERS_STAY
        )
        self.ddp.register_comm_hook(None, self._reduced)
        self.laid_out = tree or processes.size <= 2  # two terms have one order

    def _lay_out(self, x: Tensor, y: Tensor) -> None:
        """Run a backward pass and drop its gradients: DDP rebuilds its buckets after the first one.

        A ring adds in an order that depends on a number's place in its bucket. Without this, the
        first step of a resumed run would add in another order than an uninterrupted run.
        """
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            self.ddp(x, y).backward()
        _taken(self.parameters)
        self.laid_out = True

    def add(self, x: Tensor, y: Tensor, weight: Tensor, last: bool) -> Tensor:
        """See GradientAccumulator."""
        if not self.laid_out:
            self._lay_out(x, y)
        if last:
            sums = self.sums.take()
            self.before = [dict(zip(self.parameters, part, strict=True)) for part in sums]
        with nullcontext() if last else self.ddp.no_sync():
            with self.forward_time.lap():
                loss = self.ddp(x, y)
            (loss * weight).backward()
        self.before = []
        if self.tree and not last:
            self.sums.add(_taken(self.parameters))
        return loss.detach()

    def _reduced(
        self,
        _: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        """Sum the gradients of a bucket over micro-batches and processes."""
        flat, size = bucket.buffer(), self.processes.size
        for sums in self.before:
            for gradient, parameter in zip(bucket.gradients(), bucket.parameters(), strict=True):
                gradient.add_(sums[parameter])
        self.watch(flat)
        if not self.tree:
            work = dist.all_reduce(flat, async_op=True)
            assert work is not None
            return work.get_future().then(lambda done: done.value()[0])
        parts = flat.new_zeros(size, -(-len(flat) // size))
        parts.view(-1)[: len(flat)] = flat
        sums_of_all = torch.empty_like(parts)
        collectives.all_gather_single(sums_of_all.view(-1), _reduce_scattered(parts))
        flat.copy_(sums_of_all.view(-1)[: len(flat)])
        devices = [flat.device] if flat.is_cuda else None
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        done.set_result(flat)
        return done


class Sharded(GradientAccumulator):
    """Some rows of each parameter in every process, as `shard` has cut the model."""

    def __init__(self, model: TransformerLM, loss_of: LossOf, tree: bool):
        super().__init__(model, tree)
        self.loss_of = loss_of
        self.alternating = tree  # neighbours are added as they come
        reduce = _ReduceScatter(self)
        for module in (*model.layers, model):
            fsdp: Any = module
            fsdp.set_custom_reduce_scatter(reduce)
            fsdp.set_force_sum_reduction_for_comms(True)
            fsdp.set_gradient_divide_factor(1.0)

    def add(self, x: Tensor, y: Tensor, weight: Tensor, last: bool) -> Tensor:
        """See GradientAccumulator."""
        fsdp: Any = self.model
        fsdp.set_requires_gradient_sync(last or self.tree)
        with self.forward_time.lap():
            loss = self.loss_of(self.model, x, y)
        (loss * weight).backward()
        if self.tree:
            parameters = tuple(self.model.parameters())  # the sharded ones, now
            self.sums.add(_taken(parameters))
            if last:
                for parameter, gradient in zip(parameters, self.sums.take()[0], strict=True):
                    parameter.grad = gradient
        return loss.detach()


class _ReduceScatter:
    """FSDP's reduce-scatter, or one over a tree."""

    def __init__(self, accumulator: GradientAccumulator):
        self.accumulator = accumulator

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self.accumulator.watch(input_tensor)
        if not self.accumulator.tree:
            return collectives.reduce_scatter_single(
                output_tensor, input_tensor, op=op, group=group, async_op=async_op
            )
        parts = input_tensor.view(group.size(), -1)
        output_tensor.copy_(_reduce_scattered(parts, group))
        return None


def _reduce_scattered(parts: Tensor, group: Any = None) -> Tensor:
    """Sum the parts (N, n) of all processes pairwise; return this rank's part (n,)."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return pairwise(received)


def _taken(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Remove the gradients from the parameters and return them."""
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


def shard(model: TransformerLM, device: torch.device) -> None:
    """Share out the rows of each parameter; a block's are gathered while it is used."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = mesh_of(dist.group.WORLD, device.type)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("loss", "guesses"):
        register_fsdp_forward_method(model, method)
