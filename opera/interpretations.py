"""What the detectors and segmenters of the rows cost, for INTERPRETATIONS.md; ``make claims`` calls ``tables``."""

from opera.costs import count, memory_of
from shared.claims.compose import dense_rows, row_config
from shared.claims.protocol import load_paper
from shared.claims.tables import Table
from shared.dense.count import COLUMNS, cost_cells
from shared.dense.libraries import missing_modules
from shared.environment import repository_root


def tables() -> dict[str, list[Table]]:
    """Return the tables of INTERPRETATIONS.md by marker name; none without the extra, by which they are counted."""
    if missing_modules():
        return {}
    cfgs = [row_config("opera", row, 0) for row in dense_rows(load_paper(repository_root(), "opera"))]
    return {"dense": [Table("", COLUMNS, cost_cells(cfgs, count, memory_of))]}
