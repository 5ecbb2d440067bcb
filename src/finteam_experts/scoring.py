# SPDX-License-Identifier: Apache-2.0
"""Scoring the labels of classification prompts by log-likelihood, as a language model for lm-eval."""

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

Request = tuple[tuple[str, str], list[int], list[int]]  # (texts, context tokens, continuation tokens)


class LabelScoringLM(HFLM):
    """lm-eval's `HFLM` that encodes the prompt of a row once for all of its labels.

    One forward pass gives the log-likelihood of every label that agrees with it up to the label's last token, and the
    vocabulary head runs on the label's positions only. Batches hold rows of similar length, `batch_tokens` tokens each.
    """

    def __init__(self, *args, batch_tokens: int = 2048, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.batch_tokens = batch_tokens

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool] | None] = [None] * len(requests)
        passes = sorted(_passes(requests), key=lambda p: -len(p[0]))
        with tqdm(total=len(requests), desc="label scores", disable=disable_tqdm or self.rank != 0) as progress:
            while passes:
                rows = max(1, self.batch_tokens // len(passes[0][0]))
                batch, passes = passes[:rows], passes[rows:]
                first = min(len(requests[members[0]][1]) for _, members in batch) - 1  # predicts a first label token
                tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True)
                # Right padding needs no mask: under causal attention no earlier position sees it.
                logits = self.model(tokens.to(self.device), logits_to_keep=tokens.shape[1] - first).logits
                log_probs = logits.float().log_softmax(-1)  # [rows, kept positions, vocabulary]
                for row, (_, members) in zip(log_probs, batch, strict=True):
                    for index in members:
                        _, context, label = requests[index]
                        start = len(context) - 1 - first
                        own = row[start : start + len(label)]
                        target = torch.tensor(label, device=own.device)
                        total = own.gather(1, target[:, None]).sum().item()
                        scores[index] = (total, bool((own.argmax(-1) == target).all()))
                        progress.update()
        return scores


def _passes(requests: list[Request]) -> list[tuple[list[int], list[int]]]:
    """The token sequences to run, each with the indices of the requests that it answers."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (_, context, _) in enumerate(requests):
        by_context.setdefault(tuple(context), []).append(index)
    passes = []
    for context, members in by_context.items():
        # a label's last token is only predicted, never read; the longest go first and take shorter ones along
        open_passes: list[tuple[list[int], list[int]]] = []
        for index in sorted(members, key=lambda i: -len(requests[i][2])):
            read = requests[index][2][:-1]
            for tail, answered in open_passes:
                if tail[: len(read)] == read:
                    answered.append(index)
                    break
            else:
                open_passes.append((read, [index]))
        passes += [([*context, *tail], answered) for tail, answered in open_passes]
    return passes
