"""Settings from a YAML file, as runs write them."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as brief
from typing import Any

import yaml

from apart_hf.config.setting import Setting
from apart_hf.config.train_config import SETTINGS
from apart_hf.errors import ApartError, unknown_name


def read_config(path: str) -> dict[str, Any]:
    """Read the settings in a YAML file of `key: value` lines; null stands for "not given".

    All but the name of the run that wrote it, so that the file repeats the run under a name of its own. `recipe` stays
    where it is null: the settings are of no recipe.

    Raises:
        ApartError: where the file cannot be read, or a key or the type of a value is wrong.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ApartError(f"--config {path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    try:
        found = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date or number; too many brackets
        reason = " ".join(str(error).split())
        raise ApartError(f"--config {path}: no YAML ({reason}).") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ApartError(f"--config {path}: must hold lines `key: value`, not a {type(found).__name__}.")
    known = {name: setting for name, setting in SETTINGS.items() if setting.role != "command"}
    for key in found:
        if key not in known:
            raise unknown_name(f"key in {path}", key if isinstance(key, str) else brief(key), known)
    given = {key: _converted(path, known[key], value) for key, value in found.items() if value is not None}
    given.pop("experiment", None)
    return given | ({"recipe": None} if "recipe" in found and found["recipe"] is None else {})


def write_config(settings: dict[str, Any]) -> str:
    """Write settings as the text of such a file."""
    return yaml.safe_dump({k: v for k, v in settings.items() if SETTINGS[k].role != "command"}, sort_keys=False)


def _converted(path: str, setting: Setting, value: Any) -> Any:
    if setting.kind is bool:
        if not isinstance(value, bool):
            raise ApartError(f"{path}: {setting.name}: {brief(value)} is neither true nor false.")
        return value
    kind, many = setting.kind, setting.many
    if many != isinstance(value, list):
        raise ApartError(f"{path}: {setting.name}: {brief(value)} is {'no' if many else 'a'} list.")
    try:
        values = [_one(kind, item) for item in (value if many else [value])]
    except (TypeError, ValueError) as error:
        raise ApartError(f"{path}: {setting.name}: {brief(value)} is no {kind.__name__}.") from error
    if setting.choices and values[0] not in setting.choices:
        raise ApartError(f"{path}: {setting.name}: {value!r} is none of {', '.join(setting.choices)}.")
    return values if many else values[0]


def _one(kind: type, value: Any) -> Any:
    """Convert one value: YAML reads 1e-3 as text, 1 for a float; but a number is no text, and 2.5 no whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    if kind is str and not isinstance(value, str):
        raise TypeError
    if kind is int and isinstance(value, float):
        raise TypeError
    try:
        return kind(value)
    except OverflowError as error:
        raise ValueError from error
