"""The figures, from the aggregated results."""


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
            labels={"content": "Test error (figure)"},
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
            labels={"content": "Learning curves (figure)"},
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
            labels={"content": "Search progress (figure)"},
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
            labels={"content": "Filters (figure)"},
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
            labels={"content": "Curves (figure)"},
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
            labels={"content": "Formulas (figure)"},
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
