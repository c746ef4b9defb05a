"""Stage tokenizer: data/tokenizer/tokenizer.json, learnt from the training split or taken over."""

from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

from lm.console import say
from lm.text import DataConfig, source_files, split_documents
from lm.tokenizer import (
    TokenizerConfig,
    byte_tokenizer,
    foreign_tokenizer,
    from_tiktoken,
    train_bpe,
)
from stages.run import Inputs, run

TOKENIZER, OWN_TOKENIZERS = Path("data/tokenizer"), Path("data/tokenizers")
SAMPLES = 200  # documents on which a tokenizer from elsewhere is tried


def tokenizer(inputs: Inputs) -> None:
    """Write data/tokenizer/."""
    config = inputs.section(TokenizerConfig, "tokenizer")
    data = inputs.section(DataConfig, "data")
    inputs.watch(OWN_TOKENIZERS, partial(source_files, data))
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
    inputs.check()
    result.save(TOKENIZER)
    say(f"Tokenizer ({config.kind}) with {result.vocab_size:,} tokens in {TOKENIZER}")


if __name__ == "__main__":
    run(tokenizer, ["data", "tokenizer"])
