"""Settings as frozen dataclasses: each field's type and range stand in its annotation, and are checked in one place.

A class that derives from ``Settings`` holds what its annotations say, however it was made: in Python, from JSON with
``from_dict``, or by ``dataclasses.replace``.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import types
import typing
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from stable_diffusion.errors import InputError, shown, unknown_name

T = TypeVar("T")


class Rule(NamedTuple):
    """What a field's value must be beyond its type, in its annotation: ``Annotated[int, within(1, 9)]``."""

    what: str
    """As the end of a sentence that begins with "must be"."""
    holds: Callable[[Any], bool]
    """May also raise an InputError of its own."""


def within(low: float, high: float) -> Rule:
    """A number from `low` to `high`, both included."""
    return Rule(f"from {low} to {high}", lambda value: low <= value <= high)


ABOVE_0 = Rule("above 0", lambda value: value > 0)


def sized(low: int, high: int) -> Rule:
    """A list of `low` to `high` items."""
    return Rule(f"a list of {low} to {high} items", lambda value: low <= len(value) <= high)


class Settings:
    """The base of dataclasses whose fields hold to their annotations.

    Raises:
        InputError: a field of another type or outside its range, or fields that do not fit together.
    """

    FORMER: ClassVar[tuple[str, ...]] = ()
    """Keys of older files, which are left out."""
    NAMED: ClassVar[dict[str, Any]] = {}
    """Instances by the names that files may call them."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, typed(hint, getattr(self, name), name))
        self.check()

    def check(self) -> None:
        """Raises InputError where fields do not fit together."""


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as plain dictionaries, lists, numbers and strings, ready for JSON."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(cls: type[T], data: dict[str, Any], *, base: T | None = None) -> T:
    """The settings that ``to_dict`` gave, or ``base`` (default: the class's defaults) changed by ``data``.

    Raises InputError for a key that the class does not have (with the nearest) or a value that it cannot have.
    """
    known = _hints(cls)
    data = {key: value for key, value in data.items() if key not in getattr(cls, "FORMER", ())}
    for key in data:
        if key not in known:
            raise unknown_name(f"setting of {cls.__name__}", key, known)
    values = {key: typed(known[key], value, key, getattr(base, key, None)) for key, value in data.items()}
    return cls(**values) if base is None else replace(base, **values)  # type: ignore[type-var] # T is a dataclass


def _annotations(cls: Any) -> dict[str, Any]:
    """The annotations of a dataclass. A field that a subclass gives only another default keeps its range."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for base in filter(dataclasses.is_dataclass, cls.__mro__[1:]):
        for name, hint in _hints(base).items():
            if typing.get_origin(hint) is Annotated and hints[name] == typing.get_args(hint)[0]:
                hints[name] = hint
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


_hints: Callable[[Any], dict[str, Any]] = functools.cache(_annotations)


def documented(cls: type) -> dict[str, str]:
    """The sentences below a class's fields, by the field: what ``--help`` shows of it."""
    try:
        module = ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))
    except OSError:  # a package without its sources
        return {}
    (tree,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    pairs = itertools.pairwise(tree.body)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def typed(hint: Any, value: Any, key: str, base: Any = None) -> Any:
    """`value`, as read from JSON or TOML or given in Python, as an instance of the annotation `hint`.

    Raises InputError, naming `key`, for a value of another type, or outside the range that `hint` says.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = typed(inner[0], value, key, base)
        for rule in inner[1:]:
            if isinstance(rule, Rule) and not rule.holds(value):
                raise InputError(f"{key} must be {rule.what}, got {shown(value)}")
        return value
    if origin in (types.UnionType, typing.Union):
        options = [option for option in inner if option is not type(None)]
        if value is None and len(options) < len(inner):
            return None
        if len(options) > 1:  # the two autoencoders, told apart by their `kind`
            kind = value.get("kind", getattr(base, "kind", None)) if isinstance(value, dict) else None
            kind = getattr(value, "kind", kind)
            kinds = {option.kind: option for option in options}
            if not isinstance(kind, str) or kind not in kinds:
                raise unknown_name(f"{key} kind", kind, kinds)
            options = [kinds[kind]]
            base = base if isinstance(base, options[0]) else None
        return typed(options[0], value, key, base)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        try:
            return from_dict(typing.cast(type, hint), value, base=base)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
    if isinstance(value, str) and (named := getattr(hint, "NAMED", None)):
        if value not in named:
            raise unknown_name(key, value, named)
        return named[value]
    if origin is tuple and isinstance(value, (list, tuple)):
        items = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(items) == len(value):
            return tuple(typed(item, v, key) for item, v in zip(items, value, strict=True))
    if origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
        raise unknown_name(key, value, inner)
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):  # numpy's too
        return int(value)
    if hint is float and isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # of an int of hundreds of digits
            if abs(number := float(value)) < 1e300:
                return number
        raise InputError(f"{key} must be a finite number, got {shown(value)}")
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise InputError(f"{key} must be of type {expected}, got {shown(value)}")
