"""The numbers of the paper (arXiv 2603.08230): Table 2, Table 3, Figure 2.

JS and Brier are better low, BC and R2 high. `None`: the paper does not state it; Figure 2 draws the runs without KL
and prints no numbers.
"""

METRICS = ("js", "bc", "r2", "brier")

# table -> corpus -> row -> (JS, BC, R2, Brier)
PUBLISHED = {
    "2": {
        "iemocap": {
            "base": (0.40, 0.64, 0.51, 0.15),
            "Audio-Reasoner": (0.36, 0.67, 0.52, 0.15),
            "SFT": (0.29, 0.73, 0.60, 0.12),
            "DPO": (0.23, 0.79, 0.65, 0.09),
            "GRPO": (0.36, 0.67, 0.55, 0.13),
            "GRPOz": (0.20, 0.82, 0.67, 0.07),
        },
        "cremad": {
            "base": (0.25, 0.78, 0.54, 0.05),
            "Audio-Reasoner": (0.37, 0.69, 0.51, 0.09),
            "SFT": (0.21, 0.82, 0.57, 0.04),
            "DPO": (0.17, 0.86, 0.67, 0.03),
            "GRPO": (0.25, 0.77, 0.46, 0.04),
            "GRPOz": (0.20, 0.82, 0.68, 0.04),
        },
    },
    "3": {  # SFT on CREMA-D; "-> other" is IEMOCAP
        "cremad": {
            "SFT": (0.21, 0.82, 0.57, 0.04),
            "SFT, no CoT": (0.22, 0.81, 0.57, 0.04),
            "SFT -> other": (0.38, 0.65, 0.50, 0.15),
            "SFT, no CoT -> other": (0.52, 0.52, 0.31, 0.22),
        },
        "iemocap": {},
    },
    "figure2": {
        "iemocap": {"SFT": (0.29, 0.73, 0.60, 0.12), "DPO": (0.23, 0.79, 0.65, 0.09)},
        "cremad": {"SFT": (0.21, 0.82, 0.57, 0.04), "DPO": (0.17, 0.86, 0.67, 0.03)},
    },
}


def published(table: str, corpus: str, row: str) -> tuple[float | None, ...]:
    """(JS, BC, R2, Brier) of one row, None where the paper states nothing."""
    return PUBLISHED.get(table, {}).get(corpus, {}).get(row, (None,) * len(METRICS))
