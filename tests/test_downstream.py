"""What others make of our models: transformers, llama.cpp and lm-evaluation-harness."""

import json
import re
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from gguf import GGUFReader, TokenType
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from benchmarks.harness import document_nats
from lm.base.errors import InputError
from lm.data.tokenizer import GPT2_PATTERN, Tokenizer, byte_tokenizer
from lm.export.gguf import main, write
from lm.generate.stream import generate
from lm.model.model_folder import save_model
from lm.prepare.learn import train_bpe
from tests.project import ROOT
from tests.test_model import variant_model

TEXTS = [
    "def f(x):\n    return x",
    "It's 12  o'clock\n",
    "naïve 東京 🙂",
    "a <|endoftext|> b",
    " \n\n x  ",
]
KINDS = {
    "llama": {},
    "llama, fewer heads, tied": {"num_kv_heads": 2, "tie_embeddings": True},
    "qwen3": {"qk_norm": True},
    "qwen3, fewer heads, tied": {"qk_norm": True, "num_kv_heads": 1, "tie_embeddings": True},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["some words, some more words " * 20, *TEXTS[:3]], 300)


@pytest.fixture
def make_model(model_config, tokenizer):
    def make(tokenizer=tokenizer, **changes):
        more = {"vocab_size": tokenizer.vocab_size, "rope_theta": 500.0, "norm_eps": 1e-3}
        return variant_model(model_config, more | changes)

    return make


def opened_by_transformers(file):
    """As from_pretrained(gguf_file=...), which demands `accelerate` and has heads 128 wide."""
    settings = load_gguf_checkpoint(file)["config"]
    settings["head_dim"] = fields(file)[f"{settings['model_type']}.attention.key_length"]
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"]
    lacking, surplus = theirs.load_state_dict(tensors, strict=False)
    assert not surplus
    assert lacking == (["lm_head.weight"] if theirs.config.tie_word_embeddings else [])
    return theirs


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_logits_from_the_gguf(make_model, tokenizer, tmp_path, kind):
    ours = make_model(**KINDS[kind])
    write(ours, tokenizer, tmp_path / "model.gguf")
    theirs = opened_by_transformers(tmp_path / "model.gguf")
    assert theirs.config.model_type == kind.split(",")[0]
    assert theirs.config.max_position_embeddings == ours.config.context_length
    ids = torch.randint(300, (3, 16))
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)


def fields(file):
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def test_the_gguf_holds_the_tokens_of_tokenizer_json(make_model, tokenizer, tmp_path):
    write(make_model(vocab_size=310), tokenizer, tmp_path / "model.gguf")
    got = fields(tmp_path / "model.gguf")
    tokenizer.save(tmp_path)
    expected = json.loads((tmp_path / "tokenizer.json").read_text())
    tokens = got["tokenizer.ggml.tokens"]
    assert {t: tokens.index(t) for t in expected["model"]["vocab"]} == expected["model"]["vocab"]
    assert got["tokenizer.ggml.merges"] == [" ".join(m) for m in expected["model"]["merges"]]
    assert tokens[299] == "<|endoftext|>"
    assert tokens[300:] == [f"[PAD{i}]" for i in range(300, 310)]
    assert got["tokenizer.ggml.token_type"] == (
        [TokenType.NORMAL] * 299 + [TokenType.CONTROL] + [TokenType.UNUSED] * 10
    )


def test_the_same_model_gives_the_same_bytes_and_replaces_a_gguf_alone(
    make_model, tokenizer, tmp_path, capsys
):
    save_model(make_model(), tokenizer, tmp_path / "model")
    for name in ("a.gguf", "b.gguf", "b.gguf"):
        main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "new" / name)])
    a, b = ((tmp_path / "new" / name).read_bytes() for name in ("a.gguf", "b.gguf"))
    assert a == b
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["a.gguf", "b.gguf"]
    mine = tmp_path / "model" / "config.json"
    before = mine.read_bytes()
    with pytest.raises(SystemExit) as exit_:
        main(["--model", str(tmp_path / "model"), "--out", str(mine)])
    assert exit_.value.code == 2
    assert "config.json: exists and is no GGUF file" in capsys.readouterr().err
    assert mine.read_bytes() == before


def cutting(tokenizer, pattern):
    """The tokenizer, but text is cut by a pattern, or not at all, before its merges."""
    settings = json.loads(tokenizer.backend.to_str())
    last = settings["pre_tokenizer"] | {"use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    parts = [{**split, "invert": False}, last] if pattern else [last]
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    return Tokenizer(tokenizer.backend.from_str(json.dumps(settings)))


def test_what_llama_cpp_has_not_is_refused_by_name(make_model, tokenizer, tmp_path):
    out = tmp_path / "model.gguf"
    for change in ({"ffn": "silu"}, {"intra_document_masking": True}):
        with pytest.raises(InputError, match=f"model.{next(iter(change))} = "):
            write(make_model(**change), tokenizer, out)
    for pattern in (None, GPT2_PATTERN.replace("+", "{1,3}")):
        with pytest.raises(InputError, match="cuts text by another pattern than GPT-2's"):
            write(make_model(), cutting(tokenizer, pattern), out)
    assert not out.exists()


def test_gpt2s_pattern_is_known_as_tiktoken_spells_it(make_model, tokenizer, tmp_path):
    other = cutting(tokenizer, GPT2_PATTERN)
    assert other.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    for name, known in (("a.gguf", tokenizer), ("b.gguf", other)):
        write(make_model(), known, tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_windows_of_the_harness_cut_each_document_by_itself(make_model):
    model, end = make_model(), 299  # of 16 positions
    short, long = [5, 6, 7], [i * 7 % 300 for i in range(40)]

    def nats(row, first):
        losses = F.cross_entropy(model(torch.tensor([row[:-1]]))[0], torch.tensor(row[1:]),
                                 reduction="none")  # fmt: skip
        return losses[first:].sum().item()

    assert document_nats(model, short, end) == pytest.approx(nats([end, *short], 0))
    expected = nats([end, *long[:16]], 0) + nats(long[15:32], 0) + nats(long[23:40], 8)
    assert document_nats(model, long, end) == pytest.approx(expected)
    assert document_nats(model, [], end) == 0


def test_versions_for_the_harness_are_ours():
    def pins(*names):
        text = "\n".join((ROOT / name).read_text() for name in names)
        return dict(re.findall(r"^([\w.-]+)(?:\[\w+\])?==([\w.]+)", text, re.M))

    ours, harness = pins("requirements.txt", "constraints.txt"), pins("requirements-lm-eval.txt")
    assert {"torch", "transformers", "tokenizers"} <= harness.keys()
    assert {name: harness[name] for name in harness.keys() & ours.keys()} == {
        name: ours[name] for name in harness.keys() & ours.keys()
    }


# --- what has to be installed first ------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """Asks llama.cpp, as npm has it built for this machine's processor."""
    if not shutil.which("npm"):
        pytest.skip("no npm")
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(ROOT / "tests" / "llama.mjs", folder)
    packages = ["node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1"]
    install = ["npm", "install", "--omit=optional", "--ignore-scripts", "--no-audit", *packages]
    subprocess.run(install, cwd=folder, check=True, capture_output=True)

    def ask(file, prompt, steps, texts=TEXTS):
        job = {"modelPath": str(file), "texts": texts, "prompt": prompt, "steps": steps}
        (folder / "job.json").write_text(json.dumps(job))
        subprocess.run(["node", "llama.mjs", "job.json", "answer.json"], cwd=folder, check=True,
                       timeout=60)  # fmt: skip
        return json.loads((folder / "answer.json").read_text())

    return ask


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_llama_cpp_gives_our_ids_and_our_greedy_text(
    make_model, tokenizer, tmp_path, llama_cpp, kind
):
    if kind == "bytes":
        tokenizer = byte_tokenizer()
    model = make_model(tokenizer, context_length=64, **KINDS.get(kind, {}))
    write(model, tokenizer, tmp_path / "model.gguf")
    prompt = tokenizer.encode("some words")
    answer = llama_cpp(tmp_path / "model.gguf", prompt, 40)
    assert answer["ids"] == tokenizer.encode_batch(TEXTS)
    ours = [new.id for (new,) in generate(model, [prompt], 40, temperature=0)]
    assert answer["greedy"] == ours


@pytest.mark.soak
def test_the_harness_has_the_bits_per_byte_that_we_have(finished):
    if not (ROOT / ".venv-lm-eval").exists():
        pytest.skip("run `make lm-eval` once: it installs the harness")
    shutil.copytree(ROOT / "benchmarks", finished.folder / "benchmarks")
    (finished.folder / ".venv-lm-eval").symlink_to(ROOT / ".venv-lm-eval")
    done = finished.run("python", "-m", "benchmarks.harness")
    assert done.returncode == 0, done.stderr
    harness, ours, stage = map(float, re.findall(r"\| (\d\.\d+) \|", done.stdout))
    assert harness == pytest.approx(ours, abs=1e-5)
    assert harness == pytest.approx(stage, rel=0.05)  # other windows, end tokens counted
