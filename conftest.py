"""In continuous integration a skipped notebook or browser test fails: what it needs is installed there."""

import os

import pytest

REQUIRED = ("test_notebook", "test_widgets", "test_browser")


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
