"""The page itself: which control does what. Only drawing charges; moving the slider or reading the plan does not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from shapes.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES

import hf_dp_xattn as dpx
from app import panels
from app.studio import Studio

TITLE = "A private prompt, and what epsilon does to it"
PROMPT = "a large green star on the right, a small red circle on the left, black background"
UNIT, EPSILON = "context", 16.0
STYLE = Path(__file__).with_name("style.css")
LONGEST = 300  # characters
_INTRO = f"""<div class="dpx-intro"><h1>{TITLE}</h1>
<p>The prompt is released <b>once</b>, with noise, and the image model reads that release and never the prompt. A smaller ε tells
less about it, to the model and to everyone who sees the picture.</p></div>"""
_HINT = (
    "<p class='dpx-hint'>Moving the slider updates the plan, for free. Letting it go, its arrow keys, <i>Enter</i> in the prompt, another "
    "unit, or the button draws: a new combination is released and <b>charged</b>, one that was drawn before is free.</p>"
)
_WHY_NOT = (
    "<p class='dpx-hint'>Forgets what was spent and draws new noise, so that you can play on. <b>Never do this in earnest:</b> what was "
    "released stays released, pictures drawn from two releases can be averaged, and a ledger that forgets promises nothing. In use it is "
    "a file: <code>dpx.Ledger(path)</code>.</p>"
)
_SHARED = (
    "<p class='dpx-hint'>The ledger is kept in memory until the server stops; reloading the page does not reset it. Everyone who opens "
    "this page shares it, and can see whether a prompt was drawn before: give real customers a ledger each.</p>"
)


def theme() -> gr.themes.Base:
    """Fonts of the system: nothing is fetched from elsewhere."""
    system = ["ui-sans-serif", "system-ui", "sans-serif"]
    plain = gr.themes.Default(primary_hue="indigo", font=system, font_mono=["ui-monospace", "monospace"])
    return plain.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")


def _words() -> str:
    kinds = {
        "shapes": SHAPES,
        "colours": COLOURS,
        "sizes": ("small", "large"),
        "places": PLACES,
        "backgrounds": BACKGROUNDS,
    }
    items = "".join(f"<dt>{k}</dt><dd>{', '.join(v)}</dd>" for k, v in kinds.items())
    return f"<dl class='dpx-words'>{items}</dl><p class='dpx-hint'>One or two objects, each with size, colour, shape and place.</p>"


ONE_AT_A_TIME: dict[str, Any] = {
    "concurrency_limit": 1,
    "concurrency_id": "pipeline",
    "api_visibility": "private",
    "show_progress": "minimal",
}
"""Of events that run the model."""
ARROWS = """() => {
  const slider = document.querySelector('#dpx-epsilon input[type=range]');
  let due;
  slider.addEventListener('keyup', (event) => {  // once the keys rest: each new value that is drawn is charged
    if (!/^(Arrow|Page|Home|End)/.test(event.key)) return;
    clearTimeout(due);
    due = setTimeout(() => document.querySelector('#dpx-draw').click(), 600);
  });
}"""


def say_epsilon(epsilons: Sequence[float]) -> str:
    """What a screen reader says of the slider, whose own value is a position."""
    names = [f"epsilon {e:g}" for e in epsilons]
    return f"(i) => {{ document.querySelector('#dpx-epsilon input[type=range]').setAttribute('aria-valuetext', {names}[i]); }}"


def epsilon_slider(epsilons: Sequence[float], start: int) -> gr.Slider:
    """Its value is the position of an epsilon; these stand below it."""
    slider = gr.Slider(
        0, len(epsilons) - 1, start, step=1, label="ε of one release", elem_id="dpx-epsilon", buttons=[]
    )
    gr.HTML(f"<div class='dpx-ticks'>{''.join(f'<span>{e:g}</span>' for e in epsilons)}</div>")
    return slider


def build(studio: Studio) -> gr.Blocks:
    """The page. Handlers run one at a time."""
    epsilons = studio.epsilons
    start = epsilons.index(EPSILON)

    def plan(unit: str, index: float) -> str:
        return panels.expectation(studio.plan(unit, epsilons[int(index)]))

    def about(unit: str) -> str:
        return f"<p class='dpx-hint'>{panels.ABOUT_UNITS[unit]}</p>"

    def draw(prompt: str, unit: str, index: float) -> tuple[Any, ...]:
        epsilon = epsilons[int(index)]
        try:
            drawn = studio.draw(prompt, unit, epsilon)
        except dpx.DPXAttnError as error:  # its messages quote no prompt
            return panels.refusal(str(error)), gr.skip(), plan(unit, index), gr.skip(), gr.skip()
        except Exception as error:  # other messages may
            print(f"drawing failed: {type(error).__name__}", file=sys.stderr, flush=True)
            return (panels.refusal("Drawing failed; see the server's output."), *[gr.skip()] * 4)
        return (
            panels.status(drawn),
            panels.pictures(drawn),
            plan(unit, index),
            panels.spending(drawn),
            panels.report(drawn),
        )

    def reset(prompt: str, unit: str, index: float) -> tuple[Any, ...]:
        studio.reset()
        return draw(prompt, unit, index)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(_INTRO)
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(
                    PROMPT,
                    label="Private prompt",
                    lines=2,
                    max_lines=4,
                    max_length=LONGEST,
                    elem_id="dpx-prompt",
                    # browsers remember what is typed, and some send it away to check its spelling
                    html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
                )
                unit = gr.Radio(
                    [(name, key) for key, (name, *_) in panels.UNITS.items()],
                    value=UNIT,
                    label="What one guarantee covers",
                    elem_id="dpx-unit",
                )
                unit_text = gr.HTML(about(UNIT))
                index = epsilon_slider(epsilons, start)
                button = gr.Button("Draw", variant="primary", elem_id="dpx-draw")
                gr.HTML(_HINT)
                with gr.Accordion("Words that this small model knows", open=False):
                    gr.HTML(_words())
            with gr.Column(scale=7, min_width=320):
                status = gr.HTML(elem_id="dpx-status")
                pictures = gr.HTML(elem_id="dpx-pictures")
        with gr.Row():
            with gr.Column(min_width=320):
                expected = gr.HTML(plan(UNIT, start), elem_id="dpx-plan")
                report = gr.HTML(elem_id="dpx-report")
            with gr.Column(min_width=320):
                spent = gr.HTML(elem_id="dpx-spent")
                again = gr.Button("Reset demo budget", size="sm", elem_id="dpx-reset")
                gr.HTML(_WHY_NOT + _SHARED)

        given, shown = [prompt, unit, index], [status, pictures, expected, spent, report]
        draws = {
            "inputs": given,
            "outputs": shown,
            **ONE_AT_A_TIME,
        }
        gr.on([prompt.submit, button.click, index.release, unit.input, page.load], draw, **draws)
        again.click(reset, **draws)
        index.change(
            plan,
            [unit, index],
            expected,
            api_visibility="private",
            show_progress="hidden",
            trigger_mode="always_last",
        )
        # for screen readers: the slider's own value is a position
        gr.on([index.change, page.load], None, index, js=say_epsilon(epsilons))
        page.load(None, None, None, js=ARROWS)
        unit.change(about, unit, unit_text, api_visibility="private", show_progress="hidden")
    return page.queue(max_size=32)
