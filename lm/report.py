"""Results as text for people."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN_KINDS = 20  # of files, in a table
FEW = 3  # texts beside tables: a README, a license
ROWS = {
    "uniform": "uniform guess",
    "unigram": "unigram",
    "bigram": "bigram, interpolated",
    "loss_nats": "this model",
    "floor": "entropy of the grammar",
}


def summary(
    metrics: Mapping[str, Any],
    baselines: Mapping[str, float],
    sample: tuple[str, str],
    places: Mapping[str, str],
) -> str:
    """The validation loss beside its baselines, a sample, and where everything lies (Markdown)."""
    prompt, completion = sample
    lines = [
        loss_table(metrics, baselines),
        _sample(f"Prompt `{prompt}`", prompt + completion),
        *(f"{what:<12} {where}" for what, where in places.items()),
    ]
    return "\n".join(lines) + "\n"


def loss_table(metrics: Mapping[str, Any], baselines: Mapping[str, float]) -> str:
    """The validation loss beside its baselines (Markdown)."""
    bits = metrics["tokens"] / (math.log(2) * metrics["bytes"])  # nats/token to bits/byte
    losses = {**baselines, "loss_nats": metrics["loss_nats"]}
    if "floor_bits_per_byte" in metrics:
        losses["floor"] = metrics["floor_bits_per_byte"] / bits
    rows = {key: ROWS[key] for key in losses}
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
    return "\n".join(f"    {line}".rstrip() for line in text.rstrip().split("\n"))


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
