"""Reports on finished runs: a comparison table and a self-contained page."""
