"""Write and read a model folder: weights, settings and tokenizer, without the optimizer.

    models/model/   model.safetensors, config.json, tokenizer.json, provenance.json

Files are written whole and checked when they are read. Reading them runs no code.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lm.base.errors import InputError
from lm.base.files import read_json, write_json
from lm.base.migrations import ADDED, migrated
from lm.base.sections import UP_TO_1024, read_section
from lm.data.tokenizer import Tokenizer, load_tokenizer
from lm.machine.gauges import free_memory_bytes
from lm.model.safetensors_file import open_safetensors, unshared, write_safetensors
from lm.model.stored import FLOATS, as_stored, require_finite, require_settings, require_weights
from lm.model.transformer import ModelConfig, TransformerLM

PROBED = 16  # ids whose logits are computed when a model is opened
PROVENANCE = ("model", "train", "inputs", "code", "environment")


def save_model(model: TransformerLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write all that using the model needs: weights, settings and tokenizer."""
    tokenizer.save(folder)
    write_json(folder / "config.json", asdict(model.config))
    weights = unshared(model.state_dict())
    write_safetensors(weights, {"format": "pt"}, folder / "model.safetensors")


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the settings, hashes of inputs and code, and environment that made a model.

    Raises InputError if the file is missing or was not written by stage train.
    """
    file = folder / "provenance.json"
    found = read_json(file)
    if isinstance(found, dict) and all(isinstance(found.get(part), dict) for part in PROVENANCE):
        threads = found["train"].get("num_threads")
        if threads is None or (type(threads) is int and UP_TO_1024.holds(threads)):
            return {**found, **{part: migrated(part, found[part]) for part in ADDED}}
    raise InputError(f"{file}: not a record of stage train; run it again")


def load_model(folder: Path, device: torch.device) -> tuple[TransformerLM, Tokenizer]:
    """Return a saved model, in evaluation mode, and its tokenizer.

    Raises InputError if a file is missing, torn or does not fit the others.
    """
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    settings = migrated("model", read_json(config_file))
    config = read_section(ModelConfig, {"model": settings}, "model", str(config_file))
    with open_safetensors(weights_file) as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    name, stored = str(weights_file), as_stored(weights)
    require_settings(name, config, stored)
    _require_room(config_file, config)
    model = TransformerLM(config)
    require_weights(name, model.state_dict(), stored, FLOATS)
    require_finite(name, weights, weights)
    model.load_state_dict(weights)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{config.vocab_size}; they do not belong together"
        )
    _require_finite_logits(name, model.eval(), tokenizer.end_id)
    return model.to(device), tokenizer


def _require_room(file: Path, config: ModelConfig) -> None:
    """Raise InputError if the rotary angles do not fit: no weight shows their context_length."""
    needed = 12 * config.context_length * config.head_dim  # two of float64, and one of float32
    free = free_memory_bytes(torch.device("cpu"))
    if config.position_embedding == "rope" and free is not None and needed > free:
        raise InputError(
            f"{file}: context_length = {config.context_length} takes {needed / 1e9:,.1f} GB for "
            f"rotary positions, {free / 1e9:,.1f} GB are free"
        )


@torch.no_grad()
def _require_finite_logits(name: str, model: TransformerLM, end_id: int) -> None:
    """Raise InputError if finite weights are too large to compute with."""
    ids = torch.arange(min(PROBED, model.config.vocab_size, model.config.context_length))[None]
    if not model(ids, model.documents(ids, end_id)).isfinite().all():
        raise InputError(f"{name}: weights too large: logits are not finite; lower train.lr")
