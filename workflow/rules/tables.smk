"""The tables, from result files alone."""


rule aggregate_results:
    """Bring all results together, compare the methods, and write the tables."""
    input:
        datasets=leave_out_missing(
            expand("results/prepare_dataset/{dataset}.json", dataset=DATASETS)
        ),
        finetuned=leave_out_missing(
            expand_searches(
                "results/finetune_loss/{task}/{method}/seed_{search_seed}/finetune.json"
            )
        ),
        histories=leave_out_missing(
            expand_searches(
                "results/search_loss/{task}/{method}/seed_{search_seed}/history.parquet"
            )
        ),
        losses=leave_out_missing(get_losses()),
        runs=leave_out_missing(
            expand_models(
                "results/train_model/{task}/{model}/{method}/seeds_{train_seed_group}.parquet",
                method=config["methods"],
                train_seed_group=TRAIN_SEED_GROUPS,
            )
        ),
        searches=leave_out_missing(
            expand_searches(
                "results/search_loss/{task}/{method}/seed_{search_seed}/hall_of_fame.json"
            )
        ),
        simplified=leave_out_missing(
            expand_searches("results/simplify_loss/{task}/{method}/seed_{search_seed}.json")
        ),
        tuned=leave_out_missing(get_all_tuned_rates()),
    output:
        runs="results/aggregate_results/runs.parquet",
        final="results/aggregate_results/final.parquet",
        comparison="results/aggregate_results/comparison.parquet",
        losses="results/aggregate_results/losses.parquet",
        searches="results/aggregate_results/searches.parquet",
        test_error_csv=report(
            "results/tables/test_error.csv",
            caption="../report/table_test_error.rst",
            category="Results",
            labels={"content": "Test error (table)"},
        ),
        test_error_md="results/tables/test_error.md",
        comparison_csv=report(
            "results/tables/comparison.csv",
            caption="../report/table_comparison.rst",
            category="Results",
            labels={"content": "Comparison with the baselines (table)"},
        ),
        comparison_md="results/tables/comparison.md",
        losses_csv=report(
            "results/tables/losses.csv",
            caption="../report/table_losses.rst",
            category="Learned losses",
            labels={"content": "Learned losses (table)"},
        ),
        losses_md="results/tables/losses.md",
        searches_csv=report(
            "results/tables/searches.csv",
            caption="../report/table_searches.rst",
            category="Search",
            labels={"content": "Searches (table)"},
        ),
        searches_md="results/tables/searches.md",
        datasets_csv=report(
            "results/tables/datasets.csv",
            caption="../report/table_datasets.rst",
            category="Data",
            labels={"content": "Datasets (table)"},
        ),
        datasets_md="results/tables/datasets.md",
        origin_csv=report(
            "results/tables/origin.csv",
            caption="../report/table_origin.rst",
            category="Origin",
            labels={"content": "Versions and hardware (table)"},
        ),
        origin_md="results/tables/origin.md",
        missing_csv=(
            report(
                "results/tables/missing.csv",
                caption="../report/table_missing.rst",
                category="Missing",
                labels={"content": "Jobs without a result (table)"},
            )
            if MISSING
            else "results/tables/missing.csv"
        ),
        missing_md="results/tables/missing.md",
    log:
        "results/logs/aggregate_results.log",
    benchmark:
        "results/benchmarks/aggregate_results.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=1500,
        runtime=20,
    params:
        code=digest_code(
            "analysis/aggregate.py",
            "analysis/final.py",
            "analysis/load.py",
            "analysis/load_losses.py",
            "analysis/missing.py",
            "analysis/origin.py",
            "analysis/statistics.py",
            "analysis/tables.py",
        ),
        missing=MISSING,
        version=VERSION,
    script:
        "../scripts/aggregate_results.py"
