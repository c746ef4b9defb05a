"""Write a model as one file for llama.cpp:  python -m lm.export.gguf [--model FOLDER] [--out FILE]

    weights     float32, of the architecture llama, or qwen3 where the model has QK-norm
    tokenizer   gpt2: the same ids for the same text, if GPT-2's pattern cuts it before merging

llama.cpp's own converter knows tokenizers by their hashes, so it refuses those learnt here.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lm.base.console import say
from lm.base.errors import InputError, one_line_errors
from lm.base.files import replacing
from lm.base.paths import MODEL
from lm.data.tokenizer import GPT2_PATTERN, Tokenizer
from lm.model.huggingface import model_type, not_stock, stock_weights
from lm.model.model_folder import load_model
from lm.model.transformer import ModelConfig, TransformerLM

MAGIC = b"GGUF"
# llama.cpp wants merges, plain bytes have none: this one joins bytes that UTF-8 never has
NO_MERGES = ["ÿ ÿ"]
# by Hugging Face's model_type: llama.cpp's name; whether rotary positions turn the halves of a
# head, as transformers does, or pairs of features, as we do
ARCHITECTURES = {"llama": ("LLAMA", False), "qwen3": ("QWEN3", True)}


def write(model: TransformerLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the file, atomically. Its bytes depend on model and tokenizer alone.

    Raises InputError if llama.cpp has no such model or tokenizer or `out` is another kind of file,
    and EnvironmentFault if it cannot be written.
    """
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    require_gguf(out)
    config = model.config
    if why_not := not_stock(config):
        raise InputError(why_not)
    kind = model_type(config)
    architecture, turns_halves = ARCHITECTURES[kind]
    writer = GGUFWriter(None, kind)
    _add_settings(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    weights = stock_weights(model)
    if not turns_halves:
        weights = dict(zip(weights, model.state_dict().values(), strict=True))
    names = get_tensor_name_map(MODEL_ARCH[architecture], config.num_layers)
    for name, weight in weights.items():
        theirs = names.get_name(name, (".weight",))
        assert theirs, name
        writer.add_tensor(theirs, weight.cpu().numpy())
    with replacing(out, sum(weight.nbytes for weight in weights.values())) as scratch:
        writer.write_header_to_file(scratch)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def require_gguf(out: Path) -> None:
    """Raise InputError unless `out` is free or a GGUF file, which may be replaced."""
    if out.is_file():
        with open(out, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return
    if out.exists():
        raise InputError(f"{out}: exists and is no GGUF file; name another file, or move this one")


def _add_settings(writer: Any, config: ModelConfig) -> None:
    from gguf import LlamaFileType

    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add tokens by id, and merges. Ids of the model without a token become padding.

    Raises InputError if it is not byte-level BPE over the words of GPT-2's pattern.
    """
    from gguf import TokenType

    settings = json.loads(tokenizer.backend.to_str())
    bpe = settings["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe.get("merges", [])]
    if bpe["type"] != "BPE" or bpe.get("ignore_merges"):
        raise InputError(
            "llama.cpp has no such tokenizer: it is not plain BPE; use tokenizer.kind: bpe or bytes"
        )
    if merges and not _cuts_as_gpt2(settings["pre_tokenizer"]):
        raise InputError(
            "the tokenizer cuts text by another pattern than GPT-2's: not supported; use "
            "tokenizer.kind: bpe or bytes, or tiktoken's gpt2"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, i in bpe["vocab"].items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for added in settings["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges or NO_MERGES)
    writer.add_bos_token_id(tokenizer.end_id)  # it also stands before a document
    writer.add_eos_token_id(tokenizer.end_id)
    writer.add_add_bos_token(False)  # as in lm.generate.stream: a prompt begins anywhere


def _cuts_as_gpt2(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Return whether a tokenizer.json cuts text as GPT-2 does; it can say so in two ways."""
    if pre_tokenizer is None:
        return False
    *before, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if last["use_regex"]:
        return not before
    split = {"type": "Split", "pattern": {"Regex": GPT2_PATTERN}, "behavior": "Isolated"}
    return before == [{**split, "invert": False}]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m lm.export.gguf", description=about)
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder")
    parser.add_argument("--out", type=Path, default=Path("model.gguf"), help="file to write")
    options = parser.parse_args(arguments)
    with one_line_errors():
        model, tokenizer = load_model(options.model, torch.device("cpu"))
        write(model, tokenizer, options.out)
        say(f"Model in {options.out}")


if __name__ == "__main__":
    main()
