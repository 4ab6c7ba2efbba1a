"""The notebooks run as tests, at the ci budget and with one run store for all of them, unless DRS_BUDGET and
DRS_STORE say otherwise. In continuous integration a skipped notebook, browser, site or slides test fails:
what it needs is installed there.
"""

import os
from unittest.mock import patch

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter. It reads this when something imports it.
    os.environ["TRITON_INTERPRET"] = "1"

REQUIRED = ("test_notebook", "test_labs", "test_browser", "test_site", "test_slides")
# What takes longest begins first, where tests run side by side.
SLOW = ("test_notebooks_voc.py", ".ipynb", "test_browser", "test_site.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [name not in item.path.name for name in SLOW])


_STORE = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    # A notebook's kernel starts with its first cell and inherits this environment.
    if item.path.suffix != ".ipynb":
        return (yield)
    environment = {"DRS_BUDGET": os.environ.get("DRS_BUDGET", "ci")}
    if "DRS_STORE" not in os.environ and environment["DRS_BUDGET"] == "ci":
        if _STORE not in item.config.stash:
            base = item.config._tmp_path_factory.getbasetemp()
            # One store for all processes of a run.
            beside = base.parent if hasattr(item.config, "workerinput") else base
            item.config.stash[_STORE] = str(beside / "notebook-runs")
        environment["DRS_STORE"] = item.config.stash[_STORE]
    with patch.dict(os.environ, environment):
        return (yield)


def _must_run(path):
    return os.environ.get("CI") == "true" and (path.suffix == ".ipynb" or path.name.startswith(REQUIRED))


def _fail(report):
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"This test must not be skipped where CI=true, and was. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and _must_run(item.path):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.skipped and _must_run(collector.path):
        _fail(report)
    return report
