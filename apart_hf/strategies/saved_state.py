"""What a saved state says of the strategy that it is of, against the one that goes on from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from apart_hf.errors import ApartError
from apart_hf.strategies.scalars import python_numbers

_log = logging.getLogger(__name__)


def check_state(name: str, hyper: Mapping[str, Any], has_generator: bool, state: Mapping[str, Any]) -> None:
    """Refuse the state of another kind of strategy.

    Args:
        name: of the method that goes on.
        hyper: its hyper-parameters.
        has_generator: whether it was given one.
        state: of `state_dict`, also of an earlier version.

    Raises:
        ApartError: where the method is another, or one of the two has a generator, and the other has none.
    """
    if ("generator" in state) != has_generator:
        has, lacks = ("state", "strategy") if "generator" in state else ("strategy", "state")
        raise ApartError(f"the {has} has a generator, the {lacks} has none; pass generator= as when it was saved.")
    found = state.get("hyper", hyper)
    if found.keys() != hyper.keys():
        raise ApartError(
            f"the state has the hyper-parameters {', '.join(found) or 'of a plain step'}, and the method {name!r} has "
            f"{', '.join(hyper) or 'none'}; load the state of a strategy of the same method."
        )
    if state.get("name", name) != name:
        raise ApartError(
            f"the state is of the method {state['name']!r}, and goes on with {name!r}; load the state of a strategy of "
            "the same method."
        )


def made_with(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the saved strategy was made with: where an earlier version does not say it, what it had in use."""
    in_use = dict(state.get("hyper", {})) | {key: state[key] for key in ("every", "uneven") if key in state}
    return python_numbers(state.get("made_with", in_use))


def say_overridden(name: str, given: Mapping[str, Any], saved: Mapping[str, Any], in_use: Mapping[str, Any]) -> None:
    """Warn where a strategy that goes on was given other values than the saved one was made with.

    Values that `set` has changed between the two are no contradiction.

    Args:
        name: of the method.
        given: what the strategy that goes on was made with.
        saved: what the saved one was made with.
        in_use: from now on.
    """
    changed = [key for key, value in given.items() if saved[key] != value]
    if changed:
        kept, wanted = (", ".join(f"{key}={values[key]!r}" for key in changed) for values in (in_use, given))
        _log.warning(
            "%s goes on with %s, as its saved state has it, and not with %s, as given; strategy.set(%s) after loading "
            "changes that.",
            name,
            kept,
            wanted,
            wanted,
        )
