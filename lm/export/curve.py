"""The loss curve of a model card, as SVG."""

import csv
import math
from statistics import fmean

from lm.base.errors import InputError

CURVE_POINTS = 100  # of the training loss, averaged
VEGA_LITE = "6.4"
BLUE, ORANGE = "#4c78a8", "#f58518"


def loss_curve(curves: str, font: str = "sans-serif") -> str:
    """Draw training and validation loss by tokens from the text of a curves.csv.

    Every size is fixed: the layout does not depend on the fonts of this machine, nor do the bytes.
    """
    columns = ("tokens", "train_loss", "valid_loss")
    try:
        rows = [{k: float(row[k]) for k in columns} for row in csv.DictReader(curves.splitlines())]
    except (KeyError, TypeError, ValueError, csv.Error):
        raise InputError("metrics/curves.csv: not a table of numbers; run `dvc repro`") from None
    trained = [row for row in rows if math.isfinite(row["train_loss"])]
    size = -(-len(trained) // CURVE_POINTS) or 1
    points = []
    for start in range(0, len(trained), size):
        group = trained[start : start + size]
        tokens, loss = (fmean(row[key] for row in group) for key in ("tokens", "train_loss"))
        points.append({"tokens": tokens, "loss": loss, "of": "training"})
    points += [
        {"tokens": row["tokens"], "loss": row["valid_loss"], "of": "validation"}
        for row in rows
        if math.isfinite(row["valid_loss"])
    ]
    axis = {"labelOverlap": False, "labelFlush": False, "tickCount": 5, "titleFontWeight": "normal"}
    names = [
        {
            "data": {"values": [{}]},
            "mark": {"type": "text", "text": name, "color": color, "x": 590, "y": y,
                     "align": "right", "fontSize": 12},
        }
        for name, color, y in (("training", BLUE, 12), ("validation", ORANGE, 30))
    ]  # fmt: skip
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": 600, "height": 280, "autosize": "none", "background": "white",
        "padding": {"left": 55, "right": 20, "top": 10, "bottom": 45},
        "layer": [
            {
                "data": {"values": points},
                "mark": {"type": "line", "strokeWidth": 1.5},
                "encoding": {
                    "x": {"field": "tokens", "type": "quantitative", "title": "training tokens",
                          "axis": axis | {"format": "~s", "titleY": 34}},
                    "y": {"field": "loss", "type": "quantitative", "title": "nats per token",
                          "scale": {"zero": False}, "axis": axis | {"titleX": -40}},
                    "color": {"field": "of", "type": "nominal", "legend": None,
                              "scale": {"domain": ["training", "validation"],
                                        "range": [BLUE, ORANGE]}},
                },
            },
            *names,
        ],
        "config": {"font": font, "view": {"stroke": None}, "axis": {"gridColor": "#e8e8e8"}},
    }  # fmt: skip
    import vl_convert

    return vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE) + "\n"
