# SPDX-License-Identifier: Apache-2.0
"""The pipeline as SLURM jobs: which job waits for which, and what each would run. SLURM's commands are doubles."""

import os
import shlex
import subprocess

import pytest

from conftest import REPOSITORY, ROLES, shell

SBATCH = """#!/bin/bash
number=$(( $(ls {jobs} | wc -l) + 100 ))
printf '%s\\0' "$@" > {jobs}/$number
echo $number
"""
SRUN = '#!/bin/bash\nexec "$@"\n'
SCONTROL = "#!/bin/bash\nprintf 'first\\nsecond\\n'\n"
ACCELERATE = '#!/bin/bash\necho "accelerate $*"\n'
OPTIONS = ("--recipes", "recipes/llama3-8b", "--base", "ID", "--data_dir", "DIR")


@pytest.fixture
def cluster(tmp_path):
    """Runs a command where SLURM's programs and accelerate only note what they are asked for."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "bin").mkdir()
    for name, text in {
        "sbatch": SBATCH.replace("{jobs}", str(tmp_path / "jobs")),
        "srun": SRUN,
        "scontrol": SCONTROL,
        "accelerate": ACCELERATE,
    }.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_PROCID": "1",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }

    def jobs(*arguments):
        ended = shell("bash", "recipes/slurm.sh", *OPTIONS, "--run_dir", tmp_path / "run", *arguments, env=environment)
        assert ended.returncode == 0, ended.stderr
        found = {}
        for file in sorted((tmp_path / "jobs").iterdir()):
            words = file.read_text().split("\0")[:-1]
            options = dict(zip(words[1::2], words[2::2], strict=True))  # after --parsable, all have a value
            options["id"] = file.name
            found[options["--job-name"].removeprefix("finteam-")] = options
        return found

    jobs.environment = environment
    return jobs


def test_every_stage_waits_for_what_it_reads(cluster):
    jobs = cluster("--sbatch", "--partition gpu")
    assert list(jobs) == [*ROLES, "merge", "team", "dense", "evaluate"]
    waits = {name: options.get("--dependency") for name, options in jobs.items()}
    ids = {name: options["id"] for name, options in jobs.items()}
    assert waits == {
        **dict.fromkeys(ROLES),
        "merge": "afterok:" + ":".join(ids[role] for role in ROLES),
        "team": f"afterok:{ids['merge']}",
        "dense": f"afterok:{ids['team']}",
        "evaluate": f"afterok:{ids['dense']}",
    }
    assert all(options["--partition"] == "gpu" for options in jobs.values())


def test_what_the_jobs_launch(cluster):
    jobs = cluster("--nodes", 2, "--gpus", 4)
    started = {}
    for name in (*ROLES, "team", "dense"):
        command = ["bash", "-c", jobs[name]["--wrap"]]
        text = subprocess.run(command, env=cluster.environment, capture_output=True, text=True).stdout
        assert f"--data_dir {REPOSITORY}/DIR" in text  # the jobs need not start where this was called
        started[name] = text.replace(f"{REPOSITORY}/", "")
    assert jobs["team"]["--nodes"] == "2"
    team = shlex.split(started["team"])
    options = dict(zip(team[2:-1:2], team[3::2], strict=False))
    assert options["--config_file"] == "recipes/accelerate/multi_node.yaml"
    assert (options["--num_processes"], options["--num_machines"], options["--machine_rank"]) == ("8", "2", "1")
    assert options["--main_process_ip"] == "first"
    for role in ROLES:
        words = shlex.split(started[role])
        assert f"--role {role}" in started[role]
        assert {word for word in words if word.startswith("recipes/")} == {
            "recipes/accelerate/multi_gpu.yaml", "recipes/train_expert.py", "recipes/llama3-8b/train_expert.yaml"
        }  # fmt: skip
    named = {word for text in started.values() for word in shlex.split(text) if word.startswith("recipes/")}
    assert all((REPOSITORY / word).is_file() for word in named)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "ID"), "--recipes is missing"),
        (("--recipe", "x"), "unknown option '--recipe'"),
        (
            (*OPTIONS, "--run_dir", "r", "--recipes", "recipes/nothing"),
            "recipes/nothing/train_expert.yaml does not exist",
        ),
    ],
)
def test_nothing_is_submitted_on_bad_input(arguments, message):
    ended = shell("bash", "recipes/slurm.sh", *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
