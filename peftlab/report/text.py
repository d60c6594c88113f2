"""Values of a comparison as people read them; what is missing is an en dash."""

from __future__ import annotations

import re

from peftlab.results.comparison import Metric, Row
from peftlab.results.paired import Difference

MISSING = "–"
_CONTROL = re.compile(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def clean(text: str) -> str:
    """Without terminal colours and the control characters that XML and terminals must not see."""
    return _CONTROL.sub("", _ANSI.sub("", text))


def shorten(text: str, length: int) -> str:
    """At most ``length`` characters, with an ellipsis in the middle where more were there."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def number(value: float | None) -> str:
    """``0.8463`` → ``0.846``, ``123.456`` → ``123.5``."""
    if value is None:
        return MISSING
    size = abs(value)
    digits = 3 if size < 10 else 2 if size < 100 else 1
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None) -> str:
    """``-0.0123`` → ``−0.012``, ``0.01`` → ``+0.010``."""
    text = number(value)
    return text if value is None or text.startswith("−") else f"+{text}"


def percent(value: float | None) -> str:
    """Three significant digits: ``0.662`` → ``0.662%``, ``100`` → ``100%``."""
    if value is None:
        return MISSING
    if abs(value) >= 99.95 or value == 0:
        return f"{value:.0f}%"
    return f"{value:#.{3 if abs(value) >= 0.1 else 2}g}%"


def saving(value: float | None) -> str:
    """Whole percent; negative where it takes more."""
    return MISSING if value is None else f"{round(value)}%".replace("-", "−")


def metric_name(metric: Metric) -> str:
    """``accuracy``, or with its unit ``loss (nats/token)``; a share of 1 needs none."""
    return f"{metric.name} ({metric.unit})" if metric.unit not in ("", "share") else metric.name


def mean_sd(row: Row) -> str:
    """``0.846 ± 0.006``; the mean alone with one seed."""
    if row.metric_mean is None:
        return MISSING
    spread = "" if row.metric_sd is None else f" ± {number(row.metric_sd)}"
    return f"{number(row.metric_mean)}{spread}"


def interval(change: Difference | None) -> str:
    """``−0.012 [−0.021, −0.003]``; the value alone without an interval."""
    if change is None:
        return MISSING
    if change.low is None or change.high is None:
        return signed(change.value)
    return f"{signed(change.value)} [{signed(change.low)}, {signed(change.high)}]"


def starred(change: Difference | None) -> str:
    """The difference, with a star where its interval leaves out zero."""
    if change is None:
        return MISSING
    star = " *" if change.verdict in ("better", "worse") else ""
    return f"{signed(change.value)}{star}"


def lost(row: Row) -> str:
    """What became of the runs that did not finish: ``1 diverged, 2 oom``; empty if all did."""
    others = sorted((status, count) for status, count in row.statuses.items() if status != "ok")
    return ", ".join(f"{count} {status}" for status, count in others)


def join(words: list[str]) -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
