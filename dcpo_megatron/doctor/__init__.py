"""What `dcpo doctor` checks of a machine, and of the ranks on it."""
