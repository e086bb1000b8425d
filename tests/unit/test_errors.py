"""One sentence each, with the value, and one root for all."""

import errno

import pytest

from pileus import errors
from pileus.errors import (
    ApiError,
    ConfigError,
    GuestError,
    HostError,
    KvmError,
    LocalProtocolError,
    PileusError,
    ProtocolError,
    RemoteProtocolError,
    StateError,
)

SENTENCES: list[tuple[PileusError, str]] = [
    (
        ConfigError("--cpus", 0, "1 to 4096 vCPUs are possible"),
        "--cpus 0: 1 to 4096 vCPUs are possible",
    ),
    (
        StateError("pause", "shut down", "only a running VM pauses"),
        "cannot pause a VM that is shut down: only a running VM pauses",
    ),
    (HostError("open", "/no"), "cannot open /no"),
    (
        HostError("open", "/no", FileNotFoundError(errno.ENOENT, "os", "/no")),
        "cannot open /no: No such file or directory",
    ),
    (HostError("open", "/no", OSError("without a number")), "cannot open /no: without a number"),
    (HostError("open", "/no", "it is a door"), "cannot open /no: it is a door"),
    (
        KvmError("KVM_RUN", errno.EFAULT, "vCPU 0"),
        "cannot use /dev/kvm: KVM_RUN failed: Bad address (vCPU 0)",
    ),
    (KvmError("KVM_RUN", errno.EFAULT), "cannot use /dev/kvm: KVM_RUN failed: Bad address"),
    (ApiError(400, ["--cpus 0: no.", "Bad."]), "--cpus 0: no. Bad."),
    (ApiError(429, []), "the API answers with status 429"),
    (GuestError("rng0: a request is writable only"), "rng0: a request is writable only"),
]


@pytest.mark.parametrize(("error", "sentence"), SENTENCES, ids=lambda each: type(each).__name__)
def test_an_error_is_one_sentence(error: PileusError, sentence: str) -> None:
    assert str(error) == sentence


def test_errors_keep_what_they_were_made_of() -> None:
    config = ConfigError("--cpus", 0, "more")
    assert (config.option, config.value, config.allowed) == ("--cpus", 0, "more")
    state = StateError("pause", "gone", "no")
    assert (state.action, state.state, state.allowed) == ("pause", "gone", "no")
    kvm = KvmError("KVM_RUN", errno.EFAULT)
    assert (kvm.name, kvm.errno) == ("KVM_RUN", errno.EFAULT)


def test_there_is_one_root() -> None:
    for each in vars(errors).values():
        if isinstance(each, type) and issubclass(each, BaseException):
            assert issubclass(each, PileusError)
    assert issubclass(KvmError, HostError)
    assert issubclass(LocalProtocolError, ProtocolError)
    assert issubclass(RemoteProtocolError, ProtocolError)
