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
    foreign_tokenizer,
    from_tiktoken,
    train_bpe,
)
from stages.run import Params, run

TOKENIZER, OWN_TOKENIZERS = Path("data/tokenizer"), Path("data/tokenizers")
SAMPLES = 200  # documents on which a tokenizer from elsewhere is tried


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
        result = from_tiktoken(str(config.source), islice(texts, SAMPLES), config.end_token)
    else:
        source = OWN_TOKENIZERS / str(config.source)
        result = foreign_tokenizer(source, islice(texts, SAMPLES), config.end_token)
    result.save(TOKENIZER)
    say(f"Tokenizer ({config.kind}) with {result.vocab_size:,} tokens in {TOKENIZER}")


if __name__ == "__main__":
    run(tokenizer, ["data", "tokenizer"])
