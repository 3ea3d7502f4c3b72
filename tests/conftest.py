"""What every test shares."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _logging_left_as_found():
    # A command line configures the package's logger, once a process; here many run in one.
    package = logging.getLogger("unicon_pipeline")
    handlers, level = list(package.handlers), package.level
    yield
    package.handlers[:] = handlers
    package.setLevel(level)
