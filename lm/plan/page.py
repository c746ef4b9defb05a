"""The plan of a training as a page of tables, in Markdown."""

import dataclasses

from lm.base.console import count, duration
from lm.plan.footprint import flops_per_token, parameters
from lm.plan.plan import Plan
from lm.plan.timing import seconds_for


def table(
    plan: Plan, step_s: float | None, price: float | None, bandwidth: float | None = None
) -> str:
    """Return the plan as a page of Markdown tables; without `step_s`, seconds a step, no times.

    `price` is in EUR an hour for all processes; `bandwidth` in bytes per second for each.
    """
    config, alone = plan.config, plan.num_processes == 1
    sizes, by_part = parameters(plan.model), flops_per_token(plan.model, config, plan.device)
    forward, backward = (sum(flops) for flops in zip(*by_part.values(), strict=True))
    each = "" if alone else f" of each of {plan.num_processes} processes, {config.parallel}"
    title = f"memory{each}, {config.dtype}, micro-batch size {plan.micro_batch_size}"
    checkpointing = not config.gradient_checkpointing
    other = dataclasses.replace(config, gradient_checkpointing=checkpointing)
    instead = sum(dataclasses.replace(plan, config=other).memory.values())
    lines = [
        "| part | parameters |",
        "|------|-----------:|",
        *(f"| {part} | {size:,} |" for part, size in sizes.items()),
        f"| all | {sum(sizes.values()):,} |",
        "",
        "| per token | FLOP forward | FLOP backward |",
        "|-----------|-------------:|--------------:|",
        *(f"| {part} | {f:,.0f} | {b:,.0f} |" for part, (f, b) in by_part.items()),
        f"| all | {forward:,.0f} | {backward:,.0f} |",
        "",
        *_megabytes(title, plan.memory),
        *([] if alone else _megabytes("a process sends in a step", plan.communication)),
        f"With train.gradient_checkpointing: {str(checkpointing).lower()} {instead / 1e6:,.1f} MB",
    ]
    steps, sending_s = f"{count(config.max_steps, 'step')}, {plan.flops:.3e} FLOP", 0.0
    if bandwidth is not None:
        sending_s = sum(plan.communication.values()) / bandwidth
        lines += [f"Sending takes {sending_s:.3f} s a step at {bandwidth / 1e9:g} GB/s"]
    if step_s is None:
        return "\n".join([*lines, f"{steps}; not timed: a step is too large for this machine"])
    # computing and sending overlap, but for the first and the last part of a model
    seconds = seconds_for(plan, config.max_steps, max(step_s, sending_s))
    note = "" if alone else ", timed on one process alone with its share of the windows"
    lines += [f"{steps}, {step_s:.3f} s a step: {duration(seconds)}{note}"]
    if price is not None:
        lines += [f"{seconds / 3600 * price:,.2f} EUR at {price:g} EUR an hour"]
    return "\n".join(lines)


def _megabytes(title: str, parts: dict[str, float]) -> list[str]:
    lines = [f"| {title} | MB |", "|---|---:|"]
    lines += [f"| {part} | {size / 1e6:,.1f} |" for part, size in parts.items()]
    return [*lines, f"| all | {sum(parts.values()) / 1e6:,.1f} |", ""]
