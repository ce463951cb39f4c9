"""Neighbouring contexts and histories on four kinds of host, with equal noise and equal sums: all that is published must be equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.mechanisms.anchors.mixed import AnchorMixed
from hf_dp_xattn.mechanisms.anchors.sources import AnchorCounts, AnchorHistogram, AnchorResponse, AnchorSum
from hf_dp_xattn.mechanisms.base import Integers
from hf_dp_xattn.mechanisms.dptree.dptree import PreparedDPTree
from hf_dp_xattn.mechanisms.kernel_sum.kernel_sum import PreparedKernelSum
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.ledger import Budget

from ..hosts import anchor_calibrations
from ..hosts.transformers.decoder_only.calibrations import calibration_for as for_decoder
from ..hosts.transformers.decoder_only.tiny import tiny as decoder_tiny
from ..hosts.transformers.encoder_decoder.calibrations import calibration_for as for_documents
from ..hosts.transformers.encoder_decoder.tiny import tiny
from ..hosts.transformers.mllama.protecting import anchors_for
from ..hosts.transformers.mllama.tiny import images, texts
from ..hosts.transformers.mllama.tiny import tiny as image_tiny
from ..hosts_tiny import CHANNELS, picture, tiny_sd
from .hosts import files
from .server import FakeHub

MECHANISMS = ("kernel_sum", "dptree", "anchors")
REPLACE, ADD = "replace_one", "add_or_remove_one"


class FixedEntropy(SeededEntropy):
    """Equal noise in two worlds. It says that it is private, or nothing could be saved."""

    @property
    def private(self) -> bool:
        return True


def zeroed(exact: Integers) -> Integers:
    """Sums or cells of the same shapes."""
    return tuple(torch.zeros_like(t) for t in exact)


def equal_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum of private contributions is zero: with equal noise, two worlds release equal integers."""
    anchors = (AnchorSum, AnchorResponse, AnchorHistogram, AnchorMixed, AnchorCounts)
    for owner in (PreparedKernelSum, PreparedDPTree, *anchors):
        original = owner.exact

        def patched(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            return zeroed(_original(*args, **kwargs))

        monkeypatch.setattr(owner, "exact", patched)


Given = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two neighbouring contexts as arguments of `release`, and two as those of `append` to a release that was opened with them."""

    unit: str
    relation: str
    one: Given
    other: Given
    appended: tuple[Given, Given] | None = None


@dataclass(frozen=True)
class Host:
    """make: a fresh host. calibration(host, unit, relation). pairs. read(host, inputs): what the public sees."""

    make: Callable[[], Any]
    calibration: Callable[[Any, str, str], AnchorCalibration]
    pairs: dict[str, Pair]
    read: Callable[[Any, Any], torch.Tensor]


def rows(n: int, channels: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(seed))


def replaced(whole: torch.Tensor) -> torch.Tensor:
    """The third row is another one."""
    other = whole.clone()
    other[2] = whole.flip(-1)[2]
    return other


def _row_pairs(channels: int) -> dict[str, Pair]:
    whole = rows(9, channels)
    return {
        "a row is another one": Pair("row", REPLACE, {"context": whole}, {"context": replaced(whole)}),
        "a row more": Pair("row", ADD, {"context": whole}, {"context": whole[:8]}),
        "a group more": Pair(
            "group",
            ADD,
            {"context": whole, "groups": torch.arange(9) // 3},
            {"context": whole[:6], "groups": torch.arange(6) // 3},
        ),
        "another context, shorter": Pair("context", REPLACE, {"context": whole}, {"context": whole[3:] + 1}),
    }


def _growing(channels: int) -> dict[str, Pair]:
    whole, more = rows(9, channels), rows(5, channels, 1)
    opened = {"context": whole, "horizon": 2}
    return {
        "an append of a row more": Pair(
            "row", ADD, opened, opened, ({"context": more}, {"context": more[:4]})
        ),
        "an opening of a row more": Pair(
            "row", ADD, opened, {**opened, "context": whole[:8]}, ({"context": more}, {"context": more})
        ),
    }


def _of_pipe(kind: str) -> Host:
    phrases = {"groups": "phrases"}
    pairs = {
        **_row_pairs(CHANNELS),
        **(_growing(CHANNELS) if kind != "response" else {}),
        "another prompt": Pair("context", REPLACE, {"context": "zebra quartz"}, {"context": "an obelisk"}),
        "another phrase": Pair(
            "group",
            REPLACE,
            {"context": ["a zebra", "by day"], **phrases},
            {"context": ["an elk", "by day"], **phrases},
        ),
        "a phrase more": Pair(
            "group", ADD, {"context": "a zebra, by day", **phrases}, {"context": "a zebra", **phrases}
        ),
    }

    def calibrate(pipe: Any, unit: str, relation: str) -> AnchorCalibration:
        return anchor_calibrations.calibration_for(pipe, kind, unit=unit, neighboring=relation)

    return Host(
        tiny_sd, calibrate, pairs, lambda pipe, release: picture(pipe, **release.inputs(), guidance_scale=1.0)
    )


def _of_documents() -> Host:
    ids = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 7, dtype=torch.int64)
    corpus = {"input_ids": ids, "attention_mask": mask, "groups": "documents"}
    fewer = {"input_ids": ids[:2], "attention_mask": mask[:2], "groups": "documents"}
    shorter = {
        **corpus,
        "attention_mask": mask.index_put((torch.tensor(2), torch.arange(4, 7)), torch.tensor(0)),
    }
    more = ids.flip(1)[:2]
    longer = torch.cat([ids, ids[:, :2]], dim=1)
    pairs = {
        **_row_pairs(16),
        **_growing(16),
        "a document more": Pair("group", ADD, corpus, fewer),
        "another document of the corpus, shorter": Pair("group", REPLACE, corpus, shorter),
        "an opening of a document, shorter": Pair(
            "group",
            REPLACE,
            {**corpus, "horizon": 2},
            {**shorter, "horizon": 2},
            ({"context": more[:1], "groups": "documents"}, {"context": more[:1], "groups": "documents"}),
        ),
        "an append of a document, shorter": Pair(
            "group",
            REPLACE,
            {**corpus, "horizon": 2},
            {**corpus, "horizon": 2},
            ({"context": more[:1], "groups": "documents"}, {"context": more[1:, :4], "groups": "documents"}),
        ),
        "another corpus": Pair("context", REPLACE, corpus, {**fewer, "attention_mask": None}),
        "a token more": Pair("row", ADD, {"input_ids": ids[:1]}, {"input_ids": longer[:1, :8]}),
        "another document, longer": Pair(
            "context", REPLACE, {"input_ids": ids[:1]}, {"input_ids": longer[1:2]}
        ),
    }

    def read(model: Any, release: Any) -> torch.Tensor:
        found: torch.Tensor = model(**release.inputs(), decoder_input_ids=torch.tensor([[2, 5]])).logits
        return found

    def calibrate(model: Any, unit: str, relation: str) -> AnchorCalibration:
        return dataclasses.replace(
            for_documents(model),
            unit=unit,
            neighboring=relation,
            grouping="documents" if unit == "group" else "rows",
        )

    return Host(lambda: tiny("bart"), calibrate, pairs, read)


def _of_prefixes() -> Host:
    ids = torch.randint(3, 40, (12,), generator=torch.Generator().manual_seed(2))
    apart = {"groups": "segments", "public_head": [1]}
    parts = [p.tolist() for p in ids.split(4)]
    whole = {"public_head": 1}
    pairs = {
        "another prefix": Pair("context", REPLACE, {"context": ids, **whole}, {"context": ids[:9], **whole}),
        "a token is another one": Pair(
            "row",
            REPLACE,
            {"context": ids, **whole},
            {"context": ids.flip(0).roll(1).index_put((torch.tensor(0),), ids[0]), **whole},
        ),
        "a token more": Pair("row", ADD, {"context": ids, **whole}, {"context": ids[:11], **whole}),
        "another segment": Pair(
            "group", REPLACE, {"context": parts, **apart}, {"context": [*parts[:2], [9, 8]], **apart}
        ),
        "a segment more": Pair("group", ADD, {"context": parts, **apart}, {"context": parts[:2], **apart}),
    }

    def read(model: Any, release: Any) -> torch.Tensor:
        found: torch.Tensor = model(**release.inputs(input_ids=torch.tensor([[3, 4, 6]]))).logits
        return found

    def calibrate(model: Any, unit: str, relation: str) -> AnchorCalibration:
        return dataclasses.replace(for_decoder(model, unit), neighboring=relation)

    return Host(lambda: decoder_tiny("llama"), calibrate, pairs, read)


def _of_images() -> Host:
    given, other = images(1, seed=3), images(1, seed=4)
    pairs = {**_row_pairs(32), "another image": Pair("context", REPLACE, given, other)}

    def read(model: Any, release: Any) -> torch.Tensor:
        asked = {k: v for k, v in texts(1).items() if k != "cross_attention_mask"}
        found: torch.Tensor = model(**release.inputs(**asked)).logits
        return found

    def calibrate(model: Any, unit: str, relation: str) -> AnchorCalibration:
        return dataclasses.replace(anchors_for(model), unit=unit, neighboring=relation)

    return Host(image_tiny, calibrate, pairs, read)


HOSTS = {
    "diffusers, sum": _of_pipe("sum"),
    "diffusers, response": _of_pipe("response"),
    "diffusers, histogram": _of_pipe("histogram"),
    "encoder-decoder": _of_documents(),
    "decoder-only": _of_prefixes(),
    "image-text": _of_images(),
}
BUDGET = Budget(epsilon=64.0, delta=1e-4)


def config_of(mechanism: str, pair: Pair) -> dpx.DPXAttnConfig:
    return dpx.DPXAttnConfig(
        mechanism=mechanism, degree=1, projection_dim=2, unit=pair.unit, neighboring=pair.relation
    )


def protected(host: Host, mechanism: str, pair: Pair, ledger: dpx.Ledger) -> tuple[Any, Any]:
    """(host, handle): fresh ones, with the same noise at each call."""
    own, config = host.make(), config_of(mechanism, pair)
    calibration = host.calibration(own, pair.unit, pair.relation) if mechanism == "anchors" else None
    entropy = FixedEntropy(5)
    return own, dpx.protect(
        own,
        config,
        calibration=calibration,
        ledger=ledger,
        budget=BUDGET,
        entropy=entropy,
        allow_useless=True,
    )


def error_of(call: Callable[[], Any]) -> bytes:
    with pytest.raises(Exception) as caught:
        call()
    assert isinstance(caught.value, dpx.DPXAttnError), repr(caught.value)
    return repr(caught.value).encode()


def wrong(handle: Any, given: Given) -> dict[str, bytes]:
    """What the usual mistakes with this context say."""
    named = {k: v for k, v in given.items() if k not in ("groups", "horizon")}
    name = next(iter(k for k in ("context", "input_ids", "pixel_values") if k in named))
    private = named[name]
    short = torch.zeros(2, dtype=torch.int64)
    calls: dict[str, Callable[[], Any]] = {
        "groups of another length": lambda: handle.release(**named, groups=short),
        "groups that are none": lambda: handle.release(**named, groups="none"),
    }
    if isinstance(private, torch.Tensor):
        calls["a dimension more"] = lambda: handle.release(**{**named, name: private[None, None, None]})
        if private.is_floating_point():
            calls["channels"] = lambda: handle.release(**{**named, name: private[..., :3]})
        else:
            calls["ids out of range"] = lambda: handle.release(**{**named, name: private + 10**6})
            calls["ids of a wrong type"] = lambda: handle.release(**{**named, name: private > 3})
            if name == "input_ids":  # an encoder with a table of positions
                far = private.repeat_interleave(100, dim=-1)
                calls["too long"] = lambda: handle.release(**{**named, name: far})
        if name == "input_ids":
            calls["a short mask"] = lambda: handle.release(**{**named, "attention_mask": short[None]})
    return {f"error: {what}": error_of(call) for what, call in calls.items()}


def published(
    host: Host, own: Any, handle: Any, release: Any, folder: Path, hub: FakeHub
) -> dict[str, bytes]:
    """All that may be given away: files, pushes, repr, guarantees, terms, what a reader of the files sees, and answers."""
    from hf_dp_xattn.hosts.storage import ReleaseFile

    things = {"release": release, "contexts": release.contexts, "terms": release.terms}
    things |= {"guarantees": release.guarantees, "config": handle.config}
    blobs = {name: (repr(thing) + str(thing)).encode() for name, thing in things.items()}
    blobs["answer"] = host.read(own, release).detach().numpy().tobytes()
    blobs["inputs"] = repr(
        [tuple(v.shape) for v in release.inputs(**_asked(own)).values() if isinstance(v, torch.Tensor)]
    ).encode()
    release.save_pretrained(folder / "release")
    read = ReleaseFile.load(folder / "release")
    read.save_pretrained(str(folder / "again"))
    blobs["report of the files"] = (str(read.report()) + read.report().to_json()).encode()
    release.push_to_hub("me/release")
    if handle.config.mechanism == "kernel_sum":
        own.save_pretrained(folder / "host")
    blobs |= files(folder)
    blobs |= {f"pushed {name}": data for name, data in hub.repos["me/release"].files().items()}
    return blobs


def _asked(own: Any) -> Given:
    return {"input_ids": torch.tensor([[3, 4, 6]])} if "ForCausalLM" in type(own).__name__ else {}
