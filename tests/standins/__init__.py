"""What stands for hardware that the machine of the tests lacks. Each says what it stands for."""
