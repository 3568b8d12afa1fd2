"""What the testbeds digits and mnist share: model, training, sampling, metrics, and the comparison of policies."""
