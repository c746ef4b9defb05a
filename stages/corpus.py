"""Stage corpus: write the default text and its manifest, by corpus.source.

packages: the source code of corpus.packages, one .jsonl file each; grammar: stories (lm.corpus).
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, assert_never

from lm.base.console import ByteProgress, count, say
from lm.base.errors import EnvironmentFault, InputError
from lm.base.files import atomic_write, read_json, write_json
from lm.base.paths import CORPUS, LICENSES, RAW
from lm.base.settings import CorpusConfig
from lm.corpus.grammar import STORIES, stories
from lm.corpus.packages import license_of, python_sources
from stages.run import Inputs, run_stage

STORIES_FILE, STORIES_SEED = "grammar.jsonl", 0


def corpus_stage(inputs: Inputs) -> None:
    """Write data/raw/*.jsonl, data/licenses.txt and data/corpus.json."""
    config = inputs.section(CorpusConfig, "corpus")
    _refuse_other_files()
    match config.source:
        case "grammar":
            manifest, licenses = [_write_stories(config.grammar_bytes)], ""
        case "packages":
            manifest = [_write_package(requirement) for requirement in config.packages]
            licenses = _licenses(config.packages)
        case other:
            assert_never(other)
    inputs.check()
    atomic_write(LICENSES, licenses.encode())
    write_json(CORPUS, manifest)
    RAW.mkdir(parents=True, exist_ok=True)
    for stale in {f.name for f in RAW.iterdir()} - {_file_name(entry) for entry in manifest}:
        (RAW / stale).unlink()


def _write_package(requirement: str) -> dict[str, Any]:
    """Write a package's sources; return its entry of the manifest."""
    name, _, version = requirement.partition("==")
    sources = list(python_sources(requirement))
    lines = (json.dumps({"path": path, "text": text}) + "\n" for path, text in sources)
    data = "".join(lines).encode()
    entry = {
        "package": name,
        "version": version,
        "files": len(sources),
        "bytes": sum(len(text.encode()) for _, text in sources),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    atomic_write(RAW / _file_name(entry), data)
    say(f"{requirement}: {count(len(sources), 'file')}, {entry['bytes']:,} bytes of source")
    return entry


def _licenses(requirements: Sequence[str]) -> str:
    """Return the names of the licences, a line each, and after an empty line their texts."""
    found = {requirement: license_of(requirement) for requirement in requirements}
    names = "".join(f"{requirement}: {name}\n" for requirement, (name, _) in found.items())
    rule = "-" * 80
    return names + "".join(f"\n{rule}\n{r}\n\n{text}" for r, (_, text) in found.items())


def _write_stories(size_bytes: int) -> dict[str, Any]:
    """Write the stories; return their entry of the manifest, with the entropy of the grammar."""
    free = shutil.disk_usage(RAW.parent).free
    if size_bytes > free:
        raise EnvironmentFault(
            f"corpus.grammar_bytes = {size_bytes}: only {free:,} bytes of disk are free; lower it"
        )
    sha256, documents, n_bytes = hashlib.sha256(), 0, 0

    def lines() -> Iterator[bytes]:
        nonlocal documents, n_bytes
        for text in stories(STORIES_SEED, size_bytes):
            documents, n_bytes = documents + 1, n_bytes + len(text.encode())
            line = json.dumps({"text": text}).encode() + b"\n"
            sha256.update(line)
            progress.show(len(text.encode()))
            yield line

    progress = ByteProgress("Stories", size_bytes)
    atomic_write(RAW / STORIES_FILE, lines())
    progress.close()
    floor = round(STORIES.bits_per_byte(), 6)  # further digits depend on the BLAS library
    say(f"grammar: {documents:,} stories, {n_bytes:,} bytes, entropy {floor:.4f} bits per byte")
    return {
        "grammar": "stories",
        "documents": documents,
        "bytes": n_bytes,
        "sha256": sha256.hexdigest(),
        "bits_per_byte": floor,
    }


def _file_name(entry: Any) -> str:
    match entry:
        case {"package": str(package)}:
            return f"{package}.jsonl"
        case {"grammar": str()}:
            return STORIES_FILE
        case _:
            raise InputError(
                f"{CORPUS}: not a list of packages; delete it and {RAW}, and run again"
            )


def _refuse_other_files() -> None:
    """Raise InputError if data/raw holds a file that an earlier run of this stage did not write."""
    entries = read_json(CORPUS) if CORPUS.exists() else []
    written = {_file_name(entry) for entry in (entries if isinstance(entries, list) else [None])}
    for file in sorted(RAW.glob("*")):
        if file.name not in written and not file.name.endswith(".tmp"):
            raise InputError(
                f"{file}: not written by this stage, which owns {RAW}; move your text to another "
                "folder and name that in data.path"
            )


if __name__ == "__main__":
    run_stage(corpus_stage, ["corpus", "data"])
