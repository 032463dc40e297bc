"""What is taken away: hidden neurons, input context."""
