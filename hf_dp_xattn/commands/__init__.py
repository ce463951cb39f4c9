"""Subcommands of `hf-dp-xattn`, one module each: `NAME`, `add(subparsers)`, and `run(args) -> exit code`. Heavy imports belong in `run`."""
