"""Settings: every wrong value is one line that names the key; YAML is read as DVC writes it."""

import math
import re

import pytest
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import dumps_yaml, loads_yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from ruamel.yaml import YAMLError

from lm.base.errors import InputError
from lm.base.params import load_params, parse_yaml
from lm.base.sections import read_section
from lm.base.settings import TrainSection
from lm.model.transformer import ModelConfig
from lm.prepare.sources import DataConfig, SourceConfig
from tests.project import ROOT, SMOKE
from tools.settings import KINDS


def read_all(params):
    params["model"].setdefault("vocab_size", 512)
    return {name: read_section(kind, params, name) for name, kind in KINDS.items()}


@pytest.mark.parametrize(
    "file", [ROOT / "params.yaml", *(ROOT / "presets").glob("*.yaml")], ids=str
)
def test_shipped_settings_are_complete(file):
    assert set(read_all(load_params(file))) == set(KINDS)


def test_an_unknown_key_names_the_nearest(smoke_params):
    smoke_params["train"]["warmup_step"] = 3
    with pytest.raises(InputError, match=r"unknown key train.warmup_step \(did you mean train.war"):
        read_section(TrainSection, smoke_params, "train")
    with pytest.raises(InputError, match=r"unknown key train.lrr \(did you mean train.lr\?\)"):
        load_params(SMOKE, ["train.lrr=1"])
    with pytest.raises(InputError, match="expected section.key=value"):
        load_params(SMOKE, ["lr=1"])


SOURCES = "data:\n  sources:\n    web:\n      path: a\n      weight: 1.0\n"


def test_a_key_within_a_key_is_overridden(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(SOURCES)
    changes = ["data.sources.web.weight=2", "data.sources.web.path=b"]
    got = load_params(file, changes)
    assert got == {"data": {"sources": {"web": {"path": "b", "weight": 2}}}}
    apply_overrides(file, changes)
    assert load_params(file) == got  # as DVC does it
    whole = load_params(file, ["data.sources={books: {path: c}}", "data.sources.books.path=d"])
    assert whole["data"]["sources"] == {"books": {"path": "d"}}
    assert load_params(file, ["data.sources=null"]) == {"data": {"sources": None}}
    for unknown, nearest in (
        ("data.sources.web.wieght=2", "data.sources.web.weight"),
        ("data.sources.wbe.weight=2", "data.sources.web.weight"),
    ):
        with pytest.raises(InputError, match=rf"unknown key .*did you mean {nearest}\?"):
            load_params(file, [unknown])
    with pytest.raises(InputError, match=r"unknown key data.sources.web.path.name"):
        load_params(file, ["data.sources.web.path.name=2"])


def test_a_mapping_of_settings_is_built_and_checked(smoke_params):
    source = {"path": "web", "text_field": "text", "weight": 2}
    smoke_params["data"]["sources"] = {"web": source}
    config = read_section(DataConfig, smoke_params, "data")
    assert config.sources == {"web": SourceConfig("web", "text", 2.0)}
    assert type(config.sources["web"].weight) is float
    smoke_params["data"]["sources"]["books"] = {**source, "weight": "2"}
    with pytest.raises(InputError, match="data.sources.books.weight = '2' is text, wanted a numb"):
        read_section(DataConfig, smoke_params, "data")


@pytest.mark.parametrize(
    ("key", "value", "wrong"),
    [
        ("lr", math.nan, "train.lr = nan: must be finite"),
        ("lr", 10**400, "train.lr = inf: must be finite"),
        ("lr", True, "train.lr = True is a boolean, wanted a number"),
        ("seed", 1.0, "train.seed = 1.0 is a decimal, wanted an integer"),
        ("compile", 1, "train.compile = 1: must be one of auto, true, false"),
        ("micro_batch_size", 0, "train.micro_batch_size = 0: must be >= 1"),
    ],
)
def test_a_value_is_of_its_type_and_within_its_bounds(smoke_params, key, value, wrong):
    smoke_params["train"][key] = value
    with pytest.raises(InputError, match=re.escape(wrong)):
        read_section(TrainSection, smoke_params, "train")


def test_a_missing_key_or_section_is_named(smoke_params):
    del smoke_params["model"]["num_layers"]
    smoke_params["model"]["vocab_size"] = 10
    with pytest.raises(InputError, match=r"missing key model.num_layers"):
        read_section(ModelConfig, smoke_params, "model")
    del smoke_params["model"]
    with pytest.raises(InputError, match="missing section model"):
        read_section(ModelConfig, smoke_params, "model")


def test_a_derived_value_is_no_setting(smoke_params):
    derived = read_section(ModelConfig, smoke_params, "model", vocab_size=10)
    assert derived.vocab_size == 10
    smoke_params["model"]["vocab_size"] = 7
    with pytest.raises(InputError, match="unknown key model.vocab_size: it is derived"):
        read_section(ModelConfig, smoke_params, "model", vocab_size=10)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("2e-05", 2e-5), ("1E3", 1e3), (".5", 0.5), ("5.", 5.0), ("-7", -7),
     ("yes", "yes"), ("off", "off"), ("~", None), ("", None), ("null", None), ("True", True),
     ("-.inf", -math.inf), ("12:30", "12:30"), ("+3", 3), ("0", 0), ("0.5", 0.5), (".", "."),
     ("_1", "_1"), ("1\u0661", "1\u0661"), ("2026-01", "2026-01"), ("<<", "<<"), ("=", "="),
     ("'0777'", "0777")],
)  # fmt: skip
def test_scalars_are_read_as_yaml_1_2(text, value):
    got = parse_yaml(text, "here")
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "text", ["0777", "00", "-01", "01.5", "1_000", "0x1F", "0o17", "0b1", "2026-01-01", "9" * 101]
)
def test_numbers_that_readers_differ_about_are_refused(text):
    with pytest.raises(InputError, match="is ambiguous; write a plain decimal number, or quote it"):
        parse_yaml(text, "here")


LOOKALIKES = st.from_regex(  # text that could be taken for a number, a date, null or a boolean
    r"[-+]?[0-9_]{0,3}\.?[0-9_]{0,3}([eE][-+]?[0-9]{1,2})?|[-+]?0[box]?[0-9a-fA-F_]{1,3}"
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ][0-9]{1,2}:[0-9]{2}:[0-9]{2})?"
    r"|[-+]?\.?(inf|Inf|nan|NaN)|[nN](ull|ULL|o)?|~|[tT]rue|TRUE|[yY]es|on|<<|=",
    fullmatch=True,
)
VALUES = st.one_of(
    st.floats(),
    st.integers(),
    st.booleans(),
    st.none(),
    LOOKALIKES,
    st.text(st.characters(codec="utf-8")),
)


@given(VALUES)
def test_what_dvc_writes_is_read_back(value):
    """The dumper with which `dvc exp run -S` rewrites params.yaml; repr tells 1 from 1.0, True."""
    assume(value != value or loads_yaml(dumps_yaml([value])) == [value])  # it loses U+0085 itself
    got = parse_yaml(dumps_yaml({"key": value, "list": [value]}), "here")
    assert repr(got) == repr({"key": value, "list": [value]})


@given(LOOKALIKES)
def test_what_a_hand_writes_is_read_as_dvc_means_it_or_refused(text):
    """Otherwise DVC would watch another data.path than the one that is read."""
    try:
        got = parse_yaml(f"key: {text}", "here")
        meant = loads_yaml(f"key: {text}")
    except (InputError, YAMLError, ValueError):
        return
    assert repr(got) == repr(meant)


ALIKE = [  # what both read, whatever it looks like in YAML
    '"<|endoftext|>"', "'a b'", "a b", "", "1e-3", "1E3", ".5", "+3", "-1", "null", "Null", "True",
    "yes", "None", "[]", "[a,'1']", "[a, 2, null]", "['a,b']", "{}", "{web: {path: a}}", r"\n\n",
    r"'\n'", '"a: b"', "a: b", "- a", "|", "*", "**/*.py", "%x", "@x", "?", "a:b", "../x", "a/b.c",
    r'"a\"b"', " 3 ", "$x", "1" * 20,
]  # fmt: skip


@pytest.mark.parametrize("text", ALIKE)
def test_an_override_means_the_same_to_dvc_and_to_a_stage(tmp_path, text):
    file = tmp_path / "params.yaml"
    file.write_text("train:\n  lr: 1.0e-5\n")
    ours = load_params(file, [f"train.lr={text}"])
    apply_overrides(file, [f"train.lr={text}"])
    assert repr(ours) == repr(load_params(file))


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-5", 2e-5), ("1e3", 1e3), ("7", 7), ("true", True), ("null", None), ("yes", "yes"),
     ("0777", "0777"), ("2026-01-01", "2026-01-01"), ("'1e-3'", "1e-3"), ("[a,'1']", ["a", "1"])],
)  # fmt: skip
def test_an_override_given_to_dvc_is_read_as_it_was_meant(tmp_path, text, value):
    file = tmp_path / "params.yaml"
    file.write_text("# a comment\ntrain:\n  lr: 1.0e-5\n")
    apply_overrides(file, [f"train.lr={text}"])
    got = load_params(file)["train"]["lr"]
    assert got == value
    assert type(got) is type(value)
