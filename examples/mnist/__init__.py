"""A testbed: a DiT-MoE with 48 experts, trained on 5,000 images of MNIST."""
