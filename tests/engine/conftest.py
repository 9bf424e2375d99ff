import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    """No bars of transformers on stderr, and no threads that wait for each other over tiny work."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
