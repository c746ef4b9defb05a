"""Check every setting, alone and together, before anything runs.

`make repro` begins with it (stages/check.py), so does each stage, and `python -m lm.plan --check`
does nothing else. A stage runs it in a process of its own and does not depend on this code, which
decides no byte of an output. It is quick, since it does not load torch.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.base.errors import InputError
from lm.base.paths import OWN_TOKENIZERS, PRETRAINED, RAW
from lm.base.sections import read_section
from lm.base.settings import (
    CorpusConfig,
    EvaluateConfig,
    ModelConfig,
    RuntimeConfig,
    TrainSection,
    share_of_batch,
)
from lm.data.tokenizer import TokenizerConfig
from lm.export.card import ExportConfig
from lm.prepare.sources import DataConfig, find_sources


def check(params: Mapping[str, Mapping[str, Any]], where: str, stage: str = "") -> None:
    """Raise InputError for a wrong setting, and for a missing file that a setting names.

    A stage looks only for files that later stages read. Their readers check the content.
    """
    corpus = read_section(CorpusConfig, params, "corpus", where)
    data = read_section(DataConfig, params, "data", where)
    tokenizer = read_section(TokenizerConfig, params, "tokenizer", where)
    read_section(ModelConfig, params, "model", where, vocab_size=1)  # any: the tokens decide it
    train = read_section(TrainSection, params, "train", where)
    read_section(EvaluateConfig, params, "evaluate", where)
    read_section(ExportConfig, params, "export", where)
    runtime = read_section(RuntimeConfig, params, "runtime", where)
    # auto means one process per GPU, but counting GPUs would load torch
    share_of_batch(train, 1 if runtime.num_processes == "auto" else runtime.num_processes)
    path = Path(data.path)
    raw = path.is_relative_to(RAW)  # the text of stage corpus
    if corpus.source == "grammar" and not (raw and data.split == "hash"):
        raise InputError(
            f"corpus.source = grammar needs data.path: {RAW} and data.split: hash, found "
            f"{data.path} and {data.split}; to train on your own text set corpus.source: packages"
        )
    if stage in ("", "corpus"):
        if not raw and (path.exists() or not _dvc_makes(path)):
            find_sources(data)
        _require_tokenizer(tokenizer)
    if stage in ("", "corpus", "tokenizer", "tokens"):
        _require_weights(train)


def _dvc_makes(path: Path) -> bool:
    """Return whether DVC can provide a missing path: by a .dvc file, or a stage of dvc.yaml."""
    pipeline = Path("dvc.yaml")
    text = pipeline.read_text(encoding="utf-8") if pipeline.is_file() else ""
    return any(
        Path(f"{part}.dvc").exists()
        or re.search(rf"^ *- ['\"]?{re.escape(str(part))}['\"]?/?:? *$", text, re.MULTILINE)
        for part in (path, *path.parents)
    )


def _require_tokenizer(config: TokenizerConfig) -> None:
    file = OWN_TOKENIZERS / str(config.source)
    if config.kind == "file" and not file.exists():
        raise InputError(f"{file}: no such file; copy it there (tokenizer.source names it)")


def _require_weights(config: TrainSection) -> None:
    folder = PRETRAINED / str(config.init_from)
    if config.init_from is not None and not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; copy the model's there (train.init_from names it)"
        )
