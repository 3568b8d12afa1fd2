"""The testbed: a small DiT-MoE trained on scikit-learn's handwritten digits."""
