"""Simplify the losses of a hall of fame and prove that they stay the same."""

from evoloss.results import read_json, write_json
from evoloss.script_logging import script_logging
from evoloss.stages.simplifying import simplify_hall_of_fame

if __name__ == "__main__":
    with script_logging(snakemake):
        simplified = simplify_hall_of_fame(
            read_json(snakemake.input.hall_of_fame),
            snakemake.params.task["kind"],
            snakemake.params.simplify["tolerance"],
        )
        write_json(snakemake.output.simplified, simplified)
