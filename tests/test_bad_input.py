"""All the bad input we know, in one table: what is given, and the line that the user sees.

Each row is a stage as a user starts it, forked from a process that has imported everything, since
importing torch takes seconds. The line is exact; "…" stands for what differs by machine.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
import zstandard
from safetensors.torch import load_file, save_file

from lm.base.files import sha256_file, write_json
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.data.tokenizer import END_TOKEN, load_tokenizer
from lm.model.model_folder import PROVENANCE, save_model
from lm.model.transformer import ModelConfig, TransformerLM
from lm.prepare.learn import train_bpe
from tests.project import SMOKE, Project

OUTPUTS = ("data", "models", "metrics")


class Stages:
    """A prepared project, put back after each test."""

    def __init__(self, folder: Path):
        self.project = Project(folder / "project")
        self.folder = self.project.folder
        self.project.prepare("tokenizer", "tokens")
        self.pristine = folder / "pristine"
        shutil.copytree(self.folder, self.pristine)

    def restore(self):
        for name in (*OUTPUTS, "given", "params.yaml"):
            old, new = self.folder / name, self.pristine / name
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
            if new.is_dir():
                shutil.copytree(new, old)
            elif new.exists():
                shutil.copy(new, old)

    def try_out(self, row):
        """Run a row's stage; its result, and the outputs that it made, altered or deleted."""
        for given in row.given:
            if callable(given):
                given(self.folder)
        before = self.outputs(row.stage)
        words = [("-S", given) for given in row.given if isinstance(given, str)]
        result = self.project.warm(row.stage, *chain.from_iterable(words))
        changed = before.items() ^ self.outputs(row.stage).items()
        return result, {name for name, _ in changed}

    def outputs(self, stage):
        """What the outputs hold, but for the tokens that stage tokens drops before it begins."""
        return {
            file.relative_to(self.folder).as_posix(): file.read_bytes()
            for name in OUTPUTS
            for file in (self.folder / name).rglob("*")
            if file.is_file() and file.stat().st_size < 1 << 20
            if not (stage == "tokens" and file.is_relative_to(self.folder / "data" / "tokens"))
        }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Stages(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def stages(prepared):
    yield prepared
    prepared.restore()


class Row(NamedTuple):
    area: str
    stage: str
    given: list[str | Callable[[Path], object]]  # settings, and what is done to the project
    code: int
    line: str


def file(name, data):
    """Put a file into the project: its bytes, or a function that makes them, if that takes long."""

    def write(folder):
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data() if callable(data) else data)

    return write


def soak(row):
    """A row that only the soak tries: another like it does in a part of the time."""
    return pytest.param(row, marks=pytest.mark.soak)


def long_file(name, size, head=b""):
    """A file that takes no space on the disk: NUL bytes behind some others."""

    def write(folder):
        file(name, head)(folder)
        os.truncate(folder / name, size)

    return write


def special(name, make):
    """Put what `make` makes in place of a file."""

    def write(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return write


def setting(key, value, line):
    """A setting in params.yaml, read by the first stage that depends on its section."""
    section = key.split(".")[0]
    reader = {
        "corpus": "corpus",
        "data": "tokens",
        "tokenizer": "tokenizer",
        "evaluate": "evaluate",
    }
    return Row("params", reader.get(section, "train"), [f"{key}={value}"], 2, line)


def in_params(**sections):
    """Write settings into params.yaml."""

    def write(folder):
        params = yaml.safe_load((folder / "params.yaml").read_text())
        for section, keys in sections.items():
            params[section] |= keys
        (folder / "params.yaml").write_text(yaml.safe_dump(params))

    return write


def written(stage, line, **sections):
    """Settings in params.yaml that a stage is told of although only a later one reads them."""
    return Row("check", stage, [in_params(**sections)], 2, line)


def settings(text, line):
    """A whole params.yaml."""
    text = text if isinstance(text, bytes) else text.encode()
    return Row("params", "train", [file("params.yaml", text)], 2, f"params.yaml: {line}")


def data(name, content, line, *more):
    """A file of text."""
    return Row(
        "data", "tokens", [file(f"given/{name}", content), "data.path=given", *more], 2, line
    )


def folder(what, line, *more):
    """A folder of text with something in it."""
    return Row("data", "tokens", [what, "data.path=given", *more], 2, line)


def from_sources(text, line, *more):
    """A mapping of sources."""
    return Row("data", "tokens", [f"data.sources={text}", *more], 2, line)


def source(path=".", weight="null"):
    """A mapping of one source."""
    return f"{{web: {{path: {path}, text_field: text, weight: {weight}}}}}"


def link_to_folder(folder):
    """A link among the text to a folder elsewhere."""
    file("given/a.txt", b"text")(folder)
    (folder / "given" / "link").symlink_to("../text")


def table(**columns):
    """The bytes of a parquet table."""
    made = io.BytesIO()
    options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    pyarrow.parquet.write_table(pyarrow.table(columns), made, **options)
    return made.getvalue()


def repeated(value, rows):
    """The bytes of a parquet table in which all rows share one long value, and no schema says so."""
    made = io.BytesIO()
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows), [value])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), made, store_schema=False)
    return made.getvalue()


def two_columns(name):
    """The bytes of a parquet table with two columns of one name."""
    made = io.BytesIO()
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, [name, name]), made)
    return made.getvalue()


def altered(data, at):
    """Bytes with one bit flipped."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def long_window(data):
    """The bytes as `zstd --long=31` compresses them."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


def tokenizer(change, line, end_token=END_TOKEN):
    """A tokenizer.json whose JSON has been changed, or bytes in its place."""
    if callable(change):
        content = json.loads(TOKENIZER)
        change(content)
        change = json.dumps(content).encode()
    given = [
        "tokenizer.kind=file",
        "tokenizer.source=given.json",
        f"tokenizer.end_token={end_token}",
    ]
    return Row("tokenizer", "tokenizer", [file(GIVEN, change), *given], 2, line)


def archive(kind, member="a.txt", **attributes):
    """The bytes of an archive with one member."""
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as made:
            made.writestr(member, "text")
    else:
        with tarfile.open(fileobj=packed, mode="w") as made:
            information = tarfile.TarInfo(member)
            for name, value in attributes.items():
                setattr(information, name, value)
            made.addfile(information)
    return packed.getvalue()


def added_token(content, i=300, **options):
    """Add a token that is looked for in the text before all else."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    token = {"id": i, "content": content} | flags | options
    return lambda json: json["added_tokens"].append(token)


def splitting(pattern):
    """Split text by a pattern before all else."""
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return lambda json: json.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, json["pre_tokenizer"]]}
    )


def model(**changes):
    """Change the model of a tokenizer.json."""
    return lambda json: json["model"].update(changes)


def vocabulary(**ids):
    """Change the ids of some tokens."""
    return lambda json: json["model"]["vocab"].update(ids)


def without_x(json):
    """Take one byte out of the vocabulary."""
    ids = json["model"]["vocab"]
    ids["never"] = ids.pop("x")


def saved(*changes):
    """Put a small model, untrained, into models/model; then change it."""

    def write(folder):
        tokenizer = load_tokenizer(folder / "data" / "tokenizer")
        section = load_params(SMOKE)["model"] | {"vocab_size": tokenizer.vocab_size}
        torch.manual_seed(0)
        model = TransformerLM(read_section(ModelConfig, {"model": section}, "model"))
        save_model(model, tokenizer, folder / MODEL)
        made_of = {part: {} for part in PROVENANCE} | {"model": section}
        write_json(folder / MODEL / "provenance.json", made_of)
        for change in changes:
            change(folder)

    return write


def weights(change, name="lm_head.weight"):
    """Change one of the model's weights; the file is whole."""

    def write(folder):
        file = folder / MODEL / "model.safetensors"
        tensors = load_file(file)
        tensors[name] = change(tensors[name])
        save_file(tensors, file)

    return write


def many_tensors(count):
    """The bytes of a safetensors file of tensors without a number in them."""
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": nothing for i in range(count)}).encode()
    return len(header).to_bytes(8, "little") + header


def poked(value):
    """One of the weights is no number, or is too large."""

    def change(tensor):
        tensor[1, 2] = value
        return tensor

    return weights(change)


def edited(name, **values):
    """Change values of a JSON file; without any, it becomes a list."""

    def write(folder):
        content = json.loads((folder / name).read_text()) | values if values else []
        (folder / name).write_text(json.dumps(content))

    return write


def settings_of(**values):
    """The settings beside a saved model are of another."""
    return saved(edited(f"{MODEL}/config.json", **values))


def rewritten(side, place, token_id):
    """Put an id into the tokens; the manifest agrees with it."""

    def write(folder):
        name, manifest = f"{side}/text-00000.bin", folder / TOKENS / "tokens.json"
        with open(folder / TOKENS / name, "r+b") as shard:
            os.pwrite(shard.fileno(), token_id.to_bytes(2, "little"), 2 * place)
        content = json.loads(manifest.read_text())
        content["shards"][0][side]["sha256"] = sha256_file(folder / TOKENS / name)
        manifest.write_text(json.dumps(content))

    return write


MODEL, TOKENS = "models/model", "data/tokens"
WEIGHTS = f"{MODEL}/model.safetensors"
GIVEN = "data/tokenizers/given.json"
TOKENIZER = train_bpe(["low lower newest " * 20], 280).backend.to_str()
BOMB = "a: &a [0,0,0,0,0,0,0,0,0]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghi")
)
CONVERT = "convert the file to UTF-8, leave it out, or set data.encoding_errors: replace"
NAME_ANOTHER = "name another in data.text_field (or its source's text_field)"
NO_TEXT = "no text; every document is empty or left out"
SKIP = "or set data.on_bad_document: skip"
LEAVE_OUT = "or leave it out (data.glob, data.on_bad_document: skip)"
UNPACK = f"not text; unpack it {LEAVE_OUT}"
DECOMPRESS = f"not text; decompress it {LEAVE_OUT}"
ARRAY = f"a JSON array, not one object per line; convert it (jq -c '.[]') {LEAVE_OUT}"
VALUE = f"JSON over several lines, not one object per line; convert it (jq -c .) {LEAVE_OUT}"
LINES = f"JSON lines, not text; give it the suffix .jsonl {LEAVE_OUT}"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000\n"
POINTER = "a pointer of Git LFS, not the file itself; run `git lfs pull`"
EXPANDS = (
    "bytes expand to more than 100 times as many; raise data.max_expansion if the file is right"
)
AMBIGUOUS = "is ambiguous; write a plain decimal number, or quote it if it is text"
NO_YAML = "not valid YAML: line 1: anchors, aliases and tags are not supported"
LONG = "a document longer than 64 MiB; split it (data.separator splits text files) or set data.on_bad_document: skip"
AGAIN = "run `dvc repro tokens`"

ROWS = [
    setting("train.lr", "-1e-3", "params.yaml: train.lr = -0.001: must be > 0"),
    setting("train.lr", '"1e-3"', "params.yaml: train.lr = '1e-3' is text, wanted a number"),
    setting("train.lr", ".nan", "params.yaml: train.lr = nan: must be finite"),
    setting("train.lr", ".inf", "params.yaml: train.lr = inf: must be finite"),
    setting("train.lr", "1e999", "params.yaml: train.lr = inf: must be finite"),
    setting("train.lr", "null", "params.yaml: train.lr = null, wanted a number"),
    setting("train.lr", "", "params.yaml: train.lr = '' is text, wanted a number"),
    setting("train.early_stopping", "", "params.yaml: train.early_stopping = '' is text, wanted an integer"),
    setting("data.separator", r'"\n\n"', r'-S data.separator="\n\n": a backslash in double quotes means one text to DVC and another to YAML; write the value into params.yaml'),
    setting("train.lr", "[1", "-S train.lr=[1: not valid YAML: while parsing a flow sequence …"),
    setting("train.lr", "9" * 400, f"-S train.lr={'9' * 400}: not valid YAML: line 1: {'9' * 80}... {AMBIGUOUS}"),
    setting("model.num_layers", "0", "params.yaml: model.num_layers = 0: must be >= 1"),
    setting("model.num_layers", "true", "params.yaml: model.num_layers = True is a boolean, wanted an integer"),
    setting("model.num_layers", "3.0", "params.yaml: model.num_layers = 3.0 is a decimal, wanted an integer"),
    setting("model.num_layers", "0777", f"-S model.num_layers=0777: not valid YAML: line 1: 0777 {AMBIGUOUS}"),
    setting("model.num_layers", "yes", "params.yaml: model.num_layers = 'yes' is text, wanted an integer"),
    setting("model.num_layers", "[1]", "params.yaml: model.num_layers = [1] is a list, wanted an integer"),
    setting("model.num_layers", "{a: 1}", "params.yaml: model.num_layers = {'a': 1} is a dict, wanted an integer"),
    setting("model.d_ff", str(10**30), f"params.yaml: model.d_ff = {10**30}: must be < 2**31"),
    Row("params", "train", ["model.d_model=2147483646", "model.num_heads=5"], 2, "params.yaml: model.d_model = 2147483646 is not divisible by model.num_heads = 5; use 1, 2, 3, …, ..."),
    *(Row("params", "train", [f"{key}=2000000000"], 3, f"training … MB of memory, … MB are free; {remedy}") for key, remedy in (
        ("train.batch_size", "train.micro_batch_size: 1, train.batch_size: … would fit"),
        ("model.num_layers", "train.micro_batch_size: 1, model.num_layers: … would fit"),
        ("model.d_model", "not even one layer would fit: lower model.d_model, model.d_ff, model.context_length or tokenizer.vocab_size"),
    )),
    setting("evaluate.max_new_tokens", "2000000000", "params.yaml: evaluate.max_new_tokens = 2000000000: must be in [1, 65536]"),
    setting("model.num_heads", "3", "params.yaml: model.d_model = 32 is not divisible by model.num_heads = 3; use 1, 2, 4, 8, 16, 32"),
    setting("model.num_kv_heads", "3", "params.yaml: model.num_heads = 2 is not a multiple of model.num_kv_heads = 3; use 1, 2"),
    setting("model.num_heads", "32", "params.yaml: … need an even head dimension…"),
    setting("model.dropout", "1.0", "params.yaml: model.dropout = 1.0: must be in [0, 1)"),
    setting("model.dropout", "-0.1", "params.yaml: model.dropout = -0.1: must be in [0, 1)"),
    setting("model.norm", "layernorm", "params.yaml: model.norm = layernorm: must be one of rmsnorm, none"),
    setting("model.norm", "a" * 1000, f"params.yaml: model.norm = {'a' * 80}...: must be one of rmsnorm, none"),
    setting("model.ffn", "relu_cubed", "params.yaml: model.ffn = relu_cubed: must be one of swiglu, silu"),
    written("train", "params.yaml: model.norm = a\\nb\\x1b[31m: must be one of rmsnorm, none", model={"norm": "a\nb\x1b[31m"}),
    setting("model.qk_norm", "1", "params.yaml: model.qk_norm = 1 is a number, wanted true or false"),
    setting("model.context_length", "100000", "the train split has 13,578 tokens, but one window needs model.context_length + 1 = 100,001; lower model.context_length or add text"),
    setting("model.context_length", "5000", "the valid split has 4,025 tokens, but one window needs model.context_length + 1 = 5,001; lower model.context_length or add text"),
    setting("train.warmup_steps", "500", "params.yaml: train.warmup_steps = 500 exceeds train.max_steps = 20"),
    setting("train.max_steps", "-3", "params.yaml: train.max_steps = -3: must be >= 1"),
    setting("train.batch_size", "0", "params.yaml: train.batch_size = 0: must be >= 1"),
    setting("train.micro_batch_size", "3", "params.yaml: train.batch_size = 4 is not a multiple of …"),
    setting("train.num_threads", 0, "params.yaml: train.num_threads = 0: must be in [1, 1024]"),
    setting("train.on_nonfinite", "ignore", "params.yaml: train.on_nonfinite = ignore: must be one of stop, skip"),
    setting("train.max_skipped_steps", 0, "params.yaml: train.max_skipped_steps = 0: must be >= 1"),
    setting("train.dtype", "float8", "params.yaml: train.dtype = float8: must be one of auto, float32, bfloat16, float16"),
    setting("train.seed", "-1", "params.yaml: train.seed = -1: must be in [0, 2**63)"),
    setting("train.seed", str(2**70), f"params.yaml: train.seed = {2**70}: must be in [0, 2**63)"),
    setting("train.optimizer", "sgd", "params.yaml: train.optimizer = sgd: must be one of adamw, muon"),
    setting("train.schedule", "wsd", "params.yaml: train.decay_steps = 0: train.schedule = wsd needs >= 1…"),
    setting("runtime.device", "tpu", "params.yaml: runtime.device = tpu: must be one of auto, cpu, cuda, cuda:0, cuda:1, ..., mps"),
    setting("runtime.device", "cuda:", "params.yaml: runtime.device = cuda:: must be one of …"),
    setting("runtime.num_processes", "all", "params.yaml: runtime.num_processes = 'all' is text, wanted an integer or auto"),
    setting("runtime.num_processes", "0", "params.yaml: runtime.num_processes = 0: must be in [1, 1024] or auto"),
    written("corpus", "params.yaml: runtime.device = cuda:1 is for one process, but runtime.num_processes = 2; use cuda, each process takes a GPU of its own", runtime={"device": "cuda:1", "num_processes": 2}),
    setting("runtime.keep_checkpoints", "1", "params.yaml: runtime.keep_checkpoints = 1: must be >= 2"),
    setting("tokenizer.vocab_size", "100", "params.yaml: tokenizer.vocab_size = 100: must be >= 257 (256 bytes and the end token)"),
    setting("tokenizer.vocab_size", "2000000000", "params.yaml: tokenizer.vocab_size = 2000000000: must be <= 1048576"),
    setting("tokenizer.kind", "file", "params.yaml: tokenizer.source = null: tokenizer.kind = file needs a name"),
    setting("tokenizer.end_token", "''", "params.yaml: tokenizer.end_token = : must not be empty"),
    setting("tokenizer.end_token", "a", "tokenizer.end_token = a: plain text gives this token; choose another"),
    setting("data.valid_fraction", "0", "params.yaml: data.valid_fraction = 0.0: must be in (0, 1)"),
    setting("corpus.packages", "networkx", "params.yaml: corpus.packages = 'networkx' is text, wanted a list"),
    setting("corpus.packages", "[1]", "params.yaml: corpus.packages[0] = 1 is a number, wanted text"),
    setting("data.separator", "''", "params.yaml: data.separator = : must not be empty"),
    setting("data.path", "''", "params.yaml: data.path = : must not be empty"),
    setting("evaluate.top_p", "1.5", "params.yaml: evaluate.top_p = 1.5: must be in (0, 1]"),
    setting("evaluate.prompts", "[]", "params.yaml: evaluate.prompts = []: must not be empty"),
    written("tokens", "params.yaml: evaluate.prompts times evaluate.temperatures are 90,000 samples: must be <= 65,536", evaluate={"prompts": ["a"] * 300, "temperatures": [n / 100 for n in range(300)]}),
    setting("train.lrr", "1", "-S train.lrr=1: unknown key train.lrr (did you mean train.lr?)"),
    setting("train", "1", "-S train=1: expected section.key=value, as in -S train.lr=1e-3"),
    setting("model.vocab_size", "7", "-S model.vocab_size=7: unknown key model.vocab_size…"),
    setting("train.init_from", "../model", "params.yaml: train.init_from = ../model: must be a folder's name in models/pretrained/, which DVC watches; copy the folder there"),
    *(setting("train.init_from", name, f"params.yaml: train.init_from = {name.strip(chr(39))}: must be a folder's name in models/pretrained/, which DVC watches; copy the folder there") for name in ("..", ".", "''")),
    Row("params", "tokenizer", ["tokenizer.kind=file", "tokenizer.source=.."], 2,
        "params.yaml: tokenizer.source = ..: must be a file's name in data/tokenizers/, which DVC watches; copy the file there"),
    settings(b"\xef\xbb\xbfdata:\r\n\tpath: a\r\n", "not valid YAML: while scanning for the next token found character '\\t' that cannot start any token line 2, column 1: path: a ^"),
    written("train", f"params.yaml: train.max_steps = {'1' * 20}: must be < 2**31", train={"max_steps": int("1" * 20)}),
    setting("train.init_from", "mine", "models/pretrained/mine: no such folder; copy the model's there (train.init_from names it)"),
    *(written(stage, "params.yaml: train.lr = 'fast' is text, wanted a number", train={"lr": "fast"}) for stage in ("corpus", "tokenizer", "tokens")),
    *(written(stage, "params.yaml: evaluate.temperatures[0] = -1.0: must be >= 0", evaluate={"temperatures": [-1]}) for stage in ("corpus", "tokens", "train")),
    written("corpus", "params.yaml: model.d_model = 32 is not divisible by model.num_heads = 3; use 1, 2, 4, 8, 16, 32", model={"num_heads": 3}),
    written("tokens", "params.yaml: unknown key model.vocab_size: it is derived, not set; take it out", model={"vocab_size": 7}),
    written("tokenizer", "params.yaml: export.license = MIT License: must be an identifier of the Hub, as apache-2.0, or null", export={"license": "MIT License"}),
    written("evaluate", "params.yaml: train.warmup_steps = 500 exceeds train.max_steps = 20", train={"warmup_steps": 500}),
    written("tokens", "train.parallel = none, but there are 2 processes; use ddp or fsdp, or runtime.num_processes: 1", runtime={"num_processes": 2}),
    written("corpus", "train.batch_size = 4 is not a multiple of 3 processes", train={"parallel": "ddp"}, runtime={"num_processes": 3}),
    written("corpus", "data.path = owner/dataset: no such file or folder; a data set of Hugging Face must be downloaded first: …", data={"path": "owner/dataset"}),
    written("corpus", "data.path = text/*.txt: no such file or folder; a pattern goes into data.glob", data={"path": "text/*.txt"}),
    written("corpus", "data/tokenizers/missing.json: no such file; copy it there (tokenizer.source names it)", tokenizer={"kind": "file", "source": "missing.json"}),
    *(written(stage, "models/pretrained/missing: no such folder; copy the model's there (train.init_from names it)", train={"init_from": "missing"}) for stage in ("corpus", "tokens")),
    written("corpus", "corpus.source = grammar needs data.path: data/raw and data.split: hash, found text and hash; to train on your own text set corpus.source: packages", corpus={"source": "grammar"}),
    Row("params", "train", ["evaluate.top_p=0.5"], 2, "-S evaluate.top_p=0.5: this stage reads only the sections model, train, runtime"),
    Row("params", "tokenizer", ["tokenizer.kind=file", "tokenizer.source=../x"], 2,
        "params.yaml: tokenizer.source = ../x: must be a file's name in data/tokenizers/, which DVC watches; copy the file there"),
    Row("params", "corpus", ["corpus.packages=[networkx==1.0]"], 3, "corpus.packages: expected networkx==1.0, found 3.6.1; run …"),
    Row("params", "train", [lambda folder: (folder / "params.yaml").unlink()], 2,
        "params.yaml: no such file; run from the project's root folder"),
    Row("params", "train", [special("params.yaml", Path.mkdir)], 2,
        "params.yaml: not a file; run from the project's root folder"),
    Row("params", "train", [special("params.yaml", os.mkfifo)], 2,
        "params.yaml: not a file; run from the project's root folder"),
    settings("", "holds no sections; expected corpus, data, tokenizer, model, train, evaluate, export, runtime"),
    settings("- 1", "holds no sections; expected corpus, data, tokenizer, model, train, evaluate, export, runtime"),
    settings("trian: {}", "unknown section trian (did you mean train?)"),
    settings("model: {}", "missing section corpus"),
    settings("corpus: {}", "missing key corpus.source"),
    settings("train: 3", "section train holds no keys"),
    settings("data: {path: text, packages: []}", "data.packages is called corpus.packages now; move it there"),
    Row("params", "tokens", ["data.source=grammar"], 2, "-S data.source=grammar: data.source is called corpus.source now"),
    settings("corpus: {<<: {lr: 1}}", "unknown key corpus.<<…"),
    settings(f"corpus: {{? {'k' * 2000} : 1}}", f"unknown key corpus.{'k' * 73}..."),
    settings(f"? {'k' * 2000}\n: {{}}\n", f"unknown section {'k' * 80}..."),
    settings("corpus: {pakages: []}", "unknown key corpus.pakages (did you mean corpus.packages?)"),
    settings("train: {lr: 1, lr: 2}", "not valid YAML: line 1: key lr stands twice"),
    settings("train: {1: 2}", "not valid YAML: line 1: key 1 is not text"),
    settings("train: {[a]: 2}", "not valid YAML: line 1: key ['a'] is not text"),
    settings("train: {lr: 1", "not valid YAML: while parsing a flow mapping …"),
    settings("train: {lr: " + "9" * 5000 + "}", f"not valid YAML: line 1: {'9' * 80}... {AMBIGUOUS}"),
    settings("train: !!python/object/apply:os.getcwd []", NO_YAML),
    settings("train: !!int a", NO_YAML),
    settings(BOMB, NO_YAML),
    settings("train: " + "[" * 10_000, "not valid YAML: nested too deeply"),
    settings("train: " + "{a: " * 10_000, "not valid YAML: nested too deeply"),
    settings("train: \0", "not valid YAML: unacceptable character #x0000: …"),
    settings('train: "\\ud800"', "not valid YAML: line 1: half a surrogate pair; write the character itself"),
    settings('"\\udc80": 1', "not valid YAML: line 1: half a surrogate pair; write the character itself"),
    settings(b"train: \xff", "not UTF-8 at offset 7"),
    settings("a" * (1 << 18) + "b", "longer than 262,144 bytes; keep only settings in it"),

    Row("data", "tokenizer", ["data.path=missing"], 2, "data.path = missing: no such file or folder"),
    Row("data", "tokens", ["data.path=text/*.txt"], 2, "data.path = text/*.txt: no such file or folder; a pattern goes into data.glob"),
    Row("data", "tokens", ["data.path=/dev/zero"], 2, "data.path = /dev/zero: a pipe or a device; name a file or a folder"),
    Row("data", "tokens", [special("given", os.mkfifo), "data.path=given"], 2, "data.path = given: a pipe or a device; name a file or a folder"),
    Row("data", "tokens", [in_params(data={"path": "a\0"})], 2, "data.path = a\\x00: no such file or folder"),
    Row("data", "tokens", ["data.path=" + "a" * 300], 3, f"{'a' * 300}: File name too long"),
    Row("data", "tokens", [in_params(data={"glob": "a\0"})], 2, "data.path = text: no file matches data.glob = a\\x00"),
    Row("data", "tokens", [file("given/.hidden", b"x"), "data.path=given"], 2, "data.path = given: no file matches data.glob = **/*; not read: names that begin with a dot: 1"),
    Row("data", "tokens", ["data.glob=../**/*"], 2, "data.path = text: no file matches data.glob = ../**/*"),
    folder(file(f"given/{'a/' * 30}a.txt", b"text"), f"data.path = given: no file matches data.glob = {'**/' * 12}b", f"data.glob='{'**/' * 12}b'"),
    Row("data", "tokens", ["data.glob=/etc/*"], 2, "data.glob = /etc/*: expected a pattern of paths in the folder, as **/*.txt"),
    Row("data", "tokens", ["data.glob='**.txt'"], 2, "data.glob = **.txt: expected a pattern of paths in the folder, as **/*.txt"),
    Row("data", "tokens", ["data.glob='*.{txt,md}'"], 2, "data.path = text: no file matches data.glob = *.{txt,md}; braces are not supported, use data.sources"),
    Row("data", "tokens", ["data.path=~/text"], 2, "data.path = ~/text: no such file or folder; only a shell expands ~, write the full path"),
    Row("data", "tokens", ["data.path=owner/some-text"], 2,
        "data.path = owner/some-text: no such file or folder; a data set of Hugging Face must be downloaded first: hf download owner/some-text --repo-type dataset --local-dir FOLDER"),
    *(Row("data", stage, [f"data.path={name}"], 2, f"data.path = {name}: the stages write …; put your text into a folder of its own and name that")
      for stage in ("tokenizer", "tokens") for name in ("data", ".", "data/tokenizer", "metrics", "models", "text/..")),
    Row("data", "tokens", [file("given/a.txt.dvc", b"outs: []"), "data.path=given"], 2, "data.path = given: no file matches data.glob = **/*; not read: files of DVC's own: 1"),
    Row("data", "tokens", [file("given.dvc", b"outs: []"), "data.path=given.dvc"], 2, "data.path = given.dvc: a file of DVC's own; name the text itself"),
    Row("data", "tokens", [file("given/.dvcignore", b"*.md"), "data.path=given"], 2,
        "given/.dvcignore: DVC allows none in a folder that it hashes; move its lines to .dvcignore in the project's root folder"),
    Row("data", "tokenizer", [file(b"given/caf\xe9.txt", b"text"), "data.path=given"], 2, "given/caf\\xe9.txt: a name that is not UTF-8, which DVC cannot record; rename it, or …"),
    from_sources(source("a.txt"), "given/b/\\xe9: a name that is not UTF-8, which DVC cannot record; …", file("given/a.txt", b"text"), file(b"given/b/\xe9", b"text"), "data.path=given"),
    Row("data", "tokens", ["data.valid_fraction=0.0001"], 2, "the valid split has no documents; change data.valid_fraction, …"),
    Row("data", "tokenizer", ["data.valid_fraction=0.9999"], 2, "the train split has no documents; change data.valid_fraction, …"),
    Row("data", "corpus", [file("data/raw/mine.txt", b"text")], 2,
        "data/raw/mine.txt: not written by this stage, which owns data/raw; move your text to another folder and name that in data.path"),
    *(Row("data", "corpus", [file("data/corpus.json", content)], 2,
          "data/corpus.json: not a list of packages; delete it and data/raw, and run again")
      for content in (b'["a"]', b"{}", b'[{"web": "a"}]')),
    Row("data", "corpus", ["corpus.packages=[networkx]"], 2, "corpus.packages: networkx pins no version; write name==version"),
    Row("data", "corpus", ["corpus.packages=[no-such==1]"], 3, "corpus.packages: no-such is not installed; run …"),
    Row("data", "tokens", ["data.glob=''"], 2, "data.glob = : expected a pattern of paths in the folder, as **/*.txt"),
    data("a.txt", b"", f"data.path = given: {NO_TEXT}"),
    data("a.txt", b" \n\n ", f"data.path = given: {NO_TEXT}"),
    data("a.txt", "café".encode("latin-1"), f"given/a.txt: byte 0xe9 at offset 3 is not UTF-8; {CONVERT}"),
    data("a.txt", "text".encode("utf-16"), f"given/a.txt: byte 0xff at offset 0 is not UTF-8 (is the file UTF-16?); {CONVERT}"),
    data("a.txt", "text".encode("utf-16-le"), f"given/a.txt: byte 0x00 at offset 1 is NUL, not text; {CONVERT}"),
    data("a.txt", b"\x7fELF\x02\x01\x01\x00\xc8", f"given/a.txt: byte 0xc8 at offset 8 is not UTF-8; {CONVERT}"),
    data("a.txt", b"\x89PNG\r\n\x1a\n", f"given/a.txt: an image, not text; remove it {LEAVE_OUT}", "data.encoding_errors=replace"),
    data("a.txt", b"%PDF-1.7\n", f"given/a.txt: a PDF, not text; convert it {LEAVE_OUT}"),
    data("a.txt", b"SQLite format 3\0", f"given/a.txt: an SQLite database, not text; export its text {LEAVE_OUT}"),
    data("a.arrow", b"ARROW1\0\0", f"given/a.arrow: an Arrow table, not text; save it as .parquet {LEAVE_OUT}"),
    data("a.txt", LFS, f"given/a.txt: {POINTER}"),
    data("a.txt", LFS, f"given/a.txt: {POINTER}", "data.on_bad_document=skip"),
    data("a.json", LFS, f"given/a.json: {POINTER}"),
    data("a.csv", LFS, f"given/a.csv: {POINTER}"),
    data("a.jsonl.gz", LFS, f"given/a.jsonl.gz: {POINTER}"),
    data("a.txt.zst", LFS, f"given/a.txt.zst: {POINTER}"),
    data("a.parquet", LFS, f"given/a.parquet: {POINTER}"),
    data("a.PARQUET.GZ", LFS, f"given/a.PARQUET.GZ: {POINTER}"),
    data("a.txt", b"/annex/objects/SHA256E-s1--0", "given/a.txt: a pointer of git-annex, not the file itself; run `git annex get`"),
    data("a.txt", b'{"text": "a"}\n{"text": "b"}\n', f"given/a.txt: {LINES}"),
    data("a.txt", b'{"text": "a"}\n{"text": "b"}\n', f"given/a.txt: {LINES}", "data.separator=b"),
    data("a.data.gz", gzip.compress(b'{"text": "' + b"a" * 10_000 + b'"}\n'), f"given/a.data.gz: {LINES}"),
    data("a.txt", b'\xef\xbb\xbf [\n  {"text": "a"}]', f"given/a.txt: {ARRAY}"),
    data("a.json", b'[{"text": "a"}, {"text": "b"}]', f"given/a.json: {ARRAY}"),
    data("a.json.gz", gzip.compress(b'[\n{"text": "a"},\n{"text": "b"}\n]'), f"given/a.json.gz: {ARRAY}"),
    data("package.json", b'{\n  "name": "a"\n}\n', f"given/package.json: {VALUE}"),
    data("a.json", b'{"name": "a"}', f"given/a.json:1: no field 'text' (has: name); {NAME_ANOTHER} {SKIP}"),
    data("a.json", b'"text"\n', f"given/a.json:1: not an object with field 'text'; correct it {SKIP}"),
    data("a.NDJSON", b'{"text": "a"}\n{"id": 2}\n', f"given/a.NDJSON:2: no field 'text' (has: id); {NAME_ANOTHER} {SKIP}"),
    data("a.JSONL.GZ", gzip.compress(b'{"id": 2}\n'), f"given/a.JSONL.GZ:1: no field 'text' (has: id); {NAME_ANOTHER} {SKIP}"),
    data("a.ipynb", b'{"cells": []}', f"given/a.ipynb: a notebook; convert it (jupyter nbconvert --to script) {LEAVE_OUT}"),
    data("a.csv", b"id,body\n1,a\n", f"given/a.csv: no column 'text' (has: id, body); {NAME_ANOTHER}"),
    data("a.csv", b"text,text\n1,a\n", f"given/a.csv: 2 columns 'text'; {NAME_ANOTHER}"),
    data("a.csv", b'id,text\n1,"a\nb"\n2,a,b\n', f"given/a.csv:4: expected 2 fields as in the header, found 3; quote fields that hold ',' {SKIP}"),
    data("a.csv", b'id,text\n1,"a"b\n', "given/a.csv:2: not a row of a table (…); check its quotes"),
    data("a.csv", b'id,text\n1,"a\n', "given/a.csv:2: not a row of a table (…); check its quotes"),
    data("a.csv", b"id,text\n1,a\xff\n", f"given/a.csv:2: byte 0xff at offset 1 of the text is not UTF-8; {CONVERT}"),
    folder(special("given/a.csv", lambda path: path.write_bytes(b"text\n" + b'"\n",' * 25_000_000)), "given/a.csv:2: not a row of a table (a row longer than 64 MiB); check its quotes"),
    data("a.tsv.gz", gzip.compress(b"id\ttext\n1\n"), f"given/a.tsv.gz:2: expected 2 fields as in the header, found 1; quote fields that hold '\\t' {SKIP}"),
    data("a.txt", b"a\n\nb", r'data.separator = "\\n\\n": does not occur in any text file; it is a backslash and an n, but the text has line breaks: write "\n\n" in params.yaml', r"data.separator=\n\n"),
    data("a.txt", b"a\r\n\r\nb", r'data.separator = "\n\n": does not occur in any text file; the text has Windows line ends: write "\r\n\r\n" in params.yaml', in_params(data={"separator": "\n\n"})),
    data("a.txt", b"a\r\n\r\nb", r'data.separator = "\\n\\n": does not occur in any text file; the text has Windows line ends: write "\r\n\r\n" in params.yaml', r"data.separator=\n\n"),
    Row("data", "tokenizer", [file("given/a.txt", b"a\n\nb"), "data.path=given", "data.separator=--"], 2,
        'data.separator = "--": does not occur in any text file; set it to what stands between two documents, or to null'),
    data("a.gz", lambda: gzip.compress(bytes(100 << 20)), f"given/a.gz: …{EXPANDS}"),
    data("a.jsonl.zst", lambda: zstandard.compress(b" " * (100 << 20)), f"given/a.jsonl.zst: …{EXPANDS}"),
    data("a.parquet.gz", lambda: gzip.compress(bytes(100 << 20)), f"given/a.parquet.gz: …{EXPANDS}"),
    data("a.txt.gz.gz", gzip.compress(gzip.compress(b"text")), f"given/a.txt.gz.gz: compressed twice, not text; decompress it once {LEAVE_OUT}"),
    data("a.txt.zst", long_window(b"text"), "given/a.txt.zst: compressed with a window above 128 MiB; unpack it (zstd -d --long=31)"),
    data("a\nb\x1b[31m.txt", b"\xff", f"given/a\\nb\\x1b[31m.txt: byte 0xff at offset 0 is not UTF-8; {CONVERT}"),
    data("a.txt", b"one<|end|>two\xff", f"given/a.txt#2: byte 0xff at offset 13 is not UTF-8; {CONVERT}", "data.separator=<|end|>"),
    data("a.zip", archive("zip"), f"given/a.zip: a zip archive, {UNPACK}"),
    data("a.zip", archive("zip", "../a"), f"given/a.zip: a zip archive, {UNPACK}"),
    data("a.zip", archive("zip"), f"given/a.zip: a zip archive, {UNPACK}", "data.encoding_errors=replace"),
    data("a.txt", archive("tar"), f"given/a.txt: a tar archive, {UNPACK}"),
    data("a.tar", archive("tar", "../a"), f"given/a.tar: a tar archive, {UNPACK}"),
    data("a.tar", archive("tar", "/tmp/a"), f"given/a.tar: a tar archive, {UNPACK}"),
    data("a.tar", archive("tar", type=tarfile.SYMTYPE, linkname="/etc/passwd"), f"given/a.tar: a tar archive, {UNPACK}"),
    data("a.tar", archive("tar", type=tarfile.CHRTYPE), f"given/a.tar: a tar archive, {UNPACK}"),
    data("a.jsonl", gzip.compress(b"{}"), f"given/a.jsonl: compressed by gzip, not text; give it the suffix .gz {LEAVE_OUT}"),
    data("a.txt", b"\x28\xb5\x2f\xfd\x04\x00", f"given/a.txt: compressed by zstd, not text; give it the suffix .zst {LEAVE_OUT}"),
    data("a.txt", b"PAR1\x15\x04PAR1", f"given/a.txt: a parquet table, not text; give it the suffix .parquet {LEAVE_OUT}"),
    data("a.tar.gz", gzip.compress(archive("tar", "../a")), f"given/a.tar.gz: a tar archive, {UNPACK}"),
    data("a.zip.gz", gzip.compress(archive("zip")), f"given/a.zip.gz: a zip archive, {UNPACK}"),
    data("a.txt.gz", b"text", "given/a.txt.gz: damaged or cut off (…); fetch or compress it again"),
    data("a.jsonl.gz", gzip.compress(TOKENIZER.encode())[:500], "given/a.jsonl.gz: damaged or cut off (…); fetch or compress it again"),
    data("a.jsonl.gz", gzip.compress(b"{}")[:-6] + b"......", "given/a.jsonl.gz: damaged or cut off (…); fetch or compress it again"),
    data("a.txt.gz", gzip.compress(b"caf\xe9"), f"given/a.txt.gz: byte 0xe9 at offset 3 is not UTF-8; {CONVERT}"),
    data("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"id": 2}\n'), f"given/a.jsonl.gz:2: no field 'text' (has: id); {NAME_ANOTHER} {SKIP}"),
    data("a.zst", b"\x28\xb5\x2f\xfd\x04\x00", "given/a.zst: damaged or cut off (…); fetch or compress it again"),
    data("a.txt.zst", b"text", "given/a.txt.zst: damaged or cut off (…); fetch or compress it again"),
    data("a.txt.zst", zstandard.compress(TOKENIZER.encode())[:-9], "given/a.txt.zst: damaged or cut off (…); fetch or compress it again"),
    data("a.xz", lzma.compress(b"text"), f"given/a.xz: compressed by xz, {DECOMPRESS}"),
    data("a.bz2", bz2.compress(b"text"), f"given/a.bz2: compressed by bzip2, {DECOMPRESS}"),
    data("a.parquet", b"PAR1\x15\x04PAR1", "given/a.parquet: damaged or not a parquet table (…); fetch it again"),
    data("a.parquet", b"", "given/a.parquet: damaged or not a parquet table (…); fetch it again"),
    data("a.parquet", table(text=["a"])[:-20], "given/a.parquet: damaged or not a parquet table (…); fetch it again"),
    data("a.parquet", table(text=["a" * 5000])[200:], "given/a.parquet: damaged or not a parquet table (…); fetch it again"),
    data("a.parquet", two_columns("text"), f"given/a.parquet: 2 columns 'text'; {NAME_ANOTHER}"),
    data("a.parquet", table(**{"a": [{"text": 1}], "a.text": ["a"]}), f"given/a.parquet: 2 columns 'a.text'; {NAME_ANOTHER}", "data.text_field=a.text"),
    data("a.parquet", repeated("word " * 2_000_000, 1000), f"given/a.parquet: …{EXPANDS}"),
    data("a.parquet.gz", lambda: gzip.compress(repeated("word " * 2_000_000, 1000)), f"given/a.parquet.gz: …{EXPANDS}"),
    data("a.parquet", altered(table(text=["a" * 5000]), 2500), "given/a.parquet: damaged or not a parquet table (could not verify page integrity, CRC checksum verification failed…); fetch it again"),
    data("a.parquet", table(id=[1], body=["a"]), f"given/a.parquet: no column 'text' (has: id, body); {NAME_ANOTHER}"),
    data("a.parquet", table(text=[1]), f"given/a.parquet: column 'text' is int64, not text; {NAME_ANOTHER}"),
    data("a.parquet", table(text=[["a"]]), f"given/a.parquet: column 'text' is list<element: string>, not text; {NAME_ANOTHER}"),
    data("a.parquet", table(text=["a", None]), f"given/a.parquet: row 1: column 'text' is null; remove the row {SKIP}"),
    data("a.parquet", table(text=[b"a\xff"]), f"given/a.parquet: row 0: byte 0xff at offset 1 of the text is not UTF-8; {CONVERT}"),
    data("a.parquet.gz", gzip.compress(b"text"), "given/a.parquet.gz: damaged or not a parquet table (…); fetch it again"),
    data("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 2}\n', f"given/a.jsonl:2: no field 'text' (has: body, id); {NAME_ANOTHER} {SKIP}"),
    data("a.jsonl", b'{"text": "a"}\n{"text": \n', f"given/a.jsonl:2: not valid JSON (…); correct the line {SKIP}"),
    data("a.jsonl", b'["text"]\n', f"given/a.jsonl:1: not an object with field 'text'; correct it {SKIP}"),
    data("a.jsonl", b'{"text": null}\n', f"given/a.jsonl:1: field 'text' is null, not text; {NAME_ANOTHER} {SKIP}"),
    data("a.jsonl", b'{"text": "a\\ud800b"}\n', f"given/a.jsonl:1: byte 0xed at offset 1 of the text is not UTF-8; {CONVERT}"),
    data("a.jsonl", b'{"text": "a\\u0000b"}\n', f"given/a.jsonl:1: byte 0x00 at offset 1 of the text is NUL, not text; {CONVERT}"),
    data("a.jsonl", b'{"text": "\xff"}\n', f"given/a.jsonl:1: byte 0xff at offset 10 is not UTF-8; {CONVERT}"),
    data("a.jsonl", b'{"id": ' + b"9" * 5000 + b"}", f"given/a.jsonl:1: not valid JSON (…); correct the line {SKIP}"),
    data("a.jsonl", b"[" * 100_000 + b"\n", f"given/a.jsonl:1: not valid JSON (…); correct the line {SKIP}"),
    folder(long_file("given/a.txt", 2 << 30), f"given/a.txt: {LONG}"),
    soak(folder(long_file("given/a.txt", 2 << 30, b"a<|end|>"), f"given/a.txt#2: {LONG}", "data.separator=<|end|>")),
    folder(long_file("given/a.jsonl", 5 << 28), f"given/a.jsonl:1: {LONG}"),
    soak(folder(long_file("given/a.JSON", 2 << 30), f"given/a.JSON:1: {LONG}")),
    soak(folder(long_file("given/a.csv", 2 << 30), "given/a.csv:1: not a row of a table (a row longer than 64 MiB); check its quotes")),
    folder(long_file("given/a.csv", 5 << 28, b'text\n"a\n'), "given/a.csv:2: not a row of a table (…); check its quotes"),
    folder(long_file("given/a.jsonl", 5 << 28), f"data.path = given: {NO_TEXT}", "data.on_bad_document=skip"),
    folder(long_file("given/a.parquet", 2 << 30), "given/a.parquet: damaged or not a parquet table (…); fetch it again"),
    folder(special("given/pipe", os.mkfifo), "given/pipe: a pipe, a device, a broken link or a link to a folder; remove it or leave it out by data.glob"),
    folder(special("given/zero", lambda path: path.symlink_to("/dev/zero")), "given/zero: a pipe, a device, …"),
    folder(special("given/link", lambda path: path.symlink_to("nowhere")), "given/link: a pipe, a device, …"),
    folder(special("given/link", lambda path: path.symlink_to("link")), "given/link: a pipe, a device, …"),
    folder(special("given/link", lambda path: path.symlink_to("../text")), "given/link: a pipe, a device, …"),
    from_sources("{}", "params.yaml: data.sources = {}: name a source, or set null to make all text one"),
    from_sources("text", "params.yaml: data.sources = 'text' is text, wanted keys and values"),
    from_sources("{web: text}", "params.yaml: data.sources.web = 'text' is text, wanted keys and values"),
    from_sources("{web: {path: .}}", "params.yaml: missing key data.sources.web.text_field"),
    from_sources("{web: {path: ., text_field: text, weight: 1, wieght: 2}}",
                 "params.yaml: unknown key data.sources.web.wieght (did you mean data.sources.web.weight?)"),
    from_sources(source(weight=0), "params.yaml: data.sources.web.weight = 0.0: must be > 0"),
    from_sources(source(weight=".inf"), "params.yaml: data.sources.web.weight = inf: must be finite"),
    from_sources("{a: " + source(weight=1)[6:-1] + ", b: " + source()[6:], "params.yaml: data.sources.b.weight = null: give every source a weight, or none"),
    from_sources("{../b: " + source()[6:], "params.yaml: data.sources.../b: a source's name is part of file names: a-z, 0-9, - and _"),
    from_sources("{Web: " + source()[6:], "params.yaml: data.sources.Web: a source's name is part of file names: a-z, 0-9, - and _"),
    from_sources(source("''"), "params.yaml: data.sources.web.path = : must not be empty"),
    from_sources(source("/etc"), "data.sources.web.path = /etc: must lie in data.path = text, which DVC watches"),
    from_sources(source("../data"), "data.sources.web.path = ../data: must lie in data.path = text, which DVC watches"),
    from_sources(source("missing"), "data.sources.web.path = missing: no such file or folder"),
    from_sources(source("'*.md'"), "data.sources.web.path = *.md: no file matches data.sources.web.path = *.md"),
    from_sources(source("."), "data.path = text/00.txt: a file; with data.sources, name the folder that holds them", "data.path=text/00.txt"),
    from_sources(source("."), "data.path = missing: no such folder", "data.path=missing"),
    folder(link_to_folder, "data.sources.web.path = link: a link to a folder, which DVC does not watch; name the folder itself", f"data.sources={source('link')}"),

    Row("tokenizer", "tokenizer", ["tokenizer.kind=file", "tokenizer.source=missing.json"], 2, "data/tokenizers/missing.json: no such file"),
    Row("tokenizer", "tokenizer", [special(GIVEN, os.mkfifo), "tokenizer.kind=file", "tokenizer.source=given.json"], 2, f"{GIVEN}: not a file"),
    Row("tokenizer", "tokenizer", [long_file(GIVEN, 1 << 30), "tokenizer.kind=file", "tokenizer.source=given.json"], 2,
        f"{GIVEN}: longer than 64 MiB; no tokenizer needs that"),
    Row("tokenizer", "tokenizer", ["tokenizer.kind=tiktoken", "tokenizer.source=gpt9"], 2, "tokenizer.source = gpt9: tiktoken has only …"),
    tokenizer(b"", f"{GIVEN}: not a tokenizer.json (…)"),
    tokenizer(b"[1, 2]", f"{GIVEN}: not a tokenizer.json (…)"),
    tokenizer(b"\xff\xfe", f"{GIVEN}: not a tokenizer.json (…)"),
    tokenizer(b'{"model":' * 100_000, f"{GIVEN}: not a tokenizer.json (…)"),
    tokenizer(TOKENIZER[:2000].encode(), f"{GIVEN}: not a tokenizer.json (…)"),
    tokenizer(model(vocab=[1]), f"{GIVEN}: not a tokenizer.json (…)"),
    tokenizer(model(merges=[["l", "nothing"]]), f"{GIVEN}: not a tokenizer.json (…)"),
    tokenizer(splitting("(a"), f"{GIVEN}: not a tokenizer.json (…)"),
    tokenizer(vocabulary(x=5 * 10**9), f"{GIVEN}: not a tokenizer.json (…)"),
    tokenizer(vocabulary(x=4 * 10**9), f"{GIVEN}: id 4000000000 is too large for 269 tokens; number them from 0"),
    tokenizer(vocabulary(x=3), f"{GIVEN}: id 3 stands for several tokens; give each an id of its own"),
    tokenizer(without_x, f"{GIVEN}: alters text: b'stuvwxyz{{|}}~… came back as b'stuvwyz{{|}}~…"),
    tokenizer(lambda json: (without_x(json), model(unk_token="!")(json)), f"{GIVEN}: alters text: b'stuvwxyz… came back as b'stuvw!yz…"),
    tokenizer(model(dropout=0.5), f"{GIVEN}: drops merges at random (dropout 0.5); set dropout to null"),
    tokenizer(model(end_of_word_suffix="</w>"), f"{GIVEN}: alters text: …"),
    tokenizer(model(continuing_subword_prefix="##"), f"{GIVEN}: not a tokenizer.json (slice index starts at 1 but ends at 0)"),
    tokenizer(model(type="WordLevel", unk_token="nothing"), f"{GIVEN}: the tokenizer cannot encode a text: WordLevel error: Missing [UNK] token from the vocabulary"),
    tokenizer(splitting(r"(a+)+$"), f"{GIVEN}: the tokenizer cannot encode a text: Onig: Regex search error: retry-limit-in-match over"),
    tokenizer(lambda json: json.update(pre_tokenizer=None), f"{GIVEN}: alters text: …"),
    tokenizer(lambda json: json["pre_tokenizer"].update(add_prefix_space=True), f"{GIVEN}: alters text: b'\\x00\\x01… came back as b' \\x00\\x01…"),
    *(tokenizer(lambda json, kind=kind: json.update(decoder=kind), f"{GIVEN}: its decoder alters text; set decoder to type ByteLevel") for kind in (
        {"type": "Replace", "pattern": {"String": "ByteLevel"}, "content": ""},
        {"type": "Sequence", "decoders": [json.loads(TOKENIZER)["decoder"], {"type": "Strip", "content": "a", "start": 1, "stop": 0}]},
    )),
    tokenizer(lambda json: json.update(decoder=None), f"{GIVEN}: not byte-level (its decoder is not ByteLevel); choose one that is"),
    tokenizer(lambda json: json.update(normalizer={"type": "NFKC"}), f"{GIVEN}: its normalizer NFKC alters text; choose a tokenizer without it"),
    tokenizer(added_token("low", lstrip=True), f"{GIVEN}: alters text: b'a  low  b…' came back as b'alow…"),
    tokenizer(added_token("low", rstrip=True), f"{GIVEN}: alters text: b'  low  blow… came back as b'  lowblow…"),
    tokenizer(added_token("Ġ"), f"{GIVEN}: alters text: …\\x1e\\x1f !… came back as …\\x1f\\xc4\\xa0!…"),
    tokenizer(TOKENIZER.encode(), f"{GIVEN}: no special token '</s>'; set tokenizer.end_token to one of these: <|endoftext|>", "</s>"),
    tokenizer(added_token("low"), f"{GIVEN}: no special token 'low'; set …", "low"),
    tokenizer(lambda json: json["added_tokens"][0].update(content="e" * 5000), f"{GIVEN}: no special token '<|endoftext|>'; set tokenizer.end_token to one of these: {'e' * 400}"),
    Row("tokenizer", "tokens", [file("data/tokenizer/tokenizer_config.json", b'{"eos_token": 3}')], 2,
        "data/tokenizer/tokenizer_config.json: eos_token is missing or not text"),
    Row("tokenizer", "tokens", [file("data/tokenizer/tokenizer_config.json", b"[]")], 2,
        "data/tokenizer/tokenizer_config.json: eos_token is missing or not text"),
    Row("tokenizer", "tokens", [file("data/tokenizer/tokenizer_config.json", b"{")], 2,
        "data/tokenizer/tokenizer_config.json: not valid JSON (…); run `dvc repro` again"),
    Row("tokenizer", "tokens", [file("data/tokenizer/tokenizer.json", b"{")], 2, "data/tokenizer/tokenizer.json: not a tokenizer.json (…)"),

    Row("tokenizer", "tokens", [lambda folder: shutil.rmtree(folder / "data/tokenizer")], 2,
        "data/tokenizer/tokenizer_config.json: no such file; run `dvc repro tokenizer`"),
    Row("tokenizer", "tokens", [special("data/tokenizer/tokenizer.json", lambda path: None)], 2, "data/tokenizer/tokenizer.json: no such file; run `dvc repro tokenizer`"),
    Row("tokens", "train", [file("data/tokens/tokens.json", b"[" * 100_000)], 2,
        "data/tokens/tokens.json: not valid JSON (…); run `dvc repro` again"),
    Row("tokens", "train", [long_file("data/tokens/tokens.json", 1 << 29, b"{}")], 2, "data/tokens/tokens.json: longer than 256 MiB; run `dvc repro` again"),
    Row("tokens", "train", [file("data/tokens/tokens.json", b"[]")], 2, "data/tokens/tokens.json: not a token manifest; run `dvc repro tokens`"),
    Row("tokens", "train", [special("data/tokens/tokens.json", lambda path: None)], 2, "data/tokens/tokens.json: no such file; run `dvc repro` to make it"),
    Row("tokens", "train", [special("data/tokens/valid/text-00000.bin", lambda path: None)], 2, f"data/tokens/valid/text-00000.bin: no such file; {AGAIN}"),
    Row("tokens", "train", [file("data/tokens/valid/text-00000.bin", b"\0\0\0")], 2, f"data/tokens/valid/text-00000.bin: 3 bytes, but tokens.json says …; {AGAIN}"),
    Row("tokens", "train", [file("data/tokenizer/tokenizer.json", TOKENIZER.encode())], 2, f"data/tokens: made with another tokenizer; {AGAIN}"),
    *(
        Row("tokens", stage, [saved(rewritten(side, 7, 300))], 2, f"{TOKENS}/{side}/text-00000.bin: token 7 has id 300, but the vocabulary has 300 ids; {AGAIN}")
        for stage in ("train", "evaluate")
        for side in ("train", "valid")
    ),
    *(
        Row("tokens", stage, [saved(edited(f"{TOKENS}/tokens.json", vocab_size=301))], 2, f"{TOKENS}/tokens.json: vocab_size = 301, but the tokenizer's is 300; {AGAIN}")
        for stage in ("train", "evaluate")
    ),
    Row("tokens", "train", [edited(f"{TOKENS}/tokens.json", end_id=3)], 2, f"{TOKENS}/tokens.json: end_id = 3, but the tokenizer's is 299; {AGAIN}"),
    Row("tokens", "train", [edited(f"{TOKENS}/tokens.json", end_id=300)], 2, f"{TOKENS}/tokens.json: not a token manifest; {AGAIN}"),
    Row("tokens", "train", [edited(f"{TOKENS}/tokens.json", train={"tokens": 10**30, "bytes": 1, "documents": 1})], 2, f"{TOKENS}/tokens.json: not a token manifest; {AGAIN}"),
    Row("tokens", "train", [special("data/tokens/tokens.json", os.mkfifo)], 2, "data/tokens/tokens.json: not a file"),
    Row("model", "evaluate", [long_file("models/model/config.json", 1 << 29)], 2, "models/model/config.json: longer than 256 MiB; run `dvc repro` again"),
    Row("model", "evaluate", [file("models/model/config.json", b"[]")], 2, "models/model/config.json: section model holds no keys"),
    Row("model", "evaluate", [file("models/model/config.json", b"{}")], 2, "models/model/config.json: missing key model.vocab_size"),
    Row("model", "evaluate", [file("models/model/config.json", b"{")], 2, "models/model/config.json: not valid JSON (…); run `dvc repro` again"),
    Row("model", "evaluate", [], 2, "models/model/config.json: no such file; run `dvc repro` to make it"),
    Row("model", "evaluate", [special("models/model/config.json", os.mkfifo)], 2, "models/model/config.json: not a file"),
    *(
        Row("model", stage, [saved(change)], 2, f"{WEIGHTS}: {line}")
        for change, line in (
            (weights(lambda t: t.long()), "lm_head.weight is int64, expected float32 or bfloat16 or float16"),
            (poked(float("nan")), "lm_head.weight: 1 of … values are not finite"),
            (poked(float("-inf")), "lm_head.weight: 1 of … values are not finite"),
            (weights(lambda t: t * 3e38), "weights too large: logits are not finite; lower train.lr"),
        )
        for stage in ("evaluate", "lm.export.gguf")
    ),
    *(
        Row("model", "evaluate", [saved(change)], 2, f"{WEIGHTS}: {line}")
        for change, line in (
            (weights(lambda t: t > 0), "lm_head.weight is bool, expected float32 or bfloat16 or float16"),
            (weights(lambda t: t.double()), "lm_head.weight is float64, expected float32 or bfloat16 or float16"),
            (weights(lambda t: t.cfloat()), "lm_head.weight is complex64, expected float32 or bfloat16 or float16"),
            (weights(lambda t: t[:-1].clone()), "another model: lm_head.weight is …, expected …"),
            (weights(lambda t: t[0], "token_embeddings.weight"), "another model: vocab_size = … in its settings, none in its weights, d_model = … in its settings, none in its weights"),
            (file(WEIGHTS, b"\xff" * 8 + b"{}"), "not a safetensors file (…)"),
            (file(WEIGHTS, (100).to_bytes(8, "little") + b"{}"), "not a safetensors file (…)"),
            (file(WEIGHTS, (10**8 + 1).to_bytes(8, "little") + b" " * 10**8), "not a safetensors file (…)"),
            (lambda folder: file(WEIGHTS, many_tensors(300_000))(folder), "not a safetensors file (a header of … bytes; no model needs more than 16,777,216)"),
            (file(WEIGHTS, b"\2" + bytes(7) + b"[]"), "not a safetensors file (…)"),
            (file(WEIGHTS, b"\2" + bytes(7) + b"{}"), "another model: …"),
            (special(WEIGHTS, os.mkfifo), "not a file"),
            (special(WEIGHTS, os.mkdir), "not a file"),
        )
    ),
    Row("model", "evaluate", [settings_of(num_layers=2_000_000)], 2, f"{WEIGHTS}: another model: num_layers = 2000000 in its settings, 2 in its weights"),
    Row("model", "lm.export.gguf", [settings_of(num_layers=2_000_000)], 2, f"{WEIGHTS}: another model: num_layers = 2000000 in its settings, 2 in its weights"),
    Row("model", "evaluate", [settings_of(d_model=10**9)], 2, f"{WEIGHTS}: another model: d_model = 1000000000 in its settings, … in its weights"),
    Row("model", "evaluate", [settings_of(d_ff=10**9)], 2, f"{WEIGHTS}: another model: d_ff = 1000000000 in its settings, … in its weights"),
    Row("model", "evaluate", [settings_of(vocab_size=10**9)], 2, f"{WEIGHTS}: another model: vocab_size = 1000000000 in its settings, 300 in its weights"),
    Row("model", "evaluate", [settings_of(num_heads=10**9)], 2, f"{MODEL}/config.json: model.d_model = … is not divisible by model.num_heads = 1000000000; use …"),
    Row("model", "evaluate", [settings_of(num_layers=10**30)], 2, f"{MODEL}/config.json: model.num_layers = 1000000000000000000000000000000: must be < 2**31"),
    Row("model", "evaluate", [settings_of(context_length=2 * 10**9)], 2, f"{MODEL}/config.json: context_length = 2000000000 takes … GB for rotary positions, … GB are free"),
    Row("model", "evaluate", [settings_of(rope_theta=10**400)], 2, f"{MODEL}/config.json: model.rope_theta = inf: must be finite"),
    Row("model", "evaluate", [settings_of(rope_theta=float("nan"))], 2, f"{MODEL}/config.json: model.rope_theta = nan: must be …"),
    Row("model", "evaluate", [saved(edited(f"{MODEL}/provenance.json"))], 2, f"{MODEL}/provenance.json: not a record of stage train; run it again"),
    *(Row("model", "evaluate", [saved(edited(f"{MODEL}/provenance.json", train={"num_threads": value}))], 2, f"{MODEL}/provenance.json: not a record of stage train; run it again")
      for value in ("two", [1], 1.5, -1, 10**9)),
    *(Row("model", "evaluate", [saved(file("metrics/train.json", json.dumps(content).encode()))], 2, f"metrics/train.json{line}; run `dvc repro`") for content, line in (
        ([], " = [], expected keys and values"),
        (dict.fromkeys(("step", "tokens", "parameters", "best_step"), 1) | dict.fromkeys(("train_loss", "valid_loss"), 1.0), ": no best_valid_loss in it"),
        ({"step": {}}, ": step = {}, expected a count of 1 or more"),
    )),
    Row("model", "evaluate", [saved(edited(f"{MODEL}/provenance.json", train=[]))], 2, f"{MODEL}/provenance.json: not a record of stage train; run it again"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.area}: {row.line[:60]}")
def test_bad_input_is_one_line_an_exit_code_and_no_loss(stages, row):
    result, changed = stages.try_out(row)
    expected = ".*".join(map(re.escape, f"error: {row.line}".split("…")))
    assert re.fullmatch(expected, result["err"].removesuffix("\n")), result["err"]
    assert result["status"] == row.code
    assert result["peak_bytes"] < 1 << 30
    assert not changed
