"""Stage evaluate: measure models/model/ on the validation split, and compare it with baselines.

With corpus.source = grammar compare it also with the grammar's entropy, the floor of any model.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lm.base.console import say
from lm.base.files import atomic_write, sha256_file, write_json
from lm.base.paths import METRICS, MODEL, TOKENS
from lm.base.result_files import read_result
from lm.base.run_id import remove_finished, run_folder
from lm.base.settings import CorpusConfig, EvaluateConfig, RuntimeConfig
from lm.base.tables import remarks_on
from lm.data.splits import open_tokens
from lm.evaluate.baselines import baseline_losses_nats
from lm.evaluate.excerpt import excerpt, excerpt_json
from lm.evaluate.floor import floor
from lm.evaluate.metrics import calibration, finite_metrics, loss_by_position, require_batch_fits
from lm.evaluate.samples import draw_samples, samples_as_markdown, summary
from lm.generate.decoder import COMPARED, require_same_logits
from lm.machine.device import choose_device, make_deterministic
from lm.model.model_folder import load_model, read_provenance
from lm.model.validation import evaluate
from stages.run import RUNS_ROOT, Inputs, run_stage

PLACES = {
    "Model": "models/model/         python -m lm.generate --prompt 'def '",
    "Checkpoints": "models/checkpoints/   python -m stages.train --resume-from ...",
    "Metrics": "metrics/*.json        dvc metrics show",
    "Curves": "metrics/curves.csv    dvc plots show",
    "Samples": "metrics/samples.md",
    "Report": "metrics/report.html   open it in a browser",
}
TRAIN = METRICS / "train.json"  # missing if the model comes from elsewhere
POSITIONS = ("position", "loss_nats")
CALIBRATION = ("above", "up_to", "tokens", "confidence", "accuracy")


def evaluate_stage(inputs: Inputs) -> None:
    """Write metrics/: eval.json, the tables behind it, samples, an excerpt and summary.md."""
    config = inputs.section(EvaluateConfig, "evaluate")
    source = inputs.section(CorpusConfig, "corpus").source
    inputs.watch(MODEL, TOKENS, TRAIN)
    device = choose_device(inputs.section(RuntimeConfig, "runtime").device)
    model, tokenizer = load_model(MODEL, device)
    provenance = read_provenance(MODEL)
    remove_finished(run_folder(RUNS_ROOT, provenance))  # by now DVC has recorded its outputs
    training = read_result(TRAIN) if TRAIN.is_file() else None
    make_deterministic(device, provenance["train"].get("num_threads"))
    tokens = open_tokens(TOKENS, sha256_file(MODEL / "tokenizer.json"), tokenizer)
    require_batch_fits(config, model.config, tokens.valid, device)
    lengths = tokenizer.byte_lengths
    sums = evaluate(model, tokens.valid, config.batch_size, lengths, stride=config.stride)
    metrics = finite_metrics(sums, str(MODEL))
    if source == "grammar":
        metrics |= floor(metrics, tokens.valid, tokenizer)
    baselines = baseline_losses_nats(tokens)
    require_same_logits(model, tokens.valid.tokens[:COMPARED], tokens.valid.end_id)
    samples = draw_samples(model, tokenizer, config)
    held_out = excerpt(model, tokens.valid, tokenizer)
    stops_early = provenance["train"].get("early_stopping") is not None
    remarks = remarks_on(metrics, baselines, training, stops_early)
    inputs.check()
    write_json(METRICS / "eval.json", {**metrics, "baseline_loss_nats": baselines})
    write_csv(METRICS / "loss_by_position.csv", POSITIONS, loss_by_position(sums))
    write_csv(METRICS / "calibration.csv", CALIBRATION, calibration(sums))
    write_json(METRICS / "samples.json", [sample._asdict() for sample in samples])
    atomic_write(METRICS / "samples.md", samples_as_markdown(samples).encode())
    atomic_write(METRICS / "held_out.json", excerpt_json(held_out))
    page = summary(metrics, baselines, samples[0], PLACES, remarks)
    atomic_write(METRICS / "summary.md", page.encode())
    say(
        f"Validation loss {metrics['loss_nats']:.4f} nats per token "
        f"(bigram {baselines['bigram']:.4f}), {metrics['bits_per_byte']:.4f} bits per byte"
    )
    for remark in remarks:
        say(f"warning: {remark}")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[int | float]]) -> None:
    """Write a table; fractions with six decimals."""
    cells = ([f"{v:.6f}" if isinstance(v, float) else str(v) for v in row] for row in rows)
    atomic_write(path, "".join(",".join(row) + "\n" for row in (columns, *cells)).encode())


if __name__ == "__main__":
    run_stage(evaluate_stage, ["corpus", "evaluate", "runtime"])
