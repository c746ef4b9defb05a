"""Stage corpus: the source code of data.packages, one .jsonl file each, and their manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lm.console import say
from lm.errors import InputError
from lm.files import atomic_write, read_json, write_json
from lm.packages import python_sources
from lm.text import DataConfig
from stages.run import Inputs, run

RAW, MANIFEST = Path("data/raw"), Path("data/corpus.json")


def corpus(inputs: Inputs) -> None:
    """Write data/raw/*.jsonl and data/corpus.json."""
    packages = inputs.section(DataConfig, "data").packages
    _refuse_strangers()
    RAW.mkdir(parents=True, exist_ok=True)
    manifest: list[dict[str, Any]] = []
    for requirement in packages:
        name, _, version = requirement.partition("==")
        sources = list(python_sources(requirement))
        lines = (json.dumps({"path": path, "text": text}) + "\n" for path, text in sources)
        data = "".join(lines).encode()
        atomic_write(RAW / f"{name}.jsonl", data)
        entry = {
            "package": name,
            "version": version,
            "files": len(sources),
            "bytes": sum(len(text.encode()) for _, text in sources),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        manifest.append(entry)
        say(f"{requirement}: {entry['files']} files, {entry['bytes']:,} bytes of source")
    inputs.check()
    write_json(MANIFEST, manifest)
    for stale in {f.name for f in RAW.iterdir()} - {f"{e['package']}.jsonl" for e in manifest}:
        (RAW / stale).unlink()


def _refuse_strangers() -> None:
    """Raise InputError if data/raw holds a file that an earlier run of this stage did not write."""
    entries = read_json(MANIFEST) if MANIFEST.exists() else []
    if not (
        isinstance(entries, list) and all(isinstance(e, dict) and "package" in e for e in entries)
    ):
        raise InputError(f"{MANIFEST}: not a list of packages; delete it and {RAW}, and run again")
    written = {f"{entry['package']}.jsonl" for entry in entries}
    for file in sorted(RAW.glob("*")):
        if file.name not in written and not file.name.endswith(".tmp"):
            raise InputError(
                f"{file}: not written by this stage, to which {RAW} belongs; move your text "
                "elsewhere and name it in data.path"
            )


if __name__ == "__main__":
    run(corpus, ["data"])
