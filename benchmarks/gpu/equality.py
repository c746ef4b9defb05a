"""Test what must be equal, bit for bit or nearly: straight = resumed, not finite, beside the CPU.

python -m benchmarks.gpu.equality JOB: one training, in a process of its own.
"""

import hashlib
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.runs import Note, small, split_of, train_as_the_stage_does
from benchmarks.worker import Child, Failed, begin
from lm.base.errors import Diverged
from lm.machine.device import prepare
from lm.machine.processes import joined
from lm.machine.sharded_tensors import local
from lm.runs.checkpoint import contents
from lm.train.loop import train
from lm.train.state import TrainState, new_state

CASES: dict[str, dict[str, Any]] = {  # changes to the settings of the small model
    "AdamW float32": {"train.optimizer": "adamw", "train.dtype": "float32"},
    "AdamW bfloat16": {"train.optimizer": "adamw"},
    "AdamW bfloat16 compiled": {"train.optimizer": "adamw", "train.compile": True},
    "Muon bfloat16 compiled": {"train.compile": True},
    "Muon float16, loss scaling": {"train.dtype": "float16"},
    "dropout": {"model.dropout": 0.1},
    "documents masked, compiled": {"model.intra_document_masking": True, "train.compile": True},
    "checkpointing, compiled": {"train.gradient_checkpointing": True, "train.compile": True},
    "4 micro-batches, tree": {"train.micro_batch_size": 4, "train.reduction": "tree"},
    "ddp, compiled": {"train.parallel": "ddp", "train.compile": True},
    "fsdp, Muon": {"train.parallel": "fsdp"},
}
TINY_CASES = ("fsdp, Muon",)
STEPS = 20
MOST_APART = 0.02, 0.1  # nats beside float32 on a CPU: in float32, in bfloat16


def equality(device: torch.device, tiny: bool, note: Note) -> None:
    """Note whether straight = resumed in each case, and a step not finite changes nothing."""

    def one(case: str) -> None:
        try:
            note(case, equal=straight_is_resumed(case, device.type, tiny))
        except Failed as failure:
            note(case, equal=False, failed=str(failure)[-300:])

    with ThreadPoolExecutor(1 if tiny else 6) as pool:
        list(pool.map(one, TINY_CASES if tiny else CASES))
    for optimizer in ("adamw", "muon"):
        kept, said = changes_by_a_step_not_finite({"train.optimizer": optimizer}, device, tiny)
        note(f"a step not finite, {optimizer}", equal=not kept, says=said[:60])


def straight_is_resumed(case: str, device: str, tiny: bool) -> bool:
    """Return whether a run that a signal stopped, and another process resumed, ends in equal bytes.

    The first process trains twice: to the end, and until the signal after half of the steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        straight, resumed = (_child(case, device, tiny, folder, part) for part in "ab")
    return bool(straight == resumed)


def _child(case: str, device: str, tiny: bool, folder: str, part: str) -> Any:
    places = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    job = [case, device, tiny, folder, part]
    with Child("benchmarks.gpu.equality", job, environment=places) as child:
        try:
            return child.start()["ends_in"]
        except Failed:
            print(child.log, file=sys.stderr)
            raise


def main() -> None:
    """Train a part of a case; report the hash of all that its last checkpoint holds."""
    (case, device_name, tiny, folder, part), tell = begin()
    device, steps = torch.device(device_name), 4 if tiny else STEPS
    run_settings = small(CASES[case], tiny, steps)
    _, config, runtime = run_settings
    with joined(config.parallel, device, runtime.process_timeout_s) as processes:
        prepare(device, config.num_threads)

        def ends_in(name: str, stop_after: int | None = None) -> str:
            place = Path(folder, name)
            run, _ = train_as_the_stage_does(
                run_settings, device, place, stop_after=stop_after, processes=processes
            )
            at_most = steps if stop_after is None else steps - 1  # a GPU is a few steps ahead
            assert (stop_after or steps) <= run.state.step <= at_most, run.state.step
            return sha256_of(run.state, run.logbook.extra())

        if part == "a":
            straight = ends_in("straight")
            ends_in("stopped", stop_after=steps // 2)
            tell(ends_in=straight)
        else:
            tell(ends_in=ends_in("stopped"))


def sha256_of(state: TrainState, extra: dict[str, Any]) -> str:
    """Return the hash of all that a checkpoint of a state holds."""
    tensors, metadata = contents(state.model, state.optimizer, state.step, extra)
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for name in sorted(tensors):
        numbers = local(tensors[name]).detach().cpu().contiguous()
        digest.update(numbers.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Return copies of the model's tensors and of all numbers of its optimizer."""
    found = dict(state.model.state_dict())
    for number, entries in state.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": torch.as_tensor(value) for name, value in entries.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not the same bit for bit, NaN or not."""
    bits = ({k: t.reshape(-1).view(torch.uint8) for k, t in x.items()} for x in (before, after))
    old, new = bits
    return [name for name in old | new if not torch.equal(old[name], new[name])]


def changes_by_a_step_not_finite(
    changes: dict[str, Any], device: torch.device, tiny: bool
) -> tuple[list[str], str]:
    """Spoil a weight after two steps; return what the steps after that change, and the error."""
    model, config, _ = small(changes, tiny, 8)
    prepare(device, config.num_threads)
    state = new_state(model, config, device)
    steps = train(state, split_of(model), config, pause=lambda step: step == 2)
    for _ in range(2):
        next(steps)
    with torch.no_grad():
        next(iter(state.model.parameters())).fill_(float("nan"))
    before, step = tensors_of(state), state.step
    try:
        for _ in steps:
            pass
    except Diverged as error:
        names = changed(before, tensors_of(state))
        return names + ["step"] * (state.step != step), str(error)
    return ["everything"], "nothing"


def losses(changes: dict[str, Any], device: torch.device, tiny: bool, steps: int) -> list[float]:
    """Return the losses of a small training."""
    model, config, _ = small({"train.optimizer": "adamw"} | changes, tiny, steps)
    prepare(device, config.num_threads)
    records = train(new_state(model, config, device), split_of(model), config)
    return [float(record["train_loss"]) for record in records]


def curve(device: torch.device, tiny: bool, note: Note) -> None:
    """Note how far the losses on the device are from those of float32 on the CPU."""
    steps, plain = 10 if tiny else 60, {"train.dtype": "float32"}
    there = losses(plain, torch.device("cpu"), tiny, steps)
    ways = [("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True)]
    for dtype, compiled in ways[: 2 if tiny else 4]:
        here = losses({"train.dtype": dtype, "train.compile": compiled}, device, tiny, steps)
        apart = [abs(a - b) for a, b in zip(there, here, strict=True)]
        note(
            f"{dtype}{', compiled' * compiled}",
            close=max(apart) <= MOST_APART[dtype == "bfloat16"],
            first_nats=here[0],
            last_nats=here[-1],
            last_nats_on_cpu=there[-1],
            apart_at_step_1=apart[0],
            apart_at_most=max(apart),
        )


if __name__ == "__main__":
    main()
