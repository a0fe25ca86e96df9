"""wasi:messaging on the worker's side: what its host would not take is an error to the guest, and never its end."""

import pytest

from agent.host.engine.adapter_abi import Denials
from agent.host.interfaces.messaging import Publisher
from agent.host.ipc import framing
from fleet.protocol import bounds
from fleet.protocol.manifest import Grants, Limits

GRANTS = Grants(interfaces=("wasi:messaging",), publish=("plant/#",))
LONG = "x" * (bounds.MESSAGE_METADATA_WORD_MAX_CHARS + 1)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"note": LONG}, "its metadata has a word of 1025 characters, at most 1024 are taken"),
        ({LONG: "note"}, "its metadata has a word of 1025 characters, at most 1024 are taken"),
        (
            {str(each): "" for each in range(17)},
            "its metadata has 17 entries of 24 bytes, at most 16 of 4096 are taken",
        ),
        (dict.fromkeys("abcde", LONG[1:]), "its metadata has 5 entries of 5125 bytes, at most 16 of 4096 are taken"),
    ],
)
def test_metadata_that_is_not_taken_is_not_sent(metadata, said):
    ours, theirs = framing.socket_pair()
    with ours, theirs:
        publisher = Publisher(theirs, GRANTS, Limits(idle_ms=1))
        handle = publisher.add(b"1")
        publisher.get(handle).metadata = metadata
        error = publisher.send(Denials(lambda _line: None), "plant/a", handle)
        assert (error.tag, error.payload) == ("other", said)
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
