from pathlib import Path

import pytest

from data.prepare import PreparedData
from tests.data.corpus import make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """One small prepared folder for tests that only read."""
    return make(Path(tmp_path_factory.mktemp("prepared")))
