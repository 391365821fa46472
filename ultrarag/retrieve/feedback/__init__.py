"""Feedback: what people asked and what they did with the hits, and the training rows that follow from it.

Searches and events come in, by query id; rows to train on, labels to judge by and files in the names of OpenSearch's
User Behavior Insights go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.feedback.after_swap import Watch, watch
    from ultrarag.retrieve.feedback.entries import ACTIONS, LoggedQuery
    from ultrarag.retrieve.feedback.frozen import freeze
    from ultrarag.retrieve.feedback.keeping import FILE
    from ultrarag.retrieve.feedback.labels import Label, Rules, wilson
    from ultrarag.retrieve.feedback.log import FeedbackLog
    from ultrarag.retrieve.feedback.position import Position, estimate
    from ultrarag.retrieve.feedback.rows import TrainingRows, training_rows
    from ultrarag.retrieve.feedback.schedule import Readiness, Schedule
    from ultrarag.retrieve.feedback.ubi import export_ubi, import_ubi
else:
    __getattr__, __dir__, __all__ = exports(__name__)
