"""A model as a folder that Hugging Face opens:  python -m lm.export [--model FOLDER] [--out FOLDER]

    config.json  model.safetensors  generation_config.json      a stock Llama or Qwen3, float32
    tokenizer.json  tokenizer_config.json                       ids as in training
    README.md  loss.svg  provenance.json                        the model card

Before anything is written, the logits are compared with those of `transformers`, if it is there.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm.base.config import add_overrides, load_params, read_section
from lm.base.console import say
from lm.base.errors import InputError, one_line_errors
from lm.base.files import atomic_write, read_json, sha256_file, to_json
from lm.base.tables import SHAPES, require_shape
from lm.data.tokenizer import Tokenizer
from lm.export.card import MARK, Results, card, loss_curve
from lm.export.card import ExportConfig as ExportConfig
from lm.generate.decoder import require_same_logits
from lm.model.huggingface import not_stock, stock_config, stock_weights
from lm.model.model_folder import load_model, read_provenance, write_checkpoint
from lm.model.transformer import TransformerLM

MODEL, OUT = Path("models/model"), Path("models/huggingface")
METRICS, RAW, CORPUS = Path("metrics"), "data/raw", Path("data/corpus.json")
MEASURED = [METRICS / name for name in ("data.json", "train.json", "eval.json", "samples.md",
                                        "curves.csv")]  # fmt: skip
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "config.json", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json", "loss.svg")  # fmt: skip
TOLERANCE = 1e-4  # of logits


def read_results(data_path: str) -> Results:
    """What the pipeline measured of models/model. Raises InputError for a file that is missing."""
    for file in MEASURED:
        if not file.is_file():
            raise InputError(f"{file}: no such file; run `dvc repro` to make it")
    data, train, evaluation = map(_read_checked, MEASURED[:3])
    try:
        samples, curves = (file.read_text(encoding="utf-8") for file in MEASURED[3:])
    except UnicodeDecodeError as error:
        raise InputError(f"{MEASURED[3]} or {MEASURED[4]}: {error}; run `dvc repro`") from None
    corpus = _read_checked(CORPUS) if data_path == RAW else None
    return Results(data, train, evaluation, samples, curves, corpus)


def _read_checked(file: Path) -> Any:
    content = read_json(file)
    require_shape(content, SHAPES[file.name], str(file))
    return content


@dataclass(frozen=True)
class Folder:
    """What an export consists of."""

    files: dict[str, bytes]  # the card first
    weights: dict[str, Tensor]
    why_not: str | None  # the weights are not among it


def export(source: Path, config: ExportConfig, results: Results | None) -> Folder:
    """The model in `source` as Hugging Face opens it; without weights if no stock model is it.

    Raises InputError if a file is missing, torn or does not fit the others.
    """
    model, tokenizer = load_model(source, torch.device("cpu"))
    provenance = read_provenance(source)
    require_shape(provenance, SHAPES["provenance.json"], str(source / "provenance.json"))
    why_not = not_stock(model.config)
    page = card(
        provenance,
        sha256_file(source / "model.safetensors"),
        tokenizer.end_token,
        config.license,
        why_not,
        results,
    )
    files = {"README.md": page.encode(), "provenance.json": to_json(provenance)}
    if results is not None:
        files["loss.svg"] = loss_curve(results.curves).encode()
    if why_not:
        return Folder(files, {}, why_not)
    text = tokenizer.encode(page)
    require_same_logits(model, text, tokenizer.end_id)
    settings, weights = stock_config(model.config, tokenizer.end_id), stock_weights(model)
    say(_compared(model, settings, weights, text))
    return Folder(files | _settings_files(settings, tokenizer), weights, None)


def write(folder: Folder, out: Path) -> None:
    """Write all files, and delete those that an earlier export left and this one has not.

    Raises InputError if `out` holds what lm.export.folder did not write.
    """
    require_ours(out)
    for name in FILES:
        if name not in folder.files:
            (out / name).unlink(missing_ok=True)
    for name, content in folder.files.items():
        atomic_write(out / name, content)
    if folder.weights:
        write_checkpoint(folder.weights, {"format": "pt"}, out / WEIGHTS)
    why_not = folder.why_not
    say(f"Model card in {out}, no weights: {why_not}" if why_not else f"Model in {out}")


def require_ours(out: Path) -> None:
    """Raise InputError unless nothing is lost if this folder is written."""
    page = out / "README.md"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: not a folder")
    if not out.exists() or all(file.suffix == ".tmp" for file in out.iterdir()):
        return  # new, or what a kill left before the card was there
    if not (page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")):
        raise InputError(
            f"{out}: not written by lm.export.folder; name another folder, or move this one"
        )


def _settings_files(settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, bytes]:
    end_id = tokenizer.end_id
    generation = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.end_token,
        "pad_token": tokenizer.end_token,  # behind the attention mask; on the left, to write on
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


@torch.inference_mode()
def _compared(
    model: TransformerLM, settings: dict[str, Any], weights: dict[str, Tensor], text: list[int]
) -> str:
    """How well transformers' logits agree over a full context of random ids and of text, in words.

    It may be more than TOLERANCE by rounding alone, which is then shown. The model may have been
    changed by that. Raises AssertionError, for it would be our fault, if there is more to it.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM  # for development alone
    except ImportError:
        return "transformers is not installed: logits not compared"
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    lacking, surplus = theirs.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if model.config.tie_embeddings else []
    assert (lacking, surplus) == (tied, [])
    length = model.config.context_length
    random = np.random.default_rng(0).integers(model.config.vocab_size, size=length)
    ids = torch.from_numpy(np.stack([random, np.resize(text, length)]))
    logits = model(ids)
    if not logits.isfinite().all():
        raise InputError(
            "logits are not finite: weights are too large; train with a lower train.lr"
        )
    difference = (logits - theirs(ids).logits).abs().max().item()
    said = f"Logits agree with those of transformers to {difference:.1e}"
    if not difference <= TOLERANCE:  # a long context: they round the angles of rotary positions
        assert model.rope is not None
        cos, sin = theirs.model.rotary_emb(ids.float(), torch.arange(length)[None])  # (1, T, D)
        model.rope.cos.copy_(cos[0, :, : cos.shape[-1] // 2])
        model.rope.sin.copy_(sin[0, :, : sin.shape[-1] // 2])
        exact = (model.double()(ids) - theirs.double()(ids).logits).abs().max().item()
        assert exact <= TOLERANCE, f"{said}, and to {exact:.1e} where nothing is rounded"
        said += f", all of it rounding: to {exact:.1e} in float64 with their rotary angles"
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lm.export", description=__doc__.split("\n")[0])
    add_overrides(parser)
    parser.add_argument("--model", type=Path, default=MODEL, help="its folder")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write")
    options = parser.parse_args(arguments)
    with one_line_errors():
        params = load_params(Path("params.yaml"), options.overrides)
        config = read_section(ExportConfig, params, "export")
        # metrics/ is of the pipeline's model and says nothing of another
        data_path = str(params.get("data", {}).get("path"))
        results = read_results(data_path) if options.model == MODEL else None
        require_ours(options.out)  # before the work
        folder = export(options.model, config, results)
        if folder.why_not:
            raise InputError(f"{options.model}: {folder.why_not}")
        write(folder, options.out)
