"""The report of a fine-tuning run: one HTML file that shows what was gained and lost; it knows plain data alone.

Its curves are drawn for other pages too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.report.page import line_chart
    from ultrarag.report.rendering import Page, Rung, render
else:
    __getattr__, __dir__, __all__ = exports(__name__)
