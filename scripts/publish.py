# SPDX-License-Identifier: Apache-2.0
"""STEP 5. Push a run to the Hub: the adapters, the merged team, the tuned team with its card, and the Space.

    python scripts/publish.py --run_dir outputs/quickstart --namespace ME --dry_run
    python scripts/publish.py --run_dir outputs/quickstart --namespace ME

Repositories are private unless --public is given. Everything is checked before the first repository is made: names, licences, the
token, the cards, and the snippet of each card, which is run once and kept in RUN_DIR/reports. A dry run runs and makes nothing.
Run it again after an interruption: files that are there are not uploaded twice.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, SpaceCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from finteam_experts.errors import InputError, nearest, run
from finteam_experts.files import read_json, write_json
from finteam_experts.publishing.cards import Cards
from finteam_experts.publishing.repositories import (
    PARTS,
    PublishedRun,
    Repo,
    check_licence,
    check_texts,
    data_licences,
)
from finteam_experts.runs import RECORD

SPACE = Path(__file__).parents[1] / "space"
NOT_RUN = {"output": "(not run yet)", "seconds": 0, "peak_gib": 0, "cores": 0}
PEAK = "\nimport resource\nprint()\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
ADVICE = {
    401: "Log in with 'hf auth login', or set HF_TOKEN to a token that is valid.",
    402: "A Gradio Space needs a paid plan. Publish the models alone: leave space out of --parts.",
    403: "The token may not write there. Make one with write access, or choose another --namespace.",
    404: "The repository is gone, or the token may not see it.",
    412: "Someone else changed the repository meanwhile. Run the same command again.",
    503: "The Hub is out of service. Run the same command again later.",
}


def tried_snippet(cards: Cards, repo: Repo, *, run_it: bool) -> dict[str, Any] | None:
    """What the card's snippet prints and takes on the run's own folders: kept from before, or run now.

    It is run again when the snippet changes, or a file of the model, which its size and time tell without reading it.
    """
    published, code = cards.run, cards.snippet(repo)
    stats = {name: file.stat() for name, file in repo.files.items() if isinstance(file, Path) and name != RECORD}
    model = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items() if not name.endswith(".png")}
    inputs, file = {"code": code, "model": model}, published.run_dir / "reports" / "snippets.json"
    kept = read_json(file) if file.is_file() else {}
    if kept.get(repo.part, {}).get("inputs") == inputs:
        return kept[repo.part]
    if not run_it:
        return None
    for part in (repo.part, published.dense):
        code = code.replace(json.dumps(published.id_of(part)), json.dumps(str(published.folder_of(part))))
    print(f"Running the snippet of {repo.id}")
    began = time.monotonic()
    # an absent Hub must not slow it, and the card's figures are of the model alone
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code + PEAK]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        raise InputError(f"the card's snippet fails on {published.run_dir / repo.part}:\n{ended.stderr[-2000:]}")
    output, _, peak = ended.stdout.strip().rpartition("\n")
    kept[repo.part] = {
        "inputs": inputs,
        "output": output.strip(),
        "seconds": round(time.monotonic() - began, 1),
        "peak_gib": round(int(peak) / (2**30 if sys.platform == "darwin" else 2**20), 1),  # bytes, KiB elsewhere
        "cores": os.cpu_count(),
    }
    write_json(file, kept)
    return kept[repo.part]


def space_files(model: str) -> dict[str, Path | bytes]:
    """The files of the Space, which shows `model`."""
    card = SpaceCard.load(SPACE / "README.md")
    card.data.models = [model]
    files = {path.name: path for path in (*SPACE.glob("*.py"), SPACE / "requirements.txt")}
    return files | {"README.md": str(card).encode()}


def print_plan(repos: list[Repo], visibility: str) -> None:
    """Every file of every repository with its size."""
    total = 0
    for repo in repos:
        print(f"{repo.kind} {repo.id} ({visibility})")
        for path, content in sorted(repo.files.items()):
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"{size / 1e6:14,.3f} MB  {path}")
            total += size
    print(f"{total / 1e6:14,.3f} MB in {len(repos)} repositories")


@contextmanager
def asking_the_hub(doing: str) -> Iterator[None]:
    """What to do when the Hub refuses, or can't be reached, is said as an `InputError`."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = ADVICE.get(status, "Run the same command again; uploaded files stay.")
        raise InputError(f"{doing}: the Hub answered {error.server_message or error}. {advice}") from None
    except (httpx2.TransportError, OSError, RuntimeError) as error:
        advice = "Run the same command again: uploaded files stay."
        raise InputError(f"{doing}: the upload broke off ({error}). {advice}") from None


def check_token(api: HfApi, namespace: str) -> None:
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


def is_published(api: HfApi, repo: Repo, tag: str) -> bool:
    """Whether the repository has this version already; `InputError` if it has it with other files."""
    if tag not in {ref.name for ref in api.list_repo_refs(repo.id, repo_type=repo.kind).tags}:
        return False
    tree = api.list_repo_tree(repo.id, recursive=True, revision=tag, repo_type=repo.kind)
    known = {file.path: file for file in tree if isinstance(file, RepoFile)}
    for path, content in repo.files.items():
        there, here = known.get(path), CommitOperationAdd(path, content)
        if there and there.lfs:
            same = there.lfs.sha256 == here.upload_info.sha256.hex()
        else:  # Git's own hash, of a small file
            with here.as_file() as file:
                same = there and there.blob_id == git_hash(file.read())
        if not same:
            advice = "Name a new one with --version; the published files stay."
            raise InputError(f"{repo.id}: version {tag} was published with another {path}. {advice}")
    return True


def upload(api: HfApi, repo: Repo, tag: str) -> None:
    """Commit the repository's files and tag the result."""
    operations = [CommitOperationAdd(path, content) for path, content in sorted(repo.files.items())]
    commit = api.create_commit(
        repo.id, operations, repo_type=repo.kind, commit_message=f"FinTeamExperts {tag}: {repo.part}"
    )
    api.create_tag(repo.id, tag=tag, revision=commit.oid, repo_type=repo.kind)


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
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything and list repositories, files and sizes; run, make and upload nothing",
    )
    args = parser.parse_args()

    published, data = PublishedRun(args.run_dir, args.namespace, args.name, args.base_model), args.data_dir
    licences = data_licences(data or args.run_dir / "data")
    check_licence(args.license, licences, args.base_model or "", args.name)
    repos = published.repos(args.parts)
    for repo in repos:
        try:
            validate_repo_id(repo.id)
        except HFValidationError as error:
            names = f"--namespace {args.namespace} and --name {args.name}"
            raise InputError(f"{names} give no name of a repository: {error}") from None
    api = HfApi()
    if not args.dry_run:
        with asking_the_hub("checking the token"):
            check_token(api, args.namespace)
    cards, missing = Cards(published, args.license, f"v{args.version}", licences), []
    for repo in repos:
        if repo.kind == "space":
            repo.files = space_files(published.id_of("moe-instruct"))
        else:
            tried = tried_snippet(cards, repo, run_it=False)
            repo.files["README.md"] = cards.render(repo, tried or NOT_RUN)
            missing += [] if tried else [repo]
    check_texts(repos, args.run_dir, *filter(None, [data]))
    print_plan(repos, "public" if args.public else "private")
    if args.dry_run:
        if missing:
            print(f"The snippets of these cards would be run first: {', '.join(repo.id for repo in missing)}")
        print("Nothing was uploaded: --dry_run")
        return

    for repo in missing:
        repo.files["README.md"] = cards.render(repo, tried_snippet(cards, repo, run_it=True))
    for repo in sorted(repos, key=lambda repo: repo.kind != "space"):  # which may need a plan
        with asking_the_hub(f"making {repo.id}"):
            create(api, repo, published.id_of("moe-instruct"), private=not args.public)
    unpublished = []
    for repo in repos:
        with asking_the_hub(f"looking at {repo.id}"):
            unpublished += [] if is_published(api, repo, cards.version) else [repo]
    for repo in repos:
        if repo in unpublished:
            with asking_the_hub(f"uploading {repo.id}"):
                upload(api, repo, cards.version)
        state = "uploaded" if repo in unpublished else "unchanged"
        print(f"{api.endpoint}/{'spaces/' * (repo.kind == 'space')}{repo.id}: {state}")
    if not args.public and any(repo.kind == "space" for repo in repos):
        print("The Space needs a secret HF_TOKEN that may read the private model: set it in the Space's settings.")


if __name__ == "__main__":
    run(main)
