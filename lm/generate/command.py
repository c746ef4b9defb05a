"""Complete prompts: `python -m lm.generate --prompt "def "` streams a completion."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lm.base.errors import InputError, one_line_errors
from lm.base.paths import MODEL
from lm.base.sections import ABOVE_ZERO_UP_TO_ONE, AT_LEAST_ONE, Bound, brief
from lm.base.settings import DEVICE, DTYPES
from lm.generate.stream import SamplingOptions, require_rows_fit, stream
from lm.machine.device import choose_device, native_dtype
from lm.model.model_folder import load_model

STDIN = Path("-")
# features are kept in the dtype too, and may overflow float16
WIDE = [name for name, kind in DTYPES.items() if not kind.scaled]
BOUNDS = {
    "max_new_tokens": Bound(lambda x: 1 <= x <= sys.maxsize, f"must be in [1, {sys.maxsize}]"),
    "num_samples": AT_LEAST_ONE,
    "stop": Bound(all, "no stop text may be empty"),
    "temperature": Bound(lambda x: 0 <= x < math.inf, "must be >= 0 and finite"),
    "top_k": AT_LEAST_ONE,
    "top_p": ABOVE_ZERO_UP_TO_ONE,
    "device": DEVICE,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print completions of the prompts that the command line names."""
    options = _parser().parse_args(arguments)
    with one_line_errors():
        _require_bounds(options)
        prompts, stop = (
            [_utf8(f"--{name}", os.fsencode(text)) for text in getattr(options, name)]
            for name in ("prompt", "stop")
        )
        prompts += [_read_prompt(file) for file in options.prompt_file]
        if not prompts:
            prompts = [""] if sys.stdin.isatty() else [_read_prompt(STDIN)]
        device = choose_device(options.device)
        dtype = native_dtype(device) if options.dtype == "auto" else options.dtype
        model, tokenizer = load_model(options.model, device)
        longest = max(len(tokenizer.encode(prompt)) for prompt in prompts)
        require_rows_fit(model, len(prompts) * options.num_samples, longest, dtype)
        prompts = [prompt for prompt in prompts for _ in range(options.num_samples)]
        sampling = SamplingOptions(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            dtype=dtype,
        )
        texts, streamed = list(prompts), len(prompts) == 1
        if streamed:
            print(prompts[0], end="", flush=True)
        for chunk in stream(
            model, tokenizer, prompts, options.max_new_tokens, stop=stop, **sampling
        ):
            texts[chunk.row] += chunk.text
            if streamed:
                print(chunk.text, end="", flush=True)
        if streamed:
            print()
            return
        for row, text in enumerate(texts):
            print(f"==> {row} <==\n{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lm.generate",
        description="Complete prompts. One is streamed; several are printed when all are done.",
    )
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="text to continue; may be repeated")
    add(
        "--prompt-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="file with a prompt, whose last line break counts; - is standard input, which is also "
        "read if no prompt is given and it is no terminal; may be repeated",
    )
    add("--max-new-tokens", type=int, default=200)
    add("--num-samples", type=int, default=1, help="completions of each prompt")
    add("--stop", action="append", default=[], help="end before this text; may be repeated")
    add("--temperature", type=float, default=0.8, help="0: take the most probable")
    add("--top-k", type=int, help="keep the k most probable tokens")
    add("--top-p", type=float, help="keep the tokens that make up this probability")
    add("--seed", type=int, default=0)
    add("--model", type=Path, default=MODEL, help="model folder")
    add("--device", default="auto", help=DEVICE.text)
    add(
        "--dtype",
        default="float32",
        choices=["auto", *WIDE],
        help="auto: bfloat16 where the device multiplies it natively",
    )
    return parser


def _require_bounds(options: argparse.Namespace) -> None:
    for name, bound in BOUNDS.items():
        value = getattr(options, name)
        if value is not None and not bound.holds(value):
            raise InputError(f"--{name.replace('_', '-')} {brief(value)}: {bound.text}")


def _read_prompt(file: Path) -> str:
    """Return the text of a file, or of standard input. Raises InputError if it cannot be read."""
    if file == STDIN:
        return _utf8("standard input", sys.stdin.buffer.read())
    if not file.exists() or file.is_dir():
        raise InputError(f"{file}: {'a directory' if file.exists() else 'no such file'}")
    return _utf8(str(file), file.read_bytes())


def _utf8(name: str, data: bytes) -> str:
    """Return the text of some bytes. Raises InputError, under this name, if they are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8"
        ) from None
