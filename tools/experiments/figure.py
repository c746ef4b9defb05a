"""The results of a comparison as a picture (Vega-Lite)."""

import math
from typing import Any

from tools.experiments.read import is_number, label, show
from tools.experiments.statistics import CONFIDENCE, ComparedSetting, interval

BLUE = "#4c78a8"


def figure(rows: list[ComparedSetting], names: list[str], title: str) -> dict[str, Any]:
    """Each seed, and each setting's mean with its own confidence interval (Vega-Lite)."""
    numeric = [n for n in names if all(is_number(row.setting.get(n)) for row in rows)]
    x = max(numeric, key=lambda n: len({row.setting[n] for row in rows}), default=None)
    x = x or (names[0] if names else "setting")
    places = [row.setting.get(x, "all the same") for row in rows]
    others = [name for name in names if name != x]
    series = [label(row.setting, others) for row in rows]
    shifted = dodge(x, places, series) if x in numeric else [show(place) for place in places]
    seeds, means = [], []
    for row, place, name in zip(rows, shifted, series, strict=True):
        point = {"x": place, "series": name}
        seeds += [point | {"loss": loss, "seed": seed} for seed, loss in row.losses.items()]
        if len(row.losses) > 1:
            means.append(
                point | dict(zip(("loss", "low", "high"), interval(row.losses), strict=True))
            )
    encoding: dict[str, Any] = {
        "x": {"field": "x", "title": x, "axis": {"labelAngle": 0, "grid": False}},
        "y": {"field": "loss", "type": "quantitative", "title": title,
              "scale": {"domain": domain(seeds, means), "nice": False}},
        "color": {"value": BLUE},
    }  # fmt: skip
    if x in numeric:
        values = sorted(set(places))
        scale = {"type": "log" if is_logarithmic(x, values) else "linear", "zero": False,
                 "nice": False, "padding": 30}  # fmt: skip
        encoding["x"] |= {"type": "quantitative", "scale": scale}
        encoding["x"]["axis"] |= {"values": values, "format": "~g"}
    else:
        encoding["x"] |= {"type": "nominal", "sort": None}
        encoding["xOffset"] = {"field": "series"}
    if others:
        legend = {"orient": "bottom", "columns": 2, "labelLimit": 300}
        encoding["color"] = {"field": "series", "type": "nominal", "title": None, "legend": legend}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": {"text": f"{title}, by {x}", "anchor": "start", "offset": 12,
                  "subtitle": [f"circles: seeds; diamonds: their mean, with its {CONFIDENCE:.0%} "
                               "confidence interval; lower is better",
                               "overlapping bars decide nothing: the table compares pairwise"]},
        "width": 560, "height": 320, "encoding": encoding,
        "layer": [
            {"data": {"values": means},
             "mark": {"type": "rule", "clip": True, "strokeWidth": 2, "opacity": 0.7},
             "encoding": {"y": {"field": "low"}, "y2": {"field": "high"}}},
            {"data": {"values": means if x in numeric else []},
             "mark": {"type": "line", "opacity": 0.3}},
            {"data": {"values": seeds},
             "mark": {"type": "point", "size": 45, "opacity": 0.8, "strokeWidth": 1.5}},
            {"data": {"values": means},
             "mark": {"type": "point", "shape": "diamond", "filled": True, "size": 110}},
        ],
        "config": {"font": "sans-serif", "background": "white", "view": {"stroke": None},
                   "axis": {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal",
                            "gridColor": "#e8e8e8", "titlePadding": 10},
                   "title": {"fontSize": 15, "subtitleFontSize": 12, "subtitleColor": "#555",
                             "subtitlePadding": 6},
                   "legend": {"labelFontSize": 12}, "padding": 16},
    }  # fmt: skip


def is_logarithmic(name: str, values: list[float]) -> bool:
    """Learning rates, and what spans more than a decade."""
    return min(values) > 0 and (name.endswith("lr") or max(values) > 10 * min(values))


def dodge(name: str, places: list[float], series: list[str]) -> list[float]:
    """Numbers moved a little to the side, so that several series at one place can be told apart."""
    several = sorted(set(series))
    log = is_logarithmic(name, places)
    span = math.log(max(places) / min(places)) if log else max(places) - min(places)
    step = min(0.04, 0.6 / len(several) / len(set(places))) * span
    shifts = [(several.index(s) - (len(several) - 1) / 2) * step for s in series]
    if log:
        return [place * math.exp(shift) for place, shift in zip(places, shifts, strict=True)]
    return [place + shift for place, shift in zip(places, shifts, strict=True)]


def domain(seeds: list[dict[str, Any]], means: list[dict[str, Any]]) -> list[float]:
    """All seeds, and the intervals as far as these do not dwarf them (two seeds: 12 times)."""
    losses = [point["loss"] for point in seeds]
    low, high = min(losses), max(losses)
    span = high - low or abs(high) or 1.0
    low = max(low - span, min([low, *(mean["low"] for mean in means)]))
    high = min(high + span, max([high, *(mean["high"] for mean in means)]))
    return [low - 0.05 * (high - low), high + 0.05 * (high - low)]
