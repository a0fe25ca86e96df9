"""The demo from its first process to its last: play, show, stay up if asked to, and leave nothing behind."""

import asyncio
import contextlib
import shlex
import shutil
import signal
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from rich.text import Text

from fleet.client import ClientError
from fleet.demo.fixtures import NoFixtureError, fixture
from fleet.demo.processes import ChildDiedError
from fleet.demo.scene import DemoError, Scene, program
from fleet.demo.show import Teller
from fleet.demo.story import GROUP, INSTANCE, Story, play

OK, FAILED, INTERRUPTED = 0, 1, 130


def run(*, directory: Path | None, once: bool, broker: str = "auto") -> int:
    """Play the demo; the exit code: 0 when all of it held, 1 when not, 130 when interrupted before its end.

    Args:
        directory: for everything it makes, which then stays; None for a temporary one.
        once: end after the last act instead of staying up.
        broker: as in `fleet init`.
    """
    place = directory.absolute() if directory is not None else Path(tempfile.mkdtemp(prefix="wasmfleet-demo-"))
    return asyncio.run(_run(place, broker, keep=directory is not None, once=once))


async def _run(place: Path, broker: str, *, keep: bool, once: bool) -> int:
    teller = Teller()
    teller.console.print(Text.assemble(("wasmfleet demo", "bold"), (f"  in {place}", "dim")))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    scene = Scene(place)
    code = FAILED
    try:
        code = await _until_stopped(_whole(scene, teller, stop, broker, once=once), stop)
    finally:
        with teller.waiting("Ending every process"):
            await scene.close()
        if not keep and code != FAILED:
            shutil.rmtree(place, ignore_errors=True)
        elif code == FAILED:
            teller.console.print(f"What every process said is in {place / 'logs'}.", soft_wrap=True, markup=False)
    return code


async def _until_stopped(whole: Coroutine[Any, Any, int], stop: asyncio.Event) -> int:
    """The result of `whole`, or INTERRUPTED when `stop` comes before it has one."""
    playing = asyncio.ensure_future(whole)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({playing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not playing.done():
        # After the last act it ends by itself when it is told to stop.
        await asyncio.wait({playing}, timeout=0.5)
    stopping.cancel()
    if playing.done():
        return playing.result()
    playing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await playing
    return INTERRUPTED


async def _whole(scene: Scene, teller: Teller, stop: asyncio.Event, broker: str, *, once: bool) -> int:
    try:
        story = await play(scene, teller, broker=broker)
    except (DemoError, ChildDiedError, ClientError, NoFixtureError) as error:
        teller.console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        return FAILED
    except TimeoutError:
        teller.console.print(Text.assemble(("error: ", "bold red"), "the act took too long; see the logs"))
        return FAILED
    teller.end(story, scene.boards)
    code = OK if story.held else FAILED
    if not once:
        _next_steps(scene, teller, story)
        await stop.wait()
    return code


def _next_steps(scene: Scene, teller: Teller, story: Story) -> None:
    """What a person may try on the fleet that is still up."""
    board = scene.boards[0]
    fleet = program("fleet")
    file = shlex.quote(str(fixture("v2.wasm")))
    teller.act("The fleet stays up until Ctrl-C. Try, in another terminal:")
    for line in (
        f"export WASMFLEET_HOME={shlex.quote(str(scene.home))}",
        f"curl {board.url(INSTANCE)}",
        f"curl -d 'a body' {board.url(INSTANCE)}echo",
        f"{fleet} devices",
        f"{fleet} why {board.device}",
        f"{fleet} push {file} --group {GROUP} --dry-run",
        f"{fleet} push {file} --device {scene.boards[-1].device}",
        f"{fleet} rollouts",
    ):
        teller.console.print(f"  {line}", soft_wrap=True, markup=False)
    if not story.held:
        teller.console.print(Text("\nNot everything held: see above.", style="bold red"))
