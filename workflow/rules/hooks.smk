"""What happens before the first job and at the end: the report's place, or a report of what there is. No rules."""

import json
import subprocess

from evoloss.results import write_atomically

RECORDS = Path(".snakemake") / "evoloss"


def write_record(name, data):
    """Write a JSON file for other Snakemake processes, keys in their order, and return its absolute path."""
    path = (RECORDS / name).absolute()
    text = json.dumps(data, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def freeze_config():
    """Make jobs on a cluster read a copy of the configuration that the run was planned with.

    Each of them reads the files that follow --configfile when it starts, and these may have been edited since.
    """
    digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]
    workflow.overwrite_configfiles[:] = [write_record(f"config_{digest}.json", config)]


def find_failed():
    """Return the jobs that failed for good; those of a group fail together."""
    return {
        job
        for unit in workflow.scheduler.failed
        for job in (unit.jobs if unit.is_group() else [unit])
    }


def find_causes(job, failed):
    """Return the failed jobs that kept a job from running, or the job itself."""
    if job in failed:
        return {job}
    undone = (need for need in workflow.dag.dependencies[job] if is_undone(need))
    return set().union(*(find_causes(need, failed) for need in undone))


def is_undone(job):
    """Whether a job had to run and has not ended well."""
    return workflow.dag.needrun(job) and not workflow.dag.finished(job)


def describe_job(job, failed):
    """Describe a job without a result: what it is, the logs that say why, and the files that it would have made."""
    return {
        "stage": job.rule.name,
        **{name: str(value) for name, value in job.wildcards_dict.items()},
        "status": "failed" if job in failed else "not run",
        "logs": sorted(str(log) for cause in find_causes(job, failed) for log in cause.log),
        "files": sorted(map(str, job.output)),
    }


def report_what_there_is():
    """Build the requested tables, figures and report without what failed jobs left missing.

    A second Snakemake runs the rules of the report alone; the first one schedules nothing any more, so the lock that
    it still holds protects nothing. An interrupted run builds nothing.
    """
    scheduler = workflow.scheduler
    if not workflow.execution_settings.keep_going or scheduler.running or scheduler.open_jobs:
        return
    failed, undone = find_failed(), [job for job in workflow.dag.jobs if is_undone(job)]
    stages = [job for job in undone if job.rule.name not in [*REPORT_RULES, "all"]]
    targets = sorted(
        str(file) for job in undone if job.rule.name in REPORT_RULES for file in job.output
    )
    if not stages or not targets:
        return
    missing = sorted((describe_job(job, failed) for job in stages), key=rank_missing)
    log = Path("results/logs/partial_report.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    done = build_targets(targets, write_record("missing.json", missing), log)
    count = f"{len(missing)} job{'s' if len(missing) > 1 else ''}"
    if done.returncode:
        logger.error(f"What {count} left could not be reported; see {log}.")
    else:
        logger.error(
            f"Tables, figures and report lack {count}, listed in results/tables/missing.md. "
            "The same command makes what is missing, and the whole report."
        )


def rank_missing(entry):
    """Order missing jobs: failed ones first, then in the order of the stages."""
    stages = [rule.name for rule in workflow.rules]
    return entry["status"] != "failed", stages.index(entry["stage"]), entry["files"]


def build_targets(targets, missing, log):
    """Run Snakemake for files of the report, with the list of what is missing; its output goes to ``log``."""
    resources, deployment = workflow.resource_settings, workflow.deployment_settings
    command = [sys.executable, "-m", "snakemake", "--nolock", "--no-hooks", "--rerun-incomplete"]
    command += ["--cores", str(resources.cores or resources.local_cores or 1)]
    command += ["--snakefile", str(workflow.main_snakefile), "--workflow-profile", "none"]
    command += ["--configfile", *map(str, workflow.overwrite_configfiles)]
    methods = [method.item_to_choice() for method in deployment.deployment_method]
    command += ["--software-deployment-method", *methods] if methods else []
    for name in ("conda_prefix", "apptainer_prefix", "apptainer_args"):
        value = getattr(deployment, name)
        command += [f"--{name.replace('_', '-')}={value}"] if value else []
    command += ["--allowed-rules", *REPORT_RULES, "--", *targets]
    environment = {k: v for k, v in os.environ.items() if k != "SNAKEMAKE_PROFILE"}
    environment[MISSING_VARIABLE] = str(missing)
    with log.open("w", encoding="utf-8") as stream:
        return subprocess.run(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False
        )


def name_report():
    """Say where the report is, if this run has built it."""
    for job in workflow.dag.jobs:
        if job.rule.name == "build_report" and workflow.dag.finished(job):
            logger.info(f"The report is {Path(str(job.output.html)).absolute()}")


onstart:
    freeze_config()


onsuccess:
    name_report()


onerror:
    # the run has failed already: nothing here may hide its own last messages
    try:
        report_what_there_is()
    except Exception as error:
        logger.error(f"The results that there are could not be reported: {error!r}")
