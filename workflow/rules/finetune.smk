"""The constants of the simplified formulas, optimised by unrolled differentiation."""


rule finetune_loss:
    """Fine-tune the constants of a search's best formulas, and finish the one that does best on validation data."""
    input:
        dataset=get_dataset,
        simplified="results/simplify_loss/{task}/{method}/seed_{search_seed}.json",
        tuned=get_tuned_rate,
    output:
        finetune="results/finetune_loss/{task}/{method}/seed_{search_seed}/finetune.json",
        loss="results/finetune_loss/{task}/{method}/seed_{search_seed}/loss.json",
    log:
        "results/logs/finetune_loss/{task}/{method}/seed_{search_seed}.log",
    benchmark:
        "results/benchmarks/finetune_loss/{task}/{method}/seed_{search_seed}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=grow(2000),
        runtime=grow(480),
        gpu=GPU,
    params:
        device=config["device"],
        finetune=get_finetune,
        method=lambda wildcards: wildcards.method,
        num_steps=get_num_train_steps,
        seed=lambda wildcards: int(wildcards.search_seed),
        task=get_task,
        training=section("training"),
        version=VERSION,
    script:
        "../scripts/finetune_loss.py"
