"""Corpora: documents per second, memory and speed-up, `python benchmarks/corpus.py --out docs/corpus`.

Encoding is SmolLM2's (first half of its layers, one document after the other, as private ones are); votes, names, charges and sums are
measured with a toy encoder, so that they can be told from it, on corpora of 10^4, 10^5 and 10^6 documents, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import hf_dp_xattn as dpx  # noqa: E402
from hf_dp_xattn.hosts.text.unit_encoders import unit_encoder  # noqa: E402

CONFIG = dpx.DPXAttnConfig(mechanism="library", epsilon=1.0, unit="group")
WORDS = ("tea", "law", "sea", "sky", "war", "tax", "art", "sun")
ASSUMED = 2000  # documents a second and GPU
PAIR = 100_000  # documents that one process and two release
SIZES = (10_000, 100_000, 1_000_000)
spawn = multiprocessing.get_context("spawn")


def embed(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[float(text.count(w)) for w in WORDS] for text in texts])


def documents(start: int, stop: int) -> Iterator[str]:
    for i in range(start, stop):
        yield f"note {i} about {WORDS[i % 8]} and {WORDS[(i // 8) % 8]}"


def library() -> Any:
    public = [f"a public note about {a} and {b}" for a in WORDS for b in WORDS]
    lists = [[public[(7 * i + 3 * j) % 64] for j in range(8)] for i in range(200)]
    return dpx.calibrate(
        None, lists, CONFIG, encoder=embed, grouping="documents", epsilons=1.0, progress=False
    )


def memory(name: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most. (`getrusage` tells a child its parent's.)"""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def release(rank: int, ranks: int, count: int, folder: str, results: Any) -> None:
    """One process's part of one release; puts (seconds, MiB at the start, MiB at most)."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    made = library()
    ledger = dpx.Ledger(f"sqlite:///{folder}/ledger.db" if rank == 0 else None)
    protected = dpx.protect(None, CONFIG, calibration=made, encoder=embed, ledger=ledger)
    before = memory("VmRSS")
    start = time.perf_counter()
    part = documents(rank * count // ranks, (rank + 1) * count // ranks)
    found = protected.release(part, groups="documents")
    seconds = time.perf_counter() - start
    assert sum(found.counts) == count
    results.put((rank, seconds, before, memory("VmHWM")))


def run(count: int, ranks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        results = spawn.Queue()
        workers = [
            spawn.Process(target=release, args=(r, ranks, count, folder, results)) for r in range(ranks)
        ]
        for worker in workers:
            worker.start()
        _, seconds, before, most = min(results.get() for _ in workers)  # of the first process
        for worker in workers:
            worker.join()
        ledger = (Path(folder) / "ledger.db").stat().st_size / 2**20
    return {
        "documents": count,
        "processes": ranks,
        "seconds": seconds,
        "per_second": count / seconds,
        "mib_before": before,
        "mib_most": most,
        "ledger_mib": ledger,
    }


def encoding(count: int = 200) -> dict[str, float]:
    """Documents per second of one core, each encoded by itself."""
    from assistant.smollm import load_chat

    torch.set_num_threads(1)
    encoder = unit_encoder(load_chat())
    texts = [
        f"{text} It holds for everybody who works here, and has for years." for text in documents(0, count)
    ]
    encoder(texts[:5])
    start = time.perf_counter()
    encoder(texts)
    return {"documents": count, "per_second": count / (time.perf_counter() - start)}


def page(result: dict[str, Any]) -> str:
    rows = result["streams"]
    lines = [
        "# Corpora: speed and memory",
        "",
        "Written by `python benchmarks/corpus.py --out docs/corpus`; one core a process. Names, votes, sums and charges (SQLite), with an "
        "encoder that takes no time:",
        "",
        "| documents | processes | seconds | documents a second | memory before | at most | ledger |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        memory = f"{r['mib_before']:,.0f} MiB | {r['mib_most']:,.0f} MiB | {r['ledger_mib']:,.1f} MiB"
        lines.append(
            f"| {r['documents']:,} | {r['processes']} | {r['seconds']:.1f} | {r['per_second']:,.0f} | {memory} |"
        )
    largest = max((r for r in rows if r["processes"] == 1), key=lambda r: r["documents"])
    grown = 2**20 * (largest["mib_most"] - largest["mib_before"]) / largest["documents"]
    one, two = (next(r for r in rows if r["processes"] == n and r["documents"] == PAIR) for n in (1, 2))
    hours = 1e9 / (64 * ASSUMED) / 3600
    charging = 1e9 / largest["per_second"] / 86400
    ledger = 1e9 * largest["ledger_mib"] / largest["documents"] / 2**20
    lines += [
        "",
        f"Memory grows by {grown:.0f} bytes a document: its names, which the ledger is to charge. Two processes take "
        f"{two['seconds'] / one['seconds']:.2f} times the time of one: the charge is one process's, whatever their number.",
        "",
        f"SmolLM2-135M (half of its layers) encodes {result['encoding']['per_second']:.1f} documents of some twenty words a second and "
        "core, each by itself: that is most of what a corpus takes, and it is shared evenly.",
        "",
        f"**A billion documents on 64 GPUs, on paper.** Encoded one by one at {ASSUMED:,} a second and GPU (an assumption, not measured "
        f"here) they take {hours:.1f} hours. Adding up takes nothing: one vector of 64-bit integers a process. Charging a billion names, "
        f"at the rate of the table's largest corpus, takes {charging:.1f} days of one process and {ledger:,.1f} TiB of ledger: that "
        "is what would have to be spread first (a ledger for each range of digests).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help=f"documents; {PAIR} among them")
    args = parser.parse_args()
    measured = {"encoding": encoding()}
    streams = [run(PAIR, 2)] + [run(count, 1) for count in args.sizes]
    result = {"streams": [*streams[1:], streams[0]], **measured}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "speed.md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
