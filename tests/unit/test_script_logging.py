"""What a workflow script says when it works, when it refuses, and when it breaks."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from evoloss.errors import DataError
from evoloss.script_logging import script_logging


@pytest.fixture
def job(tmp_path: Path) -> SimpleNamespace:
    wildcards = {"search_seed": "3", "task": "diabetes", "method": "evomal"}
    return SimpleNamespace(
        log=[str(tmp_path / "logs" / "job.log")],
        params={"checkpoints": str(tmp_path / "checkpoints")},
        wildcards=wildcards,
        rule="r",
    )


def test_messages_of_the_package_go_to_the_log(job: SimpleNamespace) -> None:
    root = logging.getLogger()
    before = list(root.handlers)
    with script_logging(job) as logger:
        logging.getLogger("evoloss.search").info("generation 1")
        logger.info("done")
    text = Path(job.log[0]).read_text()
    assert "INFO generation 1" in text
    assert "INFO done" in text
    assert root.handlers == before


def test_a_job_that_goes_on_from_a_checkpoint_goes_on_in_its_log(job: SimpleNamespace) -> None:
    for word in ("lost", "first"):
        with script_logging(job) as logger:
            logger.info(word)
    Path(job.params["checkpoints"]).mkdir()
    with script_logging(job) as logger:
        logger.info("second")
    text = Path(job.log[0]).read_text()
    assert "lost" not in text
    assert text.index("first") < text.index("second")


def test_an_error_of_ours_is_one_sentence(
    job: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, script_logging(job):
        raise DataError("mine.csv has no column 'price'")
    assert caught.value.code == 1
    assert capsys.readouterr().err == "diabetes/evomal/3: mine.csv has no column 'price'\n"
    text = Path(job.log[0]).read_text()
    assert "ERROR mine.csv has no column 'price'" in text
    assert "Traceback" not in text


def test_an_interrupted_job_leaves_no_traceback(job: SimpleNamespace) -> None:
    with pytest.raises(SystemExit) as caught, script_logging(job):
        raise KeyboardInterrupt
    assert caught.value.code == 130
    text = Path(job.log[0]).read_text()
    assert "ERROR interrupted" in text
    assert "Traceback" not in text


def test_a_bug_leaves_its_traceback_in_the_log(job: SimpleNamespace) -> None:
    with pytest.raises(ZeroDivisionError), script_logging(job):
        _ = 1 / 0
    assert "ZeroDivisionError" in Path(job.log[0]).read_text()
