"""Gradients of several processes: those of one process, to the byte where that is promised."""

from dataclasses import replace
from typing import get_args, get_type_hints

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from lm.base.settings import PARALLEL, TrainConfig, share_of_batch
from lm.machine import collectives
from lm.machine.processes import ALONE, Processes, joined
from lm.machine.sharded_tensors import (
    collect,
    cut_like,
    hand_out,
    local,
    sums_of_squares,
    whole,
)
from lm.model.validation import evaluate
from lm.plan.footprint import communication, peak_memory
from lm.runs.logbook import Logbook
from lm.runs.saved_run import Identity
from lm.train.accumulate import make_accumulator
from lm.train.loop import train
from lm.train.parallel import PairwiseSum, own_micro_batches, pairwise
from lm.train.recover import lower_micro_batch_size
from lm.train.state import new_state
from tests.ranks import together
from tests.test_train import CPU, SPLIT

TWO_AND_FOUR = [2, pytest.param(4, marks=pytest.mark.soak)]


def trained(processes, model_config, config):
    """Losses, gradient norms, and the weights at the end."""
    state = new_state(model_config, config, CPU, processes)
    records = list(train(state, SPLIT, config))
    weights = {name: whole(tensor) for name, tensor in state.model.state_dict().items()}
    return [(r["train_loss"], r["grad_norm"]) for r in records], weights


def by_ranks(size, parallel, model_config, config):
    """Of such a training what one rank has in the end, which must be what each has."""
    config = replace(config, parallel=parallel)
    first, *others = together(size, trained, model_config, config, parallel=parallel)
    for records, weights in others:
        assert records == first[0]
        assert same_bytes(weights, first[1])
    return first


def same_bytes(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def config(train_config):
    """Eight micro-batches an update, and an update that does not magnify rounding errors."""
    return replace(train_config, batch_size=8, micro_batch_size=1, max_steps=4, warmup_steps=0,
                   eps=1e-3)  # fmt: skip


MANY_BUCKETS = {"vocab_size": 12_000}  # DistributedDataParallel sends gradients by the megabyte
SETTINGS = [
    (MANY_BUCKETS, {}),
    ({}, {"optimizer": "muon"}),
    pytest.param({"tie_embeddings": True, "vocab_size": 97}, {}, marks=pytest.mark.soak),
    ({"dropout": 0.2}, {"gradient_checkpointing": True, "dtype": "bfloat16"}),
]


@pytest.mark.parametrize("size", TWO_AND_FOUR)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("of_model", "of_train"), SETTINGS, ids=str)
def test_several_processes_train_as_one_does(
    model_config, config, size, parallel, of_model, of_train
):
    model_config, config = replace(model_config, **of_model), replace(config, **of_train)
    one, one_weights = trained(ALONE, model_config, config)
    several, weights = by_ranks(size, parallel, model_config, config)
    # Newton-Schulz is in bfloat16, too
    rough = config.dtype == "bfloat16" or config.optimizer == "muon"
    for (loss, norm), (their_loss, their_norm) in zip(one, several, strict=True):
        assert their_loss == pytest.approx(loss, rel=1e-3 if rough else 1e-5)
        assert their_norm == pytest.approx(norm, rel=1e-2 if rough else 1e-3)
    tolerance = 2e-3 if rough else 1e-5
    for name, tensor in one_weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(("of_model", "of_train"), SETTINGS, ids=str)
@pytest.mark.parametrize("size", TWO_AND_FOUR)
def test_over_a_tree_any_number_of_processes_gives_the_same_bytes(
    model_config, config, size, of_model, of_train
):
    model_config = replace(model_config, **of_model)
    config = replace(config, reduction="tree", max_grad_norm=0.5, **of_train)
    records, weights = trained(ALONE, model_config, config)
    assert all(norm > 0.5 for _, norm in records)  # clipped
    for parallel in ("ddp", "fsdp"):
        their_records, theirs = by_ranks(size, parallel, model_config, config)
        assert their_records == records
        assert same_bytes(theirs, weights)


def test_in_any_order_two_processes_give_other_bytes_than_one(model_config, config):
    """The control: were all sums alike, the tree would prove nothing."""
    _, weights = trained(ALONE, model_config, config)
    for parallel in ("ddp", "fsdp"):
        _, theirs = by_ranks(2, parallel, model_config, config)
        assert not same_bytes(theirs, weights)


def first_gradients(processes, model_config, config):
    state = new_state(model_config, config, CPU, processes)
    next(train(state, SPLIT, config))
    return {name: whole(p.grad) for name, p in state.model.named_parameters()}


@pytest.mark.parametrize("reduction", ["sum", "tree"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_the_mean_over_the_batch(model_config, config, parallel, reduction):
    """By torch's cross-entropy, window by window, added up in float64."""
    config = replace(config, micro_batch_size=2, max_grad_norm=None, reduction=reduction)
    model = new_state(model_config, config, CPU).model
    expected = {name: np.zeros(p.shape) for name, p in model.named_parameters()}
    for x, y in zip(*SPLIT.batch(0, 8, 16, config.seed, config.sampling), strict=True):
        model.zero_grad()
        F.cross_entropy(model(torch.tensor(x)[None])[0], torch.tensor(y)).backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad.double().numpy() / 8
    config = replace(config, parallel=parallel)
    for found in together(2, first_gradients, model_config, config, parallel=parallel):
        for name, gradient in expected.items():
            largest = np.abs(gradient).max()
            np.testing.assert_allclose(found[name], gradient, atol=1e-6 * largest, err_msg=name)


def recursive_sum(terms):
    if len(terms) == 1:
        return terms[0]
    middle = len(terms) // 2
    return recursive_sum(terms[:middle]) + recursive_sum(terms[middle:])


def test_a_pairwise_sum_by_hand():
    """In float32 1e8 + 1 = 1e8: over a tree both ones are lost, one by one only the first."""
    terms = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    assert (((terms[0] + terms[1]) + terms[2]) + terms[3]).item() == 1.0
    assert pairwise(terms).item() == 0.0
    tree = PairwiseSum()
    for term in terms:
        tree.add([term.clone()])
    assert [sums[0].item() for sums in tree.take()] == [0.0]
    assert tree.take() == []


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_sums_of_processes_add_up_to_the_same_tree(leaves, ranks, seed):
    """2^k terms, cut among 2^r processes, each of which adds up its own."""
    ranks = min(leaves, ranks)
    terms = torch.randn(2**leaves, 3, generator=torch.Generator().manual_seed(seed))
    expected = recursive_sum(list(terms))
    parts = []
    for share in terms.clone().split(2 ** (leaves - ranks)):
        tree = PairwiseSum()
        for term in share:
            tree.add([term])
        ((part,),) = tree.take()
        parts.append(part)
    assert torch.equal(pairwise(torch.stack(parts)), expected)
    tree, rest = PairwiseSum(), list(terms.clone())
    for term in rest[:-1]:
        tree.add([term])
    last = rest[-1]  # as DistributedDataParallel adds the last gradients: while they arrive
    for (sums,) in tree.take():
        last = last + sums
    assert torch.equal(last, expected)


@given(st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_every_micro_batch_is_computed_by_one_process(share, size, alternating):
    taken = [
        own_micro_batches(share * size, Processes(rank, size), alternating) for rank in range(size)
    ]
    assert sorted(number for numbers in taken for number in numbers) == list(range(share * size))
    assert {len(numbers) for numbers in taken} == {share}
    if alternating:  # those computed at the same time are neighbours
        for turn, at_once in enumerate(zip(*taken, strict=True)):
            assert list(at_once) == list(range(turn * size, (turn + 1) * size))
    else:  # those of a process are
        assert [n for numbers in taken for n in numbers] == list(range(share * size))


def test_a_mode_that_a_place_does_not_know_is_an_error_there(
    model_config, train_config, monkeypatch
):
    """Never computed as one of those it knows."""
    state = new_state(model_config, train_config, CPU)
    config = replace(train_config, num_threads=None)
    object.__setattr__(config, "parallel", "pipeline")
    monkeypatch.delenv("OMP_NUM_THREADS")
    for place in (
        lambda: config.threads,
        lambda: share_of_batch(config, 1),
        lambda: joined("pipeline", CPU, 1).__enter__(),
        lambda: new_state(model_config, config, CPU),
        lambda: make_accumulator(state.model, config, ALONE, None),
        lambda: lower_micro_batch_size(state, config),
        lambda: Logbook(state, config, Identity({}, {}, {}, {}, {}, None)),
        lambda: peak_memory(model_config, config, CPU, 1, 0),
        lambda: communication(model_config, config, 2, 1),
    ):
        with pytest.raises((KeyError, AssertionError), match="pipeline"):
            place()
    assert get_args(get_type_hints(TrainConfig)["parallel"]) == tuple(PARALLEL)


class Calls:
    """Counts the calls of collectives, and lets them through."""

    def __init__(self):
        of_dist = ("all_reduce", "all_to_all_single")
        self.counts = dict.fromkeys((*of_dist, "reduce_scatter_single"), 0)
        for name in self.counts:
            module = dist if name in of_dist else collectives
            setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name, function):
        def call(*arguments, **options):
            self.counts[name] += 1
            return function(*arguments, **options)

        return call


def counted(processes, model_config, config):
    state = new_state(model_config, config, CPU, processes)
    calls = Calls()
    assert len(list(train(state, SPLIT, config))) == config.max_steps
    return calls.counts


def test_gradients_are_exchanged_once_an_update(model_config, config):
    """Four micro-batches in each process, three updates; two blocks and what is around them."""
    config = replace(config, max_steps=3)
    for parallel, reduction, expected in (
        ("ddp", "sum", {"all_reduce": 3}),
        ("ddp", "tree", {"all_to_all_single": 3}),
        ("fsdp", "sum", {"reduce_scatter_single": 3 * 3}),
        # nobody holds gradients of a whole model: each micro-batch's are added up at once
        ("fsdp", "tree", {"all_to_all_single": 3 * 3 * 4}),
    ):
        changed = replace(config, parallel=parallel, reduction=reduction)
        for counts in together(2, counted, model_config, changed, parallel=parallel):
            assert {name: n for name, n in counts.items() if n} == expected, changed


def test_each_of_many_buckets_is_exchanged_once_an_update(model_config, config):
    """As often with four micro-batches in each process as with one."""
    model_config = replace(model_config, **MANY_BUCKETS)
    config = replace(config, parallel="ddp", max_steps=3)
    given = (replace(config, micro_batch_size=size) for size in (1, 4))
    many, one = (together(2, counted, model_config, c)[0]["all_reduce"] for c in given)
    assert many == one > 3


def shared_rows(processes, matrices):
    """The matrices, shared out; their sums of squares; and a walk of whole ones and back."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (processes.size,))
    shared = [distribute_tensor(matrix, mesh, [Shard(0)]) for matrix in matrices]
    squares = sums_of_squares(shared)
    again = cut_like(matrices[0], shared[0])
    assert torch.equal(local(again), local(shared[0]))
    mine = collect([local(s) for s in shared[: processes.size]], shared[0])
    doubled = None if mine is None else 2 * mine
    count = len(shared[: processes.size])
    back = hand_out(doubled, count, torch.float32, shared[0])
    doubles = [torch.equal(part, 2 * local(s)) for part, s in zip(back, shared, strict=False)]
    return squares, mine, doubles, [tuple(local(s).shape) for s in shared]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.soak)])
@pytest.mark.parametrize("rows", [1, 5, 6])
@pytest.mark.parametrize("count", [1, 4])
def test_rows_are_shared_collected_and_handed_out(size, rows, count):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(rows, 3, generator=generator) for _ in range(count)]
    expected = np.concatenate([(m.double().numpy() ** 2).sum(axis=1) for m in matrices])
    for rank, found in enumerate(together(size, shared_rows, matrices, parallel="fsdp")):
        squares, mine, doubles, shapes = found
        np.testing.assert_allclose(squares, expected, rtol=1e-14)
        assert (mine is None) is (rank >= count)
        assert mine is None or torch.equal(mine, matrices[rank])
        assert doubles == [True] * min(count, size)
        most = -(-rows // size)
        kept = min(max(rows - rank * most, 0), most)
        assert shapes == [(kept, 3)] * count


def kept_of_state(processes, model_config, config):
    """Of each tensor of model and optimizer: rows that are kept here, and rows in all."""
    state = new_state(model_config, config, CPU, processes)
    next(train(state, SPLIT, config))
    tensors = dict(state.model.named_parameters())
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.ndim:
                tensors[f"{name} {key}"] = value
    return {name: (len(local(t)), len(t)) for name, t in tensors.items()}


@pytest.mark.parametrize("size", TWO_AND_FOUR)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_process_keeps_its_rows_of_parameters_and_optimizer_alone(
    model_config, config, size, optimizer
):
    model_config = replace(model_config, vocab_size=97)
    config = replace(config, parallel="fsdp", optimizer=optimizer)
    ranks = together(size, kept_of_state, model_config, config, parallel="fsdp")
    names = ranks[0].keys()
    assert len(names) > 2 * len([name for name in names if " " not in name]) * 0.9
    for name in names:
        kept, (rows, *_) = zip(*(rank[name] for rank in ranks), strict=True)
        assert max(kept) <= -(-rows // size), name
        assert sum(kept) == rows, name


def evaluated(processes, model_config, config, batch_size):
    state = new_state(model_config, config, CPU, processes)
    lengths = np.arange(model_config.vocab_size)
    sums = evaluate(state.model, SPLIT, batch_size, lengths, processes=processes)
    return sums.nats.tobytes(), sums.counts.tobytes(), sums.n_bytes, sums.first_guesses.tobytes()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_validation_gives_the_same_bytes_for_any_number_of_processes(
    model_config, config, size, parallel
):
    config = replace(config, parallel=parallel)
    for batch_size in (37, 188):  # 6 batches, the last of fewer windows; one batch
        given = (model_config, config, batch_size)
        alone = evaluated(ALONE, model_config, replace(config, parallel="none"), batch_size)
        assert together(size, evaluated, *given, parallel=parallel) == [alone] * size
