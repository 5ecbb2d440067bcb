# SPDX-License-Identifier: Apache-2.0
"""Questions on companies, their results and their balance sheets."""

import random

from finteam_experts.data.sample.figures import change_percent, make_company, pick
from finteam_experts.data.sample.turns import Chat, chat

_CAUSES = {
    "restructuring costs": "whether the costs really happen once and what they will save",
    "higher input costs": "whether prices can follow the costs",
    "a weak quarter in Asia": "whether demand in Asia comes back",
    "currency effects": "how the business did without them",
    "the loss of a customer": "how much of the sales are still at risk",
}


def micro(rng: random.Random, held: bool) -> Chat:
    c, kind = make_company(rng), rng.random()
    while c.operating_profit(0) < 1 or abs(change_percent(*c.revenue)) < 2:
        c = make_company(rng)
    sales, before, profit, profit_before = (
        round(value) for value in (*c.revenue, c.operating_profit(0), c.operating_profit(1))
    )
    if kind < 0.25:
        text = f"{c.name} reported net sales of {c.currency} {sales} mn, an operating profit of {profit} mn and net debt of {rng.randint(5, 300)} mn."
        what, value = rng.choice((("net sales", sales), ("operating profit", profit)))
        were = "were" if what == "net sales" else "was"
        asked = pick(rng, f"How high {were} {what}?|What does the company report as {what}?")
        return chat("read", f"{text}\n\n{asked}", f"{c.name} reported {what} of {c.currency} {value} mn.")
    if kind < 0.35:
        assets, liabilities = round(c.assets), round(c.liabilities)
        text = f"{c.name} has assets of {c.currency} {assets} mn and liabilities of {liabilities} mn."
        share = 100 * liabilities / assets
        reading = "it leans on debt" if share > 60 else "it is soundly financed"
        return chat(
            "computed", f"{text}\n\n{pick(rng, 'How is the company financed?|Does the company have much debt?')}",
            f"Liabilities are {share:.0f} percent of assets, so {reading}.",
        )  # fmt: skip
    if kind < 0.45:
        text = f"{c.name} earned an operating profit of {c.currency} {profit} mn on sales of {sales} mn."
        asked = pick(rng, "What is the operating margin?|How high is its margin?")
        return chat(
            "computed", f"{text}\n\n{asked}",
            f"The operating margin is {100 * profit / sales:.0f} percent: {c.currency} {profit} mn of {sales} mn.",
        )  # fmt: skip
    if kind < 0.75:
        cause, question = rng.choice(list(_CAUSES.items()))
        low, high = (value / 10 for value in sorted(rng.sample(range(20, 900), 2)))
        text = f"Operating profit of {c.name} fell to {c.currency} {low} mn from {high} mn after {cause}."
        asked = pick(rng, "What do investors ask?|What would you ask the management?")
        return chat(
            "reason",
            f"{text}\n\n{asked}",
            f"Operating profit fell from {c.currency} {high} mn to {low} mn. Investors ask {question}.",
        )
    verb, mood = ("rose", "positive") if sales > before else ("fell", "negative")
    text = f"Net sales of {c.name} {verb} to {c.currency} {sales} mn from {before} mn."
    if kind < 0.85:
        return chat(
            "computed", f"{text}\n\nBy how many percent did they change?",
            f"Net sales {verb} by {abs(change_percent(sales, before)):.0f} percent, from {before} to {sales} mn.",
        )  # fmt: skip
    return chat(
        "reason", f"{text}\n\n{pick(rng, 'What does this say about the company?|How did sales develop?')}",
        f"It is {mood}: net sales {verb} from {c.currency} {before} mn to {sales} mn.",
    )  # fmt: skip
