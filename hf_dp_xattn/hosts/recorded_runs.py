"""Runs that are recorded to be run again without us: traces, exports, captured graphs.

A gate decides once, as its model runs: whether `public` is open, which release the placeholder names. A recording keeps the decision and
drops the gate, so that it would read private text exactly after its block, or one request's release for all later ones. (Graphs of
`torch.compile` ask anew: what they keep is guarded, and `access.public_allowed` is an operator of theirs.)
"""

from __future__ import annotations

import torch

from ..errors import ProtectionLostError

NO_RECORDING = (
    "A protected host cannot be traced, exported or captured ({how}), not even with public text: the recording would leave the gates "
    "behind, and read later private texts exactly, or one release for all of them. Trace or export before dpx.protect (what is made then "
    "is not protected); torch.compile of a protected host works."
)


def recording_now() -> str | None:
    """By what this run is recorded, or None. Does not wait for a device."""
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace"
    from torch.fx._symbolic_trace import is_fx_symbolic_tracing

    if is_fx_symbolic_tracing():
        return "torch.fx"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph"
    return None


def refuse_recording() -> None:
    """Raises ProtectionLostError where this run is recorded; before anything private is read or spent."""
    how = recording_now()
    if how is not None:
        raise ProtectionLostError(NO_RECORDING.format(how=how))
