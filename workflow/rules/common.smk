"""What the rules share: the package, the checked configuration, parameters and inputs. No rules."""

import hashlib
import os
import sys
from pathlib import Path

from snakemake.settings.types import DeploymentMethod

# Makes the package importable here and in every script, installed or not, also with --directory and on a cluster.
sys.path.insert(0, str(Path(workflow.basedir) / "workflow"))

import evoloss
from evoloss import config as settings
from evoloss import config_file, provenance
from evoloss.errors import ConfigError
from evoloss.results import read_json

WORKFLOW = Path(workflow.basedir) / "workflow"


def check_config():
    """Stop with one sentence if the configuration is refused; an exception would add a list of Snakefile lines."""
    files = [Path(file) for file in workflow.configfiles]
    names = [
        str(f.relative_to(Path.cwd())) if f.is_relative_to(Path.cwd()) else str(f) for f in files
    ]
    try:
        contents = [config_file.read_config(name) for name in names]  # refuses keys given twice
        config_file.drop_tasks(config, contents)
        schema = config_file.read_schema(WORKFLOW / "schemas" / "config.schema.yaml")
        settings.validate_config(config, schema, " + ".join(names) or "--config")
    except ConfigError as error:
        sys.exit(f"Error in the configuration: {error}")


check_config()

CONFIG = settings.sort_keys(config)
VERSION = evoloss.__version__
TASKS = list(config["tasks"])
DATASETS = sorted({task["dataset"] for task in config["tasks"].values()})
LEARNED_METHODS = [m for m in config["methods"] if m in settings.LEARNED_METHODS]
SEARCH_SEEDS = sorted(config["search_seeds"])
TRAIN_SEED_GROUPS = settings.group_seeds(config["train_seeds"], config["train_seeds_per_job"])
GPU = int(config["device"] == "cuda")  # "auto" must not make a cluster wait for a GPU
ENVIRONMENT = "../../envs/environment-cuda.yaml" if GPU else "../../envs/environment.yaml"
IMAGE = WORKFLOW.parent / "envs" / "evoloss.sif"

TABLE_NAMES = ["test_error", "comparison", "losses", "searches", "datasets", "origin", "missing"]
FIGURE_NAMES = ["test_error", "learning_curves", "search_progress", "filters", "losses", "formulas"]
TABLES = expand("results/tables/{name}.{ext}", name=TABLE_NAMES, ext=["csv", "md"])
FIGURES = expand("results/figures/{name}.{ext}", name=FIGURE_NAMES, ext=["svg", "png"])
REPORT_RULES = ["aggregate_results", *expand("plot_{name}", name=FIGURE_NAMES), "build_report"]

# In a report of what there is (hooks.smk) this variable names the list of the jobs without a result.
MISSING_VARIABLE = "EVOLOSS_MISSING"
MISSING = read_json(os.environ[MISSING_VARIABLE]) if MISSING_VARIABLE in os.environ else []
if MISSING:
    config["missing"] = MISSING  # for the report's first page, which sees nothing else


# Only then, because Snakemake refuses an image whose path has a space even where it would not use it.
if DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method:
    if not IMAGE.exists():
        sys.exit(f"Error: {IMAGE} is missing; envs/evoloss.def says how to build it.")
    os.environ[provenance.COMMIT_VARIABLE] = provenance.encode_commit()

    container: str(IMAGE)


wildcard_constraints:
    dataset="[A-Za-z][A-Za-z0-9_]*",
    task="[A-Za-z][A-Za-z0-9_]*",
    model="[A-Za-z][A-Za-z0-9_]*",
    method="[a-z_0-9]+",
    search_seed=r"\d+",
    train_seed_group="|".join(TRAIN_SEED_GROUPS),


def grow(amount):
    """Return a resources function: the amount, and as much again for every retry (the cluster profile retries)."""

    def get_amount(wildcards, attempt):
        return amount * attempt

    return get_amount


def section(name):
    """Return a params function: one section of the configuration, the task's own values merged, keys sorted."""

    def get_section(wildcards):
        return settings.merge_section(config, wildcards.task, name)

    return get_section


def get_local_search(wildcards):
    """The local search's settings, or nothing for a method without one: then they cannot make it run again."""
    if wildcards.method == "evomal":
        return settings.merge_section(config, wildcards.task, "local_search")
    return {}


def get_finetune(wildcards):
    """The fine-tuning's settings; gp_lfl has no constants to tune, only candidates to choose from."""
    merged = settings.merge_section(config, wildcards.task, "finetune")
    if wildcards.method == "evomal":
        return merged
    return {key: merged[key] for key in ("num_candidates", "selection_seeds")}


def get_num_train_steps(wildcards):
    """The budget of a final training alone: how its curve is drawn must not make searches run again."""
    return settings.merge_section(config, wildcards.task, "train")["steps"]


def get_task(wildcards):
    """Describe the task to a script; without a model wildcard it is the search's model, the first one."""
    task = config["tasks"][wildcards.task]
    kind, _ = settings.describe_dataset(config, task["dataset"])
    noise = task.get("label_noise")
    return {
        "data_seed": config["data_seed"],
        "dataset": task["dataset"],
        "kind": kind,
        "label_noise": settings.sort_keys(noise) if noise else None,
        "model": wildcards.get("model", task["models"][0]),
        "name": wildcards.task,
    }


def get_dataset(wildcards):
    """The arrays of the task's dataset."""
    return f"results/prepare_dataset/{config['tasks'][wildcards.task]['dataset']}.npz"


def get_csv_options(wildcards):
    """Path, target and kind of a dataset of the user's own; nothing for a built-in one."""
    return settings.sort_keys(config["datasets"].get("csv", {}).get(wildcards.dataset, {}))


def get_csv_file(wildcards):
    """The user's own file, so that editing it prepares the dataset again."""
    return get_csv_options(wildcards).get("path", [])


def get_tuned_rate(wildcards):
    """The tuned learning rate of the model, for the methods that train with it; else nothing."""
    method = wildcards.method
    learned = method in settings.LEARNED_METHODS
    if method == "baseline_tuned" or (learned and settings.uses_tuned_rate(config, wildcards.task)):
        model = get_task(wildcards)["model"]
        return f"results/tune_learning_rate/{wildcards.task}/{model}.json"
    return []


def get_trained_losses(wildcards):
    """The finished loss of every search seed, for a learned method."""
    if wildcards.method not in settings.LEARNED_METHODS:
        return []
    pattern = "results/finetune_loss/{task}/{method}/seed_{search_seed}/loss.json"
    return expand(pattern, **wildcards, search_seed=SEARCH_SEEDS)


def get_search_seeds(wildcards):
    """The search seeds whose losses a learned method trains, in the order of the files."""
    return SEARCH_SEEDS if wildcards.method in settings.LEARNED_METHODS else []


def expand_searches(pattern):
    """Fill {task}, {method} and {search_seed} for every search."""
    return expand(pattern, task=TASKS, method=LEARNED_METHODS, search_seed=SEARCH_SEEDS)


def get_losses():
    """Every finished loss."""
    return expand_searches("results/finetune_loss/{task}/{method}/seed_{search_seed}/loss.json")


def leave_out_missing(paths):
    """Leave out the files of jobs without a result; what lies at their paths stems from an earlier run."""
    absent = {file for job in MISSING for file in job["files"]}
    return [path for path in paths if path not in absent]


def expand_models(pattern, tasks=TASKS, **others):
    """Fill {task} and {model} for every model of the tasks, and what else is given."""
    return [
        path
        for task in tasks
        for path in expand(pattern, task=task, model=config["tasks"][task]["models"], **others)
    ]


def get_all_tuned_rates():
    """Every tuned learning rate that some training needs."""
    everywhere = "baseline_tuned" in config["methods"]
    learned = [t for t in TASKS if LEARNED_METHODS and settings.uses_tuned_rate(config, t)]
    return expand_models(
        "results/tune_learning_rate/{task}/{model}.json", TASKS if everywhere else learned
    )


def digest_code(*modules):
    """Hash modules of the package: as a parameter it makes a rule run again when its figure's or table's code changes.

    Only for what takes seconds. A compute rule runs again when the version is raised.
    """
    package = WORKFLOW / "evoloss"
    contents = b"".join((package / module).read_bytes() for module in sorted(modules))
    return hashlib.sha256(contents).hexdigest()[:16]


def get_captions(wildcards):
    """The captions, so that editing one rebuilds the report and nothing else."""
    return sorted(str(path) for path in (WORKFLOW / "report").glob("*.rst"))
