"""Stage tokens: the corpus as token ids, shards in data/tokens with tokens.json."""

from collections import Counter
from functools import partial
from pathlib import Path

from lm.console import say
from lm.files import sha256_file
from lm.text import DataConfig, source_files, split_documents
from lm.tokenizer import load_tokenizer
from lm.tokens import write_tokens
from stages.run import Inputs, run

TOKENIZER, TOKENS = Path("data/tokenizer"), Path("data/tokens")


def tokens(inputs: Inputs) -> None:
    """Write data/tokens/."""
    tally: Counter[str] = Counter()
    data = inputs.section(DataConfig, "data")
    inputs.watch(TOKENIZER, partial(source_files, data))
    documents = inputs.checked(split_documents(data, tally))  # the manifest comes after the last
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
