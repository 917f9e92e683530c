"""What a rank will hold and how long a step will take, by formula, before anything runs."""
