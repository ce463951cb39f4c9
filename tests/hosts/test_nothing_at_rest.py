"""Invariant 7: saved files, repr, reports, logs, errors and ledgers carry no private row, prompt or token id."""

from __future__ import annotations

import json
import logging
import struct
from typing import Any

import diffusers
import pytest
import torch
import transformers

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import DPXAttnError

from ..hosts_tiny import CHANNELS, picture, tiny_sd
from .anchor_calibrations import BOTH, protect

SECRET = "zebra quartz"
LONG_SECRET = "zebra quartz jukebox wyvern obelisk marzipan"


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture) -> Any:
    """All log records, those of diffusers and transformers (which do not propagate) included."""
    caplog.set_level(logging.DEBUG)
    libraries = [logging.getLogger(n) for n in ("diffusers", "transformers", "hf_dp_xattn")]
    verbosity = diffusers.logging.get_verbosity(), transformers.logging.get_verbosity()
    for library in libraries:
        library.addHandler(caplog.handler)
    diffusers.logging.set_verbosity_debug()
    transformers.logging.set_verbosity_debug()
    yield caplog
    for library in libraries:
        library.removeHandler(caplog.handler)
    diffusers.logging.set_verbosity(verbosity[0])
    transformers.logging.set_verbosity(verbosity[1])


def needles(pipe: Any, prompt: str) -> list[bytes]:
    """The prompt's words, its token ids in several spellings, and bytes of its private rows, keys and values."""
    ids = pipe.tokenizer(prompt, truncation=True, max_length=16).input_ids[1:6]
    found = [w.encode() for w in prompt.split() if len(w) > 3]
    found += [", ".join(map(str, ids)).encode(), " ".join(map(str, ids)).encode()]
    found += [struct.pack(f"<{len(ids)}{kind}", *ids) for kind in "qi"]
    with torch.no_grad():
        rows = pipe.encode_prompt(prompt, "cpu", 1, False)[0][0, 1:]
        attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
        for tensor in (rows, attn.to_k(rows), attn.to_v(rows)):
            for line in tensor:
                found.append(line[:4].numpy().tobytes())
                found.append(line[:4].to(torch.float16).numpy().tobytes())
            found.append(f"{float(tensor[0, 0]):.4f}".encode())
    return found


def check_clean(blobs: dict[str, bytes], secrets: list[bytes]) -> None:
    for where, blob in blobs.items():
        for secret in secrets:
            assert secret not in blob, where


def files(folder: Any) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def everything_written(pipe: Any, config: Any, folder: Any) -> dict[str, bytes]:
    """Uses a protected pipeline in every way, and collects what it shows and writes."""
    handle = protect(pipe, config, ledger=dpx.Ledger(folder / "ledger.json"))
    picture(pipe, SECRET, negative_prompt="ugly")
    picture(pipe, LONG_SECRET, num_images_per_prompt=2)
    release = handle.release([SECRET, LONG_SECRET])
    release.inputs(prompt="a wash")
    release.save_pretrained(folder / "release")
    pipe.save_pretrained(folder / "pipe")
    handle.config.save_pretrained(folder / "config")
    shown = {
        "handle": handle,
        "release": release,
        "context": release.contexts[0],
        "ledger": handle.ledger,
        "pipe": pipe,
    }
    shown |= {"guarantees": release.guarantees, "report": handle.report(), "entries": handle.ledger.entries()}
    blobs = {name: (repr(o) + str(o)).encode() for name, o in shown.items()}
    blobs["report.json"] = handle.report().to_json().encode()
    return {**blobs, **files(folder)}


@BOTH
def test_nothing_that_is_shown_or_written_holds_the_context(private: Any, tmp_path: Any, logs: Any) -> None:
    pipe = tiny_sd()
    secrets = needles(tiny_sd(), SECRET) + needles(tiny_sd(), LONG_SECRET)
    logs.clear()
    blobs = everything_written(pipe, private, tmp_path)
    assert len(blobs) > 12
    check_clean({**blobs, "log": logs.text.encode()}, secrets)
    assert "longer than" not in logs.text  # nor how long a prompt is
    assert "truncated" not in logs.text


def test_the_logs_are_really_read(logs: Any) -> None:
    """Power: the unprotected pipeline logs the words that it cuts off."""
    logs.clear()
    picture(tiny_sd(), LONG_SECRET)
    with pytest.raises(AssertionError):
        check_clean({"log": logs.text.encode()}, [b"wyvern", b"obelisk"])


@pytest.mark.parametrize("plant", ["text", "ids", "rows", "half", "key"])
def test_planted_content_is_found(plant: str, tmp_path: Any) -> None:
    pipe = tiny_sd()
    ids = pipe.tokenizer(SECRET, return_tensors="pt").input_ids[0]
    rows = pipe.encode_prompt(SECRET, "cpu", 1, False)[0][0].detach()
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    content = {
        "text": SECRET.encode(),
        "ids": json.dumps(ids.tolist()).encode(),
        "rows": rows.numpy().tobytes(),
        "half": rows.half().numpy().tobytes(),
        "key": attn.to_k(rows).detach().numpy().tobytes(),
    }[plant]
    (tmp_path / "x").write_bytes(b"....." + content)
    with pytest.raises(AssertionError):
        check_clean(files(tmp_path), needles(pipe, SECRET))


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
    check_clean({"errors": "\n".join(texts).encode()}, [b"zebra", b"quartz", b"0.1234", b"87, 66", b"87"])


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


@BOTH
def test_nothing_of_the_context_stays_in_memory(pipe: Any, private: Any) -> None:
    """After a release, no live tensor holds a private row, key or value."""
    import gc

    reference = tiny_sd()
    with torch.no_grad():
        rows = reference.encode_prompt(SECRET, "cpu", 1, False)[0][0, 1:].clone()
    del reference

    def holders() -> int:
        gc.collect()
        count = 0
        for item in gc.get_objects():
            plain = (
                type(item) in (torch.Tensor, torch.nn.Parameter)
                and item is not rows
                and item.dtype == torch.float32
            )
            if plain and item.shape[-1:] == (CHANNELS,):
                flat = item.detach().reshape(-1, CHANNELS)
                count += (
                    bool(((flat[:, None] - rows[-1:]).abs().amax(-1) < 1e-5).any())
                    if flat.shape[0] < 10_000
                    else 0
                )
        return count

    handle = protect(pipe, private)
    release = handle.release(SECRET)
    picture(pipe, SECRET)
    base = holders()
    assert release.contexts
    kept = rows.clone()  # power: one more copy is seen
    assert holders() == base + 1 and base == 0
    del kept
