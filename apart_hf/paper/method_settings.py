"""Methods as the benchmark names them: by name, or by name and hyper-parameters, such as `advprop:steps=1`."""

from __future__ import annotations

import json
from typing import Any

from apart_hf.errors import ApartError
from apart_hf.strategies.methods import check_hyper_parameters


def parse_method(written: str) -> tuple[str, dict[str, Any]]:
    """Divide `NAME:KEY=VALUE:KEY=VALUE` into the name and the hyper-parameters that it sets.

    Raises:
        ApartError: where there is no such method or hyper-parameter, a value is missing, or a key comes twice.
    """
    name, *parts = written.split(":")
    hyper: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if not value or key in hyper:
            fault = "has no value" if not value else "comes twice"
            raise ApartError(f"--methods {written}: {key!r} {fault}; write it once, as in advprop:steps=1.")
        try:
            hyper[key] = json.loads(value)
        except json.JSONDecodeError:
            hyper[key] = value
    check_hyper_parameters(name, hyper)
    return name, hyper
