"""The shape of each result file: which keys it has, and which values. Every reader checks it.

Results may come through DVC from other machines and revisions, so none is trusted.
"""

import re
from pathlib import Path
from typing import Any

from lm.base.errors import InputError
from lm.base.files import read_json
from lm.base.sections import Bound


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # not nan; room for sums


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)  # has no UTF-8


NUMBER = Bound(_is_number, "a number")
MAYBE = Bound(lambda x: x is None or _is_number(x), "a number or null")
ABOVE_ZERO = Bound(lambda x: _is_number(x) and x > 0, "a number > 0")
COUNT = Bound(lambda x: type(x) is int and 0 <= x < 1 << 63, "a count")
SOME = Bound(lambda x: type(x) is int and 1 <= x < 1 << 63, "a count of 1 or more")
FLAG = Bound(lambda x: isinstance(x, bool), "true or false")
TEXT = Bound(_is_text, "text")
SHOWN = Bound(lambda x: _is_text(str(x)), "what UTF-8 can show")
GUESS = Bound(
    lambda x: isinstance(x, list) and len(x) == 2 and _is_text(x[0]) and _is_number(x[1]),
    "a name and a probability",
)

_SOURCE = {
    "documents bytes tokens longest_document_bytes vocabulary_used": COUNT,
    "bytes_per_token": NUMBER,
    "valid": {"tokens": COUNT},
}
_TEXT_FILE = {"bytes": COUNT, "sha256": TEXT}
_SPLIT = {"documents bytes": COUNT, "tokens": SOME}
# Only keys that are read are listed, several in one text. "key?" may be missing, "*" is any key.
# A tuple holds alternatives: a value must have the shape whose first key it has.
SHAPES: dict[str, Any] = {
    "data.json": {
        **_SOURCE,
        "train valid": _SPLIT,
        "vocabulary": SOME,
        "duplicates replacement_characters": COUNT,
        "left_out": {"*": COUNT},
        "sources": {"*": _SOURCE},
    },
    "train.json": {
        "step tokens parameters best_step": SOME,
        "train_loss valid_loss best_valid_loss": NUMBER,
    },
    "eval.json": {
        "loss_nats bits_per_byte": ABOVE_ZERO,
        "perplexity accuracy calibration_error floor_bits_per_byte? distance_to_floor?": NUMBER,
        "tokens bytes": SOME,
        "baseline_loss_nats": {"uniform unigram bigram": NUMBER},
    },
    "samples.json": [{"prompt completion": TEXT, "temperature": NUMBER}],
    "held_out.json": [
        {"whole": FLAG, "tokens": [{"text name": TEXT, "loss_nats": NUMBER, "guesses": [GUESS]}]}
    ],
    "performance.json": {
        "seconds memory_bytes": {"predicted": MAYBE, "measured": NUMBER},
        "tokens_per_second step_seconds_median flops_per_token micro_batch_size": NUMBER,
        "matmul_flops_per_second mfu": NUMBER,
        "mfu_is_of device dtype": TEXT,
        "compiled": FLAG,
        "num_devices?": SOME,
    },
    "provenance.json": {
        "model": {"*": SHOWN, "vocab_size context_length num_layers d_model": SOME},
        "train environment": {"*": SHOWN},
        "inputs code": {"*": TEXT},
    },
    "corpus.json": [
        ({"package": TEXT, "version?": TEXT, **_TEXT_FILE}, {"grammar": TEXT, **_TEXT_FILE})
    ],
}


def require_shape(value: Any, shape: Any, where: str) -> None:
    """Raise InputError unless a JSON value has this shape; further keys are allowed."""
    if isinstance(shape, tuple):
        kinds = {next(iter(kind)): kind for kind in shape}
        found = [kinds[key] for key in kinds if isinstance(value, dict) and key in value]
        if len(found) != 1:
            raise InputError(f"{where}: expected one of {', '.join(kinds)} in it; run `dvc repro`")
        (shape,) = found
    if isinstance(shape, Bound):
        fits, expected = shape.holds(value), shape.text
    else:
        fits = type(value) is type(shape)
        expected = "a list" if isinstance(shape, list) else "keys and values"
    if not fits:
        raise InputError(f"{where} = {str(value)[:40]}, expected {expected}; run `dvc repro`")
    if isinstance(shape, list):
        for number, item in enumerate(value):
            require_shape(item, shape[0], f"{where}[{number}]")
    if isinstance(shape, dict):
        for key, inner in ((key, shape[keys]) for keys in shape for key in keys.split()):
            for name in value if key == "*" else [key.removesuffix("?")]:
                if key == "*":
                    require_shape(name, TEXT, where)
                if name in value:
                    place = f"{where}{'.' if ': ' in where else ': '}{name}"
                    require_shape(value[name], inner, place)
                elif not key.endswith("?"):
                    raise InputError(f"{where}: no {name} in it; run `dvc repro`")


def read_result(file: Path) -> Any:
    """Return the content of a result file. Raises InputError unless it has its shape."""
    content = read_json(file)
    require_shape(content, SHAPES[file.name], str(file))
    return content
