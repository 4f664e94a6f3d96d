"""Finished losses against the standard loss."""


rule train_model:
    """Train a model from scratch with a method's losses; all methods share initial weights and batches of a seed."""
    input:
        dataset=get_dataset,
        losses=get_trained_losses,
        tuned=get_tuned_rate,
    output:
        run="results/train_model/{task}/{model}/{method}/seeds_{train_seed_group}.parquet",
    log:
        "results/logs/train_model/{task}/{model}/{method}/seeds_{train_seed_group}.log",
    benchmark:
        "results/benchmarks/train_model/{task}/{model}/{method}/seeds_{train_seed_group}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=grow(2000),
        runtime=grow(480),
        gpu=GPU,
    params:
        checkpoints="results/checkpoints/train_model/{task}/{model}/{method}/seeds_{train_seed_group}",
        device=config["device"],
        method=lambda wildcards: wildcards.method,
        search_seeds=get_search_seeds,
        task=get_task,
        train=section("train"),
        train_seeds=lambda wildcards: TRAIN_SEED_GROUPS[wildcards.train_seed_group],
        training=section("training"),
        version=VERSION,
    script:
        "../scripts/train_model.py"
