"""Every device there is, by name: the suites that all devices run take them from here.

To add one, write a function that yields a device which needs nothing but this process, and closes what it
opened for it; FakeDriver closes the device.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pileus.config.model import DiskConfig, NetConfig
from pileus.console import Sink
from pileus.fs.identity import Ids
from pileus.fs.session import Session
from pileus.memory._iommu import Iommu
from pileus.virtio.device import VirtioDevice
from pileus.virtio.devices.balloon import Balloon
from pileus.virtio.devices.blk import open_disk
from pileus.virtio.devices.console import ConsoleDevice
from pileus.virtio.devices.fs import Fs
from pileus.virtio.devices.iommu import IommuDevice
from pileus.virtio.devices.net import open_net
from pileus.virtio.devices.pmem import Pmem
from pileus.virtio.devices.rng import FileSource, Rng
from tests.unit.net.namespace import Namespace


@contextmanager
def rng() -> Iterator[VirtioDevice]:
    yield Rng("rng0", source=lambda count: b"\xa5" * count)


@contextmanager
def rng_of_a_file() -> Iterator[VirtioDevice]:
    source = FileSource("/dev/urandom")
    yield Rng("rng0", source)
    source.close()


@contextmanager
def console() -> Iterator[VirtioDevice]:
    """Its output is dropped."""
    sink = Sink()
    device = ConsoleDevice("console0", sink)
    device.feed(b"typed before the guest was up")
    yield device
    sink.close()


@contextmanager
def stuck_console() -> Iterator[VirtioDevice]:
    """Its output goes to a pipe that nobody reads."""
    output, pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    sink = Sink()
    sink.attach(pipe, 0)
    yield ConsoleDevice("console0", sink)
    sink.close()
    os.close(output)
    os.close(pipe)


@contextmanager
def balloon() -> Iterator[VirtioDevice]:
    yield Balloon("balloon0", 1 << 20, deflate_on_oom=True, free_page_reporting=True, statistics=True)


@contextmanager
def bare_balloon() -> Iterator[VirtioDevice]:
    yield Balloon("balloon0")


@contextmanager
def net() -> Iterator[VirtioDevice]:
    """On a TAP of two queue pairs, in a network of its own."""
    with Namespace():
        yield open_net(NetConfig(num_queues=4), 0)


def disk(**more: object) -> "Factory":
    @contextmanager
    def make() -> Iterator[VirtioDevice]:
        with TemporaryDirectory() as folder:
            path = Path(folder, "image")
            path.write_bytes(bytes(1 << 20))
            yield open_disk(DiskConfig(path=str(path), image_type="raw", **more), 0)  # type: ignore[arg-type]

    return make


@contextmanager
def pmem() -> Iterator[VirtioDevice]:
    yield Pmem("pmem0", 1 << 33, 2 << 20, lambda: None)


@contextmanager
def fs() -> Iterator[VirtioDevice]:
    """Shares a folder with a file in it, for as long as it is open."""
    with TemporaryDirectory() as folder:
        Path(folder, "file").write_bytes(bytes(5000))
        root = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        yield Fs("fs0", Session(root, Ids(), Ids(), locks=True), "shared", 2, 64)


def behind_an_iommu(factory: "Factory") -> "Factory":
    """What it is in for is FakeDriver's to say."""

    @contextmanager
    def make() -> Iterator[VirtioDevice]:
        with factory() as device:
            device.iommu = Iommu(bypass=False).add_endpoint(8, device.name)
            yield device

    return make


@contextmanager
def iommu() -> Iterator[VirtioDevice]:
    """With two endpoints."""
    device = IommuDevice("iommu0")
    device.core.add_endpoint(8, "disk")
    device.core.add_endpoint(16, "net")
    yield device


Factory = Callable[[], AbstractContextManager[VirtioDevice]]

FACTORIES: dict[str, Factory] = {
    "rng": rng,
    "rng of a file": rng_of_a_file,
    "console": console,
    "stuck console": stuck_console,
    "balloon": balloon,
    "bare balloon": bare_balloon,
    "net": net,
    "disk": disk(),
    "disk of four queues": disk(num_queues=4),
    "pmem": pmem,
    "fs": fs,
    "read-only disk": disk(readonly=True),
    "iommu": iommu,
    "rng behind an iommu": behind_an_iommu(rng),
    "console behind an iommu": behind_an_iommu(console),
    "net behind an iommu": behind_an_iommu(net),
    "disk behind an iommu": behind_an_iommu(disk()),
}
