"""Convert a model to Hugging Face's files and back: a stock Llama, or Qwen3 where it has QK-norm.

    model --stock_config, stock_weights--> config.json, model.safetensors --start_from--> model

Names differ, and the order of features within a head: our rotary positions rotate the pairs
(2i, 2i + 1), theirs (i, i + D / 2). The logits are the same.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lm.base.errors import InputError
from lm.base.files import require_file
from lm.data.tokenizer import Tokenizer, open_tokenizer_json
from lm.model.kernels import evens_first
from lm.model.safetensors_file import open_safetensors
from lm.model.stored import FLOATS, require_finite
from lm.model.transformer import ModelConfig, TransformerLM


@dataclass(frozen=True)
class Architecture:
    """All that depends on the choice of a stock architecture."""

    name: str  # of its class in transformers
    qk_norm: bool
    head_dim: int | None  # where config.json says none; None: hidden_size / num_attention_heads


ARCHITECTURES = {  # by model_type
    "llama": Architecture("LlamaForCausalLM", qk_norm=False, head_dim=None),
    "qwen3": Architecture("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
}
OUTER = {"token_embeddings": "model.embed_tokens", "ln_final": "model.norm", "lm_head": "lm_head"}
INNER = {
    "ln1": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.output_proj": "self_attn.o_proj",
    "ln2": "post_attention_layernorm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w3": "mlp.up_proj",
    "ffn.w2": "mlp.down_proj",
}
ROTATED = ("q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")
STOCK = {"norm": "rmsnorm", "norm_position": "pre", "position_embedding": "rope", "ffn": "swiglu"}
TYPES = {
    "model_type": str,
    "head_dim": int,
    "layer_types": list,
    "rope_scaling": dict,
    "rope_parameters": dict,
}
COUNTS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size",
          "max_position_embeddings", "vocab_size")  # fmt: skip
# the keys of a tokenizer.json that decide the ids of a text
TOKENIZER_KEYS = ("added_tokens", "normalizer", "pre_tokenizer", "model")


def not_stock(config: ModelConfig) -> str | None:
    """Return, in words, the settings that no stock architecture has; None if there are none."""
    found = [
        f"model.{key} = {_yaml(getattr(config, key))} (theirs: {_yaml(value)})"
        for key, value in {**STOCK, "intra_document_masking": False}.items()
        if getattr(config, key) != value
    ]
    if not found:
        return None
    return f"neither Llama nor Qwen3 of Hugging Face can compute it: {', '.join(found)}"


def model_type(config: ModelConfig) -> str:
    """Return the stock architecture of a model of which `not_stock` is None."""
    (found,) = (key for key, kind in ARCHITECTURES.items() if kind.qk_norm == config.qk_norm)
    return found


def stock_config(config: ModelConfig, end_id: int) -> dict[str, Any]:
    """Return their config.json, for a model of which `not_stock` is None."""
    kind = model_type(config)
    return {
        "architectures": [ARCHITECTURES[kind].name],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # where transformers 4 looks
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end_id,  # it also stands before a document
        "eos_token_id": end_id,
        "dtype": "float32",
    }


def stock_weights(model: TransformerLM) -> dict[str, Tensor]:
    """Return the weights by their names, in the model's order; most share its memory."""
    return {
        _their_name(name): evens_first(weight, model.config.head_dim)
        if name.endswith(ROTATED)
        else weight
        for name, weight in model.state_dict().items()
    }


def _their_name(name: str) -> str:
    """Return model.layers.3.mlp.down_proj.weight for layers.3.ffn.w2.weight."""
    module = name.removesuffix(".weight")
    if module in OUTER:
        return f"{OUTER[module]}.weight"
    _, number, inner = module.split(".", 2)
    return f"model.layers.{number}.{INNER[inner]}.weight"


def _pairs_together(weight: Float[Tensor, "E *C"], head_dim: int) -> Float[Tensor, "E *C"]:
    """Return the rows in our order: the inverse of `evens_first`."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def start_from(folder: Path, model: TransformerLM, tokenizer: Tokenizer) -> None:
    """Copy the weights of a Hugging Face folder into `model`, as float32.

    Leave out rows of the embedding beyond the tokenizer's tokens (padding). Execute nothing from
    the folder. Raises InputError if its model or its tokenizer differs from ours; the message names
    the settings to change.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; copy the model's there (train.init_from names it)"
        )
    _require_same_settings(folder / "config.json", model.config)
    _require_same_tokenizer(folder / "tokenizer.json", tokenizer)
    own = model.state_dict()  # shares memory with the parameters
    ours = {_their_name(name): name for name in own}
    for file, name, tensor in _stored_tensors(folder):
        tied_head = name == "lm_head.weight" and model.config.tie_embeddings
        if tied_head or name.endswith("rotary_emb.inv_freq"):
            continue  # the embedding again; follows from rope_theta
        if name not in ours:
            raise InputError(f"{file}: {name}: no such weight in a model of these settings")
        if tensor.dtype not in FLOATS:
            raise InputError(f"{file}: {name} is {tensor.dtype}; expected float32 or bfloat16")
        require_finite(str(file), {name: tensor}, [name])
        target = own[ours[name]]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = tensor[: len(target)]
        if tensor.shape != target.shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(target.shape)}"
            raise InputError(f"{file}: {name} is {shapes}")
        if name.endswith(ROTATED):
            tensor = _pairs_together(tensor, model.config.head_dim)
        target.copy_(tensor)
        del ours[name]
    if ours:
        raise InputError(f"{folder}: no weight {next(iter(ours))} in its safetensors files")


def _stored_tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield file, name and value of every tensor in the folder's safetensors files.

    Raises InputError if there are none: pickles (.bin, .pt) run code when opened.
    """
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        named = _read_object(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
            raise InputError(f"{index}: no weight_map from names to files")
        names = set(named.values())
    elif not (folder / "model.safetensors").is_file():
        raise InputError(
            f"{folder}: no model.safetensors; .bin and .pt files run code when they are opened and "
            "are not read: get the safetensors version, or have their author save one"
        )
    for name in sorted(names):
        if Path(name).name != name:
            raise InputError(f"{index}: {name} is not in this folder")
        with open_safetensors(folder / name) as file:
            for key in file.keys():  # noqa: SIM118
                yield folder / name, key, file.get_tensor(key)


def _require_same_settings(file: Path, config: ModelConfig) -> None:
    """Raise InputError unless config.json describes a model of these settings."""
    theirs = _read_object(file)
    for key, wanted in TYPES.items():
        if theirs.get(key) is not None and type(theirs[key]) is not wanted:
            raise InputError(f"{file}: {key} = {str(theirs[key])[:40]}, expected {wanted.__name__}")
    kind, names = theirs.get("model_type"), theirs.get("architectures")
    if kind not in ARCHITECTURES or names not in (None, [ARCHITECTURES[kind].name]):
        known = ", ".join(architecture.name for architecture in ARCHITECTURES.values())
        raise InputError(
            f"{file}: model_type {kind}, architectures {names}: not supported; only {known} are"
        )
    for key in COUNTS:
        if type(value := theirs.get(key)) is not int or value < 1:
            raise InputError(f"{file}: {key} = {value}; expected an integer of at least 1")
    _refuse_what_ours_lacks(file, theirs)
    expected = _settings(file, theirs)
    ours = {key: getattr(config, key) for key in expected} | {"num_kv_heads": config.kv_heads}
    if differing := [
        f"model.{key} = {_yaml(ours[key])}, expected {_yaml(expected[key])}"
        for key in expected
        if ours[key] != expected[key]
    ]:
        raise InputError(
            f"{file}: another model than params.yaml describes: {'; '.join(differing)}; set the "
            "expected values, or another train.init_from"
        )
    limit = theirs["max_position_embeddings"]
    if config.context_length > limit:
        raise InputError(
            f"{file}: model.context_length = {config.context_length}, but the model was trained on "
            f"at most {limit} positions; lower model.context_length"
        )
    if config.vocab_size > theirs["vocab_size"]:
        raise InputError(
            f"{file}: vocab_size = {theirs['vocab_size']}, the tokenizer has {config.vocab_size} "
            f"tokens; {_how_to_take_over(file.with_name('tokenizer.json'))}"
        )


def _settings(file: Path, theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of section `model` that the weights fix; defaults as in transformers."""
    width, heads = theirs["hidden_size"], theirs["num_attention_heads"]
    architecture = ARCHITECTURES[theirs["model_type"]]
    head_dim = theirs.get("head_dim") or architecture.head_dim or width / heads
    if head_dim * heads != width:
        raise InputError(
            f"{file}: head_dim = {head_dim}: only hidden_size / num_attention_heads = "
            f"{width} / {heads} is supported"
        )
    rope = theirs.get("rope_parameters") or theirs
    return {
        "d_model": width,
        "num_layers": theirs["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": theirs.get("num_key_value_heads") or heads,
        "d_ff": theirs["intermediate_size"],
        "rope_theta": rope.get("rope_theta", 10000.0),
        "norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "qk_norm": architecture.qk_norm,
        "tie_embeddings": theirs.get("tie_word_embeddings", False),
        **STOCK,
    }


def _refuse_what_ours_lacks(file: Path, theirs: dict[str, Any]) -> None:
    scaling = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if scaling else "default"
    lacking = {
        f"hidden_act = {theirs.get('hidden_act')}": theirs.get("hidden_act", "silu") != "silu",
        "attention_bias": theirs.get("attention_bias"),
        "mlp_bias": theirs.get("mlp_bias"),
        f"rotary positions of type {kind}": kind != "default",
        "partial_rotary_factor": scaling.get("partial_rotary_factor", 1) != 1,
        "sliding windows": theirs.get("use_sliding_window")
        or "sliding_attention" in (theirs.get("layer_types") or []),
        "quantization_config": theirs.get("quantization_config"),
    }
    if found := [name for name, present in lacking.items() if present]:
        raise InputError(f"{file}: {', '.join(found)}: not supported")


def _require_same_tokenizer(file: Path, tokenizer: Tokenizer) -> None:
    """Raise InputError unless a tokenizer.json gives every text the ids that ours gives."""
    require_file(file, "; only byte-level tokenizers in it are supported")
    both = open_tokenizer_json(file, tokenizer.end_token), tokenizer
    theirs, ours = (json.loads(one.backend.to_str()) for one in both)
    if any(theirs[key] != ours[key] for key in TOKENIZER_KEYS):
        raise InputError(f"{file}: not the tokenizer of data/tokenizer; {_how_to_take_over(file)}")


def _how_to_take_over(file: Path) -> str:
    name = f"{file.parent.name}.json"
    return (
        f"copy it to data/tokenizers/{name} and set tokenizer.kind: file, tokenizer.source: {name}"
    )


def _read_object(file: Path) -> dict[str, Any]:
    require_file(file, "; a model folder of Hugging Face has one")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: not a JSON object")
    return value


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
