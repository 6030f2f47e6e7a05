"""Times as users write them: 90s, 10m, 2h."""

from __future__ import annotations

import re

from apart_hf.errors import ApartError

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_FORM = re.compile(r"([0-9]{1,9})([smh]?)")


def seconds_of(flag: str, text: str) -> float:
    """Return the seconds that a text names: a whole number above 0, alone or with s, m or h after it.

    Args:
        flag: that the user gave it by, for messages.
        text: such as 90s, 10m or 2h.

    Raises:
        ApartError: where it is no such text.
    """
    found = _FORM.fullmatch(text)
    if found is None or int(found[1]) < 1:
        raise ApartError(f"{flag} {text!r}: a whole number above 0 of seconds (90s), minutes (10m) or hours (2h).")
    return int(found[1]) * _UNITS[found[2]]
