"""Public ECG data sets as `datasets` builders with one shared row."""
