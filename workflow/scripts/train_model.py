"""Train a model from scratch with a method's losses."""

from evoloss.results import write_parquet
from evoloss.script_logging import script_logging
from evoloss.stages.setup import StageInput
from evoloss.stages.training import train_model

if __name__ == "__main__":
    with script_logging(snakemake):
        params = snakemake.params
        stage = StageInput.from_snakemake(snakemake)
        columns, metadata = train_model(
            stage,
            params.method,
            snakemake.input.get("losses") or [],
            params.search_seeds,
            params.train,
            params.train_seeds,
        )
        write_parquet(snakemake.output.run, columns, metadata)
        stage.remove_checkpoints()
