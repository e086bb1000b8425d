"""A virtio device of which only registers and configuration are here: a vhost-user back-end has its queues.

It gets the doorbells' eventfds and the interrupts', so that no request passes through this process. One that
goes away is reconnected to: meanwhile the guest waits, as for any slow device. Sockets are opened and closed
on the control loop; any thread may end a conversation by shutting it down, which the loop then sees.
What may take long, a back-end's first answers, is waited for on a thread that ends with them.
"""

import _thread
import os
import select
import time

from pileus import log
from pileus.errors import ConfigError, HostError, LocalProtocolError, PileusError
from pileus.vhost_user.connection import close_all
from pileus.vhost_user.frontend import RUNNING, UNDERSTOOD, Frontend, Ring
from pileus.vhost_user.protocol import REPLY, VERSION, BackendRequest, Feature, Message
from pileus.virtio.device import VERSION_1, VirtioDevice
from pileus.virtio.queue import RING_FEATURES

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Protocol

    from pileus.vhost_user.connection import Connection
    from pileus.vhost_user.frontend import Inflight
    from pileus.virtio.device import State

    class Timer(Protocol):
        def cancel(self) -> None: ...

    class Loop(Protocol):
        """What is needed of the control loop."""

        def watch(self, fd: int, events: int, call: Callable[[int], None]) -> None: ...
        def unwatch(self, fd: int) -> None: ...
        def after(self, seconds: float, call: Callable[[], None]) -> Timer: ...
        def post(self, call: Callable[[], None]) -> None: ...

    class Peer(Protocol):
        """A way to a back-end: Client or Server of ``vhost_user.connection``."""

        path: str

        def attempt(self) -> socket.socket | None: ...
        def last_words(self) -> str: ...
        def close(self) -> None: ...


PATIENCE = 5.0  # seconds for a back-end to be there when the VM is built
FIRST_DELAY, LAST_DELAY = 0.01, 1.0  # seconds between attempts, each twice the one before
HANG_UP = select.EPOLLHUP | select.EPOLLERR
REFUSED = 1


class VhostUserDevice(VirtioDevice):
    """Subclasses set ``known``, the feature bits of virtio that may be offered if the back-end has them, and
    ``needed``, protocol features it cannot do without; and override ``refresh``.

    ``option`` is the user's, for errors. Owns ``peer``.
    """

    known = 0
    needed = Feature(0)
    wanted = int(UNDERSTOOD)  # protocol features to agree on
    kicked_in_python: "tuple[int, ...] | None" = ()

    def __init__(
        self, name: str, option: str, peer: "Peer", loop: "Loop", patience: float = PATIENCE
    ) -> None:
        self._frontend: Frontend | None = None
        self._peer = peer
        self._loop = loop
        self._option = option
        self._inflight: Inflight | None = None
        self._timer: Timer | None = None
        self._delay = FIRST_DELAY
        self._patience = patience  # for the first answers, too
        self._since = 0.0  # when the present back-end was met
        self._closed = False
        self._meeting: Frontend | None = None  # that answers its first questions
        self._met = _thread.allocate_lock()  # held by the thread that asks them
        super().__init__(name)
        self._meet_first(time.monotonic() + patience)

    # -- what a subclass overrides ----------------------------------------------------------------

    def refresh(self, frontend: Frontend) -> bytes:
        """The configuration for the driver, now that ``frontend`` is there or says that it changed.

        Raises ConfigError where the back-end cannot do what was asked for.
        """
        return self.config

    def enabled(self, index: int) -> bool:
        """Whether the driver asked for queue ``index`` to be served."""
        return True

    def backend_features(self) -> int:
        """Of the features that the driver chose, those that are the back-end's business."""
        return self.driver_features

    def answer(self, message: Message, fds: "list[int]") -> bool:
        """Whether what the back-end asks for is done; ``fds`` came with it. Without the device's lock."""
        return message.request == BackendRequest.CONFIG_CHANGE_MSG

    def taken_up(self, frontend: Frontend) -> None:
        """Tell ``frontend``, whose rings run for a driver that knew another, what else it must know."""

    # -- the face of a device ---------------------------------------------------------------------

    @property
    def offered(self) -> int:
        """What the back-end offers and we know; the rings are its own."""
        return super().offered & self.features

    def activate(self) -> None:
        """Without a back-end the driver waits for one."""
        if self._frontend is not None:
            self._try(lambda frontend: self._start(frontend, self._first_base))

    def reset(self) -> None:
        if self._frontend is not None and self._frontend.state == RUNNING:
            self._try(self._stop)
        self._forget_inflight()
        if self._frontend is not None:
            self.features = self._offer(self._frontend)  # it may be another than the driver knew

    def call_changed(self, index: int) -> None:
        if self._frontend is not None and self._frontend.state == RUNNING and self.queues[index].active:
            self._try(lambda frontend: frontend.set_call(index, self.queues[index].call_fd))

    def state(self) -> "State":
        """Takes the rings back to learn where they stand, and starts them again."""
        frontend = self._frontend
        if frontend is not None and frontend.state == RUNNING:
            try:
                for index, base in frontend.stop().items():
                    queue = self.queues[index]
                    queue.restore({**queue.state(), "next_avail": base, "next_used": base})
                self._start(frontend, self._first_base)
            except PileusError as error:
                raise HostError("save", self.name, str(error)) from error
        return {}

    def close(self) -> None:
        """End the conversation; the back-end is free for another."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if (meeting := self._meeting) is not None:
            meeting.shut_down()
        with self._met:
            pass
        for frontend in filter(None, (self._frontend, self._meeting)):
            self._part(frontend)
        self._forget_inflight()
        self._peer.close()
        super().close()

    # -- rings ------------------------------------------------------------------------------------

    def served(self, index: int) -> bool:
        """Whether queue ``index`` is the back-end's."""
        return self.queues[index].active

    def _first_base(self, index: int) -> int:
        return int(self.queues[index].state()["next_avail"])

    def _used_base(self, index: int) -> int:
        """Where the back-end before this one was seen last; what it had begun beyond is begun again."""
        assert self.memory is not None
        return int.from_bytes(self.memory.read(self.queues[index].used + 2, 2), "little")

    def _start(self, frontend: Frontend, base: "Callable[[int], int]") -> None:
        assert self.memory is not None
        indexes = [index for index in range(len(self.queues)) if self.served(index)]
        rings = [Ring(index, self.queues[index], base(index), self.enabled(index)) for index in indexes]
        if self._inflight is None and rings:
            size = max(ring.queue.size for ring in rings)
            self._inflight = frontend.inflight(self.data_queues, size)
        frontend.start(self.memory, self.backend_features(), rings, self._inflight)

    def _stop(self, frontend: Frontend) -> None:
        frontend.stop()
        frontend.reset_device()

    def _forget_inflight(self) -> None:
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = None

    def _try(self, action: "Callable[[Frontend], None]") -> None:
        """With the device's lock held: a back-end that fails is left, and another conversation begun."""
        frontend = self._frontend
        if frontend is None:
            return
        try:
            action(frontend)
        except LocalProtocolError:
            raise
        except PileusError as error:
            log.limited(log.WARNING, f"{self.name}: {error}; starting over with its back-end")
            frontend.shut_down()

    # -- meeting ----------------------------------------------------------------------------------

    def _meet_first(self, deadline: float) -> None:
        """While the VM is built: soon, or not at all."""
        try:
            while (sock := self._peer.attempt()) is None:
                if time.monotonic() + self._delay > deadline:
                    raise ConfigError(self._option, self._peer.path, "no back-end is there")
                time.sleep(self._delay)
                self._delay = min(2 * self._delay, LAST_DELAY)
            frontend = Frontend(sock, self._who)
            try:
                frontend.negotiate(self.wanted, self._patience)
                self._judge(frontend)
                self.config = self.refresh(frontend)
                self.features = self._offer(frontend)
                self._embrace(frontend)
            except HostError as error:
                frontend.close()
                if words := self._peer.last_words():
                    raise HostError("start", self._peer.path, words) from error
                raise
            except BaseException:
                frontend.close()
                raise
        except BaseException:
            self._peer.close()
            super().close()
            raise
        self._delay = FIRST_DELAY

    @property
    def _who(self) -> str:
        return f"the back-end at {self._peer.path}"

    def _judge(self, frontend: Frontend) -> None:
        """Raises ConfigError for a back-end that cannot serve this device."""
        if not frontend.features & VERSION_1:
            raise ConfigError(self._option, self._peer.path, "its back-end offers no VIRTIO_F_VERSION_1")
        lacking = self.needed & ~frontend.protocol_features
        if lacking:
            raise ConfigError(
                self._option, self._peer.path, f"its back-end lacks protocol feature {lacking!r}"
            )
        most = frontend.max_queues
        if most is not None and most < self.queue_groups:
            raise ConfigError(
                self._option, f"num_queues {self.data_queues}", f"its back-end serves at most {most} queues"
            )

    def _offer(self, frontend: Frontend) -> int:
        return frontend.features & (self.known | RING_FEATURES | VERSION_1)

    @property
    def data_queues(self) -> int:
        """How many queues the back-end serves."""
        return len(self.queues)

    def _embrace(self, frontend: Frontend) -> None:
        """On the loop's thread, or before it runs: from now on this is our back-end."""
        self._frontend = frontend
        self._since = time.monotonic()
        self._loop.watch(frontend.fileno(), 0, lambda events: self._hung_up(frontend, events))
        if (requests := frontend.requests) is not None:
            self._loop.watch(requests.fileno(), select.EPOLLIN, lambda _: self._asked(frontend, requests))

    def _part(self, frontend: Frontend) -> None:
        self._frontend = None
        self._loop.unwatch(frontend.fileno())
        if frontend.requests is not None:
            self._loop.unwatch(frontend.requests.fileno())
        frontend.close()

    def _hung_up(self, frontend: Frontend, events: int) -> None:
        with self.lock:
            if self._frontend is not frontend or not events & HANG_UP:
                return
            log.limited(log.WARNING, f"{self.name}: {self._who} is gone; waiting for it to come back")
            self._part(frontend)
            self.noticed("backend-lost")
        if time.monotonic() - self._since > LAST_DELAY:
            self._delay = FIRST_DELAY  # else it comes and goes, and is met ever more slowly
        self._attempt_later()

    def _attempt_later(self) -> None:
        if not self._closed:
            self._timer = self._loop.after(self._delay, self._attempt)
            self._delay = min(2 * self._delay, LAST_DELAY)

    def _attempt(self) -> None:
        """On the loop's thread."""
        self._timer = None
        try:
            sock = self._peer.attempt()
        except HostError as error:
            log.limited(log.WARNING, f"{self.name}: {error}")
            sock = None
        if sock is None:
            self._attempt_later()
            return
        self._meeting = Frontend(sock, self._who)
        self._met.acquire()
        try:
            _thread.start_new_thread(self._meet_again, (self._meeting,))
        except BaseException:
            self._met.release()
            raise

    def _meet_again(self, frontend: Frontend) -> None:
        """On a thread of its own; the loop closes what comes of it."""
        failed = False
        try:
            frontend.negotiate(self.wanted, self._patience)
            with self.lock:
                if not self._closed:
                    self._take_up(frontend)
        except PileusError as error:
            log.limited(log.WARNING, f"{self.name}: {error}")
            failed = True
        except BaseException as error:
            log.exception(error)
            failed = True
        finally:
            self._loop.post(lambda: self._met_again(frontend, failed))
            self._met.release()

    def _met_again(self, frontend: Frontend, failed: bool) -> None:
        """On the loop's thread again."""
        with self.lock:
            self._meeting = None
            if failed or self._closed:
                frontend.close()
            else:
                log.info(f"{self.name}: {self._who} is back")
                self._embrace(frontend)
                self.noticed("backend-back")
        if failed:
            self._attempt_later()

    def _take_up(self, frontend: Frontend) -> None:
        """The driver goes on with a new back-end, if it can do what the one before it could."""
        self._judge(frontend)
        offered = self._offer(frontend)
        config = self.refresh(frontend)
        if self.memory is None:
            self.features, self.config = offered, config
        elif lacking := self.backend_features() & ~offered:
            self.fail(f"its back-end came back without features {lacking:#x}")
        else:
            if not self.failed:
                self._start(frontend, self._used_base)
                self.taken_up(frontend)
                self._wake()
            if config != self.config:
                self.reconfigure(config)
        self._frontend = frontend

    def _wake(self) -> None:
        """Both sides look at the rings: a kick or a call may have gone to the back-end that died."""
        for index, queue in enumerate(self.queues):
            if self.served(index):
                os.eventfd_write(queue.kick_fd, 1)
                if queue.call_fd >= 0:
                    os.eventfd_write(queue.call_fd, 1)

    # -- what the back-end asks -------------------------------------------------------------------

    def _asked(self, frontend: Frontend, requests: "Connection") -> None:
        try:
            received = requests.receive_now()
            if received is None:
                return
            message, fds = received
            try:
                done = self.answer(message, fds)
            finally:
                close_all(fds)
            if message.needs_reply:  # at once: a back-end that waits for this may answer nothing else
                requests.allow()
                requests.send(Message(message.request, 0 if done else REFUSED, flags=VERSION | REPLY))
        except HostError:
            self._loop.unwatch(requests.fileno())  # it asks nothing any more; perhaps it is about to end
            return
        except PileusError as error:
            log.limited(log.WARNING, f"{self.name}: {error}; starting over with its back-end")
            self._loop.unwatch(requests.fileno())
            frontend.shut_down()
            return
        if message.request == BackendRequest.CONFIG_CHANGE_MSG:
            self._config_changed(frontend)

    def _config_changed(self, frontend: Frontend) -> None:
        with self.lock:
            if self._frontend is frontend:
                self._try(lambda _: self._reread(frontend))

    def _reread(self, frontend: Frontend) -> None:
        config = self.refresh(frontend)
        if config != self.config:
            self.reconfigure(config)
