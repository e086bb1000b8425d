from pileus.memory._mappings import Mappings
from pileus.memory._space import Translation

MAX_MAPPINGS: int
FAULT_READ: int
FAULT_WRITE: int

class Domain:
    number: int
    bypass: bool
    mappings: Mappings
    endpoints: list[Endpoint]

class Endpoint(Translation):
    number: int
    name: str
    iommu: Iommu
    domain: Domain | None
    def translate(self, iova: int, access: int) -> tuple[int, int] | int: ...

class Iommu:
    endpoints: dict[int, Endpoint]
    domains: dict[int, Domain]
    dropped: int
    fault_fd: int
    bypass: bool
    faults_waiting: int
    def __init__(self, bypass: bool = True, limit: int = ...) -> None: ...
    def add_endpoint(self, number: int, name: str) -> Endpoint: ...
    def attach(self, endpoint: Endpoint, number: int, bypass: bool = False) -> None: ...
    def detach(self, endpoint: Endpoint) -> None: ...
    def map(self, domain: Domain, first: int, last: int, gpa: int, access: int) -> int: ...
    def unmap(self, domain: Domain, first: int, last: int) -> int: ...
    def reset(self) -> None: ...
    def take_fault(self) -> tuple[int, int, int, int] | None: ...
    def take_faults(self) -> list[tuple[int, int, int, int]]: ...
