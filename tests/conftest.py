"""Tests that need more than the package are left out unless they are asked for by their mark."""

import pytest

MARKS = {"browser": "needs Debian's chromium and Playwright: make test-browser",
         "listen": "needs faster-whisper and Whisper-base: make test-listen",
         "mpnet": "needs all-mpnet-base-v2 (404 MB): make test-mpnet",
         "slow": "takes minutes: make test-slow"}


def pytest_configure(config):
    for name, why in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {why}")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for name, why in MARKS.items():
            if item.get_closest_marker(name) and name not in config.getoption("markexpr"):
                item.add_marker(pytest.mark.skip(reason=why))
