"""What a conformance run found: one Result per check, readable in a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "failed", "not applicable"]


class Failed(Exception):
    """A check did not hold: what was found, with its number, and what to do about it."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.found = found
        self.remedy = remedy


class NotApplicable(Exception):
    """A check has no meaning for this adapter or this machine; the message says why."""


@dataclass(frozen=True)
class Result:
    """The outcome of one check."""

    check: str
    status: Status
    #: what was measured, what failed, or why the check does not apply
    detail: str
    #: what to do; empty unless it failed
    remedy: str = ""


@dataclass
class Report:
    """All results of one adapter."""

    adapter: str
    #: "adapter 'NAME' of package 'PACKAGE' VERSION"
    label: str
    model: str
    results: list[Result] = field(default_factory=list)

    @property
    def failed(self) -> list[Result]:
        """The checks that did not hold."""
        return [result for result in self.results if result.status == "failed"]

    @property
    def ok(self) -> bool:
        """No check failed."""
        return not self.failed

    def __getitem__(self, check: str) -> Result:
        """The result of the named check."""
        return next(result for result in self.results if result.check == check)

    def __str__(self) -> str:
        wide = max((len(result.check) for result in self.results), default=0)
        lines = [f"{self.label}, model {self.model}"]
        for result in self.results:
            mark = "-" if result.status == "not applicable" else result.status
            reason = "not applicable: " if result.status == "not applicable" else ""
            lines.append(f"{mark:<6}  {result.check:<{wide}}  {reason}{result.detail}")
            if result.remedy:
                lines.append(f"{'':<6}  {'':<{wide}}  -> {result.remedy}")
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        count = {status: sum(result.status == status for result in self.results) for status in _STATUSES}
        return ", ".join(f"{number} {status}" for status, number in count.items())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "ok": self.ok}


_STATUSES: Sequence[Status] = ("ok", "failed", "not applicable")
