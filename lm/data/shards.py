"""Token shards on disk, and the manifest that describes them.

    data/tokens/train/text-00000.bin   ids of source "text", little-endian; a document, its end, ...
    data/tokens/valid/text-00000.bin   the held-out ids of the same part of the text
    data/tokens/tokens.json            the manifest, written last: it makes the shards valid

A split is its shards, joined in the manifest's order, source after source: windows
cross from one to the next. Ids are uint16 where the vocabulary allows, else uint32.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lm.base.errors import InputError
from lm.base.files import read_json, write_json, writing
from lm.base.result_files import COUNT, SOME, TEXT, require_shape
from lm.base.sections import Bound

FORMAT = 2
MANIFEST = "tokens.json"
SplitName = Literal["train", "valid"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
COUNTS = ("tokens", "bytes", "documents")
REMEDY = "run `dvc repro tokens`"
_COUNTED = dict.fromkeys(COUNTS, COUNT)
_WEIGHT = Bound(lambda x: x is None or type(x) in (int, float), "a number or null")
_SHARD_FILE = {**_COUNTED, "file": TEXT, "sha256": TEXT}
SHAPE = {  # of the manifest
    "format": SOME,
    "dtype": TEXT,
    "vocab_size": SOME,
    "end_id": COUNT,
    "tokenizer_sha256": TEXT,
    "train": _COUNTED,
    "valid": _COUNTED,
    "sources": [{"name": TEXT, "weight": _WEIGHT}],
    "shards": [{"source": TEXT, "train": _SHARD_FILE, "valid": _SHARD_FILE}],
}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of the ids on disk: little-endian, two bytes where they suffice."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """A context manager that writes, counts and hashes the ids of one shard.

    Raises EnvironmentFault if the file cannot be written.
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
        """Write the ids of documents, each with its end token; `n_bytes` is that of the text."""
        assert not len(ids) or ids.max() <= np.iinfo(self.dtype).max
        data = np.ascontiguousarray(ids, dtype=self.dtype).view(np.uint8).data
        with writing(self.path):
            self._file.write(data)
        self._sha256.update(data)
        for name, count in zip(COUNTS, (len(ids), n_bytes, n_documents), strict=True):
            self.counts[name] += count

    def entry(self) -> dict[str, Any]:
        """Return the manifest's entry of this file, which lies in the folder of its split."""
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
    """Write tokens.json, which finishes a folder of shards; return its content.

    `sources` are {"name", "weight"}; `shards` are {"source", "train", "valid"} with the entries
    of their writers, in the order of `sources`. Raises InputError for a manifest that
    `read_manifest` would refuse.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": token_dtype(vocab_size).name,
        "vocab_size": vocab_size,
        "end_id": end_id,
        "tokenizer_sha256": tokenizer_sha256,
        **{split: sums([shard[split] for shard in shards]) for split in SPLITS},
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


def sums(entries: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the sum over the entries of each of COUNTS."""
    return {name: sum(entry[name] for entry in entries) for name in COUNTS}


def _check(manifest: Any, path: Path) -> None:
    """Raise InputError if a manifest lacks something or contradicts itself."""
    try:
        require_shape(manifest, SHAPE, "")
        is_one = manifest["dtype"] == token_dtype(manifest["vocab_size"]).name
    except InputError:
        is_one = False
    if not is_one or manifest["end_id"] >= manifest["vocab_size"]:
        raise InputError(f"{path}: not a token manifest; {REMEDY}")
    shards = manifest["shards"]
    _check_weights(manifest["sources"], path)
    names = [source["name"] for source in manifest["sources"]]
    order = [shard["source"] for shard in shards]
    if len(set(names)) < len(names) or order != [n for n in names for o in order if o == n]:
        raise InputError(f"{path}: its shards do not stand in the order of its sources; {REMEDY}")
    files = [shard[split]["file"] for shard in shards for split in SPLITS]
    if len(set(files)) < len(files):
        raise InputError(f"{path}: names a file twice; {REMEDY}")
    for split in SPLITS:
        entries = [shard[split] for shard in shards]
        for entry in entries:
            # each document has an end token, and text has tokens
            if entry["tokens"] < max(entry["documents"], entry["bytes"] > 0):
                raise InputError(f"{path}: not a token manifest; {REMEDY}")
            if not re.fullmatch(rf"{split}/[^/\\\x00-\x1f]+\.bin", entry["file"]):
                raise InputError(
                    f"{path}: {entry['file']!r} is not a file in its folder {split}; {REMEDY}"
                )
        for name, total in sums(entries).items():
            if manifest[split][name] != total:
                raise InputError(
                    f"{path}: {manifest[split][name]} {name} in {split}, but its shards have "
                    f"{total}; {REMEDY}"
                )


def _check_weights(sources: Sequence[dict[str, Any]], path: Path) -> None:
    """Raise InputError unless every source has a weight in (0, 1e6], or none has one."""
    without = [source["name"] for source in sources if source["weight"] is None]
    if 0 < len(without) < len(sources):
        raise InputError(
            f"{path}: source {without[0]} has no weight, others have; give each a weight, or none"
        )
    for source in sources:
        if not without and not 0 < source["weight"] <= 1e6:
            shown = str(source["weight"])[:20]
            raise InputError(
                f"{path}: source {source['name']} has the weight {shown}, must be in (0, 1e6]"
            )
