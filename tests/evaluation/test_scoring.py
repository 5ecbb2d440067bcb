# SPDX-License-Identifier: Apache-2.0
"""The one scorer: labels count with what ends them, logits are fp32, and one reading of a prompt serves all of its labels."""

import pytest
import torch
from transformers import CohereConfig, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from conftest import call, form_of
from finteam_experts.evaluation.answers import first_label, greedy_answers
from finteam_experts.evaluation.heldout import answer_scores, heldout_loss
from finteam_experts.evaluation.tasks import written_labels
from finteam_experts.models import load_model
from finteam_experts.scoring import Score, batched, float_head, log_likelihoods

LABELS = ("BB", "BBB", "A", "A-", "buy", "buy more", "1", "1/10", "10", "No")


@torch.no_grad()
def plainly(model, prompt, continuation) -> Score:
    """One sequence by itself, with the head in fp32."""
    hidden = model.base_model(torch.tensor([prompt + continuation])).last_hidden_state[0, len(prompt) - 1 : -1]
    log_probs = (hidden.float() @ model.get_output_embeddings().weight.float().T).log_softmax(-1)
    target = torch.tensor(continuation)
    return Score(log_probs.gather(1, target[:, None]).sum().item(), log_probs.argmax(-1).tolist() == continuation)


def pairs_of(form, prompts, labels=LABELS):
    exchanges = form.exchanges([(prompt, label) for prompt in prompts for label in labels])
    return [(exchange.prompt, exchange.scored) for exchange in exchanges]


PROMPTS = ("Rates rose.", "The company reported higher sales in " + "March " * 9, "x" * 40)
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "window": (MistralConfig, {"sliding_window": 24}),  # shorter than the prompts
    "eager": (LlamaConfig, {"attn_implementation": "eager"}),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_each_label_is_scored_as_it_is_alone_with_its_end(make_base, name, batch_tokens):
    config_class, options = FAMILIES[name]
    folder = make_base(config_class=config_class, **options)
    model, form = load_model(folder), form_of(folder)
    model.set_attn_implementation(options.get("attn_implementation", "sdpa"))
    pairs = pairs_of(form, PROMPTS)
    assert all(continuation[-1] == form.tokenizer.eos_token_id for _, continuation in pairs)
    found = log_likelihoods(model, pairs, batch_tokens=batch_tokens)
    for score, pair in zip(found, pairs, strict=True):
        expected = plainly(model, *pair)
        assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)
        assert score.is_greedy == expected.is_greedy


@pytest.mark.parametrize("run", ["done_run", "qwen3_run"])
def test_the_teams_scores_are_those_of_one_sequence_at_a_time(request, run):
    folder = request.getfixturevalue(run) / "moe-instruct"
    model, form = load_model(folder), form_of(folder)
    pairs = pairs_of(form, PROMPTS)
    for score, pair in zip(log_likelihoods(model, pairs), pairs, strict=True):
        assert score.log_likelihood == pytest.approx(plainly(model, *pair).log_likelihood, abs=1e-4)


def test_a_prompt_is_read_once_for_all_of_its_labels(toy_base):
    model, form = load_model(toy_base), form_of(toy_base)
    read = []
    hook = model.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].shape), with_kwargs=True
    )
    pairs = pairs_of(form, PROMPTS[1:2], [f"label {n}" for n in range(300)])
    log_likelihoods(model, pairs, batch_tokens=4096)
    hook.remove()
    assert len(read) == 1 and read[0][0] == 1
    assert read[0][1] < len(pairs[0][0]) + sum(len(label) for _, label in pairs)


def test_texts_that_share_a_first_token_are_read_by_themselves(toy_base):
    model = load_model(toy_base)
    read = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].shape), with_kwargs=True
    )
    heldout_loss(
        model, form_of(toy_base).tokenizer, ["The company sells paper in Finland."] * 3 + ["The company fell."]
    )
    assert all(inputs[1] < 40 for inputs in read)


def memorise(model, exchange):
    """Tune the toy until it writes the answer and its end."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(torch.tensor([exchange.ids]), labels=torch.tensor([exchange.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("short", "long"), [("BB", "BBB"), ("A", "A-"), ("buy", "buy more"), ("1", "1/10"), ("1", "10")]
)
def test_a_label_that_another_begins_with_is_written_and_scored_right(toy_base, short, long):
    """The model writes the longer one: the shorter one is neither likelier nor what greedy decoding writes."""
    model, form = load_model(toy_base), form_of(toy_base)
    exchanges = form.exchanges([("Which?", short), ("Which?", long)])
    first, second = (exchange.scored for exchange in exchanges)
    memorise(model, exchanges[1])
    found = answer_scores(model, exchanges)
    assert found[1].is_greedy and not found[0].is_greedy
    assert found[1].log_likelihood > found[0].log_likelihood
    assert greedy_answers(model, form, ["Which?"]) == [long]
    if first[:-1] == second[: len(first) - 1]:  # without the end the shorter one always wins
        assert plainly(model, exchanges[0].prompt, first[:-1]).log_likelihood > found[1].log_likelihood - 1e-6


def test_the_same_weights_in_bfloat16_and_fp32_agree_where_only_the_head_could_differ(toy_base, tmp_path):
    """Steps of logits in bfloat16 made labels tie, and ties went to the first one."""
    exact = load_model(toy_base)
    rounded = load_model(toy_base, torch.bfloat16)
    exact.lm_head.weight = torch.nn.Parameter(rounded.lm_head.weight.detach().float())
    with torch.no_grad():
        hidden = rounded.base_model(torch.tensor([[1, 50, 60, 70]])).last_hidden_state
        for model in (rounded, exact):
            with float_head(model):
                logits = model.lm_head(hidden)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, hidden.float() @ exact.lm_head.weight.T)
    form = form_of(toy_base)
    scores = [score.log_likelihood for score in log_likelihoods(rounded, pairs_of(form, PROMPTS))]
    assert len({round(score, 6) for score in scores}) == len(scores)


@pytest.mark.parametrize("config_class", [CohereConfig, Gemma2Config])
def test_what_a_model_does_to_its_logits_is_done_in_fp32(make_base, config_class):
    """A scale (Cohere), a soft cap (Gemma 2): scores follow the model's own logits, up to the type."""
    folder = (
        make_base(config_class=config_class, head_dim=8)
        if config_class is Gemma2Config
        else make_base(config_class=config_class)
    )
    model, form = load_model(folder), form_of(folder)
    for (prompt, continuation), score in zip(
        pairs := pairs_of(form, PROMPTS[:1]), log_likelihoods(model, pairs), strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_a_head_with_a_bias_and_one_with_an_adapter(toy_base):
    model = load_model(toy_base, torch.bfloat16)
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, dtype=torch.bfloat16)
    model.set_output_embeddings(head)
    hidden = torch.randn(2, 3, model.config.hidden_size, dtype=torch.bfloat16)
    with float_head(model):
        torch.testing.assert_close(head(hidden), hidden.float() @ head.weight.float().T + head.bias.float())

    class Doubled(torch.nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model.set_output_embeddings(doubled := Doubled(model.config.hidden_size, 500, dtype=torch.bfloat16))
    with float_head(model):
        assert doubled(hidden).dtype == torch.float32
    torch.testing.assert_close(
        doubled(hidden).float(), 2 * torch.nn.functional.linear(hidden, doubled.weight, doubled.bias).float()
    )
    assert not doubled._forward_hooks and not doubled._forward_pre_hooks


def test_bfloat16_scores_are_close_and_ties_are_not_made(done_run):
    """The backbone rounds, the head does not: scores move by hundredths, and two labels never score exactly alike."""
    model, form = load_model(done_run / "moe"), form_of(done_run / "moe")
    pairs = pairs_of(form, PROMPTS)
    exact, rounded = (
        [score.log_likelihood for score in log_likelihoods(model, pairs, bf16=bf16)] for bf16 in (False, True)
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.5)
    assert len(set(rounded)) == len(rounded)


def test_batches_hold_similar_lengths_and_no_more_than_they_may():
    lengths = [5, 3, 9, 3, 4, 40]
    assert list(batched(lengths, 12)) == [[1, 3, 4], [0], [2], [5]]
    assert list(batched([], 12)) == []


PAIRS = (("BB", "BBB"), ("A", "A-"), ("AA", "AAA"), ("B", "BB"), ("buy", "buy more"), ("1", "10"), ("1", "1/10"), ("sell", "sell now"),
         ("up", "up a lot"), ("hold", "hold on"))  # fmt: skip


@pytest.fixture(scope="module")
def real_base(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("real")
    call("scripts/make_base.py", "--run_dir", run_dir)
    return run_dir / "base"


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("short", "long"), PAIRS)
def test_scored_andwritten_labels_of_a_real_base_are_those_of_plain_transformers(real_base, short, long):
    model, form, labels = load_model(real_base), form_of(real_base), (short, long)
    prompts = [
        f"Analysts met on day {row}. Their answer is {label}.\n\nWhich answer did they give? Answer {short} or {long}."
        for row in range(20)
        for label in labels
    ]
    exchanges = form.exchanges([(prompt, label) for prompt in prompts for label in labels])
    found = answer_scores(model, exchanges)
    by_row = [found[at : at + 2] for at in range(0, len(found), 2)]
    written = written_labels(model, form, labels, prompts, by_row, 8)
    scored = [labels[own[1] > own[0]] for own in by_row]

    plain_scored, plain_written = [], []
    for row, ids in enumerate(form.prompts(prompts)):
        scores = []
        for exchange in exchanges[2 * row : 2 * row + 2]:
            log_probs = model(torch.tensor([ids + exchange.scored])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            scores.append(log_probs.gather(1, torch.tensor(exchange.scored)[:, None]).sum().item())
        plain_scored.append(labels[scores[1] > scores[0]])
        output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0, len(ids) :]
        plain_written.append(first_label(form.tokenizer.decode(output, skip_special_tokens=True), labels))
    assert sum(a != b for a, b in zip(scored, plain_scored, strict=True)) <= 1
    assert sum(a != b for a, b in zip(written, plain_written, strict=True)) <= 1
