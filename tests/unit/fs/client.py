"""A driver of a shared directory: each method is a request of FUSE, and raises OSError as a kernel would."""

import os
from pathlib import Path

from pileus.fs import abi
from pileus.testing import FakeDriver
from pileus.virtio.devices.fs import Fs

URGENT, REQUESTS = 0, 1
ROOM = 1 << 16
USER, GROUP = 0, 0
SETATTR_FIELDS = (
    "size", "lock_owner", "atime", "mtime", "ctime", "atime_ns", "mtime_ns", "ctime_ns", "mode", "uid", "gid",
)  # fmt: skip


class Node:
    """An inode as LOOKUP told it."""

    def __init__(self, entry: bytes) -> None:
        self.id, self.generation, self.entry_valid, self.attr_valid, *_ = abi.ENTRY_OUT.unpack_from(entry)
        self.about = About(entry[abi.ENTRY_OUT.size :])


class About:
    def __init__(self, attributes: bytes) -> None:
        fields = abi.ATTRIBUTES.unpack_from(attributes)
        self.ino, self.size, self.blocks, self.atime, self.mtime, self.ctime = fields[:6]
        self.atime_ns, self.mtime_ns, self.ctime_ns = fields[6:9]
        self.mode, self.nlink, self.uid, self.gid, self.rdev, self.blksize, _ = fields[9:]


class Client:
    """Asks on the queue for requests. ``uid`` and ``gid`` are whose the next requests are."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.uid, self.gid = USER, GROUP
        self.unique = 0

    def send(self, opcode: int, node: int, body: bytes = b"", room: int = ROOM, queue: int = REQUESTS) -> int:
        """The head of the chain."""
        self.unique += 1
        length = abi.IN_HEADER.size + len(body)
        header = abi.IN_HEADER.pack(length, opcode, self.unique, node, self.uid, self.gid, 1, 0)
        sizes = [abi.OUT_HEADER.size, room] if room else []
        head = self.driver.add([header, body] if body else [header], sizes, queue=queue)
        self.driver.kick(queue)
        return head

    def ask(self, opcode: int, node: int, body: bytes = b"", room: int = ROOM) -> bytes:
        head = self.send(opcode, node, body, room)
        unique = self.unique
        self.driver.wait(REQUESTS)
        answer = self.driver.read(head, REQUESTS)
        length, error, told = abi.OUT_HEADER.unpack_from(answer)
        assert told == unique
        assert length <= len(answer)
        if error:
            raise OSError(-error, os.strerror(-error))
        return answer[abi.OUT_HEADER.size : length]

    def begin(self, flags: int = 0xFFFFFFFF) -> int:
        """INIT; the flags agreed on."""
        answer = self.ask(abi.INIT, 0, abi.INIT_IN.pack(7, 38, 1 << 17, flags))
        version, _, _, agreed, *_ = abi.INIT_OUT.unpack(answer)
        assert version == 7
        return int(agreed)

    def look_up(self, name: str, parent: int = 1) -> Node:
        return Node(self.ask(abi.LOOKUP, parent, os.fsencode(name) + b"\0"))

    def walk(self, path: str) -> Node:
        node = None
        for name in path.split("/"):
            node = self.look_up(name, node.id if node else 1)
        assert node
        return node

    def attributes(self, node: int) -> About:
        return About(self.ask(abi.GETATTR, node, abi.GETATTR_IN.pack(0, 0))[abi.ATTR_OUT.size :])

    def set_attributes(self, node: int, valid: int, **fields: int) -> About:
        values = [fields.get(name, 0) for name in SETATTR_FIELDS]
        body = abi.SETATTR_IN.pack(valid, fields.get("handle", 0), *values)
        return About(self.ask(abi.SETATTR, node, body)[abi.ATTR_OUT.size :])

    def make(self, name: str, mode: int, parent: int = 1, device: int = 0) -> Node:
        return Node(
            self.ask(abi.MKNOD, parent, abi.MKNOD_IN.pack(mode, device, 0) + os.fsencode(name) + b"\0")
        )

    def make_directory(self, name: str, parent: int = 1, mode: int = 0o755) -> Node:
        return Node(self.ask(abi.MKDIR, parent, abi.MKDIR_IN.pack(mode, 0) + os.fsencode(name) + b"\0"))

    def link_to(self, target: str, name: str, parent: int = 1) -> Node:
        body = os.fsencode(name) + b"\0" + os.fsencode(target) + b"\0"
        return Node(self.ask(abi.SYMLINK, parent, body))

    def rename(self, old: str, new: str, source: int = 1, target: int = 1, flags: int = 0) -> None:
        names = os.fsencode(old) + b"\0" + os.fsencode(new) + b"\0"
        self.ask(abi.RENAME2, source, abi.RENAME2_IN.pack(target, flags) + names)

    def unlink(self, name: str, parent: int = 1) -> None:
        self.ask(abi.UNLINK, parent, os.fsencode(name) + b"\0")

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        return int(abi.OPEN_OUT.unpack(self.ask(abi.OPEN, node, abi.OPEN_IN.pack(flags, 0)))[0])

    def create(
        self, name: str, flags: int = os.O_RDWR, mode: int = 0o644, parent: int = 1
    ) -> tuple[Node, int]:
        body = abi.CREATE_IN.pack(flags | os.O_CREAT, mode, 0, 0) + os.fsencode(name) + b"\0"
        answer = self.ask(abi.CREATE, parent, body)
        entry = abi.ENTRY_OUT.size + abi.ATTRIBUTES.size
        return Node(answer), int(abi.OPEN_OUT.unpack(answer[entry:])[0])

    def release(self, handle: int, opcode: int = abi.RELEASE) -> None:
        self.ask(opcode, 1, abi.RELEASE_IN.pack(handle, 0, 0, 0))

    def read(self, handle: int, size: int, offset: int = 0) -> bytes:
        return self.ask(abi.READ, 1, abi.READ_IN.pack(handle, offset, size, 0, 0, 0), room=size)

    def write(self, handle: int, data: bytes, offset: int = 0) -> int:
        body = abi.WRITE_IN.pack(handle, offset, len(data), 0, 0, 0) + data
        return int(abi.WRITE_OUT.unpack(self.ask(abi.WRITE, 1, body))[0])

    def forget(self, node: int, lookups: int) -> None:
        self.send(abi.FORGET, node, abi.FORGET_IN.pack(lookups), room=0, queue=URGENT)
        self.driver.wait(URGENT)

    def names(self, node: int = 1, size: int = ROOM, plus: bool = False) -> list[str]:
        """All of a directory, in as many pieces as it takes."""
        handle = abi.OPEN_OUT.unpack(self.ask(abi.OPENDIR, node, abi.OPEN_IN.pack(0, 0)))[0]
        names, offset = [], 0
        while True:
            body = abi.READ_IN.pack(handle, offset, size, 0, 0, 0)
            answer = self.ask(abi.READDIRPLUS if plus else abi.READDIR, node, body)
            if not answer:
                break
            at = 0
            while at < len(answer):
                at += abi.ENTRY_OUT.size + abi.ATTRIBUTES.size if plus else 0
                _, offset, length, _ = abi.DIRENT.unpack_from(answer, at)
                at += abi.DIRENT.size
                names.append(os.fsdecode(answer[at : at + length]))
                at += length + -(abi.DIRENT.size + length) % abi.ALIGN
        self.release(handle, abi.RELEASEDIR)
        return names

    def lock(
        self, node: int, handle: int, owner: int, kind: int, *, opcode: int = abi.SETLK, flags: int = 0,
        start: int = 0, end: int = (1 << 63) - 1,
    ) -> bytes:  # fmt: skip
        return self.ask(opcode, node, abi.LOCK_IN.pack(handle, owner, start, end, kind, 1, flags))


def served(folder: Path, **about: object) -> tuple[Fs, FakeDriver, Client]:
    """The device, with a driver and its client; closing the driver closes the device."""
    from pileus.fs.identity import Ids
    from pileus.fs.session import Session

    ids = {name: about.pop(name, Ids()) for name in ("uids", "gids")}
    root = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    session = Session(root, ids["uids"], ids["gids"], **about)  # type: ignore[arg-type]
    device = Fs("fs0", session, "shared", 1, 128)
    driver = FakeDriver(device)
    client = Client(driver)
    client.begin()
    return device, driver, client
