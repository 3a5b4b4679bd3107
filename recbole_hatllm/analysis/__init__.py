"""`run_hatllm.py analyze`: what a prompt looks like, what the layers attend to, and where two runs disagree.

Reads run folders and data, and is read by the command line alone. Every figure leaves its numbers beside it.
"""
