"""Text to token shards, by several processes, on several machines, in several attempts.

    plan --encode_shard--> KEPT/KEY.train.bin, KEY.valid.bin, KEY.json --publish--> data/tokens

A shard that is done is kept under a key of all that decides its bytes: text, settings, tokenizer,
code. Whoever needs it again finds it there: the run after one that was killed, the run after files
were added, the run that collects what other machines made. It is verified before it is used.
"""

import hashlib
import importlib.metadata
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import numpy as np

from lm.base.console import ByteProgress, say
from lm.base.errors import InputError
from lm.base.files import read_json, sha256_file, sha256_json, write_json, writing
from lm.data.shards import SPLITS, ShardWriter, token_dtype
from lm.data.tokenizer import load_tokenizer
from lm.prepare.documents import DataConfig, Document, Shard, documents, sides, tail_boundary
from lm.prepare.encoder import DocumentRefused, Encoder, Library
from lm.prepare.formats import compression, format_of
from lm.prepare.gigatoken_guard import EncodersDiffer
from lm.prepare.workers import ordered_map

BATCH_BYTES = 1 << 21  # of text, encoded at once
KEPT_DAYS = 7  # what no run has used for so long is dropped
FINGERPRINT = np.dtype([("digest", "<u8", 2), ("tokens", "<u4"), ("bytes", "<u4")])
Record = dict[str, Any]  # of a shard: what KEY.json says


@dataclass(frozen=True)
class Job:
    """What decides the bytes of every shard, beside its text, and where done ones are kept."""

    config: DataConfig
    tokenizer: Path  # its folder
    code: str  # a hash of the code that runs
    kept: Path
    library: Library | None = None  # to encode with; None: the fastest

    @cached_property
    def tokenizer_sha256(self) -> str:
        return sha256_file(self.tokenizer / "tokenizer.json")

    @cached_property
    def identity(self) -> str:
        """A hash of tokenizer, code, and the settings that are in no other part of a key."""
        config = self.config
        decides = {
            "tokenizer": self.tokenizer_sha256,
            "end_token": sha256_file(self.tokenizer / "tokenizer_config.json"),
            "code": self.code,
            "tokenizers": importlib.metadata.version("tokenizers"),
            "library": self.library,
            "on_bad_document": config.on_bad_document,
            "deduplicate": config.deduplicate,
            "split": [config.split, config.valid_fraction if config.split == "hash" else None],
        }
        return sha256_json(decides)


class Task(NamedTuple):
    """A shard of the plan, and how many of its bytes are for training if the tail is held out."""

    shard: Shard
    train_bytes: int


def tasks(config: DataConfig, shards: Sequence[Shard], num_workers: int) -> list[Task]:
    """The shards as tasks. To hold out the tail, all of the text is measured first."""
    if config.split == "hash":
        return [Task(shard, 0) for shard in shards]
    sizes = list(ordered_map(partial(_text_bytes, config), shards, num_workers))
    boundary = tail_boundary(sum(sizes), config)
    starts = accumulate(sizes, initial=0)
    return [
        Task(shard, min(max(boundary - start, 0), size))
        for shard, start, size in zip(shards, starts, sizes, strict=False)
    ]


def _text_bytes(config: DataConfig, shard: Shard) -> int:
    return sum(len(document.data) for document in documents(config, Counter(), [shard]))


def share(todo: Sequence[Task], part: str) -> list[Task]:
    """The tasks of one of several machines; "2/4" is the second of four. Raises InputError."""
    number, _, total = part.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise InputError(f"--shard {part}: expected I/N with 1 <= I <= N, as in --shard 2/4")
    return list(todo[int(number) - 1 :: int(total)])


def require_done(job: Job, todo: Sequence[Task], num_workers: int) -> None:
    """Raise InputError unless every shard is kept."""
    done = list(ordered_map(partial(_is_done, job), todo, num_workers))
    absent = [task for task, is_done in zip(todo, done, strict=True) if not is_done]
    if absent:
        raise InputError(
            f"{len(absent):,} of {len(todo):,} shards were not made; the first begins with "
            f"{absent[0].shard.pieces[0].file}; run the other --shard parts, on these very files, "
            "settings and code"
        )


def _is_done(job: Job, task: Task) -> bool:
    return kept_record(job.kept, shard_key(job, task)) is not None


def encode_all(job: Job, todo: Sequence[Task], num_workers: int) -> tuple[Job, list[Record]]:
    """The records of all shards, in their order; the job, too, since its library may change."""
    try:
        return job, list(_watched(job, todo, num_workers))
    except EncodersDiffer as error:
        say(f"{error}; the shards are made again with tokenizers, which is slower")
        job = replace(job, library="tokenizers")
        return job, list(_watched(job, todo, num_workers))


def _watched(job: Job, todo: Sequence[Task], num_workers: int) -> Iterator[Record]:
    """The records as they come, with a progress bar."""
    encoder = open_encoder(job)  # before the processes fork, so that they have it
    if encoder.why_not is not None:
        say(f"{encoder.why_not}: tokenizers encodes, which is slower")
    progress = ByteProgress("encoding", sum(task.shard.size_bytes for task in todo))
    reused = 0
    with closing(ordered_map(partial(encode_shard, job), todo, num_workers)) as records:
        for task, record in zip(todo, records, strict=True):
            reused += record.pop("reused", False)
            progress.show(task.shard.size_bytes)
            yield record
    progress.close()
    if reused:
        say(f"{reused:,} of {len(todo):,} shards were done before")


# --- one shard --------------------------------------------------------------------------


def encode_shard(job: Job, task: Task) -> Record:
    """The record of a shard that is done: found where it was kept, or made now.

    Raises InputError for text that cannot be read or that the tokenizer alters, EncodersDiffer if
    the fast library is not to be trusted.
    """
    key = shard_key(job, task)
    record = kept_record(job.kept, key)
    if record is not None:
        return record | {"reused": True}
    encoder = open_encoder(job)
    with writing(job.kept):
        job.kept.mkdir(parents=True, exist_ok=True)
        scratch = Path(mkdtemp(".tmp", f"{key}.", job.kept))  # another run may make the same
    try:
        record = _write_shard(job, task, encoder, scratch) | {"key": key}
        files = sorted(scratch.iterdir())
        record["files"] = {file.name: sha256_file(file) for file in files}
        write_json(scratch / "json", record, durable=False)
        with writing(job.kept):
            for file in [*files, scratch / "json"]:  # it last: without it the shard is not there
                file.replace(kept_file(job.kept, key, file.name))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return record


def _write_shard(job: Job, task: Task, encoder: Encoder, folder: Path) -> Record:
    """Write both sides of a shard into a folder; returns what there is to say of them."""
    tally: Counter[str] = Counter()
    with ExitStack() as stack:
        outputs = {
            side: stack.enter_context(_Output(folder / side, encoder, job.config.deduplicate))
            for side in SPLITS
        }
        found = documents(job.config, tally, [task.shard])
        for side, document in sides(found, job.config, task.train_bytes):
            outputs[side].add(document)
        return {
            **{side: output.finish() for side, output in outputs.items()},
            "tally": dict(sorted(tally.items())),
            "longest_bytes": max(output.longest for output in outputs.values()),
            "used": np.packbits(outputs["train"].used | outputs["valid"].used).tobytes().hex(),
        }


class _Output:
    """One side of a shard on its way to the disk."""

    def __init__(self, path: Path, encoder: Encoder, deduplicate: bool):
        tokenizer = encoder.tokenizer
        self.encoder, self.end_id = encoder, tokenizer.end_id
        self.writer = ShardWriter(path, token_dtype(tokenizer.vocab_size))
        self.fingerprints: list[bytes] | None = [] if deduplicate else None
        self.used = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.longest = self._size = 0
        self._batch: list[Document] = []

    def __enter__(self) -> "_Output":
        self.writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.writer.__exit__(*error)

    def add(self, document: Document) -> None:
        """One more document; they are encoded together."""
        self._batch.append(document)
        self._size += len(document.data)
        if self._size >= BATCH_BYTES:
            self._encode()

    def finish(self) -> dict[str, Any]:
        """Encode what is left; returns what the shard's record says of this side."""
        if self._batch:
            self._encode()
        if self.fingerprints is not None:
            path = self.writer.path.with_name(f"{self.writer.path.name}.fingerprints")
            with writing(path):
                path.write_bytes(b"".join(self.fingerprints))
        return dict(self.writer.counts)

    def _encode(self) -> None:
        data = [document.data for document in self._batch]
        try:
            ids, lengths = self.encoder.encode(data)
        except DocumentRefused as error:
            raise InputError(f"{self._batch[error.index].place}: {error}") from None
        self.used[ids] = True
        self.writer.append(np.insert(ids, np.cumsum(lengths), self.end_id), self._size, len(data))
        sizes = np.fromiter(map(len, data), np.int64, len(data))
        self.longest = max(self.longest, int(sizes.max()))
        if self.fingerprints is not None:
            table = np.empty(len(data), dtype=FINGERPRINT)
            digests = b"".join(hashlib.sha256(text).digest()[:16] for text in data)
            table["digest"] = np.frombuffer(digests, "<u8").reshape(-1, 2)
            table["tokens"], table["bytes"] = lengths + 1, sizes
            self.fingerprints.append(table.tobytes())
        self._batch, self._size = [], 0


def open_encoder(job: Job) -> Encoder:
    """The encoder of a job; it is opened once. Raises InputError if its tokenizer is missing."""
    for file in (job.tokenizer / "tokenizer_config.json", job.tokenizer / "tokenizer.json"):
        if not file.is_file():
            raise InputError(f"{file}: no such file; run `dvc repro tokenizer`")
    return _encoder(job.tokenizer, job.identity, job.library)


@lru_cache(maxsize=1)
def _encoder(folder: Path, identity: str, library: Library | None) -> Encoder:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    return Encoder(load_tokenizer(folder), library)


# --- what is kept -----------------------------------------------------------------------


def shard_key(job: Job, task: Task) -> str:
    """A hash of all that decides the bytes of a shard; not of where its text stands."""
    pieces = []
    for file, start, stop in task.shard.pieces:
        text_format = format_of(file)
        content = hashlib.sha256()
        for chunk in text_format.content(file, task.shard.layout, start, stop):
            content.update(chunk)
        form = type(text_format).__name__, compression(file), start > 0  # a file's head has a say
        pieces.append([*form, content.hexdigest()])
    separator = task.shard.layout.separator
    layout = asdict(task.shard.layout) | {"separator": separator and separator.hex()}
    del layout["max_expansion"]  # stops or does not
    return sha256_json([job.identity, layout, task.train_bytes, pieces])


def kept_file(kept: Path, key: str, name: str) -> Path:
    """Where a file of a shard that is done is kept."""
    return kept / f"{key}.{name}"


def kept_record(kept: Path, key: str) -> Record | None:
    """The record of a shard if it is kept and every file of it is whole."""
    path = kept_file(kept, key, "json")
    try:
        record = read_json(path)
        for name, sha256 in record["files"].items():
            if sha256_file(kept_file(kept, key, name)) != sha256:
                return None
        path.touch()
    except (OSError, InputError, LookupError, TypeError, AttributeError):
        return None
    return dict(record)


def drop_unused(kept: Path, in_use: set[str]) -> None:
    """Delete what no run has used for KEPT_DAYS, and what killed ones left half made."""
    limit = time.time() - KEPT_DAYS * 86400
    for path in kept.glob("*"):
        key = path.name.split(".")[0]
        record = kept_file(kept, key, "json")
        with suppress(FileNotFoundError):  # another run drops it, too
            age_of = record if record.exists() else path
            if key not in in_use and age_of.stat().st_mtime < limit:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
