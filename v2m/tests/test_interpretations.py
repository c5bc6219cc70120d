"""The tables of interpretations: the default is the first line; what the counter of LocalMamba's code gives."""

import pytest

from shared.claims.compose import row_config
from v2m import interpretations
from v2m.model import count

HALF_A_DIGIT = 0.05  # of the printed billions


@pytest.mark.parametrize(
    ("row", "scans"),
    [
        ("v2m-in1k-vim-t", 2),
        ("v2m-in1k-vim-s", 2),
        ("v2m-in1k-localvim-t", 4),
        ("v2m-in1k-localvim-s", 4),
        ("v2m-in1k-t-lw", 6),
        ("v2m-in1k-s-lw", 6),
    ],
)
def test_the_counter_of_localmambas_code_gives_the_printed_flops(row, scans):
    printed = interpretations.PRINTED[row][2]
    assert abs(interpretations.as_localmamba_counts(row, scans) / 1e9 - printed) <= HALF_A_DIGIT


def test_of_v2m_it_gives_them_nearly_for_four_scans_and_not_for_six():
    for row in ("v2m-in1k-t", "v2m-in1k-s"):
        printed = interpretations.PRINTED[row][2]
        four, six = (interpretations.as_localmamba_counts(row, scans) / 1e9 for scans in (4, 6))
        assert abs(four - printed) <= 2 * HALF_A_DIGIT < abs(six - printed)


@pytest.mark.parametrize("rows", interpretations.INTERPRETATIONS)
def test_the_first_interpretation_is_the_row_itself(rows):
    first = next(iter(interpretations.INTERPRETATIONS[rows].values()))
    for row in rows:
        own = count(row_config("v2m", row, 0))
        assert interpretations.counted(row, tuple(first.items())) == own


@pytest.mark.slow
@pytest.mark.parametrize("rows", list(interpretations.INTERPRETATIONS)[1:])
def test_the_default_is_the_nearest_to_the_paper_where_nothing_settles_it(rows):
    apart = {
        name: interpretations.distance(
            [interpretations.counted(row, tuple(changes.items())) for row in rows], rows, "flops_scan_once"
        )
        for name, changes in interpretations.INTERPRETATIONS[rows].items()
    }
    assert min(apart, key=apart.get) == next(iter(apart))
