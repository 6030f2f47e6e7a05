"""The facts of one setting, which stand beside its field: what it may be, what it is for, and who asks for it."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["what", "how", "where", "command"]
OnResume = Literal["free", "override", "fixed"]
LARGEST = 2**31 - 1  # of whole numbers


@dataclass(frozen=True)
class Range:
    """Says which numbers a setting takes, or each number of a list: finite ones within the bounds.

    Args:
        least: lower bound that is allowed itself; with it, a whole number is at most `LARGEST` unless `most` says less.
        above: lower bound that is not.
        most: upper bound that is allowed itself.
        below: upper bound that is not.
        outside: what is said of a number outside, in the place of the bounds.
        over: what is said of one over the upper bound.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    outside: str | None = None
    over: str | None = None

    def problem(self, value: float) -> str | None:
        """Say what is wrong with a value; None stands for nothing."""
        if self.least is not None and not self.least <= value < math.inf:  # NaN is refused too
            return self.outside or f"must be a finite number of at least {self.least}"
        lower = -math.inf if self.above is None else self.above
        if not lower < value < math.inf:
            return self.outside or f"must be a finite number above {lower}"
        most = self.most
        if most is None and self.least is not None and isinstance(value, int):
            most = LARGEST
        if most is not None and value > most:
            return self.over or self.outside or f"must be at most {most}"
        if self.below is not None and value >= self.below:
            return self.over or self.outside or f"must be below {self.below}"
        return None


@dataclass(frozen=True)
class Setting:
    """Holds what is known of one setting of a run.

    Its first six facts are the field's own: `settings_of` fills them in.

    Args:
        name: of the field.
        default: of the field; None stands for "decided from the others".
        kind: bool, int, float or str: of the value, or of each value in a list.
        many: a list is given.
        length: how many values the list has; None: one or more.
        choices: what a text may be; empty: anything.
        group: its heading in --help.
        help: its text there.
        role: "what": it changes the result. "how": the same is computed in another way. "where": folders, names and
            logging. "command": what to do with the other settings; not kept in a file of settings.
        on_resume: whether a run goes on with another value: "free": always, "override": with --override alone,
            "fixed": never, since a checkpoint or best/ is of this value.
        in_tables: it may follow `--` of a table's command; else the table, its rows and its seeds decide it.
        recorded: its place among the settings in config.json's "apart" block; None: it is not there.
        recorded_by_default: it is recorded also where it has its default.
        range: of numbers.
        decides: the setting that this one decides, and so unsets in a file or recipe below it.
        idle_without: the setting without which this one has no part in a result; None: it always has.
        flags: short flags.
        metavar: of the value in --help; None: N or X for numbers, the choices for others.
    """

    name: str
    default: Any
    kind: type
    many: bool
    length: int | None
    choices: tuple[str, ...]
    group: str
    help: str
    role: Role
    on_resume: OnResume
    in_tables: bool
    recorded: int | None = None
    recorded_by_default: bool = False
    range: Range | None = None
    decides: str | None = None
    idle_without: str | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None

    @property
    def flag(self) -> str:
        """Return the long flag."""
        return f"--{self.name.replace('_', '-')}"


def setting(
    default: Any,
    help: str,
    *,
    group: str,
    role: Role,
    on_resume: OnResume | None = None,
    in_tables: bool | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    outside: str | None = None,
    over: str | None = None,
    **facts: Any,
) -> Any:
    """Make the field of one setting; its type says what values it takes, and `Literal` which choices.

    Args:
        default, help, group, role: see `Setting`.
        on_resume: None: "free" for the roles "where" and "command", "override" for the others.
        in_tables: None: for all roles but "command".
        least, above, most, below, outside, over: see `Range`.
        **facts: further ones of `Setting`.
    """
    bounds = Range(least, above, most, below, outside, over)
    given = functools.partial(
        Setting,
        group=group,
        help=help,
        role=role,
        on_resume=on_resume or ("free" if role in ("where", "command") else "override"),
        in_tables=role != "command" if in_tables is None else in_tables,
        range=None if bounds == Range() else bounds,
        **{"length": None} | facts,
    )
    return dataclasses.field(default=default, metadata={"setting": given})


def settings_of(config: type) -> Mapping[str, Setting]:
    """Return the settings of a dataclass by name, in the order of its fields.

    Raises:
        TypeError: for a field that `setting` has not made, or of a type that no flag has.
    """
    if config not in _known:
        _known[config] = _read(config)
    return _known[config]


_known: dict[type, Mapping[str, Setting]] = {}


def _read(config: type) -> Mapping[str, Setting]:
    hints, found = typing.get_type_hints(config), {}
    for field in dataclasses.fields(config):
        if "setting" not in field.metadata:
            raise TypeError(f"{config.__name__}.{field.name} has no facts: make the field by config.setting.setting.")
        kind, many, choices = _shape(hints[field.name])
        if kind not in (bool, int, float, str):
            raise TypeError(f"{config.__name__}.{field.name}: {hints[field.name]} is no type that a flag can have.")
        found[field.name] = field.metadata["setting"](
            name=field.name, default=field.default, kind=kind, many=many, choices=choices
        )
    return types.MappingProxyType(found)


def _shape(hint: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """Return kind of a value, whether there are many, and choices: of `X`, `X | None`, `list[X]` and `Literal[...]`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(one for one in typing.get_args(hint) if one is not types.NoneType)
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True, ()
    if typing.get_origin(hint) is Literal:
        return str, False, typing.get_args(hint)
    return hint, False, ()
