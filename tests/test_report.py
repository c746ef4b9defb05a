"""The page of a run in a browser: what it shows, that nothing of the text runs, its size."""

import json
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from lm.base.errors import InputError
from lm.base.result_files import SHAPES, require_shape
from lm.export.card import Results, card
from tests.browser import BROWSER, needs_browser
from tests.kill import run
from tests.project import Project
from tools.report.page import page
from tools.report.report import read_run

ATTACK = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"
HEBREW, LONG = "שלום עולם", "x" * 3000
FOREIGN = f"{HEBREW} \x1b[31m{LONG}"
PAGE = "metrics/report.html"


def report(project, *arguments, code=0):
    done = run(project, "python", "-m", "tools.report", *arguments)
    assert done.returncode == code, done.stdout
    return done.stdout


def made(folder):
    """A project whose text and prompts attack the page, and are not all ASCII."""
    project = Project(folder / "project")
    for file in (project.folder / "text").iterdir():
        file.write_text(f"# {file.stem}: déjà vu €🙂 {ATTACK}\nprint({file.stem!r})\n")
    project.set("tokenizer.kind", "bytes")
    project.set("evaluate.prompts", [ATTACK, "print", FOREIGN])
    project.prepare("tokenizer", "tokens", "train", "evaluate")
    report(project)
    return project


@pytest.fixture(scope="session")
def shared(made_once):
    return made_once("report", made)


@pytest.fixture
def project(shared, tmp_path):
    other = Project(tmp_path / "copy")
    shutil.rmtree(other.folder)
    shutil.copytree(shared.folder, other.folder)
    yield other
    other.close()


JSONS = [f"metrics/{name}.json" for name in ("data", "train", "eval", "samples", "held_out",
                                             "performance")]  # fmt: skip


@pytest.mark.parametrize("name", [*JSONS, "models/model/provenance.json", "data/corpus.json"])
def test_results_with_anything_else_in_any_place_are_refused_in_one_line_or_shown(shared, name):
    """Each value of each file is taken out or replaced, and page and card are made of it."""
    corpus = b'[{"package": "pip", "version": "1", "bytes": 3, "sha256": "0"}]'
    files = {"data/corpus.json": corpus}

    def read(file):
        return files.get(file) or shared.read(file)

    def used():
        run = read_run("run", read, "commit", clocks=True)
        content = json.loads(read("data/corpus.json"))
        require_shape(content, SHAPES["corpus.json"], "data/corpus.json")
        page([run], "").encode()
        samples, curves = (
            shared.read(f"metrics/{n}").decode() for n in ("samples.md", "curves.csv")
        )
        results = Results(
            run.data, run.train, run.evaluation, samples, curves, content, "pip: MIT\n\n"
        )
        card(run.provenance, "0", "<end>", None, None, results).encode()

    held_out = json.loads(shared.read("metrics/held_out.json"))
    few = [document | {"tokens": document["tokens"][:2]} for document in held_out[:1]]
    files["metrics/held_out.json"] = json.dumps(few).encode()
    made_of = json.loads(shared.read("models/model/provenance.json"))
    few = {part: dict([*made_of[part].items()][:2]) for part in ("inputs", "code")}
    files["models/model/provenance.json"] = json.dumps(made_of | few).encode()
    used()
    whole, refused = json.loads(read(name)), 0
    for place in places(whole):
        for value in (None, "text", -(10**400), [], float("nan"), "\ud800", "GONE"):
            files[name] = json.dumps(replaced(whole, place, value)).encode()
            with suppress(InputError):
                used()
                continue
            refused += 1
    assert refused > 9


def test_a_text_of_another_kind_than_packages_and_stories_is_refused():
    entry, shape = {"bytes": 3, "sha256": "0"}, SHAPES["corpus.json"]
    require_shape(
        [entry | {"package": "pip"}, entry | {"grammar": "stories"}], shape, "corpus.json"
    )
    for kind in ({}, {"web": "pages"}, {"package": "pip", "grammar": "stories"}):
        with pytest.raises(InputError, match=r"corpus.json\[0\]: expected one of package, grammar"):
            require_shape([entry | kind], shape, "corpus.json")


def places(value, outer=()):
    """The keys that lead to each value of a JSON file; of a list to the first and the last."""
    yield outer
    keys = [*value] if isinstance(value, dict) else []
    if isinstance(value, list) and value:
        keys = sorted({0, len(value) - 1})
    for key in keys:
        yield from places(value[key], (*outer, key))


def replaced(value, place, new):
    if not place:
        return new
    (key, *inner), copy = place, value.copy()
    if new == "GONE" and not inner:
        del copy[key]
    else:
        copy[key] = replaced(value[key], inner, new)
    return copy


@contextmanager
def opened(path, width=1280, scheme="light", touch=False):
    """A page in Chromium; it must say nothing on the console and ask for nothing but itself."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=touch
        )
        page = context.new_page()
        asked, said = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        page.locator(".chart svg").last.wait_for()
        yield page
        assert (asked, said) == ([path.as_uri()], [])
        browser.close()


def tokens_of(project):
    documents = json.loads(project.read("metrics/held_out.json"))
    return [token for document in documents for token in document["tokens"]]


def guesses(page):
    """What the panel shows: the token, and (guess, probability in percent)."""
    rows = page.locator("#guesses li").all()
    cells = [(row.locator("code").inner_text(), row.locator("span").first) for row in rows]
    shown = [(name, float(cell.inner_text().strip("<% "))) for name, cell in cells]
    return page.locator("#guesses .chosen code").inner_text(), shown


def visible(name):
    return name.replace(" ", "·").replace("\n", "↵").replace("\t", "→")


@needs_browser
def test_the_text_shows_its_guesses_to_mouse_keyboard_and_finger(shared):
    tokens = tokens_of(shared)

    def expect(page, number):
        name, shown = guesses(page)
        assert name == visible(tokens[number]["name"])
        wanted = tokens[number]["guesses"]
        assert [guess for guess, _ in shown] == [visible(guess) for guess, _ in wanted]
        for (_, percent), (_, p) in zip(shown, wanted, strict=True):
            assert percent == pytest.approx(100 * p, abs=0.051)

    with opened(shared.folder / PAGE) as page:
        spans = page.locator(".text span")
        assert spans.count() == len(tokens)
        spans.nth(5).hover()
        expect(page, 5)
        spans.nth(5).focus()
        page.keyboard.press("ArrowRight")
        expect(page, 6)
        page.keyboard.press("End")
        expect(page, len(tokens) - 1)
        page.keyboard.press("Home")
        expect(page, 0)
        page.keyboard.press("Shift+Tab")  # the whole text is one stop
        assert page.evaluate("document.activeElement.closest('.text')") is None
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.querySelector('.text span')")
    with opened(shared.folder / PAGE, 390, touch=True) as page:
        page.locator(".text span").nth(7).tap()
        expect(page, 7)


@needs_browser
def test_nothing_of_the_text_runs_and_all_of_it_is_shown(shared):
    with opened(shared.folder / PAGE) as page:
        assert page.evaluate("window.hacked") is None
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 3
        document = page.locator(".document").first.text_content().replace("↵", "")
        document = document.replace("·", "")  # pieces of characters that are still to come
        text = document.removesuffix("<|endoftext|>")
        assert ATTACK in text
        assert "déjà vu €🙂" in text
        written = {file.read_text() for file in (shared.folder / "text").iterdir()}
        assert text in written
        assert ATTACK in page.locator(".samples pre b").first.text_content()


@needs_browser
def test_text_runs_its_own_way_without_control_characters_and_within_its_frame(shared):
    with opened(shared.folder / PAGE) as page:
        prompts = page.locator(".samples pre b")
        assert f"{HEBREW} \\x1b[31m{LONG}" in prompts.last.text_content()
        direction = "e => getComputedStyle(e.closest('pre')).direction"
        assert prompts.last.evaluate(direction) == "rtl"
        assert prompts.first.evaluate(direction) == "ltr"
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280


@needs_browser
def test_a_script_that_slipped_through_would_not_run(project):
    """The policy alone, with the escaping taken away."""
    path = project.folder / PAGE
    text = path.read_text().replace("<footer>", f"<footer><script>window.hacked=3</script>{ATTACK}")
    path.write_text(text)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(path.as_uri())
        page.locator(".chart svg").last.wait_for()
        assert page.evaluate("window.hacked") is None
        browser.close()


CONTRAST = """([front, back]) => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const luminance = layers => {
        canvas.clearRect(0, 0, 1, 1);
        for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(value =>
            value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const [low, high] = [luminance(back), luminance(front)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
}"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_screen_and_can_be_read(shared, width, scheme):
    with opened(shared.folder / PAGE, width, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for place in ("loss", "learning-rate", "gradient-norm", "positions", "calibration"):
            drawn = page.locator(f"#chart-{place} .mark-line path[d*=L]")
            assert drawn.count() == {"loss": 2, "calibration": 2}.get(place, 1)
            box = page.locator(f"#chart-{place} svg").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width

        def colour(selector, name):
            return page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{name}")

        paper = colour("body", "backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        pairs = [(colour(selector, "color"), [paper]) for selector in ("body", ".note", "nav a")]
        for level in range(1, 8):  # ink on each colour of the legend
            heat = colour(f".legend .q{level}", "backgroundColor")
            for under in (paper, colour(".text", "backgroundColor")):
                pairs.append((colour("body", "color"), [under, heat]))
        for front, back in pairs:  # WCAG 2.2, 1.4.3
            assert page.evaluate(CONTRAST, [[front], back]) >= 4.5, (front, back)


@needs_browser
def test_its_parts_have_names(shared):
    with opened(shared.folder / PAGE) as page:
        assert page.locator("h1").count() == page.locator("main").count() == 1
        for section in page.locator("main section").all():
            assert section.locator("h2").count() == 1
            assert section.get_attribute("aria-labelledby") is not None
        assert page.locator("table").count() == page.locator("table > caption").count() > 10
        assert page.locator("figure").count() == page.locator("figure > figcaption").count() > 5
        for link in page.locator("nav a").all():
            assert page.locator(link.get_attribute("href")).count() == 1
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))


def test_it_shows_the_figures_of_the_run_and_is_small(shared):
    text = shared.read(PAGE).decode()
    metrics = json.loads(shared.read("metrics/eval.json"))
    assert f"<dd>{metrics['loss_nats']:.4f}</dd>" in text
    assert f"{metrics['baseline_loss_nats']['bigram']:.4f}" in text
    provenance = json.loads(shared.read("models/model/provenance.json"))
    for sha256 in (*provenance["inputs"].values(), *provenance["code"].values()):
        assert sha256 in text
    assert "<td>as trained</td>" in text
    assert (shared.folder / PAGE).stat().st_size < 2e6
    assert "Predicted before the training" in text


def test_clocks_and_code_of_another_run_are_not_taken_for_its_own(project):
    curves = project.folder / "metrics" / "curves.csv"
    first, *rest = curves.read_text().splitlines(keepends=True)
    curves.write_text("".join([first, *rest[:-1]]))  # as DVC puts another run's in place
    code = project.folder / "lm" / "train" / "schedule.py"
    code.write_text(code.read_text() + "\n# edited\n")
    report(project)
    text = project.read(PAGE).decode()
    assert "No times: this run was not the last training on this machine" in text
    assert "Predicted before the training" not in text
    assert "changed since: lm/train/schedule.py" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics/eval.json", None, "metrics/eval.json: no such file; run `make repro`"),
        ("metrics/samples.json", "{", "metrics/samples.json: not valid JSON"),
        ("metrics/curves.csv", "a\nb\n", "metrics/curves.csv: not a table of numbers"),
        ("metrics/calibration.csv", "a\n1\n", "metrics/calibration.csv: not a table of numbers"),
        ("params.yaml", None, "params.yaml: no such file; run `make repro`"),
    ],
)
def test_what_is_missing_or_torn_is_one_line(project, name, content, message):
    path = project.folder / name
    path.unlink() if content is None else path.write_text(content)
    said = report(project, code=2)
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


@needs_browser
def test_two_runs_lie_beside_each_other(finished):
    finished.set("evaluate.temperatures", [0.5, 1.0])
    finished.set("evaluate.stride", 16)
    before = json.loads(finished.read("metrics/eval.json"))
    finished.prepare("evaluate")
    after = json.loads(finished.read("metrics/eval.json"))
    assert report(finished, "--compare", "HEAD") == "Report in metrics/report-compare.html\n"
    with opened(finished.folder / "metrics" / "report-compare.html") as page:
        assert page.locator("h1").inner_text() == "HEAD and workspace"
        settings = page.locator("#settings tbody tr").all_inner_texts()
        assert sorted(row.split("\t") for row in settings) == [
            ["evaluate.stride", "null", "16"],
            ["evaluate.temperatures", "[0.8, 0.0]", "[0.5, 1.0]"],
        ]
        row = page.locator("#results tr", has_text="nats per token").inner_text().split("\t")
        old, new = before["loss_nats"], after["loss_nats"]
        assert row[1:] == [f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}"]
        assert page.locator("#chart-loss .mark-line path[d*=L]").count() == 4
        labels = page.locator("#chart-loss .role-legend-label text").all_text_contents()
        assert labels == ["HEAD", "workspace", "training", "validation"]
        captions = page.locator(".samples figcaption").all_inner_texts()
        assert captions == [
            "Temperature 0, HEAD",
            "Temperature 0.5, workspace",
            "Temperature 0.8, HEAD",
            "Temperature 1, workspace",
        ]
    said = report(finished, "--compare", "nonsense", code=2)
    assert said.startswith("error: unknown Git revision 'nonsense'; ")
    shutil.rmtree(finished.folder / ".dvc" / "cache" / "files")
    said = report(finished, "--compare", "HEAD", code=2)
    assert said.startswith("error: HEAD: metrics/curves.csv: not in git or DVC's cache; ")
    assert said.count("\n") == 1
    assert Path(finished.folder, "metrics", "report-compare.html").exists()
