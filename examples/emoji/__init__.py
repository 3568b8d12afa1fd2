"""A testbed: a DiT-MoE with experts in every block, trained on small color pictures, the emoji of Twemoji."""
