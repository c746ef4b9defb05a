"""Export and its reverse against transformers: logits, ids, generated text; what is refused."""

import copy
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lm.base.errors import InputError
from lm.base.files import write_json
from lm.base.sections import read_section
from lm.data.tokenizer import byte_tokenizer, load_tokenizer
from lm.evaluate.samples import Sample, samples_as_markdown
from lm.export.agreement import compared
from lm.export.card import MARK, ExportConfig, aligned, card
from lm.export.curve import loss_curve
from lm.export.folder import export, main, write
from lm.generate.stream import generate
from lm.model import huggingface
from lm.model.huggingface import start_from, stock_config, stock_weights
from lm.model.model_folder import load_model, save_model
from lm.model.safetensors_file import write_safetensors
from lm.model.transformer import TransformerLM
from lm.prepare.learn import train_bpe
from tests.kill import copied, dvc, ran
from tests.project import ROOT, one_line
from tests.test_model import variant_model

CPU = torch.device("cpu")
TEXTS = ["def f(x):\n    return x", "It's 12  o'clock\n", "naïve 東京 🙂\0", "a <|endoftext|> b"]
NO_LICENSE = ExportConfig(license=None)
PROVENANCE = {
    "model": {"vocab_size": 300, "context_length": 16, "num_layers": 2, "d_model": 32},
    "train": {"max_steps": 3, "init_from": None},
    "inputs": {"data/tokens/tokens.json": "0123"},
    "code": {},
    "environment": {"python": "3.11"},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["some words, some more words " * 20, *TEXTS[:3]], 300)


@pytest.fixture
def saved(model_config, tokenizer, tmp_path):
    """Saves a model with some changes as stage train does; gives it and the folder."""

    def save(tokenizer=tokenizer, **changes):
        vocab_size = {"vocab_size": tokenizer.vocab_size}
        model = variant_model(model_config, vocab_size | changes)
        save_model(model, tokenizer, tmp_path / "model")
        write_json(tmp_path / "model" / "provenance.json", PROVENANCE)
        return model, tmp_path / "model"

    return save


def exported(source, out):
    write(export(source, NO_LICENSE, None), out)
    theirs = AutoModelForCausalLM.from_pretrained(out, local_files_only=True).eval()
    return theirs, AutoTokenizer.from_pretrained(out, local_files_only=True)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_transformers_and_the_way_back_give_our_logits(saved, tmp_path, qk_norm, kv_heads, tied):
    more = {"rope_theta": 500.0, "norm_eps": 1e-3, "dropout": 0.1}
    ours, folder = saved(
        num_heads=4, num_kv_heads=kv_heads, qk_norm=qk_norm, tie_embeddings=tied, **more
    )
    theirs, _ = exported(folder, tmp_path / "out")
    assert type(theirs) is (Qwen3ForCausalLM if qk_norm else LlamaForCausalLM)
    ids = torch.randint(300, (3, 16))
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)
    again = TransformerLM(ours.config).eval()
    start_from(tmp_path / "out", again, load_tokenizer(folder))
    assert torch.equal(again(ids), ours(ids))
    assert theirs.num_parameters() == ours.num_parameters()


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_ids_and_greedy_text_are_the_same(saved, tmp_path, tokenizer, kind):
    tokenizer = byte_tokenizer() if kind == "bytes" else tokenizer
    ours, folder = saved(tokenizer)
    theirs, their_tokenizer = exported(folder, tmp_path / "out")
    assert their_tokenizer(TEXTS).input_ids == [tokenizer.encode(text) for text in TEXTS]
    assert their_tokenizer.decode(tokenizer.encode(TEXTS[2])) == TEXTS[2]
    assert their_tokenizer.eos_token_id == tokenizer.end_id
    assert len(their_tokenizer) == tokenizer.vocab_size
    prompt = their_tokenizer("some", return_tensors="pt")
    n = prompt.input_ids.shape[1]
    said = theirs.generate(**prompt, max_new_tokens=16 - n, do_sample=False)[0].tolist()
    steps = generate(ours, [said[:n]], 16 - n, temperature=0, end_id=tokenizer.end_id)
    assert said == said[:n] + [step[0].id for step in steps]
    assert len(said) > n + 2
    both = their_tokenizer(["some", "somewhat longer"], padding=True, return_tensors="pt")
    padded = theirs.generate(**both, max_new_tokens=2, do_sample=False)[0].tolist()
    assert padded[padded.index(said[0]) :][: n + 2] == said[: n + 2]


def test_samples_that_run_from_right_to_left_are_framed_and_others_left_as_they_are():
    latin = samples_as_markdown([Sample("a", 1.0, "b\n\nc\r# d")])
    hebrew = samples_as_markdown([Sample("שלום", 1.0, " עולם\n\nb")])
    assert latin == "Prompt `a`, temperature 1:\n\n    ab\n\n    c\\r# d\n\n"
    assert aligned(latin) == latin
    framed = '<div dir="auto">\n\n    שלום עולם\n\n    b\n\n</div>\n\n'
    assert aligned(latin + hebrew) == latin + "Prompt `שלום`, temperature 1:\n\n" + framed


def test_the_card_names_the_licence_of_the_model_and_what_else_may_bind():
    provenance = PROVENANCE | {"train": {"init_from": "small"}}
    end = card(provenance, "0", "<end>", "mit", None, None).partition("## Licence\n\n")[2]
    assert end.startswith("`mit`. The text that the model was trained on may have a licence")
    assert end.endswith("\n\nThe licence of `small`, whose weights it continues, holds too.\n")


def test_the_bytes_depend_on_the_model_alone(saved, tmp_path):
    _, folder = saved()
    contents = []
    for out in (tmp_path / "a", tmp_path / "another folder" / "b"):
        write(export(folder, NO_LICENSE, None), out)
        contents.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 7
    assert str(tmp_path).encode() not in b"".join(contents[0].values())
    with safe_open(tmp_path / "a" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_curve_is_drawn_without_measuring_a_font():
    """Fonts differ between machines: another one, wider by half, must not move anything."""
    header = "step,tokens,train_loss,valid_loss,learning_rate,grad_norm\n"
    rows = [f"{i},{i * 64},{9 / i},{3.5 if i % 100 == 0 else 'nan'},1,1\n" for i in range(1, 501)]
    curves = header + "".join(rows) + "501,32064,nan,nan,1,nan\n"
    sans, mono = (loss_curve(curves, font=font) for font in ("sans-serif", "monospace"))
    assert sans != mono
    assert sans == mono.replace("monospace", "sans-serif")
    assert len(sans) < 20_000


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "none"},
        {"norm_position": "post"},
        {"position_embedding": "none"},
        {"ffn": "silu"},
        {"intra_document_masking": True},
    ],
    ids=str,
)
def test_what_no_stock_model_is_ends_in_one_line_and_writes_nothing(
    saved, tmp_path, changes, capsys, monkeypatch
):
    _, folder = saved(**changes)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as left:
        main(["--model", str(folder), "--out", str(tmp_path / "out")])
    assert left.value.code == 2
    ((key, value),) = changes.items()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"neither Llama nor Qwen3 of Hugging Face can compute it: model.{key} = " in line
    assert str(value).lower() in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "mit\nlibrary_name: evil", "my own", "-.-", "ß"])
def test_a_license_that_is_no_identifier_is_refused(text):
    with pytest.raises(InputError, match="(?s)export.license = .*: must be an identifier"):
        read_section(ExportConfig, {"export": {"license": text}}, "export")
    given = read_section(ExportConfig, {"export": {"license": "cc-by-sa-4.0"}}, "export")
    assert given.license == "cc-by-sa-4.0"


def test_a_folder_of_others_is_left_as_it_is_and_ours_is_written_again(saved, tmp_path):
    _, folder = saved()
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "README.md").write_text("somebody's card")
    for place in (out, folder, tmp_path / "out" / "README.md"):
        with pytest.raises(InputError, match=r"not written by lm.export|not a folder"):
            write(export(folder, NO_LICENSE, None), place)
    assert [file.name for file in sorted(out.iterdir())] == ["README.md", "deep"]
    assert (out / "README.md").read_text() == "somebody's card"
    (out / "README.md").write_text(MARK)
    write(export(folder, NO_LICENSE, None), out)
    assert (out / "model.safetensors").exists()
    saved(norm="none")
    write(export(folder, NO_LICENSE, None), out)
    left = {file.name for file in out.iterdir()}
    assert left == {"README.md", "provenance.json", "deep"}
    assert "no weights in this folder: neither Llama" in (out / "README.md").read_text()


def test_rounding_is_told_from_a_wrong_model(saved):
    """Sharp attention far out, where the rounded angles of transformers change its logits."""
    ours, _ = saved(context_length=1024, rope_theta=1e6)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(8)
    text, config = [1, 2, 3], stock_config(ours.config, 0)
    said = compared(copy.deepcopy(ours), config, stock_weights(ours), text)
    assert "all of it rounding" in said
    direct, exact = (float(number) for number in re.findall(r"\d\.\de-\d\d", said))
    assert direct > 1e-4
    assert exact < direct / 10
    swapped = stock_weights(ours)
    key = "model.layers.1.self_attn.k_proj.weight"
    swapped[key] = swapped[key].roll(1, dims=0)
    with pytest.raises(AssertionError, match="where nothing is rounded"):
        compared(ours, config, swapped, text)


def test_logits_that_are_no_numbers_are_none_that_agree(saved, tmp_path):
    """Each weight is finite, and their sums are not."""
    ours, _ = saved()
    with torch.no_grad():
        ours.lm_head.weight.fill_(3e38)
    with pytest.raises(InputError, match="logits are not finite"):
        compared(ours, stock_config(ours.config, 0), stock_weights(ours), [7, 8])


def test_weights_reach_the_disk_before_their_name_does(tmp_path, monkeypatch):
    """The file is synced, then renamed, then its folder synced; others may read it."""
    events, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: events.append(os.fstat(fd).st_ino) or fsync(fd))
    monkeypatch.setattr("os.replace", lambda *names: events.append("rename") or rename(*names))
    path = tmp_path / "new" / "some.safetensors"
    write_safetensors({"x": torch.ones(2)}, {}, path)
    assert events == [path.stat().st_ino, "rename", path.parent.stat().st_ino]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- start_from -------------------------------------------------------------------------


def their_model(qk_norm=False, **changes):
    """A random model made by transformers, with norms that are not all ones."""
    torch.manual_seed(3)
    settings = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 32,
    }  # fmt: skip
    kind, config = (Qwen3ForCausalLM, Qwen3Config) if qk_norm else (LlamaForCausalLM, LlamaConfig)
    model = kind(config(**settings | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def store(model, tokenizer, folder, **options):
    model.save_pretrained(folder, **options)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def fitting(model_config):
    """Ours with the settings of `their_model`."""
    return replace(
        model_config, vocab_size=300, num_heads=4, num_kv_heads=2, norm_eps=1e-6, zero_init=True
    )


@pytest.mark.parametrize(
    ("qk_norm", "tied", "dtype", "options"),
    [
        (False, False, torch.float32, {}),
        (False, True, torch.float32, {"max_shard_size": "20KB"}),
        (True, False, torch.bfloat16, {"max_shard_size": "20KB"}),
        (True, True, torch.float16, {}),
    ],
)
def test_a_model_of_transformers_goes_on_with_its_logits(
    fitting, tokenizer, tmp_path, qk_norm, tied, dtype, options
):
    theirs = their_model(qk_norm, tie_word_embeddings=tied).to(dtype)
    folder = store(theirs, tokenizer, tmp_path / "theirs", **options)
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1 if options else [file.name for file in shards] == ["model.safetensors"]
    ours = TransformerLM(replace(fitting, qk_norm=qk_norm, tie_embeddings=tied)).eval()
    start_from(folder, ours, tokenizer)
    ids = torch.randint(300, (2, 16))
    torch.testing.assert_close(ours(ids), theirs.float()(ids).logits, atol=1e-4, rtol=0)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


def test_rows_that_no_token_has_are_left_out(fitting, tokenizer, tmp_path):
    theirs = their_model(vocab_size=320)
    ours = TransformerLM(fitting).eval()
    start_from(store(theirs, tokenizer, tmp_path / "theirs"), ours, tokenizer)
    ids = torch.randint(300, (2, 16))
    torch.testing.assert_close(ours(ids), theirs(ids).logits[:, :, :300], atol=1e-4, rtol=0)


def test_an_architecture_that_no_setting_tells_from_another_is_an_error(fitting, monkeypatch):
    third = huggingface.Architecture("ThirdForCausalLM", qk_norm=False, head_dim=None)
    monkeypatch.setitem(huggingface.ARCHITECTURES, "third", third)
    with pytest.raises(ValueError, match="too many values"):
        stock_config(replace(fitting, qk_norm=False), 0)


@pytest.fixture(scope="module")
def their_folder(tokenizer, tmp_path_factory):
    return store(their_model(), tokenizer, tmp_path_factory.mktemp("theirs") / "small")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = gelu: not supported"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias, mlp_bias: not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary positions of type linear"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary positions of type yarn"),
        ({"use_sliding_window": True}, "sliding windows: not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: not supported"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, r"gpt2, architectures \['"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM, Qwen3For"),
        ({"head_dim": 16}, "head_dim = 16: only hidden_size / num_attention_heads = 32 / 4"),
        ({"vocab_size": 200}, "vocab_size = 200, the tokenizer has 300 tokens; copy it to data/"),
        (
            {"max_position_embeddings": 8},
            "context_length = 16, but the model was trained on at most 8 positions",
        ),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = two; expected an integer"),
        ({"num_hidden_layers": 2_000_000}, "model.num_layers = 2, expected 2000000"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\], expected dict"),
        ({"rope_scaling": "yarn"}, "rope_scaling = yarn, expected dict"),
        ({"model_type": ["llama"]}, r"model_type = \['llama'\], expected str"),
        ({"layer_types": 3}, "layer_types = 3, expected list"),
        ({"head_dim": "8"}, "head_dim = 8, expected int"),
        ({"rope_theta": "NaN", "rope_parameters": None}, "expected NaN"),
        (
            {"num_hidden_layers": 3, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
            "another model than params.yaml describes: model.num_layers = 2, expected 3; "
            "model.norm_eps = 1e-06, expected 1e-05; model.tie_embeddings = false, expected true; "
            "set the expected values",
        ),
    ],
    ids=str,
)
def test_what_ours_is_not_is_refused_by_name(
    fitting, tokenizer, their_folder, tmp_path, changes, message
):
    folder = shutil.copytree(their_folder, tmp_path / "small")
    settings = json.loads((folder / "config.json").read_bytes())
    write_json(folder / "config.json", settings | changes)
    with pytest.raises(InputError, match=message):
        start_from(folder, TransformerLM(fitting), tokenizer)


def spoil(folder, name):
    if name == "no folder":
        shutil.rmtree(folder)
    elif name == "pickle":
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    elif name == "shard elsewhere":
        write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../b"}})
    elif name == "torn":
        (folder / "model.safetensors").write_bytes(b"torn")
    elif name == "other tokenizer":
        train_bpe(["other words " * 50], 300).save(folder)
    elif name == "no config":
        (folder / "config.json").unlink()
    else:
        weights = load_file(folder / "model.safetensors")
        if name == "missing":
            del weights["model.norm.weight"]
        elif name == "surplus":
            weights["model.layers.0.mlp.router.weight"] = torch.zeros(1)
        elif name == "shape":
            weights["model.norm.weight"] = torch.zeros(7)
        elif name == "integers":
            weights["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
        elif name in ("nan", "inf"):
            weights["model.norm.weight"][5] = float(name)
        save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no folder", r"small: no such folder; copy the model's there \(train.init_from names it"),
        ("pickle", r"no model.safetensors; .bin and .pt files run code"),
        ("shard elsewhere", "index.json: ../b is not in this folder"),
        ("torn", "model.safetensors: not a safetensors file"),
        (
            "other tokenizer",
            "not the tokenizer of data/tokenizer; copy it to data/tokenizers/small",
        ),
        ("no config", "config.json: no such file; a model folder of Hugging Face has one"),
        ("missing", "no weight model.norm.weight in its safetensors files"),
        ("surplus", "model.layers.0.mlp.router.weight: no such weight in a model of these"),
        ("shape", r"model.norm.weight is \(7,\), expected \(32,\)"),
        ("integers", "model.norm.weight is torch.int8; expected float32 or bfloat16"),
        ("nan", "model.safetensors: model.norm.weight: 1 of 32 values are not finite"),
        ("inf", "model.safetensors: model.norm.weight: 1 of 32 values are not finite"),
    ],
)
def test_a_folder_that_cannot_be_continued_says_why(
    fitting, tokenizer, their_folder, tmp_path, name, message
):
    folder = shutil.copytree(their_folder, tmp_path / "small")
    spoil(folder, name)
    with pytest.raises(InputError, match=message):
        start_from(folder, TransformerLM(fitting), tokenizer)


# --- the stages -------------------------------------------------------------------------


def test_the_pipeline_ends_in_a_folder_with_a_card_that_is_true(baseline, tmp_path):
    project = copied(baseline, tmp_path / "project")
    out = project.folder / "models" / "huggingface"
    page = (out / "README.md").read_text()
    front = ModelCard.load(out / "README.md").data.to_dict()
    assert front == {
        "license": "unknown", "library_name": "transformers", "pipeline_tag": "text-generation"
    }  # fmt: skip
    bits = json.loads(project.read("metrics/eval.json"))["bits_per_byte"]
    assert f"it needs {bits:.4f} bits per byte" in page
    tokens = json.loads(project.read("metrics/data.json"))["train"]["tokens"]
    assert f"{tokens:,} tokens.\nHeld out" in page
    assert project.read("metrics/samples.md").decode().strip() in page
    hashes = re.findall(r"^\| `(.+)` \| `([0-9a-f]{64})` \|$", page, re.M)
    assert len(hashes) == 4
    for name, sha256 in hashes:
        assert hashlib.sha256(project.read(name)).hexdigest() == sha256, name
    for link in re.findall(r"\]\((.+?)\)", page):
        assert (out / link).is_file(), link
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {}
    exec(snippet.replace('folder = "."', f"folder = {str(out)!r}"), names)
    assert names["ids"].shape[1] > 2
    ours, _ = load_model(project.folder / "models" / "model", CPU)
    ids = torch.randint(ours.config.vocab_size, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), names["model"](ids).logits, atol=1e-4, rtol=0)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert set(before) == {
        "README.md", "config.json", "generation_config.json", "loss.svg", "model.safetensors",
        "provenance.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    by_hand = project.warm("lm.export", "--out", "again", "-S", "export.license=mit")
    assert by_hand["status"] == 0, by_hand["err"]
    after = {file.name: file.read_bytes() for file in (project.folder / "again").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"README.md"}
    assert b"license: mit\n" in after["README.md"]
    project.close()


def test_an_ablation_goes_through_the_pipeline_with_the_card_alone(finished):
    finished.set("model.norm", "none")
    finished.prepare("train", "evaluate")
    said = finished.stage("export").stdout
    assert "Model card in models/huggingface, no weights: neither Llama nor Qwen3" in said
    left = {file.name for file in (finished.folder / "models" / "huggingface").iterdir()}
    assert left == {"README.md", "provenance.json", "loss.svg"}


def test_a_run_starts_from_a_folder_and_a_change_of_it_is_another_run(finished):
    folder = finished.folder / "models" / "pretrained" / "mine"
    before = float(finished.read("metrics/curves.csv").split()[1].split(b",")[2])
    shutil.copytree(finished.folder / "models" / "huggingface", folder)
    finished.set("train.init_from", "mine")
    finished.set("train.lr", 1e-30)
    result = finished.stage("train")
    assert "Starting from the weights in models/pretrained/mine\n" in result.stdout, result.stderr
    after = float(finished.read("metrics/curves.csv").split()[1].split(b",")[2])
    assert after < before - 1  # the first loss
    weights = load_file(finished.folder / "models" / "model" / "model.safetensors")
    theirs = load_file(folder / "model.safetensors")
    assert torch.equal(weights["ln_final.weight"], theirs["model.norm.weight"])
    provenance = json.loads(finished.read("models/model/provenance.json"))
    name = "models/pretrained/mine/model.safetensors"
    assert provenance["inputs"][name] == hashlib.sha256(finished.read(name)).hexdigest()
    assert "Resumed at step 20" in finished.stage("train").stdout
    theirs["model.norm.weight"] += 1
    save_file(theirs, folder / "model.safetensors")
    assert "Resumed" not in finished.stage("train").stdout
    finished.set("train.init_from", "../model")
    assert "must be a folder's name in models/pretrained/" in one_line(finished.stage("train"))


@pytest.mark.soak
def test_verify_replays_a_run_that_started_from_a_folder(finished):
    shutil.copytree(
        finished.folder / "models" / "huggingface", finished.folder / "models/pretrained/mine"
    )
    finished.set("train.init_from", "mine")
    assert ran(dvc(finished, "repro")) == ["train", "evaluate", "export"]
    done = finished.run("python", "-m", "tools.verify", "--replay", "20", "--device", "cpu")
    assert "replayed steps 1 to 20: the weights at step 8, step 16, step 20" in done.stdout
