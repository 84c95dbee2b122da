"""Every operator and attribute of the conformance table is sound or refused, by every method, as recorded."""

from __future__ import annotations

import pytest

from lirpa_fastwarmup.engine.bounds import METHODS
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from tests.conformance.cells import CELLS
from tests.conformance.oracles import verdicts
from tests.conformance.record import PAGE, engines, page, recorded


@pytest.mark.parametrize("name", CELLS)
def test_bounds_are_sound_or_refused_as_recorded(name):
    assert verdicts(CELLS[name]) == recorded(ENGINE_VERSION)[name]


def test_every_engine_has_a_record_of_every_cell_and_nothing_unsound_in_it():
    assert engines() == ["0.3", "0.7.1"]
    for engine in engines():
        table = recorded(engine)
        assert list(table) == list(CELLS)
        assert all(list(row) == list(METHODS) for row in table.values())
        assert {verdict for row in table.values() for verdict in row.values()} == {"sound", "refused"}


def test_the_page_of_operators_is_that_of_the_records():
    assert PAGE.read_text() == page(), "run python -m tests.conformance.record"
