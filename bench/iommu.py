"""What the virtual IOMMU costs: block requests with and without it, each page mapped by itself."""

from support.bench import Options, Row
from support.block_load import compared, engine

GOALS = ("bench",)
BEHIND, WITHOUT = "behind the virtual IOMMU", "without"


def run(options: Options) -> list[Row]:
    return compared(BEHIND, {BEHIND: engine(behind_iommu=True), WITHOUT: engine()}, options.runs or 5)
