"""Table 6 of the paper: architecture search. Candidates are ranked by training each on a small set, the proxy."""
