"""What a run is told: the schema of its configuration, and the recipes that come with the package."""
