"""What leaves a process is what was recorded: messages, tables, the API's document, commands, words.

Names of Python may change, what is outside may not, but where a change says so: then `make golden` records it anew, and
the difference of the files stands in that change.
"""

import argparse
import contextlib
import enum
import importlib
import io
import json
import os
import pkgutil
import re
import sqlite3
import stat

import click
import msgspec
import pytest
import sqlite_utils

import agent
import fleet
import signing
from agent import cli as agent_cli
from agent.host import cli as host_cli
from agent.update import state as agent_state
from agent.update import store as agent_store
from fleet.admin.bootstrap import init
from fleet.cli.main import main as fleet_command
from fleet.server.api import routes
from fleet.store.sqlite import MIGRATIONS, Database
from signing import conformance
from tests.golden import catalogue, support

NAMED = {f"{group}/{name}": kind for group, kinds in catalogue.MESSAGES.items() for name, kind in kinds.items()}
WORDS = [(f"words/{name}", kind) for name, kinds in catalogue.VOCABULARIES.items() for kind in kinds]


@pytest.fixture(scope="module")
def ours():
    """Every module of the product is imported."""
    with contextlib.redirect_stdout(io.StringIO()):
        for package in (agent, fleet, signing):
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)
    return {agent.__name__, fleet.__name__, signing.__name__}


def derived(kind, packages):
    for each in kind.__subclasses__():
        if each.__module__.split(".")[0] in packages:
            yield each
        yield from derived(each, packages)


# Messages -------------------------------------------------------------------------------------------------------------


def test_every_struct_has_a_golden_row(ours):
    known = {*NAMED.values(), *catalogue.BASES, *catalogue.INTERNAL}
    missing = sorted({f"{kind.__module__}.{kind.__qualname__}" for kind in derived(msgspec.Struct, ours)} - {
        f"{kind.__module__}.{kind.__qualname__}" for kind in known
    })  # fmt: skip
    assert not missing, f"give each a stable name in tests/golden/catalogue.py: {missing}"


def encoded(message):
    """The JSON of a message, its keys in the order in which they are written."""
    return json.loads(msgspec.json.encode(message))


@pytest.mark.parametrize("group", catalogue.MESSAGES)
def test_messages_are_what_was_recorded(golden, group):
    kinds = catalogue.MESSAGES[group]
    rows = {
        name: {
            "full": encoded(support.full(kind)),
            "least": encoded(support.minimal(kind)),
            "required": support.required_keys(kind),
        }
        for name, kind in kinds.items()
    }
    golden.check_json(f"messages/{group}.json", rows)


@pytest.mark.parametrize("group", catalogue.MESSAGES)
def test_schemas_are_what_was_recorded(golden, group):
    found = support.schemas([*NAMED.items(), *WORDS])
    golden.check_json(f"schemas/{group}.json", {name: found[f"{group}/{name}"] for name in catalogue.MESSAGES[group]})


@pytest.mark.parametrize("name", NAMED)
def test_a_recorded_message_is_read_and_written_as_it_was(name):
    group, _, short = name.partition("/")
    row = json.loads((support.FOLDER / "messages" / f"{group}.json").read_text())[short]
    kind = NAMED[name]
    for example, made in (("full", support.full(kind)), ("least", support.minimal(kind))):
        read = msgspec.json.decode(json.dumps(row[example]).encode(), type=kind)
        assert json.dumps(encoded(read)) == json.dumps(encoded(made)) == json.dumps(row[example])
    # and what an older program leaves out, since it did not know it, is filled in
    short_form = {key: row["least"][key] for key in row["required"]}
    read = msgspec.json.decode(json.dumps(short_form).encode(), type=kind)
    assert json.dumps(encoded(read)) == json.dumps(row["least"])


# Words ----------------------------------------------------------------------------------------------------------------


def test_every_vocabulary_has_a_golden_row(ours):
    known = {each for kinds in catalogue.VOCABULARIES.values() for each in kinds} | catalogue.INTERNAL
    missing = {kind for kind in derived(enum.Enum, ours) if len(kind)} - known
    assert not missing, f"give each a stable name in tests/golden/catalogue.py: {missing}"


def test_words_are_what_was_recorded(golden):
    for name, kinds in catalogue.VOCABULARIES.items():
        assert len({tuple(support.words(kind)) for kind in kinds}) == 1, f"{name} is written twice, differently"
    rows = {name: support.words(kinds[0]) for name, kinds in catalogue.VOCABULARIES.items()}
    golden.check_json("words.json", {**rows, **catalogue.CONSTANTS})


# Tables ---------------------------------------------------------------------------------------------------------------


def schema_of(db):
    rows = db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type, name")
    lines = [" ".join(sql.split()) + ";" for (sql,) in rows]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    # a column to a line, so that a difference names it
    tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
    columns = []
    for (table,) in tables:
        for _, name, kind, not_null, default, key in db.execute(f'PRAGMA table_info("{table}")'):
            facts = (
                ["not null"] * not_null + [f"default {default}"] * (default is not None) + [f"key {key}"] * (key > 0)
            )
            columns.append(" ".join([f"-- {table}: {name}", kind, *facts]).rstrip())
    return "\n".join([*lines, f"PRAGMA user_version={version};", "", *columns])


def server_schema_at(version, path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for migrate in MIGRATIONS[:version]:
            migrate(sqlite_utils.Database(db))
        db.execute(f"PRAGMA user_version={version}")
        return schema_of(db)


def agent_schema_at(version, path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for script in agent_store.MIGRATIONS[:version]:
            db.executescript(script)
        db.execute(f"PRAGMA user_version={version}")
        return schema_of(db)


def made_by_the_server(path):
    Database.open(path, fleet="test").close()


def made_by_the_agent(path):
    agent_store.Store(path).close()


STORES = {
    "server": (server_schema_at, len(MIGRATIONS), made_by_the_server),
    "agent": (agent_schema_at, len(agent_store.MIGRATIONS), made_by_the_agent),
}


@pytest.mark.parametrize("store", STORES)
def test_tables_are_what_was_recorded_at_every_version(golden, tmp_path, store):
    at, newest, make = STORES[store]
    for version in range(1, newest + 1):
        golden.check(f"tables/{store}-{version}.sql", at(version, tmp_path / f"{version}.db"))
    make(tmp_path / "fresh.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "fresh.db")) as db:
        golden.check(f"tables/{store}-{newest}.sql", schema_of(db))


OLD = [(store, version) for store, (_, newest, _) in STORES.items() for version in range(1, newest + 1)]


@pytest.mark.parametrize(("store", "version"), OLD)
def test_a_store_of_a_recorded_version_is_brought_up_to_date(tmp_path, store, version):
    _, newest, make = STORES[store]
    path = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        made_by_sqlite = "CREATE TABLE sqlite_"  # the bookkeeping of AUTOINCREMENT, which nobody may create
        recorded = (support.FOLDER / "tables" / f"{store}-{version}.sql").read_text()
        lines = [line for line in recorded.splitlines() if not line.startswith(made_by_sqlite)]
        db.executescript("\n".join(sorted(lines, key=lambda line: not line.startswith("CREATE TABLE"))))
    make(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert schema_of(db) == (support.FOLDER / "tables" / f"{store}-{newest}.sql").read_text().rstrip("\n")


def test_rows_of_the_agent_are_what_was_recorded(golden, tmp_path):
    # the names of rows are no columns: a renamed counter would be lost in silence
    kinds = catalogue.MESSAGES["kept-by-the-agent"]
    made = {name: support.full(kinds[name]) for name in ("change", "committed", "failed", "verifier-state", "doubt")}
    store = agent_store.Store(tmp_path / "agent.db")
    store.apply(agent_state.Transition(change=made["change"], committed=made["committed"], failure=made["failed"]))
    store.save(facts=made["verifier-state"])
    store.save(report=support.full(catalogue.MESSAGES["device"]["report"]))
    store.save(report=support.minimal(catalogue.MESSAGES["device"]["report"]))
    store.accept(b"{}", 7, made["verifier-state"])
    store.set_doubts([made["doubt"]])
    store.set_problems(["a problem"])
    store.set_counter("generation", 1)
    store.acknowledge(1)
    store.close()
    rows = {}
    with contextlib.closing(sqlite3.connect(tmp_path / "agent.db")) as db:
        tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
        for (table,) in tables:
            found = db.execute(f'SELECT * FROM "{table}" ORDER BY 1, 2')
            keys = [column[0] for column in found.description]
            rows[table] = [dict(zip(keys, map(readable, row), strict=True)) for row in found]
    golden.check_json("tables/agent-rows.json", rows)


def readable(value):
    """A column's value; a document in it as a document."""
    if not isinstance(value, bytes):
        return value
    text = value.decode()
    return json.loads(text) if text.startswith(("{", "[")) else text


@pytest.mark.parametrize("size", ["dev", "solo"])
def test_a_home_has_the_files_that_were_recorded(golden, tmp_path, size):
    home, mask = tmp_path / "home", os.umask(0o022)
    try:
        init(home, fleet="test", size=size, passphrase=None if size == "dev" else b"correct horse", operators_port=1)
    finally:
        os.umask(mask)
    lines = [
        f"{stat.filemode(path.stat().st_mode)} {path.relative_to(home)}{'/' if path.is_dir() else ''}"
        for path in sorted(home.rglob("*"))
    ]
    golden.check(f"files/home-{size}.txt", re.sub(r"\b[0-9a-f]{30,}\b", "SERIAL", "\n".join(lines)))
    settings = (home / "server" / "server.toml").read_text()
    golden.check(f"files/server-{size}.toml", settings)


# The API and the commands ---------------------------------------------------------------------------------------------


def test_routes_are_what_was_recorded(golden):
    document = json.loads(routes.document())
    rows = {}
    names = {name: kind for name, kind in NAMED.items() if name.startswith(("operator/", "device/"))}
    by_class = {kind.__name__: name for name, kind in names.items()}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            text = json.dumps({key: value for key, value in operation.items() if key != "summary"})
            for found in sorted(set(support.REFERENCE.findall(text))):
                text = text.replace(f'"#/components/schemas/{found}"', f'"{by_class[found]}"')
            rows[f"{method.upper()} {path}"] = support.without_prose(json.loads(text))
    assert set(support.REFERENCE.findall(json.dumps(document))) <= document["components"]["schemas"].keys()
    golden.check_json("api/routes.json", {**rows, "security": document["security"]})


def test_commands_of_the_operator_are_what_was_recorded(golden):
    golden.check("commands/fleet.txt", "\n".join(click_tree(fleet_command, "fleet")))


@pytest.mark.parametrize(
    ("name", "parser"),
    [
        pytest.param("fleet-agent", agent_cli._parser, id="fleet-agent"),
        pytest.param("fleet-host", host_cli._parser, id="fleet-host"),
        pytest.param("fleet-tuf-conformance", conformance._parser, id="fleet-tuf-conformance"),
    ],
)
def test_commands_of_the_device_are_what_was_recorded(golden, name, parser):
    golden.check(f"commands/{name}.txt", "\n".join(argparse_tree(parser(), name)))


def click_tree(command, path):
    context = click.Context(command, info_name=path)
    yield f"{path}{' (hidden)' if command.hidden else ''}"
    for param in command.params:
        yield f"    {click_param(param, context)}"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from click_tree(command.get_command(context, name), f"{path} {name}")


def click_param(param, context):
    facts = [
        param.human_readable_name
        if isinstance(param, click.Argument)
        else ", ".join([*param.opts, *param.secondary_opts])
    ]
    if not getattr(param, "is_flag", False):
        facts.append(f"<{param.type.name}>")
    if isinstance(param.type, click.Choice):
        facts.append("|".join(map(str, param.type.choices)))
    if isinstance(param.type, click.IntRange | click.FloatRange):
        facts.append(f"{param.type.min}..{param.type.max}")
    facts += [word for word in ("required", "multiple", "hidden", "is_flag") if getattr(param, word, False)]
    if param.nargs != 1:
        facts.append(f"nargs={param.nargs}")
    default = param.to_info_dict().get("default")
    if default not in (None, (), "", False) and not callable(default):
        facts.append(f"default={default}")
    if param.envvar:
        facts.append(f"env={param.envvar}")
    return " ".join(facts)


def argparse_tree(parser, path):
    yield path
    nested = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            nested += action.choices.items()
            continue
        facts = [", ".join(action.option_strings) or action.metavar or action.dest]
        if action.nargs != 0:
            facts.append(f"<{action.metavar or 'text'}>")
        if action.choices:
            facts.append("|".join(map(str, action.choices)))
        facts += ["required"] if action.required and action.option_strings else []
        facts += [f"nargs={action.nargs}"] if action.nargs not in (None, 0) else []
        if action.default not in (None, argparse.SUPPRESS, "", False, frozenset()):
            facts.append(f"default={action.default}")
        yield f"    {' '.join(facts)}"
    for name, command in nested:
        yield from argparse_tree(command, f"{path} {name}")


def test_together_the_files_stay_small():
    files = [path for path in support.FOLDER.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}]
    assert sum(path.stat().st_size for path in files) < 600_000
