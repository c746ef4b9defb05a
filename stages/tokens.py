"""Stage tokens: write the text as token ids to data/tokens/, and its statistics to metrics/.

N machines that share this folder can divide the work: `--shard 1/N` ... `--shard N/N` each make a
part of the shards, then `dvc repro tokens`, or `--merge`, collects them.
"""

from collections import Counter
from functools import partial

from lm.base.console import say
from lm.base.files import atomic_write, sha256_json, write_json
from lm.base.paths import METRICS, TOKENIZER, TOKENS
from lm.base.settings import RuntimeConfig
from lm.base.tables import data_table
from lm.data.shards import MANIFEST
from lm.prepare.collect import collect_shards, files_table
from lm.prepare.documents import cut_into_shards, with_train_bytes
from lm.prepare.encode_shards import (
    Job,
    drop_unused,
    encode_all,
    open_encoder,
    require_done,
    select_part,
)
from lm.prepare.sources import DataConfig, find_files, find_sources
from lm.prepare.workers import number_of_workers
from stages.run import SCRATCH, Inputs, run_stage


def tokens_stage(inputs: Inputs) -> None:
    """Write data/tokens/, metrics/data.json and metrics/data.md."""
    data = inputs.section(DataConfig, "data")
    num_workers = number_of_workers(inputs.section(RuntimeConfig, "runtime").num_workers)
    inputs.watch(TOKENIZER)
    job = Job(data, TOKENIZER, sha256_json(inputs.code), SCRATCH / "lm-shards")
    tokenizer = open_encoder(job).tokenizer  # fails before any text is read
    found = find_sources(data)
    files = [file for source in found for file in source.files]
    inputs.watch_without_hashing(partial(find_files, data), files)
    left_out = sum((source.left_out for source in found), Counter())
    shards = with_train_bytes(data, cut_into_shards(data, found), num_workers)
    if inputs.arguments.shard:
        part = select_part(shards, inputs.arguments.shard)
        encode_all(job, part, num_workers)
        inputs.check()
        say(f"{len(part):,} of {len(shards):,} shards are done")
        return
    if inputs.arguments.merge:
        require_done(job, shards, num_workers)
    (TOKENS / MANIFEST).unlink(missing_ok=True)
    job, done = encode_all(job, shards, num_workers)
    inputs.check()
    report = collect_shards(TOKENS, job, tokenizer, shards, done)
    write_json(METRICS / "data.json", report)
    tables = f"{data_table(report)}\n{files_table(shards, left_out)}"
    atomic_write(METRICS / "data.md", tables.encode())
    drop_unused(job.kept, {shard["key"] for shard in done})
    say(tables)


if __name__ == "__main__":
    shard = ("--shard", {"metavar": "I/N", "help": "make the I-th of N parts and publish nothing"})
    merge = ("--merge", {"action": "store_true", "help": "publish if every part is made"})
    run_stage(tokens_stage, ["data", "runtime"], shard, merge)
