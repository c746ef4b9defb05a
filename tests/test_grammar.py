"""The stories against independent oracles: a naive parser, enumeration, sampling, compressors."""

import json
import math
import random
import re
import zlib
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from lm.base.files import sha256_file
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.corpus.grammar import STORIES, Grammar, stories, story
from lm.data.tokenizer import load_tokenizer
from lm.evaluate.baselines import Bigram
from lm.prepare.documents import split_documents
from lm.prepare.sources import DataConfig
from tests.project import ROOT, one_line, write_tokens

TINY = """
tale       = 2 A <who> came. <more> | 1 Nobody came.
who he     = 3 king he | 1 queen she
more       = 1 Soon {he} had a <pet>. <another> {He} loved the {pet}. | 3 The {who} left.
another    = 1 So had a <who>, a <pet>. | 2 It slept.
pet        = 4 dog | 1 cat | 2 lion
"""
WHO_HE_IS = """
tale       = 1 The <who> said that {he} was <kind>. {He} was! | 1 Oh <kind> day, <tale>
who he     = 3 king he | 1 queen she
kind       = 5 good | 2 very <kind> | 1 so very <kind>
"""


def derivations(grammar, text):
    """How many derivations a text has: every alternative is tried, nothing is looked ahead."""

    def ends(parts, offset, words):
        if not parts:
            yield offset, words
            return
        part, rest = parts[0], parts[1:]
        if part.startswith("<"):
            rule = grammar.rules[part[1:-1]]
            for inner, says in zip(rule.parts, rule.says, strict=True):
                for end, after in ends(inner, offset, words | says):
                    yield from ends(rest, end, words if rule.symbol in grammar.scoped else after)
        else:
            literal = words[part[1:-1]] if part.startswith("{") else part
            if text.startswith(literal, offset):
                yield from ends(rest, offset + len(literal), words)

    return sum(end == len(text) for end, _ in ends([f"<{grammar.root}>"], 0, {}))


def every_text(grammar):
    """All texts of a finite grammar with their probabilities, choice by choice."""
    todo, found = [()], []
    while todo:
        numbers, p, left = todo.pop(), 1.0, None
        given = iter(numbers)

        def choose(rule, given=given):
            nonlocal p, left
            number = next(given, None)
            if number is None:
                left = len(rule.p)
                raise LookupError
            p *= rule.p[number]
            return number

        try:
            found.append(("".join(grammar.pieces(choose)), p))
        except LookupError:
            todo += [(*numbers, number) for number in range(left)]
    return found


@pytest.mark.parametrize("scoped", [frozenset(), frozenset({"another"})])
def test_probabilities_of_all_texts_of_a_small_grammar_sum_to_one(scoped):
    grammar = Grammar(TINY, scoped)
    found = every_text(grammar)
    assert len({text for text, _ in found}) == len(found) == 1 + 2 * (1 + 3 * (1 + 2 * 3))
    assert sum(2 ** -grammar.bits(text) for text, _ in found) == pytest.approx(1, abs=1e-12)
    assert all(2 ** -grammar.bits(text) == pytest.approx(p) for text, p in found)
    entropy = -sum(p * math.log2(p) for _, p in found)
    assert grammar.entropy_bits() == pytest.approx(entropy, abs=1e-12)
    mean = sum(p * len(text) for text, p in found)
    assert grammar.mean_bytes() == pytest.approx(mean, abs=1e-12)
    assert grammar.bits_per_byte() == pytest.approx(entropy / mean)


def test_what_is_said_in_a_scope_is_forgotten_at_its_end():
    told = "A king came. Soon he had a dog. So had a queen, a lion. "
    inside, outside = told + "She loved the lion.", told + "He loved the dog."
    assert Grammar(TINY).bits(inside) == Grammar(TINY, frozenset({"another"})).bits(outside)
    with pytest.raises(ValueError, match=r"^offset 56: expected 'She', found 'He loved the dog.'"):
        Grammar(TINY).bits(outside)


def test_entropy_of_an_endless_grammar_is_the_one_worked_out_by_hand():
    """kind ends after k steps with probability (3/8)^k 5/8; tale adds one `kind` a time."""
    grammar = Grammar(WHO_HE_IS)
    h = -sum(p * math.log2(p) for p in (5 / 8, 2 / 8, 1 / 8)) / (5 / 8)
    who = -sum(p * math.log2(p) for p in (3 / 4, 1 / 4))
    assert grammar.entropy_bits() == pytest.approx(2 * (1 + h) + who)
    kind = 4 + (2 * 5 + 1 * 8) / 5  # "good", and "very " or "so very " before it
    he = 3 / 4 * 2 + 1 / 4 * 3
    once = len("The  said that  was . ") + len(" was!") + 3 / 4 * 4 + 1 / 4 * 5 + 2 * he + kind
    assert grammar.mean_bytes() == pytest.approx(once + len("Oh  day, ") + kind)


@pytest.mark.parametrize(
    "alternatives", ["1 a <b> | 1 a cat", "1 <b> | 1 x", "1 dog | 1 dogs", "1 {b} x | 2 y"]
)
def test_a_choice_that_the_first_words_do_not_tell_is_refused(alternatives):
    with pytest.raises(AssertionError):
        Grammar(f"a = 1 Oh <b> <c>\nc = {alternatives}\nb = 1 u | 1 v\n")


def test_the_parser_of_the_tests_counts_the_derivations_of_an_ambiguous_text():
    grammar = Grammar("a = 1 <b> <b>\nb = 1 x | 1 y\n")
    grammar.rules["b"].parts[:] = [["x"], ["x"]]
    assert derivations(grammar, "x x") == 4
    assert derivations(grammar, "x y") == 0


def test_no_story_has_two_derivations():
    for number in range(60):
        assert derivations(STORIES, story(3, number)) == 1


def test_bits_are_those_of_the_choices_that_were_made():
    draws = random.Random(1)
    for _ in range(100):
        taken = []

        def choose(rule, taken=taken):
            (number,) = draws.choices(range(len(rule.p)), rule.p)
            taken.append(rule.p[number])
            return number

        text = "".join(STORIES.pieces(choose))
        assert STORIES.bits(text) == pytest.approx(-math.log2(math.prod(taken)), rel=1e-12)


def test_every_alternative_can_be_taken_anywhere():
    """Rare ones too: no word comes back before it was said."""
    draws, taken = random.Random(2), set()
    for _ in range(500):

        def choose(rule):
            number = draws.randrange(len(rule.p))
            taken.add((rule.symbol, number))
            return number

        text = "".join(STORIES.pieces(choose))
        assert STORIES.bits(text) > 0
    assert taken == {(s, n) for s, rule in STORIES.rules.items() for n in range(len(rule.p))}


def test_entropy_and_length_are_the_means_of_many_stories():
    texts = list(islice(stories(5, 10**9), 1000))
    for values, expected in (
        ([STORIES.bits(text) for text in texts], STORIES.entropy_bits()),
        ([len(text.encode()) for text in texts], STORIES.mean_bytes()),
    ):
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(len(texts))
    assert 0.25 < STORIES.bits_per_byte() < 0.8
    assert 200 < STORIES.mean_bytes() < 600


def test_a_story_is_a_function_of_seed_and_number():
    first = list(stories(7, 20_000))
    assert first == [story(7, number) for number in range(len(first))]
    assert sum(map(len, first[:-1])) < 20_000 <= sum(map(len, first))
    assert list(stories(7, 10_000)) == first[: len(list(stories(7, 10_000)))]
    assert not set(first) & set(stories(8, 20_000))


def test_two_stories_of_millions_are_not_the_same_by_chance():
    """P(two are the same) = Z(root), Z(A) = sum p^2 prod Z(B): the least solution, by iteration."""
    same = dict.fromkeys(STORIES.rules, 0.0)
    for _ in range(200):
        same = {
            symbol: sum(
                p**2 * math.prod(same[part[1:-1]] for part in parts if part[0] == "<")
                for p, parts in zip(rule.p, rule.parts, strict=True)
            )
            for symbol, rule in STORIES.rules.items()
        }
    assert (10**7) ** 2 / 2 * same[STORIES.root] < 1e-4


def test_stories_are_good_english_as_far_as_a_pattern_can_tell():
    girls = {s["hero"] for s in STORIES.rules["hero"].says if s["he"] == "she"}
    for text in islice(stories(9, 10**9), 300):
        words = set(re.findall(r"\w+", text))
        (hero,) = words & {s["hero"] for s in STORIES.rules["hero"].says}
        wrong = {"he", "him", "his"} if hero in girls else {"she", "her"}
        assert not {word.lower() for word in words} & wrong, text
        assert text.startswith("Once ")
        assert text.isascii()
        assert not re.search(r"\b[Aa] [aeiou]|  |[<>{}/|]| [.,]|[.!?] [a-z]", text), text
        for line in text.split("\n"):
            assert re.fullmatch(r"""[A-Z].*[.!]"?""", line), line


def test_a_text_outside_of_the_grammar_is_refused_at_its_offset():
    text = story(0, 0)
    assert text.startswith("Once ")
    name = re.search(r"\b(?:[A-Z]\w+)\b(?=.* (?:his|her) )", text[5:]).group()
    with pytest.raises(ValueError, match="^offset 0: expected 'Once ', found 'Twice "):
        STORIES.bits(text.replace("Once", "Twice"))
    with pytest.raises(ValueError, match=f"^offset {len(text)}: the text goes on after its end"):
        STORIES.bits(text + " ")
    with pytest.raises(ValueError, match=rf"^offset {text.index(name)}: no <hero>: 'Nemo"):
        STORIES.bits(text.replace(name, "Nemo"))
    again = text.rindex(name)
    assert again > text.index(name)
    with pytest.raises(ValueError, match=rf"^offset {again}: expected '{name}', found 'Nemo"):
        STORIES.bits(text[:again] + "Nemo" + text[again + len(name) :])
    for cut in (0, 3, 100, len(text) - 1):
        with pytest.raises(ValueError, match="^offset "):
            STORIES.bits(text[:cut])
    with pytest.raises(ValueError, match="^offset "):
        STORIES.bits(text[: text.index("had a ") + 6] + "very " * 100_000)


def test_neither_a_compressor_nor_a_bigram_comes_below_the_entropy():
    texts = list(stories(2, 200_000))
    bits = sum(map(STORIES.bits, texts))
    data = "".join(texts).encode()
    assert len(zlib.compress(data, 9)) * 8 > 1.2 * bits
    ids = np.frombuffer(data, dtype=np.uint8)
    _, bigram = Bigram(ids, 256).losses_nats(ids)  # on the text it was counted on
    assert bigram * (len(ids) - 1) / math.log(2) > 2 * bits


@pytest.fixture
def grammar_project(project):
    """A project of presets/smoke.yaml whose text is stories."""
    project.set("corpus.source", "grammar")
    project.set("data.path", "data/raw")
    project.set("corpus.grammar_bytes", 30_000)
    project.set("data.valid_fraction", 0.1)
    return project


def texts_of(project, wanted):
    """The documents of one split, read from data/raw."""
    config = read_section(DataConfig, project.params, "data")
    config = replace(config, path=str(project.folder / config.path))
    return [d.text for split, d in split_documents(config, Counter()) if split == wanted]


def test_the_sources_of_the_default_corpus_take_turns(grammar_project):
    project, raw = grammar_project, grammar_project.folder / "data" / "raw"
    project.prepare("corpus")
    (entry,) = json.loads(project.read("data/corpus.json"))
    lines = project.read("data/raw/grammar.jsonl").decode().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert texts == list(stories(0, 30_000))
    assert entry["documents"] == len(texts)
    assert entry["bytes"] == sum(len(text) for text in texts)
    assert entry["bits_per_byte"] == pytest.approx(STORIES.bits_per_byte(), abs=1e-6)
    assert project.read("data/licenses.txt") == b""
    assert project.stage("corpus", "corpus.source=packages").returncode == 0
    assert list(raw.iterdir()) == []
    project.prepare("corpus")
    assert [file.name for file in raw.iterdir()] == ["grammar.jsonl"]
    (raw / "mine.txt").write_text("precious")
    assert "data/raw/mine.txt: not written by this stage" in one_line(project.stage("corpus"))


def test_evaluation_tells_how_far_the_floor_is(grammar_project):
    project = grammar_project
    project.prepare("corpus", "tokenizer", "tokens", "train", "evaluate")
    metrics = json.loads(project.read("metrics/eval.json"))
    texts = texts_of(project, "valid")
    assert len(texts) > 2
    n_bytes = sum(map(len, texts)) - metrics["bytes"]
    assert 0 < n_bytes <= len("Once")  # the first token of the split is no target
    floor = sum(map(STORIES.bits, texts)) / metrics["bytes"]
    assert metrics["floor_bits_per_byte"] == pytest.approx(floor, rel=1e-12)
    assert metrics["distance_to_floor"] == pytest.approx(metrics["bits_per_byte"] / floor - 1)
    assert metrics["distance_to_floor"] > 0.1
    (row,) = [s for s in project.read("metrics/summary.md").decode().splitlines() if "entropy" in s]
    nats = floor * metrics["bytes"] * math.log(2) / metrics["tokens"]
    assert row.split("|")[1:-1] == [
        " entropy of the grammar ",
        f"{nats:>15.4f} ",
        f"{math.exp(nats):>11.1f} ",
        f"{floor:>14.4f} ",
    ]
    other = project.folder / "data" / "raw" / "other"  # what is of no grammar has no floor
    (project.folder / "text").rename(other)
    project.set("data.path", "data/raw/other")
    project.prepare("tokens")
    result = project.stage("evaluate")
    assert result.returncode == 2
    assert one_line(result).startswith(
        "error: data/tokens: document 1 of the validation split is not of the grammar (offset 0: "
    )


def test_a_model_that_knows_the_validation_text_is_told_from_a_good_one(grammar_project):
    project = grammar_project
    project.prepare("corpus", "tokenizer")
    texts = texts_of(project, "valid")[:2]
    folder = project.folder / "data"
    leaked = [(split, text) for split in ("train", "valid") for text in texts]
    tokenizer = load_tokenizer(folder / "tokenizer")
    write_tokens(
        folder / "tokens", leaked, tokenizer, sha256_file(folder / "tokenizer/tokenizer.json")
    )
    for key, value in {"max_steps": 150, "eval_interval": 150, "batch_size": 8}.items():
        project.set(f"train.{key}", value)
    project.prepare("train")
    result = project.stage("evaluate")
    assert result.returncode == 2
    assert re.search(
        r"^error: models/model: 0\.\d{4} bits per byte are below the entropy of the held-out text, "
        r"0\.\d{4}: the model has seen this text in training, or there is a bug$",
        one_line(result),
    )
    assert not (project.folder / "metrics" / "eval.json").exists()


@pytest.mark.soak
def test_a_small_model_comes_within_three_percent_of_the_entropy(project):
    """presets/grammar.yaml as it stands: about twelve minutes on two idle cores."""
    project.params = load_params(ROOT / "presets" / "grammar.yaml")
    project.set("runtime.device", "cpu")
    for stage in ("corpus", "tokenizer", "tokens", "train", "evaluate"):
        process = project.start("python", "-m", f"stages.{stage}", OMP_NUM_THREADS="2")
        _, error = process.communicate()
        assert process.returncode == 0, error
    metrics = json.loads(project.read("metrics/eval.json"))
    assert 0 < metrics["distance_to_floor"] < 0.03
