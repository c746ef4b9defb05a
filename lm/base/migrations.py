"""Settings that files of earlier versions lack, each with the value that keeps their meaning.

A new setting of the sections `model` or `train` needs a line here, so that older models and
checkpoints still open.
"""

from typing import Any

ADDED: dict[str, dict[str, Any]] = {
    "model": {"intra_document_masking": False, "zero_init": False},
    "train": {
        "init_from": None,
        "max_skipped_steps": 10,
        "num_threads": None,
        "on_nonfinite": "stop",
        "parallel": "none",
        "reduction": "sum",
    },
}


def migrated(section: str, settings: Any) -> Any:
    """Add to the settings of a file those that it lacks; return anything but a dict unchanged."""
    if not isinstance(settings, dict):
        return settings
    return settings | {key: v for key, v in ADDED[section].items() if key not in settings}
