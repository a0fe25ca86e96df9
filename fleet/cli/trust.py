"""What this operator believes of the repository, verified from the root pinned on this machine."""

import os
from datetime import UTC, datetime

import msgspec

from fleet.cli.base import Exit, Fault
from fleet.cli.home import Operator
from fleet.cli.prepare import read_file
from fleet.client import Client
from fleet.protocol import caps
from signing import repository
from signing.cache import DirectoryCache
from signing.errors import FetchNotFound, Rejected
from signing.facts import Facts
from signing.policy import Release
from signing.workflow import Workflow, profile


class Trust:
    """What this operator believes of the repository: verified from the pinned root, remembered between commands.

    Raises:
        Fault: the root is missing, or what the server shows does not verify.
    """

    def __init__(self, who: Operator, client: Client) -> None:
        self._who = who
        self._client = client
        self._facts_file = who.trust / "facts.json"
        pinned = read_file(who.root, caps.ROOT_MAX_BYTES)
        self._workflow = Workflow(root=pinned, fetch=self._fetch, cache=DirectoryCache(who.trust / "cache"))
        self.refresh()

    def refresh(self) -> None:
        """Bring everything up to date with the server."""
        facts = self._load_facts()
        try:
            self._workflow.refresh(facts=facts, now=facts.time(datetime.now(UTC)))
            self._role = self._workflow.role(self._who.namespace)
        except Rejected as error:
            raise Fault(
                "the fleet's repository does not verify",
                error.message,
                "nothing was signed; find out who changed it before anything else",
                code=Exit.REFUSED,
            ) from None
        finally:
            self._store_facts(self._workflow.facts)

    @property
    def development(self) -> bool:
        """Whether the repository was made for development, by its signed root."""
        return profile(self._workflow.loaded()[0]).get("size") == "dev"

    @property
    def role(self) -> bytes:
        """The verified role of this operator's namespace."""
        return self._role

    @property
    def releases(self) -> tuple[Release, ...]:
        """What the namespace has published."""
        return repository.releases(self._role)

    def _fetch(self, name: str, _max_bytes: int) -> bytes:
        data = self._client.tuf(name)
        if data is None:
            raise FetchNotFound(name)
        return data

    def _load_facts(self) -> Facts:
        try:
            return Facts.decode(self._facts_file.read_bytes())
        except FileNotFoundError:
            return Facts()
        except msgspec.MsgspecError as error:
            raise Fault(
                f"{self._facts_file} is damaged",
                str(error),
                "restore it, or delete it if nobody else writes there",
            ) from None

    def _store_facts(self, facts: Facts) -> None:
        fresh = self._facts_file.with_suffix(".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            file.write(facts.encode())
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._facts_file)
