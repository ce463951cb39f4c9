"""docs/paper.md from results.json: every number in it comes from there."""

from __future__ import annotations

from typing import Any

from .common import KERNEL, MECHANISMS, TREE

REPOSITORY_COMMAND = "python benchmarks/paper.py"


def _g(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _slope(fit: dict[str, Any]) -> str:
    return f"{fit['slope']:.2f} ({fit['low']:.2f} to {fit['high']:.2f})"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(rows + ["| " + " | ".join(line) + " |" for line in lines])


def _times(a: float, b: float) -> str:
    return f"{a / b:.1f}" if a / b < 100 else f"{a / b:,.0f}"


def _summary(r: dict[str, Any]) -> str:
    space, init, query = r["space"], r["initialisation"], r["queries"]
    rows_, eps = r["error_rows"]["slopes"], r["error_epsilon"]["slopes"]
    relative = r["relative"]
    over = {
        m: max(p[m] / p["limit"] for p in relative["points"] if p["limit"] > 10 * relative["precision"])
        for m in MECHANISMS
    }
    features = r["error_features"]["slopes"]

    def both(slopes: dict[str, Any], show: Any = _slope) -> list[str]:
        return [show(slopes[m]) if m in slopes else "too little signal" for m in MECHANISMS]

    def plain(v: float) -> str:
        return f"{v:.2f}"

    lines = [
        ["space against n (one bin a row)", "1 (n d r^2 in all)", *both(space["slopes"]["n"], plain)],
        ["space against d (channels)", "1", *both(space["slopes"]["dv"], plain)],
        ["space against r", "at most 2", *both(space["slopes"]["r"], plain)],
        ["initialisation time against n", "1", *both(init["slopes"]["n"])],
        ["initialisation time against d", "1", *both(init["slopes"]["dv"])],
        ["initialisation time against r", "at most 2", *both(init["slopes"]["r"])],
        ["query time against n", "0 (up to logarithms)", *both(query["slopes"]["n"])],
        ["query time against d", "at most 1", *both(query["slopes"]["dv"])],
        ["query time against r", "at most 2", *both(query["slopes"]["r"])],
        ["additive error against n", "-1", *both(rows_)],
        ["additive error against epsilon", "-1", *both(eps)],
        ["noise of a numerator against r", "at most 2", *both(features)],
        [
            "relative error over 2 eps_s / (1 - eps_s)",
            "at most 1",
            *(f"at most {over[m]:.2f}" for m in MECHANISMS),
        ],
    ]
    return _table(["claim", "the paper's exponent", "dptree", "kernel_sum"], lines)


def _factors(r: dict[str, Any]) -> str:
    features, bins, space = (
        r["error_features"]["points"],
        r["error_bins"]["points"],
        r["space"]["points"]["n"],
    )
    first, last = features[0], features[-1]
    one, many = bins[0], bins[-1]
    q, i = r["queries"]["points"]["r"], r["initialisation"]["points"]["r"]
    n = r["error_rows"]["points"][-1]
    lines = [
        ["error of an answer", f"n = {n['x']:,}, r = 15, 64 bins", _times(n[TREE], n[KERNEL])],
        ["noise", f"r = {first['x']}, 64 bins", _times(first[TREE], first[KERNEL])],
        ["noise", f"r = {last['x']}, 64 bins", _times(last[TREE], last[KERNEL])],
        ["noise", f"r = 15, {one['x']} bin (no tree at all)", _times(one[TREE], one[KERNEL])],
        ["noise", f"r = 15, {many['x']:,} bins", _times(many[TREE], many[KERNEL])],
        ["numbers released", f"{space[0]['x']} bin", _times(space[0][TREE], space[0][KERNEL])],
        ["numbers released", f"{space[-1]['x']:,} bins", _times(space[-1][TREE], space[-1][KERNEL])],
        ["initialisation", f"r = {i[-1]['x']}, 64 bins", _times(i[-1][TREE], i[-1][KERNEL])],
        ["queries, through the trees", f"r = {q[-1]['x']}", _times(q[-1]["trees"], q[-1][KERNEL])],
        ["queries, served form", f"r = {q[-1]['x']}", _times(q[-1][TREE], q[-1][KERNEL])],
    ]
    return _table(["what", "where", "dptree / kernel_sum"], lines)


def _adversary(a: dict[str, Any]) -> str:
    lines = [
        [
            v["release"],
            str(v["coordinates"]),
            _g(v["fixed"]),
            _g(v["adaptive"]),
            _g(v["bound"]),
            f"{v['adaptive'] / v['bound']:.2f}",
        ]
        for v in a["found"]
    ]
    head = ["release", "coordinates", "fixed queries", "adaptive queries", "bound", "adaptive / bound"]
    return _table(head, lines)


def _growing(g: dict[str, Any]) -> str:
    lines = []
    for p in g["points"]:
        tree, root = p["tree"], p["square_root"]
        lines.append(
            [
                f"{p['x']:,}",
                p["chosen"].replace("_", " "),
                f"{root['worst_predicted']:.2f}",
                f"{root['mean_measured']:.2f}",
                f"{tree['worst_predicted']:.2f}",
                f"{tree['mean_measured']:.2f}",
                f"{p['naive']['worst_predicted']:.2f}",
                _times(tree["worst_predicted"], root["worst_predicted"]),
                _times(p["naive"]["worst_predicted"], root["worst_predicted"]),
            ]
        )
    head = [
        "T",
        "chosen",
        "square root, worst",
        "mean, measured",
        "tree, worst",
        "mean, measured",
        "naive",
        "tree / root",
        "naive / root",
    ]
    return _table(head, lines)


def _shapes(s: dict[str, Any]) -> str:
    if "missing" in s:
        return f"Not measured: {s['missing']}"
    names = ("anchors", KERNEL, "kernel_sum_small", TREE)
    lines = [
        [_g(p["x"]), *(f"{p[m]['fvu']:.3g} ({p[m]['low']:.3g} to {p[m]['high']:.3g})" for m in names)]
        for p in s["points"]
    ]
    settings = ", ".join(f"{k} = {v}" for k, v in s["tree_settings"].items())
    head = ["epsilon", "anchors", "kernel_sum, sketch", "kernel_sum, the tree's settings", "dptree"]
    return f"""Fraction of the outputs' variance that a release leaves unexplained (1: as good as the public mean, which scored
{s["public_mean"]:.3g}), over {s["captions"]} public captions, all layers and heads, 76 private rows, unit = row, replace_one, delta = 1e-5,
queries from other captions, 95 % intervals over captions. The tree has the settings that suit it ({settings}: hardly more than the mean
value) and a public geometry; kernel_sum has its calibration with a sketch and shrinkage, and beside it the tree's settings.

{_table(head, lines)}

![Unexplained variance against epsilon](paper/shapes.png)"""


def page(r: dict[str, Any]) -> str:
    """The whole document."""
    growing, adversary = r["growing"], r["adversary"]
    last = growing["points"][-1]
    checked = ", ".join(f"{m}: {v:.3g}" for m, v in r["queries"]["relative_errors_checked"].items())
    root = last["square_root"]["worst_predicted"]
    over_tree = _times(last["tree"]["worst_predicted"], root)
    over_naive = _times(last["naive"]["worst_predicted"], root)
    meta = r["meta"]
    own = " and ".join(f"{v:.2f} ({m})" for m, v in r["error_epsilon"]["slopes_of_the_noise"].items())
    return f"""# The paper's claims, measured

Written by `{REPOSITORY_COMMAND}`; every number comes from [paper/results.json](paper/results.json), and none was typed. arXiv
2407.14717 claims, for a context of n rows, d channels and r polynomial features: space and initialisation O~(n d r^2), query
O~(d r^2), additive error O~((1 - eps_s)^-1 n^-1 eps^-1 R^2s R_w r^2), relative error 2 eps_s / (1 - eps_s), for adaptive queries too.

`dptree` is the paper's own structure with its holes closed (every term noised and counted); `kernel_sum` releases the same sums at
once. Both have the same (epsilon, delta = 1e-5), unit = row, replace_one, degree 2, declared bounds and no calibration. Times: CPU
seconds in one thread, torch {meta["torch"]}, {meta["machine"]}. Before any time was taken, both answered within the paper's
relative error of exact attention ({checked}).

## Exponents

Slopes of least-squares lines on log-log axes, 95 % intervals by resampling the noise draws or times. Times: over the upper half of
each range, where fixed costs no longer dominate. Additive error: over the points where it is below a tenth of the answers' range;
above, the noise reaches the normaliser and no bound holds. The noise that (epsilon, delta) asks for does not fall as 1/epsilon quite:
over the same epsilons its own slope is {own}.

{_summary(r)}

An exponent below the paper's is an improvement on its bound: r trees instead of r^2 numbers, and times that small sizes hide.
`kernel_sum` has no n in its space at all.

## By what factor, and where

Above 1: the tree loses.

{_factors(r)}

Squares of distances read only the root of each tree, so its levels cost noise and space for nothing; and the detour by distances
noises a sum three times (weights, first and second moments) that kernel_sum noises once.

![Space](paper/space.png)

![Initialisation](paper/initialisation.png)

![Queries](paper/queries.png)

## Additive error

Root mean square of the difference to the answers of the same features without noise.

![Additive error against n and epsilon](paper/error.png)

The noise of a numerator (epsilon = 1), in rows: a context must have many more rows than this.

![Noise against features and bins](paper/noise.png)

## Relative error

Without visible noise, the largest relative error of an answer against exact attention, degrees 1 to 4, logit bounds 0.25 to 1.5;
random rows, and rows at both ends of the logits' range. Below about {r["relative"]["precision"]:g} the integer lattice is what is seen.

![Relative error against eps_s](paper/relative.png)

## Adaptive queries

{adversary["queries"]:,} queries of one weighted kernel sum (epsilon = {adversary["epsilon"]:g}, degree 2), each chosen
from the answers so far by an adversary that knows the data; the worst of {adversary["seeds"]} releases, in rows. The bounds hold for all
queries at once with probability 1 - {adversary["beta"]:g}: for one release because its noise is bounded, for the median of
{adversary["copies"]} copies by the paper's net.

{_adversary(adversary)}

One release needs no copies: the median's share of the budget costs more than it gains.

## A context that grows

T appends, one charge (`release.append`, `privacy/continual.py`): standard deviation of the running sum's error, in units of the noise
that ONE release of it takes at the same (epsilon = {growing["epsilon"]:g}, delta). "Naive": the whole context released anew at each
append, or each append by itself.

{_growing(growing)}

At T = {last["x"]:,} the square-root factorisation errs {over_tree} times less than the binary tree and {over_naive} times less than
naive releases. It keeps 2 T vectors in memory, the tree 2 log T: the tree is taken where those do not fit.

![Error against the number of appends](paper/growing.png)

## anchors

`anchors` releases rows of the context space that a host's layers project, decoded with a public calibration, so it is not defined for
bare keys and values and has no r; it is measured on the `shapes` pipeline.

{_shapes(r["shapes"])}
"""
