import numpy as np
import pyarrow as pa

from ping_llm.columns import INVALID, MISSING, OK, parse_addresses
from ping_llm.ingest.records import REASONS, Verdict, check


def test_a_column_that_records_may_lack_is_unknown_where_it_is_missing_and_else_must_be_right():
    verdict, ok = Verdict(4), np.zeros(4, np.uint8)
    ends = parse_addresses(pa.array(["192.0.2.1"] * 4))
    loss = np.array([0.5, 0.0, 0.0, 1.5]), np.array([OK, MISSING, INVALID, OK])
    table = check(
        verdict,
        src=ends,
        dst=ends,
        time=(np.arange(4), ok),
        family=(np.full(4, 4), ok),
        rtt=(np.ones(4), ok),
        loss=loss,
    )
    assert [REASONS[code] for code in verdict.codes] == ["", "", "invalid loss", "invalid loss"]
    assert table.loss is not None
    np.testing.assert_array_equal(table.loss, np.float32([0.5, np.nan]))
