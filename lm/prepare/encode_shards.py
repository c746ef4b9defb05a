"""Encode text into token shards, by several processes, on several machines, in several runs.

    shard --encode_shard--> KEPT/KEY.train, KEY.valid, KEY.json --collect_shards--> data/tokens

A done shard is kept under a key, a hash of all that decides its bytes: text, settings, tokenizer,
code. A later run finds it there after a kill, after files were added, or when it collects what
other machines made. It is verified before it is used.
"""

import hashlib
import importlib.metadata
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, assert_never

import numpy as np

from lm.base.console import say
from lm.base.errors import InputError
from lm.base.files import read_json, sha256_file, sha256_json, write_json, writing
from lm.data.shards import SPLITS, ShardWriter, SplitName, token_dtype
from lm.data.tokenizer import load_tokenizer
from lm.prepare.documents import Document, TextShard, over_shards, shard_documents
from lm.prepare.encoder import DocumentRefused, Encoder, Library
from lm.prepare.file_bytes import compression
from lm.prepare.gigatoken_guard import EncodersDiffer
from lm.prepare.readers import reader_of
from lm.prepare.sources import DataConfig
from lm.prepare.workers import ordered_map

BATCH_BYTES = 1 << 21  # of text, passed to the encoder at once
KEPT_DAYS = 7  # after the last use
FINGERPRINT = np.dtype([("digest", "<u8", 2), ("tokens", "<u4"), ("bytes", "<u4")])
DoneShard = dict[str, Any]  # the content of KEY.json


@dataclass(frozen=True)
class Job:
    """All but the text that decides the bytes of shards, and the folder of done shards."""

    config: DataConfig
    tokenizer: Path  # its folder
    code: str  # a hash of the code that runs
    kept: Path
    library: Library | None = None  # encodes; None: the fastest

    @cached_property
    def tokenizer_sha256(self) -> str:
        return sha256_file(self.tokenizer / "tokenizer.json")

    @cached_property
    def identity(self) -> str:
        """Return a hash of tokenizer, code, and the settings that the rest of a key leaves out."""
        config = self.config
        match config.split:
            case "hash":
                split = [config.split, config.valid_fraction]
            case "tail":  # train_bytes of a shard decides
                split = [config.split, None]
            case other:
                assert_never(other)
        decides = {
            "tokenizer": self.tokenizer_sha256,
            "end_token": sha256_file(self.tokenizer / "tokenizer_config.json"),
            "code": self.code,
            "tokenizers": importlib.metadata.version("tokenizers"),
            "library": self.library,
            "on_bad_document": config.on_bad_document,
            "deduplicate": config.deduplicate,
            "split": split,
        }
        return sha256_json(decides)


def select_part(shards: Sequence[TextShard], part: str) -> list[TextShard]:
    """Return the shards for one of several machines; "2/4" is the second of four."""
    number, _, total = part.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise InputError(f"--shard {part}: expected I/N with 1 <= I <= N, as in --shard 2/4")
    return list(shards[int(number) - 1 :: int(total)])


def require_done(job: Job, shards: Sequence[TextShard], num_workers: int) -> None:
    """Raise InputError unless every shard is kept."""
    done = list(ordered_map(partial(_is_done, job), shards, num_workers))
    absent = [shard for shard, is_done in zip(shards, done, strict=True) if not is_done]
    if absent:
        raise InputError(
            f"{len(absent):,} of {len(shards):,} shards are not made yet; the first begins with "
            f"{absent[0].stretches[0].file}; run the other --shard parts with the same files, "
            "settings and code"
        )


def _is_done(job: Job, shard: TextShard) -> bool:
    return find_done(job.kept, shard_key(job, shard)) is not None


def encode_all(
    job: Job, shards: Sequence[TextShard], num_workers: int
) -> tuple[Job, list[DoneShard]]:
    """Encode all shards, in their order; return them and the job, whose library may change."""
    encoder = open_encoder(job)  # before the workers fork, so that they inherit it
    if encoder.why_not is not None:
        say(f"{encoder.why_not}: encoding with tokenizers, which is slower")
    try:
        all_done = list(over_shards("encoding", partial(encode_shard, job), shards, num_workers))
    except EncodersDiffer as error:
        say(f"{error}; encoding again with tokenizers, which is slower")
        return encode_all(replace(job, library="tokenizers"), shards, num_workers)
    reused = sum(done.pop("reused", False) for done in all_done)
    if reused:
        say(f"{reused:,} of {len(shards):,} shards were already done")
    return job, all_done


# --- one shard --------------------------------------------------------------------------


def encode_shard(job: Job, shard: TextShard) -> DoneShard:
    """Return a done shard: the kept one, or one made now.

    Raises InputError for text that cannot be read or that the tokenizer alters, EncodersDiffer if
    gigatoken gives wrong ids.
    """
    key = shard_key(job, shard)
    if (done := find_done(job.kept, key)) is not None:
        return done | {"reused": True}
    encoder = open_encoder(job)
    with writing(job.kept):
        job.kept.mkdir(parents=True, exist_ok=True)
        scratch = Path(mkdtemp(".tmp", f"{key}.", job.kept))  # another run may make the same shard
    try:
        done = _write_shard(job, shard, encoder, scratch) | {"key": key}
        files = sorted(scratch.iterdir())
        done["files"] = {file.name: sha256_file(file) for file in files}
        write_json(scratch / "json", done, durable=False)
        with writing(job.kept):
            for file in [*files, scratch / "json"]:  # json last: it makes the others valid
                file.replace(kept_file(job.kept, key, file.name))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return done


def _write_shard(job: Job, shard: TextShard, encoder: Encoder, folder: Path) -> DoneShard:
    """Write both splits of a shard into a folder; return their counts."""
    tally, dtype = Counter[str](), token_dtype(encoder.tokenizer.vocab_size)
    used, longest = np.zeros(encoder.tokenizer.vocab_size, dtype=bool), 0
    fingerprints: dict[SplitName, list[bytes]] = {split: [] for split in SPLITS}
    with ExitStack() as stack:
        writers = {s: stack.enter_context(ShardWriter(folder / s, dtype)) for s in SPLITS}
        for batch in _batches(shard_documents(job.config, tally, shard)):
            texts = [document.data for _, document in batch]
            try:
                ids, lengths = encoder.encode(texts)
            except DocumentRefused as error:
                raise InputError(f"{batch[error.index][1].place}: {error}") from None
            used[ids] = True
            ids = np.insert(ids, np.cumsum(lengths), encoder.tokenizer.end_id)
            table = np.zeros(len(texts), dtype=FINGERPRINT)
            table["tokens"], table["bytes"] = lengths + 1, list(map(len, texts))
            longest = max(longest, int(table["bytes"].max()))
            if job.config.deduplicate:
                digests = b"".join(hashlib.sha256(text).digest()[:16] for text in texts)
                table["digest"] = np.frombuffer(digests, "<u8").reshape(-1, 2)
            splits = np.array([split for split, _ in batch])
            for split, writer in writers.items():
                mine = splits == split
                n_bytes = int(table["bytes"][mine].sum())
                writer.append(ids[np.repeat(mine, table["tokens"])], n_bytes, int(mine.sum()))
                fingerprints[split].append(table[mine].tobytes())
    for split in SPLITS if job.config.deduplicate else ():
        file = folder / f"{split}.fingerprints"
        with writing(file):
            file.write_bytes(b"".join(fingerprints[split]))
    return {
        **{split: writer.counts for split, writer in writers.items()},
        "tally": dict(sorted(tally.items())),
        "longest_bytes": longest,
        "used": np.packbits(used).tobytes().hex(),
    }


def _batches(
    found: Iterable[tuple[SplitName, Document]],
) -> Iterator[list[tuple[SplitName, Document]]]:
    """Yield documents in batches of about BATCH_BYTES."""
    batch, size = [], 0
    for split, document in found:
        batch.append((split, document))
        size += len(document.data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def open_encoder(job: Job) -> Encoder:
    """Return the encoder of a job, opened once. Raises InputError if the tokenizer is missing."""
    for file in (job.tokenizer / "tokenizer_config.json", job.tokenizer / "tokenizer.json"):
        if not file.is_file():
            raise InputError(f"{file}: no such file; run `dvc repro tokenizer`")
    return _encoder(job.tokenizer, job.identity, job.library)


@lru_cache(maxsize=1)
def _encoder(folder: Path, identity: str, library: Library | None) -> Encoder:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    return Encoder(load_tokenizer(folder), library)


# --- done shards ------------------------------------------------------------------------


def shard_key(job: Job, shard: TextShard) -> str:
    """Return a hash of all that decides the bytes of a shard; the path of its text does not."""
    contents = []
    for file, start, stop in shard.stretches:
        reader = reader_of(file, shard.options)
        content = hashlib.sha256()
        for chunk in reader.content(start, stop):
            content.update(chunk)
        form = type(reader).__name__, compression(file), start > 0  # only a head can be refused
        contents.append([*form, content.hexdigest()])
    separator = shard.options.separator
    options = asdict(shard.options) | {"separator": separator and separator.hex()}
    del options["max_expansion"]  # can only stop the stage
    return sha256_json([job.identity, options, shard.train_bytes, contents])


def kept_file(kept: Path, key: str, name: str) -> Path:
    """Return the path under which a file of a done shard is kept."""
    return kept / f"{key}.{name}"


def find_done(kept: Path, key: str) -> DoneShard | None:
    """Return a shard if it is kept and each of its files is intact, else None."""
    path = kept_file(kept, key, "json")
    try:
        done = read_json(path)
        for name, sha256 in done["files"].items():
            if sha256_file(kept_file(kept, key, name)) != sha256:
                return None
        path.touch()
    except (OSError, InputError, LookupError, TypeError, AttributeError):
        return None
    return dict(done)


def drop_unused(kept: Path, in_use: set[str]) -> None:
    """Delete shards, and remains of unfinished ones, that no run has used for KEPT_DAYS."""
    limit = time.time() - KEPT_DAYS * 86400
    for path in kept.glob("*"):
        key = path.name.split(".")[0]
        last = kept_file(kept, key, "json")
        with suppress(FileNotFoundError):  # another run may drop it at the same time
            age_of = last if last.exists() else path
            if key not in in_use and age_of.stat().st_mtime < limit:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
