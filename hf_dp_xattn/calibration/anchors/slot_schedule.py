"""In which batches a slot decoder is trained: what a host can afford on two cores. How long is `minutes`' to say."""

from __future__ import annotations

import dataclasses

from .slots_fit import PublicContexts, SlotSettings

MANY = 64  # documents from which a sum is always ahead of one answer for each
_LARGE = 5e6
_BATCH_NUMBERS = 4e7


def is_large(row_flops: float) -> bool:
    """Whether a training step over all layers, or a public denoising run, takes seconds rather than milliseconds.

    Args:
        row_flops: multiplications and additions of one row's keys and values in all layers.
    """
    return row_flops > _LARGE


def slot_schedule(contexts: PublicContexts, row_flops: float, steps: int | None, seed: int) -> SlotSettings:
    """Batches that this host can afford: large hosts get smaller batches over two layers at a time.

    Args:
        contexts: what is trained on.
        row_flops: as in `is_large`; 0 where keys and values are parts of a row, so that the numbers passed are what counts.
        steps: training steps; None: as many as there is time for.
        seed: of the training.
    """
    usual = SlotSettings(seed=seed)
    if row_flops:
        chosen = dataclasses.replace(usual, batch=16, layers=2, slots=48) if is_large(row_flops) else usual
    else:
        each = contexts.whole[0].numel() + contexts.units[0].numel()
        chosen = dataclasses.replace(usual, batch=max(8, min(usual.batch, int(_BATCH_NUMBERS / each))))
    return chosen if steps is None else dataclasses.replace(chosen, steps=steps)


def slots_for(schedule: SlotSettings, documents: int) -> SlotSettings:
    """Contexts of many documents hold more that adds up than a prompt does: more slots; smaller batches keep the time."""
    if documents < MANY:
        return schedule
    batch = max(16, min(schedule.batch, 65_536 // documents))
    return dataclasses.replace(schedule, slots=128, directions=96, batch=batch)
