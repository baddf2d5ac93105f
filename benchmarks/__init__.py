"""Side-by-side runs of quality and speed; results are the JSON files in `results/`, shown in the README."""
