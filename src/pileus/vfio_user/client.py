"""A device that another process emulates: the client's end, as a back-end of ``pileus.vfio``.

A thread of its own hears what the server says: answers, which it hands to whoever waits, and requests for the
guest's memory. A server that dies, hangs or breaks the protocol is left: from then on its device reads as
ones, an error in the log says why, and nothing else happens to the VM.
"""

import _thread
import errno
import fcntl
import json
import os
import socket
import time

from pileus import log
from pileus.errors import ConfigError, HostError, PileusError, RemoteProtocolError
from pileus.memory import Region
from pileus.vfio import abi
from pileus.vfio_user.connection import Connection, close_all
from pileus.vfio_user.protocol import (
    ERROR,
    MAJOR,
    MAX_DMA_MAPS,
    MAX_FDS,
    MAX_TRANSFER,
    MINOR,
    PAGE_SIZE,
    REPLY,
    Command,
    Message,
    capabilities,
    number,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pileus.memory import GuestMemory

    class Mapping(Protocol):
        """Of memory.Region, what a server is told."""

        fd: int
        offset: int
        size: int


PATIENCE = 5.0  # seconds for a server to be there when the VM is built
FIRST_DELAY, LAST_DELAY = 0.01, 0.5  # seconds between attempts, each twice the one before
TIMEOUT = 5.0  # seconds for an answer
RESET_TIMEOUT = 20.0  # a reset may take its time
STACK_SIZE = 256 << 10
TRIGGER = abi.DATA_EVENTFD | abi.ACTION_TRIGGER
DISABLE = abi.DATA_NONE | abi.ACTION_TRIGGER


def connect(option: str, path: str, patience: float = PATIENCE) -> "socket.socket":
    """A socket on which a server answers at ``path``. Raises ConfigError where none is there in time."""
    deadline, delay = time.monotonic() + patience, FIRST_DELAY
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(patience)
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            sock.close()
            if time.monotonic() + delay > deadline:
                raise ConfigError(option, path, "no server is there") from error
        except OSError as error:
            sock.close()
            raise HostError("connect to", path, error) from error
        time.sleep(delay)
        delay = min(2 * delay, LAST_DELAY)


class Answer:
    """What somebody waits for: the lock is held until it is there."""

    __slots__ = ("fds", "lock", "message")

    def __init__(self) -> None:
        self.lock = _thread.allocate_lock()
        self.lock.acquire()
        self.message: Message | None = None
        self.fds: list[int] = []


class Client:
    """The device behind ``sock``, which it owns. The server may read and write all of ``memory``.

    Raises PileusError for a server that cannot be understood; then nothing is left.
    """

    def __init__(self, sock: "socket.socket", name: str, memory: "GuestMemory") -> None:
        self.name = name
        self.regions: list[abi.RegionInfo] = []
        self.irqs: dict[int, int] = {}
        self._memory = memory
        self._files: dict[int, int] = {}  # region -> descriptor to map
        self._answers: dict[int, Answer] = {}  # by number
        self._number = 0
        self._max_fds = 1
        self._dead = ""  # why, once it is
        self._lock = _thread.allocate_lock()
        self._connection = Connection(sock, f"the server of {name}")
        self._listening = _thread.allocate_lock()
        self._listening.acquire()
        try:
            before = _thread.stack_size(STACK_SIZE)
            try:
                _thread.start_new_thread(self._listen, ())
            finally:
                _thread.stack_size(before)
        except BaseException:
            self._connection.close()
            raise
        try:
            self._greet()
            self._learn()
            self._map_memory()
            self.ask(Message(Command.DEVICE_RESET), patience=RESET_TIMEOUT)
        except BaseException:
            self.close()
            raise

    # -- the face of a back-end -------------------------------------------------------------------

    def read(self, region: int, offset: int, size: int) -> int:
        try:
            reply = self.ask(Message(Command.REGION_READ, offset, region, size))
            if len(reply.tail) != size:
                raise self._broken(f"{len(reply.tail)} bytes for {size}")
        except PileusError as error:
            self._failed(error)
            return (1 << (8 * size)) - 1
        return int.from_bytes(reply.tail, "little")

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        tail = value.to_bytes(size, "little")
        self._try(Message(Command.REGION_WRITE, offset, region, size, tail=tail))

    def map(self, region: int, offset: int, size: int) -> Region | None:
        """Only files that cannot become shorter: the guest, and so the VM, would die of that."""
        fd = self._files.get(region)
        if fd is None or not _holds(fd, self.regions[region].offset + offset + size):
            return None
        copy = os.dup(fd)
        try:
            return Region(copy, size, self.regions[region].offset + offset)
        except HostError as error:
            os.close(copy)
            log.limited(log.WARNING, f"{self.name}: {error}")
            return None

    def set_eventfds(self, kind: int, fds: list[int]) -> None:
        if not fds:
            self._try(Message(Command.DEVICE_SET_IRQS, abi.IRQ_SET.size, DISABLE, kind, 0, 0))
        for start in range(0, len(fds), self._max_fds):
            some = fds[start : start + self._max_fds]
            request = Message(Command.DEVICE_SET_IRQS, abi.IRQ_SET.size, TRIGGER, kind, start, len(some))
            self._try(request, some)

    def unmask_by(self, fd: int) -> bool:
        return False

    def unmask(self) -> None:
        flags = abi.DATA_NONE | abi.ACTION_UNMASK
        self._try(Message(Command.DEVICE_SET_IRQS, abi.IRQ_SET.size, flags, abi.INTX, 0, 1))

    def reset(self) -> None:
        try:
            self.ask(Message(Command.DEVICE_RESET), patience=RESET_TIMEOUT)
        except PileusError as error:
            self._failed(error)

    def close(self) -> None:
        """Hang up; the server gives up the guest's memory by itself."""
        with self._lock:
            self._dead = self._dead or "closed"
        self._connection.shut_down()
        self._listening.acquire()
        self._connection.close()
        while self._files:
            os.close(self._files.popitem()[1])

    # -- asking -----------------------------------------------------------------------------------

    def ask(self, request: Message, fds: "list[int] | None" = None, patience: float = TIMEOUT) -> Message:
        """The reply to ``request``, without descriptors. Raises HostError, RemoteProtocolError."""
        reply, given = self._ask(request, fds or [], patience)
        close_all(given)
        return reply

    def _ask(self, request: Message, fds: list[int], patience: float) -> tuple[Message, list[int]]:
        """Likewise, with the reply's descriptors, the caller's."""
        answer = Answer()
        with self._lock:
            if self._dead:
                raise HostError("ask", self._connection.peer, self._dead)
            self._number = self._number + 1 & 0xFFFF
            while self._number in self._answers:
                self._number = self._number + 1 & 0xFFFF
            request.number = self._number
            self._answers[request.number] = answer
        try:
            self._connection.send(request, fds)
            if not answer.lock.acquire(timeout=patience):
                raise HostError("hear from", self._connection.peer, "it did not answer in time")
        except HostError as error:
            self._die(str(error))
        finally:
            with self._lock:
                self._answers.pop(request.number, None)
        reply = answer.message
        if reply is None:
            close_all(answer.fds)
            raise HostError("ask", self._connection.peer, self._dead)
        if reply.command != request.command:
            close_all(answer.fds)
            raise self._broken(f"an answer to {reply.command} for {request.command}")
        if reply.failed:
            close_all(answer.fds)
            reason = os.strerror(reply.error) if reply.error else "it says no"
            command = Command(request.command).name
            raise HostError(f"have {command} of", self._connection.peer, reason)
        return reply, answer.fds

    def _try(self, request: Message, fds: "list[int] | None" = None) -> None:
        try:
            self.ask(request, fds)
        except PileusError as error:
            self._failed(error)

    def _failed(self, error: PileusError) -> None:
        if not self._dead:  # why it died was told already
            log.limited(log.WARNING, f"{self.name}: {error}")

    def _broken(self, what: str) -> RemoteProtocolError:
        """The server broke the protocol, and is left for it."""
        error = RemoteProtocolError(f"{self._connection.peer}: {what}")
        self._die(str(error))
        return error

    def _die(self, why: str) -> None:
        """Leave the server, once; whoever waits for it is told."""
        with self._lock:
            if self._dead:
                return
            self._dead = "it was left after an error"
            answers = list(self._answers.values())
            self._answers.clear()
        log.error(f"{self.name}: {why}; from now on the device does not answer")
        self._connection.shut_down()
        for answer in answers:
            _release(answer)

    # -- hearing ----------------------------------------------------------------------------------

    def _listen(self) -> None:
        """On a thread of its own, until either end hangs up."""
        try:
            while True:
                message, fds = self._connection.receive()
                try:
                    if message.is_reply:
                        self._hand_over(message, fds)
                    else:
                        self._serve(message)
                finally:
                    close_all(fds)
        except PileusError as error:
            self._die(str(error))
        except BaseException as error:
            log.exception(error)
            self._die("a bug of pileus")
        finally:
            self._listening.release()

    def _hand_over(self, message: Message, fds: list[int]) -> None:
        """Takes ``fds`` over, where somebody waits."""
        with self._lock:
            answer = self._answers.pop(message.number, None)
            if answer is None:
                raise RemoteProtocolError(f"{self._connection.peer}: an answer that nobody waits for")
            answer.message = message
            answer.fds, fds[:] = fds[:], []
        _release(answer)

    def _serve(self, request: Message) -> None:
        """The server wants something of the guest's memory, which is checked."""
        flags, values, tail, failure = REPLY, request.values, b"", 0
        try:
            if request.command == Command.DMA_READ:
                iova, count = request.values
                if count > MAX_TRANSFER:
                    raise ValueError(f"{count} bytes at once")
                tail = self._memory.read(iova, count)
            elif request.command == Command.DMA_WRITE:
                iova, count = request.values
                self._memory.write(iova, request.tail)
            else:
                failure = errno.ENOTSUP
        except ValueError as error:
            log.limited(log.WARNING, f"{self.name}: {error}")
            failure = errno.EFAULT
        if failure:
            flags, values, tail = REPLY | ERROR, (), b""
        reply = Message(
            request.command, *values, tail=tail, number=request.number, flags=flags, error=failure
        )
        if request.wants_reply:
            self._connection.send(reply)

    # -- meeting ----------------------------------------------------------------------------------

    def _greet(self) -> None:
        wanted = {"capabilities": {"max_msg_fds": MAX_FDS, "max_data_xfer_size": MAX_TRANSFER}}
        request = Message(Command.VERSION, MAJOR, MINOR, tail=json.dumps(wanted).encode() + b"\0")
        reply = self.ask(request)
        if reply.values[0] != MAJOR:
            raise self._broken(f"version {reply.values[0]}.{reply.values[1]} of the protocol")
        said = capabilities(reply.tail)
        self._max_fds = min(MAX_FDS, number(said, "max_msg_fds", 1, 1))
        if number(said, "max_dma_maps", MAX_DMA_MAPS, 1) < len(self._memory.regions):
            raise self._broken(f"it takes no {len(self._memory.regions)} regions of memory")
        if not number(said, "pgsizes", PAGE_SIZE, 1) & PAGE_SIZE:
            raise self._broken("it takes no pages of 4 KiB")

    def _learn(self) -> None:
        """What the device has. More regions and interrupts than those of PCI are not for us."""
        _, flags, regions, irqs = self.ask(
            Message(Command.DEVICE_GET_INFO, abi.DEVICE_INFO.size, 0, 0, 0)
        ).values
        if not flags & abi.DEVICE_PCI or regions <= abi.CONFIG:
            raise self._broken(f"no PCI device, but one of {regions} regions with flags {flags:#x}")
        self.regions = [
            self._learn_region(index) if index < regions else abi.RegionInfo(index)
            for index in range(abi.REGIONS)
        ]
        for kind in range(min(irqs, abi.IRQS)):
            _, _, answered, count = self.ask(
                Message(Command.DEVICE_GET_IRQ_INFO, abi.IRQ_INFO.size, 0, kind, 0)
            ).values
            if answered != kind or count > abi.MAX_IRQS:
                raise self._broken(f"interrupts {answered} for {kind}, {count} of them")
            self.irqs[kind] = count

    def _learn_region(self, index: int) -> abi.RegionInfo:
        head = Message(Command.DEVICE_GET_REGION_INFO, MAX_REGION_INFO, 0, index, 0, 0, 0)
        try:
            reply, fds = self._ask(head, [], TIMEOUT)
        except HostError:
            if self._dead:
                raise
            return abi.RegionInfo(index)  # a server may refuse what its device has not
        try:
            region = abi.decode_region(index, abi.REGION_INFO.pack(*reply.values) + reply.tail)
            if fds and region.areas:
                self._files[index] = fds.pop()
            return region
        except RemoteProtocolError as error:
            raise self._broken(str(error)) from error
        finally:
            close_all(fds)

    def _map_memory(self) -> None:
        """The guest's RAM, with the files that it is kept in."""
        flags = abi.DMA_READ | abi.DMA_WRITE
        for gpa, region in self._memory.regions:
            offset = 0 if region.fd < 0 else region.offset
            request = Message(Command.DMA_MAP, DMA_MAP_SIZE, flags, offset, gpa, region.size)
            self.ask(request, [] if region.fd < 0 else [region.fd])


MAX_REGION_INFO = 4096
DMA_MAP_SIZE = 32


def _release(answer: Answer) -> None:
    answer.lock.release()


def _holds(fd: int, size: int) -> bool:
    """Whether the file has so many bytes, and will have them for ever."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return os.fstat(fd).st_size >= size
    except OSError:
        return False  # no memfd, or one that nobody may seal
