"""The tables of `benchmarks/tokens.py`."""

from __future__ import annotations

from typing import Any

LATE, LONGEST, FIRST = 4096, 262_144, 1024  # where the targets are

INTRO = (
    "**Tokens behind a private context** ({threads} threads), random weights, float32, a question of {question} tokens, greedy `generate`; "
    "protected and unprotected answers take turns, and ratios are medians of their pairs (least to largest). Unprotected attention is SDPA "
    "over a cache that already holds the n rows and is never copied; transformers' default one copies all of them at each token. Left out "
    "on both sides is what makes the rows: an encoder's run, or the run over a prefix. An unprotected encoder-decoder model makes keys and "
    "values of n rows at its first token. Protected is `anchors`, {served} rows served at every n, with a calibration that was not fitted: "
    "what it decodes means nothing and takes as long."
)
KINDS = {
    "Llama": "`{name}` (decoder-only; the context is a prefix of n tokens)",
    "BART": "`{name}` (encoder-decoder; the context is n rows of documents)",
}


def markdown(results: dict[str, Any]) -> str:
    """A table of times for each host, and one of the targets."""
    hosts = results["hosts"]
    served = max(p["rows_served"] for h in hosts for p in h["points"])
    lines = [INTRO.format(threads=results["threads"], question=hosts[0]["question"], served=served)]
    for host in hosts:
        lines += ["", *_host(host)]
    return "\n".join([*lines, "", *_targets(hosts)])


def _sizes(host: dict[str, Any]) -> str:
    keys = "" if host["key_heads"] == host["heads"] else f" that share {host['key_heads']} key heads"
    return (
        f"{host['layers']} layers, width {host['width']:,}, {host['heads']} heads of {host['width'] // host['heads']}{keys}, MLP "
        f"{host['inner']:,}, vocabulary {host['vocabulary']:,}: {host['parameters'] / 1e6:.0f} M parameters"
    )


def _short(host: dict[str, Any]) -> str:
    return host["name"] + ("" if host["key_heads"] == host["heads"] else ", shared key heads")


def _host(host: dict[str, Any]) -> list[str]:
    by_default = any("default cache" in p["sides"] for p in host["points"])
    kernel = any("kernel_sum" in p["sides"] for p in host["points"])
    heads = [
        "rows n",
        "token, protected, ms",
        "token, exact, ms",
        *(["exact, default cache, ms"] * by_default),
    ]
    heads += ["exact / protected", "in the attention layers alone", "first token, protected, ms"]
    heads += ["first token, exact, ms", "exact / protected", "release, s"]
    if kernel:
        heads += ["`kernel_sum`: token, ms", "exact / protected", "release, s"]
    lines = [
        KINDS[host["name"]].format(name=host["name"]) + f": {_sizes(host)}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for point in host["points"]:
        own, exact = point["sides"]["anchors"], point["sides"]["exact"]
        ratios = point["speedup"]["anchors"]
        cells = [f"{point['n']:,}", _ms(own["token"]), _ms(exact["token"])]
        if by_default:
            cells += [_ms(point["sides"]["default cache"]["token"])]
        cells += [_range(ratios["token"]), _number(ratios["layers"]["median"])]
        cells += [_ms(own["first"]), _ms(exact["first"]), _range(ratios["first"])]
        cells += [f"{point['release_s']['anchors']:.2f}"]
        if kernel and "kernel_sum" in point["sides"]:
            cells += [_ms(point["sides"]["kernel_sum"]["token"])]
            cells += [_range(point["speedup"]["kernel_sum"]["token"])]
            cells += [f"{point['release_s']['kernel_sum']:.2f}"]
        elif kernel:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _targets(hosts: list[dict[str, Any]]) -> list[str]:
    """What the targets ask for, host by host; left out where the n is not among those measured."""
    rows = []
    for host in hosts:
        points = {p["n"]: p for p in host["points"]}
        late = [points[n]["speedup"]["anchors"]["token"] for n in points if n >= LATE]
        if late:
            least = min(late, key=lambda r: r["median"])
            rows.append(
                (
                    f"{_short(host)}: exact / protected token, least from {LATE:,} rows on",
                    _range(least),
                    "> 1",
                )
            )
        if LONGEST in points:
            longest = points[LONGEST]["speedup"]["anchors"]
            rows.append((f"{_short(host)}: the same at {LONGEST:,} rows", _range(longest["token"]), "20"))
            rows.append(
                (
                    f"{_short(host)}: the same, attention layers alone",
                    _number(longest["layers"]["median"]),
                    "",
                )
            )
            sides = points[LONGEST]["sides"]
            if "default cache" in sides:
                slow = sides["default cache"]["token"] / sides["anchors"]["token"]
                rows.append((f"{_short(host)}: the same, transformers' default cache", _number(slow), "20"))
            if "first" in longest:
                rows.append(
                    (f"{_short(host)}: first token at {LONGEST:,} rows", _range(longest["first"]), "20")
                )
            if FIRST in points:
                ends = [points[n]["sides"]["anchors"]["token"] for n in (LONGEST, FIRST)]
                what = f"{_short(host)}: protected token at {LONGEST:,} rows / at {FIRST:,}"
                rows.append((what, f"{ends[0] / ends[1]:.2f}", "1"))
    table = [f"| {' | '.join(row)} |" for row in rows]
    return ["| what | value | target |", "|---|---|---|", *table]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _range(ratio: dict[str, float]) -> str:
    return f"{_number(ratio['median'])} ({_number(ratio['low'])} to {_number(ratio['high'])})"
