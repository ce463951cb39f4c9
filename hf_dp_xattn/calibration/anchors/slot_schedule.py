"""How long and in which batches a slot decoder is trained: what a host can afford in a few minutes on two cores."""

from __future__ import annotations

import dataclasses

from .slots_fit import PublicContexts, SlotSettings

MANY = 64  # documents from which a sum is always ahead of one answer for each
_LARGE = 5e6
_FLOPS = 1.2e13  # multiplications and additions of a training
_NUMBERS = 5e10  # numbers of context space that a training passes, where projecting them costs nothing
_BATCH_NUMBERS = 4e7


def is_large(row_flops: float) -> bool:
    """Whether a training step over all layers, or a public denoising run, takes seconds rather than milliseconds.

    Args:
        row_flops: multiplications and additions of one row's keys and values in all layers.
    """
    return row_flops > _LARGE


def slot_schedule(
    contexts: PublicContexts, layers: int, row_flops: float, steps: int | None, seed: int
) -> SlotSettings:
    """Batches that this host can afford: large hosts get smaller batches over two layers at a time; by default fewer steps.

    Args:
        contexts: what is trained on.
        layers: how many layers the host has.
        row_flops: as in `is_large`; 0 where keys and values are parts of a row, so that the numbers passed are what counts.
        steps: training steps; None: as many as cost a few minutes.
        seed: of the training.
    """
    usual = SlotSettings(seed=seed)
    if row_flops:
        chosen = dataclasses.replace(usual, batch=16, layers=2, slots=48) if is_large(row_flops) else usual
        # the exact rows pass forward once, the decoded ones forward and back
        passed = chosen.batch * (contexts.whole.shape[1] + 3 * chosen.slots)
        cost, effort = passed * row_flops * min(chosen.layers, layers) / layers, _FLOPS
    else:
        each = contexts.whole[0].numel() + contexts.units[0].numel()
        chosen = dataclasses.replace(usual, batch=max(8, min(usual.batch, int(_BATCH_NUMBERS / each))))
        cost, effort = chosen.batch * each, _NUMBERS
    affordable = max(200, min(usual.steps, int(effort / cost)))
    return dataclasses.replace(chosen, steps=affordable if steps is None else steps)


def slots_for(schedule: SlotSettings, documents: int) -> SlotSettings:
    """Contexts of many documents hold more that adds up than a prompt does: wider codes; smaller batches keep the time."""
    if documents < MANY:
        return schedule
    batch = max(16, min(schedule.batch, 65_536 // documents))
    return dataclasses.replace(schedule, code=128, slots=128, directions=32, batch=batch)
