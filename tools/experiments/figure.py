"""Draw the results of a comparison: fill in figure.json (Vega-Lite)."""

import json
from pathlib import Path
from typing import Any

from tools.experiments.read import is_number, label, show
from tools.experiments.statistics import CONFIDENCE, ComparedSetting, t_interval


def figure(rows: list[ComparedSetting], names: list[str], title: str) -> dict[str, Any]:
    """Return each seed, and each setting's mean with its own confidence interval (Vega-Lite).

    The x axis shows the setting with the most numbers, to scale, or else the first setting. Colours
    show the other settings that differ.
    """
    numeric = [n for n in names if all(is_number(row.setting.get(n)) for row in rows)]
    x = max(numeric, key=lambda n: len({row.setting[n] for row in rows}), default=None)
    x = x or (names[0] if names else "setting")
    others = [name for name in names if name != x]
    seeds, means = [], []
    for row in rows:
        place = row.setting.get(x, "all the same")
        point = {"x": place if x in numeric else show(place), "series": label(row.setting, others)}
        losses = [*row.losses.values()]
        seeds += [point | {"loss": loss} for loss in losses]
        if len(losses) > 1:
            low, high = t_interval(CONFIDENCE, losses)
            means.append(point | {"loss": row.mean, "low": low, "high": high})
    plot: dict[str, Any] = json.loads(Path(__file__).with_name("figure.json").read_bytes())
    plot["title"]["text"] = f"{title}, by {x}"
    plot["datasets"] = {"seeds": seeds, "means": means, "lines": means if x in numeric else []}
    encoding = plot["encoding"]
    encoding["x"]["title"], encoding["y"]["title"] = x, title
    encoding["y"]["scale"]["domain"] = domain(seeds, means)
    if x in numeric:
        values: list[float] = sorted({row.setting[x] for row in rows})
        is_logarithmic = values[0] > 0 and (x.endswith("lr") or values[-1] > 10 * values[0])
        kind = "log" if is_logarithmic else "linear"
        scale = {"type": kind, "zero": False, "nice": False, "padding": 30}
        encoding["x"] |= {"type": "quantitative", "scale": scale}
        encoding["x"]["axis"] |= {"values": values, "format": "~g"}
    else:
        encoding["x"] |= {"type": "ordinal", "sort": None}
        encoding["xOffset"] = {"field": "series"}
    if others:
        legend = {"orient": "bottom", "columns": 2, "labelLimit": 300}
        encoding["color"] = {"field": "series", "type": "nominal", "title": None, "legend": legend}
    return plot


def domain(seeds: list[dict[str, Any]], means: list[dict[str, Any]]) -> list[float]:
    """Return a range with all seeds, and with the intervals unless they dwarf the seeds.

    With two seeds an interval is 12 times as wide as the distance between them.
    """
    losses = [point["loss"] for point in seeds]
    low, high = min(losses), max(losses)
    span = high - low or abs(high) or 1.0
    low = max(low - span, min([low, *(mean["low"] for mean in means)]))
    high = min(high + span, max([high, *(mean["high"] for mean in means)]))
    return [low - 0.05 * (high - low), high + 0.05 * (high - low)]
