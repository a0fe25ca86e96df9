"""The operator's directory `<home>/operator` and the connection it describes; shell completion from the server.

The directory holds the server's address, the fleet's CA, the token and the keys. Completion of groups, devices and
rollouts asks the server, and offers nothing while the server is unreachable.
"""

import os
import stat
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from fleet.cli.base import Fault, Options, read_file, reason
from fleet.protocol import bounds
from fleet.protocol.files import damage
from fleet.protocol.names import BadNameError, TargetName

if TYPE_CHECKING:
    from fleet.client import Client

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

TOKEN_VARIABLE: Final = "FLEET_TOKEN"  # noqa: S105 - the name of a variable
GONE_S: Final = 60.0
"""Time that the server may be unreachable while something is followed: longer than a restart takes."""

_PAUSE_S: Final = 0.5
_COPY: Final = "restore it from a copy: another operator's, or repository/1.root.json of the server"
_ASK: Final = "restore it from a copy, or have an admin run 'fleet operators add' for a new one"
_TOKEN_MAX_CHARS: Final = 1000
_INIT: Final = "run 'fleet init --dev' here first, or name the fleet's directory with --home"


def where_option(text: str) -> Callable[[F], F]:
    """Make the option `--where`, a selector of devices, which is read before anything is done."""
    return click.option("--where", callback=_selector, metavar="SELECTOR", help=text)


def _selector(_ctx: click.Context, _param: click.Parameter, text: str | None) -> str:
    """Return a selector unchanged, empty where none was given.

    An empty text is no selector either: a script whose variable is empty would mean every device.

    Raises:
        click.BadParameter: the text cannot be read.
    """
    if text is None:
        return ""
    from fleet.rollout.selector import BadSelectorError, parse  # noqa: PLC0415 - not for --help

    try:
        parse(text)
    except BadSelectorError as error:
        raise click.BadParameter(f"{error}.") from None
    return text


@dataclass(frozen=True, slots=True)
class Operator:
    """Connection and keys of an operator of a fleet.

    Attributes:
        directory: `<home>/operator`.
        url: of the server's listener for operators.
        namespace: of the components that this operator signs.
        clean: make texts of the server's answers printable, as for all that is shown to people.
    """

    directory: Path
    url: str
    fleet: str
    namespace: str
    clean: bool = True

    @property
    def ca(self) -> Path:
        """Path of the fleet's CA certificate, PEM."""
        return self.directory / "ca.pem"

    @property
    def trust(self) -> Path:
        """Directory of the TUF metadata as last verified, with the pinned root."""
        return self.directory / "trust"

    @property
    def root(self) -> Path:
        """Path of the pinned TUF root, from `fleet init` or handed over."""
        return self.trust / "1.root.json"

    def pinned_root(self) -> bytes:
        """Read the pinned root.

        Raises:
            Fault: the file is missing or damaged.
        """
        found = read_file(self.root, bounds.ROOT_MAX_BYTES)
        if words := damage(self.root):
            raise Fault(f"{self.root} is damaged ({words})", "nothing can be verified without it", _COPY)
        return found

    @property
    def key(self) -> Path:
        """Path of the namespace's signing key."""
        return self.directory / "keys" / f"{self.namespace}.pem"

    def target(self, text: str) -> TargetName:
        """Read NAME@VERSION or NAMESPACE/NAME@VERSION; without a namespace, this operator's.

        Raises:
            Fault: not the name of a target.
        """
        try:
            return TargetName.parse(text, namespace=self.namespace)
        except BadNameError as error:
            raise Fault(str(error)) from None

    def client(self, *, late: bool = False) -> "Client":
        """Connect to the server. Raises `Fault` when the token is missing or readable by others.

        A pipeline gives its token in $FLEET_TOKEN. `late` as in `Client`.
        """
        from fleet.client import Client  # noqa: PLC0415 - httpx is not for --help

        token = os.environ.get(TOKEN_VARIABLE, "").strip() or _secret(self.directory / "token")
        return Client(url=self.url, ca=self.ca, token=token, late=late, clean=self.clean)


def home(options: Options) -> Path:
    """Return the fleet's directory: --home, $WASMFLEET_HOME or the user's data directory.

    Raises:
        Fault: the user has no home directory, as in a container that knows only the user's number.
    """
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    path = Path(data) / "wasmfleet" if options.home is None else options.home
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        why = "HOME is not set, and the system knows no home directory of this user"
        raise Fault(f"cannot find {path}", why, "name the fleet's directory with --home or WASMFLEET_HOME") from error


def default_home() -> Path:
    """Return the directory of a `fleet` command without --home."""
    named = os.environ.get("WASMFLEET_HOME")
    return home(Options(home=Path(named) if named else None))


def load_operator(options: Options) -> Operator:
    """Read the operator's configuration.

    Raises:
        Fault: the configuration is missing or damaged.
    """
    directory = home(options) / "operator"
    path = directory / "config.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Fault(f"no fleet in {directory.parent}", f"{path} does not exist", _INIT) from None
    except PermissionError:
        raise Fault(
            f"cannot read {path}", "it belongs to another user", "name a directory of your own with --home"
        ) from None
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise Fault(f"cannot read {path}", f"it is not TOML: {error}", "correct that line") from None
    for name in ("url", "fleet", "namespace"):
        if not isinstance(values.get(name), str) or not values[name]:
            raise Fault(f"{path} has no {name}", "it must be a string", f'add {name} = "..."')
    return Operator(
        directory=directory,
        url=values["url"],
        fleet=values["fleet"],
        namespace=values["namespace"],
        clean=not options.json,
    )


def patiently(ask: Callable[[], T]) -> T:
    """Ask a server that may be away for a while, as it is when it is started again.

    Raises:
        UnreachableError: it stayed away for `GONE_S`.
    """
    from fleet.client import ProblemError, UnreachableError  # noqa: PLC0415 - httpx is not for --help

    until = time.monotonic() + GONE_S
    while True:
        try:
            return ask()
        except UnreachableError:
            if time.monotonic() > until:
                raise
        except ProblemError as error:
            # the server's broker starts a moment later
            if error.problem.type != "no-broker" or time.monotonic() > until:
                raise
        time.sleep(_PAUSE_S)


def connect(options: Options) -> "Client":
    """Connect to the server of the fleet that the options name."""
    return load_operator(options).client()


def _secret(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise Fault(f"{path} does not exist", "the server refuses requests without a token", _ASK) from None
    except OSError as error:
        raise Fault(f"cannot read the token {path}", reason(error), "check its owner and permissions") from None
    except UnicodeDecodeError:
        raise Fault(f"the token {path} is damaged", "it is not ASCII text", _ASK) from None
    if stat.S_IMODE(mode) & 0o077:
        raise Fault(
            f"the token {path} can be read by others", "it gives access to the whole fleet", f"chmod 600 {path}"
        )
    if not text or not text.isprintable() or len(text) > _TOKEN_MAX_CHARS:
        how = "damaged" if text else "empty"
        raise Fault(f"the token {path} is {how}", "the server refuses requests without one", _ASK)
    return text


def groups(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete names of groups."""
    return _offer(
        context, begun, lambda client: ((row.name, f"{row.devices} devices") for row in client.groups().groups)
    )


def devices(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete ids of devices."""
    return _offer(
        context,
        begun,
        lambda client: ((row.id, "online" if row.online else "offline") for row in client.devices().devices),
    )


def rollouts(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete numbers of rollouts."""
    return _offer(
        context,
        begun,
        lambda client: ((str(row.number), f"{row.instance}: {row.state}") for row in client.rollouts().rollouts),
    )


def _offer(
    context: click.Context, begun: str, ask: "Callable[[Client], Iterable[tuple[str, str]]]"
) -> list[CompletionItem]:
    from fleet.client import ClientError  # noqa: PLC0415 - httpx is not for --help

    home = context.find_root().params.get("home") or os.environ.get("WASMFLEET_HOME")
    try:
        with connect(Options(home=Path(home) if home else None)) as client:
            return [CompletionItem(name, help=text) for name, text in ask(client) if name.startswith(begun)]
    except (Fault, ClientError, OSError):
        return []
