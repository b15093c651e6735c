"""Archives that unpack to more than they are, reach outside, or show one reader what another does not see."""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import torch

from repfuse.samples import NotebookBlock

from .assembling import Member, pickled, read_archive, system, torch_archive, touching, write_archive, zeros
from .attack import Attack, fixed

HUGE = 1 << 30
DEFLATED = zipfile.ZIP_DEFLATED
Change = Callable[[list[Member]], Iterable[Member]]
Archive = Callable[[], list[Member]]


def network() -> list[Member]:
    """Return the members of a good file."""
    buffer = io.BytesIO()
    torch.save(NotebookBlock(), buffer)
    return [Member(path, data) for path, data in read_archive(buffer.getvalue()).items()]


def changed(change: Change, *, may_load: bool = False, of: Archive = network, **around: Any) -> Attack:
    return Attack(lambda _folder, _canary: write_archive(change(of()), **around), may_load=may_load)


def with_member(ending: str, *, may_load: bool = False, of: Archive = network, **fields: Any) -> Attack:
    """The good file, with lies about the member whose name ends so."""

    def change(members: list[Member]) -> Iterable[Member]:
        for member in members:
            if member.name.endswith(ending):
                vars(member).update({key: make(member) if callable(make) else make for key, make in fields.items()})
        return members

    return changed(change, may_load=may_load, of=of)


def also(path: str, data: bytes = b"x", *, may_load: bool = False, of: Archive = network, **fields: Any) -> Attack:
    return changed(lambda members: [*members, Member(path, data, **fields)], may_load=may_load, of=of)


def bomb(ending: str, size: int = HUGE, *, of: Archive = network) -> Attack:
    return with_member(ending, of=of, data=lambda _: zeros(size), method=DEFLATED, size=size, crc=0)


def quine(members: list[Member]) -> list[Member]:
    """Many members that are one and the same stretch of the file."""
    data = Member("archive/data/same", bytes(1 << 20))
    first = write_archive([data])
    offset = first.index(b"PK\3\4")
    return [data, *[Member(f"archive/data/{n}", b"", size=1 << 20, packed=1 << 20, offset=offset) for n in range(5000)]]


def two_faced(_folder: Any, canary: Any) -> bytes:
    """An archive whose two directories name two pickles: which of them is read depends on the reader."""
    good = write_archive(network())
    evil = torch_archive(pickled(system(touching(canary))))
    return good + evil


ARCHIVES = {
    "bomb: the pickle": bomb("data.pkl"),
    "bomb: a storage": bomb("data/0"),
    "bomb: the byte order": bomb("byteorder"),
    "bomb: the version": bomb("version"),
    "bomb: small and honest": with_member(
        "data/0", data=lambda _: zeros(64 << 20), method=DEFLATED, size=64 << 20, crc=0
    ),
    "bomb: members on one place": changed(quine),
    "bomb: a member of LZMA": with_member("data.pkl", method=zipfile.ZIP_LZMA),
    "bomb: an unknown method": with_member("data.pkl", method=99),
    "many members": changed(
        lambda ms: [*ms, *[Member(f"archive/data/x{n}", b"") for n in range(10_000)]], may_load=True
    ),
    "traversal": also("archive/../../../canary", may_load=True),
    "traversal by the root": changed(
        lambda ms: [Member(m.name.replace("archive/", "../"), m.data) for m in ms], may_load=True
    ),
    "absolute name": also("/tmp/canary"),
    "backslashes": also("archive\\..\\canary"),
    "drive": also("archive/C:\\canary", may_load=True),
    "NUL in a name": also("archive/data/0\0.txt", may_load=True),
    "link": also("archive/data/9", b"/etc/passwd", attributes=(stat.S_IFLNK | 0o777) << 16, may_load=True),
    "the pickle is a link": with_member("data.pkl", data=b"/etc/passwd", attributes=(stat.S_IFLNK | 0o777) << 16),
    "one name twice": changed(lambda members: [*members, members[0]]),
    "one name twice, but for case": also("ARCHIVE/DATA.PKL"),
    "two pickles": also("other/data.pkl"),
    "another folder first": changed(lambda members: [Member("other/x", b""), *members]),
    "encrypted": with_member("data.pkl", flags=1),
    "size beyond the file": with_member("data/0", size=1 << 31, packed=1 << 31),
    "size of 4 GB": with_member("data/0", size=(1 << 32) - 1, packed=(1 << 32) - 1),
    "offset beyond the file": with_member("data/0", offset=(1 << 32) - 2),
    "offset into another member": with_member("data/0", offset=0, may_load=True),
    "another name in the local header": with_member("data.pkl", local_name="archive/other.pkl"),
    "another size in the local header": with_member("data.pkl", local_size=7, may_load=True),
    "wrong checksum": with_member("data.pkl", crc=7),
    "more entries than there are": changed(lambda members: members, count=60_000),
    "fewer entries than there are": changed(lambda members: members, count=1),
    "a directory elsewhere": changed(lambda members: members, directory=7),
    "a comment": changed(lambda members: members, comment=b"PK\5\6" + bytes(40)),
    "bytes behind": changed(lambda members: members, behind=b"x" * 50, may_load=True),
    "another archive before": Attack(two_faced),
    "only the beginning": Attack(fixed(b"PK\3\4")),
    "no members": Attack(fixed(b"PK\3\4" + bytes(40) + write_archive([]))),
    "a storage for a folder": changed(lambda ms: [*ms, Member("archive/data/0/x", b"x")], may_load=True),
}
