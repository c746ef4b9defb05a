"""What differs on a GPU: kernels, memory, waiting. `LM_TEST_DEVICE=cpu pytest -m cuda` proves them.

`LM_SHAPE_CHECKS=0` runs those that compile, too.

On a CPU the models are tiny; what is compared with the CPU is then compared with itself.
"""

import copy
import io
import itertools
import json
import os
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu.equality import (
    CASES,
    MOST_APART,
    changed,
    changes_by_a_step_not_finite,
    losses,
    straight_is_resumed,
    tensors_of,
)
from benchmarks.gpu.runs import small, split_of, train_as_the_stage_does
from lm.generate.decoder import Decoder
from lm.generate.stream import generate
from lm.machine.device import Stopwatch, choose_device, describe, environment, prepare
from lm.machine.gauges import peak_memory_bytes, resident_memory_bytes
from lm.model.kernels import linear_cross_entropy
from lm.model.transformer import TransformerLM
from lm.plan.timing import Timing
from lm.runs.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from lm.runs.run_folder import RunFolder
from lm.train.batch import get_batch
from lm.train.loop import train
from lm.train.optim import gradient_clipping
from lm.train.state import new_state

DEVICE, CPU = torch.device(os.environ.get("LM_TEST_DEVICE", "cuda")), torch.device("cpu")
TINY = DEVICE == CPU
VARIANTS = {
    "plain": {},
    "grouped heads, norms of queries and keys": {"num_kv_heads": 2, "qk_norm": True},
    "tied embeddings": {"tie_embeddings": True},
    "norms behind, no gate": {"norm_position": "post", "ffn": "silu"},
    "documents masked": {"intra_document_masking": True},
}
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's compiler, within torch
    pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning"),  # with Python 3.13.0
]
compiles = pytest.mark.skipif(
    os.environ["LM_SHAPE_CHECKS"] != "0",
    reason="torch's compiler cannot trace shape checks: set LM_SHAPE_CHECKS=0",
)


@pytest.fixture(autouse=True)
def as_before():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_deterministic_debug_mode("default")
    torch.set_num_threads(1)


def made(changes=None, device=DEVICE, steps=8):
    """A small training: its model's settings, its own, and its state before the first step."""
    model, config, _ = small(changes or {}, TINY, steps)
    prepare(device, config.num_threads)
    return model, config, new_state(model, config, device)


def model_on(device, **changes):
    config, _, _ = small({f"model.{key}": value for key, value in changes.items()}, True, 4)
    torch.manual_seed(0)
    return TransformerLM(config).to(device).eval()


def ids_of(model, rows=4, more=1):
    size = (rows, model.config.context_length + more)
    ids = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(1))
    return ids.to(model.head.device)


# --- runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_and_resumed_ends_in_the_bytes_of_a_straight_one(case):
    assert straight_is_resumed(case, DEVICE.type, TINY)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "muon"},
        pytest.param({"optimizer": "adamw", "compile": True}, marks=compiles),
        {"optimizer": "muon", "dtype": "float16"},
        {"optimizer": "adamw", "micro_batch_size": 2},
    ],
    ids=str,
)
def test_a_step_not_finite_changes_nothing(changes):
    given = {f"train.{key}": value for key, value in changes.items()}
    names, said = changes_by_a_step_not_finite(given, DEVICE, TINY)
    assert names == []
    assert "loss is nan at step 3" in said


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing_and_the_next_ones_do(optimizer):
    given = {"train.optimizer": optimizer, "train.on_nonfinite": "skip", "train.dtype": "float32"}
    model, config, state = made(given)

    def spoil(gradient):
        return gradient * float("inf") if state.step == 2 else gradient

    state.model.lm_head.weight.register_hook(spoil)
    steps = train(state, split_of(model), config, pause=lambda step: step == 2)
    records = list(itertools.islice(steps, 2))
    before = tensors_of(state)
    records.append(next(steps))
    assert changed(before, tensors_of(state)) == []
    records += list(steps)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert ["skipped" in record for record in records] == [False, False, True] + 5 * [False]
    assert state.skipped_steps == 1
    assert changed(before, tensors_of(state))


@pytest.mark.parametrize(
    "compiled", [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=compiles)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_stay_beside_the_cpus(dtype, compiled):
    there = losses({"train.dtype": "float32"}, CPU, TINY, 20)
    here = losses({"train.dtype": dtype, "train.compile": compiled}, DEVICE, TINY, 20)
    assert here == pytest.approx(there, abs=MOST_APART[dtype == "bfloat16"])
    assert here[-1] < here[0] - 0.1


def test_training_twice_gives_the_same_bits():
    def once():
        model, config, state = made({"model.dropout": 0.1})
        records = [r["train_loss"] for r in train(state, split_of(model), config)]
        return records, tensors_of(state)

    (a, left), (b, right) = once(), once()
    assert a == b
    assert changed(left, right) == []


def test_micro_batches_give_the_losses_of_the_whole_batch():
    def run(changes):
        return losses(changes | {"train.dtype": "float32"}, DEVICE, TINY, 6)

    assert run({"train.micro_batch_size": 1}) == pytest.approx(run({}), abs=1e-3)


def test_a_stopwatch_counts_the_seconds_in_which_the_device_works():
    square, watch, start = torch.randn(500, 500, device=DEVICE), Stopwatch(DEVICE), time.monotonic()
    for _ in range(3):
        with watch.lap():
            square @ square
    torch.get_device_module(DEVICE).synchronize()
    assert 0 < watch.take() <= time.monotonic() - start
    assert watch.take() == 0


@contextmanager
def too_little_memory(state, peak):
    """Limit a GPU to a part of the peak of a whole batch; elsewhere only half of one fits."""
    if state.model.head.is_cuda:
        torch.cuda.empty_cache()
        fraction = 0.7 * peak / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(fraction)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        with state.model.layers[0].register_forward_pre_hook(refuse_more_than_half):
            yield


def refuse_more_than_half(_, inputs):
    if len(inputs[0]) > 32:
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("ahead", [False, True])
def test_out_of_memory_lowers_the_micro_batch_size_and_the_run_goes_on(ahead):
    sizes = {"train.batch_size": 64, "train.dtype": "float32"}

    def records_of(peak=None):
        model, config, state = made(sizes, steps=4)
        state.runs_ahead = ahead
        limit = nullcontext() if peak is None else too_little_memory(state, peak)
        with limit:
            return list(train(state, split_of(model), config, pause=lambda step: False))

    if not TINY:
        torch.cuda.reset_peak_memory_stats()
    whole = records_of()
    parts = records_of(0 if TINY else torch.cuda.max_memory_reserved())
    assert [record["micro_batch_size"] for record in whole] == [64] * 4
    assert all(record["micro_batch_size"] < 64 for record in parts)
    assert [record["step"] for record in parts] == [1, 2, 3, 4]
    for one, other in zip(whole, parts, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-3)


def test_the_peak_of_memory_is_of_training_not_of_the_products_that_measure_the_device(
    tmp_path, monkeypatch
):
    if not TINY:
        torch.cuda.reset_peak_memory_stats()
    run, plan = train_as_the_stage_does(small({}, True, 4), DEVICE, tmp_path)

    def product(device, dtype):
        """Take more memory than the process ever held, as 8192 x 8192 numbers do on a GPU."""
        more = peak_memory_bytes(device) - resident_memory_bytes() + (64 << 20)
        return float(np.ones(more, dtype=np.uint8)[0])

    if TINY:
        monkeypatch.setattr("lm.runs.pace.matmul_flops_per_second", product)
    before = peak_memory_bytes(DEVICE)
    run.write_performance(tmp_path, Timing(plan, 0))
    found = json.loads((tmp_path / "performance.json").read_text())
    for peak in (found["peak_memory_bytes"], found["memory_bytes"]["measured"]):
        assert 0 <= peak - before < 8 << 20
    assert not TINY or peak_memory_bytes(DEVICE) - before > 32 << 20


# --- the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_the_cpus(variant):
    here, there = model_on(DEVICE, **VARIANTS[variant]), model_on(CPU, **VARIANTS[variant])
    for model in (here, there):
        ids = ids_of(model)
        x, y = ids[:, :-1], ids[:, 1:]
        model.nats = model.loss(x, y, model.documents(x, 0))
        model.nats.backward()
    assert here.nats.item() == pytest.approx(there.nats.item(), abs=1e-5)
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_masked_documents_do_not_see_each_other():
    model = model_on(DEVICE, intra_document_masking=True)
    first, second = ids_of(model, 1, 0)[:, :8].clamp(1), ids_of(model, 1, 0)[:, 8:].clamp(1)
    first[0, -1] = 0  # ends a document
    both = torch.cat([first, second], dim=1)
    together = model(both, model.documents(both, 0))
    for part, ids in ((together[:, :8], first), (together[:, 8:], second)):
        torch.testing.assert_close(part, model(ids, model.documents(ids, 0)), atol=1e-4, rtol=1e-4)


def test_the_loss_in_pieces_is_that_of_all_logits():
    generator = torch.Generator().manual_seed(0)
    features, head = (
        torch.randn(300, 32, generator=generator),
        torch.randn(97, 32, generator=generator),
    )
    targets = torch.randint(97, (300,), generator=generator).to(DEVICE)
    grads = []
    for function in (linear_cross_entropy, lambda x, w, y: F.cross_entropy(x @ w.t(), y)):
        x, w = (t.to(DEVICE).requires_grad_() for t in (features, head))
        loss = function(x, w, targets)
        grads.append([loss.detach(), *torch.autograd.grad(loss, (x, w))])
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_is_the_cpus(optimizer):
    # eps keeps g / |g| from magnifying what rounds differently
    given = {"train.optimizer": optimizer, "train.eps": 1e-3}
    sides = [made(given, device)[2] for device in (DEVICE, CPU)]
    for state in sides:
        generator = torch.Generator().manual_seed(0)
        for parameter in state.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        gradient_clipping(state.model.parameters(), 1.0)
        state.optimizer.step()
    here, there = (state.model.state_dict() for state in sides)
    tolerance = 1e-5 if optimizer == "adamw" else 2e-3  # Newton-Schulz in bfloat16
    for name in there:
        torch.testing.assert_close(here[name].cpu(), there[name], atol=tolerance, rtol=1e-3)


def test_the_norm_of_the_gradients_is_the_cpus():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in (5, 1000, 40_000)]
    parameters = [torch.nn.Parameter(torch.zeros_like(value, device=DEVICE)) for value in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value.to(DEVICE, copy=True)
    norm = gradient_clipping(parameters, 1.0).item()
    assert norm == pytest.approx(torch.cat(values).norm().item(), rel=1e-5)
    clipped = torch.cat([parameter.grad.cpu() for parameter in parameters])
    torch.testing.assert_close(clipped, torch.cat(values) / norm, atol=1e-6, rtol=1e-4)


# --- evaluating and decoding --------------------------------------------------------------


def texts(model, prompts, n=12, **options):
    steps = generate(model, prompts, n, **options)
    return [
        list(row) for row in zip(*([token.id for token in step] for step in steps), strict=True)
    ]


@pytest.mark.parametrize("n", [8, 40], ids=["within the context", "beyond the context"])
def test_greedy_text_is_the_cpus(n):
    prompts = [[1, 2, 3], [4]]
    there = texts(model_on(CPU), prompts, n, temperature=0)
    assert texts(model_on(DEVICE), prompts, n, temperature=0) == there


def test_a_row_does_not_depend_on_the_others():
    model = model_on(DEVICE)
    prompts = [[1, 2, 3], [4], [5, 6]]
    together = texts(model, prompts, temperature=0)
    assert together == [texts(model, [prompt], temperature=0)[0] for prompt in prompts]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_draws_the_same_text(dtype):
    model, options = model_on(DEVICE), {"temperature": 0.8, "top_k": 20, "dtype": dtype}
    a, b, c = (texts(model, [[1, 2]], 30, seed=seed, **options) for seed in (0, 0, 1))
    assert a == b != c


@pytest.fixture
def replayed(monkeypatch):
    """The CUDA graphs, one for each launch of one."""
    if TINY:
        pytest.skip("a CPU has no CUDA graphs")
    graphs, replay = [], torch.cuda.CUDAGraph.replay

    def counted(graph):
        graphs.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return graphs


def test_decoding_replays_a_cuda_graph_from_the_second_step_of_a_span_on(replayed):
    decoder = Decoder(model_on(DEVICE), 1)
    decoder.read([0], [[1, 2, 3]])
    for _ in range(5):
        decoder.step(torch.tensor([4], device=DEVICE))
    assert len(replayed) == 4


@compiles
def test_a_compiled_step_of_training_replays_a_cuda_graph(replayed):
    model, config, state = made({"train.compile": True})
    steps = train(state, split_of(model), config)
    list(itertools.islice(steps, 4))  # compiles and records
    replayed.clear()
    assert len(list(steps)) == 4
    assert len(replayed) >= 4


# --- memory and files ---------------------------------------------------------------------


def test_a_batch_arrives_as_it_was_dealt():
    data = split_of(model_on(CPU).config).tokens
    here, there = (get_batch(data, 8, 16, device, seed=3, step=5) for device in (DEVICE, "cpu"))
    for a, b in zip(here, there, strict=True):
        assert a.device.type == DEVICE.type
        assert torch.equal(a.cpu(), b)


def test_a_checkpoint_goes_from_device_to_device():
    model, config, state = made()
    *_, _ = train(state, split_of(model), config)
    file = io.BytesIO()
    save_checkpoint(state.model, state.optimizer, state.step, file)
    there = new_state(model, config, CPU)
    assert load_checkpoint(io.BytesIO(file.getvalue()), there.model, there.optimizer) == 8
    assert weights_sha256(there.model) == weights_sha256(state.model)
    here = {name: tensor.cpu() for name, tensor in tensors_of(state).items()}
    assert changed(here, tensors_of(there)) == []


def test_a_save_in_the_background_is_of_the_step_at_which_it_was_asked_for(tmp_path):
    _, config, state = made()
    as_asked = copy.deepcopy(state.model)
    run_folder = RunFolder(tmp_path / "run", 2)
    extra = {"best": {"step": None}}
    run_folder.save(state.model, state.optimizer, 1, extra)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.zero_()  # while the thread writes
    run_folder.wait()
    run_folder.save(state.model, state.optimizer, 2, extra)  # into the same pinned memory
    run_folder.unlock()
    read = new_state(state.model.config, config, CPU)
    load_checkpoint(run_folder.checkpoint(1), read.model, read.optimizer)
    assert weights_sha256(read.model) == weights_sha256(as_asked)
    load_checkpoint(run_folder.checkpoint(2), read.model, read.optimizer)
    assert not any(parameter.any() for parameter in read.model.parameters())


def test_the_device_is_the_one_asked_for_and_named():
    assert choose_device(DEVICE.type) == DEVICE
    found = environment(DEVICE, False)
    assert found["device"] == describe(DEVICE)
    assert ("cuda" in found) == (not TINY)


def test_a_kernel_that_is_not_deterministic_is_refused():
    prepare(DEVICE, 1)
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(4, device=DEVICE).put_(
            torch.tensor([0, 0], device=DEVICE), torch.ones(2, device=DEVICE)
        )
