"""What the documents say can be typed, followed and read: commands, options, settings, links."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from textwrap import indent

import pytest

from lm.base.params import SECTIONS, load_params
from tests.kill import copied
from tests.project import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
}
MAKEFILE = (ROOT / "Makefile").read_text()
HISTORY = {"CHANGELOG.md", "docs/LOG.md"}  # tell of what was there


def with_indented_commands(text):
    """A page with its blocks of a shell, or of no language, as indented lines."""

    def indented(block):
        return indent(block[2], "    ") if block[1] in ("", "sh", "bash", "console") else block[0]

    return re.sub(r"^```(\w*)\n(.*?)^```$", indented, text, flags=re.M | re.S)


CURRENT = {
    name: with_indented_commands(text) for name, text in PAGES.items() if name not in HISTORY
}
# processes that others start, which nobody types
INTERNAL = {
    "benchmarks.gpu.equality",
    "benchmarks.gpu.parts",
    "benchmarks.saver",
    "benchmarks.worker",
    "lm.prepare.foreign",
}
# not run here: what has tests of its own, takes experiments to work on, or goes on for ever
ELSEWHERE = {
    "lm.demo",
    "lm.serve",
    "tools.experiments.ablations",
    "tools.experiments.compare",
    "tools.experiments.sweep",
}


def code(text):
    """A page with every inline code span on one line, so that a command is found in one piece."""
    text = re.sub(r"^```\w*$", "", text, flags=re.M).replace("\\\n", " ")
    return re.sub(r"`[^`]*`", lambda span: " ".join(span[0].split()), text)


def prose(text):
    """A page without code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^    .*$", "", text, flags=re.M))


def commands():
    """(where, module, arguments) of every `python -m` of this project, in pages and Makefile."""
    for where, text in [*CURRENT.items(), ("Makefile", MAKEFILE)]:
        found = re.findall(
            r"python -m ((?:lm|stages|tools|benchmarks|tests)\.[\w.]*\w)([^`|\n#]*)", code(text)
        )
        yield from ((where, module, arguments) for module, arguments in found)


def with_command_line(*packages):
    """The modules of some packages that can be started."""
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__main__":
                yield ".".join(parts[:-1])
            elif "\nif __name__ ==" in path.read_text():
                yield ".".join(parts)


def imported_by(module):
    """The modules that a program imports from, and those of the module whose main it calls."""
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = {name.name for name in node.names}
            if isinstance(node, ast.Import):
                found |= names
            else:
                found |= {node.module} | (imported_by(node.module) if "main" in names else set())
    return found


class Asked(BaseException):
    """Carries a parser out of a program that was about to read its command line."""


def options_of(module, monkeypatch):
    """What the real parser of a program knows; nothing if the program has none."""
    if not imported_by(module) & {"argparse", "stages.run"}:
        return set()

    def ask(parser, *arguments, **more):
        raise Asked(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", ask)
        patch.setattr(sys, "argv", [module])
        with pytest.raises(Asked) as asked:
            runpy.run_module(module, run_name="__main__")
    return set(asked.value.args[0]._option_string_actions)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("module", sorted({module for _, module, _ in commands()}))
def test_a_documented_command_exists_and_knows_its_options(module, monkeypatch):
    assert module in with_command_line("lm", "stages", "tools", "benchmarks", "tests")
    known = options_of(module, monkeypatch)
    for where, name, arguments in commands():
        if name == module:
            given = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*|-[A-Z])(?![\w-])", arguments))
            assert given <= known, (where, arguments)


def test_every_command_line_is_documented():
    text = "".join([*PAGES.values(), MAKEFILE])  # whose targets are documented, see below
    for module in with_command_line("lm", "stages", "tools", "benchmarks"):
        if module not in INTERNAL:
            assert re.search(rf"\b{module}\b", text), module


def test_every_make_target_is_documented_and_every_documented_one_exists():
    targets = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.M))
    variables = set(re.findall(r"\b([A-Z]+) \?=|\$\(([A-Z]+)\)", MAKEFILE))
    variables = {name for pair in variables for name in pair if name}
    named = set()
    for where, text in [*CURRENT.items(), ("Makefile", MAKEFILE.replace("#", "    "))]:
        for line in re.findall(r"(?:`|^ {4,}(?:\$ )?|: )(make [a-z][^`\n#]*)", code(text), re.M):
            target, *given = line.split()[1:]
            if where != "Makefile" or target in targets:  # its comments are prose as well
                assert target in targets, (where, line)
            named.add(target)
            names = {word.partition("=")[0] for word in given if re.match(r"[A-Z]+=", word)}
            assert names <= variables, (where, line)
    assert targets <= named, targets - named


def test_every_setting_that_is_given_a_value_exists():
    settings = load_params(ROOT / "params.yaml")
    given = rf"\b({'|'.join(SECTIONS)})\.(\w+)(?:\.[\w.]+)?="
    found = [(where, *m) for where, text in CURRENT.items() for m in re.findall(given, text)]
    assert found
    for where, section, key in found:
        assert key in settings[section], (where, section, key)


def test_every_preset_and_path_that_is_named_exists():
    made = {"presets/NAME.yaml", "benchmarks/tasks/validation.jsonl"}  # by who follows the page
    file = r"(?:presets|lm|stages|tools|benchmarks|tests|docs)/(?:[\w-]+/)*\w[\w-]*\.\w+"
    for where, text in [*CURRENT.items(), ("Makefile", MAKEFILE)]:
        for name in set(re.findall(rf"(?<![\w/]){file}", text)) - made:
            assert (ROOT / name).exists(), (where, name)


def anchors(text):
    """The names of a page's headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M
    ):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (slug := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(slug)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        if re.match(r"[a-z]+:", link):  # another site: no test of ours depends on it
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_readme_is_read_to_its_end():
    assert PAGES["README.md"].count("\n") <= 150


@pytest.mark.parametrize("page", [page for page in CURRENT if page.startswith("docs/")])
def test_a_page_begins_with_whom_it_is_for(page):
    title, _, text = PAGES[page].partition("\n\n")
    first = " ".join(re.split(r"[.:]\s", text)[0].split())
    assert title.startswith("# ")
    assert re.match(r"For |.* (is|are) for ", first), first


def test_the_entrance_leads_to_every_page():
    links = set(re.findall(r"\]\((\w+\.md)[)#]", PAGES["docs/index.md"]))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert pages - {"index.md"} <= links


def shortened(argument):
    """An argument for a project of 20 steps."""
    argument = re.sub(r"^train.max_steps=\d+$", "train.max_steps=24", argument)
    return re.sub(r"^100$", "10", argument)


def runnable():
    """The commands on lines of their own that need no more than a trained project."""
    found = set()
    for text in CURRENT.values():
        for line in re.findall(r"^ {4,}(?:\$ )?python -m ((?:lm|stages)\.\w+[^\n]*)", text, re.M):
            module, *arguments = shlex.split(line, comments=True)
            typed = not re.search(r"\.\.\.|\b[A-Z]{2,}\b|/data\b|[<>|&;$]", " ".join(arguments))
            if module not in ELSEWHERE and typed:
                found.add((module, *map(shortened, arguments)))
    return sorted(found)


def test_the_pages_have_commands_to_run():
    assert len(runnable()) > 12


@pytest.mark.parametrize("command", runnable(), ids=" ".join)
def test_a_quick_command_runs_in_a_trained_project(command, baseline, tmp_path):
    project = copied(baseline, tmp_path / "project")
    (project.folder / "presets").symlink_to(ROOT / "presets")
    done = project.warm(*command)
    assert done["status"] == 0, done["err"]
    assert done["out"]


# --- the tour, the architecture ---------------------------------------------------------


def names_in(path):
    """Everything that a file names: functions, classes, arguments, attributes, constants."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("name", "attr", "id", "arg"):
            if isinstance(name := getattr(node, field, None), str):
                found.add(name)
    return found


def defined_in(body, prefix=""):
    """The functions, classes and variables that statements define, members as Class.member."""
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= defined_in(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (name for target in targets for name in ast.walk(target))
            found |= {prefix + name.id for name in names if isinstance(name, ast.Name)}
    return found


def without_blocks(page):
    """A page without its blocks of code, on one line."""
    return " ".join(re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S).split())


@pytest.mark.parametrize("page", CURRENT)
def test_what_a_page_cites_with_its_file_is_defined_there(page):
    """`name` (`file.py`), or `name` and `other` (`file.py`)."""
    one = r"`[A-Za-z_][\w.]*`"
    file = r"(?:lm|stages|tools|benchmarks|tests)/[\w/]+\.py"
    cited = re.findall(rf"((?:{one}(?:, | and ))*{one}) \(`({file})`\)", without_blocks(page))
    assert len(cited) > 15 or page not in ("docs/TOUR.md", "docs/ARCHITECTURE.md")
    for names, path in cited:
        defined = defined_in(ast.parse((ROOT / path).read_text()).body)
        assert set(re.findall(r"`([\w.]+)`", names)) <= defined, (names, path)


@pytest.mark.parametrize("page", ["docs/TOUR.md", "docs/ARCHITECTURE.md"])
def test_what_a_page_names_is_there(page):
    text = without_blocks(page)
    files = [f for folder in ("lm", "stages", "tools") for f in (ROOT / folder).rglob("*.py")]
    everything = set().union(*map(names_in, files))
    settings = {
        f"{s}.{key}" for s, keys in load_params(ROOT / "params.yaml").items() for key in keys
    }
    for span in re.findall(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)", text):
        known = span in settings or set(span.split(".")) <= everything or (ROOT / span).exists()
        assert known or span in SECTIONS, span
    for folder in re.findall(r"`((?:lm|stages|tools|tests|presets)/[\w/]*)`", text):
        assert (ROOT / folder).is_dir(), folder


def snippets():
    """(program, output) of each Python block of the tour with the text block behind it."""
    pattern = r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$"
    return re.findall(pattern, PAGES["docs/TOUR.md"], re.M | re.S)


NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.parametrize("number", range(len(snippets())))
def test_a_snippet_of_the_tour_prints_what_the_tour_says(number, capsys, monkeypatch, tmp_path):
    """Word for word; decimals to a unit of their last place, since CPUs round differently."""
    monkeypatch.chdir(tmp_path)
    program, expected = snippets()[number]
    exec(program, {})
    printed = capsys.readouterr().out
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", expected)
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
        unit = 10.0 ** -len(theirs.partition(".")[2])
        assert float(ours) == pytest.approx(float(theirs), abs=1.01 * unit)


def test_every_program_of_the_tour_is_tried():
    assert PAGES["docs/TOUR.md"].count("```python") == len(snippets()) > 5
