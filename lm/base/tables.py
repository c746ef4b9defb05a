"""Results as text for people, and what the files that they are read from must hold."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.base.errors import InputError

WORSE = 0.01  # times the best validation loss is noise
DIVERGED = "diverged_at_step"  # in metrics/train.json of a run that has curves and no results

SHOWN_KINDS = 20  # of files, in a table
FEW = 3  # texts beside tables: a README, a license
ROWS = {
    "uniform": "uniform guess",
    "unigram": "unigram",
    "bigram": "bigram, interpolated",
    "loss_nats": "this model",
    "floor": "entropy of the grammar",
}

NUMBER, MAYBE, COUNT, SOME = "a number", "a number or null", "a count", "a count of 1 or more"
POSITIVE, TEXT, FLAG, GUESS = "a number > 0", "text", "true or false", "a name and a probability"
SHOWN = "what UTF-8 can show"
_KINDS = {
    NUMBER: lambda x: _is_number(x),
    MAYBE: lambda x: x is None or _is_number(x),
    COUNT: lambda x: type(x) is int and 0 <= x < 1 << 63,
    SOME: lambda x: type(x) is int and 1 <= x < 1 << 63,
    POSITIVE: lambda x: _is_number(x) and x > 0,
    TEXT: lambda x: _is_text(x),
    GUESS: lambda x: isinstance(x, list) and len(x) == 2 and _is_text(x[0]) and _is_number(x[1]),
    FLAG: lambda x: isinstance(x, bool),
    SHOWN: lambda x: _is_text(str(x)),
}
_SIDE = {"documents": COUNT, "bytes": COUNT, "tokens": SOME}
_SOURCE = {
    **dict.fromkeys(("documents", "bytes", "tokens"), COUNT),
    **dict.fromkeys(("longest_document_bytes", "vocabulary_used"), COUNT),
    "bytes_per_token": NUMBER,
    "valid": {"tokens": COUNT},
}
# what is read of each file: "key?" may be missing, "*" is every key, a list holds any number
SHAPES: dict[str, Any] = {
    "data.json": {
        **_SOURCE,
        **dict.fromkeys(("train", "valid"), _SIDE),
        "vocabulary": SOME,
        **dict.fromkeys(("duplicates", "replacement_characters"), COUNT),
        "left_out": {"*": COUNT},
        "sources": {"*": _SOURCE},
    },
    "train.json": {
        **dict.fromkeys(("step", "tokens", "parameters", "best_step"), SOME),
        **dict.fromkeys(("train_loss", "valid_loss", "best_valid_loss"), NUMBER),
    },
    "eval.json": {
        **dict.fromkeys(("loss_nats", "bits_per_byte"), POSITIVE),
        **dict.fromkeys(("perplexity", "accuracy", "calibration_error"), NUMBER),
        **dict.fromkeys(("tokens", "bytes"), SOME),
        "baseline_loss_nats": dict.fromkeys(("uniform", "unigram", "bigram"), NUMBER),
        **dict.fromkeys(("floor_bits_per_byte?", "distance_to_floor?"), NUMBER),
    },
    "samples.json": [{"prompt": TEXT, "temperature": NUMBER, "completion": TEXT}],
    "held_out.json": [
        {
            "whole": FLAG,
            "tokens": [{"text": TEXT, "name": TEXT, "loss_nats": NUMBER, "guesses": [GUESS]}],
        }
    ],
    "performance.json": {
        **{key: {"predicted": MAYBE, "measured": NUMBER} for key in ("seconds", "memory_bytes")},
        **dict.fromkeys(("tokens_per_second", "step_seconds_median", "flops_per_token"), NUMBER),
        **dict.fromkeys(("matmul_flops_per_second", "mfu", "micro_batch_size"), NUMBER),
        "compiled": FLAG,
        **dict.fromkeys(("mfu_is_of", "device", "dtype"), TEXT),
        "num_devices?": SOME,
    },
    "provenance.json": {
        "model": {
            "*": SHOWN,
            **dict.fromkeys(("vocab_size", "context_length", "num_layers", "d_model"), SOME),
        },
        "train": {"*": SHOWN},
        **{key: {"*": TEXT} for key in ("inputs", "code")},
        "environment": {"*": SHOWN},
    },
    "corpus.json": [{"package?": TEXT, "version?": TEXT, "bytes": COUNT, "sha256": TEXT}],
}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # not nan; room for sums


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)  # has no UTF-8


def require_shape(value: Any, shape: Any, where: str) -> None:
    """Raise InputError unless a value of JSON has what is read of it; more may be there."""
    if isinstance(shape, str):
        if not _KINDS[shape](value):
            raise InputError(f"{where} = {str(value)[:40]}, expected {shape}; run `dvc repro`")
        return
    if type(value) is not type(shape):
        kind = "a list" if isinstance(shape, list) else "keys and values"
        raise InputError(f"{where} = {str(value)[:40]}, expected {kind}; run `dvc repro`")
    if isinstance(shape, list):
        for number, item in enumerate(value):
            require_shape(item, shape[0], f"{where}[{number}]")
        return
    for key, inner in shape.items():
        for name in value if key == "*" else (key.removesuffix("?"),):
            if key == "*":
                require_shape(name, TEXT, where)
            if name in value:
                require_shape(value[name], inner, f"{where}{'.' if ': ' in where else ': '}{name}")
            elif not key.endswith("?"):
                raise InputError(f"{where}: no {name} in it; run `dvc repro`")


def summary(
    metrics: Mapping[str, Any],
    baselines: Mapping[str, float],
    sample: tuple[str, str],
    places: Mapping[str, str],
    remarks: Iterable[str] = (),
) -> str:
    """The validation loss beside its baselines, a sample, and where everything lies (Markdown)."""
    prompt, completion = sample
    lines = [
        loss_table(metrics, baselines),
        *(f"Warning: {remark}\n" for remark in remarks),
        _sample(f"Prompt `{prompt}`", prompt + completion),
        *(f"{what:<12} {where}" for what, where in places.items()),
    ]
    return "\n".join(lines) + "\n"


def behind_bigram(metrics: Mapping[str, Any], baselines: Mapping[str, float]) -> str | None:
    """That counting pairs of tokens predicts better than the model, in words; None if not."""
    loss, bigram = metrics["loss_nats"], baselines["bigram"]
    if loss <= bigram:
        return None
    return (
        f"the model ({loss:.4f}) is worse than the bigram baseline ({bigram:.4f}): train it "
        "longer, or with another train.lr"
    )


def loss_table(metrics: Mapping[str, Any], baselines: Mapping[str, float]) -> str:
    """The validation loss beside its baselines (Markdown)."""
    bits = metrics["tokens"] / (math.log(2) * metrics["bytes"])  # nats/token to bits/byte
    losses = {**baselines, "loss_nats": metrics["loss_nats"]}
    if "floor_bits_per_byte" in metrics:
        losses["floor"] = metrics["floor_bits_per_byte"] / bits
    rows = {key: ROWS.get(key, key) for key in losses}
    width = max(map(len, rows.values()))
    lines = [
        f"Validation on {metrics['tokens']:,} tokens ({metrics['bytes']:,} bytes)",
        "",
        f"| {'':<{width}} | nats per token | perplexity | bits per byte |",
        f"|-{'-' * width}-|---------------:|-----------:|--------------:|",
        *(
            f"| {rows[key]:<{width}} | {loss:>14.4f} | {math.exp(min(loss, 99.0)):>10,.1f} "
            f"| {loss * bits:>13.4f} |"
            for key, loss in losses.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def samples(texts: Iterable[tuple[str, float, str]]) -> str:
    """Prompts, temperatures and completions (Markdown)."""
    return "".join(
        _sample(f"Prompt `{prompt}`, temperature {temperature:g}", prompt + completion)
        for prompt, temperature, completion in texts
    )


def _sample(head: str, text: str) -> str:
    return f"{head}:\n\n{_indented(text)}\n\n"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in plain(text).rstrip().split("\n"))


def plain(text: str) -> str:
    """A text whose control characters are written out: of a model, they may be any.

    A terminal would obey them, and Markdown ends a line at a carriage return.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


def data_table(report: Mapping[str, Any]) -> str:
    """What the tokens hold, by source and in all, and what was left out (Markdown)."""
    rows = [*report["sources"].items(), *([("all", report)] if len(report["sources"]) > 1 else [])]
    lines = [
        "| source | documents | bytes | tokens | held out | bytes per token | longest document "
        "| vocabulary used |",
        "|--------|----------:|------:|-------:|---------:|----------------:|-----------------:"
        "|----------------:|",
        *(
            f"| {name} | {part['documents']:,} | {part['bytes']:,} | {part['tokens']:,} "
            f"| {part['valid']['tokens'] / max(1, part['tokens']):.1%} "
            f"| {part['bytes_per_token']:.2f} | {part['longest_document_bytes']:,} "
            f"| {part['vocabulary_used'] / report['vocabulary']:.1%} |"
            for name, part in rows
        ),
    ]
    left_out = {"duplicate": report["duplicates"], **report["left_out"]}
    counted = [f"{count:,} {reason}" for reason, count in left_out.items() if count]
    if counted:
        lines += ["", f"Left out: {', '.join(counted)}"]
    if report["replacement_characters"]:
        lines += ["", f"Replacement characters put in: {report['replacement_characters']:,}"]
    unseen = [name for name, part in report["sources"].items() if not part["valid"]["tokens"]]
    if unseen:
        lines += [
            "",
            f"No held-out text in {', '.join(unseen)}: validation says nothing of it; raise "
            "data.valid_fraction or add text",
        ]
    return "\n".join(lines) + "\n"


def files_table(kinds: Sequence[tuple[str, str, str, Sequence[Path]]], left_out: str) -> str:
    """How many files of each suffix were read, and as what, and which were not (Markdown)."""
    order = sorted(kinds, key=lambda kind: (kind[0], -len(kind[3]), kind[1]))
    lines = ["| source | suffix | files | read as |", "|--------|--------|------:|---------|"]
    lines += [
        f"| {source} | {suffix} | {len(files):,} | {read_as} |"
        for source, suffix, read_as, files in order[:SHOWN_KINDS]
    ]
    if rest := order[SHOWN_KINDS:]:
        lines.append(f"| | {len(rest):,} more | {sum(len(kind[3]) for kind in rest):,} | |")
    for source in dict.fromkeys(kind[0] for kind in order):
        mine = [kind for kind in order if kind[0] == source]
        texts = [file.name for kind in mine if kind[2] == "text" for file in kind[3]]
        others = [kind for kind in mine if kind[2] != "text"]
        if texts and others and len(texts) <= max(FEW, len(others[0][3])):
            name = "".join(c if c.isprintable() else "?" for c in texts[0])
            more = f" and {len(texts) - 1:,} more" if texts[1:] else ""
            beside = f"read as text beside {len(others[0][3]):,} {others[0][1]} files"
            lines += ["", f"{name}{more} {beside}: leave out by data.glob what is no text to learn"]
    if left_out:
        lines += ["", f"Files not read: {left_out}"]
    return "\n".join(lines) + "\n"


def ended_worse(train: Mapping[str, Any], publishes_best: bool) -> str | None:
    """That a training ended worse than it was, of its metrics/train.json, in words; None if not.

    With early stopping the best model is published, and all is well.
    """
    best, last = train["best_valid_loss"], train["valid_loss"]
    if publishes_best or last <= (1 + WORSE) * best:
        return None
    return (
        f"best validation was step {train['best_step']:,} ({best:.4f}), published step "
        f"{train['step']:,} ({last:.4f}): set train.early_stopping"
    )
