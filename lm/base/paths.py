"""The places of the pipeline's files, as dvc.yaml has them.

Stages, tools, command lines and the checks of settings read them here. All else in lm/ gets
folders as arguments.
"""

from pathlib import Path

PARAMS = Path("params.yaml")
RAW, CORPUS = Path("data/raw"), Path("data/corpus.json")  # the default text, and its manifest
LICENSES = Path(
    "data/licenses.txt"
)  # of the default text: a line for each, an empty one, the texts
TOKENIZER, TOKENS = Path("data/tokenizer"), Path("data/tokens")
METRICS, MODELS = Path("metrics"), Path("models")
MODEL, HUGGINGFACE = MODELS / "model", MODELS / "huggingface"
LAST, BEST = (MODELS / "checkpoints" / f"{name}.safetensors" for name in ("last", "best"))
# where a user puts tokenizers and models of others
OWN_TOKENIZERS, PRETRAINED = Path("data/tokenizers"), MODELS / "pretrained"
