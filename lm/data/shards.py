"""Token shards on disk: how they are written, and the manifest that says what they hold.

    data/tokens/train/text-00000.bin   ids of source "text", little-endian; a document, its end, ...
    data/tokens/valid/text-00000.bin   what was held out of the same shard of the text
    data/tokens/tokens.json            the manifest, written last: without it nothing is finished

A split is the concatenation of its shards in the manifest's order, source after source; where it
is cut into shards means nothing. Ids are uint16 where the vocabulary allows, else uint32.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lm.base.errors import InputError
from lm.base.files import read_json, write_json, writing

FORMAT = 2
MANIFEST = "tokens.json"
SplitName = Literal["train", "valid"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
COUNTS = ("tokens", "bytes", "documents")
MOST = 1 << 60  # tokens or bytes: no file has as many, and sums of them fit into 63 bits
REMEDY = "run `dvc repro tokens`"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of the ids on disk: little-endian, two bytes where they suffice."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes the ids of one shard to its file and counts what passes; a context manager.

    Raises EnvironmentFault where the file cannot be written.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]):
        self.path, self.dtype = path, dtype
        self.counts = dict.fromkeys(COUNTS, 0)
        self._sha256 = hashlib.sha256()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        with writing(self.path):
            self._file.close()

    def append(self, ids: NDArray[Any], n_bytes: int, n_documents: int) -> None:
        """Add documents: their ids, each with its end token, and the size of their text."""
        assert not len(ids) or ids.max() <= np.iinfo(self.dtype).max
        data = np.ascontiguousarray(ids, dtype=self.dtype).view(np.uint8).data
        with writing(self.path):
            self._file.write(data)
        self._sha256.update(data)
        for name, count in zip(COUNTS, (len(ids), n_bytes, n_documents), strict=True):
            self.counts[name] += count

    def entry(self) -> dict[str, Any]:
        """Return the manifest's entry of this shard; its file stands in the folder of its split."""
        file = f"{self.path.parent.name}/{self.path.name}"
        return {"file": file, **self.counts, "sha256": self._sha256.hexdigest()}


def write_manifest(
    folder: Path,
    *,
    vocab_size: int,
    end_id: int,
    tokenizer_sha256: str,
    sources: Sequence[dict[str, Any]],
    shards: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Finish a folder of token shards; return what tokens.json then says.

    `sources` are {"name", "weight"}; `shards` are {"source", "train", "valid"} with the entries
    of their writers, grouped by source in the order of `sources`. Raises InputError for what
    could not be read again, e.g. weights that only some sources have.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": token_dtype(vocab_size).name,
        "vocab_size": vocab_size,
        "end_id": end_id,
        "tokenizer_sha256": tokenizer_sha256,
        **{split: _sums(shard[split] for shard in shards) for split in SPLITS},
        "sources": list(sources),
        "shards": list(shards),
    }
    _check(manifest, folder / MANIFEST)
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder of token shards. Raises InputError if it contradicts itself."""
    path = folder / MANIFEST
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if type(found) is int and found != FORMAT:
        age, cure = ("a newer", "") if found > FORMAT else ("an older", f"; {REMEDY}")
        raise InputError(
            f"{path}: written by {age} version (format {found}, this one reads {FORMAT}){cure}"
        )
    _check(manifest, path)
    return dict(manifest)


def check_weights(sources: Sequence[tuple[str, float | None]], where: str) -> None:
    """Raise InputError unless every source has a weight that can be one, or none has."""
    without = [name for name, weight in sources if weight is None]
    if without and len(without) < len(sources):
        raise InputError(
            f"{where}: source {without[0]} has no weight, others have; give each a weight, or none"
        )
    for name, weight in sources:
        if weight is not None and not 0 < weight <= 1e6:
            raise InputError(
                f"{where}: source {name} has the weight {str(weight)[:20]}, must be in (0, 1e6]"
            )


def _sums(entries: Iterable[dict[str, Any]]) -> dict[str, int]:
    total = dict.fromkeys(COUNTS, 0)
    for entry in entries:
        for name in COUNTS:
            total[name] += entry[name]
    return total


def _check(manifest: Any, path: Path) -> None:
    """Raise InputError for a manifest of another shape, or one that contradicts itself."""
    if not _is_manifest(manifest):
        raise InputError(f"{path}: not a token manifest; {REMEDY}")
    check_weights([(source["name"], source["weight"]) for source in manifest["sources"]], str(path))
    names = [source["name"] for source in manifest["sources"]]
    order = [shard["source"] for shard in manifest["shards"]]
    if len(set(names)) < len(names) or order != [n for n in names for o in order if o == n]:
        raise InputError(f"{path}: its shards do not stand in the order of its sources; {REMEDY}")
    files = [shard[split]["file"] for shard in manifest["shards"] for split in SPLITS]
    if len(set(files)) < len(files):
        raise InputError(f"{path}: names a file twice; {REMEDY}")
    for split in SPLITS:
        for shard in manifest["shards"]:
            if not re.fullmatch(rf"{split}/[^/\\\x00-\x1f]+\.bin", shard[split]["file"]):
                raise InputError(
                    f"{path}: {shard[split]['file']!r} is no file of its folder {split}; {REMEDY}"
                )
        sums = _sums(shard[split] for shard in manifest["shards"])
        for name in COUNTS:
            if manifest[split][name] != sums[name]:
                raise InputError(
                    f"{path}: {manifest[split][name]} {name} in {split}, its shards have "
                    f"{sums[name]}; {REMEDY}"
                )


def _is_manifest(value: Any) -> bool:
    return (
        _has(value, format=int, dtype=str, vocab_size=int, end_id=int, tokenizer_sha256=str)
        and _has(value, train=dict, valid=dict, sources=list, shards=list)
        and value["vocab_size"] >= 1
        and value["dtype"] == token_dtype(value["vocab_size"]).name
        and 0 <= value["end_id"] < value["vocab_size"]
        and all(_is_counted(value[split]) for split in SPLITS)
        and all(
            _has(source, name=str) and type(source.get("weight", "")) in (type(None), int, float)
            for source in value["sources"]
        )
        and all(
            _has(shard, source=str, train=dict, valid=dict)
            and all(
                _is_counted(shard[split]) and _has(shard[split], file=str, sha256=str)
                for split in SPLITS
            )
            for shard in value["shards"]
        )
    )


def _is_counted(value: Any) -> bool:
    """Return whether the counts can be of documents: each has an end, and text has tokens too."""
    if not _has(value, **dict.fromkeys(COUNTS, int)):
        return False
    tokens, n_bytes, documents = (value[name] for name in COUNTS)
    return 0 <= documents <= tokens < MOST and 0 <= n_bytes < MOST and (tokens > 0 or n_bytes == 0)


def _has(value: Any, **kinds: type) -> bool:
    """Return whether a JSON object has these keys, each of exactly this type."""
    return isinstance(value, dict) and all(
        type(value.get(name)) is kind for name, kind in kinds.items()
    )
