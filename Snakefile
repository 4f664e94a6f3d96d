"""Evolve a loss function for each task, make it readable, fine-tune it, and try it against the standard loss."""

from snakemake.utils import min_version

min_version("9.10")


# A --configfile replaces config.yaml; to change single keys, give both: --configfile config.yaml mine.yaml
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/datasets.smk"  # prepare_dataset, tune_learning_rate
include: "workflow/rules/search.smk"  # search_loss
include: "workflow/rules/simplify.smk"  # simplify_loss
include: "workflow/rules/finetune.smk"  # finetune_loss
include: "workflow/rules/evaluate.smk"  # train_model
include: "workflow/rules/tables.smk"  # aggregate_results
include: "workflow/rules/figures.smk"  # plot_*
include: "workflow/rules/report.smk"  # build_report
include: "workflow/rules/hooks.smk"  # before the first job; at the end of a run


rule all:
    """Build everything: learned losses, final trainings, tables, figures and the report."""
    input:
        report="results/report.html",
        tables=TABLES,
        figures=FIGURES,
        losses=get_losses(),
