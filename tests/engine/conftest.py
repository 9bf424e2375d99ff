import pytest
import torch

from kernels.cpu import native_status


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    """No bars of transformers on stderr, and no threads that wait for each other over tiny work."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _native_kernels_from_the_users_cache() -> None:
    """Loaded before a test has a cache folder of its own, in which they would be compiled again."""
    native_status()
