"""Methods as the benchmark names them: by name, or by name and hyper-parameters, such as `advprop:steps=1`."""

from __future__ import annotations

from typing import Any

from apart_hf.config.key_values import key_values
from apart_hf.errors import ApartError
from apart_hf.strategies.methods import check_hyper_parameters


def parse_method(written: str) -> tuple[str, dict[str, Any]]:
    """Divide `NAME:KEY=VALUE:KEY=VALUE` into the name and the hyper-parameters that it sets.

    Raises:
        ApartError: where there is no such method or hyper-parameter, a value is missing, or a key comes twice.
    """
    name, *pairs = written.split(":")
    keys: list[str] = []
    for pair in pairs:
        key, _, value = pair.partition("=")
        if not value or key in keys:
            fault = "has no value" if not value else "comes twice"
            raise ApartError(f"--methods {written}: {key!r} {fault}; write it once, as in advprop:steps=1.")
        keys.append(key)
    hyper = key_values(pairs)
    check_hyper_parameters(name, hyper)
    return name, hyper
