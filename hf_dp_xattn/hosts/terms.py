"""What a release carries along about the host that made it: for its card, and for whoever loads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..artefacts.card import is_hub_id
from ..report import PrivacyReport


@dataclass(frozen=True)
class Terms:
    """host: class of the model. base_model: its Hub id, where it came from the Hub. The rest: word for word from the host's report."""

    host: str
    base_model: str | None
    public: tuple[str, ...]
    not_covered: tuple[str, ...]
    warnings: tuple[str, ...]

    def report(
        self, config: dict[str, Any], releases: Iterable[dict[str, Any]], *, layers: int = 0, heads: int = 0
    ) -> PrivacyReport:
        """What a release's file says of itself.

        Args:
            config: `DPXAttnConfig.to_dict`.
            releases: one entry each (`report.release_entry`).
            layers: how many read the context.
            heads: of all these layers.
        """
        return PrivacyReport(
            host=self.host,
            layers=layers,
            heads=heads,
            config=config,
            releases=tuple(releases),
            public=self.public,
            not_covered=self.not_covered,
            ledger="with whoever made the release",
            warnings=self.warnings,
        )


def base_model_of(host: Any) -> str | None:
    """The Hub id that a pipeline or model was loaded from. A local path says nothing to others, and may say too much."""
    config = getattr(host, "config", None)
    name = getattr(host, "name_or_path", None) or getattr(config, "_name_or_path", None)
    return name if is_hub_id(name) else None


def terms_of(report: PrivacyReport, hosts: Iterable[Any]) -> Terms:
    """The terms that a report states. hosts: the pipeline or model, and its parts, of which one may know its Hub id."""
    return Terms(
        host=report.host,
        base_model=next((name for host in hosts if (name := base_model_of(host)) is not None), None),
        public=report.public,
        not_covered=report.not_covered,
        warnings=report.warnings,
    )
