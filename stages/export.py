"""Stage export: write models/model/ as a folder that Hugging Face opens, with a model card."""

from lm.base.paths import CORPUS, HUGGINGFACE, LICENSES, MODEL
from lm.export.card import TEMPLATE, ExportConfig
from lm.export.folder import MEASURED, export, read_results, write
from stages.run import Inputs, run_stage


def export_stage(inputs: Inputs) -> None:
    """Write models/huggingface/; only the card if no stock architecture fits the model."""
    config = inputs.section(ExportConfig, "export")
    inputs.watch(MODEL, CORPUS, LICENSES, *MEASURED, TEMPLATE)
    results = read_results(str(inputs.params["data"]["path"]))
    folder = export(MODEL, config, results)
    inputs.check()
    write(folder, HUGGINGFACE)


if __name__ == "__main__":
    run_stage(export_stage, ["data", "export"])
