"""The metrics of a model on the validation split, and what must hold for them."""

import math

import torch

from lm.base.errors import InputError
from lm.base.settings import EvaluateConfig
from lm.data.batches import Split
from lm.machine.gauges import free_memory_bytes, require_memory
from lm.model.loss import METRICS, Sums, validation_logits
from lm.model.transformer import TransformerLM


def require_logits_fit(
    config: EvaluateConfig, model: TransformerLM, valid: Split, device: torch.device
) -> None:
    """Raise EnvironmentFault if the logits of a batch of windows cannot fit into memory."""
    stride = config.stride or model.config.context_length
    windows = min(config.batch_size, -(-len(valid.tokens) // stride))
    require_memory(
        f"evaluate.batch_size = {config.batch_size}: the logits of {windows:,} windows take",
        validation_logits(model.config, "float32", windows),
        free_memory_bytes(device),
        "lower it, which changes no result",
    )


def finite_metrics(sums: Sums, model: str) -> dict[str, float]:
    """Return every metric by name. Raises InputError, naming the model, if one is not finite."""
    metrics = {name: metric(sums) for name, metric in METRICS.items()}
    if not all(map(math.isfinite, metrics.values())):
        raise InputError(
            f"{model}: its loss on the validation split is {metrics['loss_nats']}: the weights are "
            "broken or too large; train it again with a lower train.lr"
        )
    return metrics
