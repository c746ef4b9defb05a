"""Stage tokens: the corpus as token ids, data/tokens/{train,valid}.bin with tokens.json."""

import argparse
from collections import Counter
from pathlib import Path

from lm.config import read_section
from lm.console import say
from lm.files import sha256_file
from lm.text import DataConfig, split_documents
from lm.tokenizer import load_tokenizer
from lm.tokens import write_tokens
from stages.run import Params, run

TOKENIZER, TOKENS = Path("data/tokenizer"), Path("data/tokens")


def tokens(params: Params, arguments: argparse.Namespace) -> None:
    """Write data/tokens/."""
    tally: Counter[str] = Counter()
    documents = split_documents(read_section(DataConfig, params, "data"), tally)
    tokenizer = load_tokenizer(TOKENIZER)
    sha256 = sha256_file(TOKENIZER / "tokenizer.json")
    manifest = write_tokens(TOKENS, documents, tokenizer, sha256)
    for split in ("train", "valid"):
        entry = manifest[split]
        say(
            f"{split}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, "
            f"{entry['tokens']:,} tokens, {entry['bytes'] / entry['tokens']:.2f} bytes per token"
        )
    for what, count in sorted(tally.items()):
        say(f"{what.replace('_', ' ')}: {count:,}")


if __name__ == "__main__":
    run(tokens, ["data"])
