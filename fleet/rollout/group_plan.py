"""Plan of a group: how rollouts in it go, unless somebody names other values.

People write it in TOML, and `parse` reads it strictly: an unknown key, a value of another type or one that cannot be
meant is an error that names the key and its line.

    soak = "10m"                      # of each stage that names none
    approval = true                   # of a second person, before anything is offered
    limits = { failures = 0, at-once = 20, on-breach = "pause" }
    budget = { by = "site", min-available = 2 }

    [[stages]]
    select = { ring = "canary" }
    size = 2
    approval = true

    [[stages]]

Each stage takes a number or a share of the devices that its labels select and no stage before it took; the last one
takes everybody who is left.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from fleet.protocol import bounds, names
from fleet.protocol.codes import OnBreach
from fleet.protocol.operator_api import GroupPlan, PlanBudget, PlanLimits, PlanStage
from fleet.protocol.toml_lines import line_of
from fleet.rollout.decide import Limits
from fleet.rollout.members import EVERYBODY, WAVES_MAX, Amount, BadWavesError, Stage

MAX_BYTES: Final = 64 * 1024
"""Size of a plan in TOML: far above twenty stages with comments."""

TIMEOUT_MIN_S: Final = 10
"""Shortest time without progress after which a device counts as stuck: less than that is no time to start in."""

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION: Final = re.compile(r"(\d{1,9})([smhd])")

Path = tuple[str | int, ...]


class BadPlanError(ValueError):
    """A plan that cannot be meant: one sentence for people, with the path of the key at fault."""

    def __init__(self, path: Path, problem: str, line: int = 0) -> None:
        where = shown(path)
        at = f"line {line}: " if line else ""
        super().__init__(f"{at}{where}: {problem}" if where else f"{at}{problem}")
        self.path, self.problem, self.line = path, problem, line


def shown(path: Path) -> str:
    """Return a path as people read it: `stages[2].size`, counted from 1."""
    text = ""
    for part in path:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else part
    return text


# -- reading -----------------------------------------------------------------------------------------------------------

_SAID_BITS: Final = 128
"""A larger number is not repeated in an error."""

_Read = Callable[[Path, Any], Any]


def parse(text: str) -> GroupPlan:
    """Read a plan.

    Raises:
        BadPlanError: not TOML, an unknown key, a value of another type, or one that cannot be meant.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadPlanError((), f"it is not TOML: {error}") from None
    except RecursionError:
        raise BadPlanError((), "it is nested too deeply for a plan") from None
    except ValueError:
        raise BadPlanError((), "a number in it has too many digits") from None
    try:
        plan = GroupPlan(**_fields((), raw, _PLAN))
        check(plan)
    except BadPlanError as error:
        raise BadPlanError(error.path, error.problem, line_of(text, error.path)) from None
    return plan


def _fields(path: Path, value: Any, known: Mapping[str, tuple[str, _Read]]) -> dict[str, Any]:
    """Read a table: `known` has the field of each key, and how its value is read."""
    if not isinstance(value, dict):
        raise BadPlanError(path, f"expected a table, not {_kind(value)}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise BadPlanError((*path, key), f"unknown key; {hint}")
    return {known[key][0]: known[key][1]((*path, key), each) for key, each in value.items()}


def _kind(value: Any) -> str:
    words = {bool: "true or false", int: "a number", float: "a fraction", str: "a text", list: "a list"}
    return words.get(type(value), "a table" if isinstance(value, dict) else "a date or time")


def _amount(path: Path, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(_bounded(path, value)) if value >= 0 else str(max(value, -bounds.NUMBER_MAX))
    if isinstance(value, str):
        return value
    raise BadPlanError(path, f'expected a number of devices such as 3, or a share such as "5%", not {_kind(value)}')


def _number(path: Path, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadPlanError(path, f"expected a whole number, not {_kind(value)}")
    return _bounded(path, value)


def _bounded(path: Path, value: int) -> int:
    if not 0 <= value <= bounds.NUMBER_MAX:
        said = value if value.bit_length() <= _SAID_BITS else "it"  # thousands of digits cannot be written
        raise BadPlanError(path, f"{said} is not between 0 and {bounds.NUMBER_MAX}")
    return value


def _seconds(path: Path, value: Any) -> int:
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        value = None if match is None else int(match[1]) * _UNITS[match[2]]
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadPlanError(path, 'expected a duration: write seconds such as 600, or "90s", "30m", "12h", "7d"')
    if not 0 <= value <= bounds.WAIT_MAX_S:
        raise BadPlanError(path, f"it is not between 0 and {bounds.WAIT_MAX_S // 86_400}d")
    return value


def _flag(path: Path, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadPlanError(path, f"expected true or false, not {_kind(value)}")
    return value


def _word(path: Path, value: Any) -> str:
    if not isinstance(value, str):
        raise BadPlanError(path, f"expected a text, not {_kind(value)}")
    return value


def _breach(path: Path, value: Any) -> OnBreach:
    if value not in list(OnBreach):
        raise BadPlanError(path, f"expected {' or '.join(repr(str(each)) for each in OnBreach)}")
    return OnBreach(value)


def _labels(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise BadPlanError(path, f'expected labels such as {{ ring = "canary" }}, not {_kind(value)}')
    return {key: _word((*path, key), each) for key, each in value.items()}


def _stages(path: Path, value: Any) -> tuple[PlanStage, ...]:
    if not isinstance(value, list):
        raise BadPlanError(path, f"expected stages, each under [[stages]], not {_kind(value)}")
    return tuple(PlanStage(**_fields((*path, place), each, _STAGE)) for place, each in enumerate(value))


_STAGE: Final[dict[str, tuple[str, _Read]]] = {
    "select": ("select", _labels),
    "size": ("size", _amount),
    "soak": ("soak_s", _seconds),
    "approval": ("approval", _flag),
}
_LIMITS: Final[dict[str, tuple[str, _Read]]] = {
    "min-success": ("min_success", _amount),
    "failures": ("failures", _amount),
    "max-lost": ("max_lost", _amount),
    "on-breach": ("on_breach", _breach),
    "at-once": ("at_once", _number),
    "catch-up": ("catch_up", _amount),
    "timeout": ("timeout_s", _seconds),
}
_BUDGET: Final[dict[str, tuple[str, _Read]]] = {"by": ("by", _word), "min-available": ("min_available", _number)}
_PLAN: Final[dict[str, tuple[str, _Read]]] = {
    "soak": ("soak_s", _seconds),
    "limits": ("limits", lambda path, value: PlanLimits(**_fields(path, value, _LIMITS))),
    "budget": ("budget", lambda path, value: _budget(path, _fields(path, value, _BUDGET))),
    "approval": ("approval", _flag),
    "stages": ("stages", _stages),
}


def _budget(path: Path, fields: dict[str, Any]) -> PlanBudget:
    for key, (field, _) in _BUDGET.items():
        if field not in fields:
            raise BadPlanError(path, f'{key} is missing: write {{ by = "site", min-available = 2 }}')
    return PlanBudget(**fields)


# -- what can be meant -------------------------------------------------------------------------------------------------


def check(plan: GroupPlan) -> None:
    """Check that a plan can be meant.

    Raises:
        BadPlanError: naming the key as it is written in TOML.
    """
    if plan == GroupPlan():
        raise BadPlanError((), "the plan is empty: it sets no limit, budget, soak, approval or stage")
    for key, (field, read) in _LIMITS.items():
        value = getattr(plan.limits, field)
        if read is _amount and value:
            _checked_amount(("limits", key), value)
    if plan.limits.timeout_s is not None and plan.limits.timeout_s < TIMEOUT_MIN_S:
        raise BadPlanError(("limits", "timeout"), f"{plan.limits.timeout_s} s is less than {TIMEOUT_MIN_S} s")
    if plan.budget is not None:
        _check_label(("budget", "by"), plan.budget.by, "label")
        if plan.budget.min_available == 0:
            raise BadPlanError(("budget", "min-available"), "a budget of 0 means nothing: leave the budget out")
    if len(plan.stages) > WAVES_MAX:
        raise BadPlanError(("stages", WAVES_MAX), f"at most {WAVES_MAX} stages are accepted")
    for place, stage in enumerate(plan.stages):
        _check_stage(("stages", place), stage, last=place == len(plan.stages) - 1)


def _check_stage(path: Path, stage: PlanStage, *, last: bool) -> None:
    size = _checked_amount((*path, "size"), stage.size) if stage.size else EVERYBODY
    for key, value in stage.select.items():
        _check_label((*path, "select", key), key, "label")
        _check_label((*path, "select", key), value, f"value of the label {key},")
    if last and (stage.select or size != EVERYBODY):
        key = "select" if stage.select else "size"
        raise BadPlanError(
            (*path, key), "the last stage takes everybody who is left: leave select and size out, or add a stage"
        )
    if size.number == 0:
        raise BadPlanError((*path, "size"), f"a stage of {size} means nothing")
    if not last and not stage.select and size == EVERYBODY:
        raise BadPlanError(path, "it takes every device, so that none is left for the next stage: add select or size")


def _checked_amount(path: Path, text: str) -> Amount:
    try:
        return Amount.parse(text)
    except BadWavesError as error:
        raise BadPlanError(path, str(error)) from None


def _check_label(path: Path, text: str, what: str) -> None:
    try:
        names.check_label(text, what)
    except names.BadNameError as error:
        raise BadPlanError(path, str(error)) from None


# -- meaning -----------------------------------------------------------------------------------------------------------


def stages_of(plan: GroupPlan) -> tuple[Stage, ...]:
    """Return the stages of a plan for the draw; none where it leaves them to the size of the group."""
    return tuple(
        Stage(
            Amount.parse(each.size) if each.size else EVERYBODY,
            from_first=False,
            selector=tuple(sorted(each.select.items())),
            soak_s=each.soak_s,
            approval=each.approval,
        )
        for each in plan.stages
    )


def limits_of(limits: PlanLimits, *, min_available: int | None = None) -> Limits:
    """Return limits as decisions need them; what is not set is the default.

    Raises:
        BadWavesError: an amount that is none.
    """
    default = Limits()
    return Limits(
        min_success=_or_none(limits.min_success) or default.min_success,
        failures=_or_none(limits.failures),
        lost=_or_none(limits.max_lost),
        on_breach=default.on_breach if limits.on_breach is None else limits.on_breach,
        at_once=limits.at_once or 0,
        min_available=min_available,
        catch_up=_or_none(limits.catch_up) or default.catch_up,
        timeout_s=default.timeout_s if limits.timeout_s is None else limits.timeout_s,
    )


def _or_none(text: str) -> Amount | None:
    return Amount.parse(text) if text else None


# -- writing -----------------------------------------------------------------------------------------------------------

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_DIGITS: Final = re.compile(r"0|[1-9][0-9]*")


def write(plan: GroupPlan) -> str:
    """Return a plan as TOML, which `parse` reads as the same plan."""
    lines = [f"soak = {_duration(plan.soak_s)}"] if plan.soak_s is not None else []
    lines += ["approval = true"] if plan.approval else []
    limits = _pairs(plan.limits, _LIMITS)
    if limits:
        lines += ["", "[limits]", *limits]
    if plan.budget is not None:
        lines += ["", "[budget]", *_pairs(plan.budget, _BUDGET)]
    for stage in plan.stages:
        lines += ["", "[[stages]]", *_pairs(stage, _STAGE)]
    return "\n".join(lines).strip("\n") + "\n"


def _pairs(struct: PlanLimits | PlanBudget | PlanStage, known: Mapping[str, tuple[str, _Read]]) -> list[str]:
    found = []
    for key, (field, read) in known.items():
        value = getattr(struct, field)
        if value not in (None, "", {}) and value is not False:
            found.append(f"{key} = {_toml(value, read)}")
    return found


def _toml(value: Any, read: _Read) -> str:
    if read is _seconds:
        return _duration(value)
    if read is _labels:
        pairs = ", ".join(
            f"{key if _BARE.fullmatch(key) else _quoted(key)} = {_quoted(each)}" for key, each in sorted(value.items())
        )
        return f"{{ {pairs} }}"
    if isinstance(value, bool):
        return "true"
    return str(value) if isinstance(value, int) or _DIGITS.fullmatch(value) else _quoted(value)


def _quoted(text: str) -> str:
    """Return a TOML string: the escapes of JSON are among those of TOML."""
    return msgspec.json.encode(text).decode()


def _duration(seconds: int) -> str:
    for unit, factor in sorted(_UNITS.items(), key=lambda item: -item[1]):
        if seconds and seconds % factor == 0:
            return f'"{seconds // factor}{unit}"'
    return str(seconds)
