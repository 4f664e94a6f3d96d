"""Learned losses as short formulas."""


rule simplify_loss:
    """Rewrite every loss of a hall of fame to its shortest form with the same gradient, and prove that it is the same."""
    input:
        hall_of_fame="results/search_loss/{task}/{method}/seed_{search_seed}/hall_of_fame.json",
    output:
        simplified="results/simplify_loss/{task}/{method}/seed_{search_seed}.json",
    log:
        "results/logs/simplify_loss/{task}/{method}/seed_{search_seed}.log",
    benchmark:
        "results/benchmarks/simplify_loss/{task}/{method}/seed_{search_seed}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=grow(1500),
        runtime=grow(60),
    params:
        simplify=settings.sort_keys(config["simplify"]),
        task=get_task,
        version=VERSION,
    script:
        "../scripts/simplify_loss.py"
