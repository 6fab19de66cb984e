"""The server under several clients at once: every answer fits, every job ends once, no file is lost or left
over.
"""

import pytest

from benchmarks.serve_load import load


@pytest.mark.slow
def test_every_job_is_accounted_for(tmp_path):
    _, checks = load(tmp_path, clients=8, seconds=8, growth_mb=None)
    assert len(checks) == 19
    assert not [check for check in checks if not check[1]]
