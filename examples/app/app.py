"""A page where epsilon is a slider: a private prompt, its picture without and with protection, what it costs and what is promised.

    pip install 'hf_dp_xattn[app]'
    python examples/app/app.py            # then open http://127.0.0.1:7860
    python examples/app/app.py --model HuggingFaceTB/SmolLM2-135M-Instruct      # a language model: yours by its folder or Hub id

Without --model it serves the `shapes` pipeline of this repository and its public calibrations; nothing is downloaded and nothing is sent
anywhere. Drawing a new (prompt, unit, epsilon) makes a release, which the ledger charges to the prompt; drawing it again reads that
release and is free. The page shows the sum, which is what an attacker who sees all the pictures has.

The prompt goes to the server in the body of a request, is not logged, and is written to no file; neither are the pictures.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# before the imports: no analytics, no version check, no Hub, and no library's log of what it is given
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from app.studio import BUDGET, Studio

LOCAL = "127.0.0.1"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one")
    parser.add_argument(
        "--host",
        default=LOCAL,
        help="address to listen on; any other than 127.0.0.1 sends prompts over plain HTTP",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        help=f"epsilon that one prompt may spend under one unit (default {BUDGET:g}, more than all of the slider)",
    )
    parser.add_argument(
        "--model", help="folder, Hub id or GGUF file of a chat model, whose system prompt is private"
    )
    parser.add_argument(
        "--calibration", help="its library (default: a small one of public prompts, made once and kept)"
    )
    args = parser.parse_args()
    if args.model is not None and not Path(args.model).exists():
        os.environ.pop("HF_HUB_OFFLINE")  # asked for by its Hub id
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        from app.page import STYLE, build, theme
    except ImportError as error:
        sys.exit(f"The page needs gradio ({error}): pip install 'hf_dp_xattn[app]'")
    if args.host != LOCAL:
        print("Prompts will travel unencrypted: put this behind HTTPS.", file=sys.stderr)

    print("loading ...", flush=True)
    if args.model is None:
        studio = Studio(args.budget)
        studio.warm_up()
        page = build(studio)
    else:
        from app.chat_page import build_chat
        from app.chat_studio import load_chat_studio

        page = build_chat(load_chat_studio(args.model, args.calibration, args.budget))
    _, url, _ = page.launch(
        server_name=args.host,
        server_port=args.port or free_port(args.host),
        theme=theme(),
        css_paths=[STYLE],
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        run_history=False,  # the browser keeps no calls
        show_error=False,  # error texts may quote it
        enable_monitoring=False,
        prevent_thread_lock=True,
    )
    print(f"open {url} (stop with Ctrl-C)", flush=True)
    page.block_thread()


def free_port(host: str) -> int:
    """A port that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
