"""From plain values (TOML, JSON) to frozen dataclasses: strict, with errors that name the key.

The dataclass is the schema. Sections are dataclasses, tagged unions are told apart by their field `kind` (where a table
names none, the one that has `implied = True` is meant), single values are judged by pydantic in strict mode: no string
becomes a number, no float an integer. A word stands for what TOML cannot write: "none".
"""

import difflib
import functools
import math
import re
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

SIMPLE = {int: "an integer", float: "a number", bool: "true or false", str: "a string", Path: "a path as a string"}


class ConfigError(ValueError):
    """A recipe that cannot be used, in one line: `source: key: what is wrong`.

    key: dotted, "" when the whole recipe is meant. source: file name or "command line".
    """

    def __init__(self, key: str, problem: str, source: str = "") -> None:
        super().__init__(": ".join(part for part in (source, key, problem) if part))
        self.key, self.problem = key, problem

    def at(self, source: str) -> "ConfigError":
        return ConfigError(self.key, self.problem, source)


def require(ok: bool, key: str, got: object, wants: str) -> None:
    """Raises ValueError naming the key unless `ok`."""
    if not ok:
        raise ValueError(f"{key}: got {got!r}, wants {wants}")


def read(schema: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the dataclass `schema` from nested plain values.

    Raises ConfigError for unknown, missing and wrong values, and for what the dataclasses themselves refuse.
    """
    return _Reader(schema).read(schema, values, "")


def write(value: Any) -> Any:
    """Plain values, as JSON holds them, from which `read` makes an equal dataclass."""
    if is_dataclass(value):
        return {field.name: write(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: write(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [write(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def parse_override(text: str) -> tuple[str, Any]:
    """`section.key=value` as (dotted key, value); the value is TOML, and what is no TOML is a string."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or "" in key.split("."):
        raise ConfigError("", f"got {text!r}, wants section.key=value", "command line")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return key, value.strip()
    return key, parsed["value"] if len(parsed) == 1 else value.strip()


def override(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested tables, in place."""
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            outer = ".".join(sections[: depth + 1])
            raise ConfigError(key, f"unknown key; {outer} is a single value", "command line")
    values[last] = value


class _Reader:
    def __init__(self, root: type) -> None:
        self.root = root

    def read(self, schema: Any, value: Any, key: str) -> Any:
        members = _members(schema)
        if type(None) in members and value in (None, "none"):
            return None
        sections: list[Any] = [member for member in members if is_dataclass(member)]
        if len(sections) > 1:
            return self._read_tagged({member.kind: member for member in sections}, value, key)
        if sections:
            return self._read_section(sections[0], value, key)
        if len(members) == 2 and type(None) in members:
            schema = next(member for member in members if member is not type(None))
        origin, arguments = get_origin(schema), get_args(schema)
        if _is_mapping(origin):
            return {name: self.read(arguments[1], item, _join(key, name)) for name, item in _table(value, key).items()}
        if origin in (tuple, list) and _holds_sections(arguments[0]):
            if not isinstance(value, list):
                raise ConfigError(key, f"got {value!r}, wants a list of tables")
            return origin(self.read(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value))
        return _read_value(schema, value, key, optional=type(None) in members)

    def _read_section(self, schema: type, value: Any, key: str) -> Any:
        table = _table(value, key)
        hints = get_type_hints(schema)
        known = [field for field in fields(schema) if field.init]
        names = [field.name for field in known]
        for name in table:
            if name not in names:
                variant = f" for kind {table['kind']}" if "kind" in table else ""
                raise ConfigError(_join(key, name), f"unknown key{variant}{self._nearest(name, names, key)}")
        for field in known:
            if field.name not in table and field.default is MISSING and field.default_factory is MISSING:
                raise ConfigError(_join(key, field.name), f"missing, wants {describe(hints[field.name])}")
        read = {name: self.read(hints[name], item, _join(key, name)) for name, item in table.items()}
        try:
            return schema(**read)
        except ConfigError:
            raise
        except ValueError as error:
            raise _located(str(error), names, key) from None

    def _read_tagged(self, members: dict[str, type], value: Any, key: str) -> Any:
        table = _table(value, key)
        kinds = ", ".join(members)
        kind = table.get("kind", next((k for k, member in members.items() if getattr(member, "implied", False)), None))
        if kind is None:
            raise ConfigError(_join(key, "kind"), f"missing, wants one of {kinds}")
        if kind not in list(members):
            close = difflib.get_close_matches(str(kind), members, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(_join(key, "kind"), f"got {kind!r}, wants one of {kinds}{hint}")
        return self._read_section(members[kind], table, key)

    def _nearest(self, name: str, names: list[str], key: str) -> str:
        """A hint: the nearest of `names`, else a key of this name in another section, else what there is."""
        close = [_join(key, near) for near in difflib.get_close_matches(name, names, n=1)]
        wrong = _join(key, name)
        close += [other for other in all_keys(self.root) if other.rpartition(".")[2] == name and other != wrong]
        return f"; did you mean {close[0]}?" if close else f"; {key or 'a recipe'} has {', '.join(names)}"


def _read_value(schema: Any, value: Any, key: str, optional: bool) -> Any:
    """One value that is no section, judged by pydantic."""
    wants = describe(schema) + " or none" * optional
    try:
        result = _adapter(schema).validate_python(_plain(schema, value))
    except ValidationError:
        raise ConfigError(key, f"got {value!r}, wants {wants}") from None
    numbers = result if isinstance(result, tuple) else (result,)
    if any(isinstance(number, float) and math.isnan(number) for number in numbers) or result in (math.inf, -math.inf):
        raise ConfigError(key, f"got {value!r}, wants {wants}")
    return result


def _plain(schema: Any, value: Any) -> Any:
    """What pydantic's strict mode takes for a value that TOML or JSON writes as a list or a string."""
    origin, arguments = get_origin(schema), get_args(schema)
    if origin is tuple and isinstance(value, list):
        return tuple(math.inf if item == "inf" else item for item in value)
    if isinstance(value, str) and (schema is Path or Path in arguments):
        return Path(value)
    return value


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def describe(schema: Any) -> str:
    """What values of a type look like in a recipe, in words."""
    members = _members(schema)
    sections: list[Any] = [member for member in members if is_dataclass(member)]
    if len(sections) > 1:
        return f"a table whose kind is one of {', '.join(member.kind for member in sections)}"
    if len(members) > 1:
        return " or ".join("none" if member is type(None) else describe(member) for member in members)
    origin, arguments = get_origin(schema), get_args(schema)
    if origin is Literal:
        words = ", ".join(str(argument) for argument in arguments)
        return f"one of {words}" if len(arguments) > 1 else words
    if origin is list or (origin is tuple and arguments[1:] == (Ellipsis,)):
        return f"a list, each {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    return SIMPLE.get(schema, "a table")


def all_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe, as far as its names are fixed."""
    for section in _members(schema):
        if is_dataclass(section):
            hints = get_type_hints(section)
            for field in fields(section):
                yield _join(prefix, field.name)
                yield from all_keys(hints[field.name], _join(prefix, field.name))


def _members(schema: Any) -> tuple[Any, ...]:
    """The types of a union; any other type alone."""
    return get_args(schema) if get_origin(schema) in (Union, types.UnionType) else (schema,)


def _holds_sections(schema: Any) -> bool:
    return any(map(is_dataclass, _members(schema)))


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _table(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(key, f"got {value!r}, wants a table")
    return value


def _located(message: str, names: Iterable[str], key: str) -> ConfigError:
    """A dataclass's own complaint, which begins with the field that it means, under the key of the section."""
    match = re.match(r"([A-Za-z_]\w*)((?:\.[^\s:]+)?)(:?) ", message)
    if match is None or match[1] not in names:
        return ConfigError(key, message)
    if match[3]:
        return ConfigError(_join(key, match[1] + match[2]), message[match.end() :])
    return ConfigError(_join(key, match[1]), message[match.end() :])


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
