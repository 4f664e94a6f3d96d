"""Write one dataset, split and scaled, and its card."""

from evoloss.script_logging import script_logging
from evoloss.tasks.datasets import prepare_dataset, save_dataset

if __name__ == "__main__":
    with script_logging(snakemake):
        arrays, card = prepare_dataset(
            snakemake.wildcards.dataset,
            data_seed=snakemake.params.data_seed,
            split=snakemake.params.split,
            options=snakemake.params.options,
        )
        save_dataset(arrays, card, snakemake.output.arrays, snakemake.output.card)
