"""Tables, figures and the report, from result files alone."""


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
                "results/train_model/{task}/{model}/{method}/seed_{train_seed}.parquet",
                method=config["methods"],
                train_seed=TRAIN_SEEDS,
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
            labels={"content": "Test error", "form": "table"},
        ),
        test_error_md="results/tables/test_error.md",
        comparison_csv=report(
            "results/tables/comparison.csv",
            caption="../report/table_comparison.rst",
            category="Results",
            labels={"content": "Comparison with the baselines", "form": "table"},
        ),
        comparison_md="results/tables/comparison.md",
        losses_csv=report(
            "results/tables/losses.csv",
            caption="../report/table_losses.rst",
            category="Learned losses",
            labels={"content": "Learned losses", "form": "table"},
        ),
        losses_md="results/tables/losses.md",
        searches_csv=report(
            "results/tables/searches.csv",
            caption="../report/table_searches.rst",
            category="Search",
            labels={"content": "Searches", "form": "table"},
        ),
        searches_md="results/tables/searches.md",
        datasets_csv=report(
            "results/tables/datasets.csv",
            caption="../report/table_datasets.rst",
            category="Data",
            labels={"content": "Datasets", "form": "table"},
        ),
        datasets_md="results/tables/datasets.md",
        origin_csv=report(
            "results/tables/origin.csv",
            caption="../report/table_origin.rst",
            category="Origin",
            labels={"content": "Versions and hardware", "form": "table"},
        ),
        origin_md="results/tables/origin.md",
        missing_csv=(
            report(
                "results/tables/missing.csv",
                caption="../report/table_missing.rst",
                category="Missing",
                labels={"content": "Jobs without a result", "form": "table"},
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


rule plot_test_error:
    """Final test error of every method: mean, spread and single seeds."""
    input:
        final="results/aggregate_results/final.parquet",
        comparison="results/aggregate_results/comparison.parquet",
    output:
        png="results/figures/test_error.png",
        svg=report(
            "results/figures/test_error.svg",
            caption="../report/test_error.rst",
            category="Results",
            labels={"content": "Test error", "form": "figure"},
        ),
    log:
        "results/logs/plot_test_error.log",
    benchmark:
        "results/benchmarks/plot_test_error.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=1000,
        runtime=20,
    params:
        code=digest_code("analysis/figure_test_error.py", "analysis/style.py"),
        version=VERSION,
    script:
        "../scripts/plot_test_error.py"


rule plot_learning_curves:
    """Error while training with the finished losses, mean with bands."""
    input:
        runs="results/aggregate_results/runs.parquet",
    output:
        png="results/figures/learning_curves.png",
        svg=report(
            "results/figures/learning_curves.svg",
            caption="../report/learning_curves.rst",
            category="Results",
            labels={"content": "Learning curves", "form": "figure"},
        ),
    log:
        "results/logs/plot_learning_curves.log",
    benchmark:
        "results/benchmarks/plot_learning_curves.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=1000,
        runtime=20,
    params:
        code=digest_code("analysis/figure_learning_curves.py", "analysis/style.py"),
        version=VERSION,
    script:
        "../scripts/plot_learning_curves.py"


rule plot_search_progress:
    """Best and median fitness of the searches by generation."""
    input:
        searches="results/aggregate_results/searches.parquet",
    output:
        png="results/figures/search_progress.png",
        svg=report(
            "results/figures/search_progress.svg",
            caption="../report/search_progress.rst",
            category="Search",
            labels={"content": "Search progress", "form": "figure"},
        ),
    log:
        "results/logs/plot_search_progress.log",
    benchmark:
        "results/benchmarks/plot_search_progress.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=1000,
        runtime=20,
    params:
        code=digest_code("analysis/figure_search_progress.py", "analysis/style.py"),
        version=VERSION,
    script:
        "../scripts/plot_search_progress.py"


rule plot_filters:
    """What the filters caught in each search."""
    input:
        searches="results/aggregate_results/searches.parquet",
    output:
        png="results/figures/filters.png",
        svg=report(
            "results/figures/filters.svg",
            caption="../report/filters.rst",
            category="Search",
            labels={"content": "Filters", "form": "figure"},
        ),
    log:
        "results/logs/plot_filters.log",
    benchmark:
        "results/benchmarks/plot_filters.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=1000,
        runtime=20,
    params:
        code=digest_code("analysis/figure_filters.py", "analysis/style.py"),
        version=VERSION,
    script:
        "../scripts/plot_filters.py"


rule plot_losses:
    """Each learned loss as a curve beside the standard loss: value and gradient."""
    input:
        losses="results/aggregate_results/losses.parquet",
    output:
        png="results/figures/losses.png",
        svg=report(
            "results/figures/losses.svg",
            caption="../report/losses.rst",
            category="Learned losses",
            labels={"content": "Curves", "form": "figure"},
        ),
    log:
        "results/logs/plot_losses.log",
    benchmark:
        "results/benchmarks/plot_losses.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=1000,
        runtime=20,
    params:
        code=digest_code(
            "analysis/figure_losses.py",
            "analysis/loss_curves.py",
            "analysis/style.py",
        ),
        version=VERSION,
    script:
        "../scripts/plot_losses.py"


rule plot_formulas:
    """The learned losses as typeset formulas."""
    input:
        losses="results/aggregate_results/losses.parquet",
    output:
        png="results/figures/formulas.png",
        svg=report(
            "results/figures/formulas.svg",
            caption="../report/formulas.rst",
            category="Learned losses",
            labels={"content": "Formulas", "form": "figure"},
        ),
    log:
        "results/logs/plot_formulas.log",
    benchmark:
        "results/benchmarks/plot_formulas.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=1000,
        runtime=20,
    params:
        code=digest_code("analysis/figure_formulas.py", "analysis/style.py"),
        version=VERSION,
    script:
        "../scripts/plot_formulas.py"


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
