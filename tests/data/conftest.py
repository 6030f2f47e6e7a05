"""What the tests of data share."""

import pytest


@pytest.fixture
def parquet(tmp_path):
    def write(**splits):
        for name, data in splits.items():
            data.to_parquet(str(tmp_path / f"{name}-00000-of-00001.parquet"))
        return str(tmp_path)

    return write
