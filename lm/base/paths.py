"""The paths of the pipeline's files, the same as in dvc.yaml.

Stages, tools, command lines and the checks of settings take them from here. All other code in
lm/ gets folders as arguments.
"""

from pathlib import Path

PARAMS = Path("params.yaml")
RAW, CORPUS = Path("data/raw"), Path("data/corpus.json")  # the default text, and its manifest
# licences of the default text: a line for each, an empty line, their texts
LICENSES = Path("data/licenses.txt")
TOKENIZER, TOKENS = Path("data/tokenizer"), Path("data/tokens")
METRICS, MODELS = Path("metrics"), Path("models")
MODEL, HUGGINGFACE = MODELS / "model", MODELS / "huggingface"
LAST, BEST = (MODELS / "checkpoints" / f"{name}.safetensors" for name in ("last", "best"))
# where users put tokenizers and models that were made elsewhere
OWN_TOKENIZERS, PRETRAINED = Path("data/tokenizers"), MODELS / "pretrained"
