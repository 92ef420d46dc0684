"""What several benchmarks are made of.

results_file.py    the JSON file of rows with hardware, versions and command, and the table that is printed
random_models.py   Llama shapes with random weights
needle_cells.py    which cells of a needle grid share a needle, and their FLOPs
"""
