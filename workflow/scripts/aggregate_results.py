"""Bring the results of all jobs together, compare the methods, and write the tables."""

from evoloss.analysis.aggregate import aggregate_results, describe_results, write_results
from evoloss.script_logging import script_logging

INPUTS = (
    "datasets",
    "runs",
    "tuned",
    "searches",
    "histories",
    "simplified",
    "finetuned",
    "losses",
)

if __name__ == "__main__":
    with script_logging(snakemake) as log:
        inputs = {name: list(getattr(snakemake.input, name)) for name in INPUTS}
        results = aggregate_results(inputs, snakemake.params.missing)
        write_results(results, dict(snakemake.output.items()))
        for note in describe_results(results)["test_error"].notes:
            log.warning("%s", note.strip("*"))
        log.info("%d runs, %d losses", len(results.final), len(results.losses))
