"""Left out where they cannot run: the harness switches fibers on x86-64 only, and is not tested under itself."""

import platform


def pytest_ignore_collect(collection_path, config):
    return True if platform.machine() not in ("x86_64", "AMD64") or config.getoption("--simt") else None
