"""A shared directory, as a guest's kernel uses it."""

import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pileus.fs import abi
from pileus.fs.identity import Ids
from tests.unit.fs.client import Client, served

Share = Callable[..., Client]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
NOREPLACE, EXCHANGE = 1, 2
END = (1 << 63) - 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o755)
    (tmp_path / "secret").write_text("not for guests")
    return folder


@pytest.fixture
def share(folder: Path) -> Iterator[Share]:
    drivers = []
    before = sorted(os.listdir("/proc/self/fd"), key=int)
    umask = os.umask(0)

    def share(**about: object) -> Client:
        _, driver, client = served(folder, **about)
        drivers.append(driver)
        return client

    yield share
    os.umask(umask)
    for driver in drivers:
        driver.close()
    assert sorted(os.listdir("/proc/self/fd"), key=int) == before


@pytest.fixture
def client(share: Share) -> Client:
    return share()


def test_a_file_is_made_written_and_read(client: Client, folder: Path) -> None:
    node, handle = client.create("file", mode=0o640)
    assert client.write(handle, b"some text") == 9
    assert client.write(handle, b"TEXT", 5) == 4
    assert client.read(handle, 100) == b"some TEXT"
    assert client.read(handle, 3, 5) == b"TEX"
    assert client.read(handle, 10, 100) == b""
    client.ask(abi.FLUSH, node.id, abi.FLUSH_IN.pack(handle, 1))
    client.ask(abi.FSYNC, node.id, abi.FSYNC_IN.pack(handle, abi.FSYNC_DATA))
    client.ask(abi.FSYNC, node.id, abi.FSYNC_IN.pack(handle, 0))
    client.release(handle)
    assert (folder / "file").read_bytes() == b"some TEXT"
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o640
    assert client.attributes(node.id).size == 9


def test_an_open_file_that_was_released_is_none(client: Client) -> None:
    _, handle = client.create("file")
    client.release(handle)
    for attempt in (lambda: client.read(handle, 1), lambda: client.write(handle, b"x")):
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            attempt()


def test_what_the_host_writes_is_read(client: Client, folder: Path) -> None:
    data = os.urandom(3 << 20)
    (folder / "big").write_bytes(data)
    handle = client.open(client.look_up("big").id)
    read = b"".join(client.read(handle, 1 << 20, at << 20) for at in range(3))
    assert read == data


def test_a_tree_is_walked(client: Client, folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "c").write_text("deep")
    node = client.walk("a/b/c")
    assert client.read(client.open(node.id), 10) == b"deep"
    assert node.about.ino == (folder / "a/b/c").stat().st_ino
    with pytest.raises(FileNotFoundError):
        client.walk("a/c")
    with pytest.raises(NotADirectoryError):
        client.walk("a/b/c/d")


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("size", [200, 1 << 16])
def test_a_directory_of_many_is_read_whole(client: Client, folder: Path, size: int, plus: bool) -> None:
    for number in range(1000):
        (folder / f"file{number}").touch()
    names = client.names(size=size + (152 if plus else 0), plus=plus)
    assert sorted(names) == sorted([".", "..", *os.listdir(folder)])


def test_names_change(client: Client, folder: Path) -> None:
    client.create("one")
    client.make_directory("sub")
    sub = client.look_up("sub").id
    client.rename("one", "two", target=sub)
    assert os.listdir(folder / "sub") == ["two"]
    client.create("three")
    with pytest.raises(FileExistsError):
        client.rename("two", "three", source=sub, flags=NOREPLACE)
    client.rename("two", "three", source=sub, flags=EXCHANGE)
    names = b"three\0four\0"
    client.ask(abi.RENAME, 1, abi.RENAME_IN.pack(1) + names)
    assert sorted(os.listdir(folder)) == ["four", "sub"]
    client.unlink("two", sub)
    client.ask(abi.RMDIR, 1, b"sub\0")
    assert os.listdir(folder) == ["four"]


def test_a_file_without_a_name_lives_while_it_is_open(client: Client, folder: Path) -> None:
    node, handle = client.create("file")
    client.unlink("file")
    client.write(handle, b"still here")
    assert client.read(client.open(node.id), 20) == b"still here"
    assert client.attributes(node.id).nlink == 0


def test_links(client: Client, folder: Path) -> None:
    client.create("file")
    link = client.link_to("file", "soft")
    assert client.ask(abi.READLINK, link.id) == b"file"
    node = client.look_up("file")
    client.ask(abi.LINK, 1, abi.LINK_IN.pack(node.id) + b"hard\0")
    assert client.look_up("hard").id == node.id
    assert client.attributes(node.id).nlink == 2
    client.ask(abi.LINK, 1, abi.LINK_IN.pack(link.id) + b"soft2\0")
    assert os.readlink(folder / "soft2") == "file"


def test_attributes_are_set(client: Client, folder: Path) -> None:
    node, handle = client.create("file")
    client.write(handle, b"12345678")
    about = client.set_attributes(node.id, abi.SET_MODE | abi.SET_SIZE, mode=0o600, size=4)
    assert (stat.S_IMODE(about.mode), about.size) == (0o600, 4)
    about = client.set_attributes(node.id, abi.SET_SIZE | abi.SET_HANDLE, handle=handle, size=6)
    assert about.size == 6
    valid = abi.SET_ATIME | abi.SET_MTIME
    about = client.set_attributes(node.id, valid, atime=1, atime_ns=2, mtime=3, mtime_ns=4)
    assert (about.atime, about.atime_ns, about.mtime, about.mtime_ns) == (1, 2, 3, 4)
    before = time.time()
    about = client.set_attributes(node.id, abi.SET_MTIME | abi.SET_MTIME_NOW)
    assert about.mtime >= int(before)
    assert about.atime == 1
    about = client.set_attributes(node.id, abi.SET_ATIME, atime=(1 << 64) - 5, atime_ns=1)
    assert (folder / "file").stat().st_atime_ns == -5 * 10**9 + 1


@root_only
def test_files_belong_to_the_guests_user(client: Client, folder: Path) -> None:
    client.uid, client.gid = 1000, 1001
    client.create("file")
    client.make_directory("sub")
    client.link_to("file", "link")
    client.make("pipe", stat.S_IFIFO | 0o600)
    for name in os.listdir(folder):
        about = (folder / name).lstat()
        assert (about.st_uid, about.st_gid) == (1000, 1001), name
    node = client.look_up("link")
    client.set_attributes(node.id, abi.SET_UID | abi.SET_GID, uid=5, gid=6)
    assert ((folder / "link").lstat().st_uid, (folder / "file").lstat().st_uid) == (5, 1000)


@root_only
def test_a_directory_with_set_group_id_gives_its_group(client: Client, folder: Path) -> None:
    node = client.make_directory("team", mode=0o775)
    client.set_attributes(node.id, abi.SET_GID, gid=50)
    client.set_attributes(node.id, abi.SET_MODE, mode=0o2775)
    client.uid, client.gid = 1000, 1000
    client.create("file", parent=node.id)
    client.make_directory("sub", parent=node.id)
    assert (folder / "team/file").stat().st_gid == (folder / "team/sub").stat().st_gid == 50
    assert (folder / "team/sub").stat().st_mode & stat.S_ISGID
    assert (folder / "team/file").stat().st_uid == 1000


@root_only
def test_users_are_mapped(share: Share, folder: Path) -> None:
    client = share(uids=Ids(((0, 100000, 1000),)), gids=Ids(((0, 200000, 1000),)))
    client.uid, client.gid = 7, 8
    node, _ = client.create("file")
    about = (folder / "file").stat()
    assert (about.st_uid, about.st_gid) == (100007, 200008)
    assert (client.attributes(node.id).uid, client.attributes(node.id).gid) == (7, 8)
    os.chown(folder / "file", 0, 0)
    assert client.attributes(node.id).uid == 65534
    client.uid = 1000
    with pytest.raises(PermissionError):
        client.create("other")
    with pytest.raises(PermissionError):
        client.set_attributes(node.id, abi.SET_UID, uid=5000)
    assert os.listdir(folder) == ["file"]


@root_only
def test_special_files_are_made_and_not_opened(client: Client, folder: Path) -> None:
    node = client.make("null", stat.S_IFCHR | 0o666, device=0x103)
    assert (folder / "null").stat().st_rdev == os.makedev(1, 3)
    assert node.about.rdev == 0x103
    for name, mode in (("pipe", stat.S_IFIFO), ("socket", stat.S_IFSOCK)):
        client.make(name, mode | 0o600)
    for name in ("null", "pipe", "socket"):
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            client.open(client.look_up(name).id)
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            client.create(name)


def test_extended_attributes(client: Client, folder: Path) -> None:
    node, _ = client.create("file")

    def put(name: bytes, value: bytes, flags: int = 0) -> None:
        client.ask(abi.SETXATTR, node.id, abi.SETXATTR_IN.pack(len(value), flags) + name + b"\0" + value)

    put(b"user.colour", b"red")
    assert os.getxattr(folder / "file", "user.colour") == b"red"
    ask = abi.GETXATTR_IN.pack
    assert client.ask(abi.GETXATTR, node.id, ask(0) + b"user.colour\0") == abi.GETXATTR_OUT.pack(3)
    assert client.ask(abi.GETXATTR, node.id, ask(3) + b"user.colour\0") == b"red"
    with pytest.raises(OSError, match=os.strerror(errno.ERANGE)):
        client.ask(abi.GETXATTR, node.id, ask(2) + b"user.colour\0")
    with pytest.raises(FileExistsError):
        put(b"user.colour", b"blue", os.XATTR_CREATE)
    assert client.ask(abi.LISTXATTR, node.id, ask(100)) == b"user.colour\0"
    client.ask(abi.REMOVEXATTR, node.id, b"user.colour\0")
    assert os.listxattr(folder / "file") == []
    for name in (b"trusted.overlay.opaque", b"system.posix_acl_access"):
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            put(name, b"y")


def test_extended_attributes_can_be_off(share: Share) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        share(xattr=False).ask(abi.LISTXATTR, 1, abi.GETXATTR_IN.pack(0))


def test_space_is_allocated_and_holes_are_found(client: Client, folder: Path) -> None:
    node, handle = client.create("file")
    client.ask(abi.FALLOCATE, node.id, abi.FALLOCATE_IN.pack(handle, 0, 1 << 20, 0))
    assert client.attributes(node.id).size == 1 << 20
    client.write(handle, b"x" * 4096, 1 << 19)
    client.ask(abi.FALLOCATE, node.id, abi.FALLOCATE_IN.pack(handle, 1 << 19, 4096, 0x01 | 0x02))
    assert client.read(handle, 4096, 1 << 19) == bytes(4096)
    answer = client.ask(abi.LSEEK, node.id, abi.LSEEK_IN.pack(handle, 1 << 19, os.SEEK_HOLE))
    assert abi.LSEEK_OUT.unpack(answer)[0] >= 1 << 19
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        client.ask(abi.LSEEK, node.id, abi.LSEEK_IN.pack(handle, 0, os.SEEK_END))


def test_a_range_is_copied_within_the_host(client: Client, folder: Path) -> None:
    _, source = client.create("source")
    target, handle = client.create("target")
    client.write(source, b"0123456789")
    body = abi.COPY_FILE_RANGE_IN.pack(source, 2, target.id, handle, 4, 5, 0)
    assert abi.WRITE_OUT.unpack(client.ask(abi.COPY_FILE_RANGE, 1, body)) == (5,)
    assert (folder / "target").read_bytes() == bytes(4) + b"23456"


def test_the_file_system_tells_its_size(client: Client, folder: Path) -> None:
    about = os.statvfs(folder)
    answer = abi.STATFS_OUT.unpack(client.ask(abi.STATFS, 1))
    assert (answer[0], answer[3], answer[7]) == (about.f_blocks, about.f_files, about.f_frsize)
    client.ask(abi.SYNCFS, 1, bytes(8))


def test_a_driver_that_forgets_costs_nothing(share: Share, folder: Path) -> None:
    client = share()
    for number in range(100):
        (folder / f"file{number}").touch()
    before = len(os.listdir("/proc/self/fd"))
    nodes = [client.look_up(f"file{number}") for number in range(100)]
    assert client.look_up("file0").id == nodes[0].id
    assert len(os.listdir("/proc/self/fd")) == before + 100
    client.forget(nodes[0].id, 1)
    assert client.attributes(nodes[0].id).size == 0
    client.forget(nodes[0].id, 1)
    with pytest.raises(FileNotFoundError):
        client.attributes(nodes[0].id)
    pairs = b"".join(abi.FORGET_ONE.pack(node.id, 1000) for node in nodes[1:])
    client.send(abi.BATCH_FORGET, 0, abi.BATCH_FORGET_IN.pack(99) + pairs, room=0, queue=0)
    client.driver.wait(0)
    assert len(os.listdir("/proc/self/fd")) == before
    client.forget(1, 1 << 40)
    assert client.look_up("file5").about.size == 0


def test_a_new_session_finds_nothing_open(client: Client) -> None:
    node, handle = client.create("file")
    client.begin()
    for attempt in (lambda: client.attributes(node.id), lambda: client.read(handle, 1)):
        with pytest.raises(OSError, match=f"{os.strerror(errno.ENOENT)}|{os.strerror(errno.EBADF)}"):
            attempt()


# -- read only ------------------------------------------------------------------------------------


def test_a_read_only_directory_stays_as_it_is(share: Share, folder: Path) -> None:
    (folder / "file").write_text("text")
    client = share(readonly=True)
    node = client.look_up("file")
    attempts: list[Callable[[], object]] = [
        lambda: client.create("new"),
        lambda: client.make_directory("new"),
        lambda: client.link_to("file", "new"),
        lambda: client.make("new", stat.S_IFREG),
        lambda: client.unlink("file"),
        lambda: client.rename("file", "new"),
        lambda: client.open(node.id, os.O_RDWR),
        lambda: client.open(node.id, os.O_RDONLY | os.O_TRUNC),
        lambda: client.set_attributes(node.id, abi.SET_MODE, mode=0),
        lambda: client.ask(abi.LINK, 1, abi.LINK_IN.pack(node.id) + b"new\0"),
        lambda: client.ask(abi.REMOVEXATTR, node.id, b"user.x\0"),
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            attempt()
    assert client.read(client.open(node.id), 10) == b"text"
    assert os.listdir(folder) == ["file"]


# -- nobody leaves --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["..", ".", "", "../secret", "sub/../../secret", "/etc/passwd", "a" * 256])
def test_a_name_is_one_component(client: Client, folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    before = sorted(os.listdir(folder.parent))
    attempts: list[Callable[[], object]] = [
        lambda: client.look_up(name),
        lambda: client.create(name),
        lambda: client.make_directory(name),
        lambda: client.link_to("x", name),
        lambda: client.unlink(name),
        lambda: client.rename("sub", name),
        lambda: client.rename(name, "new"),
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match=f"{os.strerror(errno.EINVAL)}|{os.strerror(errno.ENAMETOOLONG)}"):
            attempt()
    assert sorted(os.listdir(folder.parent)) == before


def test_a_link_is_a_link(client: Client, folder: Path) -> None:
    (folder / "out").symlink_to("../secret")
    (folder / "up").symlink_to("..")
    for name in ("out", "up"):
        node = client.look_up(name)
        assert stat.S_ISLNK(node.about.mode)
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            client.open(node.id)
        with pytest.raises(NotADirectoryError):
            client.look_up("secret", node.id)
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        client.create("out", os.O_RDWR | os.O_TRUNC)
    assert (folder.parent / "secret").read_text() == "not for guests"
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        client.set_attributes(client.look_up("out").id, abi.SET_SIZE, size=0)
    client.set_attributes(client.look_up("out").id, abi.SET_MTIME, mtime=1)
    assert (folder.parent / "secret").stat().st_mtime > 1


def test_a_name_that_becomes_a_link_all_the_time_never_leads_out(client: Client, folder: Path) -> None:
    (folder / "dir").mkdir()
    (folder / "dir" / "secret").write_text("inside")
    (folder / "other").symlink_to("..")
    stop = threading.Event()

    def swap() -> None:
        import pileus.fs._calls as calls

        fd = os.open(folder, os.O_RDONLY)
        while not stop.is_set():
            calls.rename(fd, b"dir", fd, b"other", EXCHANGE)
        os.close(fd)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        seen = set()
        for _ in range(2000):
            node = client.look_up("dir")
            if stat.S_ISDIR(node.about.mode):
                found = client.look_up("secret", node.id)
                seen.add(client.read(client.open(found.id), 20))
            client.forget(node.id, 1)
    finally:
        stop.set()
        thread.join()
    assert seen == {b"inside"}


def test_a_directory_that_is_moved_away_leads_nowhere_else(client: Client, folder: Path) -> None:
    (folder / "dir").mkdir()
    node = client.look_up("dir")
    (folder / "dir").rename(folder.parent / "moved")
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        client.look_up("..", node.id)


# -- locks ----------------------------------------------------------------------------------------


def test_locks_are_the_guests_own_unless_asked_for(share: Share) -> None:
    assert not share().begin() & (abi.POSIX_LOCKS | abi.FLOCK_LOCKS)
    assert share(locks=True).begin() & abi.POSIX_LOCKS


def test_owners_exclude_each_other_and_programs_of_the_host(share: Share, folder: Path) -> None:
    client = share(locks=True)
    node, handle = client.create("file")
    client.lock(node.id, handle, 1, fcntl.F_WRLCK, start=0, end=99)
    client.lock(node.id, handle, 2, fcntl.F_WRLCK, start=100, end=199)
    with pytest.raises(BlockingIOError):
        client.lock(node.id, handle, 2, fcntl.F_RDLCK, start=50, end=60)
    answer = client.lock(node.id, handle, 2, fcntl.F_RDLCK, start=50, end=60, opcode=abi.GETLK)
    assert abi.LOCK_OUT.unpack(answer)[:3] == (0, 99, fcntl.F_WRLCK)
    with (folder / "file").open("r+b") as file, pytest.raises(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 20)
    client.ask(abi.FLUSH, node.id, abi.FLUSH_IN.pack(handle, 1))  # owner 1 closes it
    client.lock(node.id, handle, 2, fcntl.F_RDLCK, start=50, end=60)
    answer = client.lock(node.id, handle, 1, fcntl.F_WRLCK, start=300, end=END, opcode=abi.GETLK)
    assert abi.LOCK_OUT.unpack(answer)[2] == fcntl.F_UNLCK


def test_who_waits_for_a_lock_has_it_when_it_is_free_and_holds_up_nobody(share: Share, folder: Path) -> None:
    client = share(locks=True)
    node, handle = client.create("file")
    other = client.open(node.id, os.O_RDWR)
    client.lock(node.id, handle, 1, fcntl.F_WRLCK)
    body = abi.LOCK_IN.pack(other, 2, 0, END, fcntl.F_WRLCK, 1, 0)
    waiting = client.send(abi.SETLKW, node.id, body)
    assert client.attributes(node.id).size == 0
    client.lock(node.id, handle, 1, fcntl.F_UNLCK)
    client.driver.wait(1)
    assert abi.OUT_HEADER.unpack_from(client.driver.read(waiting, 1))[1] == 0
    with pytest.raises(BlockingIOError):
        client.lock(node.id, handle, 1, fcntl.F_WRLCK)


def test_who_waits_for_a_lock_can_be_interrupted(share: Share) -> None:
    client = share(locks=True)
    node, handle = client.create("file")
    other = client.open(node.id, os.O_RDWR)
    client.lock(node.id, handle, 1, fcntl.F_WRLCK, flags=abi.LOCK_FLOCK)
    body = abi.LOCK_IN.pack(other, 2, 0, END, fcntl.F_WRLCK, 1, abi.LOCK_FLOCK)
    waiting = client.send(abi.SETLKW, node.id, body)
    unique = client.unique
    client.send(abi.INTERRUPT, 0, abi.INTERRUPT_IN.pack(unique), room=0, queue=0)
    client.driver.wait(1)
    assert abi.OUT_HEADER.unpack_from(client.driver.read(waiting, 1))[1] == -errno.EINTR


# -- DAX ------------------------------------------------------------------------------------------


class FakeMapper:
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def map(self, region: int, fd: int, at: int, offset: int, length: int, writable: bool) -> None:
        self.calls.append((region, os.fstat(fd).st_ino, at, offset, length, writable))

    def unmap(self, region: int, offset: int, length: int) -> None:
        self.calls.append((region, offset, length))


def mapped(folder: Path, **about: object) -> tuple[Client, FakeMapper, Callable[[], None]]:
    device, driver, client = served(folder, **about)
    mapper = device.mapper = FakeMapper()
    driver.start()
    assert client.begin() & abi.MAP_ALIGNMENT
    return client, mapper, driver.close


def test_files_are_mapped_where_the_driver_wants_them(folder: Path) -> None:
    (folder / "file").write_bytes(bytes(1 << 16))
    client, mapper, close = mapped(folder)
    node = client.look_up("file")
    ask = abi.SETUPMAPPING_IN.pack
    client.ask(abi.SETUPMAPPING, node.id, ask(abi.NO_HANDLE, 4096, 8192, abi.MAPPING_WRITE, 1 << 21))
    client.ask(abi.SETUPMAPPING, node.id, ask(abi.NO_HANDLE, 0, 4096, 0, 0))
    body = abi.REMOVEMAPPING_IN.pack(2) + abi.REMOVEMAPPING_ONE.pack(0, 4096)
    client.ask(abi.REMOVEMAPPING, node.id, body + abi.REMOVEMAPPING_ONE.pack(1 << 21, 8192))
    ino = node.about.ino
    assert mapper.calls == [
        (0, ino, 4096, 1 << 21, 8192, True),
        (0, ino, 0, 0, 4096, False),
        (0, 0, 4096),
        (0, 1 << 21, 8192),
    ]
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        client.ask(abi.SETUPMAPPING, node.id, ask(abi.NO_HANDLE, 1, 4096, 0, 0))
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        client.ask(abi.REMOVEMAPPING, node.id, abi.REMOVEMAPPING_IN.pack(1000))
    close()


def test_a_read_only_directory_is_not_mapped_for_writing(folder: Path) -> None:
    (folder / "file").write_bytes(bytes(4096))
    client, mapper, close = mapped(folder, readonly=True)
    node = client.look_up("file")
    body = abi.SETUPMAPPING_IN.pack(abi.NO_HANDLE, 0, 4096, abi.MAPPING_WRITE, 0)
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        client.ask(abi.SETUPMAPPING, node.id, body)
    assert mapper.calls == []
    close()


def test_without_a_window_nothing_is_mapped(client: Client) -> None:
    assert not client.begin() & abi.MAP_ALIGNMENT
    node, _ = client.create("file")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        client.ask(abi.SETUPMAPPING, node.id, abi.SETUPMAPPING_IN.pack(abi.NO_HANDLE, 0, 4096, 0, 0))
