# SPDX-License-Identifier: Apache-2.0
"""Telling two models apart: hashes of all that shapes a model's results, for the records of steps."""

import hashlib
import json
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from finteam_experts.families import family_in
from finteam_experts.files import read_json
from finteam_experts.models import GENERATION_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG, TOKENIZER_FILES
from finteam_experts.weights import StoredTensors, weight_files

PARTS = ("weights", "config", "tokenizer", "chat_template", "generation_config")
PLAIN_TEXT_PARTS = PARTS[:3]  # all that a LoRA on plain text is trained with
_TEMPLATE = "chat_template"  # older folders have it in tokenizer_config.json


def fingerprint(folder: Path, parts: Collection[str] = PARTS) -> dict[str, str]:
    """16 hex digits for each of these parts of a model folder, which change with any byte of it (about 1.5 GB per second)."""
    settings = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    template = str(settings.pop(_TEMPLATE, None))
    sources = {
        "weights": lambda: ({file.name: file for file in weight_files(folder)}, ""),
        "config": lambda: ({"config.json": folder / "config.json"}, ""),
        "tokenizer": lambda: ({name: folder / name for name in TOKENIZER_FILES}, json.dumps(settings, sort_keys=True)),
        "chat_template": lambda: ({TEMPLATE_FILE: folder / TEMPLATE_FILE}, template),
        "generation_config": lambda: ({GENERATION_FILE: folder / GENERATION_FILE}, ""),
    }
    return {part: _digest(*sources[part]()) for part in parts}


def trunk_fingerprint(folder: Path) -> str:
    """16 hex digits of all weights in bfloat16 that the experts of a team share: neither MLPs nor gates.

    It is the same for a trunk, for the dense experts that branched off from it, and for the MoE that was merged from them.
    """
    with StoredTensors(folder) as stored:
        shared = set(filter(family_in(folder).in_trunk, stored))
        if read_json(folder / "config.json").get("tie_word_embeddings"):
            shared.discard("lm_head.weight")  # some writers store it a second time
        return _digest_in_bf16((name, stored[name]) for name in sorted(shared))


def expert_fingerprint(folder: Path, place: int | None = None) -> str:
    """16 hex digits of an expert's matrices in bfloat16: of the dense model in `folder`, or of that place of the MoE.

    It is the same for a dense expert and for its place in an MoE.
    """
    family, layers = family_in(folder), read_json(folder / "config.json")["num_hidden_layers"]
    with StoredTensors(folder) as stored:
        return _digest_in_bf16(
            (f"{layer}.{matrix}", stored[name])
            for layer in range(layers)
            for matrix, name in enumerate(family.expert_tensors(layer, place))
        )


def is_model(folder: Path, recorded: object) -> bool:
    """Whether the model in `folder` has the fingerprint that a record holds, in the parts that it holds."""
    known = isinstance(recorded, dict) and recorded.keys() <= set(PARTS)
    return known and fingerprint(folder, recorded) == recorded


def _digest_in_bf16(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(files: dict[str, Path], text: str) -> str:
    """Of the files that exist, by name, read in parallel (hashing frees Python's lock), and of a text."""
    present = {name: file for name, file in sorted(files.items()) if file.is_file()}
    with ThreadPoolExecutor() as pool:
        digests = list(
            pool.map(lambda file: hashlib.file_digest(file.open("rb"), "sha256").hexdigest(), present.values())
        )
    return hashlib.sha256(repr((list(present), digests, text)).encode()).hexdigest()[:16]
