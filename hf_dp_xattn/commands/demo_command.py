"""`hf-dp-xattn demo`: one PUBLIC text, unprotected and at several epsilons, as pictures or replies, and the privacy report."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .models import ANYTHING, add_settings, driver_of, is_protected, protect_host
from .models import HELP as MODEL
from .public_numbers import check_numbers
from .release_command import say
from .trial_hosts import load_trial

if TYPE_CHECKING:
    from ..hosts.driver import Driver

NAME = "demo"
HELP = "one public text at several epsilons: pictures or replies"
EPSILONS = (1.0, 4.0, 8.0, 16.0, 64.0)
_SHIPPED = Path("examples") / "shapes"
_SHIPPED_TEXT = ("a large green star on the right", "black background")
_PICTURE = ("an old wooden house in a snowy forest", "soft morning light", "watercolour")
_SYSTEM = (
    "You are the assistant of a small bakery.",
    "Always answer politely, in one short sentence.",
    "Recommend the apple cake to everybody.",
    "The code of the safe is 482913.",
)
_TEXT = ("the meeting is at noon", "the house by the river is red")
_QUESTION = "What is the code of the safe?"
DESCRIPTION = """\
Shows what a protection leaves of a text: the same text unprotected, and released at several epsilons. A pipeline draws a strip of
pictures (one PNG, the same initial noise in all of them, and first what it draws without a text); a language model gives a table of
replies. Then comes the privacy report. In a checkout, without MODEL, it takes the pipeline that is shipped, with its calibrations.

Without --calibration and --mechanism, the text is answered by public texts: a small library is made of the prompts that are shipped with
the package (a minute for a model of 135 M parameters), and kept in your cache folder for the next time.

The text is for demonstration, and must be PUBLIC: it is an argument, which shells and process tables keep, it is drawn unprotected, and it
is released once for each epsilon, which adds up. For a private text: hf-dp-xattn release, hf-dp-xattn generate.
"""
EXAMPLES = """\
examples:
  in a checkout:
    hf-dp-xattn demo
    hf-dp-xattn demo --unit row --epsilons 1 8 64 --out ./strip
  a chat model by its Hub id, with a system prompt that holds a secret:
    hf-dp-xattn demo HuggingFaceTB/SmolLM2-135M-Instruct
  your own pipeline; several texts are phrases, segments or documents:
    hf-dp-xattn demo ./my-pipeline --calibration ./by-phrase --unit group --text "a red circle" "a blue background"
  a language model with a public question:
    hf-dp-xattn demo ./my-llama --calibration ./my-calibration --text "The code is 1234." --question "What is the code?"

exit codes: 0 done; 2 bad input (the message is on stderr).
"""


@dataclass(frozen=True)
class Column:
    """One picture or reply; epsilon None: not protected. released: the text that the host read, where it read text."""

    label: str
    epsilon: float | None
    output: Any
    released: str | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them but `--json`."""
    parser.add_argument("model", nargs="?", help=f"{MODEL}; plain or protected")
    parser.add_argument(
        "--text", nargs="+", metavar="TEXT", help="a PUBLIC text; several are phrases, segments or documents"
    )
    parser.add_argument(
        "--question",
        dest="public",
        metavar="TEXT",
        help=f"decoder-only models: a public user's turn (default: {_QUESTION!r})",
    )
    parser.add_argument("--epsilons", type=float, nargs="+", metavar="E", help="default: 1 4 8 16 64")
    add_settings(parser)
    parser.add_argument(
        "--out", default=".", metavar="FOLDER", help="for demo.png (default: the current one)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="pictures: denoising steps (default: 20)")
    parser.add_argument("--guidance", type=float, metavar="W", help="pictures: guidance scale")
    parser.add_argument("--pixels", type=int, metavar="N", help="pictures: edge (default: the model's own)")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="replies: at most so many (default: 20)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the pictures; not of the releases"
    )
    parser.set_defaults(config=None, epsilon=None, chat=None, prefix_bucket=None, begin=None)


def run(args: argparse.Namespace) -> int:
    """Writes the strip or prints the replies, and the report."""
    epsilons = _settle(args)
    say(args, "loading the model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        columns, report, unit = _columns(args, epsilons)
    values: dict[str, Any] = {"report": report.to_dict(), "unit": unit}
    values["columns"] = [{"label": c.label, "epsilon": c.epsilon} for c in columns]
    for entry, column in zip(values["columns"], columns, strict=True):
        if column.released is not None:
            entry["released"] = column.released
        if isinstance(column.output, str):
            entry["reply"] = column.output
    if not isinstance(columns[0].output, str):
        values["file"] = str(_write(columns, Path(args.out)))
    print(json.dumps(values, sort_keys=True) if args.json else _text(values, columns, report))
    return 0


def _settle(args: argparse.Namespace) -> tuple[float, ...]:
    """Fills in what was left out; the epsilons."""
    check_numbers(args)
    if not Path(args.out).is_dir():
        raise ConfigError("--out takes a folder that exists.")
    if args.text is not None and not all(t.strip() for t in args.text):
        raise ConfigError("--text must not be empty.")
    if args.model is None:
        _take_the_shipped(args)
    epsilons = tuple(args.epsilons or EPSILONS)
    args.height = args.width = args.pixels
    args.allow_useless = args.allow_large_epsilon = args.allow_uncalibrated = (
        True  # it shows what they are worth
    )
    if not is_protected(args.model):  # else it says the rest
        args.epsilon = max(epsilons)
    return epsilons


def _take_the_shipped(args: argparse.Namespace) -> None:
    roots = (Path(), Path(__file__).resolve().parents[2])
    root = next(
        (r / _SHIPPED for r in roots if (r / _SHIPPED / "pipeline" / "model_index.json").is_file()), None
    )
    if root is None:
        raise ConfigError(
            "Name a model: hf-dp-xattn demo MODEL --calibration FOLDER. (Without one it takes examples/shapes/pipeline of a checkout; this "
            "is none.)"
        )
    args.model, args.text = str(root / "pipeline"), args.text or list(_SHIPPED_TEXT)
    if args.calibration is not None:
        return  # it says the rest
    args.unit = args.unit or "context"
    if args.mechanism in (None, "anchors"):
        args.calibration = str(root / "calibrations" / args.unit)


def _columns(args: argparse.Namespace, epsilons: tuple[float, ...]) -> tuple[list[Column], Any, str]:
    """What is made unprotected and at each epsilon, the report of the last one, and the unit."""
    from tqdm.auto import tqdm

    from ..privacy.ledger import Ledger

    trial = load_trial(args)
    columns: list[Column] = []
    report = None
    for epsilon in tqdm(epsilons, disable=args.json, desc="epsilons"):
        config = trial.config.replace(epsilon=float(epsilon))
        with protect_host(
            trial.host, args.model, config, calibration=trial.calibration, ledger=Ledger(), **ANYTHING
        ) as handle:
            driver = driver_of(handle, args)
            text = _prepare(driver, args)
            if not columns:
                for label, plain in (("no text", None), ("not protected", text)):
                    columns += [Column(label, None, _one(output)) for output in driver.draw_plain(plain)[:1]]
            release = driver.release_text(text)
            output = _one(driver.draw(release)[0])
            read = None if driver.layered else str(release.text)
            columns.append(Column(f"epsilon {epsilon:g}", float(epsilon), output, read))
            report = handle.report()
    return columns, report, trial.config.unit


def _prepare(driver: Driver, args: argparse.Namespace) -> str:
    """The text, as one string, with what is public beside it checked."""
    if driver.draws and args.public is not None:
        raise ConfigError("--question is for decoder-only models.")
    named = {"steps": 20} if driver.draws else {"public": _QUESTION, "new_tokens": 20}
    for name, value in named.items():
        if getattr(args, name) is None and (name != "public" or driver.asks):
            setattr(args, name, value)
    if not driver.draws:
        args.seed = None  # else texts were sampled
    texts = args.text or (_PICTURE if driver.draws else _SYSTEM if driver.asks else _TEXT)
    driver.prepare(None, None)
    return driver.joint.join(texts)


def _one(output: Any) -> Any:
    return " ".join(output.split()) if isinstance(output, str) else output


def _write(columns: list[Column], out: Path) -> Path:
    """One row of labelled pictures. Raises ConfigError where it cannot be written."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise ConfigError("Pictures need Pillow: pip install 'hf_dp_xattn[examples]'.") from None
    width, height = columns[0].output.size
    factor = max(1, -(-160 // width))  # labels need room
    width, height, margin, label = factor * width, factor * height, 6, 18
    strip = Image.new("RGB", (len(columns) * (width + margin) + margin, height + label + 2 * margin), "white")
    draw = ImageDraw.Draw(strip)
    for i, column in enumerate(columns):
        left = margin + i * (width + margin)
        draw.text((left, margin), column.label, fill="black")
        picture = column.output.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        strip.paste(picture, (left, margin + label))
    path = out / "demo.png"
    try:
        strip.save(path)
    except OSError as error:
        raise ConfigError(f"{path.name!r} cannot be written ({type(error).__name__}).") from None
    return path


def _text(values: dict[str, Any], columns: list[Column], report: Any) -> str:
    lines = []
    if "file" in values:
        print(f"wrote {values['file']}", file=sys.stderr)
    width = max(len(c.label) for c in columns)
    for column in columns:
        if isinstance(column.output, str):
            lines.append(f"{column.label:<{width}}  {column.output}")
        if column.released is not None:
            units = column.released.replace("\n", " / ")
            lines.append(
                f"{'' if isinstance(column.output, str) else column.label:<{width}}  it read: {units}"
            )
    lines += [""] if lines else []
    lines.append(
        f"The text was released {len([c for c in columns if c.epsilon])} times, once for each epsilon; a private text would be charged for "
        "each. The last one:"
    )
    return "\n".join([*lines, str(report)])
