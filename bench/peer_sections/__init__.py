"""The parts of bench/peers.py: what is sampled, the code that each tool asks of its user, and how it is measured."""
