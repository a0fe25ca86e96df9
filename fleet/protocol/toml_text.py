"""A manifest written as `component.toml`: only what differs from the defaults, units as people read them."""

import json
import re
from collections.abc import Iterable
from typing import Final

from fleet.protocol import units
from fleet.protocol.manifest import Grants, Health, Http, Limits, Manifest, OnMessage, Schedule, Service, Trigger
from fleet.protocol.toml_table import Field, fields

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def render(manifest: Manifest, *, leave_out_version: str = "") -> str:
    """The text that `fleet.protocol.author.load` reads back to `manifest`.

    Args:
        manifest: what to write.
        leave_out_version: a version that the reader fills in by itself.
    """
    lines = [f"name = {text(manifest.name)}"]
    if manifest.version != leave_out_version:
        lines.append(f"version = {text(manifest.version)}")
    if manifest.description:
        lines.append(f"description = {text(manifest.description)}")
    lines.append(f"trigger = {_trigger(manifest.trigger)}")
    if manifest.world:
        lines.append(f"world = {text(manifest.world)}")
    if manifest.security_epoch:
        lines.append(f"security_epoch = {manifest.security_epoch}")
    if manifest.data_schema:
        lines.append(f"data_schema = {manifest.data_schema}")
    if manifest.arch:
        lines.append(f"arch = {texts(manifest.arch)}")
    lines += _table("grants", _grants(manifest.grants))
    lines += _table("limits", _numbers(manifest.limits, Limits()))
    lines += _table("health", _numbers(manifest.health, Health()), always=_check(manifest.health))
    for key, value in manifest.config.items():
        inner = [f"description = {text(value.description)}"] if value.description else []
        inner += [] if value.default is None else [f"default = {text(value.default)}"]
        name = key if _BARE_KEY.fullmatch(key) else text(key)
        lines += ["", f"[config.{name}]", *inner]
    for key, secret in manifest.secrets.items():
        inner = [f"description = {text(secret.description)}"] if secret.description else []
        inner += [] if secret.required else ["required = false"]
        lines += ["", f"[secrets.{key if _BARE_KEY.fullmatch(key) else text(key)}]", *inner]
    return "\n".join(lines) + "\n"


def text(value: str) -> str:
    """A basic string; TOML 1.0, section "String"."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def texts(values: Iterable[str]) -> str:
    """An array of basic strings."""
    return f"[{', '.join(text(value) for value in values)}]"


def _table(name: str, lines: list[str], always: tuple[str, ...] = ()) -> list[str]:
    return ["", f"[{name}]", *always, *lines] if lines or always else []


def _check(health: Health) -> tuple[str, ...]:
    """Whether there is a check is always written: left out, it is told from the exports."""
    return (f"check = {'true' if health.check else 'false'}",)


def _trigger(trigger: Trigger) -> str:
    match trigger:
        case Http():
            return '"http"'
        case Service():
            return '"service"'
        case Schedule(every_ms=int(every)):
            return f'{{ type = "schedule", every = {text(units.format_duration(every))} }}'
        case Schedule():
            return f'{{ type = "schedule", cron = {text(trigger.cron or "")} }}'
        case OnMessage():
            return f'{{ type = "message", topics = {texts(trigger.topics)} }}'


def _grants(grants: Grants) -> list[str]:
    named = {"interfaces": grants.interfaces, "outbound": grants.outbound, "instances": grants.instances}
    return [f"{key} = {texts(values)}" for key, values in named.items() if values]


def _numbers(value: Limits | Health, default: Limits | Health) -> list[str]:
    lines = []
    for field in fields(type(value)):
        number = getattr(value, field.name)
        if number != getattr(default, field.name) and field.kind != "switch":
            lines.append(f"{field.key} = {quantity(field, number)}")
    return lines


def quantity(field: Field, value: int) -> str:
    """A value as it is written for this field."""
    match field.kind:
        case "size":
            return text(units.format_size(value))
        case "duration":
            return text(units.format_duration(value))
        case "number":
            return str(value)
        case "switch":
            return "true" if value else "false"
