"""What goes wrong at the edges: each message says what, where, and what to type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HatError(Exception):
    """Every error that this package raises on purpose."""


class ConfigError(HatError):
    """A configuration key or value cannot be used."""


class DataError(HatError):
    """A data file, a table or a checkpoint cannot be used."""


class BackboneError(HatError):
    """A pretrained model cannot be loaded, or cannot do what is asked of it."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known ones, or a full stop. Case does not count."""
    by_lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.7)
    return f": did you mean {' or '.join(by_lower[other] for other in close)}?" if close else "."
