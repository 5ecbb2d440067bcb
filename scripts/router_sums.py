# SPDX-License-Identifier: Apache-2.0
"""Compute what a team's router has to know of an analyst's text, so that the analyst can join without its text.

    python scripts/router_sums.py --run_dir outputs/credit --base outputs/quickstart/trunk --role credit

Reads RUN_DIR/adapters/ROLE, or RUN_DIR/experts/ROLE where the adapter has been merged, and the role's corpus, tasks and
conversations in RUN_DIR/data. Writes router_sums.safetensors into RUN_DIR/experts/ROLE: hand that folder to the team
(scripts/change_team.py). docs/teams.md says what the sums may tell about the text.
"""

import argparse
from pathlib import Path

from finteam_experts.threads import use_available_cores  # before torch

from accelerate import PartialState

from finteam_experts.data.calibration import CHAT_SHARE, GENERAL_SHARE, general_text, halves, role_text
from finteam_experts.errors import check_number, run
from finteam_experts.fingerprints import expert_fingerprint, fingerprint, trunk_fingerprint
from finteam_experts.merging.lora import check_adapter, dense_expert
from finteam_experts.merging.moe import check_expert
from finteam_experts.merging.sums import FEWEST_TOKENS, SUMS, TOKENS_PER_ROLE, compute_sums, mean_of, save_sums
from finteam_experts.models import as_chats, load_model, load_tokenizer, local_folder, reading_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--role", required=True, help="the analyst")
    parser.add_argument("--data_dir", type=Path, help="data directory (default: RUN_DIR/data)")
    parser.add_argument("--base", help="the trunk that the adapter was trained on (default: RUN_DIR/trunk)")
    parser.add_argument("--tokens_per_role", type=int, default=TOKENS_PER_ROLE, help="tokens of the analyst's text")
    parser.add_argument("--chat_share", type=float, default=CHAT_SHARE, help="share of them in the chat format")
    parser.add_argument("--seed", type=int, default=0, help="which passages are drawn")
    args = parser.parse_args()

    check_number("--tokens_per_role", args.tokens_per_role, least=FEWEST_TOKENS)
    check_number("--chat_share", args.chat_share, least=0, most=1)

    use_available_cores()
    data, adapter = args.data_dir or args.run_dir / "data", args.run_dir / "adapters" / args.role
    expert = args.run_dir / "experts" / args.role
    base = local_folder(args.base or str(args.run_dir / "trunk"))
    if adapter.is_dir() or not expert.is_dir():
        known_base = fingerprint(base)
        check_adapter(adapter, args.role, base, known_base)
        dense_expert(base, known_base, adapter, expert)
    check_expert(expert, base, trunk := trunk_fingerprint(base))
    belongs_to = expert_fingerprint(expert)
    form = as_chats(load_tokenizer(expert), expert)
    own, _ = role_text(data, args.role, form, args.tokens_per_role, args.seed, args.chat_share)
    general = general_text(data, form, round(GENERAL_SHARE * args.tokens_per_role))
    device = PartialState().device
    parts = zip((expert, base), halves(own), halves(general), strict=True)
    dtype = reading_dtype(device)
    sums = mean_of(
        *(
            compute_sums(
                load_model(folder, dtype).to(device), form.tokenizer, *text, trunk=trunk, belongs_to=belongs_to
            )
            for folder, *text in parts
        )
    )
    save_sums(sums, expert / SUMS)
    size = (expert / SUMS).stat().st_size / 1e6
    print(f"{expert / SUMS}: {size:.0f} MB, of {sums.tokens} tokens of {args.role}")


if __name__ == "__main__":
    run(main)
