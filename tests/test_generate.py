"""Generation: the cache changes nothing, rows are independent, sampling keeps what it should."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lm.checkpoint import save_model
from lm.generate import Sampled, complete, generate, main, sample
from lm.model import TransformerLM
from lm.tokenizer import byte_tokenizer


def rows(steps):
    """Per prompt, the ids generated."""
    columns = list(zip(*steps, strict=True))
    return [[token.id for token in column if token] for column in columns]


def test_greedy_output_equals_the_full_pass_beyond_the_context(model):
    prompt = [3, 1, 4, 1, 5]
    got = rows(generate(model, [prompt], 60, temperature=0))[0]
    ids = list(prompt)
    for _ in range(60):
        start = 0 if len(ids) <= 16 else -(-(len(ids) - 16) // 8) * 8
        ids.append(model(torch.tensor([ids[start:]]))[0, -1].argmax().item())
    assert got == ids[5:]


def test_a_masked_model_continues_the_last_document_of_a_prompt(model_config, model):
    masked = TransformerLM(replace(model_config, intra_document_masking=True)).eval()
    masked.load_state_dict(model.state_dict())
    before, last = [3, 1, 4, 95, 7, 95], [9, 2, 6, 5]
    whole = rows(generate(masked, [before + last, last], 6, temperature=0, end_id=95))
    assert whole[0] == whole[1] == rows(generate(model, [last], 6, temperature=0))[0]
    assert whole[0] != rows(generate(model, [before + last], 6, temperature=0))[0]


def test_a_row_is_what_it_would_be_alone(model):
    prompts = [[7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 5, 5]]
    together = rows(generate(model, prompts, 20, temperature=0))
    assert together == [rows(generate(model, [p], 20, temperature=0))[0] for p in prompts]
    assert [len(row) for row in together] == [20, 20, 20]
    sampled = rows(generate(model, prompts, 20, seed=5))
    assert sampled[0] == rows(generate(model, prompts[:1], 20, seed=5))[0]


def test_sampling_is_a_function_of_the_seed(model):
    a, b, c = (rows(generate(model, [[1], [1]], 30, seed=s)) for s in (0, 0, 1))
    assert a == b
    assert a != c
    assert a[0] != a[1]  # rows draw for themselves


def test_a_row_ends_at_the_stop_token(model):
    free = rows(generate(model, [[7], [9]], 40, seed=3))
    stop = free[0][5]
    stopped = rows(generate(model, [[7], [9]], 40, seed=3, stop_id=stop))
    assert stopped[0] == free[0][: free[0].index(stop) + 1]
    assert stopped[1] == free[1][: [*free[1], stop].index(stop) + 1]


def test_a_prompt_longer_than_the_context_is_read_from_its_window(model):
    prompt = [i % 96 for i in range(45)]
    got = rows(generate(model, [prompt], 1, temperature=0))[0]
    window = torch.tensor([prompt[32:]])  # 45 - 16 = 29 tokens too many, forgotten by eights
    assert got == [model(window)[0, -1].argmax().item()]


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="an empty prompt"):
        next(generate(model, [[]], 1))


def frequencies(probabilities, **options):
    draws = torch.tensor((np.arange(10_000) + 0.5) / 10_000)
    logits = torch.tensor(probabilities).log().expand(10_000, -1)
    temperature = options.pop("temperature", 1.0)
    temperatures = torch.full((10_000,), temperature) if temperature else None
    ids = sample(logits, temperatures, options.get("top_k"), options.get("top_p"), draws)
    return (np.bincount(ids, minlength=len(probabilities)) / 10_000).tolist()


def test_sampling_follows_the_probabilities():
    p = [0.1, 0.4, 0.2, 0.3]
    assert frequencies(p) == pytest.approx(p, abs=1e-3)
    assert frequencies(p, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-3)
    assert frequencies(p, top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-3)
    assert frequencies(p, top_p=0.71) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=1e-3)
    assert frequencies(p, top_p=0.01) == frequencies(p, top_k=1) == [0, 1, 0, 0]
    assert frequencies(p, temperature=0) == [0, 1, 0, 0]
    squared = np.array(p) ** 2
    expected = (squared / squared.sum()).tolist()
    assert frequencies(p, temperature=0.5) == pytest.approx(expected, abs=1e-3)


def test_characters_of_several_tokens_arrive_whole(model, monkeypatch):
    data = "aé🙂".encode()
    script = [[Sampled(byte)] for byte in (*data, 0xF0, 255)]  # ends inside a character
    monkeypatch.setattr("lm.generate.generate", lambda *a, **k: iter(script))
    pieces = list(complete(model, byte_tokenizer(), "x", 9))
    assert [piece for piece in pieces if piece] == ["a", "é", "🙂", "\ufffd"]


def test_the_command_line_prints_prompt_and_completion(model_config, tmp_path, capsys):
    model = TransformerLM(replace(model_config, vocab_size=256))
    save_model(model, byte_tokenizer(), tmp_path)
    main(["--prompt", "def ", "--max-new-tokens", "8", "--model", str(tmp_path), "--device", "cpu"])
    first = capsys.readouterr().out
    assert first.startswith("def ")
    assert first.endswith("\n")
    main(["--prompt", "def ", "--max-new-tokens", "8", "--model", str(tmp_path), "--device", "cpu"])
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: must be >= 1"),
        (["--temperature", "-1"], "--temperature: must be >= 0"),
        (["--top-k", "0"], "--top-k: must be >= 1"),
        (["--top-p", "0"], "--top-p: must be in (0, 1]"),
        (["--prompt", "ab\udcff"], "--prompt: not UTF-8"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--model", "nowhere", "--device", "cpu"], "config.json: no such file"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
