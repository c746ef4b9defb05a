"""Stage tokenizer: learn data/tokenizer/ from the training split, or make it from a file."""

from collections import Counter
from functools import partial
from itertools import islice
from typing import assert_never

from lm.base.console import say
from lm.base.paths import OWN_TOKENIZERS, TOKENIZER
from lm.base.settings import RuntimeConfig
from lm.data.tokenizer import TokenizerConfig, byte_tokenizer
from lm.prepare.documents import split_documents
from lm.prepare.foreign import foreign_tokenizer, from_tiktoken
from lm.prepare.learn import train_bpe_large
from lm.prepare.learning_sample import learning_sample
from lm.prepare.sources import DataConfig, find_files
from lm.prepare.workers import number_of_workers
from stages.run import Inputs, run_stage

TRIED = 200  # documents on which a tokenizer from elsewhere is tested


def tokenizer_stage(inputs: Inputs) -> None:
    """Write data/tokenizer/."""
    config = inputs.section(TokenizerConfig, "tokenizer")
    data = inputs.section(DataConfig, "data")
    num_workers = number_of_workers(inputs.section(RuntimeConfig, "runtime").num_workers)
    inputs.watch(OWN_TOKENIZERS)
    inputs.watch_without_hashing(partial(find_files, data))
    found = split_documents(data, Counter())
    texts = islice((document.text for split, document in found if split == "train"), TRIED)
    match config.kind:
        case "bpe":
            sample = learning_sample(data, config.sample_bytes, num_workers)
            result = train_bpe_large(sample, config.vocab_size, config.end_token)
        case "bytes":
            result = byte_tokenizer(config.end_token)
        case "tiktoken":
            result = from_tiktoken(str(config.source), texts, config.end_token)
        case "file":
            source = OWN_TOKENIZERS / str(config.source)
            result = foreign_tokenizer(source, texts, config.end_token)
        case other:
            assert_never(other)
    inputs.check()
    result.save(TOKENIZER)
    if result.left_out:
        say("The normalizer NFC is left out: text in NFC keeps its ids, other text its bytes")
    unused = f", {result.n_unused:,} ids without a token," if result.n_unused else ""
    say(f"Tokenizer ({config.kind}) with {result.vocab_size:,} tokens{unused} in {TOKENIZER}")


if __name__ == "__main__":
    run_stage(tokenizer_stage, ["data", "tokenizer", "runtime"])
