"""That a real release is what its law says: its random bytes are recorded, and the law makes the same release of them, bit for bit.

No statistics, so no false alarm: a release that adds other noise than its parameters say, adds it in another place or not at all,
or reads its rows in another way, is not rebuilt. The bytes are the operating system's; they belong to releases of canaries.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import DPXAttnError
from ..mechanisms.anchors.anchors import HistogramSource, ResponseSource, SumSource, pool
from ..mechanisms.anchors.histogram import GaussianNoise
from ..mechanisms.anchors.mixed import MixedSource
from ..mechanisms.anchors.row_sum import PreparedRowSum
from ..mechanisms.dptree.tree_attention import layers_of
from ..mechanisms.dptree.tree_moments import moments_of
from ..mechanisms.dptree.tree_structure import structure_of
from ..mechanisms.kernel_sum.kernel_sum import layer_structure
from ..privacy.bits import Entropy, SystemEntropy
from .laws import AnchorsLaw, Context, DPTreeLaw, KernelSumLaw, Law


class Recorder:
    """The operating system's entropy, and a record of it."""

    def __init__(self) -> None:
        self._source, self.bytes = SystemEntropy(), bytearray()

    @property
    def private(self) -> bool:
        return True

    def random_bytes(self, n: int) -> bytes:
        data = self._source.random_bytes(n)
        self.bytes += data
        return data


class Replayer:
    """A record, read once from its beginning; more than there is raises."""

    def __init__(self, record: bytes) -> None:
        self._record, self._at = record, 0

    @property
    def private(self) -> bool:
        return False

    @property
    def left(self) -> int:
        return len(self._record) - self._at

    def random_bytes(self, n: int) -> bytes:
        if n > self.left:
            raise _Differs
        self._at += n
        return self._record[self._at - n : self._at]


class _Differs(DPXAttnError):
    """More bytes are read than the release drew."""


def replayed(law: Law, context: Context) -> bool:
    """Whether ONE real release of a canary is rebuilt exactly."""
    recorder = Recorder()
    if isinstance(law, AnchorsLaw):
        released = law.prepared.run_rows(context.rows, groups=context.groups, entropy=recorder).context
        real = [released.rows, released.log_weights]
    else:
        assert isinstance(law, (KernelSumLaw, DPTreeLaw))
        keys, values = context.rows
        result = law.prepared.run(keys, values, groups=context.groups, entropy=recorder)
        real = [t for s in result.structures for t in s.tensors().values()]
    replayer = Replayer(bytes(recorder.bytes))
    try:
        if isinstance(law, AnchorsLaw):
            rebuilt = _anchors(law, context, replayer)
        elif isinstance(law, DPTreeLaw):
            rebuilt = _dptree(law, context, replayer)
        else:
            rebuilt = _kernel_sum(law, context, replayer)
    except _Differs:
        return False
    same = len(real) == len(rebuilt) and all(torch.equal(a, b) for a, b in zip(real, rebuilt, strict=True))
    return same and replayer.left == 0


def _anchors(law: AnchorsLaw, context: Context, entropy: Entropy) -> list[torch.Tensor]:
    p = law.prepared
    decoded = p.source.decode(_code(p.source, context, entropy), p.plan, p.decoders).pruned()
    return [decoded.rows, decoded.log_weights]


def _code(source: Any, context: Context, entropy: Entropy) -> torch.Tensor:
    if isinstance(source, SumSource):
        return _sum(source.prepared, pool(context.rows, source.unit, context.groups), entropy)
    if isinstance(source, HistogramSource):
        prepared = source.prepared
        total = prepared.exact_sums(source.quantizer.cells(pool(context.rows, source.unit, context.groups)))
        return prepared.counts(total + prepared.noise.sample(prepared.cells, entropy))
    if isinstance(source, MixedSource):
        counts = _code(source.histogram, context, entropy)
        total = _sum(source.sum, context.rows, entropy)
        return torch.cat([counts, total, total.new_tensor([float(len(context.rows))])])
    assert isinstance(source, ResponseSource)
    code = source.codes.new_zeros(source.codes.shape[-1])
    for cells, codes in zip(source.cells(context.rows, context.groups), source.codes, strict=True):
        code = code + codes[torch.from_numpy(source.response.draw(cells.numpy(), entropy))].sum(0)
    return code


def _sum(prepared: PreparedRowSum, rows: torch.Tensor, entropy: Entropy) -> torch.Tensor:
    noise = GaussianNoise(prepared.sigma_squared).sample(prepared.row_sum.size, entropy)
    return (prepared.exact_sums(rows) + noise).to(torch.float64) * 2.0**-prepared.exponent


def _kernel_sum(law: KernelSumLaw, context: Context, entropy: Entropy) -> list[torch.Tensor]:
    p, noise = law.prepared, GaussianNoise(law.prepared.sigma_squared)
    noised = [
        (t + noise.sample(t.numel(), entropy).view(t.shape)).to(torch.float64) * 2.0**-p.exponent
        for t in law.totals(context)
    ]
    n = context.rows[0][0].shape[1]
    units = {"row": n, "context": 1}.get(p.config.unit) or len(torch.unique(context.groups))
    sums = noised if p.sketch is None else p.sketch.reconstruct(noised[0], units, p.sigma)
    known = n if p.config.unit == "row" and p.config.neighboring == "replace_one" else None
    structures = [
        layer_structure(encoder, part, known, p.config.normalizer_floor)
        for encoder, part in zip(p.encoders, sums, strict=True)
    ]
    return [t for s in structures for t in s.tensors().values()]


def _dptree(law: DPTreeLaw, context: Context, entropy: Entropy) -> list[torch.Tensor]:
    p, noise = law.prepared, law.noise
    step = {part.name: part.step for part in p.split.parts}
    noised = {
        name: [
            (t + noise.sample(t.numel(), entropy).view(t.shape)).to(torch.float64) * step[name]
            for t in tensors
        ]
        for name, tensors in law.parts(context).items()
    }
    n = context.rows[0][0].shape[1]
    layers = layers_of(p.plan, p.config, moments_of(noised, p.plan.moments), n)
    return [t for layer in layers for t in structure_of(layer).tensors().values()]
