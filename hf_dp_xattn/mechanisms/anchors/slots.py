r"""Slot decoder: from a released code y in R^K to R rows in context space. Post-processing, trained on public contexts with fresh noise.

    z = (y - m) / s,    h = [gelu(W_2 gelu(W_1 z + b_1) + b_2) ; g z],    x_r = slot_r + U A_r h,    log w_r = l_r + c_r h.

slot_r are public rows (anchors that the code moves), U: L directions of context space. The linear path g z carries what adds up (new
combinations of known parts), the network the rest. W_2, A, U, slots, l, c are shared by all plans of a calibration; W_1, b_1, b_2, g, m, s
belong to one plan, so to one epsilon. At small epsilon training drives h towards a constant: the decoder
then gives the rows that stand for the public mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..context_rows import ContextRows


@dataclass(frozen=True, eq=False)
class SlotHead:
    """One plan's first layer: weight [H, K], bias and second_bias [H], gain [K]; center [K] and scale [] of the codes."""

    weight: torch.Tensor
    bias: torch.Tensor
    second_bias: torch.Tensor
    gain: torch.Tensor
    center: torch.Tensor
    scale: torch.Tensor

    TENSORS = ("weight", "bias", "second_bias", "gain", "center", "scale")


@dataclass(frozen=True, eq=False)
class SlotDecoder:
    """The shared part: hidden [H, H], coefficients [R, L, H + K], directions [L, C], slots [R, C], weight_map [R, H + K],
    log_weights [R]."""

    hidden: torch.Tensor
    coefficients: torch.Tensor
    directions: torch.Tensor
    slots: torch.Tensor
    weight_map: torch.Tensor
    log_weights: torch.Tensor

    TENSORS = ("hidden", "coefficients", "directions", "slots", "weight_map", "log_weights")

    def moves(self, code: torch.Tensor, head: SlotHead) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K] -> how far each slot moves along each direction [B, R, L], log weights [B, R]; differentiable."""
        x = (code - head.center) / head.scale
        h = F.gelu(F.linear(x, head.weight, head.bias))
        h = torch.cat([F.gelu(F.linear(h, self.hidden, head.second_bias)), x * head.gain], dim=-1)
        moved = torch.einsum("rlh,bh->brl", self.coefficients, h)
        return moved, self.log_weights + F.linear(h, self.weight_map)

    def decode_batch(self, code: torch.Tensor, head: SlotHead) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K] -> rows [B, R, C], log weights [B, R]; differentiable."""
        moved, log_weights = self.moves(code, head)
        return self.slots + moved @ self.directions, log_weights

    @torch.no_grad()
    def decode(self, code: torch.Tensor, head: SlotHead) -> ContextRows:
        """[K] -> rows and log weights, float32."""
        rows, log_weights = self.decode_batch(code.to("cpu", torch.float32).unsqueeze(0), head)
        return ContextRows(rows[0], log_weights[0])
