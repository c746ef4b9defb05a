"""Stage evaluate: how good models/model/ is on the validation split, beside simple baselines."""

from pathlib import Path

from lm.baselines import Bigram, uniform_loss_nats
from lm.checkpoint import load_model, read_provenance
from lm.config import RuntimeConfig
from lm.console import say
from lm.device import choose_device, make_deterministic
from lm.evaluate import METRICS, EvaluateConfig, evaluate, loss_by_position
from lm.files import atomic_write, sha256_file, write_json
from lm.generate import complete
from lm.report import samples, summary
from lm.resume import remove_finished, run_folder
from lm.tokens import open_tokens
from stages.run import UNFINISHED, Inputs, run

PLACES = {
    "Model": "models/model/         python -m lm.generate --prompt 'def '",
    "Checkpoints": "models/checkpoints/   python -m stages.train --resume-from ...",
    "Metrics": "metrics/*.json        dvc metrics show",
    "Curves": "metrics/curves.csv    dvc plots show",
    "Samples": "metrics/samples.md",
}
MODEL, TOKENS, RESULTS = Path("models/model"), Path("data/tokens"), Path("metrics")


def evaluate_stage(inputs: Inputs) -> None:
    """Write metrics/eval.json, loss_by_position.csv, samples.md and summary.md."""
    config = inputs.section(EvaluateConfig, "evaluate")
    inputs.watch(MODEL, TOKENS)
    device = choose_device(inputs.section(RuntimeConfig, "runtime").device)
    model, tokenizer = load_model(MODEL, device)
    provenance = read_provenance(MODEL)
    remove_finished(run_folder(UNFINISHED, provenance))  # by now DVC has recorded what it made
    make_deterministic(device, provenance["train"].get("num_threads"))
    tokens = open_tokens(TOKENS, sha256_file(MODEL / "tokenizer.json"))
    sums = evaluate(
        model, tokens.valid, config.batch_size, tokenizer.byte_lengths, stride=config.stride
    )
    metrics = {name: metric(sums) for name, metric in METRICS.items()}
    unigram, bigram = Bigram(tokens.train.tokens, tokens.vocab_size).losses_nats(
        tokens.valid.tokens
    )
    baselines = {
        "uniform": uniform_loss_nats(tokens.vocab_size),
        "unigram": unigram,
        "bigram": bigram,
    }
    options = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "seed")}
    texts = [
        (prompt, "".join(complete(model, tokenizer, prompt, config.max_new_tokens, **options)))
        for prompt in config.prompts
    ]
    curve = "".join(f"{position},{loss:.6f}\n" for position, loss in loss_by_position(sums))
    inputs.check()
    write_json(RESULTS / "eval.json", {**metrics, "baseline_loss_nats": baselines})
    atomic_write(RESULTS / "loss_by_position.csv", b"position,loss_nats\n" + curve.encode())
    atomic_write(RESULTS / "samples.md", samples(texts).encode())
    atomic_write(RESULTS / "summary.md", summary(metrics, baselines, texts[0], PLACES).encode())
    say(f"Validation loss {metrics['loss_nats']:.4f} nats per token (bigram {bigram:.4f}), "
        f"{metrics['bits_per_byte']:.4f} bits per byte")  # fmt: skip


if __name__ == "__main__":
    run(evaluate_stage, ["evaluate", "runtime"])
