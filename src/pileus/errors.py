"""Every error pileus raises on purpose, split by who is at fault.

::

    PileusError
    ├── ConfigError            the user's option or API field
    ├── StateError             the right request at the wrong time
    ├── HostError              the host refused a file, socket, TAP, …
    │   └── KvmError           … or an ioctl of /dev/kvm
    ├── ApiError               a VMM said no to its client
    ├── GuestError             the guest broke a device's rules; stays inside that device
    └── ProtocolError
        ├── LocalProtocolError     we did
        └── RemoteProtocolError    the peer did

Each prints as one sentence that holds the offending value. Anything else that is raised is a bug.
"""

import os


class PileusError(Exception):
    """The root: catch this to catch all that pileus raises on purpose."""


class ConfigError(PileusError):
    """``option`` was given ``value``, which is not what is ``allowed``: exit status 1, or HTTP 400."""

    def __init__(self, option: str, value: object, allowed: str) -> None:
        super().__init__(f"{option} {value}: {allowed}")
        self.option = option
        self.value = value
        self.allowed = allowed


class StateError(PileusError):
    """``action`` is not possible in ``state``: HTTP 4xx."""

    def __init__(self, action: str, state: str, allowed: str) -> None:
        super().__init__(f"cannot {action} a VM that is {state}: {allowed}")
        self.action = action
        self.state = state
        self.allowed = allowed


class HostError(PileusError):
    """The host refused: ``doing`` what to ``path``. Raised ``from`` the OSError, whose reason it prints."""

    def __init__(self, doing: str, path: object, reason: object = "") -> None:
        detail = os.strerror(reason.errno) if isinstance(reason, OSError) and reason.errno else str(reason)
        super().__init__(f"cannot {doing} {path}" + (f": {detail}" if detail else ""))


class KvmError(HostError):
    """The ioctl ``name`` of KVM failed with ``errno``."""

    def __init__(self, name: str, errno: int, note: str = "") -> None:
        super().__init__(
            "use", "/dev/kvm", f"{name} failed: {os.strerror(errno)}{f' ({note})' if note else ''}"
        )
        self.name = name
        self.errno = errno


class ApiError(PileusError):
    """A VMM answered its client with the HTTP ``status`` and these ``sentences``, outermost first."""

    def __init__(self, status: int, sentences: list[str]) -> None:
        super().__init__(" ".join(sentences) or f"the API answers with status {status}")
        self.status = status
        self.sentences = sentences


class GuestError(PileusError):
    """The guest broke a rule of a device; that device stops, the VMM goes on."""


class ProtocolError(PileusError):
    """A message was not what the protocol allows; that connection closes."""


class LocalProtocolError(ProtocolError):
    """Our side broke the protocol."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol."""
