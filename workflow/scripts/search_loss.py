"""Search for a loss by genetic programming."""

from evoloss.results import write_json, write_parquet
from evoloss.script_logging import script_logging
from evoloss.stages.searching import search_loss
from evoloss.stages.setup import StageInput

if __name__ == "__main__":
    with script_logging(snakemake):
        stage = StageInput.from_snakemake(snakemake)
        hall_of_fame, history = search_loss(
            stage,
            snakemake.params.method,
            snakemake.params.search,
            snakemake.params.local_search,
            snakemake.params.seed,
        )
        write_parquet(snakemake.output.history, history, {"provenance": hall_of_fame["provenance"]})
        write_json(snakemake.output.hall_of_fame, hall_of_fame)
        stage.remove_checkpoints()
