"""Stage 1 and 2 of the method: genetic programming, with local search for evomal."""


rule search_loss:
    """Evolve loss functions for a task with its first model; the best, by fitness and size, go to the hall of fame."""
    input:
        dataset=get_dataset,
        tuned=get_tuned_rate,
    output:
        hall_of_fame="results/search_loss/{task}/{method}/seed_{search_seed}/hall_of_fame.json",
        history="results/search_loss/{task}/{method}/seed_{search_seed}/history.parquet",
    log:
        "results/logs/search_loss/{task}/{method}/seed_{search_seed}.log",
    benchmark:
        "results/benchmarks/search_loss/{task}/{method}/seed_{search_seed}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=grow(2000),
        runtime=grow(1440),
        gpu=GPU,
    params:
        checkpoints="results/checkpoints/search_loss/{task}/{method}/seed_{search_seed}",
        device=config["device"],
        local_search=get_local_search,
        method=lambda wildcards: wildcards.method,
        search=section("search"),
        seed=lambda wildcards: int(wildcards.search_seed),
        task=get_task,
        training=section("training"),
        version=VERSION,
    script:
        "../scripts/search_loss.py"
