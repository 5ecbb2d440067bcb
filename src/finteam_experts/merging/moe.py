# SPDX-License-Identifier: Apache-2.0
"""The one writer of an MoE's folder, for a merge and for a team that changes, and what may join it.

transformers 5 fuses the experts of a layer into two tensors when it loads them. On disk every expert has three tensors (a
Mixtral's are `block_sparse_moe.experts.N.w1/w2/w3`): older readers look for those, and some of them leave experts that they do
not find at random values with no more than a warning.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.moe.config import MoEMergeConfig
from mergekit.moe.router import get_gate_params, tokenize_prompts
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from finteam_experts import runs
from finteam_experts.errors import InputError, nearest
from finteam_experts.families import config_difference, family_of, is_moe
from finteam_experts.files import file_hash, read_json, write_json
from finteam_experts.fingerprints import trunk_fingerprint
from finteam_experts.merging.config import check_name
from finteam_experts.models import (
    ADAPTER_FILE,
    COMPANION_FILES,
    align_eos,
    check_base,
    load_tokenizer,
    read_config,
    stored_dtype,
)
from finteam_experts.weights import StoredTensors, cast, new_writer

KINDS = ("add", "replace", "remove")
LEAST_EXPERTS = 2


@dataclass(frozen=True)
class Expert:
    """Where an expert's matrices are: in the folder of a dense model, or at a place in that of an MoE."""

    folder: Path
    place: int | None = None


def write_moe(trunk: Path, experts: list[Expert], gates: torch.Tensor, config: PretrainedConfig, target: Path) -> None:
    """Write the MoE of `experts` with `gates` [layers, experts, hidden] and `config` to `target`, one tensor at a time, and
    compare it with its sources.

    All else is taken over from the model in `trunk`, dense or MoE. What comes from an MoE stays bit for bit; what comes from a
    dense model gets the type of `config`. Raises `InputError` if a weight is not finite in that type.
    """
    family = family_of(config)
    with contextlib.ExitStack() as stack:
        folders = {trunk, *(expert.folder for expert in experts)}
        stored = {folder: stack.enter_context(StoredTensors(folder)) for folder in folders}
        configs = {folder: read_config(folder) for folder in folders}

        def read(folder: Path, name: str) -> torch.Tensor:
            tensor = stored[folder][name]
            return cast(tensor, tensor.dtype if is_moe(configs[folder]) else config.dtype, f"{folder}: {name}")

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name in filter(family_of(configs[trunk]).in_trunk, stored[trunk]):
                yield name, read(trunk, name)
            for layer in tqdm(range(config.num_hidden_layers), desc=f"writing {target.name}", leave=False):
                yield family.gate_tensor(layer), cast(gates[layer], config.dtype, f"the gate of layer {layer}")
                for place, expert in enumerate(experts):
                    sources = family_of(configs[expert.folder]).expert_tensors(layer, expert.place)
                    for name, source in zip(family.expert_tensors(layer, place), sources, strict=True):
                        yield name, read(expert.folder, source)

        writer = new_writer(target)
        for name, tensor in tensors():
            writer.save_tensor(name, tensor)
        writer.finalize()
        written = stack.enter_context(StoredTensors(target))
        for name, tensor in tensors():
            if not torch.equal(written[name], tensor):
                raise InputError(f"{target}: {name} is not what was written. The disk may be faulty: look at it.")
    finish_folder(config, trunk, target)


def finish_folder(config: PretrainedConfig, source: Path, target: Path) -> None:
    """Put what every reader wants beside the weights in `target`: the config, and the companions of `source`."""
    config.output_router_logits = False  # it would cost every user the auxiliary loss
    config.save_pretrained(target)
    for name in COMPANION_FILES:
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    content = read_json(target / "config.json")
    rope = dict(content.get("rope_parameters") or {})
    content |= {
        "torch_dtype": content.get("dtype"),
        "rope_theta": rope.pop("rope_theta", 10000.0),
    }  # transformers 4's keys
    if is_moe(config):
        content |= {key: content[now] for key, now in family_of(config).older_keys.items() if now in content}
    if rope.get("rope_type", "default") != "default":
        content["rope_scaling"] = rope
    write_json(target / "config.json", content)
    _for_older_readers(target / "tokenizer_config.json")
    align_eos(target)


def _for_older_readers(path: Path) -> None:
    """Name a tokenizer class that transformers 4 knows, and write special tokens in a form that it reads."""
    if not path.is_file():
        return
    content = read_json(path)
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    write_json(path, content)


@torch.no_grad()
def prompt_gates(config: MoEMergeConfig, base: Path) -> torch.Tensor:
    """mergekit's gates from the experts' prompts, fp32 [layers, experts, hidden].

    For the modes that need hidden states mergekit loads the base whole, 16 GB for an 8B base, and averages the padding of
    shorter prompts with the longest. Here the layers stay on disk, and padding is left out. Random gates are the same in
    every merge.
    """
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
    if not config.gate_mode.startswith("hidden"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ModelReference(model=ModelPath(path=str(base.absolute())))
            return get_gate_params(model, tokenizer, config.experts, mode=config.gate_mode).float()
    decoder = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": "disk"}).model
    tokens = slice(None) if config.gate_mode == "hidden_avg" else slice(-1, None)

    def states(prompts: list[str]) -> torch.Tensor:
        """[layers, hidden]: what enters each layer, the mean over prompts."""
        batch = tokenize_prompts(prompts, tokenizer)
        entering = torch.stack(decoder(**batch, output_hidden_states=True).hidden_states[:-1])
        # padding is on the right, where no token sees it
        real = zip(entering.unbind(1), batch["attention_mask"].bool(), strict=True)
        return torch.stack([own[:, mask][:, tokens].float().mean(1) for own, mask in real]).mean(0)

    gates = [
        states(e.positive_prompts) - (states(e.negative_prompts) if e.negative_prompts else 0) for e in config.experts
    ]
    return torch.nn.functional.normalize(torch.stack(gates, dim=1), dim=-1, eps=1e-8)


def adapter_in_team(run_dir: Path, name: str) -> Path | None:
    """The adapter in the run folder that the team's expert of that name was made from; `None` if it came from elsewhere."""
    moe, folder = run_dir / "moe" / runs.RECORD, run_dir / "adapters" / name
    experts = read_json(moe).get("experts", {}) if moe.is_file() else {}
    known, file = experts.get(name, {}).get("adapter"), folder / ADAPTER_FILE
    return folder if known and file.is_file() and file_hash(file) == known else None


def changed_team(names: list[str], kind: str, role: str) -> list[str]:
    """The names of the team after the change; `InputError` if the team can't be changed like that."""
    if kind == "add":
        check_name(role, "the analyst that joins")
        if role in names:
            raise InputError(f"the team has an analyst '{role}'. Replace that one, or choose another name.")
        return [*names, role]
    if role not in names:
        raise InputError(f"the team has no analyst '{role}', only {', '.join(names)}.{nearest(role, names)}")
    if kind == "remove" and len(names) <= LEAST_EXPERTS:
        raise InputError(
            f"the team has {len(names)} analysts, {' and '.join(names)}: without {role} it would be one dense model. "
            "Take the expert that is left, or the trunk."
        )
    return [name for name in names if name != role] if kind == "remove" else names


def check_expert(expert: Path, like: Path, trunk: str) -> None:
    """Raise `InputError` unless the dense model in `expert` is the one in `like`, dense or MoE, but for its MLPs.

    All of the config that acts and the tokenizer are compared. `trunk` is the fingerprint of the weights that all experts
    share, as the team's router sums know it.
    """
    own, team = check_base(expert), read_config(like)
    if family_of(own).moe_type != family_of(team).moe_type:
        raise InputError(
            f"{expert} is a {own.model_type}, and {like} a {team.model_type}. Train the expert from the team's trunk."
        )
    if difference := config_difference(own, team):
        raise InputError(
            f"{expert}/config.json: {difference} as in {like}, so it would compute otherwise in the team. Train it from the "
            "team's trunk."
        )
    check_same_tokenizer(expert, like)
    if trunk_fingerprint(expert) != trunk:
        types = [str(stored_dtype(path)).removeprefix("torch.") for path in (expert, like)]
        rounded = (
            f"It is a copy in {types[0]} of one in {types[1]}: take that. Or it" if len(set(types)) == 2 else "It"
        )
        raise InputError(
            f"{expert} has other attention, norms or embeddings than {like}. {rounded} was tuned from another model, or not in its "
            "MLPs alone. Name its trunk, or train it from this one: recipes/train_expert.py --base TRUNK"
        )


def check_same_tokenizer(folder: Path, like: Path) -> None:
    """Raise `InputError` unless the tokenizers in both folders read and write every text and conversation alike."""
    mine, others = (_about(load_tokenizer(path)) for path in (folder, like))
    for key in sorted(mine | others):
        if mine.get(key) != others.get(key):
            values = " and not ".join(repr(about.get(key))[:80] for about in (mine, others))
            raise InputError(
                f"{folder}: the {key} of its tokenizer is {values} as in {like}. A team has one tokenizer: train with the trunk's."
            )


def _about(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """All that a tokenizer does, by name. Padding is masked, and `align_eos` says where an answer ends: both may differ."""
    ignored = {"pad_token"} if "eos_token" in str(tokenizer.chat_template) else {"pad_token", "eos_token"}
    about = {key: value for key, value in tokenizer.special_tokens_map.items() if key not in ignored}
    about |= {f"token {token!r}": place for token, place in tokenizer.get_vocab().items()}
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        left_out = ("vocab", "model", "added_tokens", "padding", "truncation", "version")
        about |= {key: value for key, value in (content | content["model"]).items() if key not in left_out}
    return about | {"chat_template": tokenizer.chat_template}
