"""Judge the summaries that `evaluate` wrote."""
