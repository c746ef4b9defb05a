"""Time the way from a file of text to a file of token ids: ours beside those of others.

    python -m benchmarks.data --megabytes 100 --rounds 3

Each way is a process of its own, timed from start to end. All make the same ids with the same
vocabulary, in turns. `nanogpt` needs the package datasets and is left out without it. Memory is the
peak of the resident set, summed over a process and its children.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.corpus import END, documents

ROOT = Path(__file__).parent.parent
OURS, OURS_LEARNS = "ours", "ours learns"
SPAN = 1 << 22  # bytes of text that a pool hands to one process


# --- the ways: FILE, TOKENIZER, OUT, cores -------------------------------------------------


def raw(file: Path, tokenizer: Path, out: Path, cores: int) -> None:
    """Read the file, write nothing."""
    with open(file, "rb") as stream:
        while stream.read(SPAN):
            pass


def bare(file: Path, tokenizer: Path, out: Path, cores: int) -> None:
    """Encode the file by gigatoken alone, without a split or a check."""
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    import gigatoken

    content = json.loads(tokenizer.read_text())
    end_id = content.pop("added_tokens")[-1]["id"]
    encoder = gigatoken.Tokenizer.from_json(json.dumps(content | {"added_tokens": []}))
    with open(out, "wb") as target:
        for span in spans(file):
            found = encoder.encode_batch(gigatoken.gigatoken_rs.BytesSource(span, END)).layout
            offsets, ids = found.offsets.data, found.content.data
            np.insert(ids, offsets[1:], end_id).astype(np.uint16).tofile(target)


def tiktoken_pool(file: Path, tokenizer: Path, out: Path, cores: int) -> None:
    """Encode spans of documents by tiktoken in a pool of processes, with one writer."""
    write_in_order(file, out, cores, _tiktoken_span, _open_tiktoken, tokenizer)


def tokenizers_pool(file: Path, tokenizer: Path, out: Path, cores: int) -> None:
    """Encode spans of documents by tokenizers in a pool of processes, with one writer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    write_in_order(file, out, cores, _tokenizers_span, _open_tokenizers, tokenizer)


def nanogpt(file: Path, tokenizer: Path, out: Path, cores: int) -> None:
    """Do as nanoGPT: datasets.map with tiktoken, then the arrow table to a memmap in batches."""
    import datasets  # type: ignore[import-not-found]

    from benchmarks import data as this  # under this name its functions can be pickled

    datasets.disable_progress_bars()
    this._open_tiktoken(tokenizer)
    parquet = str(file.with_suffix(".parquet"))
    cache = str(out.parent / "datasets")
    table = datasets.load_dataset("parquet", data_files=parquet, split="train", cache_dir=cache)
    made = table.map(this._tokenized, remove_columns=["text"], num_proc=cores)
    ids = np.memmap(out, dtype=np.uint16, mode="w+", shape=(int(np.sum(made["len"])),))
    place, n_batches = 0, min(1024, len(made))
    for i in range(n_batches):
        batch = made.shard(n_batches, i, contiguous=True).with_format("numpy")
        joined = np.concatenate(batch["ids"])
        ids[place : place + len(joined)] = joined
        place += len(joined)
    ids.flush()


def learn_by_tokenizers(file: Path, tokenizer: Path, out: Path, cores: int) -> None:
    """Learn the vocabulary by Hugging Face tokenizers, from the training split that ours uses."""
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    from lm.base.params import load_params
    from lm.base.sections import read_section
    from lm.data.tokenizer import load_tokenizer
    from lm.prepare.documents import split_documents
    from lm.prepare.learn import train_bpe
    from lm.prepare.sources import DataConfig

    params = load_params(ROOT / "params.yaml")
    params["data"] |= {"path": str(file), "separator": END.decode()}
    found = split_documents(read_section(DataConfig, params, "data"), Counter())
    texts = (document.text for side, document in found if side == "train")
    vocabulary = load_tokenizer(tokenizer.parent).vocab_size
    train_bpe(texts, vocabulary).save(out.parent / "by_tokenizers")


WAYS: dict[str, Callable[[Path, Path, Path, int], None]] = {
    "bare gigatoken": bare,
    "tiktoken pool": tiktoken_pool,
    "tokenizers pool": tokenizers_pool,
    "nanogpt": nanogpt,
    "raw read": raw,
    "learn by tokenizers": learn_by_tokenizers,
}


def spans(file: Path) -> Iterator[bytes]:
    """Yield the file in stretches of whole documents."""
    rest = b""
    with open(file, "rb") as stream:
        while chunk := stream.read(SPAN):
            whole, _, rest = (rest + chunk).rpartition(END)
            yield whole
    if rest.strip():
        yield rest


def write_in_order(
    file: Path,
    out: Path,
    cores: int,
    encode: Callable[[bytes], Any],
    begin: Callable[[Path], None],
    tokenizer: Path,
) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(cores, begin, (tokenizer,)) as pool, open(out, "wb") as target:
        for ids in pool.imap(encode, spans(file)):
            ids.tofile(target)


_encoder: Any = None
_end_id = 0


def _open_tiktoken(tokenizer: Path) -> None:
    global _encoder, _end_id
    import tiktoken

    from lm.data.tokenizer import load_tokenizer

    ours = load_tokenizer(tokenizer.parent)
    ranks = {ours.decode_bytes([i]): i for i in range(ours.vocab_size) if i != ours.end_id}
    _encoder = tiktoken.Encoding(
        "ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    _end_id = ours.end_id


GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def _open_tokenizers(tokenizer: Path) -> None:
    global _encoder, _end_id
    from lm.data.tokenizer import load_tokenizer

    _encoder = load_tokenizer(tokenizer.parent)
    _end_id = _encoder.end_id


def _texts(span: bytes) -> list[str]:
    return [part.decode() for part in span.split(END) if part.strip()]


def _joined(encoded: Any) -> Any:
    return np.array([i for ids in encoded for i in (*ids, _end_id)], dtype=np.uint16)


def _tiktoken_span(span: bytes) -> Any:
    return _joined(_encoder.encode_ordinary(text) for text in _texts(span))


def _tokenizers_span(span: bytes) -> Any:
    return _joined(_encoder.encode_batch(_texts(span)))


def _tokenized(row: dict[str, str]) -> dict[str, Any]:
    ids = [*_encoder.encode_ordinary(row["text"]), _end_id]
    return {"ids": ids, "len": len(ids)}


# --- the run ----------------------------------------------------------------------------


def measure(way: str, file: Path, tokenizer: Path, out: Path, cores: int) -> tuple[float, float]:
    """Run one way as a process; return its seconds and its peak resident set in MB."""
    options = {"way": way, "file": file, "tokenizer": tokenizer, "out": out, "cores": cores}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command, folder = [sys.executable, "-m", "benchmarks.data", *words], ROOT
    if way in (OURS, OURS_LEARNS):
        folder = out.parent / "project"
        shutil.rmtree(folder / ".dvc", ignore_errors=True)  # done shards are kept there
        vocabulary = len(json.loads(tokenizer.read_text())["model"]["vocab"]) + 1
        command = stage("tokens", file, {"runtime.num_workers": cores})
        if way == OURS_LEARNS:
            settings = {"runtime.num_workers": cores, "tokenizer.vocab_size": vocabulary}
            command = stage("tokenizer", file, settings)
    shutil.rmtree(out.parent / "datasets", ignore_errors=True)  # and here
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.02)
    elapsed = time.perf_counter() - start
    assert process.returncode == 0, way
    return elapsed, peak / 1e6


def stage(name: str, file: Path, settings: dict[str, Any]) -> list[str]:
    """Return the command of a stage of this project, on a text of ours."""
    separator = END.decode() if file.suffix == ".txt" else "null"
    settings = {"data.path": file, "data.separator": separator, **settings}
    given = [word for key, value in settings.items() for word in ("-S", f"{key}={value}")]
    return [sys.executable, "-m", f"stages.{name}", *given]


def resident_bytes(pid: int) -> int:
    """Return the resident set of a process and its children; what they share counts for each."""
    total = 0
    try:
        for process in [(top := psutil.Process(pid)), *top.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def digest(out: Path, way: str) -> tuple[int, int]:
    """Return the number of ids and their sum: the same for all ways, whatever was held out."""
    files = [out]
    if way == OURS:
        files = sorted((out.parent / "project" / "data" / "tokens").glob("*/*.bin"))
    ids = [np.fromfile(file, dtype=np.uint16) for file in files]
    return sum(map(len, ids)), sum(int(part.sum(dtype=np.int64)) for part in ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--only", nargs="*", default=[OURS, OURS_LEARNS, *WAYS])
    for name in ("--file", "--tokenizer", "--out"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        WAYS[arguments.way](arguments.file, arguments.tokenizer, arguments.out, arguments.cores)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), arguments)


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    """Run all ways in turns, on 2 cores and on 1, and our formats; print Markdown tables."""
    texts = [text.strip(b"\r\n") for text in documents(int(arguments.megabytes * 1e6))]
    files = write_formats(folder, texts)
    size = sum(map(len, texts))
    project = folder / "project"
    project.mkdir()
    for name in ("lm", "stages", "tools"):
        shutil.copytree(ROOT / name, project / name)
    shutil.copy(ROOT / "params.yaml", project)
    tokenizer = learn(files["text"], project, arguments.vocabulary)
    ways = [
        w
        for w in (OURS, OURS_LEARNS, *WAYS)
        if w in arguments.only and (w != "nanogpt" or find_spec("datasets"))
    ]
    rows = [(way, "text") for way in ways]
    rows += [(OURS, kind) for kind in files if kind != "text"] if OURS in ways else []
    for cores in (2, 1):
        taken: dict[tuple[str, str], list[tuple[float, float]]] = {row: [] for row in rows}
        found = {}
        for _ in range(arguments.rounds):
            for way, kind in rows:
                measured = measure(way, files[kind], tokenizer, folder / "out.bin", cores)
                taken[way, kind].append(measured)
                if way not in ("raw read", OURS_LEARNS, "learn by tokenizers"):
                    found[way, kind] = digest(folder / "out.bin", way)
        assert len(set(found.values())) == 1, found
        if "learn by tokenizers" in ways:
            theirs = (folder / "by_tokenizers" / "tokenizer.json").read_bytes()
            assert theirs == tokenizer.read_bytes()
        (n_tokens, _) = next(iter(found.values()))
        print(
            f"\n{size / 1e6:.0f} MB, {len(texts):,} documents, {n_tokens:,} ids, {cores} core(s)\n"
        )
        print("| way | s | MB/s | time / ours | peak MB |\n|---|--:|--:|--:|--:|")
        for (way, kind), runs in taken.items():
            ours = OURS_LEARNS if "learn" in way else OURS
            base = statistics.median(seconds for seconds, _ in taken[ours, "text"])
            seconds = statistics.median(seconds for seconds, _ in runs)
            peak = max(peak for _, peak in runs)
            name, speed = way if kind == "text" else f"{way}, {kind}", size / 1e6 / seconds
            print(f"| {name} | {seconds:.2f} | {speed:,.0f} | {seconds / base:.2f} | {peak:,.0f} |")


def write_formats(folder: Path, texts: list[bytes]) -> dict[str, Path]:
    """Write the same documents in each format."""
    import pyarrow
    from pyarrow import parquet

    paths = {kind: folder / f"text.{suffix}" for kind, suffix in
             (("text", "txt"), ("jsonl", "jsonl"), ("parquet", "parquet"))}  # fmt: skip
    paths["text"].write_bytes(b"".join(text + END for text in texts))
    with open(paths["jsonl"], "w") as lines:
        lines.writelines(json.dumps({"text": text.decode()}) + "\n" for text in texts)
    table = pyarrow.table({"text": [text.decode() for text in texts]})
    parquet.write_table(table, paths["parquet"], row_group_size=1000)
    return paths


def learn(file: Path, project: Path, vocabulary: int) -> Path:
    """Learn the vocabulary that all ways use, by our stage tokenizer."""
    (project / "data" / "tokenizers").mkdir(parents=True)
    command = stage("tokenizer", file, {"tokenizer.vocab_size": vocabulary})
    subprocess.run(command, cwd=project, check=True)
    return project / "data" / "tokenizer" / "tokenizer.json"


if __name__ == "__main__":
    main()
