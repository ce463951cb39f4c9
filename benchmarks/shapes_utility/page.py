"""docs/utility.md from results.json: what was measured, tables, and what they mean in plain words. No number is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from shapes.tables import KINDS, PLAIN, PUBLIC

from .fvu import QUERIES
from .methods import title
from .parts import PRIORS
from .readable import Readable, find_readable
from .setting import HELDOUT_SEED, OTHER_SEED

# What issue 3 asks for: share of the unprotected pipeline's accuracy, and the best FVU of the prototype (DESIGN.md).
ACCURACY_TARGETS = {4.0: 0.60, 8.0: 0.90, 16.0: 0.97}
FVU_TARGETS = {1.0: 0.77, 2.0: 0.735, 4.0: 0.62, 8.0: 0.43, 16.0: 0.30}
LAYER_EPSILON = 8.0
Line = dict[str, Any]
Results = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def grid(lines: Sequence[Line], label: Callable[[Line], str], cell: Callable[[Line], str], first: str) -> str:
    """One row per method (or label), one column per epsilon; lines without an epsilon hold at every one."""
    epsilons = sorted({v["epsilon"] for v in lines if v["epsilon"] is not None})
    rows = []
    for name in dict.fromkeys(label(v) for v in lines):
        own = {v["epsilon"]: v for v in lines if label(v) == name}
        cells = [cell(own[e]) if e in own else cell(own[None]) if None in own else "" for e in epsilons]
        rows.append([name, *cells])
    return table([first, *(f"{e:g}" for e in epsilons)], rows)


def _percent(v: Line) -> str:
    return f"{100 * v['accuracy']:.0f} ({100 * v['low']:.0f}-{100 * v['high']:.0f})"


def _fvu(queries: str) -> Callable[[Line], str]:
    def cell(v: Line) -> str:
        return _interval(v[queries])

    return cell


def _interval(x: Line) -> str:
    digits = 2 if x["fvu"] < 10 else 0
    return f"{x['fvu']:,.{digits}f} ({x['low']:,.{digits}f}-{x['high']:,.{digits}f})"


def _name(v: Line) -> str:
    return title(v["method"]) if v["method"] not in (PLAIN, PUBLIC) else v["method"]


def _at(lines: Iterable[Line], method: str, epsilon: float | None) -> Line | None:
    return next((v for v in lines if v["method"] == method and v["epsilon"] == epsilon), None)


def _beside(results: Results, key: str) -> list[Line]:
    """anchors with unit = context (and phrase), to stand beside every number of unit = row."""
    return list(results.get("d", {}).get(key, []))


def setup(results: Results) -> str:
    part = next(iter(results.values()))
    sizes = part["sizes"]
    return (
        "The `shapes` pipeline (a small Stable Diffusion, 7 cross-attention layers of 4 heads) draws scenes that captions describe, and a "
        "separately trained reader reads the attributes back. The private contexts are held-out captions "
        f"(seed {HELDOUT_SEED}); every (colour, shape, place) in them is absent from the public ones. **Everything that was fitted or "
        "chosen (calibrations, codebooks, filters, clipping norms) comes from public training captions alone.** A context is 76 private "
        "rows and one exact public row (BOS). Every method has the same budget in total for the whole UNet, all layers, heads and "
        f"denoising steps together: delta = {part['delta']:g}, neighbouring relation replace_one, unit = row unless another is named. "
        "Intervals are 95 %, bootstrapped over contexts, each with its own noise. The noise is seeded, so that a run can be repeated; a "
        "real release draws it from the operating system.\n\n"
        f"Sizes: {sizes['contexts']} contexts with {sizes['draws']} noise draw(s) each for FVU (one draw for kernel_sum and dptree, and "
        f"dptree on {sizes['dptree'][0]} contexts), {sizes['captions']} captions drawn once for every method and epsilon, "
        f"{sizes['public']:,} public captions for the baselines."
    )


def in_short(results: Results) -> str:
    """Targets and whether they were met."""
    out = []
    if "b" in results:
        lines = results["b"]["lines"]
        plain = _at(lines, PLAIN, None)
        assert plain is not None
        rows = []
        for epsilon, target in ACCURACY_TARGETS.items():
            own = _at(lines, "anchors", epsilon)
            if own is None:
                continue
            share = own["accuracy"] / plain["accuracy"]
            context = _at(_beside(results, "attributes"), "anchors_context", epsilon)
            beside = "" if context is None else f"{100 * context['accuracy'] / plain['accuracy']:.0f} %"
            low, high = (100 * own[k] / plain["accuracy"] for k in ("low", "high"))
            met = "yes" if share >= target else "**no**"
            rows.append(
                [
                    f"{epsilon:g}",
                    f"{100 * target:.0f} %",
                    f"{100 * share:.0f} % ({low:.0f}-{high:.0f})",
                    met,
                    beside,
                ]
            )
        head = ["epsilon", "target", "anchors, unit = row", "met", "anchors, unit = context"]
        out.append(
            f"Attributes right, as a share of the unprotected pipeline's {100 * plain['accuracy']:.1f} %:\n\n"
            + table(head, rows)
        )
    if "a" in results:
        rows = []
        for epsilon, target in FVU_TARGETS.items():
            own = _at(results["a"]["lines"], "anchors", epsilon)
            if own is None:
                continue
            context = _at(_beside(results, "fvu"), "anchors_context", epsilon)
            beside = "" if context is None else f"{context['other']['fvu']:.2f}"
            met = "yes" if own["other"]["fvu"] <= target else "**no**"
            rows.append([f"{epsilon:g}", f"{target:g}", _fvu("other")(own), met, beside])
        head = ["epsilon", "prototype", "anchors, unit = row", "met", "anchors, unit = context"]
        out.append(
            "FVU at other contexts' queries, beside the best of the prototype (which was measured on another model's attention):\n\n"
            + table(head, rows)
        )
    return "\n".join(out)


def fvu_section(results: Results) -> str:
    part = results["a"]
    lines = [*part["lines"], *_beside(results, "fvu")]
    out = [
        "FVU is the squared error of every layer's and head's cross-attention output over its variance between contexts at the same query "
        "(`calibration/anchors/objective.py`). 1 is what the public mean alone reaches, 0 is exact, and above 1 a method does harm. "
        "Queries of a late step carry the context that they were computed from, so there are two sets: queries recorded while the "
        f"unprotected pipeline draws OTHER held-out captions (seed {OTHER_SEED}), and queries recorded while it draws this very context.",
        "![FVU against epsilon, queries of other contexts](utility/fvu_other.png)",
        "Queries from **other** contexts:\n\n" + grid(lines, _name, _fvu("other"), "FVU at epsilon ="),
        "![FVU against epsilon, own queries](utility/fvu_own.png)",
        "The context's **own** queries:\n\n" + grid(lines, _name, _fvu("own"), "FVU at epsilon ="),
    ]
    own = [v for v in lines if v["epsilon"] in (LAYER_EPSILON, None) and v["method"] != "exact"]
    for queries in QUERIES:
        rows = [
            [_name(v), *(f"{x:.2f}" if x < 10 else f"{x:,.0f}" for x in v[queries]["layers"])] for v in own
        ]
        out.append(
            f"Layer by layer at epsilon = {LAYER_EPSILON:g}, {queries} queries (heads are in `results.json`):\n\n"
            + table(["FVU", *(_layer(n) for n in part["layers"])], rows)
        )
    return "\n\n".join(out)


def _layer(name: str) -> str:
    """down_blocks.0.attentions.0.transformer_blocks.0.attn2 -> down 0.0"""
    words = name.split(".")
    block = words[0].removesuffix("_blocks").removesuffix("_block")
    return f"{block} {'.'.join(w for w in words[1:4] if w.isdigit())}"


def attributes_section(results: Results) -> str:
    lines = results["b"]["lines"]
    both = [*lines, *(v for v in _beside(results, "attributes") if v["epsilon"] is not None)]
    kinds = [v for v in both if v["epsilon"] in (LAYER_EPSILON, None)]
    rows = [[_name(v), f"{100 * v['accuracy']:.0f}", *(f"{100 * v[k]:.0f}" for k in KINDS)] for v in kinds]
    return "\n\n".join(
        [
            "A caption names four attributes of each object and the background's colour. The table has the share (in %) that the reader "
            "finds right in the picture of each caption's one release. Mechanisms draw through `dpx.protect`; baselines hand their rows "
            "to the unprotected pipeline as prompt embeddings.",
            "![Attributes right against epsilon](utility/attributes.png)",
            grid(both, _name, _percent, "% right at epsilon ="),
            f"By kind of attribute, at epsilon = {LAYER_EPSILON:g}:\n\n" + table(["%", "all", *KINDS], rows),
        ]
    )


def readable_section(results: Results) -> str:
    """At which epsilon the prompt can be read from the picture; the definition was fixed before measuring."""
    out = [
        "Defined before measuring: a prompt is **readable** when the share of right attributes is at least halfway between the picture "
        "of the public (empty) prompt and the unprotected picture. That is a matter of the average picture; a single attribute can be "
        "given away earlier, so the first epsilon at which pictures are better than the public prompt's (intervals apart) is named too.\n"
    ]
    lines = [*results["b"]["lines"], *_beside(results, "attributes")]
    for method in dict.fromkeys(v["method"] for v in lines if v["epsilon"] is not None):
        own = [v for v in lines if v["method"] == method and v["epsilon"] is not None]
        found = find_readable(own, *(_reference(lines, own[0]["unit"], r) for r in (PUBLIC, PLAIN)))
        out.append(f"* **{title(method)}**: {_words(found)}")
    out.append(
        "\nUtility and what a picture gives away are the same thing here: a picture that shows the scene tells the scene to whoever sees "
        "it. What epsilon limits is what can be learned about ONE unit beyond what the rest of the release's inputs make predictable."
    )
    return "\n".join(out)


def _reference(lines: Sequence[Line], unit: str, name: str) -> Line:
    exact = [v for v in lines if v["method"] == name]
    return next((v for v in exact if v["unit"] == unit), exact[0])


def _words(found: Readable) -> str:
    first = (
        "never better than the public prompt among the values measured"
        if found.above_public is None
        else f"better than the public prompt from epsilon = {found.above_public:g}"
    )
    if found.readable is None:
        return f"{first}; not readable up to the largest epsilon measured ({found.largest:g})"
    below = (
        "already at the smallest epsilon measured" if found.below is None else f"not yet at {found.below:g}"
    )
    return f"{first}; readable from epsilon = {found.readable:g} ({below})"


def odds_section(results: Results) -> str:
    odds = results["d"]["odds"]
    epsilons = sorted({o["epsilon"] for o in odds})
    bound = {(o["epsilon"], o["prior"]): o["bound"] for o in odds}
    rows = [[_prior(p), *(_chance(bound[e, p]) for e in epsilons)] for p in PRIORS]
    eight = {p: _chance(bound[LAYER_EPSILON, p]) for p in PRIORS} if LAYER_EPSILON in epsilons else {}
    said = (
        ""
        if not eight
        else (
            f"An epsilon of {LAYER_EPSILON:g} is therefore no secret-keeper for what is easily guessed: where the attacker would have been "
            f"right with probability {_prior(PRIORS[0])} before, the bound is {eight[PRIORS[0]]}; one of eight colours, {eight[1 / 8]}. "
            f"Something that was one of a million stays at {eight[PRIORS[-1]]} or less."
        )
    )
    return "\n\n".join(
        [
            "The proven bound (`hf_dp_xattn.privacy.guessing`; `hf-dp-xattn plan` prints it for any setting): the largest probability "
            "with which an attacker who knows EVERYTHING ELSE, all other units included, names the one unit rightly after seeing the "
            "release, by how likely a right guess was before. Under the guarantee's assumptions (exact noise, a good entropy source; the "
            "report names them) no attack does better.",
            table(["right before with probability", *(f"epsilon {e:g}" for e in epsilons)], rows),
            said,
            "What the unit is decides what the table speaks of:\n"
            "\n* **A row** (unit = row): one of the 76 embedding rows, all others known. That is *not* a word: the text encoder writes "
            "each word into its own row and into every row after it, so the other 75 rows alone say almost everything (see below)."
            "\n* **A phrase** (unit = group): the phrases of a prompt are encoded apart, so the table holds for any one phrase, end to "
            "end. How many phrases there are and their order is public. Two phrases together: twice the epsilon, and delta (1 + e^epsilon)."
            "\n* **The prompt** (unit = context): the table holds for the whole prompt, all words at once.",
        ]
    )


def _prior(p: float) -> str:
    return f"1 in {1 / p:,.0f}"


def _chance(p: float) -> str:
    """A bound is rounded up, and never up to certainty."""
    if p >= 1:
        return "1"
    for digits in (2, 3, 4, 5, 6):
        up = -(-p * 10**digits // 1) / 10**digits
        if up < 1 and up <= 1.1 * p + 1e-9:
            return f"{up:.{digits}f}"
    return "above 0.99999" if p > 0.5 else f"{p:.1e}"


def row_section(results: Results) -> str:
    p = results["a"]["padding"]
    out = (
        f"**unit = row is weak on this model.** Of the {p['rows']} private rows of a held-out caption at least {p['padding_min']} "
        f"(on average {p['padding_mean']:.0f}) are padding after its end, and each of them carries the whole scene: the last row alone "
        f"tells {100 * p['explained_by_last']:.0f} % of the variance of a padding row in the middle (by a linear map of public captions). "
        "`row` protects any one of them while its near-copies stay, and a sum over all rows lets the copies add up against the noise. So a "
        "small epsilon for a row is a much larger one for the prompt: replacing the prompt replaces all rows, and group privacy multiplies "
        "epsilon by their number, which proves nothing at any epsilon above. "
        "Whoever wants to protect what a prompt says should read the line for unit = context, which stands beside every number for rows."
    )
    return out


def units_section(results: Results) -> str:
    part = results["d"]
    row = [v for v in results.get("a", {}).get("lines", []) if v["method"] == "anchors"]
    fvu = grid([*row, *part["fvu"]], _name, _fvu("other"), "FVU (other queries) at epsilon =")
    mine = [v for v in results.get("b", {}).get("lines", []) if v["method"] in ("anchors", PLAIN, PUBLIC)]
    mine += [
        v
        for v in part["attributes"]
        if v["epsilon"] is not None or (v["unit"] == "group" and v["method"] == PLAIN)
    ]

    def label(v: Line) -> str:
        return f"{_name(v)}, phrase by phrase" if v["method"] == PLAIN and v["unit"] == "group" else _name(v)

    return "\n\n".join(
        [
            "`group`: the prompt is written phrase by phrase (one per object, one for the background), each phrase is encoded by itself "
            "and enters as its mean row; the target is the attention over the whole prompt's encoding. `context`: the mean row of the "
            "prompt is the one unit.",
            fvu,
            grid(mine, label, _percent, "% right at epsilon ="),
        ]
    )


def _kind(v: Line) -> str:
    return str(v.get("kind", "unlike"))


def _length_name(v: Line) -> str:
    return title(v["method"]) + (", contexts like the public ones" if _kind(v) == "like" else "")


def lengths_section(results: Results) -> str:
    part = results["c"]
    lines = part["lines"]
    out = [
        "Contexts of 1, 4, 16, ... captions' rows side by side. The anchors calibrations are small ones, fitted for each n on public "
        f"captions only (at most {part['sizes']['length_steps']} steps and {part['sizes']['length_cells']:,} cells, less where contexts "
        "are long; the shipped ones are trained longer), the baselines are those above, row by row. Queries are those of single captions' "
        "drawings (the pipeline was not trained to draw from such contexts). With more captions in a context its deviation from the "
        "public mean shrinks, so 1 is the same yardstick at every n, not the same error. As everywhere, these numbers are for one row as "
        "the unit.",
        "The captions are held-out ones, so a context of many of them is **unlike** every public context: its mean is elsewhere, which "
        "is why the public mean itself is above 1 there."
        + (
            " Lines of *contexts like the public ones* are measured on fresh captions from the public captions' own distribution."
            if any(_kind(v) == "like" for v in lines)
            else ""
        ),
        "![FVU against the number of rows](utility/fvu_rows.png)",
        _verdict(lines),
    ]
    for epsilon in sorted({v["epsilon"] for v in lines if v["epsilon"] is not None}):
        own = [v for v in lines if v["epsilon"] in (epsilon, None)]
        rows_ = sorted({v["rows"] for v in own})
        body = []
        for name in dict.fromkeys(map(_length_name, own)):
            at = {v["rows"]: v for v in own if _length_name(v) == name}
            body.append([name, *(_interval(at[n]) if n in at else "" for n in rows_)])
        out.append(f"epsilon = {epsilon:g}:\n\n" + table(["FVU at n =", *(f"{n:,}" for n in rows_)], body))
    kinds = ", ".join(
        f"n = {76 * p['captions']:,} at {p['epsilon']:g}: {p['release']}" for p in part["plans"]
    )
    out.append(f"What anchors released (chosen on public contexts): {kinds}.")
    if part.get("choices"):
        out.append(_choices(part["choices"]))
    return "\n\n".join(out)


def _verdict(lines: Sequence[Line]) -> str:
    """Where anchors beat the public mean and every baseline on unlike contexts, at the largest epsilon; intervals apart or not."""
    unlike = [v for v in lines if _kind(v) == "unlike"]
    largest = max((v["epsilon"] for v in unlike if v["epsilon"] is not None), default=None)
    said = []
    for n in sorted({v["rows"] for v in unlike}):
        here = [v for v in unlike if v["rows"] == n and v["epsilon"] in (largest, None)]
        own = _at(here, "anchors", largest)
        others = [v for v in here if v["method"] != "anchors"]
        if own is None or not others:
            continue
        best = min(others, key=lambda v: v["fvu"])
        word = (
            "better than"
            if own["high"] < best["low"]
            else "worse than"
            if own["low"] > best["high"]
            else "not told apart from"
        )
        helps = (
            ""
            if own["fvu"] < 1
            else "; still above 1: further off than these contexts' own mean output, which no public data tells"
        )
        said.append(
            f"* n = {n:,}: anchors {own['fvu']:.2f}, {word} the best of the others ({title(best['method'])}, {best['fvu']:.2f}){helps}."
        )
    return f"At epsilon = {largest:g}, on unlike contexts:\n\n" + "\n".join(said)


def _choices(choices: Sequence[Line]) -> str:
    rows = [
        [
            f"{76 * c['captions']:,}",
            f"{c['epsilon']:g}",
            f"{c['histogram_like']:.2f} / {c['histogram_unlike']:.2f}",
            f"{c['like']:.2f} / {c['unlike']:.2f}",
        ]
        for c in choices
    ]
    return (
        "*mixed* is a histogram beside a sum of row codes, which moves the anchors to the context's mean "
        "(`mechanisms/anchors/mixed.py`). The calibration weighs it against the histogram alone on held-out public contexts and on unlike "
        "ones that it composes from public rows (`calibration/anchors/mixed_fit.py`):\n\n"
        + table(["n", "epsilon", "histogram, like / unlike", "mixed, like / unlike"], rows)
    )


def predicted_section(results: Results) -> str:
    """The calibrations' own predictions beside what was measured."""
    expected = [*results["a"]["predicted"], *results.get("d", {}).get("predicted", [])]
    lines = [v for v in results["a"]["lines"] if v["method"] == "anchors"] + _beside(results, "fvu")
    measured = {(v["unit"], v["epsilon"]): v["other"] for v in lines}
    rows = [
        [
            p["unit"],
            f"{p['epsilon']:g}",
            p["release"],
            _interval(p),
            _interval(found),
            f"{found['fvu'] / p['fvu']:.2f}",
        ]
        for p in expected
        if (found := measured.get((p["unit"], p["epsilon"]))) is not None
    ]
    return (
        "A calibration predicts its FVU (for `hf-dp-xattn plan`) on public captions that it was not fitted to. The held-out captions here "
        "are made of combinations that NO public caption has, so a ratio above 1 is what novelty costs, which no public split shows.\n\n"
        + table(["unit", "epsilon", "release", "predicted, public", "measured, held-out", "ratio"], rows)
    )


CAVEATS = (
    "* FVU is measured with queries of unprotected drawings; a protected drawing asks other ones, which is why pictures are scored too.\n"
    "* The reader is a trained classifier with errors of its own; the unprotected line is its ceiling.\n"
    "* Noised rows and k-ary response are our own implementations, with a public codebook, priors and filters as good as we could make "
    "them; the Gaussian noise of the former is drawn in floating point, which measures the same and would not do for a release.\n"
    "* One small pipeline and one family of captions. Nothing here says how another model or another kind of prompt behaves; calibrate and "
    "use `hf-dp-xattn plan` for that.\n"
    "* Not covered by any of this: timing, the seed and scheduler, the negative prompt, the number of prompts and their padded length."
)

SECTIONS = (
    ("Fidelity of attention", "a", fvu_section),
    ("Attributes in pictures", "b", attributes_section),
    ("When can the prompt be read from the picture?", "b", readable_section),
    ("What an epsilon means for an attacker's odds", "d", odds_section),
    ("Why a row is a weak unit here", "a", row_section),
    ("Larger units: a phrase, a prompt", "d", units_section),
    ("Predicted and measured", "a", predicted_section),
    ("More rows", "c", lengths_section),
)


def write_page(results: Results, folder: Path) -> Path:
    """Writes <folder>.md; sections without results are left out."""
    out = [
        "# Utility, measured on `shapes`",
        "Written by `python benchmarks/utility.py` from `utility/results.json`; do not edit by hand.",
        "## What was measured",
        setup(results),
        "## In short",
        in_short(results),
    ]
    for heading, part, section in SECTIONS:
        if part in results:
            out += [f"## {heading}", section(results)]
    seconds = ", ".join(f"{p}: {v['seconds']:,} s on {v['threads']} thread(s)" for p, v in results.items())
    out += [
        "## Limits of these numbers",
        CAVEATS,
        f"Time: {seconds} (torch {next(iter(results.values()))['torch']}).",
    ]
    path = folder.with_suffix(".md")
    path.write_text("\n\n".join(part.strip() for part in out) + "\n")
    return path
