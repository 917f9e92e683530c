"""Tasks that need no data set, and models that are warmed up on them: for the demo, the study and the tests."""
