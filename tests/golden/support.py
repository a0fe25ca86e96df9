"""Golden files: what leaves a process, written down as text, so that a change of it shows as a difference of text.

A golden file is compared as a whole. Record all of them again with `make golden` after a change that is meant, and read
the difference before it is committed.
"""

import difflib
import enum
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect as shape

FOLDER = Path(__file__).parent
DIFFERENCE_LINES = 80


class Golden:
    """Compares with the files in this folder, or records them."""

    def __init__(self, *, record: bool) -> None:
        self.record = record

    def check(self, name: str, text: str) -> None:
        """Compare `text` with the golden file `name`, or record it."""
        path, now = FOLDER / name, text.rstrip("\n") + "\n"
        if self.record:
            path.parent.mkdir(exist_ok=True)
            path.write_text(now)
            return
        then = path.read_text() if path.exists() else ""
        if then == now:
            return
        lines = [
            *difflib.unified_diff(then.splitlines(), now.splitlines(), f"recorded {name}", "now", lineterm="", n=6)
        ]
        shown = "\n".join(lines[:DIFFERENCE_LINES])
        more = f"\n... {len(lines) - DIFFERENCE_LINES} more lines" if len(lines) > DIFFERENCE_LINES else ""
        raise AssertionError(f"{name} is not what was recorded; if that is meant: make golden\n{shown}{more}")

    def check_json(self, name: str, value: Any) -> None:
        """Compare JSON, a value to a line; the order of keys counts."""
        self.check(name, pretty(value))


def pretty(value: Any, depth: int = 0) -> str:
    """JSON with a line to each value, and what fits in one line in one."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or (len(line) <= 100 and depth):
        return line
    inner = "\n" + " " * (depth + 1)
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {pretty(each, depth + 1)}" for key, each in value.items()]
        return f"{{{inner}{f',{inner}'.join(parts)}{inner[:-1]}}}"
    return f"[{inner}{f',{inner}'.join(pretty(each, depth + 1) for each in value)}{inner[:-1]}]"


# Examples -------------------------------------------------------------------------------------------------------------

WHEN = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


def full(kind: type) -> Any:
    """An example with every field given, made from the type alone."""
    return _made(shape.type_info(kind), "value", every=True)


def minimal(kind: type) -> Any:
    """An example with required fields only."""
    return _made(shape.type_info(kind), "value", every=False)


def required_keys(kind: type) -> list[str]:
    """The keys that the encoded form of a type must have, its tag among them."""
    info: Any = shape.type_info(kind)
    tag = [info.tag_field] if getattr(info, "tag_field", None) else []
    return [*tag, *(field.encode_name for field in info.fields if field.required)]


def _made(info: Any, name: str, *, every: bool) -> Any:  # noqa: PLR0911 - a case for each kind of type
    match info:
        case shape.StructType() | shape.DataclassType() | shape.NamedTupleType():
            fields = [field for field in info.fields if every or field.required]
            return info.cls(**{field.name: _made(field.type, field.encode_name, every=every) for field in fields})
        case shape.EnumType():
            return min(info.cls, key=lambda each: each.value)
        case shape.UnionType():
            choices = [each for each in info.types if not isinstance(each, shape.NoneType)]
            return _made(min(choices, key=_rank), name, every=every)
        case shape.DictType():
            return {_made(info.key_type, f"{name}-key", every=every): _made(info.value_type, name, every=every)}
        case shape.VarTupleType() | shape.ListType() | shape.SetType() | shape.FrozenSetType():
            kinds = {
                shape.VarTupleType: tuple,
                shape.ListType: list,
                shape.SetType: set,
                shape.FrozenSetType: frozenset,
            }
            return kinds[type(info)]([_made(info.item_type, name, every=every)])
        case shape.TupleType():
            return tuple(_made(each, f"{name}-{number}", every=every) for number, each in enumerate(info.item_types))
        case shape.Metadata():
            return _made(info.type, name, every=every)
        case _:
            return _scalar(info, name)


_TEXTS = {"directories": "maps", "directories-key": "/maps", "buckets-key": "plant"}
"""Texts of fields whose form is checked."""


def _scalar(info: Any, name: str) -> Any:  # noqa: PLR0911 - a case for each kind of type
    match info:
        case shape.StrType() if name in _TEXTS:
            return _TEXTS[name]
        case shape.StrType():
            text = f"a {name}"
            return text[: info.max_length].ljust(info.min_length or 0, "-")
        case shape.BoolType():
            return True
        case shape.IntType() | shape.FloatType():
            if name == "v":
                return 1  # the version of the schema: there is one
            number: int | float = 7 if isinstance(info, shape.IntType) else 1.5
            low = info.ge if info.ge is not None else number if info.gt is None else info.gt + 1
            high = info.le if info.le is not None else number if info.lt is None else info.lt - 1
            return min(max(number, low), max(high, low))
        case shape.DateTimeType():
            return WHEN
        case shape.BytesType():
            return f"a {name}".encode()
        case shape.LiteralType():
            return info.values[-1]
        case shape.RawType() | shape.AnyType():
            return msgspec.Raw(json.dumps({f"a {name}": 7}).encode())
        case _:
            raise TypeError(f"no example is known for {info!r}: add one here")


def _rank(info: Any) -> tuple[str, str]:
    return type(info).__name__, str(getattr(info, "tag", ""))


# Schemas --------------------------------------------------------------------------------------------------------------


def schemas(names: Iterable[tuple[str, type]]) -> dict[str, Any]:
    """JSON Schema of each type under its stable name; prose and names of classes are left out.

    Args:
        names: pairs of a stable name and a type; two types of one name are written alike.
    """
    pairs = list(names)
    kinds = list(dict.fromkeys(kind for _, kind in pairs))
    references, components = msgspec.json.schema_components(kinds, ref_template="#{name}")
    reference = {kind: each["$ref"] for kind, each in zip(kinds, references, strict=True)}
    stable: dict[str, str] = {}
    for name, kind in pairs:
        stable.setdefault(reference[kind], name)
    unnamed = {f"#{name}" for name in components} - stable.keys()
    assert not unnamed, f"types without a name in the catalogue of golden files: {sorted(unnamed)}"

    def plain(value: Any, *, names_inside: bool = False) -> Any:
        if isinstance(value, dict):
            kept = value if names_inside else {key: each for key, each in value.items() if key not in _PROSE}
            return {key: plain(each, names_inside=key in _NAMED and not names_inside) for key, each in kept.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return stable.get(value, value) if isinstance(value, str) else value

    by_reference = {f"#{name}": component for name, component in components.items()}
    return {name: plain(by_reference[reference[kind]]) for name, kind in pairs}


_PROSE = frozenset({"title", "description"})
_NAMED = frozenset({"properties", "mapping"})


REFERENCE = re.compile(r'"#/components/schemas/([^"]+)"')


def without_prose(value: Any) -> Any:
    """The same without summaries and descriptions."""
    if isinstance(value, dict):
        return {key: without_prose(each) for key, each in value.items() if key not in {"summary", "description"}}
    return [without_prose(each) for each in value] if isinstance(value, list) else value


def words(kind: type[enum.Enum]) -> list[Any]:
    """The values of a closed vocabulary, sorted."""
    return sorted(member.value for member in kind)
