"""A resumable training loop: one checkpoint file per stage, batches that depend on the step only."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

LossFn = Callable[[int, torch.Generator], Tensor]


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the weights, shorter in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, 1 - decay)


def average_gradients(model: nn.Module) -> None:
    """Mean of the gradients over all processes: one message, as the networks are small."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def save_atomically(state: object, path: Path) -> None:
    """A killed run never leaves half a file behind."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def fit(
    name: str,
    model: nn.Module,
    loss_fn: LossFn,
    *,
    out: Path,
    steps: int,
    lr: float,
    seed: int,
    decay: float = 0.99,
    warmup: int = 100,
    every: int = 500,
    on_checkpoint: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Train ``model`` and return the moving average of its weights.

    The state is saved to ``out/NAME.pt`` every ``every`` steps and found again by the next call,
    so a finished stage returns at once. The generator given to ``loss_fn`` is seeded by the step
    (and the process): a resumed run sees the batches that an unbroken one would have seen. In a
    process group every process takes its own batch and the gradients are averaged.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    path = out / f"{name}.pt"
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
    model.train()
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=5.0, disable=rank > 0)
    smooth = None
    for step in bar:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * world + rank)
        for group in optimiser.param_groups:
            group["lr"] = lr * lr_factor(step, steps, warmup)
        loss = loss_fn(step, generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if world > 1:
            average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        update_average(average, model, step, decay)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if rank == 0 and ((step + 1) % every == 0 or step + 1 == steps):
            save_atomically(
                {
                    "step": step + 1,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimiser": optimiser.state_dict(),
                },
                path,
            )
            if on_checkpoint is not None:
                on_checkpoint(step + 1, average)
    return average
