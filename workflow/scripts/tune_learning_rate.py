"""Tune the learning rate of the standard loss on validation data."""

from evoloss.results import write_json
from evoloss.script_logging import script_logging
from evoloss.stages.setup import StageInput
from evoloss.stages.tuning import tune_learning_rate

if __name__ == "__main__":
    with script_logging(snakemake) as log:
        result = tune_learning_rate(
            StageInput.from_snakemake(snakemake),
            snakemake.params.tune,
            snakemake.params.num_steps,
        )
        write_json(snakemake.output.tuned, result)
        log.info("best learning rate %s", result["best_learning_rate"])
