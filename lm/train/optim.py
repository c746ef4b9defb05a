"""Optimizers, chosen by name, and gradient clipping.

To add one, write a subclass of AdamW with its own `state_names` and `_update`, a function that
makes its parameter groups, each with an "initial_lr", and an entry of OPTIMIZERS. While `found_inf`
is 1, `_update` must change nothing (ahead.py). Under fsdp it sees only the rows of each parameter
that this process holds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lm.base.settings import OptimizerConfig
from lm.machine.sharded_tensors import (
    collect,
    group_of,
    hand_out,
    is_shared,
    local,
    sums_of_squares,
)

# Newton-Schulz coefficients of Jordan et al. 2024, chosen for a steep slope at zero
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).

        m <- b1 m + (1 - b1) g          theta <- theta - lr * weight_decay * theta
        v <- b2 v + (1 - b2) g^2        theta <- theta - lr * m / (1 - b1^t)
                                                 / (sqrt(v / (1 - b2^t)) + eps)

    The arithmetic is torch's fused kernel where there is one (CPU, CUDA, MPS): it reads each
    number once. `fused=False` runs one tensor operation after the other.
    """

    # torch wraps these to keep its compiler out; the wrapper imports it: 1.5 s at every start
    add_param_group = unwrap(Optimizer.add_param_group)
    state_dict = unwrap(Optimizer.state_dict)
    load_state_dict = unwrap(Optimizer.load_state_dict)
    zero_grad = unwrap(Optimizer.zero_grad)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool = True,
    ):
        """Raise ValueError for a rate, beta, eps or decay outside of its range."""
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW: {lr=}, {betas=}, {eps=}, {weight_decay=} out of range")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"fused": fused})

    found_inf: Tensor | None = None  # scalar on the device; if it is 1, `step` changes nothing

    def state_names(self, group: dict[str, Any]) -> set[str]:
        """Return the names in a parameter's state: a scalar "step", others of its shape."""
        return {"step", "exp_avg", "exp_avg_sq"}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                counter = p.device if group["fused"] else "cpu"  # where the kernels expect it
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=counter)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            [self.state[p]["step"] for p in parameters],
            fused=group["fused"],
            foreach=False,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            found_inf=self.found_inf,
        )


class Muon(AdamW):
    """Momentum orthogonalised by Newton-Schulz for matrices, AdamW for all else (Jordan 2024).

        m <- momentum m + (1 - momentum) g;   u = (1 - momentum) g + momentum m
        theta <- theta (1 - lr * weight_decay) - lr * scale * UV^T,   where u = U S V^T

    scale = sqrt(max(1, rows / columns)), as torch.optim.Muon has it. A parameter group with
    "momentum" holds matrices; the others are AdamW's. Equal shapes are stacked and
    orthogonalised together.
    """

    def state_names(self, group: dict[str, Any]) -> set[str]:
        """See AdamW."""
        return {"momentum_buffer"} if "momentum" in group else super().state_names(group)

    def _update(self, group: dict[str, Any]) -> None:
        if "momentum" not in group:
            super()._update(group)
            return
        lr, momentum = group["lr"], group["momentum"]
        stacks: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for some in _at_once([p for p in group["params"] if p.grad is not None]):
            for p in some:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            gradients = [local(p.grad) for p in some if p.grad is not None]
            buffers = [local(self.state[p]["momentum_buffer"]) for p in some]
            if self.found_inf is not None:  # keep m: m + (1 - momentum) (m - m)
                nonfinite = self.found_inf.bool()
                gradients = [
                    torch.where(nonfinite, *pair) for pair in zip(buffers, gradients, strict=True)
                ]
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            mixed = torch._foreach_lerp(gradients, buffers, momentum)
            for p, update in zip(some, mixed, strict=True):
                stacks.setdefault(p.shape, []).append((p, update))
        for shape, stack in stacks.items():
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            updates = [u for _, u in stack]
            if is_shared(stack[0][0]):
                directions = _orthogonalise_shared(updates, stack[0][0])
            else:
                directions = list(orthogonalise(torch.stack(updates)))
            steps = dict(zip((p for p, _ in stack), directions, strict=True))
            for some in _at_once(list(steps)):
                rows = [local(p) for p in some]
                decay = 1 - lr * group["weight_decay"]
                directions = [steps[p].to(p.dtype) for p in some]
                if self.found_inf is not None:  # keep theta: 1 theta - 0
                    nonfinite = self.found_inf.bool()
                    decay = torch.where(nonfinite, 1.0, decay)
                    directions = [torch.where(nonfinite, 0.0, d) for d in directions]
                torch._foreach_mul_(rows, decay)
                torch._foreach_add_(rows, directions, alpha=-lr * scale)


def _at_once(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Group what is updated together: on CUDA all, in one launch; else one by one, in cache."""
    together = bool(parameters) and parameters[0].is_cuda
    return [parameters] if together else [[p] for p in parameters]


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximate the orthogonal matrix nearest to each of (N, R, C): five Newton-Schulz steps."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16()
    if transposed := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if transposed else x


def _orthogonalise_shared(updates: list[Tensor], like: Tensor) -> list[Tensor]:
    """Orthogonalise matrices whose rows are spread over processes: each gathers whole ones."""
    size, directions = group_of(like).size(), []
    for first in range(0, len(updates), size):
        some = updates[first : first + size]
        matrix = collect(some, like)
        direction = None if matrix is None else orthogonalise(matrix[None])[0]
        directions += hand_out(direction, len(some), torch.bfloat16, like)
    return directions


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a matrix in a block, which Muon orthogonalises."""
    return name.startswith("layers.") and parameter.ndim == 2


def parameter_groups(
    model: nn.Module, decay_embeddings: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the parameters as (matrices in the blocks, other decayed ones, undecayed ones).

    Norms never decay; embeddings, and a head tied to them, only on request.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices: list[Tensor] = []
    decayed: list[Tensor] = []
    undecayed: list[Tensor] = []
    for name, p in model.named_parameters():
        if id(p) in embeddings:
            (decayed if decay_embeddings else undecayed).append(p)
        elif p.ndim < 2:  # a norm
            undecayed.append(p)
        elif name == "lm_head.weight":
            decayed.append(p)
        elif is_block_matrix(name, p):
            matrices.append(p)
        else:
            raise AssertionError(f"{name} {tuple(p.shape)}: of no known kind")
    return matrices, decayed, undecayed


def make_adamw(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Make AdamW over all parameters."""
    matrices, decayed, undecayed = parameter_groups(model, config.decay_embeddings)
    return AdamW(_adamw_groups(config, matrices + decayed, undecayed))


def make_muon(model: nn.Module, config: OptimizerConfig) -> Muon:
    """Make Muon for the matrices in the blocks, AdamW for embeddings, head and norms."""
    matrices, decayed, undecayed = parameter_groups(model, config.decay_embeddings)
    muon_group = {
        "params": matrices,
        "lr": config.muon_lr,
        "initial_lr": config.muon_lr,
        "momentum": config.muon_momentum,
        "weight_decay": config.weight_decay,
    }
    return Muon([muon_group, *_adamw_groups(config, decayed, undecayed)])


def _adamw_groups(
    config: OptimizerConfig, decayed: list[Tensor], undecayed: list[Tensor]
) -> list[dict[str, Any]]:
    """Return the groups that are not empty; a schedule multiplies each "initial_lr"."""
    common = {
        "lr": config.lr,
        "initial_lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }
    groups = [(decayed, config.weight_decay), (undecayed, 0.0)]
    return [common | {"params": ps, "weight_decay": decay} for ps, decay in groups if ps]


@dataclass(frozen=True)
class OptimizerKind:
    """All that depends on the choice of train.optimizer; lm/plan reads the numbers."""

    make: Callable[[nn.Module, OptimizerConfig], AdamW]
    matrix_numbers: int  # float32 numbers of state for each weight of a matrix in a block
    other_numbers: int  # the same for each other weight
    # for each weight of a matrix, where an update computes with whole matrices, else 0:
    kept_bytes: int  # for every matrix in the blocks, until the update ends
    stacked_bytes: int  # for the matrices computed together; under fsdp for one matrix
    exchanged_bytes: int  # under fsdp for that matrix: its rows as they are sent and received
    sent_bytes: int  # under fsdp for every matrix: to the process that computes it, and back


OPTIMIZERS = {
    "adamw": OptimizerKind(
        make_adamw,
        matrix_numbers=2,
        other_numbers=2,
        kept_bytes=0,
        stacked_bytes=0,
        exchanged_bytes=0,
        sent_bytes=0,
    ),
    # gradients and a stack of them in float32, three more stacks and the directions in bfloat16
    "muon": OptimizerKind(
        make_muon,
        matrix_numbers=1,
        other_numbers=2,
        kept_bytes=4,
        stacked_bytes=10,
        exchanged_bytes=8,
        sent_bytes=6,
    ),
}


def gradient_clipping(
    parameters: Iterable[Tensor], max_l2_norm: float, by_rows: bool = False
) -> Tensor:
    """Scale all gradients by min(1, max / (norm + 1e-6)), norm being their joint L2 norm.

    Parameters without gradient are skipped. Return the norm before clipping, a scalar. With
    `by_rows` squares are added row by row in float64, so that the norm is the same for any number
    of processes.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if by_rows:
        norm = sums_of_squares(gradients).sum().sqrt().float()
    else:
        norm = nn.utils.get_total_norm(gradients)
    # on a GPU always, since reading the norm would wait for it; a factor of 1 changes no bit
    if norm.is_cuda or not norm + 1e-6 <= max_l2_norm:  # true for nan: it must reach the gradients
        nn.utils.clip_grads_with_norm_(parameters, max_l2_norm, norm)
    return norm
