"""Okabe and Ito's colours, which the colour-blind tell apart; in this order they also differ in grey."""

BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442",
)  # fmt: skip
