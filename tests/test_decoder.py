"""The decoder against the model's full pass and transformers' Llama, token by token."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from lm.base.errors import InputError
from lm.generate.decoder import SPAN, Decoder
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
    kept = [tensor.data_ptr() for tensor in (*decoder.memory, decoder.mask)]
    for _ in range(40):  # beyond the context, too: a row that has ended goes on
        logits = decoder.step(torch.tensor([3, 4]))
    assert kept == [tensor.data_ptr() for tensor in (*decoder.memory, decoder.mask)]
    assert torch.isfinite(logits).all()


def test_bfloat16_is_close_to_float32(model_config):
    model = variant_model(model_config, {"qk_norm": True})
    ids = torch.randint(96, (2, 8))
    exact = followed(Decoder(model, 2), PROMPTS[1:], ids)
    rough = followed(Decoder(model, 2, dtype=torch.bfloat16), PROMPTS[1:], ids)
    assert rough.dtype == torch.bfloat16
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
