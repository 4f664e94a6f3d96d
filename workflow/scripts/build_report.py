"""Collect figures, tables and formulas in one HTML page: Snakemake's own report."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from evoloss.errors import EvolossError
from evoloss.script_logging import script_logging


def main(snakemake, logger) -> None:
    """Ask Snakemake for the report of the files that the rule got.

    A second Snakemake reads what the running one has finished: ``--report`` runs no job, so it
    neither recurses nor needs the lock that the first one holds. It gets the resolved
    configuration, whatever files and options that came from.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(snakemake.params.config), encoding="utf-8")
        command = [sys.executable, "-m", "snakemake", "--nolock", "--cores", "1"]
        command += [
            "--snakefile",
            str(Path(snakemake.scriptdir).resolve().parents[1] / "Snakefile"),
        ]
        command += ["--configfile", str(config), "--workflow-profile", "none"]
        command += ["--report", snakemake.output.html, "--", *snakemake.input.contents]
        environment = {k: v for k, v in os.environ.items() if k != "SNAKEMAKE_PROFILE"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    logger.info("%s\n%s%s", " ".join(command), done.stdout, done.stderr)
    if done.returncode:
        raise EvolossError(f"Snakemake could not write the report; see {snakemake.log[0]}")


if __name__ == "__main__":
    with script_logging(snakemake) as logger:
        main(snakemake, logger)
