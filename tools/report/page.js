"use strict";
// Draw the charts; show the guesses for the chosen token of the held-out text.

const data = JSON.parse(document.getElementById("page-data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function chart({points, x, y, small, calibration}) {
  const runs = [...new Set(points.map(point => point.run))];
  const kinds = [...new Set(points.map(point => point.kind))];
  const several = runs.length > 1;
  const [key, names] = several ? ["run", runs] : ["kind", kinds];
  const colours = several || kinds.length === 1
    ? [colour("--first"), colour("--second")] : [colour("--faint-line"), colour("--first")];
  const closer = "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!";
  const zoom = {name: "zoom", bind: "scales", select: {
    type: "interval", on: closer, translate: closer, zoom: "wheel![event.shiftKey]"}};
  const hover = {name: "hover", select: {
    type: "point", on: "pointermove", clear: "pointerout", nearest: true, fields: ["x"]}};
  const tooltip = [
    {field: "x", type: "quantitative", title: x, format: calibration ? ".1%" : ",~r"},
    {field: "y", type: "quantitative", title: y, format: calibration ? ".1%" : ".4~g"},
    ...(calibration ? [{field: "tokens", type: "quantitative", format: ","}] : []),
    ...(several ? [{field: "run"}] : []),
    ...(kinds.length > 1 ? [{field: "kind"}] : []),
  ];
  const format = calibration ? "%" : "~s";
  const encoding = {
    x: {field: "x", type: "quantitative", title: x,
        axis: {format, tickCount: small ? 4 : calibration ? 5 : 8}, scale: {nice: false, zero: Boolean(calibration)}},
    y: {field: "y", type: "quantitative", title: y,
        axis: {format: calibration ? "%" : "~g", tickCount: 5}, scale: {zero: Boolean(calibration)}},
    color: {field: key, type: "nominal", title: null, sort: null,
            scale: {domain: names, range: colours.slice(0, names.length)},
            legend: names.length > 1 ? {} : null},
    ...(several && kinds.length > 1 ? {strokeDash: {
      field: "kind", type: "nominal", title: null, sort: null,
      scale: {domain: kinds, range: [[1, 0], [6, 3]]},
      legend: {symbolStrokeColor: colour("--ink")}}} : {}),
  };
  const validations = {
    transform: [{filter: {field: "kind", equal: "validation"}}],
    mark: {type: "point", filled: true, opacity: 1, size: 28, clip: true}};
  const lines = [
    {params: [zoom], mark: {type: "line", strokeWidth: 1.75, clip: true}},
    ...(kinds.length > 1 ? [validations] : []),
    {params: [hover], mark: {type: "point", filled: true, size: 55, clip: true}, encoding: {
      opacity: {condition: {param: "hover", empty: false, value: 1}, value: 0}, tooltip}},
  ];
  const reliability = [
    {data: {values: [{x: 0, y: 0}, {x: 1, y: 1}]},
     mark: {type: "line", strokeDash: [5, 4], strokeWidth: 1, color: colour("--muted")},
     encoding: {color: {value: colour("--muted")}}},
    {mark: {type: "line", strokeWidth: 1.75}},
    {mark: {type: "point", filled: true, opacity: 1}, encoding: {tooltip,
      size: {field: "tokens", type: "quantitative", legend: null, scale: {range: [20, 260]}}}},
  ];
  return {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    description: `${y} by ${x}`,
    width: "container", height: small ? 170 : 300, autosize: {type: "fit", contains: "padding"},
    data: {values: points}, encoding, layer: calibration ? reliability : lines,
    config: {
      background: "transparent", font: "system-ui, sans-serif", view: {stroke: null},
      axis: {labelColor: colour("--muted"), titleColor: colour("--muted"), titleFontWeight: "normal",
             labelFontSize: 12, titleFontSize: 12, gridColor: colour("--line"), titlePadding: 8,
             domainColor: colour("--line"), tickColor: colour("--line"), labelOverlap: true},
      legend: {orient: "top", labelColor: colour("--ink"), labelFontSize: 13, symbolType: "stroke",
               symbolStrokeWidth: 2.5, labelLimit: 220, padding: 0, offset: 8},
    },
  };
}

function draw() {
  for (const place of document.querySelectorAll(".chart")) {
    const spec = chart(data[place.id.replace("chart-", "")]);
    const tooltip = {theme: dark.matches ? "dark" : "light"};
    window.vegaEmbed(place, spec, {renderer: "svg", actions: false, tooltip});
  }
}

draw();
dark.addEventListener("change", draw);

// --- held-out text ------------------------------------------------------------------

const text = document.querySelector(".text");
const panel = document.getElementById("guesses");
const tokens = text ? [...text.querySelectorAll("span")] : [];
let chosen = 0;

function element(name, content = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = content;
  made.className = kind;
  if (name === "code") made.dir = "auto";
  return made;
}

const visible = name => name.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→");

function percent(p) {
  return p < 0.0001 ? "< 0.01%" : `${(100 * p).toFixed(p < 0.0995 ? 2 : 1)}%`;
}

function tell(number) {
  const [name, loss, guesses] = data.tokens[number];
  const head = element("p", "", "chosen");
  head.append(element("code", visible(name)),
    element("span", `${loss.toFixed(2)} nats, probability ${percent(Math.exp(-loss))}`));
  const list = element("ol");
  for (const [guess, p] of guesses) {
    const item = element("li", "", guess === name ? "right" : "");
    const bar = element("span", "", "bar");
    bar.style.width = `${100 * p}%`;
    item.append(element("code", visible(guess)), element("span", percent(p)), bar);
    if (guess === name) item.append(element("span", " (this token)", "hidden"));
    list.append(item);
  }
  panel.replaceChildren(head, element("p", "The model's most probable tokens here", "note"), list);
}

function choose(number) {
  if (tokens[number].classList.contains("current")) return;
  tokens[chosen].tabIndex = -1;
  tokens[chosen].classList.remove("current");
  chosen = number;
  tokens[chosen].tabIndex = 0;
  tokens[chosen].classList.add("current");
  tell(number);
}

if (tokens.length) {
  tokens.forEach((token, number) => {
    token.setAttribute("role", "button");
    token.setAttribute("aria-label", visible(data.tokens[number][0]));
    token.tabIndex = number ? -1 : 0;
  });
  const number = event => tokens.indexOf(event.target.closest(".text span"));
  const chooseTarget = event => { if (number(event) >= 0) choose(number(event)); };
  text.addEventListener("focusin", chooseTarget);
  text.addEventListener("click", chooseTarget);
  let pointer = "";  // its last place: text that scrolls under a resting pointer is not chosen
  text.addEventListener("pointermove", event => {
    const place = `${event.clientX} ${event.clientY}`;
    if (place !== pointer) chooseTarget(event);
    pointer = place;
  });
  text.addEventListener("keydown", event => {
    const last = tokens.length - 1;
    const to = {ArrowRight: chosen + 1, ArrowLeft: chosen - 1, ArrowDown: chosen + 10,
                ArrowUp: chosen - 10, Home: 0, End: last}[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    tokens[Math.max(0, Math.min(last, to))].focus();
  });
}
