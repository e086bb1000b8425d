"""CPU topology: how many threads, cores, dies and packages, and the APIC ids that follow.

An APIC id is a packed field of package, die, core and thread numbers, each as wide as its count needs, so
ids have gaps where a count is no power of two. Source: Intel SDM Vol. 3A, 9.9.1; AMD APM Vol. 3, E.5.
"""


def width(count: int) -> int:
    """Bits that hold the numbers 0 to ``count`` - 1."""
    return (count - 1).bit_length()


class Topology:
    """``threads`` per core, ``cores`` per die, ``dies`` per package, ``packages``."""

    __slots__ = ("cores", "dies", "packages", "threads")

    def __init__(self, threads: int, cores: int, dies: int, packages: int) -> None:
        self.threads = threads
        self.cores = cores
        self.dies = dies
        self.packages = packages

    @property
    def per_package(self) -> int:
        """Logical CPUs in one package."""
        return self.threads * self.cores * self.dies

    @property
    def thread_bits(self) -> int:
        return width(self.threads)

    @property
    def core_bits(self) -> int:
        """Bits of the thread and core numbers together: what is above tells dies apart."""
        return self.thread_bits + width(self.cores)

    @property
    def package_bits(self) -> int:
        """Bits of all numbers within a package."""
        return self.core_bits + width(self.dies)

    def apic_id(self, index: int) -> int:
        """The APIC id of vCPU ``index``, counted thread by thread, then core, die and package."""
        rest, thread = divmod(index, self.threads)
        rest, core = divmod(rest, self.cores)
        package, die = divmod(rest, self.dies)
        return package << self.package_bits | die << self.core_bits | core << self.thread_bits | thread
