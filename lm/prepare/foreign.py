"""Open foreign tokenizers, a tiktoken encoding or a tokenizer.json, and try them on texts."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise, zip_longest
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

from lm.base.errors import EnvironmentFault, InputError, one_line_errors
from lm.data.tokenizer import (
    END_TOKEN,
    GPT2_PATTERN,
    Tokenizer,
    byte_level_backend,
    open_tokenizer_json,
    spelled,
)

TRIED_CHARACTERS = 5000  # of each text
TRIAL_SECONDS = 60  # to encode a few megabytes
# GPT-2's pattern as tiktoken spells it for speed; gigatoken knows only the usual spelling
TIKTOKEN_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def from_tiktoken(name: str, texts: Iterable[str], end_token: str = END_TOKEN) -> Tokenizer:
    """Return a named tiktoken encoding as a tokenizer; compare their ids on some texts.

    tiktoken stores the rank of each token; `_last_merge` finds the merge that makes it. Raises
    InputError for an unknown name or other ids, EnvironmentFault if tiktoken cannot fetch its data.
    """
    import tiktoken

    known = {*tiktoken.list_encoding_names(), *tiktoken.registry.ENCODINGS}
    if name not in known:
        raise InputError(f"tokenizer.source = {name}: tiktoken has only {', '.join(sorted(known))}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors; the hash is wrong
        raise EnvironmentFault(
            f"tokenizer.source = {name}: tiktoken could not fetch its data "
            f"({type(error).__name__}); go online once, or set TIKTOKEN_CACHE_DIR to its cache"
        ) from None
    ranks = encoding._mergeable_ranks
    vocabulary = {spelled(token): rank for token, rank in ranks.items()} | encoding._special_tokens
    merges = [
        (spelled(left), spelled(right))
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1
        for left, right in [_last_merge(token, ranks)]
    ]
    backend = byte_level_backend(models.BPE(vocab=vocabulary, merges=merges), use_regex=False)
    pattern = GPT2_PATTERN if encoding._pat_str == TIKTOKEN_GPT2 else encoding._pat_str
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            backend.pre_tokenizer,
        ]
    )
    backend.add_special_tokens(list(encoding._special_tokens))
    tokenizer = Tokenizer(backend, end_token)
    for text in (text[:TRIED_CHARACTERS] for text in texts):
        if tokenizer.encode(text) != encoding.encode_ordinary(text):
            raise InputError(
                f"tokenizer.source = {name}: ids differ from tiktoken's; choose another encoding"
            )
    return tokenizer


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the pair whose merge makes `token`: byte-pair encode it by the lower ranks alone."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def foreign_tokenizer(file: Path, texts: Iterable[str], end_token: str = END_TOKEN) -> Tokenizer:
    """Open a foreign tokenizer.json; try it on hard texts and on the beginnings of the user's.

    Raises InputError if it is damaged, alters text or takes too long. The trial runs in its own
    process: a pattern may backtrack for years, and the library panics on stderr when it gives up.
    """
    beginnings = json.dumps([text[:TRIED_CHARACTERS] for text in texts])
    trial = subprocess.run(
        [sys.executable, "-m", "lm.prepare.foreign", file, end_token, str(TRIAL_SECONDS)],
        input=beginnings.encode(),
        stderr=subprocess.PIPE,
    )
    if trial.returncode == -signal.SIGALRM:
        raise InputError(
            f"{file}: not done with a few megabytes of text after {TRIAL_SECONDS} s; its pattern "
            "backtracks too much: simplify it, or choose another tokenizer"
        )
    if trial.returncode != 0:
        *_, last = trial.stderr.decode("utf-8", "replace").strip().split("\n")
        if not last.startswith("error: "):
            raise InputError(
                f"{file}: crashed in a trial ({last or trial.returncode}); choose another tokenizer"
            )
        raise InputError(last.removeprefix("error: "))
    return open_tokenizer_json(file, end_token)


def _trial(file: str, end_token: str, seconds: str) -> None:
    """Encode every byte of UTF-8, long runs, added tokens amid spaces, and the texts on stdin."""
    signal.alarm(int(seconds))  # ends the process even inside the library
    tokenizer = open_tokenizer_json(Path(file), end_token)
    added = tokenizer.backend.get_added_tokens_decoder().values()
    texts = [
        "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 0x1000)])),
        *(chr(code) * 10_000 + "!" for code in range(128)),
        "".join(f"a  {token.content}  b{token.content}c\n{token.content}\n" for token in added),
        *json.load(sys.stdin),
    ]
    try:
        encoded = tokenizer.encode_batch(texts)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    for text, ids in zip(texts, encoded, strict=True):
        given, kept = text.encode(), tokenizer.decode_bytes(ids)
        if given != kept:
            different = (a != b for a, b in zip_longest(given, kept))
            at = max(0, list(different).index(True) - 5)
            raise InputError(
                f"{file}: alters text: {given[at : at + 20]!r} came back as {kept[at : at + 20]!r}"
            )
        if tokenizer.backend.decode(ids, skip_special_tokens=False) != text:  # as others will
            raise InputError(f"{file}: its decoder alters text; set decoder to type ByteLevel")


if __name__ == "__main__":
    with one_line_errors():
        _trial(*sys.argv[1:])
