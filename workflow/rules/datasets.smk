"""Data, and what is measured on it before any search."""


rule prepare_dataset:
    """Split a dataset by its own seed, scale it with training statistics, and describe it on a card."""
    input:
        source=get_csv_file,
    output:
        arrays="results/prepare_dataset/{dataset}.npz",
        card="results/prepare_dataset/{dataset}.json",
    log:
        "results/logs/prepare_dataset/{dataset}.log",
    benchmark:
        "results/benchmarks/prepare_dataset/{dataset}.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=1500,
        runtime=10,
    params:
        data_seed=config["data_seed"],
        options=get_csv_options,
        split=settings.sort_keys(config["datasets"]["split"]),
        version=VERSION,
    script:
        "../scripts/prepare_dataset.py"


rule tune_learning_rate:
    """Find the learning rate with which the standard loss does best on validation data."""
    input:
        dataset=get_dataset,
    output:
        tuned="results/tune_learning_rate/{task}/{model}.json",
    log:
        "results/logs/tune_learning_rate/{task}/{model}.log",
    benchmark:
        "results/benchmarks/tune_learning_rate/{task}/{model}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=grow(2000),
        runtime=grow(120),
        gpu=GPU,
    params:
        device=config["device"],
        num_steps=get_num_train_steps,
        task=get_task,
        training=section("training"),
        tune=section("tune_learning_rate"),
        version=VERSION,
    script:
        "../scripts/tune_learning_rate.py"
