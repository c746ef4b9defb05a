"""The decoder against the model's full pass and transformers' Llama, token by token."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lm.base.errors import InputError
from lm.generate.decoder import GRAPH_SPAN, SPAN, Decoder
from lm.generate.stream import generate, sample
from lm.machine.device import make_deterministic
from tests.project import ROOT
from tests.test_model import END, PACKED, VARIANTS, as_llama, variant_model, with_third_choice

PROMPTS = [[7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 5, 5]]


def followed(decoder, prompts, ids):
    """Logits after the prompts and after each column of ids (B, T), as (B, 1 + T, V)."""
    logits = [decoder.read(range(len(prompts)), prompts)]
    logits += [decoder.step(column) for column in ids.T]
    return torch.stack(logits, dim=1)


def full_pass(model, prompt, ids):
    """The same of one row by the model itself."""
    whole = torch.tensor([[*prompt, *ids.tolist()]])
    return model(whole, model.documents(whole, END))[0, len(prompt) - 1 :]


@pytest.mark.parametrize("masking", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_steps_of_ragged_rows_equal_the_full_pass_of_each(model_config, changes, masking):
    model = variant_model(model_config, {**changes, "intra_document_masking": masking})
    ids = torch.randint(95, (3, 7))
    ids[0, 2] = ids[1, 0] = ids[1, 1] = ids[2, 6] = END
    prompts = [PROMPTS[0], PROMPTS[1], [5, END]]
    got = followed(Decoder(model, 3, END), prompts, ids)
    for row, prompt, column in zip(got, prompts, ids, strict=True):
        torch.testing.assert_close(row, full_pass(model, prompt, column), atol=1e-5, rtol=1e-5)


def test_places_are_found_across_the_spans_that_are_looked_through(model_config):
    model = variant_model(model_config, {"context_length": 2 * SPAN + 10})
    ids = torch.randint(96, (2, 2 * SPAN))
    got = followed(Decoder(model, 2), [[1], [2, 3, 4, 5]], ids)
    for row, prompt, column in zip(got, ([1], [2, 3, 4, 5]), ids, strict=True):
        torch.testing.assert_close(row, full_pass(model, prompt, column), atol=1e-5, rtol=1e-4)


# transformers 5.24 calls it cache, the pinned version does not
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_steps_equal_the_cached_llama_of_transformers(model_config):
    ours = variant_model(replace(model_config, num_heads=4, num_kv_heads=2), {})
    theirs, ids = as_llama(ours), torch.randint(96, (3, 12))
    got = followed(Decoder(ours, 3), ids[:, :4].tolist(), ids[:, 4:])
    first = theirs(ids[:, :4], use_cache=True)
    logits, memory = [first.logits[:, -1]], first.past_key_values
    for column in ids[:, 4:].T:
        logits.append(theirs(column[:, None], past_key_values=memory, use_cache=True).logits[:, 0])
    torch.testing.assert_close(got, torch.stack(logits, dim=1), atol=1e-5, rtol=1e-4)


def test_a_row_begins_anew_while_the_others_go_on(model):
    decoder = Decoder(model, 3)
    followed(decoder, PROMPTS, torch.randint(96, (3, 5)))
    kept = torch.randint(96, (2, 6))
    before = followed(Decoder(model, 2), PROMPTS[:2], kept)
    decoder.read([0, 1], PROMPTS[:2])
    for number, column in enumerate(kept.T):
        if number == 3:
            torch.testing.assert_close(
                decoder.read([2], [[8, 8]])[0], full_pass(model, [8, 8], column[:0])[0]
            )
        logits = decoder.step(torch.cat([column, torch.tensor([4])]))
        torch.testing.assert_close(logits[:2], before[:, number + 1], atol=1e-5, rtol=1e-5)
        expected = full_pass(model, [8, 8], torch.tensor([4] * (number - 2)))[-1]
        if number >= 3:
            torch.testing.assert_close(logits[2], expected, atol=1e-5, rtol=1e-5)


def test_a_step_makes_nothing_that_grows(model):
    decoder = Decoder(model, 2)
    decoder.read([0, 1], [[1], [2]])
    tensors = *decoder.memory, decoder.mask, decoder.positions
    kept = [tensor.data_ptr() for tensor in tensors]
    for _ in range(40):  # beyond the context, too: a row that has ended goes on
        logits = decoder.step(torch.tensor([3, 4]))
    tensors = *decoder.memory, decoder.mask, decoder.positions
    assert kept == [tensor.data_ptr() for tensor in tensors]
    assert torch.isfinite(logits).all()


class Recorder(TorchDispatchMode):
    """Operations with the tensors that they had, to be done again: what a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.operations.append((function, arguments, options or {}, result))
        return result

    def repeat(self):
        for function, arguments, options, result in self.operations:
            places = {t.untyped_storage().data_ptr() for t in tensors_of((arguments, options))}
            again = function(*arguments, **options)
            for before, now in zip(tensors_of(result), tensors_of(again), strict=True):
                if before.untyped_storage().data_ptr() not in places:  # no view, nothing in place
                    before.copy_(now)


def tensors_of(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(leaf)]


@pytest.mark.parametrize("masking", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_repeating_a_steps_operations_is_the_next_step(model_config, changes, masking):
    model = variant_model(model_config, {**changes, "intra_document_masking": masking})
    ids, prompts = torch.randint(95, (6, 3)), [PROMPTS[0], PROMPTS[1], [5, END]]
    ids[1, 0] = ids[3, 1] = END
    repeated, called = (Decoder(model, 3, END) for _ in range(2))
    for decoder in repeated, called:
        decoder.read(range(3), prompts)
    repeated.ids.copy_(ids[0])
    with torch.inference_mode(), Recorder() as recorder:
        logits = repeated._step(repeated.ids, 16)
    torch.testing.assert_close(logits, called._step(ids[0], 16), rtol=0, atol=0)
    with torch.inference_mode():
        for row in ids[1:]:
            repeated.ids.copy_(row)
            recorder.repeat()
            torch.testing.assert_close(logits, called._step(row, 16), rtol=0, atol=0)


def test_where_no_graph_can_be_captured_steps_are_plain_calls(model, monkeypatch):
    tried = []

    def capture():
        tried.append("a capture")
        raise RuntimeError("CUDA has no graphs here")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", capture)
    ids, (replaying, plain) = torch.randint(96, (5, 3)), (Decoder(model, 3) for _ in range(2))
    for decoder in replaying, plain:
        decoder.read(range(3), PROMPTS)
    with pytest.warns(RuntimeWarning, match="decoding without CUDA graphs") as warned:
        got = [replaying._replay(row, SPAN) for row in ids]
    assert len(warned) == len(tried) == 1
    for logits, row in zip(got, ids, strict=True):
        assert torch.equal(logits, plain._step(row, SPAN))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_close_to_float32(model_config, dtype):
    model = variant_model(model_config, {"qk_norm": True})
    ids = torch.randint(96, (2, 8))
    exact = followed(Decoder(model, 2), PROMPTS[1:], ids)
    rough = followed(Decoder(model, 2, dtype=dtype), PROMPTS[1:], ids)
    assert rough.dtype == dtype
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_masked_model_has_to_know_what_ends_documents(model_config):
    model = variant_model(model_config, {"intra_document_masking": True})
    with pytest.raises(InputError, match="no id is known to end a document"):
        Decoder(model, 3).read(range(3), PACKED.tolist())


PROGRAM = """
import torch
from lm.base.settings import ModelConfig
from lm.generate.decoder import require_same_logits
from lm.generate.stream import generate
from lm.model.transformer import TransformerLM

torch.manual_seed(0)
model = TransformerLM(ModelConfig(**%r)).eval()
logprobs = model(torch.tensor([[1, 2, 3]]))[0, -1].log_softmax(dim=0)
(token,) = next(generate(model, [[1, 2, 3]], 1, temperature=0, top_logprobs=96))
print([token.logprob, dict(token.top)[50]])
print(logprobs[[token.id, 50]].tolist())
require_same_logits(model, list(range(16)), None)
"""


@pytest.mark.parametrize(
    ("file", "line", "changed", "follows"),
    [
        ("kernels", "return F.silu(gate) * up", "return F.relu(gate).square() * up", True),
        ("transformer", "self.activation.function(*project(x, self.inner))",
         "project(x, self.inner)[0].relu().square()", False),
        ("transformer", "return rms_norm(x, self.weight, self.eps)",
         "return x / x.norm(dim=-1, keepdim=True) * self.weight", False),
    ],
    ids=["activation", "feed-forward", "norm"],
)  # fmt: skip
def test_a_change_of_the_models_code_reaches_the_decoder_or_is_an_error(
    tmp_path, capsys, model_config, file, line, changed, follows
):
    program = PROGRAM % asdict(model_config)
    exec(program, {})  # by the code as it is
    before = capsys.readouterr().out
    shutil.copytree(ROOT / "lm", tmp_path / "lm", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "lm" / "model" / f"{file}.py"
    text = source.read_text()
    assert text.count(line) == 1
    source.write_text(text.replace(line, changed))
    result = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    decoded, computed = map(json.loads, result.stdout.splitlines())
    assert computed != pytest.approx(json.loads(before.splitlines()[1]), abs=1e-3)
    if follows:
        assert result.returncode == 0, result.stderr
        assert decoded == pytest.approx(computed, abs=1e-4)
    else:
        said = result.stderr.splitlines()[-1]
        assert "decoder.py computes another model than lm/model/transformer.py" in said


def test_what_the_decoder_does_not_know_is_an_error_there(model):
    model.ln_final = torch.nn.LayerNorm(model.config.d_model)
    with pytest.raises(AssertionError, match="the decoder does not know LayerNorm"):
        Decoder(model, 1)


@pytest.mark.parametrize("key", ["norm_position", "position_embedding"])
def test_a_third_choice_is_never_decoded_as_another(model, key):
    model.config = with_third_choice(model.config, key)
    with pytest.raises(AssertionError, match="third"):
        Decoder(model, 1).read([0], [[1]])


@pytest.fixture
def cuda():
    make_deterministic(torch.device("cuda"), None)
    yield torch.device("cuda")
    torch.cuda.set_sync_debug_mode("default")
    torch.set_deterministic_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_replayed_steps_are_those_of_calls_and_wait_for_nothing(model_config, cuda, changes, dtype):
    changes = {**changes, "context_length": 2 * GRAPH_SPAN, "intra_document_masking": True}
    model = variant_model(model_config, changes).to(cuda)
    replayed, called = (Decoder(model, 3, END, dtype) for _ in range(2))
    called.capturing = False
    for decoder in replayed, called:
        decoder.read(range(3), [[1] * (GRAPH_SPAN - 5), [5, END], [7, 8, 9]])
    ids, draws = torch.randint(95, (12, 3)), torch.rand(3, dtype=torch.float64, device=cuda)
    ids[1, 0] = ids[3, 1] = ids[8, 2] = END
    for number, row in enumerate(ids.to(cuda)):
        if number not in (0, 1, 5, 6):  # the first two of a span load kernels and capture
            torch.cuda.set_sync_debug_mode("error")
        logits = replayed.step(row)
        sample(logits, 0.8, 20, 0.9, draws)
        torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(logits, called.step(row), atol=1e-5, rtol=1e-5)
    assert set(replayed.graphs) == {GRAPH_SPAN, 2 * GRAPH_SPAN}


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 50}, {"top_p": 0.9}], ids=str)
def test_text_drawn_on_a_gpu_is_that_of_a_cpu(model, cuda, options):
    prompts = [[3, 1, 4], [1] * 14, [5] * 30]  # beyond the context
    options |= {"seed": 2, "top_logprobs": 3, "end_id": END}
    expected = list(generate(model, prompts, 60, **options))
    got = list(generate(model.to(cuda), prompts, 60, **options))
    assert len(got) == len(expected)
    for step in zip(got, expected, strict=True):
        for ours, theirs in zip(*step, strict=True):
            assert (ours and ours.id) == (theirs and theirs.id)
            assert (ours and ours.logprob) == pytest.approx(theirs and theirs.logprob, abs=1e-4)
