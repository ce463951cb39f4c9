"""Votes and answers of the same held-out lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.checkpoints import Checkpoints
from hf_dp_xattn.calibration.library.encoding import encode_chunks
from hf_dp_xattn.calibration.library.library_fit import LibraryOptions, build_library
from hf_dp_xattn.calibration.library.stored_plan import spread
from hf_dp_xattn.calibration.library.vote_fit import matched
from hf_dp_xattn.calibration.library.vote_plan import chosen
from hf_dp_xattn.mechanisms.library.entry_lattice import unit_codes
from hf_dp_xattn.mechanisms.library.library import FromLibrary
from hf_dp_xattn.privacy.bits import SeededEntropy

EPSILONS = (1.0, 2.0, 4.0, 8.0)
SIZES = (10, 30, 100, 300, 800)
CONFIG = dpx.DPXAttnConfig(mechanism="library", unit="group")

Encode = Callable[[Sequence[str]], torch.Tensor]


def curves(
    public: Sequence[Sequence[str]],
    private: Sequence[Sequence[str]],
    encode: Encode,
    folder: Path | None,
    most: int,
) -> dict[str, Any]:
    name = getattr(encode, "name", "")
    options = LibraryOptions(epsilons=EPSILONS, grouping="segments", encoder=name, kept=Checkpoints(folder))
    library = build_library(public, encode, CONFIG, options)
    flat = [segment for context in private for segment in context]
    codes = torch.cat(
        list(tqdm(encode_chunks(flat, encode, name, Checkpoints(folder)), desc="chunks of private codes"))
    )
    at = {text: i for i, text in enumerate(library.texts)}
    units = unit_codes(codes, library.center, library.projection)
    entries = torch.nn.functional.normalize(library.codes.float(), dim=1)

    def judged(prepared: FromLibrary, rows: torch.Tensor, own: torch.Tensor, seed: int) -> float:
        made = prepared.run(rows, groups=torch.arange(len(rows)), entropy=SeededEntropy(seed))
        return matched(own, entries[[at[t] for t in made.texts]])

    rows: list[dict[str, Any]] = []
    for epsilon in tqdm(EPSILONS, desc="epsilons"):
        config = CONFIG.replace(epsilon=epsilon)
        answers = library.prepare(config)
        for n in SIZES:
            lists = [slice(i, i + n) for i in range(0, len(flat) - n + 1, n)][:most]
            plan = chosen(library.votes, epsilon, n)
            votes = library.voting(plan, config)
            blank = torch.zeros(len(plan.entries), dtype=torch.int64)
            share = (plan.share.double() * n).floor().to(torch.int64)
            share[torch.argsort(share - plan.share.double() * n)[: n - int(share.sum())]] += 1
            found: dict[str, list[float]] = {"prior": [], "answers": [], "votes": [], "exact": []}
            for seed, own in enumerate(lists):
                (cast,) = votes.exact(codes[own], torch.arange(n))
                for name, counts in (("prior", blank + share), ("exact", cast)):
                    found[name].append(matched(units[own], entries[plan.entries.repeat_interleave(counts)]))
                found["answers"].append(judged(answers, codes[own], units[own], seed))
                found["votes"].append(judged(votes, codes[own], units[own], seed))
            numbers = {
                name: [round(x, 4) for x in spread(torch.tensor(values))] for name, values in found.items()
            }
            rows.append(
                {"epsilon": epsilon, "n": n, "texts": len(plan.entries), "chosen": plan.better, **numbers}
            )
    return {"segments": len(flat), "prompts": len(private), "lists": most, "rows": rows}
