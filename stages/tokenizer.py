"""Stage tokenizer: data/tokenizer/tokenizer.json, learnt from the training split or taken over."""

import argparse
from collections import Counter
from itertools import islice
from pathlib import Path

from lm.config import read_section
from lm.console import say
from lm.text import DataConfig, split_documents
from lm.tokenizer import (
    TokenizerConfig,
    byte_tokenizer,
    from_tiktoken,
    open_tokenizer_json,
    train_bpe,
)
from stages.run import Params, run

TOKENIZER, OWN_TOKENIZERS = Path("data/tokenizer"), Path("data/tokenizers")
TIKTOKEN_SAMPLES = 200  # documents on which the converted encoding is compared


def tokenizer(params: Params, arguments: argparse.Namespace) -> None:
    """Write data/tokenizer/."""
    config = read_section(TokenizerConfig, params, "tokenizer")
    data = read_section(DataConfig, params, "data")
    texts = (
        document.text for split, document in split_documents(data, Counter()) if split == "train"
    )
    if config.kind == "bpe":
        result = train_bpe(texts, config.vocab_size, config.end_token)
    elif config.kind == "bytes":
        result = byte_tokenizer(config.end_token)
    elif config.kind == "tiktoken":
        result = from_tiktoken(
            str(config.source), islice(texts, TIKTOKEN_SAMPLES), config.end_token
        )
    else:
        result = open_tokenizer_json(OWN_TOKENIZERS / str(config.source), config.end_token)
    result.save(TOKENIZER)
    say(f"Tokenizer ({config.kind}) with {result.vocab_size:,} tokens in {TOKENIZER}")


if __name__ == "__main__":
    run(tokenizer, ["data", "tokenizer"])
