"""`fleet keys`: keys of people and pipelines, and the roles that trust them."""

import difflib
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from securesystemslib.signer import CryptoSigner

from fleet.cli import base, output
from fleet.cli.base import SIGN_YES, Exit, Fault, Group, Options, command, days, read_file, reason, save_event_option
from fleet.cli.operator import Operator, home, load_operator
from fleet.cli.signing_event import Ceremony, Change, for_pipeline, replaced, signing_faults, without
from fleet.cli.trust_store import TrustStore
from fleet.cli.unlock import ask, free_key_file, keyring, new_passphrase
from fleet.client import ClientError
from fleet.protocol.manifest import Grants
from signing import events, rotation
from signing import keyring as keyrings
from signing import keys as key_files
from signing.errors import KeyFileError

ONLINE = ("snapshot", "timestamp", "director")


@click.group("keys", cls=Group)
def keys() -> None:
    """Make, list, rotate and revoke signing keys.

    A person's key is kept in an encrypted file, in an ssh-agent or on a PKCS#11 token. 'fleet keys list' shows these
    and other people's keys by name.
    """


@command(
    "new",
    examples="fleet keys new alice\n"
    "fleet keys new build --ci --namespace edge --expires 180d --ceiling wasi:http --ceiling wasi:clocks",
)
@click.argument("name")
@click.option(
    "--form", type=click.Choice(["pkcs12", "openssh"]), default="pkcs12", show_default=True, help="Format of the file"
)
@click.option(
    "--ci",
    is_flag=True,
    help="Make a key for a pipeline: it may publish in one namespace, below its ceiling, for a time",
)
@click.option(
    "--namespace", metavar="NAME", help="With --ci: namespace of its components, created if need be  [this operator's]"
)
@click.option("--expires", default="180d", show_default=True, metavar="DAYS", help="With --ci: validity of the key")
@click.option(
    "--ceiling",
    multiple=True,
    metavar="INTERFACE",
    help="With --ci: what the namespace's components may import; repeatable",
)
@click.option(
    "--outbound",
    multiple=True,
    metavar="URL",
    help="With --ci: where the namespace's components may connect; repeatable",
)
@click.option(
    "--pipeline",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --ci: write the public files that a pipeline needs into this new directory, its --home",
)
@save_event_option
@SIGN_YES
def new(options: Options, *, name: str, form: str, ci: bool, **how: Any) -> None:
    """Create the key NAME in an encrypted file; it may sign nothing until a role names it.

    With --ci the key may publish in one namespace and is written unencrypted to NAME.ci.pem. Copy its text into the
    pipeline's secret FLEET_SIGNING_KEY, then delete the file.
    """
    who = load_operator(options)
    if ci:
        _new_for_pipeline(options, name, **how)
        return
    with signing_faults():
        entry, _ = keyring(who).generate(name, passphrase=new_passphrase(name), form=key_files.Format(form))
    output.result(
        options,
        {"name": name, "keyid": entry.key.keyid, "file": str(keyring(who).file(name))},
        f"Made {name} ({entry.key.keyid[:12]}). 'fleet keys show {name}' prints its public half.",
    )


def _new_for_pipeline(
    options: Options,
    name: str,
    *,
    namespace: str | None,
    expires: str,
    ceiling: tuple[str, ...],
    outbound: tuple[str, ...],
    pipeline: Path | None,
    to: Path | None,
    yes: bool,
) -> None:
    who = load_operator(options)
    path = Path(f"{name}.ci.pem")
    limit = Grants(interfaces=ceiling, outbound=outbound) if ceiling or outbound else None
    signer = CryptoSigner.generate_ed25519()
    with who.client() as client, signing_faults():
        ceremony = Ceremony(options, who, client)
        now = datetime.now(UTC)
        space = namespace or who.namespace
        change = for_pipeline(
            ceremony.files, space, signer.public_key, now=now, ends=now + days(expires), ceiling=limit
        )
        event = events.propose(
            ceremony.files, namespaces={space: change}, now=now, note=f"{name} publishes in {space} for {expires}"
        )
        key_files.store(path, signer)
        try:
            ceremony.ring.add(name, signer.public_key)
            ceremony.carry_through(event, extra=(signer,), yes=yes, to=to)
        except BaseException:
            path.unlink()
            ceremony.ring.forget(name)
            raise
    if pipeline is not None:
        write_public(who, pipeline, space)
    output.say(
        options,
        f"Wrote {path}: put its text into the pipeline's secret FLEET_SIGNING_KEY, then delete the file.\n"
        f'The pipeline\'s operator/config.toml says namespace = "{space}".',
    )


def write_public(who: Operator, directory: Path, namespace: str) -> None:
    """Write the public files with which a pipeline or signing host finds the server and verifies the repository."""
    place = directory / "operator"
    config = f'url = "{who.url}"\nfleet = "{who.fleet}"\nnamespace = "{namespace}"\n'
    try:
        (place / "trust").mkdir(parents=True)
        (place / "config.toml").write_text(config, encoding="utf-8")
        (place / "ca.pem").write_bytes(who.ca.read_bytes())
        (place / "trust" / who.root.name).write_bytes(who.root.read_bytes())
        (place / ".gitignore").write_text("/token\n/keys/\n/trust/cache/\n/trust/facts.json\n", encoding="utf-8")
    except OSError as error:
        raise Fault(f"cannot write {directory}", reason(error), "name another") from None


@command(
    "import",
    examples="fleet keys import bob bob.pub\n"
    "fleet keys import alice ~/.ssh/id_ed25519\n"
    "fleet keys import alice --ssh-agent alice@desk\n"
    "fleet keys import vault --token wasmfleet --number 2\n"
    "fleet keys import recovery --recovery",
)
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--ssh-agent", "agent", metavar="COMMENT", help="Use an Ed25519 key that an ssh-agent holds")
@click.option(
    "--token", metavar="LABEL", help="Use a P-256 or P-384 key on a PKCS#11 token; PYKCS11LIB names its driver"
)
@click.option(
    "--number", metavar="NUMBER", default=2, show_default=True, help="Number of the key on the token (CKA_ID)"
)
@click.option("--recovery", is_flag=True, help="Type in, or pipe in, the recovery key that was printed")
def import_(
    options: Options, *, name: str, file: Path | None, agent: str | None, token: str | None, number: int, recovery: bool
) -> None:
    """Add a key under NAME: somebody's public key, or a private key of yours, which is encrypted anew."""
    if sum(bool(each) for each in (file, agent, token, recovery)) != 1:
        raise click.UsageError("Give one of FILE, --ssh-agent, --token and --recovery.")
    ring = keyring(load_operator(options))
    with signing_faults():
        if agent:
            known = key_files.identities()
            if agent not in known:
                raise Fault(f"the ssh-agent has no Ed25519 key {agent!r}", f"it has {', '.join(known) or 'none'}")
            entry = ring.add(name, known[agent], where=key_files.SCHEME + ":")
        elif token:
            uri, key = keyrings.import_token(label=token, number=number, ask=ask)
            entry = ring.add(name, key, where=uri)
        elif recovery:
            text = click.prompt("Recovery key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read()
            entry = ring.adopt(name, keyrings.from_recovery(text), passphrase=new_passphrase(name))
        else:
            assert file is not None
            entry = _import_file(ring, name, file)
    if options.json:
        output.show_json({"name": name, "keyid": entry.key.keyid, "where": entry.where})
    else:
        whose = f"yours, {_where(entry)}" if entry.ours else "somebody else's"
        output.say(options, f"{name} is {entry.key.keyid[:12]}: {whose}.")


def _import_file(ring: keyrings.Keyring, name: str, file: Path) -> keyrings.Entry:
    data = read_file(file, key_files.MAX_BYTES)
    try:
        public = keyrings.read_public(data, what=str(file))
    except KeyFileError as error:
        if not data.strip():
            raise Fault(
                f"{file} is empty", "", "have its owner send it again: fleet keys show NAME > NAME.pub"
            ) from None
        if file.suffix == ".pub":
            raise Fault(str(error)) from None
        signer = keyrings.open_file(file, ask)  # raises also for a file that is no private key
        return ring.adopt(name, signer, passphrase=new_passphrase(name))
    return ring.add(name, public)


@command("list", examples="fleet keys list\nfleet keys list --json")
@base.table_options
def list_(options: Options) -> None:
    """List the keys known here, and what each of them may sign."""
    who = load_operator(options)
    ring = keyring(who)
    roles: dict[str, list[str]] | None = None
    try:
        with who.client() as client:
            roles = _roles(TrustStore(who, client, expired=True).files)
    except (ClientError, Fault) as error:
        output.note(f"cannot tell what each key may sign: {error}")
    with signing_faults():
        entries = ring.entries()
    rows = [(each.name, each.key.keyid, _where(each), (roles or {}).get(each.key.keyid, [])) for each in entries]
    known = {each.key.keyid for each in entries}
    rows += [("-", keyid, "", held) for keyid, held in (roles or {}).items() if keyid not in known]
    if options.json:
        output.show_json({"keys": [dict(zip(("name", "keyid", "where", "signs"), row, strict=True)) for row in rows]})
    else:
        output.table(
            ("NAME", "KEY", "WHERE", "SIGNS"),
            [(n, k[:12], w, ", ".join(s)) for n, k, w, s in rows],
            empty="no keys here",
        )


def _roles(files: dict[str, bytes]) -> dict[str, list[str]]:
    from signing import repository  # noqa: PLC0415 - the module's other name is taken by the command

    found: dict[str, list[str]] = {}
    for role in ("root", "targets", *repository.namespaces(files), *ONLINE):
        for key in rotation.keys_of(files, role).keys:
            found.setdefault(key.keyid, []).append(role)
    return found


def _where(entry: keyrings.Entry) -> str:
    return entry.where.rstrip(":") if entry.ours else "elsewhere"


@command("show", examples="fleet keys show alice > alice.pub")
@click.argument("name")
def show(options: Options, *, name: str) -> None:
    """Print the public half of the key NAME, for others to import."""
    with signing_faults():
        entry = keyring(load_operator(options)).get(name)
    if options.json:
        public = keyrings.public_pem(entry.key)
        output.show_json({"name": entry.name, "keyid": entry.key.keyid, "where": entry.where, "public": public})
    else:
        click.echo(keyrings.public_pem(entry.key).rstrip())


@command(
    "rotate",
    examples="fleet keys rotate main\n"
    "fleet keys rotate root --to alice --to bob --to carol --threshold 2\n"
    "fleet keys rotate director\n"
    "fleet keys rotate sensors --new-namespace",
)
@click.argument("role")
@click.option("--new-namespace", is_flag=True, help="Create ROLE as a namespace; it has no ceiling")
@click.option(
    "--to",
    "names",
    multiple=True,
    metavar="KEY",
    help="Let this key sign from now on; repeatable  [a new key in place of yours]",
)
@click.option(
    "--threshold", metavar="NUMBER", type=click.IntRange(1), help="Number of keys that must sign  [as before]"
)
@save_event_option
@SIGN_YES
def rotate(
    options: Options,
    *,
    role: str,
    new_namespace: bool,
    names: tuple[str, ...],
    threshold: int | None,
    to: Path | None,
    yes: bool,
) -> None:
    """Replace the keys of ROLE: root, targets, a namespace, snapshot, timestamp or director.

    With --new-namespace a namespace is created. The same event contains what the new keys must sign anew. Keys of
    snapshot, timestamp and director are made in the server directory of this home.
    """
    who = load_operator(options)
    with who.client() as client, signing_faults():
        ceremony = Ceremony(options, who, client)
        _check_role(ceremony.files, role, new=new_namespace)
        made = _NewKey(options, ceremony, role)
        try:
            change = replaced(
                ceremony.files,
                role,
                mine={each.key.keyid for each in ceremony.ring.entries() if each.ours},
                to=tuple(ceremony.ring.get(name).key for name in names),
                make=made.make,
                threshold=threshold,
            )
            event = _propose(ceremony, change, f"other keys for {role}")
            ceremony.carry_through(event, yes=yes, to=to)
        except BaseException:
            made.undo()
            raise


def _check_role(files: dict[str, bytes], role: str, *, new: bool) -> None:
    from signing import repository  # noqa: PLC0415 - the module's other name is taken by the command

    known = ("root", "targets", *repository.namespaces(files), *ONLINE)
    if new == (role not in known):
        return
    if new:
        raise Fault(f"{role} exists", "--new-namespace creates another namespace", "leave the option out")
    near = difflib.get_close_matches(role, known, 1)
    raise Fault(
        f"there is no role or namespace {role!r}",
        f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}",
        "to create it as a namespace, add --new-namespace",
        code=Exit.REFUSED,
    )


@command("revoke", examples="fleet keys revoke bob")
@click.argument("name")
@save_event_option
@SIGN_YES
def revoke(options: Options, *, name: str, to: Path | None, yes: bool) -> None:
    """Take the key NAME out of every role. NAME may be the beginning of the key id."""
    who = load_operator(options)
    with who.client() as client, signing_faults():
        ceremony = Ceremony(options, who, client)
        keyid = next((each for each in _roles(ceremony.files) if len(name) >= 8 and each.startswith(name)), None)  # noqa: PLR2004 - shorter ids are guesses
        change = without(ceremony.files, keyid or ceremony.ring.get(name).key.keyid)
        ceremony.carry_through(_propose(ceremony, change, f"{name} no longer signs anything"), yes=yes, to=to)


def _propose(ceremony: Ceremony, change: Change, note: str) -> Any:
    return events.propose(
        ceremony.files,
        roles=change.roles,
        director=change.director,
        namespaces=change.namespaces,
        now=datetime.now(UTC),
        note=note,
    )


class _NewKey:
    """Key of a rotation, removed again when the rotation fails."""

    def __init__(self, options: Options, ceremony: Ceremony, role: str) -> None:
        self._options, self._ceremony, self._role = options, ceremony, role
        self._paths: list[Path] = []
        self._names: list[str] = []

    def make(self) -> Any:
        """Make the key and return its public half."""
        if self._role in ONLINE:
            return self._make_online()
        ring = self._ceremony.ring
        name = ring.free(self._role)
        passphrase = None if self._ceremony.trust.development else new_passphrase(name)
        entry, _ = ring.generate(name, passphrase=passphrase)
        self._names.append(name)
        self._paths.append(ring.file(name))
        output.say(self._options, f"Made the key {name}.")
        return entry.key

    def _make_online(self) -> Any:
        directory = home(self._options) / "server" / "keys"
        if not directory.is_dir():
            raise Fault(
                f"the {self._role} key belongs on the server",
                f"{directory} is not here",
                f"run fleet keys rotate {self._role} on the server's machine",
            )
        path = free_key_file(directory, self._role)
        self._paths.append(path)
        return key_files.generate(path).public_key

    def undo(self) -> None:
        """Remove the key, which no published or saved event names."""
        for path in self._paths:
            path.unlink(missing_ok=True)
        for name in self._names:
            self._ceremony.ring.forget(name)


for each in (new, import_, list_, show, rotate, revoke):
    keys.add_command(each)
