from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> Iterator[None]:
    """transformers draws bars on stderr when it saves and loads."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
