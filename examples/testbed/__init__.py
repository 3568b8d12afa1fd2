"""What the testbeds share: model, training, sampling, metrics, and the comparison of policies."""
