"""Write a folder that Hugging Face opens:  python -m lm.export [--model FOLDER] [--out FOLDER]

    config.json  model.safetensors  generation_config.json      a stock Llama or Qwen3, float32
    tokenizer.json  tokenizer_config.json                       ids as in training
    README.md  loss.svg  provenance.json  TEXT_LICENSES.txt     the model card

Before anything is written, the logits are compared with those of `transformers`, if installed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.base.console import say
from lm.base.errors import InputError, one_line_errors
from lm.base.files import atomic_write, require_file, sha256_file, to_json
from lm.base.params import add_overrides, load_params
from lm.base.paths import CORPUS, HUGGINGFACE, LICENSES, METRICS, MODEL, PARAMS, RAW
from lm.base.result_files import SHAPES, read_result, require_shape
from lm.base.sections import read_section
from lm.data.tokenizer import Tokenizer
from lm.export.agreement import compared
from lm.export.card import MARK, TEXT_LICENSES, ExportConfig, Results, card
from lm.export.curve import loss_curve
from lm.generate.decoder import require_same_logits
from lm.model.huggingface import not_stock, stock_config, stock_weights
from lm.model.model_folder import load_model, read_provenance
from lm.model.safetensors_file import write_safetensors

NAMES = ("data.json", "train.json", "eval.json", "samples.md", "curves.csv")
MEASURED = [METRICS / name for name in NAMES]
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "config.json", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json", "loss.svg", TEXT_LICENSES)  # fmt: skip


def read_results(data_path: str) -> Results:
    """Return the measurements of models/model. Raises InputError for a missing file."""
    for file in MEASURED:
        require_file(file, "; run `dvc repro` to make it")
    data, train, evaluation = map(read_result, MEASURED[:3])
    try:
        samples, curves = (file.read_text(encoding="utf-8") for file in MEASURED[3:])
    except UnicodeDecodeError as error:
        raise InputError(f"{MEASURED[3]} or {MEASURED[4]}: {error}; run `dvc repro`") from None
    if data_path != str(RAW):
        return Results(data, train, evaluation, samples, curves, None, "")
    corpus = read_result(CORPUS)
    require_file(LICENSES, "; run `dvc repro` to make it")
    licenses = LICENSES.read_text(encoding="utf-8", errors="replace")
    return Results(data, train, evaluation, samples, curves, corpus, licenses)


@dataclass(frozen=True)
class Folder:
    """The files of an export."""

    files: dict[str, bytes]  # the card first
    weights: dict[str, Tensor]
    why_no_weights: str | None  # set if there are no weights


def export(source: Path, config: ExportConfig, results: Results | None) -> Folder:
    """Build the folder of the model in `source`, without weights if no stock model computes it.

    Raises InputError if a file is missing or damaged, or does not fit the others.
    """
    model, tokenizer = load_model(source, torch.device("cpu"))
    provenance = read_provenance(source)
    require_shape(provenance, SHAPES["provenance.json"], str(source / "provenance.json"))
    why_no_weights = not_stock(model.config)
    sha256 = sha256_file(source / WEIGHTS)
    page = card(provenance, sha256, tokenizer.end_token, config.license, why_no_weights, results)
    files = {"README.md": page.encode(), "provenance.json": to_json(provenance)}
    if results is not None:
        files["loss.svg"] = loss_curve(results.curves).encode()
        files |= {TEXT_LICENSES: results.licenses.encode()} if results.licenses else {}
    if why_no_weights:
        return Folder(files, {}, why_no_weights)
    text = tokenizer.encode(page)
    require_same_logits(model, text, tokenizer.end_id)
    settings, weights = stock_config(model.config, tokenizer.end_id), stock_weights(model)
    say(compared(model, settings, weights, text))
    return Folder(files | _settings_files(settings, tokenizer), weights, None)


def write(folder: Folder, out: Path) -> None:
    """Write all files, and delete those of an earlier export that this one lacks.

    Raises InputError if `out` holds files that lm.export did not write.
    """
    require_ours(out)
    for name in FILES:
        if name not in folder.files:
            (out / name).unlink(missing_ok=True)
    for name, content in folder.files.items():
        atomic_write(out / name, content)
    if folder.weights:
        write_safetensors(folder.weights, {"format": "pt"}, out / WEIGHTS)
        say(f"Model in {out}")
    else:
        say(f"Model card in {out}, no weights: {folder.why_no_weights}")


def require_ours(out: Path) -> None:
    """Raise InputError if writing this folder would lose files that lm.export did not write."""
    page = out / "README.md"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: not a folder; name another")
    if not out.exists() or all(file.suffix == ".tmp" for file in out.iterdir()):
        return  # new, or left by a kill before the card was there
    if not (page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")):
        raise InputError(f"{out}: not written by lm.export; name another folder, or move this one")


def _settings_files(settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, bytes]:
    end_id = tokenizer.end_id
    generation = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.end_token,
        "pad_token": tokenizer.end_token,  # masked; on the left, so that a text can be continued
        "padding_side": "left",
        "model_max_length": settings["max_position_embeddings"],
        "split_special_tokens": True,  # the text of a special token is text, as in training
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        "config.json": to_json(settings),
        "generation_config.json": to_json(generation),
        "tokenizer_config.json": to_json(tokenizer_config),
        "tokenizer.json": tokenizer.backend.to_str(pretty=True).encode() + b"\n",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m lm.export", description=__doc__.split("\n")[0])
    add_overrides(parser)
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder")
    parser.add_argument("--out", type=Path, default=HUGGINGFACE, help="folder to write")
    options = parser.parse_args(arguments)
    with one_line_errors():
        params = load_params(PARAMS, options.overrides)
        config = read_section(ExportConfig, params, "export")
        # metrics/ describes the pipeline's model alone
        data_path = str(params.get("data", {}).get("path"))
        results = read_results(data_path) if options.model == MODEL else None
        require_ours(options.out)  # before the long work
        folder = export(options.model, config, results)
        if folder.why_no_weights:
            raise InputError(f"{options.model}: {folder.why_no_weights}")
        write(folder, options.out)
