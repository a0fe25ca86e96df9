"""Spool of readings: messages of components in segment files, until the server has stored them.

    <first position>.seg     a head, then readings; each with its length and checksum, so that a torn end is found

Readings are appended in groups, and each group is synced before it is acknowledged. A segment is written
by one process alone: after a start, the next group begins a segment, so that nothing is ever written behind a torn end.
Its head has what must survive the segments before it: the sequence of each instance, and what was dropped. A segment
goes once every reading of it is acknowledged and a later one exists; which readings were acknowledged is not stored, as
the server knows it.

Not thread-safe: one call at a time.
"""

import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, Literal

import msgspec

from agent import disk
from agent.disk import Write
from fleet.protocol import bounds, files
from fleet.protocol.bounds import KIB, MIB, Count, MessageData, MessageTopic, MessageType, Metadata, Word
from fleet.protocol.messages import Reading

SEGMENT_MAX_BYTES: Final = MIB
SEGMENTS_OF_ALL: Final = 8
"""A segment has at most this part of what may be kept, as readings are dropped by the segment."""

INSTANCES_MAX: Final = bounds.INSTANCES_MAX
"""Instances whose sequence is remembered; those that have published last."""

_EPOCH_BYTES: Final = 8
_RECORD: Final = struct.Struct(">II")
_RECORD_MAX_BYTES: Final = 2 * MIB
_SUFFIX: Final = ".seg"
_NAME_DIGITS: Final = 16


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """Message of a component that is to be kept.

    Attributes:
        session, number: by which the host names it, growing within a session of the host; it may come again.
    """

    instance: Word
    topic: MessageTopic
    data: MessageData = b""
    content_type: MessageType = ""
    metadata: Metadata = ()
    session: Word = ""
    number: Count = 0


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """First record of a segment.

    Attributes:
        first: position of its first reading.
        sequences: of the newest reading of each instance before this segment, those that published last at the end.
        session, number: of the newest message before this segment.
    """

    epoch: Word
    first: Count
    sequences: dict[str, Count] = {}
    dropped: Count = 0
    session: Word = ""
    number: Count = 0


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a reading: the reading itself, and by which name the host knows it."""

    reading: Reading
    session: Word = ""
    number: Count = 0


_heads: Final = msgspec.msgpack.Decoder(_Head)
_records: Final = msgspec.msgpack.Decoder(_Record)


@dataclass(slots=True)
class _Segment:
    """Segment on the disk: positions of its readings (`last` is `first - 1` for none), size, times of its readings."""

    path: Path
    first: int
    last: int
    size: int
    oldest: datetime | None = None
    newest: datetime | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of a spool: bytes in all, for how long, and what happens when there is no more room."""

    max_bytes: int = 64 * MIB
    keep: timedelta = timedelta(days=30)
    full: Literal["drop-oldest", "refuse"] = "drop-oldest"
    reserve_bytes: int = 0


@dataclass(slots=True)
class _Cursor:
    """Place of the reading after `position`, so that a segment is not read from its begin for each batch."""

    path: Path | None = None
    position: int = 0
    offset: int = 0


@dataclass(slots=True)
class Spool:
    """Readings that the server has not stored yet, in a directory.

    Attributes:
        epoch: another one for each new spool.
        acknowledged: position up to which the server has all readings, as far as it has said so since the start.
        dropped: readings that were given up, since the spool began.
        session, number: by which the host names the newest message that is kept.
    """

    directory: Path
    limits: Bounds = field(default_factory=Bounds)
    epoch: str = ""
    acknowledged: int = 0
    dropped: int = 0
    session: str = ""
    number: int = 0
    _segments: list[_Segment] = field(default_factory=list)
    _sequences: dict[str, int] = field(default_factory=dict)
    _next: int = 1
    _open: bool = False
    """True while the newest segment was begun by this process and may be continued."""
    _cursor: _Cursor = field(default_factory=_Cursor)

    @classmethod
    def open(cls, directory: Path, limits: Bounds) -> "Spool":
        """Read what an earlier process has left. Raises `OSError`."""
        spool = cls(directory, limits)
        disk.make_directory(Write.DIRECTORY, directory, mode=0o700)
        for path in sorted(directory.glob(f"*{_SUFFIX}")):
            spool._take_in(path)
        if spool._segments:
            spool._read_newest(spool._segments[-1])
        if not spool.epoch:
            spool.epoch = os.urandom(_EPOCH_BYTES).hex()
        spool.acknowledged = spool.first - 1
        return spool

    def _take_in(self, path: Path) -> None:
        """Read the begin of a segment; one without a head was cut off there, and has nothing that anybody relies on.

        How the segment before it ends follows from its head: only the newest is read to its end.
        """
        records = _scan(path)
        head = next(records, None)
        try:
            known = None if head is None else _heads.decode(head[1])
        except msgspec.MsgspecError:
            known = None
        if known is None or (self.epoch and known.epoch != self.epoch):
            disk.remove(Write.READINGS_DAMAGED, path)
            return
        self.epoch, self._sequences, self.dropped = known.epoch, dict(known.sequences), known.dropped
        self.session, self.number = known.session, known.number
        segment = _Segment(path, known.first, known.first - 1, path.stat().st_size)
        with suppress(msgspec.MsgspecError):
            for _, data in records:
                segment.oldest = _records.decode(data).reading.at
                break
        if self._segments:
            before = self._segments[-1]
            before.last, before.newest = known.first - 1, segment.oldest or before.oldest
        self._next = max(self._next, known.first)
        self._segments.append(segment)

    def _read_newest(self, segment: _Segment) -> None:
        """Read the newest segment to its end, torn or not."""
        with suppress(msgspec.MsgspecError):  # of a later version: whoever can read it reads no further either
            for number, (_, data) in enumerate(_scan(segment.path)):
                if number:  # behind the head
                    self._count(segment, _records.decode(data))
        self._next = max(self._next, segment.last + 1)

    def _count(self, segment: _Segment, record: _Record) -> None:
        reading = record.reading
        segment.last = reading.position
        segment.oldest, segment.newest = segment.oldest or reading.at, reading.at
        self._sequences.pop(reading.instance, None)  # the one that published last stands last
        self._sequences[reading.instance] = reading.sequence
        self.session, self.number = record.session, record.number

    # Kept readings

    @property
    def first(self) -> int:
        """Position of the oldest reading that is on the disk; of the next one where there is none."""
        return next((each.first for each in self._segments if each.last >= each.first), self._next)

    @property
    def newest(self) -> int:
        """Position of the newest reading that was kept; 0 for none."""
        return self._next - 1

    @property
    def waiting(self) -> int:
        """Readings that are not acknowledged."""
        return self._next - 1 - max(self.acknowledged, self.first - 1)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(each.size for each in self._segments)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the segments with readings that are not acknowledged."""
        return sum(each.size for each in self._segments if each.last > self.acknowledged)

    def oldest(self) -> datetime | None:
        """Return when the oldest reading that is not acknowledged was taken, to a segment; None for none."""
        return next((each.oldest for each in self._segments if each.last > self.acknowledged), None)

    def read(self, after: int, *, most: int, most_bytes: int) -> tuple[Reading, ...]:
        """Return readings after a position, oldest first, as many as fit, and at least one if there is one.

        Args:
            after: position.
            most: number of readings.
            most_bytes: of them as JSON.

        Raises:
            OSError: they cannot be read.
        """
        found: list[Reading] = []
        size = 0
        for segment in self._segments:
            if segment.last <= after:
                continue
            known = self._cursor.path == segment.path and self._cursor.position <= after
            for end, data in _scan(segment.path, self._cursor.offset if known else 0):
                try:
                    reading = _records.decode(data).reading
                except msgspec.MsgspecError:  # the head
                    continue
                if reading.position <= after:
                    continue
                if reading.position > segment.last:
                    break
                size += len(msgspec.json.encode(reading)) + 1
                if found and (size > most_bytes or len(found) >= most):
                    return tuple(found)
                found.append(reading)
                self._cursor = _Cursor(segment.path, reading.position, end)
        return tuple(found)

    # New readings

    def append(self, drafts: Sequence[Draft], *, now: datetime) -> tuple[int, str]:
        """Keep messages, in their order; return how many of them, and why those behind are not kept.

        Messages that are kept already, by the names of the host, count as kept.

        Raises:
            OSError: the disk cannot be written; some of them may be kept all the same.
        """
        new = [each for each in drafts if each.session != self.session or each.number > self.number]
        known = len(drafts) - len(new)
        kept: list[tuple[_Record, bytes]] = []
        why = ""
        size = 0
        sequences = dict(self._sequences)
        for draft in new:
            sequence = sequences[draft.instance] = sequences.get(draft.instance, 0) + 1
            record = self._record(draft, self._next + len(kept), sequence, now)
            data = _framed(record)
            if why := self._no_room(size + len(data)):
                break
            kept.append((record, data))
            size += len(data)
        if kept:
            self._write(kept)
        return known + len(kept), why

    def _record(self, draft: Draft, position: int, sequence: int, now: datetime) -> _Record:
        reading = Reading(
            position=position,
            instance=draft.instance,
            sequence=sequence,
            at=now,
            topic=draft.topic,
            data=draft.data,
            content_type=draft.content_type,
            metadata=draft.metadata,
        )
        return _Record(reading=reading, session=draft.session, number=draft.number)

    def _no_room(self, size: int) -> str:
        """Make room for some bytes if that is what the owner wants; return why there is none, empty if there is."""
        while self.size + size > self.limits.max_bytes:
            if not self._may_drop():
                return f"the device keeps at most {self.limits.max_bytes // KIB} KiB of messages"
            self._drop_oldest()
        while self.limits.reserve_bytes and shutil.disk_usage(self.directory).free < self.limits.reserve_bytes + size:
            if not self._may_drop():
                return "the device's disk is full"
            self._drop_oldest()
        return ""

    def _may_drop(self) -> bool:
        """Tell whether the oldest segment may go to make room for others."""
        if not self._segments or self._segments[0].last < self._segments[0].first:
            return False
        return self.limits.full == "drop-oldest" or self._segments[0].last <= self.acknowledged

    def _write(self, kept: list[tuple[_Record, bytes]]) -> None:
        data = b"".join(each for _, each in kept)
        most = min(SEGMENT_MAX_BYTES, self.limits.max_bytes // SEGMENTS_OF_ALL)
        begin = not self._open or not self._segments or self._segments[-1].size + len(data) > most
        if begin:
            data = _framed(self._head()) + data
            path = self.directory / f"{self._next:0{_NAME_DIGITS}}{_SUFFIX}"
            segment = _Segment(path, self._next, self._next - 1, 0)
        else:
            segment = self._segments[-1]
        self._open = False
        try:
            disk.append_synced(Write.READINGS, segment.path, data, begin=begin)
        except OSError:
            self._take_what_was_written(segment, begin=begin)
            raise
        self._open = True
        if begin:
            self._segments.append(segment)
        segment.size += len(data)
        for record, _ in kept:
            self._count(segment, record)
        self._next = segment.last + 1
        self._forget_acknowledged()

    def _head(self) -> _Head:
        return _Head(
            epoch=self.epoch,
            first=self._next,
            sequences=dict(list(self._sequences.items())[-INSTANCES_MAX:]),
            dropped=self.dropped,
            session=self.session,
            number=self.number,
        )

    def _take_what_was_written(self, segment: _Segment, *, begin: bool) -> None:
        """Note what a failed write has left: whole records are kept, also those that were refused."""
        if begin:
            with suppress(OSError):
                disk.remove(Write.READINGS_DAMAGED, segment.path, missing_ok=True)
            return
        for _, data in _scan(segment.path):
            with suppress(msgspec.MsgspecError):
                record = _records.decode(data)
                if record.reading.position > segment.last:
                    self._count(segment, record)
        with suppress(OSError):
            segment.size = segment.path.stat().st_size
        self._next = segment.last + 1

    # Readings that go

    def acknowledge(self, position: int) -> bool:
        """Note that the server has every reading up to a position; return whether that is news. Raises `OSError`."""
        position = min(position, self._next - 1)
        if position <= self.acknowledged:
            return False
        self.acknowledged = position
        self._forget_acknowledged()
        return True

    def rewind(self, position: int) -> None:
        """Go by what the server says that it has, which may be less than before: it may be made anew from a backup."""
        self.acknowledged = min(max(position, self.first - 1), self._next - 1)
        self._forget_acknowledged()

    def _forget_acknowledged(self) -> None:
        """Remove segments that are not needed any more; the newest stays, as its head has the sequences."""
        while len(self._segments) > 1 and self._segments[0].last <= self.acknowledged:
            self._remove_oldest()

    def expire(self, now: datetime) -> int:
        """Drop the segments whose newest reading is too old; return how many readings went. Raises `OSError`."""
        before = self.dropped
        while self._segments and (newest := self._segments[0].newest) is not None and newest < now - self.limits.keep:
            self._drop_oldest()
        return self.dropped - before

    def _drop_oldest(self) -> None:
        """Give up the oldest segment; the next one that is begun has the sequences."""
        segment = self._segments[0]
        self.dropped += max(0, segment.last - max(self.acknowledged, segment.first - 1))
        if len(self._segments) == 1:
            self._begin_empty()
        self._remove_oldest()

    def _begin_empty(self) -> None:
        """Begin a segment without readings, so that sequences and position outlive the last one with any."""
        path = self.directory / f"{self._next:0{_NAME_DIGITS}}{_SUFFIX}"
        data = _framed(self._head())
        disk.append_synced(Write.READINGS, path, data, begin=True)
        self._segments.append(_Segment(path, self._next, self._next - 1, len(data)))
        self._open = True

    def _remove_oldest(self) -> None:
        segment = self._segments.pop(0)
        disk.remove(Write.READINGS_REMOVED, segment.path, missing_ok=True)


def _framed(record: msgspec.Struct) -> bytes:
    data = msgspec.msgpack.encode(record)
    return _RECORD.pack(len(data), zlib.crc32(data)) + data


def _scan(path: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield each whole record from an offset on, with the offset behind it, up to a torn end. Raises `OSError`."""
    with files.open_to_read(path) as file:
        file.seek(offset)
        while True:
            head = file.read(_RECORD.size)
            if len(head) < _RECORD.size:
                return
            size, checksum = _RECORD.unpack(head)
            if not 0 < size <= _RECORD_MAX_BYTES:
                return
            data = file.read(size)
            if len(data) < size or zlib.crc32(data) != checksum:
                return
            offset += _RECORD.size + size
            yield offset, data
