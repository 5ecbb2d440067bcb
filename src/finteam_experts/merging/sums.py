# SPDX-License-Identifier: Apache-2.0
"""Router sums: all that a router has to know of an analyst's text, without the text.

A ridge regression (Hoerl and Kennard 1970, doi:10.1080/00401706.1970.10488634) needs of its data no more than X'X and X'Y.
X are the hidden states that a gate reads, Y says whose text they are of. Attention is the trunk's in every expert, so that an
analyst's part of both can be computed from its dense expert, before there is a team. Parts add up: the gates of any team
follow from the parts of its analysts (`solve_gates`), and an analyst that comes or goes needs nobody's text again.

An expert leaves traces in the hidden states of its tokens. Gates that have seen each text through its own expert alone know the
expert by them, not the text, and a token that goes wrong once stays wrong. So half of the text goes through something else: the
trunk, or the team itself (`merging.router`). `mean_of` joins the sums.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from finteam_experts.data.calibration import Excerpt
from finteam_experts.errors import InputError
from finteam_experts.evaluation.batches import padded_batches
from finteam_experts.merging.gates import forced_expert, watched_mlps
from finteam_experts.weights import open_tensors

FOLDER = "router_sums"  # of an MoE: one file for each analyst
SUMS = "router_sums.safetensors"  # of a dense expert
TOKENS_PER_ROLE = 24000
FEWEST_TOKENS = 256  # a gate has more unknowns
RIDGE = 0.01  # the penalty, as a share of the mean diagonal of X'X
GENERAL_WEIGHT = 0.1  # of general text beside the analyst's own


@dataclass
class RouterSums:
    """Of one analyst, for every layer, fp32. Analysts count alike, however much text they have, and so do an analyst's texts,
    however long they are: both are means over texts of the mean over their tokens.

    A question without a passage is short, and would hardly count if tokens counted alike.
    """

    # X'X [layers, hidden, hidden]: of the analyst's own text, and of general text by `GENERAL_WEIGHT`
    inputs: torch.Tensor
    targets: torch.Tensor  # X'Y [layers, hidden]: of the analyst's own text alone
    tokens: int  # of the analyst's own text
    trunk: str  # `trunk_fingerprint` of the model that they were computed with
    expert: str  # `expert_fingerprint` of the expert that they belong to


def solve_gates(team: list[RouterSums], ridge: float) -> torch.Tensor:
    """The gates, fp32 [layers, experts, hidden], by ridge regression of one-hot experts on gate inputs, without a bias.

    `ridge` is the penalty as a share of the mean diagonal of X'X. Computed in fp64, so that the order of the analysts does not
    matter. Raises `InputError` if that has no solution.
    """
    gates = []
    for layer in range(len(team[0].inputs)):  # one by one: a batched solve fails on some CPUs
        xx = sum(own.inputs[layer].double() for own in team)
        xy = torch.stack([own.targets[layer].double() for own in team], dim=1)
        penalty = ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        factor, failed = torch.linalg.cholesky_ex(xx + penalty)
        if failed:
            raise InputError(
                f"the router of layer {layer} can't be computed from these sums with a penalty of {ridge:g}: pass a larger --ridge."
            )
        gates.append(torch.cholesky_solve(xy, factor).T.float())
    return torch.stack(gates)


def mean_of(*parts: RouterSums) -> RouterSums:
    """The sums of an analyst's text, parts of which went through different models."""
    inputs, targets = (torch.stack([getattr(own, key) for own in parts]).mean(0) for key in ("inputs", "targets"))
    return replace(parts[0], inputs=inputs, targets=targets, tokens=sum(own.tokens for own in parts))


def compute_sums(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    own: list[Excerpt],
    general: Sequence[Excerpt] = (),
    *,
    trunk: str,
    belongs_to: str,
    expert: int | None = None,
) -> RouterSums:
    """The sums of an analyst's `own` text, and of `general` text that no analyst is to get for itself.

    `trunk` and `belongs_to` are the fingerprints of the trunk and of the expert that the sums belong to. `model` is dense, or an MoE in which every token goes through `expert` alone or, with `None`, where the gates send it. Tokens
    that don't tell whose they are stay out; so do first tokens, attention sinks with norms a hundred times the others'. Raises
    `InputError` if a hidden state is not finite.
    """
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    inputs, targets = (torch.zeros(layers, *shape, device=model.device) for shape in ((hidden, hidden), (hidden,)))
    for part, weight in ((own, 1.0), (general, GENERAL_WEIGHT)):
        if not part:
            continue
        weights = weight / len(part) / torch.tensor([sum(excerpt.telling) for excerpt in part], device=model.device)

        def add(layer: int, x: torch.Tensor, places: torch.Tensor, part=part, weights=weights) -> None:
            if not x.isfinite().all():
                raise InputError(
                    f"the hidden states that the gate of layer {layer} reads are not finite. An expert or the base has NaN "
                    "or overflows in its dtype: look at the adapters' training log, or load it in bfloat16 or float32."
                )
            weighted = weights[places, None] * x
            inputs[layer].addmm_(x.T, weighted)  # in place: autocast would compute a product of its own in bf16
            if part is own:
                targets[layer].add_(weighted.sum(0))

        gate_inputs(model, tokenizer, part, add, expert=expert, title="router sums")
    # rounding may differ above and below the diagonal, and a file has one of them
    inputs = inputs.triu() + inputs.triu(1).mT
    tokens = sum(sum(excerpt.telling) for excerpt in own)
    return RouterSums(inputs.cpu(), targets.cpu(), tokens, trunk, belongs_to)


@torch.no_grad()
def gate_inputs(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[Excerpt],
    see: Callable[[int, torch.Tensor, torch.Tensor], None],
    *,
    expert: int | None,
    title: str,
) -> None:
    """Call `see(layer, hidden states, places)` with what each gate reads of the tokens that tell whose they are: fp32 [tokens,
    hidden], and the place in `text` that each token is of: int64 [tokens].

    `model` is dense, or an MoE in which every token goes through `expert` alone or, with `None`, where the gates send it.
    """
    for rows, batch in padded_batches([excerpt.ids for excerpt in text], tokenizer, title=title):
        batch = batch.to(model.device)
        telling = [torch.tensor(text[row].telling) for row in rows]
        kept = pad_sequence(telling, batch_first=True, padding_value=False).flatten().to(model.device)
        places = torch.tensor([row for row in rows for counts in text[row].telling if counts], device=model.device)
        with (
            forced_expert(model, expert),
            watched_mlps(model, lambda layer, x, kept=kept, places=places: see(layer, x[kept].float(), places)),
        ):
            model.model(**batch)


def sums_file(moe: Path, role: str) -> Path:
    return moe / FOLDER / f"{role}.safetensors"


def copy_sums(moe: Path, target: Path) -> list[str]:
    """Copy the sums of the team in `moe`, if it has some, to another folder; returns the names of what was copied."""
    if not (moe / FOLDER).is_dir():
        return []
    shutil.copytree(moe / FOLDER, target / FOLDER, dirs_exist_ok=True)
    return [FOLDER]


def save_sums(sums: RouterSums, path: Path) -> None:
    """Write the sums as safetensors; of X'X, which is symmetric, the upper triangle."""
    rows, columns = torch.triu_indices(*sums.inputs.shape[1:])
    tensors = {"inputs": sums.inputs[:, rows, columns].contiguous(), "targets": sums.targets}
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"tokens": str(sums.tokens), "trunk": sums.trunk, "expert": sums.expert})
    partial.replace(path)


def load_sums(path: Path) -> RouterSums:
    """Read what `save_sums` wrote; `InputError` if the file is something else, or has figures that no text can give."""
    with open_tensors(path) as stored:
        about, tensors = stored.metadata() or {}, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118

    def check(holds: bool, found: str) -> None:
        if not holds:
            raise InputError(f"{path} {found}. Compute the sums again: scripts/router_sums.py")

    check(tensors.keys() == {"inputs", "targets"} and {"tokens", "trunk"} <= about.keys(), "has no router sums")
    check(
        "expert" in about and about["tokens"].isdecimal(),
        "doesn't say which expert and how many tokens its sums are of",
    )
    triangles, targets = tensors["inputs"], tensors["targets"]
    shapes, types = ([str(getattr(t, key)) for t in (triangles, targets)] for key in ("shape", "dtype"))
    hidden = targets.shape[-1] if targets.dim() == 2 else 0
    fits = hidden and list(triangles.shape) == [len(targets), hidden * (hidden + 1) // 2]
    check(bool(fits), f"has inputs and targets that do not belong together: {' and '.join(shapes)}")
    check(set(types) == {"torch.float32"}, f"has sums in {' and '.join(types)}, which have to be torch.float32")
    check(bool(triangles.isfinite().all() and targets.isfinite().all()), "has sums that are not finite")
    rows, columns = torch.triu_indices(hidden, hidden)
    inputs = torch.empty(len(targets), hidden, hidden)
    inputs[:, rows, columns] = inputs[:, columns, rows] = triangles
    for layer, (xx, xy) in enumerate(zip(inputs.double(), targets.double(), strict=True)):
        # of any text, X'X less the product of the mean with itself is positive semidefinite
        spread = xx.diagonal().mean()
        _, failed = torch.linalg.cholesky_ex(xx - xy.outer(xy) + RIDGE * spread * torch.eye(hidden, dtype=xx.dtype))
        definite = not failed and spread > 0 and bool(xy.any())
        check(definite, f"has sums of layer {layer} that are not those of any text (not positive definite)")
    return RouterSums(inputs, targets, int(about["tokens"]), about["trunk"], about["expert"])


def check_sums(sums: RouterSums, source: Path, like: RouterSums, trunk: str, expert: str | None) -> None:
    """Raise `InputError` unless the sums in `source` have the layers of `like`, and are of that trunk and of that expert, by
    their fingerprints.

    `None` is any expert: those of a team that was tuned as a whole are not the ones that its sums were computed with.
    """
    if sums.targets.shape != like.targets.shape:
        (layers, hidden), (own_layers, own_hidden) = like.targets.shape, sums.targets.shape
        raise InputError(
            f"{source} has sums of {own_layers} layers of {own_hidden}, and the team has {layers} layers of {hidden}. They are of "
            "another model. Compute them again: scripts/router_sums.py"
        )
    if sums.trunk != trunk:
        raise InputError(
            f"{source} was computed with a model of another trunk ({sums.trunk}; the team's is {trunk}). Compute the sums "
            "again with this expert: scripts/router_sums.py"
        )
    if expert not in (None, sums.expert):
        raise InputError(
            f"{source} has the sums of another expert ({sums.expert}; this one is {expert}): of another role, or of an earlier "
            "training. Compute the sums again with this expert: scripts/router_sums.py"
        )
