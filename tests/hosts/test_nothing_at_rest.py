"""Invariant 7: errors, the ledger's names and memory carry no private row, prompt or token id.

What is written and shown is searched in tests/hub/test_nothing_private_at_rest.py.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import DPXAttnError

from ..hosts_tiny import CHANNELS, picture, tiny_sd
from .anchor_calibrations import BOTH, protect
from .transformers.mllama import protecting
from .transformers.mllama.tiny import generate as describe
from .transformers.mllama.tiny import images, texts
from .transformers.mllama.tiny import tiny as image_tiny

SECRET = "zebra quartz"


def check_clean(text: str, secrets: list[str]) -> None:
    for secret in secrets:
        assert secret not in text


def provoke(pipe: Any, handle: Any) -> list[str]:
    """Texts of the errors that private input can cause, with their causes."""
    rows = torch.full((1, 16, CHANNELS), 0.12345)
    ids = torch.tensor([[0, 87, 66, 63]])
    calls = [
        lambda: picture(pipe, SECRET, prompt_embeds=rows),
        lambda: picture(pipe, [SECRET, 3]),
        lambda: picture(pipe, (SECRET,)),
        lambda: picture(pipe, {SECRET: 1}),
        lambda: picture(pipe, SECRET, negative_prompt=["a", "b"]),
        lambda: picture(pipe, [SECRET, SECRET], negative_prompt=["a", "b", "c"]),
        lambda: picture(pipe, SECRET, clip_skip=1),
        lambda: picture(pipe, prompt_embeds=rows[0]),
        lambda: picture(pipe, prompt_embeds=rows[..., :8]),
        lambda: picture(pipe, prompt_embeds=torch.where(rows > 0, torch.nan, rows)),
        lambda: handle.release(SECRET, fresh=True),
        lambda: handle.release(SECRET, groups=torch.zeros(3)),
        lambda: handle.release(ids.repeat(1, 9)),
        lambda: handle.release(-ids),
        lambda: handle.release(ids + 1),
        lambda: handle.release({SECRET}),
        lambda: handle.release(SECRET.encode()),
    ]
    texts = []
    handle.release(SECRET)
    for call in calls:
        with pytest.raises((DPXAttnError, ValueError, TypeError)) as caught:
            call()
        error: BaseException | None = caught.value
        while error is not None:
            texts.append(repr(error) + str(error))
            error = error.__cause__ or error.__context__
    return texts


@BOTH
def test_errors_do_not_quote_the_context(pipe: Any, private: Any) -> None:
    texts = provoke(pipe, protect(pipe, private))
    check_clean("\n".join(texts), ["zebra", "quartz", "0.1234", "87, 66", "87"])


def test_diffusers_own_errors_would_quote_it(pipe: Any) -> None:
    """Power: what the shadowed `check_inputs` is for."""
    with pytest.raises(ValueError, match="zebra"):
        picture(pipe, SECRET, prompt_embeds=torch.zeros(1, 16, CHANNELS))


def test_the_ledger_names_contexts_by_keyed_digests(private: Any, tmp_path: Any) -> None:
    """Two ledgers give one prompt unlike names, so that a list of guesses cannot be tried against a ledger file."""
    names = []
    for name in "ab":
        pipe = tiny_sd()
        with protect(pipe, private, ledger=dpx.Ledger(tmp_path / name)) as handle:
            handle.release(SECRET)
            names.append(handle.ledger.entries()[0].digest)
    assert names[0] != names[1]


def holders(rows: torch.Tensor) -> int:
    """How many live tensors but `rows` [n, C] hold its last row."""
    gc.collect()
    count = 0
    for item in gc.get_objects():
        plain = (
            type(item) in (torch.Tensor, torch.nn.Parameter)
            and item is not rows
            and item.dtype == torch.float32
        )
        if plain and item.shape[-1:] == rows.shape[-1:]:
            flat = item.detach().reshape(-1, rows.shape[-1])
            count += len(flat) < 10_000 and bool(((flat - rows[-1]).abs().amax(-1) < 1e-5).any())
    return count


def check_memory(rows: torch.Tensor) -> None:
    """No live tensor but `rows` holds its last row; with power: one more copy would be seen."""
    assert holders(rows) == 0
    kept = rows.clone()
    assert holders(rows) == 1
    del kept


@BOTH
def test_nothing_of_the_context_stays_in_memory(pipe: Any, private: Any) -> None:
    """After a release, no live tensor holds a private row."""
    with torch.no_grad():
        rows = tiny_sd().encode_prompt(SECRET, "cpu", 1, False)[0][0, 1:].clone()
    handle = protect(pipe, private)
    release = handle.release(SECRET)
    picture(pipe, SECRET)
    check_memory(rows)
    assert release.contexts


@BOTH
@pytest.mark.slow
def test_nothing_of_an_image_stays_in_memory(private: Any) -> None:
    """Likewise of the vision model's output, and of the pixels beside the caller's own."""
    # pixels that no other test holds in memory: they are searched for by value
    given = images(1, seed=20_260_724)
    with torch.no_grad():
        reference = image_tiny().model
        states = reference.vision_model(**given).last_hidden_state
        rows = reference.multi_modal_projector(states).flatten(0, -2).clone()
    del reference, states
    model = image_tiny()
    handle = protecting.protect(model, private)
    release = handle.release(**given)
    describe(model, {**given, **texts(1)})
    check_memory(rows)
    lines = given.pop("pixel_values").flatten(0, -2).clone()  # the caller's own tensor is gone
    check_memory(lines)
    assert release.contexts
