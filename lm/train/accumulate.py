"""Accumulate the gradients of a batch in one process, or choose how several do: parallel.py."""

from collections.abc import Callable
from typing import assert_never

from torch import Tensor

from lm.base.settings import BY_TREE, TrainConfig
from lm.machine.device import compiled
from lm.machine.processes import Processes
from lm.model.transformer import TransformerLM
from lm.train.parallel import GradientAccumulator, Replicated, Sharded
from lm.train.step import gradients_of, loss_of

# model, x, y, weight of the loss -> loss, gradients of weight x loss by each parameter
GradientsOf = Callable[[TransformerLM, Tensor, Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]


class OneProcess(GradientAccumulator):
    """For the only process: one function runs both passes, so a compiler can see them together."""

    def __init__(self, model: TransformerLM, backward: GradientsOf, tree: bool, overwrites: bool):
        """With `overwrites`, a call of `backward` overwrites what the one before returned."""
        super().__init__(model, tree)
        self.backward, self.overwrites = backward, overwrites
        self.parameters = tuple(model.parameters())

    def add(self, x: Tensor, y: Tensor, weight: Tensor, last: bool) -> Tensor:
        """See GradientAccumulator."""
        loss, gradients = self.backward(self.model, x, y, weight)
        if self.overwrites and not last:  # the last ones are read before the next call
            loss = loss.clone()
            if self.tree or self.parameters[0].grad is None:  # later ones are added at once
                gradients = tuple(gradient.clone() for gradient in gradients)
        if self.tree:
            self.sums.add(list(gradients))
            if not last:
                return loss
            gradients = tuple(self.sums.take()[0])
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return loss


def make_accumulator(
    model: TransformerLM, config: TrainConfig, processes: Processes, end_id: int | None
) -> GradientAccumulator:
    """Return the accumulator that train.parallel and train.compile ask for."""
    device, tree = model.head.device, BY_TREE[config.reduction]

    def forward(model: TransformerLM, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(model, x, y, config.dtype, end_id)

    def backward(
        model: TransformerLM, x: Tensor, y: Tensor, weight: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return gradients_of(forward, model, x, y, weight)

    match config.parallel:
        case "none":
            cuda_graph = False
            if config.compile and config.gradient_checkpointing:
                # compiled together, both passes would keep what checkpointing drops; a model that
                # needs it is so large that launches do not limit it
                forward = compiled(forward, device)
            elif config.compile:
                cuda_graph = device.type == "cuda"
                backward = compiled(backward, device, cuda_graph)
            return OneProcess(model, backward, tree, overwrites=cuda_graph)
        case "ddp":
            return Replicated(model, forward, processes, tree)
        case "fsdp":
            return Sharded(model, forward, tree)
        case other:
            assert_never(other)
