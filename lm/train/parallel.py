"""The gradients of a batch that several processes share.

    micro-batches of this process -> Backward -> gradients of the whole batch, in every process

    none   one process: loss and gradients are one function, which a compiler sees whole
    ddp    every process holds the whole model: torch's DistributedDataParallel
    fsdp   every process keeps some rows of each parameter: torch's fully_shard (FSDP2)

Every micro-batch weighs its loss by 1 / (micro-batches of the batch), and gradients are summed. By
`reduction: sum` in whatever order is fast. By `tree`, those of micro-batches 2i and 2i + 1 are
added, then those sums likewise: one order for any number of processes that is a power of two.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lm.machine.device import Stopwatch
from lm.machine.processes import Processes
from lm.machine.sharded_tensors import mesh_of
from lm.model.transformer import TransformerLM

LossOf = Callable[[TransformerLM, Tensor, Tensor], Tensor]
# model, x, y, weight of the loss -> loss, gradients of weight x loss by each parameter
Gradients = Callable[[TransformerLM, Tensor, Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]


class Backward:
    """Takes the micro-batches of a batch one by one; after the last, every .grad is the batch's."""

    def __init__(self, model: TransformerLM, tree: bool) -> None:
        self.model, self.tree, self.sums = model, tree, PairwiseSum()
        self.forward = Stopwatch(model.head.device)  # of several processes shows which is slow
        self.watching, self.spoilt = False, False
        self.alternating = False  # whether processes take micro-batches in turn

    def __call__(self, x: Tensor, y: Tensor, weight: Tensor, last: bool) -> Tensor:
        """The loss of a micro-batch of windows (B, T), in nats."""
        raise NotImplementedError

    def watch(self, gradients: Tensor) -> None:
        """Remember whether gradients are not finite before they meet those of others."""
        if self.watching:
            self.spoilt |= not bool(gradients.isfinite().all())


class PairwiseSum:
    """The sum of 2^k lists of tensors over a balanced binary tree, as they come."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, list[Tensor]]] = []  # terms and their sum, the largest first

    def add(self, term: list[Tensor]) -> None:
        """Take in the next term, whose memory may be used."""
        count = 1
        while self.parts and self.parts[-1][0] == count:
            _, before = self.parts.pop()
            for total, part in zip(before, term, strict=True):
                total.add_(part)
            term, count = before, 2 * count
        self.parts.append((count, term))

    def take(self) -> list[list[Tensor]]:
        """The sums to which the next is to be added, the smallest first; none remains."""
        parts, self.parts = self.parts, []
        return [sums for _, sums in reversed(parts)]


def pairwise(terms: Tensor) -> Tensor:
    """The same sum over the first dimension: (2^k, n) to (n,)."""
    while len(terms) > 1:
        terms = terms[0::2] + terms[1::2]
    return terms[0]


def own_micro_batches(count: int, processes: Processes, alternating: bool) -> range:
    """The numbers of those of `count` micro-batches of a batch that this process computes.

    Neighbours, so that a process can add up its own; or, `alternating`, every N-th, so that those
    which all processes compute at the same time are neighbours.
    """
    if alternating:
        return range(processes.rank, count, processes.size)
    share = count // processes.size
    return range(processes.rank * share, (processes.rank + 1) * share)


class Alone(Backward):
    """One process."""

    def __init__(self, model: TransformerLM, gradients_of: Gradients, tree: bool):
        super().__init__(model, tree)
        self.gradients_of = gradients_of
        self.parameters = tuple(model.parameters())

    def __call__(self, x: Tensor, y: Tensor, weight: Tensor, last: bool) -> Tensor:
        """See Backward."""
        loss, gradients = self.gradients_of(self.model, x, y, weight)
        if self.tree:
            self.sums.add(list(gradients))
            if not last:
                return loss
            gradients = tuple(self.sums.take()[0])
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return loss


class _Loss(nn.Module):
    """What DistributedDataParallel wraps: a module whose forward pass gives the loss."""

    def __init__(self, model: TransformerLM, loss_of: LossOf):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss_of(self.model, x, y)


class Replicated(Backward):
    """Every process holds the whole model; gradients are reduced during the last backward pass."""

    def __init__(self, model: TransformerLM, loss_of: LossOf, processes: Processes, tree: bool):
        super().__init__(model, tree)
        self.parameters, self.processes = tuple(model.parameters()), processes
        self.before: list[dict[Tensor, Tensor]] = []  # to which the last gradients are added
        self.ddp = nn.parallel.DistributedDataParallel(
            _Loss(model, loss_of), gradient_as_bucket_view=True, forward_sync_buffers=False
        )
        self.ddp.register_comm_hook(None, self._reduced)
        self.laid_out = tree or processes.size <= 2  # a + b needs no order

    def _lay_out(self, x: Tensor, y: Tensor) -> None:
        """Let DDP see a backward pass, after which it lays its buckets out anew.

        The order in which a ring adds depends on a number's place in its bucket: in a resumed run
        the first step would else be added otherwise than in one that was never stopped.
        """
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            self.ddp(x, y).backward()
        _taken(self.parameters)
        self.laid_out = True

    def __call__(self, x: Tensor, y: Tensor, weight: Tensor, last: bool) -> Tensor:
        """See Backward."""
        if not self.laid_out:
            self._lay_out(x, y)
        if last:
            sums = self.sums.take()
            self.before = [dict(zip(self.parameters, part, strict=True)) for part in sums]
        with nullcontext() if last else self.ddp.no_sync():
            with self.forward.lap():
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
        """The gradients of a bucket, summed over micro-batches and processes."""
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
        dist.all_gather_single(sums_of_all.view(-1), _reduce_scattered(parts))
        flat.copy_(sums_of_all.view(-1)[: len(flat)])
        done: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[flat.device] if flat.is_cuda else None
        )
        done.set_result(flat)
        return done


class Sharded(Backward):
    """Every process keeps its rows of each parameter; `shard` has made the model so."""

    def __init__(self, model: TransformerLM, loss_of: LossOf, tree: bool):
        super().__init__(model, tree)
        self.loss_of = loss_of
        self.alternating = tree  # neighbours are added as they come
        self.gather, self.reduce = _AllGather(), _ReduceScatter(self)
        for module in (*model.layers, model):
            fsdp: Any = module
            fsdp.set_custom_all_gather(self.gather)
            fsdp.set_custom_reduce_scatter(self.reduce)
            fsdp.set_force_sum_reduction_for_comms(True)
            fsdp.set_gradient_divide_factor(1.0)

    def __call__(self, x: Tensor, y: Tensor, weight: Tensor, last: bool) -> Tensor:
        """See Backward."""
        fsdp: Any = self.model
        fsdp.set_requires_gradient_sync(last or self.tree)
        self.gather.waited_s = 0.0
        with self.forward.lap():
            loss = self.loss_of(self.model, x, y)
        if not self.forward.on_gpu:
            self.forward.seconds -= self.gather.waited_s
        (loss * weight).backward()
        if self.tree:
            parameters = tuple(self.model.parameters())  # the sharded ones, now
            self.sums.add(_taken(parameters))
            if last:
                for parameter, gradient in zip(parameters, self.sums.take()[0], strict=True):
                    parameter.grad = gradient
        return loss.detach()


class _AllGather:
    """FSDP's own, with the time that a CPU waits in it; a GPU's is in its forward pass."""

    waited_s = 0.0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        start = time.perf_counter()
        work = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        self.waited_s += time.perf_counter() - start
        return work


class _ReduceScatter(_AllGather):
    """FSDP's own, or by a tree."""

    def __init__(self, backward: Backward):
        self.backward = backward

    def __call__(  # type: ignore[override]
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self.backward.watch(input_tensor)
        if not self.backward.tree:
            return dist.reduce_scatter_single(
                output_tensor, input_tensor, op=op, group=group, async_op=async_op
            )
        parts = input_tensor.view(group.size(), -1)
        output_tensor.copy_(_reduce_scattered(parts, group))
        return None


def _reduce_scattered(parts: Tensor, group: Any = None) -> Tensor:
    """The part of my rank of what each process has, (N, n), summed pairwise over them, (n,)."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return pairwise(received)


def _taken(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients, which the parameters then have no more."""
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


def shard(model: TransformerLM, device: torch.device) -> None:
    """Leave each process its rows of each parameter; a block at a time is gathered when used."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = mesh_of(dist.group.WORLD, device.type)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
