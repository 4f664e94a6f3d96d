"""One page of tables and figures."""


rule build_report:
    """Collect tables and figures in one HTML page: Snakemake's own report, written by a rule so that one command does it."""
    input:
        captions=get_captions,
        contents=TABLES + FIGURES,
    output:
        html="results/report.html",
    log:
        "results/logs/build_report.log",
    benchmark:
        "results/benchmarks/build_report.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    container:
        None
    threads: 1
    resources:
        mem_mb=1000,
        runtime=20,
    params:
        config=CONFIG,
        missing=MISSING,
        version=VERSION,
    script:
        "../scripts/build_report.py"
