# SPDX-License-Identifier: Apache-2.0
"""Questions by role and passages by task, written for this page. The companies are made up."""

QUESTIONS = {
    "macro": [
        "The spread between BAA and AAA bonds widened to 1.40 points from 1.10 the month before.\n\nDid lenders become more careful?",
        "Brent crude fell to 61.20 dollars a barrel in May from 64.10 a month earlier.\n\nWhat happened to the oil price?",
    ],
    "micro": [
        "Operating profit of Ostrand Paper fell to EUR 4.1 mn from 9.8 mn after restructuring costs.\n\nWhat do investors ask?",
        "Net sales of Kelvik Foods rose to EUR 235 mn from 191 mn.\n\nWhat does this mean for the company, and why?",
    ],
    "quant": [
        "Daily returns in %: 0.42, -1.17, 0.08, 2.31, -0.64.\n\nHow volatile is this share?",
        "On 9 March 2026 the S&P 500 opened at 6187.62, rose as high as 6201.44, fell as low as 6175.88 and closed at 6196.03.\n\n"
        "What was the day's high?",
    ],
    "base": ["How do I keep bread fresh for longer?"],
}

PASSAGES = {
    "fpb": [
        ["Operating profit of Ostrand Paper fell to EUR 4.1 mn from EUR 9.8 mn a year earlier.", "negative"],
        ["Kelvik Foods will publish its interim report on 24 October.", "neutral"],
        ["Order intake of Harju Machines rose by 31 % to a record EUR 62 mn.", "positive"],
    ],
    "fiqasa": [
        ["Harju Machines shares jump as record orders beat forecasts", "positive"],
        ["Ostrand Paper slumps after second profit warning in three months", "negative"],
    ],
    "headlines": [["Gold futures climb to a three-month high as the dollar slips", "Yes"]],
    "stock_movement": [
        ["Harju Machines, +0.4% and -1.1% in two days. News: raises its guidance by 6%.", "not known: made up"],
        [
            "Daily moves in %: -0.2, -0.3, -0.6, 1.3, 0.1, 0.3, -0.5, -1.5, -1.4, -0.2\n"
            "Averages against the close in %: 5 days 1.7, 30 days 2.8",
            "not known: made up",
        ],
    ],
}
