"""Fine-tune the constants of a search's best formulas, and write the loss to take home."""

from evoloss.losses.loss_file import save_loss
from evoloss.results import read_json, write_json
from evoloss.script_logging import script_logging
from evoloss.stages.finetuning import finetune_loss
from evoloss.stages.setup import StageInput

if __name__ == "__main__":
    with script_logging(snakemake):
        params = snakemake.params
        result = finetune_loss(
            StageInput.from_snakemake(snakemake),
            read_json(snakemake.input.simplified),
            params.method,
            params.finetune,
            params.num_steps,
            params.seed,
        )
        write_json(snakemake.output.finetune, result.report)
        save_loss(
            snakemake.output.loss,
            kind=params.task["kind"],
            expression=result.expression,
            scale=result.scale,
            reason=result.report["reason"],
            provenance=result.report["provenance"],
        )
