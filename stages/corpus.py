"""Stage corpus: the source code of data.packages, one .jsonl file each, and their manifest."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from lm.config import read_section
from lm.console import say
from lm.files import atomic_write, write_json
from lm.packages import python_sources
from lm.text import DataConfig
from stages.run import Params, run

RAW = Path("data/raw")


def corpus(params: Params, arguments: argparse.Namespace) -> None:
    """Write data/raw/*.jsonl and data/corpus.json."""
    manifest: list[dict[str, Any]] = []
    RAW.mkdir(parents=True, exist_ok=True)
    for requirement in read_section(DataConfig, params, "data").packages:
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
    for stale in {file.stem for file in RAW.iterdir()} - {entry["package"] for entry in manifest}:
        (RAW / f"{stale}.jsonl").unlink()
    write_json(RAW.with_name("corpus.json"), manifest)


if __name__ == "__main__":
    run(corpus)
