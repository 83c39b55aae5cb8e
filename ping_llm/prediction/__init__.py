"""What a trained model says about a pair of addresses, and how good that is."""
