"""Pages from the templates beside this file, as one string: self-contained, no script, no requests."""

from __future__ import annotations

import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mahalo_ray import __version__
from mahalo_ray.evaluation.terminal import compact_count


def render_page(template: str, **values: Any) -> str:
    """A template with its values; all texts are escaped, and a value that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("mahalo_ray.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "duration": duration, "count": compact_count}
    return environment.get_template(template).render(**values, version=__version__)


def number(value: float | None, digits: int = 3) -> str:
    """A figure for the page; a dash where it is unknown or undefined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """A difference with its sign (a true minus sign)."""
    return f"{value:+.3f}".replace("-", "−")


def duration(seconds: float) -> str:
    """`8.3 s`, `2 min 05 s`, `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
