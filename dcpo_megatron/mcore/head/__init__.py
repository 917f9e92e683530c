"""The output head on response positions: log-probs and entropies of a vocabulary that ranks share."""
