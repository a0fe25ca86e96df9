"""`fleet demo`."""

import importlib.util
from pathlib import Path
from typing import Final

import click

from fleet.cli.base import Exit, Fault, Options, check_choice, command

_PARTS: Final = {"wasmtime": "agent", "paho": "agent", "uvicorn": "server", "starlette": "server"}


@command("demo", json=False, examples="fleet demo\nfleet demo --once\nfleet demo --directory ./try")
@click.option("--once", is_flag=True, help="End after the last act; the exit code says whether all of it held")
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False), help="For all it makes  [temporary]")
@click.option("--broker", default="auto", show_default=True, help="auto (Mosquitto where there is one) or embedded")
def demo(_options: Options, *, once: bool, directory: Path | None, broker: str) -> int:
    """The whole main job on this machine, as an ordinary user.

    Makes a development fleet, starts its server and three boards as real processes, pushes v1, pushes v2 while clients
    send requests without a pause, pushes a v3 that traps and is rolled back, and takes the group back with 'fleet
    undo'. Then it stays up until Ctrl-C. It leaves no process behind.
    """
    check_choice(broker, ("auto", "mosquitto", "embedded"), "broker")
    missing = [name for name in _PARTS if importlib.util.find_spec(name) is None]
    if missing:
        raise Fault("the demo needs every part", f"{missing[0]} is not installed", "pip install 'wasmfleet[all]'")
    if directory is not None and directory.exists() and any(directory.iterdir()):
        raise Fault(f"{directory} is not empty", "the demo makes everything anew", "name another --directory")
    from fleet.demo.run import run  # noqa: PLC0415 - not for --help

    return Exit(code) if (code := run(directory=directory, once=once, broker=broker)) in set(Exit) else code
