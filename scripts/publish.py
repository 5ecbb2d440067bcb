# SPDX-License-Identifier: Apache-2.0
"""STEP 5. Push a run to the Hub: the adapters, the merged team, the tuned team with its card, and the Space.

    python scripts/publish.py --run_dir outputs/quickstart --namespace ME --dry_run
    python scripts/publish.py --run_dir outputs/quickstart --namespace ME

Repositories are private unless --public is given. Token, namespace and permissions are checked, and every repository is
made, before the first file is uploaded. Run it again after an interruption: files that are there are not uploaded twice.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, SpaceCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from rich.table import Table

from finteam_experts.errors import InputError, nearest, run
from finteam_experts.files import file_hash, read_json, write_json
from finteam_experts.fingerprints import fingerprint
from finteam_experts.models import ADAPTER_FILE
from finteam_experts.publishing.cards import render, snippet
from finteam_experts.publishing.repositories import PublishedRun, Repo, check_licence, check_texts, data_licences
from finteam_experts.screen import screen

PARTS = ("dense", "adapters", "moe", "moe-instruct", "space")
SPACE = Path(__file__).parents[1] / "space"
SPACE_FILES = (
    "README.md", "app.py", "team.py", "panels.py", "examples.py", "gpu.py", "chats.py", "prompts.py", "requirements.txt",
)  # fmt: skip
PEAK = "\nimport resource\nprint()\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
ADVICE = {
    401: "Log in with 'hf auth login', or set HF_TOKEN to a token that is valid.",
    402: "A Gradio Space needs a paid plan. Publish the models alone: leave space out of --parts.",
    403: "The token may not write there. Make one with write access, or choose another --namespace.",
    404: "The repository is gone, or the token may not see it.",
    412: "Someone else changed the repository meanwhile. Run the same command again.",
    503: "The Hub is out of service. Run the same command again later.",
}


def try_snippet(published: PublishedRun, repo: Repo) -> dict[str, Any]:
    """What the card's snippet printed and took when it was run on the run's own folders; kept until these change."""
    folder, dense = published.run_dir / repo.part, published.folder_of(published.dense)
    known_file = published.run_dir / "reports" / "snippets.json"
    known = read_json(known_file) if known_file.exists() else {}
    code = snippet(published, repo)
    inputs = {
        "code": code,
        "model": file_hash(folder / ADAPTER_FILE) if repo.card == "adapter" else fingerprint(folder),
    }
    if known.get(repo.part, {}).get("inputs") != inputs:
        for name, path in {repo.id: folder, published.id_of(published.dense): dense}.items():
            code = code.replace(json.dumps(name), json.dumps(str(path)))
        print(f"Running the snippet of {repo.id}")
        began = time.monotonic()
        # an absent Hub must not slow it, and the card's figures are of the model alone
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", code + PEAK]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if ended.returncode:
            raise InputError(f"the card's snippet fails on {folder}:\n{ended.stderr[-2000:]}")
        output, _, peak = ended.stdout.strip().rpartition("\n")
        known[repo.part] = {
            "inputs": inputs,
            "output": output.strip(),
            "seconds": round(time.monotonic() - began, 1),
            "peak_gib": round(int(peak) / (2**30 if sys.platform == "darwin" else 2**20), 1),  # bytes, KiB elsewhere
            "cores": os.cpu_count(),
        }
        write_json(known_file, known)
    return known[repo.part]


def add_cards(published: PublishedRun, repos: list[Repo], licence: str, tag: str, licences: dict[str, str]) -> None:
    """Put each repository's README.md into it."""
    for repo in repos:
        if repo.kind == "space":
            repo.files = {name: SPACE / name for name in SPACE_FILES}
            card = SpaceCard.load(SPACE / "README.md")
            card.data.models = [published.id_of("moe-instruct")]
            repo.files["README.md"] = str(card).encode()
        else:
            tried = try_snippet(published, repo)
            repo.files["README.md"] = render(published, repo, licence, tag, licences, tried)
            ModelCard(repo.files["README.md"].decode())  # raises if its metadata are not what the Hub reads


def print_plan(repos: list[Repo], visibility: str) -> None:
    """Every file of every repository with its size."""
    table = Table("repository", "file", title=f"To publish ({visibility})")
    table.add_column("MB", justify="right")
    for repo in repos:
        for path, size in repo.sizes():
            table.add_row(f"{repo.kind} {repo.id}", path, f"{size / 1e6:,.3f}")
        table.add_section()
    files, size = sum(len(repo.files) for repo in repos), sum(size for repo in repos for _, size in repo.sizes())
    table.add_row("all", f"{files} files", f"{size / 1e6:,.1f}")
    screen(140).print(table)


def preflight(api: HfApi, namespace: str) -> None:
    """`InputError` unless the token may write to the namespace."""
    user = api.whoami()
    names = [user["name"], *(org["name"] for org in user["orgs"])]
    if namespace not in names:
        owners = f"the token belongs to {', '.join(names)}.{nearest(namespace, names)}"
        raise InputError(f"--namespace {namespace}: {owners}")
    if user["auth"].get("accessToken", {}).get("role") == "read":
        raise InputError("the token only reads. Make one with write access at https://huggingface.co/settings/tokens")


def create(api: HfApi, repo: Repo, model: str, *, private: bool) -> None:
    """Make the repository, if it is not there. A Space shows `model`."""
    options = {}
    if repo.kind == "space":
        options = {"space_sdk": "gradio", "space_variables": [{"key": "MODEL_ID", "value": model}]}
    api.create_repo(repo.id, repo_type=repo.kind, private=private, exist_ok=True, **options)


def upload(api: HfApi, repo: Repo, tag: str) -> str:
    """Commit the files that differ from those on the Hub, tag the result, and say what was done."""
    before = api.repo_info(repo.id, repo_type=repo.kind).sha
    operations = [CommitOperationAdd(path, content) for path, content in sorted(repo.files.items())]
    message = f"FinTeamExperts {tag}: {repo.title}"
    commit = api.create_commit(
        repo.id, operations, repo_type=repo.kind, commit_message=message, parent_commit=before
    ).oid
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo.id, repo_type=repo.kind).tags}
    if tags.get(tag, commit) != commit:
        advice = "Name a new one with --version; the published files stay."
        raise InputError(f"{repo.id}: version {tag} was published with other files. {advice}")
    if tag not in tags:
        api.create_tag(repo.id, tag=tag, revision=commit, repo_type=repo.kind)
    return "unchanged" if commit == before else "uploaded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--data_dir", type=Path, help="data directory of the run (default: RUN_DIR/data)")
    parser.add_argument("--namespace", required=True, help="user or organisation on the Hub")
    parser.add_argument("--name", default="FinTeam-SmolLM2-135M", help="of the tuned team; the others' begin with it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to publish (default: all)")
    parser.add_argument("--base_model", metavar="ID", help="the dense base on the Hub, if the run was made from one")
    parser.add_argument("--license", default="apache-2.0", help="of the weights, as the Hub names it")
    parser.add_argument("--version", default=version("finteam-experts"), help="tag of what is uploaded")
    parser.add_argument("--public", action="store_true", help="everyone may see it")
    parser.add_argument("--dry_run", action="store_true", help="list repositories, files and sizes, upload nothing")
    args = parser.parse_args()

    published = PublishedRun(args.run_dir, args.namespace, args.name, args.base_model)
    licences = data_licences(args.data_dir or args.run_dir / "data")
    check_licence(args.license, licences, args.base_model or "", args.name)
    repos = published.repos([part for part in PARTS if part in args.parts])
    for repo in repos:
        try:
            validate_repo_id(repo.id)
        except HFValidationError as error:
            raise InputError(
                f"--namespace {args.namespace} and --name {args.name} give no name of a repository: {error}"
            ) from None
    api, tag, doing = HfApi(), f"v{args.version}", "preflight"
    try:
        if not args.dry_run:
            preflight(api, args.namespace)
            for repo in repos:
                doing = f"making {repo.id}"
                create(api, repo, published.id_of("moe-instruct"), private=not args.public)
        add_cards(published, repos, args.license, tag, licences)
        check_texts(repos)
        print_plan(repos, "public" if args.public else "private")
        if args.dry_run:
            print("Nothing was uploaded: --dry_run")
            return
        for repo in repos:
            doing = f"uploading {repo.id}"
            print(f"{api.endpoint}/{'spaces/' * (repo.kind == 'space')}{repo.id}: {upload(api, repo, tag)}")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = ADVICE.get(status, "Run the same command again; uploaded files stay.")
        raise InputError(f"{doing}: the Hub answered {error.server_message or error}. {advice}") from None
    except (httpx2.TransportError, OSError, RuntimeError) as error:
        advice = "Run the same command again: uploaded files stay."
        raise InputError(f"{doing}: the upload broke off ({error}). {advice}") from None
    if not args.public and any(repo.kind == "space" for repo in repos):
        print("The Space needs a secret HF_TOKEN that may read the private model: set it in the Space's settings.")


if __name__ == "__main__":
    run(main)
