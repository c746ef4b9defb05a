"""Generation: the cache changes nothing, rows are independent, sampling keeps what it should."""

import io
import json
import re
import sys
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lm.base.errors import InputError
from lm.base.files import write_json
from lm.base.migrations import ADDED
from lm.base.settings import DEVICE, EvaluateConfig
from lm.data.tokenizer import byte_tokenizer
from lm.evaluate.samples import draw_samples
from lm.generate.command import main
from lm.generate.decoder import GRAPH_SPAN, Decoder, memory_bytes
from lm.generate.stream import Completion, draw_tokens, generate, one_ahead, sample, stream
from lm.machine.device import native_dtype
from lm.model.model_folder import load_model, save_model
from lm.model.transformer import TransformerLM
from tests.test_model import as_llama, variant_model


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


def test_greedy_output_equals_that_of_transformers(model_config):
    ours = variant_model(replace(model_config, num_heads=4, num_kv_heads=2), {})
    ids = torch.randint(96, (3, 5))
    theirs = as_llama(ours).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=11,
        do_sample=False,
        eos_token_id=None,
    )
    assert rows(generate(ours, ids.tolist(), 11, temperature=0)) == theirs[:, 5:].tolist()


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
    stopped = rows(generate(model, [[7], [9]], 40, seed=3, end_id=stop))
    assert stopped[0] == free[0][: free[0].index(stop) + 1]
    assert stopped[1] == free[1][: [*free[1], stop].index(stop) + 1]


def test_tokens_that_are_read_a_step_later_are_the_same(model):
    """As on a GPU; rows begin anew while their last token is unread."""
    prompts, asked = [[3, 1, 4], [1] * 14], []

    def choose(logits, draws):
        asked.append(len(draws))
        return sample(logits, 0.9, 20, 0.95, draws)

    steps = [draw_tokens(Decoder(model, 2), prompts, 5, choose, top_logprobs=3) for _ in range(2)]
    at_once = [tokens() for tokens in islice(steps[0], 40)]
    later = [(tokens(), len(asked)) for tokens in one_ahead(islice(steps[1], 40))]
    assert later == [(tokens, min(42 + n, 80)) for n, tokens in enumerate(at_once)]
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 5, "top_logprobs": 3}
    assert at_once == list(generate(model, prompts, 40, **options))
    assert list(one_ahead(iter([]))) == []


def test_log_probabilities_are_of_the_models_own_distribution(model):
    prompts, ids = [[7], [9, 2]], [[7], [9, 2]]
    steps = generate(model, prompts, 6, temperature=0.3, top_k=4, top_logprobs=3)
    for tokens in steps:
        for row, token in zip(ids, tokens, strict=True):
            logprobs = model(torch.tensor([row]))[0, -1].log_softmax(dim=0)
            assert token.logprob == pytest.approx(logprobs[token.id].item(), abs=1e-5)
            expected = sorted(enumerate(logprobs.tolist()), key=lambda pair: -pair[1])[:3]
            assert [i for i, _ in token.top] == [i for i, _ in expected]
            assert [p for _, p in token.top] == pytest.approx([p for _, p in expected], abs=1e-5)
            row.append(token.id)


def test_a_prompt_longer_than_the_context_is_read_from_its_window(model):
    prompt = [i % 96 for i in range(45)]
    got = rows(generate(model, [prompt], 1, temperature=0))[0]
    window = torch.tensor([prompt[32:]])  # 45 - 16 = 29 tokens too many, forgotten by eights
    assert got == [model(window)[0, -1].argmax().item()]


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="an empty prompt"):
        next(generate(model, [[]], 1))


def frequencies(probabilities, temperature=1.0, top_k=None, top_p=None):
    draws = torch.tensor((np.arange(10_000) + 0.5) / 10_000)
    logits = torch.tensor(probabilities).log().expand(10_000, -1)
    ids = sample(logits, temperature, top_k, top_p, draws)
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


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.7), (7, 0.8), (20, 1.0)])
def test_sampling_follows_the_warped_logits_of_transformers(top_k, top_p):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    warped = TemperatureLogitsWarper(0.8)(None, logits)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p:
        warped = TopPLogitsWarper(top_p)(None, warped)
    p = logits.softmax(dim=1)[0].tolist()
    got = frequencies(p, temperature=0.8, top_k=top_k, top_p=top_p)
    assert got == pytest.approx(warped.softmax(dim=1)[0].tolist(), abs=1e-3)


def speaker(config, text):
    """A model of bytes that goes on with the next byte of a text in which each occurs once."""
    bare = {"norm": "none", "position_embedding": "none", "zero_init": True, "num_heads": 1}
    model = TransformerLM(replace(config, vocab_size=256, d_model=256, num_kv_heads=None, **bare))
    torch.nn.init.eye_(model.token_embeddings.weight)
    torch.nn.init.zeros_(model.lm_head.weight)
    data = text.encode() if isinstance(text, str) else text
    assert len(set(data)) == len(data)
    for before, after in pairwise(data):
        model.lm_head.weight.data[after, before] = 1.0
    return model.eval()


def test_characters_of_several_tokens_arrive_whole(model_config):
    text = "xaé🙂".encode() + bytes([0xE0, 255])  # ends inside of a character
    model = speaker(model_config, text)
    pieces = [piece.text for piece in stream(model, byte_tokenizer(), ["x"], 20, temperature=0)]
    assert pieces == ["a", "é", "🙂", "\ufffd"]


def test_pieces_end_before_a_stop_text_and_hold_all_tokens(model_config):
    model, tokenizer = speaker(model_config, "abcdefghijk"), byte_tokenizer()
    prompts = ["a", "e", "xb"]
    pieces = list(stream(model, tokenizer, prompts, 5, stop=["de", "defg", "hi"], temperature=0))
    by_row = [[piece for piece in pieces if piece.row == row] for row in range(3)]
    assert [[piece.text for piece in row] for row in by_row] == [
        ["b", "c", ""], ["f", "g", ""], ["c", ""]
    ]  # fmt: skip
    assert [row[-1].finish_reason for row in by_row] == ["stop"] * 3
    ids = [[token.id for piece in row for token in piece.tokens] for row in by_row]
    assert list(map(bytes, ids)) == [b"bcde", b"fghi", b"cde"]
    assert not any(piece.finish_reason for row in by_row for piece in row[:-1])


def test_a_completion_tells_why_it_ended(model_config):
    model, tokenizer = speaker(model_config, b"abc\xff"), byte_tokenizer()
    for length, text, reason, n in ((9, "bc", "stop", 3), (2, "bc", "length", 2)):
        pieces = list(stream(model, tokenizer, ["a"], length, stop=["cd"], temperature=0))
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.finish_reason for piece in pieces][-1] == reason
        assert sum(len(piece.tokens) for piece in pieces) == n


def test_an_empty_prompt_begins_with_the_end_token(model_config):
    model = speaker(model_config, b"\xffhello"[:4])
    texts = ["", ""]
    for piece in stream(model, byte_tokenizer(), ["", "h"], 2, temperature=0):
        texts[piece.row] += piece.text
    assert texts == ["he", "el"]


@pytest.mark.parametrize("change", [{}, {"seed": 4}, {"top_k": None}, {"top_p": None}], ids=str)
def test_samples_are_drawn_as_the_settings_say(model_config, change):
    torch.manual_seed(0)
    model, tokenizer = TransformerLM(replace(model_config, vocab_size=256)).eval(), byte_tokenizer()
    options = {"seed": 3, "top_k": 40, "top_p": 0.9}
    config = EvaluateConfig(
        batch_size=1, stride=None, prompts=["a", "bc"], temperatures=[1.0, 0.0],
        max_new_tokens=20, **options,
    )  # fmt: skip
    drawn = draw_samples(model, tokenizer, replace(config, **change))
    assert [(s.prompt, s.temperature) for s in drawn] == [
        ("a", 1.0), ("a", 0.0), ("bc", 1.0), ("bc", 0.0)
    ]  # fmt: skip
    for prompt, temperature, completion in drawn:
        how = {**options, **change, "temperature": temperature}
        pieces = stream(model, tokenizer, [prompt], 20, **how)
        assert completion == "".join(piece.text for piece in pieces)
    as_before = draw_samples(model, tokenizer, config)
    assert (drawn == as_before) == (not change)
    assert drawn[1::2] == as_before[1::2]  # of temperature 0


CUTS = st.lists(st.text("ab🙂", max_size=3), max_size=8)
STOPS = st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3)


@settings(max_examples=50)
@given(CUTS, STOPS)
def test_a_text_is_cut_before_the_first_stop_text_however_it_arrives(parts, stop):
    whole, completion, shown, stopped = "".join(parts), Completion(stop), "", False
    for number, part in enumerate([*parts, ""]):
        new, stopped = completion.take(part.encode(), final=number == len(parts))
        shown += new
        if stopped:
            break
        arrived = "".join(parts[: number + 1])
        held = arrived.removeprefix(shown)
        assert shown + held == arrived
        assert not held or any(s.startswith(held) for s in stop)  # no more than it must
    expected = whole
    for n in range(len(whole) + 1):
        if found := [s for s in stop if whole[:n].endswith(s)]:
            expected = whole[: n - max(map(len, found))]
            break
    assert shown == expected
    assert stopped == (expected != whole)


@pytest.fixture
def folder(model_config, tmp_path):
    """A saved model that says the alphabet."""
    model = speaker(model_config, "abcdefghijklmnopqrstuvwxyz")
    save_model(model, byte_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def run(folder, *arguments):
    main([*arguments, "--model", str(folder), "--device", "cpu"])


def test_several_completions_are_numbered_and_whole(folder, tmp_path, capsys):
    (tmp_path / "prompt").write_bytes("\u00e9x\n".encode())
    greedy = ["--temperature", "0", "--max-new-tokens", "4", "--stop", "d", "--stop", "h"]
    prompts = ["--prompt", "a", "--prompt", "e", "--prompt-file", str(tmp_path / "prompt")]
    run(folder, *greedy, *prompts[:4])
    assert capsys.readouterr().out == "==> 0 <==\nabc\n\n==> 1 <==\nefg\n\n"
    run(folder, *prompts, "--num-samples", "2", "--max-new-tokens", "1", "--temperature", "0")
    parts = capsys.readouterr().out.split("==> ")
    assert [part[:7] for part in parts[1:5]] == [f"{i} <==\n{c}" for i, c in enumerate("aaee")]
    assert parts[6].startswith("5 <==\néx\n")


def test_samples_of_a_seed_stay_when_more_are_asked_for(folder, capsys):
    hot = ["--prompt", "a", "--temperature", "30", "--max-new-tokens", "8"]
    texts = []
    for count in ("2", "3"):
        run(folder, *hot, "--num-samples", count)
        texts.append(capsys.readouterr().out.split("==> "))
    assert texts[0][1:] == texts[1][1:3]
    assert len({text.partition("<==")[2] for text in texts[1][1:]}) == 3


@pytest.mark.parametrize("arguments", [[], ["--prompt-file", "-"]])
def test_a_prompt_is_piped_in(folder, arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"wx")))
    run(folder, *arguments, "--max-new-tokens", "2", "--temperature", "0")
    assert capsys.readouterr().out == "wxyz\n"


def test_any_text_is_printed_on_a_terminal_that_knows_ascii_alone(folder, monkeypatch):
    """And a prompt is UTF-8 where Python takes the command line for ASCII."""
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="ascii"))
    run(folder, "--prompt", "\udcc3\udca9w", "--max-new-tokens", "2", "--temperature", "0")
    sys.stdout.flush()
    assert printed.getvalue() == b"\\xe9wxy\n"


def test_the_command_line_prints_prompt_and_completion(model_config, tmp_path, capsys):
    model = TransformerLM(replace(model_config, vocab_size=256))
    save_model(model, byte_tokenizer(), tmp_path)
    main(["--prompt", "def ", "--max-new-tokens", "8", "--model", str(tmp_path), "--device", "cpu"])
    first = capsys.readouterr().out
    assert first.startswith("def ")
    assert first.endswith("\n")
    main(["--prompt", "def ", "--max-new-tokens", "8", "--model", str(tmp_path), "--device", "cpu"])
    assert capsys.readouterr().out == first


def test_the_command_line_takes_the_dtype_that_the_device_multiplies_natively(folder, capsys):
    printed = []
    for dtype in ("auto", native_dtype(torch.device("cpu"))):
        run(folder, "--prompt", "a", "--max-new-tokens", "8", "--dtype", dtype)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_line_takes_every_dtype_wide_enough(folder, dtype, capsys):
    run(folder, "--prompt", "a", "--max-new-tokens", "3", "--temperature", "0", "--dtype", dtype)
    assert capsys.readouterr().out == "abcd\n"


@pytest.mark.parametrize("count", ["100000000", "9" * 20])
def test_more_completions_than_fit_are_refused_with_what_they_would_take(folder, capsys, count):
    with pytest.raises(SystemExit) as left:
        run(folder, "--prompt", "a", "--num-samples", count)
    assert left.value.code == 3
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: {int(count):,} completions at once need [\d,]+ MB .*\n", said)
    assert "MB are free; ask for fewer at once" in said


def test_what_a_row_remembers_is_what_it_is_said_to_take(model):
    one, three = (Decoder(model, n_rows) for n_rows in (1, 3))

    def held(decoder):
        return sum(tensor.nbytes for tensor in (*decoder.memory, decoder.mask))

    config = model.config
    logits, read = config.vocab_size * 56, 4 * 3 * config.d_model + 4 * 2 * config.d_ff
    for_one, for_three = (memory_bytes(model, n, 5, torch.float32, False) for n in (1, 3))
    assert for_three - for_one == held(three) - held(one) + 2 * (5 * read + logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_that_a_decoder_copies_are_what_they_are_said_to_take(
    model_config, dtype, tied
):
    model = variant_model(model_config, {"tie_embeddings": tied, "qk_norm": False})
    decoder = Decoder(model, 1, dtype=dtype)
    tensors = [decoder.embeddings, decoder.head]
    tensors += [t for x in decoder.layers for t in (x.qkv, x.output, x.up, x.down)]
    shared = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    copied = sum(t.nbytes for t in tensors if t.untyped_storage().data_ptr() not in shared)
    one, two = (memory_bytes(model, n, 5, dtype, False) for n in (1, 2))
    assert one - (two - one) == copied


@pytest.mark.parametrize(
    ("context", "graphs"), [(16, 1), (GRAPH_SPAN, 1), (GRAPH_SPAN + 1, 2), (5 * GRAPH_SPAN, 5)]
)
def test_every_cuda_graph_counts_with_its_logits(model_config, context, graphs):
    model = variant_model(model_config, {"context_length": context})
    gpu, cpu = (memory_bytes(model, 3, 5, torch.bfloat16, on_gpu) for on_gpu in (True, False))
    assert gpu - cpu == graphs * torch.empty(3, model.config.vocab_size).bfloat16().nbytes


@pytest.mark.parametrize("temperature", [1e-320, 1e-13])
def test_the_coldest_temperatures_take_the_most_probable_token(model, temperature):
    prompts = [[3, 1, 4], [1, 5]]
    cold = rows(generate(model, prompts, 5, temperature=temperature))
    assert cold == rows(generate(model, prompts, 5, temperature=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be in [1, 9223372036854775807]"),
        (["--max-new-tokens", "9" * 20], f"{'9' * 20}: must be in [1, 9223372036854775807]"),
        (["--max-new-tokens", "9" * 5000], "--max-new-tokens: invalid int value"),
        (["--temperature", "-1"], "--temperature -1.0: must be >= 0 and finite"),
        (["--top-k", "0"], "--top-k 0: must be >= 1"),
        (["--top-p", "0"], "--top-p 0.0: must be in (0, 1]"),
        (["--top-p", "nan"], "--top-p nan: must be in (0, 1]"),
        (["--temperature", "nan"], "--temperature nan: must be >= 0 and finite"),
        (["--num-samples", "0"], "--num-samples 0: must be >= 1"),
        (["--stop", ""], "--stop ['']: no stop text may be empty"),
        (["--stop", "\udcff"], "--stop: byte 0xff at offset 0 is not UTF-8"),
        (["--prompt", "ab\udcff"], "--prompt: byte 0xff at offset 2 is not UTF-8"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--prompt-file", "/"], "/: a directory"),
        (["--prompt-file", sys.executable], "is not UTF-8"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--device", "tpu"], f"--device tpu: {DEVICE.text}"),
        (["--device", "cuda:"], f"--device cuda:: {DEVICE.text}"),
        (["--prompt", "", "--model", "nowhere", "--device", "cpu"], "config.json: no such file"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_a_fault_of_the_machine(folder, device, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as left:
        main(["--prompt", "a", "--model", str(folder), "--device", device])
    assert left.value.code == 3
    assert f"device {device}: not available" in capsys.readouterr().err


def test_a_model_folder_from_before_a_setting_still_opens(folder):
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    model, _ = load_model(folder, torch.device("cpu"))
    write_json(file, {key: value for key, value in settings.items() if key not in ADDED["model"]})
    older, _ = load_model(folder, torch.device("cpu"))
    assert older.config == replace(model.config, **ADDED["model"])
    write_json(file, {key: value for key, value in settings.items() if key != "norm"})
    with pytest.raises(InputError, match=r"missing key model\.norm$"):
        load_model(folder, torch.device("cpu"))
