"""The mathematical reward: the answer in a response, and whether it is the reference's."""
