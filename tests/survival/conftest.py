"""Options and fixtures of the survival tests. What is marked `survival` runs only where `-m` names that mark."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.quickstart.conftest import cache  # noqa: F401 (a fixture)
from tests.survival.fault_rows import FAULTS, S3
from tests.survival.matrix import Matrix, write_section
from tests.survival.s3_server import MISSING, REASON, s3_server
from tests.survival.web_server import web_server


def pytest_addoption(parser):
    group = parser.getgroup("survival", "survival tests (-m survival)")
    group.addoption(
        "--fault-table",
        type=Path,
        metavar="FILE",
        help="write the outcomes of all faults into this document",
    )
    group.addoption(
        "--fault-jobs",
        type=int,
        default=os.cpu_count(),
        help="faults at a time (default: %(default)s)",
    )
    group.addoption(
        "--fault-limit",
        type=int,
        default=300,
        help="seconds that a run may take (default: %(default)s)",
    )
    group.addoption("--cache-root", help="of the embedded default, as for quickstart")
    group.addoption(
        "--kill-runs", type=int, default=20, help="killed runs of each stage (default: %(default)s)"
    )
    group.addoption(
        "--kill-seed",
        type=int,
        default=0,
        help="of the moments of the kills (default: %(default)s)",
    )


def pytest_collection_modifyitems(config, items):
    """Leave out the long tests, unless they are asked for."""
    if "survival" in (config.option.markexpr or "").replace("not survival", ""):
        if not hasattr(config.option, "fault_table"):  # this file was read too late for its options
            raise pytest.UsageError("name the folder: python -m pytest tests/survival -m survival")
        return
    config.hook.pytest_deselected(
        items=[item for item in items if item.get_closest_marker("survival")]
    )
    items[:] = [item for item in items if not item.get_closest_marker("survival")]


@pytest.fixture(scope="session")
def outcomes(request, tmp_path_factory):
    """Give {(group, name): Future of the outcome} of all selected faults; write the table at the end."""
    option = request.config.option
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    faults = [each["fault"] for each in params if "fault" in each]
    if option.fault_table and len(faults) != len(FAULTS):
        raise pytest.UsageError(
            "--fault-table replaces the whole table: leave out -k and single tests"
        )
    by_s3 = [fault for fault in faults if fault.group == S3]
    if option.fault_table and MISSING:
        raise pytest.UsageError(f"--fault-table {REASON}")
    faults = [fault for fault in faults if not MISSING or fault not in by_s3]
    folder = tmp_path_factory.mktemp("faults")
    s3 = s3_server() if by_s3 and not MISSING else nullcontext()
    with s3, web_server(folder) as address, ThreadPoolExecutor(option.fault_jobs) as pool:
        matrix = Matrix(folder, address, option.fault_limit, option.cache_root)
        futures = {
            (fault.group, fault.name): pool.submit(matrix.outcome, fault) for fault in faults
        }
        yield futures
        pool.shutdown(cancel_futures=True)  # after Ctrl-C those at work end, no other begins
        if option.fault_table and not any(future.cancelled() for future in futures.values()):
            write_section(option.fault_table, [future.result() for future in futures.values()])
